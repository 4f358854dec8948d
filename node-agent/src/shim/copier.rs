//! Copies an attempt's log files to `$AZ_BATCHAI_STDOUTERR_DIR` as they grow, in a process of its own: the directory may
//! lie on a dead mount, and that must hold up nobody else.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use batchai_common::holes;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::{close, pipe2};

use super::process;
use crate::launch::JobUser;
use crate::user::with_files_of;

/// Files are looked at this often.
const PAUSE_MS: u16 = 200;

/// A copier that runs.
pub struct Copier {
    pub pid: i32,
    /// Closing it tells the copier to copy a last time.
    stop: OwnedFd,
}

/// Starts a copier. What cannot be copied now is tried again; only what cannot be copied at the end is an error.
pub fn start(from: &Path, to: &Path, user: Option<&JobUser>) -> io::Result<Copier> {
    let (stopped, stop) = pipe2(OFlag::O_CLOEXEC)?;
    let own = stop.as_raw_fd();
    // In no group: it copies what they said last that were killed in theirs.
    let pid = process::helper((None, &[]), || {
        // Its own copy of the end that the shim closes would keep it from ever being closed.
        match close(own)
            .map_err(io::Error::from)
            .and_then(|()| run((from, to), user, &stopped))
        {
            Ok(()) => 0,
            Err(error) => {
                super::tell(&format!(
                    "cannot copy log files to {}: {error}",
                    to.display()
                ));
                1
            }
        }
    })?;
    Ok(Copier { pid, stop })
}

impl Copier {
    /// Lets it copy a last time and waits until it has, but not for ever: it may hang on a dead mount. `unwanted`: it is killed at once.
    pub fn finish(
        self,
        patience: Duration,
        unwanted: &mut dyn FnMut() -> bool,
    ) -> Result<(), String> {
        drop(self.stop);
        process::await_end(self.pid, patience, unwanted)
    }
}

fn run((from, to): (&Path, &Path), user: Option<&JobUser>, stopped: &OwnedFd) -> io::Result<()> {
    let mut copied = BTreeMap::new();
    loop {
        let mut fds = [PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PAUSE_MS) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        let last = fds[0].revents().is_some_and(|events| !events.is_empty());
        let done = copy((from, to), user, &mut copied);
        // Nothing is ever written to it: it is readable when it is closed.
        if last {
            return done;
        }
    }
}

/// Appends to every file what it lacks; one that cannot be copied does not keep the others from it.
fn copy(
    (from, to): (&Path, &Path),
    user: Option<&JobUser>,
    copied: &mut BTreeMap<OsString, u64>,
) -> io::Result<()> {
    let mut failed = Ok(());
    for entry in fs::read_dir(from)? {
        if let Err(error) = copy_file(&entry?, to, user, copied) {
            failed = Err(error);
        }
    }
    failed
}

fn copy_file(
    entry: &fs::DirEntry,
    to: &Path,
    user: Option<&JobUser>,
    copied: &mut BTreeMap<OsString, u64>,
) -> io::Result<()> {
    let known = copied.get(&entry.file_name()).copied();
    let length = entry.metadata()?.len();
    if known == Some(length) {
        return Ok(());
    }
    let mut source = File::open(entry.path())?;
    // The first copy replaces what an earlier attempt of the job left there.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(known.is_none());
    // A link in a log file's place is nobody's wish.
    options.custom_flags(OFlag::O_NOFOLLOW.bits());
    // The directory is the job's, and may lie where only its user writes.
    let target = to.join(entry.file_name());
    let mut target = with_files_of(user, || options.open(target))?;
    // What was given up before it could be copied is a hole there as well.
    let offset = known.unwrap_or(0).max(holes::first_kept(&source)?);
    source.seek(SeekFrom::Start(offset))?;
    target.seek(SeekFrom::Start(offset))?;
    let count = io::copy(&mut source.take(length.saturating_sub(offset)), &mut target)?;
    copied.insert(entry.file_name(), offset + count);
    Ok(())
}
