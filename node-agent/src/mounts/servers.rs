//! Ends what serves mounts from this host, once they are gone: children of the holder, or adopted by it.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What served mounts from this host ends by itself when they are gone.
const SERVERS_MAX: Duration = Duration::from_secs(3);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// What served the mounts has nothing to serve any more.
pub fn end() {
    let begun = Instant::now();
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) => {}
                Err(_) => return,
            }
        }
        let signal = match begun.elapsed() {
            elapsed if elapsed < SERVERS_MAX / 3 => None,
            elapsed if elapsed < SERVERS_MAX * 2 / 3 => Some(Signal::SIGTERM),
            elapsed if elapsed < SERVERS_MAX => Some(Signal::SIGKILL),
            _ => return,
        };
        if let Some(signal) = signal {
            for pid in children() {
                let _ = kill(Pid::from_raw(pid), signal);
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Orphans are children of the first thread; this is the only one left.
fn children() -> Vec<i32> {
    let pid = std::process::id();
    let text = std::fs::read_to_string(format!("/proc/self/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}
