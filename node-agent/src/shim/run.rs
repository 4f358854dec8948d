//! The shim's loop, and the life of an attempt on one host.
//!
//! ```text
//! Preparing -> Ready -> Running -> Ending -> (exit record written)
//!     \          \_________________^
//!      \___________________________|   stop, failure, wall clock, all ranks done
//! ```

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use batchai_common::crash_point;
use batchai_common::limits;
use batchai_common::time::{boot_millis, boot_time};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use super::children::{StartError, start_failure};
use super::container::{Coming, Room};
use super::copier::{self, Copier};
use super::gpus::Looker;
use super::logs::{Drained, ExecutionLog, Stream};
use super::process::Rights;
use super::secrets::{Handed, Secrets};
use super::volumes::Volumes;
use super::{ShimError, ports, prepare, process, system};
use crate::journal::{AttemptDir, LAUNCH, LOGS, MOUNT_LOST, PREPARE, STATUS, STOP};
use crate::launch::{Keys, Preparation, ProcessPlan};
use crate::lease::Fence;
use crate::status::{FailureRecord, Phase, RankStatus, Status};

/// While processes are being ended the loop looks this often.
const ENDING_STEP: Duration = Duration::from_millis(20);
/// The rank numbers of the process that makes directories, and of the preparation command.
pub(super) const SETUP: i32 = -2;
pub(super) const PREPARATION: i32 = -1;
/// That of the process that makes the container.
pub(super) const CONTAINER: i32 = -3;
/// Kept free for the records of the attempt, should its logs fill the disk.
pub(super) const RESERVE: &str = "reserve";
const RESERVE_BYTES: usize = 64 << 10;
/// The lease is looked at this often at least.
const FENCE_LOOK: Duration = Duration::from_secs(1);
/// A record that could not be written is tried again this often.
pub(super) const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// So many processes are started before it is looked at what they print.
const STARTS_UNREAD_MAX: usize = 16;
/// What is waited for beside streams: signals and files of the agent's.
const OTHERS: usize = 2;

/// What the attempt's processes get on their way out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
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

pub(super) struct Running {
    pub rank: i32,
    pub pid: i32,
    /// The name of the log file of its standard error; empty for helpers.
    pub stderr: String,
}

pub struct Shim {
    pub(super) dir: AttemptDir,
    pub(super) plan: Preparation,
    /// They are nowhere but here, and in the environment of the job's processes.
    secrets: Secrets,
    /// They are handed on to what mounts its volumes.
    pub(super) keys: Keys,
    pub(super) status: Status,
    pub(super) log: ExecutionLog,
    pub(super) running: Vec<Running>,
    pub(super) streams: Vec<Stream>,
    pub(super) ending: Ending,
    /// When the wall clock is over.
    pub(super) deadline: Duration,
    /// The node's lease, where it is bound to that.
    pub(super) fence: Fence,
    /// It was over.
    pub(super) fenced_off: bool,
    pub(super) launched: bool,
    /// The status on disk is not the latest.
    pub(super) unsaid: bool,
    pub(super) copier: Option<Copier>,
    pub(super) volumes: Volumes,
    pub(super) looker: Option<Looker>,
    /// Who serves what the job's nodes share, where this node does.
    pub(super) server: Option<Child>,
    /// By it the job's image is pulled.
    pub(super) password: Option<String>,
    pub(super) coming: Option<Coming>,
    /// What all processes of the job are in, where that is a container.
    pub(super) room: Option<Room>,
    /// The arguments that lead to this program's own subcommands.
    pub(super) own: Vec<String>,
    /// What its processes may have open, as it was before the shim took more for itself.
    pub(super) open_files: Option<(u64, u64)>,
    pub(super) signals: SignalFd,
    pub(super) inotify: Inotify,
}

impl Shim {
    pub fn new(dir: AttemptDir, handed: Handed, own: Vec<String>) -> Result<Shim, ShimError> {
        let plan: Preparation = dir.read(PREPARE)?.ok_or(ShimError::NoPlan)?;
        let signals = super::take_signals()?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        let inotify = inotify.map_err(system("inotify"))?;
        let changes = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
        inotify
            .add_watch(&dir.path, changes)
            .map_err(system("inotify"))?;
        std::fs::write(dir.path.join(RESERVE), vec![0; RESERVE_BYTES])
            .map_err(system("reserve space"))?;
        let log = ExecutionLog::new(dir.path.join(LOGS).join(&plan.execution_log));
        let deadline = boot_time() + Duration::from_secs(plan.wall_clock_s);
        Ok(Shim {
            dir,
            plan,
            secrets: handed.variables,
            keys: handed.keys,
            password: handed.password,
            coming: None,
            room: None,
            status: Status::default(),
            log,
            running: Vec::new(),
            streams: Vec::new(),
            ending: Ending::No,
            deadline,
            fence: Fence::default(),
            fenced_off: false,
            launched: false,
            unsaid: false,
            copier: None,
            looker: None,
            volumes: Volumes::None,
            server: None,
            own,
            open_files: limits::raise_open_files().ok(),
            signals,
            inotify,
        })
    }

    /// Runs the attempt to its end and writes the exit record.
    pub fn run(mut self) -> Result<(), ShimError> {
        self.prepare()?;
        let mut buffer = Vec::new();
        while !self.over() {
            let readable = self.wait()?;
            // Before anything is begun: it may have stood still until now.
            self.watch_the_fence();
            // Before children are looked for: one that ends later sends another signal.
            let told = self.take_signals();
            self.drain(&mut buffer, |at| readable.get(at).is_some_and(|it| *it));
            if told {
                // Before the ranks are counted: a machine that shuts down tells them as well.
                self.stopped();
            }
            self.reap(&mut buffer)?;
            self.watch_looker();
            self.obey()?;
            self.watch_the_clock();
            self.drive_ending();
            if self.unsaid {
                self.publish();
            }
        }
        self.finish(&mut buffer)
    }

    fn prepare(&mut self) -> Result<(), ShimError> {
        if self.dir.has(STOP) {
            self.end("it was told to end before it began");
            return Ok(());
        }
        self.log.say("preparing");
        if !self.plan.mount_points.is_empty() {
            self.volumes = Volumes::Directories;
        }
        self.make_directories();
        Ok(())
    }

    /// Has directories made: all of them; or those that are mounted on, and then, when everything is mounted, the others.
    pub(super) fn make_directories(&mut self) {
        let part = match self.volumes {
            Volumes::None => prepare::Part::All,
            Volumes::Directories => prepare::Part::BeforeMounts,
            Volumes::Mounting(_) | Volumes::Mounted(_) => prepare::Part::AfterMounts,
        };
        let (dir, plan) = (self.dir.clone(), self.plan.clone());
        match process::helper((plan.group.as_ref(), &plan.bounds), || {
            prepare::run(&dir, &plan, part)
        }) {
            Ok(pid) => {
                crash_point!("shim_forked_its_helper");
                self.running.push(Running {
                    rank: SETUP,
                    pid,
                    stderr: String::new(),
                });
                self.publish();
            }
            Err(error) => self.fail(FailureRecord {
                code: "ShimFailed".into(),
                message: format!("cannot start a process: {error}"),
                infrastructure: true,
                ..FailureRecord::default()
            }),
        }
    }

    pub(super) fn ready(&mut self) {
        self.log.say("ready; waiting for the other nodes");
        self.status.phase = Phase::Ready;
        crash_point!("shim_is_ready");
        self.publish();
        crash_point!("shim_said_it_is_ready");
    }

    /// Waits for a signal, a file of the agent's, output, or the next time to look. Returns which of the streams have something:
    /// where many ranks print, looking at all of them each time would cost more than what they print.
    fn wait(&self) -> Result<Vec<bool>, ShimError> {
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
            Ending::No => {
                let looker = self.looker.as_ref().and_then(Looker::left);
                let deadline = self.deadline.saturating_sub(boot_time());
                looker.map_or(deadline, |left| left.min(deadline))
            }
            _ if !self.status.stuck.is_empty() => WRITE_AGAIN,
            _ => ENDING_STEP,
        };
        let fenced = self.plan.fence.is_some() && !self.is_killed();
        // Polling does not count the time for which a machine is suspended, and leases do.
        let left = |left: i64| Duration::from_millis(u64::try_from(left).unwrap_or_default());
        let fence = fenced.then(|| left(self.fence.left(boot_millis())).min(FENCE_LOOK));
        let timeout = fence.map_or(timeout, |fence| fence.min(timeout));
        let timeout = if self.unsaid {
            timeout.min(WRITE_AGAIN)
        } else {
            timeout
        };
        // Never zero, so that a deadline is past when it is looked at; poll takes no more than some weeks.
        let timeout = timeout.as_millis().clamp(1, i32::MAX as u128) as i32;
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(system("poll")(error)),
        }
        let streams = fds.iter().skip(OTHERS);
        // An error is read, too, as is the end.
        let readable = streams.map(|fd| fd.revents().is_none_or(|events| !events.is_empty()));
        Ok(readable.collect())
    }

    /// Whether one of the signals says to end.
    fn take_signals(&mut self) -> bool {
        let mut told = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            told |= signal.ssi_signo == Signal::SIGTERM as u32;
        }
        told
    }

    /// Takes what those of the streams have that are asked for.
    pub(super) fn drain(&mut self, buffer: &mut Vec<u8>, asked: impl Fn(usize) -> bool) {
        let log = &self.log;
        let mut at = 0;
        self.streams.retain_mut(|stream| {
            at += 1;
            if !asked(at - 1) {
                return true;
            }
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

    /// Does what the agent's files and signals say.
    fn obey(&mut self) -> Result<(), ShimError> {
        while self
            .inotify
            .read_events()
            .is_ok_and(|events| !events.is_empty())
        {}
        if !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        self.look_at_mounts()?;
        if !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        if let Some(failure) = self.dir.read::<FailureRecord>(MOUNT_LOST)? {
            self.fail(failure);
            return Ok(());
        }
        match self.dir.read::<bool>(STOP)? {
            Some(true) => self.stopped(),
            Some(false) => self.end("it was told to end"),
            None if self.status.phase == Phase::Ready && !self.launched && self.dir.has(LAUNCH) => {
                self.launched = true;
                self.launch()?;
            }
            None => {}
        }
        Ok(())
    }

    /// The node ends, by its agent's word or the machine's: the job is not to blame.
    fn stopped(&mut self) {
        if matches!(self.ending, Ending::No) {
            self.fail(FailureRecord {
                code: "NodeStopped".into(),
                message: "the node was stopped while the job ran".into(),
                infrastructure: true,
                ..FailureRecord::default()
            });
        }
    }

    pub(super) fn launch(&mut self) -> Result<(), ShimError> {
        let processes: Vec<ProcessPlan> = self.dir.read(LAUNCH)?.unwrap_or_default();
        self.status.phase = Phase::Running;
        if let Some(port) = ports::in_use(&self.plan.ports) {
            self.fail(ports::clash(port));
            return Ok(());
        }
        let mut buffer = Vec::new();
        for (at, plan) in processes.iter().enumerate() {
            if at % STARTS_UNREAD_MAX == STARTS_UNREAD_MAX - 1 {
                // What the first ones print does not wait for the last ones to start.
                self.drain(&mut buffer, |_| true);
            }
            match self.start(plan) {
                Ok(pid) => {
                    self.log.say(&format!(
                        "rank {} started as {pid}: {:?}",
                        plan.rank, plan.argv
                    ));
                    let rank = RankStatus {
                        rank: plan.rank,
                        pid,
                        ..RankStatus::default()
                    };
                    self.status.ranks.push(rank);
                }
                Err(error) => {
                    self.fail(start_failure("JobFailed", plan, error));
                    return Ok(());
                }
            }
        }
        if processes.is_empty() {
            self.log
                .say("no process runs on this node; it waits until the job is over");
        }
        crash_point!("shim_launched");
        self.publish();
        crash_point!("shim_said_it_launched");
        Ok(())
    }

    pub(super) fn start(&mut self, plan: &ProcessPlan) -> Result<i32, StartError> {
        let logs = self.dir.path.join(LOGS);
        let rights = Rights {
            group: self.plan.group.as_ref(),
            bounds: &self.plan.bounds,
            open_files: self.open_files,
            limits: &self.plan.limits,
            user: self.plan.user.as_ref(),
            may_gain: self.plan.may_gain,
            room: self.room.as_ref(),
        };
        let started = process::start(plan, &self.secrets, rights).map_err(StartError::Program)?;
        crash_point!("shim_forked_a_rank", plan.rank >= 0);
        self.running.push(Running {
            rank: plan.rank,
            pid: started.pid,
            stderr: plan.stderr.clone(),
        });
        for (pipe, file) in [
            (started.stdout, &plan.stdout),
            (started.stderr, &plan.stderr),
        ] {
            let stream = Stream::new(pipe, &logs.join(file), self.plan.log_limit)
                .map_err(StartError::Log)?;
            self.streams.push(stream);
        }
        Ok(started.pid)
    }

    fn watch_the_clock(&mut self) {
        if !matches!(self.ending, Ending::No) || boot_time() < self.deadline {
            return;
        }
        let seconds = self.plan.wall_clock_s;
        self.fail(FailureRecord {
            code: "JobWallClockTimeExceeded".into(),
            message: format!(
                "the job took longer than its maxWallClockTime of {seconds} s, and was ended; if it only needs more time, give it more"
            ),
            details: vec![("seconds".into(), seconds.to_string())],
            ends_job: true,
            ..FailureRecord::default()
        });
    }

    pub(super) fn fail(&mut self, failure: FailureRecord) {
        let message = failure.message.clone();
        self.status.failure.get_or_insert(failure);
        self.publish();
        self.end(&message);
    }

    pub(super) fn start_copier(&mut self) {
        let (from, to) = (self.dir.path.join(LOGS), PathBuf::from(&self.plan.copy_to));
        match copier::start(&from, &to, self.plan.user.as_ref()) {
            Ok(copier) => self.copier = Some(copier),
            Err(error) => self.log.say(&format!("log files are not copied: {error}")),
        }
    }

    /// Says how things are; where that cannot be written now, later.
    pub(super) fn publish(&mut self) {
        let written = self.dir.write(STATUS, &self.status, false);
        self.unsaid = written.is_err();
        if let Err(error) = written {
            super::tell(&format!("the status cannot be written: {error}"));
        }
    }
}
