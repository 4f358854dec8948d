//! PURE. The replicated state and the one function that changes it.
//!
//! `apply` is run alike on every replica: it sees no clock, no randomness, no I/O and no order but that of its
//! ordered maps. A command that is refused changes nothing. What happens next (placing jobs, telling agents) is
//! decided elsewhere, from the State that results; see `duties`.
//!
//! A job's life is decided in `attempts`: from what its nodes observed follows when it runs, when it is over, and how.

pub mod assignments;
pub mod attempts;
pub mod clusters;
pub mod experiments;
pub mod invariants;
pub mod jobs;
pub mod nodes;
pub mod requests;
pub mod resource_groups;
pub mod workspaces;

use std::ops::Bound;
use std::sync::Arc;

use batchai_common::names::{self, Kind};
use batchai_proto::internal::v1::{Command, command::Kind as CommandKind};
use batchai_proto::v1;
use imbl::OrdMap;
use prost_types::Timestamp;

pub use attempts::Attempt;
pub use clusters::Cluster;
pub use jobs::Job;
pub use nodes::Node;

/// All resources by full name. A value: cloning it costs a few pointers, whatever it holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Rises by one with every command that changed something; the etag of what it changed.
    pub revision: i64,
    /// How many jobs were ever submitted: the place of the next one in its queue.
    pub submissions: i64,
    /// The log index of the last command, changed or not.
    pub applied_index: u64,
    /// The latest time a command carried. It never goes back.
    pub time: Timestamp,
    /// UUID of the ensemble; empty before its first command.
    pub ensemble: String,
    /// Rises with every restore from a backup.
    pub epoch: i64,
    pub resource_groups: OrdMap<String, Arc<v1::ResourceGroup>>,
    pub workspaces: OrdMap<String, Arc<v1::Workspace>>,
    pub clusters: OrdMap<String, Arc<Cluster>>,
    pub experiments: OrdMap<String, Arc<v1::Experiment>>,
    pub jobs: OrdMap<String, Arc<Job>>,
    pub nodes: OrdMap<String, Arc<Node>>,
    /// The latest attempt of every job that has one, by attempt id.
    pub attempts: OrdMap<String, Arc<Attempt>>,
    /// What was carried out lately, by the id it came with.
    pub requests: requests::Requests,
}

/// What a command changed: for those who watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A resource was created or changed.
    Changed { name: String, revision: i64 },
    /// A resource was removed.
    Deleted { name: String, revision: i64 },
    /// The assignments of a node are others than before.
    Assigned { node: String, revision: i64 },
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
    #[error("request id {id} was used for another request")]
    RequestIdReused { id: String },
    /// A plan or report was overtaken by events; whoever made it makes another.
    #[error("{name}: overtaken: {why}")]
    Overtaken { name: String, why: String },
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
        let revision = self.state.revision;
        self.events.push(Event::Changed {
            name: name.to_owned(),
            revision,
        });
    }

    pub fn deleted(&mut self, name: &str) {
        let revision = self.state.revision;
        self.events.push(Event::Deleted {
            name: name.to_owned(),
            revision,
        });
    }

    pub fn assigned(&mut self, node: &str) {
        let revision = self.state.revision;
        self.events.push(Event::Assigned {
            node: node.to_owned(),
            revision,
        });
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
        && (time.seconds, time.nanos) > (next.time.seconds, next.time.nanos)
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
        let why = "the ensemble has no name yet".to_owned();
        return Err(Rejection::Overtaken {
            name: "ensemble".to_owned(),
            why,
        });
    }
    match command.kind.as_ref().ok_or(Rejection::Unknown)? {
        CommandKind::InitEnsemble(c) => init_ensemble(step.state, &c.ensemble, c.epoch),
        CommandKind::CreateResourceGroup(c) => resource_groups::create(step, c),
        CommandKind::DeleteResourceGroup(c) => resource_groups::delete(step, c),
        CommandKind::CreateWorkspace(c) => workspaces::create(step, c),
        CommandKind::DeleteWorkspace(c) => workspaces::delete(step, c),
        CommandKind::CreateCluster(c) => clusters::create(step, c),
        CommandKind::ResizeCluster(c) => clusters::resize(step, c),
        CommandKind::DeleteCluster(c) => clusters::delete(step, c),
        CommandKind::CreateExperiment(c) => experiments::create(step, c),
        CommandKind::DeleteExperiment(c) => experiments::delete(step, c),
        CommandKind::CreateJob(c) => jobs::create(step, c),
        CommandKind::CreateJobs(c) => c.jobs.iter().try_for_each(|job| jobs::create(step, job)),
        CommandKind::TerminateJob(c) => jobs::terminate(step, &c.name),
        CommandKind::DeleteJob(c) => jobs::delete(step, c),
        CommandKind::RegisterNode(c) => nodes::register(step, c),
        CommandKind::AllocateNode(c) => nodes::allocate(step, c),
        CommandKind::ReleaseNode(c) => nodes::release(step, c),
        CommandKind::Place(c) => attempts::place(step, c),
        CommandKind::RecordReport(c) => attempts::record(step, c),
        CommandKind::FailAttempt(c) => attempts::fail(step, c),
    }
}

fn init_ensemble(state: &mut State, ensemble: &str, epoch: i64) -> Result<(), Rejection> {
    if !state.ensemble.is_empty() {
        let why = "the ensemble has its name already".to_owned();
        return Err(Rejection::Overtaken {
            name: state.ensemble.clone(),
            why,
        });
    }
    state.ensemble = ensemble.to_owned();
    state.epoch = epoch;
    Ok(())
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

/// A new resource needs its parent and a free name.
pub(crate) fn check_new<T, P>(
    kind: Kind,
    name: &str,
    table: &OrdMap<String, T>,
    parents: &OrdMap<String, P>,
) -> Result<(), Rejection> {
    let parent = names::parent(name).unwrap_or_default();
    let parent_kind = kind.parent().unwrap_or(kind);
    if !parents.contains_key(parent) {
        return Err(not_found(parent_kind, parent));
    }
    if table.contains_key(name) {
        return Err(Rejection::Exists {
            kind,
            name: name.to_owned(),
        });
    }
    Ok(())
}

/// The resources of a table that one parent holds, by name, from behind a name on.
pub fn children<'a, T>(
    table: &'a OrdMap<String, T>,
    parent: &str,
    kind: Kind,
    after: &str,
) -> impl Iterator<Item = (&'a String, &'a T)> + use<'a, T> {
    let prefix = match kind.parent() {
        Some(_) => format!("{parent}/{}/", kind.collection()),
        None => format!("{}/", kind.collection()),
    };
    let begin = match after {
        "" => Bound::Included(prefix.clone()),
        after => Bound::Excluded(after.to_owned()),
    };
    table
        .range((begin, Bound::Unbounded))
        .take_while(move |(name, _)| name.starts_with(&prefix))
}

/// Refuses to remove what still holds something.
pub(crate) fn check_empty<T>(
    parent: &str,
    table: &OrdMap<String, T>,
    kind: Kind,
) -> Result<(), Rejection> {
    let Some((child, _)) = children(table, parent, kind, "").next() else {
        return Ok(());
    };
    let why = format!("it still holds {} {child}; delete that first", kind.noun());
    Err(Rejection::WrongState {
        name: parent.to_owned(),
        why,
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
