//! Where a replica's log, vote and identity live: behind [`LogStore`], on disk ([`disk`]) or, in tests, in memory.
//!
//! A store only keeps what it is given and gives back what it kept. It knows nothing of leaders or commands, and does not decide
//! when a snapshot is taken. A snapshot ([`snapshot`]) is written beside the log, by whoever has the time; only then is the log told
//! that it may forget.

pub mod chunk;
pub mod disk;
pub mod memory;
mod open;
pub mod snapshot;
pub mod witness;

use std::path::PathBuf;

use batchai_proto::internal::v1::{LogBegin, ReplicaIdentity, SnapshotMark};
use raft::eraftpb::{Entry, HardState};

use crate::state::State;

/// The only format that this version reads: those before it, never released, knew nothing of the ensemble's replicas.
pub const FORMAT: i64 = 3;

/// Why a store cannot be opened or written. After a failed write the replica stops: what is on disk is not known.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {source}", path = .path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: the log's database refuses: {why}", path = .path.display())]
    Database { path: PathBuf, why: String },
    #[error(
        "{path}: damaged: {why}. Nothing was changed. A replica that may have lost acknowledged data must not \
         serve: restore the directory from a copy, or set it aside and start with a new one",
        path = .path.display()
    )]
    Damaged { path: PathBuf, why: String },
    #[error(
        "{path}: the store has format {found}, this version knows {FORMAT}; use the version that wrote it",
        path = .path.display()
    )]
    Format { path: PathBuf, found: i64 },
}

/// What a store held when it was opened.
#[derive(Debug, Default)]
pub struct Recovered {
    pub identity: ReplicaIdentity,
    pub hard_state: HardState,
    /// The latest snapshot.
    pub snapshot: Option<(SnapshotMark, State)>,
    /// The entry before the first.
    pub begin: Begin,
    /// Without gaps.
    pub entries: Vec<Entry>,
}

/// The last entry that the log has no more; 0 where it has all of them.
pub type Begin = LogBegin;

/// Keeps the log.
pub trait LogStore: Send {
    /// Keeps entries and hard state together. What they overlap is replaced. When it returns they survive a power cut.
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError>;

    /// Who writes snapshots: somewhere else, so that the log goes on meanwhile.
    fn snapshots(&self) -> Box<dyn Snapshots>;

    /// Forgets the log up to an entry, which a snapshot that was written stands for. What is forgotten goes bit by bit, with what is
    /// appended later.
    fn compact(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError>;

    /// Begins behind a snapshot that came from a peer and was written: nothing of the log before or behind it stays.
    fn install(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError>;
}

/// Writes snapshots.
pub trait Snapshots: Send {
    /// Writes one. When it returns it survives a power cut.
    fn write(&mut self, mark: &SnapshotMark, state: &State) -> Result<(), StoreError>;
}
