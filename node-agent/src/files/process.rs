//! The processes that look and write, as the agent sees them: fed, listened to, and given up.

use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_common::names::hex;
use batchai_proto::agent::v1::answer_file_request::Part;
use batchai_proto::agent::v1::file_entry::Kind;
use batchai_proto::agent::v1::{FileAlive, FileBegun, FileDone, FileEntries, FileEntry, FileFault};
use bytes::Bytes;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::look::What;
use super::put::Progress;
use super::{Send, Stop, Stuck, fault, look, passing, put};

/// Entries in one message.
const ENTRIES_MAX: usize = 500;
/// How long a process may be silent: less than the coordinator waits.
const SILENCE_MAX_MS: u16 = 20_000;
/// Processes that are stuck in the kernel: with so many, no other is started.
const STUCK_MAX: usize = 8;
/// Whoever waits and gets nothing is told this often that it goes on.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// When it was last said that something goes on.
pub struct Pulse(Instant);

impl Default for Pulse {
    fn default() -> Pulse {
        Pulse(Instant::now())
    }
}

impl Pulse {
    /// Whether it is to be said again; it counts as said then.
    pub fn is_due(&mut self) -> bool {
        let due = self.0.elapsed() >= ALIVE_EVERY;
        if due {
            self.0 = Instant::now();
        }
        due
    }
}

/// Starts processes that look.
#[derive(Clone)]
pub struct Starter {
    pub own: &'static [&'static str],
    pub stuck: Stuck,
}

impl Starter {
    /// One that looks.
    pub fn look(&self, wanted: &look::Wanted) -> Result<Looking, Stop> {
        let mut looking = self.start("look", wanted)?;
        looking.stdin = None;
        Ok(looking)
    }

    /// One that writes.
    pub fn put(&self, wanted: &put::Wanted) -> Result<Looking, Stop> {
        self.start("put", wanted)
    }

    fn start(&self, verb: &str, wanted: &impl Serialize) -> Result<Looking, Stop> {
        let stuck = self.stuck.load(Ordering::Relaxed);
        if stuck >= STUCK_MAX {
            let why = format!("{stuck} earlier looks still hang on this node: is a mount dead?");
            return Err(fault(why));
        }
        let started = self.spawn(verb, wanted);
        started.map_err(|error| fault(error.to_string()))
    }

    fn spawn(&self, verb: &str, wanted: &impl Serialize) -> io::Result<Looking> {
        let mut question = serde_json::to_vec(wanted).map_err(io::Error::other)?;
        question.push(b'\n');
        // The very file that this agent runs, even if it was replaced meanwhile.
        let child = Command::new("/proc/self/exe")
            .arg0(format!("batchai-{verb}"))
            .args(self.own)
            .arg(verb)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut looking = Looking {
            child,
            stdin: None,
            stuck: self.stuck.clone(),
        };
        looking.stdin = looking.child.stdin.take();
        if let Some(stdin) = &mut looking.stdin {
            stdin.write_all(&question)?;
        }
        Ok(looking)
    }
}

/// The next bytes that a process prints; none at the end.
fn next(pipe: Option<&mut (impl io::Read + AsFd)>, buffer: &mut [u8]) -> Result<usize, Stop> {
    let pipe = pipe.ok_or_else(|| fault("its output is not piped"))?;
    ready(pipe, PollFlags::POLLIN)?;
    pipe.read(buffer).map_err(|error| fault(error.to_string()))
}

/// Waits until a process takes or says something.
fn ready(fd: &impl AsFd, what: PollFlags) -> Result<(), Stop> {
    ready_within(fd, what, SILENCE_MAX_MS)
}

fn ready_within(fd: &impl AsFd, what: PollFlags, most_ms: u16) -> Result<(), Stop> {
    let mut fds = [PollFd::new(fd.as_fd(), what)];
    match poll(&mut fds, PollTimeout::from(most_ms)) {
        // A slow disk may answer the next one, and so may one that is mounted again.
        Ok(0) => Err(passing("the directory does not answer: is its mount dead?")),
        Ok(_) => Ok(()),
        Err(error) => Err(fault(error.to_string())),
    }
}

/// A process that looks or writes.
pub struct Looking {
    child: Child,
    stdin: Option<ChildStdin>,
    stuck: Stuck,
}

impl Looking {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Stop> {
        next(self.child.stdout.as_mut(), buffer)
    }

    pub fn bytes(&mut self, send: Send<'_>) -> Result<(), Stop> {
        let mut buffer = vec![0; FILE_CHUNK_BYTES_MAX];
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(()),
                read => send(Part::Data(Bytes::copy_from_slice(&buffer[..read])))?,
            }
        }
    }

    /// All bytes of a file, of which those from an offset on are passed on.
    pub fn whole(&mut self, from: u64, send: Send<'_>) -> Result<FileDone, Stop> {
        let mut buffer = vec![0; FILE_CHUNK_BYTES_MAX];
        let (mut hash, mut size, mut pulse) = (Sha256::new(), 0_u64, Pulse::default());
        loop {
            let read = self.read(&mut buffer)?;
            if read == 0 {
                return Ok(FileDone {
                    size_bytes: size as i64,
                    sha256: hex(&hash.finalize()),
                });
            }
            let piece = &buffer[..read];
            hash.update(piece);
            let known = from.saturating_sub(size).min(read as u64) as usize;
            size += read as u64;
            if known < read {
                send(Part::Data(Bytes::copy_from_slice(&piece[known..])))?;
            } else if pulse.is_due() {
                send(Part::Alive(FileAlive {}))?;
            }
        }
    }

    /// Has a file written, from where the process says to its size.
    pub fn write(
        &mut self,
        size: u64,
        mut data: mpsc::Receiver<Bytes>,
        send: Send<'_>,
    ) -> Result<(), Stop> {
        // It says why, where it ends without a word.
        let Some(offset) = self.begun(send)? else {
            return Ok(());
        };
        send(Part::Begun(FileBegun {
            offset: offset as i64,
        }))?;
        let mut left = size.saturating_sub(offset);
        while left > 0 {
            let piece = data.blocking_recv().ok_or(Stop::Unwanted)?;
            left = left.saturating_sub(piece.len() as u64);
            if !self.feed(&piece)? {
                break;
            }
        }
        self.stdin = None;
        // Until it has ended.
        let mut buffer = [0; 64];
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// From where on it wants bytes; none where it has ended before.
    fn begun(&mut self, send: Send<'_>) -> Result<Option<u64>, Stop> {
        let (mut said, mut buffer) = (Vec::new(), [0; 64]);
        loop {
            let read = self.read(&mut buffer)?;
            if read == 0 {
                return Ok(None);
            }
            said.extend_from_slice(&buffer[..read]);
            while let Some(end) = said.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = said.drain(..=end).collect();
                let said = serde_json::from_slice(&line).map_err(|e| fault(e.to_string()))?;
                match said {
                    Progress::Alive => send(Part::Alive(FileAlive {}))?,
                    Progress::From(offset) => return Ok(Some(offset)),
                }
            }
        }
    }

    /// Gives it bytes; whether it takes any.
    fn feed(&mut self, mut data: &[u8]) -> Result<bool, Stop> {
        let Some(stdin) = &mut self.stdin else {
            return Ok(false);
        };
        let nonblocking = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
        fcntl(stdin.as_fd(), nonblocking).map_err(|error| fault(error.to_string()))?;
        while !data.is_empty() {
            ready(stdin, PollFlags::POLLOUT)?;
            match stdin.write(data) {
                Ok(written) => data = &data[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
                Err(error) => return Err(fault(error.to_string())),
            }
        }
        Ok(true)
    }

    pub fn entries(&mut self, send: Send<'_>) -> Result<(), Stop> {
        let (mut text, mut buffer) = (Vec::new(), vec![0; FILE_CHUNK_BYTES_MAX]);
        loop {
            match self.read(&mut buffer)? {
                0 => break,
                read => text.extend_from_slice(&buffer[..read]),
            }
        }
        if text.is_empty() {
            return Ok(());
        }
        let found: Vec<look::Entry> =
            serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
        for part in found.chunks(ENTRIES_MAX) {
            let entries = part.iter().map(entry).collect();
            send(Part::Entries(FileEntries { entries }))?;
        }
        Ok(())
    }

    /// How it ended.
    pub fn finish(&mut self) -> Result<(), Stop> {
        let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
        loop {
            match next(self.child.stderr.as_mut(), &mut buffer)? {
                0 => break,
                read => said.extend_from_slice(&buffer[..read]),
            }
        }
        let status = self
            .child
            .wait()
            .map_err(|error| fault(error.to_string()))?;
        match status.code() {
            Some(0) => Ok(()),
            code => Err(Stop::Fault(FileFault {
                absent: code == Some(look::ABSENT),
                busy: code == Some(put::BUSY),
                passing: code == Some(put::DAMAGED),
                message: String::from_utf8_lossy(&said).trim().to_owned(),
            })),
        }
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // One that is stuck in the kernel is left to the kernel; who waits for it is a thread of its own.
            let _ = self.child.kill();
            let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
            let stuck = self.stuck.clone();
            stuck.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || {
                let _ = nix::sys::wait::waitpid(pid, None);
                stuck.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }
}

fn entry(found: &look::Entry) -> FileEntry {
    let kind = match found.what {
        What::File => Kind::File,
        What::Directory => Kind::Directory,
        What::Other => Kind::Other,
        What::Unreadable => Kind::Unreadable,
    };
    FileEntry {
        name: found.name.clone(),
        kind: kind as i32,
        length: found.length as i64,
        last_modified: Some(batchai_common::time::from_millis(found.modified_ms)),
        executable: found.executable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_may_be_over_the_next_time() {
        let (reader, _writer) = io::pipe().unwrap();
        let Err(Stop::Fault(fault)) = ready_within(&reader, PollFlags::POLLIN, 1) else {
            panic!("nobody writes");
        };
        assert!(fault.passing && fault.message.contains("does not answer"));
    }
}
