//! PURE. The State as a sequence of records, and back. Where the records go is not decided here.
//!
//! What follows from the rest is not written: queues and running jobs of clusters, what workspaces hold, who is bound.

use batchai_common::fault;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::internal::v1::snapshot_record::Kind as Record;
use batchai_proto::internal::v1::{
    SnapshotRecord, StoredAttempt, StoredCluster, StoredFileServer, StoredJob, StoredNode,
};
use batchai_proto::v1;
use imbl::OrdSet;

use super::access::Joined;
use super::agreement::{Comparison, FEATURE_LEVEL};
use super::attempts::{Attempt, AttemptNode, Outcome, Phase, Verdict, Work};
use super::digest::Digest;
use super::setup::Setup;
use super::{Cluster, FileServer, Job, Node, State, keys, limit_of_workspace, stored};

/// Why records are no State.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("the header is missing, or does not come first")]
    Header,
    #[error("a record is of a kind that this version does not know; use the version that wrote it")]
    Unknown,
    #[error("{what} is missing")]
    Missing { what: String },
    #[error("{what} has a value that this version does not know; use the version that wrote it")]
    Value { what: String },
}

/// The records of a State.
pub fn records(state: &State) -> impl Iterator<Item = SnapshotRecord> + '_ {
    let one = |kind| SnapshotRecord { kind: Some(kind) };
    std::iter::once(stored::header(state))
        .chain(resources(state))
        .chain(work(state))
        .chain(access(state))
        .chain(replicas(state))
        .chain(strays(state))
        .map(one)
}

fn replicas(state: &State) -> impl Iterator<Item = Record> + '_ {
    let replicas = state.replicas.values();
    replicas.map(|replica| Record::Replica((**replica).clone()))
}

fn strays(state: &State) -> impl Iterator<Item = Record> + '_ {
    let strays = state.strays.values();
    strays.map(|stray| Record::Stray((**stray).clone()))
}

fn resources(state: &State) -> impl Iterator<Item = Record> + '_ {
    let groups = state.resource_groups.values();
    let groups = groups.map(|g| Record::ResourceGroup((**g).clone()));
    let workspaces = state.workspaces.values();
    let workspaces = workspaces.map(|w| Record::Workspace((**w).clone()));
    let clusters = state
        .clusters
        .values()
        .map(|c| Record::Cluster(stored::cluster(c)));
    let experiments = state.experiments.values();
    let experiments = experiments.map(|e| Record::Experiment((**e).clone()));
    let servers = state.file_servers.values();
    let servers = servers.map(|s| Record::FileServer(stored::file_server(s)));
    let aliases = state.vm_size_aliases.values();
    let aliases = aliases.map(|a| Record::VmSizeAlias((**a).clone()));
    let storage = state.storage_aliases.values();
    let aliases = aliases.chain(storage.map(|a| Record::StorageAlias((**a).clone())));
    groups
        .chain(workspaces)
        .chain(clusters)
        .chain(experiments)
        .chain(servers)
        .chain(aliases)
}

fn work(state: &State) -> impl Iterator<Item = Record> + '_ {
    let attempts = state.attempts.values();
    let attempts = attempts.map(|a| Record::Attempt(stored::attempt(a, is_as_placed(state, a))));
    let jobs = state.jobs.values().map(|j| Record::Job(stored::job(j)));
    let nodes = state
        .nodes
        .iter()
        .map(|(name, n)| Record::Node(stored::node(name, n)));
    let deleting = state.deleting.iter().cloned().map(Record::Deleting);
    let requests = state.requests.known().iter();
    let requests = requests
        .map(|(key, known)| stored::request(key, known))
        .filter(|_| !fault!("snapshot_without_requests"));
    attempts
        .chain(jobs)
        .chain(nodes)
        .chain(deleting)
        .chain(requests)
}

fn access(state: &State) -> impl Iterator<Item = Record> + '_ {
    let bindings = state.role_bindings.values();
    let bindings = bindings.map(|b| Record::RoleBinding((**b).clone()));
    let tokens = state.tokens.values().map(|t| Record::Token((**t).clone()));
    let joined = state
        .joined
        .iter()
        .map(|(node, of)| stored::joined(node, of));
    let expelled = state
        .expelled
        .iter()
        .map(|(node, uid)| stored::expelled(node, uid));
    let revoked = state.revoked.iter();
    let revoked = revoked.map(|(member, until)| stored::revoked(member, *until));
    let keys = state
        .data_keys
        .iter()
        .map(|(of, keys)| stored::data_keys(of, keys));
    bindings
        .chain(tokens)
        .chain(joined)
        .chain(expelled)
        .chain(revoked)
        .chain(keys)
}

/// Whether the job of an attempt is still what it was placed as: then it is written once.
fn is_as_placed(state: &State, attempt: &Attempt) -> bool {
    let job = attempt.job().and_then(|name| state.jobs.get(name));
    job.is_some_and(|job| job.spec == attempt.spec)
}

/// Makes a State of its records, in their order.
#[derive(Default)]
pub struct Builder {
    state: State,
    begun: bool,
}

impl Builder {
    /// Takes the next record.
    pub fn add(&mut self, record: SnapshotRecord) -> Result<(), SnapshotError> {
        let record = record.kind.ok_or(SnapshotError::Unknown)?;
        if self.begun == matches!(record, Record::Header(_)) {
            return Err(SnapshotError::Header);
        }
        let state = &mut self.state;
        match record {
            Record::Header(header) => {
                self.begun = true;
                state.revision = header.revision;
                state.submissions = header.submissions;
                state.workspaces_made = header.workspaces_made;
                state.applied_index = header.applied_index;
                state.time = header.time.unwrap_or_default();
                state.ensemble = header.ensemble;
                state.epoch = header.epoch;
                state.restored = header.restored;
                state.longest_lease_ms = header.longest_lease_ms;
                if header.feature_level > FEATURE_LEVEL {
                    let what = "the feature level".to_owned();
                    return Err(SnapshotError::Value { what });
                }
                state.feature_level = header.feature_level;
                state.comparison = Comparison {
                    begun: header.comparison_begun,
                    decided: header.comparison_decided,
                    digest: Digest::read(&header.comparison_digest),
                };
            }
            Record::ResourceGroup(group) => {
                let name = group.name.clone();
                state.resource_groups.insert(name, Arc::new(group));
            }
            Record::Workspace(workspace) => {
                let name = workspace.name.clone();
                state.workspaces.insert(name, Arc::new(workspace));
            }
            Record::Experiment(experiment) => {
                let name = experiment.name.clone();
                state.experiments.insert(name, Arc::new(experiment));
            }
            Record::StorageAlias(alias) => {
                let name = alias.name.clone();
                state.storage_aliases.insert(name, Arc::new(alias));
            }
            Record::VmSizeAlias(alias) => {
                state
                    .vm_size_aliases
                    .insert(alias.name.clone(), Arc::new(alias));
            }
            Record::Cluster(stored) => add_cluster(state, stored)?,
            Record::FileServer(stored) => add_file_server(state, stored)?,
            Record::Attempt(stored) => add_attempt(state, stored)?,
            Record::Job(stored) => add_job(state, stored)?,
            Record::Node(stored) => add_node(state, stored)?,
            Record::Deleting(name) => drop(state.deleting.insert(name)),
            Record::Request(stored) => state
                .requests
                .restore(&required(stored.key, "request")?, stored.time),
            Record::Replica(replica) => drop(state.replicas.insert(replica.id, Arc::new(replica))),
            Record::Stray(stored) => {
                let seen = stored.stray.as_ref().and_then(|stray| stray.seen.as_ref());
                let seen = required(seen, "what was seen of a stray")?;
                let key = (stored.node.clone(), seen.attempt.clone());
                state.strays.insert(key, Arc::new(stored));
            }
            other => add_access(state, other),
        }
        Ok(())
    }

    /// All of it is there.
    pub fn finish(self) -> Result<State, SnapshotError> {
        match self.begun {
            true => Ok(derive(self.state)),
            false => Err(SnapshotError::Header),
        }
    }
}

fn add_access(state: &mut State, record: Record) {
    match record {
        Record::RoleBinding(binding) => {
            state
                .role_bindings
                .insert(binding.name.clone(), Arc::new(binding));
        }
        Record::Token(token) => {
            state.tokens.insert(token.name.clone(), Arc::new(token));
        }
        Record::Joined(stored) => {
            let joined = Joined {
                uid: stored.uid,
                token: stored.token,
                digest: stored.digest,
                vm_size: stored.vm_size,
            };
            state.joined.insert(stored.node, joined);
        }
        Record::Expelled(stored) => drop(state.expelled.insert((stored.node, stored.uid))),
        Record::Revoked(stored) => drop(state.revoked.insert(stored.member, stored.until)),
        Record::DataKeys(stored) => {
            state
                .data_keys
                .insert(stored.workspace, Arc::new(stored.keys));
        }
        _ => {}
    }
}

fn required<T>(value: Option<T>, what: &str) -> Result<T, SnapshotError> {
    value.ok_or_else(|| SnapshotError::Missing {
        what: what.to_owned(),
    })
}

fn add_cluster(state: &mut State, stored: StoredCluster) -> Result<(), SnapshotError> {
    let spec = required(stored.spec, "a cluster's spec")?;
    let name = spec.name.clone();
    let cluster = Cluster {
        spec: Arc::new(spec),
        revision: stored.revision,
        members: stored.members.into_iter().collect(),
        queue: OrdSet::new(),
        running: OrdSet::new(),
        allocation_time: stored.allocation_time.unwrap_or_default(),
        deleting: stored.deleting,
    };
    state.clusters.insert(name, Arc::new(cluster));
    Ok(())
}

fn add_file_server(state: &mut State, stored: StoredFileServer) -> Result<(), SnapshotError> {
    let spec = required(stored.spec, "a file server's spec")?;
    let name = spec.name.clone();
    let server = FileServer {
        spec: Arc::new(spec),
        revision: stored.revision,
        node: Some(stored.node).filter(|node| !node.is_empty()),
        place: stored.place,
        failure: stored.failure,
        deleting: stored.deleting,
        purge: stored.purge,
        state_time: stored.state_time.unwrap_or_default(),
    };
    state.file_servers.insert(name, Arc::new(server));
    Ok(())
}

fn add_attempt(state: &mut State, stored: StoredAttempt) -> Result<(), SnapshotError> {
    let value = |what: &str| SnapshotError::Value {
        what: format!("{what} of attempt {}", stored.id),
    };
    let phase = match stored.phase {
        0 => Phase::Preparing,
        1 => Phase::Running,
        2 => Phase::Ending,
        3 => Phase::Ended,
        _ => return Err(value("the phase")),
    };
    let outcome = match stored.outcome {
        None => None,
        Some(outcome) => Some(Outcome {
            verdict: match outcome.verdict {
                0 => Verdict::Succeeded,
                1 => Verdict::Failed,
                2 => Verdict::Requeue,
                3 => Verdict::InfrastructureFailed,
                4 => Verdict::Retry,
                _ => return Err(value("the verdict")),
            },
            exit_code: outcome.exit_code,
            errors: outcome.errors,
        }),
    };
    let mut nodes = Vec::new();
    for node in stored.nodes {
        let seen = required(node.seen, "a node of an attempt")?;
        nodes.push(AttemptNode {
            phase: seen.phase(),
            node: seen.node,
            port: node.port,
            ranks: seen.ranks,
            files: seen.files,
            first_failed: node.first_failed,
            stuck: node.stuck,
            last_words: node.last_words,
        });
    }
    let attempt = Attempt {
        id: stored.id.clone(),
        number: stored.number,
        work: match stored.job.as_str() {
            "" => Work::SetUp,
            job => Work::Job(job.to_owned()),
        },
        // One that the job still has comes with the job.
        spec: Arc::new(stored.spec.unwrap_or_default()),
        create_time: stored.create_time.unwrap_or_default(),
        phase,
        nodes,
        outcome,
        log_home: stored.log_home,
    };
    state.attempts.insert(stored.id, Arc::new(attempt));
    Ok(())
}

fn add_job(state: &mut State, stored: StoredJob) -> Result<(), SnapshotError> {
    let mut spec = required(stored.job, "a job")?;
    let job = Job {
        revision: stored.revision,
        submitted: stored.submitted,
        state: v1::job::State::try_from(spec.state).map_err(|_| SnapshotError::Value {
            what: format!("the state of {}", spec.name),
        })?,
        state_time: spec.state_transition_time.take().unwrap_or_default(),
        start_time: spec.start_time.take(),
        end_time: spec.end_time.take(),
        exit_code: spec.exit_code.take(),
        errors: std::mem::take(&mut spec.errors),
        attempt: Some(stored.attempt).filter(|attempt| !attempt.is_empty()),
        attempts: stored.attempts,
        infrastructure_retries: stored.infrastructure_retries,
        retries: stored.retries,
        deleting: stored.deleting,
        spec: {
            spec.state = 0;
            Arc::new(spec)
        },
    };
    if let Some(attempt) = job
        .attempt
        .as_ref()
        .and_then(|id| state.attempts.get_mut(id))
        && attempt.spec.name.is_empty()
    {
        Arc::make_mut(attempt).spec = job.spec.clone();
    }
    let name = job.queue_key().job;
    state.jobs.insert(name, Arc::new(job));
    Ok(())
}

fn add_node(state: &mut State, stored: StoredNode) -> Result<(), SnapshotError> {
    let seen = required(stored.node, "a node")?;
    let filled = |text: String| Some(text).filter(|text| !text.is_empty());
    let node = Node {
        uid: seen.uid,
        incarnation: stored.incarnation,
        facts: Arc::new(seen.facts.unwrap_or_default()),
        revision: stored.revision,
        create_time: seen.create_time.unwrap_or_default(),
        cluster: filled(seen.cluster),
        leaving: stored.leaving,
        expelled: stored.expelled,
        attempt: filled(stored.attempt),
        assigned: stored.assigned,
        epoch: stored.epoch,
        setup: stored.setup.map(|setup| Setup {
            incarnation: setup.incarnation,
            attempt: setup.attempt,
            done: setup.done,
            retries: setup.retries,
            error: setup.error,
            unavailable: setup.unavailable,
        }),
    };
    state.nodes.insert(seen.name, Arc::new(node));
    Ok(())
}

/// What follows from the rest.
fn derive(mut state: State) -> State {
    for (name, binding) in state.role_bindings.clone() {
        state.grants.insert((binding.member.clone(), name));
    }
    for kind in [Kind::Cluster, Kind::Experiment, Kind::FileServer, Kind::Job] {
        let names: Vec<_> = state.names(kind, "", "").map(str::to_owned).collect();
        for name in names.iter().filter(|_| limit_of_workspace(kind).is_some()) {
            let key = (keys::workspace_of(name).to_owned(), kind);
            *state.held.entry(key).or_insert(0) += 1;
        }
    }
    for job in state.jobs.clone().values() {
        let Some(cluster) = state.clusters.get_mut(&job.spec.cluster) else {
            continue;
        };
        let cluster = Arc::make_mut(cluster);
        match job.state {
            v1::job::State::Queued => drop(cluster.queue.insert(job.queue_key())),
            v1::job::State::Running | v1::job::State::Terminating => {
                drop(cluster.running.insert(job.spec.name.clone()));
            }
            _ => {}
        }
    }
    state
}
