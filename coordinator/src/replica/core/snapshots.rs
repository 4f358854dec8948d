//! Snapshots: when one is due, what it stands for, and what becomes of the log; those that come from peers.

use batchai_common::fault;
use batchai_proto::internal::v1::SnapshotMark;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Message, Snapshot};

use super::{Core, CoreError};
use crate::replica::store::{Begin, LogStore, Snapshots};
use crate::state::State;

impl<S: LogStore> Core<S> {
    /// What a snapshot would stand for now, and the State; none where it is too early, unless it is wanted now. The caller has it
    /// written and says so by `compact`, or asks again.
    pub fn snapshot_due(&self, now: bool) -> Option<(SnapshotMark, State)> {
        let index = self.raw.raft.raft_log.applied;
        let due = now
            || self.raw.store().wants_snapshot()
            || index.saturating_sub(self.snapshot) >= self.policy.entries
            || self.unsaved_bytes >= self.policy.bytes;
        let entry = self
            .raw
            .store()
            .entry(index)
            .filter(|_| due && index > self.snapshot)?;
        let conf_state = self.raw.store().conf_state().write_to_bytes();
        let mark = SnapshotMark {
            index: index - u64::from(fault!("snapshot_index_off_by_one")),
            term: entry.term,
            conf_state: conf_state.expect("what is in memory can be encoded"),
        };
        Some((mark, self.state.clone()))
    }

    /// A snapshot was written: the log before it may go, but for what is kept.
    ///
    /// # Errors
    /// The replica must stop: what is on disk is not known.
    pub fn compact(&mut self, mark: &SnapshotMark, state: State) -> Result<(), CoreError> {
        // A later one may have come from a peer meanwhile.
        if mark.index <= self.snapshot {
            return Ok(());
        }
        let until = mark.index.saturating_sub(self.policy.kept);
        let begin = self.raw.store().entry(until).unwrap_or_default();
        let begin = match begin.index {
            // It begins behind that already.
            0 => self.raw.store().begin(),
            _ => begin,
        };
        self.store.compact(mark, begin)?;
        let log = self.raw.mut_store();
        log.begin_behind(begin);
        log.set_snapshot(mark.clone(), state);
        (self.snapshot, self.unsaved_bytes) = (mark.index, 0);
        Ok(())
    }

    /// Who writes snapshots.
    pub fn snapshots(&self) -> Box<dyn Snapshots> {
        self.store.snapshots()
    }

    /// A message of a peer that names a snapshot, and the snapshot, which was written by `snapshots`.
    ///
    /// # Errors
    /// As `step`.
    pub fn step_snapshot(
        &mut self,
        message: Message,
        mark: SnapshotMark,
        state: State,
    ) -> Result<(), CoreError> {
        let meta = message.get_snapshot().get_metadata();
        if (mark.index, mark.term) != (meta.index, meta.term) {
            let why = "it is not the one that was announced".to_owned();
            return Err(CoreError::Snapshot { why });
        }
        self.came.push((mark, state));
        Ok(self.raw.step(message)?)
    }

    /// What a message of this replica names that has no data of its own.
    pub fn snapshot_of(&self, message: &Message) -> Option<(SnapshotMark, State)> {
        let index = message.get_snapshot().get_metadata().index;
        let latest = self.raw.store().latest_snapshot();
        latest.filter(|(mark, _)| mark.index == index).cloned()
    }

    /// Takes a snapshot in, in place of everything that was there.
    pub(super) fn install(&mut self, snapshot: &Snapshot) -> Result<(), CoreError> {
        let meta = snapshot.get_metadata();
        let mut came = self.came.drain(..);
        let came = came.find(|(mark, _)| (mark.index, mark.term) == (meta.index, meta.term));
        let (mark, state) = came.ok_or_else(|| CoreError::Snapshot {
            why: "what raft wants to take is not what came".to_owned(),
        })?;
        let begin = Begin {
            index: mark.index,
            term: mark.term,
        };
        self.store.install(&mark, begin)?;
        let log = self.raw.mut_store();
        log.restart(begin, meta.get_conf_state().clone());
        log.set_snapshot(mark, state.clone());
        self.state = if fault!("state_not_from_snapshot") {
            self.state.clone()
        } else {
            state
        };
        (self.snapshot, self.unsaved_bytes) = (begin.index, 0);
        // Who waits for what is in it learns that it may have been applied.
        Ok(())
    }
}

pub(super) fn read_conf_state(mark: &SnapshotMark) -> Result<ConfState, CoreError> {
    let mut conf_state = ConfState::default();
    let read = conf_state.merge_from_bytes(&mark.conf_state);
    read.map_err(|error| CoreError::Entry {
        index: mark.index,
        why: error.to_string(),
    })?;
    Ok(conf_state)
}
