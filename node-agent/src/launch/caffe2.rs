//! PURE. A Caffe2 job: the script once on every node.
//!
//! A process finds its node's number in `AZ_BATCHAI_TASK_INDEX`, and meets the others in files below `AZ_BATCHAI_SHARED_JOB_TEMP`, which the
//! original's recipes pass as `--shard_id` and `--file_store_path`. Nodes of other machines mount that directory (see `shared`): such files are
//! made by renaming, and so seen whole. The one process of a node sees all of its GPUs. gloo is told the interface of the node's address. Files are `stdout-{i}.txt` and
//! `stderr-{i}.txt`. The job is over when all processes are, or one fails.

use batchai_proto::v1::Caffe2Settings;

use super::{
    Context, LaunchError, ProcessPlan, environment, host_number, rank_count, ranks, script,
};

pub fn processes(
    context: &Context<'_>,
    settings: &Caffe2Settings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let hosts = context.assignment.hosts.len();
    let index = host_number(context);
    let total = rank_count(context.job, hosts);
    let own = ranks(total, hosts, index);
    let process = |rank: usize| -> Result<ProcessPlan, LaunchError> {
        let env = environment::of_rank(context, rank, total, &own)?;
        let env = environment::with_user(context, env)?;
        let paths = (
            &*settings.python_script_file_path,
            &*settings.python_interpreter_path,
        );
        let arguments = ("command_line_args", &*settings.command_line_args);
        Ok(ProcessPlan {
            rank: rank as i32,
            argv: script::argv(context, paths, arguments, &env)?,
            env,
            cwd: context.paths.job_temp.clone(),
            stdout: format!("stdout-{rank}.txt"),
            stderr: format!("stderr-{rank}.txt"),
        })
    };
    own.clone().map(process).collect()
}
