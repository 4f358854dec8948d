//! The coordinator's own binary: the same library that `batchai` carries.

use clap::Parser;

/// The batchai coordinator.
#[derive(Parser)]
#[command(name = "batchai-coordinator", version)]
struct Cli {
    #[command(flatten)]
    coordinator: batchai_coordinator::Cli,
}

fn main() -> std::process::ExitCode {
    batchai_coordinator::main(Cli::parse().coordinator)
}
