//! Real daemons, real processes.

use std::time::{Duration, Instant};

use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::{Background, processes_of, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn custom(nodes: i32, command_line: &str) -> Value {
    json!({ "nodeCount": nodes, "customToolkitSettings": { "commandLine": command_line } })
}

/// A python script as a PyTorch job: it needs no torch, only its place among the ranks.
fn ranks(ensemble: &Ensemble, nodes: i32, script: &str) -> Value {
    let path = ensemble.path().join("script.py");
    std::fs::write(&path, script).unwrap();
    json!({ "nodeCount": nodes, "pyTorchSettings": { "pythonScriptFilePath": path } })
}

fn errors(job: &Value) -> Vec<&str> {
    let errors = job["errors"].as_array().unwrap();
    errors
        .iter()
        .map(|error| error["code"].as_str().unwrap())
        .collect()
}

const NUMBERED: &str = "
import os, sys, time
rank = os.environ['RANK']
print('rank', rank, 'of', os.environ['WORLD_SIZE'], 'at', os.environ['MASTER_ADDR'])
for i in range(int(os.environ.get('LINES', '5000'))):
    print(rank, i)
    if i % 500 == 0:
        time.sleep(float(os.environ.get('PAUSE', '0')))
print('error', rank, file=sys.stderr)
";

fn assert_numbered(log: &str, rank: usize, lines: usize) {
    let mut expected = format!("rank {rank} of 2 at 127.0.0.1\n");
    expected.extend((0..lines).map(|i| format!("{rank} {i}\n")));
    assert!(
        log == expected,
        "rank {rank}: {} bytes, expected {}",
        log.len(),
        expected.len()
    );
}

#[test]
fn a_gang_runs_and_the_logs_of_all_ranks_are_complete_and_in_order() {
    let mut e = Ensemble::with_cluster(2);
    e.submit("j", ranks(&e, 2, NUMBERED));
    assert_eq!(e.wait("j"), 0);
    for rank in 0..2 {
        assert_numbered(&e.log("j", &format!("stdout-{rank}.txt")), rank, 5000);
        assert_eq!(
            e.log("j", &format!("stderr-{rank}.txt")),
            format!("error {rank}\n")
        );
    }
    let job = e.job("j");
    assert_eq!(
        (&job["state"], &job["exitCode"]),
        (&json!("SUCCEEDED"), &json!(0))
    );
    // The same files lie where the original put them.
    let segment = job["jobOutputDirectoryPathSegment"].as_str().unwrap();
    let copy = e
        .path()
        .join("out")
        .join(segment)
        .join("stdouterr/stdout-1.txt");
    assert_numbered(&std::fs::read_to_string(copy).unwrap(), 1, 5000);
    // The nodes forget their copies once the coordinator has them on disk, and only the log's second copy is left.
    until("the nodes to forget the attempt", || {
        let left = |agent: &str| {
            let attempts = e.path().join("agents").join(agent).join("attempts");
            std::fs::read_dir(attempts).unwrap().count()
        };
        (left("a1") + left("a2") == 0).then_some(())
    });
    assert_numbered(&e.log("j", "stdout-0.txt"), 0, 5000);
    e.assert_nothing_left();
}

#[test]
fn exit_codes_and_signals_arrive() {
    let e = Ensemble::with_cluster(2);
    e.submit("seven", custom(2, "echo before; exit 7"));
    e.submit("signal", custom(1, "kill -9 $$"));
    e.submit("missing", custom(1, "/no/such/program"));
    assert_eq!(e.wait("seven"), 7);
    assert_eq!(e.wait("signal"), 137);
    assert_eq!(e.wait("missing"), 127);
    assert_eq!(e.log("seven", "stdout.txt"), "before\n");
    let job = e.job("seven");
    assert_eq!(
        (errors(&job), &job["state"]),
        (vec!["JobFailed"], &json!("FAILED"))
    );
    assert!(e.log("missing", "stderr.txt").contains("/no/such/program"));
    // One rank fails, the other would run for ever.
    let script = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(600)";
    e.submit("rank", ranks(&e, 2, script));
    assert_eq!(e.wait("rank"), 3);
    assert!(
        e.job("rank")["errors"][0]["message"]
            .as_str()
            .unwrap()
            .contains("rank 1")
    );
}

#[test]
fn the_environment_paths_and_preparation_are_the_originals() {
    let e = Ensemble::with_cluster(1);
    let mut properties = custom(
        1,
        "env; cat $AZ_BATCHAI_JOB_TEMP/made; pwd; echo x > $AZ_BATCHAI_OUTPUT_M/f",
    );
    properties["jobPreparation"] =
        json!({ "commandLine": "echo made by preparation > $AZ_BATCHAI_JOB_TEMP/made; echo out" });
    properties["environmentVariables"] =
        json!([{ "name": "MINE", "value": "$AZ_BATCHAI_JOB_TEMP/x" }]);
    properties["outputDirectories"] = json!([{ "id": "M", "pathPrefix": e.path().join("out") }]);
    e.submit("j", properties);
    assert_eq!(e.wait("j"), 0);
    let log = e.log("j", "stdout.txt");
    let root = e.path().join("nodes/a1");
    let temp = root.join("jobs/w/e/j").to_string_lossy().into_owned();
    for expected in [
        "made by preparation".to_owned(),
        format!("\n{temp}\n"),
        format!("MINE={temp}/x"),
        format!("AZ_BATCHAI_MOUNT_ROOT={}/mounts", root.display()),
        "AZ_BATCH_HOST_LIST=127.0.0.1".to_owned(),
    ] {
        assert!(log.contains(&expected), "{expected} in:\n{log}");
    }
    assert!(
        !log.contains("BATCHAI_ENDPOINT"),
        "the agent's own environment leaks"
    );
    assert_eq!(e.log("j", "stdout-job_prep.txt"), "out\n");
    assert!(
        e.log("j", "execution.log")
            .contains("rank 0 ended with exit code 0")
    );
    let segment = e.job("j")["jobOutputDirectoryPathSegment"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        e.path()
            .join("out")
            .join(segment)
            .join("outputs/f")
            .exists()
    );

    let mut properties = custom(1, "echo must not run");
    properties["jobPreparation"] = json!({ "commandLine": "exit 5" });
    e.submit("prep", properties);
    assert_eq!(e.wait("prep"), 5);
    assert_eq!(errors(&e.job("prep")), ["JobPreparationFailed"]);
}

#[test]
fn the_coordinator_is_killed_while_a_job_runs_and_nothing_is_lost() {
    let mut e = Ensemble::with_cluster(2);
    let mut properties = ranks(&e, 2, NUMBERED);
    properties["environmentVariables"] = json!([{ "name": "PAUSE", "value": "0.3" }]);
    e.submit("j", properties);
    e.until_job("j", "RUNNING");
    let mut args = vec!["job", "file", "stream", "-j", "j", "-f", "stdout-0.txt"];
    args.extend(IN);
    let follower = Background::start(&mut e.command(&args));
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(500));
        e.coordinator.as_mut().unwrap().kill();
        e.start_coordinator();
    }
    assert_eq!(e.wait("j"), 0);
    assert_eq!(e.job("j")["attempt"]["number"], 1, "it ran once");
    assert_numbered(&e.log("j", "stdout-0.txt"), 0, 5000);
    assert_numbered(&e.log("j", "stdout-1.txt"), 1, 5000);
    let followed = follower.finish();
    assert_numbered(&String::from_utf8(followed.stdout).unwrap(), 0, 5000);
}

#[test]
fn every_acknowledged_resource_survives_a_kill_at_any_moment() {
    let mut e = Ensemble::start(0);
    let mut acknowledged = 0;
    for round in 0..5 {
        let until = Instant::now() + Duration::from_millis(150 + 40 * round);
        while Instant::now() < until {
            e.ok(&["group", "create", "-n", &format!("g{acknowledged:03}")]);
            acknowledged += 1;
        }
        e.coordinator.as_mut().unwrap().kill();
        e.start_coordinator();
        let groups = e.json(&["group", "list"]);
        assert_eq!(groups.as_array().unwrap().len(), acknowledged);
    }
}

#[test]
fn an_agent_is_ended_and_the_next_one_takes_its_job_over() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut e = Ensemble::with_cluster(2);
        let mut properties = ranks(&e, 2, NUMBERED);
        properties["environmentVariables"] = json!([{ "name": "PAUSE", "value": "0.2" }]);
        e.submit("j", properties);
        let job = e.until_job("j", "RUNNING");
        assert_eq!(job["attempt"]["number"], 1);
        until("the ranks to run", || {
            e.log_now("stdout-1.txt").contains("1 500").then_some(())
        });
        let agent = e.agents.get_mut("a2").unwrap();
        agent.signal(signal);
        agent.wait();
        std::thread::sleep(Duration::from_millis(300));
        e.start_agent("a2");
        assert_eq!(e.wait("j"), 0);
        assert_eq!(e.job("j")["attempt"]["number"], 1, "it ran once");
        for rank in 0..2 {
            assert_numbered(&e.log("j", &format!("stdout-{rank}.txt")), rank, 5000);
        }
    }
}

trait LogNow {
    fn log_now(&self, file: &str) -> String;
}

impl LogNow for Ensemble {
    /// What there is of a log now; empty where there is none.
    fn log_now(&self, file: &str) -> String {
        let mut args = vec![
            "job",
            "file",
            "stream",
            "--no-follow",
            "-j",
            "j",
            "-f",
            file,
        ];
        args.extend(IN);
        String::from_utf8(self.run(&args).stdout).unwrap()
    }
}

#[test]
fn a_shim_that_dies_takes_its_ranks_along_and_the_job_runs_again() {
    let e = Ensemble::with_cluster(1);
    // A grandchild in a session of its own: only its tag betrays it.
    e.submit(
        "j",
        custom(1, "setsid sleep 600 & echo $AZ_BATCHAI_JOB_TEMP; sleep 600"),
    );
    e.until_job("j", "RUNNING");
    until("the log", || {
        e.log_now("stdout.txt").contains("jobs").then_some(())
    });
    let before = processes_of(e.path());
    let shim = before
        .iter()
        .find(|(_, cmdline)| cmdline.starts_with("batchai-shim"))
        .unwrap()
        .0;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    until("the second attempt", || {
        (e.job("j")["attempt"]["number"] == 2).then_some(())
    });
    let sleeps = processes_of(e.path())
        .into_iter()
        .filter(|(_, c)| c.starts_with("sleep"))
        .count();
    assert!(sleeps <= 2, "the first attempt's processes are still there");
}

#[test]
fn terminating_ends_the_whole_tree_also_what_ignores_sigterm() {
    let mut e = Ensemble::with_cluster(1);
    let stubborn = "trap '' TERM; (setsid bash -c 'trap \"\" TERM; while :; do sleep 1; done' &) ; while :; do sleep 1; done";
    e.submit("j", custom(1, stubborn));
    e.until_job("j", "RUNNING");
    until("the tree", || {
        let bashes = processes_of(e.path())
            .into_iter()
            .filter(|(_, c)| c.contains("trap"))
            .count();
        (bashes >= 2).then_some(())
    });
    let mut args = vec!["job", "terminate", "-y", "--no-wait", "-n", "j"];
    args.extend(IN);
    let started = Instant::now();
    let job: Value = serde_json::from_str(&e.ok(&args)).unwrap();
    assert_eq!(job["state"], "TERMINATING");
    let job = e.until_job("j", "FAILED");
    assert_eq!(errors(&job), ["JobTerminated"]);
    assert!(job.get("exitCode").is_none());
    assert!(
        started.elapsed() >= Duration::from_secs(9),
        "it had its grace"
    );
    let left: Vec<_> = processes_of(e.path())
        .into_iter()
        .filter(|(_, c)| c.contains("trap"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // A second job on the same node; a queued one that is terminated; and one that is deleted while it runs.
    e.submit("next", custom(1, "sleep 600"));
    e.submit("queued", custom(1, "true"));
    e.until_job("next", "RUNNING");
    assert_eq!(e.job("queued")["state"], "QUEUED");
    args[5] = "queued";
    e.ok(&args);
    assert_eq!(errors(&e.until_job("queued", "FAILED")), ["JobTerminated"]);
    let mut delete = vec!["job", "delete", "-y", "-n", "next"];
    delete.extend(IN);
    e.ok(&delete);
    until("the job to be gone", || {
        e.job("next").is_null().then_some(())
    });
    let mut show = vec!["job", "show", "-n", "next"];
    show.extend(IN);
    assert_eq!(e.fails(&show).0, 3);
    e.assert_nothing_left();
}

#[test]
fn the_wall_clock_ends_a_job() {
    let e = Ensemble::with_cluster(1);
    let mut properties = custom(1, "sleep 600");
    properties["constraints"] = json!({ "maxWallClockTime": "PT1S" });
    e.submit("j", properties);
    assert_eq!(e.wait("j"), 255);
    assert_eq!(errors(&e.job("j")), ["JobWallClockTimeExceeded"]);
}

#[test]
fn a_job_out_of_reach_waits_and_says_why() {
    let e = Ensemble::with_cluster(1);
    e.submit("big", custom(7, "true"));
    e.submit("small", custom(1, "true"));
    assert_eq!(e.wait("small"), 0);
    let job = e.job("big");
    assert_eq!(job["state"], "QUEUED");
    let reason = job["pendingReason"].as_str().unwrap();
    assert!(
        reason.contains("wants 7 nodes") && reason.contains("shall have 1"),
        "{reason}"
    );
}

#[test]
fn resizing_moves_nodes_in_and_out() {
    let e = Ensemble::with_cluster(2);
    let resize = |count: &str| {
        e.ok(&[
            "cluster", "resize", "-g", "g", "-w", "w", "-n", "c", "-t", count,
        ])
    };
    let steady = |count: i64| {
        until("the cluster to be steady", || {
            let cluster = e.json(&["cluster", "show", "-g", "g", "-w", "w", "-n", "c"]);
            let is = cluster["allocationState"] == "STEADY"
                && cluster["currentNodeCount"].as_i64().unwrap_or(0) == count;
            is.then_some(())
        });
    };
    steady(2);
    resize("0");
    steady(0);
    resize("1");
    steady(1);
    e.submit("j", custom(1, "true"));
    assert_eq!(e.wait("j"), 0);
}
