//! PURE. The set-up of nodes for their clusters: what is mounted there and the task that runs on every node when it joins, and after
//! each reboot, before it takes jobs.
//!
//! ```text
//! (none) -> an attempt of its own -> done | failed
//!   ^______________| infrastructure failed, as often as the bound allows
//!   ^________________________________| the node has rebooted, unless it was lost too often, or was given to a cluster anew
//! ```
//! It is an attempt like those of jobs (see `attempts`), with one node and one process. When one is to begin is decided in
//! `duties`.

use batchai_common::fault;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::agent::v1::MountsReport;
use batchai_proto::internal::v1::SetUpNode;
use batchai_proto::v1;

use super::attempts::{self, Attempt, AttemptNode, Outcome, Phase, Verdict, Work};
use super::jobs::INFRASTRUCTURE_RETRIES_MAX;
use super::{Cluster, Node, Rejection, State, Step, file_servers, nodes, not_found, restore};

/// How long it may take.
const WALL_CLOCK_S: i64 = 3600;

/// How the set-up of a node stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// The incarnation of the node that it was begun in.
    pub incarnation: String,
    /// Its latest attempt.
    pub attempt: String,
    pub done: bool,
    /// How often infrastructure ended it.
    pub retries: i32,
    /// Why it is not tried again.
    pub error: Option<v1::ResourceError>,
    /// What is the matter with what is mounted for the cluster, as the node said last.
    pub unavailable: Option<v1::ResourceError>,
}

/// What a cluster wants done on its nodes.
fn task(cluster: &Cluster) -> Option<&v1::SetupTask> {
    cluster.spec.node_setup.as_ref()?.setup_task.as_ref()
}

/// What a cluster wants mounted on its nodes, for as long as they are its own.
pub fn mounts(cluster: &Cluster) -> Option<&v1::MountVolumes> {
    let setup = cluster.spec.node_setup.as_ref()?;
    let mounts = setup.mount_volumes.as_ref();
    mounts.filter(|mounts| **mounts != v1::MountVolumes::default())
}

fn wants_any(cluster: &Cluster) -> bool {
    task(cluster).is_some() || mounts(cluster).is_some()
}

/// A node belongs to a cluster, or does not any more: what is mounted there changes where that wants anything mounted.
pub(super) fn remount(step: &mut Step<'_>, cluster: &str, node: &str) {
    let cluster = step.state.clusters.get(cluster);
    if cluster.is_some_and(|cluster| mounts(cluster).is_some()) {
        nodes::assign(step, node);
    }
}

/// What is known of this incarnation of a node; or that its set-up was lost too often, in whatever incarnation: one that reboots its
/// machine would go on for ever.
fn current(node: &Node) -> Option<&Setup> {
    let setup = node.setup.as_ref();
    setup.filter(|setup| setup.incarnation == node.incarnation || setup.given_up())
}

impl Setup {
    fn given_up(&self) -> bool {
        self.error.is_some() && self.retries >= INFRASTRUCTURE_RETRIES_MAX
    }
}

/// Whether a node is as its cluster wants it.
pub fn is_done(state: &State, node: &Node) -> bool {
    let cluster = node.cluster.as_ref().and_then(|c| state.clusters.get(c));
    fault!("set_up_not_awaited")
        || cluster.is_none_or(|cluster| !wants_any(cluster))
        || current(node).is_some_and(|setup| setup.done && setup.unavailable.is_none())
}

/// Why a node will not be as its cluster wants it.
pub fn error(node: &Node) -> Option<&v1::ResourceError> {
    let setup = current(node)?;
    setup.error.as_ref().or(setup.unavailable.as_ref())
}

/// Whether a node says something new of what is mounted there for its cluster.
pub fn is_news(state: &State, node: &Node, said: &MountsReport) -> bool {
    let cluster = node.cluster.as_ref().and_then(|c| state.clusters.get(c));
    let setup = node.setup.as_ref();
    cluster.is_some_and(|cluster| cluster.spec.uid == said.cluster_uid)
        && setup.is_some_and(|setup| setup.unavailable != said.failure)
}

/// Takes in what a node says of what is mounted there for its cluster.
pub(super) fn take_in(step: &mut Step<'_>, name: &str, said: &MountsReport) {
    let node = step.state.nodes.get(name).cloned();
    let Some(node) = node.filter(|node| is_news(step.state, node, said)) else {
        return;
    };
    nodes::change(step, name, |node| {
        if let Some(setup) = &mut node.setup {
            setup.unavailable.clone_from(&said.failure);
        }
    });
    // How many of its nodes can be used is part of it.
    super::clusters::change(step, node.cluster.as_deref().unwrap_or_default(), |_| {});
}

/// What is mounted on a node for its cluster is to be mounted anew.
pub(super) fn renew(step: &mut Step<'_>, name: &str) {
    nodes::change(step, name, |node| {
        if let Some(setup) = &mut node.setup {
            setup.done = false;
        }
    });
}

/// Whether the set-up of a node is to begin.
pub fn is_due(state: &State, node: &Node) -> bool {
    let busy = node.attempt.is_some() || node.leaving || node.expelled;
    let cluster = node.cluster.as_ref().and_then(|c| state.clusters.get(c));
    let volumes = cluster.and_then(|cluster| mounts(cluster));
    !busy
        && !is_done(state, node)
        && error(node).is_none()
        && file_servers::awaited(state, volumes).is_none()
}

/// The secrets that the set-up of a node takes.
pub fn secrets<'a>(
    state: &'a State,
    node: &Node,
) -> Option<&'a [v1::EnvironmentVariableWithSecretValue]> {
    let cluster = state.clusters.get(node.cluster.as_ref()?)?;
    Some(&task(cluster)?.secrets)
}

/// A new cluster, with what is its own.
pub(super) fn named(state: &State, cluster: &v1::Cluster) -> v1::Cluster {
    let mut stored = v1::Cluster {
        create_time: Some(state.time),
        ..cluster.clone()
    };
    let task = stored.node_setup.as_mut();
    if let Some(task) = task.and_then(|setup| setup.setup_task.as_mut()) {
        let name = &cluster.name;
        let below = name.split_once('/').map_or(name.as_str(), |(_, rest)| rest);
        let suffix = format!("{}/{below}/{}", state.ensemble, cluster.uid);
        task.std_out_err_path_suffix = suffix;
    }
    stored
}

pub(super) fn begin(step: &mut Step<'_>, command: &SetUpNode) -> Result<(), Rejection> {
    let state = &*step.state;
    let name = &command.node;
    let node = state.nodes.get(name).cloned();
    let node = node.ok_or_else(|| not_found(Kind::Node, name))?;
    let cluster = node.cluster.as_ref().and_then(|c| state.clusters.get(c));
    let due = is_due(state, &node)
        && node.revision == command.node_revision
        && !state.restored
        && !restore::may_hold_strays(state, name);
    let (true, Some(cluster)) = (due, cluster) else {
        let why = "it needs no set-up any more".to_owned();
        let name = name.clone();
        return Err(Rejection::Overtaken { name, why });
    };
    let id = batchai_common::attempt::id(state.epoch, state.revision);
    let last = node
        .setup
        .as_ref()
        .filter(|setup| !setup.done && setup.error.is_none());
    let retries = last.map_or(0, |setup| setup.retries);
    let attempt = Attempt {
        id: id.clone(),
        number: retries + 1,
        work: Work::SetUp,
        spec: Arc::new(spec(cluster)),
        create_time: state.time,
        phase: Phase::Preparing,
        nodes: vec![AttemptNode::new(name, 0)],
        outcome: None,
        log_home: command.log_home,
    };
    forget(step, name);
    step.state.attempts.insert(id.clone(), Arc::new(attempt));
    nodes::change(step, name, |node| {
        node.attempt = Some(id.clone());
        node.setup = Some(Setup {
            incarnation: node.incarnation.clone(),
            attempt: id,
            done: false,
            retries,
            error: None,
            unavailable: None,
        });
    });
    nodes::assign(step, name);
    Ok(())
}

/// The task in the form of a job: what nodes know how to run.
fn spec(cluster: &Cluster) -> v1::Job {
    let task = task(cluster).cloned().unwrap_or_else(|| v1::SetupTask {
        // There is nothing to run, and nobody reads its logs: they stay in its own directory.
        std_out_err_path_prefix: "$AZ_BATCHAI_JOB_TEMP".to_owned(),
        command_line: "true".to_owned(),
        ..v1::SetupTask::default()
    });
    v1::Job {
        name: cluster.spec.name.clone(),
        uid: cluster.spec.uid.clone(),
        node_count: 1,
        std_out_err_path_prefix: task.std_out_err_path_prefix,
        job_output_directory_path_segment: task.std_out_err_path_suffix,
        environment_variables: task.environment_variables,
        secrets: task.secrets,
        constraints: Some(v1::JobConstraints {
            max_wall_clock_time: Some(prost_types::Duration {
                seconds: WALL_CLOCK_S,
                nanos: 0,
            }),
            max_retries: 0,
        }),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: task.command_line,
            processes_per_node: 0,
        }),
        ..Default::default()
    }
}

/// The attempt of a node's set-up has ended.
pub(super) fn finish(step: &mut Step<'_>, name: &str, outcome: &Outcome) {
    nodes::change(step, name, |node| {
        let Some(setup) = &mut node.setup else {
            return;
        };
        match outcome.verdict {
            Verdict::Succeeded => setup.done = true,
            Verdict::Requeue => {}
            Verdict::InfrastructureFailed if setup.retries < INFRASTRUCTURE_RETRIES_MAX => {
                setup.retries += i32::from(!fault!("set_up_retries_not_counted"));
            }
            // Of a set-up that fails there is no other try: `attempts` makes no `Retry` of it.
            Verdict::InfrastructureFailed | Verdict::Failed | Verdict::Retry => {
                setup.error = outcome.errors.first().cloned();
            }
        }
    });
    let cluster = step.state.nodes.get(name).and_then(|n| n.cluster.clone());
    if let Some(cluster) = cluster {
        // How many of its nodes do what is part of it.
        super::clusters::change(step, &cluster, |_| {});
    }
}

/// Has the set-up of a cluster's nodes ended; whether there was any.
pub(super) fn end(step: &mut Step<'_>, cluster: &Cluster) -> bool {
    let busy = |name: &&String| {
        let node = step.state.nodes.get(*name);
        node.is_some_and(|node| node.attempt.is_some())
    };
    let busy: Vec<_> = cluster.members.iter().filter(busy).cloned().collect();
    for name in &busy {
        nodes::change(step, name, |node| node.leaving = true);
        end_of(step, name);
    }
    !busy.is_empty()
}

/// Has the set-up of a node ended, if it is being set up.
pub(super) fn end_of(step: &mut Step<'_>, name: &str) {
    let node = step.state.nodes.get(name);
    let attempt = node.and_then(|node| step.state.attempts.get(node.attempt.as_ref()?));
    if let Some(attempt) = attempt.filter(|attempt| attempt.job().is_none()) {
        let id = attempt.id.clone();
        attempts::decide(step, &id, Outcome::requeue_for_resize(name));
    }
}

/// A node belongs to no cluster any more, or begins anew: its last set-up is of no use.
pub(super) fn forget(step: &mut Step<'_>, name: &str) {
    let last = step.state.nodes.get(name).and_then(|n| n.setup.as_ref());
    if let Some(attempt) = last.map(|setup| setup.attempt.clone()) {
        step.state.attempts.remove(&attempt);
        nodes::change(step, name, |node| node.setup = None);
    }
}
