//! Groups in which what a job takes is limited: made, set, and removed, and the try which limits this agent can enforce.
//!
//! Nothing is ended by them (`group` does that), and who asks for a limit that is not to be had was refused before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::path::Path;

use super::group::{PROCS, ROUND, ROUNDS_MAX, leave};
use crate::cgroups::{Bound, Controller, Group, Seat, Setting, kills, v1_seats};

/// What of cgroup v2 is enabled for the groups in a group.
const ENABLED: &str = "cgroup.subtree_control";

impl Bound {
    /// Makes the group and sets its limits.
    pub fn create(&self) -> io::Result<()> {
        self.seat.create()?;
        for setting in &self.settings {
            set(&self.seat.path, setting)?;
        }
        Ok(())
    }

    /// Who writes `0` into it is in the group. None where it is the group that ends it: one is in it already.
    pub fn entrance(&self) -> io::Result<Option<File>> {
        let open = || {
            OpenOptions::new()
                .write(true)
                .open(self.seat.path.join(PROCS))
        };
        (!self.seat.v2).then(open).transpose()
    }

    /// How many of it the kernel killed for want of memory.
    pub fn kills(&self) -> u64 {
        let text = self
            .seat
            .kills_file()
            .map(|file| fs::read_to_string(self.seat.path.join(file)));
        text.and_then(Result::ok).map_or(0, |text| kills(&text))
    }
}

impl Seat {
    fn create(&self) -> io::Result<()> {
        if let (true, Some(home)) = (self.v2, self.path.parent()) {
            // Whoever left it last has removed it.
            fs::create_dir_all(home)?;
            enable(home, self.controller)?;
        }
        fs::create_dir_all(&self.path)
    }

    /// Removes it; nothing may run in it. What was killed takes a moment to leave.
    pub fn remove(&self) -> io::Result<()> {
        let mut removed = Ok(());
        for _ in 0..ROUNDS_MAX {
            removed = match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                removed => removed,
            };
            if removed.is_ok() {
                break;
            }
            std::thread::sleep(ROUND);
        }
        if let Some(home) = self.path.parent() {
            leave(home);
        }
        removed
    }
}

/// A file of a group takes a line in one piece.
fn set(group: &Path, setting: &Setting) -> io::Result<()> {
    let opened = OpenOptions::new()
        .write(true)
        .open(group.join(&setting.file));
    let written = opened.and_then(|mut file| file.write_all(setting.value.as_bytes()));
    match written {
        Err(error) if setting.may_lack && error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => {
            let (file, value) = (&setting.file, &setting.value);
            Err(io::Error::new(
                error.kind(),
                format!("{file} does not take {value}: {error}"),
            ))
        }
        Ok(()) => Ok(()),
    }
}

/// Lets the groups in a group of cgroup v2 limit something. Not where processes are in that group itself: there the kernel refuses
/// some controllers and takes others, and lets nobody into the groups below from then on.
fn enable(group: &Path, controller: Controller) -> io::Result<()> {
    let name = controller.name();
    let enabled = fs::read_to_string(group.join(ENABLED))?;
    if enabled.split_whitespace().any(|known| known == name) {
        return Ok(());
    }
    // The top of all, as no namespace shows it but the first, is free of that rule.
    let is_top = !group.join("cgroup.events").exists();
    if !is_top && !fs::read_to_string(group.join(PROCS))?.is_empty() {
        let why = format!("{} has processes of its own", group.display());
        return Err(io::Error::new(ErrorKind::ResourceBusy, why));
    }
    fs::write(group.join(ENABLED), format!("+{name}"))
}

/// What can be limited for groups of cgroup v2 in this directory.
pub fn of_v2(home: &Group) -> Vec<Seat> {
    let able = Controller::ALL.into_iter().filter_map(|controller| {
        let seat = Seat {
            controller,
            v2: true,
            path: home.path.clone(),
        };
        enable(home.path.parent()?, controller).ok()?;
        works(&seat).then_some(seat)
    });
    able.collect()
}

/// What can be limited by cgroup v1, each by the first hierarchy that lets this agent.
pub fn of_v1(node_uid: &str) -> io::Result<Vec<Seat>> {
    let mut found: Vec<Seat> = Vec::new();
    for home in v1_homes(node_uid)? {
        let known = found.iter().any(|seat| seat.controller == home.controller);
        if !known && works(&home) {
            found.push(home);
        }
    }
    Ok(found)
}

/// Where the groups of a node's attempts can be for limits by cgroup v1.
fn v1_homes(node_uid: &str) -> io::Result<Vec<Seat>> {
    let (mounts, own) = super::group::own_places()?;
    let seats = v1_seats(&mounts, &own).into_iter();
    let name = format!("batchai-{node_uid}");
    Ok(seats.map(|seat| seat.below(&name)).collect())
}

fn works(home: &Seat) -> bool {
    let seat = home.below("try");
    let able = seat.create().is_ok() && seat.path.join(seat.limit_file()).exists();
    // Where it cannot be removed it is no place for others.
    able && seat.remove().is_ok()
}

/// Removes the groups of a node's attempts, where the attempt is not one that `keep` says is alive.
///
/// # Errors
/// Names one that is left; the others are gone.
pub fn sweep(node_uid: &str, keep: &impl Fn(&str) -> bool) -> io::Result<()> {
    let mut failed = Ok(());
    for home in v1_homes(node_uid)? {
        let entries = fs::read_dir(&home.path).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names = dirs.map(|entry| entry.file_name().to_string_lossy().into_owned());
        for name in names.filter(|name| !keep(name)) {
            failed = failed.and(home.below(&name).remove());
        }
        leave(&home.path);
    }
    failed
}
