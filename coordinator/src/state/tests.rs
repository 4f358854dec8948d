//! Tells the story of jobs to `apply`, one command at a time, and checks every invariant after each.

use batchai_proto::agent::v1::{AttemptObservation, Failure, MountsReport, Report};
use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{
    Command, CreateJobs, DataKey, Delete, FailAttempt, InitEnsemble, PutDataKey, RaiseFeatureLevel,
    RecordReport, RegisterNode, Replica, RequestKey, SnapshotRecord, TerminateJob, Update, replica,
    snapshot_record,
};
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::job_attempt_node::Phase as P;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption as Dealloc;
use proptest::prelude::*;

use super::digest::Digest;
use super::*;
use crate::duties::{Heard, Leader, duties};
use crate::scheduler::explain::pending_reason;

const GROUP: &str = "resourceGroups/g";
const WORKSPACE: &str = "resourceGroups/g/workspaces/w";
const EXPERIMENT: &str = "resourceGroups/g/workspaces/w/experiments/e";
/// The lease of nodes.
pub(super) const LEASE_MS: i64 = 60_000;
const CLUSTER: &str = "resourceGroups/g/workspaces/w/clusters/c";

/// A State with its invariants checked after every command.
pub(crate) struct Ensemble {
    pub state: State,
    pub heard: Heard,
    /// What the next command carries out.
    request: Option<RequestKey>,
    /// What the cluster wants done on its nodes.
    setup_task: Option<v1::SetupTask>,
    index: u64,
    digest: Digest,
}

impl Drop for Ensemble {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.digest, Digest::of(&self.state));
        }
    }
}

impl Ensemble {
    /// An ensemble with a cluster of the given target.
    pub(super) fn new(target: i32) -> Ensemble {
        Ensemble::with_task(target, None)
    }

    /// The same with a set-up task.
    fn with_task(target: i32, setup_task: Option<v1::SetupTask>) -> Ensemble {
        let heard = Heard {
            now: 1_000_000,
            ..Heard::default()
        };
        let mut e = Ensemble {
            state: State::default(),
            heard,
            request: None,
            setup_task,
            index: 0,
            digest: Digest::of(&State::default()),
        };
        let ensemble = "00000000-0000-0000-0000-000000000001".to_owned();
        e.ok(C::InitEnsemble(InitEnsemble {
            ensemble,
            epoch: 1,
            replicas: Vec::new(),
        }));
        e.make_what_holds_jobs(target);
        e
    }

    /// Makes what is not there of a resource group, a workspace, an experiment and a cluster.
    fn make_what_holds_jobs(&mut self, target: i32) {
        let group = v1::ResourceGroup {
            name: GROUP.into(),
            ..Default::default()
        };
        let workspace = v1::Workspace {
            name: WORKSPACE.into(),
            ..Default::default()
        };
        let experiment = v1::Experiment {
            name: EXPERIMENT.into(),
            ..Default::default()
        };
        let cluster = v1::Cluster {
            name: CLUSTER.into(),
            vm_size: "small".into(),
            scale_settings: Some(v1::ScaleSettings {
                manual: Some(v1::ManualScaleSettings {
                    target_node_count: target,
                    ..Default::default()
                }),
                auto_scale: None,
            }),
            ..Default::default()
        };
        let cluster = v1::Cluster {
            node_setup: self.setup_task.clone().map(|task| v1::NodeSetup {
                setup_task: Some(task),
                ..Default::default()
            }),
            ..cluster
        };
        for (name, create) in [
            (GROUP, C::CreateResourceGroup(group)),
            (WORKSPACE, C::CreateWorkspace(workspace)),
            (EXPERIMENT, C::CreateExperiment(experiment)),
            (CLUSTER, C::CreateCluster(cluster)),
        ] {
            if !self.state.contains(Kind::of(name).unwrap(), name) {
                self.ok(create);
            }
        }
    }

    /// Goes on from another State.
    pub(super) fn become_state(&mut self, state: State) {
        self.digest = Digest::of(&state);
        self.state = state;
        invariants::check(&self.state).unwrap();
    }

    pub(super) fn with_nodes(target: i32, count: usize) -> Ensemble {
        let mut e = Ensemble::new(target);
        for i in 0..count {
            e.register(&format!("nodes/n{i}"), "1");
        }
        e.settle();
        e
    }

    pub(super) fn try_apply(&mut self, kind: C) -> Result<Vec<Event>, Rejection> {
        self.index += 1;
        let time = Some(batchai_common::time::from_millis(self.heard.now));
        let before = self.state.clone();
        let result = apply(
            &mut self.state,
            self.index,
            &Command {
                time,
                request: self.request.take(),
                kind: Some(kind),
            },
        );
        if result.is_err() {
            let untouched = State {
                applied_index: self.index,
                ..before.clone()
            };
            assert_eq!(self.state, untouched, "a rejection changed something");
        }
        invariants::check(&self.state).unwrap();
        // What changed is enough to know what tells States apart.
        self.digest = self.digest.advance(&before, &self.state);
        result
    }

    pub(super) fn ok(&mut self, kind: C) -> Vec<Event> {
        self.try_apply(kind.clone())
            .unwrap_or_else(|e| panic!("{kind:?}: {e}"))
    }

    pub(super) fn register(&mut self, name: &str, incarnation: &str) {
        self.register_as(name, incarnation, "small");
    }

    fn register_as(&mut self, name: &str, incarnation: &str, vm_size: &str) {
        let facts = v1::NodeFacts {
            vm_size: vm_size.into(),
            boot_id: "one-machine".into(),
            addresses: vec!["10.0.0.1".into()],
            first_port: 20_000,
            last_port: 20_099,
            ..Default::default()
        };
        self.ok(C::RegisterNode(RegisterNode {
            name: name.into(),
            uid: format!("uid-{name}"),
            incarnation: incarnation.into(),
            facts: Some(facts),
            empty: true,
        }));
        self.heard.last.insert(name.into(), self.heard.now);
    }

    /// Performs duties until there are none.
    pub(super) fn settle(&mut self) {
        let mut since = std::mem::take(&mut self.heard.since);
        since.look(&self.state, &self.heard);
        self.heard.since = since;
        let leader = Leader {
            replica: 1,
            ensemble: "unused".into(),
            replicas: Vec::new(),
            lease_ms: LEASE_MS,
        };
        for _ in 0..100 {
            let commands = duties(&self.state, &self.heard, &leader);
            if commands.is_empty() {
                return;
            }
            for command in commands {
                // A plan may be overtaken by the command before it, as on a real leader.
                let _ = self.try_apply(command);
            }
        }
        panic!("duties never end");
    }

    /// Queues a job, and looks no further.
    pub(super) fn queue(
        &mut self,
        id: &str,
        nodes: i32,
        change: impl FnOnce(&mut v1::Job),
    ) -> String {
        let name = format!("{EXPERIMENT}/jobs/{id}");
        let mut job = v1::Job {
            name: name.clone(),
            uid: format!("uid-{id}"),
            cluster: CLUSTER.into(),
            node_count: nodes,
            custom_toolkit_settings: Some(v1::CustomToolkitSettings::default()),
            ..Default::default()
        };
        change(&mut job);
        self.ok(C::CreateJob(job));
        name
    }

    pub(super) fn submit(
        &mut self,
        id: &str,
        node_count: i32,
        change: impl FnOnce(&mut v1::Job),
    ) -> String {
        let name = self.queue(id, node_count, change);
        self.settle();
        name
    }

    /// Gives the workspace another data key, and has a job sealed by it.
    fn rotate(&mut self, id: &str) {
        let follows = keys::current(&self.state, WORKSPACE).map(|key| key.id.clone());
        self.ok(put_key(id, &follows.unwrap_or_default()));
    }

    pub(super) fn job(&self, name: &str) -> &Job {
        &self.state.jobs[name]
    }

    pub(super) fn attempt(&self, name: &str) -> Arc<Attempt> {
        self.state.attempts[self.job(name).attempt.as_ref().unwrap()].clone()
    }

    /// Reports for the i-th node of the job's attempt.
    pub(super) fn see(&mut self, job: &str, i: usize, phase: P, ranks: &[(i32, Option<i32>)]) {
        let attempt = self.attempt(job);
        self.see_attempt(&attempt, i, phase, ranks, None);
    }

    pub(super) fn see_attempt(
        &mut self,
        attempt: &Attempt,
        i: usize,
        phase: P,
        ranks: &[(i32, Option<i32>)],
        failure: Option<Failure>,
    ) {
        let ranks = ranks.iter().map(|&(rank, exit_code)| v1::JobRank {
            rank,
            exit_code,
            ..Default::default()
        });
        let seen = AttemptObservation {
            phase: phase as i32,
            ranks: ranks.collect(),
            failure,
            ..Default::default()
        };
        self.report(attempt, i, seen);
    }

    /// Reports for the i-th node of an attempt, whatever it is.
    pub(super) fn report(&mut self, attempt: &Attempt, i: usize, seen: AttemptObservation) {
        let node = attempt.nodes[i].node.clone();
        let observation = AttemptObservation {
            attempt: attempt.id.clone(),
            ..seen
        };
        let known = &self.state.nodes[&node];
        let report = RecordReport {
            uid: known.uid.clone(),
            incarnation: known.incarnation.clone(),
            node,
            report: Some(Report {
                attempts: vec![observation],
                ..Report::default()
            }),
        };
        self.ok(C::RecordReport(report));
        self.settle();
    }

    /// Takes a two-node job to where its processes run.
    pub(super) fn run_two(&mut self, change: impl FnOnce(&mut v1::Job)) -> String {
        let job = self.submit("j", 2, change);
        self.see(&job, 0, P::Ready, &[]);
        self.see(&job, 1, P::Ready, &[]);
        assert_eq!(self.attempt(&job).phase, attempts::Phase::Running);
        job
    }

    pub(super) fn state_of(&self, job: &str) -> JobState {
        self.job(job).state
    }
}

pub(super) fn pytorch(job: &mut v1::Job) {
    job.custom_toolkit_settings = None;
    job.py_torch_settings = Some(v1::PyTorchSettings::default());
}

#[test]
fn a_feature_level_rises_when_all_know_it_and_one_that_is_not_known_stops_the_replica() {
    let mut e = Ensemble::new(0);
    let levels = |e: &mut Ensemble, levels: &[u32]| {
        let replica = |(id, level): (usize, &u32)| {
            let replica = Replica {
                id: id as u64 + 1,
                role: replica::Role::Voter as i32,
                feature_level: *level,
                ..Default::default()
            };
            (replica.id, Arc::new(replica))
        };
        e.state.replicas = levels.iter().enumerate().map(replica).collect();
        e.digest = Digest::of(&e.state);
        let kinds = agreement::duties(&e.state);
        let levels = kinds.filter_map(|kind| match kind {
            C::RaiseFeatureLevel(c) => Some(c.level),
            _ => None,
        });
        levels.last()
    };
    let known = agreement::FEATURE_LEVEL;
    assert_eq!(
        levels(&mut e, &[known, 0, known]),
        None,
        "one is not heard of"
    );
    // Of what this version does not know itself it does not speak.
    assert_eq!(levels(&mut e, &[known + 1; 3]), Some(known));
    e.ok(C::RaiseFeatureLevel(RaiseFeatureLevel { level: known }));
    assert_eq!(e.state.feature_level, known);
    assert_eq!(levels(&mut e, &[known; 3]), None);
    let later = C::RaiseFeatureLevel(RaiseFeatureLevel { level: known + 1 });
    assert_eq!(e.try_apply(later).unwrap_err(), Rejection::Unknown);
    let header = snapshot::records(&e.state).next().unwrap();
    let Some(snapshot_record::Kind::Header(mut header)) = header.kind else {
        panic!("the header comes first");
    };
    header.feature_level += 1;
    let kind = Some(snapshot_record::Kind::Header(header));
    let refused = snapshot::Builder::default().add(SnapshotRecord { kind });
    assert!(refused.unwrap_err().to_string().contains("feature level"));
}

#[test]
fn a_custom_job_is_over_when_its_master_process_is() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|_| {});
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert_eq!(
        e.state_of(&job),
        JobState::Running,
        "the other node still cleans up"
    );
    assert_eq!(e.attempt(&job).phase, attempts::Phase::Ending);
    e.see(&job, 1, P::Ended, &[]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
    assert_eq!(e.job(&job).exit_code, Some(0));
}

#[test]
fn a_pytorch_job_is_over_when_all_ranks_are() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(pytorch);
    e.see(&job, 1, P::Ended, &[(1, Some(0))]);
    assert_eq!(
        e.attempt(&job).phase,
        attempts::Phase::Running,
        "rank 0 still runs"
    );
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
}

#[test]
fn the_first_failing_rank_decides_and_names_itself() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(pytorch);
    e.see(&job, 1, P::Ended, &[(1, Some(7))]);
    assert_eq!(e.attempt(&job).phase, attempts::Phase::Ending);
    e.see(&job, 0, P::Ended, &[(0, Some(143))]);
    let job = e.job(&job);
    assert_eq!((job.state, job.exit_code), (JobState::Failed, Some(7)));
    assert_eq!(job.errors[0].code, "JobFailed");
    assert!(
        job.errors[0].message.contains("rank 1 on nodes/"),
        "{:?}",
        job.errors
    );
}

#[test]
fn a_gang_waits_for_all_of_its_nodes() {
    let mut e = Ensemble::with_nodes(2, 1);
    let job = e.submit("j", 2, |_| {});
    assert_eq!(e.state_of(&job), JobState::Queued);
    let reason = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(
        reason.contains("waits for 2 idle nodes") && reason.contains("idle: 1"),
        "{reason}"
    );
    e.register("nodes/n1", "1");
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Running);
}

#[test]
fn a_job_out_of_reach_says_so_and_holds_up_nobody() {
    let mut e = Ensemble::with_nodes(1, 1);
    let big = e.submit("big", 5, |_| {});
    let small = e.submit("small", 1, |_| {});
    assert_eq!(
        (e.state_of(&big), e.state_of(&small)),
        (JobState::Queued, JobState::Running)
    );
    let reason = pending_reason(&e.state, &e.heard, e.job(&big));
    assert!(
        reason.contains("wants 5 nodes") && reason.contains("resized"),
        "{reason}"
    );
}

#[test]
fn urgent_jobs_go_first_then_those_submitted_first() {
    let mut e = Ensemble::with_nodes(1, 1);
    let first = e.submit("first", 1, |_| {});
    let low = e.submit("low", 1, |j| {
        j.set_scheduling_priority(v1::job::SchedulingPriority::Low)
    });
    let normal = e.submit("a-normal", 1, |_| {});
    let later = e.submit("a-later", 1, |_| {});
    let high = e.submit("z-high", 1, |j| {
        j.set_scheduling_priority(v1::job::SchedulingPriority::High)
    });
    let mut order = vec![];
    for _ in 0..5 {
        let all = [&first, &low, &normal, &later, &high];
        let running = *all
            .iter()
            .find(|j| e.state_of(j) == JobState::Running)
            .unwrap();
        order.push(running.clone());
        e.see(running, 0, P::Ended, &[(0, Some(0))]);
    }
    assert_eq!(order, [first, high, normal, later, low]);
}

#[test]
fn a_batch_of_jobs_is_queued_in_its_order_or_not_at_all() {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = |id: &str, cluster: &str| v1::Job {
        name: format!("{EXPERIMENT}/jobs/{id}"),
        cluster: cluster.into(),
        node_count: 1,
        custom_toolkit_settings: Some(v1::CustomToolkitSettings::default()),
        ..Default::default()
    };
    let batch = |jobs| C::CreateJobs(CreateJobs { jobs });
    let refused = e.try_apply(batch(vec![job("a", CLUSTER), job("b", "nowhere")]));
    assert!(matches!(refused, Err(Rejection::NotFound { .. })));
    assert!(e.state.jobs.is_empty());
    e.ok(batch(vec![
        job("z", CLUSTER),
        job("y", CLUSTER),
        job("x", CLUSTER),
    ]));
    let queue = e.state.clusters[CLUSTER]
        .queue
        .iter()
        .map(|key| key.job.clone());
    let order: Vec<_> = queue
        .map(|name| name[name.len() - 1..].to_owned())
        .collect();
    assert_eq!(order, ["z", "y", "x"]);
}

#[test]
fn a_queued_job_ends_at_once_when_terminated_and_a_running_one_when_its_nodes_are_done() {
    let mut e = Ensemble::with_nodes(2, 2);
    let running = e.run_two(|_| {});
    let queued = e.submit("q", 1, |_| {});
    for name in [&queued, &running, &queued, &running] {
        e.ok(C::TerminateJob(TerminateJob {
            name: name.clone(),
            ..Default::default()
        }));
    }
    assert_eq!(e.state_of(&queued), JobState::Failed);
    assert_eq!(e.job(&queued).errors[0].code, "JobTerminated");
    assert_eq!(e.state_of(&running), JobState::Terminating);
    e.see(&running, 0, P::Ended, &[(0, Some(143))]);
    e.see(&running, 1, P::Ended, &[]);
    let job = e.job(&running);
    assert_eq!((job.state, job.exit_code), (JobState::Failed, None));
    assert_eq!(job.errors[0].code, "JobTerminated");
}

#[test]
fn a_deleted_running_job_is_gone_when_its_processes_are_and_its_name_is_free() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|_| {});
    e.ok(C::Delete(Delete {
        name: job.clone(),
        ..Default::default()
    }));
    assert!(e.job(&job).deleting.is_some());
    e.see(&job, 0, P::Ended, &[(0, Some(143))]);
    let attempt = e.attempt(&job);
    e.see_attempt(&attempt, 1, P::Ended, &[], None);
    assert!(e.state.jobs.is_empty() && e.state.attempts.is_empty());
    e.submit("j", 2, |_| {});
}

#[test]
fn a_new_incarnation_of_a_node_ends_its_attempt_and_the_job_runs_again_but_not_for_ever() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|_| {});
    for round in 0..=jobs::INFRASTRUCTURE_RETRIES_MAX {
        let earlier = e.attempt(&job);
        let node = earlier.nodes[1].node.clone();
        e.register(&node, &format!("boot-{round}"));
        assert_eq!(
            e.attempt(&job).phase,
            attempts::Phase::Ending,
            "the other node must end first"
        );
        e.see(&job, 0, P::Ended, &[(0, Some(143))]);
        if round < jobs::INFRASTRUCTURE_RETRIES_MAX {
            assert_ne!(e.attempt(&job).id, earlier.id);
            assert_eq!(e.state_of(&job), JobState::Running);
        }
    }
    assert_eq!(e.state_of(&job), JobState::Failed);
    assert_eq!(e.job(&job).errors[0].code, "NodeLost");
    assert_eq!(e.job(&job).attempts, 1 + jobs::INFRASTRUCTURE_RETRIES_MAX);
}

fn put_key(id: &str, follows: &str) -> C {
    C::PutDataKey(PutDataKey {
        workspace: WORKSPACE.into(),
        key: Some(DataKey {
            id: id.into(),
            wrapped_by: "k".into(),
            wrapped: vec![1],
        }),
        follows: follows.into(),
    })
}

fn sealed_by(key: &str) -> v1::EnvironmentVariableWithSecretValue {
    let sealed = keys::Sealed {
        key: key.into(),
        bytes: b"sealed".to_vec(),
    };
    v1::EnvironmentVariableWithSecretValue {
        name: "TOKEN".into(),
        value: sealed.to_string(),
        value_secret_reference: None,
    }
}

#[test]
fn secrets_enter_sealed_go_to_who_prepares_and_are_forgotten_at_the_end() {
    let mut e = Ensemble::with_nodes(1, 1);
    let open = v1::Job {
        name: format!("{EXPERIMENT}/jobs/open"),
        cluster: CLUSTER.into(),
        node_count: 1,
        secrets: vec![v1::EnvironmentVariableWithSecretValue {
            value: "open".into(),
            ..sealed_by("a")
        }],
        ..Default::default()
    };
    let unknown = v1::Job {
        secrets: vec![sealed_by("a")],
        ..open.clone()
    };
    for job in [open, unknown] {
        let refused = e.try_apply(C::CreateJob(job));
        assert!(matches!(refused, Err(Rejection::Overtaken { .. })));
    }
    e.rotate("a");
    let job = e.submit("j", 1, |job| job.secrets = vec![sealed_by("a")]);
    let value = |e: &Ensemble| {
        let list = assignments::assignments(&e.state, "nodes/n0");
        list.assignments[0].job.clone().unwrap().secrets[0]
            .value
            .clone()
    };
    assert_eq!(value(&e), sealed_by("a").value);
    e.see(&job, 0, P::Ready, &[]);
    assert_eq!(value(&e), "", "who runs has them already");
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert_eq!(e.job(&job).state, JobState::Succeeded);
    assert_eq!(e.job(&job).spec.secrets[0].name, "TOKEN");
    assert_eq!(e.job(&job).spec.secrets[0].value, "");
    assert_eq!(e.attempt(&job).spec.secrets[0].value, "");
}

#[test]
fn a_workspace_keeps_the_data_keys_that_are_of_use() {
    let mut e = Ensemble::with_nodes(0, 0);
    let known = |e: &Ensemble| -> Vec<String> {
        let keys = e.state.data_keys.get(WORKSPACE);
        let keys = keys.iter().flat_map(|keys| keys.iter());
        keys.map(|key| key.id.clone()).collect()
    };
    e.rotate("a");
    let overtaken = e.try_apply(put_key("b", ""));
    assert!(matches!(overtaken, Err(Rejection::Overtaken { .. })));
    let job = e.submit("j", 1, |job| job.secrets = vec![sealed_by("a")]);
    for id in ["b", "c", "d"] {
        e.rotate(id);
    }
    assert_eq!(
        known(&e),
        ["d", "c", "a"],
        "what seals, what sealed last, what is used"
    );
    e.ok(C::TerminateJob(TerminateJob {
        name: job,
        ..Default::default()
    }));
    // A cluster needs its key as long as it is there.
    let task = v1::SetupTask {
        secrets: vec![sealed_by("d")],
        ..setup_task()
    };
    let with_task = format!("{WORKSPACE}/clusters/task");
    e.ok(C::CreateCluster(v1::Cluster {
        name: with_task.clone(),
        node_setup: Some(v1::NodeSetup {
            setup_task: Some(task),
            ..Default::default()
        }),
        ..Default::default()
    }));
    for id in ["e", "f", "g"] {
        e.rotate(id);
    }
    assert_eq!(known(&e), ["g", "f", "d"]);
    e.ok(force(&with_task));
    e.rotate("e");
    assert_eq!(known(&e), ["e", "g"]);
    // Wrapped anew, wherever it stands.
    e.ok(put_key("g", "g"));
    assert_eq!(known(&e), ["e", "g"]);
    // One that is gone does not come back.
    assert!(e.try_apply(put_key("d", "d")).is_err());
    let delete = |name: &str| {
        C::Delete(Delete {
            name: name.into(),
            etag: String::new(),
            force: true,
        })
    };
    e.ok(delete(WORKSPACE));
    e.settle();
    assert!(e.state.workspaces.is_empty() && known(&e).is_empty());
    assert!(e.try_apply(put_key("f", "")).is_err());
}

#[test]
fn reports_of_earlier_attempts_and_incarnations_change_nothing() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|_| {});
    let earlier = e.attempt(&job);
    e.register(&earlier.nodes[1].node.clone(), "2");
    e.see(&job, 0, P::Ended, &[]);
    assert_ne!(e.attempt(&job).id, earlier.id);
    let before = e.attempt(&job);
    e.see_attempt(&earlier, 0, P::Ended, &[(0, Some(9))], None);
    assert_eq!(e.attempt(&job), before);
    let stale = RecordReport {
        node: earlier.nodes[0].node.clone(),
        uid: "somebody".into(),
        ..Default::default()
    };
    assert!(matches!(
        e.try_apply(C::RecordReport(stale)),
        Err(Rejection::Overtaken { .. })
    ));
}

#[test]
fn a_failed_preparation_fails_the_job_with_its_exit_code() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.submit("j", 2, |_| {});
    let attempt = e.attempt(&job);
    let error = attempts::error("JobPreparationFailed", "it failed", &[]);
    let failure = Failure {
        error: Some(error),
        exit_code: Some(3),
        ..Default::default()
    };
    e.see_attempt(&attempt, 0, P::Ended, &[], Some(failure));
    e.see_attempt(&attempt, 1, P::Ended, &[], None);
    assert_eq!(
        (e.state_of(&job), e.job(&job).exit_code),
        (JobState::Failed, Some(3))
    );
}

#[test]
fn preparation_has_a_deadline_that_names_the_slow_node() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.submit("j", 2, |_| {});
    e.see(&job, 0, P::Ready, &[]);
    e.heard.now += crate::duties::PREPARE_DEADLINE_MS + 1;
    e.settle();
    let slow = e.attempt(&job).nodes[1].node.clone();
    e.see(&job, 0, P::Ended, &[]);
    e.see(&job, 1, P::Ended, &[]);
    let error = &e.job(&job).errors[0];
    assert_eq!(error.code, "JobPreparationTimeout");
    assert!(
        error.message.ends_with(&format!(": {slow}")),
        "{}",
        error.message
    );
}

/// Time passes, and of the i-th nodes of an attempt something is heard all the time.
fn pass(e: &mut Ensemble, attempt: &Attempt, ms: i64, heard: &[usize]) {
    let end = e.heard.now + ms;
    while e.heard.now < end {
        e.heard.now = end.min(e.heard.now + 1_000);
        for i in heard {
            let node = attempt.nodes[*i].node.clone();
            e.heard.last.insert(node, e.heard.now);
        }
        e.settle();
    }
}

#[test]
fn a_node_that_does_not_start_its_ranks_is_named_in_time_and_the_job_runs_again() {
    let deadline = crate::duties::LAUNCH_DEADLINE_MS;
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|job| {
        let settings = job.custom_toolkit_settings.as_mut().unwrap();
        settings.processes_per_node = 2;
    });
    let attempt = e.attempt(&job);
    let running = |e: &Ensemble| e.attempt(&job).phase == attempts::Phase::Running;
    e.see(&job, 0, P::Running, &[(0, None), (1, None)]);
    // One that is silent is a matter of its lease, and is asked anew when it is heard of again.
    pass(&mut e, &attempt, deadline - 30_000, &[0, 1]);
    pass(&mut e, &attempt, 20_000, &[0]);
    pass(&mut e, &attempt, deadline - 1_000, &[0, 1]);
    assert!(running(&e));
    pass(&mut e, &attempt, 2_000, &[0, 1]);
    assert_eq!(e.attempt(&job).phase, attempts::Phase::Ending);
    let late = FailAttempt {
        attempt: attempt.id.clone(),
        failure: None,
        launching: true,
    };
    let refused = e.try_apply(C::FailAttempt(late.clone())).unwrap_err();
    assert!(refused.to_string().contains("gone on"), "{refused}");
    e.see_attempt(
        &attempt,
        0,
        P::Ended,
        &[(0, Some(143)), (1, Some(143))],
        None,
    );
    e.see_attempt(&attempt, 1, P::Ended, &[], None);
    let error = &e.job(&job).errors[0];
    assert_eq!(error.code, "JobLaunchTimeout");
    let name = &attempt.nodes[1].node;
    let said = format!(": {name} (rank 2, 3)");
    assert!(error.message.ends_with(&said), "{}", error.message);
    // It is nobody's fault who wrote the job.
    let again = e.attempt(&job);
    assert_ne!(again.id, attempt.id);
    // Who has said that all of it runs has all the time there is.
    for i in [0, 1] {
        e.see(&job, i, P::Ready, &[]);
    }
    for i in [0, 1] {
        let first = 2 * i as i32;
        e.see(&job, i, P::Running, &[(first, None), (first + 1, None)]);
    }
    pass(&mut e, &again, 2 * deadline, &[0, 1]);
    assert!(running(&e));
    let late = FailAttempt {
        attempt: again.id.clone(),
        ..late
    };
    assert!(e.try_apply(C::FailAttempt(late)).is_err());
}

fn resize(target: i32, option: Dealloc) -> C {
    let manual = v1::ManualScaleSettings {
        target_node_count: target,
        node_deallocation_option: option as i32,
    };
    C::Update(Update {
        name: CLUSTER.into(),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(manual),
            auto_scale: None,
        }),
        ..Default::default()
    })
}

#[test]
fn a_node_registers_as_the_size_that_its_token_was_made_for() {
    let mut e = Ensemble::new(0);
    e.ok(C::CreateToken(v1::Token {
        name: "tokens/t".into(),
        kind: v1::token::Kind::Node as i32,
        vm_size: "gpu".into(),
        use_count_max: 1,
        ..Default::default()
    }));
    e.ok(C::UseToken(batchai_proto::internal::v1::UseToken {
        name: "tokens/t".into(),
        node: "nodes/n0".into(),
        uid: "uid-nodes/n0".into(),
        digest: vec![1],
    }));
    let register = |vm_size: &str| {
        C::RegisterNode(RegisterNode {
            name: "nodes/n0".into(),
            uid: "uid-nodes/n0".into(),
            incarnation: "1".into(),
            facts: Some(v1::NodeFacts {
                vm_size: vm_size.into(),
                ..Default::default()
            }),
            empty: true,
        })
    };
    let refused = e.try_apply(register("small")).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("a token for VM size gpu, and registers small")
    );
    e.ok(register("gpu"));
}

#[test]
fn a_workspace_holds_so_much_and_a_scope_has_so_many_bindings() {
    let mut e = Ensemble::new(0);
    let cluster = |i: usize, workspace: &str| {
        C::CreateCluster(v1::Cluster {
            name: format!("{workspace}/clusters/{i}"),
            ..Default::default()
        })
    };
    let most = limit_of_workspace(Kind::Cluster).unwrap();
    for i in 1..most {
        e.ok(cluster(i, WORKSPACE));
    }
    let refused = e.try_apply(cluster(most, WORKSPACE)).unwrap_err();
    assert!(
        refused.to_string().contains(&format!("in {WORKSPACE}")),
        "{refused}"
    );
    let other = format!("{GROUP}/workspaces/other");
    e.ok(C::CreateWorkspace(v1::Workspace {
        name: other.clone(),
        ..Default::default()
    }));
    e.ok(cluster(0, &other));
    e.ok(C::Delete(Delete {
        name: CLUSTER.into(),
        ..Default::default()
    }));
    e.ok(cluster(most, WORKSPACE));
    let binding = |i: usize, scope: &str| {
        C::CreateRoleBinding(v1::RoleBinding {
            name: format!("roleBindings/{i}"),
            member: format!("users/u{i}"),
            scope: scope.into(),
            ..Default::default()
        })
    };
    for i in 0..1000 {
        e.ok(binding(i, WORKSPACE));
    }
    assert!(e.try_apply(binding(1000, WORKSPACE)).is_err());
    e.ok(binding(1000, ""));
    let names = |e: &Ensemble, member: &str| -> Vec<String> {
        e.state
            .bindings_of(member)
            .map(|b| b.name.clone())
            .collect()
    };
    assert_eq!(names(&e, "users/u7"), ["roleBindings/7"]);
    assert_eq!(names(&e, "users/u"), Vec::<String>::new());
}

fn setup_task() -> v1::SetupTask {
    v1::SetupTask {
        command_line: "apt-get install -y libfoo".into(),
        std_out_err_path_prefix: "/logs".into(),
        ..Default::default()
    }
}

impl Ensemble {
    /// A cluster with a set-up task, and its nodes.
    fn to_set_up(target: i32, nodes: usize) -> Ensemble {
        let mut e = Ensemble::with_task(target, Some(setup_task()));
        for i in 0..nodes {
            e.register(&format!("nodes/n{i}"), "1");
        }
        e.settle();
        e
    }

    /// What a node says about its set-up.
    fn see_setup(&mut self, node: &str, phase: P, code: Option<i32>) {
        let id = self.state.nodes[node].attempt.clone().unwrap();
        let attempt = self.state.attempts[&id].clone();
        let ranks: Vec<_> = code.map(|code| (0, Some(code))).into_iter().collect();
        self.see_attempt(&attempt, 0, phase, &ranks, None);
        self.settle();
    }

    /// A node is set up, or fails to be.
    fn set_up(&mut self, node: &str, code: i32) {
        self.see_setup(node, P::Ready, None);
        self.see_setup(node, P::Ended, Some(code));
    }
}

#[test]
fn nodes_are_set_up_before_they_take_jobs_and_after_each_reboot() {
    let mut e = Ensemble::to_set_up(2, 2);
    let job = e.submit("j", 2, |_| {});
    assert_eq!(e.job(&job).state, JobState::Queued);
    let list = assignments::assignments(&e.state, "nodes/n0");
    assert!(list.assignments[0].set_up);
    e.set_up("nodes/n0", 0);
    assert_eq!(e.job(&job).state, JobState::Queued);
    let waits = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(waits.contains("idle: 1, being set up: 1"), "{waits}");
    e.set_up("nodes/n1", 0);
    assert_eq!(e.job(&job).state, JobState::Running);
    for i in 0..2 {
        e.see(&job, i, P::Ready, &[]);
    }
    for i in 0..2 {
        e.see(&job, i, P::Ended, &[(0, Some(0))]);
    }
    assert_eq!(e.state_of(&job), JobState::Succeeded);
    // A reboot: it is set up once more, and only it.
    e.register("nodes/n1", "2");
    e.settle();
    assert!(e.state.nodes["nodes/n1"].attempt.is_some());
    assert!(e.state.nodes["nodes/n0"].attempt.is_none());
    e.set_up("nodes/n1", 0);
    // A node that leaves and comes back is set up anew; one that stays is not.
    e.ok(resize(1, Dealloc::Requeue));
    e.settle();
    assert_eq!(e.state.nodes["nodes/n1"].setup, None);
    e.ok(resize(2, Dealloc::Requeue));
    e.settle();
    assert!(e.state.nodes["nodes/n1"].attempt.is_some());
    assert!(e.state.nodes["nodes/n0"].attempt.is_none());
}

#[test]
fn a_set_up_that_fails_keeps_its_node_out_and_says_why() {
    let mut e = Ensemble::to_set_up(1, 1);
    let job = e.submit("j", 1, |_| {});
    e.set_up("nodes/n0", 3);
    let node = &e.state.nodes["nodes/n0"];
    assert_eq!(
        (node.attempt.clone(), setup::is_due(&e.state, node)),
        (None, false)
    );
    let error = setup::error(node).unwrap();
    assert_eq!(error.code, "SetupTaskFailed");
    assert!(error.message.contains("exit code 3 on nodes/n0"));
    let waits = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(waits.contains("whose set-up failed: 1"), "{waits}");
    // Another boot, another try; infrastructure gets several.
    e.register("nodes/n0", "2");
    e.settle();
    for _ in 0..jobs::INFRASTRUCTURE_RETRIES_MAX {
        e.see_setup("nodes/n0", P::Lost, None);
        assert!(e.state.nodes["nodes/n0"].attempt.is_some());
    }
    e.see_setup("nodes/n0", P::Lost, None);
    let node = &e.state.nodes["nodes/n0"];
    assert_eq!(setup::error(node).unwrap().code, "NodeLost");
    assert_eq!(node.attempt, None);
}

#[test]
fn a_node_has_the_mounts_of_its_cluster_and_says_how_they_stand() {
    let mut e = Ensemble::new(0);
    let name = format!("{WORKSPACE}/clusters/m");
    let cluster = v1::Cluster {
        name: name.clone(),
        uid: "u".into(),
        vm_size: "small".into(),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(v1::ManualScaleSettings {
                target_node_count: 1,
                ..Default::default()
            }),
            auto_scale: None,
        }),
        node_setup: Some(v1::NodeSetup {
            mount_volumes: Some(v1::MountVolumes {
                unmanaged_file_systems: vec![v1::UnmanagedFileSystem::default()],
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    e.register("nodes/n0", "1");
    e.settle();
    let list = |e: &Ensemble| assignments::assignments(&e.state, "nodes/n0");
    assert_eq!(list(&e).mounts, None);
    let before = list(&e).revision;
    e.ok(C::CreateCluster(cluster.clone()));
    e.settle();
    let mounts = list(&e).mounts.unwrap();
    assert_eq!((mounts.cluster, mounts.uid.as_str()), (name.clone(), "u"));
    assert_eq!(mounts.volumes, cluster.node_setup.unwrap().mount_volumes);
    assert!(list(&e).revision > before);
    // It is set up though there is no task, and waits for its mounts there.
    assert!(list(&e).assignments[0].set_up);
    e.set_up("nodes/n0", 0);
    let node = |e: &Ensemble| e.state.nodes["nodes/n0"].clone();
    assert!(setup::is_done(&e.state, &node(&e)));
    let say = |e: &mut Ensemble, uid: &str, code: Option<&str>| {
        let failure = code.map(|code| attempts::error(code, "why", &[]));
        let mounts = MountsReport {
            cluster_uid: uid.into(),
            failure,
        };
        let known = node(e);
        e.ok(C::RecordReport(RecordReport {
            node: "nodes/n0".into(),
            uid: known.uid.clone(),
            incarnation: known.incarnation.clone(),
            report: Some(Report {
                mounts: Some(mounts),
                ..Report::default()
            }),
        }));
        e.settle();
    };
    say(&mut e, "another", Some("MountUnavailable"));
    assert!(setup::is_done(&e.state, &node(&e)));
    say(&mut e, "u", Some("MountUnavailable"));
    assert!(!setup::is_done(&e.state, &node(&e)) && !setup::is_due(&e.state, &node(&e)));
    assert_eq!(setup::error(&node(&e)).unwrap().code, "MountUnavailable");
    say(&mut e, "u", None);
    assert!(setup::is_done(&e.state, &node(&e)));
    assert_eq!(setup::error(&node(&e)), None);
    // A cluster that goes takes them along.
    let before = list(&e).revision;
    e.ok(C::Delete(Delete {
        name,
        ..Delete::default()
    }));
    assert_eq!(list(&e).mounts, None);
    assert!(list(&e).revision > before);
}

#[test]
fn what_is_of_no_use_leaves_first_and_what_does_not_fit_is_not_set_up() {
    let mut e = Ensemble::to_set_up(3, 3);
    e.set_up("nodes/n0", 3);
    e.set_up("nodes/n1", 0);
    e.ok(resize(2, Dealloc::Requeue));
    e.settle();
    assert!(e.state.nodes["nodes/n0"].is_free());
    e.ok(resize(1, Dealloc::Requeue));
    e.settle();
    assert!(e.state.nodes["nodes/n2"].leaving);
    assert_eq!(e.state.nodes["nodes/n1"].cluster.as_deref(), Some(CLUSTER));
    // Another size, in the same incarnation, in the middle of it.
    let mut e = Ensemble::to_set_up(1, 1);
    e.register_as("nodes/n0", "1", "large");
    let list = assignments::assignments(&e.state, "nodes/n0");
    let stop = batchai_proto::agent::v1::assignment::Desired::Stop;
    assert_eq!(list.assignments[0].desired(), stop);
    e.see_setup("nodes/n0", P::Ended, None);
    assert!(e.state.nodes["nodes/n0"].is_free());
    // One that takes its machine down with it is not tried for ever.
    let mut e = Ensemble::to_set_up(1, 1);
    for boot in 2..20 {
        e.register("nodes/n0", &boot.to_string());
        e.settle();
    }
    assert!(setup::error(&e.state.nodes["nodes/n0"]).is_some());
    assert_eq!(e.state.nodes["nodes/n0"].attempt, None);
}

#[test]
fn clusters_are_resized_and_deleted_while_their_nodes_are_set_up() {
    for option in [
        Dealloc::Requeue,
        Dealloc::Terminate,
        Dealloc::WaitForJobCompletion,
    ] {
        let mut e = Ensemble::to_set_up(1, 1);
        e.ok(resize(0, option));
        e.settle();
        let list = assignments::assignments(&e.state, "nodes/n0");
        let stop = batchai_proto::agent::v1::assignment::Desired::Stop;
        assert_eq!(list.assignments[0].desired(), stop);
        e.see_setup("nodes/n0", P::Ended, None);
        assert!(e.state.nodes["nodes/n0"].is_free());
        assert!(e.state.attempts.is_empty());
    }
    let mut e = Ensemble::to_set_up(2, 2);
    e.set_up("nodes/n0", 0);
    e.ok(C::Delete(Delete {
        name: CLUSTER.into(),
        etag: String::new(),
        force: false,
    }));
    e.settle();
    assert!(e.state.clusters[CLUSTER].deleting.is_some());
    e.see_setup("nodes/n1", P::Ended, None);
    assert!(e.state.clusters.is_empty() && e.state.attempts.is_empty());
    assert!(e.state.nodes.values().all(|node| node.is_free()));
}

#[test]
fn shrinking_does_to_running_jobs_what_was_asked_for() {
    for (option, expected) in [
        (Dealloc::Requeue, JobState::Queued),
        (Dealloc::Terminate, JobState::Failed),
        (Dealloc::WaitForJobCompletion, JobState::Succeeded),
    ] {
        let mut e = Ensemble::with_nodes(2, 2);
        let job = e.run_two(|_| {});
        e.ok(resize(0, option));
        e.settle();
        e.see(&job, 0, P::Ended, &[(0, Some(0))]);
        e.see(&job, 1, P::Ended, &[]);
        assert_eq!(e.state_of(&job), expected, "{option:?}");
        let errors = &e.job(&job).errors;
        let said = errors
            .iter()
            .any(|e| e.message.contains("taken from its cluster"));
        assert_eq!(said, expected != JobState::Succeeded, "{errors:?}");
        assert!(
            e.state.nodes.values().all(|node| node.cluster.is_none()),
            "{option:?}"
        );
        assert!(e.state.clusters[CLUSTER].members.is_empty());
    }
}

#[test]
fn what_still_holds_something_is_not_deleted() {
    let mut e = Ensemble::with_nodes(1, 1);
    let job = e.submit("j", 1, |_| {});
    let delete = |name: &str| Delete {
        name: name.into(),
        ..Default::default()
    };
    for kind in [
        C::Delete(delete(GROUP)),
        C::Delete(delete(WORKSPACE)),
        C::Delete(delete(EXPERIMENT)),
        C::Delete(delete(CLUSTER)),
    ] {
        assert!(matches!(
            e.try_apply(kind),
            Err(Rejection::WrongState { .. })
        ));
    }
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    e.ok(C::Delete(delete(&job)));
    e.ok(C::Delete(delete(EXPERIMENT)));
    e.ok(C::Delete(delete(CLUSTER)));
    e.ok(C::Delete(delete(WORKSPACE)));
    e.ok(C::Delete(delete(GROUP)));
    assert!(e.state.nodes.values().all(|node| node.cluster.is_none()));
}

fn force(name: &str) -> C {
    C::Delete(Delete {
        name: name.into(),
        force: true,
        ..Default::default()
    })
}

#[test]
fn a_workspace_goes_with_all_it_holds_when_its_jobs_have_ended() {
    let mut e = Ensemble::with_nodes(2, 2);
    let running = e.run_two(|_| {});
    e.submit("queued", 2, |_| {});
    let other = "resourceGroups/g/workspaces/other";
    e.ok(C::CreateWorkspace(v1::Workspace {
        name: other.into(),
        ..Default::default()
    }));
    e.ok(C::CreateExperiment(v1::Experiment {
        name: format!("{other}/experiments/e"),
        ..Default::default()
    }));
    // A job of another workspace on the cluster that goes.
    let guest = format!("{other}/experiments/e/jobs/guest");
    e.ok(C::CreateJob(v1::Job {
        name: guest.clone(),
        cluster: CLUSTER.into(),
        node_count: 1,
        ..Default::default()
    }));
    e.ok(force(WORKSPACE));
    let deleting = v1::ProvisioningState::Deleting;
    assert_eq!(e.state.workspaces[WORKSPACE].provisioning_state(), deleting);
    let again = e.ok(force(WORKSPACE));
    assert!(again.is_empty(), "asked twice, it is the same deletion");
    let new = v1::Experiment {
        name: format!("{WORKSPACE}/experiments/new"),
        ..Default::default()
    };
    let refused = e.try_apply(C::CreateExperiment(new));
    assert!(matches!(refused, Err(Rejection::WrongState { .. })));
    e.settle();
    // The running job holds up what holds it, and nothing else.
    assert_eq!(e.state_of(&running), JobState::Terminating);
    assert_eq!(e.state.jobs.len(), 2);
    assert_eq!(e.job(&guest).state, JobState::Failed);
    assert_eq!(e.job(&guest).errors[0].code, "ClusterDeleted");
    assert!(e.state.clusters.contains_key(CLUSTER));
    let attempt = e.attempt(&running);
    e.see(&running, 0, P::Ended, &[(0, Some(143))]);
    e.see_attempt(&attempt, 1, P::Ended, &[], None);
    e.settle();
    assert!(!e.state.workspaces.contains_key(WORKSPACE));
    assert!(e.state.deleting.is_empty() && e.state.clusters.is_empty());
    assert!(e.state.nodes.values().all(|node| node.cluster.is_none()));
    assert_eq!(e.state.jobs.len(), 1);
    // The name is free.
    e.ok(C::CreateWorkspace(v1::Workspace {
        name: WORKSPACE.into(),
        ..Default::default()
    }));
    e.ok(force(GROUP));
    e.settle();
    assert!(e.state.resource_groups.is_empty() && e.state.jobs.is_empty());
}

#[test]
fn more_jobs_than_one_look_deletes_go_all_the_same() {
    let mut e = Ensemble::with_nodes(0, 0);
    for i in 0..700 {
        e.submit(&format!("j{i}"), 1, |_| {});
    }
    e.ok(force(EXPERIMENT));
    e.settle();
    assert!(e.state.jobs.is_empty() && e.state.experiments.is_empty());
    assert!(e.state.clusters[CLUSTER].queue.is_empty());
}

#[test]
fn labels_change_and_nothing_else_with_them() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|_| {});
    let before = e.attempt(&job);
    for name in [GROUP, WORKSPACE, EXPERIMENT, CLUSTER, job.as_str()] {
        let labels = [("team".to_owned(), "vision".to_owned())].into();
        let labels = Some(batchai_proto::internal::v1::Labels { labels });
        let events = e.ok(C::Update(Update {
            name: name.into(),
            labels,
            ..Default::default()
        }));
        let name = name.to_owned();
        assert_eq!(events, [Event::Changed { name }]);
    }
    assert_eq!(e.job(&job).spec.labels["team"], "vision");
    assert_eq!(e.state.clusters[CLUSTER].spec.labels["team"], "vision");
    assert_eq!(e.state.experiments[EXPERIMENT].labels["team"], "vision");
    assert_eq!(e.attempt(&job), before, "what runs is not touched");
    assert_eq!(e.state.clusters[CLUSTER].target(), 2);
}

#[test]
fn an_alias_is_no_name_that_machines_have_themselves() {
    let mut e = Ensemble::with_nodes(0, 1);
    let alias = v1::VmSizeAlias {
        name: "vmSizeAliases/small".into(),
        vm_size: "large".into(),
        ..Default::default()
    };
    let refused = e.try_apply(C::CreateVmSizeAlias(alias));
    assert!(matches!(refused, Err(Rejection::WrongState { .. })));
}

#[test]
fn nodes_of_another_image_do_not_join() {
    let mut e = Ensemble::new(0);
    let image = v1::ImageReference {
        publisher: "debian".into(),
        offer: "debian".into(),
        sku: "12".into(),
        version: "latest".into(),
        ..Default::default()
    };
    let cluster = format!("{WORKSPACE}/clusters/debian");
    e.ok(C::CreateCluster(v1::Cluster {
        name: cluster.clone(),
        vm_size: "small".into(),
        virtual_machine_configuration: Some(v1::VirtualMachineConfiguration {
            image_reference: Some(image),
        }),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(v1::ManualScaleSettings {
                target_node_count: 9,
                ..Default::default()
            }),
            auto_scale: None,
        }),
        ..Default::default()
    }));
    for (i, image) in [
        "debian:debian:12:latest",
        "ubuntu:debian:12:latest",
        "debian:ubuntu:12:latest",
        "debian:debian:13:latest",
        "debian:debian:12:1",
        "",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("nodes/n{i}");
        let facts = v1::NodeFacts {
            vm_size: "small".into(),
            image: image.into(),
            ..Default::default()
        };
        e.ok(C::RegisterNode(RegisterNode {
            name: name.clone(),
            uid: name.clone(),
            incarnation: "1".into(),
            facts: Some(facts),
            empty: true,
        }));
        let now = e.heard.now;
        e.heard.last.insert(name, now);
    }
    e.settle();
    let members: Vec<_> = e.state.clusters[&cluster].members.iter().collect();
    assert_eq!(members, ["nodes/n0"]);
}

#[test]
fn an_alias_stands_for_a_size_as_long_as_it_exists() {
    let mut e = Ensemble::new(0);
    let cluster = format!("{WORKSPACE}/clusters/aliased");
    let alias = v1::VmSizeAlias {
        name: "vmSizeAliases/Standard_NC6".into(),
        vm_size: "small".into(),
        ..Default::default()
    };
    e.ok(C::CreateVmSizeAlias(alias));
    e.ok(C::CreateCluster(v1::Cluster {
        name: cluster.clone(),
        vm_size: "Standard_NC6".into(),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(v1::ManualScaleSettings {
                target_node_count: 2,
                ..Default::default()
            }),
            auto_scale: None,
        }),
        ..Default::default()
    }));
    e.register("nodes/n0", "1");
    e.settle();
    assert_eq!(e.state.clusters[&cluster].members.len(), 1);
    e.ok(force("vmSizeAliases/Standard_NC6"));
    // The same machine comes back: it is still what the cluster was made of.
    e.register("nodes/n0", "2");
    e.register("nodes/n1", "1");
    e.settle();
    assert_eq!(e.state.clusters[&cluster].members.len(), 1);
}

#[test]
fn a_job_with_processes_per_node_is_over_when_all_of_them_are() {
    let mut e = Ensemble::with_nodes(2, 2);
    let job = e.run_two(|job| {
        job.custom_toolkit_settings = Some(v1::CustomToolkitSettings {
            processes_per_node: 2,
            ..Default::default()
        });
    });
    e.see(&job, 0, P::Ended, &[(0, Some(0)), (1, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Running);
    e.see(&job, 1, P::Ended, &[(2, Some(0)), (3, Some(0))]);
    assert_eq!(e.state_of(&job), JobState::Succeeded);
}

fn create_group(
    e: &mut Ensemble,
    group: &str,
    id: &str,
    digest: u8,
) -> Result<Vec<Event>, Rejection> {
    let (caller, id) = ("me".to_owned(), id.to_owned());
    e.request = Some(RequestKey {
        caller,
        id,
        digest: vec![digest],
    });
    let name = format!("resourceGroups/{group}");
    e.try_apply(C::CreateResourceGroup(v1::ResourceGroup {
        name,
        ..Default::default()
    }))
}

#[test]
fn a_request_that_is_sent_again_does_nothing() {
    let mut e = Ensemble::new(0);
    assert_eq!(create_group(&mut e, "a", "1", 1).unwrap().len(), 1);
    let before = e.state.revision;
    assert!(create_group(&mut e, "a", "1", 1).unwrap().is_empty());
    assert_eq!(e.state.revision, before);
    let reused = create_group(&mut e, "b", "1", 2);
    assert!(matches!(reused, Err(Rejection::RequestIdReused { .. })));
    // One that was refused was not carried out.
    assert!(matches!(
        create_group(&mut e, "a", "2", 3),
        Err(Rejection::Exists { .. })
    ));
    assert_eq!(create_group(&mut e, "c", "2", 4).unwrap().len(), 1);
    e.heard.now += requests::AGE_MAX_MS + 1;
    assert_eq!(create_group(&mut e, "d", "3", 5).unwrap().len(), 1);
    assert_eq!(e.state.requests.count(), 1, "old ones are forgotten");
    assert_eq!(create_group(&mut e, "b", "1", 2).unwrap().len(), 1);
    // One that is too old is forgotten, also where nothing has come since that would have swept it.
    e.heard.now += requests::AGE_MAX_MS + 1;
    assert_eq!(create_group(&mut e, "late", "1", 9).unwrap().len(), 1);
}

#[test]
fn no_more_requests_are_remembered_than_may_be() {
    let mut state = State {
        time: batchai_common::time::from_millis(1),
        ..State::default()
    };
    for i in 0..requests::REQUESTS_MAX + 5 {
        let (caller, id) = ("me".to_owned(), i.to_string());
        requests::remember(
            &mut state,
            &RequestKey {
                caller,
                id,
                digest: Vec::new(),
            },
        );
    }
    assert_eq!(state.requests.count(), requests::REQUESTS_MAX);
}

#[test]
fn a_stale_etag_is_refused() {
    let mut e = Ensemble::new(0);
    let etag = e.state.workspaces[WORKSPACE].etag.clone();
    assert!(!etag.is_empty());
    let delete = Delete {
        name: EXPERIMENT.into(),
        etag,
        force: true,
    };
    assert!(matches!(
        e.try_apply(C::Delete(delete)),
        Err(Rejection::StaleEtag { .. })
    ));
}

#[test]
fn nodes_of_another_size_or_image_do_not_join_and_silent_ones_get_no_work() {
    let mut e = Ensemble::new(2);
    e.register("nodes/n0", "1");
    let facts = v1::NodeFacts {
        vm_size: "large".into(),
        ..Default::default()
    };
    e.ok(C::RegisterNode(RegisterNode {
        name: "nodes/big".into(),
        uid: "u".into(),
        incarnation: "1".into(),
        facts: Some(facts),
        empty: true,
    }));
    let now = e.heard.now;
    e.heard.last.insert("nodes/big".into(), now);
    e.settle();
    let members: Vec<_> = e.state.clusters[CLUSTER].members.iter().cloned().collect();
    assert_eq!(members, ["nodes/n0"]);
    e.heard.now += 60_000;
    let job = e.submit("j", 1, |_| {});
    assert_eq!(e.state_of(&job), JobState::Queued);
    let reason = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(reason.contains("not heard of lately: 1"), "{reason}");
}

/// What a random history is made of.
#[derive(Clone, Debug)]
enum Action {
    Submit {
        nodes: i32,
        pytorch: bool,
        high: bool,
    },
    See {
        job: usize,
        node: usize,
        phase: i32,
        code: Option<i32>,
        infrastructure: bool,
    },
    Terminate(usize),
    Delete(usize),
    Reboot(usize, bool),
    Resize(i32, i32),
    Pass(i64),
    /// What holds jobs, or runs them, goes with all of it, and is made again when it is gone.
    Force(usize),
    Label(usize),
    Batch(usize),
    Rotate,
    SetUp {
        node: usize,
        phase: i32,
        code: Option<i32>,
    },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        1 => Just(Action::Rotate),
        8 => (0..4usize, 2..6i32, prop::option::weighted(0.5, 0..2i32))
            .prop_map(|(node, phase, code)| Action::SetUp { node, phase, code }),
        3 => (1..4i32, any::<bool>(), any::<bool>())
            .prop_map(|(nodes, pytorch, high)| Action::Submit { nodes, pytorch, high }),
        12 => (0..6usize, 0..3usize, 1..6i32, prop::option::of(0..3i32), prop::bool::weighted(0.1))
            .prop_map(|(job, node, phase, code, infrastructure)| Action::See {
                job, node, phase, code, infrastructure
            }),
        1 => (0..6usize).prop_map(Action::Terminate),
        1 => (0..6usize).prop_map(Action::Delete),
        1 => (0..4usize, prop::bool::weighted(0.3)).prop_map(|(n, other)| Action::Reboot(n, other)),
        1 => (0..5i32, 0..4i32).prop_map(|(n, o)| Action::Resize(n, o)),
        1 => (0..20_000i64).prop_map(Action::Pass),
        1 => (0..4usize).prop_map(Action::Force),
        1 => (0..5usize).prop_map(Action::Label),
        1 => (1..4usize).prop_map(Action::Batch),
    ]
}

/// The State as it comes back from its records, each encoded and decoded.
pub(super) fn through_a_snapshot(state: &State) -> State {
    use prost::Message as _;
    let mut builder = snapshot::Builder::default();
    for record in snapshot::records(state) {
        let bytes = record.encode_to_vec();
        let read = batchai_proto::internal::v1::SnapshotRecord::decode(&bytes[..]).unwrap();
        builder.add(read).unwrap();
    }
    builder.finish().unwrap()
}

#[test]
fn a_state_comes_back_from_its_records_whole() {
    let mut e = Ensemble::to_set_up(3, 3);
    e.rotate("k");
    e.set_up("nodes/n0", 0);
    e.set_up("nodes/n1", 3);
    e.request = Some(RequestKey {
        caller: "users/ada".into(),
        id: "1".into(),
        digest: vec![7],
    });
    let job = e.submit("j", 1, |job| job.secrets = vec![sealed_by("k")]);
    e.see(&job, 0, P::Ready, &[]);
    e.submit("waits", 3, |_| {});
    // Its attempt was placed as it was before.
    e.ok(C::Update(Update {
        name: job,
        labels: Some(batchai_proto::internal::v1::Labels {
            labels: [("a".to_owned(), "b".to_owned())].into(),
        }),
        ..Default::default()
    }));
    e.ok(C::CreateToken(v1::Token {
        name: "tokens/t".into(),
        kind: v1::token::Kind::Node as i32,
        use_count_max: 2,
        ..Default::default()
    }));
    for (node, uid) in [("nodes/x", "x"), ("nodes/y", "y")] {
        e.ok(C::UseToken(batchai_proto::internal::v1::UseToken {
            name: "tokens/t".into(),
            node: node.into(),
            uid: uid.into(),
            digest: vec![1],
        }));
    }
    e.ok(C::ExpelNode(batchai_proto::internal::v1::ExpelNode {
        name: "nodes/x".into(),
    }));
    e.ok(C::RevokeCertificates(
        batchai_proto::internal::v1::RevokeCertificates {
            member: "users/ada".into(),
        },
    ));
    e.ok(C::CreateRoleBinding(v1::RoleBinding {
        name: "roleBindings/b".into(),
        member: "users/ada".into(),
        ..Default::default()
    }));
    e.ok(C::CreateVmSizeAlias(v1::VmSizeAlias {
        name: "vmSizeAliases/a".into(),
        ..Default::default()
    }));
    e.ok(force(CLUSTER));
    // Nothing of it is empty, so that nothing can be forgotten.
    let s = &e.state;
    assert!(!s.jobs.is_empty() && !s.attempts.is_empty() && s.requests.count() == 1);
    assert!(!s.joined.is_empty() && !s.expelled.is_empty() && !s.revoked.is_empty());
    assert!(!s.data_keys.is_empty() && !s.deleting.is_empty() && !s.held.is_empty());
    assert!(!s.tokens.is_empty() || s.role_bindings.len() == 1 && s.vm_size_aliases.len() == 1);
    assert_eq!(through_a_snapshot(s), *s);

    let records: Vec<_> = snapshot::records(s).collect();
    let add = |records: &[batchai_proto::internal::v1::SnapshotRecord]| {
        let mut builder = snapshot::Builder::default();
        let added = records
            .iter()
            .try_for_each(|record| builder.add(record.clone()));
        added.and_then(|()| builder.finish().map(|_| ()))
    };
    assert_eq!(add(&[]), Err(snapshot::SnapshotError::Header));
    assert_eq!(add(&records[1..]), Err(snapshot::SnapshotError::Header));
    let twice = [records[0].clone(), records[0].clone()];
    assert_eq!(add(&twice), Err(snapshot::SnapshotError::Header));
    let unknown = [records[0].clone(), Default::default()];
    assert_eq!(add(&unknown), Err(snapshot::SnapshotError::Unknown));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever happens, every invariant holds after every command, and two replicas that apply the same commands
    /// have the same State.
    #[test]
    fn invariants_hold_through_any_history(
        actions in prop::collection::vec(action(), 1..80), with_task in any::<bool>()
    ) {
        let mut e = match with_task {
            true => Ensemble::to_set_up(3, 4),
            false => Ensemble::with_nodes(3, 4),
        };
        let mut names: Vec<String> = Vec::new();
        for (i, action) in actions.into_iter().enumerate() {
            match action {
                Action::Submit { .. } | Action::Batch(_) if !e.state.deleting.is_empty() => {}
                Action::Force(i) => {
                    let _ = e.try_apply(force([GROUP, WORKSPACE, EXPERIMENT, CLUSTER][i]));
                }
                Action::Label(at) => {
                    let name = [GROUP, WORKSPACE, EXPERIMENT, CLUSTER].get(at);
                    let name = name.map(|name| (*name).to_owned()).or(names.last().cloned());
                    let labels = [("i".to_owned(), i.to_string())].into();
                    let _ = e.try_apply(C::Update(Update {
                        name: name.unwrap_or_default(),
                        labels: Some(batchai_proto::internal::v1::Labels { labels }),
                        ..Default::default()
                    }));
                }
                Action::Batch(count) => {
                    let jobs: Vec<_> = (0..count).map(|n| v1::Job {
                        name: format!("{EXPERIMENT}/jobs/b{i}-{n}"),
                        cluster: CLUSTER.into(),
                        node_count: 1,
                        ..Default::default()
                    }).collect();
                    names.extend(jobs.iter().map(|job| job.name.clone()));
                    e.ok(C::CreateJobs(CreateJobs { jobs }));
                }
                Action::Submit { nodes, pytorch: torch, high } => {
                    let key = keys::current(&e.state, WORKSPACE).map(|key| key.id.clone());
                    names.push(e.submit(&format!("j{i}"), nodes, |job| {
                        if torch { pytorch(job) }
                        if let Some(key) = key { job.secrets.push(sealed_by(&key)) }
                        if high { job.set_scheduling_priority(v1::job::SchedulingPriority::High) }
                    }));
                }
                Action::See { job, node, phase, code, infrastructure } => {
                    let Some(name) = names.get(job) else { continue };
                    let Some(job) = e.state.jobs.get(name.as_str()) else { continue };
                    let Some(id) = job.attempt.clone() else { continue };
                    let attempt = e.state.attempts[&id].clone();
                    if node >= attempt.nodes.len() { continue }
                    let failure = infrastructure.then(|| Failure { infrastructure, ..Default::default() });
                    let failure = failure.map(|f| Failure {
                        error: Some(attempts::error("X", "x", &[])), ..f
                    });
                    let phase = P::try_from(phase).unwrap();
                    e.see_attempt(&attempt, node, phase, &[(node as i32, code)], failure);
                }
                Action::Terminate(job) => {
                    if let Some(name) = names.get(job) {
                        let _ = e.try_apply(C::TerminateJob(TerminateJob {
            name: name.clone(),
            ..Default::default()
        }));
                    }
                }
                Action::Delete(job) => {
                    if let Some(name) = names.get(job) {
                        let delete = Delete { name: name.clone(), etag: String::new(), force: false };
                        let _ = e.try_apply(C::Delete(delete));
                    }
                }
                Action::Reboot(node, other) => {
                    let size = if other { "large" } else { "small" };
                    e.register_as(&format!("nodes/n{node}"), &format!("boot-{i}"), size);
                }
                Action::Resize(target, option) => {
                    let _ = e.try_apply(resize(target, Dealloc::try_from(option).unwrap()));
                }
                Action::SetUp { node, phase, code } => {
                    let node = format!("nodes/n{node}");
                    let busy = e.state.nodes[&node].attempt.as_ref().map(|id| &e.state.attempts[id]);
                    if busy.is_some_and(|attempt| attempt.job().is_none()) {
                        e.see_setup(&node, P::try_from(phase).unwrap(), code);
                    }
                }
                Action::Rotate => {
                    if !e.state.deleting.contains(WORKSPACE) && !e.state.deleting.contains(GROUP) {
                        e.rotate(&format!("key-{i}"));
                    }
                }
                Action::Pass(ms) => {
                    e.heard.now += ms;
                    let now = e.heard.now;
                    e.heard.last.values_mut().for_each(|last| *last = now);
                }
            }
            e.settle();
            if e.state.deleting.is_empty() {
                e.make_what_holds_jobs(3);
            }
        }
        prop_assert_eq!(through_a_snapshot(&e.state), e.state.clone());
    }
}

#[test]
fn whatever_a_state_holds_is_in_its_digest() {
    let mut e = Ensemble::with_nodes(2, 2);
    e.run_two(|_| {});
    let whole = e.state.clone();
    type Change = fn(&mut State);
    let parts: [(&str, Change); 9] = [
        ("resource_groups", |s| s.resource_groups.clear()),
        ("workspaces", |s| s.workspaces.clear()),
        ("clusters", |s| s.clusters.clear()),
        ("experiments", |s| s.experiments.clear()),
        ("jobs", |s| s.jobs.clear()),
        ("attempts", |s| s.attempts.clear()),
        ("nodes", |s| s.nodes.clear()),
        ("one field of a node", |s| {
            for name in s.nodes.clone().keys() {
                Arc::make_mut(s.nodes.get_mut(name).unwrap()).leaving = true;
            }
        }),
        ("revision", |s| s.revision += 1),
    ];
    for (part, change) in parts {
        let mut other = whole.clone();
        change(&mut other);
        assert!(other != whole, "there is nothing to change: {part}");
        assert_ne!(Digest::of(&other), Digest::of(&whole), "{part}");
        let digest = Digest::of(&whole).advance(&whole, &other);
        assert_eq!(digest, Digest::of(&other), "{part}");
    }
}

#[test]
fn a_digest_that_is_kept_up_is_that_of_the_whole_also_where_requests_are_forgotten() {
    let mut state = Ensemble::new(0).state.clone();
    let first = state.time.seconds;
    let mut digest = Digest::of(&state);
    let mut before = state.clone();
    for number in 0..requests::REQUESTS_MAX + 1500 {
        let command = Command {
            time: Some(prost_types::Timestamp {
                seconds: first + number as i64 / 100,
                nanos: 0,
            }),
            request: Some(RequestKey {
                caller: "users/u".into(),
                // Scattered, as those of clients are.
                id: format!("{:08x}", (number as u32).wrapping_mul(2_654_435_761)),
                digest: vec![1; 32],
            }),
            kind: Some(C::Update(batchai_proto::internal::v1::Update {
                name: "resourceGroups/g".into(),
                labels: Some(batchai_proto::internal::v1::Labels {
                    labels: [("n".to_owned(), number.to_string())].into(),
                }),
                ..Default::default()
            })),
        };
        apply(&mut state, number as u64 + 1, &command).unwrap();
        if number % 50 == 0 {
            digest = digest.advance(&before, &state);
            before = state.clone();
        }
        if number % 500 == 0 {
            assert_eq!(digest, Digest::of(&state), "after {number}");
        }
    }
}

#[test]
fn a_job_that_would_fit_does_not_overtake_the_one_whose_turn_it_is() {
    let mut e = Ensemble::with_nodes(2, 2);
    let first = e.submit("first", 1, |_| {});
    let large = e.submit("large", 2, |_| {});
    let small = e.submit("small", 1, |_| {});
    let states = [&first, &large, &small].map(|job| e.state_of(job));
    assert_eq!(
        states,
        [JobState::Running, JobState::Queued, JobState::Queued]
    );
}
