//! GPUs, as real agents see them by a twin of NVIDIA's library (`gpu/nvml.c`): which of them processes of jobs are shown, and that a job does
//! not begin on one that somebody else uses. No GPU is there, and nothing computes on any.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use batchai_tests::ensemble::{Ensemble, IN, agent_args};
use batchai_tests::process::{Process, until};
use serde_json::{Value, json};

/// Four GPUs, two of which are linked.
const FOUR: &str = "gpu GPU-aaaa 16384 2 Tesla V100-SXM2\ngpu GPU-bbbb 16384 2 Tesla V100-SXM2\ngpu GPU-cccc 8192 0 Tesla P4\n\
                    gpu GPU-dddd 8192 0 Tesla P4\n";
const ONE: &str = "gpu GPU-only 16384 0 Tesla V100\n";

/// The twin, made where the ensemble lies.
fn library(e: &Ensemble) -> PathBuf {
    let dir = e.path().join("nvml");
    std::fs::create_dir(&dir).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu/nvml.c");
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(dir.join("libnvidia-ml.so.1"))
        .arg(source)
        .status();
    assert!(made.unwrap().success());
    dir
}

/// What an agent's driver says from now on.
fn say(e: &Ensemble, agent: &str, text: &str) {
    let (new, path) = (e.path().join("new.gpus"), twin(e, agent));
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

fn twin(e: &Ensemble, agent: &str) -> PathBuf {
    e.path().join(format!("{agent}.gpus"))
}

fn start(e: &mut Ensemble, library: &Path, agent: &str, text: &str) {
    say(e, agent, text);
    let args = agent_args(e.path(), &e.endpoint, agent, "self");
    let (library, twin) = (library.to_string_lossy(), twin(e, agent));
    let twin = twin.to_string_lossy();
    let [token] = e.join_token();
    let variables = [("LD_LIBRARY_PATH", &*library), ("NVML_TWIN", &*twin), token];
    let log = e.path().join(format!("{agent}.log"));
    let process = Process::start_with(args, &variables, &log);
    e.agents.insert(agent.to_owned(), process);
}

/// Agents whose drivers say these, in a cluster.
fn ensemble(agents: &[(&str, &str)]) -> Ensemble {
    let mut e = Ensemble::start(0);
    let library = library(&e);
    for (agent, text) in agents {
        start(&mut e, &library, agent, text);
    }
    e.until_alive(agents.len());
    e.create_cluster(agents.len());
    e
}

fn node(e: &Ensemble, agent: &str) -> Value {
    let nodes = e.json(&["node", "list"]);
    let name = format!("nodes/{agent}");
    let mut nodes = nodes.as_array().unwrap().iter();
    nodes.find(|node| node["name"] == name).unwrap().clone()
}

/// Something that has nothing to do with batchai. It ends with the test.
struct Stranger(Child);

impl Stranger {
    fn start() -> Stranger {
        let child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn();
        Stranger(child.unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const TELL: &str =
    r#"echo "${CUDA_VISIBLE_DEVICES-none} by $CUDA_DEVICE_ORDER of $AZ_BATCHAI_NUM_GPUS""#;
const ALL: &str = "0,1,2,3 by PCI_BUS_ID of 4\n";

/// Bash for an interpreter, which runs the arguments that stand for a script.
fn script() -> Value {
    json!({ "pythonScriptFilePath": "-c", "pythonInterpreterPath": "/bin/bash" })
}

fn with(mut settings: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    settings.as_object_mut().unwrap().extend(more);
    settings
}

#[test]
fn gpus_are_registered_and_every_process_of_a_job_sees_what_it_is_to_use() {
    let mut e = ensemble(&[("a1", FOUR)]);
    let gpus = &node(&e, "a1")["facts"]["gpus"];
    let gpu = |uuid: &str, model: &str, mib: &str, links: i32| {
        let plain = json!({ "uuid": uuid, "model": model, "memoryMib": mib, "vendor": "NVIDIA" });
        match links {
            0 => plain,
            links => with(plain, json!({ "nvLinkCount": links })),
        }
    };
    let expected = json!([
        gpu("GPU-aaaa", "Tesla V100-SXM2", "16384", 2),
        gpu("GPU-bbbb", "Tesla V100-SXM2", "16384", 2),
        gpu("GPU-cccc", "Tesla P4", "8192", 0),
        gpu("GPU-dddd", "Tesla P4", "8192", 0),
    ]);
    assert_eq!(*gpus, expected);

    e.submit(
        "custom",
        json!({ "nodeCount": 1, "jobPreparation": { "commandLine": TELL }, "customToolkitSettings": { "commandLine": TELL } }),
    );
    e.until_job("custom", "SUCCEEDED");
    assert_eq!(e.log("custom", "stdout.txt"), ALL);
    assert_eq!(e.log("custom", "stdout-job_prep.txt"), ALL);

    let arguments = format!("'{TELL}'");
    let torch = with(
        script(),
        json!({ "commandLineArgs": arguments, "processCount": 2, "communicationBackend": "gloo" }),
    );
    e.submit("torch", json!({ "nodeCount": 1, "pyTorchSettings": torch }));
    let own = json!([{ "name": "CUDA_VISIBLE_DEVICES", "value": "$AZ_BATCHAI_TASK_INDEX" }]);
    e.submit(
        "own",
        json!({ "nodeCount": 1, "pyTorchSettings": torch, "environmentVariables": own }),
    );
    e.until_job("torch", "SUCCEEDED");
    e.until_job("own", "SUCCEEDED");
    for rank in 0..2 {
        let file = format!("stdout-{rank}.txt");
        assert_eq!(e.log("torch", &file), ALL);
        assert_eq!(e.log("own", &file), format!("{rank} by PCI_BUS_ID of 4\n"));
    }

    let tensorflow = json!({
        "masterCommandLineArgs": arguments,
        "workerCommandLineArgs": arguments,
        "parameterServerCommandLineArgs": format!("'{TELL}; sleep 600'"),
        "workerCount": 2,
        "parameterServerCount": 1,
    });
    let tensorflow = with(script(), tensorflow);
    e.submit(
        "tensorflow",
        json!({ "nodeCount": 1, "tensorFlowSettings": tensorflow }),
    );
    e.until_job("tensorflow", "SUCCEEDED");
    for (who, seen) in [("wk-0", "0,1"), ("wk-1", "2,3"), ("ps-0", "")] {
        let said = e.log("tensorflow", &format!("stdout-{who}.txt"));
        assert_eq!(said, format!("{seen} by PCI_BUS_ID of 4\n"), "{who}");
    }
    e.assert_nothing_left();
}

#[test]
fn a_gpu_that_somebody_else_uses_is_named_and_the_job_runs_on_another_node() {
    let mut e = ensemble(&[("a1", ONE), ("a2", ONE)]);
    let stranger = Stranger::start();
    let pid = stranger.pid();
    // Who only draws keeps nobody away.
    let drawing = format!("graphics 0 {}\n", std::process::id());
    say(&e, "a1", &format!("{ONE}compute 0 {pid}\n"));
    say(&e, "a2", &format!("{ONE}{drawing}"));
    let waits = "until [ -e go ]; do sleep 0.1; done";
    e.submit(
        "moves",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": waits } }),
    );
    let job = until("the job to run on the other node", || {
        let job = e.job("moves");
        let node = &job["attempt"]["nodes"][0];
        (node["node"] == "nodes/a2" && node["phase"] == "RUNNING").then_some(job)
    });
    // Waiting is no try.
    let counted = job["infrastructureRetryCount"].as_i64();
    assert_eq!(counted.unwrap_or_default(), 0, "{job:#}");
    assert_eq!(job["attempt"]["number"], 2, "{job:#}");
    let error = &job["errors"][0];
    assert_eq!(error["code"], "GpuInUse", "{job:#}");
    let message = error["message"].as_str().unwrap();
    let named =
        format!("GPU 0 of NVIDIA on this node (GPU-only) is in use by process {pid} (sleep)");
    assert!(message.starts_with(&named), "{message}");
    let node = error["details"].as_array().unwrap();
    assert!(
        node.contains(&json!({ "name": "node", "value": "nodes/a1" })),
        "{job:#}"
    );

    // What goes away while a job waits for it was in nobody's way.
    let job = json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "true" } });
    e.submit("waits", job);
    until("the node to look at its GPU", || {
        let job = e.job("waits");
        (job["attempt"]["nodes"][0]["phase"] == "PREPARING").then_some(())
    });
    say(&e, "a1", ONE);
    let job = e.until_job("waits", "SUCCEEDED");
    assert_eq!(job["attempt"]["nodes"][0]["node"], "nodes/a1", "{job:#}");
    assert_eq!(job["attempt"]["number"], 1, "{job:#}");
    let terminate = [&["job", "terminate", "-n", "moves", "-y"][..], &IN].concat();
    e.ok(&terminate);
    e.until_job("moves", "FAILED");
    e.assert_nothing_left();
}

#[test]
fn a_driver_that_does_not_answer_holds_up_neither_an_agent_nor_a_job() {
    let mut e = Ensemble::start(0);
    let library = library(&e);
    start(&mut e, &library, "a1", ONE);
    e.until_alive(1);
    // This one never hears of a GPU, and joins without.
    start(&mut e, &library, "a2", "hang\n");
    e.until_alive(2);
    assert_eq!(node(&e, "a2")["facts"]["gpus"], Value::Null);
    let log = e.agents["a2"].log_text();
    assert!(log.contains("the NVIDIA driver cannot be asked"), "{log}");
    e.create_cluster(2);
    say(&e, "a1", "hang\n");
    e.submit(
        "moves",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": TELL } }),
    );
    let job = e.until_job("moves", "SUCCEEDED");
    assert_eq!(e.log("moves", "stdout.txt"), "none by  of 0\n");
    assert_eq!(job["infrastructureRetryCount"], 1, "{job:#}");
    assert_eq!(job["attempt"]["nodes"][0]["node"], "nodes/a2", "{job:#}");
    // Which GPU a job would find by a number must be the one that was registered by it.
    say(&e, "a1", "gpu GPU-other 16384 0 Tesla V100\n");
    e.submit(
        "both",
        json!({ "nodeCount": 2, "customToolkitSettings": { "commandLine": "sleep 600" } }),
    );
    let job = e.until_job("both", "FAILED");
    let error = &job["errors"][0];
    assert_eq!(error["code"], "GpuUnavailable", "{job:#}");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("GPU 0 was GPU-only when the agent started, and is GPU-other now"),
        "{message}"
    );
    e.assert_nothing_left();
}
