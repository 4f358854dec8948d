//! The process that holds mounts: mounts them, looks after them, unmounts them.
//!
//! ```text
//! Mounting -> Ready -> (told to, or its shim is gone) -> unmounted
//!     \-> Failed: one could not be mounted, and none is
//! ```
//! Each mount has a thread that waits for its steps, so that none waits for another.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use batchai_common::shutdown;
use batchai_common::time::boot_millis;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{geteuid, getppid, setsid};

use super::kernel::{self, Mark};
use super::rclone;
use super::servers;
use super::step::{Step, StepError, within};
use super::{CACHE, FAILED, MARKS, PLAN, Phase, Plan, STATUS, Status, UNAVAILABLE, UNMOUNT, left};
use crate::journal::{AttemptDir, JournalError};
use crate::launch::{How, Keys, Mount};
use crate::memory;
use crate::status::FailureRecord;

/// How soon it is seen that it is told to unmount.
const PAUSE: Duration = Duration::from_millis(20);
/// What is written back takes so long, or is lost.
const UNMOUNT_MAX: Duration = Duration::from_secs(10);
/// Getting a mount out of the way asks nobody.
const DETACH_MAX: Duration = Duration::from_secs(10);
/// Between two looks at whether a mount answers.
const LOOK_MAX: Duration = Duration::from_secs(5);
const LOOK_MIN: Duration = Duration::from_millis(200);

/// Why a holder cannot do its work.
#[derive(Debug, thiserror::Error)]
enum HolderError {
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

/// All of it that is mounted is got out of the way, whoever uses it.
fn clean_up(dir: &AttemptDir, own: &[&str]) -> Result<(), HolderError> {
    let plan: Plan = dir.read(PLAN)?.ok_or(HolderError::NoPlan)?;
    detach_all(dir, &plan, own)
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
    let holder = Holder {
        dir,
        own,
        keys,
        stop: AtomicBool::new(false),
        states: Mutex::new(vec![State::Coming; plan.mounts.len()]),
        marks: Mutex::new(vec![Vec::new(); plan.mounts.len()]),
        plan,
    };
    holder.run()
}

/// How a mount stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Coming,
    Up,
    /// It was up.
    Down(String),
    /// It is to go, and not all that was written is written back.
    Unwritten(String),
    Failed(String),
}

struct Holder<'a> {
    dir: &'a AttemptDir,
    own: &'a [&'a str],
    plan: Plan,
    /// They are nowhere but here.
    keys: Keys,
    stop: AtomicBool,
    states: Mutex<Vec<State>>,
    /// How the kernel knows what was mounted for each of them.
    marks: Mutex<Vec<Vec<Mark>>>,
}

impl Holder<'_> {
    fn run(&self) -> Result<(), HolderError> {
        let mut said = Status::default();
        self.dir.write(STATUS, &said, false)?;
        std::thread::scope(|scope| {
            for at in 0..self.plan.mounts.len() {
                scope.spawn(move || self.keep(at));
            }
            loop {
                let status = self.status(said.phase);
                if status.phase == Phase::Failed || self.dir.has(UNMOUNT) {
                    self.stop.store(true, Ordering::Relaxed);
                    said = status;
                    return;
                }
                if status != said && self.dir.write(STATUS, &status, false).is_ok() {
                    said = status;
                }
                std::thread::sleep(PAUSE);
            }
        });
        if said.phase != Phase::Failed {
            said = self.status(said.phase);
        }
        let gone = detach_all(self.dir, &self.plan, self.own);
        if gone.is_ok() {
            // Their numbers may be given to others now.
            let none: Vec<Vec<Mark>> = Vec::new();
            self.dir.write(MARKS, &none, true)?;
        }
        servers::end();
        // Nobody reads or writes it any more, and it may be large. It need not be there.
        let _ = std::fs::remove_dir_all(self.dir.path.join(CACHE));
        // After the last of it is gone: who reads it may do what must not find it.
        self.dir.write(STATUS, &said, false)?;
        gone
    }

    /// All of them together.
    fn status(&self, phase: Phase) -> Status {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let mounts = self.plan.mounts.iter().zip(&*states);
        let record = |code: &str, mount: &Mount, why: &str, message: String| FailureRecord {
            code: code.to_owned(),
            message,
            details: vec![
                ("path".to_owned(), mount.path.clone()),
                ("error".to_owned(), why.to_owned()),
            ],
            ..FailureRecord::default()
        };
        let mut failure = None;
        let mut up = true;
        for (mount, state) in mounts {
            let path = &mount.path;
            match state {
                State::Coming => up = false,
                State::Up => {}
                State::Failed(why) => {
                    let message = format!("{path} cannot be mounted: {}: {why}", named(mount));
                    return Status {
                        phase: Phase::Failed,
                        failure: Some(record(failed_code(mount), mount, why, message)),
                    };
                }
                State::Down(why) => {
                    let message = format!("what is mounted at {path} does not answer: {why}");
                    failure.get_or_insert(record(UNAVAILABLE, mount, why, message));
                }
                State::Unwritten(why) => {
                    let message = format!("what was written to {path} is lost in part: {why}");
                    failure.get_or_insert(record(UNAVAILABLE, mount, why, message));
                }
            }
        }
        let phase = if up { Phase::Ready } else { phase };
        Status { phase, failure }
    }

    fn set(&self, at: usize, state: State) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states[at] = state;
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
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
            return self.set(at, State::Failed(why));
        }
        self.set(at, State::Up);
        while let Some(why) = self.watch(mount) {
            // Whoever waits for it gets an error.
            self.detach(at);
            self.set(at, State::Down(why));
            loop {
                self.pause(self.look_every());
                if self.is_over() || !self.plan.again {
                    return;
                }
                match self.bring_up(at, mount) {
                    Ok(()) => break,
                    Err(_) => self.detach(at),
                }
            }
            self.set(at, State::Up);
        }
        if let Err(why) = self.write_back(at, mount) {
            self.set(at, State::Unwritten(why));
        }
        // In order, so that what was written arrives; by force, where that does not do.
        for mark in self.marks_of(at).iter().rev() {
            let known = kernel::mounted().unwrap_or_default();
            let Some(place) = known.place(mark) else {
                continue;
            };
            let unmount = Step::Unmount {
                place: place.to_owned(),
                force: false,
                lazy: false,
            };
            let _ = within(self.own, &unmount, UNMOUNT_MAX, &|| false);
        }
    }

    /// Where a program serves a mount what is written waits on this host for a while. Waits for that to be written back.
    fn write_back(&self, at: usize, mount: &Mount) -> Result<(), String> {
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
            let wanted = self.dir.read::<bool>(UNMOUNT).ok().flatten();
            if Instant::now() >= end || wanted == Some(false) {
                let to = named(mount);
                return Err(format!("{left} files were not written back to {to}"));
            }
            // There may be many files to look at.
            std::thread::sleep(PAUSE.max(begun.elapsed() * 4));
        }
    }

    fn cache(&self, at: usize) -> PathBuf {
        self.dir.path.join(CACHE).join(at.to_string())
    }

    fn marks_of(&self, at: usize) -> Vec<Mark> {
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
            How::Command(_) | How::Bind { .. } | How::Nfs { .. } | How::Local { .. } => {
                String::new()
            }
        };
        let step = Step::Mount {
            mount: Box::new(mount.clone()),
            env: self.plan.env.clone(),
            until: boot_millis() + left().as_millis() as i64,
            key,
            place: kernel::real(&self.plan.root, &mount.path),
            cache: self.cache(at),
        };
        let mounted = self.within(&step, left()).map_err(words);
        let noted = self.note(at, mount);
        mounted?;
        noted?;
        let look = look(mount);
        self.within(&look, left())
            .map_err(|error| format!("it is mounted, and does not answer: {error}"))
    }

    /// Looks after a mount until it is to go, or does not answer for too long: then why.
    fn watch(&self, mount: &Mount) -> Option<String> {
        let look = look(mount);
        let mut answered = Instant::now();
        loop {
            self.pause(self.look_every());
            if self.is_over() {
                return None;
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
        within(self.own, step, most, &|| self.is_over())
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
}

fn named(mount: &Mount) -> String {
    if !mount.what.is_empty() {
        return mount.what.clone();
    }
    match &mount.how {
        How::Command(line) => format!("{line:?}"),
        How::Nfs {
            address,
            port,
            directory,
            ..
        } => format!("NFS from {address}:{port}, {directory}"),
        How::Local {
            shared, directory, ..
        } => format!("the directory {directory:?} of {shared}"),
        How::Bind { source, .. } => source.clone(),
        How::Remote(remote) => remote.named(),
    }
}

fn look(mount: &Mount) -> Step {
    let server = match &mount.how {
        How::Remote(remote) => remote.server(),
        How::Command(_) | How::Bind { .. } | How::Nfs { .. } | How::Local { .. } => None,
    };
    let path = mount.path.clone();
    Step::Look { path, server }
}

fn failed_code(mount: &Mount) -> &str {
    match mount.code.as_str() {
        "" => FAILED,
        code => code,
    }
}

/// Gets what is mounted out of the way; whoever waits for it gets an error, unless it is mounted elsewhere too.
fn detach(own: &[&str], mark: &Mark) {
    let Some(known) = kernel::mounted() else {
        return;
    };
    let Some(place) = known.place(mark) else {
        return;
    };
    let step = Step::Unmount {
        place: place.to_owned(),
        force: known.is_sole(mark),
        lazy: true,
    };
    if let Err(error) = within(own, &step, DETACH_MAX, &|| false) {
        eprintln!("mounts: {} cannot be unmounted: {error}", place.display());
    }
}
