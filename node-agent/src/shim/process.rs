//! Starts the processes of an attempt, the shim's own helpers, and commands beside them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::time::Duration;

use batchai_common::time::boot_time;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, fork, getpid, getppid, setsid};

use super::container::Room;
use super::secrets::Secrets;
use crate::cgroups::{Bound, Group};
use crate::launch::{JobLimit, JobUser, ProcessPlan};
use crate::user::{Identity, become_user, give_up_privileges, take_limit};

/// A process that was started, and what it prints.
pub struct Started {
    pub pid: i32,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// What a process may.
#[derive(Clone, Copy)]
pub struct Rights<'a> {
    /// The group that it is in, with all that it starts.
    pub group: Option<&'a Group>,
    /// The groups in which what it takes is limited.
    pub bounds: &'a [Bound],
    /// How many files it may have open, soft and hard.
    pub open_files: Option<(u64, u64)>,
    /// What it may take beyond that.
    pub limits: &'a [JobLimit],
    /// Whom it runs as; the shim's own user where it is none.
    pub user: Option<&'a JobUser>,
    /// It may start what has more rights than it.
    pub may_gain: bool,
    /// What it is in; the host itself where it is none.
    pub room: Option<&'a Room>,
}

/// Starts a process in a session of its own, with nothing of the shim's but its pipes. It dies when the shim does.
pub fn start(plan: &ProcessPlan, secrets: &Secrets, rights: Rights<'_>) -> io::Result<Started> {
    let mut command = command(&plan.argv, &plan.env, &plan.cwd, rights)?;
    command
        .envs(secrets)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    in_its_own_session(&mut command, &plan.cwd, rights, false)?;
    let mut child = command.spawn()?;
    let missing = || io::Error::other("a pipe is missing");
    let stdout = OwnedFd::from(child.stdout.take().ok_or_else(missing)?);
    let stderr = OwnedFd::from(child.stderr.take().ok_or_else(missing)?);
    for pipe in [&stdout, &stderr] {
        fcntl(pipe.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    // The shim's loop reaps it, with all other children.
    Ok(Started {
        pid: child.id() as i32,
        stdout,
        stderr,
    })
}

/// Starts a command in a session of its own with these streams, of which the first is its terminal, where it has one. It dies when this
/// process does.
pub fn start_beside(
    (argv, cwd): (&[String], &str),
    env: &Secrets,
    [input, output, error]: [Stdio; 3],
    terminal: bool,
    rights: Rights<'_>,
) -> io::Result<i32> {
    let mut command = command(argv, env, cwd, rights)?;
    command.stdin(input).stdout(output).stderr(error);
    in_its_own_session(&mut command, cwd, rights, terminal)?;
    Ok(command.spawn()?.id() as i32)
}

/// A program with its variables and its directory, as they are where it runs.
fn command(argv: &[String], env: &Secrets, cwd: &str, rights: Rights<'_>) -> io::Result<Command> {
    let fitting = rights.room.map(|room| room.fit(argv, env));
    let (argv, env) = match &fitting {
        Some((argv, env)) => (&argv[..], env),
        None => (argv, env),
    };
    let missing = || io::Error::new(io::ErrorKind::InvalidInput, "there is no program to start");
    let (program, arguments) = argv.split_first().ok_or_else(missing)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(env);
    if rights.room.is_none() {
        command.current_dir(cwd);
    }
    Ok(command)
}

/// Has a command see mounts of its own.
#[allow(unsafe_code)]
pub fn in_its_own_namespace(command: &mut Command) {
    // SAFETY: the closure makes one system call.
    unsafe {
        command.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNS)?));
    }
}

/// A descriptor that the kernel has just passed to this process.
#[allow(unsafe_code)]
pub fn received(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel made it for who received the message, and nobody else has its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Gives a terminal another size: who runs in it is told by the kernel.
#[allow(unsafe_code)]
pub fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = nix::pty::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = terminal.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open while it is borrowed, and the kernel reads one such struct.
    let done = unsafe { nix::libc::ioctl(terminal, nix::libc::TIOCSWINSZ, &size) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// What has to happen between fork and exec.
#[allow(unsafe_code)]
fn in_its_own_session(
    command: &mut Command,
    cwd: &str,
    rights: Rights<'_>,
    terminal: bool,
) -> io::Result<()> {
    let shim = getpid();
    let entrances = entrances(rights.group, rights.bounds)?;
    let Rights {
        open_files,
        may_gain,
        ..
    } = rights;
    let user = rights.user.map(Identity::from);
    let limits = rights.limits.to_vec();
    let room = rights
        .room
        .map(|room| room.namespace().try_clone_to_owned());
    let room = room.transpose()?;
    let cwd = CString::new(cwd)?;
    // SAFETY: the shim has one thread, and the closure makes system calls only: it allocates nothing unless it fails.
    unsafe {
        command.pre_exec(move || {
            // First: it is the agent's to make, and nothing of the job's may run outside of it.
            enter(&entrances)?;
            // What spares the agent and the shim is not for jobs. A container may not let it be changed: then it stays.
            let _ = fs::write("/proc/self/oom_score_adj", "0");
            if let Some((soft, hard)) = open_files {
                setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
            }
            for limit in &limits {
                take_limit(limit)?;
            }
            if let Some(room) = &room {
                setns(room, CloneFlags::CLONE_NEWNS)?;
            }
            if let Some(user) = &user {
                become_user(user)?;
            }
            if room.is_some() {
                // As whom it is then; elsewhere it is there already.
                chdir(cwd.as_c_str())?;
            }
            give_up_privileges(may_gain)?;
            // Last: who becomes somebody else forgets with whom it dies.
            detach(shim)?;
            if terminal {
                // Its standard input, which is in its place by now.
                nix::errno::Errno::result(nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0))?;
            }
            Ok(())
        });
    }
    Ok(())
}

fn entrances(group: Option<&Group>, bounds: &[Bound]) -> io::Result<Vec<File>> {
    let group = group.map(|group| group.entrance().map(Some));
    let bounds = bounds.iter().map(Bound::entrance);
    let all = group.into_iter().chain(bounds);
    all.filter_map(Result::transpose).collect()
}

/// Puts this process into groups.
fn enter(entrances: &[File]) -> io::Result<()> {
    let mut entrances = entrances.iter();
    entrances.try_for_each(|mut entrance| entrance.write_all(b"0"))
}

/// Runs something that may hang in a child that dies with the shim; returns its pid. It is forked and not started anew:
/// it shares what the shim has in memory, and is there at once.
#[allow(unsafe_code)]
pub fn helper(
    (group, bounds): (Option<&Group>, &[Bound]),
    work: impl FnOnce() -> i32,
) -> io::Result<i32> {
    let shim = getpid();
    let entrances = entrances(group, bounds)?;
    // SAFETY: the shim has one thread, so that no lock is held by another one in the child, which never returns from
    // here.
    unsafe {
        match fork()? {
            ForkResult::Parent { child } => Ok(child.as_raw()),
            ForkResult::Child => {
                let work = AssertUnwindSafe(|| {
                    enter(&entrances)
                        .and_then(|()| detach(shim))
                        .map_or(1, |()| work())
                });
                nix::libc::_exit(catch_unwind(work).unwrap_or(101))
            }
        }
    }
}

/// Waits for a helper that should be done soon, but not for ever. `unwanted`: it is killed at once.
pub fn await_end(
    pid: i32,
    patience: Duration,
    unwanted: &mut dyn FnMut() -> bool,
) -> Result<(), String> {
    let pid = Pid::from_raw(pid);
    let until = boot_time() + patience;
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::StillAlive) if boot_time() < until && !unwanted() => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => {
                // It may be stuck in the kernel; nobody waits for it.
                let _ = kill(pid, Signal::SIGKILL);
                return Err(format!("{other:?}"));
            }
        }
    }
}

/// A session of its own, no blocked signals, and an end when the shim has one.
fn detach(shim: Pid) -> io::Result<()> {
    setsid()?;
    // The shim blocks signals that it reads from a descriptor; its children must not inherit that.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The shim may have died before the line above.
    match getppid() == shim {
        true => Ok(()),
        false => Err(io::Error::other("the shim is gone")),
    }
}
