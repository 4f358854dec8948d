//! The directory that the job's nodes share, as this node serves it to those of other machines: by a process of its own (`nfs`), from the
//! time when the directory is there until everything of the attempt has ended here. It goes with the shim, however that ends.
//!
//! Whoever waits for it on the other nodes is theirs (see `mounts`).

use std::fs;
use std::io;
use std::process::Child;
use std::time::Duration;

use batchai_common::limits::TERMINATION_GRACE;
use batchai_common::time::boot_time;
use batchai_proto::shared::SHARED_JOB_TEMP;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::run::{Ending, Shim};
use super::{ports, process};
use crate::journal::{AttemptDir, JournalError, SHARED};
use crate::launch::Preparation;
use crate::launch::shared::{FAILED, Serve};
use crate::nfs;
use crate::status::FailureRecord;
use crate::user::with_files_of;

/// How long it is waited for other nodes to unmount it: they are told that the job is over when this one is, and have their grace.
const LINGER: Duration = TERMINATION_GRACE.saturating_add(Duration::from_secs(10));
/// It does what it is being asked for to its end, which takes less.
const LAST_CALLS_MAX: Duration = Duration::from_secs(15);
/// One that is killed has ended by then.
const DEATH_MAX: Duration = Duration::from_secs(1);
/// What is not removed by then, the next job removes.
const REMOVAL_MAX: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("its server cannot be started: {0}")]
    Start(io::Error),
}

impl Shim {
    /// Begins to serve the directory, which is there, where the plan says so and it is not served yet.
    pub(super) fn serve(&mut self) {
        let Some(serve) = self.plan.serve.clone().filter(|_| self.server.is_none()) else {
            return;
        };
        let Serve { node, listen, .. } = &serve;
        if let Some(port) = ports::in_use(&[listen.port()]) {
            return self.fail(ports::clash(port));
        }
        self.log.say(&format!(
            "serving {} at {listen} to {:?}",
            serve.directory, serve.clients
        ));
        match self.start_server(&serve) {
            Ok(child) => self.server = Some(child),
            Err(error) => {
                let message = format!("${SHARED_JOB_TEMP} cannot be served by {node}: {error}");
                self.fail(failed(message, true));
            }
        }
    }

    fn start_server(&self, serve: &Serve) -> Result<Child, ServeError> {
        let dir = server_dir(&self.dir);
        dir.create()?;
        dir.write(nfs::CONFIG, &config(&self.plan, serve), false)?;
        let own: Vec<_> = self.own.iter().map(String::as_str).collect();
        nfs::start(&own, &dir, true).map_err(ServeError::Start)
    }

    /// Other nodes need this one as long as the job runs anywhere: it does not end with its own processes.
    pub(super) fn is_serving(&self) -> bool {
        self.server.is_some()
    }

    /// Who serves it has ended: that was not to be.
    pub(super) fn serving_lost(&mut self) -> Result<(), JournalError> {
        self.server = None;
        let status: Option<nfs::Status> = server_dir(&self.dir).read(nfs::STATUS)?;
        let said = status.and_then(|status| status.error);
        let killed = said.is_none();
        let why = said.unwrap_or_else(|| "its server has ended".to_owned());
        let node = self.plan.serve.as_ref().map(|serve| serve.node.clone());
        let node = node.unwrap_or_default();
        if matches!(self.ending, Ending::No) {
            let message = format!("${SHARED_JOB_TEMP} cannot be served by {node}: {why}");
            self.fail(failed(message, killed));
        }
        Ok(())
    }

    /// Ends the server, and removes what it served: nothing of the job runs here any more. Other nodes have a moment to go before.
    pub(super) fn end_serving(&mut self) {
        let Some(serve) = self.plan.serve.clone() else {
            return;
        };
        if let Some(child) = self.server.take() {
            self.end_server(child);
        }
        let plan = &self.plan;
        // As the job's user, who may have put a link anywhere on the way there; and by a process that may be given up on.
        let removed = process::helper((None, &[]), || {
            let gone = with_files_of(plan.user.as_ref(), || fs::remove_dir_all(&serve.directory));
            let left = gone.is_err_and(|error| error.kind() != io::ErrorKind::NotFound);
            i32::from(left)
        });
        let removed = removed.map_err(|error| error.to_string());
        let removed = removed.and_then(|pid| process::await_end(pid, REMOVAL_MAX, &mut || false));
        if let Err(why) = removed {
            let directory = &serve.directory;
            self.log.say(&format!(
                "{directory} is left, the next job removes it: {why}"
            ));
        }
    }

    fn end_server(&mut self, mut child: Child) {
        let pid = Pid::from_raw(child.id() as i32);
        let until = boot_time() + LINGER + LAST_CALLS_MAX;
        // It may have ended just now.
        let _ = kill(pid, Signal::SIGTERM);
        // What may begin elsewhere by now is given no time.
        while boot_time() < until && !self.is_fenced_off() {
            match child.try_wait() {
                Ok(None) => std::thread::sleep(STEP),
                _ => return,
            }
        }
        self.log
            .say("what served other nodes does not end by itself: killing it");
        // It may have ended just now.
        let _ = child.kill();
        let until = boot_time() + DEATH_MAX;
        while boot_time() < until && matches!(child.try_wait(), Ok(None)) {
            std::thread::sleep(STEP);
        }
    }
}

fn server_dir(dir: &AttemptDir) -> AttemptDir {
    AttemptDir {
        path: dir.path.join(SHARED),
    }
}

/// All of it belongs to the job's user, by whatever number other nodes know him, and to root where the job runs as the agent does.
fn config(plan: &Preparation, serve: &Serve) -> nfs::Config {
    let user = plan.user.as_ref();
    let (squash_uid, squash_gid) = user.map_or((0, 0), |user| (user.uid, user.gid));
    nfs::Config {
        root: serve.directory.clone().into(),
        listen: serve.listen,
        generation: fastrand::u64(1..),
        clients: serve.clients.clone(),
        squash_uid,
        squash_gid,
        squash_all: true,
        linger_s: LINGER.as_secs(),
        any_port: false,
        backend: nfs::EMBEDDED.to_owned(),
    }
}

fn failed(message: String, infrastructure: bool) -> FailureRecord {
    FailureRecord {
        code: FAILED.to_owned(),
        message,
        infrastructure,
        ..FailureRecord::default()
    }
}
