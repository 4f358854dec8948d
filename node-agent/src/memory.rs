//! The way of secrets from one process to another: through memory that has no name, and so past every disk, command line and environment.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::process::Stdio;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::dup2_stdin;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A file that is nowhere but in memory, and goes with the last process that has it open.
pub fn file(content: &[u8]) -> io::Result<File> {
    let mut memory = File::from(memfd_create(c"secrets", MFdFlags::MFD_CLOEXEC)?);
    memory.write_all(content)?;
    memory.rewind()?;
    Ok(memory)
}

/// What a process that is about to start reads something from.
pub fn hand_over<T: Serialize>(secrets: &T) -> io::Result<Stdio> {
    Ok(file(&serde_json::to_vec(secrets)?)?.into())
}

/// Takes what was handed over, on standard input; nothing that is started later has it open. Where nothing was: nothing.
pub fn take<T: DeserializeOwned + Default>() -> io::Result<T> {
    let mut text = Vec::new();
    io::stdin().lock().read_to_end(&mut text)?;
    dup2_stdin(File::open("/dev/null")?)?;
    match text.is_empty() {
        true => Ok(T::default()),
        // The error would quote what it cannot read.
        false => serde_json::from_slice(&text)
            .map_err(|_| io::Error::other("what was handed over is unreadable")),
    }
}
