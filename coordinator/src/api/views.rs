//! PURE. What the State holds, as replies show it.

use std::collections::BTreeSet;
use std::sync::Arc;

use batchai_common::names::Kind as Noun;
use batchai_common::time;
use batchai_proto::v1::ProvisioningState;
use batchai_proto::v1::cluster::AllocationState;
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::node::State as NodeState;
use batchai_proto::{secrets, v1};
use prost_types::Timestamp;

use super::{cluster_spec, file_servers};
use crate::duties::Heard;
use crate::scheduler::explain::pending_reason;
use crate::state::attempts;
use crate::state::file_servers::Load;
use crate::state::{Cluster, FileServer, Job, Node, State, etag, setup, vm_size_aliases};

/// Errors of its nodes that a cluster shows.
const ERRORS_MAX: usize = 20;

/// A kind of resource as replies show it.
pub trait Resource: prost::Message + Default + Send + 'static {
    const KIND: Noun;
    /// The name of its message in the API.
    const MESSAGE: &'static str;
    /// One of them; none where the State has none of that name.
    fn view(state: &State, heard: &Heard, name: &str) -> Option<Self>;
    /// Nothing more happens to it by itself.
    fn is_over(&self) -> bool {
        false
    }
}

macro_rules! resource {
    ($message:ident, |$state:ident, $heard:ident, $name:ident| $view:expr) => {
        impl Resource for v1::$message {
            const KIND: Noun = Noun::$message;
            const MESSAGE: &'static str = stringify!($message);

            fn view($state: &State, $heard: &Heard, $name: &str) -> Option<Self> {
                $view
            }
        }
    };
}

resource!(ResourceGroup, |state, _heard, name| state
    .resource_groups
    .get(name)
    .map(|group| Self::clone(group)));
resource!(Workspace, |state, _heard, name| state
    .workspaces
    .get(name)
    .map(|workspace| Self::clone(workspace)));
resource!(Experiment, |state, _heard, name| state
    .experiments
    .get(name)
    .map(|experiment| Self::clone(experiment)));
resource!(StorageAlias, |state, _heard, name| state
    .storage_aliases
    .get(name)
    .map(|alias| Self::clone(alias)));
resource!(VmSizeAlias, |state, _heard, name| state
    .vm_size_aliases
    .get(name)
    .map(|alias| Self::clone(alias)));
resource!(RoleBinding, |state, _heard, name| state
    .role_bindings
    .get(name)
    .map(|binding| Self::clone(binding)));
resource!(Token, |state, _heard, name| state.tokens.get(name).map(
    |token| Self {
        // What goes in never comes out.
        secret_sha256: String::new(),
        ..Self::clone(token)
    }
));
resource!(Cluster, |state, heard, name| Some(cluster(
    state,
    heard,
    state.clusters.get(name)?
)));
resource!(Node, |state, heard, name| Some(node(
    state,
    heard,
    name,
    state.nodes.get(name)?
)));

resource!(FileServer, |state, heard, name| Some(file_server(
    state,
    heard,
    state.file_servers.get(name)?
)));

impl Resource for v1::Job {
    const KIND: Noun = Noun::Job;
    const MESSAGE: &'static str = "Job";

    fn view(state: &State, heard: &Heard, name: &str) -> Option<Self> {
        Some(job(state, heard, state.jobs.get(name)?))
    }

    fn is_over(&self) -> bool {
        let ended = matches!(self.state(), JobState::Succeeded | JobState::Failed);
        ended && self.provisioning_state() != ProvisioningState::Deleting
    }
}

/// Where a record is in its life, and since when.
fn provisioning(
    deleting: Option<Timestamp>,
    created: Option<Timestamp>,
) -> (i32, Option<Timestamp>) {
    match deleting {
        Some(since) => (ProvisioningState::Deleting as i32, Some(since)),
        None => (ProvisioningState::Succeeded as i32, created),
    }
}

fn job(state: &State, heard: &Heard, job: &Job) -> v1::Job {
    let (provisioning_state, since) = provisioning(job.deleting, job.spec.create_time);
    let attempt = job.attempt.as_ref().and_then(|id| state.attempts.get(id));
    let mut spec = v1::Job::clone(&job.spec);
    secrets::blank(secrets::of_job(&mut spec));
    v1::Job {
        etag: etag(job.revision),
        state: job.state as i32,
        state_transition_time: Some(job.state_time),
        pending_reason: pending_reason(state, heard, job),
        start_time: job.start_time,
        end_time: job.end_time,
        exit_code: job.exit_code,
        errors: job.errors.clone(),
        attempt: attempt.map(|attempt| attempt.view()),
        provisioning_state,
        provisioning_state_transition_time: since,
        retry_count: job.retries,
        infrastructure_retry_count: job.infrastructure_retries,
        ..spec
    }
}

fn file_server(state: &State, heard: &Heard, server: &FileServer) -> v1::FileServer {
    let place = server.place.as_ref();
    v1::FileServer {
        etag: etag(server.revision),
        mount_settings: place.map(|place| v1::MountSettings {
            mount_point: place.path.clone(),
            file_server_public_ip: place.address.clone(),
            file_server_internal_ip: place.address.clone(),
            port: place.port,
        }),
        provisioning_state: server.state() as i32,
        provisioning_state_transition_time: Some(server.state_time),
        node: server.node.clone().unwrap_or(server.spec.node.clone()),
        backend: place.map(|place| place.backend.clone()).unwrap_or_default(),
        errors: server
            .failure
            .clone()
            .into_iter()
            .chain(unserved(state, heard, server))
            .collect(),
        warnings: file_servers::warnings(&server.spec),
        ..v1::FileServer::clone(&server.spec)
    }
}

/// Why a file server is not served, as far as that is not its node's own failure.
fn unserved(state: &State, heard: &Heard, server: &FileServer) -> Option<v1::ResourceError> {
    let (size, name) = (&server.spec.vm_size, &server.spec.name);
    let alias = vm_size_aliases::resolve(state, size);
    let fits = |(id, node): (&String, &Arc<Node>)| {
        heard.is_alive(id)
            && server.matches(alias, id, node)
            && Load::of(state, id).with(server).fits(node)
    };
    let (code, message) = match &server.node {
        Some(node) if !heard.is_alive(node) && server.failure.is_none() => {
            let end = match server.deleting {
                Some(_) => "; it is deleted once the node is back, or expelled",
                None => "",
            };
            let why = format!("{node}, which serves it, is not heard of{end}");
            ("FileServerNodeSilent", why)
        }
        Some(_) => return None,
        None if state.restored => (
            "RestoreNotAccepted",
            "the ensemble was restored from a backup, and nothing begins before that is accepted: batchai admin snapshot accept".to_owned(),
        ),
        None if state.nodes.iter().any(fits) => return None,
        None => {
            let which = match server.spec.node.as_str() {
                "" => "no node that is heard of",
                node => &format!("{node} is not heard of, or not one that"),
            };
            let why = format!(
                "{which} has VM size {size}, was given a --storage-root, and has room there for its disks beside what other file servers were promised"
            );
            ("NoStorageNode", why)
        }
    };
    Some(attempts::error(code, &message, &[("fileServer", name)]))
}

fn node(state: &State, heard: &Heard, name: &str, node: &Node) -> v1::Node {
    let attempt = node.attempt.as_ref().and_then(|id| state.attempts.get(id));
    v1::Node {
        name: name.to_owned(),
        uid: node.uid.clone(),
        etag: etag(node.revision),
        create_time: Some(node.create_time),
        state: node_state(state, heard, name, node) as i32,
        errors: setup::error(node)
            .cloned()
            .into_iter()
            .chain(attempts::stuck(state, name, node))
            .collect(),
        cluster: node.cluster.clone().unwrap_or_default(),
        job: attempt
            .and_then(|attempt| attempt.job())
            .map(str::to_owned)
            .unwrap_or_default(),
        last_contact_time: heard.last_wall(name).map(time::from_millis),
        facts: Some(v1::NodeFacts::clone(&node.facts)),
    }
}

fn node_state(state: &State, heard: &Heard, name: &str, node: &Node) -> NodeState {
    match heard.is_alive(name) {
        _ if node.expelled => NodeState::Expelled,
        true if setup::error(node).is_some() => NodeState::Unusable,
        true if attempts::stuck(state, name, node).is_some() => NodeState::Unusable,
        true if !setup::is_done(state, node) && !node.leaving => NodeState::Preparing,
        true => node.state(),
        false => NodeState::Unusable,
    }
}

/// A cluster, with its nodes counted.
fn cluster(state: &State, heard: &Heard, cluster: &Cluster) -> v1::Cluster {
    let (provisioning_state, since) = provisioning(cluster.deleting, cluster.spec.create_time);
    let members = cluster
        .members
        .iter()
        .filter_map(|name| Some((name, state.nodes.get(name)?)));
    let mut counts = v1::NodeStateCounts::default();
    for (name, node) in members {
        let count = match node_state(state, heard, name, node) {
            NodeState::Idle => &mut counts.idle_node_count,
            NodeState::Running => &mut counts.running_node_count,
            NodeState::Leaving => &mut counts.leaving_node_count,
            NodeState::Preparing => &mut counts.preparing_node_count,
            _ => &mut counts.unusable_node_count,
        };
        *count += 1;
    }
    let mut spec = v1::Cluster::clone(&cluster.spec);
    secrets::blank(secrets::of_cluster(&mut spec));
    v1::Cluster {
        etag: etag(cluster.revision),
        allocation_state: match cluster.steady() {
            true => AllocationState::Steady,
            false => AllocationState::Resizing,
        } as i32,
        allocation_state_transition_time: Some(cluster.allocation_time),
        provisioning_state,
        provisioning_state_transition_time: since,
        warnings: cluster_spec::warnings(&cluster.spec),
        current_node_count: cluster.members.len() as i32,
        node_state_counts: Some(counts),
        errors: too_few(state, cluster)
            .into_iter()
            .chain(unprepared(state, cluster))
            .collect(),
        ..spec
    }
}

/// Why nodes of a cluster are not as it wants them: the first ones, by name.
fn unprepared(state: &State, cluster: &Cluster) -> Vec<v1::ResourceError> {
    let members = cluster.members.iter().filter_map(|n| state.nodes.get(n));
    let errors = members.filter_map(|node| setup::error(node));
    errors.take(ERRORS_MAX).cloned().collect()
}

/// Says what nodes there are where a cluster finds too few that match.
fn too_few(state: &State, cluster: &Cluster) -> Option<v1::ResourceError> {
    let missing = cluster.target().saturating_sub(cluster.members.len());
    let free = || state.nodes.values().filter(|node| node.is_free());
    let alias = vm_size_aliases::resolve(state, &cluster.spec.vm_size);
    if missing == 0 || free().any(|node| cluster.matches(alias, &node.facts)) {
        return None;
    }
    let kinds: BTreeSet<_> = free()
        .map(|node| (&node.facts.vm_size, &node.facts.image))
        .collect();
    // A message is no inventory: a few kinds show what went wrong.
    let kinds = kinds.into_iter().take(5);
    let kinds: Vec<_> = kinds
        .map(|(size, image)| format!("{size} ({image})"))
        .collect();
    let kinds = if kinds.is_empty() {
        "none".to_owned()
    } else {
        kinds.join(", ")
    };
    let size = &cluster.spec.vm_size;
    let message = format!(
        "{missing} nodes are missing: no free node has VM size {size} and the cluster's image; \
         free nodes: {kinds}"
    );
    let missing = missing.to_string();
    let details = [
        ("missing", missing.as_str()),
        ("vmSize", size),
        ("freeNodes", &kinds),
    ];
    Some(crate::state::attempts::error(
        "TooFewNodes",
        &message,
        &details,
    ))
}
