//! The network between the replicas: what is lost, doubled, late and overtaken, and who takes a message from whom.
//!
//! Whom a replica reaches, and whom it listens to, production's `Peers` says. Connections are not played: what they swallow is lost.

use std::collections::{BTreeMap, BTreeSet};

use batchai_common::error::ApiError;
use batchai_coordinator::replica::store::snapshot;
use batchai_coordinator::state::State;
use batchai_coordinator::state::digest::Digest;
use batchai_proto::internal::v1::SnapshotMark;
use raft::eraftpb::{Message, MessageType};

use super::Sim;
use super::replicas::endpoint;

/// A message on its way, and the snapshot that goes with it.
#[derive(Clone)]
pub struct Sent {
    message: Message,
    snapshot: Option<Vec<u8>>,
}

impl Sent {
    pub fn new(message: Message, named: Option<(SnapshotMark, State)>) -> Sent {
        let snapshot = named.map(|(mark, state)| {
            let mut bytes = Vec::new();
            snapshot::encode(&mut bytes, &mark, &state).expect("memory is there");
            bytes
        });
        Sent { message, snapshot }
    }
}

/// From, to, the entry, and the digest of the State there.
pub type Told = (u64, u64, u64, Digest);

/// Whom a replica can send to, and what that was made of: a State and so many that it met.
pub struct Book {
    state: State,
    met: usize,
    reached: BTreeSet<u64>,
}

/// What is on its way, by the step in which it arrives, and what does not get through.
#[derive(Default)]
pub struct Network {
    messages: BTreeMap<(u64, u64), Sent>,
    told: BTreeMap<(u64, u64), Told>,
    sent: u64,
    /// From, to, and until when nothing gets through.
    cut: BTreeMap<(u64, u64), u64>,
}

impl Network {
    pub fn cut(&mut self, from: u64, to: u64, until: u64) {
        self.cut.insert((from, to), until);
    }

    /// What was cut until now is whole again.
    pub fn mend(&mut self, step: u64) {
        self.cut.retain(|_, until| *until > step);
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        self.cut.contains_key(&(from, to))
    }

    fn next(&mut self) -> u64 {
        self.sent += 1;
        self.sent
    }
}

impl Sim {
    pub(super) fn deliver(&mut self) {
        let later = self.network.told.split_off(&(self.step + 1, 0));
        let told = std::mem::replace(&mut self.network.told, later);
        for (from, to, index, digest) in told.into_values() {
            if self.listens(from, to) {
                self.core(to).told(from, index, digest);
            }
        }
        let later = self.network.messages.split_off(&(self.step + 1, 0));
        let messages = std::mem::replace(&mut self.network.messages, later);
        for Sent { message, snapshot } in messages.into_values() {
            let (from, to) = (message.from, message.to);
            if !self.listens(from, to) {
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

    /// Whether something that comes from a replica is taken in by another one.
    pub(super) fn listens(&mut self, from: u64, to: u64) -> bool {
        if self.network.is_cut(from, to) || !self.is_up(to) {
            return false;
        }
        let theirs = self.replicas[&from].peers.clone();
        let hello = theirs.own();
        let replica = self.replica(to);
        let state = replica.core.as_ref().expect("it is up").state();
        match replica.peers.check_known(state, hello) {
            Ok(()) => {
                replica.peers.heard(hello);
                replica.met.insert(from);
                true
            }
            Err(ApiError::Expelled { .. }) => {
                // It is told so, and ends.
                if !self.network.is_cut(to, from) && self.is_up(from) {
                    self.stop(from);
                    self.replica(from).over = true;
                    self.checks.saw("a removed replica is told so");
                }
                false
            }
            Err(_) => false,
        }
    }

    /// Whether a replica knows where another one is.
    fn reaches(&mut self, from: u64, to: u64) -> bool {
        let first = 1..=self.options.replicas;
        let replica = self.replica(from);
        let Some(core) = &replica.core else {
            return false;
        };
        let (state, met) = (core.state(), replica.met.len());
        let same = |book: &Book| {
            let known = &book.state.replicas;
            book.met == met && (known.ptr_eq(&state.replicas) || *known == state.replicas)
        };
        if !replica.book.as_ref().is_some_and(same) {
            let first = first.map(|id| (id, endpoint(id))).collect();
            let reached = replica.peers.book(&first, state).into_keys().collect();
            let state = state.clone();
            replica.book = Some(Book {
                state,
                met,
                reached,
            });
        }
        let book = replica.book.as_ref();
        book.is_some_and(|book| book.reached.contains(&to))
    }

    pub(super) fn tell_digest(&mut self, told: Told) {
        if self.random.f64() >= self.options.loss && self.reaches(told.0, told.1) {
            let arrival = self.step + self.random.u64(1..=self.options.delay);
            let place = (arrival, self.network.next());
            self.network.told.insert(place, told);
        }
    }

    /// Who sent a snapshot learns what became of it.
    fn tell(&mut self, from: u64, to: u64, snapshot: bool, arrived: bool) {
        if snapshot && self.replicas[&from].core.is_some() {
            self.core(from).snapshot_sent(to, arrived);
        }
    }

    /// Sends a message, so many steps from now.
    pub(super) fn send(&mut self, message: Sent, later: u64) {
        let (from, to) = (message.message.from, message.message.to);
        if message.message.get_msg_type() == MessageType::MsgRequestVote {
            self.checks.campaigns(message.message.term, from);
        }
        if !self.replicas.contains_key(&to) || !self.reaches(from, to) {
            self.tell(from, to, message.snapshot.is_some(), false);
            if self.replicas[&from].core.is_some() {
                self.core(from).unreachable(to);
            }
            return;
        }
        if message.snapshot.is_some() && self.is_changing(from) {
            self.checks
                .saw("a snapshot travels during a change of the membership");
        }
        let copies = 1 + usize::from(self.random.f64() < self.options.duplicate);
        for _ in 0..copies {
            if self.random.f64() < self.options.loss {
                self.tell(from, to, message.snapshot.is_some(), false);
            } else {
                let arrival = self.step + later + self.random.u64(1..=self.options.delay);
                let place = (arrival, self.network.next());
                self.network.messages.insert(place, message.clone());
            }
        }
    }

    /// Some of the others hear from a replica's machine that nobody listens there.
    pub(super) fn tell_gone(&mut self, gone: u64) {
        for id in self.ids() {
            if self.is_up(id) && self.random.bool() {
                self.core(id).gone(gone);
            }
        }
    }
}
