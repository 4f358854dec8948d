//! Work on what somebody else made, done by a process of its own, whose memory is bounded: what it finds out comes back through a pipe.
//!
//! It bounds neither the time that the work takes nor the disk: the job's end does the one, and `layers` the other.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _};

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::process;
use super::super::unpack::bound_memory;
use super::failure;
use crate::status::FailureRecord;

/// What such a process says, at most.
const SAID_BYTES_MAX: u64 = 1 << 20;
/// How it says what went wrong: the image, the disk, or this host.
const FAULTY: i32 = 2;
const FULL: i32 = 3;
const UNABLE: i32 = 4;
const GREEDY: &str = "to read it takes more memory than any image needs";

/// Why there is no image to use, by who has to do something about it.
#[derive(Debug)]
pub enum Trouble {
    /// Who made the image, or named it.
    Image(String),
    /// Nobody else than who has this host.
    Node(String),
    /// The same: its disk is full. There may be room yet.
    Full(String),
}

impl Trouble {
    /// What went wrong with an image for what it is, unless it was the disk, which is full or too small for it.
    pub fn of_image(error: &io::Error) -> Trouble {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Trouble::Full(error.to_string())
            }
            io::ErrorKind::FileTooLarge => Trouble::Node(error.to_string()),
            io::ErrorKind::OutOfMemory => Trouble::Image(GREEDY.to_owned()),
            _ => Trouble::Image(error.to_string()),
        }
    }

    /// As the job is told it; `what` could not be done.
    pub fn failure(&self, what: &str) -> FailureRecord {
        let infrastructure = !matches!(self, Trouble::Image(_));
        failure(format!("{what}: {self}"), infrastructure)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Trouble::Image(why) | Trouble::Node(why) | Trouble::Full(why)) = self;
        f.write_str(why)
    }
}

/// What this process does itself with its own files.
impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        match Trouble::of_image(&error) {
            full @ Trouble::Full(_) => full,
            _ => Trouble::Node(error.to_string()),
        }
    }
}

/// Does work in such a process, which is prepared first: what fails then is not the image's.
///
/// # Errors
/// Why it is not done, by who is to blame.
pub fn apart<T: Serialize + DeserializeOwned>(
    prepare: impl FnOnce() -> io::Result<()>,
    work: impl FnOnce() -> io::Result<T>,
) -> Result<T, Trouble> {
    let (from, to) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let mut to = File::from(to);
    let all = || {
        let (code, said) = match bound_memory().and_then(|()| prepare()) {
            Err(error) => (UNABLE, error.to_string().into_bytes()),
            Ok(()) => match work().map(|found| serde_json::to_vec(&found)) {
                Ok(Ok(found)) => (0, found),
                Ok(Err(error)) => (UNABLE, error.to_string().into_bytes()),
                Err(error) => match Trouble::of_image(&error) {
                    Trouble::Full(why) => (FULL, why.into_bytes()),
                    Trouble::Node(why) => (UNABLE, why.into_bytes()),
                    trouble => (FAULTY, trouble.to_string().into_bytes()),
                },
            },
        };
        to.write_all(&said).map_or(1, |()| code)
    };
    let pid = process::helper((None, &[]), all)?;
    drop(to);
    let mut said = Vec::new();
    // When this is done the pipe is closed: who says more does not wait for ever.
    File::from(from)
        .take(SAID_BYTES_MAX)
        .read_to_end(&mut said)?;
    let ended = waitpid(Pid::from_raw(pid), None).map_err(io::Error::from)?;
    judged(ended, &said)
}

/// What came of the work, by how its process ended and what it said.
fn judged<T: DeserializeOwned>(ended: WaitStatus, said: &[u8]) -> Result<T, Trouble> {
    let why = || String::from_utf8_lossy(said).into_owned();
    match ended {
        WaitStatus::Exited(_, 0) => serde_json::from_slice(said)
            .map_err(|error| Trouble::Image(format!("it is more than can be taken: {error}"))),
        WaitStatus::Exited(_, FAULTY) => Err(Trouble::Image(why())),
        WaitStatus::Exited(_, FULL) => Err(Trouble::Full(why())),
        WaitStatus::Exited(_, UNABLE) => Err(Trouble::Node(why())),
        // So ends who asks for more memory than he may have.
        WaitStatus::Signaled(_, Signal::SIGABRT, _) => Err(Trouble::Image(GREEDY.to_owned())),
        other => Err(Trouble::Node(format!(
            "the process that reads it has ended: {other:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_to_blame_is_told_apart() {
        let pid = Pid::from_raw(1);
        let of = |ended, said: &str| match judged::<String>(ended, said.as_bytes()) {
            Ok(found) => ("fine", found),
            Err(trouble @ Trouble::Image(_)) => ("image", trouble.to_string()),
            Err(trouble @ Trouble::Node(_)) => ("node", trouble.to_string()),
            Err(trouble @ Trouble::Full(_)) => ("full", trouble.to_string()),
        };
        let exited = |code| WaitStatus::Exited(pid, code);
        let signalled = |signal| WaitStatus::Signaled(pid, signal, false);
        assert_eq!(of(exited(0), "\"x\""), ("fine", "x".to_owned()));
        assert_eq!(of(exited(FAULTY), "bad"), ("image", "bad".to_owned()));
        assert_eq!(of(exited(FULL), "full"), ("full", "full".to_owned()));
        assert_eq!(of(exited(UNABLE), "no"), ("node", "no".to_owned()));
        assert_eq!(of(signalled(Signal::SIGABRT), "").0, "image");
        assert_eq!(of(signalled(Signal::SIGKILL), "").0, "node");
        // Cut off in the middle.
        assert_eq!(of(exited(0), "\"x").0, "image");

        let kinds = [
            (io::ErrorKind::StorageFull, "full", "full"),
            (io::ErrorKind::QuotaExceeded, "full", "full"),
            (io::ErrorKind::FileTooLarge, "node", "node"),
            (io::ErrorKind::OutOfMemory, "image", "node"),
            (io::ErrorKind::InvalidData, "image", "node"),
        ];
        let word = |trouble: &Trouble| match trouble {
            Trouble::Image(_) => "image",
            Trouble::Node(_) => "node",
            Trouble::Full(_) => "full",
        };
        for (kind, of_image, own) in kinds {
            let error = || io::Error::from(kind);
            assert_eq!(word(&Trouble::of_image(&error())), of_image, "{kind}");
            assert_eq!(word(&Trouble::from(error())), own, "{kind}");
        }
        assert!(!Trouble::Image(String::new()).failure("x").infrastructure);
        assert!(Trouble::Full(String::new()).failure("x").infrastructure);
    }
}
