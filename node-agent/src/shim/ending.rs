//! How an attempt ends on this host: SIGTERM, the grace, SIGKILL until nothing is left, the last copy of the logs, the exit
//! record.

use std::path::Path;
use std::time::Duration;

use batchai_common::crash_point;
use batchai_common::limits::STUCK_MAX;
use batchai_common::time::{boot_millis, boot_time};
use nix::sys::signal::Signal;

use super::run::{Ending, RESERVE, Shim, WRITE_AGAIN};
use super::{ShimError, group, tree};
use crate::cgroups::Group;
use crate::journal::{STATUS, read_lease};
use crate::status::{FailureRecord, Phase};

/// Processes that SIGKILL does not end within this time are stuck in the kernel.
const KILL_MAX: Duration = Duration::from_secs(30);
/// How long the last copy of the logs may take.
const COPY_MAX: Duration = Duration::from_secs(30);

impl Shim {
    /// Begins to end everything: SIGTERM, then after the grace SIGKILL.
    pub(super) fn end(&mut self, why: &str) {
        if !matches!(self.ending, Ending::No) {
            return;
        }
        self.log.say(&format!("ending: {why}"));
        tree::signal_all(&self.tree(), Signal::SIGTERM);
        self.ending = Ending::Asked {
            until: boot_time() + Duration::from_secs(self.plan.grace_s),
        };
    }

    pub(super) fn is_killed(&self) -> bool {
        matches!(self.ending, Ending::Killed { .. })
    }

    /// Where the node's lease is over, the work may begin elsewhere: nothing of it is left here by then, whether the agent lives, is stopped
    /// or gone. A lease that cannot be read is over.
    pub(super) fn watch_the_fence(&mut self) {
        if self.fenced_off || !self.is_fenced_off() {
            return;
        }
        self.fenced_off = true;
        self.cut_off();
        if self.is_killed() {
            return;
        }
        self.fail(FailureRecord {
            code: "NodeLeaseExpired".into(),
            message: "the node has not reached a coordinator for as long as its lease lasts, and the job may begin elsewhere".into(),
            infrastructure: true,
            ..FailureRecord::default()
        });
        self.log.say("killing what is left at once");
        self.ending = Ending::Killed {
            until: boot_time() + KILL_MAX,
        };
    }

    /// Whether it is bound to the node's lease, and that is over.
    pub(super) fn is_fenced_off(&mut self) -> bool {
        let now = boot_millis();
        let Some(path) = &self.plan.fence else {
            return false;
        };
        if self.fenced_off {
            return true;
        }
        if self.fence.left(now) > 0 {
            return false;
        }
        let written = read_lease(Path::new(path));
        if let Err(error) = &written {
            let text = format!("the node's lease cannot be read: {error}");
            self.log.say(&text);
        }
        !self.fence.look(now, written.ok())
    }

    pub(super) fn drive_ending(&mut self) {
        let now = boot_time();
        match self.ending {
            Ending::Asked { until } if now >= until => {
                self.log.say("the grace is over: killing what is left");
                self.ending = Ending::Killed {
                    until: now + KILL_MAX,
                };
            }
            Ending::Killed { until } => {
                self.kill_group();
                // Also with a group: root may leave it.
                let left = self.tree();
                // Stopped first, so that none of them can start another while the others are killed.
                tree::signal_all(&left, Signal::SIGSTOP);
                tree::signal_all(&left, Signal::SIGKILL);
                let left: Vec<_> = left.into_iter().take(STUCK_MAX).collect();
                // Not why the job ended, whatever that was: it is the node that cannot be used.
                if now >= until && left != self.status.stuck {
                    self.log
                        .say(&format!("processes that do not die: {left:?}"));
                    self.status.stuck = left;
                    self.publish();
                }
            }
            _ => {}
        }
    }

    /// Everything that the attempt started and that has not ended.
    pub(super) fn tree(&self) -> Vec<i32> {
        // They serve what runs to its end, and end after it; who looks at GPUs may never end.
        let copier = self.copier.as_ref().map(|copier| copier.pid);
        let server = self.server.as_ref().map(|server| server.id() as i32);
        let looker = self.looker.as_ref().map(|looker| looker.pid);
        let holder = self.volumes.holder().into_iter().chain(looker);
        let serve: Vec<_> = holder.chain(copier).chain(server).collect();
        let mut tree = tree::descendants(std::process::id() as i32, &serve);
        // Known by themselves, should the kernel not tell whose child is whose.
        let known = self.running.iter().map(|running| running.pid);
        let grouped = self.plan.group.iter().flat_map(Group::processes);
        tree.extend(known.chain(grouped));
        tree.sort_unstable();
        tree.dedup();
        tree
    }

    /// At once, whoever starts whom in it meanwhile.
    fn kill_group(&self) {
        let Some(group) = &self.plan.group else {
            return;
        };
        if let Err(error) = group.kill() {
            super::tell(&format!("the group cannot be killed: {error}"));
        }
    }

    /// A node that is told to end, or whose ranks have, is done when nothing is left of them.
    pub(super) fn over(&self) -> bool {
        !matches!(self.ending, Ending::No) && self.running.is_empty() && self.tree().is_empty()
    }

    /// The last words: nothing of the attempt runs any more.
    pub(super) fn finish(mut self, buffer: &mut Vec<u8>) -> Result<(), ShimError> {
        self.drain(buffer, |_| true);
        self.streams.clear();
        self.log.say("ended");
        self.leave_group();
        self.leave_room();
        self.finish_copy();
        self.unmount();
        self.clean_up();
        self.end_serving();
        self.status.phase = Phase::Ended;
        self.status.stuck.clear();
        self.status.files = self.dir.logs()?;
        // Without its record the attempt would count as lost, and the job would run again.
        self.give_up_reserve();
        crash_point!("shim_is_to_write_its_record");
        while let Err(error) = self.dir.write(STATUS, &self.status, true) {
            super::tell(&format!("the exit record cannot be written: {error}"));
            std::thread::sleep(WRITE_AGAIN);
        }
        crash_point!("shim_wrote_its_record");
        Ok(())
    }

    /// Nothing is in it any more. Where it cannot be removed the agent does it when it starts.
    fn leave_group(&self) {
        let group = self.plan.group.as_ref();
        if let Some(Err(error)) = group.map(Group::end) {
            super::tell(&format!("the group cannot be removed: {error}"));
        }
        for bound in &self.plan.bounds {
            if let Err(error) = bound.seat.remove() {
                super::tell(&format!("a group for a limit cannot be removed: {error}"));
            }
        }
        if let Some(home) = group.and_then(|group| group.path.parent()) {
            group::leave(home);
        }
    }

    /// Lets the copier finish, but not for ever: it may hang on a dead mount. What may begin elsewhere by now copies nothing any more.
    fn finish_copy(&mut self) {
        let Some(copier) = self.copier.take() else {
            return;
        };
        if let Err(why) = copier.finish(COPY_MAX, &mut || self.is_fenced_off()) {
            let to = &self.plan.copy_to;
            self.log.say(&format!(
                "the log files could not all be copied to {to}: {why}"
            ));
        }
    }

    pub(super) fn give_up_reserve(&self) {
        // It may be given up already.
        let _ = std::fs::remove_file(self.dir.path.join(RESERVE));
    }
}
