//! The coordinator: keeps the resource model, schedules, and tells agents what to do.
//!
//! Arrows only point down:
//! `state <- {access, scheduler, secrets} <- ensemble <- {call, config, duties} <- replica <- logs <- {audit, bundles} <- copies <- agents <- api <- {custody, gate, leader, pki} <- boot <- {backup, server}`.
//!
//! `state`, `access`, `scheduler` and `duties` are pure. `replica` makes the State survive and agree. `api` serves users,
//! `agents` serves node agents, `logs` keeps job output, `bundles` what is sent along with
//! jobs, and `copies` sees to it that every replica has both. `secrets` seals and opens. `leader` performs the duties while this replica leads; `custody` looks after the keys of secrets.
//! `ensemble` is what a replica is told of its ensemble before it starts, `boot` how it starts, `backup` how it begins anew from
//! a backup.

pub mod access;
pub mod agents;
pub mod api;
mod audit;
pub mod backup;
mod boot;
mod bundles;
mod call;
mod config;
mod copies;
mod custody;
pub mod duties;
mod ensemble;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gate;
pub mod leader;
pub mod logs;
mod pki;
pub mod replica;
pub mod scheduler;
mod secrets;
pub mod server;
pub mod state;

use std::process::ExitCode;

use batchai_common::{shutdown, telemetry};

pub use config::{Cli, Config};
pub use pki::{ADMIN_FILE, Begin, PkiError, init};

/// A coordinator as a process: runs until a signal, says on standard error why it could not.
pub fn main(cli: Cli) -> ExitCode {
    let config = match cli.part {
        None => cli.config,
        Some(config::Part::Init {
            data,
            names,
            admin,
            replicas,
        }) => return init_main(&data, names, admin, replicas),
        Some(config::Part::AddReplica { data, id }) => {
            return done(pki::add_replica(&data, id).map(|path| take_there(&path)));
        }
        Some(config::Part::Certify { data, user, to }) => {
            return done(pki::certify(&data, &user, &to));
        }
        Some(config::Part::RotateKey { data, secrets_key }) => {
            return done(config::keys(secrets_key.as_ref(), &data).rotate());
        }
    };
    telemetry::init();
    shutdown::keep_memory_private();
    if let Some(parent) = config.die_with_parent {
        shutdown::die_with_parent(parent);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let ended = runtime
        .map_err(boot::ServerError::System)
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

fn init_main(
    data: &std::path::Path,
    names: Vec<String>,
    admin: String,
    replicas: Vec<(u64, String)>,
) -> ExitCode {
    let count = replicas.len();
    let replicas: std::collections::BTreeMap<_, _> = replicas.into_iter().collect();
    if replicas.len() != count {
        return done(Err("--replica: each has a number of its own"));
    }
    let others: Vec<_> = replicas.keys().skip(1).copied().collect();
    let begin = Begin {
        names,
        admin,
        replicas,
    };
    done(init(data, begin).map(|file| {
        let file = file.display();
        println!("the administrator's credentials: {file}\nkeep them: batchai config set credentials {file}");
        for id in others {
            take_there(&data.join("replicas").join(id.to_string()));
        }
    }))
}

fn take_there(path: &std::path::Path) {
    println!(
        "take {} to the machine of that replica as its data directory, and remove it here: there are keys in it",
        path.display()
    );
}

fn done<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("batchai-coordinator: {error}");
            ExitCode::FAILURE
        }
    }
}
