//! What nodes say late, twice, or about others; and plans that were overtaken.

use batchai_proto::agent::v1::{AttemptObservation, Failure, Report};
use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{AllocateNode, Place, RecordReport};
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::job_attempt_node::Phase as P;

use crate::scheduler::schedule;
use crate::state::tests::{Ensemble, pytorch};
use crate::state::*;

/// A PyTorch job whose two ranks run, one on each node.
fn two_ranks() -> (Ensemble, String) {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(pytorch);
    for i in 0..2 {
        e.see(&job, i, P::Running, &[(i as i32, None)]);
    }
    (e, job)
}

fn code_of(e: &Ensemble, job: &str, i: usize) -> Option<i32> {
    e.attempt(job).nodes[i].ranks[0].exit_code
}

#[test]
fn a_node_speaks_for_its_own_ranks_and_an_exit_code_stays() {
    let (mut e, job) = two_ranks();
    e.see(&job, 1, P::Running, &[(0, Some(5)), (1, None)]);
    assert_eq!(e.state_of(&job), JobState::Running);
    assert_eq!(
        (code_of(&e, &job, 0), e.attempt(&job).nodes[1].ranks.len()),
        (None, 1)
    );
    e.see(&job, 0, P::Running, &[(0, Some(0))]);
    e.see(&job, 0, P::Running, &[(0, Some(3))]);
    assert_eq!(
        (code_of(&e, &job, 0), e.state_of(&job)),
        (Some(0), JobState::Running)
    );
}

#[test]
fn the_last_word_on_a_node_is_the_first_that_says_that_it_is_done() {
    let (mut e, job) = two_ranks();
    e.see(&job, 1, P::Ended, &[(1, Some(0))]);
    let attempt = e.attempt(&job);
    let failure = Failure {
        exit_code: Some(9),
        ..Default::default()
    };
    e.see_attempt(&attempt, 1, P::Ended, &[], Some(failure));
    assert_eq!(e.attempt(&job), attempt);
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
}

#[test]
fn a_node_does_not_go_back() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.submit("j", 2, |_| {});
    e.see(&job, 0, P::Ready, &[]);
    e.see(&job, 0, P::Preparing, &[]);
    assert_eq!(e.attempt(&job).nodes[0].phase, P::Ready);
    e.see(&job, 1, P::Ready, &[]);
    assert_eq!(e.attempt(&job).phase, attempts::Phase::Running);
}

#[test]
fn an_earlier_incarnation_of_a_node_is_not_believed() {
    let (mut e, job) = two_ranks();
    let attempt = e.attempt(&job);
    let seen = AttemptObservation {
        attempt: attempt.id.clone(),
        phase: P::Lost as i32,
        ..Default::default()
    };
    let node = attempt.nodes[0].node.clone();
    let stale = RecordReport {
        uid: e.state.nodes[&node].uid.clone(),
        node,
        incarnation: "0".into(),
        report: Some(Report {
            attempts: vec![seen],
            ..Report::default()
        }),
    };
    let refused = e.try_apply(C::RecordReport(stale));
    assert!(
        matches!(refused, Err(Rejection::Overtaken { .. })),
        "{refused:?}"
    );
    assert_eq!(e.attempt(&job), attempt);
}

/// Jobs of one node that wait, and what would be done about them.
fn planned(jobs: usize) -> (Ensemble, Vec<Place>) {
    let mut e = Ensemble::with_nodes(2, 2);
    for i in 0..jobs {
        e.queue(&format!("j{i}"), 1, |_| {});
    }
    let plans = schedule(&e.state, &e.heard, 1);
    assert_eq!(plans.len(), jobs);
    (e, plans)
}

#[test]
fn a_plan_for_a_job_or_a_node_that_has_changed_is_overtaken() {
    let (mut e, plans) = planned(1);
    let older_job = Place {
        job_revision: plans[0].job_revision - 1,
        ..plans[0].clone()
    };
    let mut older_node = plans[0].clone();
    older_node.nodes[0].node_revision -= 1;
    for older in [older_job, older_node] {
        let refused = e.try_apply(C::Place(older));
        assert!(
            matches!(refused, Err(Rejection::Overtaken { .. })),
            "{refused:?}"
        );
    }
    e.ok(C::Place(plans[0].clone()));
}

#[test]
fn a_port_belongs_to_one_attempt_on_a_machine() {
    let (mut e, mut plans) = planned(2);
    plans[1].nodes[0].port = plans[0].nodes[0].port;
    e.ok(C::Place(plans[0].clone()));
    let refused = e.try_apply(C::Place(plans[1].clone()));
    assert!(
        matches!(refused, Err(Rejection::Overtaken { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_node_belongs_to_one_cluster() {
    let mut e = Ensemble::with_nodes(1, 1);
    let name = "resourceGroups/g/workspaces/w/clusters/other".to_owned();
    e.ok(C::CreateCluster(v1::Cluster {
        name: name.clone(),
        vm_size: "small".into(),
        ..Default::default()
    }));
    let refused = e.try_apply(C::AllocateNode(AllocateNode {
        node: "nodes/n0".into(),
        cluster: name,
    }));
    assert!(
        matches!(refused, Err(Rejection::Overtaken { .. })),
        "{refused:?}"
    );
}
