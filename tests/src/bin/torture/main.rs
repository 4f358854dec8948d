//! Torture: `cargo run --release -p batchai-tests --bin torture -- agent-kill [--kills N] [--ranks N]`, or `node-loss [--rounds N]`.
//!
//! It ends with a line of what was gone through, or fails at the first thing that is not as it should be. This program is the `batchai`
//! command too, for every other first argument: what is tortured is what was built.

use std::process::ExitCode;

use batchai_tests::given::number;
use batchai_tests::torture;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("agent-kill") => {
            let outcome = torture::agent_kill(number("--kills", 200), number("--ranks", 50));
            println!("{outcome:?}: nothing was lost");
        }
        Some("node-loss") => match torture::node_loss(number("--rounds", 50)) {
            Some(outcome) => println!("{outcome:?}: nothing ran twice at once"),
            None => return ExitCode::FAILURE,
        },
        None => {
            eprintln!("usage: torture agent-kill [--kills N] [--ranks N] | node-loss [--rounds N]");
            return ExitCode::from(2);
        }
        Some(_) => return batchai::main(),
    }
    ExitCode::SUCCESS
}
