//! The mounts of a job: held by a process of their own for as long as the job has processes, and gone before it is said that it has
//! ended.

use std::process::Child;
use std::time::Duration;

use batchai_common::time::boot_time;

use super::run::{Ending, Shim};
use crate::journal::JournalError;
use crate::mounts::{self, Phase};
use crate::status::FailureRecord;

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
        Ok(())
    }

    /// What the job wrote and what could not be written back is lost: it has not done what it was to do.
    fn look_at_the_end(&mut self) {
        let failure = mounts::status(&self.dir).ok().and_then(|it| it.failure);
        if let Some(failure) = failure.filter(|_| self.status.failure.is_none()) {
            self.log.say(&failure.message);
            self.status.failure = Some(FailureRecord {
                undoes_success: true,
                ..failure
            });
        }
    }

    /// Has everything unmounted, and waits for it. What is left by force is not waited for.
    pub(super) fn unmount(&mut self) {
        let (Volumes::Mounting(mut child) | Volumes::Mounted(mut child)) =
            std::mem::take(&mut self.volumes)
        else {
            return;
        };
        let until = boot_time() + mounts::end_max(&self.dir);
        // What may begin elsewhere by now writes nothing any more.
        let mut write_back = !self.is_fenced_off();
        let mut told = self.dir.write(mounts::UNMOUNT, &write_back, false);
        if told.is_err() {
            // The disk is full.
            self.give_up_reserve();
            told = self.dir.write(mounts::UNMOUNT, &write_back, false);
        }
        if let Err(error) = told {
            self.log
                .say(&format!("cannot say that it is time to unmount: {error}"));
        }
        loop {
            if write_back && self.is_fenced_off() {
                write_back = false;
                // Where that cannot be said it is killed as if it hung.
                if self.dir.write(mounts::UNMOUNT, &false, false).is_err() {
                    let _ = child.kill();
                }
            }
            match child.try_wait() {
                Ok(Some(status)) if status.success() => {
                    self.log.say("all is unmounted");
                    return self.look_at_the_end();
                }
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
