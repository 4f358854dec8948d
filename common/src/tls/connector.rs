//! Makes connections to a coordinator.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

use super::Route;
use crate::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why no connection can even be tried.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error(
        "{url:?} is not where a coordinator listens: use https://ADDRESS:PORT, several with commas between them"
    )]
    Url { url: String },
    #[error(
        "{url} has TLS, and there are no credentials: give --credentials FILE, set BATCHAI_CREDENTIALS, or keep it: \
         batchai config set credentials FILE"
    )]
    NoCredentials { url: String },
}

/// Where coordinators listen, and how to come to them. Clones share which of them was the right one lately.
#[derive(Clone, Debug)]
pub struct Connector {
    /// As they were given.
    urls: Arc<[String]>,
    /// The one that is tried first.
    first: Arc<Mutex<String>>,
    /// The latest credentials; none where the connection is plain.
    tls: Option<watch::Receiver<Arc<ClientConfig>>>,
}

impl Connector {
    /// Whether a URL, or each of a list, is one of a lab, without TLS.
    pub fn is_plain(urls: &str) -> bool {
        let plain = |url: &str| {
            let uri: Result<Uri, _> = url.trim().parse();
            uri.is_ok_and(|uri| uri.scheme_str() == Some("http"))
        };
        urls.split(',').all(plain)
    }

    /// Whether a text is one that `new` takes.
    pub fn check(urls: &str) -> Result<(), TargetError> {
        match Connector::new(urls, None) {
            Ok(_) | Err(TargetError::NoCredentials { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes `https://ADDRESS:PORT` with credentials, which may be renewed, or `http://ADDRESS:PORT` of a lab; several, with
    /// commas between them, where the ensemble has several replicas.
    pub fn new(
        urls: &str,
        credentials: Option<watch::Receiver<Arc<ClientConfig>>>,
    ) -> Result<Connector, TargetError> {
        let given: Vec<_> = urls.split(',').map(|url| url.trim().to_owned()).collect();
        for url in &given {
            endpoint(url)?;
        }
        let tls = credentials.filter(|_| !Connector::is_plain(urls));
        if tls.is_none()
            && let Some(url) = given.iter().find(|url| !Connector::is_plain(url))
        {
            return Err(TargetError::NoCredentials { url: url.clone() });
        }
        Ok(Connector {
            first: Arc::new(Mutex::new(given[0].clone())),
            urls: given.into(),
            tls,
        })
    }

    /// The same ways, of which the clones of this share nothing with those of the other; another one is tried first: the nth, counted
    /// around.
    pub fn beginning_at(&self, nth: usize) -> Connector {
        let first = self.urls[nth % self.urls.len()].clone();
        Connector {
            first: Arc::new(Mutex::new(first)),
            ..self.clone()
        }
    }

    /// Connects to the first of them that is reached.
    pub async fn connect(&self) -> Result<Route, Error> {
        let mut url = self.first().clone();
        let mut last = None;
        for _ in 0..=self.urls.len() {
            let dial = service_fn(self.dial(&url));
            match self.endpoint(&url).connect_with_connector(dial).await {
                Ok(channel) => return Ok(Route::new(self.clone(), url, channel)),
                Err(error) => last = Some(error),
            }
            let next = self.after(&url, None);
            if next == url {
                break;
            }
            url = next;
        }
        Err(last.expect("one was tried"))
    }

    /// Connects when something is to be sent, and again when the connection broke.
    pub fn connect_lazy(&self) -> Route {
        let url = self.first().clone();
        let channel = self.lazy(&url);
        Route::new(self.clone(), url, channel)
    }

    /// Where to go after one that is not the right one: to the leader that it named, or to the next of those given. From now on
    /// that is tried first.
    pub(super) fn after(&self, from: &str, leader: Option<String>) -> String {
        // One without TLS is no way for who has it.
        let fits =
            |url: &String| endpoint(url).is_ok() && Connector::is_plain(url) == self.tls.is_none();
        let at = self.urls.iter().position(|url| url == from);
        let next = at.map_or(0, |at| at + 1) % self.urls.len();
        let next = leader
            .filter(fits)
            .unwrap_or_else(|| self.urls[next].clone());
        let mut first = self.first();
        // Who comes late does not turn back those who have turned.
        if *first == from {
            first.clone_from(&next);
        }
        next
    }

    fn first(&self) -> MutexGuard<'_, String> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn endpoint(&self, url: &str) -> Endpoint {
        let endpoint = endpoint(url).expect("no other URL is kept");
        endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
    }

    pub(super) fn lazy(&self, url: &str) -> Channel {
        let dial = service_fn(self.dial(url));
        self.endpoint(url).connect_with_connector_lazy(dial)
    }

    fn dial(&self, url: &str) -> impl Fn(Uri) -> Dialing + Clone + Send + 'static {
        let tls = self.tls.clone().filter(|_| !Connector::is_plain(url));
        move |uri| {
            let config = tls.as_ref().map(|tls| tls.borrow().clone());
            Box::pin(async move {
                let greeted = tokio::time::timeout(CONNECT_TIMEOUT, dial(uri, config)).await;
                greeted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
            })
        }
    }
}

/// Connects to one that is no coordinator, by a configuration that knows whom it is to be.
pub async fn connect_to(
    address: std::net::SocketAddr,
    config: Arc<ClientConfig>,
) -> Result<Channel, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let dial = move |uri| {
        let dialled = tokio::time::timeout(CONNECT_TIMEOUT, dial(uri, Some(config.clone())));
        async {
            dialled
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        }
    };
    endpoint.connect_with_connector(service_fn(dial)).await
}

/// An address, for a client that knows nothing of TLS: what is below makes the connection secure.
fn endpoint(url: &str) -> Result<Endpoint, TargetError> {
    let bad = || TargetError::Url {
        url: url.to_owned(),
    };
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let authority = uri.authority().ok_or_else(bad)?;
    let bare = matches!(uri.path(), "" | "/") && authority.as_str().find('@').is_none();
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    if !known || !bare || authority.port_u16().is_none() {
        return Err(bad());
    }
    Endpoint::from_shared(format!("http://{authority}")).map_err(|_| bad())
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
