//! PURE. A Chainer job: the script in every process that mpirun starts, for ChainerMN.
//!
//! A process sees all GPUs of its host, and takes that of `comm.intra_rank`.

use batchai_proto::v1::ChainerSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan};

pub fn processes(
    context: &Context<'_>,
    settings: &ChainerSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let script = Script {
        interpreter: &settings.python_interpreter_path,
        path: &settings.python_script_file_path,
        arguments: &settings.command_line_args,
    };
    mpi::of_script(context, settings.process_count, &script)
}
