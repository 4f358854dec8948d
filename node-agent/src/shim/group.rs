//! Groups of processes, made, ended and removed, and the try which of them this agent may make.
//!
//! It sets no limits (`seats` does). Who is in a group and leaves it, as root may, is not found by it: the walk and the sweep of `tree`
//! are for that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::seats;
use super::tree::{SweepError, signal_all};
use crate::cgroups::{Group, Isolation, Method, PROCESS_TREE, Seat, places};
use crate::journal::{Journal, PREPARE};
use crate::launch::Preparation;

pub(super) const PROCS: &str = "cgroup.procs";
const FREEZER: &str = "freezer.state";
/// How often a group is looked at until it is frozen. One that has a process stuck in the kernel may never be.
const FREEZE_LOOKS_MAX: usize = 100;
const FREEZE_PAUSE: Duration = Duration::from_millis(1);
/// How often a group is killed and removed until it is gone.
pub(super) const ROUNDS_MAX: usize = 100;
pub(super) const ROUND: Duration = Duration::from_millis(10);

impl Group {
    /// Makes it, with the directory of groups that it is in.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir_all(&self.path)
    }

    /// Who writes `0` into it is in the group, with all that it starts.
    pub fn entrance(&self) -> io::Result<File> {
        OpenOptions::new().write(true).open(self.path.join(PROCS))
    }

    /// What runs in it and in groups below it. One that is not there has nothing.
    pub fn processes(&self) -> Vec<i32> {
        let texts = below(&self.path).into_iter();
        let texts = texts.filter_map(|path| fs::read_to_string(path.join(PROCS)).ok());
        let pids = texts.flat_map(|text| {
            text.lines()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<i32>>()
        });
        // Those of another namespace have no number here.
        pids.filter(|pid| *pid > 0).collect()
    }

    /// Kills all that is in it. They end in their own time.
    pub fn kill(&self) -> io::Result<()> {
        match self.method {
            Method::CgroupKill => fs::write(self.path.join("cgroup.kill"), "1"),
            Method::CgroupFreezer => {
                let state = self.path.join(FREEZER);
                fs::write(&state, "FROZEN")?;
                for _ in 0..FREEZE_LOOKS_MAX {
                    if fs::read_to_string(&state).is_ok_and(|state| state.trim() == "FROZEN") {
                        break;
                    }
                    std::thread::sleep(FREEZE_PAUSE);
                }
                // None of them can start another now.
                signal_all(&self.processes(), Signal::SIGKILL);
                fs::write(&state, "THAWED")
            }
        }
    }

    /// Removes it, with groups that were made in it. Nothing may run in them.
    pub fn remove(&self) -> io::Result<()> {
        for path in below(&self.path) {
            match fs::remove_dir(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Kills all that is in it until nothing is, and removes it.
    ///
    /// # Errors
    /// Names the processes that do not die.
    pub fn end(&self) -> Result<(), SweepError> {
        let mut removed = Ok(());
        for _ in 0..ROUNDS_MAX {
            if !self.processes().is_empty() {
                self.kill()?;
            } else {
                // What was killed takes a moment to leave.
                removed = self.remove();
                if removed.is_ok() {
                    return Ok(());
                }
            }
            std::thread::sleep(ROUND);
        }
        let left = self.processes();
        match left.is_empty() {
            true => Ok(removed?),
            false => Err(SweepError::Left(left)),
        }
    }
}

/// A group and all groups below it, the innermost first.
fn below(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut found: Vec<_> = dirs.flat_map(|entry| below(&entry.path())).collect();
    found.push(path.to_owned());
    found
}

/// Where the groups of a node's attempts can be, best first: named by the node, for several may share a machine.
pub fn homes(node_uid: &str) -> io::Result<Vec<Group>> {
    let (mounts, own) = own_places()?;
    let places = places(&mounts, &own).into_iter();
    let name = format!("batchai-{node_uid}");
    Ok(places.map(|place| place.below(&name)).collect())
}

/// What the kernel says of its mounts, and of this process's place in each hierarchy.
pub(super) fn own_places() -> io::Result<(String, String)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    match fs::read_to_string("/proc/self/cgroup") {
        // A kernel without them.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((mounts, String::new())),
        own => Ok((mounts, own?)),
    }
}

/// Where this agent can make and end groups, and what it can limit, by trying it. `only` names the one method that is wanted;
/// with that of no groups nothing is limited either.
pub fn detect(node_uid: &str, only: Option<&str>) -> io::Result<Isolation> {
    if only == Some(PROCESS_TREE) {
        return Ok(Isolation::default());
    }
    let homes = homes(node_uid)?.into_iter();
    let wanted = homes.filter(|home| only.is_none_or(|only| only == home.method.name()));
    let mut best: Option<(Group, Vec<Seat>)> = None;
    for home in wanted {
        if let Err(error) = works(&home) {
            tracing::info!(%error, path = %home.path.display(), "no groups of processes here");
            continue;
        }
        // A process is in one group of v2: the first place is not the best where another can limit what it takes.
        let seats = match home.method {
            Method::CgroupKill => seats::of_v2(&home),
            Method::CgroupFreezer => Vec::new(),
        };
        let better = best
            .as_ref()
            .is_none_or(|(known, had)| known.method == home.method && seats.len() > had.len());
        if better {
            best = Some((home, seats));
        }
    }
    let (groups, mut seats) = best.unzip();
    let seats = seats.get_or_insert_default();
    for seat in seats::of_v1(node_uid)? {
        // A kernel has each controller in one hierarchy only.
        if seats
            .iter()
            .all(|known| known.controller != seat.controller)
        {
            seats.push(seat);
        }
    }
    Ok(Isolation {
        groups,
        seats: std::mem::take(seats),
    })
}

fn works(home: &Group) -> Result<(), SweepError> {
    let group = home.below("try");
    group.create()?;
    let tried = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .and_then(|mut child| {
            let ended = ends(&group, &mut child);
            // Also where it could not be ended by its group.
            child.kill()?;
            child.wait()?;
            ended
        });
    let removed = group.end();
    leave(&home.path);
    tried?;
    removed
}

/// Whether a process can be put into a group, and ends by it.
fn ends(group: &Group, child: &mut Child) -> io::Result<()> {
    fs::write(group.path.join(PROCS), child.id().to_string())?;
    group.kill()?;
    for _ in 0..ROUNDS_MAX {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(ROUND);
    }
    Err(io::Error::other("it does not end what is in it"))
}

/// Removes a directory of groups where it has none. Where it has it stays, and whoever ends the last one removes it.
pub fn leave(home: &Path) {
    let _ = fs::remove_dir(home);
}

/// Ends the groups of a node's attempts, where the attempt is not one that `keep` says is alive.
///
/// # Errors
/// Names what does not die; the others have ended.
pub fn sweep(
    journal: &Journal,
    node_uid: &str,
    keep: &impl Fn(&str) -> bool,
) -> Result<(), SweepError> {
    let mut homes = homes(node_uid)?;
    // An earlier agent may have had another place.
    for dir in journal.attempts().map_err(io::Error::other)? {
        let recorded = match dir.read::<Preparation>(PREPARE) {
            Ok(plan) => plan.and_then(|plan| plan.group),
            Err(error) => {
                tracing::warn!(%error, attempt = dir.id(), "what its group is cannot be read");
                None
            }
        };
        let home = recorded.and_then(|group| {
            let path = group.path.parent()?.to_owned();
            Some(Group { path, ..group })
        });
        homes.extend(home.filter(|home| !homes.contains(home)));
    }
    let mut failed = Ok(());
    for home in homes {
        let entries = fs::read_dir(&home.path).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        // Asked after it was seen: a shim takes its lock before it makes its group.
        let names = dirs.map(|entry| entry.file_name().to_string_lossy().into_owned());
        for name in names.filter(|name| !keep(name)) {
            failed = failed.and(home.below(&name).end());
        }
        leave(&home.path);
    }
    failed?;
    Ok(seats::sweep(node_uid, keep)?)
}
