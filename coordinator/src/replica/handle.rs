//! What others hold of a replica: they ask, and its loop answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use batchai_common::error::ApiError;
use batchai_common::limits::CALL_TIMEOUT;
use batchai_common::time;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{ChangeReplica, Command, RequestKey, SnapshotMark};
use raft::eraftpb::Message;
use tokio::sync::{oneshot, watch};

use super::core::Status;
use super::hub::Hub;
use super::store::StoreError;
use super::thread::REQUESTS_MAX;
use crate::state::digest::Digest;
use crate::state::{Rejection, State};

/// Requests of clients that may wait.
const CLIENTS_MAX: usize = REQUESTS_MAX / 4 * 3;
/// How long another replica may take to lead after it was asked to.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);

/// Why a request got no answer from the State.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReplicaError {
    #[error(transparent)]
    Rejected(#[from] Rejection),
    #[error("this replica does not lead")]
    NotLeader,
    #[error("{0}")]
    Refused(String),
    #[error("the leadership changed or the replica ended before the log decided")]
    Unknown,
    #[error("no answer in time: there may be no quorum")]
    TimedOut,
    #[error("the replica's queue is full")]
    Busy,
    #[error("the replica has stopped")]
    Stopped,
}

/// The State as everyone but the replica sees it.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// Shared, for a State has many tables: every call looks at it.
    pub state: Arc<State>,
    /// This replica leads and has applied all that was committed before it did.
    pub leads: bool,
    pub leader: Option<u64>,
    pub term: u64,
}

/// Who leads, as far as a replica knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Role {
    /// This replica does, and has applied all that was committed before it did.
    pub leads: bool,
    pub leader: Option<u64>,
    pub term: u64,
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, ReplicaError>>;

/// What the loop is asked for.
pub(super) enum Request {
    /// In this term only, where one is named.
    Propose(Box<Command>, Option<u64>, Reply<i64>),
    Change(Box<Command>, ChangeReplica, Reply<i64>),
    Read(Reply<()>),
    Status(Reply<Status>),
    HandOver(Option<u64>, Reply<()>),
    Save(Reply<()>),
    Step(Box<Message>),
    StepSnapshot(Box<(Message, SnapshotMark, State)>),
    Told(u64, u64, Digest),
    Unreachable(u64),
    Gone(u64),
    SnapshotSent(u64, bool),
    /// A snapshot was written, or could not be.
    Snapshot(Result<SnapshotMark, StoreError>),
    Stop,
}

/// What others hold of a replica.
#[derive(Clone)]
pub struct Handle {
    pub(super) id: u64,
    pub(super) clients: Arc<AtomicUsize>,
    pub(super) requests: SyncSender<Request>,
    pub(super) published: watch::Receiver<Published>,
    pub(super) role: watch::Receiver<Role>,
    pub(super) hub: Arc<Hub>,
}

impl Handle {
    /// The replica's raft id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Has a command applied. Returns the revision it was applied at; the published State has it by then.
    pub async fn propose(&self, kind: Kind) -> Result<i64, ReplicaError> {
        self.answer(self.send(kind, None, None)?).await
    }

    /// The same for a request that has a name; if it was carried out before, nothing is applied.
    pub async fn propose_once(&self, kind: Kind, request: RequestKey) -> Result<i64, ReplicaError> {
        self.answer(self.send(kind, Some(request), None)?).await
    }

    /// Has commands applied, sharing one write where they can; in one term only, where that is named: what a leader thought of in it is of no
    /// use in another. The answers are in their order.
    pub async fn propose_all(
        &self,
        kinds: Vec<Kind>,
        term: Option<u64>,
    ) -> Vec<Result<i64, ReplicaError>> {
        let sent: Vec<_> = kinds
            .into_iter()
            .map(|kind| self.send(kind, None, term))
            .collect();
        let mut answers = Vec::with_capacity(sent.len());
        for reply in sent {
            answers.push(match reply {
                Ok(reply) => self.answer(reply).await,
                Err(error) => Err(error),
            });
        }
        answers
    }

    /// A State that has everything that was acknowledged, by any replica, before this call.
    pub async fn read(&self) -> Result<Arc<State>, ReplicaError> {
        let (reply, answer) = oneshot::channel();
        self.of_client(Request::Read(reply))?;
        self.answer(answer).await?;
        Ok(self.published.borrow().state.clone())
    }

    /// The State as it is now on this replica.
    pub fn published(&self) -> watch::Receiver<Published> {
        self.published.clone()
    }

    /// Who leads: it changes less often than the State.
    pub fn role(&self) -> watch::Receiver<Role> {
        self.role.clone()
    }

    /// Returns when this replica does not lead.
    pub async fn deposed(&self) {
        // Closed means stopped: then it leads no more either.
        let _ = self.role().wait_for(|role| !role.leads).await;
    }

    /// Refuses what only the leader can do, and says who that is.
    pub fn must_lead(&self) -> Result<(), ApiError> {
        let leads = self.role.borrow().leads;
        match leads {
            true => Ok(()),
            false => Err(unavailable(self, &ReplicaError::NotLeader)),
        }
    }

    /// Has the membership changed; returns when the change is applied.
    pub async fn change(&self, change: ChangeReplica) -> Result<i64, ReplicaError> {
        let (reply, answer) = oneshot::channel();
        let command = Command {
            time: Some(time::now()),
            request: None,
            kind: Some(Kind::ChangeReplica(change.clone())),
        };
        self.request(Request::Change(Box::new(command), change, reply))?;
        self.answer(answer).await
    }

    /// How the replica is.
    pub async fn status(&self) -> Result<Status, ReplicaError> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Status(reply))?;
        self.answer(answer).await
    }

    /// Hands the leadership over, to whoever has most of the log where nobody is named; returns when another one leads.
    pub async fn hand_over(&self, to: Option<u64>) -> Result<(), ReplicaError> {
        let (reply, answer) = oneshot::channel();
        let mut role = self.role();
        self.request(Request::HandOver(to, reply))?;
        self.answer(answer).await?;
        let done = role.wait_for(|role| !role.leads && role.leader.is_some());
        match tokio::time::timeout(HAND_OVER_MAX, done).await {
            Ok(Ok(role)) if to.is_none_or(|to| role.leader == Some(to)) => Ok(()),
            Ok(Ok(_)) => Err(ReplicaError::Refused("another one leads now".to_owned())),
            Ok(Err(_)) => Err(ReplicaError::Stopped),
            Err(_) => Err(ReplicaError::TimedOut),
        }
    }

    /// Has a snapshot taken now; returns when it is written.
    pub async fn save(&self) -> Result<(), ReplicaError> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Save(reply))?;
        self.answer(answer).await
    }

    /// A message of a peer. One that finds no room is lost, as on a network: it is sent again.
    pub fn step(&self, message: Message) {
        let _ = self.request(Request::Step(Box::new(message)));
    }

    /// A peer tells the digest of its State at an entry.
    pub fn told(&self, peer: u64, index: u64, digest: Digest) {
        let _ = self.request(Request::Told(peer, index, digest));
    }

    /// A message of a peer that names a snapshot, which was written.
    pub fn step_snapshot(
        &self,
        message: Message,
        mark: SnapshotMark,
        state: State,
    ) -> Result<(), ReplicaError> {
        self.request(Request::StepSnapshot(Box::new((message, mark, state))))
    }

    /// A peer was not reached. Where there is no room to hear it, the next one says so.
    pub fn unreachable(&self, peer: u64) {
        let _ = self.request(Request::Unreachable(peer));
    }

    /// Nobody listens where a peer did.
    pub fn gone(&self, peer: u64) {
        let _ = self.request(Request::Gone(peer));
    }

    /// A snapshot came to a peer, or did not: without an answer no other would be sent. It is waited for room elsewhere.
    pub fn tell_snapshot_sent(&self, peer: u64, arrived: bool) {
        let requests = self.requests.clone();
        // A loop that has ended sends no more.
        tokio::task::spawn_blocking(move || requests.send(Request::SnapshotSent(peer, arrived)));
    }

    /// Where to wait for changes.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Ends the replica's loop after what is queued before this.
    pub fn stop(&self) {
        // A full queue is worked off: blocking here is short. A loop that is gone needs no stop.
        let _ = self.requests.send(Request::Stop);
    }

    fn send(
        &self,
        kind: Kind,
        request: Option<RequestKey>,
        term: Option<u64>,
    ) -> Result<oneshot::Receiver<Result<i64, ReplicaError>>, ReplicaError> {
        let (reply, answer) = oneshot::channel();
        let command = Box::new(Command {
            time: Some(time::now()),
            request,
            kind: Some(kind),
        });
        self.of_client(Request::Propose(command, term, reply))?;
        Ok(answer)
    }

    /// Takes a place among the clients' requests: however many there are, they leave room for what peers say.
    fn of_client(&self, request: Request) -> Result<(), ReplicaError> {
        if self.clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
            self.clients.fetch_sub(1, Ordering::Relaxed);
            return Err(ReplicaError::Busy);
        }
        let sent = self.request(request);
        if sent.is_err() {
            self.clients.fetch_sub(1, Ordering::Relaxed);
        }
        sent
    }

    fn request(&self, request: Request) -> Result<(), ReplicaError> {
        self.requests
            .try_send(request)
            .map_err(|error| match error {
                TrySendError::Full(_) => ReplicaError::Busy,
                TrySendError::Disconnected(_) => ReplicaError::Stopped,
            })
    }

    async fn answer<T>(
        &self,
        reply: oneshot::Receiver<Result<T, ReplicaError>>,
    ) -> Result<T, ReplicaError> {
        match tokio::time::timeout(CALL_TIMEOUT / 2, reply).await {
            Ok(Ok(answer)) => answer,
            // It was taken in, and the replica ended before it said what became of it.
            Ok(Err(_)) => Err(ReplicaError::Unknown),
            Err(_) => Err(ReplicaError::TimedOut),
        }
    }
}

/// Where to go instead: to the leader, as far as it is known where that is.
pub fn unavailable(replica: &Handle, why: &dyn std::fmt::Display) -> ApiError {
    let leader = replica.role.borrow().leader;
    let state = &replica.published.borrow().state;
    let known = leader.and_then(|id| state.replicas.get(&id));
    let endpoint = known.map(|known| known.endpoint.clone());
    ApiError::Unavailable {
        why: why.to_string(),
        leader: endpoint.filter(|endpoint| !endpoint.is_empty()),
    }
}
