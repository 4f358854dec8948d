//! The authority of an ensemble: signs the certificates of its replicas, nodes and users.
//!
//! What a request for a certificate says of itself is not believed: only its key is taken.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::credentials::{CredentialsError, write_private};
use super::{COORDINATOR_NAME, Identity, fingerprint};

/// How long the authority itself lasts.
const LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Clocks differ: certificates of servers are valid from a while ago.
const SKEW: Duration = Duration::from_secs(3600);

/// A certificate and its key, both PEM.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    key: String,
}

/// A request for a certificate, and the key that it is for.
pub struct Request {
    /// PEM. It stays where it was made.
    pub key: String,
    /// PEM.
    pub request: String,
}

impl Request {
    /// Makes a key and a request.
    pub fn new() -> Result<Request, CredentialsError> {
        let key = KeyPair::generate()?;
        let request = CertificateParams::default()
            .serialize_request(&key)?
            .pem()?;
        Ok(Request {
            key: key.serialize_pem(),
            request,
        })
    }
}

impl Authority {
    /// Makes an authority of its own for an ensemble.
    pub fn new() -> Result<Authority, CredentialsError> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "batchai authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - SKEW).into();
        params.not_after = (now + LIFETIME).into();
        params.serial_number = Some(serial());
        let certificate = params.self_signed(&key)?.pem();
        Authority::load(certificate, key.serialize_pem())
    }

    /// Takes what was written.
    pub fn load(certificate: String, key: String) -> Result<Authority, CredentialsError> {
        let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key)?)?;
        Ok(Authority {
            issuer,
            certificate,
            key,
        })
    }

    /// Reads both from a directory.
    pub fn read(dir: &Path) -> Result<Authority, CredentialsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).map_err(|source| CredentialsError::File { path, source })
        };
        Authority::load(read(CERTIFICATE)?, read(KEY)?)
    }

    /// Writes both into a directory.
    pub fn write(&self, dir: &Path) -> Result<(), CredentialsError> {
        write_private(&dir.join(KEY), &self.key)?;
        write_private(&dir.join(CERTIFICATE), &self.certificate)
    }

    /// The certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The SHA-256 of the certificate: what a token carries.
    pub fn fingerprint(&self) -> Result<[u8; 32], CredentialsError> {
        Ok(fingerprint(&CertificateDer::from_pem_slice(
            self.certificate.as_bytes(),
        )?))
    }

    /// Signs a certificate for who asks: PEM.
    ///
    /// # Errors
    /// The request is not one, or not signed with its own key.
    pub fn issue(
        &self,
        request: &str,
        identity: &Identity,
        names: &[String],
        lifetime: Duration,
    ) -> Result<String, CredentialsError> {
        let mut request = CertificateSigningRequestParams::from_pem(request)?;
        let now = SystemTime::now();
        let is_server = matches!(identity, Identity::Replica { .. });
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, identity.to_string());
        params.subject_alt_names = vec![SanType::URI(identity.uri().try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        // Of the others' the beginning says when they were made: what was made before is revoked by that.
        params.not_before = if is_server { now - SKEW } else { now }.into();
        params.not_after = (now + lifetime).into();
        if is_server {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
            for name in std::iter::once(COORDINATOR_NAME).chain(names.iter().map(String::as_str)) {
                params.subject_alt_names.push(match name.parse() {
                    Ok(address) => SanType::IpAddress(address),
                    Err(_) => SanType::DnsName(name.try_into()?),
                });
            }
        }
        request.params = params;
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    /// A file of credentials for somebody new.
    pub fn credentials(
        &self,
        identity: &Identity,
        names: &[String],
        lifetime: Duration,
    ) -> Result<String, CredentialsError> {
        let Request { key, request } = Request::new()?;
        let certificate = self.issue(&request, identity, names, lifetime)?;
        Ok(format!("{certificate}{key}{}", self.certificate))
    }
}

/// The names of the authority's files.
const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca-key.pem";

fn serial() -> SerialNumber {
    let mut bytes = uuid::Uuid::new_v4().into_bytes();
    // A serial number is positive.
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}
