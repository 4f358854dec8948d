//! A backup is made while jobs run, the coordinator's log is lost, and the ensemble begins anew from the backup: nothing runs twice at
//! once, nothing that still runs is killed, and what is not known is an administrator's to decide.

use std::path::{Path, PathBuf};

use batchai_tests::ensemble::Ensemble;
use batchai_tests::process::{processes_of, until};
use batchai_tests::replicas::Replicas;
use serde_json::{Value, json};

/// A job that notes each of its starts and runs until it is let go.
fn submit(e: &Ensemble, name: &str) {
    let (starts, go) = (started(e, name), e.path().join(format!("{name}.go")));
    let command = format!(
        "echo start >> {}; until [ -e {} ]; do sleep 0.1; done",
        starts.display(),
        go.display()
    );
    let properties = json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": command },
    });
    e.submit(name, properties);
}

fn started(e: &Ensemble, name: &str) -> PathBuf {
    e.path().join(format!("{name}.starts"))
}

fn starts(e: &Ensemble, name: &str) -> usize {
    let text = std::fs::read_to_string(started(e, name)).unwrap_or_default();
    text.lines().count()
}

fn let_go(e: &Ensemble, name: &str) {
    std::fs::write(e.path().join(format!("{name}.go")), "").unwrap();
}

fn until_started(e: &Ensemble, name: &str, times: usize) {
    until("a job to start", || {
        (starts(e, name) == times).then_some(())
    });
}

fn data(e: &Ensemble) -> PathBuf {
    e.path().join("coordinator")
}

/// The log is lost, and the coordinator begins from the backup.
fn begin_anew(e: &mut Ensemble, backup: &Path) {
    e.coordinator.take().unwrap().kill();
    let restore = [
        "admin".to_owned(),
        "snapshot".to_owned(),
        "restore".to_owned(),
        backup.display().to_string(),
        "--data".to_owned(),
        data(e).display().to_string(),
        "-y".to_owned(),
    ];
    let restore: Vec<_> = restore.iter().map(String::as_str).collect();
    let (_, said) = e.fails(&restore);
    assert!(said.contains("does not overwrite"), "{said}");
    std::fs::remove_dir_all(data(e).join("replica")).unwrap();
    // One that was cut off, whenever that was: nothing is served before it is done again.
    let begun = data(e).join("begun");
    for left in [std::fs::read(&begun).ok(), None] {
        std::fs::create_dir_all(data(e).join("restored")).unwrap();
        match left {
            Some(left) => std::fs::write(&begun, left).unwrap(),
            None => std::fs::remove_file(&begun).unwrap(),
        }
        let (_, said) = e.fails(&[
            "coordinator",
            "--listen",
            "127.0.0.1:0",
            "--data",
            &data(e).display().to_string(),
        ]);
        assert!(said.contains("was cut off"), "{said}");
    }
    e.ok(&restore);
    e.start_coordinator();
}

fn save(e: &Ensemble) -> PathBuf {
    let path = e.path().join("backup");
    let path_text = path.display().to_string();
    e.ok(&["admin", "snapshot", "save", "--to", &path_text]);
    let (code, said) = e.fails(&["admin", "snapshot", "save", "--to", &path_text]);
    assert!(code == 2 && said.contains("is there already"), "{said}");
    path
}

fn status(e: &Ensemble) -> Value {
    e.json(&["admin", "status"])
}

fn strays(e: &Ensemble) -> Vec<Value> {
    let list = e.json(&["admin", "stray", "list"]);
    list.as_array().cloned().unwrap_or_default()
}

fn until_back(e: &Ensemble) {
    until("the nodes to come back", || {
        let status = status(e);
        (status["restored"] == true && status["absentNodeCount"].as_i64().unwrap_or(0) == 0)
            .then_some(())
    });
}

#[test]
fn what_ran_goes_on_what_was_not_known_is_adopted_and_nothing_runs_twice_at_once() {
    let mut e = Ensemble::with_cluster(2);
    for name in ["known", "over"] {
        submit(&e, name);
        until_started(&e, name, 1);
    }
    submit(&e, "later");
    let backup = save(&e);
    let epoch = status(&e)["epoch"].as_str().unwrap().to_owned();
    // The backup knows nothing of what follows.
    let_go(&e, "over");
    assert_eq!(e.wait("over"), 0);
    until_started(&e, "later", 1);
    begin_anew(&mut e, &backup);
    until_back(&e);
    let now = status(&e);
    assert!(now["epoch"].as_str().unwrap().parse::<i64>().unwrap() > epoch.parse().unwrap());
    assert_eq!(
        (&now["restored"], &now["strayAttemptCount"]),
        (&json!(true), &json!(1))
    );
    assert_eq!(now["absentNodeCount"].as_i64().unwrap_or_default(), 0);
    // It may have ended, or not: nobody knows any more. It does not begin again before the restore is accepted.
    let over = e.until_job("over", "QUEUED");
    assert!(
        over["pendingReason"]
            .as_str()
            .unwrap()
            .contains("restored from a backup"),
        "{over}"
    );
    let stray = strays(&e).remove(0);
    assert!(
        stray["job"].as_str().unwrap().ends_with("jobs/later"),
        "{stray}"
    );
    assert!(!stray["jobUid"].as_str().unwrap().is_empty());
    assert_eq!(stray["nodes"][0]["phase"], "RUNNING", "{stray}");
    assert_eq!(stray["nodes"][0]["node"], "nodes/a2", "{stray}");
    assert!(
        stray["refusal"].as_str().unwrap_or_default().is_empty(),
        "{stray}"
    );
    assert!(
        stray["missingNodes"].is_null() && stray["discarded"] != true,
        "{stray}"
    );
    let (_, said) = e.fails(&["admin", "snapshot", "accept"]);
    assert!(said.contains(stray["attempt"].as_str().unwrap()), "{said}");
    let attempt = stray["attempt"].as_str().unwrap();
    e.ok(&["admin", "stray", "adopt", "--attempt", attempt]);
    assert!(strays(&e).is_empty());
    e.ok(&["admin", "snapshot", "accept"]);
    for name in ["known", "later"] {
        e.until_job(name, "RUNNING");
        assert_eq!(starts(&e, name), 1, "{name}");
        let_go(&e, name);
        assert_eq!(e.wait(name), 0);
        assert_eq!(starts(&e, name), 1, "{name}");
    }
    assert_eq!(e.wait("over"), 0);
    assert_eq!(starts(&e, "over"), 2);
    e.assert_nothing_left();
}

#[test]
fn discarded_work_ends_and_a_second_restore_of_a_backup_has_another_epoch() {
    let mut e = Ensemble::with_cluster(1);
    let backup = save(&e);
    submit(&e, "lost");
    until_started(&e, "lost", 1);
    begin_anew(&mut e, &backup);
    until_back(&e);
    let first = status(&e)["epoch"].clone();
    let stray = strays(&e).remove(0);
    assert!(
        stray["refusal"]
            .as_str()
            .unwrap()
            .contains("is not known here"),
        "{stray}"
    );
    let attempt = stray["attempt"].as_str().unwrap().to_owned();
    let (_, said) = e.fails(&["admin", "stray", "adopt", "--attempt", &attempt]);
    assert!(said.contains("is not known here"), "{said}");
    // An agent that starts again knows as much.
    e.agents.get_mut("a1").unwrap().kill();
    e.start_agent("a1");
    until("the agent to report it again", || {
        (status(&e)["strayAttemptCount"] == 1).then_some(())
    });
    assert_eq!(starts(&e, "lost"), 1);
    e.ok(&["admin", "stray", "discard", "--attempt", &attempt, "-y"]);
    until("the work to be gone", || {
        strays(&e).is_empty().then_some(())
    });
    let ranks = processes_of(e.path());
    assert!(
        !ranks.iter().any(|(_, line)| line.contains("lost.go")),
        "{ranks:?}"
    );
    e.ok(&["admin", "snapshot", "accept"]);
    submit(&e, "next");
    until_started(&e, "next", 1);
    begin_anew(&mut e, &backup);
    until_back(&e);
    assert_ne!(status(&e)["epoch"], first);
    // What ends meanwhile is kept as well: how it ended is known.
    let_go(&e, "next");
    let stray = until("the work to end", || {
        strays(&e)
            .into_iter()
            .find(|stray| stray["nodes"][0]["phase"] == "ENDED")
    });
    let node = &stray["nodes"][0];
    assert_ne!(node["ranks"][0]["rank"], 1, "{stray}");
    assert_eq!(node["ranks"][0]["exitCode"], 0, "{stray}");
    let signal = node["ranks"][0]["signal"].as_str();
    assert!(signal.unwrap_or_default().is_empty(), "{stray}");
    assert!(node["files"][0]["name"].is_string(), "{stray}");
    assert_ne!(node["files"][0]["sizeBytes"], "1", "{stray}");
    let attempt = stray["attempt"].as_str().unwrap().to_owned();
    e.ok(&["admin", "stray", "discard", "--attempt", &attempt, "-y"]);
    until("the work to be gone", || {
        strays(&e).is_empty().then_some(())
    });
    e.ok(&["admin", "snapshot", "accept"]);
    e.assert_nothing_left();
}

#[test]
fn a_backup_is_whole_or_refused_and_changes_nothing_where_it_does_not_belong() {
    let mut e = Ensemble::start(0);
    e.ok(&["group", "create", "-n", "g"]);
    let backup = save(&e);
    let text = backup.display().to_string();
    let said = e.ok(&["admin", "snapshot", "verify", &text]);
    let ensemble = status(&e)["ensemble"].as_str().unwrap().to_owned();
    assert!(
        said.contains(&ensemble) && said.contains("epoch 1"),
        "{said}"
    );
    let whole = std::fs::read(&backup).unwrap();
    let bad = e.path().join("bad");
    let bad_text = bad.display().to_string();
    for damaged in [&whole[..whole.len() / 2], b"", &[&whole[..], b"x"].concat()] {
        std::fs::write(&bad, damaged).unwrap();
        let (_, said) = e.fails(&["admin", "snapshot", "verify", &bad_text]);
        assert!(said.contains(&bad_text), "{said}");
    }
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    std::fs::write(&bad, flipped).unwrap();
    e.coordinator.take().unwrap().kill();
    let old = data(&e).join("replica.old");
    std::fs::rename(data(&e).join("replica"), &old).unwrap();
    let data = data(&e).display().to_string();
    e.fails(&[
        "admin", "snapshot", "restore", &bad_text, "--data", &data, "-y",
    ]);
    // Of another ensemble, which has served.
    let other = Ensemble::start(0);
    other.ok(&["group", "create", "-n", "g"]);
    let foreign = save(&other).display().to_string();
    let (_, said) = e.fails(&[
        "admin", "snapshot", "restore", &foreign, "--data", &data, "-y",
    ]);
    assert!(said.contains("of ensemble"), "{said}");
    // Nothing of that has changed what was there.
    std::fs::rename(&old, Path::new(&data).join("replica")).unwrap();
    e.start_coordinator();
    assert_eq!(e.json(&["group", "list"]).as_array().unwrap().len(), 1);
    assert_ne!(status(&e)["restored"], true);
}

fn groups(e: &Replicas, endpoint: &str) -> Vec<String> {
    let list = e.json_at(endpoint, &["group", "list"]);
    let list = list.as_array().cloned().unwrap_or_default();
    let name = |group: &Value| group["name"].as_str().unwrap().to_owned();
    let last = |name: String| name.rsplit('/').next().unwrap().to_owned();
    list.iter().map(|group| last(name(group))).collect()
}

#[test]
fn what_begins_anew_beside_the_old_ensemble_does_not_mix_with_it() {
    let mut e = Replicas::start(3, &[]);
    e.ok(&["group", "create", "-n", "before"]);
    e.make_token();
    let backup = e.path().join("backup").display().to_string();
    e.ok(&["admin", "snapshot", "save", "--to", &backup]);
    e.ok(&["group", "create", "-n", "after"]);
    // By mistake, or in need: two of the three run on.
    e.kill(1);
    std::fs::remove_dir_all(e.data(1).join("replica")).unwrap();
    let data = e.data(1).display().to_string();
    e.ok(&[
        "admin", "snapshot", "restore", &backup, "--data", &data, "-y",
    ]);
    e.restart(1);
    let (old, new) = (e.endpoint(2).to_owned(), e.endpoint(1).to_owned());
    until("the restored one to lead alone", || {
        (e.status_of(1)["leaderId"] == "1").then_some(())
    });
    e.ok_at(&new, &["group", "create", "-n", "new"]);
    let of_old = format!("{old},{}", e.endpoint(3));
    e.ok_at(&of_old, &["group", "create", "-n", "old"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(groups(&e, &new), ["before", "new"]);
    assert_eq!(groups(&e, &of_old), ["after", "before", "old"]);
    // Agents that have met it have nothing to do with the old one.
    let agent = |e: &mut Replicas, endpoint: &str, met: &str| {
        e.start_agent_at("a1", endpoint);
        until("the agent to say how it is", || {
            let log = std::fs::read_to_string(e.path().join("a1.log")).unwrap_or_default();
            log.contains(met).then_some(())
        });
        e.agents.remove("a1").unwrap().kill();
    };
    agent(&mut e, &of_old, "session opened");
    agent(&mut e, &new, "session opened");
    agent(&mut e, &of_old, "began anew from a backup");
    let members = e.status_of(1)["replicas"].as_array().unwrap().len();
    assert_eq!(members, 1);
    // The others join it under new numbers, with nothing of what they were.
    let said = e.fails_at(
        &new,
        &["admin", "replica", "add", "--id", "2", "--at", &old],
    );
    assert!(said.contains("not used again"), "{said}");
    let at = e.draw(4);
    e.ok(&["coordinator", "add-replica", "--data", &data, "--id", "4"]);
    e.take_there(4);
    e.begin(4);
    e.ok_at(&new, &["admin", "replica", "add", "--id", "4", "--at", &at]);
    e.ready(4);
    until("it to have the log", || {
        let promoted = e
            .command_at(&new, &["admin", "replica", "promote", "--id", "4"])
            .output();
        promoted.unwrap().status.success().then_some(())
    });
    let all = groups(&e, &at);
    assert_eq!(all, ["before", "new"]);
}
