//! A disk: what the kernel and the disk itself say of it. Nothing here writes to one.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::stat::{major, minor};
use serde::Deserialize;

use super::tools::{ToolError, WIPEFS, arg};
use crate::journal::DiskRecord;

/// The beginning and the end, where signatures lie, are read: what cannot be read is not known to be blank.
const EDGE_BYTES: u64 = 1 << 20;
const SECTOR_BYTES: u64 = 512;
/// Where makers' numbers are, below a disk in `/sys`: it depends on the driver.
const IDS: [&str; 4] = ["wwid", "device/wwid", "serial", "device/serial"];

/// A disk, or whatever the kernel has in the stead of one.
#[derive(Debug)]
pub struct Disk {
    /// As it was named.
    pub path: PathBuf,
    /// The kernel's number.
    pub device: u64,
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
    #[error(
        "it is not blank: it holds {0}; it was not touched. Take another, or, where nothing on it is wanted, empty it: wipefs --all"
    )]
    Signed(String),
    #[error(
        "it has partitions ({0}); it was not touched. Take another, or, where nothing on it is wanted, empty it: wipefs --all"
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
        Ok(Disk {
            signatures: signatures(path, unwanted)?,
            path: path.to_owned(),
            device,
            sys,
            record,
        })
    }

    /// The kernel's names of what is made of it: arrays, volumes.
    pub fn holders(&self) -> Vec<String> {
        names(&self.sys.join("holders"), |_| true)
    }

    /// An array that is made of it, and whether that is complete.
    pub fn array(&self) -> Option<(PathBuf, bool)> {
        let holders = self.holders();
        holders.iter().find_map(|name| {
            let sys = self.sys.join("holders").join(name);
            let state = fs::read_to_string(sys.join("md/array_state")).ok()?;
            let runs = !matches!(state.trim(), "clear" | "inactive");
            Some((Path::new("/dev").join(name), runs))
        })
    }

    /// Whether all that is on it is known by one of these UUIDs.
    pub fn is_of(&self, uuids: &[&str]) -> bool {
        let known = |it: &Signature| {
            let uuid = it.uuid.as_deref().map(digits).unwrap_or_default();
            uuids.iter().any(|one| digits(one) == uuid)
        };
        self.signatures.iter().all(known)
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

    /// Fails where anybody uses it, whatever is on it.
    pub fn check_unused(&self) -> Result<(), DiskError> {
        let holders = self.holders();
        if !holders.is_empty() {
            return Err(DiskError::Held(holders.join(", ")));
        }
        let parts = names(&self.sys, |path| path.join("partition").exists());
        if !parts.is_empty() {
            return Err(DiskError::Partitions(parts.join(", ")));
        }
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).custom_flags(libc::O_EXCL);
        let file = options.open(&self.path).map_err(|error| {
            match error.raw_os_error() == Some(libc::EBUSY) {
                true => DiskError::Busy,
                false => DiskError::Unusable(error),
            }
        })?;
        let edge = EDGE_BYTES.min(self.record.bytes);
        let mut bytes = vec![0; edge as usize];
        for at in [0, self.record.bytes - edge] {
            let read = file.read_exact_at(&mut bytes, at);
            read.map_err(DiskError::Unusable)?;
        }
        Ok(())
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

/// Has all that was written to it be there after a power cut.
pub fn sync(device: &Path) -> io::Result<()> {
    File::open(device)?.sync_all()
}

fn names(dir: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| wanted(&entry.path()));
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
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
            device: 0,
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
        assert_eq!(
            both.content(),
            "linux_raid_member, UUID AB:CD, label h:batchai; dos"
        );
        // One without a UUID is nobody's, also where nothing is looked for.
        assert!(!disk(&format!(r#"{{"signatures": [{other}]}}"#)).is_of(&["abcd"]));
    }
}
