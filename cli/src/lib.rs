//! The `batchai` command as a library, so that tests can start exactly what they were built with.
//!
//! It carries both daemons and starts itself again for them (`dev`, `demo`): one file is a whole ensemble. Commands
//! talk to a coordinator and print what it says; nothing is decided here.

/// Tells a person something, beside what is printed. Where nobody listens there is nobody to tell.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// States share what they have in common, and every change copies some tree nodes full of small texts: the system's allocator took half of
/// a coordinator's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

mod access;
mod admin;
mod args;
mod auto_storage;
mod backup;
mod bundle;
mod client;
mod clusters;
mod context;
mod demo;
pub mod descriptors;
mod dev;
pub mod error;
mod exec;
pub mod file;
mod file_servers;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod job;
mod job_files;
mod login;
mod logs;
mod machines;
mod output;
mod ranks;
mod resources;
mod run;
mod server_files;
mod settings;
mod storage;
mod terminal;
mod variables;

use std::process::ExitCode;

use args::{Cli, Command};
use context::Context;
use error::CliError;

/// The arguments that lead to the agent's own subcommands.
const NODE_AGENT: &[&str] = &["node-agent"];

/// Parses the command line of this process and does what it says.
pub fn main() -> ExitCode {
    if let Some(answered) = login::answer_password() {
        return answered;
    }
    let cli = Cli::read();
    match cli.command {
        Command::Coordinator(config) => batchai_coordinator::main(config),
        Command::NodeAgent(agent) => batchai_node_agent::main(agent, NODE_AGENT),
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let done = runtime.map_err(CliError::System).and_then(|runtime| {
                let done = runtime.block_on(run(command, &cli.global));
                // What is left of a file that nobody needs is not waited for.
                runtime.shutdown_background();
                done
            });
            done.unwrap_or_else(|error| {
                // It may quote what a job called its files.
                say!("batchai: {}", output::shown_lines(&error.to_string()));
                ExitCode::from(error.exit_code())
            })
        }
    }
}

async fn run(command: Command, global: &args::Global) -> Result<ExitCode, CliError> {
    // What works without a configuration works with a broken one.
    let command = match command {
        Command::Dev(dev) => return dev::run(dev).await,
        Command::Demo(demo) => return demo::run(demo).await,
        Command::Completion { shell } => {
            let (mut command, name) = (Cli::with_examples(), "batchai");
            clap_complete::generate(shell, &mut command, name, &mut std::io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        command => command,
    };
    let context = &Context::new(global)?;
    match command {
        Command::Run(command) => run::run(command, context).await,
        Command::Status => machines::status(context).await,
        Command::Group(command) => resources::group(command, context).await,
        Command::Workspace(command) => resources::workspace(command, context).await,
        Command::Cluster(command) => clusters::cluster(command, context).await,
        Command::FileServer(command) => file_servers::file_server(command, context).await,
        Command::Experiment(command) => resources::experiment(command, context).await,
        Command::Node(command) => machines::node(command, context).await,
        Command::Role(command) => access::roles(command, context).await,
        Command::User(command) => access::user(command, context).await,
        Command::Admin(command) => admin::admin(command, context).await,
        Command::Audit(command) => access::audit(command, context).await,
        Command::StorageAlias(command) => storage::alias(command, context).await,
        Command::VmSize(command) => machines::vm_size(command, context).await,
        Command::ListUsages { location } => machines::list_usages(location, context).await,
        Command::Job(command) => job::run(command, context).await,
        Command::Config(command) => {
            context::config(command, context)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Coordinator(_)
        | Command::NodeAgent(_)
        | Command::Dev(_)
        | Command::Demo(_)
        | Command::Completion { .. } => unreachable!("they run elsewhere"),
    }
}
