//! PURE. A Horovod job: the script in every rank, as for the toolkits of MPI; Horovod finds its ranks by MPI, or by gloo.
//!
//! Which of them is found out on the master when it starts (`horovod.sh`): gloo where there is no mpirun on the job's PATH, where Horovod says
//! that it was built without MPI, or where the job sets `HOROVOD_CONTROLLER=gloo`; else mpirun. Over gloo the master does what `horovodrun` would
//! (`horovod_gloo.py`), with Horovod's own server for their meeting, at any free port; but ranks have the environment that the agent of their host gives
//! them, where `horovodrun` writes the master's, secrets and all, on command lines, and ssh is the job's. Directory, log files and end are as by
//! mpirun: those of the master's process, and the first rank that fails ends all. `HOROVOD_GLOO_IFACE` names the interface of each host's
//! address, but Horovod 0.28 forgets it on the way: hosts' own names must lead to addresses by which the others reach them, and a rank whose
//! does not is told so.
//!
//! A process sees all GPUs of its host, and takes that of `hvd.local_rank()`. Horovod's elastic jobs are not started.

use batchai_proto::v1::HorovodSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan, expand};

const CHOICE: &str = include_str!("horovod.sh");
const GLOO: &str = include_str!("horovod_gloo.py");

pub fn processes(
    context: &Context<'_>,
    settings: &HorovodSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let script = Script {
        interpreter: &settings.python_interpreter_path,
        path: &settings.python_script_file_path,
        arguments: &settings.command_line_args,
    };
    let known = mpi::known(context)?;
    let (python, gloo) = (script.interpreter(&known)?, expand::literal(GLOO));
    let starter = format!("python={python}\ngloo={gloo}\n{CHOICE}{}", mpi::STARTER);
    let command_line = script.command_line(&known)?;
    mpi::started_by(&starter, context, settings.process_count, &command_line)
}
