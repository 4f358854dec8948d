//! PURE. What follows from the restore of a backup: a new epoch, and work of earlier ones that the State does not know.
//!
//! The State of a backup knows nothing of what was placed after it. So it places nothing before an administrator has accepted the
//! restore; agents keep such work and report it as strays, and an administrator has each adopted or discarded. What the State
//! knows goes on, where its node still has it; where not, it is lost: it may have ended since, and does not begin again. How a
//! backup is made and read is not decided here.

use std::collections::BTreeSet;
use std::sync::Arc;

use batchai_common::{attempt, fault};
use batchai_proto::agent::v1::{Stray, StrayList};
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{
    AcceptRestore, AdoptAttempt, AllocateNode, DiscardAttempt, Replica, StoredStray,
};
use batchai_proto::v1;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;

use super::agreement::Comparison;
use super::attempts::{self, Attempt, AttemptNode, Phase, Work};
use super::{ENSEMBLE, Job, Node, Rejection, State, Step, jobs, nodes};

/// Revisions go on behind all that were ever made, so that none is used for two things: epochs are seconds, and nobody makes so many
/// revisions in one.
const REVISIONS_PER_EPOCH: i64 = 1_000_000_000;
/// As many nodes or attempts as a refusal names.
const NAMED_MAX: usize = 10;

/// The State of a backup as one replica begins with it, alone. The others are gone, and their ids with them.
pub fn restored(mut state: State, epoch: i64, own: Replica) -> State {
    state.epoch = epoch;
    if !fault!("revisions_used_again") {
        let first = epoch.saturating_mul(REVISIONS_PER_EPOCH);
        state.revision = first.max(state.revision + 1);
    }
    state.restored = true;
    state.comparison = Comparison::default();
    let revision = state.revision;
    for (name, node) in state.nodes.clone() {
        let mut node = Node::clone(&node);
        // Agents know lists that the backup does not, and ignore older ones.
        node.assigned = revision;
        state.nodes.insert(name, Arc::new(node));
    }
    for (id, replica) in state.replicas.clone() {
        let mut replica = Replica::clone(&replica);
        replica.set_role(Role::Removed);
        state.replicas.insert(id, Arc::new(replica));
    }
    state.replicas.insert(own.id, Arc::new(own));
    state
}

/// Lets work be placed.
pub(super) fn accept(step: &mut Step<'_>, command: &AcceptRestore) -> Result<(), Rejection> {
    let refuse = |why: String| {
        Err(Rejection::WrongState {
            name: ENSEMBLE.to_owned(),
            why,
        })
    };
    if !step.state.restored {
        return refuse("it is not one that was restored from a backup and not accepted yet".into());
    }
    let absent: Vec<_> = absent(step.state).collect();
    let strays: Vec<_> = undecided(step.state).collect();
    if !command.force && !absent.is_empty() {
        return refuse(format!(
            "{} nodes have not come back and may hold work that is not known here: {}. Wait for them, expel them, or force it",
            absent.len(),
            some_of(&absent)
        ));
    }
    if !command.force && !strays.is_empty() {
        return refuse(format!(
            "{} attempts on its nodes are not known here: {}. Adopt them or discard them, or force it",
            strays.len(),
            some_of(&strays)
        ));
    }
    let ending: Vec<_> = running(step.state).into_iter().collect();
    if !command.force && !ending.is_empty() {
        return refuse(format!(
            "{} attempts that were discarded have not ended yet: {}. Wait for them, or force it",
            ending.len(),
            some_of(&ending)
        ));
    }
    step.state.restored = false;
    // Until now nothing of file servers was ended, nor anybody cut off from them.
    let nodes: Vec<_> = step.state.nodes.keys().cloned().collect();
    for node in nodes {
        nodes::assign(step, &node);
    }
    Ok(())
}

/// Attempts that the State does not know and that may still run somewhere.
fn running(state: &State) -> BTreeSet<&str> {
    let over = |stray: &StoredStray| {
        let seen = stray.stray.as_ref().and_then(|stray| stray.seen.as_ref());
        seen.is_some_and(|seen| matches!(seen.phase(), NodePhase::Ended | NodePhase::Lost))
    };
    let open = state.strays.iter().filter(|(_, stray)| !over(stray));
    open.map(|((_, id), _)| id.as_str()).collect()
}

fn some_of(names: &[&str]) -> String {
    let more = if names.len() > NAMED_MAX { ", ..." } else { "" };
    format!("{}{more}", names[..names.len().min(NAMED_MAX)].join(", "))
}

/// Nodes that have not said yet what they hold of earlier epochs.
pub fn absent(state: &State) -> impl Iterator<Item = &str> {
    let nodes = state.nodes.iter().filter(|(_, node)| !node.expelled);
    let absent = nodes.filter(|(_, node)| node.epoch != state.epoch);
    absent.map(|(name, _)| name.as_str())
}

/// Attempts that nodes hold and about which nothing was decided, each once.
pub fn undecided(state: &State) -> impl Iterator<Item = &str> {
    let open = state.strays.iter().filter(|(_, stray)| !stray.discarded);
    let ids: BTreeSet<_> = open.map(|((_, id), _)| id.as_str()).collect();
    ids.into_iter()
}

/// Whether a node may hold work that keeps others from it.
pub fn may_hold_strays(state: &State, name: &str) -> bool {
    let node = state.nodes.get(name);
    node.is_none_or(|node| node.epoch != state.epoch) || of_node(state, name).next().is_some()
}

/// What a node holds that the State does not know, by attempt.
pub fn of_node<'a>(
    state: &'a State,
    node: &str,
) -> impl Iterator<Item = (&'a str, &'a Arc<StoredStray>)> + use<'a> {
    let node = node.to_owned();
    let from = (node.clone(), String::new());
    let strays = state.strays.range(from..);
    strays
        .take_while(move |((of, _), _)| *of == node)
        .map(|((_, id), stray)| (id.as_str(), stray))
}

/// All nodes' parts of an attempt, by node.
pub fn of_attempt<'a>(
    state: &'a State,
    id: &'a str,
) -> impl Iterator<Item = (&'a str, &'a Arc<StoredStray>)> {
    let strays = state.strays.iter().filter(move |((_, of), _)| of == id);
    strays.map(|((node, _), stray)| (node.as_str(), stray))
}

/// Takes in the whole list of what a node holds.
pub(super) fn take_in(step: &mut Step<'_>, node: &str, list: &StrayList) {
    // A list of before the restore says nothing about what it left.
    if list.epoch != step.state.epoch && !fault!("told_by_an_older_list") {
        return;
    }
    let before: Vec<_> = of_node(step.state, node)
        .map(|(id, stray)| (id.to_owned(), stray.clone()))
        .collect();
    for (id, _) in &before {
        step.state.strays.remove(&(node.to_owned(), id.clone()));
    }
    // What such a node holds and did not tell of at first was known here then, and is not asked for any more.
    let node_of = |state: &State| state.nodes.get(node).cloned();
    let told_all = node_of(step.state).is_some_and(|node| node.epoch == list.epoch);
    let mut told = false;
    for stray in &list.strays {
        let id = stray.seen.clone().unwrap_or_default().attempt;
        if attempt::epoch(&id).is_none_or(|epoch| epoch >= list.epoch) {
            continue;
        }
        let known = before.iter().find(|(before, _)| *before == id);
        let decided = known.is_some_and(|(_, known)| known.discarded);
        // What the State knows and does not ask for any more has ended; what it does ask for was adopted meanwhile.
        let over = step.state.attempts.contains_key(&id) || (told_all && known.is_none());
        if node_of(step.state).is_some_and(|node| node.attempt.as_ref() == Some(&id)) {
            continue;
        }
        told |= over && !decided;
        let stored = StoredStray {
            node: node.to_owned(),
            discarded: decided || over,
            stray: Some(stray.clone()),
        };
        let key = (node.to_owned(), id);
        step.state.strays.insert(key, Arc::new(stored));
    }
    if !told_all {
        nodes::change(step, node, |node| node.epoch = list.epoch);
    }
    if told {
        nodes::assign(step, node);
    }
}

/// A node holds nothing any more.
pub(super) fn forget(step: &mut Step<'_>, node: &str) {
    let held: Vec<_> = of_node(step.state, node)
        .map(|(id, _)| id.to_owned())
        .collect();
    for id in held {
        step.state.strays.remove(&(node.to_owned(), id));
    }
}

/// Has an attempt ended wherever it was reported.
pub(super) fn discard(step: &mut Step<'_>, command: &DiscardAttempt) -> Result<(), Rejection> {
    let held: Vec<_> = of_attempt(step.state, &command.attempt)
        .map(|(node, stray)| (node.to_owned(), stray.clone()))
        .collect();
    if held.is_empty() {
        return Err(unknown(&command.attempt));
    }
    for (node, mut stray) in held {
        Arc::make_mut(&mut stray).discarded = true;
        let key = (node.clone(), command.attempt.clone());
        step.state.strays.insert(key, stray);
        nodes::assign(step, &node);
    }
    Ok(())
}

fn unknown(attempt: &str) -> Rejection {
    Rejection::WrongState {
        name: attempt.to_owned(),
        why: "no node has reported an attempt of that id that is not known here".to_owned(),
    }
}

/// The part of an attempt that all of its nodes tell alike, and its job.
///
/// # Errors
/// Says why it cannot be adopted.
pub fn adoptable<'a>(state: &'a State, id: &str) -> Result<(Stray, &'a Arc<Job>), String> {
    let held: Vec<_> = of_attempt(state, id).collect();
    let (_, first) = held.first().ok_or("no node has reported it")?;
    let stray = first.stray.clone().unwrap_or_default();
    if stray.set_up {
        return Err("it is the set-up of a node: discard it, and the node is set up again".into());
    }
    let told = |part: &StoredStray| {
        let part = part.stray.clone().unwrap_or_default();
        (part.job, part.job_uid, part.hosts)
    };
    if held.iter().any(|(_, part)| told(part) != told(first)) {
        return Err("its nodes do not tell the same of it".into());
    }
    if held.iter().any(|(_, stray)| stray.discarded) {
        return Err("it was discarded".into());
    }
    let missing = missing(state, id, &stray);
    if !missing.is_empty() && !fault!("adopted_in_part") {
        let missing = some_of(&missing.iter().map(String::as_str).collect::<Vec<_>>());
        return Err(format!(
            "these of its nodes have not reported it: {missing}"
        ));
    }
    let job = state.jobs.get(stray.job.as_str());
    let job = job.filter(|job| job.spec.uid == stray.job_uid);
    let job = job.ok_or_else(|| format!("its job is not known here: {}", stray.job))?;
    if job.state != v1::job::State::Queued || job.deleting.is_some() {
        return Err("its job is not queued".into());
    }
    if usize::try_from(job.spec.node_count).ok() != Some(stray.hosts.len()) {
        return Err("its job is for another number of nodes".into());
    }
    let taken = stray.hosts.iter().find(|host| {
        let node = state.nodes.get(&host.node);
        node.is_none_or(|node| {
            let elsewhere = node
                .cluster
                .as_ref()
                .is_some_and(|c| *c != job.spec.cluster);
            node.attempt.is_some() || elsewhere || node.leaving || node.expelled
        })
    });
    let ports = attempts::ports_by_machine(state);
    let taken = taken.or_else(|| {
        let mut hosts = stray.hosts.iter().enumerate();
        let taken = hosts.find(|(i, host)| {
            let node = state.nodes.get(&host.node);
            let mut own = attempts::ports_of(&job.spec, *i, host.port);
            node.is_some_and(|node| {
                own.any(|port| ports.contains(&(node.facts.boot_id.clone(), port)))
            })
        });
        taken.map(|(_, host)| host)
    });
    match taken {
        Some(host) => Err(format!(
            "{} has other work or its port is taken, or it is in another cluster",
            host.node
        )),
        None => Ok((stray, job)),
    }
}

/// The nodes of an attempt that have not reported it.
pub fn missing(state: &State, id: &str, stray: &Stray) -> Vec<String> {
    let held: Vec<_> = of_attempt(state, id).map(|(node, _)| node).collect();
    let nodes = stray.hosts.iter().map(|host| host.node.clone());
    nodes
        .filter(|node| !held.contains(&node.as_str()))
        .collect()
}

/// Takes an attempt over as it is.
pub(super) fn adopt(step: &mut Step<'_>, command: &AdoptAttempt) -> Result<(), Rejection> {
    let id = &command.attempt;
    let (stray, job) = adoptable(step.state, id).map_err(|why| Rejection::WrongState {
        name: id.clone(),
        why,
    })?;
    let (job, cluster) = (job.clone(), job.spec.cluster.clone());
    let held: Vec<_> = of_attempt(step.state, id)
        .map(|(node, stray)| (node.to_owned(), stray.stray.clone().unwrap_or_default()))
        .collect();
    let adopted = Attempt {
        id: id.clone(),
        number: job.attempts + 1,
        work: Work::Job(stray.job.clone()),
        spec: job.spec.clone(),
        create_time: step.state.time,
        phase: Phase::Preparing,
        nodes: stray
            .hosts
            .iter()
            .map(|host| AttemptNode::new(&host.node, host.port))
            .collect(),
        outcome: None,
        log_home: command.log_home,
    };
    step.state.attempts.insert(id.clone(), Arc::new(adopted));
    for host in &stray.hosts {
        let node = &host.node;
        if step
            .state
            .nodes
            .get(node)
            .is_some_and(|n| n.cluster.is_none())
        {
            let (node, cluster) = (node.clone(), cluster.clone());
            nodes::allocate(step, &AllocateNode { node, cluster })?;
        }
        step.state.strays.remove(&(node.clone(), id.clone()));
        nodes::change(step, node, |node| node.attempt = Some(id.clone()));
        nodes::assign(step, node);
    }
    jobs::start(step, &stray.job, id);
    for (node, part) in held {
        attempts::observe(step, &node, &part.seen.unwrap_or_default());
    }
    Ok(())
}

#[cfg(test)]
#[path = "restore_tests.rs"]
mod tests;
