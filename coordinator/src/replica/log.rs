//! The log as raft sees it: in memory, from behind what a snapshot stands for to its end.
//!
//! What is in it is in the store as well; this is what raft reads. A follower that is too far behind for what is there gets the
//! latest snapshot.

use batchai_common::fault;
use std::cell::Cell;

use batchai_proto::internal::v1::SnapshotMark;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Result, Storage, StorageError};

use super::store::Begin;
use crate::state::State;

/// The log in memory.
#[derive(Default)]
pub struct Log {
    hard_state: HardState,
    conf_state: ConfState,
    /// The entry before the first.
    begin: Begin,
    entries: Vec<Entry>,
    snapshot: Option<(SnapshotMark, State)>,
    /// Somebody needs a later one.
    wanted: Cell<bool>,
}

impl Log {
    /// A log that begins behind an entry.
    pub fn new(begin: Begin, conf_state: ConfState) -> Log {
        Log {
            begin,
            conf_state,
            ..Log::default()
        }
    }

    /// Takes entries in; what they overlap is replaced.
    pub fn append(&mut self, entries: &[Entry]) {
        if let Some(first) = entries.first() {
            let keep = first
                .index
                .saturating_sub(self.begin.index + u64::from(!fault!("overlap_off_by_one")));
            self.entries.truncate(keep as usize);
            self.entries.extend_from_slice(entries);
        }
    }

    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    pub fn set_commit(&mut self, commit: u64) {
        self.hard_state.commit = commit;
    }

    pub fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    pub fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    /// The entry before the first.
    pub fn begin(&self) -> Begin {
        self.begin
    }

    /// The index and term of an entry, where it is known.
    pub fn entry(&self, index: u64) -> Option<Begin> {
        let term = self.term(index).ok()?;
        Some(Begin { index, term })
    }

    /// Forgets everything up to an entry.
    pub fn begin_behind(&mut self, begin: Begin) {
        let gone = begin
            .index
            .saturating_sub(self.begin.index + u64::from(fault!("begin_off_by_one")))
            as usize;
        self.entries.drain(..gone.min(self.entries.len()));
        self.begin = begin;
    }

    /// Begins anew behind an entry, and has none.
    pub fn restart(&mut self, begin: Begin, conf_state: ConfState) {
        self.entries.clear();
        self.begin = begin;
        self.conf_state = conf_state;
        self.hard_state.commit = self.hard_state.commit.max(begin.index);
        self.hard_state.term = self.hard_state.term.max(begin.term);
    }

    /// What followers that are behind get from now on.
    pub fn set_snapshot(&mut self, mark: SnapshotMark, state: State) {
        self.wanted.set(false);
        self.snapshot = Some((mark, state));
    }

    /// What followers that are behind get now.
    pub fn latest_snapshot(&self) -> Option<&(SnapshotMark, State)> {
        self.snapshot.as_ref()
    }

    /// Whether a follower waits for a later one.
    pub fn wants_snapshot(&self) -> bool {
        self.wanted.get()
    }

    /// Bytes of the entries.
    pub fn bytes(&self) -> u64 {
        self.entries
            .iter()
            .map(|entry| entry.data.len() as u64)
            .sum()
    }

    fn last(&self) -> u64 {
        self.begin.index + self.entries.len() as u64
    }
}

impl Storage for Log {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(RaftState::new(
            self.hard_state.clone(),
            self.conf_state.clone(),
        ))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low <= self.begin.index {
            return Err(StorageError::Compacted.into());
        }
        let at = |index: u64| (index - self.begin.index - 1) as usize;
        let found = self.entries.get(at(low)..at(high));
        let mut found = found.ok_or(StorageError::Unavailable)?.to_vec();
        raft::util::limit_size(&mut found, max_size.into());
        Ok(found)
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index == self.begin.index {
            return Ok(self.begin.term);
        }
        let at = index.checked_sub(self.begin.index + 1);
        let at = at.ok_or(StorageError::Compacted)? as usize;
        let found = self.entries.get(at).ok_or(StorageError::Unavailable)?;
        Ok(found.term)
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.begin.index + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> Result<Snapshot> {
        let latest = self.snapshot.as_ref();
        let fits = latest.filter(|(mark, _)| mark.index >= request_index);
        let fits = fits.and_then(|(mark, _)| {
            let mut conf_state = ConfState::default();
            conf_state.merge_from_bytes(&mark.conf_state).ok()?;
            // Who finds himself not among its replicas would not take it.
            (fault!("snapshot_for_a_stranger") || has(&conf_state, to))
                .then_some((mark, conf_state))
        });
        let Some((mark, conf_state)) = fits else {
            self.wanted.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        };
        let mut snapshot = Snapshot::default();
        let meta = snapshot.mut_metadata();
        (meta.index, meta.term) = (mark.index, mark.term);
        meta.set_conf_state(conf_state);
        // Its bytes are made elsewhere, as they are sent.
        Ok(snapshot)
    }
}

fn has(conf_state: &ConfState, id: u64) -> bool {
    conf_state.voters.contains(&id) || conf_state.learners.contains(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry {
            index,
            term,
            data: vec![0; 100].into(),
            ..Entry::default()
        }
    }

    #[test]
    fn it_shows_what_is_behind_its_begin_and_nothing_else() {
        let mut log = Log::new(Begin { index: 4, term: 2 }, ConfState::default());
        assert_eq!(
            (log.first_index().unwrap(), log.last_index().unwrap()),
            (5, 4)
        );
        log.append(&[entry(5, 2), entry(6, 2), entry(7, 3)]);
        log.append(&[entry(7, 4), entry(8, 4)]);
        let terms: Vec<_> = (3..10).map(|index| log.term(index).ok()).collect();
        assert_eq!(
            terms,
            [None, Some(2), Some(2), Some(2), Some(4), Some(4), None]
        );
        let context = || GetEntriesContext::empty(false);
        let get = |log: &Log, low, high, most: u64| -> Option<Vec<u64>> {
            let found = log.entries(low, high, most, context()).ok()?;
            Some(found.iter().map(|entry| entry.index).collect())
        };
        assert_eq!(get(&log, 5, 9, u64::MAX), Some(vec![5, 6, 7, 8]));
        assert_eq!(get(&log, 5, 9, 150), Some(vec![5]), "one at least");
        assert_eq!(get(&log, 4, 9, u64::MAX), None);
        assert_eq!(get(&log, 5, 10, u64::MAX), None);
        log.begin_behind(log.entry(7).unwrap());
        assert_eq!(get(&log, 8, 9, u64::MAX), Some(vec![8]));
        assert_eq!((log.term(7).unwrap(), log.term(6).is_err()), (4, true));
        log.begin_behind(log.entry(8).unwrap());
        assert_eq!(
            (log.first_index().unwrap(), log.last_index().unwrap()),
            (9, 8)
        );
    }
}
