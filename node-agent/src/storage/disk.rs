//! A disk: what the kernel and the disk itself say of it. It is held open and locked from the first look on, so that what was looked at and
//! what is written to are the same. Nothing here writes to one but `clear`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::sys::stat::{major, minor};
use serde::Deserialize;

use super::LABEL;
use super::tools::{ToolError, WIPEFS, arg};
use crate::journal::DiskRecord;

/// The beginning and the end are zero on a blank disk: no library knows all that somebody may have written.
const HEAD_BYTES: u64 = 16 << 20;
const TAIL_BYTES: u64 = 1 << 20;
/// What is read, and what is written, at once.
const READ_BYTES: usize = 1 << 20;
const WRITE_BYTES: u64 = 4 << 10;
/// Who looks what a new disk is locks it for a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Where ext4 says when it was last mounted, and how often.
const EXT4_MOUNTED_AT: u64 = 1024 + 0x2c;
const EXT4_MOUNTS_AT: u64 = 1024 + 0x34;
/// Above, among what the kernel says of a disk: the node that it made.
const NODE: &str = "DEVNAME=";
const SECTOR_BYTES: u64 = 512;
/// Where makers' numbers are, below a disk in `/sys`: it depends on the driver.
const IDS: [&str; 4] = ["wwid", "device/wwid", "serial", "device/serial"];

/// A disk, or whatever the kernel has in the stead of one.
#[derive(Debug)]
pub struct Disk {
    /// As it was named.
    pub path: PathBuf,
    /// The kernel's own name, for programs.
    pub node: PathBuf,
    /// The kernel's number.
    pub device: u64,
    file: Flock<File>,
    sys: PathBuf,
    pub record: DiskRecord,
    pub signatures: Vec<Signature>,
}

/// What says what is on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Signature {
    #[serde(rename = "type")]
    kind: String,
    uuid: Option<String>,
    label: Option<String>,
}

#[derive(Deserialize)]
struct Signatures {
    signatures: Vec<Signature>,
}

/// What is the matter with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("it is not there: {0}")]
    Missing(io::Error),
    #[error("it is no disk (no block device)")]
    NoDisk,
    #[error("it is the same disk as another one that is given")]
    Twice,
    #[error("its size is 0")]
    Empty,
    #[error("its node in /dev is missing, or another disk's by now: {0}")]
    Changed(PathBuf),
    #[error(
        "another program has locked it: an agent, or one that divides or formats it; it was not touched"
    )]
    Locked,
    #[error(
        "it is not blank: it holds {0}; it was not touched. Take another, or, where nothing on it is wanted, empty it: wipefs --all, then \
         blkdiscard -z"
    )]
    Signed(String),
    #[error(
        "it is not blank: it holds {0}: file servers of another agent, or of this one with other --data; it was not touched. To keep them, \
         mount them at the storage root and name no disks"
    )]
    Agents(String),
    #[error(
        "it is not blank: it holds data of no known kind (its first 16 MiB and its last one are to be zero); it was not touched. Take another, \
         or, if nobody wants it: blkdiscard -z, or dd if=/dev/zero"
    )]
    Data,
    #[error(
        "what an agent had begun there was mounted since; it was not touched. Mount it at the storage root yourself, remove storage.json in \
         the --data directory, and name no disks; or, if nobody wants it, empty it: blkdiscard -z, or dd if=/dev/zero"
    )]
    Used,
    #[error(
        "it has partitions ({0}); it was not touched. Take another, or, where nothing on it is wanted, empty it: wipefs --all, then \
         blkdiscard -z"
    )]
    Partitions(String),
    #[error("it is a part of {0}; it was not touched")]
    Held(String),
    #[error("it is in use: mounted, swapped to, or opened by a program; it was not touched")]
    Busy,
    #[error("it cannot be read and written to: {0}")]
    Unusable(io::Error),
    #[error("what it holds is not known: wipefs says {0:?}")]
    Unknown(String),
    #[error("{0}")]
    Tool(#[from] ToolError),
}

impl Disk {
    /// Looks at one.
    pub fn find(path: &Path, unwanted: &dyn Fn() -> bool) -> Result<Disk, DiskError> {
        let found = path.metadata().map_err(DiskError::Missing)?;
        if !found.file_type().is_block_device() {
            return Err(DiskError::NoDisk);
        }
        let device = found.rdev();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let file = lock(file.map_err(DiskError::Unusable)?)?;
        let number = format!("{}:{}", major(device), minor(device));
        let sys = Path::new("/sys/dev/block").join(number);
        let text = |file: &str| fs::read_to_string(sys.join(file));
        let sectors = text("size").map_err(DiskError::Unusable)?;
        let sectors: u64 = sectors.trim().parse().unwrap_or_default();
        if sectors == 0 {
            return Err(DiskError::Empty);
        }
        let ids = IDS.iter().filter_map(|file| text(file).ok());
        let mut ids = ids.map(|id| id.trim().to_owned());
        let record = DiskRecord {
            id: ids.find(|id| !id.is_empty()).unwrap_or_default(),
            bytes: sectors * SECTOR_BYTES,
        };
        let said = text("uevent").map_err(DiskError::Unusable)?;
        let name = said.lines().find_map(|line| line.strip_prefix(NODE));
        let mut disk = Disk {
            path: path.to_owned(),
            node: Path::new("/dev").join(name.unwrap_or_default()),
            device,
            file,
            sys,
            record,
            signatures: Vec::new(),
        };
        disk.look_again(unwanted)?;
        Ok(disk)
    }

    /// Has what is known of it be what is on it now, whoever has written it: also another machine.
    pub fn look_again(&mut self, unwanted: &dyn Fn() -> bool) -> Result<(), DiskError> {
        let is_same = |found: fs::Metadata| {
            found.file_type().is_block_device() && found.rdev() == self.device
        };
        let nodes = [self.node.metadata(), self.file.metadata()];
        if !nodes.into_iter().all(|found| found.is_ok_and(is_same)) {
            return Err(DiskError::Changed(self.node.clone()));
        }
        let forgotten = posix_fadvise(&*self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        forgotten.map_err(|errno| DiskError::Unusable(errno.into()))?;
        self.signatures = signatures(&self.node, unwanted)?;
        Ok(())
    }

    /// The kernel's names of what is made of it: arrays, volumes.
    pub fn holders(&self) -> Result<Vec<String>, DiskError> {
        names(&self.sys.join("holders"), |_| true)
    }

    /// An array that is made of it, and whether that is complete.
    pub fn array(&self) -> Result<Option<(PathBuf, bool)>, DiskError> {
        for name in self.holders()? {
            let sys = self.sys.join("holders").join(&name);
            match fs::read_to_string(sys.join("md/array_state")) {
                Ok(state) => {
                    let runs = !matches!(state.trim(), "clear" | "inactive");
                    return Ok(Some((Path::new("/dev").join(name), runs)));
                }
                // No array.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(DiskError::Unusable(error)),
            }
        }
        Ok(None)
    }

    /// Whether all that is on it is known by one of these UUIDs.
    pub fn is_of(&self, uuids: &[&str]) -> bool {
        self.signatures.iter().all(|it| it.is_of(uuids))
    }

    /// Whether that is on it, be there what may beside it.
    pub fn has_also(&self, uuid: &str) -> bool {
        self.signatures.iter().any(|it| it.is_of(&[uuid]))
    }

    /// Whether it holds what has this UUID.
    pub fn has(&self, uuid: &str) -> bool {
        !self.signatures.is_empty() && self.is_of(&[uuid])
    }

    /// What is on it, in words.
    pub fn content(&self) -> String {
        const NAMED_MAX: usize = 3;
        let named = self.signatures.iter().map(|it| {
            let part = |what: &str, text: &Option<String>| {
                let text = text.as_deref().filter(|text| !text.is_empty());
                text.map_or(String::new(), |text| format!(", {what} {text}"))
            };
            let (uuid, label) = (part("UUID", &it.uuid), part("label", &it.label));
            format!("{}{uuid}{label}", it.kind)
        });
        let named: Vec<_> = named.take(NAMED_MAX).collect();
        match named.is_empty() {
            true => "nothing".to_owned(),
            false => named.join("; "),
        }
    }

    /// What is the matter where it holds what is not known.
    pub fn signed(&self) -> DiskError {
        match self.signatures.iter().any(Signature::is_of_agent) {
            true => DiskError::Agents(self.content()),
            false => DiskError::Signed(self.content()),
        }
    }

    /// Fails where anything is on it.
    pub fn check_blank(&self) -> Result<(), DiskError> {
        if !self.signatures.is_empty() {
            return Err(self.signed());
        }
        let mut bytes = vec![0; READ_BYTES];
        for (from, to) in self.edges() {
            for at in (from..to).step_by(READ_BYTES) {
                let some = &mut bytes[..READ_BYTES.min((to - at) as usize)];
                let read = self.file.read_exact_at(some, at);
                read.map_err(DiskError::Unusable)?;
                if some.iter().any(|byte| *byte != 0) {
                    return Err(DiskError::Data);
                }
            }
        }
        Ok(())
    }

    /// Has its beginning and its end be zero where all that is on it has these UUIDs. What tells whose it is goes last.
    pub fn clear(&mut self, uuids: &[&str], unwanted: &dyn Fn() -> bool) -> Result<(), DiskError> {
        self.look_again(unwanted)?;
        if !self.is_of(uuids) {
            return Err(self.signed());
        }
        let file = self.alone()?;
        for (from, to) in self.edges().into_iter().rev() {
            for piece in (0..(to - from).div_ceil(WRITE_BYTES)).rev() {
                let at = from + piece * WRITE_BYTES;
                let zeroes = [0; WRITE_BYTES as usize];
                let some = &zeroes[..WRITE_BYTES.min(to - at) as usize];
                file.write_all_at(some, at).map_err(DiskError::Unusable)?;
            }
        }
        file.sync_all().map_err(DiskError::Unusable)
    }

    /// Whether the ext4 that is on it was ever mounted to be written to.
    pub fn was_mounted(&self) -> Result<bool, DiskError> {
        let (mut last, mut count) = ([0; 4], [0; 2]);
        let read = self.file.read_exact_at(&mut last, EXT4_MOUNTED_AT);
        read.and_then(|()| self.file.read_exact_at(&mut count, EXT4_MOUNTS_AT))
            .map_err(DiskError::Unusable)?;
        Ok(last != [0; 4] || count != [0; 2])
    }

    /// What of it is to be zero: from, to.
    fn edges(&self) -> Vec<(u64, u64)> {
        let bytes = self.record.bytes;
        match bytes <= HEAD_BYTES + TAIL_BYTES {
            true => vec![(0, bytes)],
            false => vec![(0, HEAD_BYTES), (bytes - TAIL_BYTES, bytes)],
        }
    }

    /// Fails where anybody uses it, whatever is on it.
    pub fn check_unused(&self) -> Result<(), DiskError> {
        let holders = self.holders()?;
        if !holders.is_empty() {
            return Err(DiskError::Held(holders.join(", ")));
        }
        let parts = names(&self.sys, |path| path.join("partition").exists())?;
        if !parts.is_empty() {
            return Err(DiskError::Partitions(parts.join(", ")));
        }
        self.alone().map(drop)
    }

    /// The same disk to write to, which nobody else has.
    fn alone(&self) -> Result<File, DiskError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).custom_flags(libc::O_EXCL);
        let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        options
            .open(same)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => DiskError::Busy,
                _ => DiskError::Unusable(error),
            })
    }

    /// Has all that was written to it be there after a power cut.
    pub fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_all().map_err(DiskError::Unusable)
    }
}

impl Signature {
    fn is_of(&self, uuids: &[&str]) -> bool {
        let uuid = self.uuid.as_deref().map(digits).unwrap_or_default();
        uuids.iter().any(|one| digits(one) == uuid)
    }

    /// Whether an agent has made it: a file system, or an array, which has the host's name before its own.
    fn is_of_agent(&self) -> bool {
        let label = self.label.as_deref().unwrap_or_default();
        let name = label.rsplit(':').next().unwrap_or_default();
        let rest = name.strip_prefix(LABEL);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }
}

/// Holds it against other agents, and what heeds the same lock.
fn lock(mut file: File) -> Result<Flock<File>, DiskError> {
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((file, Errno::EWOULDBLOCK)) if Instant::now() < end => file,
            Err((_, Errno::EWOULDBLOCK)) => return Err(DiskError::Locked),
            Err((_, errno)) => return Err(DiskError::Unusable(errno.into())),
        };
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// All that the library of the system knows to be a sign of something, also what lies behind or before others.
fn signatures(path: &Path, unwanted: &dyn Fn() -> bool) -> Result<Vec<Signature>, DiskError> {
    let args = ["--no-act".as_ref(), "--json".as_ref(), arg(path)];
    let said = WIPEFS.run(&args, unwanted)?;
    if said.trim().is_empty() {
        return Ok(Vec::new());
    }
    let parsed: Result<Signatures, _> = serde_json::from_str(&said);
    let parsed = parsed.map_err(|_| DiskError::Unknown(said.chars().take(200).collect()))?;
    Ok(parsed.signatures)
}

fn names(dir: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<String>, DiskError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(DiskError::Unusable)? {
        let entry = entry.map_err(DiskError::Unusable)?;
        if wanted(&entry.path()) {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// A UUID, however it is divided.
fn digits(uuid: &str) -> String {
    let digits = uuid.chars().filter(char::is_ascii_hexdigit);
    digits.collect::<String>().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(said: &str) -> Disk {
        let signatures: Signatures = serde_json::from_str(said).unwrap();
        Disk {
            path: "/dev/x".into(),
            node: "/dev/x".into(),
            device: 0,
            file: lock(tempfile::tempfile().unwrap()).unwrap(),
            sys: "/nowhere".into(),
            record: DiskRecord {
                id: String::new(),
                bytes: 1,
            },
            signatures: signatures.signatures,
        }
    }

    #[test]
    fn a_disk_is_known_by_all_that_is_on_it() {
        let blank = disk(r#"{"signatures": []}"#);
        assert!(blank.is_of(&["ab-cd"]) && !blank.has("ab-cd"));
        assert_eq!(blank.content(), "nothing");
        let ours =
            r#"{"offset":"0x1","type":"linux_raid_member","uuid":"AB:CD","label":"h:batchai"}"#;
        let own = disk(&format!(r#"{{"signatures": [{ours}]}}"#));
        assert!(own.has("ab-cd") && own.is_of(&["12", "abcd"]) && !own.is_of(&["12"]));
        let other = r#"{"offset":"0x2","type":"dos","uuid":null,"label":null}"#;
        let both = disk(&format!(r#"{{"signatures": [{ours},{other}]}}"#));
        assert!(!both.has("abcd"), "the other is somebody's");
        assert!(both.has_also("abcd") && !both.has_also("12"));
        assert!(matches!(both.signed(), DiskError::Agents(_)));
        assert_eq!(
            both.content(),
            "linux_raid_member, UUID AB:CD, label h:batchai; dos"
        );
        let other = disk(&format!(r#"{{"signatures": [{other}]}}"#));
        assert!(matches!(other.signed(), DiskError::Signed(_)));
        // One without a UUID is nobody's, also where nothing is looked for.
        assert!(!other.is_of(&["abcd"]));
    }
}
