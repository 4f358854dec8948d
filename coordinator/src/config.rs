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
    /// Listen without TLS beyond loopback. Whoever reaches the address can run commands on every node.
    #[arg(long)]
    pub insecure_lab: bool,
    /// End when the process with this pid, which started this one, ends.
    #[arg(long, hide = true, value_name = "PID")]
    pub die_with_parent: Option<i32>,
}
