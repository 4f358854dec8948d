//! A store in memory: the twin of the disk's for tests and simulations.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use batchai_proto::internal::v1::{ReplicaIdentity, SnapshotMark};
use raft::eraftpb::{Entry, HardState};

use super::{Begin, LogStore, Recovered, Snapshots, StoreError};
use crate::state::State;

/// Keeps everything in memory. A clone is the same disk, so that a test can restart a replica on it.
#[derive(Clone, Default)]
pub struct MemoryStore {
    kept: Arc<Mutex<Kept>>,
}

#[derive(Clone, Default)]
struct Kept {
    hard_state: HardState,
    entries: Vec<Entry>,
    begin: Begin,
    /// The latest that was written, and the one that the log relies on.
    written: Option<(SnapshotMark, State)>,
    snapshot: Option<(SnapshotMark, State)>,
}

impl MemoryStore {
    /// What was kept.
    pub fn recover(&self, identity: ReplicaIdentity) -> Recovered {
        let kept = self.kept().clone();
        Recovered {
            identity,
            hard_state: kept.hard_state,
            snapshot: kept.snapshot,
            begin: kept.begin,
            entries: kept.entries,
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogStore for MemoryStore {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError> {
        let mut kept = self.kept();
        if let Some(hard_state) = hard_state {
            kept.hard_state = hard_state.clone();
        }
        if let Some(first) = entries.first() {
            kept.entries.retain(|entry| entry.index < first.index);
            kept.entries.extend_from_slice(entries);
        }
        Ok(())
    }

    fn snapshots(&self) -> Box<dyn Snapshots> {
        Box::new(self.clone())
    }

    fn compact(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        let mut kept = self.kept();
        let written = kept.written.clone().filter(|(known, _)| known == mark);
        kept.snapshot = written.or(kept.snapshot.take());
        kept.entries.retain(|entry| entry.index > begin.index);
        kept.begin = begin;
        Ok(())
    }

    fn install(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        self.kept().entries.clear();
        self.compact(mark, begin)
    }
}

impl Snapshots for MemoryStore {
    fn write(&mut self, mark: &SnapshotMark, state: &State) -> Result<(), StoreError> {
        self.kept().written = Some((mark.clone(), state.clone()));
        Ok(())
    }
}
