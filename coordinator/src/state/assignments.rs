//! PURE. What every node shall do, derived from the State: nothing of it is stored.

use std::collections::BTreeSet;

use batchai_common::fault;
use batchai_proto::agent::v1::assignment::Desired;
use batchai_proto::agent::v1::{
    Assignment, AssignmentList, ClusterMounts, FileServerSource, Host, ServedFileServer,
};
use batchai_proto::{rdma, secrets, v1};

use super::attempts::{Attempt, Phase, Work};
use super::keys::workspace_of;
use super::{Node, State, file_servers, loss, restore, setup, storage_aliases};

/// The whole list of a node's assignments. A node that does not exist has none. Secrets are as they lie in the State: sealed.
pub fn assignments(state: &State, name: &str) -> AssignmentList {
    let Some(node) = state.nodes.get(name) else {
        return AssignmentList::default();
    };
    let attempt = node.attempt.as_ref().and_then(|id| state.attempts.get(id));
    let assignment = attempt.and_then(|attempt| assignment(state, attempt, name));
    AssignmentList {
        revision: node.assigned,
        assignments: assignment.into_iter().collect(),
        epoch: state.epoch,
        discarded: restore::of_node(state, name)
            .filter(|(_, stray)| stray.discarded)
            .map(|(attempt, _)| attempt.to_owned())
            .collect(),
        mounts: cluster_mounts(state, node),
        file_servers: served(state, name),
        restored: state.restored,
    }
}

/// What is mounted on a node because of its cluster.
fn cluster_mounts(state: &State, node: &Node) -> Option<ClusterMounts> {
    let cluster = state.clusters.get(node.cluster.as_ref()?)?;
    Some(ClusterMounts {
        cluster: cluster.spec.name.clone(),
        uid: cluster.spec.uid.clone(),
        volumes: Some(setup::mounts(cluster)?.clone()),
        file_servers: sources(state, node, setup::mounts(cluster)),
        storage: storage_aliases::resolve(state, setup::mounts(cluster)),
        fault: String::new(),
    })
}

/// The file servers that a node serves, and with whom it shares them.
fn served(state: &State, node: &str) -> Vec<ServedFileServer> {
    let served = file_servers::of_node(state, node).map(|server| {
        let name = &server.spec.name;
        let clients = file_servers::mounting(state, name);
        let clients: BTreeSet<_> = clients.flat_map(|(_, n)| &n.facts.addresses).collect();
        ServedFileServer {
            name: name.clone(),
            uid: server.spec.uid.clone(),
            clients: clients.into_iter().cloned().collect(),
            ending: server.deleting.is_some(),
            purge: server.purge,
            existing: server.place.is_some() && !fault!("existing_not_said"),
        }
    });
    served.collect()
}

/// Where a node mounts file servers from.
fn sources(
    state: &State,
    node: &Node,
    volumes: Option<&v1::MountVolumes>,
) -> Vec<FileServerSource> {
    let names: BTreeSet<_> = file_servers::named(state, volumes).collect();
    let servers = names.into_iter().filter_map(|n| state.file_servers.get(n));
    let sources = servers.map(|server| {
        let serving = server.node.as_ref().and_then(|id| state.nodes.get(id));
        FileServerSource {
            name: server.spec.name.clone(),
            uid: server.spec.uid.clone(),
            place: server.place.clone(),
            local: serving.is_some_and(|serving| serving.facts.boot_id == node.facts.boot_id),
        }
    });
    sources.collect()
}

fn assignment(state: &State, attempt: &Attempt, name: &str) -> Option<Assignment> {
    let desired = match attempt.phase {
        Phase::Preparing => Desired::Prepare,
        Phase::Running => Desired::Launch,
        Phase::Ending => Desired::Stop,
        Phase::Ended => return None,
    };
    part_of(state, attempt, name, desired)
}

/// What a node has to know to find the directories of an attempt that it has, or had, a part in.
pub fn for_files(state: &State, attempt: &Attempt, name: &str) -> Option<Assignment> {
    part_of(state, attempt, name, Desired::Unspecified)
}

fn part_of(state: &State, attempt: &Attempt, name: &str, desired: Desired) -> Option<Assignment> {
    let index = attempt.nodes.iter().position(|n| n.node == name)?;
    let hosts = attempt
        .nodes
        .iter()
        .map(|n| host(state.nodes.get(&n.node), n));
    let workspace = state.workspaces.get(workspace_of(&attempt.spec.name));
    let node = state.nodes.get(name);
    let file_servers = node.map(|node| sources(state, node, attempt.spec.mount_volumes.as_ref()));
    let mut job = v1::Job::clone(&attempt.spec);
    // Whoever prepares hands them to what runs; nobody else needs them.
    if desired != Desired::Prepare {
        secrets::blank(secrets::of_job(&mut job));
    }
    let storage = storage_aliases::resolve(state, job.mount_volumes.as_ref());
    Some(Assignment {
        attempt: attempt.id.clone(),
        desired: desired as i32,
        job: Some(job),
        hosts: hosts.collect(),
        host_index: index as i32,
        fault: String::new(),
        set_up: attempt.work == Work::SetUp,
        workspace_number: workspace.map_or(0, |workspace| workspace.number),
        fenced: loss::is_fenced(attempt),
        number: attempt.number,
        file_servers: file_servers.unwrap_or_default(),
        storage,
    })
}

fn host(node: Option<&std::sync::Arc<Node>>, placed: &super::attempts::AttemptNode) -> Host {
    let facts = node.map(|node| node.facts.clone()).unwrap_or_default();
    Host {
        node: placed.node.clone(),
        address: facts.addresses.first().cloned().unwrap_or_default(),
        boot_id: facts.boot_id.clone(),
        root: facts.root.clone(),
        port: placed.port,
        agent_port: facts.agent_port,
        infiniband: facts.rdma_devices.iter().any(rdma::is_infiniband),
        uid: node.map(|node| node.uid.clone()).unwrap_or_default(),
    }
}
