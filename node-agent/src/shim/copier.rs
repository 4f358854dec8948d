//! Copies an attempt's log files to `$AZ_BATCHAI_STDOUTERR_DIR` as they grow, in a process of its own: the directory may
//! lie on a dead mount, and that must hold up nobody else.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, poll};

/// Files are looked at this often.
const PAUSE_MS: u16 = 200;

/// Copies until standard input is closed, then once more. What cannot be copied now is tried again; only what cannot be
/// copied at the end is an error.
pub fn main(from: &Path, to: &Path) -> ExitCode {
    match run(from, to) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            super::tell(&format!(
                "cannot copy log files to {}: {error}",
                to.display()
            ));
            ExitCode::FAILURE
        }
    }
}

fn run(from: &Path, to: &Path) -> io::Result<()> {
    let mut copied = BTreeMap::new();
    let stdin = io::stdin();
    loop {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PAUSE_MS) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        let last = fds[0].revents().is_some_and(|events| !events.is_empty());
        let done = copy(from, to, &mut copied);
        // Nothing is ever written to standard input: it is readable when it is closed.
        if last {
            return done;
        }
    }
}

/// Appends to every file what it lacks; one that cannot be copied does not keep the others from it.
fn copy(from: &Path, to: &Path, copied: &mut BTreeMap<OsString, u64>) -> io::Result<()> {
    let mut failed = Ok(());
    for entry in fs::read_dir(from)? {
        if let Err(error) = copy_file(&entry?, to, copied) {
            failed = Err(error);
        }
    }
    failed
}

fn copy_file(
    entry: &fs::DirEntry,
    to: &Path,
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
    let mut target = options.open(to.join(entry.file_name()))?;
    let offset = known.unwrap_or(0);
    source.seek(SeekFrom::Start(offset))?;
    target.seek(SeekFrom::Start(offset))?;
    let count = io::copy(&mut source.take(length - offset), &mut target)?;
    copied.insert(entry.file_name(), offset + count);
    Ok(())
}
