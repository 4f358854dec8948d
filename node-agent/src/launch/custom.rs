//! PURE. A custom job: a bash command line, once on the master while the other hosts are prepared and wait; or, where the
//! job asks for processes per node, so many times on every host.
//!
//! Once on the master it has the original's file names, `stdout.txt` and `stderr.txt`. On every host each process finds its
//! place in `RANK`, `WORLD_SIZE` and their kin, and writes to `stdout-{rank}.txt`. The job is over when all processes are,
//! or one fails. Each process sees all GPUs of its host.

use batchai_common::names::last_id;
use batchai_proto::v1::CustomToolkitSettings;

use super::{Context, LaunchError, ProcessPlan, bash, environment, own_host, rank_count, ranks};

pub fn processes(
    context: &Context<'_>,
    settings: &CustomToolkitSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let hosts = context.assignment.hosts.len();
    let index = usize::try_from(context.assignment.host_index).unwrap_or_default();
    match rank_count(context.job, hosts) {
        0 if index > 0 => Ok(Vec::new()),
        0 if context.assignment.set_up => {
            let node = last_id(&own_host(context.assignment)?.node);
            once(context, settings, &format!("-{node}"))
        }
        0 => once(context, settings, ""),
        total => {
            let own = ranks(total, hosts, index);
            let process = |rank: usize| -> Result<ProcessPlan, LaunchError> {
                let env = environment::of_rank(context, rank, total, &own)?;
                Ok(ProcessPlan {
                    rank: rank as i32,
                    argv: bash(&settings.command_line),
                    env: environment::with_user(context, env)?,
                    cwd: context.paths.job_temp.clone(),
                    stdout: format!("stdout-{rank}.txt"),
                    stderr: format!("stderr-{rank}.txt"),
                })
            };
            own.clone().map(process).collect()
        }
    }
}

/// One process on the master; `suffix` tells its files from others' in the same directory.
fn once(
    context: &Context<'_>,
    settings: &CustomToolkitSettings,
    suffix: &str,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    Ok(vec![ProcessPlan {
        rank: 0,
        argv: bash(&settings.command_line),
        env: environment::with_user(context, context.env.clone())?,
        cwd: context.paths.job_temp.clone(),
        stdout: format!("stdout{suffix}.txt"),
        stderr: format!("stderr{suffix}.txt"),
    }])
}
