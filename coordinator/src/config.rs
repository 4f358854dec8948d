//! What a coordinator is told on its command line.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Runs a coordinator: it keeps the resource model, schedules jobs and tells node agents what to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Where to listen for clients and agents. Port 0 takes a free one; the line `ready ADDRESS` on standard output
    /// says which.
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// The directory for the replicated log and for job logs. It is made where it does not exist.
    #[arg(
        long,
        default_value = "/var/lib/batchai/coordinator",
        value_name = "DIR"
    )]
    pub data: PathBuf,
    /// Certificates from elsewhere: a PEM file with the coordinator's certificate, its key and the authority's certificate.
    /// Those that `init` made where it is left out.
    #[arg(long, value_name = "FILE", conflicts_with = "insecure_lab")]
    pub credentials: Option<PathBuf>,
    /// The user that may do everything, whatever roles are bound: the one that `init` named where it is left out; nobody where
    /// certificates come from elsewhere.
    #[arg(long, value_name = "NAME")]
    pub admin: Option<String>,
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
