//! What goes wrong in a world, and how often; of the network, `network` sees to what happens to single messages.

use batchai_coordinator::replica::core::Core;

use super::Sim;
use super::disk::Trouble;

/// Their States are large, and every look at one takes longer.
const OLD_ONE_IN: u32 = 12;

/// What a world is like, and how often what goes wrong: chances for each message, or in each step.
#[derive(Clone, Debug)]
pub struct Options {
    /// Replicas that are there first, and that there shall be.
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
    /// A replica is cut off together with some agents.
    pub isolation: f64,
    /// A replica is killed.
    pub crash: f64,
    /// A replica dies amid its next write.
    pub torn: f64,
    /// The next write of a replica takes long.
    pub slow: f64,
    /// A replica stands still.
    pub pause: f64,
    /// The clock of a replica's machine jumps; where none ever does, all are right.
    pub clock: f64,
    /// The membership is changed, another one is to lead, or a disk is lost for good.
    pub change: f64,
    /// An agent is killed, or its machine reboots.
    pub agent_crash: f64,
    pub reboot: f64,
    /// The disk of file servers is not mounted for some time, and what serves them dies.
    pub storage: f64,
    /// Everything that the replicas have is lost, and a backup is restored.
    pub restore: f64,
    /// It begins as one that has been written to for long.
    pub old: bool,
}

impl Options {
    pub fn draw(random: &mut fastrand::Rng) -> Options {
        let mut chance = |most: f64| random.f64() * most;
        let (loss, duplicate) = (chance(0.1), chance(0.1));
        let (cut, isolation) = (chance(0.01), chance(0.004));
        let (crash, pause) = (chance(0.006), chance(0.006));
        let (torn, slow) = (chance(0.004), chance(0.01));
        let (agent_crash, reboot) = (chance(0.01), chance(0.004));
        // Not in every world: what goes wrong without them must be seen as well.
        let now_and_then = |random: &mut fastrand::Rng, most: f64| match random.bool() {
            true => random.f64() * most,
            false => 0.0,
        };
        let (clock, change) = (now_and_then(random, 0.01), now_and_then(random, 0.02));
        // Drawn apart: worlds without restores stay what they were before there were any.
        let mut apart = random.clone().fork();
        let restore = now_and_then(&mut apart, 0.001);
        let old = apart.u32(..OLD_ONE_IN) == 0;
        let storage = now_and_then(&mut apart, 0.01);
        Options {
            replicas: [1, 3, 3, 3, 5][random.usize(..5)],
            agents: random.usize(2..6),
            commands: 1000,
            loss,
            duplicate,
            delay: random.u64(1..6),
            cut,
            isolation,
            crash,
            torn,
            slow,
            pause,
            clock,
            change,
            agent_crash,
            reboot,
            storage,
            restore,
            old,
        }
    }

    /// Nothing goes wrong.
    pub fn quiet(replicas: u64, agents: usize) -> Options {
        Options {
            replicas,
            agents,
            commands: 0,
            loss: 0.0,
            duplicate: 0.0,
            delay: 1,
            cut: 0.0,
            isolation: 0.0,
            crash: 0.0,
            torn: 0.0,
            slow: 0.0,
            pause: 0.0,
            clock: 0.0,
            change: 0.0,
            agent_crash: 0.0,
            reboot: 0.0,
            storage: 0.0,
            restore: 0.0,
            old: false,
        }
    }

    /// Half as much goes wrong: in the worst worlds nothing would ever be done.
    pub fn soften(&mut self) {
        let often = [
            &mut self.loss,
            &mut self.cut,
            &mut self.isolation,
            &mut self.crash,
            &mut self.torn,
            &mut self.slow,
            &mut self.pause,
        ];
        for chance in often {
            *chance /= 2.0;
        }
    }
}

impl Sim {
    pub(super) fn fail_something(&mut self) {
        let Some(id) = self.random.choice(self.ids()) else {
            return;
        };
        self.fail_process(id);
        self.fail_machine(id);
        self.fail_ways(id);
        self.network.mend(self.step);
        self.fail_agents();
    }

    fn fail_process(&mut self, id: u64) {
        let crash = self.options.crash;
        if self.random.f64() < crash {
            self.stop(id);
            self.tell_gone(id);
        }
        // Also of one that is not.
        if self.random.f64() < crash {
            self.tell_gone(id);
        }
        for id in self.ids() {
            let replica = &self.replicas[&id];
            if !replica.over && replica.core.is_none() && self.random.f64() < 0.03 {
                self.start(id);
            }
        }
        if self.random.f64() < self.options.pause {
            let until = self.step + self.random.u64(1..60);
            if self.replicas[&id].core.as_ref().is_some_and(Core::leads) {
                self.checks.saw("a leader stands still");
            }
            self.replica(id).paused_until = until;
        }
    }

    fn fail_machine(&mut self, id: u64) {
        if self.random.f64() < self.options.torn {
            let trouble = match self.random.u32(..3) {
                0 => Trouble::Lost,
                1 => Trouble::Torn(1000),
                _ => Trouble::Torn(self.random.usize(..1000)),
            };
            self.replica(id).disk.trouble(Some(trouble));
        }
        if self.random.f64() < self.options.slow {
            let steps = self.random.u64(1..40);
            self.replica(id).disk.trouble(Some(Trouble::Slow(steps)));
        }
        if self.random.f64() < self.options.clock {
            self.jump(id);
        }
    }

    fn fail_ways(&mut self, id: u64) {
        let step = self.step;
        if self.random.f64() < self.options.cut {
            let until = step + self.random.u64(1..200);
            let other = self.random.choice(self.ids()).unwrap_or(id);
            if self.random.bool() {
                // One way only.
                self.network.cut(id, other, until);
            } else {
                self.cut_off(id, until);
            }
        }
        if self.random.f64() < self.options.isolation {
            let until = step + self.random.u64(1..300);
            self.cut_off(id, until);
            let follows = self.is_up(id) && !self.leads(id);
            let mut talking = false;
            for i in 0..self.agents.len() {
                if self.random.bool() {
                    talking |= self.agents[i].is_talking();
                    self.agents[i].isolate(id, until);
                }
            }
            if follows && talking {
                self.checks
                    .saw("a follower is cut off together with agents");
            }
        }
    }

    fn cut_off(&mut self, id: u64, until: u64) {
        for other in self.ids() {
            self.network.cut(id, other, until);
            self.network.cut(other, id, until);
        }
    }

    /// From now on nothing goes wrong any more.
    pub(super) fn heal(&mut self) {
        self.healed = true;
        self.network.heal();
        (self.options.loss, self.options.duplicate) = (0.0, 0.0);
        for id in self.ids() {
            let replica = self.replica(id);
            replica.paused_until = 0;
            replica.disk.trouble(None);
            if replica.core.is_none() && !replica.over {
                self.start(id);
            }
        }
        self.heal_agents();
    }
}
