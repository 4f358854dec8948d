//! The disks of replicas: each is a store in memory that may take its time with a write, or die with its machine amid one.
//!
//! What was kept of a write amid which the machine died is a beginning of its entries with the term and the vote, or nothing: the
//! database of the real store keeps a write whole or not at all, which is the easier case. Entries that come without the term
//! under which they were written are not played: nobody could begin from them. Snapshots are written whole.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use batchai_coordinator::replica::store::memory::MemoryStore;
use batchai_coordinator::replica::store::{Begin, LogStore, Recovered, Snapshots, StoreError};
use batchai_proto::internal::v1::{ReplicaIdentity, SnapshotMark};
use raft::eraftpb::{Entry, HardState};

/// What the next write will meet.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// It takes so many steps.
    Slow(u64),
    /// The machine dies before anything of it is there.
    Lost,
    /// The machine dies when so many thousandths of the entries are there.
    Torn(usize),
}

/// How writes went since that was asked last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Went {
    /// Something was written: what is sent from then on relies on it.
    pub written: bool,
    /// Steps that it takes.
    pub slow: u64,
    /// The machine died amid it; and whether something new was kept.
    pub died: Option<bool>,
}

#[derive(Default)]
struct Fate {
    next: Option<Trouble>,
    went: Went,
}

/// A disk. A clone is the same one.
#[derive(Clone, Default)]
pub struct Disk {
    store: MemoryStore,
    fate: Arc<Mutex<Fate>>,
}

impl Disk {
    pub fn recover(&self, identity: ReplicaIdentity) -> Recovered {
        self.store.recover(identity)
    }

    /// Has the next write meet something.
    pub fn trouble(&self, next: Option<Trouble>) {
        self.fate().next = next;
    }

    /// How writes went until now.
    pub fn went(&self) -> Went {
        self.fate().went
    }

    /// The same; what comes is counted anew.
    pub fn take(&self) -> Went {
        std::mem::take(&mut self.fate().went)
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogStore for Disk {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError> {
        let next = self.fate().next.take();
        let kept = match next {
            None => None,
            Some(Trouble::Slow(steps)) => {
                self.fate().went.slow += steps;
                None
            }
            Some(Trouble::Lost) => Some(None),
            Some(Trouble::Torn(share)) => Some(Some(entries.len() * share.min(1000) / 1000)),
        };
        self.fate().went.written = true;
        let Some(kept) = kept else {
            return self.store.append(entries, hard_state);
        };
        if let Some(kept) = kept {
            // What is committed is not what is not there: else what stood in its place would be taken for it.
            let mut there = hard_state.cloned();
            if let (Some(there), Some(first)) = (&mut there, entries.first()) {
                there.commit = there.commit.min(first.index - 1 + kept as u64);
            }
            self.store.append(&entries[..kept], there.as_ref())?;
        }
        self.fate().went.died = Some(kept.is_some() && !entries.is_empty());
        Err(StoreError::Io {
            path: "memory".into(),
            source: std::io::Error::other("the machine dies"),
        })
    }

    fn snapshots(&self) -> Box<dyn Snapshots> {
        self.store.snapshots()
    }

    fn compact(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        self.store.compact(mark, begin)
    }

    fn install(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        self.store.install(mark, begin)
    }
}
