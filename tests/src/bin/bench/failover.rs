//! `bench failover --kills N`: a leader is cut down, again and again, while a client writes; how long until the next write is
//! acknowledged? And is all of it there in the end? Beside etcd, at its defaults and at equal time-outs.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use batchai_common::tls::{Connector, Route};
use batchai_proto::v1;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_tests::api::connector;
use batchai_tests::etcd::{Etcd, put};
use batchai_tests::replicas::Replicas;
use tonic::Code;

use crate::measure::{Better, print, quantile};

pub const EXPERIMENT: &str = "resourceGroups/g/workspaces/w/experiments/e";
pub const CLUSTER: &str = "resourceGroups/g/workspaces/w/clusters/c";
/// Between a leader's return and its next loss.
const PAUSE: Duration = Duration::from_millis(1500);

pub fn run(kills: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    let mut ours = runtime.block_on(ours(kills));
    report("failover", &mut ours, Some((1000.0, 2000.0)));
    if std::process::Command::new("etcd")
        .arg("--version")
        .output()
        .is_err()
    {
        eprintln!("etcd is not there: nothing to compare with");
        return;
    }
    let mut defaults = runtime.block_on(etcd(kills.min(30), &[]));
    report("etcd_failover_defaults", &mut defaults, None);
    let equal = ["--heartbeat-interval", "100", "--election-timeout", "500"];
    let mut equal = runtime.block_on(etcd(kills.min(30), &equal));
    report("etcd_failover_500ms", &mut equal, None);
}

fn report(name: &str, times: &mut [f64], goals: Option<(f64, f64)>) {
    for (quantity, q, goal) in [
        ("p50", 0.5, None),
        ("p99", 0.99, goals.map(|goals| goals.0)),
        ("max", 1.0, goals.map(|goals| goals.1)),
    ] {
        let value = quantile(times, q);
        print(
            &format!("{name}_{quantity}"),
            value,
            "ms",
            goal,
            Better::Lower,
        );
    }
}

/// A job that waits for ever: a cluster without nodes.
pub fn job(id: String, request_id: String) -> v1::CreateJobRequest {
    v1::CreateJobRequest {
        parent: EXPERIMENT.into(),
        job_id: id,
        job: Some(v1::Job {
            cluster: CLUSTER.into(),
            node_count: 1,
            std_out_err_path_prefix: "$AZ_BATCHAI_MOUNT_ROOT/logs".into(),
            custom_toolkit_settings: Some(v1::CustomToolkitSettings {
                command_line: "true".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        request_id,
        validate_only: false,
    }
}

/// Submits a job until it is known what became of it.
pub async fn submit(route: &Route, id: &str) -> Result<(), tonic::Status> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let mut client = JobServiceClient::new(route.clone());
    loop {
        match client
            .create_job(job(id.to_owned(), request_id.clone()))
            .await
        {
            Ok(_) => return Ok(()),
            Err(status) => match status.code() {
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                _ => return Err(status),
            },
        }
    }
}

pub fn way(e: &Replicas) -> Connector {
    connector(&e.list(), &e.data(1).join("admin.pem"))
}

/// When writes were acknowledged, and whether to go on.
#[derive(Default)]
struct Written {
    stop: AtomicBool,
    latest: Mutex<Option<Instant>>,
    count: AtomicU64,
}

impl Written {
    fn acknowledged(&self) {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// The time from a moment to the next acknowledgement.
    async fn since(&self, then: Instant) -> f64 {
        loop {
            let latest = *self.latest.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(latest) = latest.filter(|latest| *latest > then) {
                return (latest - then).as_secs_f64() * 1000.0;
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
    }
}

async fn ours(kills: usize) -> Vec<f64> {
    let mut e = Replicas::start(3, &[]);
    e.create_cluster(0);
    let route = way(&e).connect().await.expect("three replicas serve");
    let written = Arc::new(Written::default());
    let writer = tokio::spawn({
        let (route, written) = (route.clone(), written.clone());
        async move {
            let mut ids = Vec::new();
            while !written.stop.load(Ordering::Relaxed) {
                let id = format!("j{}", ids.len());
                submit(&route, &id).await.expect("a job is taken");
                written.acknowledged();
                ids.push(id);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            ids
        }
    });
    let mut times = Vec::new();
    for kill in 0..kills {
        tokio::time::sleep(PAUSE).await;
        let leader = e.leader();
        e.kill(leader);
        let took = written.since(Instant::now()).await;
        eprintln!("kill {kill}: replica {leader}, {took:.0} ms");
        times.push(took);
        e.restart(leader);
    }
    written.stop.store(true, Ordering::Relaxed);
    let acknowledged = writer.await.expect("the writer ends");
    let there = all_jobs(&route).await;
    let lost = acknowledged
        .iter()
        .filter(|id| !there.contains(*id))
        .count();
    print(
        "acknowledged_writes",
        acknowledged.len() as f64,
        "jobs",
        None,
        Better::Higher,
    );
    print(
        "acknowledged_writes_lost",
        lost as f64,
        "jobs",
        Some(0.0),
        Better::Lower,
    );
    times
}

async fn all_jobs(route: &Route) -> BTreeSet<String> {
    let mut client = JobServiceClient::new(route.clone()).max_decoding_message_size(16 << 20);
    let (mut all, mut page_token) = (BTreeSet::new(), String::new());
    loop {
        let list = v1::ListJobsRequest {
            parent: EXPERIMENT.into(),
            page_size: 1000,
            page_token,
            ..Default::default()
        };
        let page = client
            .list_jobs(list)
            .await
            .expect("jobs are listed")
            .into_inner();
        let ids = page
            .jobs
            .iter()
            .filter_map(|job| job.name.rsplit('/').next());
        all.extend(ids.map(str::to_owned));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return all;
        }
    }
}

async fn etcd(kills: usize, more: &[&str]) -> Vec<f64> {
    let dir = tempfile::tempdir().expect("a directory");
    let mut etcd = Etcd::start(dir.path(), more);
    let mut channels: Vec<_> = (0..3).map(|i| etcd.channel(i)).collect();
    let written = Arc::new(Written::default());
    let writer = tokio::spawn({
        let written = written.clone();
        async move {
            // As ours: to the next one as soon as one fails, and on there.
            let (mut at, mut number) = (0, 0);
            while !written.stop.load(Ordering::Relaxed) {
                match put(&mut channels[at], format!("k{number}"), vec![b'x'; 300]).await {
                    Ok(_) => {
                        written.acknowledged();
                        number += 1;
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    Err(_) => {
                        at = (at + 1) % 3;
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            }
        }
    });
    let mut times = Vec::new();
    while times.len() < kills {
        tokio::time::sleep(PAUSE).await;
        let Some(leader) = etcd.leader().await else {
            continue;
        };
        etcd.kill(leader);
        let took = written.since(Instant::now()).await;
        eprintln!("kill {}: member {leader}, {took:.0} ms", times.len());
        times.push(took);
        etcd.begin(leader);
    }
    written.stop.store(true, Ordering::Relaxed);
    writer.await.expect("the writer ends");
    times
}
