//! Tracing to standard error. `RUST_LOG` chooses what; `info` without it.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts tracing. Called once, first thing in a daemon.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
