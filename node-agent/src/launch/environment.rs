//! PURE. The environment of a job's processes.

use std::collections::BTreeMap;

use batchai_proto::agent::v1::Assignment;
use batchai_proto::shared::SHARED_JOB_TEMP;
use batchai_proto::v1::{Job, NameValuePair};

use super::expand::expand;
use super::paths::Paths;
use super::{Context, HostFacts, JobUser, LaunchError, container, gpus, infiniband};

/// Every process of an attempt, and whatever it starts, carries this variable: `{node uid}/{attempt}`. Stray processes
/// are found by it.
pub const ATTEMPT_TAG: &str = "BATCHAI_ATTEMPT";

/// How Open MPI, PRRTE, Hydra and Intel MPI start what is on other hosts. Theirs stay there as long as it runs, and end with it.
const STARTERS: [(&str, &str); 8] = [
    ("OMPI_MCA_plm_rsh_agent", "{ssh}"),
    ("OMPI_MCA_orte_leave_session_attached", "1"),
    ("PRTE_MCA_plm_ssh_agent", "{ssh}"),
    ("PRTE_MCA_prte_leave_session_attached", "1"),
    ("HYDRA_LAUNCHER", "ssh"),
    ("HYDRA_LAUNCHER_EXEC", "{ssh}"),
    ("I_MPI_HYDRA_BOOTSTRAP", "ssh"),
    ("I_MPI_HYDRA_BOOTSTRAP_EXEC", "{ssh}"),
];

/// gloo's as PyTorch and as Horovod name it, that by which Intel's mpirun is come back to (else by its host's name), and NCCL's.
const INTERFACES: [&str; 4] = [
    "GLOO_SOCKET_IFNAME",
    "HOROVOD_GLOO_IFACE",
    "I_MPI_HYDRA_IFACE",
    "NCCL_SOCKET_IFNAME",
];

type Env = BTreeMap<String, String>;

/// What every process of the job has, before the user's own variables.
pub fn common(
    assignment: &Assignment,
    (job, user): (&Job, Option<&JobUser>),
    facts: &HostFacts,
    paths: &Paths,
) -> Result<Env, LaunchError> {
    let addresses: Vec<_> = assignment
        .hosts
        .iter()
        .map(|host| host.address.as_str())
        .collect();
    let contained = job.container_settings.is_some() && !assignment.set_up;
    let mut env = match contained {
        true => container::base(&facts.base_env, &paths.job_temp),
        false => facts.base_env.clone(),
    };
    if let Some(user) = user {
        if !contained {
            let home = match user.home.as_str() {
                "" => &paths.job_temp,
                _ => &user.home,
            };
            env.insert("HOME".into(), home.clone());
        }
        env.insert("USER".into(), user.name.clone());
        env.insert("LOGNAME".into(), user.name.clone());
    }
    env.extend(paths.variables());
    let mut set = |name: &str, value: String| env.insert(name.to_owned(), value);
    if let Some(shared) = paths.shared.path() {
        set(SHARED_JOB_TEMP, shared.clone());
    }
    set("AZ_BATCHAI_STDOUTERR_DIR", paths.stdouterr.clone());
    set("AZ_BATCHAI_MPI_HOST_FILE", paths.hostfile.clone());
    set("AZ_BATCHAI_NUM_GPUS", facts.gpus.len().to_string());
    set("AZ_BATCH_HOST_LIST", addresses.join(","));
    set("AZ_BATCHAI_ATTEMPT", assignment.number.to_string());
    for (id, path) in &paths.inputs {
        set(&format!("AZ_BATCHAI_INPUT_{id}"), path.clone());
    }
    for (id, path) in &paths.outputs {
        set(&format!("AZ_BATCHAI_OUTPUT_{id}"), path.clone());
    }
    if let Some(settings) = &job.py_torch_settings {
        set(
            "AZ_BATCHAI_PYTORCH_BACKEND",
            settings.communication_backend.clone(),
        );
    }
    env.extend(gpus::variables(&facts.gpus, &facts.gpus));
    env.extend(infiniband::variables(&assignment.hosts, &facts.infiniband));
    let mut set = |name: &str, value: String| env.insert(name.to_owned(), value);
    // Who follows a log wants lines as they are printed, and python holds them back from a pipe.
    set("PYTHONUNBUFFERED", "1".to_owned());
    set(
        ATTEMPT_TAG,
        format!("{}/{}", facts.node_uid, assignment.attempt),
    );
    Ok(env)
}

/// The environment of a rank, before the user's own variables.
pub fn of_rank(
    context: &Context<'_>,
    rank: usize,
    total: usize,
    own: &std::ops::Range<usize>,
) -> Result<Env, LaunchError> {
    let master = context.assignment.hosts.first();
    let master = master.ok_or(LaunchError::Incomplete { what: "master" })?;
    let mut env = context.env.clone();
    for (name, value) in [
        ("AZ_BATCHAI_TASK_INDEX", rank.to_string()),
        ("MASTER_ADDR", master.address.clone()),
        ("MASTER_PORT", master.port.to_string()),
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", total.to_string()),
        ("LOCAL_RANK", (rank - own.start).to_string()),
        ("LOCAL_WORLD_SIZE", own.len().to_string()),
    ] {
        env.insert(name.to_owned(), value);
    }
    tell_interface(context, &mut env);
    Ok(env)
}

/// Who talks over sockets is told which interface has the host's address, where that is known.
pub fn tell_interface(context: &Context<'_>, env: &mut Env) {
    for name in INTERFACES {
        if let Some(interface) = &context.facts.interface {
            env.insert(name.to_owned(), interface.clone());
        }
    }
}

/// What only ranks have: a user's variable that names one of them is not set for the preparation command.
const OF_RANKS: [&str; 4] = [
    "AZ_BATCHAI_TASK_INDEX",
    "AZ_BATCHAI_PYTORCH_INIT_METHOD",
    "AZ_BATCHAI_PS_HOSTS",
    "AZ_BATCHAI_WORKER_HOSTS",
];

/// The environment of the preparation command.
pub fn for_preparation(context: &Context<'_>) -> Result<Env, LaunchError> {
    let mut env = with_starters(context, context.env.clone());
    let names_ranks = |value: &str| OF_RANKS.iter().any(|name| value.contains(name));
    for variable in &context.job.environment_variables {
        if !names_ranks(&variable.value) {
            add(&mut env, variable)?;
        }
    }
    Ok(with_programs(context, env))
}

/// Adds the user's variables, whose values may name the service's.
pub fn with_user(context: &Context<'_>, env: Env) -> Result<Env, LaunchError> {
    let mut env = with_starters(context, env);
    for variable in &context.job.environment_variables {
        add(&mut env, variable)?;
    }
    Ok(with_programs(context, env))
}

fn with_starters(context: &Context<'_>, mut env: Env) -> Env {
    if super::preparation::remote_shell(context).is_some() {
        let shell = context.paths.remote_shell();
        let of = |(name, value): (&str, &str)| (name.to_owned(), value.replace("{ssh}", &shell));
        env.extend(STARTERS.map(of));
    }
    env
}

/// Who reaches the job's other nodes does so by what is first on its PATH, whatever the job says of that.
fn with_programs(context: &Context<'_>, mut env: Env) -> Env {
    if super::preparation::remote_shell(context).is_some() {
        let programs = context.paths.programs();
        let path = env.get("PATH").map_or("/usr/bin:/bin", String::as_str);
        env.insert("PATH".to_owned(), format!("{programs}:{path}"));
    }
    env
}

fn add(env: &mut Env, variable: &NameValuePair) -> Result<(), LaunchError> {
    let what = format!("environment variable {}", variable.name);
    let value = expand(&what, &variable.value, env)?;
    env.insert(variable.name.clone(), value);
    Ok(())
}
