//! Makes the storage root of raw disks, and mounts it: several are one array (RAID 0), and ext4 is on that.
//!
//! Only a disk is written to that nobody uses and that holds no signature of anything. What is made is known by its UUIDs, which the journal
//! has before the first byte is written:
//!
//! ```text
//! no record                  the disks must be blank
//! made: false                they were. What holds our UUIDs has nothing on it yet and is made anew; anything else is somebody's
//! made: true                 they are assembled and mounted, and never made again
//! ```
//! So an agent may be cut down at any line. What was made and is not all there is not served, and the node goes on; what cannot be made
//! keeps the agent from starting. Nothing here grows, mends or unmounts anything, and no disk is looked at again while the agent runs.

mod disk;
mod tools;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use self::disk::{Disk, DiskError};
use self::tools::{MDADM, MKFS, MOUNT, ToolError, arg};
use crate::config::Config;
use crate::journal::{Journal, JournalError, StorageRecord};

/// What people see of it.
const LABEL: &str = "batchai";
/// Nothing on it is a program of this machine's, nor one of its devices; and what is damaged is not written to.
const OPTIONS: &str = "nosuid,nodev,errors=remount-ro";
/// A fact of a node is not longer.
const TOLD_BYTES_MAX: usize = 1000;

/// Why the storage root is not there.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("--storage-disk {}: {why}", path.display())]
    Disk { path: PathBuf, why: DiskError },
    #[error(
        "--storage-disk {}: it holds {content}, and nothing of the {count} disks that the storage root was made of; it was not touched. Give \
         those; or, where what lay on them is given up, end the agent and remove storage.json in its --data directory", path.display()
    )]
    NotOurs {
        path: PathBuf,
        content: String,
        count: usize,
    },
    #[error(
        "the storage root was made of {made} disks, and --storage-disk names {given}: it takes all of them, and no other"
    )]
    Count { made: usize, given: usize },
    #[error("--storage-root {}: {why}", path.display())]
    Root { path: PathBuf, why: String },
    #[error("the array of the disks: {0}")]
    Array(String),
    #[error("the array or file system of the disks: {0}")]
    Tool(#[from] ToolError),
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Has the storage root be there, where it is made of disks; returns the configuration without it, and why, where it was made and is not
/// there now.
pub fn prepare(
    config: Config,
    journal: &Journal,
    unwanted: &dyn Fn() -> bool,
) -> Result<(Config, String), StorageError> {
    let Some(root) = &config.storage_root else {
        return Ok((config, String::new()));
    };
    let maker = Maker {
        root,
        journal,
        unwanted,
    };
    let stands = match journal.storage()? {
        Some(known) if known.made => maker.mount_again(&config.storage_disks, &known),
        _ if config.storage_disks.is_empty() => Ok(()),
        known => {
            return maker
                .make(&config.storage_disks, known)
                .map(|()| (config, String::new()));
        }
    };
    match stands {
        Ok(()) => Ok((config, String::new())),
        Err(error) => {
            tracing::error!(%error, "no file server is served");
            let why = error.to_string();
            let fits = why
                .char_indices()
                .take_while(|(at, _)| *at < TOLD_BYTES_MAX);
            let why = fits.map(|(_, c)| c).collect();
            let config = Config {
                storage_root: None,
                ..config
            };
            Ok((config, why))
        }
    }
}

struct Maker<'a> {
    root: &'a Path,
    journal: &'a Journal,
    unwanted: &'a dyn Fn() -> bool,
}

impl Maker<'_> {
    /// Makes it of disks that are blank, or were when an agent began.
    fn make(&self, given: &[PathBuf], begun: Option<StorageRecord>) -> Result<(), StorageError> {
        self.check_root()?;
        let disks = self.find(given)?;
        let (array, file_system) = match &begun {
            Some(begun) => (begun.array.clone(), begun.file_system.clone()),
            None => (Uuid::new_v4().to_string(), Uuid::new_v4().to_string()),
        };
        let ours = [&*array, &*file_system];
        for disk in &disks {
            let known = |begun: &StorageRecord| begun.disks.contains(&disk.record);
            let is_begun = begun.as_ref().is_some_and(known) && disk.is_of(&ours);
            if !disk.signatures.is_empty() && !is_begun {
                return Err(bad(&disk.path, DiskError::Signed(disk.content())));
            }
        }
        for disk in disks.iter().filter(|disk| disk.has(&array)) {
            self.stop(disk, &ours)?;
        }
        for disk in &disks {
            disk.check_unused().map_err(|why| bad(&disk.path, why))?;
        }
        let mut record = StorageRecord {
            disks: disks.iter().map(|disk| disk.record.clone()).collect(),
            array,
            file_system,
            made: false,
        };
        self.journal.keep_storage(&record)?;
        let device = match &disks[..] {
            [disk] => disk.path.clone(),
            disks => self.create(disks, &record.array)?,
        };
        let whole = ["-q", "-F", "-m", "0", "-E", "nodiscard", "-L", LABEL, "-U"];
        let whole = whole.iter().map(OsStr::new);
        let at = [OsStr::new(&record.file_system), arg(&device)];
        MKFS.run(&whole.chain(at).collect::<Vec<_>>(), self.unwanted)?;
        disk::sync(&device).map_err(|error| bad(&device, DiskError::Unusable(error)))?;
        record.made = true;
        self.journal.keep_storage(&record)?;
        tracing::info!(root = %self.root.display(), ?record, "made of disks");
        self.mount(&device)
    }

    /// Mounts what was made.
    fn mount_again(&self, given: &[PathBuf], record: &StorageRecord) -> Result<(), StorageError> {
        if given.is_empty() && self.is_mounted()? {
            // By the administrator.
            return Ok(());
        }
        let count = record.disks.len();
        if given.len() != count {
            return Err(StorageError::Count {
                made: count,
                given: given.len(),
            });
        }
        let disks = self.find(given)?;
        let is_whole = count == 1;
        let uuid = if is_whole {
            &record.file_system
        } else {
            &record.array
        };
        let not_ours = |disk: &Disk| StorageError::NotOurs {
            path: disk.path.clone(),
            content: disk.content(),
            count,
        };
        if let Some(other) = disks.iter().find(|disk| !disk.has(uuid)) {
            return Err(not_ours(other));
        }
        let device = match is_whole {
            true => disks[0].path.clone(),
            false => self.assemble(&disks, record)?,
        };
        let whole = self.look_at(&device)?;
        if !whole.has(&record.file_system) {
            return Err(not_ours(&whole));
        }
        let is_there = self
            .root
            .metadata()
            .map(|found| found.dev() == whole.device);
        if is_there.unwrap_or(false) {
            return Ok(());
        }
        self.check_root()?;
        self.mount(&device)
    }

    fn look_at(&self, path: &Path) -> Result<Disk, StorageError> {
        Disk::find(path, self.unwanted).map_err(|why| bad(path, why))
    }

    fn find(&self, given: &[PathBuf]) -> Result<Vec<Disk>, StorageError> {
        let mut known = BTreeSet::new();
        let mut disks = Vec::new();
        for path in given {
            let disk = self.look_at(path)?;
            if !known.insert(disk.device) {
                return Err(bad(path, DiskError::Twice));
            }
            disks.push(disk);
        }
        Ok(disks)
    }

    /// What is mounted over hides what lies there.
    fn check_root(&self) -> Result<(), StorageError> {
        let bad = |why: String| StorageError::Root {
            path: self.root.to_owned(),
            why,
        };
        match fs::DirBuilder::new().mode(0o755).create(self.root) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(|error| bad(error.to_string()))?,
        }
        if self.is_mounted()? {
            let why = "something else is mounted there than the disks that are given";
            return Err(bad(why.to_owned()));
        }
        let mut inside = fs::read_dir(self.root).map_err(|error| bad(error.to_string()))?;
        match inside.next() {
            None => Ok(()),
            Some(_) => Err(bad(
                "it is not empty, and what lies there would be hidden by what is made of the disks; give another".to_owned(),
            )),
        }
    }

    fn is_mounted(&self) -> Result<bool, StorageError> {
        let device = |path: &Path| path.metadata().map(|found| found.dev());
        let above = self.root.join("..");
        let compared = device(self.root).and_then(|own| Ok(own != device(&above)?));
        compared.map_err(|error| StorageError::Root {
            path: self.root.to_owned(),
            why: error.to_string(),
        })
    }

    /// Stops what was begun of an array of ours.
    fn stop(&self, disk: &Disk, ours: &[&str]) -> Result<(), StorageError> {
        let Some((array, runs)) = disk.array() else {
            return Ok(());
        };
        if runs {
            let found = self.look_at(&array)?;
            if !found.is_of(ours) {
                return Err(bad(&array, DiskError::Signed(found.content())));
            }
        }
        MDADM.run(&["--stop".as_ref(), arg(&array)], self.unwanted)?;
        Ok(())
    }

    /// Makes an array; returns its device.
    fn create(&self, disks: &[Disk], uuid: &str) -> Result<PathBuf, StorageError> {
        let (name, count) = (array_name(uuid), format!("--raid-devices={}", disks.len()));
        let uuid = format!("--uuid={uuid}");
        // It asks nobody: the disks were looked at.
        let how = ["--run", "--level=0", "--metadata=1.2", &count, &uuid];
        let mut args = vec![OsStr::new("--create"), OsStr::new(&name)];
        args.extend(how.iter().map(OsStr::new));
        args.extend(disks.iter().map(|disk| arg(&disk.path)));
        MDADM.run(&args, self.unwanted)?;
        running(disks)
    }

    /// The device of the array, which others may have assembled when the machine started.
    fn assemble(&self, disks: &[Disk], record: &StorageRecord) -> Result<PathBuf, StorageError> {
        if let Ok(device) = running(disks) {
            return Ok(device);
        }
        for disk in disks {
            // Begun, and incomplete.
            self.stop(disk, &[&record.file_system])?;
        }
        let (name, uuid) = (
            array_name(&record.array),
            format!("--uuid={}", record.array),
        );
        let mut args = vec![
            OsStr::new("--assemble"),
            OsStr::new(&name),
            OsStr::new(&uuid),
        ];
        args.extend(disks.iter().map(|disk| arg(&disk.path)));
        MDADM.run(&args, self.unwanted)?;
        running(disks)
    }

    fn mount(&self, device: &Path) -> Result<(), StorageError> {
        let how = ["-t", "ext4", "-o", OPTIONS].map(OsStr::new);
        let args = [&how[..], &[arg(device), arg(self.root)]].concat();
        MOUNT.run(&args, self.unwanted)?;
        Ok(())
    }
}

fn array_name(uuid: &str) -> String {
    format!(
        "/dev/md/{LABEL}-{}",
        uuid.split('-').next().unwrap_or_default()
    )
}

/// The one array that all of them are in.
fn running(disks: &[Disk]) -> Result<PathBuf, StorageError> {
    let mut arrays: Vec<_> = disks.iter().map(Disk::array).collect();
    arrays.dedup();
    match &arrays[..] {
        [Some((device, true))] => Ok(device.clone()),
        _ => Err(StorageError::Array(
            "it does not run: see /proc/mdstat, and what mdadm --examine says of each disk"
                .to_owned(),
        )),
    }
}

fn bad(path: &Path, why: DiskError) -> StorageError {
    StorageError::Disk {
        path: path.to_owned(),
        why,
    }
}
