//! How the processes of an attempt end, and what follows from that; also where one of them does not even start.

use std::io;

use batchai_common::{crash_point, signals};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::logs::last_words;
use super::run::{CONTAINER, Ending, PREPARATION, Running, SETUP, Shim};
use super::volumes::Volumes;
use super::{ShimError, system};
use crate::cgroups::Bound;
use crate::journal::{LOGS, SETUP_FAILED};
use crate::launch::ProcessPlan;
use crate::status::FailureRecord;

/// How a process ended.
#[derive(Clone, Copy)]
struct Exit {
    /// 128 + n for signal n.
    code: i32,
    signal: Option<i32>,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let code = self.code;
        match self.signal {
            None => write!(out, "ended with exit code {code}"),
            Some(signal) => {
                let name = signals::name(signal).unwrap_or("a signal");
                write!(out, "was ended by {name}, which counts as exit code {code}")
            }
        }
    }
}

/// Why a process does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("{0}")]
    Program(io::Error),
    /// Its log files cannot be made.
    #[error("its log file cannot be made: {0}")]
    Log(io::Error),
}

impl Shim {
    /// Takes in the exits of ranks, and buries orphans.
    pub(super) fn reap(&mut self, buffer: &mut Vec<u8>) -> Result<(), ShimError> {
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), Exit { code, signal: None }),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    let (code, signal) = (128 + signal as i32, Some(signal as i32));
                    (pid.as_raw(), Exit { code, signal })
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => return Err(system("waitpid")(error)),
            };
            if self.copier.as_ref().is_some_and(|copier| copier.pid == pid) {
                self.copier = None;
                let to = &self.plan.copy_to;
                self.log
                    .say(&format!("log files are not copied to {to} any more"));
            }
            if self.looker.as_ref().is_some_and(|looker| looker.pid == pid) {
                self.looked_at_gpus(exit.code, &exit.to_string())?;
            }
            if self.volumes.holder() == Some(pid) {
                self.mounts_lost()?;
            }
            if self.server.as_ref().is_some_and(|it| it.id() as i32 == pid) {
                self.serving_lost()?;
            }
            let Some(at) = self.running.iter().position(|running| running.pid == pid) else {
                continue;
            };
            let Running { rank, stderr, .. } = self.running.remove(at);
            // What it printed last is in the file before anyone hears that it ended.
            self.drain(buffer, |_| true);
            match rank {
                SETUP => self.set_up(exit)?,
                CONTAINER => self.furnished(exit, &stderr),
                PREPARATION => self.prepared(exit, &stderr),
                rank => self.rank_ended(rank, exit, &stderr),
            }
        }
    }

    /// Directories are there, or could not be made.
    fn set_up(&mut self, exit: Exit) -> Result<(), ShimError> {
        if !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        if exit.code != 0 {
            let unsaid = FailureRecord {
                code: "JobDirectoryFailed".into(),
                message: format!("the process that makes the job's directories {exit}"),
                infrastructure: true,
                ..FailureRecord::default()
            };
            let said = self.dir.read(SETUP_FAILED)?;
            let failure = self.out_of_memory(exit, None, "").or(said);
            self.fail(failure.unwrap_or(unsaid));
            return Ok(());
        }
        self.serve();
        if !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        if matches!(self.volumes, Volumes::Directories) {
            self.mount();
            return Ok(());
        }
        self.start_copier();
        match self.plan.container.clone() {
            Some(container) => self.furnish(&container),
            None => self.begin_preparation(),
        }
        Ok(())
    }

    /// The container is there, or could not be made.
    fn furnished(&mut self, exit: Exit, stderr: &str) {
        if !matches!(self.ending, Ending::No) {
            return;
        }
        match self.take_room(&exit.to_string(), stderr) {
            Ok(()) => self.begin_preparation(),
            Err(failure) => self.fail(failure),
        }
    }

    fn begin_preparation(&mut self) {
        match self.plan.command.clone() {
            Some(command) => {
                self.log.say(&format!(
                    "running the preparation command: {:?}",
                    command.argv
                ));
                if let Err(error) = self.start(&command) {
                    self.fail(start_failure("JobPreparationFailed", &command, error));
                }
                crash_point!("shim_forked_the_preparation");
            }
            None => self.ready_with_gpus(),
        }
    }

    fn prepared(&mut self, exit: Exit, stderr: &str) {
        self.log.say(&format!("the preparation command {exit}"));
        match (exit.code, self.ending) {
            (0, Ending::No) => self.ready_with_gpus(),
            (code, Ending::No) => {
                let mut details = vec![("exitCode".to_owned(), code.to_string())];
                let signal = exit.signal.and_then(signals::name);
                if let Some(signal) = signal.or_else(|| signals::of_exit_code(code)) {
                    details.push(("signal".to_owned(), signal.to_owned()));
                }
                details.push(("stderr".to_owned(), self.last_words(stderr)));
                if let Some(failure) = self.out_of_memory(exit, None, stderr) {
                    return self.fail(failure);
                }
                self.fail(FailureRecord {
                    code: "JobPreparationFailed".into(),
                    message: format!(
                        "the job preparation command {exit}; the job's own did not begin"
                    ),
                    details,
                    exit_code: Some(code),
                    ..FailureRecord::default()
                });
            }
            _ => {}
        }
    }

    fn rank_ended(&mut self, rank: i32, exit: Exit, stderr: &str) {
        self.log.say(&format!("rank {rank} {exit}"));
        // What ends because it is told to has nothing to say about why.
        let first = self.status.first_failed.is_none() && matches!(self.ending, Ending::No);
        // Why it failed is known then: no process is to be named that did so by itself.
        let starved = self
            .out_of_memory(exit, Some(rank), stderr)
            .filter(|_| first);
        if exit.code != 0 && first && starved.is_none() {
            self.status.first_failed = Some(rank);
            self.status.last_words = self.last_words(stderr);
        }
        let mut ranks = self.status.ranks.iter_mut();
        if let Some(status) = ranks.find(|status| status.rank == rank) {
            status.exit_code = Some(exit.code);
            status.signal = exit.signal;
        }
        crash_point!("shim_saw_a_rank_end");
        if let Some(failure) = starved {
            return self.fail(failure);
        }
        self.publish();
        crash_point!("shim_said_a_rank_ended");
        match (self.running.is_empty(), self.is_serving()) {
            (true, false) => self.end("all ranks of this node have ended"),
            (true, true) => self
                .log
                .say("all ranks of this node have ended; others may need what it serves until the job is over"),
            _ => {}
        }
    }

    /// What failed where the kernel had killed for want of memory did so for that: the process itself was, or one of its own.
    fn out_of_memory(&self, exit: Exit, rank: Option<i32>, stderr: &str) -> Option<FailureRecord> {
        let kills: u64 = self.plan.bounds.iter().map(Bound::kills).sum();
        if exit.code == 0 || kills == 0 {
            return None;
        }
        let who = rank.map_or("what prepares the job".to_owned(), |rank| {
            format!("rank {rank}")
        });
        let limit = self.plan.bounds.iter().find_map(Bound::memory_mib);
        let why = match &limit {
            Some(limit) => format!(
                "the job's processes on this node need more memory than its resourceLimits.memoryMib of {limit} MiB"
            ),
            None => "the machine ran out of memory".to_owned(),
        };
        let mut details = vec![
            ("exitCode".to_owned(), exit.code.to_string()),
            ("killed".to_owned(), kills.to_string()),
        ];
        details.extend(rank.map(|rank| ("rank".to_owned(), rank.to_string())));
        details.extend(limit.map(|limit| ("limitMib".to_owned(), limit)));
        if !stderr.is_empty() {
            details.push(("stderr".to_owned(), self.last_words(stderr)));
        }
        Some(FailureRecord {
            code: "JobOutOfMemory".into(),
            message: format!("{why}, and the kernel killed: {who} {exit}"),
            details,
            exit_code: Some(exit.code),
            ..FailureRecord::default()
        })
    }

    pub(super) fn last_words(&self, file: &str) -> String {
        last_words(&self.dir.path.join(LOGS).join(file))
    }
}

/// A program that cannot be started fails the run, with the exit codes of a shell; that the node cannot keep its logs does not.
pub(super) fn start_failure(code: &str, plan: &ProcessPlan, error: StartError) -> FailureRecord {
    let program = plan.argv.first().cloned().unwrap_or_default();
    let message = format!("cannot start {program}: {error}");
    let mut details = vec![
        ("program".to_owned(), program),
        ("error".to_owned(), error.to_string()),
    ];
    let source = match error {
        StartError::Program(source) => source,
        StartError::Log(_) => {
            return FailureRecord {
                code: "ShimFailed".into(),
                message,
                details,
                infrastructure: true,
                ..FailureRecord::default()
            };
        }
    };
    let exit_code = match source.kind() {
        io::ErrorKind::NotFound => 127,
        _ => 126,
    };
    details.push(("exitCode".to_owned(), exit_code.to_string()));
    if plan.rank != PREPARATION {
        details.push(("rank".to_owned(), plan.rank.to_string()));
    }
    FailureRecord {
        code: code.to_owned(),
        message,
        details,
        exit_code: Some(exit_code),
        ..FailureRecord::default()
    }
}
