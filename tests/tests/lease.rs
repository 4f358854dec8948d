//! A node is not heard of for longer than its lease: its shims kill what may begin elsewhere, whether the agent is dead or stopped, before
//! the coordinator has it begin there.

use batchai_tests::ensemble::Ensemble;
use batchai_tests::process::{processes_of, until};
use nix::sys::signal::Signal;
use serde_json::json;

/// A job that notes its starts, and whether another run of it is alive, and runs until it is let go.
fn submit(e: &Ensemble, name: &str, told: &str) {
    let dir = e.path().display().to_string();
    let held = format!(
        "echo start >> {dir}/{name}.starts; until [ -e {dir}/{name}.go ]; do sleep 0.1; done"
    );
    let command =
        format!("flock -n {dir}/{name}.lock -c '{held}' || echo twice >> {dir}/{name}.twice");
    let mut properties = json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": command },
    });
    if !told.is_empty() {
        properties["onNodeLoss"] = told.into();
    }
    e.submit(name, properties);
    until("a job to start", || (starts(e, name) == 1).then_some(()));
}

fn starts(e: &Ensemble, name: &str) -> usize {
    let path = e.path().join(format!("{name}.starts"));
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .count()
}

fn let_go(e: &Ensemble, name: &str) {
    std::fs::write(e.path().join(format!("{name}.go")), "").unwrap();
    assert_eq!(e.wait(name), 0, "{}", e.job(name));
    assert!(
        !e.path().join(format!("{name}.twice")).exists(),
        "{name} ran twice at once"
    );
}

/// The ranks of a job that run, on whatever node.
fn running(e: &Ensemble, name: &str) -> bool {
    let mark = format!("{name}.go");
    processes_of(e.path())
        .iter()
        .any(|(_, line)| line.contains(&mark))
}

fn node_of(e: &Ensemble, name: &str) -> String {
    let job = e.job(name);
    let node = job["attempt"]["nodes"][0]["node"].as_str().unwrap();
    node.trim_start_matches("nodes/").to_owned()
}

#[test]
fn when_a_node_is_not_heard_of_jobs_do_as_they_were_told_and_nothing_runs_twice() {
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = ["--lease", "20"].map(str::to_owned).to_vec();
    e.start_coordinator();
    for name in ["a1", "a2", "a3", "a4"] {
        e.start_agent(name);
    }
    e.until_alive(4);
    e.create_cluster(4);
    submit(&e, "again", "");
    submit(&e, "waits", "WAIT");
    submit(&e, "fails", "FAIL");
    let shown = ["again", "waits", "fails"].map(|name| e.job(name)["onNodeLoss"].clone());
    assert_eq!(shown, ["REQUEUE", "WAIT", "FAIL"], "on_node_loss");
    // One agent is stopped, the others are gone; their shims live.
    let stopped = node_of(&e, "again");
    e.agents[&stopped].signal(Signal::SIGSTOP);
    for name in ["waits", "fails"] {
        let node = node_of(&e, name);
        e.agents.get_mut(&node).unwrap().kill();
    }
    until("the job to run again", || {
        (starts(&e, "again") == 2).then_some(())
    });
    assert_ne!(node_of(&e, "again"), stopped);
    let again = e.job("again");
    let error = &again["errors"][0];
    let message = error["message"].as_str().unwrap();
    assert_eq!(
        (&error["code"], &again["infrastructureRetryCount"]),
        (&json!("NodeLost"), &json!(1))
    );
    assert!(
        message.contains(&format!("nodes/{stopped} was not heard of")),
        "{message}"
    );
    let failed = e.until_job("fails", "FAILED");
    assert_eq!(failed["errors"][0]["code"], "NodeLost", "{failed}");
    let waits = until("the job to say what it waits for", || {
        let job = e.job("waits");
        let reason = job["pendingReason"].as_str().unwrap_or_default().to_owned();
        reason.contains("not heard of").then_some(job)
    });
    assert_eq!(waits["state"], "RUNNING");
    assert!(running(&e, "waits"), "it survives its agent and its lease");
    // The node is back: what was lost with it is known to be over, and the rest goes on.
    e.agents[&stopped].signal(Signal::SIGCONT);
    let node = node_of(&e, "waits");
    let fails = failed["attempt"]["nodes"][0]["node"].as_str().unwrap();
    let fails = fails.trim_start_matches("nodes/").to_owned();
    for name in [&node, &fails] {
        e.agents.remove(name);
        e.start_agent(name);
    }
    until("what failed to be ended", || {
        (!running(&e, "fails")).then_some(())
    });
    assert_eq!(starts(&e, "fails"), 1);
    let_go(&e, "waits");
    assert_eq!(starts(&e, "waits"), 1);
    let_go(&e, "again");
    assert_eq!(starts(&e, "again"), 2);
    e.assert_nothing_left();
}

#[test]
fn a_loss_that_is_confirmed_is_not_waited_for() {
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = ["--lease", "3600"].map(str::to_owned).to_vec();
    e.start_coordinator();
    for name in ["a1", "a2"] {
        e.start_agent(name);
    }
    e.until_alive(2);
    e.create_cluster(2);
    submit(&e, "j", "WAIT");
    let node = node_of(&e, "j");
    let confirm = ["node", "confirm-lost", "-n", &node, "-y"];
    let (_, said) = e.fails(&confirm);
    assert!(said.contains("in contact"), "{said}");
    // The machine is off: its agent and its shims are gone.
    e.agents.remove(&node).unwrap().kill();
    for (pid, _) in processes_of(&e.path().join("agents").join(&node)) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
    until("the job's processes to be gone", || {
        for (pid, line) in processes_of(e.path()) {
            if line.contains("j.go") {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        (!running(&e, "j")).then_some(())
    });
    until("the loss to be believed", || {
        e.run(&confirm).status.success().then_some(())
    });
    until("the job to run again", || {
        (starts(&e, "j") == 2).then_some(())
    });
    assert_ne!(node_of(&e, "j"), node);
    let_go(&e, "j");
}
