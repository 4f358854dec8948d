//! What a node meets in its life: full disks, power cuts, neighbours, deaths at the wrong moment.

use std::process::Command;
use std::time::Duration;

use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::{Background, Process, processes_of, under_test, until};
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn custom(nodes: i32, command_line: &str) -> serde_json::Value {
    json!({ "nodeCount": nodes, "customToolkitSettings": { "commandLine": command_line } })
}

fn with<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &IN[..]].concat()
}

fn parent_of(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_whitespace()
        .nth(1)
        .and_then(|ppid| ppid.parse().ok())
        .unwrap_or(0)
}

/// A mount that goes with the test.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn gangs_on_one_machine_do_not_get_into_each_others_way() {
    let e = Ensemble::with_cluster(2);
    for i in 0..25 {
        let name = format!("j{i}");
        e.submit(&name, custom(2, "test -d $AZ_BATCHAI_SHARED_JOB_TEMP"));
        assert_eq!(e.wait(&name), 0, "{}", e.job(&name));
        assert_eq!(e.job(&name)["attempt"]["number"], 1);
    }
}

#[test]
fn agents_that_wait_for_their_coordinator_join_it_when_it_comes() {
    // Somebody has made a token, and has the coordinator down again.
    let mut e = Ensemble::start(0);
    e.coordinator.take().unwrap().kill();
    for name in ["a1", "a2"] {
        e.start_agent(name);
    }
    std::thread::sleep(Duration::from_millis(300));
    e.start_coordinator();
    e.until_alive(2);
    e.create_cluster(2);
    e.submit("j", custom(2, "true"));
    assert_eq!(e.wait("j"), 0);
}

#[test]
fn an_agent_starts_whatever_an_earlier_one_left_half_done() {
    let mut e = Ensemble::with_cluster(1);
    e.agents.clear();
    let attempts = e.path().join("agents/a1/attempts");
    std::fs::create_dir(attempts.join("1-901")).unwrap();
    std::fs::create_dir_all(attempts.join("1-902/logs")).unwrap();
    for file in ["started", "status.json"] {
        std::fs::write(attempts.join("1-902").join(file), "").unwrap();
    }
    std::fs::write(attempts.join("1-903"), "a file").unwrap();
    e.start_agent("a1");
    e.submit("j", custom(1, "true"));
    assert_eq!(e.wait("j"), 0);
    until("what is not wanted to be forgotten", || {
        let left = ["1-901", "1-902"]
            .iter()
            .any(|id| attempts.join(id).exists());
        (!left).then_some(())
    });
}

#[test]
fn a_node_with_a_long_name_ships_its_logs() {
    let name = "n".repeat(60);
    let mut e = Ensemble::without_daemons();
    e.start_coordinator();
    e.start_agent(&name);
    e.start_agent("a2");
    e.until_alive(2);
    e.create_cluster(2);
    let mut properties = custom(2, "echo hello");
    properties["jobPreparation"] = json!({ "commandLine": "echo prepared" });
    e.submit("j", properties);
    assert_eq!(e.wait("j"), 0);
    assert_eq!(
        e.log("j", &format!("stdout-job_prep-{name}.txt")),
        "prepared\n"
    );
    assert_eq!(e.log("j", "stdout.txt"), "hello\n");
}

#[test]
fn a_root_with_foreign_files_or_another_agent_is_refused() {
    let e = Ensemble::start(1);
    let log = e.path().join("refused.log");
    let start = |root: &str| {
        let data = e
            .path()
            .join("agents/refused")
            .to_string_lossy()
            .into_owned();
        let args = [
            "node-agent",
            "--coordinator",
            &e.endpoint,
            "--name",
            "r",
            "--data",
            &data,
            "--root",
            root,
        ];
        let mut process = Process::start(args, &log);
        assert_eq!(process.wait().code(), Some(1));
        process.log_text()
    };
    let home = e.path().join("home");
    std::fs::create_dir_all(home.join("jobs/thesis")).unwrap();
    assert!(start(&home.to_string_lossy()).contains("holds what no agent put there"));
    assert!(home.join("jobs/thesis").exists());
    let shared = e.path().join("nodes/a1");
    assert!(start(&shared.to_string_lossy()).contains("another agent uses this root"));
}

#[test]
fn who_follows_a_log_sees_every_attempt_of_the_job_to_its_end() {
    let e = Ensemble::with_cluster(2);
    // The first attempt never ends by itself; the second, which finds its file, does.
    let mark = e.path().join("second");
    let script = format!(
        "if [ -e {0} ]; then echo 2; sleep 1; echo end; else echo the first attempt; touch {0}; sleep 600; fi",
        mark.display()
    );
    e.submit("j", custom(2, &script));
    let stream = with(&["job", "file", "stream", "-j", "j", "-f", "stdout.txt"]);
    let follower = Background::start(&mut e.command(&stream));
    until("the first attempt", || mark.exists().then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    // The shim of the node that has no process.
    let all = processes_of(&e.path().join("agents/a2"));
    let shims: Vec<_> = all
        .iter()
        .filter(|(_, c)| c.contains(" shim "))
        .map(|(p, _)| *p)
        .collect();
    // Its helper has the same command line; it is the shim's child.
    let shim = shims
        .iter()
        .find(|pid| !shims.contains(&parent_of(**pid)))
        .unwrap();
    kill(Pid::from_raw(*shim), Signal::SIGKILL).unwrap();
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.job("j")["attempt"]["number"], 2);
    let output = follower.finish();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "the first attempt\n2\nend\n",
        "{stderr}"
    );
    assert!(stderr.contains("next attempt"), "{stderr}");
}

#[test]
fn a_disk_full_of_logs_fails_no_job_and_runs_none_twice() {
    let mut e = Ensemble::without_daemons();
    let data = e.path().join("agents/a1");
    std::fs::create_dir_all(&data).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&data)
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        return requirement::skip("a small tmpfs cannot be mounted: run as root");
    }
    let mount = Mounted(data);
    e.start_coordinator();
    e.start_agent("a1");
    e.until_alive(1);
    e.create_cluster(1);
    e.submit(
        "j",
        custom(1, "head -c 8000000 /dev/zero; echo done >&2; exit 0"),
    );
    let code = e.wait("j");
    let job = e.job("j");
    e.agents.clear();
    drop(mount);
    assert_eq!((code, &job["attempt"]["number"]), (0, &json!(1)), "{job}");
}

#[test]
fn dev_ends_the_jobs_of_an_agent_that_was_cut_down() {
    let dir = tempfile::Builder::new()
        .prefix("batchai-test-")
        .tempdir()
        .unwrap();
    let log = dir.path().join("dev.log");
    let data = dir.path().join("data").to_string_lossy().into_owned();
    let args = [
        "dev",
        "--agents",
        "1",
        "--listen",
        "127.0.0.1:0",
        "--data",
        &data,
    ];
    let mut dev = Process::start(args, &log);
    let endpoint = dev
        .line("batchai is ready at ")
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    let credentials = dir.path().join("data/coordinator/admin.pem");
    let run = |args: &[&str]| {
        let output = Command::new(under_test())
            .args(args)
            .env("BATCHAI_ENDPOINT", &endpoint)
            .env("BATCHAI_CREDENTIALS", &credentials)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    run(&["group", "create", "-n", "g"]);
    run(&["workspace", "create", "-g", "g", "-n", "w"]);
    run(&["experiment", "create", "-g", "g", "-w", "w", "-n", "e"]);
    run(&[
        "cluster", "create", "-g", "g", "-w", "w", "-n", "c", "-s", "dev", "-t", "1",
    ]);
    let file = dir.path().join("job.json");
    let mut properties = custom(1, "(setsid sleep 600 &); sleep 600");
    properties["stdOutErrPathPrefix"] = json!(dir.path().join("out"));
    std::fs::write(&file, json!({ "properties": properties }).to_string()).unwrap();
    run(&with(&[
        "job",
        "create",
        "-n",
        "j",
        "-c",
        "c",
        "-f",
        &file.to_string_lossy(),
    ]));
    let sleeps = || {
        processes_of(dir.path())
            .into_iter()
            .filter(|(_, c)| c.starts_with("sleep"))
    };
    until("the job to run", || (sleeps().count() == 2).then_some(()));
    let all = processes_of(dir.path());
    let agent = all
        .iter()
        .find(|(_, c)| c.starts_with("batchai-node-agent"))
        .unwrap()
        .0;
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    assert_eq!(dev.wait().code(), Some(1), "an agent ended by itself");
    let left = processes_of(dir.path());
    batchai_tests::process::sweep(dir.path());
    assert!(left.is_empty(), "{left:?}");
}
