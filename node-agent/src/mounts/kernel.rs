//! What the kernel says is mounted. Reading that asks no file system, so that a dead one does not matter.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cgroups::unescape;

/// What is mounted where.
#[derive(Debug, Default)]
pub struct Mounted {
    /// By place: the devices, the one that is seen last.
    places: BTreeMap<PathBuf, Vec<String>>,
}

/// What is mounted now, as this process sees it; `None` where the kernel does not say.
pub fn mounted() -> Option<Mounted> {
    fs::read_to_string("/proc/self/mountinfo")
        .ok()
        .map(|text| Mounted::parse(&text))
}

impl Mounted {
    fn parse(text: &str) -> Mounted {
        let mut places: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
        for line in text.lines() {
            let mut fields = line.split(' ').skip(2);
            if let (Some(device), Some(place)) = (fields.next(), fields.nth(1)) {
                let devices = places.entry(unescape(place)).or_default();
                devices.push(device.to_owned());
            }
        }
        Mounted { places }
    }

    /// Whether something is mounted at a path.
    pub fn has(&self, path: &str) -> bool {
        self.places.contains_key(&real(path))
    }

    /// Whether what is mounted at a path is mounted nowhere else: only then it may be ended as a whole.
    pub fn is_sole(&self, path: &str) -> bool {
        let device = self.places.get(&real(path)).and_then(|all| all.last());
        let all = self.places.values().flatten();
        device.is_some_and(|device| all.filter(|other| *other == device).count() == 1)
    }
}

/// A path as the kernel says it. What leads to a mount lies on this host: looking at it cannot hang.
pub fn real(path: &str) -> PathBuf {
    let path = Path::new(path);
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    match (parent, path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_known_by_their_place_and_their_device() {
        let known = Mounted::parse(
            "1 0 8:1 / / rw - ext4 d rw\n\
             2 1 0:30 / /no-such-a\\040b rw,nosuid shared:1 - tmpfs t rw\n\
             3 1 0:31 / /no-such-x rw - fuse.f f rw\n\
             4 1 0:31 /in /no-such-y rw - fuse.f f rw\n\
             junk\n",
        );
        assert!(known.has("/no-such-a b") && !known.has("/no-such-a"));
        assert!(known.is_sole("/no-such-a b"));
        assert!(!known.is_sole("/no-such-x") && !known.is_sole("/no-such-y"));
        assert!(!known.is_sole("/no-such-z"));
    }
}
