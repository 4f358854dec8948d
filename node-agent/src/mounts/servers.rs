//! Ends what serves mounts from this host, once they are gone: children of the holder, or adopted by it.

use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What served mounts from this host ends by itself when they are gone.
const SERVERS_MAX: Duration = Duration::from_secs(3);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// What served the mounts has nothing to serve any more. `hurry`: it has no time to end by itself.
pub fn end(hurry: &dyn Fn() -> bool) {
    let begun = Instant::now();
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) => {}
                Err(_) => return,
            }
        }
        let elapsed = match hurry() {
            true => begun.elapsed().max(SERVERS_MAX * 2 / 3),
            false => begun.elapsed(),
        };
        let signal = match elapsed {
            elapsed if elapsed < SERVERS_MAX / 3 => None,
            elapsed if elapsed < SERVERS_MAX * 2 / 3 => Some(Signal::SIGTERM),
            elapsed if elapsed < SERVERS_MAX => Some(Signal::SIGKILL),
            _ => return,
        };
        if let Some(signal) = signal {
            for pid in children() {
                let _ = signal::kill(Pid::from_raw(pid), signal);
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Ends at once whatever serves mounts: it is to write nothing any more. Returns whether any was left. What one of them leaves behind is
/// adopted by this process as well, for the next time.
pub fn kill() -> bool {
    let all = children();
    for pid in &all {
        let pid = Pid::from_raw(*pid);
        // One that has ended needs none.
        let _ = signal::kill(pid, Signal::SIGKILL);
        // By name: the children of other threads are waited for there.
        let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
    }
    !all.is_empty()
}

/// The same until none is left, unless one of them is stuck in the kernel.
pub fn kill_all() {
    let end = Instant::now() + SERVERS_MAX / 3;
    while kill() && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
}

/// Orphans are children of the first thread, and nothing else is.
fn children() -> Vec<i32> {
    let pid = std::process::id();
    let text = std::fs::read_to_string(format!("/proc/self/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}
