//! One token per process that says: time to end.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that SIGTERM or SIGINT cancels.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
            _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
        }
        cancel.cancel();
    });
    Ok(token)
}

/// SIGTERM and SIGINT, one after the other, for who does not end at the first.
pub struct Interrupts {
    terminate: Signal,
    interrupt: Signal,
}

impl Interrupts {
    /// From now on they do not end this process.
    pub fn new() -> std::io::Result<Interrupts> {
        Ok(Interrupts {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Has the kernel keep this process's memory from debuggers and core files: keys and secrets of jobs are in it.
pub fn keep_memory_private() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "the memory of this process can be read by others of the same user");
    }
}

/// Has the kernel send this process SIGTERM when the one that started it, with the given pid, ends, however it ends.
pub fn die_with_parent(parent: i32) {
    if let Err(error) = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM) {
        tracing::warn!(%error, "cannot follow the parent process");
    }
    // It may have ended before the line above.
    if nix::unistd::getppid().as_raw() != parent {
        std::process::exit(0);
    }
}
