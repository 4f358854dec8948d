//! The ports of attempts that share a machine.

use std::collections::BTreeSet;

use batchai_proto::agent::v1::{AttemptObservation, Report};
use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{
    AllocateNode, Command, InitEnsemble, RecordReport, RegisterNode,
};
use batchai_proto::v1::job_attempt_node::Phase as P;
use proptest::prelude::*;

use crate::scheduler::explain::pending_reason;
use crate::scheduler::heard::Heard;
use crate::scheduler::schedule;
use crate::state::tests::Ensemble;
use crate::state::*;

const GROUP: &str = "resourceGroups/g";
const WORKSPACE: &str = "resourceGroups/g/workspaces/w";
const EXPERIMENT: &str = "resourceGroups/g/workspaces/w/experiments/e";
const CLUSTER: &str = "resourceGroups/g/workspaces/w/clusters/c";
const FIRST_PORT: i32 = 20_000;
const ATTEMPTS: usize = 1000;

/// What decides how many ports a job needs: its nodes, workers and servers. Without workers it is no TensorFlow job. And whether it names the
/// directory that its nodes share.
type Shape = (i32, i32, i32, bool);

fn shaped(job: &mut v1::Job, (nodes, workers, servers, shares): Shape) {
    job.node_count = nodes;
    if shares {
        job.job_preparation = Some(v1::JobPreparation {
            command_line: format!("ls ${}", batchai_proto::shared::SHARED_JOB_TEMP),
        });
    }
    if workers > 0 {
        job.custom_toolkit_settings = None;
        job.tensor_flow_settings = Some(v1::TensorFlowSettings {
            worker_count: workers,
            parameter_server_count: servers,
            ..Default::default()
        });
    }
}

/// How many ports it has on all of its nodes: one for each process at least, and one for what nodes share.
fn needs(shape: Shape) -> i32 {
    let mut job = v1::Job::default();
    shaped(&mut job, shape);
    let (nodes, workers, servers, shares) = shape;
    let serves = i32::from(shares && nodes > 1);
    let nodes = 0..usize::try_from(nodes).unwrap();
    let ports: i32 = nodes.clone().map(|i| attempts::port_count(&job, i)).sum();
    assert!(
        ports >= workers + servers.min(workers) + serves,
        "{shape:?}"
    );
    // The master's alone has it, and nobody who shares with nobody.
    job.job_preparation = None;
    let without: i32 = nodes.map(|i| attempts::port_count(&job, i)).sum();
    assert_eq!(ports - without, serves, "{shape:?}");
    ports
}

/// Nodes of one machine. Invariants are checked where a test asks: a thousand times would take minutes.
struct Crowd {
    state: State,
    heard: Heard,
    index: u64,
    last_port: i32,
}

impl Crowd {
    fn new(nodes: i32, last_port: i32) -> Crowd {
        let mut crowd = Crowd {
            state: State::default(),
            heard: Heard {
                now: 1_000_000,
                ..Heard::default()
            },
            index: 0,
            last_port,
        };
        crowd.apply(C::InitEnsemble(InitEnsemble {
            ensemble: "00000000-0000-0000-0000-000000000001".into(),
            epoch: 1,
            replicas: Vec::new(),
        }));
        crowd.apply(C::CreateResourceGroup(v1::ResourceGroup {
            name: GROUP.into(),
            ..Default::default()
        }));
        crowd.apply(C::CreateWorkspace(v1::Workspace {
            name: WORKSPACE.into(),
            ..Default::default()
        }));
        crowd.apply(C::CreateExperiment(v1::Experiment {
            name: EXPERIMENT.into(),
            ..Default::default()
        }));
        crowd.apply(C::CreateCluster(v1::Cluster {
            name: CLUSTER.into(),
            vm_size: "small".into(),
            scale_settings: Some(v1::ScaleSettings {
                manual: Some(v1::ManualScaleSettings {
                    target_node_count: nodes,
                    ..Default::default()
                }),
                auto_scale: None,
            }),
            ..Default::default()
        }));
        for i in 0..nodes {
            crowd.join(format!("nodes/n{i}"));
        }
        crowd
    }

    fn apply(&mut self, kind: C) {
        self.index += 1;
        let command = Command {
            time: Some(batchai_common::time::from_millis(self.heard.now)),
            request: None,
            kind: Some(kind),
        };
        apply(&mut self.state, self.index, &command).unwrap();
    }

    fn join(&mut self, name: String) {
        self.apply(C::RegisterNode(RegisterNode {
            name: name.clone(),
            uid: format!("uid-{name}"),
            incarnation: "1".into(),
            facts: Some(v1::NodeFacts {
                vm_size: "small".into(),
                boot_id: "one-machine".into(),
                first_port: FIRST_PORT,
                last_port: self.last_port,
                ..Default::default()
            }),
            empty: true,
        }));
        self.heard.last.insert(name.clone(), self.heard.now);
        self.apply(C::AllocateNode(AllocateNode {
            node: name,
            cluster: CLUSTER.into(),
        }));
    }

    fn queue(&mut self, id: &str, shape: Shape) {
        let mut job = v1::Job {
            name: format!("{EXPERIMENT}/jobs/{id}"),
            uid: format!("uid-{id}"),
            cluster: CLUSTER.into(),
            custom_toolkit_settings: Some(v1::CustomToolkitSettings::default()),
            ..Default::default()
        };
        shaped(&mut job, shape);
        self.apply(C::CreateJob(job));
    }

    /// Places all that is queued, as a leader does.
    fn place(&mut self) {
        loop {
            let plans = schedule(&self.state, &self.heard, 1);
            if plans.is_empty() {
                return;
            }
            for plan in plans {
                self.apply(C::Place(plan));
            }
        }
    }

    /// Everything of a job's attempt is gone from its nodes.
    fn end(&mut self, id: &str) {
        let job = &self.state.jobs[format!("{EXPERIMENT}/jobs/{id}").as_str()];
        let attempt = self.state.attempts[job.attempt.as_ref().unwrap()].clone();
        for part in &attempt.nodes {
            let seen = AttemptObservation {
                attempt: attempt.id.clone(),
                phase: P::Ended as i32,
                ..Default::default()
            };
            self.apply(C::RecordReport(RecordReport {
                node: part.node.clone(),
                uid: format!("uid-{}", part.node),
                incarnation: "1".into(),
                report: Some(Report {
                    attempts: vec![seen],
                    strays: None,
                    ..Default::default()
                }),
            }));
        }
    }

    /// Every process of every live attempt has a port that no other has; says which.
    fn ports(&self) -> BTreeSet<i32> {
        let live: Vec<_> = attempts::live(&self.state).collect();
        assert_eq!(live.len(), ATTEMPTS);
        let mut seen = BTreeSet::new();
        for attempt in live {
            for (i, node) in attempt.nodes.iter().enumerate() {
                for port in attempts::ports_of(&attempt.spec, i, node.port) {
                    assert!((FIRST_PORT..=self.last_port).contains(&port), "{port}");
                    assert!(seen.insert(port), "{port} is given twice");
                }
            }
        }
        invariants::check(&self.state).unwrap();
        seen
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1, max_shrink_iters: 0, ..ProptestConfig::default() })]

    /// A thousand attempts at once on one machine; then some end, and their jobs, or others, run in their place.
    #[test]
    fn no_port_of_a_machine_is_two_attempts(
        shapes in prop::collection::vec((1..4_i32, 0..9_i32, 0..2_i32, any::<bool>()), ATTEMPTS),
        ended in prop::collection::btree_set(0..ATTEMPTS, 0..200),
        spare in 0..2000_i32,
    ) {
        let all: i32 = shapes.iter().copied().map(needs).sum();
        // Rows of several lengths leave gaps that nothing fits into, as long as the longest but one.
        let mut crowd = Crowd::new(
            shapes.iter().map(|(nodes, ..)| nodes).sum(),
            FIRST_PORT + all + all / 2 + spare,
        );
        for (i, shape) in shapes.iter().enumerate() {
            crowd.queue(&format!("j{i}"), *shape);
        }
        crowd.place();
        prop_assert_eq!(crowd.ports().len(), all as usize);
        for i in &ended {
            crowd.end(&format!("j{i}"));
        }
        crowd.place();
        prop_assert_eq!(crowd.ports().len(), all as usize);
    }
}

#[test]
fn a_row_of_ports_belongs_to_one_attempt_on_a_machine() {
    let mut e = Ensemble::with_nodes(2, 2);
    for i in 0..2 {
        e.queue(&format!("j{i}"), 1, |job| shaped(job, (1, 2, 1, false)));
    }
    let mut plans = schedule(&e.state, &e.heard, 1);
    let port = plans[0].nodes[0].port;
    assert!((plans[1].nodes[0].port - port).abs() >= 3, "{plans:?}");
    e.ok(C::Place(plans[0].clone()));
    for (other, free) in [
        (port - 2, false),
        (port, false),
        (port + 2, false),
        (port + 3, true),
    ] {
        plans[1].nodes[0].port = other;
        let placed = e.try_apply(C::Place(plans[1].clone()));
        assert_eq!(placed.is_ok(), free, "{other} beside {port}: {placed:?}");
    }
}

#[test]
fn a_row_that_fits_nowhere_waits_and_one_that_fits_exactly_does_not() {
    for (last_port, placed) in [(FIRST_PORT + 2, 1), (FIRST_PORT + 1, 0)] {
        let mut crowd = Crowd::new(2, last_port);
        crowd.queue("j", (1, 2, 1, false));
        crowd.queue("k", (1, 1, 0, false));
        let plans = schedule(&crowd.state, &crowd.heard, 1);
        assert_eq!(plans.len(), placed, "{last_port}");
        let job = &crowd.state.jobs[format!("{EXPERIMENT}/jobs/j").as_str()];
        let why = pending_reason(&crowd.state, &crowd.heard, job);
        assert_eq!(why.contains("free ports"), placed == 0, "{why}");
    }
}
