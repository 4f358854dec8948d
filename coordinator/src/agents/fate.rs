//! What became of what an agent has said, as the leader tells it to the replica that has the agent's session.

use batchai_proto::internal::v1::{RelayedAnswer, RelayedRefusal, relayed_answer};

use crate::replica::ReplicaError;
use crate::state::Rejection;

/// As it is sent.
pub fn told(ticket: u64, result: Result<i64, ReplicaError>) -> RelayedAnswer {
    let outcome = match result {
        Ok(revision) => relayed_answer::Outcome::Revision(revision),
        Err(ReplicaError::Rejected(Rejection::WrongState { name, why })) => {
            relayed_answer::Outcome::Refusal(RelayedRefusal { name, why })
        }
        Err(error @ (ReplicaError::Rejected(_) | ReplicaError::Refused(_))) => {
            relayed_answer::Outcome::Refused(error.to_string())
        }
        Err(error) => relayed_answer::Outcome::Unknown(error.to_string()),
    };
    RelayedAnswer {
        ticket,
        outcome: Some(outcome),
    }
}

/// As it is understood.
pub fn outcome(answer: RelayedAnswer) -> Result<i64, ReplicaError> {
    match answer.outcome {
        Some(relayed_answer::Outcome::Revision(revision)) => Ok(revision),
        Some(relayed_answer::Outcome::Refusal(refusal)) => {
            let (name, why) = (refusal.name, refusal.why);
            Err(Rejection::WrongState { name, why }.into())
        }
        Some(relayed_answer::Outcome::Refused(why)) => Err(ReplicaError::Refused(why)),
        Some(relayed_answer::Outcome::Unknown(why)) => {
            tracing::debug!(why, "what became of a report is not known");
            Err(ReplicaError::Unknown)
        }
        None => Err(ReplicaError::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_not_said_again_and_what_is_unknown_is() {
        let there_and_back = |error: ReplicaError| outcome(told(1, Err(error))).unwrap_err();
        let refused = Rejection::WrongState {
            name: "nodes/a".to_owned(),
            why: "so".to_owned(),
        };
        let limit = Rejection::Overtaken {
            name: "nodes/a".to_owned(),
            why: "so".to_owned(),
        };
        assert_eq!(outcome(told(1, Ok(7))).unwrap(), 7);
        let back = there_and_back(refused.clone().into());
        assert!(matches!(back, ReplicaError::Rejected(same) if same == refused));
        assert!(matches!(
            there_and_back(limit.into()),
            ReplicaError::Refused(_)
        ));
        for lost in [
            ReplicaError::NotLeader,
            ReplicaError::Unknown,
            ReplicaError::TimedOut,
        ] {
            assert!(matches!(there_and_back(lost), ReplicaError::Unknown));
        }
    }
}
