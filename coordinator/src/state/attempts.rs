//! PURE. Attempts: where a job's life is decided.
//!
//! ```text
//! place -> Preparing -> Running -> Ending -> ended
//!             |  \____________________^
//!             every node READY        a verdict; every node ENDED or LOST
//! ```
//! Nodes say what they observe (`record`); `verdict` reads from that, by the toolkit's rule, whether the job is over
//! and how; `advance` moves the attempt on. An attempt id is never used again, and no attempt of a job is placed
//! before every node of the one before is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_common::ranks;
use batchai_proto::agent::v1::{AttemptObservation, Failure};
use batchai_proto::internal::v1::terminate_job::Cause;
use batchai_proto::internal::v1::{FailAttempt, Place, RecordReport};
use batchai_proto::v1;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;
use prost_types::Timestamp;

use super::{Rejection, State, Step, jobs, keys, nodes, not_found};

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

    /// Its node is needed elsewhere.
    pub fn requeue_for_resize() -> Outcome {
        Outcome::new(Verdict::Requeue, None, Vec::new())
    }
}

/// Where an attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Preparing,
    Running,
    Ending,
    Ended,
}

/// One node's part in an attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct AttemptNode {
    pub node: String,
    /// For the attempt's rendezvous.
    pub port: i32,
    pub phase: NodePhase,
    pub ranks: Vec<v1::JobRank>,
    pub files: Vec<v1::JobLogFile>,
}

/// One try at running a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub id: String,
    pub number: i32,
    pub job: String,
    /// The job as it was placed: what the nodes work from.
    pub spec: Arc<v1::Job>,
    pub create_time: Timestamp,
    pub phase: Phase,
    /// The master first.
    pub nodes: Vec<AttemptNode>,
    pub outcome: Option<Outcome>,
    /// The replica that keeps the second copy of its logs.
    pub log_home: i64,
}

impl Attempt {
    /// How many processes the toolkit starts over all nodes.
    pub fn rank_count(&self) -> usize {
        rank_count(&self.spec)
    }

    /// For API replies.
    pub fn view(&self) -> v1::JobAttempt {
        let nodes = self.nodes.iter().map(|n| v1::JobAttemptNode {
            node: n.node.clone(),
            phase: n.phase as i32,
            ranks: n.ranks.clone(),
            files: n.files.clone(),
        });
        v1::JobAttempt {
            id: self.id.clone(),
            number: self.number,
            nodes: nodes.collect(),
        }
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

/// Re-validates a placement whole; all of its nodes start or none.
pub(super) fn place(step: &mut Step<'_>, plan: &Place) -> Result<(), Rejection> {
    let state = &*step.state;
    let job = state
        .jobs
        .get(&plan.job)
        .cloned()
        .ok_or_else(|| not_found(Kind::Job, &plan.job))?;
    let overtaken = |name: &str, why: &str| Rejection::Overtaken {
        name: name.to_owned(),
        why: why.to_owned(),
    };
    if job.state != v1::job::State::Queued || job.revision != plan.job_revision {
        return Err(overtaken(&plan.job, "it changed since the plan was made"));
    }
    if plan.nodes.len() != usize::try_from(job.spec.node_count).unwrap_or_default() {
        return Err(overtaken(&plan.job, "the plan has another number of nodes"));
    }
    let mut seen = BTreeSet::new();
    let mut ports = ports_by_machine(state);
    for placed in &plan.nodes {
        let node = state.nodes.get(&placed.node);
        let node = node.ok_or_else(|| not_found(Kind::Node, &placed.node))?;
        let usable = node.revision == placed.node_revision
            && node.cluster.as_ref() == Some(&job.spec.cluster)
            && node.attempt.is_none()
            && !node.leaving;
        if !usable || !seen.insert(&placed.node) {
            return Err(overtaken(
                &placed.node,
                "it is not free as it was when planned",
            ));
        }
        if !ports.insert((node.facts.boot_id.clone(), placed.port)) {
            return Err(overtaken(&placed.node, "the port is taken on its machine"));
        }
    }
    let id = format!("{}-{}", state.epoch, state.revision);
    let attempt = Attempt {
        id: id.clone(),
        number: job.attempts + 1,
        job: plan.job.clone(),
        spec: job.spec.clone(),
        create_time: state.time,
        phase: Phase::Preparing,
        nodes: plan
            .nodes
            .iter()
            .map(|placed| AttemptNode {
                node: placed.node.clone(),
                port: placed.port,
                phase: NodePhase::Preparing,
                ranks: Vec::new(),
                files: Vec::new(),
            })
            .collect(),
        outcome: None,
        log_home: plan.log_home,
    };
    step.state.attempts.insert(id.clone(), Arc::new(attempt));
    jobs::start(step, &plan.job, &id);
    for placed in &plan.nodes {
        nodes::change(step, &placed.node, |node| node.attempt = Some(id.clone()));
        nodes::assign(step, &placed.node);
    }
    Ok(())
}

/// The ports that live attempts hold, by node.
pub fn ports_in_use(state: &State) -> impl Iterator<Item = (&str, i32)> {
    live(state).flat_map(|attempt| attempt.nodes.iter().map(|n| (n.node.as_str(), n.port)))
}

/// The attempts that have nodes. The table also holds the last one of every job that has ended: it is not walked.
pub fn live(state: &State) -> impl Iterator<Item = &Arc<Attempt>> {
    let ids: BTreeSet<_> = state
        .nodes
        .values()
        .filter_map(|node| node.attempt.as_ref())
        .collect();
    ids.into_iter().filter_map(|id| state.attempts.get(id))
}

/// The same by machine: nodes that share a boot id share a machine, and a port belongs to one attempt on it.
pub fn ports_by_machine(state: &State) -> BTreeSet<(String, i32)> {
    let machine = |name: &str| Some(state.nodes.get(name)?.facts.boot_id.clone());
    ports_in_use(state)
        .filter_map(|(name, port)| Some((machine(name)?, port)))
        .collect()
}

/// Takes in what a node observed. What is about attempts that are over or never were is dropped.
pub(super) fn record(step: &mut Step<'_>, command: &RecordReport) -> Result<(), Rejection> {
    let node = step.state.nodes.get(&command.node);
    let node = node.ok_or_else(|| not_found(Kind::Node, &command.node))?;
    if node.uid != command.uid || node.incarnation != command.incarnation {
        let why = "the report is of an earlier incarnation of the node".to_owned();
        return Err(Rejection::Overtaken {
            name: command.node.clone(),
            why,
        });
    }
    let report = command.report.clone().unwrap_or_default();
    for observation in &report.attempts {
        observe(step, &command.node, observation);
    }
    Ok(())
}

fn observe(step: &mut Step<'_>, name: &str, seen: &AttemptObservation) {
    let Some(attempt) = step.state.attempts.get(&seen.attempt) else {
        return;
    };
    let mut attempt = attempt.clone();
    let Some(index) = attempt.nodes.iter().position(|n| n.node == name) else {
        return;
    };
    if attempt.phase == Phase::Ended {
        return;
    }
    let before = attempt.clone();
    // A node speaks for its own processes only.
    let own = ranks::of_node(attempt.rank_count(), attempt.nodes.len(), index);
    let changed = Arc::make_mut(&mut attempt);
    let node = &mut changed.nodes[index];
    // The last word on a node is the first that says its processes are gone.
    if matches!(node.phase, NodePhase::Ended | NodePhase::Lost) {
        return;
    }
    if seen.phase() > node.phase {
        node.phase = seen.phase();
    }
    merge_ranks(&mut node.ranks, &seen.ranks, own);
    if matches!(node.phase, NodePhase::Ended | NodePhase::Lost) {
        node.files = seen.files.clone();
    }
    if changed.outcome.is_none() {
        changed.outcome = match &seen.failure {
            Some(failure) => Some(failed(failure)),
            None => verdict(changed),
        };
    }
    if attempt != before {
        store(step, attempt);
    }
}

/// Ranks are known once they have started; an exit code, once known, stays.
fn merge_ranks(known: &mut Vec<v1::JobRank>, seen: &[v1::JobRank], own: Range<usize>) {
    let mut merged: BTreeMap<_, _> = known.iter().map(|rank| (rank.rank, *rank)).collect();
    let is_own = |rank: &&v1::JobRank| usize::try_from(rank.rank).is_ok_and(|r| own.contains(&r));
    for rank in seen.iter().filter(is_own) {
        let known = merged.entry(rank.rank).or_insert(*rank);
        known.exit_code = known.exit_code.or(rank.exit_code);
    }
    *known = merged.into_values().collect();
}

fn failed(failure: &Failure) -> Outcome {
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
        let message = format!(
            "Job failed with non-zero exit code: rank {} on {} ended with {code}",
            rank.rank, node.node
        );
        let details = [
            ("rank", rank.rank.to_string()),
            ("node", node.node.clone()),
            ("exitCode", code.to_string()),
        ];
        let details: Vec<_> = details
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let error = error("JobFailed", &message, &details);
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

/// A node came back as another incarnation: what it ran is gone.
pub(super) fn lose_node(step: &mut Step<'_>, attempt: &str, node: &str) {
    let lost = AttemptObservation {
        attempt: attempt.to_owned(),
        phase: NodePhase::Lost as i32,
        ..Default::default()
    };
    observe(step, node, &lost);
}

/// Ends an attempt for a reason that none of its nodes gave.
pub(super) fn fail(step: &mut Step<'_>, command: &FailAttempt) -> Result<(), Rejection> {
    let preparing = step.state.attempts.get(&command.attempt);
    if preparing.is_none_or(|a| a.phase != Phase::Preparing) {
        let why = "it is not preparing any more".to_owned();
        return Err(Rejection::Overtaken {
            name: command.attempt.clone(),
            why,
        });
    }
    decide(
        step,
        &command.attempt,
        failed(&command.failure.clone().unwrap_or_default()),
    );
    Ok(())
}

/// Sets how an attempt ends, unless that is decided; what a user wants goes before a mere return to the queue.
pub(super) fn decide(step: &mut Step<'_>, id: &str, outcome: Outcome) {
    let Some(attempt) = step.state.attempts.get(id) else {
        return;
    };
    let mut attempt = attempt.clone();
    let open = attempt.outcome.as_ref().is_none_or(|decided| {
        matches!(
            decided.verdict,
            Verdict::Requeue | Verdict::InfrastructureFailed
        )
    });
    if open && attempt.phase != Phase::Ended {
        Arc::make_mut(&mut attempt).outcome = Some(outcome);
        store(step, attempt);
    }
}

/// Stores a changed attempt, moved on as far as it goes, and tells those concerned.
fn store(step: &mut Step<'_>, mut attempt: Arc<Attempt>) {
    let changed = Arc::make_mut(&mut attempt);
    let before = changed.phase;
    changed.phase = advance(changed);
    let moved = changed.phase != before;
    if changed.phase == Phase::Ended {
        keys::forget(&mut changed.spec);
    }
    step.state
        .attempts
        .insert(attempt.id.clone(), attempt.clone());
    if moved {
        for node in &attempt.nodes {
            nodes::assign(step, &node.node);
        }
    }
    if let (Phase::Ended, Some(outcome)) = (attempt.phase, &attempt.outcome) {
        for node in &attempt.nodes {
            nodes::change(step, &node.node, |node| node.attempt = None);
            nodes::free_if_leaving(step, &node.node);
        }
        jobs::finish(step, &attempt.job, outcome);
    } else {
        jobs::change(step, &attempt.job, |_| {});
    }
}

fn advance(attempt: &Attempt) -> Phase {
    let gone = |n: &AttemptNode| matches!(n.phase, NodePhase::Ended | NodePhase::Lost);
    match (attempt.phase, &attempt.outcome) {
        (_, Some(_)) if attempt.nodes.iter().all(gone) => Phase::Ended,
        (_, Some(_)) => Phase::Ending,
        (Phase::Preparing, None) if attempt.nodes.iter().all(|n| n.phase >= NodePhase::Ready) => {
            Phase::Running
        }
        (phase, None) => phase,
    }
}
