//! PURE. Whether an attempt is over, and how: read from what its nodes have seen, by the toolkit's rule.

use batchai_common::ranks::Layout;
use batchai_common::signals;
use batchai_proto::agent::v1::Failure;
use batchai_proto::internal::v1::terminate_job::Cause;
use batchai_proto::shared;
use batchai_proto::v1;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;

use super::attempts::{Attempt, AttemptNode, Phase, Work};

/// Processes of other nodes that an error names.
const OTHERS_MAX: usize = 5;

/// How an attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Succeeded,
    Failed,
    /// Back to the queue, nobody's fault.
    Requeue,
    /// Back to the queue as often as the bound allows.
    InfrastructureFailed,
    /// The run failed, and the job has retries left: back to the queue.
    Retry,
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
            Cause::NodeReleased => (
                "JobTerminated",
                "the job was terminated because a node of it was taken from its cluster, which terminates jobs then \
                 (nodeDeallocationOption)",
            ),
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
    pub fn requeue_for_resize(node: &str) -> Outcome {
        let message = format!("{node} was taken from its cluster");
        let error = error("NodeReleased", &message, &[("node", node)]);
        Outcome::new(Verdict::Requeue, None, vec![error])
    }
}

/// The processes that a job's toolkit starts, and their nodes.
pub fn layout(spec: &v1::Job) -> Layout {
    let servers = spec.tensor_flow_settings.as_ref();
    let servers = servers.map_or(0, |settings| settings.parameter_server_count);
    Layout {
        nodes: usize::try_from(spec.node_count).unwrap_or_default(),
        workers: rank_count(spec),
        servers: usize::try_from(servers).unwrap_or_default(),
    }
}

/// How many ports an attempt has on its i-th node, from the one that it was placed with upwards: TensorFlow needs one for each
/// of its processes, the others one for their rendezvous. The first node has one more, the last, where it may have to serve the directory
/// that the job's nodes share.
pub fn port_count(spec: &v1::Job, index: usize) -> i32 {
    let count = match spec.tensor_flow_settings {
        Some(_) => layout(spec).of(index).count().max(1),
        None => 1,
    };
    let serves = index == 0 && spec.node_count > 1 && shared::is_named(spec);
    i32::try_from(count + usize::from(serves)).unwrap_or(i32::MAX)
}

/// How many processes of a job's toolkit it waits for, over all nodes; what starts others by itself, as mpirun does, is one.
pub fn rank_count(spec: &v1::Job) -> usize {
    if let Some(settings) = &spec.tensor_flow_settings {
        return usize::try_from(settings.worker_count.max(1)).unwrap_or(1);
    }
    if spec.caffe2_settings.is_some() {
        return usize::try_from(spec.node_count).unwrap_or(1);
    }
    let count = match (&spec.py_torch_settings, &spec.custom_toolkit_settings) {
        (Some(s), _) if s.communication_backend == "mpi" => 1,
        (Some(s), _) if s.process_count > 0 => s.process_count,
        (Some(_), _) => spec.node_count,
        (None, Some(s)) if s.processes_per_node > 0 => s.processes_per_node * spec.node_count,
        (None, _) => 1,
    };
    usize::try_from(count).unwrap_or(1)
}

impl Attempt {
    /// Of the nodes of an attempt all of which were ready, those that have not said that they started its processes, with their places.
    pub fn unstarted(&self) -> impl Iterator<Item = (usize, &AttemptNode)> {
        let launching = self.phase == Phase::Running;
        let nodes = self.nodes.iter().enumerate();
        nodes.filter(move |(_, node)| launching && node.phase < NodePhase::Running)
    }
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

/// Something uses a GPU that is no job: it may be done with it, and waiting for that is no try.
const WAITS: &str = "GpuInUse";

/// What is said to have gone wrong, by a node where one says it. A run that failed is taken for one that is tried again: who decides
/// knows how often.
pub(super) fn failed(failure: &Failure, node: Option<&str>) -> Outcome {
    let waits = failure.error.as_ref().is_some_and(|it| it.code == WAITS);
    let verdict = match (failure.infrastructure, failure.ends_job) {
        (true, _) if waits => Verdict::Requeue,
        (true, _) => Verdict::InfrastructureFailed,
        (false, true) => Verdict::Failed,
        (false, false) => Verdict::Retry,
    };
    let unsaid = || error("NodeFailed", "the node did not say what went wrong", &[]);
    let mut error = failure.error.clone().unwrap_or_else(unsaid);
    let node = node.filter(|_| error.details.iter().all(|d| d.name != "node"));
    error.details.extend(node.map(|node| v1::NameValuePair {
        name: "node".to_owned(),
        value: node.to_owned(),
    }));
    Outcome::new(verdict, failure.exit_code, vec![error])
}

/// The first process that failed. Of those of one node it says so itself. Those of several nodes are never weighed against each other,
/// as their clocks cannot be: the first node that told of one has had it decided.
fn first_failed(attempt: &Attempt) -> Option<(&AttemptNode, &v1::JobRank)> {
    let nodes = attempt.nodes.iter();
    let ranks = nodes.flat_map(|node| node.ranks.iter().map(move |rank| (node, rank)));
    let failed = ranks.filter(|(_, rank)| rank.exit_code.is_some_and(|code| code != 0));
    failed.min_by_key(|(node, rank)| (node.first_failed != Some(rank.rank), rank.rank))
}

/// How a process ended, and what that means.
fn how(rank: &v1::JobRank) -> String {
    let code = rank.exit_code.unwrap_or_default();
    match (rank.signal.as_str(), signals::of_exit_code(code), code) {
        ("", _, 126) => {
            "ended with exit code 126: so says a shell whose command is not executable".to_owned()
        }
        ("", _, 127) => {
            "ended with exit code 127: so says a shell that finds no such command".to_owned()
        }
        ("", None, code) => format!("ended with exit code {code}"),
        ("", Some(signal), code) => {
            format!("ended with exit code {code}: so says a shell whose command {signal} has ended")
        }
        (signal, _, code) => format!("was ended by {signal}, which counts as exit code {code}"),
    }
}

/// A process by its number, and by what it is where it is no worker.
fn who(attempt: &Attempt, rank: i32) -> String {
    let server = usize::try_from(rank).ok();
    match server.and_then(|rank| layout(&attempt.spec).server(rank)) {
        Some(server) => format!("rank {rank} (parameter server {server})"),
        None => format!("rank {rank}"),
    }
}

fn process_failed(attempt: &Attempt, node: &AttemptNode, rank: &v1::JobRank) -> Outcome {
    let code = rank.exit_code.unwrap_or_default();
    let (number, name, how) = (rank.rank, &node.node, how(rank));
    let who = who(attempt, number);
    let (kind, message) = match attempt.work {
        Work::Job(_) => (
            "JobFailed",
            format!("Job failed with non-zero exit code: {who} on {name} {how}"),
        ),
        Work::SetUp => (
            "SetupTaskFailed",
            format!("the set-up task {how} on {name}"),
        ),
    };
    let signal = match rank.signal.as_str() {
        "" => signals::of_exit_code(code).unwrap_or_default(),
        signal => signal,
    };
    let (number, exit_code) = (number.to_string(), code.to_string());
    let details = [
        ("rank", number.as_str()),
        ("node", name),
        ("exitCode", &exit_code),
        ("signal", signal),
        ("stderr", &node.last_words),
    ];
    let details: Vec<_> = details.into_iter().filter(|d| !d.1.is_empty()).collect();
    let error = error(kind, &message, &details);
    Outcome::new(Verdict::Retry, Some(code), vec![error])
}

/// How an attempt that is over has ended, with the processes that failed by themselves on other nodes than the one that was heard of
/// first: that need not be the one where it began.
pub(super) fn with_others(attempt: &Attempt, outcome: &Outcome) -> Outcome {
    let mut outcome = outcome.clone();
    let Some(error) = outcome.errors.iter_mut().find(|e| e.code == "JobFailed") else {
        return outcome;
    };
    let named = error.details.iter().find(|d| d.name == "node");
    let named = named.map(|detail| detail.value.clone());
    let others = attempt.nodes.iter().filter_map(|node| {
        let rank = node
            .ranks
            .iter()
            .find(|r| node.first_failed == Some(r.rank))?;
        let other = named.as_ref() != Some(&node.node);
        let who = who(attempt, rank.rank);
        other.then(|| format!("{who} on {} {}", node.node, how(rank)))
    });
    let others: Vec<_> = others.take(OTHERS_MAX).collect();
    if !others.is_empty() {
        error.details.push(v1::NameValuePair {
            name: "otherRanks".to_owned(),
            value: others.join("; "),
        });
    }
    outcome
}

/// The toolkit's rule: is the job over, and how? The first failure decides; without one, the job is over when all of its
/// ranks are: of a custom job that is one process on the master, unless it asks for some on every node. Parameter servers are not
/// waited for.
pub fn verdict(attempt: &Attempt) -> Option<Outcome> {
    if let Some((node, rank)) = first_failed(attempt) {
        return Some(process_failed(attempt, node, rank));
    }
    let count = attempt.rank_count();
    let own = |rank: i32| usize::try_from(rank).is_ok_and(|rank| rank < count);
    let ranks = attempt.nodes.iter().flat_map(|node| &node.ranks);
    let done = ranks
        .filter(|r| r.exit_code == Some(0) && own(r.rank))
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
    let (node, what) = match (lost, early) {
        (Some(node), _) => (
            node,
            "lost the attempt: nobody knows how its processes ended",
        ),
        (None, Some(node)) => (node, "ended the attempt without being told to"),
        (None, None) if all_ended => (attempt.nodes.first()?, "never started a rank"),
        (None, None) => return None,
    };
    let node = &node.node;
    Some(Outcome::node_lost(node, &format!("{node} {what}"), true))
}

fn ranks_are_done(node: &AttemptNode) -> bool {
    !node.ranks.is_empty() && node.ranks.iter().all(|rank| rank.exit_code.is_some())
}
