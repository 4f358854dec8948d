//! Makes the State survive and agree: the replicated log, on the `raft` crate.
//!
//! `core` is synchronous and does no I/O but through the store it is given; `thread` runs it on an OS thread of its
//! own, and `handle` is what others hold of it; `store` keeps the log and snapshots on disk, `log` shows them to raft. `peers`
//! carries messages to other replicas and takes theirs.

pub mod core;
pub mod handle;
pub mod hub;
mod log;
mod logger;
pub mod peers;
pub mod store;
pub mod thread;

pub use handle::{Handle, Published, ReplicaError, Role};
pub use thread::{Running, start};
