//! What never goes through the log, bundles and the logs of jobs, outlives the replica that took it.

use std::path::Path;

use batchai_tests::ensemble::{IN, job_file};
use batchai_tests::process::until;
use batchai_tests::replicas::Replicas;

fn run(e: &Replicas, name: &str, command: &str, more: &[&str]) {
    let properties = serde_json::json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": command },
    });
    let path = job_file(e.path(), name, properties);
    let path = path.display().to_string();
    let mut args = vec!["job", "create", "-n", name, "-c", "c", "-f", &path];
    args.extend(IN);
    args.extend(more);
    e.ok(&args);
}

fn ended(e: &Replicas, name: &str) -> serde_json::Value {
    until("the job to end", || {
        let job = e.job(name);
        job["endTime"].is_string().then_some(job)
    })
}

fn log(e: &Replicas, endpoints: &str, name: &str) -> String {
    let mut args = vec!["job", "file", "stream", "-j", name, "-f", "stdout.txt"];
    args.extend(IN);
    e.ok_at(endpoints, &args)
}

/// The files below a directory that have this content.
fn having(dir: &Path, content: &[u8]) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let count = |path: &Path| match path.is_dir() {
        true => having(path, content),
        false => usize::from(std::fs::read(path).is_ok_and(|found| found == content)),
    };
    entries.map(|entry| count(&entry.unwrap().path())).sum()
}

#[test]
fn a_bundle_outlives_the_replica_that_took_it() {
    let mut e = Replicas::start(3, &[]);
    // A node, so that there is a cluster; and none while the job is submitted.
    e.start_agent("n1");
    e.create_cluster(1);
    let agent = e.agents.remove("n1").expect("it runs");
    drop(agent);
    let code = e.path().join("code");
    std::fs::create_dir(&code).unwrap();
    std::fs::write(code.join("what.txt"), "it came along\n").unwrap();
    let dir = code.display().to_string();
    run(&e, "job", "cat what.txt", &["--dir", &dir]);
    let leader = e.leader();
    e.kill(leader);
    std::fs::remove_dir_all(e.data(leader).join("bundles")).unwrap();
    // The machine is gone for good: what it had, nobody asks it for.
    e.start_agent("n1");
    let job = ended(&e, "job");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    assert_eq!(log(&e, &e.list(), "job"), "it came along\n");
    // A replica that lost its bundles gets them again, while a job may need them.
    run(&e, "long", "sleep 600", &["--dir", &dir]);
    e.begin(leader);
    e.ready(leader);
    let bundles = e.data(leader).join("bundles");
    until("the bundle to be copied", || {
        let mut found = std::fs::read_dir(&bundles).unwrap();
        let whole = |path: &Path| path.extension().is_some_and(|end| end == "gz");
        found
            .any(|entry| whole(&entry.unwrap().path()))
            .then_some(())
    });
}

#[test]
fn the_logs_of_a_job_that_has_ended_outlive_the_replica_that_took_them() {
    let mut e = Replicas::start(3, &[]);
    e.start_agent("n1");
    e.create_cluster(1);
    run(
        &e,
        "job",
        "seq 1 100000; echo the last without its end | tr -d '\\n'",
        &[],
    );
    let job = ended(&e, "job");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    let numbers = (1..=100_000).map(|number| format!("{number}\n"));
    let expected = numbers.collect::<String>() + "the last without its end";
    for id in 1..=3 {
        let logs = e.data(id).join("logs");
        until("the log to be copied", || {
            (having(&logs, expected.as_bytes()) == 1).then_some(())
        });
    }
    let leader = e.leader();
    e.kill(leader);
    std::fs::remove_dir_all(e.data(leader).join("logs")).unwrap();
    assert_eq!(log(&e, &e.list(), "job"), expected);
    // Also one that does not lead has all of it.
    let leads = until("another leader", || {
        let leads = e.leader();
        (leads != leader).then_some(leads)
    });
    let follower = (1..=3).find(|id| *id != leader && *id != leads).unwrap();
    assert_eq!(log(&e, e.endpoint(follower), "job"), expected);
}

#[test]
fn a_bundle_that_most_replicas_cannot_keep_is_not_acknowledged() {
    let e = Replicas::start(3, &[]);
    e.create_cluster(1);
    let leader = e.leader();
    // No disk of theirs takes it.
    let others = (1..=3).filter(|id| *id != leader);
    let dirs: Vec<_> = others.map(|id| e.data(id).join("bundles")).collect();
    for dir in &dirs {
        std::fs::remove_dir_all(dir).unwrap();
        std::fs::write(dir, "").unwrap();
    }
    let script = e.path().join("what.sh");
    std::fs::write(&script, "echo came along\n").unwrap();
    let create = |name: &str| {
        let properties = serde_json::json!({
            "nodeCount": 1,
            "customToolkitSettings": { "commandLine": "bash what.sh" },
        });
        let path = job_file(e.path(), name, properties).display().to_string();
        let script = script.display().to_string();
        let mut args = vec!["job", "create", "-n", name, "-c", "c", "-f", &path];
        args.extend(["--script", &script]);
        args.extend(IN);
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let args = create("first");
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    // Of the leader alone: who asks the others in between hears in the end that they do not lead.
    let said = e.fails_at(e.endpoint(leader), &args);
    assert!(said.contains("on 1 of 3 replicas"), "{said}");
    // One is enough, with the leader: what came already is not sent again, but it is kept there.
    std::fs::remove_file(&dirs[0]).unwrap();
    std::fs::create_dir(&dirs[0]).unwrap();
    e.ok(&args);
    assert_eq!(
        having(&dirs[0], &std::fs::read(bundle_in(&e, leader)).unwrap()),
        1
    );
}

fn bundle_in(e: &Replicas, id: u64) -> std::path::PathBuf {
    let mut found = std::fs::read_dir(e.data(id).join("bundles")).unwrap();
    found.next().unwrap().unwrap().path()
}

#[test]
fn what_a_lost_node_had_sent_is_copied_as_well() {
    let mut e = Replicas::start(3, &[]);
    e.start_agent("n1");
    e.create_cluster(1);
    let properties = serde_json::json!({
        "nodeCount": 1,
        "onNodeLoss": "FAIL",
        "customToolkitSettings": { "commandLine": "echo the last that was heard; sleep 600" },
    });
    e.submit_with("job", properties);
    let leader = e.leader();
    let text = b"the last that was heard\n";
    until("the log to come", || {
        (having(&e.data(leader).join("logs"), text) == 1).then_some(())
    });
    let agent = e.agents.remove("n1").expect("it runs");
    drop(agent);
    until("the node to be silent", || {
        let confirm = ["node", "confirm-lost", "-n", "n1", "-y"];
        let said = e.command_at(&e.list(), &confirm).output().unwrap();
        said.status.success().then_some(())
    });
    let job = ended(&e, "job");
    assert_eq!(job["state"], "FAILED", "{job}");
    for id in 1..=3 {
        let logs = e.data(id).join("logs");
        until("the log to be copied", || {
            (having(&logs, text) == 1).then_some(())
        });
    }
}
