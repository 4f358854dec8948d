//! Agents have their sessions with whatever replica they reach: one that does not lead relays what they say, and what they are told.

use batchai_tests::process::{processes_of, until};
use batchai_tests::replicas::Replicas;
use nix::sys::signal::Signal;
use serde_json::json;

/// A job that runs until it is let go; what it starts twice leaves a mark.
fn submit(e: &Replicas, name: &str) {
    let dir = e.path().display().to_string();
    let held = format!(
        "echo out > $AZ_BATCHAI_OUTPUT_O/file; echo start >> {dir}/{name}.starts; until [ -e {dir}/{name}.go ]; do sleep 0.1; done"
    );
    let out = e.path().join("out").display().to_string();
    let properties = json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": held },
        "outputDirectories": [{ "id": "O", "pathPrefix": out, "pathSuffix": "outputs" }],
    });
    e.submit_with(name, properties);
    until("a job to run", || {
        (e.job(name)["state"] == "RUNNING" && starts(e, name) == 1).then_some(())
    });
}

fn starts(e: &Replicas, name: &str) -> usize {
    let path = e.path().join(format!("{name}.starts"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().count()
}

fn let_go(e: &Replicas, name: &str) {
    std::fs::write(e.path().join(format!("{name}.go")), "").unwrap();
    until("a job to succeed", || {
        let state = e.job(name)["state"].clone();
        assert_ne!(state, "FAILED", "{}", e.job(name));
        (state == "SUCCEEDED").then_some(())
    });
    assert_eq!(starts(e, name), 1);
}

fn until_alive(e: &Replicas, count: usize) {
    until("the nodes to be alive", || {
        let nodes = e.json_at(&e.list(), &["node", "list"]);
        let nodes = nodes.as_array().cloned().unwrap_or_default();
        let alive = nodes.iter().filter(|node| node["state"] != "UNUSABLE");
        (alive.count() == count).then_some(())
    });
}

/// How often an agent opened a session.
fn sessions(e: &Replicas, agent: &str) -> usize {
    e.agents[agent].log_text().matches("session opened").count()
}

#[test]
fn jobs_run_on_nodes_whose_agents_reach_a_follower_only_and_do_not_notice_another_leader() {
    let mut e = Replicas::start(3, &["--lease", "20"]);
    let leader = e.leader();
    let followers: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    for id in &followers {
        let endpoint = e.endpoint(*id).to_owned();
        e.start_agent_at(&format!("n{id}"), &endpoint);
    }
    until_alive(&e, 2);
    e.create_cluster(2);
    submit(&e, "one");
    submit(&e, "two");
    // Longer than a lease: it is granted through the follower.
    let begun = std::time::Instant::now();
    // A leader that is lost is no matter for sessions that are with the others.
    e.kill(leader);
    let next = e.leader();
    assert_ne!(next, leader);
    until_alive(&e, 2);
    while begun.elapsed() < std::time::Duration::from_secs(24) {
        std::thread::sleep(std::time::Duration::from_millis(500));
        for name in ["one", "two"] {
            assert_eq!(e.job(name)["state"], "RUNNING", "{}", e.job(name));
        }
    }
    for id in &followers {
        let agent = format!("n{id}");
        assert_eq!(sessions(&e, &agent), 1, "{}", e.agents[&agent].log_text());
    }
    let_go(&e, "one");
    let_go(&e, "two");
}

#[test]
fn a_node_has_one_live_session_whatever_replica_it_is_with() {
    let mut e = Replicas::start(3, &[]);
    let leader = e.leader();
    let mut others = (1..=3).filter(|id| *id != leader);
    let (one, two) = (others.next().unwrap(), others.next().unwrap());
    let endpoint = e.endpoint(one).to_owned();
    e.start_agent_at("n", &endpoint);
    until_alive(&e, 1);
    for id in [two, leader] {
        let (endpoint, copy) = (e.endpoint(id).to_owned(), format!("copy{id}"));
        e.start_twin("n", &copy, &endpoint);
        until("the second one to be refused", || {
            let log = e.agents[&copy].log_text();
            log.contains("it has a live session already").then_some(())
        });
        e.agents.remove(&copy);
    }
    assert_eq!(sessions(&e, "n"), 1);
}

#[test]
fn a_replica_that_no_leader_answers_lets_its_agents_go() {
    let mut e = Replicas::start(3, &[]);
    let leader = e.leader();
    let follower = (1..=3).find(|id| *id != leader).unwrap();
    let all = format!("{},{}", e.endpoint(follower), e.endpoint(leader));
    e.start_agent_at("n", &all);
    until_alive(&e, 1);
    e.create_cluster(1);
    submit(&e, "one");
    let files = [
        "job", "file", "list", "-g", "g", "-w", "w", "-e", "e", "-j", "one", "-d", "O", "-o", "tsv",
    ];
    let shown = e.ok(&files);
    assert!(shown.starts_with("file\t"), "{shown}");
    for id in (1..=3).filter(|id| *id != follower) {
        e.processes[&id].signal(Signal::SIGSTOP);
    }
    until("the agent to be let go", || {
        let log = e.agents["n"].log_text();
        log.contains("no leader answers this replica").then_some(())
    });
    assert!(
        processes_of(e.path())
            .iter()
            .any(|(_, line)| line.contains("one.go")),
        "the job runs on"
    );
    for id in (1..=3).filter(|id| *id != follower) {
        e.processes[&id].signal(Signal::SIGCONT);
    }
    until_alive(&e, 1);
    let_go(&e, "one");
}
