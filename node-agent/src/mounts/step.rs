//! One thing that may hang, done by a process of its own with a deadline: mounting, unmounting, looking whether a mount answers.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use batchai_common::shutdown;
use batchai_common::time::boot_millis;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::statfs::statfs;
use nix::unistd::{Pid, fchdir, getppid, setsid, syncfs};
use serde::{Deserialize, Serialize};

use super::{file_server, rclone};
use crate::launch::{How, Mount};
use crate::share;
use crate::words::{Words, redacted};

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
    /// Unmount it in order. `flush`: it fails only where something that was written to it may not have arrived.
    Leave { place: PathBuf, flush: bool },
    /// Get it out of the way at once, whoever uses it. `force`: whoever waits for it gets an error.
    Detach { place: PathBuf, force: bool },
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

/// Does something within some time, or until nobody wants it any more. What has not ended by then is left to the kernel. Returns what it
/// says, and what it has left behind goes on saying.
pub fn within(
    own: &[&str],
    step: &Step,
    most: Duration,
    unwanted: &dyn Fn() -> bool,
) -> Result<Words, StepError> {
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
    let words = Words::of(&mut child);
    let end = Instant::now() + most;
    match ended(&mut child, end, unwanted) {
        Some(true) => Ok(words),
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
            // Programs quote what they were given.
            eprintln!("{}", redacted(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn begin() -> io::Result<()> {
    shutdown::keep_memory_private();
    let mut question = Vec::new();
    io::stdin().read_to_end(&mut question)?;
    let (parent, step): (u32, Step) = serde_json::from_slice(&question)?;
    setsid()?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have ended before the line above.
    if getppid().as_raw() as u32 != parent {
        return Err(io::Error::other("nobody waits for it"));
    }
    take(step)
}

fn take(step: Step) -> io::Result<()> {
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
            How::Nfs {
                address,
                port,
                version,
                directory,
                options,
                fresh,
            } => {
                let source = file_server::Source {
                    host: address,
                    port: *port,
                    version: *version,
                    directory,
                };
                let how = (options.as_str(), *fresh);
                file_server::nfs(&source, how, Path::new(&mount.path), until)
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
                    patience: Duration::from_millis(
                        u64::try_from(until - boot_millis()).unwrap_or_default(),
                    ),
                };
                rclone::mount(remote, &key, &point)
            }
        },
        Step::Leave { place, flush } => leave(&place, flush),
        Step::Detach { place, force } => {
            let name = beside(&place)?;
            let mut flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
            flags.set(MntFlags::MNT_FORCE, force);
            Ok(umount2(name, flags)?)
        }
        Step::Look { path, server } => {
            statfs(path.as_str())?;
            server.map_or(Ok(()), |(host, port)| rclone::reach(&host, port).map(drop))
        }
    }
}

/// Goes to where the name of a mount is: what leads there may be somebody's who puts a link in its place meanwhile. What is mounted is not
/// even looked at.
fn beside(place: &Path) -> io::Result<&OsStr> {
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
    Ok(name)
}

/// What the kernel has of what was written is sent on first, where it keeps that: unmounting does so as well, and says nothing of what fails.
fn leave(place: &Path, flush: bool) -> io::Result<()> {
    let name = beside(place)?;
    if !flush {
        return Ok(umount2(name, MntFlags::UMOUNT_NOFOLLOW)?);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let flushed = match open(name, flags, Mode::empty()) {
        Ok(dir) => {
            syncfs(&dir)?;
            true
        }
        // Some servers let everybody in but root.
        Err(Errno::EACCES | Errno::EPERM) => false,
        Err(error) => return Err(error.into()),
    };
    match umount2(name, MntFlags::UMOUNT_NOFOLLOW) {
        // Somebody uses it; what there was to lose has arrived.
        Err(_) if flushed => Ok(()),
        done => Ok(done?),
    }
}

/// What bash is told: the command of the user's with the path behind it, which is one word whatever is in it.
fn appended(line: &str, path: &str) -> String {
    let path = path.replace('\'', r"'\''");
    format!("{line} '{path}'")
}

/// Becomes the command.
fn run(line: &str, path: &str, env: &BTreeMap<String, String>) -> io::Error {
    Command::new("/bin/bash")
        .arg("-c")
        .arg(appended(line, path))
        .env_clear()
        .envs(env)
        .current_dir("/")
        .stdin(Stdio::null())
        .exec()
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1::{MountVolumes, UnmanagedFileSystem};

    use super::*;
    use crate::launch;

    /// What bash is told for a file system of the user's own.
    fn told(command: &str, path: &str) -> String {
        let system = UnmanagedFileSystem {
            mount_command: command.to_owned(),
            relative_mount_path: path.to_owned(),
        };
        let volumes = MountVolumes {
            unmanaged_file_systems: vec![system],
            ..Default::default()
        };
        let (stead, root) = (BTreeMap::new(), "/mnt/batchai/mounts");
        let mounts = launch::mounts(Some(&volumes), &stead, &[], root, (0, 0)).unwrap();
        match &mounts[0].how {
            launch::How::Command(line) => appended(line, &mounts[0].path),
            other => panic!("{other:?}"),
        }
    }

    /// Golden: no Lustre was ever mounted by these.
    #[test]
    fn lustre_is_mounted_by_the_command_with_the_path_behind_it() {
        for (command, path, expected) in [
            (
                "mount -t lustre 10.0.0.4@tcp0:/lab",
                "scratch",
                "mount -t lustre 10.0.0.4@tcp0:/lab '/mnt/batchai/mounts/scratch'",
            ),
            (
                "mount -t lustre -o flock,noatime 10.0.0.4@o2ib:10.0.0.5@o2ib:/lab/sets",
                "data/./sets/",
                "mount -t lustre -o flock,noatime 10.0.0.4@o2ib:10.0.0.5@o2ib:/lab/sets '/mnt/batchai/mounts/data/sets'",
            ),
            (
                "modprobe lustre && mount -t lustre mgs@tcp:/lab",
                "it's",
                r"modprobe lustre && mount -t lustre mgs@tcp:/lab '/mnt/batchai/mounts/it'\''s'",
            ),
        ] {
            assert_eq!(told(command, path), expected);
        }
    }
}
