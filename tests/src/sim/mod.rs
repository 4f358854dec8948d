//! Several coordinators and agents in one thread, on a clock and a network that one seed draws.
//!
//! The replicas are production's cores on stores in memory, the leader's duties and the agents' `reconcile` are production's;
//! what stands between them (network, disks that forget nothing they were told to keep, machines) is played here. After every
//! step everything that must hold is looked at; at the end the faults heal, and every job must end.

mod agents;
mod checks;
mod clients;
mod faults;

use std::collections::{BTreeMap, BTreeSet};

use batchai_coordinator::duties::{Heard, Leader, duties};
use batchai_coordinator::replica::core::{Core, ELECTION_TICKS, Proposed, SnapshotPolicy};
use batchai_coordinator::replica::store::memory::MemoryStore;
use batchai_coordinator::replica::store::{FORMAT, LogStore as _, snapshot};
use batchai_coordinator::scheduler::explain::pending_reason;
use batchai_coordinator::state::attempts::{self, Phase};
use batchai_coordinator::state::digest::Digest;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Command, ReplicaIdentity, RequestKey, SnapshotMark};
use raft::eraftpb::Message;

use agents::Agent;
use checks::Checks;
use clients::Client;
use faults::Options;

/// Milliseconds of the clock in one step, which is a tick of every replica.
const STEP_MS: i64 = 50;
/// Steps with faults at most, and without them.
const FAULTY_STEPS_MAX: u64 = 20_000;
const HEALED_STEPS_MAX: u64 = 4_000;
/// A proposal that nothing is heard of for so long is taken for unknown.
const PATIENCE_STEPS: u64 = 100;
const ENSEMBLE: &str = "5eed0000-0000-4000-8000-000000000000";

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// Over everything that happened: the same seed gives the same.
    pub trace: u32,
    pub commands: i64,
    pub steps: u64,
    /// What was seen that a good test must see now and then.
    pub sometimes: BTreeSet<&'static str>,
}

/// Who proposed what waits for its fate.
#[derive(Clone, Debug)]
enum Asked {
    Client(usize),
    /// In which of its conversations.
    Agent(usize, u64),
    Duty,
}

/// A message on its way, and the snapshot that goes with it.
#[derive(Clone)]
struct Sent {
    message: Message,
    snapshot: Option<Vec<u8>>,
}

/// From, to, the entry, and the digest of the State there.
type Told = (u64, u64, u64, Digest);

/// One replica: its disk, and its process, if it runs.
struct Replica {
    store: MemoryStore,
    core: Option<Core<MemoryStore>>,
    lives: u64,
    /// It does nothing until then.
    paused_until: u64,
    /// The term for which the time to the next election was drawn.
    drawn: ((u64, bool), usize),
    /// When nodes were heard of, and attempts first seen to prepare.
    heard: Heard,
    waiting: BTreeMap<u64, (Asked, u64)>,
    reading: BTreeMap<u64, (i64, u64)>,
    /// A snapshot that is being written, and when that is done.
    writing: Option<(u64, SnapshotMark, batchai_coordinator::state::State)>,
}

/// The world.
pub struct Sim {
    options: Options,
    random: fastrand::Rng,
    step: u64,
    replicas: BTreeMap<u64, Replica>,
    /// By the step in which they arrive.
    messages: BTreeMap<(u64, u64), Sent>,
    told: BTreeMap<(u64, u64), Told>,
    sent: u64,
    tickets: u64,
    /// From, to, and until when nothing gets through.
    cut: BTreeMap<(u64, u64), u64>,
    agents: Vec<Agent>,
    clients: Vec<Client>,
    checks: Checks,
    healed: bool,
    /// The cluster was told to have all nodes.
    grown: bool,
}

/// Plays a seed.
///
/// # Errors
/// Says what did not hold, and when.
pub fn play(seed: u64) -> Result<Outcome, String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let options = Options::draw(&mut random);
    let mut sim = Sim::new(options, random);
    let end = sim.run();
    end.map_err(|why| format!("step {}: {why}; {:?}", sim.step, sim.options))
}

impl Sim {
    fn new(options: Options, random: fastrand::Rng) -> Sim {
        let replica = |_| Replica {
            store: MemoryStore::default(),
            core: None,
            lives: 0,
            paused_until: 0,
            drawn: ((0, false), ELECTION_TICKS),
            heard: Heard::default(),
            waiting: BTreeMap::new(),
            reading: BTreeMap::new(),
            writing: None,
        };
        let ids = 1..=options.replicas;
        let mut sim = Sim {
            replicas: ids.clone().zip(ids.map(replica)).collect(),
            agents: (0..options.agents).map(Agent::new).collect(),
            clients: (0..3).map(Client::new).collect(),
            options,
            random,
            step: 0,
            messages: BTreeMap::new(),
            told: BTreeMap::new(),
            sent: 0,
            tickets: 0,
            cut: BTreeMap::new(),
            checks: Checks::default(),
            healed: false,
            grown: false,
        };
        for id in 1..=sim.options.replicas {
            sim.start(id);
        }
        sim
    }

    fn run(&mut self) -> Result<Outcome, String> {
        let enough = self.options.commands;
        while self.checks.revision() < enough && self.step < FAULTY_STEPS_MAX {
            self.fail_something();
            self.once()?;
        }
        self.heal();
        let until = self.step + HEALED_STEPS_MAX;
        while !self.is_over() {
            if self.step > until {
                return Err(format!("no end: {}", self.why_not_over()));
            }
            self.once()?;
        }
        self.checks.at_the_end(&mut self.replicas)?;
        Ok(Outcome {
            trace: self.checks.trace(),
            commands: self.checks.revision(),
            steps: self.step,
            sometimes: self.checks.sometimes.clone(),
        })
    }

    /// One step of everybody.
    fn once(&mut self) -> Result<(), String> {
        self.step += 1;
        self.deliver();
        let ids: Vec<_> = self.replicas.keys().copied().collect();
        for id in &ids {
            if self.is_up(*id) {
                self.tick(*id);
                self.settle(*id)?;
                self.lead(*id);
                self.settle(*id)?;
                self.save(*id);
            }
        }
        self.step_agents();
        self.step_clients();
        for id in ids {
            if self.is_up(id) {
                self.settle(id)?;
            }
        }
        self.checks.step(&self.agents)
    }

    fn now(&self) -> i64 {
        1_000_000 + self.step as i64 * STEP_MS
    }

    fn is_up(&self, id: u64) -> bool {
        let replica = &self.replicas[&id];
        replica.core.is_some() && replica.paused_until <= self.step
    }

    fn core(&mut self, id: u64) -> &mut Core<MemoryStore> {
        let core = self
            .replicas
            .get_mut(&id)
            .and_then(|replica| replica.core.as_mut());
        core.expect("it is up")
    }

    /// Starts a replica on what its disk has.
    fn start(&mut self, id: u64) {
        let voters = self.replicas.keys().copied().collect();
        let now = self.now();
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let recovered = replica.store.recover(ReplicaIdentity {
            format: FORMAT,
            ensemble: ENSEMBLE.into(),
            replica_id: id,
            voters,
            store: format!("store-{id}"),
        });
        if recovered.snapshot.is_some() {
            self.checks.saw("a replica starts from a snapshot");
        }
        let policy = SnapshotPolicy {
            entries: 100,
            kept: 10,
            ..SnapshotPolicy::default()
        };
        replica.lives += 1;
        let core = Core::new(replica.store.clone(), recovered, replica.lives, policy);
        replica.core = Some(core.expect("what was kept can be read"));
        replica.heard = Heard {
            now,
            ..Heard::default()
        };
    }

    /// A replica is gone, with everything that it did not have on disk.
    fn stop(&mut self, id: u64) {
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        if let Some(core) = replica.core.take()
            && core.leads()
        {
            let preparing = attempts::live(core.state()).any(|a| a.phase == Phase::Preparing);
            if preparing {
                self.checks
                    .saw("a leader is lost while an attempt prepares");
            }
        }
        replica.writing = None;
        replica.reading.clear();
        let waiting = std::mem::take(&mut replica.waiting);
        for (asked, _) in waiting.into_values() {
            self.answer(asked, &Proposed::Unknown);
        }
    }

    fn tick(&mut self, id: u64) {
        let most = 2 * ELECTION_TICKS;
        let ticks = self.random.usize(ELECTION_TICKS..most);
        let again = self.random.f64() < 0.05;
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let core = replica.core.as_mut().expect("it is up");
        // Raft draws for itself whenever it begins anew; what it drew is not looked at before a tick.
        if replica.drawn.0 != core.term() || again {
            replica.drawn = (core.term(), ticks);
        }
        core.set_election_timeout(replica.drawn.1);
        core.tick();
    }

    /// Lets a replica do all it can, and passes on what came of it.
    fn settle(&mut self, id: u64) -> Result<(), String> {
        loop {
            let mut messages = Vec::new();
            let core = self.core(id);
            let output = core.ready(&mut |mut sent| messages.append(&mut sent));
            let output = output.map_err(|error| format!("replica {id}: {error}"))?;
            let more = core.has_ready();
            let sent = messages.into_iter().map(|message| Sent {
                snapshot: core.snapshot_of(&message).map(|(mark, state)| {
                    let mut bytes = Vec::new();
                    snapshot::encode(&mut bytes, &mark, &state).expect("memory is there");
                    bytes
                }),
                message,
            });
            for sent in sent.collect::<Vec<_>>() {
                self.send(sent);
            }
            for (to, index, digest) in output.digests {
                self.checks.compared(id, index, digest)?;
                self.tell_digest((id, to, index, digest));
            }
            if output.jumped.is_some() {
                self.checks.saw("a follower gets a snapshot");
            }
            self.checks
                .applied(id, self.replicas[&id].core.as_ref().expect("it is up"))?;
            for (ticket, proposed) in output.proposals {
                let replica = self.replicas.get_mut(&id).expect("it is one of them");
                if let Some((asked, _)) = replica.waiting.remove(&ticket) {
                    self.answer(asked, &proposed);
                }
            }
            for ticket in output.reads {
                let replica = self.replicas.get_mut(&id).expect("it is one of them");
                if let Some((least, _)) = replica.reading.remove(&ticket) {
                    let state = replica.core.as_ref().expect("it is up").state();
                    if state.revision < least {
                        return Err(format!("stale_read: {} of {least}", state.revision));
                    }
                    self.checks.saw("a read is answered");
                }
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// A leader does its duties.
    fn lead(&mut self, id: u64) {
        let now = self.now();
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let core = replica.core.as_ref().expect("it is up");
        let step = self.step;
        let mut given_up = Vec::new();
        replica.waiting.retain(|_, (asked, since)| {
            let keep = *since + PATIENCE_STEPS > step;
            if !keep {
                given_up.push(asked.clone());
            }
            keep
        });
        replica
            .reading
            .retain(|_, (_, since)| *since + PATIENCE_STEPS > step);
        let mut kinds = Vec::new();
        if core.leads()
            && step.is_multiple_of(4)
            && !replica
                .waiting
                .values()
                .any(|(a, _)| matches!(a, Asked::Duty))
        {
            let state = core.state();
            let live = attempts::live(state).map(|a| a.id.clone());
            let since = live.map(|id| {
                let since = replica.heard.preparing.get(&id).copied().unwrap_or(now);
                (id, since)
            });
            replica.heard.preparing = since.collect();
            replica.heard.now = now;
            let leader = Leader {
                replica: id as i64,
                ensemble: ENSEMBLE.into(),
                replicas: Vec::new(),
                lease_ms: 600_000,
            };
            kinds = duties(state, &replica.heard, &leader);
        }
        for asked in given_up {
            self.answer(asked, &Proposed::Unknown);
        }
        for kind in kinds {
            self.propose(id, kind, None, Asked::Duty);
        }
    }

    /// Snapshots take their time, and are of use only when they are there.
    fn save(&mut self, id: u64) {
        let done = self.step + self.random.u64(1..20);
        let step = self.step;
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let core = replica.core.as_mut().expect("it is up");
        match replica.writing.take() {
            Some((due, mark, state)) if due <= step => {
                // A snapshot from a peer may have come first.
                if core.snapshot_due(false).is_some() {
                    replica
                        .store
                        .snapshots()
                        .write(&mark, &state)
                        .expect("memory is there");
                    core.compact(&mark, state).expect("memory is there");
                }
            }
            Some(later) => replica.writing = Some(later),
            None => {
                let due = core.snapshot_due(false);
                replica.writing = due.map(|(mark, state)| (done, mark, state));
            }
        }
    }

    /// Proposes something to a replica; `false` where it says at once that it cannot.
    fn propose(&mut self, id: u64, kind: Kind, request: Option<RequestKey>, asked: Asked) -> bool {
        self.tickets += 1;
        let (ticket, step) = (self.tickets, self.step);
        let command = Command {
            time: Some(batchai_common::time::from_millis(self.now())),
            request,
            kind: Some(kind),
        };
        if !self.core(id).propose(&[(ticket, command)]).is_empty() {
            return false;
        }
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        replica.waiting.insert(ticket, (asked, step));
        true
    }

    fn answer(&mut self, asked: Asked, proposed: &Proposed) {
        if matches!(proposed, Proposed::Unknown) {
            self.checks.saw("what became of a proposal is not known");
        }
        match asked {
            Asked::Client(i) => self.answer_client(i, proposed),
            Asked::Agent(i, conversation) => self.agents[i].answer(conversation, proposed),
            Asked::Duty => {}
        }
    }

    /// A replica that says that it leads, as far as somebody who tries them in some order finds one.
    fn find_leader(&mut self) -> Option<u64> {
        let mut ids: Vec<_> = self.replicas.keys().copied().collect();
        self.random.shuffle(&mut ids);
        let leads = |id: &u64| self.replicas[id].core.as_ref().is_some_and(Core::leads);
        ids.into_iter().filter(|id| self.is_up(*id)).find(leads)
    }

    fn is_over(&self) -> bool {
        self.why_not_over().is_empty()
    }

    fn why_not_over(&self) -> String {
        let mut states = self
            .replicas
            .values()
            .filter_map(|r| Some(r.core.as_ref()?.state()));
        let Some(first) = states.next() else {
            return "nobody runs".to_owned();
        };
        if states.any(|other| other.applied_index != first.applied_index) {
            return "a replica is behind".to_owned();
        }
        let open = first.jobs.values().find(|job| !job.ended());
        match open {
            Some(job) => {
                let why = pending_reason(first, &Heard::default(), job);
                let nodes: Vec<_> = first
                    .nodes
                    .values()
                    .map(|n| (n.cluster.is_some(), n.leaving, n.attempt.clone()))
                    .collect();
                format!("{} is {:?}: {why}; {nodes:?}", job.spec.name, job.state)
            }
            None if !self.grown || self.clients.iter().any(Client::is_busy) => {
                "a client waits".to_owned()
            }
            None => String::new(),
        }
    }
}
