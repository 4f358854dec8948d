//! PURE. File servers: what a user asked for, which node serves it, and how that stands.
//!
//! ```text
//! create -> CREATING -> SUCCEEDED <-> FAILED        (as its node says)
//!               \----------\-----------\-> DELETING -> gone once its node has said so, or was expelled
//! ```
//! Which node serves one is decided in `duties`; who may mount it, and from where, in `assignments`. How it is served is for the node.

use std::collections::BTreeSet;
use std::sync::Arc;

use batchai_common::fault;
use batchai_common::names::Kind;
use batchai_proto::agent::v1::{FileServerPlace, FileServerReport};
use batchai_proto::internal::v1::{Delete, PlaceFileServer};
use batchai_proto::v1::{self, MountVolumes, ProvisioningState};
use prost_types::Timestamp;

use super::attempts::error;
use super::keys::workspace_of;
use super::{
    Event, Node, Rejection, State, Step, check_etag, check_new, etag, nodes, not_found, setup,
    storage_aliases, vm_size_aliases,
};

/// File servers that one node serves, at most: each is a process there.
pub const OF_NODE_MAX: usize = 32;

const GB: i64 = 1_000_000_000;

/// A file server.
#[derive(Clone, Debug, PartialEq)]
pub struct FileServer {
    /// What a user set, with name and uid.
    pub spec: Arc<v1::FileServer>,
    pub revision: i64,
    /// The node that serves it, once one was chosen.
    pub node: Option<String>,
    /// Where it is mounted from; none before it was served for the first time.
    pub place: Option<FileServerPlace>,
    /// What its node cannot do.
    pub failure: Option<v1::ResourceError>,
    /// Since when it is removed as soon as its node serves it no more.
    pub deleting: Option<Timestamp>,
    /// All that lies on it goes with it.
    pub purge: bool,
    /// When its provisioning state last changed.
    pub state_time: Timestamp,
}

impl FileServer {
    /// Where it is in its life.
    pub fn state(&self) -> ProvisioningState {
        match (&self.deleting, &self.failure, &self.place) {
            (Some(_), _, _) => ProvisioningState::Deleting,
            (_, Some(_), _) => ProvisioningState::Failed,
            (_, _, Some(_)) => ProvisioningState::Succeeded,
            (_, _, None) => ProvisioningState::Creating,
        }
    }

    /// The room that it was promised.
    pub fn bytes(&self) -> i64 {
        let disks = self.spec.data_disks.unwrap_or_default();
        let gb = i64::from(disks.disk_count).saturating_mul(i64::from(disks.disk_size_in_gb));
        gb.saturating_mul(GB)
    }

    /// Whether a node is such as it asks for, were it the only one there. `alias` is what its VM size stands for, where that is an alias.
    pub fn matches(&self, alias: Option<&str>, name: &str, node: &Node) -> bool {
        let facts = &node.facts;
        !node.expelled
            && !facts.storage_root.is_empty()
            && facts.storage_free_bytes >= self.bytes()
            && (facts.vm_size == self.spec.vm_size || alias == Some(facts.vm_size.as_str()))
            && (self.spec.node.is_empty() || self.spec.node == name)
    }
}

/// The file servers that some volumes lead to: those that they name, and those that storage aliases say in the stead of others.
pub fn named<'a>(
    state: &'a State,
    volumes: Option<&'a MountVolumes>,
) -> impl Iterator<Item = &'a str> {
    let servers = volumes.into_iter().flat_map(|v| &v.file_servers);
    let own = servers.map(|mount| mount.file_server.as_str());
    let aliased = storage_aliases::file_servers(state, volumes);
    own.chain(aliased.map(|(_, server)| server))
}

/// The first of them that cannot be mounted now, and why.
pub fn awaited<'a>(
    state: &'a State,
    volumes: Option<&'a MountVolumes>,
) -> Option<(&'a str, &'static str)> {
    named(state, volumes).find_map(|name| Some((name, why_awaited(state, name)?)))
}

fn why_awaited(state: &State, name: &str) -> Option<&'static str> {
    let Some(server) = state.file_servers.get(name) else {
        return Some("it does not exist any more");
    };
    let node = server.node.as_ref().and_then(|id| state.nodes.get(id));
    if server.deleting.is_some() {
        Some("it is being deleted")
    } else if server.node.is_some() && node.is_none_or(|node| node.expelled) {
        Some("the node that served it was expelled")
    } else if server.place.is_none() && !fault!("placed_before_its_server") {
        Some("it is not served yet; batchai file-server show says why")
    } else {
        None
    }
}

/// All that a node mounts: for its cluster, and for the attempt that it works for.
pub fn mounted<'a>(state: &'a State, node: &Node) -> BTreeSet<&'a str> {
    let cluster = node.cluster.as_ref().and_then(|c| state.clusters.get(c));
    let attempt = node.attempt.as_ref().and_then(|a| state.attempts.get(a));
    let of_cluster = cluster.and_then(|cluster| setup::mounts(cluster));
    let of_job = attempt.and_then(|attempt| attempt.spec.mount_volumes.as_ref());
    let of_cluster = named(state, of_cluster);
    of_cluster.chain(named(state, of_job)).collect()
}

/// The nodes that mount one.
pub fn mounting<'a>(state: &'a State, name: &str) -> impl Iterator<Item = (&'a String, &'a Node)> {
    let nodes = state.nodes.iter().map(|(id, node)| (id, &**node));
    nodes.filter(move |(_, node)| mounted(state, node).contains(name) || fault!("exported_to_all"))
}

/// What a node serves: how many, and what they were promised in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub count: usize,
    pub bytes: i64,
}

impl Load {
    pub fn of(state: &State, node: &str) -> Load {
        of_node(state, node).fold(Load::default(), |load, server| load.with(server))
    }

    /// With one more.
    #[must_use]
    pub fn with(self, server: &FileServer) -> Load {
        Load {
            count: self.count + 1,
            bytes: self.bytes.saturating_add(server.bytes()),
        }
    }

    /// Whether a node can bear it.
    pub fn fits(self, node: &Node) -> bool {
        self.count <= OF_NODE_MAX
            && (self.bytes <= node.facts.storage_bytes || fault!("room_not_counted"))
    }
}

/// The file servers of a node.
pub fn of_node<'a>(state: &'a State, node: &str) -> impl Iterator<Item = &'a Arc<FileServer>> {
    let all = state.file_servers.values();
    all.filter(move |server| server.node.as_deref() == Some(node))
}

/// What leads to file servers leads to such as stay.
pub(super) fn check(state: &State, volumes: Option<&MountVolumes>) -> Result<(), Rejection> {
    for (alias, name) in storage_aliases::file_servers(state, volumes) {
        if !state.file_servers.contains_key(name) {
            let why = format!("it leads to {name}, which does not exist any more");
            return Err(wrong(&alias.name, why));
        }
    }
    named(state, volumes).try_for_each(|name| check_one(state, name))
}

/// It is there, and stays.
pub fn check_one(state: &State, name: &str) -> Result<(), Rejection> {
    let server = state.file_servers.get(name);
    let server = server.ok_or_else(|| not_found(Kind::FileServer, name))?;
    match server.deleting {
        Some(_) => Err(wrong(name, "it is being deleted".to_owned())),
        None => Ok(()),
    }
}

fn wrong(name: &str, why: String) -> Rejection {
    let name = name.to_owned();
    Rejection::WrongState { name, why }
}

/// Changes one in place.
fn change(step: &mut Step<'_>, name: &str, change: impl FnOnce(&mut FileServer)) {
    let (revision, time) = (step.state.revision, step.state.time);
    if let Some(server) = step.state.file_servers.get_mut(name) {
        let server = Arc::make_mut(server);
        let before = server.state();
        change(server);
        server.revision = revision;
        if server.state() != before {
            server.state_time = time;
        }
        step.changed(name);
    }
}

pub(super) fn create(step: &mut Step<'_>, spec: &v1::FileServer) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &spec.name;
    check_new(state, Kind::FileServer, name)?;
    if !spec.node.is_empty() {
        let node = state.nodes.get(&spec.node);
        let node = node.ok_or_else(|| not_found(Kind::Node, &spec.node))?;
        if node.facts.storage_root.is_empty() {
            let why = match node.facts.storage_failure.as_str() {
                "" => "its agent was given no --storage-root",
                failure => failure,
            };
            return Err(wrong(&spec.node, format!("it offers no storage: {why}")));
        }
    }
    let server = FileServer {
        spec: Arc::new(v1::FileServer {
            create_time: Some(state.time),
            ..spec.clone()
        }),
        revision: state.revision,
        node: None,
        place: None,
        failure: None,
        deleting: None,
        purge: false,
        state_time: state.time,
    };
    state.file_servers.insert(name.clone(), Arc::new(server));
    step.made(Kind::FileServer, name);
    step.changed(name);
    Ok(())
}

pub(super) fn place(step: &mut Step<'_>, command: &PlaceFileServer) -> Result<(), Rejection> {
    let state = &*step.state;
    let PlaceFileServer { name, node: id } = command;
    let server = state.file_servers.get(name);
    let server = server.ok_or_else(|| not_found(Kind::FileServer, name))?;
    let alias = vm_size_aliases::resolve(state, &server.spec.vm_size);
    let node = state.nodes.get(id);
    let node = node.ok_or_else(|| not_found(Kind::Node, id))?;
    if server.node.is_some()
        || server.deleting.is_some()
        || !server.matches(alias, id, node)
        || !Load::of(state, id).with(server).fits(node)
    {
        let (name, why) = (name.clone(), "it is not to be served there".to_owned());
        return Err(Rejection::Overtaken { name, why });
    }
    change(step, name, |server| server.node = Some(id.clone()));
    nodes::assign(step, id);
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete, purge: bool) -> Result<(), Rejection> {
    let name = &command.name;
    let server = step.state.file_servers.get(name).cloned();
    let server = server.ok_or_else(|| not_found(Kind::FileServer, name))?;
    check_etag(name, &command.etag, &etag(server.revision))?;
    let mounts = |volumes| named(step.state, volumes).any(|other| other == name);
    if !command.force
        && let Some(user) = user(step.state, mounts)
    {
        // Who may delete it need not see the workspace of who mounts it.
        let user = match workspace_of(&user) == workspace_of(name) {
            true => user,
            false => "something in another workspace".to_owned(),
        };
        let why = format!("{user} mounts it; delete that first, or force it");
        return Err(wrong(name, why));
    }
    if let Some(alias) = storage_aliases::leading_to(step.state, name).filter(|_| !command.force) {
        let why = format!("{alias} leads to it; delete that first, or force it");
        return Err(wrong(name, why));
    }
    let node = server.node.as_ref();
    let serving = node.filter(|node| step.state.nodes.get(*node).is_some_and(|n| !n.expelled));
    let Some(node) = serving else {
        remove(step, name);
        return Ok(());
    };
    let time = step.state.time;
    change(step, name, |server| {
        server.deleting.get_or_insert(time);
        // One whose disk is lost cannot be purged: then it is let go of by force.
        server.purge = purge || (server.purge && !command.force) || fault!("purged_unasked");
    });
    nodes::assign(step, node);
    Ok(())
}

/// Something with volumes such as these: a cluster, or a job that has not ended.
pub(super) fn user<'a>(
    state: &'a State,
    such: impl Fn(Option<&'a MountVolumes>) -> bool,
) -> Option<String> {
    state.clusters.iter().find_map(|(cluster, held)| {
        if such(setup::mounts(held)) {
            return Some(cluster.clone());
        }
        let mut jobs = held.jobs().filter_map(|job| state.jobs.get(job));
        let job = jobs.find(|job| such(job.spec.mount_volumes.as_ref()))?;
        Some(job.spec.name.clone())
    })
}

fn remove(step: &mut Step<'_>, name: &str) {
    step.state.file_servers.remove(name);
    step.gone(Kind::FileServer, name);
    step.deleted(name);
}

/// Whether a node says something new of a file server that it serves.
pub fn is_news(state: &State, node: &str, said: &FileServerReport) -> bool {
    let server = of_node(state, node).find(|server| server.spec.uid == said.uid);
    server.is_some_and(|server| match said.gone {
        true => {
            server.deleting.is_some()
                && (said.purged || !server.purge || fault!("gone_before_purged"))
        }
        false => {
            server.failure != said.failure || (said.place.is_some() && server.place != said.place)
        }
    })
}

/// Takes in what a node says of a file server that it serves.
pub(super) fn take_in(step: &mut Step<'_>, node: &str, said: &FileServerReport) {
    if !is_news(step.state, node, said) {
        return;
    }
    let server = of_node(step.state, node).find(|server| server.spec.uid == said.uid);
    let Some(server) = server.cloned() else {
        return;
    };
    let name = &server.spec.name;
    if said.gone {
        remove(step, name);
        nodes::assign(step, node);
        return;
    }
    let moved = said.place.is_some() && server.place != said.place;
    change(step, name, |server| {
        server.failure.clone_from(&said.failure);
        if moved {
            server.place.clone_from(&said.place);
        }
    });
    if !moved || fault!("moved_place_not_told") {
        return;
    }
    let mounting: Vec<_> = mounting(step.state, name)
        .map(|(id, _)| id.clone())
        .collect();
    for id in mounting {
        // What its cluster mounts is to be mounted from elsewhere: by another set-up.
        let of_cluster = step.state.nodes.get(&id).is_some_and(|node| {
            let cluster = node
                .cluster
                .as_ref()
                .and_then(|c| step.state.clusters.get(c));
            let mut named = cluster
                .into_iter()
                .flat_map(|c| named(step.state, setup::mounts(c)));
            named.any(|other| other == name)
        });
        if of_cluster {
            setup::renew(step, &id);
        }
        nodes::assign(step, &id);
    }
}

/// A node serves nothing any more.
pub(super) fn expelled(step: &mut Step<'_>, node: &str) {
    let all: Vec<_> = of_node(step.state, node).cloned().collect();
    for server in all {
        let name = &server.spec.name;
        if server.deleting.is_some() {
            remove(step, name);
            continue;
        }
        let message = format!("{node}, which serves it, was expelled");
        let failure = error("FileServerNodeExpelled", &message, &[("node", node)]);
        change(step, name, |server| server.failure = Some(failure));
    }
}

/// Whom a file server is shared with follows from what nodes are assigned: where that has changed, its own node is told.
pub(super) fn follow(before: &State, step: &mut Step<'_>) {
    if step.state.file_servers.is_empty() || fault!("exports_not_renewed") {
        return;
    }
    let mut serving = BTreeSet::new();
    for event in &step.events {
        let Event::Assigned { node } = event else {
            continue;
        };
        let (was, is) = (clients_of(before, node), clients_of(step.state, node));
        for (name, _) in was.symmetric_difference(&is) {
            let server = step.state.file_servers.get(*name);
            serving.extend(server.and_then(|server| server.node.clone()));
        }
    }
    for node in serving {
        nodes::assign(step, &node);
    }
}

fn clients_of<'a>(state: &'a State, node: &str) -> BTreeSet<(&'a str, &'a [String])> {
    let node = state.nodes.get(node);
    let of = |node: &'a Arc<Node>| {
        let all = mounted(state, node).into_iter();
        all.map(|name| (name, node.facts.addresses.as_slice()))
    };
    node.into_iter().flat_map(of).collect()
}

#[cfg(test)]
#[path = "file_servers_tests.rs"]
mod tests;
