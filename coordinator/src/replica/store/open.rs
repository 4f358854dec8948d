//! What a store is when it is opened: the one that is made, the one that is read, and the many that are refused.
//!
//! Nothing here changes a store that is there.

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
use super::{Begin, StoreError, snapshot};
use crate::state::State;

/// Values of 20 KB stay inside the database's one file only with segments of this size.
const SEGMENT_BYTES: usize = 8 << 20;
const CACHE_BYTES: u64 = 64 << 20;
/// How the database says that it is open elsewhere. That this is no other process, the data directory's lock says.
const LOCKED: &str = "could not acquire lock";
const LOCK_WAIT_STEP: Duration = Duration::from_millis(5);
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
pub(super) const HARD_STATE_KEY: &[u8] = b"H";
const IDENTITY_KEY: &[u8] = b"I";
pub(super) const BEGIN_KEY: &[u8] = b"B";
pub(super) const SNAPSHOT_KEY: &[u8] = b"S";
/// Where snapshots lie.
pub(super) const SNAPSHOTS: &str = "snapshots";

pub(super) fn encode(hard_state: &HardState) -> Vec<u8> {
    hard_state
        .write_to_bytes()
        .expect("a hard state in memory can be encoded")
}

pub(super) fn io(path: &Path) -> impl Fn(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        path: path.clone(),
        source,
    }
}

pub(super) fn damaged(path: &Path, why: &str) -> StoreError {
    StoreError::Damaged {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

/// A copy of a store's database, beside the store; it goes when this does.
pub(super) struct Copied {
    path: PathBuf,
}

impl Copied {
    pub fn of(store: &Path) -> Result<Copied, StoreError> {
        let path = store.with_extension("looking");
        if path.exists() {
            fs::remove_dir_all(&path).map_err(io(&path))?;
        }
        let copy = Copied { path };
        copy_files(&store.join("log"), &copy.log())?;
        Ok(copy)
    }

    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::debug!(%error, "a copy of the log stays until the next start");
        }
    }
}

fn copy_files(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(to).map_err(io(to))?;
    for entry in fs::read_dir(from).map_err(io(from))? {
        let source = entry.map_err(io(from))?.path();
        let target = to.join(source.file_name().unwrap_or_default());
        match source.is_dir() {
            true => copy_files(&source, &target)?,
            false if was_cut_off(&source) => {}
            false => drop(fs::copy(&source, &target).map_err(io(&target))?),
        }
    }
    Ok(())
}

/// What the database was writing when it ended, beside what it relies on: it would take that for whole.
fn was_cut_off(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "generating")
}

/// Removes that.
pub(super) fn forget_what_was_cut_off(log: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(log).map_err(io(log))? {
        let path = entry.map_err(io(log))?.path();
        if was_cut_off(&path) {
            fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    Ok(())
}

/// Opens a database of a store. One that was just closed keeps its lock until a thread of its own has ended: that is waited for.
pub(super) fn open_database(log: &Path, store: &Path) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new()
        .path(log)
        .flush_every_ms(None)
        .cache_capacity(CACHE_BYTES)
        .segment_size(SEGMENT_BYTES);
    let mut waited = Duration::ZERO;
    loop {
        let opened = catch_unwind(AssertUnwindSafe(|| config.open()));
        let opened = opened.map_err(|_| damaged(store, "the database panics when it is opened"))?;
        match opened {
            Err(error) if error.to_string().contains(LOCKED) && waited < LOCK_WAIT_MAX => {
                std::thread::sleep(LOCK_WAIT_STEP);
                waited += LOCK_WAIT_STEP;
            }
            Err(sled::Error::Corruption { .. }) => {
                return Err(damaged(store, "the database says that it is corrupted"));
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
pub(super) fn create(path: &Path, identity: &ReplicaIdentity) -> Result<(), StoreError> {
    let new = path.with_extension("new");
    if new.exists() {
        fs::remove_dir_all(&new).map_err(io(&new))?;
    }
    let log = new.join("log");
    fs::create_dir_all(&log).map_err(io(&log))?;
    {
        let db = open_database(&log, path)?;
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
pub(super) struct LogStart {
    pub begin: Begin,
    pub mark: Option<SnapshotMark>,
}

pub(super) type Contents = (ReplicaIdentity, HardState, LogStart, Vec<Record>);

pub(super) fn read_snapshot(
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

/// There is no gap between the snapshot and the log.
pub(super) fn check_snapshot(
    path: &Path,
    begin: Begin,
    snapshot: &Option<(SnapshotMark, State)>,
    entries: &[Entry],
) -> Result<(), StoreError> {
    let last = entries.last().map_or(begin.index, |entry| entry.index);
    let known = snapshot.as_ref().map_or(0, |(mark, _)| mark.index);
    if (begin.index..=last).contains(&known) {
        return Ok(());
    }
    let why = format!(
        "the log goes from {} to {last}, and its snapshot stands for what is up to {known}",
        begin.index + 1
    );
    Err(damaged(path, &why))
}

pub(super) fn read_all(path: &Path, db: &sled::Db) -> Result<Contents, StoreError> {
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
pub(super) fn compare(
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

pub(super) fn index(entries: &[Entry], records: &[Record]) -> BTreeMap<u64, (u64, u16)> {
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
