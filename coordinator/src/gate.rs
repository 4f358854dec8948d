//! What every call passes first: who makes it, and may he?
//!
//! Closed by default: a call that no rule names is for those only who have shown who they are, and does nothing. What a call
//! does is not known here; its rule says what of its request to look at.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use batchai_common::error::ApiError;
use batchai_common::limits::MESSAGE_BYTES_MAX;
use batchai_common::time::{millis, now};
use batchai_common::tls::{Identity, Peer};
use batchai_proto::v1::AuditRecord;
use http::header::AUTHORIZATION;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::access::rules::{self, Place};
use crate::access::{Caller, Who, find_token, scope};
use crate::audit::Audit;
use crate::call::Call;
use crate::replica::Handle;
use crate::state::State;

/// Calls that nobody needs to show anything for: those that say whether somebody is there, and the one by which machines
/// become nodes.
const OPEN: [&str; 3] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/batchai.agent.v1.JoinService/Join",
];
/// Calls for agents.
const AGENTS: [&str; 2] = [
    "/batchai.agent.v1.AgentService/",
    "/batchai.agent.v1.JoinService/",
];
/// Before a message in a body: whether it is compressed, and its length.
const FRAME_BYTES: usize = 5;
/// So much of a name is repeated to who may not have what has it.
const NAME_CHARS_MAX: usize = 200;

/// What decides.
#[derive(Clone)]
pub struct Gate {
    pub replica: Handle,
    /// The user that may do everything, whatever the State says.
    pub admin: Arc<str>,
    /// There is no TLS: everybody may do everything.
    pub lab: bool,
    pub audit: Audit,
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        let gate = self.clone();
        Gated { gate, inner }
    }
}

/// What is behind the gate.
#[derive(Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that is ready answers; its clone is for the next.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let gate = self.gate.clone();
        Box::pin(async move {
            let mut record = begin(&request);
            let (call, request) = match gate.admit(request, &mut record).await {
                Ok((caller, request)) => (Call::new(caller), request),
                Err(error) => {
                    let refusal = Status::from(error);
                    gate.audit.record(end(record, refusal.code(), 0)).await;
                    return Ok(refusal.into_http());
                }
            };
            let response = call.clone().scope(inner.call(request)).await?;
            if changes(&record.method) {
                // Where nothing is said yet, an answer follows.
                let code =
                    Status::from_header_map(response.headers()).map_or(Code::Ok, |s| s.code());
                gate.audit.record(end(record, code, call.revision())).await;
            }
            Ok(response)
        })
    }
}

/// What is recorded of a call before it is known who makes it.
fn begin(request: &Request<Body>) -> AuditRecord {
    let peer = request.extensions().get::<Peer>();
    let address = peer.and_then(|peer| peer.address);
    let method = request.uri().path().trim_start_matches('/');
    AuditRecord {
        caller: Caller::nobody().label(),
        address: address
            .map(|address| address.to_string())
            .unwrap_or_default(),
        method: short(method),
        ..Default::default()
    }
}

fn end(record: AuditRecord, code: Code, revision: i64) -> AuditRecord {
    AuditRecord {
        time: Some(now()),
        result: spelled(code),
        revision,
        ..record
    }
}

/// Whether a call is one that changes something.
fn changes(method: &str) -> bool {
    match rules::rule(&format!("/{method}")) {
        Some(rule) => !rule.permission.ends_with("/read"),
        None => method.starts_with("batchai.agent.v1.JoinService/"),
    }
}

/// As the API spells it: `NOT_FOUND`.
fn spelled(code: Code) -> String {
    let mut spelled = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !spelled.is_empty() {
            spelled.push('_');
        }
        spelled.push(letter.to_ascii_uppercase());
    }
    match code {
        Code::Ok => "OK".to_owned(),
        _ => spelled,
    }
}

fn short(text: &str) -> String {
    text.chars().take(NAME_CHARS_MAX).collect()
}

impl Gate {
    async fn admit(
        &self,
        request: Request<Body>,
        record: &mut AuditRecord,
    ) -> Result<(Caller, Request<Body>), ApiError> {
        let caller = self.caller(&request)?;
        record.caller = caller.label();
        let path = request.uri().path().to_owned();
        let mut request = match rules::rule(&path) {
            _ if OPEN.contains(&path.as_str()) => request,
            Some(rule) => {
                let (name, request) = match &rule.place {
                    Place::Field(path) => name_of(request, path).await?,
                    Place::Ensemble | Place::Anywhere => (String::new(), request),
                };
                record.name = short(&name);
                if !caller.may_call(rule.permission, &rule.place, &name) {
                    return Err(forbidden(&caller, rule.permission, &name));
                }
                request
            }
            None if AGENTS.iter().any(|service| path.starts_with(service)) => match &caller.who {
                Who::Lab | Who::Known(Identity::Node { .. }) => request,
                _ => return Err(forbidden(&caller, "batchai/nodes/work/action", "")),
            },
            None if caller.who == Who::Nobody => return Err(unknown()),
            None => request,
        };
        request.extensions_mut().insert(caller.clone());
        Ok((caller, request))
    }

    /// Who calls.
    fn caller(&self, request: &Request<Body>) -> Result<Caller, ApiError> {
        if self.lab {
            return Ok(Caller::lab());
        }
        let state: State = self.replica.published().borrow().state.clone();
        let peer = request.extensions().get::<Peer>();
        let shown = peer.and_then(|peer| peer.certificate.clone());
        let caller = match (shown, request.headers().get(AUTHORIZATION)) {
            (Some(shown), _) if shown.expired() => {
                let why = "the certificate has expired";
                return Err(ApiError::Unauthenticated { why });
            }
            (Some(shown), _) => Caller {
                certificate: Some(shown.clone()),
                ..Caller::known(&state, shown.identity.clone(), &self.admin)
            },
            (None, Some(header)) => {
                let why = "the token is not good";
                let bad = || ApiError::Unauthenticated { why };
                let text = header.to_str().map_err(|_| bad())?;
                let text = text.strip_prefix("Bearer ").ok_or_else(bad)?;
                let caller = find_token(&state, text, millis(&now()))
                    .and_then(|token| Caller::bearer(&state, token, &self.admin));
                caller.map_err(|error| {
                    tracing::info!(%error, "a token is refused");
                    bad()
                })?
            }
            (None, None) => Caller::nobody(),
        };
        match caller.refusal(&state) {
            Some(error) => Err(error),
            None => Ok(caller),
        }
    }
}

fn unknown() -> ApiError {
    let why = "show a certificate, or a token in the header `authorization: Bearer TOKEN`";
    ApiError::Unauthenticated { why }
}

fn forbidden(caller: &Caller, permission: &str, name: &str) -> ApiError {
    if caller.who == Who::Nobody {
        return unknown();
    }
    ApiError::Forbidden {
        caller: caller.label(),
        permission: permission.to_owned(),
        name: short(name),
    }
}

/// What the one message of a request names; all of the ensemble where it is no message, so that only who may do everything
/// learns what is wrong with it.
async fn name_of(
    request: Request<Body>,
    path: &[u32],
) -> Result<(String, Request<Body>), ApiError> {
    let (parts, body) = request.into_parts();
    let collected = Limited::new(body, MESSAGE_BYTES_MAX + FRAME_BYTES)
        .collect()
        .await;
    let bytes = match collected {
        Ok(collected) => collected.to_bytes(),
        Err(error) => {
            let why = match error.downcast_ref::<LengthLimitError>() {
                Some(_) => format!("has more than {MESSAGE_BYTES_MAX} bytes"),
                None => format!("cannot be read: {error}"),
            };
            let fault = batchai_common::error::Fault::new("request", why);
            return Err(ApiError::Invalid(vec![fault]));
        }
    };
    let plain = bytes.first() == Some(&0);
    let message = bytes.get(FRAME_BYTES..).filter(|_| plain);
    let name = message.and_then(|message| scope::text(message, path));
    let body = Body::new(Full::new(bytes));
    Ok((name.unwrap_or_default(), Request::from_parts(parts, body)))
}
