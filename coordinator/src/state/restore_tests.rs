//! Tells what becomes of jobs when a backup is restored while they run.

use batchai_proto::agent::v1::{AttemptObservation, Host, Report, Stray, StrayList};
use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{
    AcceptRestore, AdoptAttempt, DiscardAttempt, Place, PlaceNode, RecordReport, RegisterNode,
    Replica,
};
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::job_attempt_node::Phase as P;

use crate::state::tests::Ensemble;
use crate::state::*;

const SECOND: i64 = 7;

/// Goes back to an earlier State, as a restore does, and has the agents say hello again.
fn restore(e: &mut Ensemble, backup: &State) {
    let own = Replica {
        id: 9,
        ..Replica::default()
    };
    e.become_state(restore::restored(backup.clone(), SECOND, own));
    for name in backup.nodes.keys() {
        register(e, name, false);
    }
}

fn register(e: &mut Ensemble, name: &str, empty: bool) {
    let known = &e.state.nodes[name];
    let register = RegisterNode {
        name: name.to_owned(),
        uid: known.uid.clone(),
        incarnation: known.incarnation.clone(),
        facts: Some((*known.facts).clone()),
        empty,
    };
    e.ok(C::RegisterNode(register));
}

/// A node says what it holds.
fn tell(e: &mut Ensemble, node: &str, epoch: i64, strays: &[Stray]) {
    let known = &e.state.nodes[node];
    let report = RecordReport {
        node: node.to_owned(),
        uid: known.uid.clone(),
        incarnation: known.incarnation.clone(),
        report: Some(Report {
            attempts: Vec::new(),
            strays: Some(StrayList {
                epoch,
                strays: strays.to_vec(),
            }),
            ..Report::default()
        }),
    };
    e.ok(C::RecordReport(report));
    e.settle();
}

/// What a node says of an attempt that the lost State had.
fn stray(attempt: &Attempt, phase: P) -> Stray {
    let host = |n: &attempts::AttemptNode| Host {
        node: n.node.clone(),
        port: n.port,
        ..Host::default()
    };
    Stray {
        seen: Some(AttemptObservation {
            attempt: attempt.id.clone(),
            phase: phase as i32,
            ..Default::default()
        }),
        job: attempt.spec.name.clone(),
        job_uid: attempt.spec.uid.clone(),
        hosts: attempt.nodes.iter().map(host).collect(),
        set_up: false,
    }
}

/// A job that was queued when the backup was made and ran on two nodes when the State was lost.
fn placed_after_the_backup() -> (Ensemble, State, String, Arc<Attempt>) {
    let mut e = Ensemble::with_nodes(2, 0);
    let job = e.submit("j", 2, |_| {});
    for node in ["nodes/n0", "nodes/n1"] {
        e.register(node, "1");
    }
    let backup = e.state.clone();
    e.settle();
    let attempt = e.attempt(&job);
    (e, backup, job, attempt)
}

#[test]
fn nothing_is_placed_before_the_restore_is_accepted_and_every_node_has_said_what_it_holds() {
    let (mut e, backup, job, _) = placed_after_the_backup();
    restore(&mut e, &backup);
    assert!(e.state.revision > backup.revision + 1_000_000);
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Queued);
    let accept = |force| C::AcceptRestore(AcceptRestore { force });
    let refused = e.try_apply(accept(false)).unwrap_err().to_string();
    assert!(refused.contains("nodes/n0, nodes/n1"), "{refused}");
    // What a node says by a list of before the restore says nothing.
    tell(&mut e, "nodes/n0", 1, &[]);
    assert_eq!(restore::absent(&e.state).count(), 2);
    tell(&mut e, "nodes/n0", SECOND, &[]);
    register(&mut e, "nodes/n1", true);
    assert_eq!(
        restore::absent(&e.state).count(),
        1,
        "that says an agent before it has a list"
    );
    tell(&mut e, "nodes/n1", SECOND, &[]);
    e.ok(accept(false));
    assert!(e.try_apply(accept(true)).is_err(), "it is accepted already");
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Running);
    let id = &e.attempt(&job).id;
    assert_eq!(batchai_common::attempt::epoch(id), Some(SECOND));
}

#[test]
fn a_forced_acceptance_keeps_nodes_that_are_not_back_without_work() {
    let (mut e, backup, job, attempt) = placed_after_the_backup();
    restore(&mut e, &backup);
    tell(&mut e, "nodes/n0", SECOND, &[]);
    e.ok(C::AcceptRestore(AcceptRestore { force: true }));
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Queued, "one node is not back");
    tell(&mut e, "nodes/n1", SECOND, &[stray(&attempt, P::Running)]);
    assert_eq!(e.state_of(&job), JobState::Queued, "one node is busy");
    tell(&mut e, "nodes/n1", SECOND, &[]);
    assert_eq!(e.state_of(&job), JobState::Running);
}

#[test]
fn work_that_a_backup_does_not_know_is_adopted_whole_or_not_at_all() {
    let (mut e, backup, job, attempt) = placed_after_the_backup();
    restore(&mut e, &backup);
    let adopt = || {
        C::AdoptAttempt(AdoptAttempt {
            attempt: attempt.id.clone(),
            log_home: 1,
        })
    };
    let part = stray(&attempt, P::Running);
    tell(&mut e, "nodes/n0", SECOND, std::slice::from_ref(&part));
    let refused = e.try_apply(adopt()).unwrap_err().to_string();
    assert!(refused.contains("nodes/n1"), "{refused}");
    let accept = || C::AcceptRestore(AcceptRestore { force: false });
    assert!(e.try_apply(accept()).is_err());
    tell(&mut e, "nodes/n1", SECOND, &[part]);
    let refused = e.try_apply(accept()).unwrap_err().to_string();
    assert!(refused.contains(&attempt.id), "{refused}");
    e.ok(adopt());
    assert_eq!(e.state_of(&job), JobState::Running);
    let adopted = e.attempt(&job);
    assert_eq!(
        (&adopted.id, adopted.phase),
        (&attempt.id, attempts::Phase::Running)
    );
    let list = assignments::assignments(&e.state, "nodes/n1");
    assert_eq!(list.assignments[0].attempt, attempt.id);
    assert!(e.try_apply(adopt()).is_err(), "it is known now");
    // A report by a list of before the adoption does not have it ended.
    tell(&mut e, "nodes/n1", SECOND, &[stray(&attempt, P::Running)]);
    assert!(
        assignments::assignments(&e.state, "nodes/n1")
            .discarded
            .is_empty()
    );
    e.ok(accept());
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    e.see(&job, 1, P::Ended, &[]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
    // What has ended and comes back is told to go.
    tell(&mut e, "nodes/n1", SECOND, &[stray(&attempt, P::Ended)]);
    let discarded = assignments::assignments(&e.state, "nodes/n1").discarded;
    assert_eq!(discarded, std::slice::from_ref(&attempt.id));
    assert_eq!(restore::undecided(&e.state).count(), 0);
}

#[test]
fn what_does_not_fit_is_not_adopted_and_says_why() {
    let (mut e, backup, job, attempt) = placed_after_the_backup();
    let why = |e: &Ensemble| {
        restore::adoptable(&e.state, &attempt.id)
            .err()
            .unwrap_or_default()
    };
    for (part, reason) in [
        (
            Stray {
                set_up: true,
                ..stray(&attempt, P::Running)
            },
            "set-up",
        ),
        (
            Stray {
                job: "other".into(),
                ..stray(&attempt, P::Running)
            },
            "not known",
        ),
        (
            Stray {
                job_uid: "other".into(),
                ..stray(&attempt, P::Running)
            },
            "not known",
        ),
        (
            Stray {
                hosts: stray(&attempt, P::Running).hosts[..1].to_vec(),
                ..stray(&attempt, P::Running)
            },
            "number of nodes",
        ),
    ] {
        restore(&mut e, &backup);
        for node in ["nodes/n0", "nodes/n1"] {
            tell(&mut e, node, SECOND, std::slice::from_ref(&part));
        }
        assert!(why(&e).contains(reason), "{reason}: {}", why(&e));
    }
    restore(&mut e, &backup);
    for node in ["nodes/n0", "nodes/n1"] {
        tell(&mut e, node, SECOND, &[stray(&attempt, P::Running)]);
    }
    assert_eq!(why(&e), "");
    let terminate = batchai_proto::internal::v1::TerminateJob {
        name: job.clone(),
        ..Default::default()
    };
    e.ok(C::TerminateJob(terminate));
    assert!(why(&e).contains("not queued"), "{}", why(&e));
}

#[test]
fn discarded_work_is_ended_and_what_the_backup_knows_goes_on() {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = e.submit("j", 1, |_| {});
    e.see(&job, 0, P::Ready, &[]);
    let (backup, known) = (e.state.clone(), e.attempt(&job));
    restore(&mut e, &backup);
    let unknown = Attempt {
        id: "1-999".into(),
        ..(*known).clone()
    };
    let discard = || {
        C::DiscardAttempt(DiscardAttempt {
            attempt: "1-999".into(),
        })
    };
    assert!(e.try_apply(discard()).is_err(), "nobody has it");
    tell(&mut e, "nodes/n0", SECOND, &[stray(&unknown, P::Running)]);
    assert_eq!(
        assignments::assignments(&e.state, "nodes/n0")
            .discarded
            .len(),
        0
    );
    e.ok(discard());
    let list = assignments::assignments(&e.state, "nodes/n0");
    assert_eq!(
        (list.epoch, list.discarded),
        (SECOND, vec!["1-999".to_owned()])
    );
    // What is being ended still runs.
    let refused = e.try_apply(C::AcceptRestore(AcceptRestore { force: false }));
    assert!(refused.unwrap_err().to_string().contains("1-999"));
    // It is repeated until it is gone, and stays discarded.
    tell(&mut e, "nodes/n0", SECOND, &[stray(&unknown, P::Ended)]);
    assert_eq!(restore::undecided(&e.state).count(), 0);
    tell(&mut e, "nodes/n0", SECOND, &[]);
    assert!(e.state.strays.is_empty());
    e.ok(C::AcceptRestore(AcceptRestore { force: false }));
    assert_eq!(e.state_of(&job), JobState::Running);
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
}

#[test]
fn an_expelled_node_holds_nothing_that_matters() {
    let (mut e, backup, _, attempt) = placed_after_the_backup();
    restore(&mut e, &backup);
    tell(&mut e, "nodes/n0", SECOND, &[stray(&attempt, P::Running)]);
    for node in ["nodes/n0", "nodes/n1"] {
        let name = node.to_owned();
        e.ok(C::ExpelNode(batchai_proto::internal::v1::ExpelNode {
            name,
        }));
    }
    e.ok(C::AcceptRestore(AcceptRestore { force: false }));
    assert!(e.state.strays.is_empty());
}

#[test]
fn what_was_known_and_is_over_needs_no_decision_though_its_job_is_deleted() {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = e.submit("j", 1, |_| {});
    e.see(&job, 0, P::Ready, &[]);
    let (backup, known) = (e.state.clone(), e.attempt(&job));
    restore(&mut e, &backup);
    tell(&mut e, "nodes/n0", SECOND, &[]);
    e.ok(C::AcceptRestore(AcceptRestore { force: false }));
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    e.ok(C::Delete(batchai_proto::internal::v1::Delete {
        name: job.clone(),
        ..Default::default()
    }));
    e.settle();
    assert!(!e.state.attempts.contains_key(&known.id));
    // The node has not forgotten it yet.
    tell(&mut e, "nodes/n0", SECOND, &[stray(&known, P::Ended)]);
    assert_eq!(restore::undecided(&e.state).count(), 0);
    let list = assignments::assignments(&e.state, "nodes/n0");
    assert_eq!(list.discarded, std::slice::from_ref(&known.id));
    tell(&mut e, "nodes/n0", SECOND, &[]);
    assert!(!restore::may_hold_strays(&e.state, "nodes/n0"));
}

#[test]
fn an_older_list_takes_nothing_away_and_a_plan_is_refused_before_the_restore_is_accepted() {
    let (mut e, backup, job, attempt) = placed_after_the_backup();
    restore(&mut e, &backup);
    tell(&mut e, "nodes/n0", SECOND, &[stray(&attempt, P::Running)]);
    tell(&mut e, "nodes/n0", 1, &[]);
    assert_eq!(restore::undecided(&e.state).count(), 1);
    for node in ["nodes/n0", "nodes/n1"] {
        tell(&mut e, node, SECOND, &[]);
    }
    let nodes = ["nodes/n0", "nodes/n1"].into_iter().zip(20_001..);
    let nodes = nodes.map(|(node, port)| PlaceNode {
        node: node.to_owned(),
        node_revision: e.state.nodes[node].revision,
        port,
    });
    let plan = Place {
        job: job.clone(),
        job_revision: e.state.jobs[job.as_str()].revision,
        nodes: nodes.collect(),
        log_home: 1,
    };
    let refused = e.try_apply(C::Place(plan)).unwrap_err().to_string();
    assert!(refused.contains("not accepted"), "{refused}");
}
