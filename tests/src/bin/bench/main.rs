//! Benchmarks: `cargo run --release -p batchai-tests --bin bench -- smoke`, or `tls`, `failover --kills N`, `writes`,
//! `logs [--ranks N] [--lines N]`, `spawn`, `files`, `copy`.
//!
//! Each measure is a JSON line on standard output; what is for people goes to standard error. This program is the
//! `batchai` command too, for every other first argument: what is measured is what was built.

mod copy;
mod failover;
mod files;
mod logs;
mod measure;
mod smoke;
mod spawn;
mod tls;
mod writes;

use std::process::ExitCode;

use batchai_tests::given::number;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("smoke") => smoke::run(),
        Some("tls") => tls::run(),
        Some("failover") => failover::run(number("--kills", 100)),
        Some("writes") => writes::run(),
        Some("logs") => logs::run(number("--ranks", 100), number("--lines", 100)),
        Some("spawn") => spawn::run(),
        Some("copy") => copy::run(),
        Some("files") => files::run(),
        // The same in namespaces of its own.
        Some("files-within") => files::within(),
        // A rank of `logs`.
        Some("stamps") => {
            let numbers = std::env::args()
                .skip(2)
                .filter_map(|text| text.parse().ok());
            logs::stamps(&numbers.collect::<Vec<_>>());
        }
        None => {
            eprintln!(
                "usage: bench smoke|tls|failover [--kills N]|writes|logs [--ranks N] [--lines N]|spawn|files|copy"
            );
            return ExitCode::from(2);
        }
        Some(_) => return batchai::main(),
    }
    ExitCode::SUCCESS
}
