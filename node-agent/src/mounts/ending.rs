//! How mounts go: what was written to them is waited for, they are unmounted in order, and what is left then is got out of the way.
//!
//! Where the job may begin elsewhere by now nothing is waited for: whatever serves its mounts is killed before anything else, so that
//! nothing of the job is written any more.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::holder::{Holder, HolderError, PAUSE};
use super::kernel::{self, Mark};
use super::standing::named;
use super::step::{Step, within};
use super::{
    CACHE, MARKS, PLAN, Phase, Plan, STATUS, Status, UNMOUNT, is_sent_elsewhere, left, rclone,
    servers,
};
use crate::journal::AttemptDir;
use crate::launch::{How, Mount};

/// Unmounting what has nothing to send any more.
const UNMOUNT_MAX: Duration = Duration::from_secs(10);
/// Getting a mount out of the way asks nobody.
const DETACH_MAX: Duration = Duration::from_secs(10);

/// All of it that is mounted is got out of the way, whoever uses it.
pub fn clean_up(dir: &AttemptDir, own: &[&str]) -> Result<(), HolderError> {
    let plan: Plan = dir.read(PLAN)?.ok_or(HolderError::NoPlan)?;
    detach_all(dir, &plan, own)?;
    if plan.again {
        // What was not written back of a cluster's is when it is mounted again.
        return Ok(());
    }
    match std::fs::remove_dir_all(dir.path.join(CACHE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn detach_all(dir: &AttemptDir, plan: &Plan, own: &[&str]) -> Result<(), HolderError> {
    let known = kernel::mounted().ok_or(HolderError::Unknown)?;
    let marks = left(dir, plan, &known)?;
    std::thread::scope(|scope| {
        for mark in &marks {
            scope.spawn(|| detach(own, mark));
        }
    });
    let known = kernel::mounted().ok_or(HolderError::Unknown)?;
    let left = left(dir, plan, &known)?;
    match left.is_empty() {
        true => Ok(()),
        false => Err(HolderError::Left(left)),
    }
}

impl Holder<'_> {
    /// Nobody looks after any of them any more.
    pub(super) fn end(&self, mut said: Status) -> Result<(), HolderError> {
        if self.is_cut_off() {
            servers::kill_all();
        }
        if said.phase != Phase::Failed && said.failure.is_some() {
            // Before anything that may fail, or may be cut down. It is said again.
            let _ = self.dir.write(STATUS, &said, false);
        }
        let gone = detach_all(self.dir, &self.plan, self.own);
        // Their numbers may be given to others now.
        let none: Vec<Vec<Mark>> = Vec::new();
        let forgotten = match gone.is_ok() {
            true => self.dir.write(MARKS, &none, true),
            false => Ok(()),
        };
        servers::end(&|| {
            self.look_at_the_fence();
            self.is_cut_off()
        });
        // Nobody reads or writes it any more, and it may be large. It need not be there.
        let _ = std::fs::remove_dir_all(self.dir.path.join(CACHE));
        said.arrived = said.failure.is_none();
        // After the last of it is gone: who reads it may do what must not find it.
        self.dir.write(STATUS, &said, false)?;
        forgotten?;
        gone
    }

    /// Where the job may begin elsewhere by now, what serves its mounts writes nothing any more.
    pub(super) fn look_at_the_fence(&self) {
        let wanted = self.dir.read::<bool>(UNMOUNT).ok().flatten();
        if wanted == Some(false) {
            self.cut.store(true, Ordering::Relaxed);
            servers::kill();
        }
    }

    /// Unmounts it in order, so that what was written arrives. What that does not do is done by force later.
    pub(super) fn leave(&self, at: usize, mount: &Mount) -> Result<(), String> {
        let elsewhere = is_sent_elsewhere(mount);
        for mark in self.marks_of(at).iter().rev() {
            let known = kernel::mounted().unwrap_or_default();
            let Some(place) = known.place(mark) else {
                continue;
            };
            let flush = elsewhere && known.holds_back(mark);
            let most = match flush {
                true => self.plan.write_back_max(),
                false => UNMOUNT_MAX,
            };
            let place = place.to_owned();
            let leave = Step::Leave { place, flush };
            match within(self.own, &leave, most, &|| self.is_cut_off()) {
                Err(error) if flush => {
                    return Err(format!("it was not all sent to {}: {error}", named(mount)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where a program serves a mount what is written waits on this host for a while. Waits for that to be written back.
    pub(super) fn write_back(&self, at: usize, mount: &Mount) -> Result<(), String> {
        if !matches!(&mount.how, How::Remote(_)) {
            return Ok(());
        }
        let end = Instant::now() + self.plan.write_back_max();
        loop {
            let begun = Instant::now();
            let left = rclone::unwritten(&self.cache(at)).map_err(|error| error.to_string())?;
            if left == 0 {
                return Ok(());
            }
            if Instant::now() >= end || self.is_cut_off() {
                let to = named(mount);
                return Err(format!("{left} files were not written back to {to}"));
            }
            // There may be many files to look at.
            std::thread::sleep(PAUSE.max(begun.elapsed() * 4));
        }
    }
}

/// Gets what is mounted out of the way; whoever waits for it gets an error, unless it is mounted elsewhere too.
pub fn detach(own: &[&str], mark: &Mark) {
    let Some(known) = kernel::mounted() else {
        return;
    };
    let Some(place) = known.place(mark) else {
        return;
    };
    let step = Step::Detach {
        place: place.to_owned(),
        force: known.is_sole(mark),
    };
    if let Err(error) = within(own, &step, DETACH_MAX, &|| false) {
        eprintln!("mounts: {} cannot be unmounted: {error}", place.display());
    }
}
