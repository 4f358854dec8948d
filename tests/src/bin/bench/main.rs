//! Benchmarks: `cargo run --release -p batchai-tests --bin bench -- smoke`, or `tls`.
//!
//! Each measure is a JSON line on standard output; what is for people goes to standard error. This program is the
//! `batchai` command too, for every other first argument: what is measured is what was built.

mod measure;
mod smoke;
mod tls;

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("smoke") => smoke::run(),
        Some("tls") => tls::run(),
        None => {
            eprintln!("usage: bench smoke|tls");
            return ExitCode::from(2);
        }
        Some(_) => return batchai::main(),
    }
    ExitCode::SUCCESS
}
