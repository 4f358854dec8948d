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
    all: Vec<One>,
}

#[derive(Debug)]
struct One {
    mark: Mark,
    place: PathBuf,
    read_only: bool,
}

impl Mark {
    /// Whether it is of no disk of this machine, and no program here serves it: the kernel itself sends what is written elsewhere, later.
    fn is_sent_later(&self) -> bool {
        let kind = self.what.split(' ').nth(2).unwrap_or_default();
        self.device.starts_with("0:") && !kind.starts_with("fuse")
    }
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
            let read_only = fields.next()?.split(',').any(|option| option == "ro");
            let mut rest = line.split_once(" - ")?.1.split(' ');
            let (kind, source) = (rest.next()?, rest.next()?);
            let what = format!("{boot} {root} {kind} {source}");
            let mark = Mark { id, device, what };
            Some(One {
                mark,
                place,
                read_only,
            })
        };
        Mounted {
            all: text.lines().filter_map(line).collect(),
        }
    }

    /// What is mounted at a place.
    pub fn at(&self, place: &Path) -> Vec<Mark> {
        let here = self.all.iter().filter(|one| one.place == place);
        here.map(|one| one.mark.clone()).collect()
    }

    /// Where something is now.
    pub fn place(&self, mark: &Mark) -> Option<&Path> {
        let found = self.all.iter().find(|one| one.mark == *mark);
        found.map(|one| one.place.as_path())
    }

    /// Something that is mounted below a place.
    pub fn below(&self, place: &Path) -> Option<&Path> {
        let mut all = self.all.iter().map(|one| one.place.as_path());
        all.find(|other| *other != place && other.starts_with(place))
    }

    /// Whether the kernel may still have something that was written to it.
    pub fn holds_back(&self, mark: &Mark) -> bool {
        let writable = |one: &One| one.mark == *mark && !one.read_only;
        mark.is_sent_later() && self.all.iter().any(writable)
    }

    /// Whether it is mounted nowhere else: only then it may be ended as a whole.
    pub fn is_sole(&self, mark: &Mark) -> bool {
        let same = self.all.iter();
        let same = same.filter(|one| one.mark.device == mark.device);
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
        assert_eq!(known.below(Path::new("/a")), None);
        assert_eq!(known.below(Path::new("/x")), None);
        assert_eq!(known.below(Path::new("/")), Some(Path::new("/a b")));
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
    fn what_the_kernel_sends_later_is_known() {
        let known = Mounted::parse(
            "b1",
            "1 0 8:1 / /d rw - ext4 d rw\n\
             2 1 0:30 / /n rw,nosuid - nfs 10.0.0.1:/ rw\n\
             3 1 0:31 / /r nosuid,ro - cifs //h/s rw\n\
             4 1 0:32 / /f rw - fuse.rclone r: rw\n",
        );
        let held = ["/d", "/n", "/r", "/f"].map(|place| {
            let marks = known.at(Path::new(place));
            known.holds_back(&marks[0])
        });
        assert_eq!(held, [false, true, false, false]);
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
