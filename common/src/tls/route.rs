//! A way to an ensemble of several replicas: calls go to the one that answers them.
//!
//! A replica that cannot do what is asked says who leads, and the next call goes there; one that is not reached is passed over. A
//! call that has one request is made again where it was certainly not carried out. What became of any other is for the caller
//! to find out.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use tonic::body::Body;
use tonic::transport::{Channel, Error};
use tonic::{Code, ConnectError, Status};
use tonic_types::StatusExt as _;
use tower::Service;

use super::Connector;
use crate::error::DOMAIN;

/// Calls whose requests are streams: those cannot be made again.
pub const STREAMED: [&str; 12] = [
    "/batchai.agent.v1.AgentService/AnswerFile",
    "/batchai.agent.v1.AgentService/ServeExec",
    "/batchai.agent.v1.AgentService/Session",
    "/batchai.agent.v1.AgentService/ShipLogs",
    "/batchai.agent.v1.PeerService/StartRemote",
    "/batchai.internal.v1.PeerService/Exchange",
    "/batchai.internal.v1.PeerService/SendSnapshot",
    "/batchai.internal.v1.RelayService/Relay",
    "/batchai.v1.BundleService/UploadBundle",
    "/batchai.v1.ExecService/ExecJob",
    "/batchai.v1.ExecService/ExecNode",
    "/batchai.v1.FileServerService/WriteFileServerFile",
];
/// How long somebody who leads is looked for.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(40);

/// A connection to whichever replica answers. Clones share it.
#[derive(Clone)]
pub struct Route {
    connector: Connector,
    current: Arc<Mutex<(String, Channel)>>,
}

type Answer = Result<Response<Body>, Error>;

impl Route {
    pub(super) fn new(connector: Connector, url: String, channel: Channel) -> Route {
        Route {
            connector,
            current: Arc::new(Mutex::new((url, channel))),
        }
    }

    fn current(&self) -> MutexGuard<'_, (String, Channel)> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn once(&self, request: Request<Body>) -> (Answer, bool) {
        let (url, mut channel) = self.current().clone();
        let sent = async {
            std::future::poll_fn(|context| channel.poll_ready(context)).await?;
            channel.call(request).await
        };
        match sent.await {
            Ok(response) => match refusal(response.headers()) {
                None => (Ok(self.listening(url, response)), false),
                Some(leader) => {
                    self.go_on(&url, leader);
                    (Ok(response), true)
                }
            },
            Err(error) => {
                self.go_on(&url, None);
                let not_sent = was_not_sent(&error);
                (Err(error), not_sent)
            }
        }
    }

    /// A stream may end with the word that another one leads: the next call goes there.
    fn listening(&self, url: String, response: Response<Body>) -> Response<Body> {
        let (parts, body) = response.into_parts();
        let route = self.clone();
        let body = body.map_frame(move |frame| {
            if let Some(leader) = frame.trailers_ref().and_then(refusal) {
                route.go_on(&url, leader);
            }
            frame
        });
        Response::from_parts(parts, Body::new(body))
    }

    /// Turns from a replica to the one that it names, or to the next.
    fn go_on(&self, from: &str, leader: Option<String>) {
        let next = self.connector.after(from, leader);
        let mut current = self.current();
        // Another call may have turned already.
        if current.0 == from && next != from {
            let channel = self.connector.lazy(&next);
            *current = (next, channel);
        }
    }

    async fn call_once(self, request: Request<Body>) -> Answer {
        self.once(request).await.0
    }

    async fn call_again(self, request: Request<Body>) -> Answer {
        let (parts, body) = request.into_parts();
        // It is in memory already: clients encode a message whole.
        let Ok(collected) = body.collect().await else {
            // What cannot be encoded is refused by who gets nothing.
            return self
                .call_once(Request::from_parts(parts, Body::empty()))
                .await;
        };
        let (bytes, begun) = (collected.to_bytes(), Instant::now());
        let mut pause = PAUSE_FIRST;
        loop {
            let (answer, not_done) = self.once(again(&parts, &bytes)).await;
            if !not_done || begun.elapsed() > PATIENCE {
                return answer;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

fn again(parts: &http::request::Parts, bytes: &Bytes) -> Request<Body> {
    let mut request = Request::new(Body::new(Full::new(bytes.clone())));
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = parts.uri.clone();
    *request.version_mut() = parts.version;
    *request.headers_mut() = parts.headers.clone();
    request
}

impl Service<Request<Body>> for Route {
    type Response = Response<Body>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Answer> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let route = self.clone();
        match STREAMED.contains(&request.uri().path()) {
            true => Box::pin(route.call_once(request)),
            false => Box::pin(route.call_again(request)),
        }
    }
}

/// Whether a replica says that it cannot do what is asked, and has done nothing; and who can, if it knows.
fn refusal(headers: &HeaderMap) -> Option<Option<String>> {
    let status = Status::from_header_map(headers)?;
    if status.code() != Code::Unavailable {
        return None;
    }
    let info = status.get_details_error_info()?;
    let ours = info.domain == DOMAIN && info.reason == "UNAVAILABLE";
    ours.then(|| info.metadata.get("leader").cloned())
}

/// There was no connection, so nothing can have come of it.
fn was_not_sent(error: &Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if cause.is::<ConnectError>() {
            return true;
        }
        source = cause.source();
    }
    false
}
