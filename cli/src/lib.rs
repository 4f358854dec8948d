//! The `batchai` command as a library, so that tests can start exactly what they were built with.
//!
//! It carries both daemons and starts itself again for them (`dev`, `demo`): one file is a whole ensemble. Commands
//! talk to a coordinator and print what it says; nothing is decided here.

mod args;
mod client;
mod demo;
pub mod descriptors;
mod dev;
pub mod error;
pub mod file;
mod job;
mod logs;
mod output;
mod resources;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use error::CliError;

/// The arguments that lead to the agent's own subcommands.
const NODE_AGENT: &[&str] = &["node-agent"];

/// Parses the command line of this process and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Command::Coordinator(config) => batchai_coordinator::main(config),
        Command::NodeAgent(agent) => batchai_node_agent::main(agent, NODE_AGENT),
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let done = runtime
                .map_err(CliError::System)
                .and_then(|runtime| runtime.block_on(run(command, &cli.global)));
            done.unwrap_or_else(|error| {
                eprintln!("batchai: {error}");
                ExitCode::from(error.exit_code())
            })
        }
    }
}

async fn run(command: Command, global: &args::Global) -> Result<ExitCode, CliError> {
    match command {
        Command::Dev(dev) => dev::run(dev).await,
        Command::Demo(demo) => demo::run(demo).await,
        Command::Group(command) => resources::group(command, global).await,
        Command::Workspace(command) => resources::workspace(command, global).await,
        Command::Cluster(command) => resources::cluster(command, global).await,
        Command::Experiment(command) => resources::experiment(command, global).await,
        Command::Node(command) => resources::node(command, global).await,
        Command::Job(command) => job::run(command, global).await,
        Command::Coordinator(_) | Command::NodeAgent(_) => unreachable!("daemons run elsewhere"),
    }
}
