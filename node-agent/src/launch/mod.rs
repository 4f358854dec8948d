//! PURE. What an attempt starts on one host: from an assignment and the facts of this host to directories, files and
//! processes. One file per framework.
//!
//! Nothing is started, created or looked up here; the shim does that.

mod caffe;
mod caffe2;
mod chainer;
mod cntk;
mod container;
mod custom;
mod custom_mpi;
mod environment;
pub mod expand;
mod gpus;
mod horovod;
mod infiniband;
mod mpi;
mod paths;
mod preparation;
mod pytorch;
mod script;
pub mod shared;
mod storage;
mod tensorflow;
mod users;
mod volumes;

use std::collections::BTreeMap;

use batchai_common::limits::{LOG_FILE_MIB, SHARED_TEMP_CLIENTS_MAX};
use batchai_common::ranks::{Layout, of_node as ranks};
use batchai_proto::agent::v1::Assignment;
use batchai_proto::v1::Job;
use serde::{Deserialize, Serialize};

use crate::cgroups::{Bound, Group, Isolation};
pub use container::{
    Ability, Container, Engine, HOSTS, Reference, SHARED_MEMORY, SHELLS, Source, gpu_line, inside,
    login_names, with_shell,
};
pub use environment::ATTEMPT_TAG;
pub use gpus::{Device, Maker};
use paths::Paths;
pub use storage::{Keys, Place, Remote, keys};
pub use users::{JobLimit, JobUser, JobUsers, Limited};
pub use volumes::{How, Mount, data_name, of as mounts};

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
    /// What is mounted on, of the job's own.
    #[serde(default)]
    pub mount_points: Vec<String>,
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
    /// What all of its processes are in, where that is a container.
    #[serde(default)]
    pub container: Option<Container>,
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
    /// The directory that is served to the job's nodes on other machines, where this host does that.
    #[serde(default)]
    pub serve: Option<shared::Serve>,
    /// What another node of this machine makes first.
    #[serde(default)]
    pub wait_for: Option<shared::WaitFor>,
    /// Ports that its processes will listen to on this host: nobody else may.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// GPUs of this host that are its own for the time: nobody else may use them.
    #[serde(default)]
    pub gpus: Vec<Device>,
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
    /// The GPUs that jobs are given.
    pub gpus: Vec<Device>,
    /// Its ports of InfiniBand that are up, as `device:port`.
    pub infiniband: Vec<String>,
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
    /// What can be done for containers here.
    pub containers: Ability,
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
    #[error(
        "$AZ_BATCHAI_SHARED_JOB_TEMP would be mounted by {count} other machines, and it is served to no more than {max}: leave it out, \
         or mount a file server",
        max = SHARED_TEMP_CLIENTS_MAX
    )]
    SharedTooWidely { count: usize },
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
    #[error(
        "{node} has no containers, which take an agent that is root and may mount (facts.image_sources of the node says what it has): \
         leave containerSettings out, or run the agent as root"
    )]
    NoContainers { node: String },
    #[error(
        "{node} has neither docker nor podman to come to the image {image}: install one of them and restart the agent, or give the image \
         as docker-archive:/PATH or rootfs:/PATH"
    )]
    NoEngine { node: String, image: String },
    #[error(
        "{what} is {path}, which a container cannot have in its place: give a directory or a file by its absolute path, without .., and not \
         the root of the node"
    )]
    NotSeen { what: String, path: String },
    #[error("this agent cannot mount {what}; upgrade the agent")]
    UnknownVolume { what: &'static str },
    #[error("file server {name} cannot be mounted: it is not known where it is served")]
    NotServed { name: String },
    #[error(
        "{path} is no place for a volume: it leads out of the mount root, or is that of another"
    )]
    BadPlace { path: String },
    #[error("what is to be mounted at {path} cannot be: {why}")]
    BadVolume { path: String, why: String },
    #[error("this agent cannot launch the job's toolkit; upgrade the agent")]
    UnknownToolkit,
}

/// Everything about one attempt on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub preparation: Preparation,
    /// What is mounted for the time of the job.
    pub mounts: Vec<Mount>,
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

impl<'a> Context<'a> {
    fn of(assignment: &'a Assignment, facts: &'a HostFacts) -> Result<Context<'a>, LaunchError> {
        let job = assignment.job.as_ref();
        let job = job.ok_or(LaunchError::Incomplete { what: "job" })?;
        let user = facts.users.of(assignment)?;
        let paths = Paths::of(job, assignment, &facts.root)?;
        let env = environment::common(assignment, (job, user.as_ref()), facts, &paths)?;
        Ok(Context {
            assignment,
            job,
            facts,
            user,
            paths,
            env,
        })
    }
}

/// Plans an attempt on this host.
///
/// # Errors
/// Says what in the job makes no sense here.
pub fn plan(assignment: &Assignment, facts: &HostFacts) -> Result<Plan, LaunchError> {
    let context = Context::of(assignment, facts)?;
    check_addresses(assignment)?;
    let volumes = context.job.mount_volumes.as_ref();
    let sources = &assignment.file_servers;
    let owner = context
        .user
        .as_ref()
        .map_or((0, 0), |user| (user.uid, user.gid));
    let root = &context.paths.job_mount_root;
    let mut mounts = mounts(volumes, &assignment.storage, sources, root, owner)?;
    mounts.extend(shared::mount(&context)?);
    Ok(Plan {
        preparation: Preparation {
            mount_points: mounts.iter().map(|mount| mount.path.clone()).collect(),
            ..preparation::preparation(&context)?
        },
        mounts,
        processes: processes(&context)?,
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
        tensor_flow_settings => tensorflow,
        caffe2_settings => caffe2,
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
    let context = Context::of(assignment, facts)?;
    let env = match mpi::starts(context.job) {
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

/// How many processes the job has over all hosts, apart from those that serve them.
fn rank_count(job: &Job, hosts: usize) -> usize {
    if let Some(settings) = &job.tensor_flow_settings {
        return usize::try_from(settings.worker_count).unwrap_or_default();
    }
    if job.caffe2_settings.is_some() {
        return hosts;
    }
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

/// Which of the job's processes are whose.
fn layout(context: &Context<'_>) -> Layout {
    let servers = context.job.tensor_flow_settings.as_ref();
    let servers = servers.map_or(0, |settings| settings.parameter_server_count);
    let nodes = context.assignment.hosts.len();
    Layout {
        nodes,
        workers: rank_count(context.job, nodes),
        servers: usize::try_from(servers).unwrap_or_default(),
    }
}

/// Which of the hosts this one is.
fn host_number(context: &Context<'_>) -> usize {
    usize::try_from(context.assignment.host_index).unwrap_or(usize::MAX)
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
#[path = "framework_tests.rs"]
mod framework_tests;

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
#[path = "mpi_tests.rs"]
mod mpi_tests;
