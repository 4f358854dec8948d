//! `bench smoke`: what a newcomer feels first.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::cluster_service_client::ClusterServiceClient;
use batchai_proto::v1::experiment_service_client::ExperimentServiceClient;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::node_service_client::NodeServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::workspace_service_client::WorkspaceServiceClient;
use batchai_tests::api::connector;
use batchai_tests::process::{processes_of, sweep, under_test, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::measure::{Better, print, private_mib, quantile};

const STARTS: usize = 5;
const JOBS: usize = 60;
/// The first jobs warm caches up.
const WARM_UP: usize = 10;
const WORKSPACE: &str = "resourceGroups/g/workspaces/w";

pub fn run() {
    let mut starts: Vec<f64> = (0..STARTS).map(|_| start_once()).collect();
    print(
        "dev_start_to_ready",
        quantile(&mut starts, 0.5),
        "ms",
        Some(1000.0),
        Better::Lower,
    );
    let dir = tempfile::tempdir().expect("a directory");
    let dev = Dev::start(dir.path(), 1);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(jobs(&dev, dir.path()));
    drop(dev);
    let size = std::fs::metadata(under_test()).expect("it exists").len() as f64;
    print(
        "binary_size",
        size / f64::from(1 << 20),
        "MiB",
        None,
        Better::Lower,
    );
}

/// A `batchai dev` that ends with the benchmark.
pub struct Dev {
    child: Child,
    pub endpoint: String,
    took_ms: f64,
    dir: std::path::PathBuf,
}

impl Dev {
    pub fn start(dir: &Path, agents: usize) -> Dev {
        let began = Instant::now();
        let mut child = Command::new(under_test())
            .args(["dev", "--agents", &agents.to_string()])
            .args(["--listen", "127.0.0.1:0", "--data"])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this very program can be started");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("it prints text");
        let took_ms = began.elapsed().as_secs_f64() * 1000.0;
        let endpoint = line
            .split_whitespace()
            .nth(4)
            .expect("it says where")
            .to_owned();
        Dev {
            child,
            endpoint,
            took_ms,
            dir: dir.to_owned(),
        }
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
        sweep(&self.dir);
    }
}

fn start_once() -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let dev = Dev::start(dir.path(), 1);
    eprintln!("dev was ready after {:.0} ms", dev.took_ms);
    dev.took_ms
}

async fn jobs(dev: &Dev, dir: &Path) {
    let credentials = dir.join("coordinator/admin.pem");
    let channel = connector(&dev.endpoint, &credentials).connect().await;
    let channel = channel.expect("dev is ready");
    create(&channel).await.expect("the resources are new");
    // Idle: nothing has happened for a while.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    memory(dir, "coordinator", "batchai-coordinator", 40.0);
    memory(dir, "agent", "batchai-node-agent", 40.0);
    let mut latencies = Vec::new();
    for i in 0..JOBS {
        let latency = one_job(&channel, dir, &format!("j{i}")).await;
        if i >= WARM_UP {
            latencies.push(latency);
        }
    }
    print(
        "submit_to_process_start_p50",
        quantile(&mut latencies, 0.5),
        "ms",
        Some(20.0),
        Better::Lower,
    );
    print(
        "submit_to_process_start_p99",
        quantile(&mut latencies, 0.99),
        "ms",
        None,
        Better::Lower,
    );
    let mut client = JobServiceClient::new(channel);
    client
        .create_job(job(dir, "sleeper", "sleep 600"))
        .await
        .expect("it is valid");
    until("the sleeper", || {
        let found = processes_of(dir)
            .into_iter()
            .any(|(_, c)| c.starts_with("sleep"));
        found.then_some(())
    });
    memory(dir, "shim", "batchai-shim", 3.0);
}

/// A shim is two processes, the other of which copies the logs: they count together.
pub fn memory(dir: &Path, name: &str, program: &str, goal: f64) {
    let all = processes_of(dir);
    let found = all
        .iter()
        .filter(|(_, cmdline)| cmdline.starts_with(program));
    let total: f64 = found.map(|(pid, _)| private_mib(*pid)).sum();
    assert!(total > 0.0, "no {name} runs");
    print(
        &format!("{name}_private_memory"),
        total,
        "MiB",
        Some(goal),
        Better::Lower,
    );
}

/// Milliseconds from before the call to when the process ran, by its own clock, which is this machine's.
async fn one_job(channel: &Route, dir: &Path, id: &str) -> f64 {
    let stamp = dir.join(format!("{id}.stamp"));
    let command = format!("echo $EPOCHREALTIME > {}", stamp.display());
    let mut client = JobServiceClient::new(channel.clone());
    let began = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("it is after 1970");
    let job = client
        .create_job(job(dir, id, &command))
        .await
        .expect("it is valid")
        .into_inner();
    let watch = v1::WatchJobRequest {
        name: job.name,
        revision: 0,
    };
    let mut changes = client
        .watch_job(watch)
        .await
        .expect("it exists")
        .into_inner();
    while changes.message().await.expect("dev runs").is_some() {}
    let text = std::fs::read_to_string(&stamp).expect("the job ran");
    let started: f64 = text.trim().replace(',', ".").parse().expect("a time");
    (started - began.as_secs_f64()) * 1000.0
}

pub fn job(dir: &Path, id: &str, command_line: &str) -> v1::CreateJobRequest {
    let command_line = command_line.to_owned();
    v1::CreateJobRequest {
        parent: format!("{WORKSPACE}/experiments/e"),
        job_id: id.to_owned(),
        job: Some(v1::Job {
            cluster: format!("{WORKSPACE}/clusters/c"),
            node_count: 1,
            std_out_err_path_prefix: dir.join("out").to_string_lossy().into_owned(),
            custom_toolkit_settings: Some(v1::CustomToolkitSettings {
                command_line,
                ..Default::default()
            }),
            ..Default::default()
        }),
        request_id: String::new(),
        validate_only: false,
    }
}

pub async fn create(channel: &Route) -> Result<(), tonic::Status> {
    let group = v1::CreateResourceGroupRequest {
        resource_group_id: "g".to_owned(),
        resource_group: None,
        request_id: String::new(),
        validate_only: false,
    };
    ResourceGroupServiceClient::new(channel.clone())
        .create_resource_group(group)
        .await?;
    let workspace = v1::CreateWorkspaceRequest {
        parent: "resourceGroups/g".to_owned(),
        workspace_id: "w".to_owned(),
        workspace: None,
        request_id: String::new(),
        validate_only: false,
    };
    WorkspaceServiceClient::new(channel.clone())
        .create_workspace(workspace)
        .await?;
    let experiment = v1::CreateExperimentRequest {
        parent: WORKSPACE.to_owned(),
        experiment_id: "e".to_owned(),
        experiment: None,
        request_id: String::new(),
        validate_only: false,
    };
    ExperimentServiceClient::new(channel.clone())
        .create_experiment(experiment)
        .await?;
    let list = v1::ListNodesRequest::default();
    let nodes = NodeServiceClient::new(channel.clone())
        .list_nodes(list)
        .await?
        .into_inner()
        .nodes;
    let vm_size = nodes[0].facts.clone().unwrap_or_default().vm_size;
    let manual = v1::ManualScaleSettings {
        target_node_count: nodes.len() as i32,
        ..Default::default()
    };
    let cluster = v1::CreateClusterRequest {
        parent: WORKSPACE.to_owned(),
        cluster_id: "c".to_owned(),
        cluster: Some(v1::Cluster {
            vm_size,
            scale_settings: Some(v1::ScaleSettings {
                manual: Some(manual),
                auto_scale: None,
            }),
            ..Default::default()
        }),
        request_id: String::new(),
        validate_only: false,
    };
    ClusterServiceClient::new(channel.clone())
        .create_cluster(cluster)
        .await?;
    Ok(())
}
