//! Whether the GPUs that a job was given on this host are free there: what is no job may use them too, and then both fail in ways that say
//! nothing of it.
//!
//! Looked at once, when the host is prepared and before it says that it is ready, by a process of its own: a driver may not answer. What computes there and is no
//! process of a job keeps the job from beginning; what only draws does not, nor does what serves all who compute (CUDA's MPS). Jobs of
//! other agents on this machine do not count either: whoever runs several there has them share its GPUs. Nothing is held against what comes later.

use std::fs;
use std::time::Duration;

use batchai_common::time::boot_time;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::run::{Ending, Shim};
use super::{ShimError, process, tree};
use crate::cgroups::Group;
use crate::hardware;
use crate::journal::SETUP_FAILED;
use crate::launch::{ATTEMPT_TAG, Device};
use crate::status::FailureRecord;

/// What has just ended, or is about to, may have a GPU for a moment.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(250);
/// Whom the kernel is to end has ended by then, or is stuck in it.
const END_MAX: Duration = Duration::from_secs(2);
/// What the kernel calls the server of MPS: it has no room for more.
const MPS: &str = "nvidia-cuda-mps";

/// Who looks at the GPUs. It may be stuck in the driver, where no signal ends it: nobody waits for it longer than until then.
pub struct Looker {
    pub pid: i32,
    until: Duration,
    given_up: bool,
}

impl Looker {
    /// How long it is waited for still.
    pub fn left(&self) -> Option<Duration> {
        (!self.given_up).then(|| self.until.saturating_sub(boot_time()))
    }
}

impl Shim {
    /// Is ready, once the GPUs are free: when all nodes are, all of theirs have been.
    pub(super) fn ready_with_gpus(&mut self) {
        let gpus = self.plan.gpus.clone();
        if gpus.is_empty() {
            return self.ready();
        }
        let (dir, group) = (self.dir.clone(), self.plan.group.clone());
        let shim = std::process::id() as i32;
        let is_ours = |pid| {
            tree::descendants(shim, &[]).contains(&pid)
                || group
                    .iter()
                    .flat_map(Group::processes)
                    .any(|own| own == pid)
                || is_of_a_job(pid)
        };
        let work = || {
            let Err(failure) = until_free(&gpus, is_ours) else {
                return 0;
            };
            if let Err(error) = dir.write(SETUP_FAILED, &failure, false) {
                super::tell(&format!("{}: {error}", failure.message));
            }
            1
        };
        // Not in the job's group: that is to be empty some day.
        match process::helper((None, &[]), work) {
            Ok(pid) => {
                self.looker = Some(Looker {
                    pid,
                    until: boot_time() + PATIENCE + hardware::ANSWER_MAX + END_MAX,
                    given_up: false,
                });
            }
            Err(error) => self.fail(unknown(&format!("no process can be started: {error}"))),
        }
    }

    /// Who looked at them has ended: with a code that is not 0, or by a signal, where they are not free or nobody can tell.
    pub(super) fn looked_at_gpus(&mut self, code: i32, how: &str) -> Result<(), ShimError> {
        let looker = self.looker.take();
        if looker.is_none_or(|looker| looker.given_up) || !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        if code == 0 {
            self.ready();
            return Ok(());
        }
        let said = self.dir.read(SETUP_FAILED)?;
        let why = format!("{}: the process that asks {how}", no_answer());
        self.fail(said.unwrap_or_else(|| unknown(&why)));
        Ok(())
    }

    /// Waits no longer for who has had its time, or looks for an attempt that ends.
    pub(super) fn watch_looker(&mut self) {
        let ends = !matches!(self.ending, Ending::No);
        let Some(looker) = &mut self.looker else {
            return;
        };
        if looker.left().is_some_and(|left| ends || left.is_zero()) {
            looker.given_up = true;
            let _ = kill(Pid::from_raw(looker.pid), Signal::SIGKILL);
            if !ends {
                let why = format!("{}, and whoever asks does not end", no_answer());
                self.fail(unknown(&why));
            }
        }
    }
}

fn no_answer() -> String {
    let s = hardware::ANSWER_MAX.as_secs();
    format!("a driver gives no answer within {s} s, or breaks")
}

/// Waits until nobody else uses them, a little.
fn until_free(gpus: &[Device], is_ours: impl Fn(i32) -> bool) -> Result<(), FailureRecord> {
    let until = boot_time() + PATIENCE;
    loop {
        hardware::answer_in_time();
        let used = hardware::used(gpus).map_err(|error| unknown(&error))?;
        let mut foreign = used.into_iter().filter(|(_, pid)| !is_ours(*pid));
        match foreign.next() {
            None => return Ok(()),
            Some((gpu, pid)) if boot_time() >= until => return Err(in_use(gpu, pid)),
            Some(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Whether a process is of some attempt of an agent of this machine, or serves those. One that cannot be looked at is of somebody else.
fn is_of_a_job(pid: i32) -> bool {
    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let tag = format!("{ATTEMPT_TAG}=");
    let mut variables = environ.split(|byte| *byte == 0);
    variables.any(|variable| variable.starts_with(tag.as_bytes())) || program(pid).starts_with(MPS)
}

/// What the kernel calls it. It is not trusted: a process names itself.
fn program(pid: i32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    let plain = |c: char| if c.is_control() { '?' } else { c };
    name.trim_end_matches('\n').chars().map(plain).collect()
}

fn in_use(gpu: &Device, pid: i32) -> FailureRecord {
    let (maker, number, uuid) = (gpu.maker.name(), gpu.number, &gpu.uuid);
    let program = program(pid);
    let who = match program.as_str() {
        // Of another namespace, or just ended and not yet forgotten by the driver.
        "" => format!("process {pid}, which cannot be seen from here"),
        program => format!("process {pid} ({program})"),
    };
    FailureRecord {
        code: "GpuInUse".into(),
        message: format!(
            "GPU {number} of {maker} on this node ({uuid}) is in use by {who}, which is of no job: end it, or take the node out of its \
             cluster as long as it runs"
        ),
        details: vec![
            ("gpu".into(), uuid.clone()),
            ("pid".into(), pid.to_string()),
            ("program".into(), program),
        ],
        infrastructure: true,
        ..FailureRecord::default()
    }
}

fn unknown(why: &str) -> FailureRecord {
    FailureRecord {
        code: "GpuUnavailable".into(),
        message: format!(
            "the GPUs that this node registered cannot be used: {why}; where nvidia-smi on the node (rocm-smi for AMD's) finds nothing wrong \
             with them, restart the agent"
        ),
        details: vec![("error".into(), why.to_owned())],
        infrastructure: true,
        ..FailureRecord::default()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// Ended with the test.
    struct Sleeper(Child);

    impl Sleeper {
        fn start(variables: &[(&str, &str)]) -> Sleeper {
            let mut command = Command::new("sleep");
            command.arg("600").envs(variables.iter().copied());
            let sleeper = Sleeper(command.stdin(Stdio::null()).spawn().unwrap());
            // Between two programs of a process its environment is not to be seen.
            let environ = format!("/proc/{}/environ", sleeper.pid());
            while fs::read(&environ).unwrap().is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            sleeper
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn jobs_of_other_agents_share_and_what_is_no_job_does_not() {
        let job = Sleeper::start(&[(ATTEMPT_TAG, "another-node/1-7")]);
        let other = Sleeper::start(&[("NOT_BATCHAI_ATTEMPT", "x")]);
        assert!(is_of_a_job(job.pid()));
        assert!(!is_of_a_job(other.pid()));
        // Nobody has that number.
        assert!(!is_of_a_job(i32::MAX));
    }

    #[test]
    fn who_has_a_gpu_is_named_and_not_believed() {
        let gpu = Device {
            maker: crate::launch::Maker::Nvidia,
            number: 3,
            uuid: "GPU-3".into(),
        };
        let other = Sleeper::start(&[]);
        let failure = in_use(&gpu, other.pid());
        let expected = format!(
            "GPU 3 of NVIDIA on this node (GPU-3) is in use by process {} (sleep)",
            other.pid()
        );
        assert!(
            failure.message.starts_with(&expected),
            "{}",
            failure.message
        );
        assert!(failure.infrastructure);
        let gone = in_use(&gpu, i32::MAX).message;
        assert!(gone.contains("cannot be seen from here"), "{gone}");
        let name = std::thread::Builder::new().name("a\nb\u{1b}".into());
        let told = name
            .spawn(|| program(nix::unistd::gettid().as_raw()))
            .unwrap();
        assert_eq!(told.join().unwrap(), "a?b?");
    }
}
