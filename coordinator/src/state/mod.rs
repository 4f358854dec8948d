//! PURE. The replicated state and the one function that changes it.
//!
//! `apply` is run alike on every replica: it sees no clock, no randomness, no I/O and no order but that of its
//! ordered maps. A command that is refused changes nothing. What happens next (placing jobs, telling agents) is
//! decided elsewhere, from the State that results; see `duties`.
//!
//! A job's life is decided in `attempts`: from what its nodes observed follows when it runs, when it is over, and how.

pub mod access;
pub mod agreement;
pub mod assignments;
pub mod attempts;
pub mod clusters;
pub mod digest;
pub mod file_servers;
mod holders;
pub mod invariants;
pub mod jobs;
pub mod keys;
pub mod loss;
pub mod nodes;
pub mod replicas;
pub mod requests;
pub mod restore;
pub mod setup;
pub mod snapshot;
pub mod storage_aliases;
mod stored;
mod tables;
mod verdict;
pub mod vm_size_aliases;

use batchai_common::fault;
use std::sync::Arc;

use batchai_common::names::{self, Kind};
use batchai_proto::internal::v1::{
    Command, DataKey, Delete, Replica, StoredStray, Update, command::Kind as CommandKind,
};
use batchai_proto::v1;
use imbl::{OrdMap, OrdSet};
use prost_types::Timestamp;

pub use attempts::Attempt;
pub use clusters::Cluster;
pub use file_servers::FileServer;
pub use jobs::Job;
pub use nodes::Node;
pub use tables::children;

/// All resources by full name. A value: cloning it costs a few pointers, whatever it holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Rises by one with every command that changed something; the etag of what it changed.
    pub revision: i64,
    /// How many jobs were ever submitted: the place of the next one in its queue.
    pub submissions: i64,
    /// How many workspaces were ever made: the number of the latest.
    pub workspaces_made: i64,
    /// The log index of the last command, changed or not.
    pub applied_index: u64,
    /// The latest time a command carried. It never goes back.
    pub time: Timestamp,
    /// UUID of the ensemble; empty before its first command.
    pub ensemble: String,
    /// Rises with every restore from a backup.
    pub epoch: i64,
    /// It was restored, and that was not accepted yet: no work is placed.
    pub restored: bool,
    /// No lease was ever granted for longer.
    pub longest_lease_ms: i64,
    /// Work of earlier epochs that it does not know, by the node that holds it and by attempt.
    pub strays: OrdMap<(String, String), Arc<StoredStray>>,
    /// What all replicas know of what commands do. Any change in that is done from its own level on.
    pub feature_level: u32,
    /// How the replicas compared their States.
    pub comparison: agreement::Comparison,
    /// Who belongs to the ensemble, and who did, by raft id.
    pub replicas: OrdMap<u64, Arc<Replica>>,
    pub resource_groups: OrdMap<String, Arc<v1::ResourceGroup>>,
    pub workspaces: OrdMap<String, Arc<v1::Workspace>>,
    pub clusters: OrdMap<String, Arc<Cluster>>,
    pub experiments: OrdMap<String, Arc<v1::Experiment>>,
    /// Every change copies some tree nodes full of names: there are many of these, and they are shared.
    pub jobs: OrdMap<Arc<str>, Arc<Job>>,
    pub nodes: OrdMap<String, Arc<Node>>,
    /// The latest attempt of every job that has one, by attempt id.
    pub attempts: OrdMap<String, Arc<Attempt>>,
    pub file_servers: OrdMap<String, Arc<FileServer>>,
    pub vm_size_aliases: OrdMap<String, Arc<v1::VmSizeAlias>>,
    pub storage_aliases: OrdMap<String, Arc<v1::StorageAlias>>,
    pub role_bindings: OrdMap<String, Arc<v1::RoleBinding>>,
    /// Who is bound, and by which of them.
    pub grants: OrdSet<(String, String)>,
    pub tokens: OrdMap<String, Arc<v1::Token>>,
    /// Machines that have joined by a token, by the node's name, which is theirs.
    pub joined: OrdMap<String, access::Joined>,
    /// Names and UUIDs of nodes that were expelled, for ever.
    pub expelled: OrdSet<(String, String)>,
    /// Until when, in seconds, the certificates were made that are good no more, by whose they are.
    pub revoked: OrdMap<String, i64>,
    /// The wrapped keys that seal the secrets of workspaces, by the workspace's name, the latest first.
    pub data_keys: OrdMap<String, Arc<Vec<DataKey>>>,
    /// How many of a kind each workspace holds, where there are any.
    pub held: OrdMap<(String, Kind), usize>,
    /// What is being deleted with all that it holds or that needs it; jobs excepted, which know it themselves.
    pub deleting: OrdSet<String>,
    /// What was carried out lately, by the id it came with.
    pub requests: requests::Requests,
}

/// How many resources of a kind there may be. All of them are in memory and in every copy of the log.
pub fn limit(kind: Kind) -> usize {
    match kind {
        Kind::ResourceGroup
        | Kind::Cluster
        | Kind::FileServer
        | Kind::VmSizeAlias
        | Kind::StorageAlias => 1_000,
        Kind::Workspace | Kind::Node | Kind::RoleBinding | Kind::Token => 10_000,
        Kind::Experiment => 100_000,
        Kind::Job => 1_000_000,
        // Files beside the State; their disk is their bound.
        Kind::Bundle => 0,
    }
}

/// How many of a kind one workspace may hold: so many that none can use up what all may have.
pub fn limit_of_workspace(kind: Kind) -> Option<usize> {
    match kind {
        Kind::Cluster | Kind::FileServer => Some(100),
        Kind::Experiment => Some(10_000),
        Kind::Job => Some(100_000),
        _ => None,
    }
}

/// As errors call what holds everything.
pub const ENSEMBLE: &str = "the ensemble";

/// What a command changed: for those who watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A resource was created or changed.
    Changed { name: String },
    /// A resource was removed.
    Deleted { name: String },
    /// The assignments of a node are others than before.
    Assigned { node: String },
}

/// Why a command changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("{} {name} does not exist", .kind.noun())]
    NotFound { kind: Kind, name: String },
    #[error("{} {name} exists already", .kind.noun())]
    Exists { kind: Kind, name: String },
    #[error("{name}: {why}")]
    WrongState { name: String, why: String },
    #[error("{name} has etag {actual}, not {expected}")]
    StaleEtag {
        name: String,
        expected: String,
        actual: String,
    },
    #[error("there are {limit} of kind {} in {place} already, as many as there may be", .kind.noun())]
    LimitReached {
        kind: Kind,
        limit: usize,
        place: String,
    },
    #[error("request id {id} was used for another request")]
    RequestIdReused { id: String },
    /// A plan or report was overtaken by events; whoever made it makes another.
    #[error("{name}: overtaken: {why}")]
    Overtaken { name: String, why: String },
    /// Nothing can be done yet.
    #[error("the ensemble is being set up")]
    Unnamed,
    /// The command is of a later version than this replica.
    #[error("unknown command: this replica is older than the log it reads; upgrade it")]
    Unknown,
}

/// The quoted revision.
pub fn etag(revision: i64) -> String {
    format!("\"{revision}\"")
}

/// Collects what one command does. It works on a clone of the State, so that a rejection half-way leaves no trace.
pub(crate) struct Step<'a> {
    pub state: &'a mut State,
    pub events: Vec<Event>,
}

impl Step<'_> {
    pub fn changed(&mut self, name: &str) {
        let name = name.to_owned();
        self.events.push(Event::Changed { name });
    }

    pub fn deleted(&mut self, name: &str) {
        let name = name.to_owned();
        self.events.push(Event::Deleted { name });
    }

    /// Something that lies in a workspace was made.
    pub fn made(&mut self, kind: Kind, name: &str) {
        if limit_of_workspace(kind).is_some() {
            let key = (keys::workspace_of(name).to_owned(), kind);
            *self.state.held.entry(key).or_insert(0) += 1;
        }
    }

    /// Something that lay in a workspace is gone.
    pub fn gone(&mut self, kind: Kind, name: &str) {
        let key = (keys::workspace_of(name).to_owned(), kind);
        match self.state.held.get_mut(&key) {
            Some(held) if *held > 1 => *held -= usize::from(!fault!("held_not_counted_down")),
            _ => drop(self.state.held.remove(&key)),
        }
    }

    pub fn assigned(&mut self, node: &str) {
        let node = node.to_owned();
        self.events.push(Event::Assigned { node });
    }
}

/// Applies one command of the log.
///
/// # Errors
/// The command was legal to write but does not fit the State it met; the State is as before but for `applied_index`.
pub fn apply(state: &mut State, index: u64, command: &Command) -> Result<Vec<Event>, Rejection> {
    state.applied_index = index;
    let mut next = state.clone();
    next.revision += 1;
    if let Some(time) = command.time
        && (fault!("time_goes_back")
            || (time.seconds, time.nanos) > (next.time.seconds, next.time.nanos))
    {
        next.time = time;
    }
    if let Some(request) = &command.request
        && requests::is_repeated(&next, request)?
    {
        return Ok(Vec::new());
    }
    let mut step = Step {
        state: &mut next,
        events: Vec::new(),
    };
    dispatch(&mut step, command)?;
    file_servers::follow(state, &mut step);
    let events = step.events;
    if let Some(request) = &command.request {
        requests::remember(&mut next, request);
    }
    *state = next;
    Ok(events)
}

fn dispatch(step: &mut Step<'_>, command: &Command) -> Result<(), Rejection> {
    let first = matches!(command.kind, Some(CommandKind::InitEnsemble(_)));
    if step.state.ensemble.is_empty() && !first {
        return Err(Rejection::Unnamed);
    }
    let kind = command.kind.as_ref().ok_or(Rejection::Unknown)?;
    agreement::check(step.state, kind)?;
    match kind {
        CommandKind::InitEnsemble(c) => replicas::init_ensemble(step.state, c),
        CommandKind::ChangeReplica(c) => replicas::change(step, c),
        CommandKind::RecordReplica(c) => replicas::record(step, c),
        CommandKind::CompareStates(_) => {
            agreement::begin(step);
            Ok(())
        }
        CommandKind::DecideComparison(c) => agreement::decide(step, c),
        CommandKind::RaiseFeatureLevel(c) => agreement::raise(step, c),
        CommandKind::AdoptAttempt(c) => restore::adopt(step, c),
        CommandKind::DiscardAttempt(c) => restore::discard(step, c),
        CommandKind::AcceptRestore(c) => restore::accept(step, c),
        CommandKind::RecordLease(c) => loss::record_lease(step, c),
        CommandKind::LoseNode(c) => loss::lose(step, c),
        CommandKind::ConfirmNodeLost(c) => loss::confirm(step, c),
        CommandKind::CreateResourceGroup(c) => holders::create(step, c),
        CommandKind::CreateWorkspace(c) => holders::create(step, c),
        CommandKind::CreateCluster(c) => clusters::create(step, c),
        CommandKind::CreateExperiment(c) => holders::create(step, c),
        CommandKind::CreateJob(c) => jobs::create(step, c),
        CommandKind::CreateJobs(c) => c.jobs.iter().try_for_each(|job| jobs::create(step, job)),
        CommandKind::CreateVmSizeAlias(c) => vm_size_aliases::create(step, c),
        CommandKind::CreateStorageAlias(c) => storage_aliases::create(step, c),
        CommandKind::CreateRoleBinding(c) => access::create_role_binding(step, c),
        CommandKind::CreateToken(c) => access::create_token(step, c),
        CommandKind::UseToken(c) => access::use_token(step, c),
        CommandKind::RevokeCertificates(c) => access::revoke_certificates(step, c),
        CommandKind::ExpelNode(c) => access::expel_node(step, c),
        CommandKind::CreateFileServer(c) => file_servers::create(step, c),
        CommandKind::PlaceFileServer(c) => file_servers::place(step, c),
        CommandKind::DeleteFileServer(c) => {
            file_servers::delete(step, &c.delete.clone().unwrap_or_default(), c.purge)
        }
        CommandKind::Update(c) => update(step, c),
        CommandKind::Delete(c) => delete(step, c),
        CommandKind::TerminateJob(c) => jobs::terminate(step, &c.name, c.cause()),
        CommandKind::RegisterNode(c) => nodes::register(step, c),
        CommandKind::AllocateNode(c) => nodes::allocate(step, c),
        CommandKind::ReleaseNode(c) => nodes::release(step, c),
        CommandKind::Place(c) => attempts::place(step, c),
        CommandKind::RecordReport(c) => attempts::record(step, c),
        CommandKind::FailAttempt(c) => attempts::fail(step, c),
        CommandKind::PutDataKey(c) => keys::put(step, c),
        CommandKind::SetUpNode(c) => setup::begin(step, c),
    }
}

fn update(step: &mut Step<'_>, command: &Update) -> Result<(), Rejection> {
    match Kind::of(&command.name).ok_or_else(|| not_for(&command.name))? {
        Kind::ResourceGroup => holders::update::<v1::ResourceGroup>(step, command),
        Kind::Workspace => holders::update::<v1::Workspace>(step, command),
        Kind::Experiment => holders::update::<v1::Experiment>(step, command),
        Kind::Cluster => clusters::update(step, command),
        Kind::Job => jobs::update(step, command),
        Kind::FileServer
        | Kind::Node
        | Kind::VmSizeAlias
        | Kind::StorageAlias
        | Kind::RoleBinding
        | Kind::Token
        | Kind::Bundle => Err(not_for(&command.name)),
    }
}

fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    match Kind::of(&command.name).ok_or_else(|| not_for(&command.name))? {
        Kind::ResourceGroup => holders::delete::<v1::ResourceGroup>(step, command),
        Kind::Workspace => holders::delete::<v1::Workspace>(step, command),
        Kind::Experiment => holders::delete::<v1::Experiment>(step, command),
        Kind::Cluster => clusters::delete(step, command),
        Kind::Job => jobs::delete(step, command),
        Kind::VmSizeAlias => vm_size_aliases::delete(step, command),
        Kind::StorageAlias => storage_aliases::delete(step, command),
        Kind::RoleBinding => access::delete_role_binding(step, command),
        Kind::Token => access::delete_token(step, command),
        Kind::FileServer => file_servers::delete(step, command, false),
        Kind::Node | Kind::Bundle => Err(not_for(&command.name)),
    }
}

/// The command is one that resources of this kind do not take. Nothing sends it; if something did, no replica falls.
fn not_for(name: &str) -> Rejection {
    Rejection::WrongState {
        name: name.to_owned(),
        why: "resources of its kind are not changed or deleted like that".to_owned(),
    }
}

/// Checks the etag a request expects; an empty one expects nothing.
pub(crate) fn check_etag(name: &str, expected: &str, actual: &str) -> Result<(), Rejection> {
    if expected.is_empty() || expected == actual {
        return Ok(());
    }
    Err(Rejection::StaleEtag {
        name: name.to_owned(),
        expected: expected.to_owned(),
        actual: actual.to_owned(),
    })
}

pub(crate) fn not_found(kind: Kind, name: &str) -> Rejection {
    Rejection::NotFound {
        kind,
        name: name.to_owned(),
    }
}

/// A new resource needs its parent, a free name and room.
pub(crate) fn check_new(state: &State, kind: Kind, name: &str) -> Result<(), Rejection> {
    if let Some(parent_kind) = kind.parent() {
        let parent = names::parent(name).unwrap_or_default();
        if !state.contains(parent_kind, parent) {
            return Err(not_found(parent_kind, parent));
        }
        check_stays(state, parent)?;
    }
    if state.contains(kind, name) {
        return Err(Rejection::Exists {
            kind,
            name: name.to_owned(),
        });
    }
    let limit = limit(kind);
    let reached = |limit, place: &str| Rejection::LimitReached {
        kind,
        limit,
        place: place.to_owned(),
    };
    if state.count(kind) >= limit {
        return Err(reached(limit, ENSEMBLE));
    }
    if let Some(limit) = limit_of_workspace(kind) {
        let workspace = keys::workspace_of(name);
        let held = state.held.get(&(workspace.to_owned(), kind));
        if held.is_some_and(|held| *held >= limit) {
            return Err(reached(limit, workspace));
        }
    }
    Ok(())
}

/// Nothing new is made in or for what is being deleted.
pub(crate) fn check_stays(state: &State, name: &str) -> Result<(), Rejection> {
    if !state.deleting.contains(name) {
        return Ok(());
    }
    Err(Rejection::WrongState {
        name: name.to_owned(),
        why: "it is being deleted".to_owned(),
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
