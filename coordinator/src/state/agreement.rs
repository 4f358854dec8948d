//! PURE. Whether the replicas hold the same State, and which version of `apply` they all know.
//!
//! Every so many entries one says: compare. Each replica takes its digest at that entry and tells the leader; what the majority has is
//! decided by another entry. Who has another one stops. Without a majority nothing is written any more, until the membership has
//! changed and the replicas agree. Taking digests and counting them is not done here.

use batchai_common::fault;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{CompareStates, DecideComparison, RaiseFeatureLevel};

use super::digest::Digest;
use super::{ENSEMBLE, Rejection, State, Step, replicas};

/// Entries of the log from one comparison to the next.
pub const COMPARE_EVERY: u64 = 500;
/// What this version of `apply` knows. A change in what it does with a command is one more, and is done from that level on only.
pub const FEATURE_LEVEL: u32 = 1;

/// The comparisons so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// The entry at which the replicas compare their States; 0 where it is to be done anew.
    pub begun: u64,
    /// The entry of the latest comparison that was decided; 0 before the first.
    pub decided: u64,
    /// What the majority had there; none where there was no majority.
    pub digest: Option<Digest>,
}

/// Since which entry the replicas are known to disagree without a majority.
pub fn disputed(state: &State) -> Option<u64> {
    let comparison = &state.comparison;
    (comparison.decided > 0 && comparison.digest.is_none()).then_some(comparison.decided)
}

/// Without a majority nothing changes but who belongs to the ensemble, and what comes of that.
pub(super) fn check(state: &State, command: &Kind) -> Result<(), Rejection> {
    let Some(index) = disputed(state).filter(|_| !fault!("written_without_a_majority")) else {
        return Ok(());
    };
    match command {
        Kind::CompareStates(_)
        | Kind::DecideComparison(_)
        | Kind::ChangeReplica(_)
        | Kind::RecordReplica(_) => Ok(()),
        _ => Err(Rejection::WrongState {
            name: ENSEMBLE.to_owned(),
            why: format!(
                "its replicas disagree about what is in it, since entry {index} of the log, and none has a majority: nothing is written. Remove \
                 the replicas that are wrong, or restore a backup"
            ),
        }),
    }
}

/// What is due of comparing and of levels.
pub fn duties(state: &State) -> impl Iterator<Item = Kind> {
    let behind = state.applied_index.saturating_sub(state.comparison.begun);
    let compare = (behind >= COMPARE_EVERY || state.comparison.begun == 0)
        .then_some(Kind::CompareStates(CompareStates {}));
    let all = replicas::members(state).map(|replica| replica.feature_level);
    let level = all.min().unwrap_or_default().min(FEATURE_LEVEL);
    let raise = (level > state.feature_level)
        .then_some(Kind::RaiseFeatureLevel(RaiseFeatureLevel { level }));
    compare.into_iter().chain(raise)
}

pub(super) fn begin(step: &mut Step<'_>) {
    step.state.comparison.begun = step.state.applied_index;
}

pub(super) fn decide(step: &mut Step<'_>, command: &DecideComparison) -> Result<(), Rejection> {
    let comparison = &mut step.state.comparison;
    if command.index <= comparison.decided || command.index > comparison.begun {
        return Err(Rejection::Overtaken {
            name: ENSEMBLE.to_owned(),
            why: "another comparison was decided".to_owned(),
        });
    }
    comparison.decided = command.index;
    comparison.digest = Digest::read(&command.digest);
    Ok(())
}

/// Raises the level; it never falls.
pub(super) fn raise(step: &mut Step<'_>, command: &RaiseFeatureLevel) -> Result<(), Rejection> {
    if command.level > FEATURE_LEVEL && !fault!("unknown_level_taken") {
        // Going on would be to apply what follows by rules that are not known here.
        return Err(Rejection::Unknown);
    }
    step.state.feature_level = step.state.feature_level.max(command.level);
    Ok(())
}
