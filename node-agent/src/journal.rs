//! The agent's memory: a directory per attempt, shared with the attempt's shim.
//!
//! ```text
//! DATA/node.json                 who this node is
//! DATA/lock                      one agent per directory
//! DATA/lease                    since when and until when fenced work runs, in milliseconds of the boot clock; read by shims
//! DATA/storage.json              of which disks the storage root is made (see `storage`)
//! DATA/bundles/                  what was fetched of bundles
//! DATA/images/                   images of containers, unpacked
//! DATA/mounts/{digest}/           what is mounted for a cluster (see `mounts`)
//! DATA/attempts/{attempt}/
//!     origin.json                whose work it is; written by the agent
//!     prepare.json  launch.json  what the shim shall do, and the group of its processes; written by the agent
//!     stop                       it shall end; written by the agent; `true` where the node is ending
//!     mount-lost.json            it shall end by what is the matter with what is mounted for the cluster; written by the agent
//!     lock                       held by the living shim
//!     started                    made once, by the shim that began
//!     status.json                what it does; written by the shim
//!     setup-failed.json          why directories could not be made, or GPUs not be had; written by a child of the shim
//!     container.json             how processes come into its container; written by the shim
//!     logs/                      what its processes print; written by the shim
//!     shared/                    of the server of what the job's nodes share (see `nfs`), where this node serves that
//! ```
//! Files are replaced whole. Nothing here decides anything.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use batchai_common::crash_point;

use crate::lease::{self, Held};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Whose work it is.
pub const ORIGIN: &str = "origin.json";
pub const PREPARE: &str = "prepare.json";
pub const LAUNCH: &str = "launch.json";
pub const STOP: &str = "stop";
/// What is the matter with what is mounted for the cluster: the attempt ends by that.
pub const MOUNT_LOST: &str = "mount-lost.json";
pub const STARTED: &str = "started";
/// Until when work runs that may begin anew elsewhere; beside the attempts.
pub const LEASE: &str = "lease";
pub const STATUS: &str = "status.json";
pub const SETUP_FAILED: &str = "setup-failed.json";
pub const LOGS: &str = "logs";
/// What is known of its container.
pub const CONTAINER: &str = "container.json";
/// Of the server of what the job's nodes share.
pub const SHARED: &str = "shared";
const LOCK: &str = "lock";
const CLUSTER_MOUNTS: &str = "mounts";
const FILE_SERVERS: &str = "file-servers";
const STORAGE: &str = "storage.json";
const LEASE_READS_MAX: u32 = 10;
const LEASE_READ_PAUSE: Duration = Duration::from_millis(2);
/// What the names of removed attempts begin with.
const GONE: &str = ".gone-";

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: unreadable: {source}", path = .path.display())]
    Unreadable {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{path}: another agent uses this data directory", path = .path.display())]
    Locked { path: PathBuf },
}

/// Who this node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub uid: String,
    /// A new one says that the attempts of an earlier journal are forgotten.
    pub journal_id: String,
    /// The ensemble that the node belongs to, once it has met one.
    pub ensemble: Option<String>,
    /// The latest epoch of the ensemble that it has met.
    #[serde(default)]
    pub epoch: i64,
    /// The VM size to register, where who let it in wants one.
    #[serde(default)]
    pub vm_size: Option<String>,
    /// The port at which other agents were listened to last.
    #[serde(default)]
    pub agent_port: u16,
    /// By it the tokens of attempts are made; empty before there was one.
    #[serde(default)]
    pub key: String,
}

/// Whose work an attempt is: all that is needed to take it over where the State that placed it is lost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The full name of the job, or of the cluster.
    pub job: String,
    pub job_uid: String,
    /// The nodes with their ports, the master first.
    pub hosts: Vec<(String, i32)>,
    pub set_up: bool,
}

/// Of which disks the storage root is made. Their signatures are its own: whatever holds them was made for this record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageRecord {
    /// What the machine is known by, where it says so: a copy of this on another one says nothing of the disks there.
    pub machine: String,
    pub disks: Vec<DiskRecord>,
    /// The UUIDs of the array, and of the file system.
    pub array: String,
    pub file_system: String,
    /// The file system is whole. Until then the agent has put nothing there that anybody wants.
    pub made: bool,
}

/// A disk, by what does not change when the machine starts again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its maker's number; empty where it has none.
    pub id: String,
    pub bytes: u64,
}

/// Since when and until when a node holds its lease. What is being written over is read again.
pub fn read_lease(path: &Path) -> io::Result<Held> {
    for _ in 0..LEASE_READS_MAX {
        let text = fs::read_to_string(path)?;
        if let Some(held) = lease::read(&text) {
            return Ok(held);
        }
        std::thread::sleep(LEASE_READ_PAUSE);
    }
    Err(io::Error::other("it is not whole"))
}

/// The data directory of an agent.
#[derive(Debug)]
pub struct Journal {
    root: PathBuf,
    _lock: Flock<File>,
}

impl Journal {
    /// Opens a data directory for this process alone, and makes what is missing.
    pub fn open(root: &Path) -> Result<(Journal, Identity), JournalError> {
        let attempts = root.join("attempts");
        // Plans hold the environment of jobs: nobody else's business.
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&attempts);
        made.map_err(at(&attempts))?;
        let path = root.join("lock");
        let file = File::create(&path).map_err(at(&path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, error)| match error {
            nix::Error::EWOULDBLOCK => JournalError::Locked {
                path: root.to_owned(),
            },
            error => at(&path)(error.into()),
        })?;
        let journal = Journal {
            root: root.to_owned(),
            _lock: lock,
        };
        journal.remove_the_gone();
        let identity = match read_json(&root.join("node.json"))? {
            Some(identity) => identity,
            None => {
                let identity = Identity {
                    epoch: 0,
                    vm_size: None,
                    agent_port: 0,
                    key: String::new(),
                    uid: uuid::Uuid::new_v4().to_string(),
                    journal_id: uuid::Uuid::new_v4().to_string(),
                    ensemble: None,
                };
                journal.keep(&identity)?;
                identity
            }
        };
        Ok((journal, identity))
    }

    /// Removes what an agent that was cut down left half removed.
    fn remove_the_gone(&self) {
        let all = ["attempts", CLUSTER_MOUNTS, FILE_SERVERS].map(|dir| self.root.join(dir));
        for entry in all.iter().flat_map(fs::read_dir).flatten().flatten() {
            let gone = entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(GONE.as_bytes());
            if gone && let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!(%error, path = %entry.path().display(), "cannot be removed");
            }
        }
    }

    /// Where the bundles of this node's work are kept.
    pub fn bundles(&self) -> PathBuf {
        self.root.join("bundles")
    }

    /// Where unpacked images are kept.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Remembers who this node is.
    pub fn keep(&self, identity: &Identity) -> Result<(), JournalError> {
        write_json(&self.root.join("node.json"), identity, true)
    }

    /// Of which disks the storage root is made.
    pub fn storage(&self) -> Result<Option<StorageRecord>, JournalError> {
        read_json(&self.root.join(STORAGE))
    }

    /// Remembers that, before anything is written to them.
    pub fn keep_storage(&self, record: &StorageRecord) -> Result<(), JournalError> {
        write_json(&self.root.join(STORAGE), record, true)
    }

    /// Where the lease is written down.
    pub fn lease(&self) -> PathBuf {
        self.root.join(LEASE)
    }

    /// Fenced work runs until then. A reboot ends it anyhow: it need not survive one.
    pub fn keep_lease(&self, held: Held) -> Result<(), JournalError> {
        let path = self.lease();
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        // In place: a full disk takes no new file.
        let kept = file.and_then(|file| file.write_all_at(lease::written(held).as_bytes(), 0));
        kept.map_err(at(&path))
    }

    /// All attempts that it holds.
    pub fn attempts(&self) -> Result<Vec<AttemptDir>, JournalError> {
        dirs(&self.root.join("attempts"))
    }

    /// The directories of what is mounted for clusters.
    pub fn cluster_mounts(&self) -> Result<Vec<AttemptDir>, JournalError> {
        dirs_if_any(&self.root.join(CLUSTER_MOUNTS))
    }

    /// The directories of the file servers of this node.
    pub fn file_servers(&self) -> Result<Vec<AttemptDir>, JournalError> {
        dirs_if_any(&self.root.join(FILE_SERVERS))
    }

    /// The directory of one of them, which need not exist. The id is a UUID that was checked.
    pub fn file_server(&self, uid: &str) -> AttemptDir {
        AttemptDir {
            path: self.root.join(FILE_SERVERS).join(uid),
        }
    }

    /// The directory of one of them, which need not exist. The id is a digest of our own.
    pub fn cluster_mount(&self, id: &str) -> AttemptDir {
        AttemptDir {
            path: self.root.join(CLUSTER_MOUNTS).join(id),
        }
    }

    /// The directory of an attempt, which need not exist. `None` where the id is no name of a file.
    pub fn attempt(&self, id: &str) -> Option<AttemptDir> {
        batchai_common::names::check_id(batchai_common::names::Kind::Node, id).ok()?;
        Some(AttemptDir {
            path: self.root.join("attempts").join(id),
        })
    }
}

fn dirs_if_any(root: &Path) -> Result<Vec<AttemptDir>, JournalError> {
    match root.exists() {
        true => dirs(root),
        false => Ok(Vec::new()),
    }
}

/// The directories in one, by name, but for what is half removed.
fn dirs(root: &Path) -> Result<Vec<AttemptDir>, JournalError> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(root).map_err(at(root))? {
        let entry = entry.map_err(at(root))?;
        let gone = entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(GONE.as_bytes());
        let path = entry.path();
        if path.is_dir() && !gone {
            dirs.push(AttemptDir { path });
        }
    }
    dirs.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(dirs)
}

/// The directory of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptDir {
    pub path: PathBuf,
}

impl AttemptDir {
    /// The attempt's id.
    pub fn id(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// Makes the directory.
    pub fn create(&self) -> Result<(), JournalError> {
        let logs = self.path.join(LOGS);
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&logs);
        made.map_err(at(&logs))
    }

    /// Whether a file of it exists.
    pub fn has(&self, file: &str) -> bool {
        self.path.join(file).exists()
    }

    /// Reads one of its files; `None` where it does not exist.
    pub fn read<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, JournalError> {
        read_json(&self.path.join(file))
    }

    /// Replaces one of its files; `durable` ones survive a power cut.
    pub fn write<T: Serialize>(
        &self,
        file: &str,
        value: &T,
        durable: bool,
    ) -> Result<(), JournalError> {
        write_json(&self.path.join(file), value, durable)
    }

    /// The process that holds the shim's lock.
    pub fn shim(&self) -> Result<Option<i32>, JournalError> {
        let path = self.path.join(LOCK);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(at(&path))?,
        };
        // Asking does not take the lock: a shim that begins in this moment is not kept from it.
        let mut lock = whole_file_lock();
        let asked = fcntl(&file, FcntlArg::F_GETLK(&mut lock));
        asked.map_err(|e| at(&path)(e.into()))?;
        Ok((lock.l_type != libc::F_UNLCK as i16).then_some(lock.l_pid))
    }

    /// Takes the shim's lock for this process; `None` where another holds it. It goes with the process, and children
    /// do not inherit it.
    pub fn take_lock(&self) -> Result<Option<File>, JournalError> {
        let path = self.path.join(LOCK);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.map_err(at(&path))?;
        match fcntl(&file, FcntlArg::F_SETLK(&whole_file_lock())) {
            Ok(_) => Ok(Some(file)),
            Err(nix::Error::EACCES | nix::Error::EAGAIN) => Ok(None),
            Err(e) => Err(at(&path)(e.into())),
        }
    }

    /// Makes the file that says that the attempt has begun, durably. `false` where it had begun already.
    pub fn begin(&self) -> Result<bool, JournalError> {
        let path = self.path.join(STARTED);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            opened => {
                let file = opened.map_err(at(&path))?;
                crash_point!("shim_begins");
                file.sync_all().map_err(at(&path))?;
                sync_dir(&self.path)?;
                Ok(true)
            }
        }
    }

    /// Its log files and their sizes now, by name.
    pub fn logs(&self) -> Result<Vec<(String, u64)>, JournalError> {
        let path = self.path.join(LOGS);
        let entries = match fs::read_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(at(&path))?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(at(&path))?;
            let size = entry.metadata().map_err(at(&path))?.len();
            files.push((entry.file_name().to_string_lossy().into_owned(), size));
        }
        files.sort();
        Ok(files)
    }

    /// Removes all of it.
    pub fn remove(&self) -> Result<(), JournalError> {
        // Renamed first: what is half removed when the agent dies is no attempt any more.
        let gone = self.path.with_file_name(format!("{GONE}{}", self.id()));
        if gone.exists() {
            fs::remove_dir_all(&gone).map_err(at(&gone))?;
        }
        fs::rename(&self.path, &gone).map_err(at(&self.path))?;
        crash_point!("agent_forgot_in_part");
        fs::remove_dir_all(&gone).map_err(at(&gone))
    }
}

fn whole_file_lock() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io {
        path: path.clone(),
        source,
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JournalError> {
    let bytes = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes.map_err(at(path))?,
    };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|source| JournalError::Unreadable {
        path: path.to_owned(),
        source,
    })
}

fn write_json<T: Serialize>(path: &Path, value: &T, durable: bool) -> Result<(), JournalError> {
    let bytes = serde_json::to_vec(value).expect("our own types have only string keys");
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let opened = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new);
    let mut file = opened.map_err(at(&new))?;
    file.write_all(&bytes).map_err(at(&new))?;
    if durable {
        file.sync_all().map_err(at(&new))?;
    }
    fs::rename(&new, path).map_err(at(path))?;
    match (durable, path.parent()) {
        (true, Some(parent)) => sync_dir(parent),
        _ => Ok(()),
    }
}

fn sync_dir(path: &Path) -> Result<(), JournalError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(at(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_keeps_its_identity_and_a_directory_has_one_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, identity) = Journal::open(dir.path()).unwrap();
        assert!(matches!(
            Journal::open(dir.path()),
            Err(JournalError::Locked { .. })
        ));
        drop(journal);
        assert_eq!(Journal::open(dir.path()).unwrap().1, identity);
    }

    #[test]
    fn an_attempt_begins_once() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.attempt("../x"), None);
        let attempt = journal.attempt("1-1").unwrap();
        attempt.create().unwrap();
        assert!(attempt.begin().unwrap());
        assert!(!attempt.begin().unwrap());
        assert_eq!(attempt.shim().unwrap(), None);
        assert_eq!(journal.attempts().unwrap(), [attempt]);
    }
}
