//! PURE. What the State holds, as replies show it.

use batchai_common::time;
use batchai_proto::v1;
use batchai_proto::v1::cluster::AllocationState;
use batchai_proto::v1::node::State as NodeState;

use crate::duties::Heard;
use crate::scheduler::explain::pending_reason;
use crate::state::{Cluster, Job, Node, State, etag};

/// A job.
pub fn job(state: &State, heard: &Heard, job: &Job) -> v1::Job {
    let attempt = job.attempt.as_ref().and_then(|id| state.attempts.get(id));
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
        deleting: job.deleting,
        ..v1::Job::clone(&job.spec)
    }
}

/// A node.
pub fn node(state: &State, heard: &Heard, name: &str, node: &Node) -> v1::Node {
    let attempt = node.attempt.as_ref().and_then(|id| state.attempts.get(id));
    v1::Node {
        name: name.to_owned(),
        uid: node.uid.clone(),
        etag: etag(node.revision),
        create_time: Some(node.create_time),
        state: node_state(heard, name, node) as i32,
        cluster: node.cluster.clone().unwrap_or_default(),
        job: attempt
            .map(|attempt| attempt.job.clone())
            .unwrap_or_default(),
        last_contact_time: heard.last_wall(name).map(time::from_millis),
        facts: Some(v1::NodeFacts::clone(&node.facts)),
    }
}

fn node_state(heard: &Heard, name: &str, node: &Node) -> NodeState {
    match heard.is_alive(name) {
        true => node.state(),
        false => NodeState::Unusable,
    }
}

/// A cluster, with its nodes counted.
pub fn cluster(state: &State, heard: &Heard, cluster: &Cluster) -> v1::Cluster {
    let members = cluster
        .members
        .iter()
        .filter_map(|name| Some((name, state.nodes.get(name)?)));
    let mut counts = v1::NodeStateCounts::default();
    for (name, node) in members {
        let count = match node_state(heard, name, node) {
            NodeState::Idle => &mut counts.idle_node_count,
            NodeState::Running => &mut counts.running_node_count,
            NodeState::Leaving => &mut counts.leaving_node_count,
            _ => &mut counts.unusable_node_count,
        };
        *count += 1;
    }
    let steady = cluster.members.len() == cluster.target();
    v1::Cluster {
        etag: etag(cluster.revision),
        allocation_state: match steady {
            true => AllocationState::Steady,
            false => AllocationState::Resizing,
        } as i32,
        current_node_count: cluster.members.len() as i32,
        node_state_counts: Some(counts),
        errors: too_few(state, cluster).into_iter().collect(),
        ..v1::Cluster::clone(&cluster.spec)
    }
}

/// Says what nodes there are where a cluster finds too few that match.
fn too_few(state: &State, cluster: &Cluster) -> Option<v1::ResourceError> {
    let missing = cluster.target().saturating_sub(cluster.members.len());
    let free = || state.nodes.values().filter(|node| node.cluster.is_none());
    if missing == 0 || free().any(|node| cluster.matches(&node.facts)) {
        return None;
    }
    let mut kinds: Vec<_> = free()
        .map(|node| format!("{} ({})", node.facts.vm_size, node.facts.image))
        .collect();
    kinds.sort_unstable();
    kinds.dedup();
    // A message is no inventory: a few kinds show what went wrong.
    kinds.truncate(5);
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
