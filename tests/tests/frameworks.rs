//! Frameworks for real: what their launchers set up is used by the frameworks themselves, which train on several nodes.

use std::net::TcpListener;

use batchai_tests::ensemble::{Ensemble, agent_args};
use batchai_tests::process::{Process, free_port};
use serde_json::json;

#[test]
fn a_port_that_somebody_holds_is_nobodys_fault_and_another_one_does() {
    let port = free_port();
    let mut e = Ensemble::start(0);
    let mut args = agent_args(e.path(), &e.endpoint, "a1", "self");
    // It has this one only.
    args.extend(["--ports".to_owned(), format!("{port}-{port}")]);
    let agent = Process::start_with(args, &e.join_token(), &e.path().join("a1.log"));
    e.agents.insert("a1".to_owned(), agent);
    e.until_alive(1);
    e.create_cluster(1);
    let job = json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": "echo at $MASTER_PORT", "processesPerNode": 1 },
    });
    let held = TcpListener::bind(("127.0.0.1", port)).unwrap();
    e.submit("clash", job.clone());
    let failed = e.until_job("clash", "FAILED");
    assert_eq!(failed["infrastructureRetryCount"], 3, "{failed:#}");
    let error = &failed["errors"][0];
    assert_eq!(error["code"], "PortInUse", "{failed:#}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(&format!("port {port}")), "{message}");
    drop(held);
    e.submit("free", job);
    e.until_job("free", "SUCCEEDED");
    assert_eq!(e.log("free", "stdout-0.txt"), format!("at {port}\n"));
    e.assert_nothing_left();
}
