//! PURE. A Horovod job: the script in every rank, as for the toolkits of MPI; Horovod finds its ranks by MPI, or by gloo.
//!
//! Which of them is found out on the master when it starts (`horovod.sh`): gloo where there is no mpirun on the job's PATH, where Horovod says
//! that it was built without MPI, or where the job sets `HOROVOD_CONTROLLER=gloo`; else mpirun, and so in any case where it sets `mpi`. Over gloo
//! the master does what `horovodrun` would (`horovod_gloo.py`), with Horovod's own server for their meeting, at the port that the job was given (a free
//! one where the job has taken that itself) and for the addresses of its hosts only; but ranks have the environment that the agent of their
//! host gives them, where `horovodrun` writes the master's, secrets and all, on command lines, and ssh is the job's. Directory, log files and end are
//! as by mpirun: those of the master's process, and the first rank that fails ends all. `HOROVOD_GLOO_IFACE` names the interface of each host's
//! address, but Horovod 0.28 forgets it on the way: hosts' own names must lead to the addresses that they are registered by, and the first rank of one
//! whose does not says so. Horovod's client of that server knows IPv4 only.
//!
//! A process sees all GPUs of its host, and takes that of `hvd.local_rank()`. Horovod's elastic jobs are not started.

use batchai_proto::v1::HorovodSettings;

use super::mpi::{self, Script};
use super::{Context, LaunchError, ProcessPlan, expand};

const CHOICE: &str = include_str!("horovod.sh");
const GLOO: &str = include_str!("horovod_gloo.py");

/// Who was built with both may have gloo as what is taken where nothing is said, and would be as many trainings as there are ranks of mpirun.
const BY_MPI: &str = "export HOROVOD_CONTROLLER=\"${HOROVOD_CONTROLLER:-mpi}\"\n";

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
    let (python, gloo) = (script.interpreter(context, &known)?, expand::literal(GLOO));
    let port = mpi::master(context)?.port;
    let starter = format!(
        "set -- \"$1\" \"$2\" {python} {gloo} {port}\n{CHOICE}{}",
        mpi::STARTER
    );
    let command_line = format!("{BY_MPI}{}", script.command_line(context, &known)?);
    mpi::started_by(&starter, context, settings.process_count, &command_line)
}
