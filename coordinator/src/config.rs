//! What a coordinator is told on its command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use batchai_common::limits::{LEASE, LOG_FILE_MIB};

use crate::secrets::Source;

/// The file of keys that protect secrets, in the data directory.
pub const SECRETS_KEY_FILE: &str = "secrets.key";

/// Runs a coordinator: it keeps the resource model, schedules jobs and tells node agents what to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Where to listen for clients and agents. Port 0 takes a free one; the line `ready ADDRESS` on standard output
    /// says which.
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Where the other replicas reach this one, where that is another address than its ensemble began with.
    #[arg(long, value_name = "URL", value_parser = endpoint)]
    pub advertise: Option<String>,
    /// How many milliseconds without a leader an election waits for, at least; up to twice as many. At least ten times what the
    /// disk takes to sync: more on slow disks.
    #[arg(long, default_value_t = 500, value_name = "MS", value_parser = clap::value_parser!(u64).range(100..=60_000))]
    pub election_timeout: u64,
    /// How many seconds a node that falls silent keeps its work; then jobs run again on other nodes, and their nodes have killed them
    /// by themselves. No job survives an outage of all coordinators that is longer, unless its `on_node_loss` is `WAIT`. All replicas wait
    /// for the longest that any of them was ever told: it can be made longer at any time, and for nodes only shorter.
    #[arg(long, default_value_t = LEASE.as_secs(), value_name = "S", value_parser = clap::value_parser!(u64).range(20..=86_400))]
    pub lease: u64,
    /// The directory for the replicated log and for job logs. It is made where it does not exist.
    #[arg(
        long,
        default_value = "/var/lib/batchai/coordinator",
        value_name = "DIR"
    )]
    pub data: PathBuf,
    /// How many MiB of each log file are kept while its job runs: beyond that what was printed first is given up.
    #[arg(long, env = "BATCHAI_LOG_MIB", hide_env = true, default_value_t = LOG_FILE_MIB, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub log_mib: u64,
    /// How many seconds ago what is kept of a log file came at most, while its job runs.
    #[arg(long, env = "BATCHAI_LOG_AGE", hide_env = true, value_name = "S", value_parser = clap::value_parser!(i64).range(1..))]
    pub log_age: Option<i64>,
    /// Certificates from elsewhere: a PEM file with the coordinator's certificate, its key and the authority's certificate.
    /// Those that `init` made where it is left out.
    #[arg(long, value_name = "FILE", conflicts_with = "insecure_lab")]
    pub credentials: Option<PathBuf>,
    /// The user that may do everything, whatever roles are bound: the one that `init` named where it is left out; nobody where
    /// certificates come from elsewhere.
    #[arg(long, value_name = "NAME")]
    pub admin: Option<String>,
    /// Where the keys come from that protect the secrets of jobs: file:PATH, env:NAME or command:COMMAND (run by sh, what it
    /// prints; both are read when it starts). One key a line, 32 bytes in base64, the first protects and the others are known still. `secrets.key` in the
    /// data directory where it is left out, made with that: keep a copy of it elsewhere, and no copy of it beside
    /// one of the data.
    #[arg(long, value_name = "SOURCE")]
    pub secrets_key: Option<Source>,
    /// How many calls a second each user, node or stranger's address may make; twice as many at once.
    #[arg(long, default_value_t = 2000, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub calls_per_second: u32,
    /// How many calls and streams each of them may have open.
    #[arg(long, default_value_t = 1024, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub calls_open: u32,
    /// Take a snapshot, and forget the log before it, after so many entries; or 32 MiB of them.
    #[arg(long, default_value_t = 20_000, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub snapshot_entries: u64,
    /// For tests only: listen in plain text and ask nobody who he is. Whoever reaches the address can run commands on every
    /// node, as root where agents are root.
    #[arg(long)]
    pub insecure_lab: bool,
    /// End when the process with this pid, which started this one, ends.
    #[arg(long, hide = true, value_name = "PID")]
    pub die_with_parent: Option<i32>,
}

/// The command line of a coordinator.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub part: Option<Part>,
    #[command(flatten)]
    pub config: Config,
}

/// What is to be done once, before a coordinator runs.
#[derive(Debug, clap::Subcommand)]
pub enum Part {
    /// Make certificates: an authority, the coordinator's own and the administrator's. Done once for an ensemble.
    Init {
        /// The data directory of the coordinator.
        #[arg(
            long,
            default_value = "/var/lib/batchai/coordinator",
            value_name = "DIR"
        )]
        data: PathBuf,
        /// A name or address by which the coordinator is reached, for clients that are not batchai's own. May be given
        /// several times.
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
        /// The name of the administrator.
        #[arg(long, default_value = "admin", value_name = "NAME")]
        admin: String,
        /// A replica of the ensemble: its number, and where the others reach it. Given once for each, three or five, this machine's
        /// first. For each other one a data directory is made below `replicas`: take it to that machine, and remove it here.
        #[arg(long = "replica", value_name = "ID=URL", value_parser = crate::ensemble::replica)]
        replicas: Vec<(u64, String)>,
    },
    /// Make the data directory of a replica that joins later, below `replicas`: take it to its machine, start it there, and let it
    /// in by `batchai admin replica add`.
    AddReplica {
        /// The data directory of the coordinator.
        #[arg(
            long,
            default_value = "/var/lib/batchai/coordinator",
            value_name = "DIR"
        )]
        data: PathBuf,
        /// Its number: one that no replica of the ensemble ever had.
        #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,
    },
    /// Put a new key before the others in the file of keys that protect secrets. The coordinator reads it within ten seconds and
    /// wraps all data keys by it; when its log says so, the older keys can be taken out of the file. Where there is no file, one
    /// is made: what the keys that were in it protect stays closed.
    RotateKey {
        /// The data directory of the coordinator.
        #[arg(
            long,
            default_value = "/var/lib/batchai/coordinator",
            value_name = "DIR"
        )]
        data: PathBuf,
        /// The file, as file:PATH; `secrets.key` in the data directory where it is left out.
        #[arg(long, value_name = "SOURCE")]
        secrets_key: Option<Source>,
    },
    /// Make credentials for a user with the authority's key, here and without a coordinator: for an administrator who has lost
    /// his.
    Certify {
        /// The data directory of the coordinator.
        #[arg(
            long,
            default_value = "/var/lib/batchai/coordinator",
            value_name = "DIR"
        )]
        data: PathBuf,
        /// For whom.
        #[arg(long, default_value = "admin", value_name = "NAME")]
        user: String,
        /// The file to write.
        #[arg(long = "to", value_name = "FILE")]
        to: PathBuf,
    },
}

/// Where keys come from: where one was told, or from the data directory.
pub fn keys(given: Option<&Source>, data: &Path) -> Source {
    let own = || Source::File(data.join(SECRETS_KEY_FILE));
    given.cloned().unwrap_or_else(own)
}

fn endpoint(text: &str) -> Result<String, String> {
    crate::ensemble::check_endpoint(text).map(|()| text.to_owned())
}
