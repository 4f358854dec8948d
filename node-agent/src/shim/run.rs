//! The shim's loop, and the life of an attempt on one host.
//!
//! ```text
//! Preparing -> Ready -> Running -> Ending -> (exit record written)
//!     \          \_________________^
//!      \___________________________|   stop, failure, wall clock, all ranks done
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use batchai_common::time::boot_time;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::logs::{Drained, ExecutionLog, Stream};
use super::{ShimError, prepare, process, system, tree};
use crate::journal::{AttemptDir, LAUNCH, LOGS, PREPARE, STATUS, STOP};
use crate::launch::{Preparation, ProcessPlan};
use crate::status::{FailureRecord, Phase, RankStatus, Status};

/// While processes are being ended the loop looks this often.
const ENDING_STEP: Duration = Duration::from_millis(20);
/// Processes that SIGKILL does not end within this time are stuck in the kernel.
const KILL_MAX: Duration = Duration::from_secs(30);
/// How long the last copy of the logs may take.
const COPY_MAX: Duration = Duration::from_secs(30);
/// The rank number of the preparation command.
const PREPARATION: i32 = -1;

/// What the attempt's processes get on their way out.
#[derive(Clone, Copy, Debug)]
enum Ending {
    No,
    /// SIGTERM was sent; SIGKILL follows at this time.
    Asked {
        until: Duration,
    },
    /// SIGKILL is being sent until this time.
    Killed {
        until: Duration,
    },
}

struct Running {
    rank: i32,
    pid: i32,
}

pub struct Shim {
    dir: AttemptDir,
    /// The arguments that lead to this program's own subcommands.
    own: Vec<&'static str>,
    plan: Preparation,
    status: Status,
    log: ExecutionLog,
    running: Vec<Running>,
    streams: Vec<Stream>,
    ending: Ending,
    /// When the wall clock is over.
    deadline: Duration,
    launched: bool,
    copier: Option<Child>,
    signals: SignalFd,
    inotify: Inotify,
}

impl Shim {
    pub fn new(dir: AttemptDir, own: &[&'static str]) -> Result<Shim, ShimError> {
        let plan: Preparation = dir.read(PREPARE)?.ok_or(ShimError::NoPlan)?;
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
        ] {
            mask.add(signal);
        }
        mask.thread_block().map_err(system("block signals"))?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags).map_err(system("signalfd"))?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        let inotify = inotify.map_err(system("inotify"))?;
        let changes = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
        inotify
            .add_watch(&dir.path, changes)
            .map_err(system("inotify"))?;
        let log = ExecutionLog::new(dir.path.join(LOGS).join(&plan.execution_log));
        let deadline = boot_time() + Duration::from_secs(plan.wall_clock_s);
        Ok(Shim {
            dir,
            own: own.to_vec(),
            plan,
            status: Status::default(),
            log,
            running: Vec::new(),
            streams: Vec::new(),
            ending: Ending::No,
            deadline,
            launched: false,
            copier: None,
            signals,
            inotify,
        })
    }

    /// Runs the attempt to its end and writes the exit record.
    pub fn run(mut self) -> Result<(), ShimError> {
        self.prepare()?;
        let mut buffer = Vec::new();
        while !self.over() {
            self.wait()?;
            // Before children are looked for: one that ends later sends another signal.
            let told = self.take_signals();
            self.drain(&mut buffer);
            self.reap(&mut buffer)?;
            self.obey(told)?;
            self.watch_the_clock()?;
            self.drive_ending()?;
        }
        self.finish(&mut buffer)
    }

    fn prepare(&mut self) -> Result<(), ShimError> {
        if self.dir.has(STOP) {
            return self.end("it was told to end before it began");
        }
        self.log.say("preparing");
        if let Err(failure) = prepare::prepare(&self.plan) {
            return self.fail(failure);
        }
        self.start_copier();
        match self.plan.command.clone() {
            Some(command) => {
                self.log.say(&format!(
                    "running the preparation command: {:?}",
                    command.argv
                ));
                if let Err(error) = self.start(&command) {
                    return self.fail(start_failure("JobPreparationFailed", &command, &error));
                }
                self.publish()
            }
            None => self.ready(),
        }
    }

    fn ready(&mut self) -> Result<(), ShimError> {
        self.log.say("ready; waiting for the other nodes");
        self.status.phase = Phase::Ready;
        self.publish()
    }

    /// Waits for a signal, a file of the agent's, output, or the next time to look.
    fn wait(&self) -> Result<(), ShimError> {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.streams
                .iter()
                .map(|s| PollFd::new(s.fd(), PollFlags::POLLIN)),
        );
        let timeout = match self.ending {
            Ending::No => self.deadline.saturating_sub(boot_time()),
            _ => ENDING_STEP,
        };
        // Never zero, so that a deadline is past when it is looked at; poll takes no more than some weeks.
        let timeout = timeout.as_millis().clamp(1, i32::MAX as u128) as i32;
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(system("poll")(error)),
        }
    }

    /// Whether one of the signals says to end.
    fn take_signals(&mut self) -> bool {
        let mut told = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            told |= signal.ssi_signo == Signal::SIGTERM as u32;
        }
        told
    }

    fn drain(&mut self, buffer: &mut Vec<u8>) {
        let log = &self.log;
        self.streams.retain_mut(|stream| {
            let before = stream.failure().is_some();
            let drained = stream.drain(buffer);
            if let (false, Some(error)) = (before, stream.failure()) {
                log.say(&format!(
                    "a log file cannot be written, output is lost: {error}"
                ));
            }
            drained == Drained::Empty
        });
    }

    /// Takes in the exits of ranks, and buries orphans.
    fn reap(&mut self, buffer: &mut Vec<u8>) -> Result<(), ShimError> {
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => return Err(system("waitpid")(error)),
            };
            if self
                .copier
                .as_ref()
                .is_some_and(|copier| copier.id() as i32 == pid)
            {
                self.copier = None;
                self.log.say(&format!(
                    "log files are not copied to {} any more",
                    self.plan.copy_to
                ));
            }
            let Some(at) = self.running.iter().position(|running| running.pid == pid) else {
                continue;
            };
            let rank = self.running.remove(at).rank;
            // What it printed last is in the file before anyone hears that it ended.
            self.drain(buffer);
            match rank {
                PREPARATION => self.prepared(code)?,
                rank => self.rank_ended(rank, code)?,
            }
        }
    }

    fn prepared(&mut self, code: i32) -> Result<(), ShimError> {
        self.log.say(&format!(
            "the preparation command ended with exit code {code}"
        ));
        match (code, self.ending) {
            (0, Ending::No) => self.ready(),
            (_, Ending::No) => self.fail(FailureRecord {
                code: "JobPreparationFailed".into(),
                message: format!("the job preparation command failed with exit code {code}"),
                details: vec![("exitCode".into(), code.to_string())],
                exit_code: Some(code),
                ..FailureRecord::default()
            }),
            _ => Ok(()),
        }
    }

    fn rank_ended(&mut self, rank: i32, code: i32) -> Result<(), ShimError> {
        self.log
            .say(&format!("rank {rank} ended with exit code {code}"));
        if let Some(status) = self
            .status
            .ranks
            .iter_mut()
            .find(|status| status.rank == rank)
        {
            status.exit_code = Some(code);
        }
        self.publish()?;
        match self.running.is_empty() {
            true => self.end("all ranks of this node have ended"),
            false => Ok(()),
        }
    }

    /// Does what the agent's files and signals say.
    fn obey(&mut self, told: bool) -> Result<(), ShimError> {
        while self
            .inotify
            .read_events()
            .is_ok_and(|events| !events.is_empty())
        {}
        if !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        if told || self.dir.has(STOP) {
            return self.end("it was told to end");
        }
        if self.status.phase == Phase::Ready
            && !self.launched
            && let Some(processes) = self.dir.read::<Vec<ProcessPlan>>(LAUNCH)?
        {
            self.launched = true;
            return self.launch(&processes);
        }
        Ok(())
    }

    fn launch(&mut self, processes: &[ProcessPlan]) -> Result<(), ShimError> {
        self.status.phase = Phase::Running;
        for plan in processes {
            match self.start(plan) {
                Ok(pid) => {
                    self.log.say(&format!(
                        "rank {} started as {pid}: {:?}",
                        plan.rank, plan.argv
                    ));
                    let rank = RankStatus {
                        rank: plan.rank,
                        pid,
                        exit_code: None,
                    };
                    self.status.ranks.push(rank);
                }
                Err(error) => return self.fail(start_failure("JobFailed", plan, &error)),
            }
        }
        if processes.is_empty() {
            self.log
                .say("no process runs on this node; it waits until the job is over");
        }
        self.publish()
    }

    fn start(&mut self, plan: &ProcessPlan) -> io::Result<i32> {
        let logs = self.dir.path.join(LOGS);
        let started = process::start(plan)?;
        self.running.push(Running {
            rank: plan.rank,
            pid: started.pid,
        });
        self.streams
            .push(Stream::new(started.stdout, &logs.join(&plan.stdout))?);
        self.streams
            .push(Stream::new(started.stderr, &logs.join(&plan.stderr))?);
        Ok(started.pid)
    }

    fn watch_the_clock(&mut self) -> Result<(), ShimError> {
        if !matches!(self.ending, Ending::No) || boot_time() < self.deadline {
            return Ok(());
        }
        let seconds = self.plan.wall_clock_s;
        self.fail(FailureRecord {
            code: "JobWallClockTimeExceeded".into(),
            message: format!("the job took longer than its maxWallClockTime of {seconds} s"),
            details: vec![("seconds".into(), seconds.to_string())],
            ..FailureRecord::default()
        })
    }

    fn fail(&mut self, failure: FailureRecord) -> Result<(), ShimError> {
        let message = failure.message.clone();
        self.status.failure.get_or_insert(failure);
        self.publish()?;
        self.end(&message)
    }

    /// Begins to end everything: SIGTERM, then after the grace SIGKILL.
    fn end(&mut self, why: &str) -> Result<(), ShimError> {
        if !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        self.log.say(&format!("ending: {why}"));
        tree::signal_all(&self.tree(), Signal::SIGTERM);
        self.ending = Ending::Asked {
            until: boot_time() + Duration::from_secs(self.plan.grace_s),
        };
        Ok(())
    }

    fn drive_ending(&mut self) -> Result<(), ShimError> {
        let now = boot_time();
        match self.ending {
            Ending::Asked { until } if now >= until => {
                self.log.say("the grace is over: killing what is left");
                self.ending = Ending::Killed {
                    until: now + KILL_MAX,
                };
            }
            Ending::Killed { until } => {
                let left = self.tree();
                // Stopped first, so that none of them can start another while the others are killed.
                tree::signal_all(&left, Signal::SIGSTOP);
                tree::signal_all(&left, Signal::SIGKILL);
                if now >= until && !left.is_empty() && self.status.failure.is_none() {
                    self.log
                        .say(&format!("processes that do not die: {left:?}"));
                    return self.fail(FailureRecord {
                        code: "ProcessesDoNotDie".into(),
                        message: format!("processes that do not die: {left:?}"),
                        details: vec![("pids".into(), format!("{left:?}"))],
                        ..FailureRecord::default()
                    });
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Everything that the attempt started and that has not ended.
    fn tree(&self) -> Vec<i32> {
        let copier = self.copier.as_ref().map(|child| child.id() as i32);
        tree::descendants(std::process::id() as i32, copier)
    }

    /// A node that is told to end, or whose ranks have, is done when nothing is left of them.
    fn over(&self) -> bool {
        !matches!(self.ending, Ending::No) && self.running.is_empty() && self.tree().is_empty()
    }

    fn start_copier(&mut self) {
        let child = Command::new("/proc/self/exe")
            .args(&self.own)
            .arg("copy-logs")
            .arg(self.dir.path.join(LOGS))
            .arg(PathBuf::from(&self.plan.copy_to))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        match child {
            Ok(child) => self.copier = Some(child),
            Err(error) => self.log.say(&format!("log files are not copied: {error}")),
        }
    }

    /// The last words: nothing of the attempt runs any more.
    fn finish(mut self, buffer: &mut Vec<u8>) -> Result<(), ShimError> {
        self.drain(buffer);
        self.streams.clear();
        self.log.say("ended");
        self.finish_copy();
        self.status.phase = Phase::Ended;
        self.status.files = self.dir.logs()?;
        Ok(self.dir.write(STATUS, &self.status, true)?)
    }

    /// Lets the copier finish, but not for ever: it may hang on a dead mount.
    fn finish_copy(&mut self) {
        let Some(mut copier) = self.copier.take() else {
            return;
        };
        drop(copier.stdin.take());
        let until = boot_time() + COPY_MAX;
        loop {
            match copier.try_wait() {
                Ok(Some(status)) if status.success() => return,
                Ok(None) if boot_time() < until => std::thread::sleep(Duration::from_millis(2)),
                other => {
                    self.log.say(&format!(
                        "the log files could not all be copied to {}: {other:?}",
                        self.plan.copy_to
                    ));
                    // It may be stuck in the kernel; nobody waits for it.
                    let _ = copier.kill();
                    return;
                }
            }
        }
    }

    fn publish(&self) -> Result<(), ShimError> {
        Ok(self.dir.write(STATUS, &self.status, false)?)
    }
}

/// What a shell would say, with its exit codes.
fn start_failure(code: &str, plan: &ProcessPlan, error: &io::Error) -> FailureRecord {
    let program = plan.argv.first().cloned().unwrap_or_default();
    let exit_code = match error.kind() {
        io::ErrorKind::NotFound => 127,
        _ => 126,
    };
    FailureRecord {
        code: code.to_owned(),
        message: format!("cannot start {program}: {error}"),
        details: vec![
            ("program".into(), program),
            ("error".into(), error.to_string()),
        ],
        exit_code: Some(exit_code),
        ..FailureRecord::default()
    }
}
