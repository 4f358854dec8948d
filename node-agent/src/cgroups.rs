//! PURE. Where on a machine processes can be grouped so that all of a group are ended at once, whatever they do: from what
//! the kernel says of its mounts and of a process's own place.
//!
//! Nothing is made, tried or ended here (`shim::group` does that), and limits are no business of it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// How a group is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// cgroup v2, with or without controllers: one write to `cgroup.kill`.
    CgroupKill,
    /// cgroup v1: frozen, killed one by one, thawed.
    CgroupFreezer,
}

/// What a node says of itself that has no groups.
pub const PROCESS_TREE: &str = "process-tree";

impl Method {
    /// As a node says it of itself.
    pub fn name(self) -> &'static str {
        match self {
            Method::CgroupKill => "cgroup-kill",
            Method::CgroupFreezer => "cgroup-freezer",
        }
    }
}

/// A group of processes, or a directory of such groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub method: Method,
    pub path: PathBuf,
}

impl Group {
    /// The one of that name in it.
    pub fn below(&self, name: &str) -> Group {
        Group {
            method: self.method,
            path: self.path.join(name),
        }
    }
}

/// Where a process may be let make groups, best first: at its own place of a hierarchy, then at the top. `mounts` and `own`
/// are its `mountinfo` and `cgroup` files.
pub fn places(mounts: &str, own: &str) -> Vec<Group> {
    let mut places = Vec::new();
    for (method, kind, controller) in [
        (Method::CgroupKill, "cgroup2", ""),
        (Method::CgroupFreezer, "cgroup", "freezer"),
    ] {
        let own = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            names(controllers, controller).then_some(path)
        });
        for line in mounts.lines() {
            let Some((root, point)) = mounted(line, kind, controller) else {
                continue;
            };
            let below = own.and_then(|own| Path::new(own).strip_prefix(&root).ok());
            // What lies outside of its namespace a process sees as a way up.
            let below = below.filter(|below| !below.iter().any(|part| part == ".."));
            for path in [below.map(|below| point.join(below)), Some(point.clone())] {
                let place = path.map(|path| Group { method, path });
                places.extend(place.filter(|place| !places.contains(place)));
            }
        }
    }
    places
}

/// Where a hierarchy is mounted, and what of it.
fn mounted(line: &str, kind: &str, controller: &str) -> Option<(PathBuf, PathBuf)> {
    let (place, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    let is = filesystem.next()? == kind;
    let options = filesystem.nth(1)?;
    let mut place = place.split(' ').skip(3).map(unescape);
    let found = (place.next()?, place.next()?);
    (is && (controller.is_empty() || names(options, controller))).then_some(found)
}

fn names(list: &str, wanted: &str) -> bool {
    list.split(',').any(|name| name == wanted)
}

/// Spaces and the like stand in mountinfo as a backslash and three octal digits.
pub fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let octal = text
            .get(i + 1..i + 4)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (bytes[i], octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                i += 4;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(mounts: &str, own: &str) -> Vec<(&'static str, String)> {
        let places = places(mounts, own).into_iter();
        places
            .map(|place| (place.method.name(), place.path.display().to_string()))
            .collect()
    }

    #[test]
    fn its_own_place_is_before_the_top_and_v2_before_v1() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      37 31 0:34 / /sys/fs/cgroup/freezer rw shared:9 - cgroup cgroup rw,freezer\n\
                      33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let own = "6:freezer:/\n1:cpu,cpuacct:/x\n0::/system.slice/agent.service\n";
        assert_eq!(
            found(hybrid, own),
            [
                (
                    "cgroup-kill",
                    "/sys/fs/cgroup/unified/system.slice/agent.service".into()
                ),
                ("cgroup-kill", "/sys/fs/cgroup/unified".into()),
                ("cgroup-freezer", "/sys/fs/cgroup/freezer/".into()),
            ]
        );
    }

    #[test]
    fn containers_see_a_part_of_a_hierarchy() {
        let mounts = "9 1 0:4 /docker/a /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate,memory_recursiveprot\n";
        assert_eq!(
            found(mounts, "0::/docker/a/b\n"),
            [
                ("cgroup-kill", "/sys/fs/cgroup/b".into()),
                ("cgroup-kill", "/sys/fs/cgroup".into()),
            ]
        );
        for elsewhere in ["0::/docker/a/../b\n", "0::/other\n", "", "nonsense\n"] {
            assert_eq!(
                found(mounts, elsewhere),
                [("cgroup-kill", "/sys/fs/cgroup".into())]
            );
        }
    }

    #[test]
    fn what_is_not_understood_is_no_place() {
        let none: [(&str, String); 0] = [];
        for mounts in [
            "",
            "x",
            "1 2 - cgroup2",
            "1 2 3 4 - cgroup2 a b",
            "1 2 3 / /c - ",
        ] {
            assert_eq!(found(mounts, "0::/\n"), none, "{mounts}");
        }
    }

    #[test]
    fn mount_points_are_read_as_they_are_meant() {
        assert_eq!(unescape("/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape("/plain\\9"), Path::new("/plain\\9"));
    }
}
