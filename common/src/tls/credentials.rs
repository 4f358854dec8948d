//! Certificates and keys as they lie in files.
//!
//! A file of credentials is PEM: the own certificate and its key, then the certificates of those whom to trust. Without a
//! key there is no own certificate: all that is in it is trusted.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::trust::Trust;
use super::{ALPN, Identity, provider};

/// The largest file of credentials.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("{path}: {source}", path = .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: others can read the key in it: chmod 600 {path}", path = .path.display())]
    Open { path: PathBuf },
    #[error("not PEM: {0}")]
    Pem(#[from] pem::Error),
    #[error("there is no certificate of whom to trust in it")]
    NoRoots,
    #[error("there is no certificate with a key in it")]
    NoKey,
    #[error("{0}")]
    Tls(#[from] rustls::Error),
    #[error("{0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    #[error("{0}")]
    Issue(#[from] rcgen::Error),
    #[error("{0}")]
    Identity(#[from] super::IdentityError),
}

/// Who one is, and whom one trusts.
#[derive(Debug)]
pub struct Credentials {
    own: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    roots: Vec<CertificateDer<'static>>,
}

impl Credentials {
    /// Reads a file of credentials.
    ///
    /// # Errors
    /// It cannot be read, others can read it, or it is not what it should be.
    pub fn read(path: &Path) -> Result<Credentials, CredentialsError> {
        let at = |source| CredentialsError::File {
            path: path.to_owned(),
            source,
        };
        let metadata = fs::metadata(path).map_err(at)?;
        if metadata.len() > FILE_BYTES_MAX {
            return Err(at(io::Error::other(
                "it is too large to be a file of credentials",
            )));
        }
        let credentials = Credentials::parse(&fs::read(path).map_err(at)?)?;
        let others = metadata.permissions().mode() & 0o077;
        if credentials.own.is_some() && others != 0 {
            return Err(CredentialsError::Open {
                path: path.to_owned(),
            });
        }
        Ok(credentials)
    }

    /// Reads the text of such a file.
    pub fn parse(text: &[u8]) -> Result<Credentials, CredentialsError> {
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
        let mut roots = certificates?;
        let own = match PrivateKeyDer::from_pem_slice(text) {
            Ok(_) if roots.is_empty() => return Err(CredentialsError::NoRoots),
            Ok(key) => Some((roots.remove(0), key)),
            Err(pem::Error::NoItemsFound) => None,
            Err(error) => return Err(error.into()),
        };
        match roots.is_empty() {
            true => Err(CredentialsError::NoRoots),
            false => Ok(Credentials { own, roots }),
        }
    }

    /// The same without who one is: for who shows a token instead.
    pub fn anonymous(self) -> Credentials {
        Credentials { own: None, ..self }
    }

    /// The own certificate.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.own.as_ref().map(|(certificate, _)| certificate)
    }

    /// The SHA-256 of the first of those whom one trusts.
    pub fn authority(&self) -> Option<[u8; 32]> {
        self.roots.first().map(|root| super::fingerprint(root))
    }

    /// What a client needs.
    pub fn client(&self) -> Result<Arc<ClientConfig>, CredentialsError> {
        client(Trust::roots(&self.roots)?, self.own.as_ref())
    }

    /// What a client needs that calls a certain node.
    pub fn client_of(&self, who: Identity) -> Result<Arc<ClientConfig>, CredentialsError> {
        client(Trust::peer(&self.roots, who)?, self.own.as_ref())
    }

    /// What a server needs: whoever comes with a certificate must come with one that is trusted.
    pub fn server(&self) -> Result<Arc<ServerConfig>, CredentialsError> {
        let (certificate, key) = self.own.as_ref().ok_or(CredentialsError::NoKey)?;
        let mut trusted = RootCertStore::empty();
        for root in &self.roots {
            trusted.add(root.clone())?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(trusted), provider());
        // Who has a token has no certificate.
        let verifier = verifier.allow_unauthenticated().build()?;
        let mut chain = vec![certificate.clone()];
        chain.extend(self.roots.iter().cloned());
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Nothing is resumed: every connection shows its certificate.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// What a client needs that knows of an authority only the SHA-256 of its certificate.
pub fn pinned(authority: [u8; 32]) -> Result<Arc<ClientConfig>, CredentialsError> {
    client(Trust::Pinned(authority), None)
}

fn client(
    trust: Trust,
    own: Option<&(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> Result<Arc<ClientConfig>, CredentialsError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(trust));
    let mut config = match own {
        Some((certificate, key)) => {
            config.with_client_auth_cert(vec![certificate.clone()], key.clone_key())?
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Writes a file that only its owner reads, whole or not at all, and so that it survives a power cut.
pub fn write_private(path: &Path, text: &str) -> Result<(), CredentialsError> {
    let write = || {
        let dir = path.parent().unwrap_or(path);
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        let part = path.with_extension(format!("part-{}", uuid::Uuid::new_v4().simple()));
        let mut options = fs::OpenOptions::new();
        // A new file, whatever others may have put where it goes.
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        let written = file
            .write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&part, path));
        if written.is_err() {
            // Half a key is no use to anybody.
            fs::remove_file(&part)?;
        }
        written?;
        fs::File::open(dir)?.sync_all()
    };
    write().map_err(|source| CredentialsError::File {
        path: path.to_owned(),
        source,
    })
}
