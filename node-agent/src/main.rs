//! The node agent's own binary: the same library that `batchai` carries.

use clap::Parser;

/// The batchai node agent.
#[derive(Parser)]
#[command(name = "batchai-node-agent", version)]
struct Program {
    #[command(flatten)]
    agent: batchai_node_agent::Cli,
}

fn main() -> std::process::ExitCode {
    batchai_node_agent::main(Program::parse().agent, &[])
}
