//! The store on disk: a sled database with one tree, and the witness file beside it.
//!
//! The only way to commit is [`DiskStore::append`]: one batch, the database's flush, `fdatasync` of its file (the flush
//! alone asks the kernel to write but does not make it durable), then the witness. The database runs no thread of its
//! own that would flush behind our back.

use batchai_common::fault;
use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use batchai_proto::internal::v1::{ReplicaIdentity, SnapshotMark};
use prost::Message as _;
use raft::eraftpb::{Entry, HardState};

use super::chunk::{self, Record};
use super::open::{
    BEGIN_KEY, Copied, HARD_STATE_KEY, SNAPSHOT_KEY, SNAPSHOTS, check_snapshot, compare, create,
    damaged, encode, forget_what_was_cut_off, index, io, open_database, read_all, read_snapshot,
};
use super::witness::{Mark, Witness};
use super::{Begin, FORMAT, LogStore, Recovered, Snapshots, StoreError, snapshot};
use crate::state::State;

/// Chunks of the forgotten prefix that go with one append: many at once would hold it up.
const FORGOTTEN_AT_ONCE: usize = 8;

type Chunks = BTreeMap<u64, (u64, u16)>;

/// A log on disk.
pub struct DiskStore {
    path: PathBuf,
    db: sled::Db,
    /// Our own handle on the database's file, to sync it.
    file: File,
    witness: Witness,
    mark: Mark,
    /// First index -> last index and number of parts.
    chunks: Chunks,
    /// What is up to here may go.
    begin: Begin,
}

/// Opens a database that is the store's, or a copy of it, and reads all of it.
fn look(path: &Path, log: &Path, mark: Mark) -> Result<(sled::Db, Chunks, Recovered), StoreError> {
    let db = open_database(log, path)?;
    // Iterating damaged pages may panic inside the database.
    let read = catch_unwind(AssertUnwindSafe(|| read_all(path, &db)));
    let (identity, hard_state, log, records) =
        read.unwrap_or_else(|_| Err(damaged(path, "the database panics when it is read")))?;
    if identity.format != FORMAT {
        return Err(StoreError::Format {
            path: path.to_owned(),
            found: identity.format,
        });
    }
    let begin = log.begin;
    let entries = chunk::unpack_behind(begin.index, &records);
    let entries = entries.map_err(|why| damaged(path, &why))?;
    let chunks = index(&entries, &records);
    let snapshot = read_snapshot(path, log.mark)?;
    check_snapshot(path, begin, &snapshot, &entries)?;
    compare(path, mark, &identity, &hard_state, (begin, &entries))?;
    let recovered = Recovered {
        identity,
        hard_state,
        snapshot,
        begin,
        entries,
    };
    Ok((db, chunks, recovered))
}

impl DiskStore {
    /// Opens the store in a directory, or makes one there for a new replica.
    ///
    /// # Errors
    /// Refuses what is damaged, incomplete or of another format, and changes nothing of it.
    pub fn open(path: &Path, new: &ReplicaIdentity) -> Result<(DiskStore, Recovered), StoreError> {
        DiskStore::open_if(path, new, |_| Ok(()))
    }

    /// Opens the store as [`DiskStore::open`] does, if it is the one that is meant.
    ///
    /// # Errors
    /// What `is_meant` says of the store's identity as well, and nothing of that store is changed either.
    pub fn open_if<E: From<StoreError>>(
        path: &Path,
        new: &ReplicaIdentity,
        is_meant: impl FnOnce(&ReplicaIdentity) -> Result<(), E>,
    ) -> Result<(DiskStore, Recovered), E> {
        if !path.exists() {
            create(path, new)?;
        }
        let log = path.join("log");
        let witness_path = path.join("witness");
        let missing = match (log.join("db").exists(), witness_path.exists()) {
            (true, true) => None,
            (false, false) => Some("the log and its witness are missing"),
            (true, false) => Some("the witness file is missing"),
            (false, true) => Some("the log is missing, its witness is there"),
        };
        if let Some(why) = missing {
            return Err(damaged(path, why).into());
        }
        let opened = Witness::open(&witness_path).map_err(io(&witness_path))?;
        let (witness, mark) =
            opened.ok_or_else(|| damaged(path, "neither slot of the witness file is whole"))?;
        // Opening a database writes to it, and to a damaged one more than it may: that is done to a copy first.
        let copy = Copied::of(path)?;
        let (copied, _, recovered) = look(path, &copy.log(), mark)?;
        is_meant(&recovered.identity)?;
        drop((copied, recovered, copy));
        forget_what_was_cut_off(&log)?;
        let (db, chunks, recovered) = look(path, &log, mark)?;
        let begin = recovered.begin;
        let file = File::open(path.join("log/db")).map_err(io(path))?;
        let store = DiskStore {
            path: path.to_owned(),
            db,
            file,
            witness,
            mark,
            chunks,
            begin,
        };
        Ok((store, recovered))
    }

    fn commit(&mut self, batch: sled::Batch) -> Result<(), StoreError> {
        let database = |e: sled::Error| StoreError::Database {
            path: self.path.clone(),
            why: e.to_string(),
        };
        self.db.apply_batch(batch).map_err(database)?;
        self.db.flush().map_err(database)?;
        if fault!("log_not_synced") {
            return Ok(());
        }
        self.file.sync_data().map_err(io(&self.path))
    }

    /// Removes everything from an index on; what a chunk holds before it is written again.
    fn truncate(&mut self, from: u64, batch: &mut sled::Batch) -> Result<(), StoreError> {
        // The witness must never promise what is about to go.
        if !fault!("witness_promises_what_goes") {
            self.mark.last = from - 1;
        }
        self.witness.write(self.mark).map_err(io(&self.path))?;
        let spanning = self
            .chunks
            .range(..from)
            .next_back()
            .map(|(first, c)| (*first, *c));
        if let Some((first, (_, parts))) = spanning.filter(|(_, (last, _))| *last >= from) {
            let records = self.read_chunk(first, parts)?;
            let entries = chunk::unpack_from(first, &records);
            let entries = entries.map_err(|why| damaged(&self.path, &why))?;
            self.remove(first, parts, batch);
            let keep = entries
                .into_iter()
                .filter(|e| e.index < from && !fault!("whole_chunk_truncated"));
            let keep: Vec<_> = keep.collect();
            self.insert(&keep, batch);
        }
        for (first, (_, parts)) in self
            .chunks
            .range(from..)
            .map(|(f, c)| (*f, *c))
            .collect::<Vec<_>>()
        {
            self.remove(first, parts, batch);
        }
        Ok(())
    }

    fn read_chunk(&self, first: u64, parts: u16) -> Result<Vec<Record>, StoreError> {
        let read = |part| {
            let key = chunk::key(first, part);
            let value = self
                .db
                .get(&key)
                .map_err(|e| damaged(&self.path, &e.to_string()))?;
            let value = value.ok_or_else(|| damaged(&self.path, "a chunk vanished"))?;
            Ok((key, value.to_vec()))
        };
        (0..parts).map(read).collect()
    }

    fn insert(&mut self, entries: &[Entry], batch: &mut sled::Batch) {
        for chunk in chunk::pack(entries) {
            self.chunks
                .insert(chunk.first, (chunk.last, chunk.records.len() as u16));
            for (key, value) in chunk.records {
                batch.insert(key, value);
            }
        }
    }

    /// Removes some of what the log need not have any more: whole chunks, the oldest first.
    fn forget(&mut self, batch: &mut sled::Batch) {
        let begin = self.begin.index;
        let old = self
            .chunks
            .iter()
            .take_while(|(_, (last, _))| *last <= begin);
        let old: Vec<_> = old
            .take(FORGOTTEN_AT_ONCE)
            .map(|(first, (_, parts))| (*first, *parts))
            .collect();
        for (first, parts) in old {
            self.remove(first, parts, batch);
        }
    }

    fn remove(&mut self, first: u64, parts: u16, batch: &mut sled::Batch) {
        self.chunks.remove(&first);
        for part in 0..parts {
            batch.remove(chunk::key(first, part));
        }
    }
}

impl LogStore for DiskStore {
    fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        if let Some(first) = entries.first() {
            let last = self
                .chunks
                .last_key_value()
                .map_or(0, |(_, (last, _))| *last);
            if first.index <= last {
                self.truncate(first.index, &mut batch)?;
            }
            self.insert(entries, &mut batch);
        }
        if let Some(hard_state) = hard_state {
            batch.insert(HARD_STATE_KEY, encode(hard_state));
        }
        self.forget(&mut batch);
        self.commit(batch)?;
        let before = self.mark;
        if let Some(last) = entries.last() {
            self.mark.last = last.index;
        }
        if let Some(hard_state) = hard_state {
            (self.mark.term, self.mark.vote) = (hard_state.term, hard_state.vote);
        }
        if self.mark != before && !fault!("witness_not_written") {
            self.witness.write(self.mark).map_err(io(&self.path))?;
        }
        Ok(())
    }

    fn snapshots(&self) -> Box<dyn Snapshots> {
        Box::new(Files {
            path: self.path.clone(),
        })
    }

    fn install(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        let last = self
            .chunks
            .last_key_value()
            .map_or(0, |(_, (last, _))| *last);
        if last > begin.index {
            self.truncate(begin.index + 1, &mut batch)?;
        }
        self.relies_on(mark, begin, batch)?;
        // The log holds nothing up to there any more, and is whole.
        self.mark.last = begin.index;
        self.witness.write(self.mark).map_err(io(&self.path))
    }

    fn compact(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        self.relies_on(mark, begin, sled::Batch::default())
    }
}

impl DiskStore {
    /// Remembers which snapshot stands for what, and only then removes the one before.
    fn relies_on(
        &mut self,
        mark: &SnapshotMark,
        begin: Begin,
        mut batch: sled::Batch,
    ) -> Result<(), StoreError> {
        batch.insert(SNAPSHOT_KEY, mark.encode_to_vec());
        batch.insert(BEGIN_KEY, begin.encode_to_vec());
        self.begin = begin;
        self.commit(batch)?;
        // Only now: until then the log relied on an earlier one.
        let dir = self.path.join(SNAPSHOTS);
        snapshot::sweep(&dir, mark.index).map_err(io(&dir))
    }
}

/// Writes snapshots beside the log.
struct Files {
    path: PathBuf,
}

impl Snapshots for Files {
    fn write(&mut self, mark: &SnapshotMark, state: &State) -> Result<(), StoreError> {
        let dir = self.path.join(SNAPSHOTS);
        snapshot::write(&dir, mark, state).map_err(io(&dir))
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
