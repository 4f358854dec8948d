//! PURE. Whether an attempt is over, and how: read from what its nodes have seen, by the toolkit's rule.

use batchai_proto::agent::v1::Failure;
use batchai_proto::internal::v1::terminate_job::Cause;
use batchai_proto::v1;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;

use super::attempts::{Attempt, AttemptNode, Work};

/// How an attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Succeeded,
    Failed,
    /// Back to the queue, nobody's fault.
    Requeue,
    /// Back to the queue as often as the bound allows.
    InfrastructureFailed,
}

/// How an attempt ends, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub exit_code: Option<i32>,
    pub errors: Vec<v1::ResourceError>,
}

impl Outcome {
    fn new(verdict: Verdict, exit_code: Option<i32>, errors: Vec<v1::ResourceError>) -> Outcome {
        Outcome {
            verdict,
            exit_code,
            errors,
        }
    }

    /// It was told to end.
    pub fn terminated(cause: Cause) -> Outcome {
        let (code, message) = match cause {
            Cause::Unspecified => ("JobTerminated", "the job was terminated by the user"),
            Cause::ClusterDeleted => ("ClusterDeleted", "the job's cluster was deleted"),
        };
        Outcome::new(Verdict::Failed, None, vec![error(code, message, &[])])
    }

    /// A node of it is gone, or not heard of for too long.
    pub(super) fn node_lost(node: &str, message: &str, runs_again: bool) -> Outcome {
        let verdict = match runs_again {
            true => Verdict::InfrastructureFailed,
            false => Verdict::Failed,
        };
        let error = error("NodeLost", message, &[("node", node)]);
        Outcome::new(verdict, None, vec![error])
    }

    /// Its node is needed elsewhere.
    pub fn requeue_for_resize() -> Outcome {
        Outcome::new(Verdict::Requeue, None, Vec::new())
    }
}

/// How many processes a job's toolkit starts over all nodes.
pub fn rank_count(spec: &v1::Job) -> usize {
    let count = match (&spec.py_torch_settings, &spec.custom_toolkit_settings) {
        (Some(s), _) if s.process_count > 0 => s.process_count,
        (Some(_), _) => spec.node_count,
        (None, Some(s)) if s.processes_per_node > 0 => s.processes_per_node * spec.node_count,
        (None, _) => 1,
    };
    usize::try_from(count).unwrap_or(1)
}

/// An error for a job.
pub fn error(code: &str, message: &str, details: &[(&str, &str)]) -> v1::ResourceError {
    let details = details.iter().map(|(name, value)| v1::NameValuePair {
        name: (*name).to_owned(),
        value: (*value).to_owned(),
    });
    v1::ResourceError {
        code: code.to_owned(),
        message: message.to_owned(),
        details: details.collect(),
    }
}

/// What a node says went wrong.
pub(super) fn failed(failure: &Failure) -> Outcome {
    let verdict = if failure.infrastructure {
        Verdict::InfrastructureFailed
    } else {
        Verdict::Failed
    };
    let unsaid = || error("NodeFailed", "the node did not say what went wrong", &[]);
    let error = failure.error.clone().unwrap_or_else(unsaid);
    Outcome::new(verdict, failure.exit_code, vec![error])
}

/// The toolkit's rule: is the job over, and how? The first failure decides; without one, the job is over when all of its
/// ranks are: of a custom job that is one process on the master, unless it asks for some on every node.
pub fn verdict(attempt: &Attempt) -> Option<Outcome> {
    let ranks = || {
        attempt
            .nodes
            .iter()
            .flat_map(|node| node.ranks.iter().map(move |r| (node, r)))
    };
    let failure = ranks().filter(|(_, r)| r.exit_code.is_some_and(|code| code != 0));
    if let Some((node, rank)) = failure.min_by_key(|(_, r)| r.rank) {
        let code = rank.exit_code.unwrap_or_default();
        let (kind, message) = match attempt.work {
            Work::Job(_) => (
                "JobFailed",
                format!(
                    "Job failed with non-zero exit code: rank {} on {} ended with {code}",
                    rank.rank, node.node
                ),
            ),
            Work::SetUp => (
                "SetupTaskFailed",
                format!(
                    "the set-up task ended with exit code {code} on {}",
                    node.node
                ),
            ),
        };
        let details = [
            ("rank", rank.rank.to_string()),
            ("node", node.node.clone()),
            ("exitCode", code.to_string()),
            ("stderr", node.last_words.clone()),
        ];
        let details: Vec<_> = details
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        let error = error(kind, &message, &details);
        return Some(Outcome::new(Verdict::Failed, Some(code), vec![error]));
    }
    let count = attempt.rank_count();
    let own = |rank: i32| usize::try_from(rank).is_ok_and(|rank| rank < count);
    let done = ranks()
        .filter(|(_, r)| r.exit_code == Some(0) && own(r.rank))
        .count();
    if done == count {
        return Some(Outcome::new(Verdict::Succeeded, Some(0), Vec::new()));
    }
    let lost = attempt.nodes.iter().find(|n| n.phase == NodePhase::Lost);
    let early = attempt
        .nodes
        .iter()
        .find(|n| n.phase == NodePhase::Ended && !ranks_are_done(n));
    let all_ended = attempt.nodes.iter().all(|n| n.phase == NodePhase::Ended);
    let (node, message) = match (lost, early) {
        (Some(node), _) => (
            node,
            "the node lost the attempt: nobody knows how its processes ended",
        ),
        (None, Some(node)) => (node, "the node ended the attempt without being told to"),
        (None, None) if all_ended => (attempt.nodes.first()?, "a rank was never started"),
        (None, None) => return None,
    };
    let error = error("NodeLost", message, &[("node", &node.node)]);
    Some(Outcome::new(
        Verdict::InfrastructureFailed,
        None,
        vec![error],
    ))
}

fn ranks_are_done(node: &AttemptNode) -> bool {
    !node.ranks.is_empty() && node.ranks.iter().all(|rank| rank.exit_code.is_some())
}
