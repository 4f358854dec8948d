//! The way of a job's secrets from the agent into the environment of its processes: through memory that has no name, and so
//! past every disk and command line.
//!
//! A shim gets them once, when it starts, and lives as long as the attempt does: an agent that comes later has none to give.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::process::Stdio;

use batchai_proto::agent::v1::Assignment;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::dup2_stdin;

use super::container::PASSWORD;
use super::{ShimError, system};

/// Values by the names of their variables.
pub type Secrets = BTreeMap<String, String>;

/// The secrets of an assignment's work.
pub fn of(assignment: &Assignment) -> Secrets {
    let secrets = assignment.job.iter().flat_map(|job| &job.secrets);
    secrets
        .map(|secret| (secret.name.clone(), secret.value.clone()))
        .collect()
}

/// The password of the registry that an assignment's image is pulled from, beside the secrets: no process of the job gets it.
pub fn registry_password(assignment: &Assignment) -> Option<(String, String)> {
    let container = assignment.job.as_ref()?.container_settings.as_ref()?;
    let credentials = container
        .image_source_registry
        .as_ref()?
        .credentials
        .as_ref()?;
    Some((PASSWORD.to_owned(), credentials.password.clone()))
}

/// What a shim that is about to start reads them from.
pub fn hand_over(secrets: &Secrets) -> std::io::Result<Stdio> {
    if secrets.is_empty() {
        return Ok(Stdio::null());
    }
    let mut memory = File::from(memfd_create(c"secrets", MFdFlags::MFD_CLOEXEC)?);
    memory.write_all(&serde_json::to_vec(secrets)?)?;
    memory.rewind()?;
    Ok(memory.into())
}

/// Takes what the agent handed over; nothing that is started later has it open.
pub fn take() -> Result<Secrets, ShimError> {
    let mut text = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut text);
    read.map_err(system("read what the agent hands over"))?;
    let nothing = File::open("/dev/null").map_err(system("/dev/null"))?;
    dup2_stdin(nothing).map_err(system("dup2"))?;
    match text.is_empty() {
        true => Ok(Secrets::new()),
        // The error would quote what it cannot read.
        false => serde_json::from_slice(&text).map_err(|_| ShimError::Secrets),
    }
}
