//! Who belongs to the ensemble, as raft sees it: how that is changed, and how each of them is.

use batchai_common::fault;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{ChangeReplica, Command};
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, Entry, EntryType,
    Message, MessageType,
};
use raft::{ProgressState, SnapshotStatus, StateRole};

use super::{Core, CoreError, Output, Proposed, Ticket};
use crate::replica::store::LogStore;
use crate::state::{Event, Rejection, apply, replicas};

/// A replica that is to get a vote may be so many entries behind: a vote that it cannot use would only raise the majority.
pub(super) const BEHIND_MAX: u64 = 100;

/// How a replica is, as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub votes: bool,
    /// Up to where it is known to have the log.
    pub matched: u64,
    /// It was heard of lately.
    pub active: bool,
    /// It is being sent a snapshot.
    pub in_snapshot: bool,
}

/// How a replica and its log are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub id: u64,
    pub leader: Option<u64>,
    pub term: u64,
    pub committed: u64,
    pub applied: u64,
    pub first: u64,
    pub last: u64,
    /// Bytes of the entries in memory.
    pub log_bytes: u64,
    pub snapshot: u64,
    /// Known to the leader only.
    pub members: Vec<Member>,
}

impl<S: LogStore> Core<S> {
    /// How it is.
    pub fn status(&self) -> Status {
        let log = &self.raw.raft.raft_log;
        let leads = self.raw.raft.state == StateRole::Leader;
        let voters = self.raw.raft.prs().conf().voters();
        let members = self.raw.raft.prs().iter().map(|(id, progress)| Member {
            id: *id,
            votes: voters.contains(*id),
            matched: progress.matched,
            active: self.is_active(*id),
            in_snapshot: progress.state == ProgressState::Snapshot,
        });
        let mut members: Vec<_> = members.filter(|_| leads).collect();
        members.sort_by_key(|member| member.id);
        Status {
            id: self.raw.raft.id,
            leader: self.leader(),
            term: self.raw.raft.term,
            committed: log.committed,
            applied: log.applied,
            first: log.first_index(),
            last: log.last_index(),
            log_bytes: self.raw.store().bytes(),
            snapshot: self.snapshot,
            members,
        }
    }

    /// Proposes another membership. What cannot be proposed comes back at once.
    pub fn change(
        &mut self,
        ticket: Ticket,
        command: &Command,
        change: &ChangeReplica,
    ) -> Option<(Ticket, Proposed)> {
        if !self.leads() {
            return Some((ticket, Proposed::NotLeader));
        }
        if let Some(why) = self.objection(change) {
            let name = replicas::name(change.id);
            let rejected = Err(Rejection::WrongState { name, why });
            return Some((ticket, Proposed::Applied(rejected)));
        }
        let single = ConfChangeSingle {
            change_type: match change.role() {
                Role::Learner => ConfChangeType::AddLearnerNode,
                Role::Voter => ConfChangeType::AddNode,
                Role::Removed | Role::Unspecified => ConfChangeType::RemoveNode,
            },
            node_id: change.id,
            ..ConfChangeSingle::default()
        };
        let change = ConfChangeV2 {
            // One at a time: any majority before has a member in any majority after, so that no joint configuration is needed, which
            // the one that goes would have to help to leave.
            transition: ConfChangeTransition::Auto,
            changes: vec![single].into(),
            ..ConfChangeV2::default()
        };
        let entry = Entry {
            entry_type: EntryType::EntryConfChangeV2,
            data: encoded(&change).into(),
            context: command.encode_to_vec().into(),
            ..Entry::default()
        };
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.raw.raft.id;
        message.entries = vec![entry].into();
        let (index, term) = (self.raw.raft.raft_log.last_index() + 1, self.raw.raft.term);
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "a change of membership refused");
            return Some((ticket, Proposed::NotLeader));
        }
        self.proposed.insert(index, (term, ticket));
        None
    }

    /// Why the membership should not be changed like that now; what the State says of it comes later.
    fn objection(&self, change: &ChangeReplica) -> Option<String> {
        let raft = &self.raw.raft;
        if raft.has_pending_conf() {
            return Some("another change of membership is under way; try again soon".to_owned());
        }
        let (role, progress) = (change.role(), raft.prs().get(change.id));
        if role == Role::Removed && change.id == raft.id {
            let why = "it leads: whoever leads after it removes it";
            return Some(why.to_owned());
        }
        if role == Role::Voter
            && let Some(progress) = progress
        {
            let behind = raft.raft_log.committed.saturating_sub(progress.matched);
            if !self.is_active(change.id) || progress.matched == 0 {
                return Some(
                    "it is not in contact: look at its log, and at its address".to_owned(),
                );
            }
            if behind > BEHIND_MAX && !fault!("vote_for_one_that_is_behind") {
                return Some(format!(
                    "it is {behind} entries behind; it gets a vote when it is at most {BEHIND_MAX} behind"
                ));
            }
        }
        let voters = raft.prs().conf().voters();
        let (mut all, mut active) = (0, 0);
        for (id, _) in raft.prs().iter() {
            let votes = match *id == change.id {
                true => role == Role::Voter,
                false => voters.contains(*id),
            };
            all += usize::from(votes);
            active += usize::from(votes && self.is_active(*id));
        }
        // A learner, who comes or goes, changes no majority.
        let changes = role == Role::Voter || voters.contains(change.id);
        (changes && active <= all / 2).then(|| {
            format!("of the {all} that would vote {active} are in contact: that is no majority")
        })
    }

    /// Applies a change of membership and what comes with it, both or neither.
    pub(super) fn apply_membership(
        &mut self,
        entry: &Entry,
    ) -> Result<Option<Result<Vec<Event>, Rejection>>, CoreError> {
        let index = entry.index;
        let bad = |why: String| CoreError::Entry { index, why };
        let mut change = ConfChangeV2::default();
        let read = change.merge_from_bytes(&entry.data);
        read.map_err(|error| bad(error.to_string()))?;
        let mut result = None;
        if !entry.context.is_empty() {
            let command = Command::decode(&*entry.context);
            let command = command.map_err(|error| bad(error.to_string()))?;
            if !matches!(command.kind, Some(Kind::ChangeReplica(_))) {
                return Err(bad("it is no change of membership".to_owned()));
            }
            let applied = apply(&mut self.state, index, &command);
            if applied.is_err() && !fault!("membership_changed_though_rejected") {
                return Ok(Some(applied));
            }
            result = Some(applied);
        }
        // A replica that starts again must not count by an older membership: it looks for changes among what it knows to be decided,
        // and what is decided is otherwise not written for its own sake.
        let mut hard_state = self.raw.store().hard_state().clone();
        hard_state.commit = hard_state.commit.max(index);
        self.store.append(&[], Some(&hard_state))?;
        self.raw.mut_store().set_hard_state(hard_state);
        let conf_state = self.raw.apply_conf_change(&change)?;
        self.raw.mut_store().set_conf_state(conf_state);
        Ok(result)
    }

    /// Answers for changes of the membership of which a majority of those who vote by now know that they are decided. Before that
    /// the others would still count by the membership before: where the leader is lost then, a replica that was removed would be missed.
    pub(super) fn settle(&mut self, output: &mut Output) {
        let Some(&(index, ..)) = self.settling.first() else {
            return;
        };
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return;
        }
        let voters = raft.prs().conf().voters();
        let (mut all, mut know) = (0, 0);
        for (id, progress) in raft.prs().iter().filter(|(id, _)| voters.contains(**id)) {
            let knows = *id == raft.id || progress.committed_index >= index;
            all += 1;
            know += usize::from(knows);
        }
        if know > all / 2 || fault!("membership_answered_at_once") {
            let (_, ticket, revision) = self.settling.remove(0);
            output
                .proposals
                .push((ticket, Proposed::Applied(Ok(revision))));
        }
    }

    /// Asks a voter to lead instead. Whether it does is seen by the leader's id.
    ///
    /// # Errors
    /// Says why it cannot.
    pub fn hand_over(&mut self, to: u64) -> Result<(), String> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return Err("this replica does not lead".to_owned());
        }
        if !raft.prs().conf().voters().contains(to) {
            return Err("it has no vote".to_owned());
        }
        let known = raft.prs().get(to);
        let behind = known.map_or(u64::MAX, |p| {
            raft.raft_log.committed.saturating_sub(p.matched)
        });
        if (behind > BEHIND_MAX || !self.is_active(to)) && !fault!("hand_over_while_behind") {
            return Err("it is not in contact, or far behind".to_owned());
        }
        self.raw.transfer_leader(to);
        Ok(())
    }

    /// Who could lead instead of this replica: the voter that has most of the log, of those in contact.
    pub fn heir(&self) -> Option<u64> {
        let members = self.status().members.into_iter();
        let others = members.filter(|m| m.votes && m.active && m.id != self.raw.raft.id);
        others.max_by_key(|member| member.matched).map(|m| m.id)
    }

    /// A peer was not reached.
    pub fn unreachable(&mut self, peer: u64) {
        self.raw.report_unreachable(peer);
    }

    /// A snapshot came to a peer, or did not.
    pub fn snapshot_sent(&mut self, peer: u64, arrived: bool) {
        let status = match arrived {
            true => SnapshotStatus::Finish,
            false => SnapshotStatus::Failure,
        };
        self.raw.report_snapshot(peer, status);
    }
}

fn encoded(message: &impl protobuf::Message) -> Vec<u8> {
    let bytes = message.write_to_bytes();
    bytes.expect("what is in memory can be encoded")
}
