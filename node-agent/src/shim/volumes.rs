//! The mounts of a job: held by a process of their own for as long as the job has processes, and gone before it is said that it has
//! ended.

use std::process::Child;
use std::time::Duration;

use batchai_common::time::boot_time;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::run::{Ending, Shim};
use super::tree;
use crate::journal::JournalError;
use crate::mounts::{self, Phase};
use crate::status::FailureRecord;

/// What a holder has left ends by then, or is stuck in the kernel.
const SERVERS_MAX: Duration = Duration::from_secs(5);
/// Getting what is mounted out of the way asks nobody.
const CLEAN_MAX: Duration = Duration::from_secs(30);

/// How far the mounts of a job are.
#[derive(Debug, Default)]
pub(super) enum Volumes {
    /// It has none.
    #[default]
    None,
    /// The directories that they are mounted on are being made.
    Directories,
    /// They are being mounted.
    Mounting(Child),
    Mounted(Child),
}

impl Volumes {
    /// Who holds them.
    pub fn holder(&self) -> Option<i32> {
        match self {
            Volumes::None | Volumes::Directories => None,
            Volumes::Mounting(child) | Volumes::Mounted(child) => Some(child.id() as i32),
        }
    }
}

impl Shim {
    /// Begins to mount what the job wants mounted.
    pub(super) fn mount(&mut self) {
        self.log
            .say(&format!("mounting: {:?}", self.plan.mount_points));
        let own: Vec<_> = self.own.iter().map(String::as_str).collect();
        match mounts::hold(&own, &self.dir, true, &self.keys) {
            Ok(child) => self.volumes = Volumes::Mounting(child),
            Err(error) => {
                self.volumes = Volumes::None;
                self.fail(broken(&format!("cannot be started: {error}")));
            }
        }
    }

    /// Goes on when everything is mounted, and ends when something is not, or not any more.
    pub(super) fn look_at_mounts(&mut self) -> Result<(), JournalError> {
        if self.volumes.holder().is_none() || !matches!(self.ending, Ending::No) {
            return Ok(());
        }
        let status = mounts::status(&self.dir)?;
        if let Some(failure) = status.failure {
            let code = match failure.code.as_str() {
                mounts::FAILED => "JobMountFailed".to_owned(),
                _ => failure.code,
            };
            self.fail(FailureRecord { code, ..failure });
            return Ok(());
        }
        if status.phase == Phase::Ready && matches!(self.volumes, Volumes::Mounting(_)) {
            if let Volumes::Mounting(child) = std::mem::take(&mut self.volumes) {
                self.volumes = Volumes::Mounted(child);
            }
            self.log.say("all is mounted");
            self.make_directories();
        }
        Ok(())
    }

    /// Whoever holds them has ended: that was not to be.
    pub(super) fn mounts_lost(&mut self) -> Result<(), JournalError> {
        // What it said last is why.
        self.look_at_mounts()?;
        self.volumes = Volumes::None;
        if matches!(self.ending, Ending::No) {
            self.fail(broken("has ended"));
        }
        self.look_at_the_end();
        Ok(())
    }

    /// What the job wrote and what could not be written back is lost: it has not done what it was to do.
    fn look_at_the_end(&mut self) {
        let failure = mounts::lost(&self.dir);
        if let Some(failure) = failure.filter(|_| self.status.failure.is_none()) {
            self.log.say(&failure.message);
            self.status.failure = Some(FailureRecord {
                undoes_success: true,
                ..failure
            });
        }
    }

    /// What serves the attempt writes nothing any more, from now on: the copier, and what serves its mounts. Ranks are ended otherwise, and
    /// those that wait for a mount end when that is gone.
    pub(super) fn cut_off(&mut self) {
        if let Some(copier) = &self.copier {
            // One that has ended needs none.
            let _ = kill(Pid::from_raw(copier.pid), Signal::SIGKILL);
        }
        if let Some(holder) = self.volumes.holder()
            && !self.tell_to_unmount(false)
        {
            // What it leaves is a child of this process then, and is killed with the others.
            let _ = kill(Pid::from_raw(holder), Signal::SIGKILL);
        }
    }

    /// Tells the holder to unmount, having what was written written back or not. Returns whether it was told.
    fn tell_to_unmount(&mut self, write_back: bool) -> bool {
        let mut told = self.dir.write(mounts::UNMOUNT, &write_back, false);
        if told.is_err() {
            // The disk is full.
            self.give_up_reserve();
            told = self.dir.write(mounts::UNMOUNT, &write_back, false);
        }
        if let Err(error) = &told {
            self.log
                .say(&format!("cannot say that it is time to unmount: {error}"));
        }
        told.is_ok()
    }

    /// Has everything unmounted, and waits for it. What is left by force is not waited for.
    pub(super) fn unmount(&mut self) {
        if self.volumes.holder().is_none() {
            return;
        }
        let until = boot_time() + mounts::end_max(&self.dir);
        // What may begin elsewhere by now writes nothing any more.
        let mut fenced = self.is_fenced_off();
        match fenced {
            true => self.cut_off(),
            false => drop(self.tell_to_unmount(true)),
        }
        let ended = loop {
            if !fenced && self.is_fenced_off() {
                fenced = true;
                self.cut_off();
            }
            let (Volumes::Mounting(child) | Volumes::Mounted(child)) = &mut self.volumes else {
                return;
            };
            match child.try_wait() {
                Ok(None) if boot_time() < until => std::thread::sleep(Duration::from_millis(5)),
                Ok(Some(status)) if status.success() => {
                    self.log.say("all is unmounted");
                    break true;
                }
                other => {
                    self.log
                        .say(&format!("not everything could be unmounted: {other:?}"));
                    // It may be stuck in the kernel; nobody waits for it.
                    let _ = child.kill();
                    break false;
                }
            }
        };
        self.volumes = Volumes::None;
        if !ended {
            self.kill_servers();
        }
        self.look_at_the_end();
    }

    /// What a holder has left that was cut down serves mounts that nobody looks after: it writes nothing any more when the attempt has ended,
    /// and what is mounted is in nobody's way. What is stuck in the kernel is not waited for.
    pub(super) fn clean_up(&mut self) {
        if !mounts::any_left(&self.dir).unwrap_or(true) {
            return;
        }
        self.kill_servers();
        let own: Vec<_> = self.own.iter().map(String::as_str).collect();
        let mut cleaner = match mounts::clean(&own, &self.dir) {
            Ok(cleaner) => cleaner,
            Err(error) => {
                return self.log.say(&format!("nothing can be unmounted: {error}"));
            }
        };
        let until = boot_time() + CLEAN_MAX;
        let ended = loop {
            match cleaner.try_wait() {
                Ok(None) if boot_time() < until => std::thread::sleep(Duration::from_millis(5)),
                ended => break ended,
            }
        };
        if !matches!(&ended, Ok(Some(status)) if status.success()) {
            self.log
                .say(&format!("what was mounted is not all gone: {ended:?}"));
        }
    }

    /// What the holder leaves is adopted by this process.
    fn kill_servers(&self) {
        let until = boot_time() + SERVERS_MAX;
        loop {
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG))
                && status != WaitStatus::StillAlive
            {}
            let left = self.tree();
            if left.is_empty() || boot_time() >= until {
                return;
            }
            tree::signal_all(&left, Signal::SIGKILL);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn broken(how: &str) -> FailureRecord {
    FailureRecord {
        code: mounts::UNAVAILABLE.to_owned(),
        message: format!("the process that holds the job's mounts {how}"),
        infrastructure: true,
        ..FailureRecord::default()
    }
}
