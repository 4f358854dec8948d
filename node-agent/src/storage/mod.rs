//! Makes the storage root of raw disks, and mounts it: several are one array (RAID 0), and ext4 is on that.
//!
//! Only a disk is written to that nobody uses, that holds no signature of anything, and whose beginning and end are zero. What is made is known by its UUIDs, which the journal
//! has before the first byte is written:
//!
//! ```text
//! no record                  the disks must be blank
//! made: false                they were. What holds our UUIDs and was never mounted is made anew; anything else is somebody's
//! made: true                 they are assembled and mounted, and never made again
//! ```
//! So an agent may be cut down at any line. What was made and is not all there is not served, and the node goes on; what cannot be made
//! keeps the agent from starting. Disks are locked (`flock`) from the first look at them until they are mounted, and the file system has the
//! kernel keep other machines from mounting it too (MMP); but two machines that make something of one blank disk in the same moment are
//! not kept apart. Nothing here grows, mends or unmounts anything, and no disk is looked at again while the agent runs.

mod disk;
mod tools;

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

/// What a machine is known by: its firmware's word stays when the system is installed anew.
const MACHINE: [&str; 2] = ["/sys/class/dmi/id/product_uuid", "/etc/machine-id"];
/// What people see of it.
const LABEL: &str = "batchai";
/// Nothing on it is a program of this machine's, nor one of its devices; and what is damaged is not written to.
const OPTIONS: &str = "nosuid,nodev,errors=remount-ro";
/// No other machine mounts it while one has it, which looks every 2 s; the wait after a power cut goes by that.
const EXTENDED: &str = "nodiscard,mmp_update_interval=2";
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
    #[error(
        "--storage-disk {}: it holds {content}: what the storage root was made of, and something beside that; it was not touched. Find out \
         whose that is, and have it removed: wipefs --types", path.display()
    )]
    Beside { path: PathBuf, content: String },
    #[error(
        "a storage root was begun of {begun} disks, of which some hold a part, and --storage-disk names not just those; nothing was \
         touched. Give all of them, and no other; or empty those of which nobody wants anything: blkdiscard -z, or dd if=/dev/zero"
    )]
    Begun { begun: usize },
    #[error(
        "a storage root was begun of {begun} disks, and is not known to be whole. Give them again (--storage-disk) to have it made; or, where \
         they were mounted by hand or are not wanted, remove storage.json in the --data directory"
    )]
    Unfinished { begun: usize },
    #[error(
        "storage.json in the --data directory was written on another machine ({theirs}; this one is {ours}), and the disks may be in use \
         there; they were not touched. Where they are this machine's for good, mount them at the storage root, remove storage.json, and name no disks"
    )]
    Machine { theirs: String, ours: String },
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
        Some(known) if config.storage_disks.is_empty() => {
            let begun = known.disks.len();
            return Err(StorageError::Unfinished { begun });
        }
        None if config.storage_disks.is_empty() => Ok(()),
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
        let mut disks = self.find(given)?;
        let begun = self.check_blank(&disks, begun)?;
        if let Some(begun) = &begun {
            check_machine(begun)?;
            self.put_away(&disks, begun)?;
        }
        for disk in &disks {
            disk.check_unused().map_err(|why| bad(&disk.path, why))?;
        }
        let uuid = || Uuid::new_v4().to_string();
        let (array, file_system) = match begun {
            Some(begun) => (begun.array, begun.file_system),
            None => (uuid(), uuid()),
        };
        let mut record = StorageRecord {
            machine: machine(),
            disks: disks.iter().map(|disk| disk.record.clone()).collect(),
            array,
            file_system,
            made: false,
        };
        self.journal.keep_storage(&record)?;
        self.write(&mut disks, &record)?;
        for disk in &mut disks {
            let again = disk.look_again(self.unwanted);
            again.map_err(|why| bad(&disk.path, why))?;
        }
        // What will be asked for when the machine starts again.
        let (device, _) = self.whole(&disks, &record)?;
        record.made = true;
        self.journal.keep_storage(&record)?;
        tracing::info!(root = %self.root.display(), ?record, "made of disks");
        self.mount(&device)
    }

    /// Fails where anything is on one of the disks that an agent had not begun; returns what it had, where anything of that is there.
    fn check_blank(
        &self,
        disks: &[Disk],
        begun: Option<StorageRecord>,
    ) -> Result<Option<StorageRecord>, StorageError> {
        let is_begun = |disk: &&Disk| {
            let known = begun.as_ref().filter(|it| it.disks.contains(&disk.record));
            !disk.signatures.is_empty()
                && known.is_some_and(|it| disk.is_of(&[&it.array, &it.file_system]))
        };
        for disk in disks.iter().filter(|disk| !is_begun(disk)) {
            disk.check_blank().map_err(|why| bad(&disk.path, why))?;
        }
        if !disks.iter().any(|disk| is_begun(&disk)) {
            return Ok(None);
        }
        let Some(begun) = begun else {
            return Ok(None);
        };
        let mut records = [
            disks.iter().map(|disk| &disk.record).collect::<Vec<_>>(),
            begun.disks.iter().collect(),
        ];
        records.iter_mut().for_each(|records| records.sort());
        match records[0] == records[1] {
            true => Ok(Some(begun)),
            // What is on one may be the half of what somebody uses.
            false => Err(StorageError::Begun {
                begun: begun.disks.len(),
            }),
        }
    }

    /// Stops the array of what was begun; fails where anybody has mounted what was begun since.
    fn put_away(&self, disks: &[Disk], begun: &StorageRecord) -> Result<(), StorageError> {
        if let [disk] = disks {
            return check_unmounted(disk, begun);
        }
        // Where one does not know of the array, nobody ever had it.
        if disks.iter().all(|disk| disk.has(&begun.array)) {
            self.assemble(disks, begun, &["--readonly"])?;
        }
        disks.iter().try_for_each(|disk| self.stop(disk, begun))
    }

    /// Writes what is to be there to disks that are blank or hold what was begun.
    fn write(&self, disks: &mut [Disk], record: &StorageRecord) -> Result<(), StorageError> {
        let ours = [&*record.array, &*record.file_system];
        for disk in disks.iter_mut() {
            let blank = match disk.signatures.is_empty() {
                true => Ok(()),
                false => disk.clear(&ours, self.unwanted),
            };
            let blank = blank.and_then(|()| disk.look_again(self.unwanted));
            let blank = blank.and_then(|()| disk.check_blank());
            blank.map_err(|why| bad(&disk.path, why))?;
        }
        let array = match &*disks {
            [_] => None,
            disks => {
                let array = self.look_at(&self.create(disks, &record.array)?)?;
                if !array.is_of(&ours) {
                    return Err(bad(&array.path, array.signed()));
                }
                Some(array)
            }
        };
        let whole = array.as_ref().unwrap_or(&disks[0]);
        let how = ["-q", "-F", "-m", "0", "-O", "mmp", "-E", EXTENDED];
        let known = ["-L", LABEL, "-U", &record.file_system];
        let mut args: Vec<_> = how.iter().chain(&known).map(OsStr::new).collect();
        args.push(arg(&whole.node));
        MKFS.run(&args, self.unwanted)?;
        whole.sync().map_err(|why| bad(&whole.path, why))
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
        check_machine(record)?;
        let disks = self.find(given)?;
        let (device, number) = self.whole(&disks, record)?;
        let there = self.root.metadata().map(|found| found.dev());
        if there.is_ok_and(|there| there == number) {
            return Ok(());
        }
        self.check_root()?;
        self.mount(&device)
    }

    /// The device with the file system that was made, and its number.
    fn whole(
        &self,
        disks: &[Disk],
        record: &StorageRecord,
    ) -> Result<(PathBuf, u64), StorageError> {
        let check = |disk: &Disk, uuid: &str| {
            let (path, content) = (disk.path.clone(), disk.content());
            match disk.has_also(uuid) {
                _ if disk.has(uuid) => Ok(()),
                true => Err(StorageError::Beside { path, content }),
                false => Err(StorageError::NotOurs {
                    path,
                    content,
                    count: record.disks.len(),
                }),
            }
        };
        if let [disk] = disks {
            check(disk, &record.file_system)?;
            return Ok((disk.node.clone(), disk.device));
        }
        for disk in disks {
            check(disk, &record.array)?;
        }
        let array = self.look_at(&self.assemble(disks, record, &[])?)?;
        check(&array, &record.file_system)?;
        Ok((array.node.clone(), array.device))
    }

    fn look_at(&self, path: &Path) -> Result<Disk, StorageError> {
        Disk::find(path, self.unwanted).map_err(|why| bad(path, why))
    }

    fn find(&self, given: &[PathBuf]) -> Result<Vec<Disk>, StorageError> {
        let mut disks: Vec<Disk> = Vec::new();
        for path in given {
            let number = path.metadata().map(|found| found.rdev()).ok();
            // None has the number 0, which files have.
            let is_known = |disk: &Disk| Some(disk.device) == number;
            if disks.iter().any(is_known) {
                return Err(bad(path, DiskError::Twice));
            }
            let disk = self.look_at(path)?;
            let id = &disk.record.id;
            // One disk by two ways to it.
            if !id.is_empty() && disks.iter().any(|other| other.record.id == *id) {
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

    /// Stops what was begun of an array of ours, and what is nothing yet.
    fn stop(&self, disk: &Disk, begun: &StorageRecord) -> Result<(), StorageError> {
        let array = disk.array().map_err(|why| bad(&disk.path, why))?;
        let Some((array, runs)) = array else {
            return Ok(());
        };
        if runs {
            let found = self.look_at(&array)?;
            if !found.is_of(&[&begun.file_system]) {
                return Err(bad(&array, found.signed()));
            }
            check_unmounted(&found, begun)?;
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
        args.extend(disks.iter().map(|disk| arg(&disk.node)));
        MDADM.run(&args, self.unwanted)?;
        running(disks)
    }

    /// The device of the array, which others may have assembled when the machine started.
    fn assemble(
        &self,
        disks: &[Disk],
        record: &StorageRecord,
        how: &[&str],
    ) -> Result<PathBuf, StorageError> {
        if let Ok(device) = running(disks) {
            return Ok(device);
        }
        for disk in disks {
            // Begun, and incomplete.
            self.stop(disk, record)?;
        }
        let (name, uuid) = (
            array_name(&record.array),
            format!("--uuid={}", record.array),
        );
        let named = ["--assemble", &name, &uuid];
        let mut args: Vec<_> = named.iter().chain(how).map(OsStr::new).collect();
        args.extend(disks.iter().map(|disk| arg(&disk.node)));
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
    let mut arrays = Vec::new();
    for disk in disks {
        arrays.push(disk.array().map_err(|why| bad(&disk.path, why))?);
    }
    arrays.dedup();
    match &arrays[..] {
        [Some((device, true))] => Ok(device.clone()),
        _ => Err(StorageError::Array(
            "it does not run: see /proc/mdstat, and what mdadm --examine says of each disk"
                .to_owned(),
        )),
    }
}

/// Fails where the file system of what was begun was used since.
fn check_unmounted(disk: &Disk, begun: &StorageRecord) -> Result<(), StorageError> {
    if !disk.has(&begun.file_system) {
        return Ok(());
    }
    match disk.was_mounted() {
        Ok(false) => Ok(()),
        Ok(true) => Err(bad(&disk.path, DiskError::Used)),
        Err(why) => Err(bad(&disk.path, why)),
    }
}

/// What this machine is known by; nothing where nothing says so.
fn machine() -> String {
    let said = MACHINE
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok());
    let mut said = said.map(|text| text.trim().to_owned());
    said.find(|text| !text.is_empty()).unwrap_or_default()
}

fn check_machine(record: &StorageRecord) -> Result<(), StorageError> {
    let (theirs, ours) = (record.machine.clone(), machine());
    match theirs == ours {
        true => Ok(()),
        false => Err(StorageError::Machine { theirs, ours }),
    }
}

fn bad(path: &Path, why: DiskError) -> StorageError {
    StorageError::Disk {
        path: path.to_owned(),
        why,
    }
}
