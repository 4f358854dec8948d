//! PURE. A Caffe job: under mpirun, the script, or `caffe train` with a solver.
//!
//! The job's arguments follow, such as `--gpu=all` or `--snapshot=`. More than one process of `caffe train` is for builds of Caffe that have
//! MPI; the others would each train alone.
//! A process sees all GPUs of its host, and takes those that `--gpu` says.

use batchai_proto::v1::CaffeSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan};

pub fn processes(
    context: &Context<'_>,
    settings: &CaffeSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let count = settings.process_count;
    if settings.config_file_path.is_empty() {
        let script = Script {
            interpreter: &settings.python_interpreter_path,
            path: &settings.python_script_file_path,
            arguments: &settings.command_line_args,
        };
        return mpi::of_script(context, count, &script);
    }
    let solver = format!("--solver={}", settings.config_file_path);
    let program = [
        ("caffe", "caffe"),
        ("caffe", "train"),
        ("config_file_path", solver.as_str()),
    ];
    mpi::of_program(context, count, &program, &settings.command_line_args)
}
