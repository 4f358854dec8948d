//! PURE. A custom MPI job: a bash command line in every process that mpirun starts. Each sees all GPUs of its host.

use batchai_proto::v1::CustomMpiSettings;

use super::{Context, LaunchError, ProcessPlan, mpi};

pub fn processes(
    context: &Context<'_>,
    settings: &CustomMpiSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    mpi::processes(context, settings.process_count, &settings.command_line)
}
