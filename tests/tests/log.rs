//! The coordinator's log, on disk: what was acknowledged is there after every end, however much of the log was forgotten.

use std::fs;
use std::path::PathBuf;

use batchai_proto::v1;
use batchai_tests::api::Api;
use batchai_tests::ensemble::Ensemble;
use batchai_tests::process::until;
use serde_json::json;
use tonic::Code;

const ENTRIES: usize = 40;

fn start(agents: usize) -> Ensemble {
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = ["--snapshot-entries", &ENTRIES.to_string()]
        .map(str::to_owned)
        .into();
    e.start_coordinator();
    for i in 1..=agents {
        e.start_agent(&format!("a{i}"));
    }
    e.until_alive(agents);
    e
}

fn snapshots(e: &Ensemble) -> Vec<PathBuf> {
    let dir = e.path().join("coordinator/replica/snapshots");
    let files = fs::read_dir(dir).map(|entries| entries.map(|entry| entry.unwrap().path()));
    let files = files.into_iter().flatten();
    files
        .filter(|path| path.extension().is_some_and(|end| end == "snapshot"))
        .collect()
}

/// What the coordinator found when it was started last: the index of its snapshot, and how many entries behind it.
fn found(e: &Ensemble) -> (u64, u64) {
    let log = e.coordinator.as_ref().unwrap().log_text();
    let line = log
        .lines()
        .find(|line| line.contains("log opened"))
        .unwrap();
    let number = |name: &str| {
        let (_, rest) = line.split_once(&format!("{name}=")).unwrap();
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    (number("snapshot"), number("entries"))
}

#[test]
fn what_was_acknowledged_is_there_after_every_kill_and_the_log_stays_short() {
    let mut e = start(1);
    e.create_cluster(1);
    e.submit(
        "sleeps",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 6; echo done" } }),
    );
    let mut made = 0;
    for round in 0..6 {
        let mut api = Api::start(e);
        for _ in 0..30 + round {
            let create = v1::CreateResourceGroupRequest {
                resource_group_id: format!("r{made}"),
                ..Default::default()
            };
            api.call(api.groups().create_resource_group(create))
                .unwrap();
            made += 1;
        }
        api.e.coordinator.as_mut().unwrap().kill();
        api.e.start_coordinator();
        e = api.e;
        let groups = e.json(&["group", "list"]);
        assert_eq!(groups.as_array().unwrap().len(), made + 1);
    }
    let (snapshot, entries) = found(&e);
    assert!(snapshot > 100, "{snapshot}");
    // What is kept, what may come before the next one is due, and what came while the last was written.
    assert!((entries as usize) < 4 * ENTRIES, "{entries}");
    assert!((1..=2).contains(&snapshots(&e).len()));
    // What the snapshot swallowed cannot be watched any more: that is said, and nothing is missed.
    let api = Api::start(e);
    let watch = |revision| {
        let name = "resourceGroups/-".to_owned();
        let request = v1::WatchResourceGroupRequest { name, revision };
        let begun = api.call(api.groups().watch_resource_group(request));
        begun.map(|_| ()).map_err(|refused| refused.code())
    };
    assert_eq!(watch(5), Err(Code::OutOfRange));
    assert_eq!(watch(0), Ok(()));
    e = api.e;
    assert_eq!(e.wait("sleeps"), 0);
    assert_eq!(e.log("sleeps", "stdout.txt"), "done\n");
    // Old state and new: what a snapshot brought back can be changed and deleted.
    e.ok(&["group", "update", "-n", "r0", "--tags", "a=b"]);
    e.ok(&["group", "delete", "-n", "r1", "-y"]);
    e.ok(&["workspace", "delete", "-g", "g", "-n", "w", "-y"]);
    e.assert_nothing_left();
}

#[test]
fn a_damaged_snapshot_is_refused_and_says_what_to_do() {
    let mut e = start(0);
    for i in 0..3 * ENTRIES {
        e.ok(&["group", "create", "-n", &format!("r{i}")]);
    }
    until("a snapshot", || snapshots(&e).pop());
    e.coordinator.as_mut().unwrap().kill();
    // All but the one in use are those that were cut off.
    let mut files = snapshots(&e);
    files.sort();
    for file in files {
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(&file, bytes).unwrap();
    }
    let data = e.path().join("coordinator");
    let data = data.to_string_lossy();
    let refused = e.run(&["coordinator", "--listen", "127.0.0.1:0", "--data", &data]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(
        said.contains("checksum") && said.contains("restore the directory"),
        "{said}"
    );
}
