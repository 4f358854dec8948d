//! Whether the other end is a coordinator of this ensemble, or a certain node of it.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::{COORDINATOR_NAME, Identity, fingerprint, provider, shown};

/// Whom a client trusts.
#[derive(Debug)]
pub enum Trust {
    /// Who these have signed.
    Roots(Arc<WebPkiServerVerifier>),
    /// Who one that is known by its SHA-256 has signed: it is shown, and not known before.
    Pinned([u8; 32]),
    /// This one, whom these have signed. Certificates of nodes are for those who call, and name no host.
    Peer(Arc<dyn ClientCertVerifier>, Identity),
}

impl Trust {
    /// Trust in certificates of authorities.
    pub fn roots(roots: &[CertificateDer<'static>]) -> Result<Trust, Error> {
        Ok(Trust::Roots(verifier(roots.iter().cloned())?))
    }

    /// Trust in one node, whose certificate these have signed.
    pub fn peer(roots: &[CertificateDer<'static>], who: Identity) -> Result<Trust, Error> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone())?;
        }
        let built =
            WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider()).build();
        let built = built.map_err(|error| Error::General(error.to_string()))?;
        Ok(Trust::Peer(built, who))
    }
}

fn verifier(
    roots: impl Iterator<Item = CertificateDer<'static>>,
) -> Result<Arc<WebPkiServerVerifier>, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root)?;
    }
    let built = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider()).build();
    built.map_err(|error| Error::General(error.to_string()))
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verifier = match self {
            Trust::Peer(verifier, who) => {
                verifier.verify_client_cert(end_entity, intermediates, now)?;
                let is_it = shown(end_entity).is_some_and(|shown| shown.identity == *who);
                let other = Error::General(format!("it is not {who}"));
                return is_it.then(ServerCertVerified::assertion).ok_or(other);
            }
            Trust::Roots(verifier) => verifier.clone(),
            Trust::Pinned(pin) => {
                let known = intermediates
                    .iter()
                    .find(|shown| fingerprint(shown) == *pin);
                let known = known.ok_or(CertificateError::UnknownIssuer)?;
                verifier(std::iter::once(known.clone().into_owned()))?
            }
        };
        let check = |name: &ServerName<'_>| {
            verifier.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
        };
        // A certificate from elsewhere may have the host's name only.
        let coordinator = ServerName::try_from(COORDINATOR_NAME);
        let coordinator = coordinator.map_err(|error| Error::General(error.to_string()))?;
        check(&coordinator).or_else(|_| check(server_name))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // No configuration here offers it.
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let provider = provider();
        verify_tls13_signature(
            message,
            cert,
            dss,
            &provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
