//! PURE. Nodes that are lost: not heard of for longer than their lease, or gone by an administrator's word.
//!
//! What a job wants (`on_node_loss`) decides what an expired lease means. Work that would run again is fenced: its node kills it before
//! the lease is over here. Work that only ends is not, and its node is given no other before it has ended that. When a lease is over
//! is not decided here.

use batchai_common::fault;
use batchai_common::names::Kind;
use batchai_proto::internal::v1::{ConfirmNodeLost, LoseNode, RecordLease};
use batchai_proto::v1::job::OnNodeLoss;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;

use super::attempts::{self, Attempt, Outcome, Phase, Verdict, Work};
use super::{Rejection, State, Step, nodes, not_found, restore};

/// What becomes of an attempt when a node's lease is over.
fn on_node_loss(attempt: &Attempt) -> OnNodeLoss {
    match (&attempt.work, attempt.spec.on_node_loss()) {
        (Work::SetUp, _) | (_, OnNodeLoss::Unspecified) => OnNodeLoss::Requeue,
        (Work::Job(_), told) => told,
    }
}

/// Whether nothing of it may run when its node's lease is over.
pub fn is_fenced(attempt: &Attempt) -> bool {
    on_node_loss(attempt) == OnNodeLoss::Requeue
}

/// Whether an expired lease ends a node's part in it: it is fenced, or will not run again. A run that failed and is tried again does.
pub fn ends_by_lease(attempt: &Attempt) -> bool {
    let over = attempt
        .outcome
        .as_ref()
        .is_some_and(|o| matches!(o.verdict, Verdict::Failed | Verdict::Succeeded));
    over || on_node_loss(attempt) != OnNodeLoss::Wait || fault!("what_waits_is_lost")
}

/// The nodes whose part in a live attempt is not over.
pub fn nodes_of(attempt: &Attempt) -> impl Iterator<Item = &str> {
    let live = attempt.phase != Phase::Ended;
    let open = attempt
        .nodes
        .iter()
        .filter(move |node| live && !matches!(node.phase, NodePhase::Ended | NodePhase::Lost));
    open.map(|node| node.node.as_str())
}

/// Leases may last longer from now on. That they last shorter is of no use: older ones may be out there.
pub(super) fn record_lease(step: &mut Step<'_>, command: &RecordLease) -> Result<(), Rejection> {
    let longest = &mut step.state.longest_lease_ms;
    *longest = match fault!("longest_lease_shortened") {
        true => command.lease_ms,
        false => command.lease_ms.max(*longest),
    };
    Ok(())
}

/// The lease of a node is over.
pub(super) fn lose(step: &mut Step<'_>, command: &LoseNode) -> Result<(), Rejection> {
    let attempt = step.state.attempts.get(&command.attempt).cloned();
    let open = attempt.filter(|a| nodes_of(a).any(|node| node == command.node) && ends_by_lease(a));
    let attempt = open.ok_or_else(|| Rejection::Overtaken {
        name: command.attempt.clone(),
        why: "the node's part in it is over already".to_owned(),
    })?;
    let minutes = step.state.longest_lease_ms as f64 / 60_000.0;
    let message = format!("{} was not heard of for {minutes:.1} minutes", command.node);
    let outcome = Outcome::node_lost(&command.node, &message, is_fenced(&attempt));
    attempts::decide(step, &command.attempt, outcome);
    attempts::lose_node(step, &command.attempt, &command.node);
    Ok(())
}

/// Nothing runs on a node any more.
pub(super) fn confirm(step: &mut Step<'_>, command: &ConfirmNodeLost) -> Result<(), Rejection> {
    let name = &command.node;
    let node = step.state.nodes.get(name).cloned();
    let node = node.ok_or_else(|| not_found(Kind::Node, name))?;
    let same = node.incarnation == command.incarnation
        && node.attempt.as_deref().unwrap_or_default() == command.attempt;
    if !same {
        let (name, why) = (
            name.clone(),
            "it has begun something else meanwhile".to_owned(),
        );
        return Err(Rejection::Overtaken { name, why });
    }
    restore::forget(step, name);
    let epoch = step.state.epoch;
    nodes::change(step, name, |node| node.epoch = epoch);
    if let Some(attempt) = &node.attempt {
        let message = format!("{name} was confirmed to be lost");
        gone(step, attempt, name, &message);
    }
    Ok(())
}

/// Nothing of an attempt runs on a node any more, for sure: who waits for that waits no longer.
pub(super) fn gone(step: &mut Step<'_>, id: &str, node: &str, message: &str) {
    let attempt = step.state.attempts.get(id);
    let fails = attempt.is_some_and(|a| on_node_loss(a) == OnNodeLoss::Fail);
    attempts::decide(step, id, Outcome::node_lost(node, message, !fails));
    attempts::lose_node(step, id, node);
}

/// The node that a job waits for, which does not run again by itself.
pub fn waits_for<'a>(
    state: &'a State,
    attempt: &str,
    lost: impl Fn(&str) -> bool,
) -> Option<&'a str> {
    let attempt = state.attempts.get(attempt)?;
    let waits = !ends_by_lease(attempt);
    nodes_of(attempt).find(|node| waits && lost(node))
}

#[cfg(test)]
#[path = "loss_tests.rs"]
mod tests;
