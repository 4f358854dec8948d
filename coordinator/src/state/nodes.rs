//! PURE. Nodes: registered by their agents, given to clusters and taken from them by the leader's duties.
//!
//! Whether a node is in contact is not part of the State; see `duties::Heard`.

use batchai_common::fault;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::internal::v1::{AllocateNode, RegisterNode, ReleaseNode};
use batchai_proto::v1;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption;
use prost_types::Timestamp;

use super::attempts::{self, Outcome};
use super::setup::{self, Setup};
use super::{Rejection, State, Step, check_new, clusters, jobs, loss, not_found, vm_size_aliases};
use batchai_proto::internal::v1::terminate_job::Cause;

/// A machine with an agent.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The UUID its agent made once.
    pub uid: String,
    /// Journal id and boot id: a new one means that what ran before is gone.
    pub incarnation: String,
    pub facts: Arc<v1::NodeFacts>,
    pub revision: i64,
    pub create_time: Timestamp,
    /// The cluster it belongs to.
    pub cluster: Option<String>,
    /// It leaves its cluster as soon as it has no attempt.
    pub leaving: bool,
    /// It is refused, and gets nothing any more.
    pub expelled: bool,
    /// The attempt it works for.
    pub attempt: Option<String>,
    /// The revision that last changed its assignments.
    pub assigned: i64,
    /// The epoch in which it last said what it holds of earlier ones.
    pub epoch: i64,
    /// How its set-up for its cluster went; none where it was not begun, or there is none.
    pub setup: Option<Setup>,
}

impl Node {
    /// Whether a cluster may have it.
    pub fn is_free(&self) -> bool {
        self.cluster.is_none() && !self.expelled
    }

    /// What it is doing, as far as the State knows.
    pub fn state(&self) -> v1::node::State {
        match self {
            Node { expelled: true, .. } => v1::node::State::Expelled,
            Node { cluster: None, .. } => v1::node::State::Available,
            Node { leaving: true, .. } => v1::node::State::Leaving,
            Node {
                attempt: Some(_), ..
            } => v1::node::State::Running,
            _ => v1::node::State::Idle,
        }
    }
}

/// Changes a node in place.
pub(super) fn change(step: &mut Step<'_>, name: &str, change: impl FnOnce(&mut Node)) {
    let revision = step.state.revision;
    let Some(node) = step.state.nodes.get_mut(name) else {
        return;
    };
    let node = Arc::make_mut(node);
    change(node);
    node.revision = revision;
    step.changed(name);
}

/// Marks that a node's assignments changed.
pub(super) fn assign(step: &mut Step<'_>, name: &str) {
    let revision = step.state.revision;
    if let Some(node) = step.state.nodes.get_mut(name) {
        Arc::make_mut(node).assigned = if fault!("assignments_not_renewed") {
            0
        } else {
            revision
        };
        step.assigned(name);
    }
}

/// Whether it is known as it registers: that need not be recorded again.
pub fn is_registered(state: &State, register: &RegisterNode) -> bool {
    let known = state.nodes.get(&register.name);
    known.is_some_and(|known| {
        known.uid == register.uid
            && known.incarnation == register.incarnation
            && Some(&*known.facts) == register.facts.as_ref()
    })
}

pub(super) fn register(step: &mut Step<'_>, command: &RegisterNode) -> Result<(), Rejection> {
    let name = &command.name;
    let facts = Arc::new(command.facts.clone().unwrap_or_default());
    check_joined(step.state, command, &facts)?;
    let Some(known) = step.state.nodes.get(name).cloned() else {
        check_new(step.state, Kind::Node, name)?;
        let node = Node {
            uid: command.uid.clone(),
            incarnation: command.incarnation.clone(),
            facts,
            revision: step.state.revision,
            create_time: step.state.time,
            cluster: None,
            leaving: false,
            expelled: false,
            attempt: None,
            assigned: step.state.revision,
            // One that is known says so by a list of strays, made under a list of this epoch.
            epoch: if command.empty { step.state.epoch } else { 0 },
            setup: None,
        };
        step.state.nodes.insert(name.clone(), Arc::new(node));
        step.changed(name);
        return Ok(());
    };
    if known.uid != command.uid && known.attempt.is_some() {
        let why = "it is registered under another uid and still has work; start the agent with \
                   its old data directory, or give it another --name"
            .to_owned();
        return Err(Rejection::WrongState {
            name: name.clone(),
            why,
        });
    }
    if known.incarnation != command.incarnation
        && !fault!("reboot_loses_nothing")
        && let Some(attempt) = &known.attempt
    {
        let message = format!(
            "{name} has begun anew: its machine was restarted, or its agent lost its journal"
        );
        loss::gone(step, attempt, name, &message);
    }
    // A machine that changed its size or image is no longer what its cluster was made of.
    let as_before = known.facts.vm_size == facts.vm_size && known.facts.image == facts.image;
    let misfit = !as_before
        && known.cluster.as_ref().is_some_and(|cluster| {
            step.state.clusters.get(cluster).is_some_and(|cluster| {
                let alias = vm_size_aliases::resolve(step.state, &cluster.spec.vm_size);
                !cluster.matches(alias, &facts)
            })
        });
    change(step, name, |node| {
        node.uid = command.uid.clone();
        node.expelled = false;
        node.incarnation = command.incarnation.clone();
        node.facts = facts;
        node.leaving |= misfit && node.cluster.is_some();
    });
    if misfit {
        setup::end_of(step, name);
    }
    assign(step, name);
    free_if_leaving(step, name);
    Ok(())
}

/// Whether a machine is the one that joined as a node, and what it was let in for.
fn check_joined(
    state: &State,
    command: &RegisterNode,
    facts: &v1::NodeFacts,
) -> Result<(), Rejection> {
    let refuse = |why: &str| {
        let (name, why) = (command.name.clone(), why.to_owned());
        Err(Rejection::WrongState { name, why })
    };
    if state.is_expelled(&command.name, &command.uid) {
        return refuse("it was expelled; give its agent a new --data directory and a new token");
    }
    let Some(joined) = state.joined.get(&command.name) else {
        return Ok(());
    };
    if joined.uid != command.uid {
        return refuse("another machine has joined as this node");
    }
    let (wanted, registers) = (&joined.vm_size, &facts.vm_size);
    if !wanted.is_empty() && registers != wanted {
        let why = format!("it joined by a token for VM size {wanted}, and registers {registers}");
        return refuse(&why);
    }
    Ok(())
}

pub(super) fn allocate(step: &mut Step<'_>, command: &AllocateNode) -> Result<(), Rejection> {
    let node = step.state.nodes.get(&command.node);
    let node = node.ok_or_else(|| not_found(Kind::Node, &command.node))?;
    let cluster = step.state.clusters.get(&command.cluster);
    let cluster = cluster.ok_or_else(|| not_found(Kind::Cluster, &command.cluster))?;
    let alias = vm_size_aliases::resolve(step.state, &cluster.spec.vm_size);
    let stays = cluster.deleting.is_none();
    if (node.cluster.is_some() && !fault!("node_of_two_clusters"))
        || node.expelled
        || !stays
        || !cluster.matches(alias, &node.facts)
    {
        let why = "it is not free for that cluster any more".to_owned();
        return Err(Rejection::Overtaken {
            name: command.node.clone(),
            why,
        });
    }
    change(step, &command.node, |node| {
        node.cluster = Some(command.cluster.clone())
    });
    clusters::change(step, &command.cluster, |cluster| {
        cluster.members.insert(command.node.clone());
    });
    setup::remount(step, &command.cluster, &command.node);
    Ok(())
}

pub(super) fn release(step: &mut Step<'_>, command: &ReleaseNode) -> Result<(), Rejection> {
    let node = step.state.nodes.get(&command.node).cloned();
    let node = node.ok_or_else(|| not_found(Kind::Node, &command.node))?;
    if node.cluster.as_deref() != Some(&command.cluster) || node.leaving {
        let why = "it has left or is leaving that cluster already".to_owned();
        return Err(Rejection::Overtaken {
            name: command.node.clone(),
            why,
        });
    }
    change(step, &command.node, |node| {
        node.leaving = !fault!("leaving_forgotten")
    });
    clusters::change(step, &command.cluster, |_| {});
    if let Some(attempt) = &node.attempt {
        let job = step.state.attempts.get(attempt);
        let job = job.and_then(|attempt| attempt.job().map(str::to_owned));
        match command.option() {
            // What it is set up for is not to be.
            _ if job.is_none() => {
                attempts::decide(step, attempt, Outcome::requeue_for_resize(&command.node))
            }
            NodeDeallocationOption::WaitForJobCompletion => {}
            NodeDeallocationOption::Terminate => {
                jobs::terminate(step, &job.unwrap_or_default(), Cause::NodeReleased)?;
            }
            NodeDeallocationOption::Requeue | NodeDeallocationOption::Unspecified => {
                attempts::decide(step, attempt, Outcome::requeue_for_resize(&command.node));
            }
        }
    }
    free_if_leaving(step, &command.node);
    Ok(())
}

/// A node that leaves and has no attempt belongs to no cluster any more.
pub(super) fn free_if_leaving(step: &mut Step<'_>, name: &str) {
    let Some(node) = step.state.nodes.get(name).cloned() else {
        return;
    };
    if let (true, None, Some(cluster)) = (node.leaving, &node.attempt, &node.cluster) {
        change(step, name, |node| {
            node.cluster = None;
            node.leaving = false;
        });
        setup::forget(step, name);
        setup::remount(step, cluster, name);
        clusters::change(step, cluster, |cluster| {
            cluster
                .members
                .remove(if fault!("released_node_stays_a_member") {
                    ""
                } else {
                    name
                });
        });
    }
}
