//! What the kernel says is mounted. Reading that asks no file system, so that a dead one does not matter.
//!
//! What was mounted for a job lies in a directory of the job's user, who may rename what leads to it, and put links there: it is
//! known by its number and what it is, and found where it is by then.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cgroups::unescape;

/// Something that is mounted, for as long as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The kernel's number for it, which it gives to another when this one is gone.
    id: u64,
    device: String,
    /// In which boot of the machine, and what it is: its part of the file system, the kind of that, and what that is made of.
    what: String,
}

/// What is mounted where, the latest last.
#[derive(Debug, Default)]
pub struct Mounted {
    all: Vec<(Mark, PathBuf)>,
}

/// What is mounted now, as this process sees it; `None` where the kernel does not say.
pub fn mounted() -> Option<Mounted> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    Some(Mounted::parse(boot.trim(), &text))
}

impl Mounted {
    fn parse(boot: &str, text: &str) -> Mounted {
        let line = |line: &str| {
            let mut fields = line.split(' ');
            let id = fields.next()?.parse().ok()?;
            let device = fields.nth(1)?.to_owned();
            let (root, place) = (fields.next()?, unescape(fields.next()?));
            let mut rest = line.split_once(" - ")?.1.split(' ');
            let (kind, source) = (rest.next()?, rest.next()?);
            let what = format!("{boot} {root} {kind} {source}");
            Some((Mark { id, device, what }, place))
        };
        Mounted {
            all: text.lines().filter_map(line).collect(),
        }
    }

    /// Whether something is mounted beneath a place, which is as the kernel says it.
    pub fn is_below(&self, place: &Path) -> bool {
        let mut all = self.all.iter();
        all.any(|(_, other)| other != place && other.starts_with(place))
    }

    /// What is mounted at a place.
    pub fn at(&self, place: &Path) -> Vec<Mark> {
        let here = self.all.iter().filter(|(_, other)| other == place);
        here.map(|(mark, _)| mark.clone()).collect()
    }

    /// Where something is now.
    pub fn place(&self, mark: &Mark) -> Option<&Path> {
        let found = self.all.iter().find(|(other, _)| other == mark);
        found.map(|(_, place)| place.as_path())
    }

    /// Whether it is mounted nowhere else: only then it may be ended as a whole.
    pub fn is_sole(&self, mark: &Mark) -> bool {
        let same = self
            .all
            .iter()
            .filter(|(other, _)| other.device == mark.device);
        same.count() == 1
    }
}

/// A path below the agent's own root as the kernel says it. Nothing is looked at below that root.
pub fn real(root: &str, path: &str) -> PathBuf {
    let below = Path::new(path).strip_prefix(root).ok();
    let root = Path::new(root).canonicalize().ok();
    match (root, below) {
        (Some(root), Some(below)) => root.join(below),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_known_by_number_and_kind_wherever_they_are() {
        let known = Mounted::parse(
            "b1",
            "1 0 8:1 / / rw - ext4 d rw\n\
             2 1 0:30 / /a\\040b rw,nosuid shared:1 - tmpfs t rw\n\
             3 1 0:31 / /x rw - fuse.f f rw\n\
             4 1 0:31 /in /y rw - fuse.f f rw\n\
             junk\n",
        );
        let [tmpfs] = &known.at(Path::new("/a b"))[..] else {
            panic!("{known:?}")
        };
        assert!(known.at(Path::new("/a")).is_empty());
        let [x] = &known.at(Path::new("/x"))[..] else {
            panic!("{known:?}")
        };
        assert!(known.is_sole(tmpfs) && !known.is_sole(x));
        let later = "2 1 0:30 / /c rw - tmpfs t rw\n3 1 0:31 / /x rw - fuse.g f rw\n";
        let moved = Mounted::parse("b1", later);
        assert_eq!(moved.place(tmpfs), Some(Path::new("/c")));
        assert_eq!(moved.place(x), None, "the number was given to another");
        let rebooted = Mounted::parse("b2", later);
        assert_eq!(rebooted.place(tmpfs), None, "it is gone with its boot");
    }

    #[test]
    fn only_the_root_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let (real_root, link) = (dir.path().join("r"), dir.path().join("l"));
        fs::create_dir(&real_root).unwrap();
        std::os::unix::fs::symlink(&real_root, &link).unwrap();
        let root = link.to_string_lossy();
        let expected = real_root.canonicalize().unwrap().join("jobs/w/x");
        assert_eq!(real(&root, &format!("{root}/jobs/w/x")), expected);
    }
}
