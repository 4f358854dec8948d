//! The one loop of a replica, on an OS thread of its own: requests and ticks in, replies and the published State out.
//!
//! All requests that wait are taken at once, so that many writes share one sync. Nothing else runs on this thread, so
//! that a slow disk holds up nothing but what needs it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use batchai_common::limits::CALL_TIMEOUT;
use batchai_common::time;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Command, RequestKey, SnapshotMark};
use raft::eraftpb::Message;
use tokio::sync::{oneshot, watch};

use super::core::{Core, CoreError, Proposed, Ticket};
use super::hub::Hub;
use super::store::{LogStore, StoreError};
use crate::state::{Rejection, State};

/// A tick; an election times out after ten to twenty.
const TICK: Duration = Duration::from_millis(50);
/// Ticks that were missed, after a slow sync, are not all made up for: that would be an election.
const TICKS_AT_ONCE_MAX: u32 = 3;
/// Requests that may wait for the loop.
const REQUESTS_MAX: usize = 4096;
/// After a snapshot that could not be written.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(60);
/// Proposals that share one sync.
const BATCH_MAX: usize = 1024;

/// Why a request got no answer from the State.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReplicaError {
    #[error(transparent)]
    Rejected(#[from] Rejection),
    #[error("this replica does not lead")]
    NotLeader,
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
    pub state: State,
    /// This replica leads and has applied all that was committed before it did.
    pub leads: bool,
    pub leader: Option<u64>,
}

type Reply<T> = oneshot::Sender<Result<T, ReplicaError>>;

enum Request {
    Propose(Box<Command>, Reply<i64>),
    Read(Reply<()>),
    /// A snapshot was written, or could not be.
    Snapshot(Result<SnapshotMark, StoreError>),
    Stop,
}

/// What others hold of a replica.
#[derive(Clone)]
pub struct Handle {
    requests: SyncSender<Request>,
    published: watch::Receiver<Published>,
    hub: Arc<Hub>,
}

impl Handle {
    /// Has a command applied. Returns the revision it was applied at; the published State has it by then.
    pub async fn propose(&self, kind: Kind) -> Result<i64, ReplicaError> {
        self.answer(self.send(kind, None)?).await
    }

    /// The same for a request that has a name; if it was carried out before, nothing is applied.
    pub async fn propose_once(&self, kind: Kind, request: RequestKey) -> Result<i64, ReplicaError> {
        self.answer(self.send(kind, Some(request))?).await
    }

    /// Has commands applied, sharing one write where they can; the answers are in their order.
    pub async fn propose_all(&self, kinds: Vec<Kind>) -> Vec<Result<i64, ReplicaError>> {
        let sent: Vec<_> = kinds
            .into_iter()
            .map(|kind| self.send(kind, None))
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
    pub async fn read(&self) -> Result<State, ReplicaError> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Read(reply))?;
        self.answer(answer).await?;
        Ok(self.published.borrow().state.clone())
    }

    /// The State as it is now on this replica.
    pub fn published(&self) -> watch::Receiver<Published> {
        self.published.clone()
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
    ) -> Result<oneshot::Receiver<Result<i64, ReplicaError>>, ReplicaError> {
        let (reply, answer) = oneshot::channel();
        let command = Box::new(Command {
            time: Some(time::now()),
            request,
            kind: Some(kind),
        });
        self.request(Request::Propose(command, reply))?;
        Ok(answer)
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

/// The thread of a replica.
pub struct Running {
    /// Says why it ended, if not because it was told to; closed without a word where it panicked.
    pub failed: oneshot::Receiver<CoreError>,
    pub thread: std::thread::JoinHandle<()>,
}

/// Starts a replica's loop.
pub fn start<S: LogStore + 'static>(core: Core<S>) -> std::io::Result<(Handle, Running)> {
    let (requests, receiver) = sync_channel(REQUESTS_MAX);
    let (publisher, published) = watch::channel(Published::default());
    let (failure, failed) = oneshot::channel();
    let hub = Arc::new(Hub::default());
    hub.jump(core.state().revision);
    let own = requests.clone();
    let handle = Handle {
        requests,
        published,
        hub: hub.clone(),
    };
    let replica = Loop {
        core,
        receiver,
        publisher,
        hub,
        next_ticket: 0,
        proposing: HashMap::new(),
        reading: HashMap::new(),
        requests: own,
        writing: None,
        written: None,
        not_before: Instant::now(),
    };
    let thread = std::thread::Builder::new()
        .name("replica".into())
        .spawn(move || {
            if let Err(error) = replica.run() {
                tracing::error!(%error, "the replica stops");
                // Nobody may be listening any more: the log line above is there in any case.
                let _ = failure.send(error);
            }
        })?;
    Ok((handle, Running { failed, thread }))
}

struct Loop<S> {
    core: Core<S>,
    receiver: Receiver<Request>,
    publisher: watch::Sender<Published>,
    hub: Arc<Hub>,
    next_ticket: Ticket,
    proposing: HashMap<Ticket, Reply<i64>>,
    reading: HashMap<Ticket, Reply<()>>,
    /// By which the thread that writes snapshots reaches this one.
    requests: SyncSender<Request>,
    /// What is being written as a snapshot.
    writing: Option<State>,
    /// It was, and this came of it.
    written: Option<Result<SnapshotMark, StoreError>>,
    /// After one that failed.
    not_before: Instant,
}

impl<S: LogStore> Loop<S> {
    fn run(mut self) -> Result<(), CoreError> {
        let hub = self.hub.clone();
        let end = self.work();
        hub.close();
        end
    }

    fn work(&mut self) -> Result<(), CoreError> {
        let mut next_tick = Instant::now() + TICK;
        self.settle()?;
        loop {
            let stop = match self
                .receiver
                .recv_timeout(next_tick - Instant::now().min(next_tick))
            {
                Ok(first) => self.take(first),
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            next_tick = self.tick(next_tick);
            self.settle()?;
            self.see_to_snapshots()?;
            if stop {
                return Ok(());
            }
        }
    }

    fn tick(&mut self, mut next: Instant) -> Instant {
        let now = Instant::now();
        if next <= now {
            // Those who no longer wait for an answer need none.
            self.proposing.retain(|_, reply| !reply.is_closed());
            self.reading.retain(|_, reply| !reply.is_closed());
        }
        for _ in 0..TICKS_AT_ONCE_MAX {
            if next > now {
                return next;
            }
            self.core.tick();
            next += TICK;
        }
        next.max(now)
    }

    /// Takes a request and all that wait behind it. `true` where one of them says stop.
    fn take(&mut self, first: Request) -> bool {
        let mut commands = Vec::new();
        let mut stop = false;
        let waiting = std::iter::once(first)
            .chain(self.receiver.try_iter())
            .take(BATCH_MAX);
        for request in waiting.collect::<Vec<_>>() {
            self.next_ticket += 1;
            match request {
                Request::Propose(command, reply) => {
                    self.proposing.insert(self.next_ticket, reply);
                    commands.push((self.next_ticket, *command));
                }
                Request::Read(reply) if self.core.read(self.next_ticket) => {
                    self.reading.insert(self.next_ticket, reply);
                }
                Request::Read(reply) => answer(reply, Err(ReplicaError::NotLeader)),
                Request::Snapshot(written) => self.written = Some(written),
                Request::Stop => stop = true,
            }
        }
        if !commands.is_empty() {
            for (ticket, outcome) in self.core.propose(&commands) {
                self.answer_proposal(ticket, outcome);
            }
        }
        stop
    }

    /// Has a snapshot written, on a thread of its own, where one is due; and the log compacted when it was.
    fn see_to_snapshots(&mut self) -> Result<(), CoreError> {
        match self.written.take() {
            Some(Ok(mark)) => {
                let state = self.writing.take().unwrap_or_default();
                self.core.compact(&mark, state)?;
                tracing::info!(index = mark.index, "snapshot taken");
            }
            // The log has everything that the snapshot would: the replica goes on, and tries again later.
            Some(Err(error)) => {
                tracing::error!(%error, "a snapshot cannot be written");
                self.writing = None;
                self.not_before = Instant::now() + SNAPSHOT_PAUSE;
            }
            None => {}
        }
        if self.writing.is_some() || Instant::now() < self.not_before {
            return Ok(());
        }
        let Some((mark, state)) = self.core.snapshot_due() else {
            return Ok(());
        };
        let kept = state.clone();
        let (mut snapshots, requests) = (self.core.snapshots(), self.requests.clone());
        let write = move || {
            let written = snapshots.write(&mark, &state).map(|()| mark);
            // The loop may have ended.
            let _ = requests.send(Request::Snapshot(written));
        };
        let thread = std::thread::Builder::new()
            .name("snapshot".into())
            .spawn(write);
        match thread {
            Ok(_) => self.writing = Some(kept),
            Err(error) => {
                tracing::error!(%error, "a snapshot cannot be written");
                self.not_before = Instant::now() + SNAPSHOT_PAUSE;
            }
        }
        Ok(())
    }

    /// Lets the core do its work until there is none.
    fn settle(&mut self) -> Result<(), CoreError> {
        self.settle_once()?;
        while self.core.has_ready() {
            self.settle_once()?;
        }
        Ok(())
    }

    /// Lets the core do a part of its work, publishes the State, then answers: who got an answer finds it in the State.
    fn settle_once(&mut self) -> Result<(), CoreError> {
        // With one voter there are no peers; a transport will take these.
        let output = self
            .core
            .ready(&mut |messages: Vec<Message>| debug_assert!(messages.is_empty()))?;
        let core = &self.core;
        self.publisher.send_if_modified(|published| {
            let (leads, leader) = (core.leads(), core.leader());
            let changed = published.state.applied_index != core.state().applied_index
                || (published.leads, published.leader) != (leads, leader);
            if changed {
                *published = Published {
                    state: core.state().clone(),
                    leads,
                    leader,
                };
            }
            changed
        });
        if let Some(revision) = output.jumped {
            self.hub.jump(revision);
        }
        self.hub.notify(output.revisions);
        for (ticket, outcome) in output.proposals {
            self.answer_proposal(ticket, outcome);
        }
        for ticket in output.reads {
            if let Some(reply) = self.reading.remove(&ticket) {
                answer(reply, Ok(()));
            }
        }
        Ok(())
    }

    fn answer_proposal(&mut self, ticket: Ticket, outcome: Proposed) {
        let Some(reply) = self.proposing.remove(&ticket) else {
            return;
        };
        answer(
            reply,
            match outcome {
                Proposed::Applied(result) => result.map_err(ReplicaError::Rejected),
                Proposed::NotLeader => Err(ReplicaError::NotLeader),
                Proposed::Unknown => Err(ReplicaError::Unknown),
            },
        );
    }
}

/// Whoever asked may have gone away meanwhile.
fn answer<T>(reply: Reply<T>, answer: Result<T, ReplicaError>) {
    let _ = reply.send(answer);
}
