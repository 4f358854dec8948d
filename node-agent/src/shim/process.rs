//! Starts one process of an attempt.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::{getppid, setsid};

use crate::launch::ProcessPlan;

/// A process that was started, and what it prints.
pub struct Started {
    pub pid: i32,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Starts a process in a session of its own, with nothing of the shim's but its pipes. It dies when the shim does.
pub fn start(plan: &ProcessPlan) -> io::Result<Started> {
    let (program, arguments) = plan.argv.split_first().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "there is no program to start")
    })?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&plan.env)
        .current_dir(&plan.cwd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    in_its_own_session(&mut command);
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

/// What has to happen between fork and exec, for ranks and the shim's own helpers alike.
#[allow(unsafe_code)]
pub fn in_its_own_session(command: &mut Command) {
    let shim = nix::unistd::getpid();
    let prepare = move || {
        setsid()?;
        // The shim blocks signals that it reads from a descriptor; its children must not inherit that.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The shim may have died before the line above.
        if getppid() != shim {
            return Err(io::Error::other("the shim is gone"));
        }
        Ok(())
    };
    // SAFETY: the shim has one thread, and the closure makes system calls only: it allocates nothing unless it fails.
    unsafe {
        command.pre_exec(prepare);
    }
}
