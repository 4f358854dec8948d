//! What a job's processes may take together on a node, enforced by the real kernel; and what a node says that cannot.

use batchai_tests::ensemble::{Ensemble, agent_args};
use batchai_tests::process::{Process, until};
use batchai_tests::requirement;
use serde_json::{Value, json};

/// Takes memory that it uses, 16 MiB at a time.
const EATER: &str = r#"python3 -c 'all = [bytearray(b"x" * (16 << 20)) for i in range(40)]'"#;

fn limited(command_line: &str, limits: Value) -> Value {
    json!({
        "nodeCount": 1,
        "resourceLimits": limits,
        "customToolkitSettings": { "commandLine": command_line },
    })
}

/// A cluster of one node that can limit this. `None` where this machine cannot.
fn start(controller: &str) -> Option<Ensemble> {
    requirement::program("python3", "install it")?;
    let e = Ensemble::with_cluster(1);
    let node = e.json(&["node", "list"])[0].clone();
    let can = node["facts"]["enforcedLimits"].as_array().cloned();
    if !can.is_some_and(|can| can.contains(&json!(controller))) {
        requirement::skip(&format!("{controller} cannot be limited here: {node}"));
        return None;
    }
    Some(e)
}

fn value_of<'a>(error: &'a Value, name: &str) -> Option<&'a str> {
    let details = error["details"].as_array()?;
    let found = details.iter().find(|detail| detail["name"] == name)?;
    found["value"].as_str()
}

fn until_no_groups(e: &Ensemble) {
    until("the groups to be removed", || {
        let left = e.groups().iter().any(|home| home.path.exists());
        (!left).then_some(())
    });
}

#[test]
fn who_takes_more_memory_than_the_job_may_is_killed_and_that_is_why_it_failed() {
    let Some(e) = start("memory") else {
        return;
    };
    let eaten_by_a_child = format!("{EATER}; exit 3");
    for (name, command, exit_code) in [
        ("itself", format!("exec {EATER}"), 137),
        ("its-child", eaten_by_a_child, 3),
    ] {
        e.submit(name, limited(&command, json!({ "memoryMib": 96 })));
        let job = e.until_job(name, "FAILED");
        let error = &job["errors"][0];
        assert_eq!(error["code"], "JobOutOfMemory", "{job:#}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("memoryMib of 96 MiB"), "{message}");
        assert_eq!(value_of(error, "limitMib"), Some("96"));
        assert_eq!(value_of(error, "rank"), Some("0"));
        assert_eq!(value_of(error, "killed"), Some("1"));
        // Where the kernel ends the whole group, the one that would have said 3 is gone as well.
        let code = job["exitCode"].as_i64();
        assert!([Some(exit_code), Some(137)].contains(&code), "{job:#}");
        assert_eq!(
            value_of(error, "exitCode"),
            Some(&*code.unwrap().to_string())
        );
    }
    let enough = limited(&format!("exec {EATER}"), json!({ "memoryMib": 1000 }));
    e.submit("enough", enough);
    e.until_job("enough", "SUCCEEDED");
    let prepared = json!({
        "nodeCount": 1,
        "resourceLimits": { "memoryMib": 96 },
        "jobPreparation": { "commandLine": format!("exec {EATER}") },
        "customToolkitSettings": { "commandLine": "true" },
    });
    e.submit("prepared", prepared);
    let job = e.until_job("prepared", "FAILED");
    assert_eq!(job["errors"][0]["code"], "JobOutOfMemory", "{job:#}");
    until_no_groups(&e);
}

#[test]
fn no_more_processes_run_than_the_job_may_start() {
    let Some(e) = start("pids") else {
        return;
    };
    let forks = "exec python3 -c '\
import os, time\n\
count = 0\n\
try:\n    while count < 100:\n        if os.fork() == 0:\n            time.sleep(600)\n        count += 1\n\
except BlockingIOError:\n    print(count, flush=True)'";
    e.submit("forks", limited(forks, json!({ "pids": 20 })));
    e.until_job("forks", "SUCCEEDED");
    let count: i32 = e.log("forks", "stdout.txt").trim().parse().unwrap();
    assert!((15..20).contains(&count), "{count}");
    until_no_groups(&e);
}

#[test]
fn all_processes_of_a_job_share_the_processors_it_may_use() {
    let Some(e) = start("cpu") else {
        return;
    };
    let two = "exec python3 -c '\
import os, time\n\
child = os.fork()\n\
end = time.monotonic() + 2\n\
while time.monotonic() < end: pass\n\
os.write(1, (str(time.process_time()) + chr(10)).encode())\n\
if child: os.wait()'";
    e.submit("busy", limited(two, json!({ "cpus": 0.25 })));
    e.until_job("busy", "SUCCEEDED");
    let text = e.log("busy", "stdout.txt");
    let used = text.lines().map(|line| line.parse::<f64>());
    let used = used.collect::<Result<Vec<_>, _>>();
    let used: f64 = used.unwrap_or_else(|_| panic!("{text:?}")).iter().sum();
    // Half a second of the two, and what a period more gives.
    assert!(used < 0.8, "{text}");
    until_no_groups(&e);
}

#[test]
fn a_node_that_cannot_limit_what_is_asked_for_refuses_and_says_so() {
    let mut e = Ensemble::start(0);
    let mut args = agent_args(e.path(), &e.endpoint, "a1", "self");
    args.extend(["--isolation".to_owned(), "process-tree".to_owned()]);
    let log = e.path().join("a1.log");
    let agent = Process::start_with(args, &e.join_token(), &log);
    e.agents.insert("a1".to_owned(), agent);
    e.until_alive(1);
    e.create_cluster(1);
    let shown = e.json(&["node", "show", "-n", "a1"]);
    assert_eq!(shown["facts"].get("enforcedLimits"), None, "{shown:#}");
    for (what, limits) in [
        ("cpu", json!({ "cpus": 1 })),
        ("memory", json!({ "memoryMib": 100 })),
        ("pids", json!({ "pids": 100 })),
    ] {
        e.submit(what, limited("true", limits));
        let job = e.until_job(what, "FAILED");
        let error = &job["errors"][0];
        assert_eq!(error["code"], "JobStartRefused", "{job:#}");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains(&format!("nodes/a1 cannot limit {what}")),
            "{message}"
        );
    }
    e.submit("none", limited("true", json!({})));
    e.until_job("none", "SUCCEEDED");
}
