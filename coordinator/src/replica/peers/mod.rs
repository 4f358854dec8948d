//! Lanes to the other replicas, and theirs to this one.
//!
//! Each lane is a bounded queue and a task that empties it into one ordered stream. What finds no room, or cannot be sent, is lost:
//! raft sends it again. A snapshot goes beside the stream, over a connection of its own. Nothing here decides who belongs to the
//! ensemble: that stands in the State.

mod lane;
mod service;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use batchai_common::error::ApiError;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{PeerHello, RecordReplica, SnapshotMark, StateDigest};
use raft::eraftpb::{Message, MessageType};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Handle;
use crate::ensemble::check_endpoint;
use crate::state::digest::Digest;
use crate::state::{State, replicas};

pub use lane::Lanes;
pub use service::{PeerDesk, check_peer};

/// The largest message of a stream: a batch and one entry, which may be as large as a request.
pub const PEER_BYTES_MAX: usize = 8 << 20;

/// Texts of a replica about itself are short.
const ENDPOINT_BYTES_MAX: usize = 300;
const VERSION_BYTES_MAX: usize = 100;

enum Outgoing {
    Message(Message),
    Digest(StateDigest),
    Snapshot(Box<(Message, SnapshotMark, State)>),
}

/// What is known of a replica that was met.
#[derive(Clone, Debug)]
pub struct Met {
    pub hello: PeerHello,
    pub last: Instant,
}

/// The lanes. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    shared: Arc<Shared>,
}

struct Shared {
    own: PeerHello,
    lanes: Mutex<BTreeMap<u64, mpsc::Sender<Outgoing>>>,
    met: Mutex<BTreeMap<u64, Met>>,
    /// The latest stream of each peer: what an earlier one still brings comes too late.
    turns: Mutex<BTreeMap<u64, u64>>,
    /// The ensemble has removed this replica.
    removed: CancellationToken,
}

impl Peers {
    /// Lanes of a replica to nobody yet.
    pub fn new(own: PeerHello) -> Peers {
        Peers {
            shared: Arc::new(Shared {
                own,
                lanes: Mutex::default(),
                met: Mutex::default(),
                turns: Mutex::default(),
                removed: CancellationToken::new(),
            }),
        }
    }

    /// Who this replica says it is.
    pub fn own(&self) -> &PeerHello {
        &self.shared.own
    }

    /// Cancelled when another replica says that this one was removed.
    pub fn removed(&self) -> &CancellationToken {
        &self.shared.removed
    }

    /// Sends a message; `false` where it is lost already.
    pub fn send(&self, message: Message) -> bool {
        self.queue(message.to, Outgoing::Message(message))
    }

    /// Tells a peer the digest of the State at an entry. One that is lost is followed by the next.
    pub fn tell(&self, to: u64, index: u64, digest: Digest) {
        let digest = digest.bytes().to_vec();
        self.queue(to, Outgoing::Digest(StateDigest { index, digest }));
    }

    /// Sends a message and the snapshot that it names; what becomes of it is told to the replica.
    pub fn send_snapshot(&self, message: Message, (mark, state): (SnapshotMark, State)) -> bool {
        let to = message.to;
        self.queue(to, Outgoing::Snapshot(Box::new((message, mark, state))))
    }

    fn queue(&self, to: u64, outgoing: Outgoing) -> bool {
        let lanes = held(&self.shared.lanes);
        lanes
            .get(&to)
            .is_some_and(|lane| lane.try_send(outgoing).is_ok())
    }

    /// What was learned of the other replicas, by raft id.
    pub fn met(&self) -> BTreeMap<u64, Met> {
        held(&self.shared.met).clone()
    }

    /// What the State should know of the replicas, this one included.
    pub fn records(&self) -> Vec<RecordReplica> {
        let met = self.met();
        let known = met.values().map(|met| &met.hello).chain([&self.shared.own]);
        known
            .map(|hello| RecordReplica {
                id: hello.from,
                endpoint: hello.endpoint.clone(),
                store: hello.store.clone(),
                feature_level: hello.feature_level,
            })
            .collect()
    }

    /// Whom this replica reaches, and where: whom it was told of in the beginning, whom the State knows, and who came since: a replica
    /// that is new, or was away, answers a leader that its State does not know yet, else it would never learn of it.
    pub fn book(&self, first: &BTreeMap<u64, String>, state: &State) -> BTreeMap<u64, String> {
        let mut book = first.clone();
        for (id, replica) in &state.replicas {
            match replica.role() {
                Role::Removed => drop(book.remove(id)),
                _ if replica.endpoint.is_empty() => {}
                _ => drop(book.insert(*id, replica.endpoint.clone())),
            }
        }
        for (id, met) in held(&self.shared.met).iter() {
            if !state.replicas.contains_key(id) && !met.hello.endpoint.is_empty() {
                book.entry(*id)
                    .or_insert_with(|| met.hello.endpoint.clone());
            }
        }
        book.remove(&self.shared.own.from);
        book
    }

    /// A peer was heard of.
    pub fn heard(&self, hello: &PeerHello) {
        let last = Instant::now();
        let mut met = held(&self.shared.met);
        match met.get_mut(&hello.from) {
            // With every message: nothing is made anew.
            Some(known) if known.hello == *hello => known.last = last,
            _ => {
                let hello = hello.clone();
                met.insert(hello.from, Met { hello, last });
            }
        }
    }

    /// Begins a stream of a peer: from now on earlier ones bring nothing.
    pub fn turn(&self, peer: u64) -> u64 {
        let mut turns = held(&self.shared.turns);
        let turn = turns.entry(peer).or_insert(0);
        *turn += 1;
        *turn
    }

    /// Hands over what a stream brings; `false` where it is not the latest of its peer.
    pub fn deliver(
        &self,
        (peer, turn): (u64, u64),
        replica: &Handle,
        (messages, digests): (Vec<Message>, Vec<(u64, Digest)>),
    ) -> bool {
        let turns = held(&self.shared.turns);
        if turns.get(&peer) != Some(&turn) {
            return false;
        }
        for message in messages {
            replica.step(message);
        }
        for (index, digest) in digests {
            replica.told(peer, index, digest);
        }
        true
    }

    /// Whether somebody who says hello is who the ensemble knows.
    ///
    /// # Errors
    /// Says why he is not.
    pub fn check(&self, state: &State, hello: &PeerHello) -> Result<(), ApiError> {
        let own = &self.shared.own;
        let refuse = |why: String| {
            let name = replicas::name(hello.from);
            Err(ApiError::WrongState { name, why })
        };
        if hello.ensemble != own.ensemble {
            return refuse(format!(
                "it is of ensemble {}, and this one is {}",
                hello.ensemble, own.ensemble
            ));
        }
        if hello.to != own.from || hello.from == own.from {
            return refuse(format!(
                "it looks for {}, and this is {}",
                hello.to, own.from
            ));
        }
        let named = hello.endpoint.is_empty() || check_endpoint(&hello.endpoint).is_ok();
        let sized =
            hello.endpoint.len() <= ENDPOINT_BYTES_MAX && hello.version.len() <= VERSION_BYTES_MAX;
        if !named || !sized || uuid::Uuid::try_parse(&hello.store).is_err() {
            return refuse("what it says of itself is not what a replica says".to_owned());
        }
        self.check_known(state, hello)
    }

    /// Whether somebody who has said hello is still who the ensemble knows.
    ///
    /// # Errors
    /// Says why he is not.
    pub fn check_known(&self, state: &State, hello: &PeerHello) -> Result<(), ApiError> {
        let refuse = |why: &str| {
            Err(ApiError::WrongState {
                name: replicas::name(hello.from),
                why: why.to_owned(),
            })
        };
        if state.ensemble.is_empty() {
            // Nobody is known yet.
            return Ok(());
        }
        if hello.epoch != 0 && hello.epoch != state.epoch {
            return refuse(
                "it is of another epoch of the ensemble: one of the two began anew from a backup",
            );
        }
        if hello.feature_level < state.feature_level {
            return refuse(
                "it is of a version older than what all replicas know by now: upgrade it",
            );
        }
        let Some(known) = state.replicas.get(&hello.from) else {
            // It may have come since, and lead: its certificate says who it is, and raft asks nothing of strangers.
            return Ok(());
        };
        if known.role() == Role::Removed {
            return Err(ApiError::Expelled {
                name: replicas::name(hello.from),
            });
        }
        if !known.store.is_empty() && known.store != hello.store {
            return refuse(
                "it comes with another store than it had: what it had promised may be forgotten. Remove it, and have it \
                 join under a new id",
            );
        }
        Ok(())
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a peer may say. The rest is for a replica's own use, or comes on another way.
pub fn is_of_peers(message: &Message, hello: &PeerHello) -> bool {
    let kind = matches!(
        message.get_msg_type(),
        MessageType::MsgAppend
            | MessageType::MsgAppendResponse
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVote
            | MessageType::MsgRequestPreVoteResponse
            | MessageType::MsgHeartbeat
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgReadIndex
            | MessageType::MsgReadIndexResp
            | MessageType::MsgTimeoutNow
    );
    kind && (message.from, message.to) == (hello.from, hello.to)
}
