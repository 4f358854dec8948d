//! PURE. What all toolkits have in common whose processes are started by MPI: `mpirun` on the master, with the hostfile.
//!
//! Which mpirun that is, Open MPI, MPICH or Intel MPI, is found out where it starts (`mpirun.sh`), because only there the job's PATH
//! leads anywhere; the rest is known here. Every rank is bash with a command line: `$AZ_BATCHAI_*` in it is that of the rank's own
//! host, and so is all of its environment. A rank finds its place in `AZ_BATCHAI_TASK_INDEX`, `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and
//! `LOCAL_WORLD_SIZE` beside what its MPI sets, and `MASTER_ADDR` and `MASTER_PORT` are of the master; gloo, nccl and Intel MPI are told the
//! interface of the host's address. Ranks are numbered over the hosts in their order and are bound to no cores: what trains has threads of its
//! own. A rank sees all GPUs of its host, and takes the one that `LOCAL_RANK`, `hvd.local_rank()` or `intra_rank` says. Log files are
//! `stdout.txt` and `stderr.txt`, those of mpirun. The job is over when mpirun is; it ends all ranks when one fails.

use std::collections::{BTreeMap, BTreeSet};

use batchai_proto::agent::v1::Host;
use batchai_proto::v1::Job;

use super::expand::quote;
use super::{Context, LaunchError, ProcessPlan, environment, pytorch, script};

/// What starts them: `$1` is how many there are, `$2` what bash runs in each.
pub const STARTER: &str = include_str!("mpirun.sh");

/// Found by the own variables of what started it, which differ; begins where jobs begin.
const PLACE: &str = concat!(
    r#"export RANK="${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${HOROVOD_RANK:-0}}}""#,
    r#" WORLD_SIZE="${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-${HOROVOD_SIZE:-1}}}""#,
    r#" LOCAL_RANK="${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${HOROVOD_LOCAL_RANK:-0}}}""#,
    r#" LOCAL_WORLD_SIZE="${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-${HOROVOD_LOCAL_SIZE:-1}}}""#,
    "\n",
    r#"export AZ_BATCHAI_TASK_INDEX="$RANK""#,
    "\n",
    r#"cd "$AZ_BATCHAI_JOB_TEMP" || exit"#,
    "\n",
);

/// Ranks of other hosts are not behind these, where the job says nothing else: the bridge of a container engine has the same address on
/// every host.
const EXCLUDED: &str = "docker0,lo";
const INTERFACES: [&str; 2] = ["OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"];

type Variables = BTreeMap<String, String>;

/// A python script, with what it is run by and given.
pub struct Script<'a> {
    pub interpreter: &'a str,
    pub path: &'a str,
    pub arguments: &'a str,
}

/// The backend of PyTorch that is MPI.
pub const BACKEND: &str = "mpi";

impl Script<'_> {
    /// What runs it, as a word of a shell.
    pub fn interpreter(
        &self,
        context: &Context<'_>,
        known: &Variables,
    ) -> Result<String, LaunchError> {
        match self.interpreter {
            "" => Ok(script::python(context.job.container_settings.is_some()).to_owned()),
            path => quote("python_interpreter_path", path, known),
        }
    }

    pub fn command_line(
        &self,
        context: &Context<'_>,
        known: &Variables,
    ) -> Result<String, LaunchError> {
        let path = quote("python_script_file_path", self.path, known)?;
        let interpreter = self.interpreter(context, known)?;
        command_line(vec![interpreter, path], self.arguments, known)
    }
}

/// So many processes of a bash command line.
pub fn processes(
    context: &Context<'_>,
    count: i32,
    command_line: &str,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    started_by(STARTER, context, count, command_line)
}

/// The same, by a script of which the last part is the above.
pub fn started_by(
    starter: &str,
    context: &Context<'_>,
    count: i32,
    command_line: &str,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    if context.assignment.host_index > 0 {
        return Ok(Vec::new());
    }
    Ok(vec![ProcessPlan {
        rank: 0,
        argv: vec![
            "/bin/bash".to_owned(),
            "-c".to_owned(),
            starter.to_owned(),
            "mpirun".to_owned(),
            count.to_string(),
            format!("{PLACE}{command_line}"),
        ],
        env: environment(context)?,
        cwd: context.paths.job_temp.clone(),
        stdout: "stdout.txt".to_owned(),
        stderr: "stderr.txt".to_owned(),
    }])
}

/// So many processes of a python script.
pub fn of_script(
    context: &Context<'_>,
    count: i32,
    script: &Script<'_>,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    processes(
        context,
        count,
        &script.command_line(context, &known(context)?)?,
    )
}

/// So many processes of a program: its words, each with the field that it is of, and arguments in shell quoting.
pub fn of_program(
    context: &Context<'_>,
    count: i32,
    program: &[(&str, &str)],
    arguments: &str,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let known = known(context)?;
    let words = program.iter().map(|(what, word)| quote(what, word, &known));
    let words = words.collect::<Result<_, _>>()?;
    processes(context, count, &command_line(words, arguments, &known)?)
}

/// The variables that a command line may name: their values are those of each rank.
pub fn known(context: &Context<'_>) -> Result<Variables, LaunchError> {
    let mut known = environment(context)?;
    known.insert("AZ_BATCHAI_TASK_INDEX".to_owned(), String::new());
    Ok(known)
}

/// Words for a shell, and arguments in shell quoting.
fn command_line(
    mut words: Vec<String>,
    arguments: &str,
    known: &Variables,
) -> Result<String, LaunchError> {
    let arguments = shlex::split(arguments).ok_or_else(|| LaunchError::Quoting {
        what: "command_line_args".into(),
    })?;
    for argument in arguments {
        words.push(quote("command_line_args", &argument, known)?);
    }
    Ok(format!("exec {}", words.join(" ")))
}

/// Whether it is mpirun that starts a job's processes.
pub fn starts(job: &Job) -> bool {
    let torch = job.py_torch_settings.as_ref();
    torch.is_some_and(|torch| torch.communication_backend == BACKEND)
        || job.custom_mpi_settings.is_some()
        || job.horovod_settings.is_some()
        || job.chainer_settings.is_some()
        || job.cntk_settings.is_some()
        || job.caffe_settings.is_some()
}

/// The host that starts them.
pub fn master<'a>(context: &Context<'a>) -> Result<&'a Host, LaunchError> {
    let master = context.assignment.hosts.first();
    master.ok_or(LaunchError::Incomplete { what: "master" })
}

/// What all of its processes have, on whatever host of it.
pub fn environment(context: &Context<'_>) -> Result<Variables, LaunchError> {
    let master = master(context)?;
    let mut env = context.env.clone();
    let (address, port) = (master.address.clone(), master.port.to_string());
    if context.job.py_torch_settings.is_some() {
        let method = pytorch::init_method(&address, &port);
        env.insert(pytorch::INIT_METHOD.to_owned(), method);
    }
    env.insert("MASTER_ADDR".to_owned(), address);
    env.insert("MASTER_PORT".to_owned(), port);
    environment::tell_interface(context, &mut env);
    // Intel MPI binds ranks to cores, and asks each host whether it shall.
    env.insert("I_MPI_PIN".to_owned(), "off".to_owned());
    let mut env = environment::with_user(context, env)?;
    if !INTERFACES.iter().any(|name| env.contains_key(*name)) {
        env.insert(INTERFACES[1].to_owned(), EXCLUDED.to_owned());
    }
    Ok(env)
}

/// The lines of hosts with their numbers of processes, in the form that Open MPI reads and in the form that Hydra does: MPICH's starter, and
/// Intel's. Neither takes an address twice: nodes of one machine may have the same.
pub fn host_files<'a>(slots: impl Iterator<Item = (&'a str, usize)>) -> (String, String) {
    let (mut order, mut sums) = (Vec::new(), BTreeMap::new());
    let mut seen = BTreeSet::new();
    for (address, slots) in slots {
        *sums.entry(address).or_insert(0) += slots;
        if seen.insert(address) {
            order.push(address);
        }
    }
    let open_mpi = order.iter().map(|address| {
        let slots = sums[address];
        format!("{address} slots={slots} max-slots={slots}\n")
    });
    let hydra = order.iter();
    let hydra = hydra.map(|address| format!("{address}:{}\n", sums[address]));
    (open_mpi.collect(), hydra.collect())
}
