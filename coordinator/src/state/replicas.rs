//! PURE. Who belongs to the ensemble. What raft makes of it is decided where the log is applied: a change of membership and the
//! command that records it are one entry, and where the command is rejected the membership stays.

use batchai_common::fault;
use std::sync::Arc;

use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{ChangeReplica, InitEnsemble, RecordReplica, Replica};

use super::{Rejection, State, Step, agreement};

/// Replicas that may belong to an ensemble at once, those without a vote included.
const REPLICAS_MAX: usize = 9;

pub(super) fn init_ensemble(state: &mut State, command: &InitEnsemble) -> Result<(), Rejection> {
    if !state.ensemble.is_empty() {
        return Err(Rejection::Overtaken {
            name: state.ensemble.clone(),
            why: "the ensemble has its name already".to_owned(),
        });
    }
    state.ensemble.clone_from(&command.ensemble);
    state.epoch = command.epoch;
    let replicas = command.replicas.iter();
    state.replicas = replicas.map(|r| (r.id, Arc::new(r.clone()))).collect();
    Ok(())
}

/// Takes a replica in without a vote, gives it one, or removes it.
pub(super) fn change(step: &mut Step<'_>, command: &ChangeReplica) -> Result<(), Rejection> {
    let refuse = |why: &str| {
        Err(Rejection::WrongState {
            name: name(command.id),
            why: why.to_owned(),
        })
    };
    let known = step.state.replicas.get(&command.id).cloned();
    let role = known.as_ref().map(|known| known.role());
    let role = role.filter(|role| *role != Role::Removed || !fault!("removed_id_used_again"));
    let replica = match (command.role(), role) {
        (Role::Learner, None) => {
            let there = members(step.state).count();
            if there >= REPLICAS_MAX {
                return refuse(&format!(
                    "the ensemble has {there} replicas, as many as it may"
                ));
            }
            Replica {
                id: command.id,
                endpoint: command.endpoint.clone(),
                ..Replica::default()
            }
        }
        (Role::Learner, Some(Role::Removed)) => {
            return refuse("it was removed, and its id is not used again: take another");
        }
        (Role::Learner, Some(_)) => return refuse("it belongs to the ensemble already"),
        (Role::Voter, Some(Role::Learner)) => (*known.unwrap_or_default()).clone(),
        (Role::Voter, Some(Role::Voter)) => return refuse("it has a vote already"),
        (Role::Removed, Some(Role::Voter))
            if voters(step.state) == 1 && !fault!("last_voter_removed") =>
        {
            return refuse("it is the last one with a vote");
        }
        (Role::Removed, Some(Role::Learner | Role::Voter)) => (*known.unwrap_or_default()).clone(),
        _ => return refuse("it does not belong to the ensemble"),
    };
    let replica = Replica {
        role: command.role,
        ..replica
    };
    step.state.replicas.insert(command.id, Arc::new(replica));
    if agreement::disputed(step.state).is_some() {
        // Those that are left may agree.
        step.state.comparison.begun = 0;
    }
    Ok(())
}

/// Records where a replica is reached, and the store that it has; it never gets another one.
pub(super) fn record(step: &mut Step<'_>, command: &RecordReplica) -> Result<(), Rejection> {
    let Some(known) = step.state.replicas.get_mut(&command.id) else {
        return Err(Rejection::Overtaken {
            name: name(command.id),
            why: "it does not belong to the ensemble".to_owned(),
        });
    };
    if !known.store.is_empty() && known.store != command.store && !fault!("another_store_taken") {
        return Err(Rejection::WrongState {
            name: name(command.id),
            why: "it has another store".to_owned(),
        });
    }
    let known = Arc::make_mut(known);
    known.store.clone_from(&command.store);
    known.feature_level = command.feature_level;
    if !command.endpoint.is_empty() {
        known.endpoint.clone_from(&command.endpoint);
    }
    Ok(())
}

/// As messages call a replica.
pub fn name(id: u64) -> String {
    format!("replicas/{id}")
}

/// Those that belong to the ensemble.
pub fn members(state: &State) -> impl Iterator<Item = &Arc<Replica>> {
    let removed = Role::Removed;
    state
        .replicas
        .values()
        .filter(move |r| fault!("removed_replica_counted") || r.role() != removed)
}

fn voters(state: &State) -> usize {
    members(state).filter(|r| r.role() == Role::Voter).count()
}

#[cfg(test)]
#[path = "replicas_tests.rs"]
mod tests;
