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

const JOBS_PER_NODE: usize = 100;
const NODES: usize = 8;
const STARTS: usize = 200;
const RANKS: i32 = 500;
/// Seldom enough that looking costs little beside the jobs.
const LOOK: Duration = Duration::from_millis(50);
const LOOKED_AT: Duration = Duration::from_secs(10);
/// A hundredth of a second: what the kernel counts in.
const TICKS_PER_S: f64 = 100.0;

pub fn run() {
    let bare = bare();
    print("bare_spawns", bare, "1/s", None, Better::Higher);
    // One after the other, as long as each takes; and as many at once as the machine bears.
    for (name, nodes, goal) in [
        ("jobs_on_one_node", 1, None),
        ("jobs_of_one_process", NODES, Some(bare / 4.0)),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        on(nodes, dir.path(), async |route| {
            let ours = jobs(&route, dir.path(), nodes * JOBS_PER_NODE).await;
            print(name, ours, "1/s", goal, Better::Higher);
        });
    }
    let dir = tempfile::tempdir().expect("a directory");
    on(1, dir.path(), async |route| {
        many_ranks(&route, dir.path()).await
    });
}

/// Does something with a `batchai dev` of so many nodes, in one cluster.
fn on(nodes: usize, dir: &Path, work: impl AsyncFnOnce(Route)) {
    let dev = Dev::start(dir, nodes);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let credentials = dir.join("coordinator/admin.pem");
        let route = connector(&dev.endpoint, &credentials).connect().await;
        let route = route.expect("dev is ready");
        create(&route).await.expect("the resources are new");
        work(route).await;
    });
}

/// The program of the jobs, started one after the other.
fn bare() -> f64 {
    let begin = Instant::now();
    for _ in 0..STARTS {
        let ended = Command::new("bash")
            .args(["-c", "true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        assert!(ended.expect("bash is there").success());
    }
    STARTS as f64 / begin.elapsed().as_secs_f64()
}

/// So many jobs, all in the queue from the beginning: those that end in a second.
async fn jobs(route: &Route, dir: &Path, count: usize) -> f64 {
    let mut client = JobServiceClient::new(route.clone());
    let requests = (0..count).map(|i| job(dir, &format!("j{i}"), "true"));
    let requests: Vec<_> = requests.collect();
    let parent = requests[0].parent.clone();
    let begin = Instant::now();
    for some in requests.chunks(JOBS_PER_NODE) {
        let batch = v1::BatchCreateJobsRequest {
            parent: parent.clone(),
            requests: some.to_vec(),
            request_id: String::new(),
            validate_only: false,
        };
        let created = client.batch_create_jobs(batch).await;
        created.expect("they are valid");
    }
    loop {
        let list = v1::ListJobsRequest {
            parent: parent.clone(),
            page_size: count as i32,
            ..Default::default()
        };
        let jobs = client.list_jobs(list).await.expect("dev runs").into_inner();
        let ended = jobs
            .jobs
            .iter()
            .filter(|job| job.state() == State::Succeeded);
        if ended.count() == count {
            return count as f64 / begin.elapsed().as_secs_f64();
        }
        tokio::time::sleep(LOOK).await;
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
