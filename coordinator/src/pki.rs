//! Certificates of this coordinator: its own, and the authority that signs those of others.
//!
//! They lie in `pki` of the data directory, made by `init`; or they come from elsewhere, in one file. Either way what lies
//! there is looked at again and again: what is about to expire is made anew, what was replaced is read, and new connections
//! have it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use batchai_common::tls::credentials::write_private;
use batchai_common::tls::{Authority, Credentials, CredentialsError, Identity, shown};
use rustls::ServerConfig;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::Config;

/// The id of the first replica of an ensemble.
pub const FIRST_REPLICA: u64 = 1;
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
}

fn directory(data: &Path) -> PathBuf {
    data.join("pki")
}

/// Makes an authority, a certificate of its own and the administrator's credentials in a data directory; returns where these
/// lie.
///
/// # Errors
/// There are some already, or they cannot be written.
pub fn init(data: &Path, names: &[String], admin: &str) -> Result<PathBuf, PkiError> {
    let dir = directory(data);
    if dir.exists() {
        return Err(PkiError::Exists {
            path: data.to_owned(),
        });
    }
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| PkiError::File { path, source }
    };
    fs::create_dir_all(data).map_err(at(data))?;
    // Whole or not there: what an earlier one left that was cut off is of no use.
    let part = data.join("pki.part");
    if part.exists() {
        fs::remove_dir_all(&part).map_err(at(&part))?;
    }
    fs::create_dir(&part).map_err(at(&part))?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(&part, private).map_err(at(&part))?;
    let authority = Authority::new()?;
    authority.write(&part)?;
    write_private(&part.join(NAMES_FILE), &names.join("\n"))?;
    write_private(&part.join(ADMIN_NAME_FILE), admin)?;
    issue_own(&authority, &part)?;
    let identity = Identity::user(admin).map_err(CredentialsError::from)?;
    let credentials = authority.credentials(&identity, &[], ADMIN_LIFETIME)?;
    let file = data.join(ADMIN_FILE);
    write_private(&file, &credentials)?;
    fs::rename(&part, &dir).map_err(at(&dir))?;
    Ok(file)
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

fn issue_own(authority: &Authority, dir: &Path) -> Result<(), CredentialsError> {
    let path = dir.join(NAMES_FILE);
    let text = fs::read_to_string(&path);
    let text = text.map_err(|source| CredentialsError::File { path, source })?;
    let mut names: Vec<_> = text.lines().map(str::to_owned).collect();
    names.extend(OWN_NAMES.map(str::to_owned));
    let own = Identity::Replica { id: FIRST_REPLICA };
    let credentials = authority.credentials(&own, &names, LIFETIME)?;
    write_private(&dir.join(SERVER_FILE), &credentials)
}

/// Certificates, and whoever keeps them fresh.
pub struct Pki {
    /// None where they come from elsewhere.
    pub authority: Option<Arc<Authority>>,
    server: watch::Sender<Arc<ServerConfig>>,
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
        let (server, modified, not_after) = read(&path)?;
        let mut pki = Pki {
            authority,
            server: watch::Sender::new(server),
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
        issue_own(authority, self.path.parent().unwrap_or(&self.path))?;
        self.reload()
    }

    fn reload(&mut self) -> Result<(), PkiError> {
        let modified = fs::metadata(&self.path)
            .and_then(|found| found.modified())
            .ok();
        if modified == self.modified {
            return Ok(());
        }
        let (server, modified, not_after) = read(&self.path)?;
        tracing::info!(path = %self.path.display(), "new connections have another certificate");
        self.server.send_replace(server);
        (self.modified, self.not_after) = (modified, not_after);
        Ok(())
    }
}

type Read = (Arc<ServerConfig>, Option<SystemTime>, i64);

fn read(path: &Path) -> Result<Read, PkiError> {
    let failed = |source| PkiError::Credentials {
        path: path.to_owned(),
        source,
    };
    let modified = fs::metadata(path).and_then(|found| found.modified()).ok();
    let credentials = Credentials::read(path).map_err(failed)?;
    let server = credentials.server().map_err(failed)?;
    let not_after = credentials
        .certificate()
        .and_then(shown)
        .map(|shown| shown.not_after);
    // One from elsewhere may name nobody: it is a server's.
    Ok((server, modified, not_after.unwrap_or(i64::MAX)))
}
