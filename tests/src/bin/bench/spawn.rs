//! `bench spawn`: jobs of one process each, with everything that a job is, beside bare starts of the same program; and what five hundred
//! running ranks cost.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::job::State;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_tests::api::connector;
use batchai_tests::process::{processes_of, until};

use super::smoke::{Dev, create, job, memory};
use crate::measure::{Better, print};

const JOBS: usize = 200;
const RANKS: i32 = 500;
const LOOKED_AT: Duration = Duration::from_secs(10);
/// A hundredth of a second: what the kernel counts in.
const TICKS_PER_S: f64 = 100.0;

pub fn run() {
    let bare = bare();
    print("bare_spawns", bare, "1/s", None, Better::Higher);
    let dir = tempfile::tempdir().expect("a directory");
    let dev = Dev::start(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let credentials = dir.path().join("coordinator/admin.pem");
        let route = connector(&dev.endpoint, &credentials).connect().await;
        let route = route.expect("dev is ready");
        create(&route).await.expect("the resources are new");
        let ours = jobs(&route, dir.path()).await;
        print(
            "jobs_of_one_process",
            ours,
            "1/s",
            Some(bare / 4.0),
            Better::Higher,
        );
        many_ranks(&route, dir.path()).await;
    });
}

/// The program of the jobs, started one after the other.
fn bare() -> f64 {
    let begin = Instant::now();
    for _ in 0..JOBS {
        let ended = Command::new("bash")
            .args(["-c", "true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        assert!(ended.expect("bash is there").success());
    }
    JOBS as f64 / begin.elapsed().as_secs_f64()
}

/// So many jobs on one node, all in its queue from the beginning.
async fn jobs(route: &Route, dir: &Path) -> f64 {
    let mut client = JobServiceClient::new(route.clone());
    let begin = Instant::now();
    let requests = (0..JOBS).map(|i| job(dir, &format!("j{i}"), "true"));
    let requests: Vec<_> = requests.collect();
    let parent = requests[0].parent.clone();
    let batch = v1::BatchCreateJobsRequest {
        parent: parent.clone(),
        requests,
        request_id: String::new(),
        validate_only: false,
    };
    client
        .batch_create_jobs(batch)
        .await
        .expect("they are valid");
    loop {
        let list = v1::ListJobsRequest {
            parent: parent.clone(),
            page_size: JOBS as i32,
            ..Default::default()
        };
        let jobs = client.list_jobs(list).await.expect("dev runs").into_inner();
        let ended = jobs
            .jobs
            .iter()
            .filter(|job| job.state() == State::Succeeded);
        if ended.count() == JOBS {
            return JOBS as f64 / begin.elapsed().as_secs_f64();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn many_ranks(route: &Route, dir: &Path) {
    let mut request = job(dir, "many", "exec sleep 600");
    if let Some(settings) = request
        .job
        .as_mut()
        .and_then(|job| job.custom_toolkit_settings.as_mut())
    {
        settings.processes_per_node = RANKS;
    }
    let mut client = JobServiceClient::new(route.clone());
    client.create_job(request).await.expect("it is valid");
    let of = |program: &str| {
        let all = processes_of(dir).into_iter();
        let found = all.filter(|(_, line)| line.starts_with(program));
        found.map(|(pid, _)| pid).collect::<Vec<_>>()
    };
    until("all ranks to run", || {
        (of("sleep").len() == RANKS as usize).then_some(())
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let cpu = |program: &str| of(program).into_iter().map(ticks).sum::<f64>();
    let programs = ["batchai-node-agent", "batchai-shim", "batchai-coordinator"];
    let before = programs.map(cpu);
    tokio::time::sleep(LOOKED_AT).await;
    for (program, before) in programs.iter().zip(before) {
        let share = (cpu(program) - before) / TICKS_PER_S / LOOKED_AT.as_secs_f64();
        let name = program.trim_start_matches("batchai-").replace('-', "_");
        print(
            &format!("{name}_cpu"),
            share * 100.0,
            "%",
            None,
            Better::Lower,
        );
        memory(dir, &name, program, 100.0);
    }
}

/// What a process has used of the processors, in ticks.
fn ticks(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<_> = after_name.split_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok());
    field(11).unwrap_or(0.0) + field(12).unwrap_or(0.0)
}
