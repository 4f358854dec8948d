//! How this node shows who it is: it joins by a token, once, and keeps its certificate fresh.
//!
//! The key is made here and never leaves this machine. In a lab without TLS there is nothing to show.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use batchai_common::error::causes;
use batchai_common::tls::authority::Request;
use batchai_common::tls::connector::TargetError;
use batchai_common::tls::credentials::{pinned, write_private};
use batchai_common::tls::{Connector, Credentials, CredentialsError, shown};
use batchai_proto::agent::v1::join_service_client::JoinServiceClient;
use batchai_proto::agent::v1::{JoinRequest, RenewRequest};
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;
use tonic::Code;

use crate::config::Config;
use crate::journal::{Identity, Journal, JournalError};
use crate::session::backoff;

const FILE: &str = "credentials.pem";
const REQUEST_FILE: &str = "join-request.pem";
/// How often it is looked whether a certificate is about to expire, or was replaced.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// Another certificate is asked for when less than this part of its life is left.
const RENEW_PART: i64 = 3;

/// Why a machine is no node.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("the coordinator's URL is plain text: use https://, or give --insecure-lab in a test")]
    Plain,
    #[error("{path}: {source}", path = .path.display())]
    Credentials {
        path: PathBuf,
        source: CredentialsError,
    },
    #[error(transparent)]
    Make(#[from] CredentialsError),
    #[error(
        "this machine is no node yet: make a token with `batchai node token create` where an administrator is, and give it \
         with --join-token-file FILE or in BATCHAI_JOIN_TOKEN"
    )]
    NoToken,
    #[error("{path}: {source}", path = .path.display())]
    TokenFile {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the token is not one that `batchai node token create` printed")]
    Token,
    #[error("this machine was not taken as a node: {}", .0.message())]
    Refused(tonic::Status),
    #[error("the authority that came is not the one that the token names")]
    Authority,
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What a node shows, the latest of it.
pub struct Shows {
    path: PathBuf,
    /// The coordinator made it, and makes another.
    own: bool,
    latest: watch::Sender<Arc<ClientConfig>>,
    /// For the agents of other nodes.
    to_peers: watch::Sender<Arc<Credentials>>,
    of_peers: watch::Sender<Arc<ServerConfig>>,
    modified: Option<SystemTime>,
    lifetime: (i64, i64),
}

/// What this node shows; it joins first where it has nothing yet. None in a lab without TLS.
pub async fn shows(
    config: &Config,
    journal: &Journal,
    node_id: &str,
    identity: &mut Identity,
) -> Result<Option<Shows>, JoinError> {
    if Connector::is_plain(&config.coordinator) {
        if !config.insecure_lab {
            return Err(JoinError::Plain);
        }
        tracing::warn!(
            "--insecure-lab: anyone between here and the coordinator runs commands on this node"
        );
        return Ok(None);
    }
    let own = config.data.join(FILE);
    let path = config.credentials.clone().unwrap_or_else(|| own.clone());
    if path == own && !own.exists() {
        let (vm_size, credentials) = join(config, node_id, &identity.uid, &config.data).await?;
        // First of the two: with the credentials there it does not join again.
        identity.vm_size = vm_size;
        journal.keep(identity)?;
        write_private(&own, &credentials)?;
        tracing::info!(node = node_id, "joined");
    }
    let Read {
        client,
        server,
        credentials,
        modified,
        lifetime,
    } = read(&path)?;
    Ok(Some(Shows {
        own: path == own,
        path,
        latest: watch::Sender::new(client),
        to_peers: watch::Sender::new(credentials),
        of_peers: watch::Sender::new(server),
        modified,
        lifetime,
    }))
}

/// What is made of a file of credentials.
struct Read {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    credentials: Arc<Credentials>,
    modified: Option<SystemTime>,
    lifetime: (i64, i64),
}

fn read(path: &Path) -> Result<Read, JoinError> {
    let failed = |source| JoinError::Credentials {
        path: path.to_owned(),
        source,
    };
    let modified = std::fs::metadata(path).and_then(|found| found.modified());
    let credentials = Credentials::read(path).map_err(failed)?;
    let shown = credentials.certificate().and_then(shown);
    let lifetime = shown.map_or((0, i64::MAX), |shown| (shown.not_before, shown.not_after));
    Ok(Read {
        client: credentials.client().map_err(failed)?,
        server: credentials.server().map_err(failed)?,
        credentials: Arc::new(credentials),
        modified: modified.ok(),
        lifetime,
    })
}

/// Joins; returns the VM size that the token wants, and the credentials. It asks with the same key however often it is
/// started: who has not heard the answer is not another machine.
async fn join(
    config: &Config,
    node_id: &str,
    uid: &str,
    data: &Path,
) -> Result<(Option<String>, String), JoinError> {
    let token = token(config)?;
    let (text, authority) = token.rsplit_once('.').ok_or(JoinError::Token)?;
    let pin = digest(authority).ok_or(JoinError::Token)?;
    let trusted = watch::Sender::new(pinned(pin)?);
    let connector = Connector::new(&config.coordinator, Some(trusted.subscribe()))?;
    let (key, request) = asked(&data.join(REQUEST_FILE))?;
    let request = JoinRequest {
        token: text.to_owned(),
        node_id: node_id.to_owned(),
        uid: uid.to_owned(),
        certificate_request: request,
    };
    let mut failures = 0;
    let joined = loop {
        let tried = match connector.connect().await {
            Ok(channel) => JoinServiceClient::new(channel).join(request.clone()).await,
            Err(error) => Err(tonic::Status::unavailable(causes(&error))),
        };
        match tried {
            Ok(joined) => break joined.into_inner(),
            Err(status) if status.code() == Code::Unavailable => {
                tracing::warn!(error = status.message(), "cannot join; trying again");
                tokio::time::sleep(backoff(failures)).await;
                failures += 1;
            }
            Err(status) => return Err(JoinError::Refused(status)),
        }
    };
    let credentials = format!("{}{key}{}", joined.certificate, joined.authority);
    if Credentials::parse(credentials.as_bytes())?.authority() != Some(pin) {
        return Err(JoinError::Authority);
    }
    let vm_size = Some(joined.vm_size).filter(|vm_size| !vm_size.is_empty());
    Ok((vm_size, credentials))
}

/// The key and the request with which this machine asks to join; made where there are none.
fn asked(path: &Path) -> Result<(String, String), JoinError> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE REQUEST";
    let parts = |text: &str| {
        let at = text.find(BEGIN)?;
        Some((text[..at].to_owned(), text[at..].to_owned()))
    };
    let known = std::fs::read_to_string(path).ok();
    if let Some(known) = known.as_deref().and_then(parts) {
        return Ok(known);
    }
    let Request { key, request } = Request::new()?;
    write_private(path, &format!("{key}{request}"))?;
    Ok((key, request))
}

fn token(config: &Config) -> Result<String, JoinError> {
    let text = match (&config.join_token, &config.join_token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(path)) => {
            let read = std::fs::read_to_string(path);
            read.map_err(|source| JoinError::TokenFile {
                path: path.clone(),
                source,
            })?
        }
        (None, None) => return Err(JoinError::NoToken),
    };
    Ok(text.trim().to_owned())
}

/// A SHA-256 in hexadecimal digits.
fn digest(text: &str) -> Option<[u8; 32]> {
    let byte = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(byte).collect();
    bytes?.try_into().ok()
}

impl Shows {
    /// What connections are made with.
    pub fn latest(&self) -> watch::Receiver<Arc<ClientConfig>> {
        self.latest.subscribe()
    }

    /// What agents of other nodes are called with, and what they are answered with.
    pub fn of_peers(
        &self,
    ) -> (
        watch::Receiver<Arc<Credentials>>,
        watch::Receiver<Arc<ServerConfig>>,
    ) {
        (self.to_peers.subscribe(), self.of_peers.subscribe())
    }

    /// Keeps it fresh for ever.
    pub async fn keep_fresh(mut self, connector: Connector) {
        loop {
            if let Err(error) = self.look(&connector).await {
                tracing::error!(%error, "the node's certificate stays as it is");
            }
            tokio::time::sleep(self.pause()).await;
        }
    }

    /// One that lives for a short time is looked at more often.
    fn pause(&self) -> Duration {
        let (from, until) = self.lifetime;
        let tenth = until.saturating_sub(from) / 10;
        LOOK_INTERVAL.min(Duration::from_secs(tenth.max(1).unsigned_abs()))
    }

    async fn look(&mut self, connector: &Connector) -> Result<(), JoinError> {
        let (from, until) = self.lifetime;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let left = until.saturating_sub(now.map_or(0, |now| now.as_secs() as i64));
        // One from elsewhere is replaced by who made it.
        let due = self.own && left < until.saturating_sub(from) / RENEW_PART;
        let renewed = match due {
            true => self.renew(connector).await,
            false => Ok(()),
        };
        let modified = std::fs::metadata(&self.path).and_then(|found| found.modified());
        if modified.ok() != self.modified {
            let read = read(&self.path)?;
            self.latest.send_replace(read.client);
            self.to_peers.send_replace(read.credentials);
            self.of_peers.send_replace(read.server);
            (self.modified, self.lifetime) = (read.modified, read.lifetime);
        }
        renewed
    }

    async fn renew(&self, connector: &Connector) -> Result<(), JoinError> {
        let Request { key, request } = Request::new()?;
        let renew = RenewRequest {
            certificate_request: request,
        };
        let channel = connector.connect().await;
        let channel = channel
            .map_err(|error| JoinError::Refused(tonic::Status::unavailable(causes(&error))))?;
        let renewed = JoinServiceClient::new(channel).renew(renew).await;
        let renewed = renewed.map_err(JoinError::Refused)?.into_inner();
        let credentials = format!("{}{key}{}", renewed.certificate, renewed.authority);
        Credentials::parse(credentials.as_bytes())?.client()?;
        write_private(&self.path, &credentials)?;
        tracing::info!("the node has another certificate");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_all_its_digits() {
        assert_eq!(digest(&"0a".repeat(32)), Some([10; 32]));
        for text in ["", "0a", &"0".repeat(63), &"zz".repeat(32), &"é".repeat(32)] {
            assert_eq!(digest(text), None, "{text}");
        }
    }
}
