//! What a command reads and prints to, and the ends of that which the agent has: three pipes, or a terminal.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::process::{ChildStdin, Stdio};

use batchai_common::limits::EXEC_CHUNK_BYTES_MAX;
use batchai_proto::v1::TerminalSize;
use bytes::{Buf as _, Bytes};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::libc::EIO;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use tokio::net::unix::pipe::{Receiver, Sender};

use crate::launch::JobUser;
use crate::shim::resize_terminal;

/// What a terminal takes for the end of the input.
const END_OF_INPUT: &[u8] = &[4];

/// What the command gets, and the agent's ends of it.
pub struct StreamsOf {
    pub output: Stdio,
    pub error: Stdio,
    pub ends: Ends,
}

/// The agent's ends, while the command has not begun.
pub enum Ends {
    Pipes(PipeReader, PipeReader),
    Terminal(File),
}

impl StreamsOf {
    /// Makes them, for a user: what is printed can be opened by its name as well (`/dev/stdout`).
    pub fn new(size: Option<&TerminalSize>, user: Option<&JobUser>) -> io::Result<StreamsOf> {
        let Some(size) = size else {
            let (output, error) = (io::pipe()?, io::pipe()?);
            give(&output.1, user)?;
            give(&error.1, user)?;
            return Ok(StreamsOf {
                output: output.1.into(),
                error: error.1.into(),
                ends: Ends::Pipes(output.0, error.0),
            });
        };
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let terminal = posix_openpt(flags)?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let path = ptsname_r(&terminal)?;
        let inner = open(path.as_str(), flags, Mode::empty())?;
        give(&inner, user)?;
        let terminal = File::from(OwnedFd::from(terminal));
        resize(&terminal, size)?;
        Ok(StreamsOf {
            output: inner.try_clone()?.into(),
            error: inner.into(),
            ends: Ends::Terminal(terminal),
        })
    }
}

fn give(stream: impl AsFd, user: Option<&JobUser>) -> io::Result<()> {
    match user {
        Some(user) => fchown(stream, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

fn resize(terminal: &File, size: &TerminalSize) -> io::Result<()> {
    let count = |count: i32| u16::try_from(count).unwrap_or(u16::MAX);
    resize_terminal(terminal, count(size.rows), count(size.columns))
}

impl Ends {
    /// Ready to be read and written without waiting.
    pub fn complete(
        self,
        stdin: Option<ChildStdin>,
        user: Option<&JobUser>,
    ) -> io::Result<Streams> {
        match self {
            Ends::Pipes(output, error) => {
                let input = match stdin {
                    None => None,
                    Some(stdin) => {
                        give(&stdin, user)?;
                        Some(Input::new(stdin)?)
                    }
                };
                Ok(Streams {
                    input,
                    output: Some(Output::new(output)?),
                    error: Some(Output::new(error)?),
                    terminal: None,
                })
            }
            Ends::Terminal(terminal) => Ok(Streams {
                input: Some(Input::new(terminal.try_clone()?)?),
                output: Some(Output::new(terminal.try_clone()?)?),
                error: None,
                terminal: Some(terminal),
            }),
        }
    }
}

/// The agent's ends of what a command reads and prints.
pub struct Streams {
    pub input: Option<Input>,
    pub output: Option<Output>,
    pub error: Option<Output>,
    terminal: Option<File>,
}

impl Streams {
    /// Gives the terminal another size, where there is one.
    pub fn resize(&self, size: &TerminalSize) {
        if let Some(terminal) = &self.terminal
            && let Err(error) = resize(terminal, size)
        {
            tracing::debug!(%error, "a terminal keeps its size");
        }
    }

    /// What there is to write at the end of the input; a pipe is closed instead, when all is written.
    pub fn last_input(&self) -> Option<Bytes> {
        let typed = || Bytes::from_static(END_OF_INPUT);
        self.terminal.as_ref().map(|_| typed())
    }
}

fn without_waiting(file: OwnedFd) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(file.into())
}

/// What the command prints to.
pub struct Output(Receiver);

impl Output {
    fn new(file: impl Into<OwnedFd>) -> io::Result<Output> {
        // A terminal is read like a pipe.
        let file = without_waiting(file.into())?;
        Ok(Output(Receiver::from_file_unchecked(file)?))
    }

    /// The next bytes; none at the end.
    pub async fn read(&self) -> io::Result<Bytes> {
        loop {
            self.0.readable().await?;
            let mut buffer = vec![0; EXEC_CHUNK_BYTES_MAX];
            match self.0.try_read(&mut buffer) {
                // What is small does not hold on to what is not.
                Ok(read) => return Ok(Bytes::copy_from_slice(&buffer[..read])),
                // So it is told that nobody has the terminal any more.
                Err(error) if error.raw_os_error() == Some(EIO) => return Ok(Bytes::new()),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What the command reads from.
pub struct Input(Sender);

impl Input {
    fn new(file: impl Into<OwnedFd>) -> io::Result<Input> {
        let file = without_waiting(file.into())?;
        Ok(Input(Sender::from_file_unchecked(file)?))
    }

    /// Writes as much as there is room for.
    pub async fn write(&self, data: &mut Bytes) -> io::Result<()> {
        loop {
            self.0.writable().await?;
            match self.0.try_write(data) {
                Ok(written) => {
                    data.advance(written);
                    return Ok(());
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), Interrupted | WouldBlock)
}
