//! Frameworks for real: each trains an example on two nodes, which are machines with addresses of their own, and what its processes print
//! proves that they talked: all know how many they are, each has other data, the loss falls, and all end with the same
//! parameters. PyTorch is Debian's; that of today, TensorFlow and Caffe2 are what `.ci/full` installs, and are tried with
//! `BATCHAI_TEST_FULL=1` only. What MPI starts, and Horovod, is in `mpi`.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use batchai_tests::ensemble::{Ensemble, IN, agent_args};
use batchai_tests::network::Network;
use batchai_tests::process::{Process, free_port, processes_of, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::requirement;
use serde_json::{Value, json};

/// Two machines with nodes, and one with the coordinator; its processes end before the network.
struct World {
    e: Replicas,
    _network: Network,
}

impl World {
    /// None where it cannot be: then the test was told so.
    fn new(test: &str) -> Option<World> {
        let network = Network::new(test, 3)?;
        let mut e = network.replica(3);
        let list = e.list();
        for machine in 1..=2 {
            let name = format!("n{machine}");
            e.start_agent_by(&network.on_named(machine, &name), &name, &list);
        }
        until("the nodes to be in contact", || {
            let nodes = e.json_at(&list, &["node", "list"]);
            let alive = nodes.as_array()?.iter();
            let alive = alive.filter(|node| node["state"] != "UNUSABLE");
            (alive.count() == 2).then_some(())
        });
        e.create_cluster(2);
        Some(World {
            e,
            _network: network,
        })
    }

    /// Submits an example, run by this interpreter.
    fn submit(&self, example: &str, python: &Path) {
        self.submit_changed(example, |properties| {
            let properties = properties.as_object_mut().unwrap();
            let settings = properties
                .iter_mut()
                .find(|(name, _)| name.ends_with("Settings"));
            settings.unwrap().1["pythonInterpreterPath"] = json!(python);
        });
    }

    /// Submits an example as this makes it.
    fn submit_changed(&self, example: &str, change: impl FnOnce(&mut Value)) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let dir = dir.join(example);
        let file = std::fs::read(dir.join("job.json")).unwrap();
        let mut file: Value = serde_json::from_slice(&file).unwrap();
        change(&mut file["properties"]);
        let path = self.e.path().join(format!("{example}.json"));
        std::fs::write(&path, file.to_string()).unwrap();
        let (path, dir) = (path.display().to_string(), dir.display().to_string());
        let create = [
            "job", "create", "-n", example, "-c", "c", "-f", &path, "--dir", &dir,
        ];
        self.e.ok(&[&create[..], &IN].concat());
    }

    fn logs(&self, job: &str, of: &[&str]) -> String {
        let stream = ["job", "file", "stream", "-j", job];
        self.e.ok(&[&stream[..], of, &IN].concat())
    }

    /// What a rank printed.
    fn rank(&self, job: &str, rank: usize) -> String {
        self.logs(job, &["--rank", &rank.to_string()])
    }

    /// Asserts that it succeeded and that its ranks trained together; returns what they printed.
    fn trained(&self, job: &str, ranks: usize) -> Vec<String> {
        let shown = self.e.end(job);
        let said: Vec<_> = (0..ranks).map(|rank| self.rank(job, rank)).collect();
        for rank in &said {
            println!("{rank}");
        }
        assert_eq!(shown["state"], "SUCCEEDED", "{shown:#}");
        let after = |text: &str, what: &str| -> String {
            let (_, rest) = text
                .split_once(what)
                .unwrap_or_else(|| panic!("no {what}: {text}"));
            rest.split_whitespace().next().unwrap().to_owned()
        };
        let all =
            |what: &str| -> BTreeSet<_> { said.iter().map(|text| after(text, what)).collect() };
        assert_eq!(all("shard ").len(), ranks, "each has data of its own");
        assert_eq!(all("parameters ").len(), 1, "all end with the same");
        for (rank, text) in said.iter().enumerate() {
            assert!(text.contains(&format!(" {rank} of {ranks}")), "{text}");
            let losses = text.split("loss ").skip(1);
            let losses = losses.map(|rest| rest.split_whitespace().next().unwrap().parse());
            let losses: Vec<f64> = losses.collect::<Result<_, _>>().unwrap();
            let (first, last) = (losses[0], losses[losses.len() - 1]);
            assert!(last < 0.8 * first, "{losses:?}");
        }
        said
    }
}

/// A python of the tools that `.ci/full` installs. None where only what every change must pass is tried.
fn tool(name: &str) -> Option<PathBuf> {
    std::env::var_os("BATCHAI_TEST_FULL")?;
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let python = cache
        .or(home)?
        .join(format!("batchai-tools/{name}/bin/python"));
    if !python.exists() {
        requirement::skip(&format!(
            "{} is missing: .ci/full makes it",
            python.display()
        ));
        return None;
    }
    Some(python)
}

#[test]
fn pytorch_trains_on_two_machines() {
    let python = Path::new("/usr/bin/python3");
    let torch = Command::new(python).args(["-c", "import torch"]).output();
    if !torch.is_ok_and(|output| output.status.success()) {
        return requirement::skip("/usr/bin/python3 has no torch: install python3-torch");
    }
    let Some(world) = World::new("torch") else {
        return;
    };
    world.submit("pytorch", python);
    let said = world.trained("pytorch", 2);
    assert!(said[0].contains("by gloo: 512 of 1024"), "{}", said[0]);
}

#[test]
fn pytorch_of_today_trains_on_two_machines() {
    let Some((python, world)) = tool("torch").zip(World::new("torch2")) else {
        return;
    };
    world.submit("pytorch", &python);
    let said = world.trained("pytorch", 2);
    assert!(said[0].contains("by gloo: 512 of 1024"), "{}", said[0]);
}

#[test]
fn torchrun_starts_two_ranks_on_each_of_two_machines() {
    let Some((python, world)) = tool("torch").zip(World::new("torchrun")) else {
        return;
    };
    let path = format!("{}:/usr/bin:/bin", python.parent().unwrap().display());
    world.submit_changed("torchrun", |properties| {
        properties["environmentVariables"] = json!([{ "name": "PATH", "value": path }]);
    });
    let shown = world.e.end("torchrun");
    // One torchrun on each node, whose file has what its two ranks print.
    let said = [0, 1].map(|node| world.rank("torchrun", node));
    println!("{}\n{}", said[0], said[1]);
    assert_eq!(shown["state"], "SUCCEEDED", "{shown:#}");
    for (node, said) in (1..).zip(&said) {
        for local in 0..2 {
            let rank = 2 * (node - 1) + local;
            let whole = format!("rank {rank} of 4 on n{node}, shard ");
            assert_eq!(said.matches(&whole).count(), 1, "{said}");
            let place = format!("rank {rank} is {local} of 2 there, torch 2.");
            assert_eq!(said.matches(&place).count(), 1, "{said}");
        }
    }
    let all = said.concat();
    let after = |what: &str| -> Vec<&str> {
        let rest = all.split(what).skip(1);
        rest.map(|rest| rest.split_whitespace().next().unwrap())
            .collect()
    };
    let distinct = |what: &str| BTreeSet::from_iter(after(what)).len();
    assert_eq!((distinct("shard "), after("parameters ").len()), (4, 4));
    assert_eq!(distinct("parameters "), 1, "all end with the same");
    let losses = after("loss ").into_iter().map(|loss| loss.parse().unwrap());
    let losses: Vec<f64> = losses.collect();
    assert!(losses[losses.len() - 1] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn tensorflow_2_mirrors_its_workers_on_two_machines() {
    let Some((python, world)) = tool("tensorflow-2").zip(World::new("tf2")) else {
        return;
    };
    world.submit("tensorflow", &python);
    world.trained("tensorflow", 2);
}

#[test]
fn tensorflow_1_trains_with_a_parameter_server_that_ends_with_the_workers() {
    let Some((python, world)) = tool("tensorflow-1").zip(World::new("tf1")) else {
        return;
    };
    world.submit("tensorflow-ps", &python);
    let said = world.trained("tensorflow-ps", 2);
    for worker in &said {
        assert!(worker.contains("the weights are on /job:ps"), "{worker}");
        assert!(worker.contains("120 steps by all"), "{worker}");
    }
    let served = "parameter server 0 of 1 serves 2 workers";
    assert!(world.rank("tensorflow-ps", 2).contains(served));
    let all = world.logs("tensorflow-ps", &["--all-ranks", "-f", "stdout"]);
    assert!(
        all.contains(served) && all.contains("worker 1 of 2"),
        "{all}"
    );
    let file = world.logs("tensorflow-ps", &["-f", "stdout-ps-0.txt"]);
    assert!(file.contains(served), "{file}");
}

#[test]
fn caffe2_trains_on_two_machines() {
    let Some((python, world)) = tool("caffe2").zip(World::new("caffe2")) else {
        return;
    };
    world.submit("caffe2", &python);
    world.trained("caffe2", 2);
}

/// Scripts that stand for workers and servers, where what matters is how they end.
fn roles(worker: &str, server: &str) -> Value {
    json!({
        "nodeCount": 2,
        "tensorFlowSettings": {
            "pythonScriptFilePath": "-c",
            "pythonInterpreterPath": "/bin/bash",
            "masterCommandLineArgs": format!("'{worker}'"),
            "workerCommandLineArgs": format!("'{worker}'"),
            "parameterServerCommandLineArgs": format!("'{server}'"),
            "parameterServerCount": 2,
        },
    })
}

#[test]
fn servers_end_with_the_workers_and_one_that_dies_before_is_named() {
    let mut e = Ensemble::with_cluster(2);
    // They take no notice of being told to end.
    let serves = "trap \"\" TERM; echo $AZ_BATCHAI_TASK_INDEX serves $AZ_BATCHAI_WORKER_HOSTS; while :; do sleep 0.1; done";
    let mut works = roles(
        "echo worker $AZ_BATCHAI_TASK_INDEX of $AZ_BATCHAI_PS_HOSTS; sleep 1",
        serves,
    );
    works["tensorFlowSettings"]["workerCount"] = json!(3);
    e.submit("ends", works);
    let job = e.until_job("ends", "SUCCEEDED");
    assert_eq!(job["exitCode"], 0, "{job:#}");
    let mut addresses = BTreeSet::new();
    for worker in 0..3 {
        let said = e.log("ends", &format!("stdout-wk-{worker}.txt"));
        assert!(said.starts_with(&format!("worker {worker} of ")), "{said}");
        addresses.extend(
            said.trim_end()
                .rsplit([' ', ','])
                .take(2)
                .map(str::to_owned),
        );
    }
    assert_eq!(
        addresses.len(),
        2,
        "all know the same two servers: {addresses:?}"
    );
    for server in 0..2 {
        let said = e.log("ends", &format!("stdout-ps-{server}.txt"));
        addresses.extend(
            said.trim_end()
                .rsplit([' ', ','])
                .take(3)
                .map(str::to_owned),
        );
    }
    assert_eq!(
        addresses.len(),
        5,
        "each of five has its own: {addresses:?}"
    );
    let mut stream = vec![
        "job",
        "file",
        "stream",
        "-j",
        "ends",
        "--all-ranks",
        "-f",
        "stdout",
    ];
    stream.extend(IN);
    let all = e.ok(&stream);
    assert!(
        all.contains("worker 2 of") && all.contains("1 serves"),
        "{all}"
    );
    until("nothing of it to be left", || {
        let left = processes_of(e.path());
        (!left.iter().any(|(_, command)| command.contains("serves"))).then_some(())
    });
    let dies = "[ $AZ_BATCHAI_TASK_INDEX = 0 ] && sleep 60; echo no more >&2; exit 7";
    e.submit("dies", roles("sleep 60", dies));
    let job = e.until_job("dies", "FAILED");
    assert_eq!(job["exitCode"], 7, "{job:#}");
    let message = job["errors"][0]["message"].as_str().unwrap();
    assert!(
        message.contains("rank 3 (parameter server 1) on nodes/"),
        "{message}"
    );
    assert!(job.to_string().contains("no more"), "{job:#}");
    e.assert_nothing_left();
}

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

/// Listens where its framework would, until all the others do; then it ends.
const HOLDS: &str = r#"
import json, os, pathlib, socket, sys, time
name, here = sys.argv[1], pathlib.Path(__file__).parent
if "TF_CONFIG" in os.environ:
    config = json.loads(os.environ["TF_CONFIG"])
    task = config["task"]
    at = config["cluster"][task["type"]][task["index"]]
    role = task["type"] + str(task["index"])
else:
    at = os.environ["MASTER_ADDR"] + ":" + os.environ["MASTER_PORT"]
    role = os.environ["RANK"]
if role != "1":
    host, port = at.rsplit(":", 1)
    held = socket.socket()
    held.bind((host, int(port)))
    held.listen()
    (here / ("held." + name + "." + role)).write_text(port)
while not (here / "go").exists():
    time.sleep(0.2)
"#;

/// Two nodes each: ten jobs of PyTorch, whose masters listen, and ten of TensorFlow, with two workers and a server that do.
#[test]
fn forty_nodes_of_one_machine_have_ports_of_their_own_for_all_their_jobs_at_once() {
    const JOBS: usize = 20;
    let mut e = Ensemble::with_cluster(2 * JOBS);
    let script = e.path().join("holds.py");
    std::fs::write(&script, HOLDS).unwrap();
    let script = script.to_string_lossy().into_owned();
    let names: Vec<_> = (0..JOBS).map(|number| format!("j{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        let settings = match number % 2 {
            0 => json!({
                "nodeCount": 2,
                "pyTorchSettings": { "pythonScriptFilePath": script, "commandLineArgs": name },
            }),
            _ => json!({
                "nodeCount": 2,
                "tensorFlowSettings": {
                    "pythonScriptFilePath": script,
                    "pythonInterpreterPath": "python3",
                    "masterCommandLineArgs": name,
                    "workerCommandLineArgs": name,
                    "parameterServerCommandLineArgs": name,
                    "workerCount": 2,
                    "parameterServerCount": 1,
                },
            }),
        };
        e.submit(name, settings);
    }
    let held = || -> Vec<String> {
        let files = std::fs::read_dir(e.path()).unwrap().flatten();
        let held = files.filter(|file| file.file_name().to_string_lossy().starts_with("held."));
        let held = held.map(|file| std::fs::read_to_string(file.path()).unwrap());
        held.filter(|port| !port.is_empty()).collect()
    };
    // One that found its port taken has ended, and is waited for in vain.
    let ports = until("all of them to listen at once", || {
        let held = held();
        (held.len() == 4 * JOBS / 2).then_some(held)
    });
    let unique: BTreeSet<_> = ports.iter().collect();
    assert_eq!(unique.len(), ports.len(), "{ports:?}");
    std::fs::write(e.path().join("go"), "").unwrap();
    for name in &names {
        assert_eq!(e.wait(name), 0, "{:#}", e.job(name));
    }
    e.assert_nothing_left();
}
