//! One replica: its machine and disk, and the process on it, if it runs, which does what production's thread and leader do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use batchai_coordinator::agents::contacts::Contacts;
use batchai_coordinator::agents::lease::Leases;
use batchai_coordinator::agents::upward::Upward;
use batchai_coordinator::duties::{Heard, Leader, duties};
use batchai_coordinator::replica::ReplicaError;
use batchai_coordinator::replica::core::{
    Core, CoreError, ELECTION_TICKS, Output, Proposed, SnapshotPolicy,
};
use batchai_coordinator::replica::peers::Peers;
use batchai_coordinator::replica::store::FORMAT;
use batchai_coordinator::state::State;
use batchai_coordinator::state::agreement::FEATURE_LEVEL;
use batchai_coordinator::state::attempts::{self, Phase};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{Command, PeerHello, ReplicaIdentity, RequestKey, SnapshotMark};
use raft::eraftpb::Message;

use super::clocks::Clock;
use super::disk::{Disk, Went};
use super::faults::Options;
use super::leases::LEASE_MS;
use super::network::{Book, Sent};
use super::relay::{Held, Stream};
use super::sessions::Serving;
use super::{Asked, ENSEMBLE, Sim};

/// A proposal that nothing is heard of for so long is taken for unknown.
pub const PATIENCE_STEPS: u64 = 100;

/// Where a replica is reached.
pub fn endpoint(id: u64) -> String {
    format!("https://replica-{id}:1")
}

/// What waits for leave to read.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The State must have at least this revision.
    pub least: i64,
    pub since: u64,
    /// Who of those whose history is judged, and in which of his moments.
    pub user: Option<(usize, u64)>,
    /// It is for leases.
    pub lease: bool,
}

/// A session waits for leave to read.
pub type Opening = (String, u64);

/// One replica.
pub struct Replica {
    pub disk: Disk,
    pub core: Option<Core<Disk>>,
    pub clock: Clock,
    /// Whom it met in this life.
    pub peers: Peers,
    pub met: BTreeSet<u64>,
    /// Whom it can send to.
    pub book: Option<Book>,
    lives: u64,
    /// It does nothing until then.
    pub paused_until: u64,
    /// Its disk is lost, or it was removed and knows it: it never runs again.
    pub over: bool,
    /// The term for which the time to the next election was drawn.
    drawn: ((u64, bool), usize),
    /// When nodes were heard of, and attempts first seen to prepare.
    pub heard: Heard,
    pub leases: Leases,
    pub contacts: Contacts,
    /// The agents' sessions that it has, by node.
    pub sessions: BTreeMap<String, Serving>,
    /// What the leader is told of them, and over what.
    pub upward: Upward,
    pub stream: Option<Stream>,
    /// Where it leads: the sessions of other replicas, by the stream that told of them.
    pub branches: BTreeMap<(u64, u64), Held>,
    /// Sessions that wait for leave to read.
    pub openings: BTreeMap<u64, Opening>,
    pub waiting: BTreeMap<u64, (Asked, u64)>,
    pub reading: BTreeMap<u64, Reading>,
    /// A snapshot that is being written, and when that is done.
    writing: Option<(u64, SnapshotMark, State)>,
}

fn hello(id: u64) -> PeerHello {
    PeerHello {
        epoch: 0,
        ensemble: ENSEMBLE.into(),
        from: id,
        to: 0,
        store: format!("store-{id}"),
        endpoint: endpoint(id),
        version: String::new(),
        feature_level: FEATURE_LEVEL,
    }
}

/// As production's callers get it.
fn result(proposed: &Proposed) -> Result<i64, ReplicaError> {
    match proposed {
        Proposed::Applied(Ok(revision)) => Ok(*revision),
        Proposed::Applied(Err(rejection)) => Err(rejection.clone().into()),
        Proposed::NotLeader => Err(ReplicaError::NotLeader),
        Proposed::Unknown => Err(ReplicaError::Unknown),
    }
}

impl Replica {
    pub fn new(id: u64, random: &mut fastrand::Rng, options: &Options) -> Replica {
        Replica {
            disk: Disk::default(),
            core: None,
            clock: Clock::draw(random, options.clock > 0.0),
            peers: Peers::new(hello(id)),
            met: BTreeSet::new(),
            book: None,
            lives: 0,
            paused_until: 0,
            over: false,
            drawn: ((0, false), ELECTION_TICKS),
            heard: Heard::default(),
            leases: Leases::default(),
            contacts: Contacts::default(),
            sessions: BTreeMap::new(),
            upward: Upward::default(),
            stream: None,
            branches: BTreeMap::new(),
            openings: BTreeMap::new(),
            waiting: BTreeMap::new(),
            reading: BTreeMap::new(),
            writing: None,
        }
    }

    fn leads(&self) -> bool {
        self.core.as_ref().is_some_and(Core::leads)
    }
}

impl Sim {
    pub(super) fn is_up(&self, id: u64) -> bool {
        let replica = &self.replicas[&id];
        replica.core.is_some() && replica.paused_until <= self.step
    }

    pub(super) fn leads(&self, id: u64) -> bool {
        self.is_up(id) && self.replicas[&id].leads()
    }

    pub(super) fn replica(&mut self, id: u64) -> &mut Replica {
        self.replicas.get_mut(&id).expect("it is one of them")
    }

    pub(super) fn core(&mut self, id: u64) -> &mut Core<Disk> {
        self.replica(id).core.as_mut().expect("it is up")
    }

    /// Those there ever were.
    pub(super) fn ids(&self) -> Vec<u64> {
        self.replicas.keys().copied().collect()
    }

    /// Starts a replica on what its disk has. Also one that comes later is told of those that were first, as production's are.
    pub(super) fn start(&mut self, id: u64) {
        let (voters, step) = (self.ensemble.first.clone(), self.step);
        let replica = self.replica(id);
        let recovered = replica.disk.recover(ReplicaIdentity {
            format: FORMAT,
            ensemble: ENSEMBLE.into(),
            replica_id: id,
            voters,
            store: format!("store-{id}"),
        });
        let from_snapshot = recovered.snapshot.is_some();
        let policy = SnapshotPolicy {
            entries: 100,
            kept: 10,
            ..SnapshotPolicy::default()
        };
        replica.lives += 1;
        let core = Core::new(replica.disk.clone(), recovered, replica.lives, policy);
        replica.core = Some(core.expect("what was kept can be read"));
        replica.peers = Peers::new(hello(id));
        replica.met.clear();
        replica.book = None;
        replica.leases = Leases::default();
        replica.heard = Heard {
            now: replica.clock.boot(step),
            ..Heard::default()
        };
        if from_snapshot {
            self.checks.saw("a replica starts from a snapshot");
        }
    }

    /// A replica is gone, with everything that it did not have on disk.
    pub(super) fn stop(&mut self, id: u64) {
        let replica = self.replica(id);
        let core = replica.core.take();
        replica.writing = None;
        replica.reading.clear();
        replica.openings.clear();
        replica.sessions.clear();
        replica.branches.clear();
        replica.stream = None;
        (replica.contacts, replica.upward) = (Contacts::default(), Upward::default());
        replica.disk.trouble(None);
        replica.disk.take();
        let waiting = std::mem::take(&mut replica.waiting);
        if let Some(core) = core.filter(Core::leads) {
            let preparing = attempts::live(core.state()).any(|a| a.phase == Phase::Preparing);
            if preparing {
                self.checks
                    .saw("a leader is lost while an attempt prepares");
            }
        }
        for (asked, _) in waiting.into_values() {
            self.answer(asked, &Proposed::Unknown);
        }
    }

    pub(super) fn tick(&mut self, id: u64) {
        let most = 2 * ELECTION_TICKS;
        let ticks = self.random.usize(ELECTION_TICKS..most);
        let again = self.random.f64() < 0.05;
        let replica = self.replica(id);
        let core = replica.core.as_mut().expect("it is up");
        // Raft draws for itself whenever it begins anew; what it drew is not looked at before a tick.
        if replica.drawn.0 != core.term() || again {
            replica.drawn = (core.term(), ticks);
        }
        core.set_election_timeout(replica.drawn.1);
        core.tick();
    }

    /// Lets a replica do all it can, and passes on what came of it.
    pub(super) fn settle(&mut self, id: u64) -> Result<(), String> {
        loop {
            // Whether each was sent before the write, or relies on it.
            let mut messages = Vec::new();
            let replica = self.replica(id);
            let (disk, core) = (&replica.disk, replica.core.as_mut().expect("it is up"));
            let output = core.ready(&mut |sent: Vec<Message>| {
                let written = disk.went().written;
                messages.extend(sent.into_iter().map(|message| (message, written)));
            });
            let more = core.has_ready();
            let named = messages.into_iter().map(|(message, written)| {
                let named = core.snapshot_of(&message);
                (message, named, written)
            });
            let named: Vec<_> = named.collect();
            let went = disk.take();
            for (message, named, written) in named {
                let later = if written { went.slow } else { 0 };
                self.send(Sent::new(message, named), later);
            }
            let output = match output {
                Ok(output) => output,
                Err(error) => return self.fell(id, went, &error),
            };
            self.pass_on(id, output)?;
            if went.slow > 0 {
                self.checks.saw("a disk is slow");
                self.replica(id).paused_until = self.step + went.slow;
                return Ok(());
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// A replica could not go on.
    fn fell(&mut self, id: u64, went: Went, error: &CoreError) -> Result<(), String> {
        let Some(torn) = went.died else {
            return Err(format!("replica {id}: {error}"));
        };
        self.checks.saw("a replica dies amid a write");
        if torn {
            self.checks.saw("a write is torn");
        }
        self.stop(id);
        self.tell_gone(id);
        Ok(())
    }

    fn pass_on(&mut self, id: u64, output: Output) -> Result<(), String> {
        for (to, index, digest) in output.digests {
            self.checks.compared(id, index, digest)?;
            self.tell_digest((id, to, index, digest));
        }
        if output.jumped.is_some() {
            self.checks.saw("a follower gets a snapshot");
        }
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let core = replica.core.as_mut().expect("it is up");
        self.checks.applied(id, core, &replica.heard)?;
        for (ticket, proposed) in output.proposals {
            if let Some((asked, _)) = self.replica(id).waiting.remove(&ticket) {
                self.answer(asked, &proposed);
            }
        }
        for ticket in output.reads {
            if let Some(opening) = self.replica(id).openings.remove(&ticket) {
                self.admit(id, opening);
            }
            if let Some(reading) = self.replica(id).reading.remove(&ticket) {
                if reading.lease {
                    self.end_round(id, true);
                    continue;
                }
                let state = self.core(id).state().clone();
                if state.revision < reading.least {
                    let (is, least) = (state.revision, reading.least);
                    return Err(format!("stale_read: {is} of {least}"));
                }
                self.checks.saw("a read is answered");
                if let Some(user) = reading.user {
                    self.show(user, &state);
                }
            }
        }
        Ok(())
    }

    /// A leader does its duties.
    pub(super) fn lead(&mut self, id: u64) {
        let step = self.step;
        let replica = self.replica(id);
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
            .retain(|_, reading| reading.since + PATIENCE_STEPS > step);
        let busy = |replica: &Replica| {
            let mut waiting = replica.waiting.values();
            waiting.any(|(asked, _)| matches!(asked, Asked::Duty))
        };
        let due = replica.leads() && step.is_multiple_of(4) && !busy(replica);
        for asked in given_up {
            self.answer(asked, &Proposed::Unknown);
        }
        if due {
            let duties = self.duties(id);
            self.note_losses(&duties);
            let losing = duties.iter().filter_map(|duty| match duty {
                Kind::LoseNode(lost) => Some(lost.node.clone()),
                _ => None,
            });
            self.replica(id).contacts.hold(losing.collect());
            for kind in duties {
                self.propose(id, kind, None, Asked::Duty);
            }
        }
    }

    fn duties(&mut self, id: u64) -> Vec<Kind> {
        let (step, first) = (self.step, self.ensemble.first.clone());
        let replica = self.replica(id);
        let (boot, wall) = (replica.clock.boot(step), replica.clock.wall(step));
        let state = replica.core.as_ref().expect("it is up").state();
        let mut since = std::mem::take(&mut replica.heard.since);
        let heard = replica.contacts.heard(boot, wall);
        since.look(state, &heard);
        replica.heard = Heard { since, ..heard };
        let granted = replica.leases.granted();
        replica.heard.leading = granted.map(|(term, since, _)| (term, since));
        replica.heard.granted = Arc::new(granted.map_or(BTreeMap::new(), |(_, _, g)| g.clone()));
        let term = replica.core.as_ref().map(|core| core.term().0);
        replica.heard.leading = replica.heard.leading.filter(|(of, _)| Some(*of) == term);
        replica.heard.replicas = replica.peers.records();
        let first = first
            .into_iter()
            .map(|id| batchai_proto::internal::v1::Replica {
                id,
                role: Role::Voter as i32,
                endpoint: endpoint(id),
                ..Default::default()
            });
        let leader = Leader {
            replica: id as i64,
            ensemble: ENSEMBLE.into(),
            replicas: first.collect(),
            lease_ms: LEASE_MS,
        };
        duties(state, &replica.heard, &leader)
    }

    /// Snapshots take their time, and are of use only when they are there.
    pub(super) fn save(&mut self, id: u64) {
        let done = self.step + self.random.u64(1..20);
        let step = self.step;
        let replica = self.replica(id);
        let core = replica.core.as_mut().expect("it is up");
        match replica.writing.take() {
            Some((due, mark, state)) if due <= step => {
                // A snapshot from a peer may have come first.
                if core.snapshot_due(false).is_some() {
                    let written = core.snapshots().write(&mark, &state);
                    written.expect("memory is there");
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
    pub(super) fn propose(
        &mut self,
        id: u64,
        kind: Kind,
        request: Option<RequestKey>,
        asked: Asked,
    ) -> bool {
        self.tickets += 1;
        let (ticket, step) = (self.tickets, self.step);
        let wall = self.replicas[&id].clock.wall(step);
        let command = Command {
            time: Some(batchai_common::time::from_millis(wall)),
            request,
            kind: Some(kind),
        };
        if !self.core(id).propose(&[(ticket, command)]).is_empty() {
            return false;
        }
        self.replica(id).waiting.insert(ticket, (asked, step));
        true
    }

    pub(super) fn answer(&mut self, asked: Asked, proposed: &Proposed) {
        if matches!(proposed, Proposed::Unknown) {
            self.checks.saw("what became of a proposal is not known");
        }
        match asked {
            Asked::Client(i) => self.answer_client(i, proposed),
            Asked::User(i, moment) => self.answer_user(i, moment, proposed),
            Asked::Session(id, node, conversation) => {
                self.answer_session(id, &node, conversation, result(proposed));
            }
            Asked::Relayed(from, stream, ticket) => {
                self.send_back(from, stream, ticket, result(proposed));
            }
            Asked::Admin(role) => self.answer_admin(role, proposed),
            Asked::Decision(what) if matches!(proposed, Proposed::Applied(Ok(_))) => {
                self.checks.saw(what);
            }
            // What is not done yet is seen by the State.
            Asked::Decision(_) | Asked::Duty => {}
        }
    }

    /// A replica that says that it leads, as far as somebody who tries them in some order finds one.
    pub(super) fn find_leader(&mut self) -> Option<u64> {
        let leading = self.replicas.keys().copied();
        let leading = leading.filter(|id| self.leads(*id));
        let leading: Vec<_> = leading.collect();
        self.random.choice(leading)
    }
}
