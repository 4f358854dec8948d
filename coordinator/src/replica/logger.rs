//! Lets the raft crate's log lines arrive in ours.

use slog::{Drain, Level, OwnedKVList, Record};

struct Bridge;

impl Drain for Bridge {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), slog::Never> {
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", "{}", record.msg()),
            Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
            // What raft calls info happens at every election: of interest only to who looks for it.
            Level::Info | Level::Debug => tracing::debug!(target: "raft", "{}", record.msg()),
            Level::Trace => tracing::trace!(target: "raft", "{}", record.msg()),
        }
        Ok(())
    }
}

/// A logger for the raft crate.
pub fn logger() -> slog::Logger {
    slog::Logger::root(Bridge.fuse(), slog::o!())
}
