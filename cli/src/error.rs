//! What can go wrong in a command, and the exit code that says so.

use std::io;
use std::path::PathBuf;

use tonic::{Code, Status};

use crate::output::shown;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(
        "cannot reach a coordinator at {endpoint}: {causes}\nStart one with `batchai dev`, or say where it is with \
         --endpoint or BATCHAI_ENDPOINT.",
        causes = batchai_common::error::causes(source)
    )]
    Connect {
        endpoint: String,
        source: tonic::transport::Error,
    },
    #[error(transparent)]
    Target(#[from] batchai_common::tls::connector::TargetError),
    #[error("{path}: {source}", path = .path.display())]
    Credentials {
        path: PathBuf,
        source: batchai_common::tls::CredentialsError,
    },
    #[error("{0}")]
    Pki(#[from] batchai_coordinator::PkiError),
    #[error(transparent)]
    Backup(#[from] batchai_coordinator::backup::BackupError),
    #[error("{}", .0.message())]
    Refused(#[from] Box<Status>),
    #[error("{path}: {source}", path = shown(&.path.to_string_lossy()))]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: {faults}", path = .path.display())]
    Content { path: PathBuf, faults: String },
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    System(#[from] io::Error),
}

impl From<Status> for CliError {
    fn from(status: Status) -> CliError {
        CliError::Refused(Box::new(status))
    }
}

impl CliError {
    /// 2 for what was typed wrong, 3 for a resource that does not exist, 1 for anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Refused(status) if status.code() == Code::NotFound => 3,
            CliError::Usage(_) | CliError::Target(_) | CliError::Credentials { .. } => 2,
            _ => 1,
        }
    }
}
