//! PURE. Attempts: where a job's life is decided.
//!
//! ```text
//! place -> Preparing -> Running -> Ending -> ended
//!             |  \____________________^
//!             every node READY        a verdict; every node ENDED or LOST
//! ```
//! Nodes say what they observe (`record`); from that follows, by the toolkit's rule, whether the job is over and how (see
//! `verdict`); `advance` moves the attempt on. An attempt id is never used again, and no attempt of a job is placed
//! before every node of the one before is gone.

use batchai_common::fault;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use batchai_common::attempt;
use batchai_common::names::Kind;
use batchai_proto::agent::v1::AttemptObservation;
use batchai_proto::internal::v1::{FailAttempt, Place, RecordReport};
use batchai_proto::v1;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;
use prost_types::Timestamp;

use super::verdict::{failed, with_others};
use super::{
    Job, Node, Rejection, State, Step, file_servers, jobs, keys, nodes, not_found, restore, setup,
};

pub use super::verdict::{Outcome, Verdict, error, layout, port_count, rank_count, verdict};

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
    /// The first of its ports there (see `port_count`); 0 where it needs none.
    pub port: i32,
    pub phase: NodePhase,
    pub ranks: Vec<v1::JobRank>,
    pub files: Vec<v1::JobLogFile>,
    /// The rank of the first of its processes that failed.
    pub first_failed: Option<i32>,
    /// The end of what it said.
    pub last_words: String,
    /// The process ids there of what SIGKILL does not end.
    pub stuck: Vec<i32>,
}

impl AttemptNode {
    /// For API replies.
    pub fn view(&self) -> v1::JobAttemptNode {
        v1::JobAttemptNode {
            node: self.node.clone(),
            phase: self.phase as i32,
            ranks: self.ranks.clone(),
            files: self.files.clone(),
        }
    }

    /// A node that is about to begin.
    pub fn new(node: &str, port: i32) -> AttemptNode {
        AttemptNode {
            node: node.to_owned(),
            port,
            phase: NodePhase::Preparing,
            ranks: Vec::new(),
            files: Vec::new(),
            first_failed: None,
            last_words: String::new(),
            stuck: Vec::new(),
        }
    }
}

/// What an attempt is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// The job's full name.
    Job(String),
    /// The set-up of its node for the cluster.
    SetUp,
}

/// One try at running a job, or at setting up a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub id: String,
    pub number: i32,
    pub work: Work,
    /// The job as it was placed, or what stands for the set-up task: what the nodes work from.
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
    /// The full name of the job that it is for.
    pub fn job(&self) -> Option<&str> {
        match &self.work {
            Work::Job(name) => Some(name),
            Work::SetUp => None,
        }
    }

    /// How many processes the toolkit starts over all nodes.
    pub fn rank_count(&self) -> usize {
        rank_count(&self.spec)
    }

    /// For API replies.
    pub fn view(&self) -> v1::JobAttempt {
        let nodes = self.nodes.iter().map(AttemptNode::view);
        v1::JobAttempt {
            id: self.id.clone(),
            number: self.number,
            nodes: nodes.collect(),
        }
    }
}

/// What a node's work left there that does not end: it gets no other until it has.
pub fn stuck(state: &State, name: &str, node: &Node) -> Option<v1::ResourceError> {
    let attempt = state.attempts.get(node.attempt.as_ref()?)?;
    let part = attempt.nodes.iter().find(|part| part.node == name)?;
    let pids: Vec<_> = part.stuck.iter().map(i32::to_string).collect();
    let pids = (!pids.is_empty()).then(|| pids.join(","))?;
    let message = format!(
        "processes that SIGKILL does not end keep the node from other work: {pids}; see what they wait for (/proc/PID/stack), or reboot it"
    );
    let details = [("pids", pids.as_str()), ("attempt", &attempt.id)];
    Some(error("ProcessesDoNotDie", &message, &details))
}

/// Whether a plan still fits.
fn check_plan(state: &State, job: &Job, plan: &Place) -> Result<(), Rejection> {
    let overtaken = |name: &str, why: &str| Rejection::Overtaken {
        name: name.to_owned(),
        why: why.to_owned(),
    };
    if state.restored && !fault!("placed_before_the_restore_is_accepted") {
        return Err(overtaken(&plan.job, "the restore is not accepted yet"));
    }
    if job.state != v1::job::State::Queued
        || (job.revision != plan.job_revision && !fault!("plan_of_an_older_job"))
        || file_servers::awaited(state, job.spec.mount_volumes.as_ref()).is_some()
    {
        return Err(overtaken(&plan.job, "it, or what it mounts, has changed"));
    }
    if plan.nodes.len() != usize::try_from(job.spec.node_count).unwrap_or_default() {
        return Err(overtaken(&plan.job, "the plan has another number of nodes"));
    }
    let mut seen = BTreeSet::new();
    let mut ports = ports_by_machine(state);
    for (index, placed) in plan.nodes.iter().enumerate() {
        let node = state.nodes.get(&placed.node);
        let node = node.ok_or_else(|| not_found(Kind::Node, &placed.node))?;
        let usable = fault!("nodes_not_checked_when_placed")
            || node.revision == placed.node_revision
                && node.cluster.as_ref() == Some(&job.spec.cluster)
                && node.attempt.is_none()
                && setup::is_done(state, node)
                && !restore::may_hold_strays(state, &placed.node)
                && !node.leaving;
        if !usable || !seen.insert(&placed.node) {
            return Err(overtaken(
                &placed.node,
                "it is not free as it was when planned",
            ));
        }
        let machine = &node.facts.boot_id;
        let mut own = ports_of(&job.spec, index, placed.port);
        if !own.all(|port| ports.insert((machine.clone(), port)))
            && !fault!("port_not_checked_when_placed")
        {
            return Err(overtaken(&placed.node, "the port is taken on its machine"));
        }
    }
    Ok(())
}

/// Re-validates a placement whole; all of its nodes start or none.
pub(super) fn place(step: &mut Step<'_>, plan: &Place) -> Result<(), Rejection> {
    let state = &*step.state;
    let job = state.jobs.get(plan.job.as_str()).cloned();
    let job = job.ok_or_else(|| not_found(Kind::Job, &plan.job))?;
    check_plan(state, &job, plan)?;
    let id = attempt::id(state.epoch, state.revision);
    let attempt = Attempt {
        id: id.clone(),
        number: job.attempts + 1,
        work: Work::Job(plan.job.clone()),
        spec: job.spec.clone(),
        create_time: state.time,
        phase: Phase::Preparing,
        nodes: plan
            .nodes
            .iter()
            .take(if fault!("gang_in_part") {
                1
            } else {
                usize::MAX
            })
            .map(|placed| AttemptNode::new(&placed.node, placed.port))
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
    let nodes = live(state).flat_map(|attempt| {
        let nodes = attempt.nodes.iter().enumerate();
        nodes.map(move |(i, node)| (&attempt.spec, i, node))
    });
    let nodes = nodes.filter(|(_, _, node)| node.port != 0);
    nodes.flat_map(|(spec, i, node)| {
        ports_of(spec, i, node.port).map(move |port| (node.node.as_str(), port))
    })
}

/// The ports of a job on its i-th node, from the first one.
pub fn ports_of(spec: &v1::Job, index: usize, first: i32) -> Range<i32> {
    first..first.saturating_add(port_count(spec, index))
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
    if node.uid != command.uid
        || (node.incarnation != command.incarnation && !fault!("incarnation_ignored"))
    {
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
    if let Some(strays) = &report.strays {
        restore::take_in(step, &command.node, strays);
    }
    if let Some(mounts) = &report.mounts {
        setup::take_in(step, &command.node, mounts);
    }
    for server in &report.file_servers {
        file_servers::take_in(step, &command.node, server);
    }
    Ok(())
}

pub(super) fn observe(step: &mut Step<'_>, name: &str, seen: &AttemptObservation) {
    let current = step
        .state
        .nodes
        .get(name)
        .and_then(|node| node.attempt.as_ref());
    let current = current.filter(|_| fault!("attempt_id_ignored"));
    let Some(attempt) = step.state.attempts.get(current.unwrap_or(&seen.attempt)) else {
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
    let layout = layout(&attempt.spec);
    let own = |rank: usize| layout.is_of(index, rank);
    let changed = Arc::make_mut(&mut attempt);
    let node = &mut changed.nodes[index];
    // The last word on a node is the first that says its processes are gone.
    if matches!(node.phase, NodePhase::Ended | NodePhase::Lost) && !fault!("word_after_the_last") {
        return;
    }
    if seen.phase() > node.phase || fault!("phase_goes_back") {
        node.phase = seen.phase();
    }
    merge_ranks(&mut node.ranks, &seen.ranks, own);
    let has_failed = |rank: &i32| {
        node.ranks
            .iter()
            .any(|r| r.rank == *rank && r.exit_code.is_some_and(|code| code != 0))
    };
    node.first_failed = node.first_failed.or(seen.first_failed.filter(has_failed));
    if node.last_words.is_empty() {
        node.last_words.clone_from(&seen.last_words);
    }
    let gone = matches!(node.phase, NodePhase::Ended | NodePhase::Lost);
    if gone {
        node.files = seen.files.clone();
    }
    let stuck = if gone { &[][..] } else { &seen.stuck };
    if node.stuck != stuck {
        node.stuck = stuck.to_vec();
        nodes::change(step, name, |_| {});
    }
    let undone = seen.failure.as_ref().is_some_and(|it| it.undoes_success);
    let decided = changed.outcome.as_ref().map(|outcome| outcome.verdict);
    if decided.is_none() || (undone && decided == Some(Verdict::Succeeded)) {
        // What went wrong behind the first process that failed is not why.
        let failure = seen.failure.as_ref();
        let failure = failure.filter(|_| changed.nodes[index].first_failed.is_none());
        let outcome = match failure {
            Some(failure) => Some(failed(failure, Some(name))),
            None => verdict(changed),
        };
        changed.outcome = outcome.map(|outcome| bounded(step.state, changed, outcome));
    }
    if attempt != before {
        store(step, attempt);
    }
}

/// A run that failed is one more try of a job that has retries left, and else its end.
fn bounded(state: &State, attempt: &Attempt, outcome: Outcome) -> Outcome {
    let job = attempt.job().and_then(|name| state.jobs.get(name));
    match outcome.verdict {
        Verdict::Retry if job.is_none_or(|job| !job.has_retries()) => Outcome {
            verdict: Verdict::Failed,
            ..outcome
        },
        _ => outcome,
    }
}

/// Ranks are known once they have started; how one ended, once known, stays.
fn merge_ranks(known: &mut Vec<v1::JobRank>, seen: &[v1::JobRank], own: impl Fn(usize) -> bool) {
    let mut merged: BTreeMap<_, _> = known.iter().map(|rank| (rank.rank, rank.clone())).collect();
    let is_own = |rank: &&v1::JobRank| usize::try_from(rank.rank).is_ok_and(&own);
    for rank in seen
        .iter()
        .filter(|rank| fault!("ranks_of_others") || is_own(rank))
    {
        let known = merged.entry(rank.rank).or_insert_with(|| rank.clone());
        if known.exit_code.is_none() || fault!("exit_code_changes") {
            known.clone_from(rank);
        }
    }
    *known = merged.into_values().collect();
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
    let holds = match step.state.attempts.get(&command.attempt) {
        Some(attempt) if command.launching => attempt.unstarted().next().is_some(),
        found => found.is_some_and(|attempt| attempt.phase == Phase::Preparing),
    };
    if !holds {
        let name = command.attempt.clone();
        let why = "it has gone on meanwhile".to_owned();
        return Err(Rejection::Overtaken { name, why });
    }
    decide(
        step,
        &command.attempt,
        failed(&command.failure.clone().unwrap_or_default(), None),
    );
    Ok(())
}

/// Sets how an attempt ends, unless that is decided; that the job ends goes before a mere return to the queue.
pub(super) fn decide(step: &mut Step<'_>, id: &str, outcome: Outcome) {
    let Some(attempt) = step.state.attempts.get(id) else {
        return;
    };
    let mut attempt = attempt.clone();
    let outcome = bounded(step.state, &attempt, outcome);
    let open = match attempt.outcome.as_ref().map(|decided| decided.verdict) {
        None | Some(Verdict::Requeue | Verdict::InfrastructureFailed) => true,
        // It failed by itself: what its nodes met with later is not why it runs again.
        Some(Verdict::Retry) => outcome.verdict == Verdict::Failed,
        Some(Verdict::Succeeded | Verdict::Failed) => false,
    };
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
    if changed.phase == Phase::Ended && !fault!("secrets_kept_in_attempts") {
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
            if attempt.work == Work::SetUp {
                setup::finish(step, &node.node, outcome);
            }
            nodes::free_if_leaving(step, &node.node);
        }
    }
    match (&attempt.work, &attempt.outcome) {
        (Work::Job(job), Some(outcome)) if attempt.phase == Phase::Ended => {
            jobs::finish(step, job, &with_others(&attempt, outcome));
        }
        (Work::Job(job), _) => jobs::change(step, job, |_| {}),
        (Work::SetUp, _) => {}
    }
}

fn advance(attempt: &Attempt) -> Phase {
    let gone = |n: &AttemptNode| matches!(n.phase, NodePhase::Ended | NodePhase::Lost);
    match (attempt.phase, &attempt.outcome) {
        (_, Some(_)) if fault!("ended_before_all_are_gone") || attempt.nodes.iter().all(gone) => {
            Phase::Ended
        }
        (_, Some(_)) => Phase::Ending,
        (Phase::Preparing, None)
            if attempt.nodes.iter().all(|n| {
                n.phase >= NodePhase::Ready || fault!("launched_before_all_are_ready")
            }) =>
        {
            Phase::Running
        }
        (phase, None) => phase,
    }
}

#[cfg(test)]
#[path = "attempts_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "servers_tests.rs"]
mod servers_tests;

#[cfg(test)]
#[path = "ports_tests.rs"]
mod ports_tests;
