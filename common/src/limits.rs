//! Bounds that both ends of a connection must agree on, each with its reason.

use std::time::Duration;

/// Processes that do not die, as far as a node names them.
pub const STUCK_MAX: usize = 100;
/// The largest message either end takes. A job with every list full stays far below it; raft entries do too.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The largest piece of a log file in one message: large enough that what each message costs beside its bytes does not count, small
/// enough that a reader who follows sees it soon.
pub const LOG_CHUNK_BYTES_MAX: usize = 256 << 10;

/// How much of a log file is kept, where nobody says otherwise: enough for what people read, and no disk is full of one rank's.
pub const LOG_FILE_MIB: u64 = 1024;

/// The largest piece of any other file in one message.
pub const FILE_CHUNK_BYTES_MAX: usize = 64 << 10;

/// The largest piece of what a command reads or prints, and how many pieces may be on their way in each direction: what it needs
/// of memory anywhere, and of the small frames that a connection takes unread.
pub const EXEC_CHUNK_BYTES_MAX: usize = 32 << 10;
pub const EXEC_CHUNKS_MAX: usize = 32;

/// The largest bundle, packed: source code, not data.
pub const BUNDLE_BYTES_MAX: u64 = 256 << 20;

/// What a bundle may unpack to, and how many files: one that was made to fill disks does not.
pub const BUNDLE_UNPACKED_BYTES_MAX: u64 = 4 << 30;
pub const BUNDLE_ENTRIES_MAX: usize = 100_000;

/// What the service itself puts into the directory where a bundle is unpacked: none has such a name at its top.
pub const BUNDLE_RESERVED: [&str; 3] = ["mounts", "shared", "hostfile"];

/// To how many other machines the directory that the nodes of a job share is served: each has a connection.
pub const SHARED_TEMP_CLIENTS_MAX: usize = 256;

/// How much of what a process that failed said last goes into an error.
pub const LAST_WORDS_BYTES_MAX: usize = 2 << 10;

/// How long a unary call may take before the server gives up on it.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Idle connections are asked for a sign of life this often, so that a peer that vanished is noticed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// How long a peer may take to give that sign.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often an agent sends a heartbeat.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);

/// A node that has not been heard of for so long gets no new work.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(15);

/// How long a node that is not heard of keeps work that may begin anew elsewhere, where nobody says otherwise.
pub const LEASE: Duration = Duration::from_secs(600);

/// Clocks of machines run differently fast by one part in so many at most: a hundred times what crystals do.
pub const LEASE_DRIFT: i64 = 100;

/// How much longer than a lease the leader waits: for killing to take effect.
pub const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// What a process gets between SIGTERM and SIGKILL.
pub const TERMINATION_GRACE: Duration = Duration::from_secs(10);

/// Raises the number of files this process may have open to what the system allows it, and returns what it was: every
/// session, reader and live log file takes one.
pub fn raise_open_files() -> nix::Result<(u64, u64)> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok((soft, hard))
}
