//! The process that holds mounts: mounts them, looks after them, unmounts them.
//!
//! ```text
//! Mounting -> Ready -> (told to, or its shim is gone) -> unmounted
//!     \-> Failed: one could not be mounted, and none is
//! ```
//! What was ready once, and is mounted again, does not fail: it is tried until it is there, and says meanwhile what is the matter.
//!
//! Each mount has a thread that waits for its steps, so that none waits for another.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use batchai_common::shutdown;
use batchai_common::time::{boot_millis, boot_time};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{geteuid, getppid, setsid};

use super::ending::{clean_up, detach};
use super::kernel::{self, Mark};
use super::standing::{self, State};
use super::step::{Step, StepError, within};
use super::{CACHE, MARKS, PLAN, Phase, Plan, STATUS, Status, UNMOUNT, rclone, room};
use crate::journal::{self, AttemptDir, JournalError};
use crate::launch::{How, Keys, Mount};
use crate::words::Words;
use crate::{memory, status};

/// How soon it is seen that it is told to unmount.
pub(super) const PAUSE: Duration = Duration::from_millis(20);
/// A shim that runs has heard by then of what is the matter.
const KNOWN_MAX: Duration = Duration::from_secs(1);
/// Between two looks at whether a mount answers.
const LOOK_MAX: Duration = Duration::from_secs(5);
const LOOK_MIN: Duration = Duration::from_millis(200);

/// Why a holder cannot do its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum HolderError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("there is no plan")]
    NoPlan,
    #[error("{0}")]
    System(#[from] nix::Error),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the kernel does not say what is mounted")]
    Unknown,
    #[error("still mounted: {0:?}")]
    Left(Vec<Mark>),
}

/// The process. `held`: it goes with the process that started it, with this pid. `clean`: it only unmounts.
pub fn main(dir: &Path, held: Option<i32>, clean: bool, own: &[&str]) -> ExitCode {
    let dir = AttemptDir {
        path: dir.to_owned(),
    };
    let done = match clean {
        true => clean_up(&dir, own),
        false => begin(&dir, held, own),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mounts: {error}");
            ExitCode::FAILURE
        }
    }
}

fn begin(dir: &AttemptDir, held: Option<i32>, own: &[&str]) -> Result<(), HolderError> {
    let plan: Plan = dir.read(PLAN)?.ok_or(HolderError::NoPlan)?;
    // Whoever comes second does nothing. That of a job goes with its shim, which has the lock of the directory.
    let _lock = match held {
        Some(parent) => {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid().as_raw() != parent {
                return Ok(());
            }
            None
        }
        None => match dir.take_lock()? {
            None => return Ok(()),
            lock => lock,
        },
    };
    shutdown::keep_memory_private();
    let keys = memory::take()?;
    setsid()?;
    // What serves a mount from this host stays where it can be found.
    prctl::set_child_subreaper(true)?;
    let was_ready = super::status(dir)?.phase == Phase::Ready;
    let holder = Holder {
        dir,
        own,
        keys,
        was_ready,
        stop: AtomicBool::new(false),
        cut: AtomicBool::new(false),
        states: Mutex::new(vec![State::Coming; plan.mounts.len()]),
        marks: Mutex::new(vec![Vec::new(); plan.mounts.len()]),
        words: Mutex::new(plan.mounts.iter().map(|_| Words::default()).collect()),
        plan,
    };
    holder.run()
}

pub(super) struct Holder<'a> {
    pub(super) dir: &'a AttemptDir,
    pub(super) own: &'a [&'a str],
    pub(super) plan: Plan,
    /// They are nowhere but here.
    keys: Keys,
    /// All of them were mounted once, by another holder.
    was_ready: bool,
    /// They are to go.
    stop: AtomicBool,
    /// At once: nothing is written back any more.
    pub(super) cut: AtomicBool,
    states: Mutex<Vec<State>>,
    /// How the kernel knows what was mounted for each of them.
    marks: Mutex<Vec<Vec<Mark>>>,
    /// What is said by what serves each of them.
    words: Mutex<Vec<Words>>,
}

impl Holder<'_> {
    fn run(&self) -> Result<(), HolderError> {
        let mut said = self.status(match self.was_ready {
            true => Phase::Ready,
            false => Phase::Mounting,
        });
        self.dir.write(STATUS, &said, false)?;
        std::thread::scope(|scope| {
            let spawn = |at| scope.spawn(move || self.keep(at));
            let threads: Vec<_> = (0..self.plan.mounts.len()).map(spawn).collect();
            while !self.is_over() || threads.iter().any(|thread| !thread.is_finished()) {
                if self.is_over() {
                    self.look_at_the_fence();
                } else {
                    let status = self.status(said.phase);
                    if status.phase == Phase::Failed || self.dir.has(UNMOUNT) {
                        self.stop.store(true, Ordering::Relaxed);
                        said = status;
                        continue;
                    }
                    if status != said && self.dir.write(STATUS, &status, false).is_ok() {
                        said = status;
                    }
                }
                std::thread::sleep(PAUSE);
            }
        });
        if said.phase != Phase::Failed {
            said = self.status(said.phase);
        }
        self.end(said)
    }

    /// All of them together.
    fn status(&self, phase: Phase) -> Status {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        standing::all(&self.plan.mounts, &states, phase)
    }

    fn set(&self, at: usize, state: State) {
        if let State::Down(why) | State::Unwritten(why) | State::Failed(why) = &state {
            let path = self.plan.mounts.get(at).map_or("", |mount| &mount.path);
            eprintln!("mounts: {path}: {why}");
        }
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states[at] = state;
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn is_cut_off(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.plan.patience_s.max(1))
    }

    /// A mount from its beginning to its end.
    fn keep(&self, at: usize) {
        let Some(mount) = self.plan.mounts.get(at) else {
            return;
        };
        if let Err(why) = self.bring_up(at, mount) {
            self.detach(at);
            if !self.was_ready {
                return self.set(at, State::Failed(why));
            }
            let why = format!("it cannot be mounted again: {why}");
            self.set(at, State::Down(why));
            if !self.bring_up_again(at, mount) {
                return;
            }
        }
        self.set(at, State::Up);
        while let Some(why) = self.watch(at, mount) {
            let why = self.with_words(at, mount, why);
            self.set(at, State::Down(why));
            self.until_known();
            // Whoever waits for it gets an error.
            self.detach(at);
            if !self.bring_up_again(at, mount) {
                return;
            }
            self.set(at, State::Up);
        }
        let left = self
            .write_back(at, mount)
            .and_then(|()| self.leave(at, mount));
        if let Err(why) = left {
            let why = match self.is_cut_off() {
                true => "the node's lease is over".to_owned(),
                false => self.with_words(at, mount, why),
            };
            self.set(at, State::Unwritten(why));
        }
    }

    /// What a job's processes do when a mount of theirs is gone is not why it fails: its shim has said why before.
    fn until_known(&self) {
        let end = Instant::now() + KNOWN_MAX;
        let known = || {
            let said = self.dir.read::<status::Status>(journal::STATUS);
            said.is_ok_and(|said| said.is_some_and(|said| said.failure.is_some()))
        };
        while !self.plan.again && !self.is_over() && Instant::now() < end && !known() {
            std::thread::sleep(PAUSE);
        }
    }

    /// Tries until it is there, or is to go. What is mounted for one job is not tried: that has failed by then.
    fn bring_up_again(&self, at: usize, mount: &Mount) -> bool {
        loop {
            self.pause(self.look_every());
            if self.is_over() || !self.plan.again {
                return false;
            }
            self.forget_what_was_read(at);
            match self.bring_up(at, mount) {
                Ok(()) if self.makes_room(at) => return true,
                _ => self.detach(at),
            }
        }
    }

    /// Whether there is room for what will be written to it. Where there is none, what waits there is written back first, and nobody is told
    /// meanwhile that it is there.
    fn makes_room(&self, at: usize) -> bool {
        let cache = self.cache(at);
        while room::lacking(&cache).is_some() {
            if self.is_over() {
                return false;
            }
            if !rclone::unwritten(&cache).is_ok_and(|left| left > 0) {
                return false;
            }
            self.pause(LOOK_MIN);
        }
        true
    }

    /// What was only read takes room as well. Nobody serves it now.
    fn forget_what_was_read(&self, at: usize) {
        let cache = self.cache(at);
        if room::lacking(&cache).is_some() && rclone::unwritten(&cache).is_ok_and(|left| left == 0)
        {
            // It need not be there.
            let _ = std::fs::remove_dir_all(&cache);
        }
    }

    /// Why something went wrong, with what was said of it by what serves the mount.
    fn with_words(&self, at: usize, mount: &Mount, why: String) -> String {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let said = words[at].so_far();
        let said = match &mount.how {
            How::Remote(_) => rclone::plain(&said),
            _ => said.lines().next_back().unwrap_or_default().to_owned(),
        };
        match said.as_str() {
            "" => why,
            said => format!("{why}; what serves it said last: {said}"),
        }
    }

    pub(super) fn cache(&self, at: usize) -> PathBuf {
        self.dir.path.join(CACHE).join(at.to_string())
    }

    pub(super) fn marks_of(&self, at: usize) -> Vec<Mark> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks[at].clone()
    }

    /// Notes what is mounted at a place, for whoever unmounts it. Nobody else can have anything there yet.
    fn note(&self, at: usize, mount: &Mount) -> Result<(), String> {
        let known = kernel::mounted().ok_or("the kernel does not say what is mounted")?;
        let found = known.at(&kernel::real(&self.plan.root, &mount.path));
        let none = found.is_empty();
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks[at] = found;
        let noted = self.dir.write(MARKS, &*marks, true);
        noted.map_err(|error| format!("it cannot be noted: {error}"))?;
        match none {
            true => Err("the command succeeded, and nothing is mounted there".to_owned()),
            false => Ok(()),
        }
    }

    fn detach(&self, at: usize) {
        for mark in self.marks_of(at).iter().rev() {
            detach(self.own, mark);
        }
    }

    fn bring_up(&self, at: usize, mount: &Mount) -> Result<(), String> {
        let most = self.patience().max(Duration::from_secs(mount.wait_s));
        let end = Instant::now() + most;
        let left = || end.saturating_duration_since(Instant::now());
        let words = |error: StepError| error.to_string();
        if !geteuid().is_root() {
            return Err("only an agent that runs as root can mount anything".to_owned());
        }
        // For a job its shim has just made it; here nothing that leads there may be a link, or somebody's.
        if self.plan.again {
            let make = Step::Make {
                root: self.plan.root.clone(),
                path: mount.path.clone(),
            };
            self.within(&make, left()).map_err(words)?;
        }
        let key = match &mount.how {
            How::Remote(remote) => self.keys.get(&remote.key).cloned().unwrap_or_default(),
            How::Command(_) | How::Nfs { .. } | How::Local { .. } => String::new(),
        };
        let step = Step::Mount {
            mount: Box::new(self.bounded(mount)),
            env: self.plan.env.clone(),
            until: boot_millis() + left().as_millis() as i64,
            key,
            place: kernel::real(&self.plan.root, &mount.path),
            cache: self.cache(at),
        };
        let mounted = within(self.own, &step, left(), &|| self.is_over()).map_err(words);
        let noted = self.note(at, mount);
        let said = mounted?;
        self.words.lock().unwrap_or_else(PoisonError::into_inner)[at] = said;
        noted?;
        let look = look(mount);
        self.within(&look, left())
            .map_err(|error| format!("it is mounted, and does not answer: {error}"))
    }

    /// What several of them keep of what was read lies on one disk.
    fn bounded(&self, mount: &Mount) -> Mount {
        let mut mount = mount.clone();
        if let How::Remote(remote) = &mut mount.how {
            let all = self.plan.mounts.len();
            remote.cache_mib = room::share_mib(&self.dir.path, remote.cache_mib, all);
        }
        mount
    }

    /// Looks after a mount until it is to go, or does not answer for too long: then why.
    fn watch(&self, at: usize, mount: &Mount) -> Option<String> {
        let look = look(mount);
        let cache = self.cache(at);
        let mut answered = Instant::now();
        let opened = boot_time();
        loop {
            let full = self.pause_while_room(&cache);
            if self.is_over() {
                return None;
            }
            if full.is_some() && !is_read_only(mount) {
                return full;
            }
            if let How::Remote(remote) = &mount.how
                && rclone::is_outlived(remote, boot_time().saturating_sub(opened))
            {
                return Some("the signature that opens it was made for a year".to_owned());
            }
            let left = (answered + self.patience()).saturating_duration_since(Instant::now());
            match self.within(&look, left.max(LOOK_MIN)) {
                Ok(()) => answered = Instant::now(),
                Err(error) if answered.elapsed() >= self.patience() => {
                    return Some(match error {
                        StepError::Late { .. } => {
                            format!("nothing was heard for {} s", self.patience().as_secs())
                        }
                        error => error.to_string(),
                    });
                }
                Err(_) => {}
            }
        }
    }

    fn within(&self, step: &Step, most: Duration) -> Result<(), StepError> {
        within(self.own, step, most, &|| self.is_over()).map(drop)
    }

    fn look_every(&self) -> Duration {
        (self.patience() / 4).clamp(LOOK_MIN, LOOK_MAX)
    }

    /// Waits, unless it is over before.
    fn pause(&self, most: Duration) {
        let end = Instant::now() + most;
        while Instant::now() < end && !self.is_over() {
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until the next look, unless the disk fills up before that: then why.
    fn pause_while_room(&self, cache: &Path) -> Option<String> {
        let end = Instant::now() + self.look_every();
        while Instant::now() < end && !self.is_over() {
            let lacking = room::lacking(cache);
            if lacking.is_some() {
                return lacking;
            }
            std::thread::sleep(PAUSE);
        }
        None
    }
}

/// Nothing waits on this host then to be written back.
fn is_read_only(mount: &Mount) -> bool {
    matches!(&mount.how, How::Remote(remote) if remote.read_only)
}

fn look(mount: &Mount) -> Step {
    let server = match &mount.how {
        How::Remote(remote) => remote.server(),
        How::Command(_) | How::Nfs { .. } | How::Local { .. } => None,
    };
    let path = mount.path.clone();
    Step::Look { path, server }
}
