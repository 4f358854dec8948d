//! The log files of an attempt on this host: what its processes print, and what the shim did.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use batchai_common::limits::LAST_WORDS_BYTES_MAX;
use batchai_common::time::boot_time;
use nix::unistd::read;

use super::rotation::Rotation;
use crate::launch::LogLimit;

const READ_BYTES: usize = 64 << 10;
/// Lines that an error takes.
const LAST_LINES_MAX: usize = 20;

/// A pipe and the file it runs into.
pub struct Stream {
    pipe: OwnedFd,
    file: File,
    rotation: Rotation,
    /// The error of the last write. What cannot be written is drained and lost: a full disk must not hold up the
    /// process.
    failed: Option<io::Error>,
    /// Bytes that were lost and are not yet marked in the file.
    lost: u64,
}

/// The last lines of a log file, as many as an error takes. Where it cannot be read, nothing: it is only said along.
pub fn last_words(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        let begin = file
            .metadata()?
            .len()
            .saturating_sub(LAST_WORDS_BYTES_MAX as u64);
        let mut end = vec![0; LAST_WORDS_BYTES_MAX];
        let length = file.read_at(&mut end, begin)?;
        end.truncate(length);
        Ok(end)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.trim_end().lines().rev().take(LAST_LINES_MAX).collect();
    let mut last: String = lines.into_iter().rev().collect::<Vec<_>>().join("\n");
    // What is no text takes more room once it is one.
    while last.len() > LAST_WORDS_BYTES_MAX {
        last.remove(0);
    }
    last
}

/// What reading a pipe came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing more for now.
    Empty,
    /// Nothing more ever.
    Closed,
}

impl Stream {
    /// Appends what comes out of a pipe to a file, of which so much is kept.
    pub fn new(pipe: OwnedFd, path: &Path, limit: LogLimit) -> io::Result<Stream> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Stream {
            pipe,
            rotation: Rotation::new(limit, &file, boot_time())?,
            file,
            failed: None,
            lost: 0,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Takes what is there, up to a bound, so that one process that floods its pipe does not starve the others.
    pub fn drain(&mut self, buffer: &mut Vec<u8>) -> Drained {
        const READS_MAX: usize = 16;
        buffer.resize(READ_BYTES, 0);
        for _ in 0..READS_MAX {
            match read(&self.pipe, buffer) {
                Ok(0) => return Drained::Closed,
                Ok(count) => self.append(&buffer[..count]),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Drained::Empty,
                Err(_) => return Drained::Closed,
            }
        }
        Drained::Empty
    }

    fn append(&mut self, data: &[u8]) {
        if self.lost > 0 {
            let mark = format!(
                "\n[batchai: {} bytes were lost: the disk was full]\n",
                self.lost
            );
            if !self.write(mark.as_bytes()).is_empty() {
                self.lost += data.len() as u64;
                return;
            }
            self.lost = 0;
        }
        self.lost += self.write(data).len() as u64;
    }

    /// Writes what can be written; returns the rest.
    fn write<'a>(&mut self, mut data: &'a [u8]) -> &'a [u8] {
        let room = self
            .rotation
            .make_room(&self.file, data.len() as u64, boot_time());
        self.failed = room.err();
        while !data.is_empty() && self.failed.is_none() {
            match self.file.write(data) {
                Ok(count) if count > 0 => {
                    self.rotation.written(count as u64);
                    data = &data[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) => self.failed = Some(io::Error::from(io::ErrorKind::WriteZero)),
                Err(error) => self.failed = Some(error),
            }
        }
        data
    }

    /// What went wrong with the file.
    pub fn failure(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }
}

/// `execution.log`: what the shim did, a line each, with the time.
pub struct ExecutionLog {
    path: PathBuf,
}

impl ExecutionLog {
    pub fn new(path: PathBuf) -> ExecutionLog {
        ExecutionLog { path }
    }

    /// Adds a line. Where that fails, standard error gets it: the job goes on.
    pub fn say(&self, text: &str) {
        let now = batchai_common::time::now();
        let line = format!("{now} {text}\n");
        let opened = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path);
        if let Err(error) = opened.and_then(|mut file| file.write_all(line.as_bytes())) {
            super::tell(&format!("{}: {error}: {line}", self.path.display()));
        }
    }
}
