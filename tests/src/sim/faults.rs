//! What goes wrong in a world, and how often; the network between the replicas, which is where most of it does.

use batchai_coordinator::replica::core::Core;
use batchai_coordinator::replica::store::snapshot;

use super::{Sent, Sim, Told};

/// What a world is like, and how often what goes wrong: chances for each message, or in each step.
#[derive(Clone, Debug)]
pub struct Options {
    pub replicas: u64,
    pub agents: usize,
    /// Commands that are applied before the faults heal.
    pub commands: i64,
    /// A message is lost, or comes twice.
    pub loss: f64,
    pub duplicate: f64,
    /// Steps that a message takes at most; later ones overtake earlier ones.
    pub delay: u64,
    /// A replica, or a pair of them in one direction, is cut off.
    pub cut: f64,
    /// A replica is killed.
    pub crash: f64,
    /// A replica stands still.
    pub pause: f64,
    /// An agent is killed, or its machine reboots.
    pub agent_crash: f64,
    pub reboot: f64,
}

impl Options {
    pub fn draw(random: &mut fastrand::Rng) -> Options {
        let mut chance = |most: f64| random.f64() * most;
        let (loss, duplicate) = (chance(0.1), chance(0.1));
        let (cut, crash, pause) = (chance(0.01), chance(0.006), chance(0.006));
        let (agent_crash, reboot) = (chance(0.01), chance(0.004));
        Options {
            replicas: [1, 3, 3, 3, 5][random.usize(..5)],
            agents: random.usize(2..6),
            commands: 1000,
            loss,
            duplicate,
            delay: random.u64(1..6),
            cut,
            crash,
            pause,
            agent_crash,
            reboot,
        }
    }
}

impl Sim {
    pub(super) fn fail_something(&mut self) {
        let Options {
            cut, crash, pause, ..
        } = self.options;
        let id = self.random.u64(1..=self.options.replicas);
        let step = self.step;
        if self.random.f64() < crash {
            self.stop(id);
            self.tell_gone(id);
        }
        // Also of one that is not.
        if self.random.f64() < crash {
            self.tell_gone(id);
        }
        for id in 1..=self.options.replicas {
            if self.replicas[&id].core.is_none() && self.random.f64() < 0.03 {
                self.start(id);
            }
        }
        if self.random.f64() < pause {
            let until = step + self.random.u64(1..60);
            if self.replicas[&id].core.as_ref().is_some_and(Core::leads) {
                self.checks.saw("a leader stands still");
            }
            self.replicas
                .get_mut(&id)
                .expect("it is one of them")
                .paused_until = until;
        }
        if self.random.f64() < cut {
            let until = step + self.random.u64(1..200);
            let other = self.random.u64(1..=self.options.replicas);
            if self.random.bool() {
                // One way only.
                self.cut.insert((id, other), until);
            } else {
                for other in 1..=self.options.replicas {
                    self.cut.insert((id, other), until);
                    self.cut.insert((other, id), until);
                }
            }
        }
        self.cut.retain(|_, until| *until > step);
        self.fail_agents();
    }

    /// Some of the others hear from a replica's machine that nobody listens there.
    fn tell_gone(&mut self, gone: u64) {
        for id in 1..=self.options.replicas {
            if self.is_up(id) && self.random.bool() {
                self.core(id).gone(gone);
            }
        }
    }

    /// From now on nothing goes wrong any more.
    pub(super) fn heal(&mut self) {
        self.healed = true;
        self.cut.clear();
        (self.options.loss, self.options.duplicate) = (0.0, 0.0);
        for id in 1..=self.options.replicas {
            self.replicas
                .get_mut(&id)
                .expect("it is one of them")
                .paused_until = 0;
            if self.replicas[&id].core.is_none() {
                self.start(id);
            }
        }
        self.heal_agents();
    }

    pub(super) fn deliver(&mut self) {
        let later = self.told.split_off(&(self.step + 1, 0));
        for (from, to, index, digest) in std::mem::replace(&mut self.told, later).into_values() {
            if !self.cut.contains_key(&(from, to)) && self.is_up(to) {
                self.core(to).told(from, index, digest);
            }
        }
        let later = self.messages.split_off(&(self.step + 1, 0));
        for Sent { message, snapshot } in std::mem::replace(&mut self.messages, later).into_values()
        {
            let (from, to) = (message.from, message.to);
            if self.cut.contains_key(&(from, to)) || !self.is_up(to) {
                self.tell(from, to, snapshot.is_some(), false);
                continue;
            }
            // One that came too late is refused, as on a real network.
            let Some(bytes) = snapshot else {
                let _ = self.core(to).step(message);
                continue;
            };
            let (mark, state) = snapshot::decode(&mut &bytes[..]).expect("it was just made");
            let core = self.core(to);
            let written = core.snapshots().write(&mark, &state);
            written.expect("memory is there");
            let _ = core.step_snapshot(message, mark, state);
            self.tell(from, to, true, true);
        }
    }

    pub(super) fn tell_digest(&mut self, told: Told) {
        if self.random.f64() >= self.options.loss {
            self.sent += 1;
            let arrival = self.step + self.random.u64(1..=self.options.delay);
            self.told.insert((arrival, self.sent), told);
        }
    }

    /// Who sent a snapshot learns what became of it.
    fn tell(&mut self, from: u64, to: u64, snapshot: bool, arrived: bool) {
        if snapshot && self.replicas[&from].core.is_some() {
            self.core(from).snapshot_sent(to, arrived);
        }
    }

    pub(super) fn send(&mut self, message: Sent) {
        let copies = 1 + usize::from(self.random.f64() < self.options.duplicate);
        for _ in 0..copies {
            let (from, to) = (message.message.from, message.message.to);
            if self.random.f64() < self.options.loss {
                self.tell(from, to, message.snapshot.is_some(), false);
            } else {
                self.sent += 1;
                let arrival = self.step + self.random.u64(1..=self.options.delay);
                self.messages.insert((arrival, self.sent), message.clone());
            }
        }
    }
}
