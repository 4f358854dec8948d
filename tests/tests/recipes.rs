//! The original's recipes: their job files are taken by the command and the API as they are, placed by the scheduler, and what each node
//! is told to start for them is what a golden file says.
//!
//! The job files and the golden files lie in `tests/recipes`. Nothing is run: that the frameworks train is shown by `frameworks` and
//! `mpi`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use batchai::descriptors::{from_json, to_json};
use batchai_coordinator::duties::{Heard, Leader, duties};
use batchai_coordinator::state::assignments::assignments;
use batchai_coordinator::state::{State, apply};
use batchai_node_agent::launch::{Ability, Device, Engine, HostFacts, Maker, Plan, beside, plan};
use batchai_proto::agent::v1::Assignment;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Command as Entry, RegisterNode};
use batchai_proto::v1;
use batchai_tests::api::{CLUSTER, EXPERIMENT, GROUP, WORKSPACE};
use batchai_tests::ensemble::{Ensemble, IN, SIZE};
use serde_json::{Value, json};

/// Of so many GPUs in each of its nodes.
struct Recipe {
    name: &'static str,
    files: &'static [&'static str],
    gpus: usize,
}

const fn recipe(name: &'static str, files: &'static [&'static str], gpus: usize) -> Recipe {
    Recipe { name, files, gpus }
}

/// All of them. Of the sweeps there is one of their jobs, which differ in arguments and variables.
const RECIPES: [Recipe; 20] = [
    recipe("TensorFlow-GPU", &["tensorflow-gpu"], 1),
    recipe(
        "TensorFlow-GPU-Distributed",
        &["tensorflow-gpu-distributed"],
        1,
    ),
    recipe("CNTK-GPU-Python", &["cntk-gpu-python"], 1),
    recipe(
        "CNTK-GPU-Python-Distributed",
        &["cntk-gpu-python-distributed"],
        1,
    ),
    recipe(
        "CNTK-GPU-Python-Distributed-Infiniband",
        &["cntk-gpu-python-distributed-infiniband"],
        4,
    ),
    recipe("CNTK-GPU-BrainScript", &["cntk-gpu-brainscript"], 1),
    recipe(
        "CNTK-GPU-BrainScript-Distributed",
        &["cntk-gpu-brainscript-distributed"],
        1,
    ),
    recipe("Caffe-GPU", &["caffe-gpu"], 1),
    // Its processes meet in a directory that the first node serves to the second.
    recipe("Caffe2-GPU-Distributed", &["caffe2-gpu-distributed"], 1),
    recipe("Chainer-GPU-Distributed", &["chainer-gpu-distributed"], 1),
    recipe(
        "Chainer-GPU-Distributed-Infiniband",
        &["chainer-gpu-distributed-infiniband"],
        4,
    ),
    recipe("Horovod-Tensorflow", &["horovod-tensorflow"], 1),
    recipe("Horovod-PyTorch", &["horovod-pytorch"], 1),
    recipe(
        "Horovod-Infiniband-Benchmark",
        &["horovod-infiniband-benchmark"],
        4,
    ),
    recipe(
        "PyTorch-GPU-Distributed-Gloo",
        &["pytorch-gpu-distributed-gloo"],
        1,
    ),
    recipe("Keras-GPU", &["keras-gpu-cntk", "keras-gpu-tensorflow"], 1),
    recipe("Batch-Scoring", &["distributed-batch-scoring"], 1),
    recipe("Random-Search", &["random-search"], 1),
    recipe("HyperBand", &["hyperband"], 1),
    recipe("Create-Job-Per-File", &["create-job-per-file"], 1),
];

/// What the recipes leave to be filled in.
const VARIABLES: [(&str, &str); 2] = [
    ("AZURE_BATCHAI_STORAGE_ACCOUNT", "recipes"),
    ("AZURE_BATCHAI_STORAGE_KEY", "bm90LWEta2V5"),
];

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes")
}

/// Sends a file as a user does; returns the job as the API shows it.
fn submit(e: &Ensemble, name: &str) -> v1::Job {
    let file = dir().join(format!("{name}.json"));
    let file = file.to_string_lossy();
    let mut args = vec!["job", "create", "-n", name, "-c", "c", "-f", &file];
    args.extend(IN);
    let made = e.command(&args).envs(VARIABLES).output().unwrap();
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{name}: {said}");
    let shown = String::from_utf8(made.stdout).unwrap();
    assert!(!shown.contains(VARIABLES[1].1), "{name}: {shown}");
    from_json("Job", serde_json::from_str(&shown).unwrap()).unwrap()
}

/// The nodes of a State, each a machine of its own or all on one.
fn register(node: usize, one_machine: bool, infiniband: bool) -> RegisterNode {
    let machine = if one_machine { 0 } else { node };
    RegisterNode {
        name: format!("nodes/n{node}"),
        uid: format!("uid-{node}"),
        incarnation: "1".into(),
        facts: Some(v1::NodeFacts {
            vm_size: SIZE.into(),
            boot_id: format!("boot-{machine}"),
            addresses: vec![format!("10.0.0.{}", 4 + machine)],
            root: format!("/r{node}"),
            first_port: 20_000,
            last_port: 20_099,
            image_sources: containers().image_sources(),
            rdma_devices: infiniband.then(rdma).into_iter().collect(),
            ..Default::default()
        }),
        empty: true,
    }
}

fn rdma() -> v1::RdmaDevice {
    v1::RdmaDevice {
        name: "mlx5_0/1".into(),
        link_layer: "InfiniBand".into(),
        port_state: "ACTIVE".into(),
        rate: "56 Gb/sec (4X FDR)".into(),
    }
}

/// What each node of a job is told, by the State and the scheduler of a coordinator.
fn assigned(job: &v1::Job, one_machine: bool, infiniband: bool) -> Vec<Assignment> {
    let count = usize::try_from(job.node_count).unwrap();
    let named = |name: &str| name.to_owned();
    let cluster = v1::Cluster {
        name: named(CLUSTER),
        vm_size: SIZE.into(),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(v1::ManualScaleSettings {
                target_node_count: job.node_count,
                ..Default::default()
            }),
            auto_scale: None,
        }),
        ..Default::default()
    };
    let mut given = vec![
        Kind::CreateResourceGroup(v1::ResourceGroup {
            name: named(GROUP),
            ..Default::default()
        }),
        Kind::CreateWorkspace(v1::Workspace {
            name: named(WORKSPACE),
            ..Default::default()
        }),
        Kind::CreateExperiment(v1::Experiment {
            name: named(EXPERIMENT),
            ..Default::default()
        }),
        Kind::CreateCluster(cluster),
    ];
    let nodes = (0..count).map(|node| Kind::RegisterNode(register(node, one_machine, infiniband)));
    given.extend(nodes);
    given.push(Kind::CreateJob(job.clone()));
    given.reverse();
    let leader = Leader {
        replica: 1,
        ensemble: "00000000-0000-0000-0000-000000000001".into(),
        replicas: Vec::new(),
        lease_ms: 600_000,
    };
    let mut heard = Heard {
        now: 1_000_000,
        ..Heard::default()
    };
    let last = (0..count).map(|node| (format!("nodes/n{node}"), heard.now));
    heard.last = last.collect();
    let (mut state, mut index) = (State::default(), 0);
    loop {
        let mut due = duties(&state, &heard, &leader);
        due.extend(given.pop());
        if due.is_empty() {
            break;
        }
        for kind in due {
            index += 1;
            let entry = Entry {
                time: Some(prost_types::Timestamp::default()),
                request: None,
                kind: Some(kind),
            };
            apply(&mut state, index, &entry).unwrap();
        }
    }
    let all = (0..count).map(|node| assignments(&state, &format!("nodes/n{node}")));
    let mut all: Vec<_> = all.map(|list| list.assignments[0].clone()).collect();
    all.sort_by_key(|assignment| assignment.host_index);
    // Which ports are free and how many commands there were before is not what this is about.
    for assignment in &mut all {
        assignment.attempt = "ATTEMPT".to_owned();
        for (i, host) in (0..).zip(&mut assignment.hosts) {
            host.port = 20_000 + if one_machine { 10 * i } else { 0 };
        }
    }
    all
}

fn containers() -> Ability {
    Ability {
        able: true,
        engine: Some(Engine::Docker),
        images: "/data/images".into(),
        libraries: vec![
            "/lib64/ld-linux-x86-64.so.2".into(),
            "/lib/libc.so.6".into(),
        ],
    }
}

fn facts(assignment: &Assignment, gpus: usize) -> HostFacts {
    let own = &assignment.hosts[assignment.host_index as usize];
    HostFacts {
        node_uid: own.uid.clone(),
        root: own.root.clone(),
        bundles: "/data/bundles".into(),
        lease: "/data/lease".into(),
        gpus: (0..gpus as u32)
            .map(|number| Device {
                maker: Maker::Nvidia,
                number,
                uuid: format!("GPU-{number}"),
            })
            .collect(),
        infiniband: own
            .infiniband
            .then(|| "mlx5_0:1".into())
            .into_iter()
            .collect(),
        interface: Some("eth0".into()),
        containers: containers(),
        base_env: BTreeMap::from([("PATH".into(), "/usr/bin:/bin".into())]),
        remote_shell: ["/usr/bin/batchai", "node-agent", "remote-shell"]
            .map(str::to_owned)
            .into(),
        ..HostFacts::default()
    }
}

/// Something that is started, with all of its variables.
type Started<'a> = (String, &'a BTreeMap<String, String>);

/// Of several, what all have is said once.
fn say_started(text: &mut String, started: &[Started<'_>]) {
    let Some((first, rest)) = started.split_first() else {
        return;
    };
    let is_common = |(name, value): &(&String, &String)| {
        rest.iter().all(|(_, env)| env.get(*name) == Some(*value))
    };
    writeln!(text, "  variables").unwrap();
    for (name, value) in first.1.iter().filter(is_common) {
        writeln!(text, "    {name}={value}").unwrap();
    }
    for (what, env) in started {
        writeln!(text, "  {what}").unwrap();
        let own = |variable: &(&String, &String)| first.1.get(variable.0) != Some(variable.1);
        let own = env.iter().filter(|v| own(v) || !is_common(v));
        for (name, value) in own {
            writeln!(text, "    {name}={value}").unwrap();
        }
    }
}

/// What one host is told to do.
fn say_plan(text: &mut String, plan: &Plan, beside: &BTreeMap<String, String>) {
    let ready = &plan.preparation;
    for mount in &plan.mounts {
        let how = json!(mount.how);
        let (place, account) = (&how["remote"]["place"], &how["remote"]["account"]);
        let what = match account.as_str() {
            Some(account) => format!("{place} of {account:?}"),
            None => how.to_string(),
        };
        let (path, code) = (&mount.path, &mount.code);
        writeln!(text, "  mount {path}: {what}, else {code}").unwrap();
    }
    if let Some(serve) = &ready.serve {
        let (what, at, to) = (&serve.directory, serve.listen, &serve.clients);
        writeln!(text, "  serves {what} at {at} to {to:?}").unwrap();
    }
    if let Some(container) = &ready.container {
        let source = json!(container.source);
        writeln!(text, "  container of {source}, log {}", container.log).unwrap();
    }
    for made in &ready.directories {
        writeln!(text, "  directory {made}").unwrap();
    }
    for (path, content) in &ready.files {
        writeln!(text, "  file {path}: {content:?}").unwrap();
    }
    let (copies, log) = (&ready.copy_to, &ready.execution_log);
    writeln!(text, "  logs to {copies}, {log} among them").unwrap();
    writeln!(
        text,
        "  listens at {:?}, has {} GPUs, for {} s at most",
        ready.ports,
        ready.gpus.len(),
        ready.wall_clock_s
    )
    .unwrap();
    let launch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node-agent/src/launch");
    let scripts = ["mpirun.sh", "horovod.sh", "horovod_gloo.py"].map(|name| {
        let script = std::fs::read_to_string(launch.join(name)).unwrap();
        (format!("{{{name}}}"), script)
    });
    let words = |argv: &[String]| {
        let word = |word: &String| {
            let mut word = word.clone();
            for (name, script) in &scripts {
                // One may stand in another's quotes.
                for text in [&script.replace('\'', r"'\''"), script] {
                    word = word.replace(text, name);
                }
            }
            match scripts.iter().any(|(name, _)| *name == word) {
                true => word,
                false => format!("{word:?}"),
            }
        };
        argv.iter().map(word).collect::<Vec<_>>().join(" ")
    };
    let mut started: Vec<Started<'_>> = Vec::new();
    for process in ready.command.iter().chain(&plan.processes) {
        let who = match process.rank {
            -1 => "preparation".to_owned(),
            rank => format!("rank {rank}"),
        };
        let (cwd, out, err) = (&process.cwd, &process.stdout, &process.stderr);
        let what = format!(
            "{who} in {cwd} to {out} and {err}: {}",
            words(&process.argv)
        );
        started.push((what, &process.env));
    }
    if plan.processes.is_empty() {
        started.push(("what ranks of other nodes start here".to_owned(), beside));
    }
    say_started(text, &started);
}

/// What becomes of a job on nodes that are machines of their own; where that is refused, also on nodes of one machine.
fn golden(job: &v1::Job, gpus: usize, infiniband: bool) -> String {
    let shown = to_json("Job", job);
    let settings = shown.as_object().unwrap().iter();
    let settings = settings.filter(|(name, _)| name.ends_with("Settings"));
    let mut text = format!("{} on {} nodes\n", shown["toolType"], job.node_count);
    for (name, value) in settings {
        writeln!(text, "{name} {value}").unwrap();
    }
    for one_machine in [false, true] {
        let where_it_is = if one_machine {
            "one machine"
        } else {
            "machines of their own"
        };
        writeln!(text, "on {where_it_is}").unwrap();
        let mut refused = false;
        for assignment in assigned(job, one_machine, infiniband) {
            let own = &assignment.hosts[assignment.host_index as usize];
            writeln!(text, "{} at {}", own.node, own.address).unwrap();
            let facts = facts(&assignment, gpus);
            match plan(&assignment, &facts) {
                Err(error) => {
                    writeln!(text, "  refused: {error}").unwrap();
                    refused = true;
                }
                Ok(plan) => say_plan(&mut text, &plan, &beside(&assignment, &facts).unwrap().0),
            }
        }
        if !refused {
            break;
        }
    }
    text.replace(&job.uid, "UID")
}

#[test]
fn every_recipe_leads_to_what_its_nodes_are_to_start() {
    let e = Ensemble::with_cluster(0);
    let mut wrong = String::new();
    for recipe in &RECIPES {
        for name in recipe.files {
            let infiniband = recipe.name.contains("Infiniband");
            let text = golden(&submit(&e, name), recipe.gpus, infiniband);
            let path = dir().join(format!("{name}.txt"));
            if std::env::var("BATCHAI_TEST_GOLDEN").is_ok_and(|word| word == "write") {
                std::fs::write(&path, &text).unwrap();
            }
            let known = std::fs::read_to_string(&path).unwrap_or_default();
            if known != text {
                let pairs = known.lines().chain(std::iter::repeat("")).zip(text.lines());
                let first = pairs.into_iter().find(|(known, now)| known != now);
                writeln!(wrong, "{}, {name}.txt: {first:?}", recipe.name).unwrap();
            }
        }
    }
    assert!(wrong.is_empty(), "known and now:\n{wrong}");
    // No file is there that no recipe names.
    let files = std::fs::read_dir(dir()).unwrap().flatten();
    let count = RECIPES
        .iter()
        .map(|recipe| recipe.files.len())
        .sum::<usize>();
    assert_eq!(files.count(), 2 * count);
}

/// Calls something for every object in a value, with its path.
fn objects(value: &Value, path: &str, each: &mut impl FnMut(&str)) {
    match value {
        Value::Object(map) => {
            each(path);
            for (key, value) in map {
                objects(value, &format!("{path}/{key}"), each);
            }
        }
        Value::Array(all) => {
            for (i, value) in all.iter().enumerate() {
                objects(value, &format!("{path}/{i}"), each);
            }
        }
        _ => {}
    }
}

#[test]
fn a_key_that_is_not_known_is_named_wherever_it_stands() {
    let e = Ensemble::with_cluster(0);
    let file = e.path().join("unknown.json");
    let path = file.to_string_lossy();
    let mut args = vec!["job", "create", "-n", "unknown", "-c", "c", "-f", &path];
    args.extend(IN);
    for name in RECIPES.iter().flat_map(|recipe| recipe.files) {
        let text = std::fs::read_to_string(dir().join(format!("{name}.json"))).unwrap();
        let known: Value = serde_json::from_str(&text).unwrap();
        // One in each object, each with a name of its own.
        let (mut value, mut places) = (known.clone(), Vec::new());
        objects(&known, "", &mut |path| {
            let object = value.pointer_mut(path).unwrap();
            object[format!("unheardOf{}", places.len())] = Value::Null;
            places.push(path.to_owned());
        });
        assert!(places.len() > 5, "{name}: {places:?}");
        std::fs::write(&file, value.to_string()).unwrap();
        let refused = e.command(&args).envs(VARIABLES).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{name}: {said}");
        for (number, place) in places.iter().enumerate() {
            let key = format!("\"unheardOf{number}\"");
            assert!(said.contains(&key), "{name}: {key} at {place} in {said}");
        }
    }
    let list = [&["job", "list"][..], &IN].concat();
    assert_eq!(e.ok(&list).trim(), "[]", "nothing of it was created");
}
