//! The mounts of a job: held by a process of their own for as long as the job has processes, and gone before it is said that it has
//! ended.

use std::process::Child;
use std::time::Duration;

use batchai_common::time::boot_time;

use super::run::{Ending, Shim};
use crate::journal::JournalError;
use crate::mounts::{self, Phase};
use crate::status::FailureRecord;

/// Unmounting in order, by force, and ending what served the mounts take less, all together.
const UNMOUNT_MAX: Duration = Duration::from_secs(60);

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
        match mounts::hold(&own, &self.dir, true) {
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
        Ok(())
    }

    /// Has everything unmounted, and waits for it. What is left by force is not waited for.
    pub(super) fn unmount(&mut self) {
        let (Volumes::Mounting(mut child) | Volumes::Mounted(mut child)) =
            std::mem::take(&mut self.volumes)
        else {
            return;
        };
        let until = boot_time() + UNMOUNT_MAX;
        let mut told = self.dir.write(mounts::UNMOUNT, &true, false);
        if told.is_err() {
            // The disk is full.
            self.give_up_reserve();
            told = self.dir.write(mounts::UNMOUNT, &true, false);
        }
        if let Err(error) = told {
            self.log
                .say(&format!("cannot say that it is time to unmount: {error}"));
        }
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return self.log.say("all is unmounted"),
                Ok(None) if boot_time() < until => std::thread::sleep(Duration::from_millis(5)),
                other => {
                    self.log
                        .say(&format!("not everything could be unmounted: {other:?}"));
                    // It may be stuck in the kernel; nobody waits for it.
                    let _ = child.kill();
                    return;
                }
            }
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
