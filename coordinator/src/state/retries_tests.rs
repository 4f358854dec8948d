//! Runs that fail and are tried again, and which of several failures is why.

use batchai_proto::agent::v1::{AttemptObservation, Failure};
use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{ConfirmNodeLost, Delete, LoseNode, TerminateJob};
use batchai_proto::v1::JobConstraints;
use batchai_proto::v1::job::{OnNodeLoss, State as JobState};
use batchai_proto::v1::job_attempt_node::Phase as P;

use crate::state::digest::Digest;
use crate::state::tests::{Ensemble, pytorch, through_a_snapshot};
use crate::state::*;

fn retries(max_retries: i32) -> impl Fn(&mut v1::Job) {
    move |job| {
        job.constraints = Some(JobConstraints {
            max_wall_clock_time: None,
            max_retries,
        });
    }
}

/// Has the process of a job of one node end like that.
fn end(e: &mut Ensemble, job: &str, code: i32) {
    e.see(job, 0, P::Ready, &[]);
    e.see(job, 0, P::Ended, &[(0, Some(code))]);
}

fn counts(e: &Ensemble, job: &str) -> (i32, i32, i32) {
    let job = e.job(job);
    (job.attempts, job.retries, job.infrastructure_retries)
}

fn codes(e: &Ensemble, job: &str) -> Vec<String> {
    let errors = e.job(job).errors.iter();
    errors.map(|error| error.code.clone()).collect()
}

fn detail<'a>(error: &'a v1::ResourceError, name: &str) -> &'a str {
    let found = error.details.iter().find(|d| d.name == name);
    found.map_or("", |detail| detail.value.as_str())
}

#[test]
fn a_failed_run_is_tried_again_as_often_as_the_job_says_and_what_infrastructure_ends_is_counted_apart()
 {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = e.submit("j", 1, retries(2));
    let mut ids = vec![e.attempt(&job).id.clone()];
    end(&mut e, &job, 3);
    assert_eq!(e.state_of(&job), JobState::Running);
    assert_eq!(
        (counts(&e, &job), codes(&e, &job)),
        ((2, 1, 0), vec!["JobFailed".to_owned()])
    );
    assert_eq!((e.attempt(&job).number, e.job(&job).exit_code), (2, None));
    let assigned = assignments::assignments(&e.state, "nodes/n0");
    assert_eq!(assigned.assignments[0].number, 2);
    ids.push(e.attempt(&job).id.clone());
    e.register("nodes/n0", "2");
    assert_eq!(
        (counts(&e, &job), codes(&e, &job)),
        ((2, 1, 1), vec!["NodeLost".to_owned()])
    );
    e.settle();
    // Nothing of that is forgotten, and all of it tells States apart.
    assert_eq!(through_a_snapshot(&e.state), e.state);
    let mut other = e.state.clone();
    Arc::make_mut(other.jobs.get_mut(job.as_str()).unwrap()).retries += 1;
    assert_ne!(Digest::of(&other), Digest::of(&e.state));
    ids.push(e.attempt(&job).id.clone());
    end(&mut e, &job, 4);
    assert_eq!(
        (counts(&e, &job), e.state_of(&job)),
        ((4, 2, 1), JobState::Running)
    );
    ids.push(e.attempt(&job).id.clone());
    end(&mut e, &job, 5);
    assert_eq!(
        (counts(&e, &job), e.state_of(&job)),
        ((4, 2, 1), JobState::Failed)
    );
    assert_eq!(e.job(&job).exit_code, Some(5));
    ids.dedup();
    assert_eq!(ids.len(), 4, "an attempt id was used again");
    // One that succeeds in the end has no errors.
    let job = e.submit("k", 1, retries(1));
    end(&mut e, &job, 3);
    end(&mut e, &job, 0);
    assert_eq!(
        (e.state_of(&job), codes(&e, &job)),
        (JobState::Succeeded, vec![])
    );
    assert_eq!(
        (e.job(&job).exit_code, counts(&e, &job)),
        (Some(0), (2, 1, 0))
    );
}

#[test]
fn losses_have_their_own_bound_also_where_retries_are_left() {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = e.submit("j", 1, retries(100));
    for boot in 0..=jobs::INFRASTRUCTURE_RETRIES_MAX {
        e.register("nodes/n0", &format!("boot-{boot}"));
        e.settle();
    }
    assert_eq!(
        (counts(&e, &job), e.state_of(&job)),
        ((4, 0, 3), JobState::Failed)
    );
    let error = &e.job(&job).errors[0];
    assert_eq!(
        (error.code.as_str(), detail(error, "node")),
        ("NodeLost", "nodes/n0")
    );
    assert!(error.message.contains("3 times"), "{error:?}");
}

#[test]
fn a_job_that_is_tried_again_has_its_old_place_in_the_queue() {
    let mut e = Ensemble::with_nodes(1, 1);
    let first = e.submit("z", 1, retries(1));
    let second = e.submit("a", 1, |_| {});
    end(&mut e, &first, 3);
    assert_eq!(
        (e.state_of(&first), e.state_of(&second)),
        (JobState::Running, JobState::Queued)
    );
}

#[test]
fn what_takes_too_long_is_refused_terminated_or_deleted_is_not_tried_again() {
    let failure = |code: &str, ends_job| Failure {
        error: Some(attempts::error(code, "why", &[])),
        ends_job,
        ..Default::default()
    };
    let mut e = Ensemble::with_nodes(2, 2);
    for (i, (failure, expected)) in [
        (failure("JobWallClockTimeExceeded", true), JobState::Failed),
        (failure("JobPreparationFailed", false), JobState::Running),
    ]
    .into_iter()
    .enumerate()
    {
        let job = e.submit(&format!("j{i}"), 2, retries(2));
        let attempt = e.attempt(&job);
        e.see_attempt(&attempt, 0, P::Ended, &[], Some(failure.clone()));
        e.see_attempt(&attempt, 1, P::Ended, &[], None);
        assert_eq!(e.state_of(&job), expected, "{failure:?}");
        let error = &e.job(&job).errors[0];
        assert_eq!(error.code, failure.error.unwrap().code);
        assert_eq!(detail(error, "node"), attempt.nodes[0].node);
    }
    let job = format!("{}/jobs/j1", "resourceGroups/g/workspaces/w/experiments/e");
    let terminate = C::TerminateJob(TerminateJob {
        name: job.clone(),
        ..Default::default()
    });
    // One node says that its run failed, and before the other is done the user has enough.
    let attempt = e.attempt(&job);
    e.see_attempt(&attempt, 0, P::Ready, &[], None);
    e.see_attempt(&attempt, 1, P::Ready, &[], None);
    e.see_attempt(&attempt, 0, P::Ended, &[(0, Some(3))], None);
    e.ok(terminate);
    e.see_attempt(&attempt, 1, P::Ended, &[], None);
    assert_eq!(
        (e.state_of(&job), codes(&e, &job)),
        (JobState::Failed, vec!["JobTerminated".to_owned()])
    );
    let job = e.submit("k", 2, retries(1));
    let attempt = e.attempt(&job);
    e.see_attempt(
        &attempt,
        0,
        P::Ended,
        &[],
        Some(failure("JobPreparationFailed", false)),
    );
    e.ok(C::Delete(Delete {
        name: job.clone(),
        ..Default::default()
    }));
    e.see_attempt(&attempt, 1, P::Ended, &[], None);
    assert!(!e.state.jobs.contains_key(job.as_str()));
}

/// A job of two ranks that runs, of which one node has failed and the other is not heard of.
fn half_failed(told: OnNodeLoss) -> (Ensemble, String, String) {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|job| {
        pytorch(job);
        retries(1)(job);
        job.set_on_node_loss(told);
    });
    e.see(&job, 0, P::Ended, &[(0, Some(3))]);
    let silent = e.attempt(&job).nodes[1].node.clone();
    (e, job, silent)
}

#[test]
fn a_failed_run_is_not_tried_again_before_no_node_can_run_it_any_more() {
    let lose = |e: &Ensemble, job: &str, node: &str| {
        C::LoseNode(LoseNode {
            node: node.to_owned(),
            attempt: e.attempt(job).id.clone(),
        })
    };
    // Nothing ends what the silent node runs: the lease says nothing about it.
    let (mut e, job, node) = half_failed(OnNodeLoss::Wait);
    assert!(e.try_apply(lose(&e, &job, &node)).is_err());
    e.ok(C::ConfirmNodeLost(ConfirmNodeLost {
        node: node.clone(),
        incarnation: "1".into(),
        attempt: e.attempt(&job).id.clone(),
    }));
    assert_eq!(
        (e.state_of(&job), counts(&e, &job)),
        (JobState::Queued, (1, 1, 0))
    );
    let (mut e, job, node) = half_failed(OnNodeLoss::Fail);
    e.ok(lose(&e, &job, &node));
    assert_eq!(
        (e.state_of(&job), codes(&e, &job)),
        (JobState::Failed, vec!["NodeLost".to_owned()])
    );
    // It was fenced.
    let (mut e, job, node) = half_failed(OnNodeLoss::Requeue);
    e.ok(lose(&e, &job, &node));
    assert_eq!(
        (e.state_of(&job), counts(&e, &job)),
        (JobState::Queued, (1, 1, 0))
    );
}

#[test]
fn a_job_that_is_to_fail_with_its_node_fails_when_that_begins_anew() {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = e.submit("j", 1, |job| job.set_on_node_loss(OnNodeLoss::Fail));
    e.register("nodes/n0", "2");
    e.settle();
    assert_eq!(
        (e.state_of(&job), codes(&e, &job)),
        (JobState::Failed, vec!["NodeLost".to_owned()])
    );
}

#[test]
fn of_several_nodes_the_first_that_is_heard_of_is_why_and_the_others_are_named() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(pytorch);
    let attempt = e.attempt(&job);
    for (i, code, signal) in [(1, 1, ""), (0, 139, "SIGSEGV")] {
        let rank = v1::JobRank {
            rank: i,
            exit_code: Some(code),
            signal: signal.to_owned(),
        };
        let seen = AttemptObservation {
            phase: P::Ended as i32,
            ranks: vec![rank],
            first_failed: Some(i),
            ..Default::default()
        };
        e.report(&attempt, i as usize, seen);
    }
    let error = &e.job(&job).errors[0];
    assert_eq!(
        (e.job(&job).exit_code, detail(error, "rank")),
        (Some(1), "1")
    );
    let others = format!(
        "rank 0 on {} was ended by SIGSEGV, which counts as exit code 139",
        attempt.nodes[0].node
    );
    assert_eq!(detail(error, "otherRanks"), others);
    // One that ended because it was told to says nothing.
    let job = e.submit("k", 2, pytorch);
    for i in 0..2 {
        e.see(&job, i, P::Ready, &[]);
    }
    e.see(&job, 1, P::Ended, &[(1, Some(7))]);
    e.see(&job, 0, P::Ended, &[(0, Some(143))]);
    let error = &e.job(&job).errors[0];
    assert_eq!(
        (detail(error, "rank"), detail(error, "otherRanks")),
        ("1", "")
    );
}

#[test]
fn of_one_node_the_process_that_failed_first_is_why_whatever_came_behind_it() {
    let mut e = Ensemble::with_nodes(1, 1);
    let rank = |rank, code, signal: &str| v1::JobRank {
        rank,
        exit_code: Some(code),
        signal: signal.to_owned(),
    };
    let mut seen = AttemptObservation {
        phase: P::Running as i32,
        ranks: vec![rank(0, 1, ""), rank(1, 139, "SIGSEGV")],
        failure: Some(Failure {
            error: Some(attempts::error("NodeStopped", "why", &[])),
            infrastructure: true,
            ..Default::default()
        }),
        last_words: "of rank 1".into(),
        first_failed: Some(1),
        ..Default::default()
    };
    let two = |job: &mut v1::Job| {
        job.custom_toolkit_settings = Some(v1::CustomToolkitSettings {
            processes_per_node: 2,
            ..Default::default()
        });
    };
    let job = e.submit("j", 1, two);
    let attempt = e.attempt(&job);
    e.report(&attempt, 0, seen.clone());
    e.see(&job, 0, P::Ended, &[]);
    let error = e.job(&job).errors[0].clone();
    assert_eq!(
        (error.code.as_str(), e.job(&job).exit_code),
        ("JobFailed", Some(139))
    );
    assert!(
        error
            .message
            .contains("rank 1 on nodes/n0 was ended by SIGSEGV"),
        "{error:?}"
    );
    for (name, value) in [
        ("rank", "1"),
        ("node", "nodes/n0"),
        ("exitCode", "139"),
        ("signal", "SIGSEGV"),
        ("stderr", "of rank 1"),
    ] {
        assert_eq!(detail(&error, name), value, "{name}");
    }
    // Of a process that has not failed, or is not the node's, nothing follows.
    for first_failed in [7, -1] {
        let job = e.submit(&format!("j{first_failed}"), 1, two);
        let attempt = e.attempt(&job);
        seen.first_failed = Some(first_failed);
        e.report(&attempt, 0, seen.clone());
        e.see(&job, 0, P::Ended, &[]);
        assert_eq!(codes(&e, &job), ["NodeStopped"]);
        e.ok(C::Delete(Delete {
            name: job.clone(),
            ..Default::default()
        }));
        let attempt = e
            .state
            .attempts
            .values()
            .find(|a| a.job() == Some(&job))
            .cloned();
        if let Some(attempt) = attempt {
            e.see_attempt(&attempt, 0, P::Ended, &[], None);
        }
    }
}

#[test]
fn a_job_whose_work_is_lost_has_not_succeeded_though_all_of_it_ended_well() {
    for undoes_success in [false, true] {
        let mut e = Ensemble::with_nodes(2, 2);
        let job = e.submit("j", 2, pytorch);
        let attempt = e.attempt(&job);
        for i in 0..2 {
            e.see(&job, i, P::Ready, &[]);
        }
        e.see(&job, 0, P::Ended, &[(0, Some(0))]);
        e.see(&job, 1, P::Running, &[(1, Some(0))]);
        assert_eq!(e.state_of(&job), JobState::Running);
        let lost = AttemptObservation {
            phase: P::Ended as i32,
            failure: Some(Failure {
                error: Some(attempts::error("MountUnavailable", "lost in part", &[])),
                undoes_success,
                ..Default::default()
            }),
            ..Default::default()
        };
        e.report(&attempt, 1, lost);
        // What a node met with when it had been decided is not why otherwise.
        let (state, expected) = match undoes_success {
            true => (JobState::Failed, vec!["MountUnavailable".to_owned()]),
            false => (JobState::Succeeded, vec![]),
        };
        assert_eq!((e.state_of(&job), codes(&e, &job)), (state, expected));
    }
}

#[test]
fn what_a_node_could_not_run_goes_to_the_ones_behind_it_and_comes_round() {
    let nodes_of = |e: &Ensemble, job: &str| -> Vec<String> {
        let attempt = e.attempt(job);
        let nodes = attempt.nodes.iter();
        nodes.map(|node| node.node.clone()).collect()
    };
    let fails_by = |e: &mut Ensemble, job: &str, node: usize, infrastructure, code: &str| {
        let attempt = e.attempt(job);
        let failure = Failure {
            error: Some(attempts::error(code, "why", &[])),
            infrastructure,
            ..Default::default()
        };
        e.see_attempt(&attempt, node, P::Ended, &[], Some(failure));
        for other in (0..attempt.nodes.len()).filter(|other| *other != node) {
            e.see_attempt(&attempt, other, P::Ended, &[], None);
        }
    };
    let fails = |e: &mut Ensemble, job: &str, node, infrastructure| {
        fails_by(e, job, node, infrastructure, "GpuUnavailable");
    };
    let mut e = Ensemble::with_nodes(3, 3);
    let job = e.submit("j", 1, |_| {});
    for expected in ["nodes/n0", "nodes/n1", "nodes/n2", "nodes/n0"] {
        assert_eq!(nodes_of(&e, &job), [expected]);
        fails(&mut e, &job, 0, true);
    }
    assert_eq!(e.state_of(&job), JobState::Failed);
    // Waiting for a GPU that a stranger uses is no try, however often.
    let job = e.submit("waits", 1, |_| {});
    for number in 0..7 {
        assert_eq!(nodes_of(&e, &job), [format!("nodes/n{}", number % 3)]);
        fails_by(&mut e, &job, 0, true, "GpuInUse");
    }
    assert_eq!(e.job(&job).infrastructure_retries, 0);
    assert_eq!(nodes_of(&e, &job), ["nodes/n1"]);
    fails_by(&mut e, &job, 0, false, "Own");
    // Of a gang it is the one that failed which counts.
    let job = e.submit("gang", 2, |_| {});
    assert_eq!(nodes_of(&e, &job), ["nodes/n0", "nodes/n1"]);
    fails(&mut e, &job, 0, true);
    assert_eq!(nodes_of(&e, &job), ["nodes/n1", "nodes/n2"]);
    fails(&mut e, &job, 0, true);
    assert_eq!(nodes_of(&e, &job), ["nodes/n0", "nodes/n2"]);
    fails(&mut e, &job, 0, false);
    // A run that the job itself made fail says nothing of its node.
    let job = e.submit("own", 1, retries(1));
    assert_eq!(nodes_of(&e, &job), ["nodes/n0"]);
    fails(&mut e, &job, 0, false);
    assert_eq!(nodes_of(&e, &job), ["nodes/n0"]);
}
