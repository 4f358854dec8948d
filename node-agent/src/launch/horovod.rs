//! PURE. A Horovod job: the script in every process that mpirun starts; Horovod finds its ranks by MPI.
//!
//! A process sees all GPUs of its host, and takes that of `hvd.local_rank()`.

use batchai_proto::v1::HorovodSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan};

pub fn processes(
    context: &Context<'_>,
    settings: &HorovodSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let script = Script {
        interpreter: &settings.python_interpreter_path,
        path: &settings.python_script_file_path,
        arguments: &settings.command_line_args,
    };
    mpi::of_script(context, settings.process_count, &script)
}
