//! Parameter servers: they are not waited for, and one that dies while the workers run is why the job failed.

use batchai_proto::agent::v1::AttemptObservation;
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::job_attempt_node::Phase as P;

use crate::state::attempts::Phase;
use crate::state::tests::Ensemble;
use crate::state::*;

/// Two workers, ranks 0 and 1, and a server, rank 2, which is beside the first; all of them run.
fn training() -> (Ensemble, String) {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|job| {
        job.custom_toolkit_settings = None;
        job.tensor_flow_settings = Some(v1::TensorFlowSettings {
            worker_count: 2,
            parameter_server_count: 1,
            ..Default::default()
        });
    });
    e.see(&job, 0, P::Running, &[(0, None), (2, None)]);
    e.see(&job, 1, P::Running, &[(1, None)]);
    (e, job)
}

#[test]
fn a_job_is_over_when_its_workers_are_and_how_its_servers_end_then_does_not_matter() {
    let (mut e, job) = training();
    e.see(&job, 0, P::Running, &[(0, Some(0)), (2, None)]);
    assert_eq!(e.attempt(&job).phase, Phase::Running);
    e.see(&job, 1, P::Ended, &[(1, Some(0))]);
    assert_eq!(e.attempt(&job).phase, Phase::Ending, "the server is ended");
    assert_eq!(e.state_of(&job), JobState::Running);
    e.see(&job, 0, P::Ended, &[(0, Some(0)), (2, Some(137))]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
    assert_eq!(e.job(&job).exit_code, Some(0));
}

#[test]
fn a_server_that_dies_while_the_workers_run_is_named_and_fails_the_job() {
    let (mut e, job) = training();
    let attempt = e.attempt(&job);
    let ranks = [(0, None), (2, Some(134))];
    let ranks = ranks.map(|(rank, exit_code)| v1::JobRank {
        rank,
        exit_code,
        ..Default::default()
    });
    let seen = AttemptObservation {
        phase: P::Running as i32,
        ranks: ranks.to_vec(),
        first_failed: Some(2),
        ..Default::default()
    };
    e.report(&attempt, 0, seen);
    for i in 0..2 {
        e.see(&job, i, P::Ended, &[]);
    }
    assert_eq!(e.state_of(&job), JobState::Failed);
    let message = &e.job(&job).errors[0].message;
    assert!(
        message.contains("rank 2 (parameter server 0) on nodes/n0"),
        "{message}"
    );
}

#[test]
fn a_server_that_is_done_early_is_no_failure() {
    let (mut e, job) = training();
    e.see(&job, 0, P::Running, &[(0, None), (2, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Running);
    e.see(&job, 0, P::Ended, &[(0, Some(0)), (2, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Running, "a worker runs");
    e.see(&job, 1, P::Ended, &[(1, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
}
