//! PURE. A PyTorch job: the script once per rank, ranks numbered over the hosts in their order.
//!
//! A rank finds its place in the original's variables (`AZ_BATCHAI_TASK_INDEX`, `AZ_BATCHAI_PYTORCH_INIT_METHOD`, here
//! `tcp://` to rank 0's host) and in those that `env://` reads today (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...). A job that wants to meet in a
//! file says `file://$AZ_BATCHAI_SHARED_JOB_TEMP/NAME` in its arguments instead; PyTorch locks that file, and locks do not reach to other machines
//! (see `shared`): there it is to take one of the former. Every rank sees all GPUs of its node, and takes the one that `LOCAL_RANK` says, as
//! under torchrun. Log files are `stdout-{rank}.txt` and `stderr-{rank}.txt`. The job is over when all ranks are,
//! or one fails. With the backend `mpi` it is mpirun that starts the ranks, and all that is as for the toolkits of MPI.

use batchai_proto::v1::PyTorchSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan, environment, rank_count, ranks, script};

pub const INIT_METHOD: &str = "AZ_BATCHAI_PYTORCH_INIT_METHOD";

pub fn processes(
    context: &Context<'_>,
    settings: &PyTorchSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    if settings.communication_backend == mpi::BACKEND {
        let script = Script {
            interpreter: &settings.python_interpreter_path,
            path: &settings.python_script_file_path,
            arguments: &settings.command_line_args,
        };
        return mpi::of_script(context, settings.process_count, &script);
    }
    let hosts = &context.assignment.hosts;
    let index = usize::try_from(context.assignment.host_index).unwrap_or_default();
    let total = rank_count(context.job, hosts.len());
    let own = ranks(total, hosts.len(), index);
    own.clone()
        .map(|rank| process(context, settings, rank, total, &own))
        .collect()
}

fn process(
    context: &Context<'_>,
    settings: &PyTorchSettings,
    rank: usize,
    total: usize,
    own: &std::ops::Range<usize>,
) -> Result<ProcessPlan, LaunchError> {
    let mut env = environment::of_rank(context, rank, total, own)?;
    let init_method = init_method(&env["MASTER_ADDR"], &env["MASTER_PORT"]);
    env.insert(INIT_METHOD.into(), init_method);
    let env = environment::with_user(context, env)?;
    let paths = (
        &*settings.python_script_file_path,
        &*settings.python_interpreter_path,
    );
    let arguments = ("command_line_args", &*settings.command_line_args);
    let argv = script::argv(context, paths, arguments, &env)?;
    Ok(ProcessPlan {
        rank: rank as i32,
        argv,
        env,
        cwd: context.paths.job_temp.clone(),
        stdout: format!("stdout-{rank}.txt"),
        stderr: format!("stderr-{rank}.txt"),
    })
}

pub fn init_method(address: &str, port: &str) -> String {
    match address.contains(':') {
        true => format!("tcp://[{address}]:{port}"),
        false => format!("tcp://{address}:{port}"),
    }
}
