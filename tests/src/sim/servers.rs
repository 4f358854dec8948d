//! What must hold of file servers, by name.

use std::collections::{BTreeMap, BTreeSet};

use batchai_common::attempt;
use batchai_coordinator::state::attempts::{Attempt, Work};
use batchai_coordinator::state::{FileServer, Node, State};
use batchai_proto::v1::{MountVolumes, ProvisioningState};

use super::Sim;
use super::agents::Agent;
use super::storage::Deed;
use super::volumes::mounted;

/// One as the State had it.
struct Known {
    uid: String,
    placed: bool,
    mountable: bool,
    purge: bool,
}

/// What is remembered of them.
#[derive(Default)]
pub struct Servers {
    /// Whose purge was asked for, by UUID, and who is gone with all that lay there.
    pub purges: BTreeSet<String>,
    purged: BTreeSet<String>,
    /// Those without a node in a State that was restored: they may have had one since, which nobody knows.
    unplaced: BTreeSet<String>,
    before: BTreeMap<String, Known>,
    attempts: BTreeSet<String>,
}

fn is_mountable(server: &FileServer) -> bool {
    server.node.is_some() && server.place.is_some() && server.deleting.is_none()
}

fn of_uid<'a>(state: &'a State, uid: &str) -> Option<&'a FileServer> {
    let mut all = state.file_servers.values();
    let found = all.find(|server| server.spec.uid == uid)?;
    Some(found)
}

/// What the cluster of a node has mounted there.
fn of_cluster<'a>(state: &'a State, node: &Node) -> Option<&'a MountVolumes> {
    let cluster = state.clusters.get(node.cluster.as_ref()?)?;
    cluster.spec.node_setup.as_ref()?.mount_volumes.as_ref()
}

fn by_attempt<'a>(state: &'a State, attempt: &'a Attempt) -> Option<&'a MountVolumes> {
    match attempt.work {
        Work::Job(_) => attempt.spec.mount_volumes.as_ref(),
        Work::SetUp => of_cluster(state, state.nodes.get(&attempt.nodes.first()?.node)?),
    }
}

/// The addresses of all who mount one.
fn clients(state: &State, name: &str) -> BTreeSet<String> {
    let mounts = |node: &&std::sync::Arc<Node>| {
        let attempt = node.attempt.as_ref().and_then(|id| state.attempts.get(id));
        let of_job = attempt.and_then(|attempt| attempt.spec.mount_volumes.as_ref());
        let mut all = mounted(state, of_job);
        all.extend(mounted(state, of_cluster(state, node)));
        all.contains(&name)
    };
    let nodes = state.nodes.values().filter(mounts);
    let all = nodes.flat_map(|node| node.facts.addresses.iter().cloned());
    all.collect()
}

impl Servers {
    fn remember(&mut self, state: &State) {
        let known = |server: &FileServer| Known {
            uid: server.spec.uid.clone(),
            placed: server.node.is_some(),
            mountable: is_mountable(server),
            purge: server.purge,
        };
        let all = state.file_servers.iter();
        self.before = all
            .map(|(name, server)| (name.clone(), known(server)))
            .collect();
    }

    /// Everything begins anew with this State.
    pub fn restored(&mut self, state: &State) {
        let all = state.file_servers.values();
        let unplaced = all.filter(|server| server.node.is_none());
        self.unplaced
            .extend(unplaced.map(|server| server.spec.uid.clone()));
        // One that was purged since the backup, and was not served then, is made again: nobody knows of it.
        for server in state.file_servers.values() {
            self.purged.remove(&server.spec.uid);
        }
        self.remember(state);
    }

    /// A State that is later than all before; what is to be seen of it.
    pub fn applied(&mut self, state: &State) -> Result<Vec<&'static str>, String> {
        let mut saw = Vec::new();
        if state.file_servers.is_empty() && self.before.is_empty() {
            return Ok(saw);
        }
        self.what_is_mounted_is_there(state, &mut saw)?;
        for (name, server) in &state.file_servers {
            let before = self.before.get(name);
            let new = before.is_none_or(|before| !before.placed);
            if server.node.is_some() && new {
                room_is_promised_once(state, server)?;
            }
            match server.state() {
                ProvisioningState::Succeeded => saw.push("a file server is served"),
                ProvisioningState::Failed => saw.push("a file server fails"),
                ProvisioningState::Deleting => saw.push("a file server is being deleted"),
                _ if server.node.is_none() => saw.push("a file server waits for room"),
                _ => {}
            }
        }
        for (name, before) in &self.before {
            let known = !self.unplaced.contains(&before.uid);
            if before.purge && known && !state.file_servers.contains_key(name) {
                self.purged.insert(before.uid.clone());
                saw.push("a file server is gone with all that lay on it");
            }
        }
        self.remember(state);
        Ok(saw)
    }

    fn what_is_mounted_is_there(
        &mut self,
        state: &State,
        saw: &mut Vec<&'static str>,
    ) -> Result<(), String> {
        let held = state
            .nodes
            .values()
            .filter_map(|node| node.attempt.as_ref());
        let held: BTreeSet<_> = held.cloned().collect();
        for id in held {
            let Some(attempt) = state.attempts.get(&id) else {
                continue;
            };
            if !self.attempts.insert(id.clone()) || attempt::epoch(&id) != Some(state.epoch) {
                continue;
            }
            for name in mounted(state, by_attempt(state, attempt)) {
                let now = state.file_servers.get(name);
                let before = self.before.get(name).is_some_and(|known| known.mountable);
                if !before && !now.is_some_and(|server| is_mountable(server)) {
                    return Err(format!("what_is_mounted_is_there: {name} for {id}"));
                }
                saw.push(match attempt.work {
                    Work::SetUp => "a cluster mounts a file server",
                    Work::Job(_) => "a job mounts a file server",
                });
            }
            let volumes = attempt.spec.mount_volumes.as_ref();
            let shares = volumes.is_some_and(|volumes| !volumes.azure_file_shares.is_empty());
            if shares && !mounted(state, volumes).is_empty() {
                saw.push("a job mounts what an alias leads to");
            }
        }
        Ok(())
    }
}

fn room_is_promised_once(state: &State, server: &FileServer) -> Result<(), String> {
    let Some((name, node)) = server
        .node
        .as_ref()
        .and_then(|id| state.nodes.get_key_value(id))
    else {
        return Ok(());
    };
    let promised = promised(state, name);
    let room = node.facts.storage_bytes;
    // One that registered anew may have less.
    match promised > room && node.revision < server.revision {
        true => Err(format!(
            "room_is_promised_once: {promised} of {room} on {name}"
        )),
        false => Ok(()),
    }
}

fn promised(state: &State, node: &str) -> i64 {
    let all = state.file_servers.values();
    let of_node = all.filter(|server| server.node.as_deref() == Some(node));
    of_node.map(|server| server.bytes()).sum()
}

/// Where one could be served, had anybody looked.
fn fits_somewhere(state: &State, server: &FileServer) -> bool {
    state.nodes.iter().any(|(name, node)| {
        let facts = &node.facts;
        !facts.storage_root.is_empty()
            && (server.spec.node.is_empty() || server.spec.node == *name)
            && facts.storage_free_bytes >= server.bytes()
            && promised(state, name) + server.bytes() <= facts.storage_bytes
    })
}

impl Sim {
    /// What an agent did.
    pub(super) fn judge_deeds(&mut self, deeds: Vec<Deed>) -> Result<(), String> {
        let Some(state) = self.latest() else {
            return Ok(());
        };
        let mut missed = false;
        for deed in deeds {
            match deed {
                Deed::Made(uid) => {
                    let known = of_uid(state, &uid);
                    if known.is_some_and(|server| server.place.is_some()) {
                        return Err(format!("what_was_served_is_never_made_anew: {uid}"));
                    }
                }
                Deed::Purged(uid, true) => {
                    return Err(format!("what_is_served_is_not_purged: {uid}"));
                }
                Deed::Purged(uid, _) if !self.checks.servers.purges.contains(&uid) => {
                    return Err(format!("purged_where_it_was_asked_for: {uid}"));
                }
                Deed::Purged(..) => {}
                Deed::Missed => missed = true,
            }
        }
        if missed {
            self.checks.saw("what lay on a file server is missed");
        }
        Ok(())
    }

    /// After every step.
    pub(super) fn judge_servers(&self) -> Result<(), String> {
        let Some(state) = self.latest() else {
            return Ok(());
        };
        for agent in &self.agents {
            self.judge_served(agent, state)?;
            self.judge_mounted(agent, state)?;
        }
        Ok(())
    }

    fn judge_served(&self, agent: &Agent, state: &State) -> Result<(), String> {
        let name = agent.name();
        let mut ports = BTreeSet::new();
        for (uid, kept) in &agent.storage.kept {
            if kept.port != 0 && !ports.insert(kept.port) {
                return Err(format!("a_port_is_one_servers: {} on {name}", kept.port));
            }
            let server = of_uid(state, uid);
            let node = server.and_then(|server| server.node.as_ref());
            let runs = agent.storage.served(uid).is_some();
            let known = !self.checks.servers.unplaced.contains(uid);
            if runs && known && node.is_some_and(|node| *node != name) {
                return Err(format!("served_by_its_node_alone: {uid} by {name}"));
            }
            let current = agent.has_list_of(state) && !state.restored;
            let Some(server) = server.filter(|server| current && server.deleting.is_none()) else {
                continue;
            };
            let clients = clients(state, &server.spec.name);
            if kept.port != 0 && kept.clients != clients {
                let exported = &kept.clients;
                return Err(format!(
                    "exported_to_who_mounts: {uid} by {name} to {exported:?}, for {clients:?}"
                ));
            }
        }
        let mut purged = self.checks.servers.purged.iter();
        match purged.find(|uid| agent.storage.has(uid)) {
            Some(uid) => Err(format!("what_was_purged_is_gone: {uid} on {name}")),
            None => Ok(()),
        }
    }

    /// What runs is not cut off from what it mounts.
    fn judge_mounted(&self, agent: &Agent, state: &State) -> Result<(), String> {
        for (id, sources) in agent.mounting() {
            let name = agent.name();
            let asked = state
                .nodes
                .get(&name)
                .is_some_and(|node| node.attempt.as_deref() == Some(id));
            let stray = state.strays.get(&(name.clone(), id.to_owned()));
            let undecided = state.restored && stray.is_none_or(|stray| !stray.discarded);
            if !asked && !undecided {
                continue;
            }
            for source in sources.iter().filter(|source| !source.local) {
                let uid = &source.uid;
                if of_uid(state, uid).is_none_or(|server| server.deleting.is_some()) {
                    continue;
                }
                let mut kept = self.agents.iter();
                let kept = kept.find_map(|agent| agent.storage.kept.get(uid));
                if kept.is_some_and(|kept| !kept.clients.contains(&agent.address())) {
                    return Err(format!("what_runs_is_not_cut_off: {id} on {name} of {uid}"));
                }
            }
        }
        Ok(())
    }

    /// Why file servers are not yet as they shall be in the end.
    pub(super) fn why_servers_wait(&self, state: &State) -> Option<String> {
        let unsettled = state.file_servers.values().find(|server| {
            let failed = server.failure.is_some();
            let node = server.node.as_ref();
            let agent = node.and_then(|node| self.agents.iter().find(|a| a.name() == *node));
            let uid = &server.spec.uid;
            let readable = agent.is_some_and(|agent| agent.storage.can_read(uid, self.step));
            match (server.state(), agent) {
                (ProvisioningState::Deleting, _) => !failed || readable,
                (ProvisioningState::Failed, _) => readable,
                (ProvisioningState::Succeeded, Some(agent)) => {
                    let place = server.place.clone().unwrap_or_default();
                    let port = agent.storage.served(uid).map(i32::from);
                    port != Some(place.port) || agent.address() != place.address || !readable
                }
                (ProvisioningState::Creating, None) => fits_somewhere(state, server),
                _ => true,
            }
        });
        if let Some(server) = unsettled {
            return Some(format!("a file server is not settled: {server:?}"));
        }
        self.agents.iter().find_map(|agent| {
            let name = agent.name();
            let mine = |uid: &str| {
                let server = of_uid(state, uid);
                server.is_some_and(|server| server.node.as_deref() == Some(name.as_str()))
            };
            let mut kept = agent.storage.kept.keys();
            let left = kept.find(|uid| !mine(uid))?;
            Some(format!("{left} is left on {name}"))
        })
    }
}
