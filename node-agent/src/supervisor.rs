//! Closes the gap between a node's assignments and its journal: scans, asks `reconcile` what to do, does it, reports.
//!
//! It holds nothing that matters: who dies here and starts again goes on from the journal.

mod volumes;

use std::collections::{HashMap, HashSet};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use batchai_common::crash_point;
use batchai_common::limits::STUCK_MAX;
use batchai_common::time::boot_millis;
use batchai_proto::agent::v1::{
    Assignment, AssignmentList, AttemptObservation, Host, Report, Stray, StrayList,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::bundles::{Bundles, Have};
use crate::file_servers::FileServers;
use crate::journal::{
    AttemptDir, Journal, JournalError, LAUNCH, MOUNT_LOST, ORIGIN, Origin, PREPARE, STARTED,
    STATUS, STOP,
};
use crate::launch::{HostFacts, plan};
use crate::logs::Shipped;
use crate::memory;
use crate::peers::{Key, TOKEN};
use crate::reconcile::{Action, Local, actions, observations, strays};
use crate::shim;
use crate::status::{FailureRecord, Phase, Status};
use crate::watch::Watch;
use volumes::Mounted;
pub use volumes::{TAG as MOUNTS_TAG, Volumes};

/// Everything is looked at this often, whatever wakes or does not wake the loop.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A shim that fails before it begins is not started more often than this.
const STARTS_MAX: u32 = 3;

/// It is not the job's fault.
const SHIM_FAILED: &str = "ShimFailed";

/// The loop and what it needs.
pub struct Supervisor {
    pub journal: Arc<Journal>,
    pub watch: Arc<Watch>,
    pub facts: HostFacts,
    pub shipped: Shipped,
    pub bundles: Bundles,
    pub volumes: Volumes,
    pub file_servers: FileServers,
    /// The arguments that lead to this program's own subcommands.
    pub own: &'static [&'static str],
    /// By it the processes of an attempt show that they are.
    pub key: Key,
    pub assignments: watch::Receiver<Option<AssignmentList>>,
    /// Until when fenced work may run, in milliseconds of the boot clock.
    pub leased: watch::Receiver<i64>,
    pub observed: watch::Sender<Report>,
    /// Shims that this agent started and that have not ended.
    pub children: HashMap<String, std::process::Child>,
    pub starts: HashMap<String, u32>,
    /// Lost attempts of which no process is left.
    pub swept: HashSet<String>,
    /// What is left of lost attempts that SIGKILL does not end.
    pub unswept: HashMap<String, Vec<i32>>,
}

impl Supervisor {
    /// Runs until the token is cancelled. Jobs go on without it.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut interval = tokio::time::interval(LOOK_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wake = self.watch.clone();
            tokio::select! {
                () = wake.status.notified() => {}
                changed = self.assignments.changed() => if changed.is_err() { return },
                // What waits for a lease begins at once.
                changed = self.leased.changed() => if changed.is_err() { return },
                _ = interval.tick() => {}
                () = shutdown.cancelled() => return,
            }
            // It waits for the disk: heartbeats go on beside it.
            if let Err(error) = tokio::task::block_in_place(|| self.look()) {
                tracing::error!(%error, "the journal cannot be used");
            }
        }
    }

    fn look(&mut self) -> Result<(), JournalError> {
        // Before the list: a lease that is newer than it says nothing about what it names.
        let leased = *self.leased.borrow_and_update() > boot_millis();
        // Before there was a first list nobody knows what is wanted: nothing is ended, only reported.
        let told = self.assignments.borrow_and_update().clone();
        let known = told.is_some();
        let mut list = told.unwrap_or_default();
        let (mut local, unread) = self.scan()?;
        if known {
            if let Err(error) = self.volumes.look(list.mounts.as_ref()) {
                // Jobs go on, and begin, without it.
                tracing::error!(%error, "mounts of clusters are not looked after");
            }
            if let Some(lost) = self.volumes.lost() {
                self.end_by(&lost, &list.assignments, &local)?;
            }
            if let Err(error) = self.file_servers.look(&list) {
                tracing::error!(%error, "file servers are not looked after");
            }
            // About what cannot be looked at nothing is done and nothing is said: it may well run.
            list.assignments
                .retain(|wanted| !unread.contains(&wanted.attempt));
            let mut todo = actions(&list, &local, leased);
            if !unread.is_empty() {
                todo.retain(|action| !matches!(action, Action::Start(_)));
            }
            for action in &todo {
                if let Err(error) = self.act(action, &list.assignments) {
                    tracing::error!(%error, ?action, "cannot be done; it is tried again");
                }
            }
            if !todo.is_empty() {
                let again = self.scan()?;
                local = again.0;
                list.assignments
                    .retain(|wanted| !again.1.contains(&wanted.attempt));
            }
        }
        let strays = known.then(|| self.strays(&list, &local)).transpose()?;
        let attempts = observations(&list, &local);
        let seen = Report {
            attempts,
            strays,
            mounts: self.volumes.report(),
            file_servers: self.file_servers.report(),
        };
        crash_point!(
            "agent_saw_an_end",
            local.iter().any(|found| {
                found
                    .status
                    .as_ref()
                    .is_some_and(|status| status.phase == Phase::Ended)
            })
        );
        self.observed.send_if_modified(|known| {
            let changed = *known != seen;
            *known = seen;
            changed
        });
        Ok(())
    }

    /// Tells the jobs that run here that what is mounted for their cluster is lost. What sets the node up waits for it.
    fn end_by(
        &self,
        lost: &FailureRecord,
        desired: &[Assignment],
        local: &[Local],
    ) -> Result<(), JournalError> {
        for found in local.iter().filter(|found| found.shim) {
            let wanted = desired
                .iter()
                .find(|wanted| wanted.attempt == found.attempt);
            let dir = self.journal.attempt(&found.attempt);
            let Some(dir) = dir.filter(|_| wanted.is_some_and(|wanted| !wanted.set_up)) else {
                continue;
            };
            if !dir.has(MOUNT_LOST) {
                dir.write(MOUNT_LOST, lost, false)?;
            }
        }
        Ok(())
    }

    /// What is here of before a restore, and whose it is.
    fn strays(&self, list: &AssignmentList, local: &[Local]) -> Result<StrayList, JournalError> {
        let stray = |seen: AttemptObservation| {
            let dir = self.journal.attempt(&seen.attempt);
            let origin = dir.map(|dir| dir.read::<Origin>(ORIGIN)).transpose()?;
            let origin = origin.flatten().unwrap_or_default();
            let host = |(node, port)| Host {
                node,
                port,
                ..Host::default()
            };
            Ok(Stray {
                seen: Some(seen),
                job: origin.job,
                job_uid: origin.job_uid,
                hosts: origin.hosts.into_iter().map(host).collect(),
                set_up: origin.set_up,
            })
        };
        let strays = strays(list, local).into_iter().map(stray);
        Ok(StrayList {
            epoch: list.epoch,
            strays: strays.collect::<Result<_, JournalError>>()?,
        })
    }

    fn reap(&mut self) {
        self.children.retain(|attempt, child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                if !status.success() {
                    tracing::warn!(attempt, %status, "a shim failed; its directory has a shim.log");
                }
                false
            }
            Err(error) => {
                tracing::error!(attempt, %error, "a shim cannot be waited for");
                false
            }
        });
    }

    /// What the journal shows, and the attempts that cannot be looked at.
    fn scan(&mut self) -> Result<(Vec<Local>, Vec<String>), JournalError> {
        self.reap();
        let (mut local, mut unread) = (Vec::new(), Vec::new());
        for dir in self.journal.attempts()? {
            match self.scan_attempt(&dir) {
                Ok(found) => local.push(found),
                Err(error) => {
                    tracing::error!(%error, attempt = dir.id(), "cannot be looked at");
                    unread.push(dir.id());
                }
            }
        }
        Ok((local, unread))
    }

    fn scan_attempt(&self, dir: &AttemptDir) -> Result<Local, JournalError> {
        let attempt = dir.id();
        // In this order. A shim takes its lock before it begins: what has begun and is not locked is over. And it
        // leaves its record before its lock.
        let started = dir.has(STARTED);
        let shim = dir.shim()?.is_some() || self.children.contains_key(&attempt);
        let status: Option<Status> = match dir.read(STATUS) {
            // A power cut leaves such a file: nobody knows any more how it ended.
            Err(JournalError::Unreadable { path, .. }) => {
                tracing::warn!(path = %path.display(), "unreadable");
                None
            }
            status => status?,
        };
        let swept = self.swept.contains(&attempt);
        let status = match status {
            Some(ended) if ended.phase == Phase::Ended => Some(ended),
            // Lost, and nothing of it runs: what its shim has written is all there will be.
            status if started && !shim && swept => Some(Status {
                files: dir.logs()?,
                ..status.unwrap_or_default()
            }),
            status => status,
        };
        Ok(Local {
            shim,
            started,
            status,
            launch_written: dir.has(LAUNCH),
            stop_written: dir.has(STOP),
            swept,
            shipped: self.shipped.is_done(dir)?,
            unswept: self.unswept.get(&attempt).cloned().unwrap_or_default(),
            attempt,
        })
    }

    fn act(&mut self, action: &Action, desired: &[Assignment]) -> Result<(), JournalError> {
        let (Action::Start(id)
        | Action::Launch(id)
        | Action::Stop(id)
        | Action::Sweep(id)
        | Action::Forget(id)) = action;
        let Some(dir) = self.journal.attempt(id) else {
            tracing::error!(
                attempt = id,
                "the coordinator sent an attempt id that is none"
            );
            return Ok(());
        };
        let assignment = desired.iter().find(|assignment| &assignment.attempt == id);
        match (action, assignment) {
            (Action::Start(_), Some(assignment)) => self.start(&dir, assignment),
            (Action::Launch(_), Some(assignment)) => self.launch(&dir, assignment),
            (Action::Stop(_), _) => {
                crash_point!("agent_is_to_stop");
                stop(&dir)?;
                crash_point!("agent_stopped");
                Ok(())
            }
            (Action::Sweep(_), _) => {
                self.sweep(&dir, id);
                Ok(())
            }
            (Action::Forget(_), _) => {
                dir.remove()?;
                self.starts.remove(id);
                self.swept.remove(id);
                self.unswept.remove(id);
                self.shipped.forget(id);
                Ok(())
            }
            (Action::Start(_) | Action::Launch(_), None) => Ok(()),
        }
    }

    fn start(&mut self, dir: &AttemptDir, assignment: &Assignment) -> Result<(), JournalError> {
        let bundle = assignment.job.as_ref().map_or("", |job| &job.bundle);
        let have = match bundle {
            "" => Have::Yes,
            bundle => self.bundles.look_for(bundle, &dir.id()),
        };
        if have == Have::NotYet {
            return Ok(());
        }
        let mounted = match assignment.set_up {
            true => self.volumes.look_for(&dir.id())?,
            false => Mounted::Yes,
        };
        if mounted == Mounted::NotYet {
            return Ok(());
        }
        dir.create()?;
        crash_point!("agent_made_a_directory");
        if let Err(error) = self.watch.add(dir) {
            tracing::warn!(%error, "changes of an attempt are noticed late");
        }
        if !assignment.fault.is_empty() {
            return refuse(dir, "JobSecretsFailed", assignment.fault.clone());
        }
        if let Have::Never(why) = have {
            let message = format!("the job's bundle cannot be had: {why}");
            return refuse(dir, "JobBundleFailed", message);
        }
        if let Mounted::Never(failure) = mounted {
            return refuse(dir, &failure.code, failure.message);
        }
        let starts = self.starts.entry(dir.id()).or_default();
        *starts += 1;
        if *starts > STARTS_MAX {
            let message = "the shim does not start; the agent's log says why".to_owned();
            return refuse(dir, SHIM_FAILED, message);
        }
        // The whole plan is made now, so that what makes no sense is said before anything runs.
        let plan = match plan(assignment, &self.facts) {
            Ok(plan) => plan,
            Err(error) => return refuse(dir, "JobStartRefused", error.to_string()),
        };
        dir.write(ORIGIN, &origin(assignment), true)?;
        self.volumes.write_down(dir, &plan.mounts)?;
        dir.write(PREPARE, &plan.preparation, true)?;
        crash_point!("agent_wrote_a_plan");
        let mut secrets = shim::secrets_of(assignment);
        let token = self.key.token(&dir.id());
        secrets.variables.insert(TOKEN.to_owned(), token);
        match self.spawn(dir, &secrets) {
            Ok(child) => {
                crash_point!("agent_started_a_shim");
                self.children.insert(dir.id(), child);
            }
            Err(error) => tracing::error!(%error, attempt = dir.id(), "a shim cannot be started"),
        }
        Ok(())
    }

    fn spawn(
        &self,
        dir: &AttemptDir,
        secrets: &shim::Handed,
    ) -> std::io::Result<std::process::Child> {
        let log = std::fs::File::create(dir.path.join("shim.log"))?;
        // The very file that this agent runs, even if it was replaced meanwhile.
        Command::new("/proc/self/exe")
            .arg0("batchai-shim")
            .args(self.own)
            .arg("shim")
            .arg(&dir.path)
            // It lives longer than the token needs to be known.
            .env_remove("BATCHAI_JOIN_TOKEN")
            .stdin(memory::hand_over(secrets)?)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
    }

    fn launch(&self, dir: &AttemptDir, assignment: &Assignment) -> Result<(), JournalError> {
        match plan(assignment, &self.facts) {
            Ok(plan) => {
                crash_point!("agent_is_to_launch");
                dir.write(LAUNCH, &plan.processes, false)?;
                crash_point!("agent_launched");
                Ok(())
            }
            // It was planned once already, from the same assignment.
            Err(error) => {
                tracing::error!(%error, attempt = dir.id(), "cannot be launched");
                stop(dir)
            }
        }
    }

    fn sweep(&mut self, dir: &AttemptDir, id: &str) {
        let swept = shim::sweep(&self.journal, &self.facts.node_uid, |attempt| attempt != id);
        // Also where something does not die: it may wait for what is mounted.
        let clean = self.volumes.is_clean(dir);
        match swept {
            Ok(()) if !clean => {}
            Ok(()) => {
                crash_point!("agent_swept");
                self.swept.insert(id.to_owned());
                self.unswept.remove(id);
            }
            Err(error) => {
                tracing::error!(%error, attempt = id, "an attempt is not gone");
                if let shim::SweepError::Left(pids) = error {
                    let pids = pids.into_iter().take(STUCK_MAX).collect();
                    self.unswept.insert(id.to_owned(), pids);
                }
            }
        }
    }
}

fn origin(assignment: &Assignment) -> Origin {
    let job = assignment.job.clone().unwrap_or_default();
    let hosts = assignment.hosts.iter();
    Origin {
        job: job.name,
        job_uid: job.uid,
        hosts: hosts.map(|host| (host.node.clone(), host.port)).collect(),
        set_up: assignment.set_up,
    }
}

/// Tells a shim to end its attempt; by a signal, where the file that says so cannot be written.
fn stop(dir: &AttemptDir) -> Result<(), JournalError> {
    dir.write(STOP, &false, true)
        .or_else(|error| match dir.shim()? {
            Some(pid) if kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok() => Ok(()),
            _ => Err(error),
        })
}

/// Ends an attempt that never began. What the job is to blame for would be refused again: it is no failed run.
fn refuse(dir: &AttemptDir, code: &str, message: String) -> Result<(), JournalError> {
    // Taken for good, so that no shim begins it after all; unless one has.
    if !dir.begin()? {
        return Ok(());
    }
    let infrastructure = code == SHIM_FAILED;
    let status = Status {
        phase: Phase::Ended,
        failure: Some(FailureRecord {
            infrastructure,
            ends_job: !infrastructure,
            code: code.to_owned(),
            message,
            ..FailureRecord::default()
        }),
        ..Status::default()
    };
    dir.write(STATUS, &status, true)
}
