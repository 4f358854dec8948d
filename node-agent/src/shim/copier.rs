//! Copies an attempt's log files to `$AZ_BATCHAI_STDOUTERR_DIR` as they grow, in a process of its own: the directory may
//! lie on a dead mount, and that must hold up nobody else.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Changes are gathered for so long.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Copies until standard input is closed, then once more.
pub fn main(from: &Path, to: &Path) -> ExitCode {
    match run(from, to) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot copy log files to {}: {error}", to.display());
            ExitCode::FAILURE
        }
    }
}

fn run(from: &Path, to: &Path) -> io::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(from, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)?;
    let mut copied = BTreeMap::new();
    let stdin = io::stdin();
    loop {
        copy(from, to, &mut copied)?;
        let mut fds = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(inotify.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        // Nothing is ever written to standard input: it is readable when it is closed.
        if fds[0].revents().is_some_and(|events| !events.is_empty()) {
            return copy(from, to, &mut copied);
        }
        std::thread::sleep(PAUSE);
        while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}

/// Appends to every file what it lacks.
fn copy(from: &Path, to: &Path, copied: &mut BTreeMap<std::ffi::OsString, u64>) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let known = copied.get(&entry.file_name()).copied();
        let length = entry.metadata()?.len();
        if known == Some(length) {
            continue;
        }
        let mut source = File::open(entry.path())?;
        let target = to.join(entry.file_name());
        // The first copy replaces what an earlier attempt of the job left there.
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(known.is_none());
        let mut target = options.open(target)?;
        let offset = known.unwrap_or(0);
        source.seek(SeekFrom::Start(offset))?;
        target.seek(SeekFrom::Start(offset))?;
        let count = io::copy(&mut source.take(length - offset), &mut target)?;
        copied.insert(entry.file_name(), offset + count);
    }
    Ok(())
}
