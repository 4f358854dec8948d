//! The gRPC services that users see. Thin: a request is parsed and checked whole, becomes a command or a read, and
//! what the State says becomes the reply. Nothing is decided here.

mod clusters;
mod experiments;
mod job_spec;
mod jobs;
mod nodes;
mod page;
mod resource_groups;
mod views;
mod workspaces;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_common::time;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Command, RequestKey};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::agents::contacts::Contacts;
use crate::logs::LogStore;
use crate::replica::{Handle, ReplicaError};
use crate::state::{Rejection, State, apply};

/// What all services share. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    pub replica: Handle,
    pub contacts: Contacts,
    pub logs: LogStore,
    pub shutdown: CancellationToken,
}

impl Api {
    /// A State that has everything that was acknowledged before this call.
    async fn read(&self) -> Result<State, ApiError> {
        self.replica.read().await.map_err(|error| match error {
            // Nothing was asked to change: it may be asked again.
            ReplicaError::TimedOut | ReplicaError::Unknown => self.unavailable(&error),
            error => self.error(error),
        })
    }

    /// Has a command applied; returns a State that has it.
    async fn write(&self, kind: Kind) -> Result<State, ApiError> {
        self.replica
            .propose(kind)
            .await
            .map_err(|error| self.error(error))?;
        Ok(self.replica.published().borrow().state.clone())
    }

    /// Has a request carried out, once, or only tried.
    async fn write_once(&self, kind: Kind, once: Once) -> Result<State, ApiError> {
        if once.validate_only {
            let mut state = self.read().await?;
            let index = state.applied_index + 1;
            let command = Command {
                time: Some(time::now()),
                request: None,
                kind: Some(kind),
            };
            // On a State of our own, which nobody else ever sees.
            apply(&mut state, index, &command).map_err(rejected)?;
            return Ok(state);
        }
        let Some(key) = once.key else {
            return self.write(kind).await;
        };
        let done = self.replica.propose_once(kind, key).await;
        done.map_err(|error| self.error(error))?;
        Ok(self.replica.published().borrow().state.clone())
    }

    /// Parses the parent of a list.
    fn parent(&self, kind: Noun, text: &str) -> Result<Name, ApiError> {
        let mut faults = Faults::default();
        let parent = kind
            .parent()
            .and_then(|parent| faults.name("parent", parent, text));
        faults.finish(parent)
    }

    fn error(&self, error: ReplicaError) -> ApiError {
        match error {
            ReplicaError::Rejected(rejection) => rejected(rejection),
            ReplicaError::Busy => ApiError::Busy {
                what: "the replica's queue",
            },
            ReplicaError::Unknown | ReplicaError::TimedOut => ApiError::Unknown {
                why: error.to_string(),
            },
            ReplicaError::NotLeader | ReplicaError::Stopped => self.unavailable(&error),
        }
    }

    fn unavailable(&self, error: &ReplicaError) -> ApiError {
        let leader = self
            .replica
            .published()
            .borrow()
            .leader
            .map(|id| id.to_string());
        ApiError::Unavailable {
            why: error.to_string(),
            leader,
        }
    }
}

fn rejected(rejection: Rejection) -> ApiError {
    match rejection {
        Rejection::NotFound { kind, name } => ApiError::NotFound { kind, name },
        Rejection::Exists { kind, name } => ApiError::AlreadyExists { kind, name },
        Rejection::WrongState { name, why } | Rejection::Overtaken { name, why } => {
            ApiError::WrongState { name, why }
        }
        Rejection::RequestIdReused { .. } => {
            ApiError::Invalid(vec![Fault::new("request_id", rejection.to_string())])
        }
        Rejection::StaleEtag {
            name,
            expected,
            actual,
        } => ApiError::StaleEtag {
            name,
            expected,
            actual,
        },
        Rejection::Unknown => ApiError::NotServed(vec![Fault::new("command", "is unknown")]),
    }
}

fn not_found(kind: Noun, name: &Name) -> ApiError {
    ApiError::NotFound {
        kind,
        name: name.to_string(),
    }
}

/// How often a request is carried out: each time it comes, once under its name, or never.
struct Once {
    key: Option<RequestKey>,
    validate_only: bool,
}

/// Collects everything that is wrong with a request.
#[derive(Default)]
struct Faults {
    invalid: Vec<Fault>,
    not_served: Vec<Fault>,
}

impl Faults {
    fn invalid(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.invalid.push(Fault::new(field, reason));
    }

    /// A field that the model has and this version does not serve.
    fn not_served(&mut self, field: &str, set: bool) {
        if set {
            self.not_served.push(Fault::new(
                field,
                "this field is not served yet; leave it out",
            ));
        }
    }

    /// A field that only the service sets.
    fn output_only(&mut self, field: &str, set: bool) {
        if set {
            self.invalid(field, "is output only; leave it out");
        }
    }

    fn name(&mut self, field: &str, kind: Noun, text: &str) -> Option<Name> {
        let parsed = Name::parse(kind, text);
        parsed
            .map_err(|error| self.invalid(field, error.to_string()))
            .ok()
    }

    /// The name of a new resource: its parent's and an id.
    fn new_name(&mut self, kind: Noun, parent: &str, id_field: &str, id: &str) -> Option<Name> {
        let parent = match kind.parent() {
            Some(noun) => self.name("parent", noun, parent),
            None => None,
        };
        if let Err(error) = batchai_common::names::check_id(kind, id) {
            self.invalid(id_field, error.to_string());
            return None;
        }
        match kind.parent() {
            None => Name::top(kind, id).ok(),
            Some(_) => parent.and_then(|parent| parent.child(kind, id).ok()),
        }
    }

    /// How often a request is to be carried out.
    fn once<M: prost::Message>(&mut self, id: &str, validate_only: bool, request: &M) -> Once {
        let named = !id.is_empty();
        if named && uuid::Uuid::try_parse(id).is_err() {
            self.invalid("request_id", "must be a UUID");
        }
        let key = named.then(|| RequestKey {
            // There are no identities yet: all callers are one.
            caller: String::new(),
            id: id.to_owned(),
            digest: Sha256::digest(request.encode_to_vec()).to_vec(),
        });
        Once { key, validate_only }
    }

    /// The name of one of several new resources of a parent that is checked elsewhere; empty where the id is bad.
    fn child_name(&mut self, kind: Noun, parent: &str, id_field: &str, id: &str) -> String {
        match batchai_common::names::check_id(kind, id) {
            Ok(()) => format!("{parent}/{}/{id}", kind.collection()),
            Err(error) => {
                self.invalid(id_field, error.to_string());
                String::new()
            }
        }
    }

    /// Checks a part of a request, whose fields are named from the whole.
    fn within<T>(&mut self, prefix: &str, check: impl FnOnce(&mut Faults) -> T) -> T {
        let mut part = Faults::default();
        let checked = check(&mut part);
        let place = |fault: Fault| Fault::new(format!("{prefix}{}", fault.field), fault.reason);
        self.invalid.extend(part.invalid.into_iter().map(place));
        self.not_served
            .extend(part.not_served.into_iter().map(place));
        checked
    }

    fn location(&mut self, field: &str, text: &str) {
        if !text.is_empty()
            && let Err(error) = batchai_common::names::check_id(Noun::ResourceGroup, text)
        {
            self.invalid(field, error.to_string());
        }
    }

    /// All faults at once, or what was parsed.
    fn finish<T>(mut self, parsed: Option<T>) -> Result<T, ApiError> {
        if !self.invalid.is_empty() {
            self.invalid.append(&mut self.not_served);
            return Err(ApiError::Invalid(self.invalid));
        }
        match parsed {
            Some(parsed) if self.not_served.is_empty() => Ok(parsed),
            _ => Err(ApiError::NotServed(self.not_served)),
        }
    }
}

/// Parses the one name of a request.
fn parse(kind: Noun, text: &str) -> Result<Name, ApiError> {
    let mut faults = Faults::default();
    let name = faults.name("name", kind, text);
    faults.finish(name)
}
