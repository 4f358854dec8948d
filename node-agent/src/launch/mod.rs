//! PURE. What an attempt starts on one host: from an assignment and the facts of this host to directories, files and
//! processes. One file per framework.
//!
//! Nothing is started, created or looked up here; the shim does that.

mod caffe;
mod chainer;
mod cntk;
mod custom;
mod custom_mpi;
mod environment;
pub mod expand;
mod horovod;
mod mpi;
mod paths;
mod pytorch;
mod users;

use std::collections::BTreeMap;

use batchai_common::limits::{LOG_FILE_MIB, TERMINATION_GRACE};
use batchai_common::ranks::of_node as ranks;
use batchai_proto::agent::v1::Assignment;
use batchai_proto::v1::Job;
use serde::{Deserialize, Serialize};

use crate::cgroups::{Bound, Group, Isolation, asked};
pub use environment::ATTEMPT_TAG;
use paths::Paths;
pub use users::{JobLimit, JobUser, JobUsers, Limited};

/// One process on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Its number over all hosts.
    pub rank: i32,
    pub argv: Vec<String>,
    /// All of its environment.
    pub env: BTreeMap<String, String>,
    pub cwd: String,
    /// Names of its log files.
    pub stdout: String,
    pub stderr: String,
}

/// How much of each log file is kept on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimit {
    pub bytes: u64,
    /// How long ago what is kept may have been printed; any time where it is none.
    pub age_s: Option<u64>,
}

impl Default for LogLimit {
    fn default() -> LogLimit {
        LogLimit {
            bytes: LOG_FILE_MIB << 20,
            age_s: None,
        }
    }
}

/// What makes this host ready for an attempt, and what holds for all of its processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preparation {
    /// The directory of all jobs' directories: whatever earlier ones left in it goes.
    pub wipe: String,
    /// Made in this order, with their parents.
    pub directories: Vec<String>,
    /// Of those of them that lie in the mount root: up to where they are this job's own, and nobody else's to look into.
    #[serde(default)]
    pub own: Vec<String>,
    /// Path and content.
    pub files: Vec<(String, String)>,
    /// The bundle on this host that is unpacked, and where to.
    #[serde(default)]
    pub bundle: Option<(String, String)>,
    /// Whom all of it is for; the agent's own user where it is none.
    #[serde(default)]
    pub user: Option<JobUser>,
    /// What its processes may take, beyond what they inherit.
    #[serde(default)]
    pub limits: Vec<JobLimit>,
    /// The group of all of its processes, where the agent can make one.
    #[serde(default)]
    pub group: Option<Group>,
    /// The groups in which what its processes take together is limited, and counted.
    #[serde(default)]
    pub bounds: Vec<Bound>,
    /// Its processes may start what has more rights than they.
    #[serde(default)]
    pub may_gain: bool,
    /// The preparation command.
    pub command: Option<ProcessPlan>,
    /// How much of each log file is kept.
    #[serde(default)]
    pub log_limit: LogLimit,
    /// Where log files are copied to.
    pub copy_to: String,
    /// The name of the log file of what happened.
    pub execution_log: String,
    /// The file that says until when it may run, where that is bound to the node's lease.
    #[serde(default)]
    pub fence: Option<String>,
    /// From the beginning of preparation.
    pub wall_clock_s: u64,
    /// Between SIGTERM and SIGKILL.
    pub grace_s: u64,
}

/// What is known of the host that the plan is for.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// The UUID of the node: part of the tag by which its processes are found.
    pub node_uid: String,
    /// The root of mounts and job directories.
    pub root: String,
    /// Where the agent keeps bundles.
    pub bundles: String,
    /// Where the agent keeps the lease of the node.
    pub lease: String,
    pub gpu_count: usize,
    /// The network interface that has the host's address.
    pub interface: Option<String>,
    /// Whom jobs run as.
    pub users: JobUsers,
    /// What their processes may take.
    pub limits: Vec<JobLimit>,
    /// How much of each of their log files is kept.
    pub log_limit: LogLimit,
    /// Where their groups of processes are, and what can be limited for those.
    pub isolation: Isolation,
    /// What every process inherits: PATH, HOME and the like.
    pub base_env: BTreeMap<String, String>,
    /// The program, with its first arguments, by which processes of a job start others on its other nodes; none where they cannot.
    pub remote_shell: Vec<String>,
}

/// Why no plan can be made. The job is to blame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    #[error("{what} names ${variable}, which is not set for this job{hint}")]
    UnknownVariable {
        what: String,
        variable: String,
        hint: &'static str,
    },
    #[error("{what} is not an absolute path once its variables are expanded: {path}")]
    NotAbsolute { what: String, path: String },
    #[error("{what} has an unclosed quote")]
    Quoting { what: String },
    #[error(
        "{node} is registered with the address {address}, which other machines cannot reach; start its agent with \
         --address"
    )]
    Unreachable { node: String, address: String },
    #[error("the assignment is incomplete: {what} is missing")]
    Incomplete { what: &'static str },
    #[error(
        "workspace {number} has no user on this node: with --job-user per-workspace, upgrade the coordinator, or give a \
         lower number"
    )]
    NoUser { number: i64 },
    #[error(
        "{node} cannot limit {what} for a job, as its resourceLimits ask: the agent may make no control groups with that controller \
         there (facts.enforcedLimits of the node says what it can); leave the limit out, or run the agent as root on a host that has them"
    )]
    NotLimited { node: String, what: &'static str },
    #[error("this agent cannot launch the job's toolkit; upgrade the agent")]
    UnknownToolkit,
}

/// Everything about one attempt on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub preparation: Preparation,
    pub processes: Vec<ProcessPlan>,
}

/// What launchers see.
struct Context<'a> {
    assignment: &'a Assignment,
    job: &'a Job,
    facts: &'a HostFacts,
    user: Option<JobUser>,
    paths: Paths,
    /// The environment of every process of the job; ranks add to it.
    env: BTreeMap<String, String>,
}

/// Plans an attempt on this host.
///
/// # Errors
/// Says what in the job makes no sense here.
pub fn plan(assignment: &Assignment, facts: &HostFacts) -> Result<Plan, LaunchError> {
    let job = assignment
        .job
        .as_ref()
        .ok_or(LaunchError::Incomplete { what: "job" })?;
    check_addresses(assignment)?;
    let user = facts.users.of(assignment)?;
    let paths = Paths::of(job, assignment, &facts.root)?;
    let env = environment::common(assignment, (job, user.as_ref()), facts, &paths)?;
    let context = Context {
        assignment,
        job,
        facts,
        user,
        paths,
        env,
    };
    let processes = processes(&context)?;
    Ok(Plan {
        preparation: preparation(&context)?,
        processes,
    })
}

/// Of the toolkit whose settings the job has: a job has those of one.
fn processes(context: &Context<'_>) -> Result<Vec<ProcessPlan>, LaunchError> {
    macro_rules! launch {
        ($($settings:ident => $toolkit:ident,)*) => {
            $(if let Some(settings) = &context.job.$settings {
                return $toolkit::processes(context, settings);
            })*
        };
    }
    launch! {
        custom_toolkit_settings => custom,
        py_torch_settings => pytorch,
        custom_mpi_settings => custom_mpi,
        horovod_settings => horovod,
        chainer_settings => chainer,
        cntk_settings => cntk,
        caffe_settings => caffe,
    }
    Err(LaunchError::UnknownToolkit)
}

/// What runs beside the processes of an attempt, and is none of them, has of the job: its environment without secrets, and its directory.
///
/// # Errors
/// As above.
pub fn beside(
    assignment: &Assignment,
    facts: &HostFacts,
) -> Result<(BTreeMap<String, String>, String), LaunchError> {
    let job = assignment.job.as_ref();
    let job = job.ok_or(LaunchError::Incomplete { what: "job" })?;
    let user = facts.users.of(assignment)?;
    let paths = Paths::of(job, assignment, &facts.root)?;
    let env = environment::common(assignment, (job, user.as_ref()), facts, &paths)?;
    let context = Context {
        assignment,
        job,
        facts,
        user,
        paths,
        env,
    };
    let env = match mpi::starts(job) {
        // Its ranks are what is started beside.
        true => mpi::environment(&context)?,
        false => environment::for_preparation(&context)?,
    };
    Ok((env, context.paths.job_temp))
}

/// A loopback address leads nowhere from another machine, and the job would wait for its rendezvous for ever.
fn check_addresses(assignment: &Assignment) -> Result<(), LaunchError> {
    let hosts = &assignment.hosts;
    let one_machine = hosts.iter().all(|host| host.boot_id == hosts[0].boot_id);
    let loopback = |address: &str| {
        address
            .parse()
            .is_ok_and(|address: core::net::IpAddr| address.is_loopback())
    };
    match hosts
        .iter()
        .find(|host| loopback(&host.address))
        .filter(|_| !one_machine)
    {
        None => Ok(()),
        Some(host) => Err(LaunchError::Unreachable {
            node: host.node.clone(),
            address: host.address.clone(),
        }),
    }
}

fn preparation(context: &Context<'_>) -> Result<Preparation, LaunchError> {
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
    let groups = &context.facts.isolation.groups;
    let limit = job
        .constraints
        .as_ref()
        .and_then(|c| c.max_wall_clock_time)
        .unwrap_or_default();
    Ok(Preparation {
        wipe: paths.job_temp_dir.clone(),
        directories: paths.directories(),
        own: paths.own(&job.job_output_directory_path_segment),
        files: files(context),
        bundle: bundle(context),
        user: context.user.clone(),
        limits: context.facts.limits.clone(),
        group: groups
            .as_ref()
            .map(|groups| groups.below(&assignment.attempt)),
        bounds: bounds(context)?,
        may_gain: assignment.set_up,
        command,
        log_limit: context.facts.log_limit,
        copy_to: paths.stdouterr.clone(),
        execution_log: format!("execution{suffix}.log"),
        fence: assignment.fenced.then(|| context.facts.lease.clone()),
        wall_clock_s: u64::try_from(limit.seconds).unwrap_or_default(),
        grace_s: TERMINATION_GRACE.as_secs(),
    })
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

/// Where an output directory of an attempt is on this host: the prefix that the user gave, and the path below it, which is
/// the job's own.
pub fn output_directory(
    assignment: &Assignment,
    facts: &HostFacts,
    id: &str,
) -> Result<(String, String), LaunchError> {
    let job = assignment.job.as_ref();
    let job = job.ok_or(LaunchError::Incomplete { what: "job" })?;
    let paths = Paths::of(job, assignment, &facts.root)?;
    let found = paths.outputs.into_iter().find(|(known, _)| known == id);
    let missing = LaunchError::Incomplete {
        what: "output directory",
    };
    let (_, path) = found.ok_or(missing.clone())?;
    let segment = format!("/{}/", job.job_output_directory_path_segment);
    let at = path.find(&segment).ok_or(missing)?;
    Ok((path[..at].to_owned(), path[at + 1..].to_owned()))
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
fn remote_shell(context: &Context<'_>) -> Option<(String, String)> {
    let Context {
        assignment,
        facts,
        paths,
        ..
    } = context;
    let wanted = assignment.hosts.len() > 1 && !assignment.set_up;
    (wanted && !facts.remote_shell.is_empty()).then(|| {
        let words = facts.remote_shell.iter();
        let words: Vec<_> = words.map(|word| expand::literal(word)).collect();
        let script = format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" "));
        (paths.remote_shell(), script)
    })
}

/// How many processes the job has over all hosts.
fn rank_count(job: &Job, hosts: usize) -> usize {
    macro_rules! processes {
        ($($settings:ident),*) => {
            [$(job.$settings.as_ref().map(|settings| settings.process_count)),*]
        };
    }
    let counts = processes!(
        py_torch_settings,
        custom_mpi_settings,
        horovod_settings,
        chainer_settings,
        cntk_settings,
        caffe_settings
    );
    let count = |count: i32| usize::try_from(count).unwrap_or_default();
    let each = job.custom_toolkit_settings.as_ref();
    let custom = each.map(|settings| count(settings.processes_per_node) * hosts);
    let known = counts.into_iter().flatten().next();
    known.map(count).or(custom).unwrap_or_default()
}

fn own_host(assignment: &Assignment) -> Result<&batchai_proto::agent::v1::Host, LaunchError> {
    let index = usize::try_from(assignment.host_index).unwrap_or(usize::MAX);
    assignment
        .hosts
        .get(index)
        .ok_or(LaunchError::Incomplete { what: "host" })
}

fn bash(command_line: &str) -> Vec<String> {
    vec!["/bin/bash".into(), "-c".into(), command_line.into()]
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
#[path = "mpi_tests.rs"]
mod mpi_tests;
