//! Mounts that cannot hang a node.
//!
//! A process of its own (`holder`) has the mounts of a job, or of the cluster of the node: it mounts them, looks after them, and
//! unmounts them when it is told to. It touches none of them itself: every mount, unmount and look is done by another process (`step`)
//! that has a deadline. The holder of a job is a child of its shim; that of a cluster outlives the agent, as shims do. What either left
//! that was cut down is found by what was written down before it was mounted, and by what the kernel says is mounted: nothing
//! else is ever unmounted.
//!
//! ```text
//! DIR/mounts.json       what to mount; written by the agent, before anything is mounted
//! DIR/mounted.json      how that stands; written by the holder; that all was ready once, where it is mounted again
//! DIR/marks.json        how the kernel knows what was mounted; written by the holder
//! DIR/unmount           it shall be unmounted; written by the shim or the agent; `false` where nothing is written back any more
//! DIR/cache/             what programs that serve mounts keep of files
//! ```
//! Keys are in none of them: a holder gets them from who starts it, and hands each to the one process that needs it.
//!
//! For a job DIR is the directory of its attempt, for a cluster one of its own (see `journal`).

mod ending;
mod file_server;
mod holder;
mod kernel;
mod rclone;
mod room;
mod servers;
mod standing;
mod step;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::journal::{AttemptDir, JournalError};
use crate::launch::{How, Keys, Mount};
use crate::memory;
use crate::status::FailureRecord;

pub use holder::main;
pub use step::main as step;

/// What to mount.
pub const PLAN: &str = "mounts.json";
/// How that stands.
const STATUS: &str = "mounted.json";
/// How the kernel knows what was mounted.
const MARKS: &str = "marks.json";
/// It shall be unmounted.
pub const UNMOUNT: &str = "unmount";
/// It cannot be mounted.
pub const FAILED: &str = "MountFailed";
/// It does not answer any more.
pub const UNAVAILABLE: &str = "MountUnavailable";

/// Unmounting in order, by force, and ending what served the mounts take less, all together.
const UNMOUNT_ALL_MAX: Duration = Duration::from_secs(60);
/// Writing back takes time, and is worth more of it than mounting: so many times as much.
const WRITE_BACK_PATIENCE: u32 = 10;
const CACHE: &str = "cache";

/// What a holder holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub mounts: Vec<Mount>,
    /// Where they lie. What is missing below it is made; for jobs all of it is there.
    pub root: String,
    /// How long each may take to be mounted, and may not answer.
    pub patience_s: u64,
    /// Mounted again when one has answered no more for so long.
    pub again: bool,
    /// The environment of what mounts, and so of what serves a mount from this host.
    pub env: BTreeMap<String, String>,
}

impl Plan {
    /// Whether what is written may still be on this host when who wrote it has ended.
    fn holds_back(&self) -> bool {
        self.mounts.iter().any(is_sent_elsewhere)
    }

    /// How long what was written may take to be written back.
    fn write_back_max(&self) -> Duration {
        match self.holds_back() {
            true => Duration::from_secs(self.patience_s.max(1)) * WRITE_BACK_PATIENCE,
            false => Duration::ZERO,
        }
    }
}

/// Whether what is written to it goes elsewhere, to stay there. What a job's nodes share for its time (`fresh`) is gone with the job.
fn is_sent_elsewhere(mount: &Mount) -> bool {
    !matches!(mount.how, How::Local { .. } | How::Nfs { fresh: true, .. })
}

/// How far a holder is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    #[default]
    Mounting,
    /// All are mounted, or were.
    Ready,
    /// One could not be mounted; none is.
    Failed,
}

/// How mounts stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub phase: Phase,
    /// What is the matter with one of them.
    pub failure: Option<FailureRecord>,
    /// They are gone, and what was written to them has arrived.
    pub arrived: bool,
}

/// How what a directory names stands; as if nothing was begun where a power cut has left nothing of that.
pub fn status(dir: &AttemptDir) -> Result<Status, JournalError> {
    match dir.read(STATUS) {
        Err(JournalError::Unreadable { path, .. }) => {
            tracing::warn!(path = %path.display(), "unreadable");
            Ok(Status::default())
        }
        status => Ok(status?.unwrap_or_default()),
    }
}

/// What is lost of what was written to mounts that are gone, or may be: whoever held them may not have come to say it.
pub fn lost(dir: &AttemptDir) -> Option<FailureRecord> {
    let said = status(dir).unwrap_or_default();
    if said.phase == Phase::Failed {
        return None;
    }
    let unsaid = || {
        FailureRecord {
        code: UNAVAILABLE.to_owned(),
        message: "what was written to what is mounted may be lost in part: the process that writes it back has ended before it said \
                  that it had"
            .to_owned(),
        ..FailureRecord::default()
    }
    };
    let plan = dir.read::<Plan>(PLAN).ok().flatten();
    let may_be = || !said.arrived && plan.is_none_or(|plan| plan.holds_back());
    let failure = said.failure.clone();
    failure.or_else(|| may_be().then(unsaid))
}

/// How long what a directory names may take to be unmounted: in order, by force, with all that serves it.
pub fn end_max(dir: &AttemptDir) -> Duration {
    let plan = dir.read::<Plan>(PLAN).ok().flatten();
    UNMOUNT_ALL_MAX + plan.map_or(Duration::ZERO, |plan| plan.write_back_max())
}

/// What was ready once, and whose holder is gone, is to be mounted again.
///
/// # Errors
/// Where that cannot be written down.
pub fn renew(dir: &AttemptDir) -> Result<(), JournalError> {
    forget(dir);
    let status = Status {
        phase: Phase::Ready,
        failure: Some(standing::being_mounted()),
        ..Status::default()
    };
    dir.write(STATUS, &status, false)
}

/// Forgets how an earlier holder of what a directory names ended.
pub fn forget(dir: &AttemptDir) {
    for file in [STATUS, UNMOUNT, MARKS] {
        // It need not be there.
        let _ = std::fs::remove_file(dir.path.join(file));
    }
}

/// Starts a holder. `own` are the arguments that lead to this program's own subcommands. One that is `held` goes with this process.
pub fn hold(own: &[&str], dir: &AttemptDir, held: bool, keys: &Keys) -> io::Result<Child> {
    let mut command = program(own, "mounts");
    command.arg(&dir.path);
    if held {
        command.arg("--held").arg(std::process::id().to_string());
    }
    command
        .env_clear()
        .stdin(memory::hand_over(keys)?)
        .stdout(Stdio::null())
        .stderr(log(&dir.path)?)
        .spawn()
}

/// Starts a process that unmounts what a holder left that is gone.
pub fn clean(own: &[&str], dir: &AttemptDir) -> io::Result<Child> {
    program(own, "mounts")
        .arg(&dir.path)
        .arg("--clean")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log(&dir.path)?)
        .spawn()
}

/// Whether anything is left of what a holder was to mount: that it is mounted, or what was kept of a job's files.
pub fn any_left(dir: &AttemptDir) -> Result<bool, JournalError> {
    let Some(plan) = dir.read::<Plan>(PLAN)? else {
        return Ok(false);
    };
    if !plan.again && dir.path.join(CACHE).exists() {
        return Ok(true);
    }
    // Where that cannot be known it is looked at again by who unmounts.
    let Some(known) = kernel::mounted() else {
        return Ok(true);
    };
    Ok(!left(dir, &plan, &known)?.is_empty())
}

/// What is mounted of a plan: what was noted, wherever it is by now, and what could not be noted any more.
fn left(
    dir: &AttemptDir,
    plan: &Plan,
    known: &kernel::Mounted,
) -> Result<Vec<kernel::Mark>, JournalError> {
    let marks: Vec<Vec<kernel::Mark>> = dir.read(MARKS)?.unwrap_or_default();
    let noted = marks.into_iter().flatten();
    let mut left: Vec<_> = noted.filter(|mark| known.place(mark).is_some()).collect();
    for mount in &plan.mounts {
        for mark in known.at(&kernel::real(&plan.root, &mount.path)) {
            if !left.contains(&mark) {
                left.push(mark);
            }
        }
    }
    Ok(left)
}

fn log(dir: &Path) -> io::Result<std::fs::File> {
    std::fs::File::create(dir.join("mounts.log"))
}

/// This program, even if it was replaced meanwhile.
fn program(own: &[&str], part: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(format!("batchai-{part}")).args(own).arg(part);
    command
}

/// Whether something is mounted beneath a directory; `None` where the kernel does not say.
pub fn is_mounted_below(directory: &Path) -> Option<bool> {
    let real = directory.canonicalize();
    let real = real.unwrap_or_else(|_| directory.to_owned());
    Some(kernel::mounted()?.below(&real).is_some())
}
