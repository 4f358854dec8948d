//! A process that holds one command which somebody runs beside an attempt, or on a node: it starts it, and sees to it that nothing of it
//! is left when it has ended, who runs it is gone, the agent is, or the job is over.
//!
//! It passes nothing on: the command has the pipes, or the terminal, that the agent made. It tells how the command ended by its own exit
//! code. One thread, no tokio: free to fork, like the shim.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use batchai_common::shutdown;
use batchai_common::time::boot_time;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, getppid, setsid};
use serde::{Deserialize, Serialize};

use super::container::Room;
use super::process::{Rights, start_beside};
use super::{ShimError, group, system, tell, tree};
use crate::cgroups::{Bound, Group};
use crate::journal::{AttemptDir, STATUS, STOP};
use crate::launch::{JobLimit, JobUser};
use crate::status::{Phase, Status};

/// Whether its end has come is looked at this often.
const LOOK: Duration = Duration::from_millis(200);
/// While it is being ended.
const ENDING_STEP: Duration = Duration::from_millis(10);
/// What is hung up gets so long before it is killed; less where a job waits for that.
const GRACE: Duration = Duration::from_secs(1);
const GRACE_OF_JOBS: Duration = Duration::from_millis(300);
/// What does not die in this time is stuck in the kernel.
const KILL_MAX: Duration = Duration::from_secs(10);
/// The largest plan.
const PLAN_BYTES_MAX: u32 = 4 << 20;
/// The exit codes of a shell.
const NOT_FOUND: i32 = 127;
const NOT_STARTED: i32 = 126;
const OF_SIGNALS: i32 = 128;

/// What to run, and whose it is.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecPlan {
    pub argv: Vec<String>,
    /// All of its environment, secrets included: it is nowhere but in memory.
    pub env: BTreeMap<String, String>,
    pub cwd: String,
    /// Whom it runs as; the agent's own user where it is none.
    pub user: Option<JobUser>,
    pub limits: Vec<JobLimit>,
    /// The group of all of its processes: in that of the attempt, where it is beside one.
    pub group: Option<Group>,
    /// The groups of the attempt in which what its processes take together is limited.
    pub bounds: Vec<Bound>,
    /// It has a terminal, which is standard output here.
    pub terminal: bool,
    /// It reads what follows the plan.
    pub input: bool,
    /// The agent's process: it ends with that.
    pub agent: i32,
    /// It ends with the attempt whose directory this process is told.
    pub of_attempt: bool,
}

/// The words in which a plan is told: its length, and itself.
pub struct Words;

impl Words {
    /// What is written to the standard input of this process, before all else.
    pub fn of(plan: &ExecPlan) -> io::Result<Vec<u8>> {
        let text = serde_json::to_vec(plan)?;
        let length = u32::try_from(text.len()).map_err(io::Error::other)?;
        Ok([&length.to_be_bytes()[..], &text].concat())
    }

    /// Reads as far as the plan goes: what follows is the command's.
    fn read(mut from: impl io::Read) -> io::Result<ExecPlan> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_be_bytes(length).min(PLAN_BYTES_MAX);
        let mut text = vec![0; length as usize];
        from.read_exact(&mut text)?;
        // The error would quote what it cannot read.
        serde_json::from_slice(&text).map_err(|_| io::Error::other("the plan is unreadable"))
    }
}

/// Whether something may run beside an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// Its processes have not started.
    NotYet,
    Now,
    /// They are gone, or are to end.
    Over,
}

impl Beside {
    /// As things are on this host.
    pub fn of(dir: &AttemptDir) -> Beside {
        // In this order: a shim leaves its record before its lock.
        let held = matches!(dir.shim(), Ok(Some(_)));
        let Ok(Some(status)) = dir.read::<Status>(STATUS) else {
            return Beside::Over;
        };
        if !held || dir.has(STOP) {
            return Beside::Over;
        }
        let ranks = &status.ranks;
        let ended = !ranks.is_empty() && ranks.iter().all(|rank| rank.exit_code.is_some());
        match status.phase {
            _ if ended || status.failure.is_some() => Beside::Over,
            Phase::Preparing | Phase::Ready => Beside::NotYet,
            Phase::Running => Beside::Now,
            Phase::Ended => Beside::Over,
        }
    }
}

/// The process. What goes wrong is said to who runs the command.
pub fn main(dir: &Path) -> ExitCode {
    let code = match begin(dir) {
        Ok(code) => code,
        Err(error) => {
            tell(&format!("batchai: {error}"));
            NOT_STARTED
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

fn begin(dir: &Path) -> Result<i32, ShimError> {
    shutdown::keep_memory_private();
    // Unbuffered: not a byte more than the plan.
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let stdin = File::from(stdin.map_err(system("dup"))?);
    let plan = Words::read(&stdin).map_err(system("read what to run"))?;
    setsid().map_err(system("setsid"))?;
    // What the command leaves behind becomes a child of this process.
    prctl::set_child_subreaper(true).map_err(system("subreaper"))?;
    let signals = super::take_signals()?;
    if let Some(group) = &plan.group {
        group.create().map_err(system("make the group"))?;
    }
    let attempt = plan.of_attempt.then(|| AttemptDir {
        path: PathBuf::from(dir),
    });
    let room = attempt.as_ref().map(Room::of).transpose();
    let room = room.map_err(system("enter the container"))?.flatten();
    let child = match start(&plan, room.as_ref(), stdin) {
        Ok(child) => child,
        Err(error) => {
            leave(plan.group.as_ref(), plan.of_attempt);
            let program = plan.argv.first().map_or("", String::as_str);
            // A terminal in its first state shows the start of the next line below the end of this one.
            tell(&format!("batchai: cannot start {program}: {error}\r"));
            return Ok(match error.kind() {
                io::ErrorKind::NotFound => NOT_FOUND,
                _ => NOT_STARTED,
            });
        }
    };
    // Who reads its output learns of its end by the end of that.
    let nothing = File::options().read(true).write(true).open("/dev/null");
    let nothing = nothing.map_err(system("/dev/null"))?;
    dup2_stdin(&nothing).map_err(system("dup2"))?;
    dup2_stdout(&nothing).map_err(system("dup2"))?;
    dup2_stderr(&nothing).map_err(system("dup2"))?;
    let holder = Holder {
        agent: Pid::from_raw(plan.agent),
        child,
        signals,
        attempt,
        group: plan.group,
        code: None,
    };
    holder.run()
}

fn start(plan: &ExecPlan, room: Option<&Room>, stdin: File) -> io::Result<i32> {
    let mut env = plan.env.clone();
    // As the agent has it for the host.
    env.extend(room.map(|room| ("SHELL".to_owned(), room.shell().to_owned())));
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    let error = io::stderr().as_fd().try_clone_to_owned()?;
    let input = match (plan.terminal, plan.input) {
        (true, _) => Stdio::from(output.try_clone()?),
        (false, true) => Stdio::from(stdin),
        (false, false) => Stdio::null(),
    };
    let rights = Rights {
        group: plan.group.as_ref(),
        bounds: &plan.bounds,
        open_files: None,
        limits: &plan.limits,
        user: plan.user.as_ref(),
        may_gain: false,
        room,
    };
    let streams = [input, Stdio::from(output), Stdio::from(error)];
    let what = (&plan.argv[..], plan.cwd.as_str());
    start_beside(what, &env, streams, plan.terminal, rights)
}

/// The group is empty, or holds what does not die: then the agent ends it when it starts.
fn leave(made: Option<&Group>, of_attempt: bool) {
    let Some(made) = made else {
        return;
    };
    if let Err(error) = made.end() {
        tell(&format!("the group cannot be removed: {error}"));
    }
    // Those above it, should their own end have come before it was made.
    let above = made.path.ancestors().skip(1);
    for home in above.take(1 + usize::from(of_attempt)) {
        group::leave(home);
    }
}

/// What holds the command.
struct Holder {
    agent: Pid,
    child: i32,
    signals: SignalFd,
    attempt: Option<AttemptDir>,
    group: Option<Group>,
    /// How it ended.
    code: Option<i32>,
}

impl Holder {
    fn run(mut self) -> Result<i32, ShimError> {
        let grace = loop {
            self.wait(LOOK)?;
            let told = self.take_signals();
            self.reap()?;
            let attempt = self.attempt.as_ref().map(Beside::of);
            if attempt.is_some_and(|attempt| attempt != Beside::Now) {
                break GRACE_OF_JOBS;
            }
            // The agent tells by a signal that who runs it is gone, and by its own end that it is.
            if told || self.code.is_some() || getppid() != self.agent {
                break GRACE;
            }
        };
        self.end(grace)?;
        leave(self.group.as_ref(), self.attempt.is_some());
        Ok(self.code.unwrap_or(OF_SIGNALS + Signal::SIGKILL as i32))
    }

    fn wait(&self, most: Duration) -> Result<(), ShimError> {
        let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let most = PollTimeout::try_from(most.as_millis() as i32).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, most) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(system("poll")(error)),
        }
    }

    fn take_signals(&mut self) -> bool {
        let mut told = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            told |= signal.ssi_signo != Signal::SIGCHLD as u32;
        }
        told
    }

    fn reap(&mut self) -> Result<(), ShimError> {
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, OF_SIGNALS + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => return Err(system("waitpid")(error)),
            };
            if pid.as_raw() == self.child {
                self.code = Some(code);
            }
        }
    }

    /// Hangs up what is left, and kills what is left of that after a while, until nothing is.
    fn end(&mut self, grace: Duration) -> Result<(), ShimError> {
        let left = self.tree();
        tree::signal_all(&left, Signal::SIGHUP);
        // What is stopped hears nothing.
        tree::signal_all(&left, Signal::SIGCONT);
        let (mut left, begun) = (left, boot_time());
        while !left.is_empty() && boot_time() < begun + grace + KILL_MAX {
            if boot_time() >= begun + grace {
                self.kill(&left);
            }
            self.wait(ENDING_STEP)?;
            self.take_signals();
            self.reap()?;
            left = self.tree();
        }
        Ok(())
    }

    fn kill(&self, left: &[i32]) {
        if let Some(group) = &self.group
            && let Err(error) = group.kill()
        {
            tell(&format!("the group cannot be killed: {error}"));
        }
        // Stopped first, so that none of them can start another while the others are killed.
        tree::signal_all(left, Signal::SIGSTOP);
        tree::signal_all(left, Signal::SIGKILL);
    }

    /// Everything that the command started and that has not ended.
    fn tree(&self) -> Vec<i32> {
        let mut tree = tree::descendants(std::process::id() as i32, &[]);
        tree.extend(self.group.iter().flat_map(Group::processes));
        tree.sort_unstable();
        tree.dedup();
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_to_its_last_byte_and_no_further() {
        let plan = ExecPlan {
            argv: vec!["sh".to_owned()],
            env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            cwd: "/".to_owned(),
            user: None,
            limits: Vec::new(),
            group: None,
            bounds: Vec::new(),
            terminal: false,
            input: true,
            agent: 1,
            of_attempt: false,
        };
        let words = [&Words::of(&plan).unwrap()[..], b"the command's"].concat();
        let mut from = &words[..];
        let read = Words::read(&mut from).unwrap();
        assert_eq!((read.argv, read.env), (plan.argv, plan.env));
        assert_eq!(from, b"the command's");
        assert!(Words::read(&b"\xff\xff\xff\xff{}"[..]).is_err());
    }

    #[test]
    fn nothing_runs_beside_what_has_not_begun_or_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let dir = AttemptDir {
            path: dir.path().to_owned(),
        };
        assert_eq!(Beside::of(&dir), Beside::Over);
        // It runs, and nobody holds it any more.
        let status = Status {
            phase: Phase::Running,
            ..Status::default()
        };
        dir.write(STATUS, &status, false).unwrap();
        assert_eq!(Beside::of(&dir), Beside::Over);
    }
}
