//! PURE. Where on a machine processes can be grouped so that all of a group are ended at once, whatever they do, and so that what they
//! take is limited: from what the kernel says of its mounts and of a process's own place.
//!
//! Nothing is made, tried or ended here (`shim::group` and `shim::seats` do that).

use std::path::{Path, PathBuf};

use batchai_proto::v1::ResourceLimits;
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

/// What the kernel can limit for a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    pub const ALL: [Controller; 3] = [Controller::Cpu, Controller::Memory, Controller::Pids];

    /// As the kernel calls it, and as a node says it of itself.
    pub fn name(self) -> &'static str {
        match self {
            Controller::Cpu => "cpu",
            Controller::Memory => "memory",
            Controller::Pids => "pids",
        }
    }
}

/// A group for which something can be limited, or a directory of such groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    pub controller: Controller,
    /// Of cgroup v2, where a process is in one group for everything: the one that it is ended with.
    pub v2: bool,
    pub path: PathBuf,
}

/// A line for a file of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    pub file: String,
    pub value: String,
    /// Not every kernel has that file, and what it says is only finer.
    pub may_lack: bool,
}

/// A group with what is limited for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    pub seat: Seat,
    pub settings: Vec<Setting>,
}

impl Bound {
    /// How much memory it leaves its processes, as it was asked for.
    pub fn memory_mib(&self) -> Option<String> {
        let limited = self.seat.controller == Controller::Memory;
        let file = self.seat.limit_file();
        let set = self
            .settings
            .iter()
            .find(|set| limited && set.file == file)?;
        let bytes: u64 = set.value.parse().ok()?;
        Some((bytes >> 20).to_string())
    }
}

/// What this agent can do with groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Isolation {
    /// Where the groups of attempts are.
    pub groups: Option<Group>,
    /// What it can limit, and where.
    pub seats: Vec<Seat>,
}

/// The time of a processor is given out in periods of so many microseconds.
const PERIOD_US: u32 = 100_000;

impl Seat {
    /// The one of that name in it.
    pub fn below(&self, name: &str) -> Seat {
        Seat {
            path: self.path.join(name),
            ..self.clone()
        }
    }

    /// The file by which a limit is known to be enforced here.
    pub fn limit_file(&self) -> &'static str {
        match (self.controller, self.v2) {
            (Controller::Cpu, true) => "cpu.max",
            (Controller::Cpu, false) => "cpu.cfs_quota_us",
            (Controller::Memory, true) => "memory.max",
            (Controller::Memory, false) => "memory.limit_in_bytes",
            (Controller::Pids, _) => "pids.max",
        }
    }

    /// The file that counts whom the kernel killed for want of memory.
    pub fn kills_file(&self) -> Option<&'static str> {
        match (self.controller, self.v2) {
            (Controller::Memory, true) => Some("memory.events"),
            (Controller::Memory, false) => Some("memory.oom_control"),
            _ => None,
        }
    }

    /// What to write into its files, in order.
    pub fn settings(&self, limits: &ResourceLimits) -> Vec<Setting> {
        let set = |file: &str, value: String| Setting {
            file: file.to_owned(),
            value,
            may_lack: false,
        };
        let finer = |file: &str, value: &str| Setting {
            may_lack: true,
            ..set(file, value.to_owned())
        };
        let mut settings = Vec::new();
        match self.controller {
            Controller::Cpu if limits.cpus > 0.0 => {
                let quota = (limits.cpus * f64::from(PERIOD_US)).round() as i64;
                if self.v2 {
                    settings.push(set(self.limit_file(), format!("{quota} {PERIOD_US}")));
                } else {
                    settings.push(set("cpu.cfs_period_us", PERIOD_US.to_string()));
                    settings.push(set(self.limit_file(), quota.to_string()));
                }
            }
            Controller::Memory => {
                // A job that lost one of its processes is not to limp on with the others.
                if self.v2 {
                    settings.push(finer("memory.oom.group", "1"));
                }
                if limits.memory_mib > 0 {
                    let bytes = limits.memory_mib.saturating_mul(1 << 20).to_string();
                    settings.push(set(self.limit_file(), bytes.clone()));
                    settings.push(match self.v2 {
                        true => finer("memory.swap.max", "0"),
                        // Memory and swap together: what is limited to the same may not swap.
                        false => finer("memory.memsw.limit_in_bytes", &bytes),
                    });
                }
            }
            Controller::Pids if limits.pids > 0 => {
                settings.push(set(self.limit_file(), limits.pids.to_string()));
            }
            Controller::Cpu | Controller::Pids => {}
        }
        settings
    }
}

/// What a job asks to be limited.
pub fn asked(limits: &ResourceLimits) -> impl Iterator<Item = Controller> {
    let wanted = [limits.cpus > 0.0, limits.memory_mib > 0, limits.pids > 0];
    let all = Controller::ALL.into_iter().zip(wanted);
    all.filter_map(|(controller, wanted)| wanted.then_some(controller))
}

/// How many the kernel killed for want of memory, by what a `kills_file` says.
pub fn kills(text: &str) -> u64 {
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or_default()
}

/// Where a process may be let limit something by cgroup v1, for each controller best first.
pub fn v1_seats(mounts: &str, own: &str) -> Vec<Seat> {
    let seats = Controller::ALL.into_iter().flat_map(|controller| {
        let paths = paths(mounts, own, "cgroup", controller.name());
        paths.into_iter().map(move |path| Seat {
            controller,
            v2: false,
            path,
        })
    });
    seats.collect()
}

/// Where a process may be let make groups, best first: at its own place of a hierarchy, then at the top. `mounts` and `own`
/// are its `mountinfo` and `cgroup` files.
pub fn places(mounts: &str, own: &str) -> Vec<Group> {
    let kinds = [
        (Method::CgroupKill, "cgroup2", ""),
        (Method::CgroupFreezer, "cgroup", "freezer"),
    ];
    let places = kinds.into_iter().flat_map(|(method, kind, controller)| {
        let paths = paths(mounts, own, kind, controller);
        paths.into_iter().map(move |path| Group { method, path })
    });
    places.collect()
}

/// A process's own place in a hierarchy, and its top.
fn paths(mounts: &str, own: &str, kind: &str, controller: &str) -> Vec<PathBuf> {
    let own = own.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        names(controllers, controller).then_some(path)
    });
    let mut paths = Vec::new();
    for line in mounts.lines() {
        let Some((root, point)) = mounted(line, kind, controller) else {
            continue;
        };
        let below = own.and_then(|own| Path::new(own).strip_prefix(&root).ok());
        // What lies outside of its namespace a process sees as a way up.
        let below = below.filter(|below| !below.iter().any(|part| part == ".."));
        for path in [below.map(|below| point.join(below)), Some(point.clone())] {
            paths.extend(path.filter(|path| !paths.contains(path)));
        }
    }
    paths
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
    fn what_is_limited_becomes_lines_for_the_files_of_groups() {
        let limits = ResourceLimits {
            cpus: 1.5,
            memory_mib: 64,
            pids: 20,
        };
        let all = |v2: bool, limits: &ResourceLimits| {
            let seats = Controller::ALL.map(|controller| Seat {
                controller,
                v2,
                path: "/g".into(),
            });
            let lines = seats.iter().flat_map(|seat| seat.settings(limits));
            let lines = lines.map(|line| format!("{} {}", line.file, line.value));
            lines.collect::<Vec<_>>()
        };
        assert_eq!(
            all(true, &limits),
            [
                "cpu.max 150000 100000",
                "memory.oom.group 1",
                "memory.max 67108864",
                "memory.swap.max 0",
                "pids.max 20",
            ]
        );
        assert_eq!(
            all(false, &limits),
            [
                "cpu.cfs_period_us 100000",
                "cpu.cfs_quota_us 150000",
                "memory.limit_in_bytes 67108864",
                "memory.memsw.limit_in_bytes 67108864",
                "pids.max 20",
            ]
        );
        let none = ResourceLimits::default();
        assert_eq!(all(true, &none), ["memory.oom.group 1"]);
        assert_eq!(all(false, &none), [""; 0]);
        assert_eq!((asked(&limits).count(), asked(&none).count()), (3, 0));
    }

    #[test]
    fn kills_are_counted_by_both_kinds_of_files() {
        assert_eq!(
            kills("low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 1\n"),
            3
        );
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"), 1);
        for text in ["", "oom_kill", "oom_kill x", "oom_kill_disable 1"] {
            assert_eq!(kills(text), 0, "{text}");
        }
    }

    #[test]
    fn each_controller_of_v1_has_a_hierarchy_of_its_own_or_shares_one() {
        let mounts = "33 31 0:30 / /c/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                      34 31 0:31 / /c/memory rw - cgroup cgroup rw,memory\n";
        let seats = v1_seats(mounts, "4:memory:/a/b\n1:cpu,cpuacct:/\n");
        let seats = seats
            .iter()
            .map(|s| (s.controller.name(), s.path.to_str().unwrap()));
        assert_eq!(
            seats.collect::<Vec<_>>(),
            [
                ("cpu", "/c/cpu/"),
                ("memory", "/c/memory/a/b"),
                ("memory", "/c/memory")
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
