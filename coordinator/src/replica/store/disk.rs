//! The store on disk: a sled database with one tree, and the witness file beside it.
//!
//! The only way to commit is [`DiskStore::append`]: one batch, the database's flush, `fdatasync` of its file (the flush
//! alone asks the kernel to write but does not make it durable), then the witness. The database runs no thread of its
//! own that would flush behind our back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use batchai_proto::internal::v1::{ReplicaIdentity, SnapshotMark};
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{Entry, HardState};

use super::chunk::{self, Record};
use super::witness::{Mark, Witness};
use super::{Begin, FORMAT, LogStore, Recovered, Snapshots, StoreError, snapshot};
use crate::state::State;

/// Values of 20 KB stay inside the database's one file only with segments of this size.
const SEGMENT_BYTES: usize = 8 << 20;
const CACHE_BYTES: u64 = 64 << 20;
/// How the database says that it is open elsewhere. That this is no other process, the data directory's lock says.
const LOCKED: &str = "could not acquire lock";
const LOCK_WAIT_STEP: Duration = Duration::from_millis(5);
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
const HARD_STATE_KEY: &[u8] = b"H";
const IDENTITY_KEY: &[u8] = b"I";
const BEGIN_KEY: &[u8] = b"B";
const SNAPSHOT_KEY: &[u8] = b"S";
/// Where snapshots lie.
const SNAPSHOTS: &str = "snapshots";
/// Chunks of the forgotten prefix that go with one append: many at once would hold it up.
const FORGOTTEN_AT_ONCE: usize = 8;

/// A log on disk.
pub struct DiskStore {
    path: PathBuf,
    db: sled::Db,
    /// Our own handle on the database's file, to sync it.
    file: File,
    witness: Witness,
    mark: Mark,
    /// First index -> last index and number of parts.
    chunks: BTreeMap<u64, (u64, u16)>,
    /// What is up to here may go.
    begin: Begin,
}

impl DiskStore {
    /// Opens the store in a directory, or makes one there for a new replica.
    ///
    /// # Errors
    /// Refuses what is damaged, incomplete or of another format, and changes nothing of it.
    pub fn open(path: &Path, new: &ReplicaIdentity) -> Result<(DiskStore, Recovered), StoreError> {
        if !path.exists() {
            create(path, new)?;
        }
        let log = path.join("log");
        let witness_path = path.join("witness");
        match (log.join("db").exists(), witness_path.exists()) {
            (true, true) => {}
            (false, false) => return Err(damaged(path, "the log and its witness are missing")),
            (true, false) => return Err(damaged(path, "the witness file is missing")),
            (false, true) => return Err(damaged(path, "the log is missing, its witness is there")),
        }
        let opened = Witness::open(&witness_path).map_err(io(&witness_path))?;
        let (witness, mark) =
            opened.ok_or_else(|| damaged(path, "neither slot of the witness file is whole"))?;
        let db = open_database(&log)?;
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
        let entries = chunk::unpack_from(first_of(&records), &records);
        let entries = entries.map_err(|why| damaged(path, &why))?;
        let chunks = index(&entries, &records);
        let (begin, snapshot) = (log.begin, read_snapshot(path, log.mark)?);
        let entries = behind(path, begin, &snapshot, entries)?;
        compare(path, mark, &identity, &hard_state, (begin, &entries))?;
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
        Ok((
            store,
            Recovered {
                identity,
                hard_state,
                snapshot,
                begin,
                entries,
            },
        ))
    }

    fn commit(&mut self, batch: sled::Batch) -> Result<(), StoreError> {
        let database = |e: sled::Error| StoreError::Database {
            path: self.path.clone(),
            why: e.to_string(),
        };
        self.db.apply_batch(batch).map_err(database)?;
        self.db.flush().map_err(database)?;
        self.file.sync_data().map_err(io(&self.path))
    }

    /// Removes everything from an index on; what a chunk holds before it is written again.
    fn truncate(&mut self, from: u64, batch: &mut sled::Batch) -> Result<(), StoreError> {
        // The witness must never promise what is about to go.
        self.mark.last = from - 1;
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
            let keep: Vec<_> = entries.into_iter().filter(|e| e.index < from).collect();
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
        if self.mark != before {
            self.witness.write(self.mark).map_err(io(&self.path))?;
        }
        Ok(())
    }

    fn snapshots(&self) -> Box<dyn Snapshots> {
        Box::new(Files {
            path: self.path.clone(),
        })
    }

    fn compact(&mut self, mark: &SnapshotMark, begin: Begin) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
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

fn encode(hard_state: &HardState) -> Vec<u8> {
    hard_state
        .write_to_bytes()
        .expect("a hard state in memory can be encoded")
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        path: path.clone(),
        source,
    }
}

fn damaged(path: &Path, why: &str) -> StoreError {
    StoreError::Damaged {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

/// A database that was just closed keeps its lock until a thread of its own has ended: that is waited for.
fn open_database(log: &Path) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new()
        .path(log)
        .flush_every_ms(None)
        .cache_capacity(CACHE_BYTES)
        .segment_size(SEGMENT_BYTES);
    let mut waited = Duration::ZERO;
    loop {
        let opened = catch_unwind(AssertUnwindSafe(|| config.open()));
        let opened = opened.map_err(|_| damaged(log, "the database panics when it is opened"))?;
        match opened {
            Err(error) if error.to_string().contains(LOCKED) && waited < LOCK_WAIT_MAX => {
                std::thread::sleep(LOCK_WAIT_STEP);
                waited += LOCK_WAIT_STEP;
            }
            opened => {
                let path = log.to_owned();
                return opened.map_err(|e| StoreError::Database {
                    path,
                    why: e.to_string(),
                });
            }
        }
    }
}

/// Makes a new store beside its place and moves it there whole: a store is complete or does not exist.
fn create(path: &Path, identity: &ReplicaIdentity) -> Result<(), StoreError> {
    let new = path.with_extension("new");
    if new.exists() {
        fs::remove_dir_all(&new).map_err(io(&new))?;
    }
    let log = new.join("log");
    fs::create_dir_all(&log).map_err(io(&log))?;
    {
        let db = open_database(&log)?;
        let database = |e: sled::Error| StoreError::Database {
            path: log.clone(),
            why: e.to_string(),
        };
        let mut batch = sled::Batch::default();
        batch.insert(IDENTITY_KEY, identity.encode_to_vec());
        batch.insert(HARD_STATE_KEY, encode(&HardState::default()));
        db.apply_batch(batch).map_err(database)?;
        db.flush().map_err(database)?;
    }
    let sync = |dir: &Path| {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(io(dir))
    };
    let mark = Mark {
        replica: identity.replica_id,
        ..Mark::default()
    };
    let witness = new.join("witness");
    Witness::create(&witness, mark).map_err(io(&witness))?;
    // The database syncs its log only, and not what it writes beside it.
    for entry in fs::read_dir(&log).map_err(io(&log))? {
        sync(&entry.map_err(io(&log))?.path())?;
    }
    sync(&log)?;
    sync(&new)?;
    fs::rename(&new, path).map_err(io(path))?;
    path.parent().map_or(Ok(()), sync)
}

/// What is kept of the log's beginning.
struct LogStart {
    begin: Begin,
    mark: Option<SnapshotMark>,
}

type Contents = (ReplicaIdentity, HardState, LogStart, Vec<Record>);

fn first_of(records: &[Record]) -> u64 {
    let first = records
        .first()
        .and_then(|(key, _)| chunk::read_key(key).ok());
    first.map_or(1, |(first, _)| first)
}

fn read_snapshot(
    path: &Path,
    mark: Option<SnapshotMark>,
) -> Result<Option<(SnapshotMark, State)>, StoreError> {
    let Some(mark) = mark else {
        return Ok(None);
    };
    let file = snapshot::path(&path.join(SNAPSHOTS), mark.index);
    let (found, state) = snapshot::read(&file).map_err(|why| {
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        damaged(path, &format!("the snapshot {name}: {why}"))
    })?;
    match found == mark {
        true => Ok(Some((found, state))),
        false => Err(damaged(
            path,
            "the snapshot is not the one that the log relies on",
        )),
    }
}

/// What the log has: behind its begin, and without a gap to the snapshot.
fn behind(
    path: &Path,
    begin: Begin,
    snapshot: &Option<(SnapshotMark, State)>,
    mut entries: Vec<Entry>,
) -> Result<Vec<Entry>, StoreError> {
    // The prefix goes bit by bit: some of it may be there still.
    entries.retain(|entry| entry.index > begin.index);
    let first = entries.first().map_or(begin.index + 1, |entry| entry.index);
    let last = entries.last().map_or(begin.index, |entry| entry.index);
    let known = snapshot.as_ref().map_or(0, |(mark, _)| mark.index);
    if first != begin.index + 1 || known < begin.index || last < known {
        let why = format!(
            "the log has {first} to {last}, and its snapshot stands for what is up to {known}"
        );
        return Err(damaged(path, &why));
    }
    Ok(entries)
}

fn read_all(path: &Path, db: &sled::Db) -> Result<Contents, StoreError> {
    let get = |key: &[u8], what: &str| {
        let value = db.get(key).map_err(|e| damaged(path, &e.to_string()))?;
        value.ok_or_else(|| damaged(path, &format!("{what} is missing")))
    };
    let unreadable = |what: &str| damaged(path, &format!("{what} is unreadable"));
    let identity = ReplicaIdentity::decode(&*get(IDENTITY_KEY, "the identity")?)
        .map_err(|_| unreadable("the identity"))?;
    let hard_state = HardState::parse_from_bytes(&get(HARD_STATE_KEY, "the hard state")?)
        .map_err(|_| unreadable("the hard state"))?;
    let optional = |key: &[u8]| db.get(key).map_err(|e| damaged(path, &e.to_string()));
    let begin = match optional(BEGIN_KEY)? {
        Some(bytes) => Begin::decode(&*bytes).map_err(|_| unreadable("the log's begin"))?,
        None => Begin::default(),
    };
    let mark = match optional(SNAPSHOT_KEY)? {
        Some(bytes) => {
            let mark = SnapshotMark::decode(&*bytes);
            Some(mark.map_err(|_| unreadable("the mark of the snapshot"))?)
        }
        None => None,
    };
    let mut records = Vec::new();
    for record in db.scan_prefix(chunk::prefix()) {
        let (key, value) = record.map_err(|e| damaged(path, &e.to_string()))?;
        records.push((key.to_vec(), value.to_vec()));
    }
    Ok((identity, hard_state, LogStart { begin, mark }, records))
}

/// The log may hold more than the witness knows of, after a crash between the two syncs; never less.
fn compare(
    path: &Path,
    mark: Mark,
    identity: &ReplicaIdentity,
    hard_state: &HardState,
    (begin, entries): (Begin, &[Entry]),
) -> Result<(), StoreError> {
    let last = entries.last().map_or(begin.index, |entry| entry.index);
    if mark.replica != identity.replica_id {
        return Err(damaged(path, "log and witness are of different replicas"));
    }
    if last < mark.last {
        let why = format!("the log ends at {last}, but {} was durable", mark.last);
        return Err(damaged(path, &why));
    }
    let older = hard_state.term < mark.term;
    let other_vote = hard_state.term == mark.term && mark.vote != 0 && hard_state.vote != mark.vote;
    if older || other_vote {
        return Err(damaged(
            path,
            "the log forgot a term or a vote that was durable",
        ));
    }
    Ok(())
}

fn index(entries: &[Entry], records: &[Record]) -> BTreeMap<u64, (u64, u16)> {
    let mut chunks: BTreeMap<u64, (u64, u16)> = BTreeMap::new();
    for (key, _) in records {
        if let Ok((first, part)) = chunk::read_key(key) {
            chunks.insert(first, (0, part + 1));
        }
    }
    let last = entries.last().map_or(0, |entry| entry.index);
    let ends: Vec<_> = chunks
        .keys()
        .skip(1)
        .map(|first| first - 1)
        .chain([last])
        .collect();
    for ((_, chunk), end) in chunks.iter_mut().zip(ends) {
        chunk.0 = end;
    }
    chunks
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
