//! Finds and ends everything that an attempt started: descendants of the shim, and strays by their group and their tag.

use std::collections::BTreeSet;
use std::fs;
use std::io;

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
    const ROUNDS_MAX: usize = 100;
    let grouped = group::sweep(journal, node_uid, &keep);
    let mut left = BTreeSet::new();
    for _ in 0..ROUNDS_MAX {
        left = tagged(node_uid, &keep)?;
        if left.is_empty() {
            return grouped;
        }
        let pids: Vec<_> = left.iter().copied().collect();
        signal_all(&pids, Signal::SIGKILL);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(SweepError::Left(left.into_iter().collect()))
}

fn tagged(node_uid: &str, keep: &impl Fn(&str) -> bool) -> io::Result<BTreeSet<i32>> {
    let prefix = format!("{ATTEMPT_TAG}={node_uid}/");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // Processes that ended meanwhile, and those of other users, have nothing to read.
        let Ok(environ) = fs::read(entry.path().join("environ")) else {
            continue;
        };
        let mut variables = environ.split(|byte| *byte == 0);
        let attempt = variables
            .find_map(|variable| std::str::from_utf8(variable).ok()?.strip_prefix(&prefix));
        if attempt.is_some_and(|attempt| !keep(attempt)) {
            found.insert(pid);
        }
    }
    Ok(found)
}
