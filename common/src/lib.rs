//! What coordinator, node agent and command share: names, times, errors on the wire, tracing and shutdown.
//!
//! Nothing here knows about jobs or nodes beyond their names, and nothing here opens a connection or a file.

pub mod attempt;
pub mod error;
pub mod executable;
pub mod faults;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod holes;
pub mod images;
pub mod limits;
pub mod mount_options;
pub mod names;
pub mod parts;
pub mod paths;
pub mod ranks;
pub mod shutdown;
pub mod signals;
pub mod storage;
pub mod telemetry;
pub mod time;
pub mod tls;

/// The version that agents and coordinators tell each other.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
