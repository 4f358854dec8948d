//! PURE. What makes a host ready for an attempt: directories, files, limits, the preparation command.
//!
//! Which processes are started then, the launchers know.

use batchai_common::limits::TERMINATION_GRACE;
use batchai_proto::agent::v1::Assignment;

use super::{
    Context, Device, LaunchError, Paths, Preparation, ProcessPlan, bash, container, environment,
    expand, host_number, layout, mpi, own_host, rank_count, ranks, shared,
};
use crate::cgroups::{Bound, asked};

pub(super) fn preparation(context: &Context<'_>) -> Result<Preparation, LaunchError> {
    let Context {
        assignment,
        job,
        paths,
        ..
    } = context;
    // One node: the original's names. Several may share the directory: theirs carry the node.
    let suffix = match assignment.hosts.len() {
        1 if !assignment.set_up => String::new(),
        _ => format!(
            "-{}",
            batchai_common::names::last_id(&own_host(assignment)?.node)
        ),
    };
    let command = match &job.job_preparation {
        Some(preparation) => Some(ProcessPlan {
            rank: -1,
            argv: bash(&preparation.command_line),
            env: environment::for_preparation(context)?,
            cwd: paths.job_temp.clone(),
            stdout: format!("stdout-job_prep{suffix}.txt"),
            stderr: format!("stderr-job_prep{suffix}.txt"),
        }),
        None => None,
    };
    let container = container::of(context, &suffix)?;
    let groups = &context.facts.isolation.groups;
    let limit = job
        .constraints
        .as_ref()
        .and_then(|c| c.max_wall_clock_time)
        .unwrap_or_default();
    Ok(Preparation {
        wipe: paths.job_temp_dir.clone(),
        directories: directories(context)?,
        own: paths.own(&job.job_output_directory_path_segment),
        mount_points: Vec::new(),
        files: files(context),
        bundle: bundle(context),
        user: context.user.clone(),
        limits: context.facts.limits.clone(),
        group: groups
            .as_ref()
            .map(|groups| groups.below(&assignment.attempt)),
        bounds: bounds(context)?,
        may_gain: assignment.set_up,
        container,
        command,
        log_limit: context.facts.log_limit,
        copy_to: paths.stdouterr.clone(),
        execution_log: format!("execution{suffix}.log"),
        serve: shared::serve(context)?,
        wait_for: shared::wait_for(context)?,
        fence: assignment.fenced.then(|| context.facts.lease.clone()),
        ports: ports(context)?,
        gpus: gpus(context),
        wall_clock_s: u64::try_from(limit.seconds).unwrap_or_default(),
        grace_s: TERMINATION_GRACE.as_secs(),
    })
}

/// The last says that the others are there.
fn directories(context: &Context<'_>) -> Result<Vec<String>, LaunchError> {
    let mut directories = context.paths.directories();
    if context.paths.is_master {
        directories.extend(shared::made(context)?);
    }
    Ok(directories)
}

/// The ports that the job's processes on this host are told to listen to: of TensorFlow each process its own, of others rank 0 that of
/// the rendezvous of them all.
fn ports(context: &Context<'_>) -> Result<Vec<u16>, LaunchError> {
    let Assignment {
        hosts, host_index, ..
    } = context.assignment;
    let count = match &context.job.tensor_flow_settings {
        Some(_) => layout(context).of(host_number(context)).count(),
        None => usize::from(*host_index == 0 && rank_count(context.job, hosts.len()) > 0),
    };
    let first = own_host(context.assignment)?.port;
    let row = (first..).take(count).map(u16::try_from);
    row.collect::<Result<_, _>>()
        .map_err(|_| LaunchError::Incomplete { what: "port" })
}

/// A job has all GPUs of the node, unless it hides those of a maker from itself; what sets a node up needs none.
fn gpus(context: &Context<'_>) -> Vec<Device> {
    if context.assignment.set_up {
        return Vec::new();
    }
    let mut gpus = context.facts.gpus.clone();
    let variables = &context.job.environment_variables;
    gpus.retain(|gpu| {
        let mut own = variables.iter();
        let own = own.find(|variable| variable.name == gpu.maker.variable());
        own.is_none_or(|variable| !variable.value.is_empty())
    });
    gpus
}

/// What the job asks to be limited, and what is counted of it in any case.
fn bounds(context: &Context<'_>) -> Result<Vec<Bound>, LaunchError> {
    let seats = &context.facts.isolation.seats;
    let limits = context.job.resource_limits.unwrap_or_default();
    let able = |wanted| seats.iter().any(|seat| seat.controller == wanted);
    if let Some(lacks) = asked(&limits).find(|wanted| !able(*wanted)) {
        return Err(LaunchError::NotLimited {
            node: own_host(context.assignment)?.node.clone(),
            what: lacks.name(),
        });
    }
    let bounds = seats.iter().map(|seat| Bound {
        seat: seat.below(&context.assignment.attempt),
        settings: seat.settings(&limits),
    });
    // One that neither limits nor counts is not worth its making.
    let of_use = |bound: &Bound| !bound.settings.is_empty() || bound.seat.kills_file().is_some();
    Ok(bounds.filter(of_use).collect())
}

fn bundle(context: &Context<'_>) -> Option<(String, String)> {
    let name = &context.job.bundle;
    let digest = batchai_common::names::last_id(name);
    let path = format!("{}/{digest}.tar.gz", context.facts.bundles);
    (!name.is_empty()).then(|| (path, context.paths.job_temp.clone()))
}

/// The hosts and how many processes each has, as the starters of MPI read it; and how those of other hosts are reached.
fn files(context: &Context<'_>) -> Vec<(String, String)> {
    let hosts = &context.assignment.hosts;
    let total = rank_count(context.job, hosts.len()).max(hosts.len());
    let of_host = |i| ranks(total, hosts.len(), i).len();
    let slots = hosts.iter().enumerate();
    let slots = slots.map(|(i, host)| (host.address.as_str(), of_host(i)));
    let (open_mpi, hydra) = mpi::host_files(slots);
    let Paths {
        job_temp, hostfile, ..
    } = &context.paths;
    let of_hydra = format!("{job_temp}/.hostfile.hydra");
    let shell = remote_shell(context);
    let hosts = [(hostfile.clone(), open_mpi), (of_hydra, hydra)];
    hosts.into_iter().chain(shell).collect()
}

/// What processes of the job find as `ssh`, and what it is; none where there is nobody to reach, or no way.
pub(super) fn remote_shell(context: &Context<'_>) -> Option<(String, String)> {
    let Context {
        assignment,
        facts,
        paths,
        ..
    } = context;
    let wanted = assignment.hosts.len() > 1 && !assignment.set_up;
    (wanted && !facts.remote_shell.is_empty()).then(|| {
        // What an image has loaded into every program is made for the image's libraries, and not for the host's.
        let (first, words) = match context.job.container_settings {
            Some(_) => ("unset LD_PRELOAD\n", container::remote_shell(facts)),
            None => ("", facts.remote_shell.clone()),
        };
        let words: Vec<_> = words.iter().map(|word| expand::literal(word)).collect();
        let script = format!("#!/bin/sh\n{first}exec {} \"$@\"\n", words.join(" "));
        (paths.remote_shell(), script)
    })
}
