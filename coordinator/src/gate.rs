//! What every call passes first: who makes it, and may he?
//!
//! Closed by default: a call that no rule names is for those only who have shown who they are, and does nothing. What a call
//! does is not known here; its rule says what of its request to look at. Whoever may not do a thing anywhere is refused before
//! his request is read; whoever may is judged when all of it is here, or the first message where that opens a stream, and again and
//! again while he is answered in a stream.

mod opening;
pub mod quota;
mod watched;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::MESSAGE_BYTES_MAX;
use batchai_common::time::{millis, now};
use batchai_common::tls::{Identity, Peer};
use batchai_proto::v1::AuditRecord;
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::access::rules::{self, Form, Place, Rule};
use crate::access::{Caller, WORK, Who, find_token, scope};
use crate::audit::Audit;
use crate::call::Call;
use crate::replica::Handle;
use quota::{Permit, Quota, stranger};
use watched::Watched;

/// Calls that nobody needs to show anything for: those that say whether somebody is there, and the one by which machines
/// become nodes.
const OPEN: [&str; 3] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    JOIN,
];
const JOIN: &str = "/batchai.agent.v1.JoinService/Join";
/// Calls for agents.
const AGENTS: [&str; 2] = [
    "/batchai.agent.v1.AgentService/",
    "/batchai.agent.v1.JoinService/",
];
/// Calls for replicas.
const PEERS: &str = "/batchai.internal.v1.";
/// What they take, as errors call it.
const ENSEMBLE: &str = "to be a replica";
/// Before a message in a body: whether it is compressed, and its length.
const FRAME_BYTES: usize = 5;
/// So much of a command is recorded.
const COMMAND_BYTES_MAX: usize = 4 << 10;
/// So much of a name is repeated to who may not have what has it.
const NAME_CHARS_MAX: usize = 200;

/// What decides.
#[derive(Clone)]
pub struct Gate {
    pub replica: Handle,
    /// The user that may do everything, whatever the State says; none where it is empty.
    pub admin: Arc<str>,
    /// There is no TLS: everybody may do everything.
    pub lab: bool,
    pub audit: Audit,
    pub quota: Quota,
    /// Of strangers: however many there are, they take no room from those who are known.
    pub strangers: Quota,
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
        let inner = std::mem::replace(&mut self.inner, clone);
        let gate = self.gate.clone();
        Box::pin(async move { Ok(gate.pass(inner, request).await) })
    }
}

/// What a call is judged by, as often as need be.
#[derive(Clone)]
struct Ticket {
    path: String,
    peer: Option<Peer>,
    authorization: Option<HeaderValue>,
    rule: Option<&'static Rule>,
    /// What of the ensemble it is about, once that was read.
    name: String,
}

impl Gate {
    async fn pass<S>(self, mut inner: S, request: Request<Body>) -> Response<Body>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send + 'static,
        S::Future: Send,
    {
        let mut ticket = Ticket::of(&request);
        let mut record = ticket.record();
        let admitted = self.admit(&mut ticket, request, &mut record).await;
        let (caller, request, permit) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                let refusal = Status::from(error);
                if is_refusal(refusal.code()) {
                    self.audit.record(end(record, refusal.code(), 0)).await;
                }
                return refusal.into_http();
            }
        };
        let call = Call::new(caller);
        if !ticket.changes() {
            let Ok(response) = call.scope(inner.call(request)).await;
            let code = code_of(&response);
            if is_refusal(code) {
                self.audit.record(end(record.clone(), code, 0)).await;
            }
            return self.answered(ticket, record, permit, response);
        }
        // On its own: that the caller goes away, or is in a hurry, ends neither what he began nor its record.
        let work = tokio::spawn(async move {
            let Ok(response) = call.clone().scope(inner.call(request)).await;
            let end = end(record.clone(), code_of(&response), call.revision());
            self.audit.record(end).await;
            self.answered(ticket, record, permit, response)
        });
        work.await.unwrap_or_else(|error| {
            let why = error.to_string();
            Status::from(ApiError::Unknown { why }).into_http()
        })
    }

    /// An answer that is a stream is watched over.
    fn answered(
        self,
        ticket: Ticket,
        record: AuditRecord,
        permit: Option<Permit>,
        response: Response<Body>,
    ) -> Response<Body> {
        let (parts, body) = response.into_parts();
        let watched = Watched::new(body, self, ticket, record, permit);
        Response::from_parts(parts, Body::new(watched))
    }

    async fn admit(
        &self,
        ticket: &mut Ticket,
        request: Request<Body>,
        record: &mut AuditRecord,
    ) -> Result<(Caller, Request<Body>, Option<Permit>), ApiError> {
        if ticket.is_open() {
            let permit = self.share(&Caller::nobody(), ticket)?;
            return Ok((Caller::nobody(), request, permit));
        }
        let caller = match self.caller(ticket) {
            Ok(caller) => caller,
            Err(error) => {
                // Who is refused uses up a stranger's share, whatever he has shown.
                self.share(&Caller::nobody(), ticket)?;
                record.caller = ticket.pretender();
                return Err(error);
            }
        };
        let permit = self.share(&caller, ticket)?;
        record.caller = caller.label();
        let Some(rule) = ticket.rule else {
            let caller = self.judge(ticket)?;
            return Ok((caller.clone(), with(caller, request), permit));
        };
        if !caller.may_somewhere(rule.permission) {
            return Err(forbidden(&caller, rule.permission, ""));
        }
        let (request, bytes) = match rule.request {
            Form::Message => {
                let (parts, bytes) = collect(request).await?;
                let body = Body::new(Full::new(bytes.clone()));
                (Request::from_parts(parts, body), bytes)
            }
            Form::Opening => opening::take(request).await?,
            Form::Stream => (request, Bytes::new()),
        };
        ticket.read(rule, &bytes, record);
        let caller = self.judge(ticket)?;
        Ok((caller.clone(), with(caller, request), permit))
    }

    /// Takes a call out of its caller's share; in a lab nobody has one.
    fn share(&self, caller: &Caller, ticket: &Ticket) -> Result<Option<Permit>, ApiError> {
        if self.lab {
            return Ok(None);
        }
        let permit = match caller.who {
            Who::Known(_) => self.quota.enter(caller.label()),
            Who::Nobody | Who::Lab => {
                let address = ticket.peer.as_ref().and_then(|peer| peer.address);
                self.strangers.enter(stranger(address))
            }
        };
        permit.map(Some)
    }

    /// Who calls, if he may, as things are now.
    fn judge(&self, ticket: &Ticket) -> Result<Caller, ApiError> {
        let caller = self.caller(ticket)?;
        match ticket.rule {
            Some(rule) if !caller.may_call(rule.permission, &rule.place, &ticket.name) => {
                Err(forbidden(&caller, rule.permission, &ticket.name))
            }
            Some(_) => Ok(caller),
            None if ticket.is_for_agents() => match &caller.who {
                Who::Lab | Who::Known(Identity::Node { .. }) => Ok(caller),
                _ => Err(forbidden(&caller, WORK, "")),
            },
            None if ticket.path.starts_with(PEERS) => match &caller.who {
                Who::Lab | Who::Known(Identity::Replica { .. }) => Ok(caller),
                _ => Err(forbidden(&caller, ENSEMBLE, "")),
            },
            None if caller.who == Who::Nobody => Err(unknown()),
            None => Ok(caller),
        }
    }

    /// Who calls.
    fn caller(&self, ticket: &Ticket) -> Result<Caller, ApiError> {
        if self.lab {
            return Ok(Caller::lab());
        }
        let state = self.replica.published().borrow().state.clone();
        let shown = ticket
            .peer
            .as_ref()
            .and_then(|peer| peer.certificate.clone());
        let refuse = |why| Err(ApiError::Unauthenticated { why });
        let caller = match (shown, &ticket.authorization) {
            (Some(_), Some(_)) => return refuse("show a certificate or a token, not both"),
            (Some(shown), None) if shown.expired() => {
                return refuse("the certificate has expired");
            }
            (Some(shown), None) => Caller {
                certificate: Some(shown.clone()),
                ..Caller::known(&state, shown.identity.clone(), &self.admin)
            },
            (None, Some(header)) => {
                let text = header
                    .to_str()
                    .ok()
                    .and_then(|text| text.strip_prefix("Bearer "));
                let caller = find_token(&state, text.unwrap_or_default(), millis(&now()))
                    .and_then(|token| Caller::bearer(&state, token, &self.admin));
                match caller {
                    Ok(caller) => caller,
                    Err(error) => {
                        tracing::debug!(%error, "a token is refused");
                        return refuse("the token is not good");
                    }
                }
            }
            (None, None) => Caller::nobody(),
        };
        match caller.refusal(&state) {
            Some(error) => Err(error),
            None => Ok(caller),
        }
    }
}

impl Ticket {
    fn of(request: &Request<Body>) -> Ticket {
        let path = request.uri().path().to_owned();
        Ticket {
            peer: request.extensions().get::<Peer>().cloned(),
            authorization: request.headers().get(AUTHORIZATION).cloned(),
            rule: rules::rule(&path),
            name: String::new(),
            path,
        }
    }

    /// As whom somebody is on record who has shown what is good no more.
    fn pretender(&self) -> String {
        let shown = self
            .peer
            .as_ref()
            .and_then(|peer| peer.certificate.as_ref());
        let nobody = Caller::nobody().label();
        match shown {
            Some(shown) => format!("{nobody}, once {}", shown.identity),
            None => nobody,
        }
    }

    /// What the first message of a request says: what it is about, and what of that is for the record.
    fn read(&mut self, rule: &Rule, bytes: &Bytes, record: &mut AuditRecord) {
        let text = |path: &Vec<u32>| message(bytes).and_then(|m| scope::text(m, path));
        let subject = rule.subject.iter().filter_map(text);
        let subject: Vec<_> = subject.filter(|text| !text.is_empty()).collect();
        record.name = short(&subject.join(" "));
        let command = rule.command.as_ref().zip(message(bytes));
        let command = command.and_then(|(path, message)| scope::texts(message, path));
        record.command = bounded(command.unwrap_or_default());
        if let Place::Field(path) = &rule.place {
            // What is no message is about all of it: only who may do everything learns what is wrong with it.
            self.name = text(path).unwrap_or_default();
        }
    }

    fn is_open(&self) -> bool {
        OPEN.contains(&self.path.as_str())
    }

    fn is_for_agents(&self) -> bool {
        AGENTS.iter().any(|service| self.path.starts_with(service))
    }

    /// Whether the call is one that changes something.
    fn changes(&self) -> bool {
        match self.rule {
            Some(rule) => !rule.permission.ends_with("/read"),
            None => self.path.starts_with("/batchai.agent.v1.JoinService/"),
        }
    }

    /// What is recorded of the call before it is known who makes it.
    fn record(&self) -> AuditRecord {
        let address = self.peer.as_ref().and_then(|peer| peer.address);
        AuditRecord {
            caller: Caller::nobody().label(),
            address: address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            method: short(self.path.trim_start_matches('/')),
            ..Default::default()
        }
    }
}

fn with(caller: Caller, mut request: Request<Body>) -> Request<Body> {
    request.extensions_mut().insert(caller);
    request
}

/// What came of a call, as far as it is known when its answer begins.
fn code_of(response: &Response<Body>) -> Code {
    Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code())
}

fn end(record: AuditRecord, code: Code, revision: i64) -> AuditRecord {
    AuditRecord {
        time: Some(now()),
        result: spelled(code),
        revision,
        ..record
    }
}

fn is_refusal(code: Code) -> bool {
    matches!(code, Code::PermissionDenied | Code::Unauthenticated)
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
    spelled
}

fn short(text: &str) -> String {
    text.chars().take(NAME_CHARS_MAX).collect()
}

/// So much of a command as is recorded: what stands first says most.
fn bounded(command: Vec<String>) -> Vec<String> {
    let mut left = COMMAND_BYTES_MAX;
    let mut bounded = Vec::new();
    for argument in command {
        let ends = argument.char_indices().map(|(at, c)| at + c.len_utf8());
        let fits = ends.take_while(|end| *end <= left).last().unwrap_or(0);
        bounded.push(argument[..fits].to_owned());
        // An empty one takes room as well.
        left = left.saturating_sub(fits + 1);
        if fits < argument.len() || left == 0 {
            break;
        }
    }
    bounded
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

/// All of a request that is one message.
async fn collect(request: Request<Body>) -> Result<(http::request::Parts, Bytes), ApiError> {
    let (parts, body) = request.into_parts();
    let collected = Limited::new(body, MESSAGE_BYTES_MAX + FRAME_BYTES)
        .collect()
        .await;
    match collected {
        Ok(collected) => Ok((parts, collected.to_bytes())),
        Err(error) => {
            let why = match error.downcast_ref::<LengthLimitError>() {
                Some(_) => format!("has more than {MESSAGE_BYTES_MAX} bytes"),
                None => format!("cannot be read: {error}"),
            };
            Err(ApiError::Invalid(vec![Fault::new("request", why)]))
        }
    }
}

/// The message of a body, unless it is compressed.
fn message(bytes: &Bytes) -> Option<&[u8]> {
    let plain = bytes.first() == Some(&0);
    bytes.get(FRAME_BYTES..).filter(|_| plain)
}
