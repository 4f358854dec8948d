//! One thing that may hang, done by a process of its own with a deadline: mounting, unmounting, looking whether a mount answers.

use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::statfs::statfs;
use nix::unistd::{Pid, fchdir, getppid, setsid};
use serde::{Deserialize, Serialize};

use super::{file_server, rclone};
use crate::launch::{How, Mount};
use crate::share;

/// Of what it says the end is kept.
const WORDS_BYTES_MAX: usize = 1024;
/// Its last words are read by then.
const WORDS_MAX: Duration = Duration::from_millis(500);
/// Between two looks at whether it has ended.
const PAUSE_MAX: Duration = Duration::from_millis(20);
/// One that is killed has ended by then, or is stuck in the kernel.
const DEATH_MAX: Duration = Duration::from_secs(1);

/// What to do.
#[derive(Serialize, Deserialize)]
pub enum Step {
    /// Make the directory that something is mounted on, root's, below one that is root's.
    Make { root: String, path: String },
    Mount {
        mount: Box<Mount>,
        env: BTreeMap<String, String>,
        /// Until when it may take, in milliseconds of the boot clock.
        until: i64,
        /// What opens it, where it needs that.
        key: String,
        /// Where the kernel says that it is mounted.
        place: PathBuf,
        /// Where who serves it keeps what was read and written.
        cache: PathBuf,
    },
    /// `force`: whoever waits for it gets an error. `lazy`: it is out of the way at once, whoever uses it.
    Unmount {
        place: PathBuf,
        force: bool,
        lazy: bool,
    },
    /// See whether it answers, and whether the server does that it comes from: who serves it here answers without that.
    Look {
        path: String,
        server: Option<(String, u16)>,
    },
}

/// Why it was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    #[error("{0}")]
    Failed(String),
    #[error("it took longer than {s} s", s = .most.as_secs())]
    Late { most: Duration },
}

/// Does something within some time, or until nobody wants it any more. What has not ended by then is left to the kernel.
pub fn within(
    own: &[&str],
    step: &Step,
    most: Duration,
    unwanted: &dyn Fn() -> bool,
) -> Result<(), StepError> {
    let failed = |error: io::Error| StepError::Failed(error.to_string());
    let question = serde_json::to_vec(&(std::process::id(), step))
        .expect("our own types have only string keys");
    let mut child = super::program(own, "mount-step")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&question).map_err(failed)?;
    }
    let words = listen(&mut child);
    let end = Instant::now() + most;
    match ended(&mut child, end, unwanted) {
        Some(true) => Ok(()),
        Some(false) => Err(StepError::Failed(words.last())),
        None => {
            // It leads a session, with what it has started.
            let pid = child.id() as i32;
            let _ = kill(Pid::from_raw(-pid), Signal::SIGKILL);
            let _ = child.kill();
            let _ = ended(&mut child, Instant::now() + DEATH_MAX, &|| false);
            Err(StepError::Late { most })
        }
    }
}

/// What a child says.
struct Words {
    kept: Arc<Mutex<Vec<u8>>>,
    listener: Option<JoinHandle<()>>,
}

impl Words {
    /// What it said last. What it has left behind may go on saying things: nobody waits for the end of that.
    fn last(&self) -> String {
        let end = Instant::now() + WORDS_MAX;
        let listens = || self.listener.as_ref().is_some_and(|it| !it.is_finished());
        while listens() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).trim().to_owned()
    }
}

/// Keeps the end of what a child says. What serves a mount may go on saying things: somebody must listen, or it waits.
fn listen(child: &mut Child) -> Words {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let its = kept.clone();
    let listener = child.stderr.take().map(|mut stderr| {
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                let mut kept = its.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..count]);
                let surplus = kept.len().saturating_sub(WORDS_BYTES_MAX);
                kept.drain(..surplus);
            }
        })
    });
    Words { kept, listener }
}

/// Whether a child ended well, should it end in time.
fn ended(child: &mut Child, end: Instant, unwanted: &dyn Fn() -> bool) -> Option<bool> {
    let mut pause = Duration::from_millis(1);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.success()),
            Err(_) => return Some(false),
            Ok(None) if Instant::now() >= end || unwanted() => return None,
            Ok(None) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// The process: what to do is on standard input, what went wrong on standard error.
pub fn main() -> ExitCode {
    match begin() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn begin() -> io::Result<()> {
    let mut question = Vec::new();
    io::stdin().read_to_end(&mut question)?;
    let (parent, step): (u32, Step) = serde_json::from_slice(&question)?;
    setsid()?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have ended before the line above.
    if getppid().as_raw() as u32 != parent {
        return Err(io::Error::other("nobody waits for it"));
    }
    match step {
        Step::Make { root, path } => share::make_own(Path::new(&root), Path::new(&path), None),
        Step::Mount {
            mount,
            env,
            key,
            place,
            cache,
            until,
        } => match &mount.how {
            How::Command(line) => Err(run(line, &mount.path, &env)),
            How::Bind { source, read_only } => bind(source, &mount.path, *read_only),
            How::Nfs {
                address,
                port,
                directory,
                options,
                fresh,
            } => {
                let place = Path::new(&mount.path);
                let how = (options.as_str(), *fresh);
                file_server::nfs((address, *port), directory, how, place, until)
            }
            How::Local {
                shared,
                directory,
                options,
            } => {
                let place = Path::new(&mount.path);
                file_server::local(Path::new(shared), directory, options, place)
            }
            How::Remote(remote) => {
                let point = rclone::Point {
                    path: Path::new(&mount.path),
                    place: &place,
                    cache: &cache,
                    env: &env,
                };
                rclone::mount(remote, &key, &point)
            }
        },
        Step::Unmount { place, force, lazy } => unmount(&place, force, lazy),
        Step::Look { path, server } => {
            statfs(path.as_str())?;
            server.map_or(Ok(()), |(host, port)| rclone::reach(&host, port).map(drop))
        }
    }
}

/// By what is open, not by name: what leads there may be somebody's who puts a link in its place meanwhile. What is mounted is not
/// even looked at.
fn unmount(place: &Path, force: bool, lazy: bool) -> io::Result<()> {
    let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
        return Err(io::Error::other("it is no place of a mount"));
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened = open(parent, flags, Mode::empty())?;
    let is = std::fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))?;
    if is != parent {
        return Err(io::Error::other(format!(
            "{} leads to {}",
            parent.display(),
            is.display()
        )));
    }
    fchdir(&opened)?;
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_FORCE, force);
    flags.set(MntFlags::MNT_DETACH, lazy);
    Ok(umount2(name, flags)?)
}

/// Becomes the command.
fn run(line: &str, path: &str, env: &BTreeMap<String, String>) -> io::Error {
    let path = path.replace('\'', r"'\''");
    Command::new("/bin/bash")
        .arg("-c")
        .arg(format!("{line} '{path}'"))
        .env_clear()
        .envs(env)
        .current_dir("/")
        .stdin(Stdio::null())
        .exec()
}

/// No device and no program that changes its user comes in with it.
fn bind(source: &str, path: &str, read_only: bool) -> io::Result<()> {
    let failed = |error: nix::Error| io::Error::other(format!("{source}: {error}"));
    if !Path::new(source).is_dir() {
        return Err(io::Error::other(format!(
            "{source} is no directory of this node"
        )));
    }
    let none = None::<&str>;
    mount(Some(source), path, none, MsFlags::MS_BIND, none).map_err(failed)?;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, read_only);
    mount(none, path, none, flags, none).map_err(failed)
}
