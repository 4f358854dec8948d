//! The shim: a small process that holds one attempt's processes on this host.
//!
//! It outlives the agent: it owns pipes, log files, the wall clock and the exit record, and every process that the
//! attempt starts is its descendant and dies with it or before it. It knows nothing of coordinators; it talks to the
//! agent through the attempt's directory only (see `journal`). One thread, one loop (`run`), no tokio: small, and free
//! to fork.

mod children;
mod container;
mod copier;
mod ending;
mod exec;
mod gpus;
mod group;
mod logs;
mod ports;
mod prepare;
mod process;
mod root;
mod rotation;
mod run;
mod seats;
mod secrets;
mod sharing;
mod tree;
mod unpack;
mod volumes;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use batchai_common::{crash_point, shutdown};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::setsid;

use crate::journal::{AttemptDir, JournalError};
use crate::memory;

pub use container::able as can_contain;
pub use exec::{Beside, ExecPlan, Words, main as exec};
pub use group::{detect, homes};
pub use process::resize as resize_terminal;
pub use root::{Root, RootError};
pub use secrets::{Handed, of as secrets_of};
pub use tree::{SweepError, sweep};
#[cfg(any(test, fuzzing))]
pub use unpack::unpack as unpack_bundle;

/// Why a shim ends without an exit record: the attempt is lost.
#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("there is no plan")]
    NoPlan,
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        source: std::io::Error,
    },
}

fn system<E: Into<std::io::Error>>(what: &'static str) -> impl Fn(E) -> ShimError {
    move |source| ShimError::System {
        what,
        source: source.into(),
    }
}

/// From here on what ends a process, and what tells of an ended child, is read and not obeyed.
fn take_signals() -> Result<SignalFd, ShimError> {
    let mut mask = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
    ] {
        mask.add(signal);
    }
    mask.thread_block().map_err(system("block signals"))?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    SignalFd::with_flags(&mask, flags).map_err(system("signalfd"))
}

/// The shim as a process. What goes wrong is said on standard error, which is a file of the attempt.
/// `own` are the arguments that lead to this program's own subcommands.
pub fn main(path: &Path, own: &[&str]) -> ExitCode {
    let dir = AttemptDir {
        path: path.to_owned(),
    };
    match begin(&dir, own) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&format!("shim: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Says something on standard error, where that is possible: its disk may be full, and that must end nothing.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn begin(dir: &AttemptDir, own: &[&str]) -> Result<(), ShimError> {
    shutdown::keep_memory_private();
    let handed = memory::take().map_err(system("read what the agent hands over"))?;
    // Whoever comes second, at any time, does nothing.
    let Some(_lock) = dir.take_lock()? else {
        return Ok(());
    };
    crash_point!("shim_has_its_lock");
    // A session of its own: no terminal and no process group of the agent's reaches it.
    setsid().map_err(system("setsid"))?;
    // Orphans of the job become its children, so that none can leave its tree.
    prctl::set_child_subreaper(true).map_err(system("subreaper"))?;
    let own = own.iter().map(|argument| (*argument).to_owned());
    let shim = run::Shim::new(dir.clone(), handed, own.collect())?;
    if let Some(group) = &shim.plan.group {
        group.create().map_err(system("make the group"))?;
    }
    for bound in &shim.plan.bounds {
        bound.create().map_err(system("limit what the job takes"))?;
    }
    // Last of what can fail: from here on the attempt has begun, and it begins once.
    match dir.begin()? {
        true => {
            crash_point!("shim_began");
            shim.run()
        }
        false => Ok(()),
    }
}
