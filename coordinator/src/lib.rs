//! The coordinator: keeps the resource model, schedules, and tells agents what to do.
//!
//! Arrows only point down:
//! `state <- scheduler <- duties <- replica <- logs <- bundles <- agents <- api <- leader <- server`.
//!
//! `state`, `scheduler` and `duties` are pure. `replica` makes the State survive and agree. `api` serves users,
//! `agents` serves node agents, `logs` keeps job output, `bundles` what is sent along with jobs. `leader` performs the duties while this replica leads.

pub mod agents;
pub mod api;
mod bundles;
mod config;
pub mod duties;
pub mod leader;
pub mod logs;
pub mod replica;
pub mod scheduler;
pub mod server;
pub mod state;

use std::process::ExitCode;

use batchai_common::{shutdown, telemetry};

pub use config::Config;

/// A coordinator as a process: runs until a signal, says on standard error why it could not.
pub fn main(config: Config) -> ExitCode {
    telemetry::init();
    if let Some(parent) = config.die_with_parent {
        shutdown::die_with_parent(parent);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let ended = runtime
        .map_err(server::ServerError::System)
        .and_then(|runtime| {
            runtime.block_on(async { server::run(config, shutdown::on_signal()?).await })
        });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("batchai-coordinator: {error}");
            ExitCode::FAILURE
        }
    }
}
