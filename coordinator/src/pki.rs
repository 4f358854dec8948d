//! Certificates of this coordinator: its own, and the authority that signs those of others.
//!
//! They lie in `pki` of the data directory, made by `init`; or they come from elsewhere, in one file. Either way what lies
//! there is looked at again and again: what is about to expire is made anew, what was replaced is read, and new connections
//! have it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use batchai_common::tls::credentials::write_private;
use batchai_common::tls::{Authority, Credentials, CredentialsError, Identity, shown};
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Config};
use crate::ensemble::{Ensemble, EnsembleError};
use crate::secrets::KeyringError;

/// How long the coordinator's own certificate is good. It is made anew when a third of that is left.
const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// How long the administrator's is.
const ADMIN_LIFETIME: Duration = Duration::from_secs(366 * 24 * 3600);
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// The administrator's credentials, in the data directory.
pub const ADMIN_FILE: &str = "admin.pem";
/// Where coordinators are reached, one name a line.
const NAMES_FILE: &str = "names";
/// The administrator's name.
const ADMIN_NAME_FILE: &str = "admin";
const SERVER_FILE: &str = "coordinator.pem";
/// The names by which any coordinator is reached from its own machine.
const OWN_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error(
        "{path} has no certificates yet: make them with `batchai coordinator init --data {path}`, or give --credentials FILE",
        path = .path.display()
    )]
    None { path: PathBuf },
    #[error("{path} has certificates already", path = .path.display())]
    Exists { path: PathBuf },
    #[error("{path}: {source}", path = .path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {source}", path = .path.display())]
    Credentials {
        path: PathBuf,
        source: CredentialsError,
    },
    #[error(transparent)]
    Make(#[from] CredentialsError),
    #[error(transparent)]
    Ensemble(#[from] EnsembleError),
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    #[error(
        "{path}: its certificate is not that of replica {id}, and the other replicas know each by it: it must name batchai:replicas/{id}",
        path = .path.display()
    )]
    NotReplica { path: PathBuf, id: u64 },
    #[error("replica {id} is there already: {path}", path = .path.display())]
    Replica { id: u64, path: PathBuf },
}

fn directory(data: &Path) -> PathBuf {
    data.join("pki")
}

/// What an ensemble begins with.
#[derive(Clone, Debug)]
pub struct Begin {
    /// Names by which clients that are not our own reach the coordinators.
    pub names: Vec<String>,
    pub admin: String,
    /// Its replicas, the first of which is this one; one that is alone where there are none.
    pub replicas: BTreeMap<u64, String>,
}

/// Makes an authority, a certificate of its own and the administrator's credentials in a data directory, and a directory for
/// each other replica; returns where the administrator's credentials lie.
///
/// # Errors
/// There are some already, or they cannot be written.
pub fn init(data: &Path, begin: Begin) -> Result<PathBuf, PkiError> {
    let dir = directory(data);
    if dir.exists() {
        return Err(PkiError::Exists {
            path: data.to_owned(),
        });
    }
    let several = begin.replicas.len() > 1;
    let ensemble = Ensemble::new(begin.replicas);
    fs::create_dir_all(data).map_err(at(data))?;
    // Whole or not there: what an earlier one left that was cut off is of no use.
    let part = new_directory(&data.join("pki.part"))?;
    let authority = Authority::new()?;
    authority.write(&part)?;
    write_private(&part.join(NAMES_FILE), &begin.names.join("\n"))?;
    write_private(&part.join(ADMIN_NAME_FILE), &begin.admin)?;
    issue_own(&authority, &part, ensemble.replica)?;
    let identity = Identity::user(&begin.admin).map_err(CredentialsError::from)?;
    let credentials = authority.credentials(&identity, &[], ADMIN_LIFETIME)?;
    let file = data.join(ADMIN_FILE);
    write_private(&file, &credentials)?;
    ensemble.write(data)?;
    if several {
        // All of them must have the same.
        config::keys(None, data).make()?;
    }
    fs::rename(&part, &dir).map_err(at(&dir))?;
    for id in ensemble.voters().into_iter().skip(1) {
        add_replica(data, id)?;
    }
    Ok(file)
}

/// Makes the data directory of another replica, to be taken to its machine; returns where it lies.
///
/// # Errors
/// There is one already, or it cannot be written.
pub fn add_replica(data: &Path, id: u64) -> Result<PathBuf, PkiError> {
    let ensemble = Ensemble::read(data)?;
    let path = data.join("replicas").join(id.to_string());
    if path.exists() || id == ensemble.replica {
        return Err(PkiError::Replica { id, path });
    }
    let own = directory(data);
    let authority = Authority::read(&own)?;
    let keys = config::keys(None, data);
    keys.make()?;
    fs::create_dir_all(data.join("replicas")).map_err(at(data))?;
    let part = new_directory(&path.with_extension("part"))?;
    let pki = new_directory(&directory(&part))?;
    authority.write(&pki)?;
    for name in [NAMES_FILE, ADMIN_NAME_FILE] {
        let text = fs::read_to_string(own.join(name)).map_err(at(&own))?;
        write_private(&pki.join(name), &text)?;
    }
    issue_own(&authority, &pki, id)?;
    let copy = Ensemble {
        replica: id,
        ..ensemble
    };
    copy.write(&part)?;
    keys.copy_to(&part.join(config::SECRETS_KEY_FILE))?;
    fs::rename(&part, &path).map_err(at(&path))?;
    Ok(path)
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::File {
        path: path.clone(),
        source,
    }
}

/// A private directory, empty whatever was there.
fn new_directory(path: &Path) -> Result<PathBuf, PkiError> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(at(path))?;
    }
    fs::create_dir(path).map_err(at(path))?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(path, private).map_err(at(path))?;
    Ok(path.to_owned())
}

/// Makes credentials for a user, with the authority's key.
pub fn certify(data: &Path, user: &str, to: &Path) -> Result<(), PkiError> {
    let authority = Authority::read(&directory(data))?;
    let identity = Identity::user(user).map_err(CredentialsError::from)?;
    let credentials = authority.credentials(&identity, &[], ADMIN_LIFETIME)?;
    Ok(write_private(to, &credentials)?)
}

/// Who may do everything: nobody where nobody was named.
pub fn admin(config: &Config) -> String {
    let kept = || {
        let path = directory(&config.data).join(ADMIN_NAME_FILE);
        let own = config
            .credentials
            .is_none()
            .then(|| fs::read_to_string(path));
        own.and_then(Result::ok)
    };
    config.admin.clone().or_else(kept).unwrap_or_default()
}

fn issue_own(authority: &Authority, dir: &Path, id: u64) -> Result<(), CredentialsError> {
    let path = dir.join(NAMES_FILE);
    let text = fs::read_to_string(&path);
    let text = text.map_err(|source| CredentialsError::File { path, source })?;
    let mut names: Vec<_> = text.lines().map(str::to_owned).collect();
    names.extend(OWN_NAMES.map(str::to_owned));
    let own = Identity::Replica { id };
    let credentials = authority.credentials(&own, &names, LIFETIME)?;
    write_private(&dir.join(SERVER_FILE), &credentials)
}

/// Certificates, and whoever keeps them fresh.
pub struct Pki {
    /// None where they come from elsewhere.
    pub authority: Option<Arc<Authority>>,
    server: watch::Sender<Arc<ServerConfig>>,
    client: watch::Sender<Arc<ClientConfig>>,
    replica: u64,
    path: PathBuf,
    modified: Option<SystemTime>,
    not_after: i64,
}

impl Pki {
    /// Reads what there is. None where there is no TLS at all.
    pub fn open(config: &Config) -> Result<Option<Pki>, PkiError> {
        if config.insecure_lab {
            return Ok(None);
        }
        let dir = directory(&config.data);
        let (authority, path) = match &config.credentials {
            Some(path) => (None, path.clone()),
            None if !dir.exists() => {
                return Err(PkiError::None {
                    path: config.data.clone(),
                });
            }
            None => (
                Some(Arc::new(Authority::read(&dir)?)),
                dir.join(SERVER_FILE),
            ),
        };
        let ensemble = Ensemble::read(&config.data)?;
        if ensemble.first.len() > 1 {
            check_replica(&path, ensemble.replica)?;
        }
        let (server, client, modified, not_after) = read(&path)?;
        let mut pki = Pki {
            authority,
            server: watch::Sender::new(server),
            client: watch::Sender::new(client),
            replica: ensemble.replica,
            path,
            modified,
            not_after,
        };
        pki.renew()?;
        Ok(Some(pki))
    }

    /// What new connections are greeted with.
    pub fn server(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.server.subscribe()
    }

    /// What this replica shows to others.
    pub fn client(&self) -> watch::Receiver<Arc<ClientConfig>> {
        self.client.subscribe()
    }

    /// Keeps it fresh until the token is cancelled.
    pub async fn keep_fresh(mut self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = shutdown.cancelled() => return,
            }
            if let Err(error) = self.renew().and_then(|()| self.reload()) {
                tracing::error!(%error, "certificates stay as they were");
            }
        }
    }

    fn renew(&mut self) -> Result<(), PkiError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let left = self.not_after - now.map_or(0, |now| now.as_secs() as i64);
        let Some(authority) = &self.authority else {
            return Ok(());
        };
        if left > LIFETIME.as_secs() as i64 / 3 {
            return Ok(());
        }
        tracing::info!(left, "the coordinator's certificate is made anew");
        let dir = self.path.parent().unwrap_or(&self.path);
        issue_own(authority, dir, self.replica)?;
        self.reload()
    }

    fn reload(&mut self) -> Result<(), PkiError> {
        let modified = fs::metadata(&self.path)
            .and_then(|found| found.modified())
            .ok();
        if modified == self.modified {
            return Ok(());
        }
        let (server, client, modified, not_after) = read(&self.path)?;
        tracing::info!(path = %self.path.display(), "new connections have another certificate");
        self.server.send_replace(server);
        self.client.send_replace(client);
        (self.modified, self.not_after) = (modified, not_after);
        Ok(())
    }
}

/// Whether a file of credentials is of a replica.
fn check_replica(path: &Path, id: u64) -> Result<(), PkiError> {
    let read = Credentials::read(path).map_err(|source| PkiError::Credentials {
        path: path.to_owned(),
        source,
    })?;
    let named = read.certificate().and_then(shown);
    match named.is_some_and(|shown| shown.identity == Identity::Replica { id }) {
        true => Ok(()),
        false => Err(PkiError::NotReplica {
            path: path.to_owned(),
            id,
        }),
    }
}

type Read = (
    Arc<ServerConfig>,
    Arc<ClientConfig>,
    Option<SystemTime>,
    i64,
);

fn read(path: &Path) -> Result<Read, PkiError> {
    let failed = |source| PkiError::Credentials {
        path: path.to_owned(),
        source,
    };
    let modified = fs::metadata(path).and_then(|found| found.modified()).ok();
    let credentials = Credentials::read(path).map_err(failed)?;
    let server = credentials.server().map_err(failed)?;
    let client = credentials.client().map_err(failed)?;
    let not_after = credentials
        .certificate()
        .and_then(shown)
        .map(|shown| shown.not_after);
    // One from elsewhere may name nobody: it is a server's.
    Ok((server, client, modified, not_after.unwrap_or(i64::MAX)))
}
