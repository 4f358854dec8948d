//! The node agent: registers a machine with the coordinator and runs its part of jobs.
//!
//! Arrows only point down:
//! `{status, cgroups, memory, words} <- {launch, lease, reconcile, serving} <- config <- {hardware, journal, share, user} <- {mounts, nfs, storage} <- {shim, watch} <- session <- {join, logs, bundles, execs, files, file_servers} <- peers <- supervisor <- agent`.
//!
//! `cgroups`, `launch`, `lease`, `reconcile`, `serving` and `status` are pure. The `shim` is a process of its own, one per attempt, that holds the
//! attempt's processes and outlives the agent.

mod agent;
mod bundles;
pub mod cgroups;
mod config;
mod execs;
mod file_servers;
mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod hardware;
mod join;
pub mod journal;
pub mod launch;
pub mod lease;
mod logs;
mod memory;
mod mounts;
pub mod nfs;
mod peers;
pub mod reconcile;
pub mod serving;
mod session;
mod share;
mod shim;
pub mod status;
mod storage;
mod supervisor;
mod user;
mod watch;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use batchai_common::{shutdown, telemetry};

pub use agent::end_jobs;
pub use config::Config;
pub use shim::homes;

/// The command line of an agent.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    config: Config,
}

/// What the agent starts itself for.
#[derive(Debug, clap::Subcommand)]
enum Part {
    /// Holds the processes of one attempt.
    #[command(hide = true)]
    Shim { dir: PathBuf },
    /// Holds a command that somebody runs beside an attempt, or on this node.
    #[command(hide = true)]
    Exec { dir: PathBuf },
    /// Holds what is mounted for a job or a cluster.
    #[command(hide = true)]
    Mounts {
        dir: PathBuf,
        #[arg(long)]
        held: Option<i32>,
        #[arg(long)]
        clean: bool,
    },
    /// Tells of NVIDIA's GPUs.
    #[command(hide = true)]
    Gpus,
    /// Mounts, unmounts, or looks at what is mounted.
    #[command(hide = true)]
    MountStep,
    /// Starts a command on another node of the job whose process this is: what jobs find as `ssh`.
    #[command(hide = true)]
    RemoteShell {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Shows what lies in a directory.
    #[command(hide = true)]
    Look,
    /// Writes a file of a file server.
    #[command(hide = true)]
    Put,
    /// Serves a directory to other nodes by NFS.
    #[command(hide = true)]
    NfsServer {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        held: Option<i32>,
    },
}

/// An agent, or a part of one, as a process. `own` are the arguments that come before those of this command line.
pub fn main(cli: Cli, own: &'static [&'static str]) -> ExitCode {
    match cli.part {
        Some(Part::Shim { dir }) => shim::main(&dir, own),
        Some(Part::Mounts { dir, held, clean }) => mounts::main(&dir, held, clean, own),
        Some(Part::MountStep) => mounts::step(),
        Some(Part::Gpus) => hardware::gpus(),
        Some(Part::Exec { dir }) => shim::exec(&dir),
        Some(Part::RemoteShell { arguments }) => peers::shell::main(&arguments),
        Some(Part::Look) => files::look(),
        Some(Part::Put) => files::put(),
        Some(Part::NfsServer { dir, held }) => nfs::main(&dir, held),
        None => agent_main(cli.config, own),
    }
}

fn agent_main(config: Config, own: &'static [&'static str]) -> ExitCode {
    telemetry::init();
    shutdown::keep_memory_private();
    if let Some(parent) = config.die_with_parent {
        shutdown::die_with_parent(parent);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let ended = runtime
        .map_err(agent::AgentError::System)
        .and_then(|runtime| {
            runtime.block_on(async { agent::run(config, own, shutdown::on_signal()?).await })
        });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("batchai-node-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
