//! Finds and ends everything that an attempt started: descendants of the shim, and strays by their group and their tag.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::group;
use crate::journal::Journal;
use crate::launch::ATTEMPT_TAG;

/// Why something of an attempt may still run.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error("processes that do not die: {0:?}")]
    Left(Vec<i32>),
    #[error(transparent)]
    System(#[from] io::Error),
}

/// All descendants of a process, but for some that are left alone with what is below them.
pub fn descendants(root: i32, except: &[i32]) -> Vec<i32> {
    let mut found = Vec::new();
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        for child in children(pid) {
            if !except.contains(&child) {
                found.push(child);
                open.push(child);
            }
        }
    }
    found
}

/// The children of all threads of a process. One that has ended meanwhile has none.
fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let texts = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    texts
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|p| p.parse().ok())
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// Sends a signal to all of them. One that has ended meanwhile needs none.
pub fn signal_all(pids: &[i32], signal: Signal) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}

/// Rounds in which nothing may be found, and nothing may vanish, before nothing is left: between two programs of a process its environment
/// is not to be seen.
const EMPTY_ROUNDS: usize = 3;
/// On a machine where something always begins and ends no round is a quiet one: so many do as well.
const UNQUIET_ROUNDS: usize = 40;
const ROUNDS_MAX: usize = 200;
const ROUND_PAUSE: Duration = Duration::from_millis(5);

/// Kills every process on this machine that is in the group or carries the tag of an attempt of a node, where the attempt
/// is not one that `keep` says is alive, until none is left.
///
/// # Errors
/// Names the processes that do not die.
pub fn sweep(
    journal: &Journal,
    node_uid: &str,
    keep: impl Fn(&str) -> bool,
) -> Result<(), SweepError> {
    let grouped = group::sweep(journal, node_uid, &keep);
    let (mut left, mut quiet, mut unquiet) = (BTreeSet::new(), 0, 0);
    for _ in 0..ROUNDS_MAX {
        let round = kill_tagged(node_uid, &keep)?;
        left = round.killed;
        match (left.is_empty(), round.vanished) {
            (false, _) => (quiet, unquiet) = (0, 0),
            (true, true) => unquiet += 1,
            (true, false) => quiet += 1,
        }
        if quiet == EMPTY_ROUNDS || unquiet == UNQUIET_ROUNDS {
            return grouped;
        }
        std::thread::sleep(ROUND_PAUSE);
    }
    Err(SweepError::Left(left.into_iter().collect()))
}

struct Round {
    killed: BTreeSet<i32>,
    /// One ended before it could be looked at.
    vanished: bool,
}

/// Kills each as it is found, the latest first: one that goes on in another process every few milliseconds would be gone before its turn.
fn kill_tagged(node_uid: &str, keep: &impl Fn(&str) -> bool) -> io::Result<Round> {
    let prefix = format!("{ATTEMPT_TAG}={node_uid}/");
    let names = fs::read_dir("/proc")?.map(|entry| entry.map(|entry| entry.file_name()));
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let pids = names.iter().filter_map(|name| name.to_str()?.parse().ok());
    let mut pids: Vec<i32> = pids.collect();
    pids.sort_unstable_by(|a, b| b.cmp(a));
    let mut round = Round {
        killed: BTreeSet::new(),
        vanished: false,
    };
    for pid in pids {
        let environ = match fs::read(format!("/proc/{pid}/environ")) {
            Ok(environ) => environ,
            // Those of other users have nothing to read.
            Err(error) => {
                round.vanished |= error.kind() != io::ErrorKind::PermissionDenied;
                continue;
            }
        };
        let mut variables = environ.split(|byte| *byte == 0);
        let attempt = variables
            .find_map(|variable| std::str::from_utf8(variable).ok()?.strip_prefix(&prefix));
        if attempt.is_some_and(|attempt| !keep(attempt)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            round.killed.insert(pid);
        }
    }
    Ok(round)
}
