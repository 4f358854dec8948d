//! The one loop of a replica, on an OS thread of its own: requests and ticks in, replies and the published State out.
//!
//! All requests that wait are taken at once, so that many writes share one sync. Nothing else runs on this thread, so
//! that a slow disk holds up nothing but what needs it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use batchai_proto::internal::v1::SnapshotMark;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::{oneshot, watch};

use super::core::{Core, CoreError, ELECTION_TICKS, Proposed, Ticket};
use super::handle::{Handle, Published, ReplicaError, Reply, Request, Role};
use super::hub::Hub;
use super::peers::Peers;
use super::store::{LogStore, StoreError};
use crate::state::State;

/// Ticks that were missed, after a slow sync, are not all made up for: that would be an election.
const TICKS_AT_ONCE_MAX: u32 = 3;
/// Requests that may wait for the loop.
pub(super) const REQUESTS_MAX: usize = 4096;
/// After a snapshot that could not be written.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(60);
/// Proposals that share one sync.
const BATCH_MAX: usize = 1024;
/// Ticks after which leave to read is asked for again: a leader that was just elected does not answer.
const READ_AGAIN_TICKS: u32 = 4;

/// The thread of a replica.
pub struct Running {
    /// Says why it ended, if not because it was told to; closed without a word where it panicked.
    pub failed: oneshot::Receiver<CoreError>,
    pub thread: std::thread::JoinHandle<()>,
}

/// Starts a replica's loop. An election begins when no leader was heard of for one to two times `election`.
pub fn start<S: LogStore + 'static>(
    core: Core<S>,
    peers: Peers,
    election: Duration,
) -> std::io::Result<(Handle, Running)> {
    let (requests, receiver) = sync_channel(REQUESTS_MAX);
    let (publisher, published) = watch::channel(Published::default());
    let (role_sender, role) = watch::channel(Role::default());
    let (failure, failed) = oneshot::channel();
    let hub = Arc::new(Hub::default());
    hub.jump(core.state().revision);
    let own = requests.clone();
    let handle = Handle {
        id: core.status().id,
        clients: Arc::default(),
        requests,
        published,
        role,
        hub: hub.clone(),
    };
    let replica = Loop {
        core,
        receiver,
        peers,
        clients: handle.clients.clone(),
        tick: election / ELECTION_TICKS as u32,
        publisher,
        role: role_sender,
        hub,
        next_ticket: 0,
        proposing: HashMap::new(),
        reading: HashMap::new(),
        requests: own,
        writing: None,
        written: None,
        saving: Vec::new(),
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
    peers: Peers,
    /// Requests of clients that wait.
    clients: Arc<AtomicUsize>,
    tick: Duration,
    publisher: watch::Sender<Published>,
    role: watch::Sender<Role>,
    hub: Arc<Hub>,
    next_ticket: Ticket,
    proposing: HashMap<Ticket, Reply<i64>>,
    /// Who waits for leave to read, together, and since when, in ticks.
    reading: HashMap<Ticket, (Vec<Reply<()>>, u32)>,
    /// By which the thread that writes snapshots reaches this one.
    requests: SyncSender<Request>,
    /// What is being written as a snapshot.
    writing: Option<(State, Vec<Reply<()>>)>,
    /// It was, and this came of it.
    written: Option<Result<SnapshotMark, StoreError>>,
    /// Who asked for a snapshot: those wait for the next one that is begun.
    saving: Vec<Reply<()>>,
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
        let mut next_tick = Instant::now() + self.tick;
        self.settle()?;
        loop {
            let wait = next_tick - Instant::now().min(next_tick);
            let stop = match self.receiver.recv_timeout(wait) {
                Ok(first) => self.take(first),
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            next_tick = self.tick_until_now(next_tick);
            self.settle()?;
            self.see_to_snapshots()?;
            if stop {
                return Ok(());
            }
        }
    }

    fn tick_until_now(&mut self, mut next: Instant) -> Instant {
        let now = Instant::now();
        if next <= now {
            // Those who no longer wait for an answer need none.
            self.proposing.retain(|_, reply| !reply.is_closed());
            self.read_again();
        }
        for _ in 0..TICKS_AT_ONCE_MAX {
            if next > now {
                return next;
            }
            self.core.tick();
            next += self.tick;
        }
        next.max(now)
    }

    /// Messages get lost, and so may the leave to read.
    fn read_again(&mut self) {
        let core = &mut self.core;
        self.reading.retain(|ticket, (replies, ticks)| {
            replies.retain(|reply| !reply.is_closed());
            *ticks += 1;
            if !replies.is_empty() && ticks.is_multiple_of(READ_AGAIN_TICKS) && !core.read(*ticket)
            {
                for reply in replies.drain(..) {
                    answer(reply, Err(ReplicaError::NotLeader));
                }
            }
            !replies.is_empty()
        });
    }

    /// Takes a request and all that wait behind it. `true` where one of them says stop.
    fn take(&mut self, first: Request) -> bool {
        let (mut commands, mut reads) = (Vec::new(), Vec::new());
        let mut stop = false;
        let waiting = std::iter::once(first)
            .chain(self.receiver.try_iter())
            .take(BATCH_MAX);
        for request in waiting.collect::<Vec<_>>() {
            if matches!(request, Request::Propose(..) | Request::Read(_)) {
                self.clients.fetch_sub(1, Ordering::Relaxed);
            }
            match request {
                Request::Propose(_, Some(term), reply) if term != self.core.term().0 => {
                    answer(reply, Err(ReplicaError::NotLeader));
                }
                Request::Propose(command, _, reply) => {
                    self.next_ticket += 1;
                    self.proposing.insert(self.next_ticket, reply);
                    commands.push((self.next_ticket, *command));
                }
                Request::Read(reply) => reads.push(reply),
                Request::Snapshot(written) => self.written = Some(written),
                Request::Stop => stop = true,
                other => self.take_rare(other),
            }
        }
        if !commands.is_empty() {
            for (ticket, outcome) in self.core.propose(&commands) {
                self.answer_proposal(ticket, outcome);
            }
        }
        if !reads.is_empty() {
            self.next_ticket += 1;
            if self.core.read(self.next_ticket) {
                self.reading.insert(self.next_ticket, (reads, 0));
            } else {
                for reply in reads {
                    answer(reply, Err(ReplicaError::NotLeader));
                }
            }
        }
        stop
    }

    /// What is of peers and administrators.
    fn take_rare(&mut self, request: Request) {
        let stepped = match request {
            Request::Step(message) => self.core.step(*message),
            Request::StepSnapshot(came) => {
                let (message, mark, state) = *came;
                self.core.step_snapshot(message, mark, state)
            }
            Request::Unreachable(peer) => {
                self.core.unreachable(peer);
                Ok(())
            }
            Request::Told(peer, index, digest) => {
                self.core.told(peer, index, digest);
                Ok(())
            }
            Request::Gone(peer) => {
                self.core.gone(peer);
                Ok(())
            }
            Request::SnapshotSent(peer, arrived) => {
                self.core.snapshot_sent(peer, arrived);
                Ok(())
            }
            Request::Change(command, change, reply) => {
                self.next_ticket += 1;
                self.proposing.insert(self.next_ticket, reply);
                let refused = self.core.change(self.next_ticket, &command, &change);
                if let Some((ticket, outcome)) = refused {
                    self.answer_proposal(ticket, outcome);
                }
                Ok(())
            }
            Request::Status(reply) => {
                answer(reply, Ok(self.core.status()));
                Ok(())
            }
            Request::HandOver(to, reply) => {
                let heir = to.or_else(|| self.core.heir());
                let heir = heir.ok_or("no other replica could lead".to_owned());
                let asked = heir.and_then(|heir| self.core.hand_over(heir));
                answer(reply, asked.map_err(ReplicaError::Refused));
                Ok(())
            }
            Request::Save(reply) => {
                self.saving.push(reply);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = stepped {
            tracing::debug!(%error, "a message of a peer is refused");
        }
    }

    /// Has a snapshot written, on a thread of its own, where one is due; and the log compacted when it was.
    fn see_to_snapshots(&mut self) -> Result<(), CoreError> {
        match self.written.take() {
            Some(Ok(mark)) => {
                let (state, waiting) = self.writing.take().unwrap_or_default();
                self.core.compact(&mark, state)?;
                tracing::info!(index = mark.index, "snapshot taken");
                for reply in waiting {
                    answer(reply, Ok(()));
                }
            }
            // The log has everything that the snapshot would: the replica goes on, and tries again later.
            Some(Err(error)) => {
                tracing::error!(%error, "a snapshot cannot be written");
                for reply in self.writing.take().unwrap_or_default().1 {
                    answer(reply, Err(ReplicaError::Refused(error.to_string())));
                }
                self.not_before = Instant::now() + SNAPSHOT_PAUSE;
            }
            None => {}
        }
        let asked = !self.saving.is_empty();
        if self.writing.is_some() || (!asked && Instant::now() < self.not_before) {
            return Ok(());
        }
        let Some((mark, state)) = self.core.snapshot_due(asked) else {
            // There is one already that says the same.
            for reply in self.saving.drain(..) {
                answer(reply, Ok(()));
            }
            return Ok(());
        };
        let kept = (state.clone(), std::mem::take(&mut self.saving));
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
                for reply in kept.1 {
                    answer(reply, Err(ReplicaError::Refused(error.to_string())));
                }
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
        let (peers, mut lost, mut snapshots) = (&self.peers, Vec::new(), Vec::new());
        let output = self.core.ready(&mut |messages: Vec<Message>| {
            for message in messages {
                let to = message.to;
                if message.get_msg_type() == MessageType::MsgSnapshot {
                    snapshots.push(message);
                } else if !peers.send(message) {
                    lost.push(to);
                }
            }
        })?;
        for message in snapshots {
            let to = message.to;
            let named = self.core.snapshot_of(&message);
            if !named.is_some_and(|named| self.peers.send_snapshot(message, named)) {
                self.core.snapshot_sent(to, false);
            }
        }
        for (to, index, digest) in output.digests {
            self.peers.tell(to, index, digest);
        }
        for peer in lost {
            self.core.unreachable(peer);
        }
        let core = &self.core;
        self.publisher.send_if_modified(|published| {
            let (leads, leader, term) = (core.leads(), core.leader(), core.term().0);
            let changed = published.state.applied_index != core.state().applied_index
                || (published.leads, published.leader, published.term) != (leads, leader, term);
            if changed {
                *published = Published {
                    state: Arc::new(core.state().clone()),
                    leads,
                    leader,
                    term,
                };
            }
            changed
        });
        let role = Role {
            leads: core.leads(),
            leader: core.leader(),
            term: core.term().0,
        };
        self.role.send_if_modified(|known| {
            let changed = *known != role;
            *known = role;
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
            for reply in self.reading.remove(&ticket).unwrap_or_default().0 {
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
