//! PURE. A custom job: one bash command line on the master; the other hosts are prepared and wait.
//!
//! The original's file names: `stdout.txt` and `stderr.txt`. The job is over when the command is.

use batchai_proto::v1::CustomToolkitSettings;

use super::{Context, LaunchError, ProcessPlan, bash, environment};

pub fn processes(
    context: &Context<'_>,
    settings: &CustomToolkitSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    if context.assignment.host_index != 0 {
        return Ok(Vec::new());
    }
    Ok(vec![ProcessPlan {
        rank: 0,
        argv: bash(&settings.command_line),
        env: environment::with_user(context, context.env.clone())?,
        cwd: context.paths.job_temp.clone(),
        stdout: "stdout.txt".into(),
        stderr: "stderr.txt".into(),
    }])
}
