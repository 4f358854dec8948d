//! Who belongs to an ensemble, and who does not any more.

use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{ChangeReplica, RecordReplica};

use crate::state::replicas::members;
use crate::state::tests::Ensemble;

fn change(id: u64, role: Role) -> C {
    C::ChangeReplica(ChangeReplica {
        id,
        role: role as i32,
        endpoint: format!("https://replica-{id}:1"),
    })
}

fn record(id: u64, store: &str) -> C {
    C::RecordReplica(RecordReplica {
        id,
        store: store.into(),
        ..Default::default()
    })
}

/// Two that vote.
fn two() -> Ensemble {
    let mut e = Ensemble::with_nodes(0, 0);
    for id in [1, 2] {
        e.ok(change(id, Role::Learner));
        e.ok(change(id, Role::Voter));
    }
    e
}

#[test]
fn a_removed_id_is_not_used_again_and_the_last_vote_stays() {
    let mut e = two();
    e.ok(change(2, Role::Removed));
    for role in [Role::Learner, Role::Voter, Role::Removed] {
        assert!(e.try_apply(change(2, role)).is_err(), "{role:?}");
    }
    assert_eq!(members(&e.state).count(), 1);
    assert!(
        e.try_apply(change(1, Role::Removed)).is_err(),
        "it is the last one"
    );
    e.ok(change(3, Role::Learner));
    assert!(
        e.try_apply(change(1, Role::Removed)).is_err(),
        "a learner has no vote"
    );
}

#[test]
fn a_replica_never_gets_another_store() {
    let mut e = two();
    e.ok(record(1, "first"));
    e.ok(record(1, "first"));
    assert!(e.try_apply(record(1, "second")).is_err());
    assert_eq!(e.state.replicas[&1].store, "first");
    assert!(e.try_apply(record(7, "any")).is_err(), "it is not there");
}
