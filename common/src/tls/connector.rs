//! Makes connections to a coordinator.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_util::either::Either;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tower::service_fn;

use crate::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why no connection can even be tried.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("{url:?} is not where a coordinator listens: use https://ADDRESS:PORT")]
    Url { url: String },
    #[error(
        "{url} has TLS, and there are no credentials: give --credentials FILE, set BATCHAI_CREDENTIALS, or keep it: \
         batchai config set credentials FILE"
    )]
    NoCredentials { url: String },
}

/// Where a coordinator listens, and how to come to it.
#[derive(Clone, Debug)]
pub struct Connector {
    endpoint: Endpoint,
    /// The latest credentials; none where the connection is plain.
    tls: Option<watch::Receiver<Arc<ClientConfig>>>,
}

impl Connector {
    /// Whether a URL is one of a lab, without TLS.
    pub fn is_plain(url: &str) -> bool {
        let uri: Result<Uri, _> = url.parse();
        uri.is_ok_and(|uri| uri.scheme_str() == Some("http"))
    }

    /// Takes `https://ADDRESS:PORT` with credentials, which may be renewed, or `http://ADDRESS:PORT` of a lab.
    pub fn new(
        url: &str,
        credentials: Option<watch::Receiver<Arc<ClientConfig>>>,
    ) -> Result<Connector, TargetError> {
        let bad = || TargetError::Url {
            url: url.to_owned(),
        };
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        let bare = matches!(uri.path(), "" | "/") && authority.as_str().find('@').is_none();
        let tls = match (uri.scheme_str(), credentials) {
            (Some("https"), Some(credentials)) => Some(credentials),
            (Some("https"), None) => {
                return Err(TargetError::NoCredentials {
                    url: url.to_owned(),
                });
            }
            (Some("http"), _) => None,
            _ => return Err(bad()),
        };
        if !bare || authority.port_u16().is_none() {
            return Err(bad());
        }
        // What is below makes the connection secure: for the client it is one like any other.
        let endpoint = Endpoint::from_shared(format!("http://{authority}")).map_err(|_| bad())?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        Ok(Connector { endpoint, tls })
    }

    /// Connects.
    pub async fn connect(&self) -> Result<Channel, Error> {
        self.endpoint
            .connect_with_connector(service_fn(self.dial()))
            .await
    }

    /// Connects when something is to be sent, and again when the connection broke.
    pub fn connect_lazy(&self) -> Channel {
        self.endpoint
            .connect_with_connector_lazy(service_fn(self.dial()))
    }

    fn dial(&self) -> impl Fn(Uri) -> Dialing + Clone + Send + 'static {
        let tls = self.tls.clone();
        move |uri| {
            let config = tls.as_ref().map(|tls| tls.borrow().clone());
            Box::pin(async move {
                let greeted = tokio::time::timeout(CONNECT_TIMEOUT, dial(uri, config)).await;
                greeted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
            })
        }
    }
}

type Stream = TokioIo<Either<TcpStream, Box<tokio_rustls::client::TlsStream<TcpStream>>>>;
type Dialing = std::pin::Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

async fn dial(uri: Uri, config: Option<Arc<ClientConfig>>) -> io::Result<Stream> {
    let host = uri
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    let port = uri.port_u16().unwrap_or_default();
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    stream.set_nodelay(true)?;
    let Some(config) = config else {
        return Ok(TokioIo::new(Either::Left(stream)));
    };
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let stream = TlsConnector::from(config).connect(name, stream).await?;
    Ok(TokioIo::new(Either::Right(Box::new(stream))))
}
