//! PURE. A CNTK job: under mpirun, the script, or the `cntk` program with a BrainScript configuration.
//!
//! The program gets `configFile=` and then the job's arguments, which are `name=value` as a rule: `parallelTrain=true` is the user's to say.
//! A process sees all GPUs of its host; CNTK takes one that no other process has (`deviceId=auto`).

use batchai_proto::v1::CntkSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan};

pub fn processes(
    context: &Context<'_>,
    settings: &CntkSettings,
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
    let config = format!("configFile={}", settings.config_file_path);
    let program = [("cntk", "cntk"), ("config_file_path", config.as_str())];
    mpi::of_program(context, count, &program, &settings.command_line_args)
}
