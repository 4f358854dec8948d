//! One replica as a synchronous core: a raft node, its store and the State.
//!
//! It does not know time (it is ticked), threads or the network (messages go in and out as values). What it does with
//! a Ready follows the order that the raft crate documents, step by step, in [`Core::ready`].
//!
//! Messages of one peer must come in their order: raft 0.7.0 takes a MsgAppend that was overtaken for a sign that a follower is
//! further behind than it is, and its bookkeeping (`next` at or below `matched`) then fails an assertion; the mend is in no
//! released version, so others keep a fork. Here the transport has one ordered stream for each direction. A snapshot travels
//! beside its message: the message names it, [`Core::step_snapshot`] brings it.

mod agreement;
mod members;
mod snapshots;

use batchai_common::{crash_point, fault};
use std::collections::BTreeMap;
use std::sync::Arc;

use batchai_proto::internal::v1::{Command, SnapshotMark};
use prost::Message as _;
use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType};
use raft::{Config, RawNode, StateRole};

use super::hub::Revision;
use super::log::Log;
use super::logger::logger;
use super::store::{LogStore, Recovered, StoreError};
use crate::state::digest::Digest;
use crate::state::{Event, Rejection, State, apply};

use agreement::Agreement;
pub use members::{Member, Status};
use snapshots::read_conf_state;

/// Ticks between heartbeats, and from the last one to an election. How long a tick is, the caller decides.
const HEARTBEAT_TICKS: usize = 2;
pub const ELECTION_TICKS: usize = 10;
/// Ticks until those who hear that their leader is gone ask for votes, one after the other: the others must have heard it, too.
const GONE_TICKS: usize = 2;
/// Below what either end of a connection takes, headers and all.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// What may be proposed and not yet committed.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// What one Ready may ask to apply: a bound on memory, for every revision keeps the State it led to.
const COMMITTED_BYTES_MAX: u64 = 1 << 20;
const INFLIGHT_MESSAGES_MAX: usize = 256;

/// Names a proposal or a read towards the caller.
pub type Ticket = u64;

/// Why a replica cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    #[error("log entry {index} is not a command: {why}")]
    Entry { index: u64, why: String },
    #[error("a snapshot came that cannot be taken: {why}")]
    Snapshot { why: String },
    #[error(
        "the State of this replica is not that of the majority, as of log entry {index}: a defect of its memory, of its disk or of this \
         program. Remove it, and have it join under a new id with an empty data directory; keep the old one to find out why"
    )]
    Differs { index: u64 },
    #[error("log entry {index}: {source}")]
    Unknown { index: u64, source: Rejection },
}

/// How a proposal ended.
#[derive(Debug)]
pub enum Proposed {
    /// It was applied at this revision, or rejected by the State it met.
    Applied(Result<i64, Rejection>),
    /// It never entered the log.
    NotLeader,
    /// The replica lost its leadership before the log decided: it may be applied yet.
    Unknown,
}

/// What came of the latest input.
#[derive(Debug, Default)]
pub struct Output {
    pub proposals: Vec<(Ticket, Proposed)>,
    /// Reads that may now be answered from the State.
    pub reads: Vec<Ticket>,
    /// The revision that the State jumped to, by a snapshot; what changed came after that.
    pub jumped: Option<i64>,
    /// Digests of the State: to whom, and at which entry.
    pub digests: Vec<(u64, u64, Digest)>,
    /// What changed, in order.
    pub revisions: Vec<Revision>,
}

/// When a snapshot is taken, and what stays of the log.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotPolicy {
    /// After so many entries, or so many bytes of them, whichever comes first.
    pub entries: u64,
    pub bytes: u64,
    /// So many entries before it are kept, for followers that are a little behind.
    pub kept: u64,
}

impl Default for SnapshotPolicy {
    fn default() -> SnapshotPolicy {
        SnapshotPolicy {
            entries: 20_000,
            bytes: 32 << 20,
            kept: 1_000,
        }
    }
}

/// A replica.
pub struct Core<S> {
    /// Tells the reads of this replica, in this life of it, from all others.
    life: [u8; 16],
    raw: RawNode<Log>,
    store: S,
    state: State,
    /// The index of the latest snapshot that the log relies on.
    snapshot: u64,
    /// How much was applied since.
    unsaved_bytes: u64,
    policy: SnapshotPolicy,
    /// Ticks since it began, and when each peer was last heard of: raft's own notes of that are forgotten at every look.
    ticks: u64,
    heard: BTreeMap<u64, u64>,
    /// Index -> term and ticket of what this replica proposed and has not seen applied.
    proposed: BTreeMap<u64, (u64, Ticket)>,
    /// Changes of membership that are applied here, and answered when a majority knows of them: index, ticket, revision.
    settling: Vec<(u64, Ticket, i64)>,
    /// Index -> reads that wait for it to be applied.
    reading: BTreeMap<u64, Vec<Ticket>>,
    /// Snapshots that came and were written, until raft has taken one of them, or none.
    came: Vec<(SnapshotMark, State)>,
    agreement: Agreement,
}

impl<S: LogStore> Core<S> {
    /// Starts a replica from what its store held. `life` is another number at every start. A committed
    /// prefix of the log is applied by the first `ready`s.
    pub fn new(
        store: S,
        recovered: Recovered,
        life: u64,
        policy: SnapshotPolicy,
    ) -> Result<Core<S>, CoreError> {
        let identity = &recovered.identity;
        let (mark, state) = recovered.snapshot.unwrap_or_default();
        let conf_state = match mark.index {
            0 => ConfState::from((identity.voters.clone(), vec![])),
            _ => read_conf_state(&mark)?,
        };
        let last = recovered
            .entries
            .last()
            .map_or(recovered.begin.index, |entry| entry.index);
        let mut log = Log::new(recovered.begin, conf_state.clone());
        log.append(&recovered.entries);
        if mark.index > 0 {
            log.set_snapshot(mark.clone(), state.clone());
        }
        let mut hard_state = recovered.hard_state;
        // The commit index is written without a sync of its own: it may be behind or ahead of what was synced.
        hard_state.commit = hard_state.commit.clamp(mark.index, last);
        hard_state.vote *= u64::from(!fault!("vote_forgotten"));
        log.set_hard_state(hard_state);
        let config = Config {
            id: identity.replica_id,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            max_inflight_msgs: INFLIGHT_MESSAGES_MAX,
            applied: mark.index,
            check_quorum: !fault!("no_check_quorum"),
            pre_vote: !fault!("no_pre_vote"),
            ..Config::default()
        };
        let mut raw = RawNode::new(&config, log, &logger())?;
        if conf_state.voters == [identity.replica_id] {
            // Nobody to wait for.
            raw.campaign()?;
        }
        let mut own = [0; 16];
        own[..8].copy_from_slice(&identity.replica_id.to_be_bytes());
        own[8..].copy_from_slice(&life.to_be_bytes());
        Ok(Core {
            life: own,
            raw,
            store,
            state,
            snapshot: mark.index,
            unsaved_bytes: 0,
            policy,
            ticks: 0,
            heard: BTreeMap::new(),
            proposed: BTreeMap::new(),
            settling: Vec::new(),
            reading: BTreeMap::new(),
            came: Vec::new(),
            agreement: Agreement::default(),
        })
    }

    /// The State as far as it is applied.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether this replica leads, and has applied everything that was committed before it did.
    pub fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.raft.apply_to_current_term()
    }

    /// The raft id of the leader, as far as it is known.
    pub fn leader(&self) -> Option<u64> {
        Some(self.raw.raft.leader_id).filter(|id| *id != 0)
    }

    /// Has the next election begin after so many ticks without a leader, at least as many as an election takes and less than twice
    /// that: for simulations, which draw it from their seed.
    pub fn set_election_timeout(&mut self, ticks: usize) {
        self.raw.raft.set_randomized_election_timeout(ticks);
    }

    /// The term that it is in, and whether it leads there.
    pub fn term(&self) -> (u64, bool) {
        (self.raw.raft.term, self.raw.raft.state == StateRole::Leader)
    }

    /// One tick of the clock.
    pub fn tick(&mut self) {
        self.ticks += 1;
        self.raw.tick();
    }

    /// A message of a peer.
    ///
    /// # Errors
    /// It was refused, and nothing came of it: the replica goes on.
    pub fn step(&mut self, message: Message) -> Result<(), CoreError> {
        if message.get_msg_type() == MessageType::MsgSnapshot {
            let why = "it came without what it names".to_owned();
            return Err(CoreError::Snapshot { why });
        }
        self.heard.insert(message.from, self.ticks);
        Ok(self.raw.step(message)?)
    }

    /// The machine of a peer says that nobody listens there any more. A leader that is gone need not be waited for: whoever comes
    /// first by id asks for votes soon, the next one a little later, so that they do not stand against each other.
    pub fn gone(&mut self, peer: u64) {
        let raft = &mut self.raw.raft;
        if raft.leader_id != peer || raft.state != StateRole::Follower {
            return;
        }
        let voters = raft.prs().conf().voters().ids();
        let before = voters.iter().filter(|id| *id != peer && *id < raft.id);
        let before = before.count();
        let wait = (GONE_TICKS * (1 + before)).min(ELECTION_TICKS);
        // What it promised to its leader and to its term stays.
        raft.become_follower(raft.term, raft::INVALID_ID);
        raft.set_randomized_election_timeout(ELECTION_TICKS);
        raft.election_elapsed = ELECTION_TICKS - wait;
    }

    /// A replica was heard of within the time in which an election begins.
    fn is_active(&self, id: u64) -> bool {
        let last = self.heard.get(&id);
        let lately = |last: &u64| self.ticks - last < 2 * ELECTION_TICKS as u64;
        id == self.raw.raft.id || last.is_some_and(lately)
    }

    /// Proposes commands, all in one message: they share a write and a sync. Returns those that cannot be proposed.
    pub fn propose(&mut self, commands: &[(Ticket, Command)]) -> Vec<(Ticket, Proposed)> {
        let refuse = |commands: &[(Ticket, Command)]| {
            commands
                .iter()
                .map(|(ticket, _)| (*ticket, Proposed::NotLeader))
                .collect()
        };
        // A follower would forward them, and nobody would learn what became of them.
        if !self.leads() || commands.is_empty() {
            return refuse(commands);
        }
        let entry = |command: &Command| Entry {
            data: command.encode_to_vec().into(),
            ..Entry::default()
        };
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.raw.raft.id;
        message.entries = commands
            .iter()
            .map(|(_, command)| entry(command))
            .collect::<Vec<_>>()
            .into();
        let (first, term) = (self.raw.raft.raft_log.last_index() + 1, self.raw.raft.term);
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "proposals refused");
            return refuse(commands);
        }
        for (index, (ticket, _)) in (first..).zip(commands) {
            self.proposed.insert(index, (term, *ticket));
        }
        Vec::new()
    }

    /// Asks for leave to answer a read from a State that has everything acknowledged before now. `false` where there is
    /// nobody to ask yet. The answer may never come: messages get lost, and a leader may turn out to be none.
    pub fn read(&mut self, ticket: Ticket) -> bool {
        let elected_but_behind = self.raw.raft.state == StateRole::Leader && !self.leads();
        if self.leader().is_none() || elected_but_behind {
            return false;
        }
        if fault!("read_without_asking") {
            self.reading.entry(0).or_default().push(ticket);
            return true;
        }
        self.raw
            .read_index([&self.life[..], &ticket.to_be_bytes()].concat());
        true
    }

    /// Whether the input so far calls for more than was done.
    pub fn has_ready(&self) -> bool {
        self.raw.has_ready()
    }

    /// Does the next part of what the input so far calls for; to be called until nothing is left. Messages for peers are
    /// handed to `send`, in order, some of them before the store has synced.
    ///
    /// # Errors
    /// The replica must stop: what is on disk is not known, or the log is of a later version.
    pub fn ready(&mut self, send: &mut dyn FnMut(Vec<Message>)) -> Result<Output, CoreError> {
        let mut output = Output::default();
        if self.raw.has_ready() {
            self.ready_once(&mut output, send)?;
        }
        self.settle(&mut output);
        self.fail_what_lost_its_leader(&mut output);
        self.tell(&mut output);
        Ok(output)
    }

    /// The raft crate's order: messages, snapshot, committed entries, append and hard state, sync, persisted messages,
    /// advance, then the same for what advancing made ready.
    fn ready_once(
        &mut self,
        output: &mut Output,
        send: &mut dyn FnMut(Vec<Message>),
    ) -> Result<(), CoreError> {
        let mut ready = self.raw.ready();
        // Entries go to followers before our own sync: theirs and ours run at once.
        send(ready.take_messages());
        for read in ready.take_read_states() {
            let ticket = read.request_ctx.strip_prefix(&self.life[..]);
            if let Some(Ok(ticket)) =
                ticket.map(|bytes| bytes.try_into().map(Ticket::from_be_bytes))
            {
                self.reading.entry(read.index).or_default().push(ticket);
            }
        }
        if !ready.snapshot().is_empty() {
            self.install(ready.snapshot())?;
            output.jumped = Some(self.state.revision);
        }
        self.came.clear();
        self.apply(ready.take_committed_entries(), output)?;
        if ready.must_sync() && !fault!("log_not_written") {
            crash_point!("replica_is_to_write");
            self.store.append(ready.entries(), ready.hs())?;
            crash_point!("replica_wrote");
        }
        let log = self.raw.mut_store();
        log.append(ready.entries());
        if let Some(hard_state) = ready.hs() {
            log.set_hard_state(hard_state.clone());
        }
        send(ready.take_persisted_messages());
        let mut light = self.raw.advance(ready);
        if let Some(commit) = light.commit_index() {
            self.raw.mut_store().set_commit(commit);
        }
        send(light.take_messages());
        // With one voter this is where new entries are committed.
        self.apply(light.take_committed_entries(), output)?;
        self.raw.advance_apply();
        crash_point!("replica_applied", !output.revisions.is_empty());
        let applied = self.raw.raft.raft_log.applied;
        let later = self.reading.split_off(
            &(applied
                + if fault!("read_before_applied") {
                    1_000
                } else {
                    1
                }),
        );
        output.reads.extend(
            std::mem::replace(&mut self.reading, later)
                .into_values()
                .flatten(),
        );
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>, output: &mut Output) -> Result<(), CoreError> {
        for entry in entries {
            self.unsaved_bytes += entry.data.len() as u64;
            let result = match entry.entry_type {
                EntryType::EntryNormal if entry.data.is_empty() => None,
                EntryType::EntryNormal => Some(self.apply_command(&entry)?),
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                    self.apply_membership(&entry)?
                }
            };
            let revision = self.state.revision;
            let result = result.map(|result| {
                result.map(|events| {
                    if !events.is_empty() {
                        let state = Arc::new(self.state.clone());
                        output.revisions.push(Revision { state, events });
                    }
                    revision
                })
            });
            let proposed = match (self.proposed.remove(&entry.index), result) {
                (Some((term, ticket)), Some(Ok(at)))
                    if term == entry.term && entry.entry_type != EntryType::EntryNormal =>
                {
                    self.settling.push((entry.index, ticket, at));
                    continue;
                }
                (Some((term, ticket)), Some(result))
                    if term == entry.term || fault!("answer_of_another_term") =>
                {
                    (ticket, Proposed::Applied(result))
                }
                (Some((_, ticket)), _) => (ticket, Proposed::NotLeader),
                (None, _) => continue,
            };
            output.proposals.push(proposed);
        }
        Ok(())
    }

    fn apply_command(&mut self, entry: &Entry) -> Result<Result<Vec<Event>, Rejection>, CoreError> {
        let index = entry.index;
        let command = Command::decode(&*entry.data).map_err(|e| CoreError::Entry {
            index,
            why: e.to_string(),
        })?;
        match apply(&mut self.state, index, &command) {
            Err(Rejection::Unknown) => Err(CoreError::Unknown {
                index,
                source: Rejection::Unknown,
            }),
            result => {
                if result.is_ok() {
                    self.after(index, &command)?;
                }
                Ok(result)
            }
        }
    }

    /// What was proposed under an earlier leadership may or may not be applied some day: whoever waits must know.
    fn fail_what_lost_its_leader(&mut self, output: &mut Output) {
        let waiting = !self.proposed.is_empty() || !self.settling.is_empty();
        if self.raw.raft.state != StateRole::Leader && waiting && !fault!("lost_proposals_not_told")
        {
            let lost = std::mem::take(&mut self.proposed).into_values();
            let unsettled = std::mem::take(&mut self.settling).into_iter();
            let lost = lost.map(|(_, t)| t).chain(unsettled.map(|(_, t, _)| t));
            output
                .proposals
                .extend(lost.map(|ticket| (ticket, Proposed::Unknown)));
        }
    }
}

#[cfg(test)]
mod tests;
