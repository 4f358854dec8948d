//! The gRPC services that users see. Thin: a request is parsed and checked whole, becomes a command or a read, and
//! what the State says becomes the reply. Nothing is decided here.

mod access;
mod admin;
mod bundles;
mod cluster_spec;
mod clusters;
mod containers;
mod exec;
mod experiments;
mod faults;
mod fields;
mod file_servers;
mod files;
mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod information;
mod job_spec;
mod jobs;
mod log_request;
mod nodes;
mod page;
mod remote_login;
mod resource_groups;
mod restore;
mod seal;
mod server_files;
mod storage_aliases;
mod toolkits;
pub mod views;
mod vm_sizes;
mod volumes;
mod watch;
mod workspaces;

use std::pin::Pin;
use std::sync::Arc;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_common::time;
use batchai_common::tls::Authority;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Command, Delete, RequestKey, Update};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};

use crate::agents::contacts::Contacts;
use crate::agents::execs::ExecDesk;
use crate::agents::files::FileDesk;
use crate::audit::Audit;
use crate::bundles::BundleStore;
use crate::call::{caller, led_to};
use crate::copies::Copies;
use crate::logs::LogStore;
use crate::replica::handle::unavailable;
use crate::replica::peers::Peers;
use crate::replica::{Handle, ReplicaError};
use crate::secrets::Vault;
use crate::state::{Rejection, State, apply};

use faults::{Faults, Once};
use page::Query;
use views::Resource;

/// What a stream sends.
type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What all services share. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    pub peers: Peers,
    pub replica: Handle,
    pub contacts: Contacts,
    pub logs: LogStore,
    pub bundles: BundleStore,
    pub copies: Copies,
    pub desk: FileDesk,
    pub execs: ExecDesk,
    /// Signs certificates, where the ensemble has some of its own making.
    pub authority: Option<Arc<Authority>>,
    pub audit: Audit,
    pub vault: Vault,
    pub shutdown: CancellationToken,
}

impl Api {
    /// A State that has everything that was acknowledged before this call.
    async fn read(&self) -> Result<Arc<State>, ApiError> {
        self.replica.read().await.map_err(|error| match error {
            // Nothing was asked to change: it may be asked again.
            ReplicaError::TimedOut | ReplicaError::Unknown => self.unavailable(&error),
            error => self.error(error),
        })
    }

    /// Has a command applied; returns the State that it led to.
    async fn write(&self, kind: Kind) -> Result<Arc<State>, ApiError> {
        let revision = self.replica.propose(kind).await;
        let revision = revision.map_err(|error| self.error(error))?;
        led_to(revision);
        Ok(self.at(revision))
    }

    /// The State of a revision, or the latest where that changed nothing or is forgotten.
    fn at(&self, revision: i64) -> Arc<State> {
        match self.replica.hub().at(revision) {
            Some(known) => known.state.clone(),
            None => self.replica.published().borrow().state.clone(),
        }
    }

    /// Has a request carried out, once, or only tried.
    async fn write_once(&self, kind: Kind, once: Once) -> Result<Arc<State>, ApiError> {
        if once.validate_only {
            let mut state = self.read().await?;
            let index = state.applied_index + 1;
            let command = Command {
                time: Some(time::now()),
                request: None,
                kind: Some(kind),
            };
            // On a State of our own, which nobody else ever sees.
            apply(Arc::make_mut(&mut state), index, &command).map_err(rejected)?;
            return Ok(state);
        }
        // Under the same id, others ask for something else.
        let caller = caller().label();
        let Some(key) = once.key.map(|key| RequestKey { caller, ..key }) else {
            return self.write(kind).await;
        };
        let revision = self.replica.propose_once(kind, key).await;
        let revision = revision.map_err(|error| self.error(error))?;
        led_to(revision);
        Ok(self.at(revision))
    }

    /// One resource, as it is in a State.
    fn show<R: Resource>(&self, state: &State, name: &str) -> Result<Response<R>, Status> {
        let found = R::view(state, &self.contacts.heard_lately(), name);
        let found = found.ok_or_else(|| ApiError::NotFound {
            kind: R::KIND,
            name: name.to_owned(),
        })?;
        Ok(Response::new(found))
    }

    /// Nodes are heard of by the leader: what they do now, and what jobs and clusters wait for, only it can say.
    fn may_show(&self, kind: Noun) -> Result<(), ApiError> {
        match kind {
            Noun::Node | Noun::Job | Noun::Cluster | Noun::FileServer => self.replica.must_lead(),
            _ => Ok(()),
        }
    }

    /// One resource.
    async fn get<R: Resource>(&self, name: &str) -> Result<Response<R>, Status> {
        let name = parse(R::KIND, name)?;
        self.may_show(R::KIND)?;
        self.show(&*self.read().await?, name.as_str())
    }

    /// A page of resources, and the token of the next.
    async fn list<R: Resource>(
        &self,
        parent: &str,
        page: (i32, &str),
        filter: &str,
    ) -> Result<(Vec<R>, String), ApiError> {
        let query = Query::new((R::KIND, R::MESSAGE), parent, page, filter)?;
        self.may_show(R::KIND)?;
        let (state, heard) = (self.read().await?, self.contacts.heard_lately());
        query.check_parent(&state)?;
        // It may look at many: others of this thread go on elsewhere.
        let page = || query.page(&state, |name| R::view(&state, &heard, name));
        Ok(tokio::task::block_in_place(page))
    }

    /// Deletes a resource, or begins to.
    async fn delete(
        &self,
        kind: Noun,
        name: &str,
        etag: String,
        force: bool,
    ) -> Result<(), ApiError> {
        let name = parse(kind, name)?.into();
        let delete = Delete { name, etag, force };
        self.write(Kind::Delete(delete)).await.map(|_| ())
    }

    /// Changes a resource; returns a State that has the change.
    async fn update(&self, update: Update) -> Result<Arc<State>, ApiError> {
        self.write(Kind::Update(update)).await
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
            ReplicaError::Refused(why) => ApiError::WrongState {
                name: "the replica".to_owned(),
                why,
            },
        }
    }

    fn unavailable(&self, error: &ReplicaError) -> ApiError {
        unavailable(&self.replica, error)
    }
}

fn rejected(rejection: Rejection) -> ApiError {
    match rejection {
        Rejection::NotFound { kind, name } => ApiError::NotFound { kind, name },
        Rejection::Exists { kind, name } => ApiError::AlreadyExists { kind, name },
        Rejection::WrongState { name, why } | Rejection::Overtaken { name, why } => {
            ApiError::WrongState { name, why }
        }
        Rejection::LimitReached { kind, limit, place } => {
            ApiError::LimitReached { kind, limit, place }
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
        Rejection::Unnamed => ApiError::Unavailable {
            why: rejection.to_string(),
            leader: None,
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

/// Parses the one name of a request.
fn parse(kind: Noun, text: &str) -> Result<Name, ApiError> {
    let mut faults = Faults::default();
    let name = faults.name("name", kind, text);
    faults.finish(name)
}

fn draining() -> ApiError {
    ApiError::Unavailable {
        why: "it is shutting down".into(),
        leader: None,
    }
}

/// What went wrong is for the log; who asked gets the name that it has there.
fn internal(error: impl std::fmt::Display) -> ApiError {
    let id = uuid::Uuid::new_v4().to_string();
    tracing::error!(%error, id, "cannot answer");
    ApiError::Internal { id }
}
