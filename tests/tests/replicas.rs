//! Three coordinators act as one: real processes on loopback, with TLS, killed, stopped, wiped, added and removed.

use batchai_tests::process::until;
use batchai_tests::replicas::Replicas;

fn group(e: &Replicas, name: &str) {
    e.ok(&["group", "create", "-n", name]);
}

fn groups(e: &Replicas, endpoint: &str) -> Vec<String> {
    let list = e.json_at(endpoint, &["group", "list"]);
    let list = list.as_array().cloned().unwrap_or_default();
    let name = |group: &serde_json::Value| group["name"].as_str().unwrap_or_default().to_owned();
    list.iter().map(name).collect()
}

#[test]
fn what_was_acknowledged_outlives_its_leader_and_every_replica_reads_it() {
    let mut e = Replicas::start(3, &[]);
    group(&e, "one");
    let first = e.leader();
    e.kill(first);
    // The same list of endpoints: whoever leads now is found.
    group(&e, "two");
    let second = e.leader();
    assert_ne!(first, second);
    for id in 1..=3 {
        if id == first {
            continue;
        }
        // A follower asks its leader how far it must be before it answers.
        let all = groups(&e, e.endpoint(id));
        assert_eq!(all, ["resourceGroups/one", "resourceGroups/two"], "{id}");
        // One that does not lead says who does, and the command goes there.
        let name = format!("by-{id}");
        e.ok_at(e.endpoint(id), &["group", "create", "-n", &name]);
        e.ok(&["group", "delete", "-n", &name, "-y"]);
    }
    e.restart(first);
    until("the one that was killed to be there again", || {
        let all = groups(&e, e.endpoint(first));
        (all == ["resourceGroups/one", "resourceGroups/two"]).then_some(())
    });
    let (applied, leader) = (e.status_of(first), e.status_of(e.leader()));
    assert_eq!(applied["ensemble"], leader["ensemble"]);
    assert_eq!(leader["replicas"].as_array().unwrap().len(), 3);
}

#[test]
fn the_status_says_how_every_replica_is() {
    let e = Replicas::start(3, &[]);
    group(&e, "one");
    let leader = e.leader();
    e.ok_at(e.endpoint(leader), &["admin", "take-snapshot"]);
    let status = e.status_of(leader);
    let number = |field: &str| status[field].as_str().unwrap().parse::<u64>().unwrap();
    assert_eq!((number("replicaId"), number("leaderId")), (leader, leader));
    assert_eq!(status["epoch"], "1");
    assert!(uuid::Uuid::try_parse(status["ensemble"].as_str().unwrap()).is_ok());
    let (first, last) = (number("firstIndex"), number("lastIndex"));
    until("the replicas to compare what they hold", || {
        let status = e.status_of(leader);
        let decided = status["stateHashIndex"].as_str()?.parse::<u64>().ok()?;
        let known = status["featureLevel"] == 1;
        (known && decided > 0 && status["stateHash"].as_str()?.len() == 32).then_some(())
    });
    assert!(number("term") >= 1 && number("logBytes") > 0 && first == 1);
    assert!(number("committedIndex") <= last && number("appliedIndex") <= last);
    assert!((1..=last).contains(&number("snapshotIndex")));
    assert!(number("revision") >= 2);
    let version = status["version"].as_str().unwrap();
    for (at, replica) in status["replicas"].as_array().unwrap().iter().enumerate() {
        let id = at as u64 + 1;
        assert_eq!(replica["id"], id.to_string());
        let role = if id == leader { "LEADER" } else { "VOTER" };
        assert_eq!(replica["role"], role);
        assert_eq!(replica["endpoint"], e.endpoint(id));
        assert_eq!(replica["version"], version);
        assert!(replica["lastContact"].as_str().unwrap().ends_with('s'));
        let matched: u64 = replica["matchedIndex"].as_str().unwrap().parse().unwrap();
        assert!(matched <= last);
        assert_ne!(replica["receivesSnapshot"], true);
    }
    // A follower knows less of the others.
    let other = e.status_of(leader % 3 + 1);
    assert_eq!(other["leaderId"], leader.to_string());
    assert!(other["replicas"][0]["matchedIndex"].is_null());
}

#[test]
fn without_a_majority_nothing_is_accepted_or_read() {
    let mut e = Replicas::start(3, &[]);
    group(&e, "one");
    let leader = e.leader();
    let others: Vec<_> = (1..=3).filter(|id| *id != leader).collect();
    for id in &others {
        e.kill(*id);
    }
    let said = e.fails_at(e.endpoint(leader), &["group", "create", "-n", "two"]);
    assert!(
        said.contains("may or may not") || said.contains("cannot serve"),
        "{said}"
    );
    let said = e.fails_at(e.endpoint(leader), &["group", "list"]);
    assert!(said.contains("cannot serve"), "{said}");
    e.restart(others[0]);
    e.leader();
    group(&e, "three");
}

#[test]
fn a_leader_that_is_stopped_hands_over_first() {
    let mut e = Replicas::start(3, &[]);
    group(&e, "one");
    let leader = e.leader();
    assert!(e.stop(leader), "it ends well");
    let log = std::fs::read_to_string(e.path().join(format!("replica-{leader}.log"))).unwrap();
    assert!(log.contains("another replica leads now"), "{log}");
    group(&e, "two");
    // And one that is asked to.
    e.restart(leader);
    e.leader();
    until("the one that came back to be able to lead", || {
        let args = ["admin", "replica", "lead", "--id", &leader.to_string()];
        let led = e.command_at(&e.list(), &args).output().unwrap();
        led.status.success().then_some(())
    });
    assert_eq!(e.leader(), leader);
}

#[test]
fn replicas_come_by_a_snapshot_get_a_vote_and_go() {
    let mut e = Replicas::start(3, &["--snapshot-entries", "5"]);
    for i in 0..30 {
        group(&e, &format!("g{i}"));
    }
    e.ok(&["admin", "take-snapshot"]);
    let data = e.data(1).display().to_string();
    let add = ["coordinator", "add-replica", "--data", &data, "--id", "4"];
    e.ok(&add);
    let said = e.fails(&add);
    assert!(said.contains("there already"), "{said}");
    let at = e.draw(4);
    e.take_there(4);
    e.begin(4);
    e.ok(&["admin", "replica", "add", "--id", "4", "--at", &at]);
    e.ready(4);
    until("the learner to have it all", || {
        (groups(&e, e.endpoint(4)).len() == 30).then_some(())
    });
    let log = std::fs::read_to_string(e.path().join("replica-4.log")).unwrap();
    assert!(log.contains("snapshot came"), "{log}");
    let said = e.fails(&["admin", "replica", "add", "--id", "4", "--at", &at]);
    assert!(said.contains("belongs to the ensemble already"), "{said}");
    e.ok(&["admin", "replica", "promote", "--id", "4"]);
    // Another one goes, the leader itself, and ends.
    let gone = e.leader();
    e.ok(&[
        "admin",
        "replica",
        "remove",
        "--id",
        &gone.to_string(),
        "-y",
    ]);
    let mut process = e.processes.remove(&gone).unwrap();
    assert!(!process.wait().success());
    assert!(
        process.log_text().contains("removed this replica"),
        "{}",
        process.log_text()
    );
    let said = e.fails(&[
        "admin",
        "replica",
        "add",
        "--id",
        &gone.to_string(),
        "--at",
        &at,
    ]);
    assert!(said.contains("not used again"), "{said}");
    // Three vote: one of them may be lost, the new one counts.
    let lost = (1..=3).find(|id| *id != gone && *id != e.leader()).unwrap();
    e.kill(lost);
    group(&e, "with-the-new-one");
    let leader = e.leader();
    let said = e.fails(&[
        "admin",
        "replica",
        "remove",
        "--id",
        &leader.to_string(),
        "-y",
    ]);
    assert!(said.contains("that is no majority"), "{said}");
}

#[test]
fn a_replica_that_lost_its_store_is_refused() {
    let mut e = Replicas::start(3, &[]);
    group(&e, "one");
    let wiped = (1..=3).find(|id| *id != e.leader()).unwrap();
    until("the leader to know all stores", || {
        let status = e.status_of(e.leader());
        let replicas = status["replicas"].as_array()?.clone();
        replicas
            .iter()
            .all(|replica| replica["version"].as_str().is_some_and(|v| !v.is_empty()))
            .then_some(())
    });
    group(&e, "two");
    e.kill(wiped);
    std::fs::remove_dir_all(e.data(wiped).join("replica")).unwrap();
    e.begin(wiped);
    let mut process = e.processes.remove(&wiped).unwrap();
    assert!(!process.wait().success());
    let said = process.log_text();
    assert!(said.contains("join under a new id"), "{said}");
    // Nor does it come with a certificate that is not its own.
    let data = e.data(wiped).display().to_string();
    let other = e.data(wiped % 3 + 1).join("pki/coordinator.pem");
    let other = other.display().to_string();
    let args = ["coordinator", "--data", &data, "--credentials", &other];
    let said = e.fails(&args);
    assert!(said.contains("not that of replica"), "{said}");
    // Also where nothing at all is left, and it comes as on its first day.
    std::fs::remove_file(e.data(wiped).join("begun")).unwrap();
    e.begin(wiped);
    let log = e.path().join(format!("replica-{wiped}.log"));
    until("it to be refused", || {
        let log = std::fs::read_to_string(&log).ok()?;
        log.contains("another store").then_some(())
    });
    // An empty list would be an answer: there must be none.
    let said = e.fails_at(e.endpoint(wiped), &["group", "list"]);
    assert!(said.contains("cannot serve"), "{said}");
    group(&e, "three");
}

#[test]
fn a_job_goes_on_while_its_leader_is_lost() {
    let mut e = Replicas::start(3, &[]);
    e.start_agent("n1");
    e.create_cluster(1);
    let run = "for i in $(seq 1 60); do echo line $i; sleep 0.1; done";
    e.submit("long", run);
    until("the job to run", || {
        (e.job("long")["state"] == "RUNNING").then_some(())
    });
    e.kill(e.leader());
    let ended = until("the job to end", || {
        let job = e.job("long");
        (job["endTime"].is_string()).then_some(job)
    });
    assert_eq!(ended["state"], "SUCCEEDED", "{ended}");
    let mut args = vec!["job", "file", "stream", "-j", "long", "-f", "stdout.txt"];
    args.extend(batchai_tests::ensemble::IN);
    let log = e.ok(&args);
    let lines: Vec<_> = (1..=60).map(|i| format!("line {i}")).collect();
    assert_eq!(log.lines().collect::<Vec<_>>(), lines);
    e.submit("next", "true");
    until("another job to end", || {
        (e.job("next")["state"] == "SUCCEEDED").then_some(())
    });
}

/// The README's section, as it stands, but for its ports.
#[test]
fn the_commands_of_the_readme_work() {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let mut text = std::fs::read_to_string(readme).unwrap();
    let ports = [0; 4].map(|_| batchai_tests::process::free_port().to_string());
    text = text.replace("127.0.0.1:707$i", "127.0.0.1:$(echo PORTS | cut -d, -f$i)");
    text = text.replace("PORTS", &ports.join(","));
    for (at, port) in ports.iter().enumerate() {
        text = text.replace(
            &format!("127.0.0.1:707{}", at + 1),
            &format!("127.0.0.1:{port}"),
        );
    }
    let blocks = text.split("```console three\n").skip(1);
    let blocks = blocks.filter_map(|block| block.split_once("```").map(|(block, _)| block));
    let lines: Vec<_> = blocks
        .flat_map(str::lines)
        .map(|line| line.strip_prefix("$ ").unwrap())
        .collect();
    assert_eq!(lines.len(), 23, "{lines:#?}");
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(
        batchai_tests::process::under_test(),
        dir.path().join("batchai"),
    )
    .unwrap();
    let script = format!(
        "set -euo pipefail\nexport PATH=$PWD:$PATH\ntrap 'kill -9 $(jobs -p) || true' EXIT\n{}\n",
        lines.join("\n")
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .current_dir(dir.path())
        .env("BATCHAI_CONFIG", dir.path().join("config.json"))
        .output()
        .unwrap();
    batchai_tests::process::sweep(dir.path());
    let (printed, said) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{printed}\n{said}");
    assert!(
        printed.contains("leader") && printed.contains("voter"),
        "{printed}"
    );
}
