//! Tells what becomes of jobs whose nodes fall silent.

use std::collections::BTreeMap;
use std::sync::Arc;

use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{ConfirmNodeLost, LoseNode, TerminateJob};
use batchai_proto::v1::job::{OnNodeLoss, State as JobState};
use batchai_proto::v1::job_attempt_node::Phase as P;

use crate::scheduler::explain::pending_reason;
use crate::state::tests::{Ensemble, LEASE_MS};
use crate::state::*;

/// An ensemble that leads since now, with a running job of one node and a spare node; the first is not heard of any more.
fn silent(told: OnNodeLoss) -> (Ensemble, String) {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.submit("j", 1, |job| job.set_on_node_loss(told));
    e.see(&job, 0, P::Ready, &[]);
    e.heard.leading = Some((1, e.heard.now));
    (e, job)
}

/// So much later; all but the node of the job are heard of.
fn later(e: &mut Ensemble, millis: i64) {
    e.heard.now += millis;
    let now = e.heard.now;
    for (name, last) in &mut e.heard.last {
        if name != "nodes/n0" {
            *last = now;
        }
    }
    e.settle();
}

const OVER: i64 = LEASE_MS + LEASE_MS / 100 + 2_001;

#[test]
fn a_job_runs_again_elsewhere_when_no_leader_can_have_granted_a_lease_that_is_not_over() {
    let (mut e, job) = silent(OnNodeLoss::Unspecified);
    assert_eq!(e.state.longest_lease_ms, LEASE_MS);
    let first = e.attempt(&job).id.clone();
    later(&mut e, OVER - 2);
    assert_eq!(e.attempt(&job).id, first);
    // This leader has granted one itself.
    let granted = BTreeMap::from([("nodes/n0".to_owned(), e.heard.now)]);
    e.heard.granted = Arc::new(granted);
    later(&mut e, OVER - 1);
    assert_eq!(e.attempt(&job).id, first);
    // Another one leads: it knows nothing, and begins to wait.
    e.heard.granted = Arc::default();
    e.heard.leading = Some((1, e.heard.now));
    later(&mut e, OVER - 1);
    assert_eq!(e.attempt(&job).id, first);
    e.heard.leading = None;
    later(&mut e, OVER);
    assert_eq!(e.attempt(&job).id, first, "it does not lead");
    e.heard.leading = Some((1, e.heard.now - OVER));
    later(&mut e, 0);
    let second = e.attempt(&job);
    assert_ne!(second.id, first);
    assert_eq!(second.nodes[0].node, "nodes/n1");
    assert_eq!(e.state_of(&job), JobState::Running);
    // The node is back, and has nothing to do with it any more.
    assert!(
        assignments::assignments(&e.state, "nodes/n0")
            .assignments
            .is_empty()
    );
}

#[test]
fn a_job_that_is_told_to_fail_fails_and_one_that_is_told_to_wait_says_for_what() {
    let (mut e, job) = silent(OnNodeLoss::Fail);
    later(&mut e, OVER);
    assert_eq!(e.state_of(&job), JobState::Failed);
    assert_eq!(e.job(&job).errors[0].code, "NodeLost");
    let (mut e, job) = silent(OnNodeLoss::Wait);
    let assigned = assignments::assignments(&e.state, "nodes/n0");
    assert!(!assigned.assignments[0].fenced);
    later(&mut e, OVER);
    assert_eq!(e.state_of(&job), JobState::Running);
    let reason = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(reason.contains("nodes/n0"), "{reason}");
    // Nobody takes it for lost by mistake.
    let attempt = e.attempt(&job).id.clone();
    let node = "nodes/n0".to_owned();
    let lose = C::LoseNode(LoseNode {
        node: node.clone(),
        attempt,
    });
    assert!(e.try_apply(lose).is_err());
    let confirm = |attempt: &str| {
        C::ConfirmNodeLost(ConfirmNodeLost {
            node: node.clone(),
            incarnation: "1".into(),
            attempt: attempt.to_owned(),
        })
    };
    assert!(
        e.try_apply(confirm("1-1")).is_err(),
        "it does something else"
    );
    let attempt = e.attempt(&job).id.clone();
    e.ok(confirm(&attempt));
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Running);
    assert_eq!(e.attempt(&job).nodes[0].node, "nodes/n1");
}

#[test]
fn a_job_that_is_told_to_end_does_not_wait_for_a_node_whose_lease_is_over() {
    let (mut e, job) = silent(OnNodeLoss::Wait);
    e.ok(C::TerminateJob(TerminateJob {
        name: job.clone(),
        ..Default::default()
    }));
    later(&mut e, OVER - 1);
    assert_eq!(e.state_of(&job), JobState::Terminating);
    later(&mut e, 1);
    assert_eq!(e.state_of(&job), JobState::Failed);
    assert_eq!(e.job(&job).errors[0].code, "JobTerminated");
}

#[test]
fn a_gang_ends_on_all_of_its_nodes_before_it_runs_again() {
    let mut e = Ensemble::with_nodes(3, 3);
    let job = e.submit("j", 2, |_| {});
    for i in 0..2 {
        e.see(&job, i, P::Ready, &[]);
    }
    e.heard.leading = Some((1, e.heard.now));
    let first = e.attempt(&job);
    e.heard.now += OVER;
    let now = e.heard.now;
    let lost = first.nodes[0].node.clone();
    let granted = first.nodes[1].node.clone();
    e.heard.granted = Arc::new(BTreeMap::from([(granted.clone(), now)]));
    for (name, last) in &mut e.heard.last {
        if *name != lost {
            *last = now;
        }
    }
    e.settle();
    // The other is told to end, and has not said that it has.
    assert_eq!(e.attempt(&job).id, first.id);
    let told = assignments::assignments(&e.state, &granted).assignments;
    assert_eq!(
        told[0].desired(),
        batchai_proto::agent::v1::assignment::Desired::Stop
    );
    e.see(&job, 1, P::Ended, &[]);
    let second = e.attempt(&job);
    assert_ne!(second.id, first.id);
    assert!(second.nodes.iter().all(|node| node.node != lost));
}

#[test]
fn leases_are_not_granted_for_longer_than_every_leader_waits() {
    let mut e = Ensemble::new(0);
    e.settle();
    assert_eq!(e.state.longest_lease_ms, LEASE_MS);
    let record = |lease_ms| C::RecordLease(batchai_proto::internal::v1::RecordLease { lease_ms });
    e.ok(record(LEASE_MS / 2));
    assert_eq!(e.state.longest_lease_ms, LEASE_MS, "older grants may last");
    e.ok(record(LEASE_MS * 2));
    assert_eq!(e.state.longest_lease_ms, LEASE_MS * 2);
}
