//! Benchmarks: `cargo run --release -p batchai-tests --bin bench -- smoke`, or `tls`, `failover --kills N`, `writes`.
//!
//! Each measure is a JSON line on standard output; what is for people goes to standard error. This program is the
//! `batchai` command too, for every other first argument: what is measured is what was built.

mod failover;
mod measure;
mod smoke;
mod tls;
mod writes;

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("smoke") => smoke::run(),
        Some("tls") => tls::run(),
        Some("failover") => failover::run(kills()),
        Some("writes") => writes::run(),
        None => {
            eprintln!("usage: bench smoke|tls|failover [--kills N]|writes");
            return ExitCode::from(2);
        }
        Some(_) => return batchai::main(),
    }
    ExitCode::SUCCESS
}

/// How many leaders to cut down.
fn kills() -> usize {
    let mut given = std::env::args().skip(2).skip_while(|arg| arg != "--kills");
    let given = given.nth(1).and_then(|text| text.parse().ok());
    given.unwrap_or(100)
}
