//! Where a replica's log, vote and identity live: behind [`LogStore`], on disk ([`disk`]) or, in tests, in memory.
//!
//! A store only keeps what it is given and gives back what it kept. It knows nothing of leaders, commands or State;
//! it does not compact, and it takes no snapshots yet.

pub mod chunk;
pub mod disk;
pub mod memory;
pub mod witness;

use std::path::PathBuf;

use batchai_proto::internal::v1::ReplicaIdentity;
use raft::eraftpb::{Entry, HardState};

/// The only format that this version reads: the one before it, never released, used the numbers of commands otherwise.
pub const FORMAT: i64 = 2;

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
    /// Without gaps, from index 1.
    pub entries: Vec<Entry>,
}

/// Keeps the log.
pub trait LogStore: Send {
    /// Keeps entries and hard state together. What they overlap is replaced. When it returns they survive a power cut.
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError>;
}
