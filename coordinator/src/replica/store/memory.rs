//! A store in memory: the twin of the disk's for tests and simulations.

use std::sync::{Arc, Mutex, PoisonError};

use batchai_proto::internal::v1::ReplicaIdentity;
use raft::eraftpb::{Entry, HardState};

use super::{LogStore, Recovered, StoreError};

/// Keeps everything in memory. A clone is the same disk, so that a test can restart a replica on it.
#[derive(Clone, Default)]
pub struct MemoryStore {
    kept: Arc<Mutex<(HardState, Vec<Entry>)>>,
}

impl MemoryStore {
    /// What was kept.
    pub fn recover(&self, identity: ReplicaIdentity) -> Recovered {
        let (hard_state, entries) = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        Recovered {
            identity,
            hard_state,
            entries,
        }
    }
}

impl LogStore for MemoryStore {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hard_state) = hard_state {
            kept.0 = hard_state.clone();
        }
        if let Some(first) = entries.first() {
            kept.1.retain(|entry| entry.index < first.index);
            kept.1.extend_from_slice(entries);
        }
        Ok(())
    }
}
