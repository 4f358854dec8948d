//! Transport security: who is at the other end, and how a connection to it is made.
//!
//! One provider (ring), one version (TLS 1.3), certificates on both sides. An [`Identity`] stands in a certificate as a URI;
//! what it may do is decided elsewhere. [`Credentials`] are one PEM file: the own certificate, its key, and whom to trust.

pub mod acceptor;
pub mod authority;
pub mod connector;
pub mod credentials;
mod identity;
mod route;
mod trust;

use std::sync::Arc;

pub use acceptor::{Peer, Shown, shown};
pub use authority::Authority;
pub use connector::Connector;
pub use credentials::{Credentials, CredentialsError};
pub use identity::{Identity, IdentityError};
pub use route::{Route, STREAMED};

use rustls::crypto::CryptoProvider;
use sha2::{Digest as _, Sha256};

/// Certificates of coordinators carry this name, wherever they listen: addresses come and go.
pub const COORDINATOR_NAME: &str = "coordinator.batchai";

/// What HTTP/2 is called where a connection begins.
const ALPN: &[u8] = b"h2";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The SHA-256 of a certificate or key, by which it is known elsewhere.
pub fn fingerprint(der: &[u8]) -> [u8; 32] {
    Sha256::digest(der).into()
}
