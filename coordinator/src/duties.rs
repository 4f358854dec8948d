//! PURE. What the leader has to see to: from a State, a time and what was heard of the nodes to more commands.
//!
//! Nothing here is remembered: the same State gives the same duties, until the commands they became have changed it.

use batchai_common::fault;
use batchai_common::names::Kind as Noun;
use batchai_proto::agent::v1::Failure;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::terminate_job::Cause;
use batchai_proto::internal::v1::{
    AllocateNode, Delete, FailAttempt, InitEnsemble, LoseNode, PlaceFileServer, RecordLease,
    ReleaseNode, Replica, SetUpNode, TerminateJob,
};
use batchai_proto::v1::ResourceError;
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;

use imbl::OrdMap;
use std::borrow::Borrow;
use std::sync::Arc;

use crate::scheduler;
pub use crate::scheduler::heard::Heard;
use crate::state::attempts::{self, Attempt, Phase};
use crate::state::file_servers::{FileServer, Load};
use crate::state::{
    Cluster, Node, State, agreement, children, keys, loss, restore, setup, vm_size_aliases,
};

/// How long the nodes of an attempt may take to get ready. Preparation commands download data sets: generous.
pub const PREPARE_DEADLINE_MS: i64 = 60 * 60 * 1000;

/// How long a node that is heard of may take to start the processes of an attempt whose nodes all were ready. It takes a moment: generous.
pub const LAUNCH_DEADLINE_MS: i64 = 5 * 60 * 1000;

/// Nodes that an error names, and ranks of each.
const NAMED_MAX: usize = 20;

/// At most so many commands of a kind at once; the rest follows from the State that these lead to.
const COMMANDS_MAX: usize = 256;

/// Who asks, as far as duties depend on it.
#[derive(Clone, Debug)]
pub struct Leader {
    /// The replica's own id: the home of the logs of what it places.
    pub replica: i64,
    /// The ensemble's UUID, for its first command.
    pub ensemble: String,
    /// The replicas that it begins with.
    pub replicas: Vec<Replica>,
    /// How long leases are that it grants.
    pub lease_ms: i64,
}

/// The commands that bring the State closer to what it should be.
pub fn duties(state: &State, heard: &Heard, leader: &Leader) -> Vec<Kind> {
    if state.ensemble.is_empty() {
        let ensemble = leader.ensemble.clone();
        let replicas = leader.replicas.clone();
        return vec![Kind::InitEnsemble(InitEnsemble {
            ensemble,
            epoch: 1,
            replicas,
        })];
    }
    // Each duty has room of its own: a large deletion must not keep clusters waiting.
    let mut commands = Vec::new();
    // Nodes that hold work which may be adopted go to its clusters.
    if !state.restored {
        drive_clusters(state, heard, &mut commands);
    }
    commands.extend(acquaintances(state, heard));
    commands.extend(agreement::duties(state));
    commands.extend(leases(state, heard, leader));
    commands.extend(deletions(state));
    let late = attempts::live(state)
        .filter_map(|attempt| late(heard, attempt).or_else(|| unstarted(heard, attempt)));
    commands.extend(late.take(COMMANDS_MAX));
    commands.extend(place_file_servers(state, heard));
    commands.extend(set_ups(state, heard, leader));
    let placements = scheduler::schedule(state, heard, leader.replica);
    commands.extend(placements.into_iter().map(Kind::Place));
    commands
}

/// What is lost with nodes whose leases are over; and how long leases may be, before any is.
fn leases(state: &State, heard: &Heard, leader: &Leader) -> Vec<Kind> {
    let lease_ms = leader.lease_ms;
    let longer =
        (lease_ms > state.longest_lease_ms).then_some(Kind::RecordLease(RecordLease { lease_ms }));
    let ending = attempts::live(state).filter(|attempt| loss::ends_by_lease(attempt));
    let open = ending.flat_map(|a| loss::nodes_of(a).map(move |node| (node, &a.id)));
    let lost = open.filter(|(node, _)| heard.lease_is_over(node, state.longest_lease_ms));
    let lost = lost.map(|(node, attempt)| {
        Kind::LoseNode(LoseNode {
            node: node.to_owned(),
            attempt: attempt.clone(),
        })
    });
    longer.into_iter().chain(lost).take(COMMANDS_MAX).collect()
}

/// What the State does not know yet of the replicas that were met.
fn acquaintances(state: &State, heard: &Heard) -> Vec<Kind> {
    let news = heard.replicas.iter().filter(|met| {
        let known = state.replicas.get(&met.id);
        known.is_some_and(|known| {
            let moved = !met.endpoint.is_empty() && known.endpoint != met.endpoint;
            let changed = moved || known.feature_level != met.feature_level;
            known.store.is_empty() || (changed && known.store == met.store)
        })
    });
    news.cloned().map(Kind::RecordReplica).collect()
}

/// Takes away what is to go with all that it holds or that needs it, from the bottom up.
fn deletions(state: &State) -> Vec<Kind> {
    let commands = state.deleting.iter().flat_map(|name| deletion(state, name));
    commands.take(COMMANDS_MAX).collect()
}

/// What stands in the way of a deletion and is not on its way out yet; where nothing stands in the way, the deletion.
fn deletion(state: &State, name: &str) -> Vec<Kind> {
    let mut way = match Noun::of(name) {
        Some(Noun::ResourceGroup) => held(state, &state.workspaces, name, Noun::Workspace),
        Some(Noun::Workspace) => {
            let mut held_here = held(state, &state.experiments, name, Noun::Experiment);
            held_here.extend(held(state, &state.clusters, name, Noun::Cluster));
            if held_here.is_empty() {
                // Nothing here mounts them any more.
                held_here = held(state, &state.file_servers, name, Noun::FileServer);
            }
            held_here
        }
        Some(Noun::Experiment) => held(state, &state.jobs, name, Noun::Job),
        _ => {
            let cluster = state.clusters.get(name);
            let jobs = cluster.into_iter().flat_map(|cluster| cluster.jobs());
            let mut way = bounded(jobs.map(|job| end_for_cluster(state, job)));
            // Nodes that are being set up are told to end it, and then in the way until they have.
            let members = cluster.into_iter().flat_map(|cluster| &cluster.members);
            let nodes = members.filter_map(|name| state.nodes.get(name));
            let mut attempts = nodes.filter_map(|node| state.attempts.get(node.attempt.as_ref()?));
            if attempts.any(|attempt| attempt.job().is_none() && attempt.outcome.is_some()) {
                way.push(None);
            }
            way
        }
    };
    if way.is_empty() {
        return vec![delete(name)];
    }
    way.retain(Option::is_some);
    way.into_iter().flatten().collect()
}

/// The deletion of everything of a kind that a name holds; `None` for what is on its way out.
fn held<K: Ord + Borrow<str>, T>(
    state: &State,
    table: &OrdMap<K, T>,
    name: &str,
    kind: Noun,
) -> Vec<Option<Kind>> {
    let going = |child: &str| {
        let job = state.jobs.get(child);
        let server = state.file_servers.get(child);
        state.deleting.contains(child)
            || job.is_some_and(|job| job.deleting.is_some())
            || server.is_some_and(|server| server.deleting.is_some())
    };
    let held = children(table, name, kind, "");
    bounded(held.map(|(child, _)| (!going(child)).then(|| delete(child))))
}

/// So many commands at most; what is on its way out is passed over and not counted.
fn bounded(commands: impl Iterator<Item = Option<Kind>>) -> Vec<Option<Kind>> {
    let mut open = 0;
    let room = |command: &Option<Kind>| {
        open += usize::from(command.is_some());
        open <= COMMANDS_MAX
    };
    commands.take_while(room).collect()
}

fn delete(name: &str) -> Kind {
    Kind::Delete(Delete {
        name: name.to_owned(),
        etag: String::new(),
        force: true,
    })
}

fn end_for_cluster(state: &State, job: &str) -> Option<Kind> {
    let ending = JobState::Terminating;
    let open = state.jobs.get(job).is_some_and(|job| job.state != ending);
    open.then(|| {
        Kind::TerminateJob(TerminateJob {
            name: job.to_owned(),
            cause: Cause::ClusterDeleted as i32,
        })
    })
}

/// Gives clusters the nodes they lack and takes those they have too many of.
fn drive_clusters(state: &State, heard: &Heard, commands: &mut Vec<Kind>) {
    let mut free: Vec<_> = state
        .nodes
        .iter()
        .filter(|(name, node)| node.is_free() && heard.is_alive(name))
        .collect();
    let stay = state.clusters.iter().filter(|(_, c)| c.deleting.is_none());
    for (name, cluster) in stay {
        let alias = vm_size_aliases::resolve(state, &cluster.spec.vm_size);
        let staying = staying(state, cluster);
        for node in surplus(state, heard, cluster, &staying) {
            if commands.len() >= COMMANDS_MAX {
                return;
            }
            commands.push(Kind::ReleaseNode(ReleaseNode {
                node: node.to_owned(),
                cluster: name.clone(),
                option: cluster.deallocation() as i32,
            }));
        }
        for _ in staying.len()..cluster.target() + usize::from(fault!("one_node_too_many")) {
            let found = free
                .iter()
                .position(|(_, node)| cluster.matches(alias, &node.facts));
            let Some(found) = found.filter(|_| commands.len() < COMMANDS_MAX) else {
                break;
            };
            let (node, _) = free.remove(found);
            let (node, cluster) = (node.clone(), name.clone());
            commands.push(Kind::AllocateNode(AllocateNode { node, cluster }));
        }
        if commands.len() >= COMMANDS_MAX {
            return;
        }
    }
}

fn staying<'a>(state: &State, cluster: &'a Cluster) -> Vec<&'a str> {
    let members = cluster.members.iter();
    let stays = |name: &&String| state.nodes.get(*name).is_some_and(|node| !node.leaving);
    members.filter(stays).map(String::as_str).collect()
}

/// The nodes to take: those whose set-up failed or is not done before idle ones, these before busy ones, silent ones before others, the last by name first.
fn surplus<'a>(
    state: &State,
    heard: &Heard,
    cluster: &Cluster,
    staying: &[&'a str],
) -> Vec<&'a str> {
    let count = staying.len().saturating_sub(cluster.target());
    // What is of no use goes first, then what is not of use yet.
    let use_of = |name: &str| match state.nodes.get(name) {
        Some(node) if setup::error(node).is_some() => 0,
        Some(node) if !setup::is_done(state, node) => 1,
        Some(node) if node.attempt.is_some() => 3,
        _ => 2,
    };
    let mut order: Vec<_> = staying.iter().rev().copied().collect();
    order.sort_by_key(|name| (use_of(name), heard.is_alive(name)));
    order.truncate(count);
    order
}

/// Nodes that are not yet as their clusters want them.
fn set_ups(state: &State, heard: &Heard, leader: &Leader) -> Vec<Kind> {
    let due = |(name, node): &(&String, &Arc<Node>)| {
        let open =
            || setup::secrets(state, node).is_none_or(|s| keys::closed(s, &heard.closed).is_none());
        heard.is_alive(name)
            && setup::is_due(state, node)
            && stays(state, node)
            && !restore::may_hold_strays(state, name)
            && open()
    };
    if state.restored {
        return Vec::new();
    }
    let due = state.nodes.iter().filter(due).take(COMMANDS_MAX);
    due.map(|(name, node)| {
        Kind::SetUpNode(SetUpNode {
            node: name.clone(),
            node_revision: node.revision,
            log_home: leader.replica,
        })
    })
    .collect()
}

/// Gives each file server without a node one that fits: of those with the fewest, the first by name.
fn place_file_servers(state: &State, heard: &Heard) -> Vec<Kind> {
    let open = |server: &&Arc<FileServer>| server.node.is_none() && server.deleting.is_none();
    let mut servers = state.file_servers.values().filter(open).peekable();
    if state.restored || servers.peek().is_none() {
        return Vec::new();
    }
    let storage = state
        .nodes
        .iter()
        .filter(|(name, node)| !node.facts.storage_root.is_empty() && heard.is_alive(name));
    let mut storage: Vec<_> = storage
        .map(|(name, node)| (Load::of(state, name), name, node))
        .collect();
    let mut plan = Vec::new();
    for server in servers.take(COMMANDS_MAX) {
        let alias = vm_size_aliases::resolve(state, &server.spec.vm_size);
        let fitting = storage.iter_mut().filter(|(load, name, node)| {
            load.with(server).fits(node) && server.matches(alias, name, node)
        });
        let fewest = fitting.min_by_key(|(load, name, _)| (load.count, *name));
        let Some((load, node, _)) = fewest else {
            continue;
        };
        *load = load.with(server);
        plan.push(Kind::PlaceFileServer(PlaceFileServer {
            name: server.spec.name.clone(),
            node: (*node).clone(),
        }));
    }
    plan
}

/// Whether the cluster of a node is one that stays.
fn stays(state: &State, node: &Node) -> bool {
    let cluster = node.cluster.as_ref().and_then(|c| state.clusters.get(c));
    cluster.is_some_and(|cluster| cluster.deleting.is_none())
}

/// An attempt whose nodes took too long to get ready fails, and the error names the slow ones.
fn late(heard: &Heard, attempt: &Attempt) -> Option<Kind> {
    let since = heard.since.preparing.get(&attempt.id)?;
    if attempt.phase != Phase::Preparing
        || heard.now - since < PREPARE_DEADLINE_MS
        || fault!("slow_preparation_never_ends")
    {
        return None;
    }
    let slow = attempt.nodes.iter().filter(|n| n.phase < NodePhase::Ready);
    let slow = named(slow.map(|node| node.node.clone()));
    let minutes = (PREPARE_DEADLINE_MS / 60_000).to_string();
    let message = format!("not ready after {minutes} minutes: {slow}");
    let details = [("nodes", slow.as_str()), ("minutes", minutes.as_str())];
    let error = attempts::error("JobPreparationTimeout", &message, &details);
    Some(failed(attempt, error, false))
}

/// An attempt of which a node does not start its part fails, and the error names it with its ranks: those of other nodes would wait for
/// these as long as their framework does, and know less. The job is not to blame.
fn unstarted(heard: &Heard, attempt: &Attempt) -> Option<Kind> {
    if fault!("launch_waits_for_ever") {
        return None;
    }
    let layout = attempts::layout(&attempt.spec);
    let is_overdue = |name: &str| {
        let key = (attempt.id.clone(), name.to_owned());
        let since = heard.since.launching.get(&key);
        since.is_some_and(|since| heard.now - since >= LAUNCH_DEADLINE_MS)
    };
    let overdue = attempt
        .unstarted()
        .filter(|(_, node)| is_overdue(&node.node));
    let mut first = None;
    let overdue = overdue.map(|(index, node)| {
        first.get_or_insert(node.node.as_str());
        let ranks = named(layout.of(index).map(|rank| rank.to_string()));
        match ranks.as_str() {
            "" => node.node.clone(),
            ranks => format!("{} (rank {ranks})", node.node),
        }
    });
    let overdue = named(overdue);
    if overdue.is_empty() {
        return None;
    }
    let minutes = (LAUNCH_DEADLINE_MS / 60_000).to_string();
    let message = format!(
        "all nodes were ready, and {minutes} minutes later these had not started their processes: {overdue}"
    );
    let details = [
        ("node", first.unwrap_or_default()),
        ("nodes", overdue.as_str()),
        ("minutes", minutes.as_str()),
    ];
    let error = attempts::error("JobLaunchTimeout", &message, &details);
    Some(failed(attempt, error, true))
}

/// Some of several, for an error.
fn named(all: impl Iterator<Item = String>) -> String {
    let all: Vec<_> = all.collect();
    let some = all[..all.len().min(NAMED_MAX)].join(", ");
    match all.len().saturating_sub(NAMED_MAX) {
        0 => some,
        more => format!("{some} and {more} more"),
    }
}

fn failed(attempt: &Attempt, error: ResourceError, launching: bool) -> Kind {
    let failure = Failure {
        error: Some(error),
        exit_code: None,
        infrastructure: launching,
        ends_job: false,
        undoes_success: false,
    };
    Kind::FailAttempt(FailAttempt {
        attempt: attempt.id.clone(),
        failure: Some(failure),
        launching,
    })
}
