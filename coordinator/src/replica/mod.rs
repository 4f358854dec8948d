//! Makes the State survive and agree: the replicated log, on the `raft` crate.
//!
//! `core` is synchronous and does no I/O but through the store it is given; `thread` runs it on an OS thread of its
//! own; `store` keeps the log and snapshots on disk, `log` shows them to raft. With one voter nothing is sent to peers yet, and
//! nothing here assumes that.

pub mod core;
pub mod hub;
mod log;
mod logger;
pub mod store;
pub mod thread;

pub use thread::{Handle, Published, ReplicaError, Running, start};
