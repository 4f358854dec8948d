//! Jobs whose processes mpirun starts, for real: they train, and what they print shows that they talked.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use batchai_common::tls::{Credentials, Identity, connector};
use batchai_proto::agent::v1::peer_service_client::PeerServiceClient;
use batchai_proto::agent::v1::start_remote_request::Message;
use batchai_proto::agent::v1::{RemoteHello, StartRemoteRequest};
use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::image::busybox_root;
use batchai_tests::network::Network;
use batchai_tests::process::{processes_of, under_test, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tonic::Code;

/// Where Debian has Open MPI and the python that knows mpi4py.
const PATH: &str = "/usr/bin:/bin";

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples")
        .join(name)
}

/// Whether there is Open MPI with mpi4py here; the test was told where not.
fn open_mpi() -> Option<()> {
    let hint = "install openmpi-bin, python3-mpi4py and python3-numpy";
    requirement::program("mpirun", hint)?;
    let python = std::process::Command::new("/usr/bin/python3")
        .args(["-c", "import mpi4py.MPI, numpy"])
        .output();
    match python.is_ok_and(|output| output.status.success()) {
        true => Some(()),
        false => {
            requirement::skip(hint);
            None
        }
    }
}

/// A python that `.ci/run` has made for a framework of old; the test was told where there is none.
fn python_of(framework: &str) -> Option<String> {
    let home = std::env::var("HOME").unwrap_or_default();
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| format!("{home}/.cache"));
    let python = format!("{cache}/batchai-tools/{framework}/bin/python");
    let there = Path::new(&python).exists();
    if !there {
        requirement::skip(&format!("{python} is missing: .ci/run makes it"));
    }
    there.then_some(python)
}

/// What an example's file says; what is given replaces that.
fn of_example(of: &str, more: Value) -> Value {
    let text = std::fs::read_to_string(example(of).join("job.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let mut properties = file["properties"].take();
    properties["environmentVariables"] = json!([{ "name": "PATH", "value": PATH }]);
    let all = properties.as_object_mut().unwrap();
    all.extend(more.as_object().unwrap().clone());
    properties
}

/// How an example is submitted with the files beside it.
fn create<'a>(name: &'a str, file: &'a str, dir: &'a str) -> Vec<&'a str> {
    let mut args = vec![
        "job", "create", "-n", name, "-c", "c", "-f", file, "--dir", dir,
    ];
    args.extend(IN);
    args
}

fn submit(e: &Ensemble, name: &str, of: &str, more: Value) {
    let file = e.job_file(name, of_example(of, more));
    let (file, dir) = (
        file.display().to_string(),
        example(of).display().to_string(),
    );
    e.ok(&create(name, &file, &dir));
}

/// Two nodes that are machines with names and addresses of their own, and no SSH server; the processes end first.
struct Pair {
    e: Replicas,
    network: Network,
    /// Where their names lead to, if anywhere.
    hosts: Option<PathBuf>,
}

const NODES: [&str; 2] = ["n2", "n3"];

impl Pair {
    /// None where it cannot be: then the test was told so.
    fn new(test: &str) -> Option<Pair> {
        Pair::new_as(test, "self")
    }

    /// The same; their jobs run as a user.
    fn new_as(test: &str, user: &str) -> Option<Pair> {
        Pair::made(test, user, false)
    }

    /// The same, whose names lead to their addresses.
    fn new_known(test: &str) -> Option<Pair> {
        Pair::made(test, "self", true)
    }

    fn made(test: &str, user: &str, known: bool) -> Option<Pair> {
        open_mpi()?;
        requirement::program("unshare", "util-linux has it")?;
        let network = Network::new(test, 3)?;
        let mut e = network.replica(1);
        e.job_user = user.to_owned();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(e.path(), open).unwrap();
        let all = e.list();
        let hosts = known.then(|| e.path().join("hosts"));
        if let Some(hosts) = &hosts {
            std::fs::write(hosts, "127.0.0.1 localhost\n10.78.0.2 n2\n10.78.0.3 n3\n").unwrap();
        }
        let mut pair = Pair { e, network, hosts };
        for name in NODES {
            pair.start_agent(name);
        }
        let e = &pair.e;
        until("the nodes to be in contact", || {
            let nodes = e.json_at(&all, &["node", "list"]);
            (nodes.as_array()?.len() == 2).then_some(())
        });
        e.create_cluster(2);
        Some(pair)
    }

    fn start_agent(&mut self, name: &str) {
        let id = (2..).zip(NODES).find(|(_, node)| *node == name).unwrap().0;
        let all = self.e.list();
        let machine = match &self.hosts {
            Some(hosts) => self.network.on_named_by(id, name, hosts),
            None => self.network.on_named(id, name),
        };
        self.e.start_agent_by(&machine, name, &all);
    }

    fn submit(&self, name: &str, of: &str, more: Value) {
        let (e, properties) = (&self.e, of_example(of, more));
        let file = batchai_tests::ensemble::job_file(e.path(), name, properties);
        let (file, dir) = (
            file.display().to_string(),
            example(of).display().to_string(),
        );
        e.ok(&create(name, &file, &dir));
    }

    fn command(&self, name: &str, command: &str, count: i32) {
        let settings = json!({ "commandLine": command, "processCount": count });
        let properties = json!({
            "nodeCount": 2,
            "customMpiSettings": settings,
            "environmentVariables": [{ "name": "PATH", "value": PATH }],
        });
        self.e.submit_with(name, properties);
    }

    /// Waits for its end; returns it with what mpirun and its processes printed.
    fn end(&self, name: &str) -> (Value, String, String) {
        let job = self.e.end(name);
        let log = |file: &str| {
            let mut args = vec!["job", "file", "stream", "-j", name, "-f", file];
            args.extend(IN);
            self.e.ok(&args)
        };
        (job, log("stdout.txt"), log("stderr.txt"))
    }

    /// What is in the file that a process of the job writes.
    fn file(&self, name: &str) -> String {
        let path = self.e.path().join(name);
        until("a process to write its file", || {
            let text = std::fs::read_to_string(&path).ok()?;
            text.ends_with('\n').then(|| text.trim().to_owned())
        })
    }

    /// Nothing of a job runs that is found by this mark.
    fn until_gone(&self, mark: &str) {
        until("all processes of the job to be gone", || {
            let left = processes_of(self.e.path());
            (!left.iter().any(|(_, line)| line.contains(mark))).then_some(())
        });
    }
}

/// What follows these words, in all lines that have them, sorted.
fn after<'a>(log: &'a str, words: &str) -> Vec<&'a str> {
    let mut found: Vec<_> = log
        .lines()
        .filter_map(|line| Some(line.split_once(words)?.1))
        .collect();
    found.sort_unstable();
    found
}

/// Asserts that so many ranks trained one model, each on its own data.
fn assert_trained(log: &str, size: usize) {
    for rank in 0..size {
        let line = format!("rank {rank} of {size} on ");
        assert_eq!(log.matches(&line).count(), 1, "{log}");
    }
    let mut shards = after(log, ", shard ");
    shards.dedup();
    assert_eq!(shards.len(), size, "each has its own shard: {log}");
    let mut parameters = after(log, ": parameters ");
    assert_eq!(parameters.len(), size, "{log}");
    parameters.dedup();
    assert_eq!(parameters.len(), 1, "all have the same parameters: {log}");
    let losses = log.lines().filter_map(|line| line.split_once(": loss "));
    let losses: Vec<f64> = losses.map(|(_, loss)| loss.parse().unwrap()).collect();
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < first / 2.0, "the loss falls: {losses:?}");
}

#[test]
fn a_custom_mpi_job_trains_with_so_many_processes_on_one_node() {
    let Some(()) = open_mpi() else { return };
    let mut e = Ensemble::with_cluster(1);
    let given = json!({ "commandLine": "python3 train.py", "processCount": 3 });
    submit(
        &e,
        "three",
        "mpi",
        json!({ "nodeCount": 1, "customMpiSettings": given }),
    );
    let code = e.wait("three");
    let (log, errors) = (e.log("three", "stdout.txt"), e.log("three", "stderr.txt"));
    assert_eq!(code, 0, "{log} {errors}");
    assert_trained(&log, 3);
    let mut args = vec!["job", "file", "list", "-j", "three", "-d", "MODEL"];
    args.extend(IN);
    assert_eq!(e.json(&args)[0]["name"], "weights.txt");
    e.assert_nothing_left();
}

#[test]
fn a_rank_that_fails_is_why_an_mpi_job_does() {
    let Some(()) = open_mpi() else { return };
    let mut e = Ensemble::with_cluster(1);
    let command = "echo pid $$; [ $RANK = 1 ] || exec sleep 600; echo it broke >&2; exit 7";
    let settings = json!({ "commandLine": command, "processCount": 2 });
    e.submit(
        "breaks",
        json!({ "nodeCount": 1, "customMpiSettings": settings }),
    );
    e.wait("breaks");
    let job = e.job("breaks");
    assert_eq!(
        (&job["state"], &job["exitCode"]),
        (&json!("FAILED"), &json!(7)),
        "{job}"
    );
    let said = e.log("breaks", "stderr.txt");
    assert!(said.contains("it broke"), "{said}");
    e.assert_nothing_left();
}

#[test]
fn an_mpi_job_trains_on_two_machines_without_an_ssh_server() {
    let Some(pair) = Pair::new("mpi") else { return };
    let settings = json!({ "commandLine": "python3 train.py", "processCount": 4 });
    let more = json!({ "nodeCount": 2, "customMpiSettings": settings });
    pair.submit("line", "mpi", more);
    let (job, log, errors) = pair.end("line");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 4);
    for (rank, node) in [(0, "n2"), (1, "n2"), (2, "n3"), (3, "n3")] {
        assert!(
            log.contains(&format!("rank {rank} of 4 on {node},")),
            "{log}"
        );
    }
}

#[test]
fn chainer_trains_on_two_machines() {
    let Some(python) = python_of("chainer") else {
        return;
    };
    let Some(pair) = Pair::new("chainer") else {
        return;
    };
    let settings = json!({
        "pythonScriptFilePath": "train.py",
        "pythonInterpreterPath": python,
        "commandLineArgs": "-o $AZ_BATCHAI_OUTPUT_MODEL",
    });
    pair.submit("spirals", "chainer", json!({ "chainerSettings": settings }));
    let (job, log, errors) = pair.end("spirals");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 2);
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        assert!(
            log.contains(&format!("rank {rank} of 2 on {node},")),
            "{log}"
        );
    }
    let mut args = vec!["job", "file", "list", "-j", "spirals", "-d", "MODEL"];
    args.extend(IN);
    let files = pair.e.json_at(&pair.e.list(), &args);
    assert_eq!(files[0]["name"], "spirals.npz");
}

#[test]
fn caffe_trains_by_a_solver_and_by_a_script_on_two_machines() {
    let Some(python) = python_of("caffe") else {
        return;
    };
    let Some(pair) = Pair::new("caffe") else {
        return;
    };
    // What PyPI has is the library: this is its program.
    let bin = pair.e.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let program = format!(
        "#!{python}\nimport sys, caffe\nassert sys.argv[1] == 'train'\n\
         caffe.get_solver(sys.argv[2].partition('--solver=')[2]).solve()\nprint('shown', sys.argv[3:])\n"
    );
    std::fs::write(bin.join("caffe"), program).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bin.join("caffe"), open).unwrap();
    let path = format!("{}:{PATH}", bin.display());
    let variables = json!([{ "name": "PATH", "value": path }]);
    let settings = json!({
        "configFilePath": "$AZ_BATCHAI_JOB_TEMP/solver.prototxt",
        "commandLineArgs": "--sighup_effect=none",
    });
    let more = json!({ "environmentVariables": variables, "caffeSettings": settings });
    pair.submit("solver", "caffe", more);
    let (job, log, errors) = pair.end("solver");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert!(log.contains("shown ['--sighup_effect=none']"), "{log}");
    let losses = errors
        .lines()
        .filter_map(|line| line.rsplit_once(", loss = "));
    let losses: Vec<f64> = losses
        .map(|(_, loss)| loss.trim().parse().unwrap())
        .collect();
    assert!(losses.last().unwrap() < &(losses[0] / 100.0), "{losses:?}");
    let settings = json!({
        "pythonScriptFilePath": "average.py",
        "pythonInterpreterPath": python,
        "processCount": 2,
    });
    let more = json!({ "nodeCount": 2, "caffeSettings": settings });
    pair.submit("average", "caffe", more);
    let (job, log, errors) = pair.end("average");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 2);
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        assert!(
            log.contains(&format!("rank {rank} of 2 on {node},")),
            "{log}"
        );
    }
}

/// What is too heavy for every change: it needs much that is not there else.
fn is_full() -> bool {
    std::env::var("BATCHAI_TEST_FULL").is_ok_and(|value| value == "1")
}

#[test]
fn an_mpi_job_trains_on_two_machines_by_mpich() {
    if !is_full() {
        return;
    }
    let Some(starter) = requirement::program("mpirun.mpich", "install mpich") else {
        return;
    };
    let Some(python) = python_of("chainer") else {
        return;
    };
    let Some(pair) = Pair::new("mpich") else {
        return;
    };
    // Debian has Open MPI first, and mpi4py of PyPI looks for MPICH by the name that others give it.
    let own = pair.e.path().join("mpich");
    std::fs::create_dir(&own).unwrap();
    let library = Path::new("/usr/lib/x86_64-linux-gnu/libmpich.so.12");
    let helper = Path::new("/usr/bin/hydra_pmi_proxy");
    for (what, name) in [
        (&*starter, "mpirun"),
        (helper, "hydra_pmi_proxy"),
        (library, "libmpi.so.12"),
    ] {
        std::os::unix::fs::symlink(what, own.join(name)).unwrap();
    }
    let path = format!("{}:{PATH}", own.display());
    let variables = json!([
        { "name": "PATH", "value": path },
        { "name": "LD_LIBRARY_PATH", "value": own },
        { "name": "MPI4PY_MPIABI", "value": "mpich" },
    ]);
    let settings = json!({ "commandLine": format!("{python} train.py"), "processCount": 4 });
    let more = json!({ "customMpiSettings": settings, "environmentVariables": variables });
    pair.submit("line", "mpi", more);
    let (job, log, errors) = pair.end("line");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 4);
    for (rank, node) in [(0, "n2"), (1, "n2"), (2, "n3"), (3, "n3")] {
        assert!(
            log.contains(&format!("rank {rank} of 4 on {node},")),
            "{log}"
        );
    }
    println!("{log}");
    let settings = json!({ "commandLine": TELL, "processCount": 2 });
    let more = json!({
        "nodeCount": 2,
        "customMpiSettings": settings,
        "inputDirectories": [{ "id": "DATA", "path": "$AZ_BATCHAI_MOUNT_ROOT/data" }],
        "environmentVariables": [
            { "name": "PATH", "value": path },
            { "name": "OWN", "value": "$AZ_BATCHAI_JOB_TEMP/own" },
        ],
        "secrets": [{ "name": "SECRET", "value": "do-not-show-it" }],
    });
    pair.e.submit_with("tells", more);
    let (job, log, errors) = pair.end("tells");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_told(&log, pair.e.path(), &[(0, "n2"), (1, "n3")]);
}

/// A python that `.ci/full` makes, where what is heavy is tried.
fn heavy_python_of(framework: &str) -> Option<String> {
    is_full().then(|| python_of(framework)).flatten()
}

/// Asserts that a job ended well, and that each of two nodes had one of its ranks, which trained one model; returns what they printed.
fn assert_both_trained(pair: &Pair, name: &str) -> String {
    let (job, log, errors) = pair.end(name);
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 2);
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        let line = format!("rank {rank} of 2 on {node}, shard ");
        assert!(log.contains(&line), "{log}");
    }
    println!("{name}:\n{log}");
    log
}

#[test]
fn an_mpi_job_trains_on_two_machines_by_intel_mpi() {
    let Some((python, pair)) = heavy_python_of("intel-mpi").zip(Pair::new("intel")) else {
        return;
    };
    let root = python.strip_suffix("/bin/python").unwrap();
    // Ranks are no shells of somebody who logs in, though their standard input is a socket.
    let home = pair.e.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join(".bashrc"), "echo this is read\n").unwrap();
    // Debian has Open MPI first, and mpi4py of PyPI is to take what is beside it.
    let variables = json!([
        { "name": "PATH", "value": format!("{root}/bin:{PATH}") },
        { "name": "LD_LIBRARY_PATH", "value": format!("{root}/lib") },
        { "name": "I_MPI_ROOT", "value": root },
        { "name": "HOME", "value": home },
        { "name": "OWN", "value": "$AZ_BATCHAI_JOB_TEMP/own" },
    ]);
    let settings = json!({ "commandLine": "python train.py", "processCount": 4 });
    let more = json!({ "customMpiSettings": settings, "environmentVariables": variables });
    pair.submit("line", "mpi", more);
    let (job, log, errors) = pair.end("line");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 4);
    for (rank, node) in [(0, "n2"), (1, "n2"), (2, "n3"), (3, "n3")] {
        assert!(
            log.contains(&format!("rank {rank} of 4 on {node},")),
            "{log}"
        );
    }
    assert!(!log.contains("this is read"), "{log}");
    println!("{log}");
    let tell = "python -c 'from mpi4py import MPI; print(MPI.Get_library_version())'";
    let cores = "echo cores $(grep -c 'Cpus_allowed_list.*[-,]' /proc/self/status)";
    let settings = json!({ "commandLine": format!("{tell}\n{cores}\n{TELL}"), "processCount": 4 });
    let properties = json!({
        "nodeCount": 2,
        "customMpiSettings": settings,
        "inputDirectories": [{ "id": "DATA", "path": "$AZ_BATCHAI_MOUNT_ROOT/data" }],
        "environmentVariables": variables,
        "secrets": [{ "name": "SECRET", "value": "do-not-show-it" }],
    });
    pair.e.submit_with("tells", properties);
    let (job, log, errors) = pair.end("tells");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_eq!(log.matches("Intel(R) MPI Library").count(), 4, "{log}");
    let several = std::thread::available_parallelism().unwrap().get() > 1;
    let line = format!("cores {}\n", usize::from(several));
    assert_eq!(log.matches(&line).count(), 4, "all cores of a node: {log}");
    let ranks = [(0, "n2"), (1, "n2"), (2, "n3"), (3, "n3")];
    assert_told(&log, pair.e.path(), &ranks);
}

#[test]
fn horovod_trains_on_two_machines_over_mpi_and_over_gloo() {
    let Some((python, pair)) = heavy_python_of("horovod").zip(Pair::new_known("horovod")) else {
        return;
    };
    // Where ssh is, and no mpirun: a node without MPI.
    let bare = pair.e.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    for program in ["bash", "sh", "env", "cat", "uname"] {
        let found = Path::new("/usr/bin").join(program);
        std::os::unix::fs::symlink(found, bare.join(program)).unwrap();
    }
    let without_mpi = python.replace("horovod/bin/python", "horovod-gloo");
    let variable = |name: &str, value: &str| json!({ "name": name, "value": value });
    let bare = bare.display().to_string();
    for (name, over, variables) in [
        ("both", "MPI", vec![variable("PATH", PATH)]),
        (
            "asked",
            "gloo",
            vec![
                variable("PATH", PATH),
                variable("HOROVOD_CONTROLLER", "gloo"),
            ],
        ),
        ("no-mpirun", "gloo", vec![variable("PATH", &bare)]),
        (
            "no-mpi",
            "gloo",
            vec![variable("PATH", PATH), variable("PYTHONPATH", &without_mpi)],
        ),
    ] {
        let settings =
            json!({ "pythonScriptFilePath": "train.py", "pythonInterpreterPath": python });
        let more = json!({ "horovodSettings": settings, "environmentVariables": variables });
        pair.submit(name, "horovod", more);
        let log = assert_both_trained(&pair, name);
        for rank in 0..2 {
            let line = format!("rank {rank} is 0 of 1 there, over {over}\n");
            assert!(log.contains(&line), "{name}: {log}");
        }
        let mut args = vec!["job", "file", "list", "-j", name, "-d", "MODEL"];
        args.extend(IN);
        let files = pair.e.json_at(&pair.e.list(), &args);
        assert_eq!(files[0]["name"], "line.pt", "{name}");
    }
}

#[test]
fn a_rank_of_horovod_over_gloo_is_told_where_the_name_of_its_node_leads_nowhere() {
    let Some((python, pair)) = heavy_python_of("horovod").zip(Pair::new("nameless")) else {
        return;
    };
    let settings = json!({ "pythonScriptFilePath": "train.py", "pythonInterpreterPath": python });
    let variables = json!([
        { "name": "PATH", "value": PATH },
        { "name": "HOROVOD_CONTROLLER", "value": "gloo" },
    ]);
    let more = json!({ "horovodSettings": settings, "environmentVariables": variables });
    pair.submit("nameless", "horovod", more);
    let (job, _, errors) = pair.end("nameless");
    assert_eq!(job["state"], "FAILED", "{job}");
    for (rank, node, address) in [(0, "n2", "10.78.0.2"), (1, "n3", "10.78.0.3")] {
        let said = format!("batchai: rank {rank}: the name of this node, {node}, leads to ''.");
        assert!(errors.contains(&said), "{errors}");
        assert!(
            errors.contains(&format!("let that be {address}")),
            "{errors}"
        );
    }
}

/// Each rank runs a script of the shell; then rank 1 ends with a code, and all sleep where one is given.
const HOROVOD_TELLS: &str = r#"
import os, subprocess, sys, time
import torch
import horovod.torch as hvd
hvd.init()
os.write(1, subprocess.check_output(["bash", sys.argv[1]]))
hvd.allreduce(torch.ones(1))
for code in map(int, sys.argv[2:]):
    if hvd.rank() == 1 and code:
        sys.exit(code)
    time.sleep(600)
"#;

#[test]
fn ranks_of_horovod_over_gloo_have_their_environment_and_end_with_each_other() {
    let Some((python, pair)) = heavy_python_of("horovod").zip(Pair::new_known("tells")) else {
        return;
    };
    let script = pair.e.path().join("tell.py");
    std::fs::write(&script, HOROVOD_TELLS).unwrap();
    let tell = pair.e.path().join("tell.sh").display().to_string();
    std::fs::write(&tell, TELL).unwrap();
    let variables = json!([
        { "name": "PATH", "value": PATH },
        { "name": "HOROVOD_CONTROLLER", "value": "gloo" },
        { "name": "OWN", "value": "$AZ_BATCHAI_JOB_TEMP/own" },
    ]);
    let submit = |name: &str, count: i32, arguments: &str| {
        let settings = json!({
            "pythonScriptFilePath": script,
            "pythonInterpreterPath": python,
            "commandLineArgs": format!("{tell} {arguments}"),
            "processCount": count,
        });
        let properties = json!({
            "nodeCount": 2,
            "horovodSettings": settings,
            "inputDirectories": [{ "id": "DATA", "path": "$AZ_BATCHAI_MOUNT_ROOT/data" }],
            "environmentVariables": variables,
            "secrets": [{ "name": "SECRET", "value": "do-not-show-it" }],
        });
        pair.e.submit_with(name, properties);
    };
    submit("tells", 3, "");
    let (job, log, errors) = pair.end("tells");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_told(&log, pair.e.path(), &[(0, "n2"), (1, "n2"), (2, "n3")]);
    // The rank on the other machine fails, and it is that which ends the one that sleeps.
    submit("fails", 2, "7");
    let (job, _, errors) = pair.end("fails");
    assert_eq!(
        (&job["state"], &job["exitCode"]),
        (&json!("FAILED"), &json!(7)),
        "{job} {errors}"
    );
    let said = "batchai: rank 1 on 10.78.0.3 ended with 7, and so ends the job";
    assert!(errors.contains(said), "{errors}");
    pair.until_gone("tell.py");
    submit("ended", 2, "0");
    until("both ranks to sleep", || {
        let all = processes_of(pair.e.path());
        let ranks = all.iter().filter(|(_, line)| {
            line.starts_with(&python) && line.trim_end().ends_with("tell.sh 0")
        });
        (ranks.count() == 2).then_some(())
    });
    let mut terminate = vec!["job", "terminate", "-n", "ended", "-y"];
    terminate.extend(IN);
    pair.e.ok(&terminate);
    let (job, ..) = pair.end("ended");
    assert_eq!(job["state"], "FAILED", "{job}");
    pair.until_gone("tell.py");
    pair.until_gone("remote-shell");
}

#[test]
fn pytorch_goes_by_the_backend_mpi_on_two_machines() {
    let Some(pair) = Pair::new("torchmpi") else {
        return;
    };
    pair.submit("mpi", "pytorch-mpi", json!({}));
    let log = assert_both_trained(&pair, "mpi");
    // No package of torch has MPI: this shows what starts the ranks, and not torch's backend.
    for rank in 0..2 {
        let line = format!("rank {rank} goes by mpi4py, index {rank}\n");
        assert!(log.contains(&line), "{log}");
    }
}

#[test]
fn what_stands_in_for_the_cntk_program_gets_a_brainscript_job_on_two_machines() {
    let Some((python, pair)) = heavy_python_of("cntk").zip(Pair::new("brain")) else {
        return;
    };
    // No package has the program: this stands for it, and trains by CNTK's library what the example does.
    let bin = pair.e.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let program = format!(
        "#!{python}\nimport runpy, sys\nfrom cntk.train.distributed import Communicator\n\
         config = open(sys.argv[1].partition('configFile=')[2]).read().split()\n\
         sys.stdout.write('stand-in %d gets %s %s\\n' % (Communicator.rank(), config, sys.argv[2:]))\n\
         runpy.run_path('train.py')\n"
    );
    std::fs::write(bin.join("cntk"), program).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bin.join("cntk"), open).unwrap();
    let config = pair.e.path().join("fit.cntk");
    std::fs::write(&config, "command = train\n").unwrap();
    let variables = json!([
        { "name": "PATH", "value": format!("{}:{PATH}", bin.display()) },
        { "name": "LD_LIBRARY_PATH", "value": python.replace("/bin/python", "/mpi") },
    ]);
    let settings = json!({
        "languageType": "BrainScript",
        "configFilePath": config,
        "commandLineArgs": "parallelTrain=true OutputDir=$AZ_BATCHAI_JOB_TEMP",
        "processCount": 2,
    });
    let more = json!({ "cntkSettings": settings, "environmentVariables": variables });
    pair.submit("brain", "cntk", more);
    let log = assert_both_trained(&pair, "brain");
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        let temp = format!("{}/nodes/{node}/jobs/w/e/brain", pair.e.path().display());
        let line = format!(
            "stand-in {rank} gets ['command', '=', 'train'] ['parallelTrain=true', 'OutputDir={temp}']\n"
        );
        assert!(log.contains(&line), "{line} in {log}");
    }
}

#[test]
fn cntk_trains_on_two_machines() {
    if !is_full() {
        return;
    }
    let Some(python) = python_of("cntk") else {
        return;
    };
    let Some(pair) = Pair::new("cntk") else {
        return;
    };
    let libraries = python.replace("/bin/python", "/mpi");
    let settings = json!({ "pythonScriptFilePath": "train.py", "pythonInterpreterPath": python });
    let variables = json!([
        { "name": "PATH", "value": PATH },
        { "name": "LD_LIBRARY_PATH", "value": libraries },
    ]);
    let more = json!({ "cntkSettings": settings, "environmentVariables": variables });
    pair.submit("fit", "cntk", more);
    let (job, log, errors) = pair.end("fit");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_trained(&log, 2);
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        assert!(
            log.contains(&format!("rank {rank} of 2 on {node},")),
            "{log}"
        );
    }
    println!("{log}");
}

/// Asserts that each rank has all that the job has on its node.
fn assert_told(log: &str, path: &Path, ranks: &[(usize, &str)]) {
    let size = ranks.len();
    for (rank, node) in ranks {
        let root = format!("{}/nodes/{node}", path.display());
        let here = format!("{root}/jobs/w/e/tells");
        let line = format!(
            "rank {rank} on {node}: {root}/mounts/data, {here}/own, 14, {rank} of {size} in {here} leaks:\n"
        );
        assert!(log.contains(&line), "{line} in {log}");
    }
}

/// Each rank tells where it is and what it has, and looks for its secret on all command lines of the machine.
const TELL: &str = r#"
for file in /proc/[0-9]*/cmdline; do
    line=$(tr '\0' ' ' 2>/dev/null <"$file")
    [[ $line == *"$SECRET"* ]] && leaks+=" $line"
done
echo "rank $RANK on $(hostname): $AZ_BATCHAI_INPUT_DATA, $OWN, ${#SECRET}, $AZ_BATCHAI_TASK_INDEX of $WORLD_SIZE in $PWD leaks:$leaks"
"#;

#[test]
fn a_rank_on_another_node_has_all_of_its_environment_and_no_secret_is_on_a_command_line() {
    let Some(pair) = Pair::new("env") else { return };
    let own = json!([
        { "name": "PATH", "value": PATH },
        { "name": "OWN", "value": "$AZ_BATCHAI_JOB_TEMP/own" },
    ]);
    let properties = json!({
        "nodeCount": 2,
        "customMpiSettings": { "commandLine": TELL, "processCount": 3 },
        "inputDirectories": [{ "id": "DATA", "path": "$AZ_BATCHAI_MOUNT_ROOT/data" }],
        "environmentVariables": own,
        "secrets": [{ "name": "SECRET", "value": "do-not-show-it" }],
    });
    pair.e.submit_with("tells", properties);
    let (job, log, errors) = pair.end("tells");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_told(&log, pair.e.path(), &[(0, "n2"), (1, "n2"), (2, "n3")]);
}

#[test]
fn ranks_on_another_node_run_as_the_users_of_jobs_and_as_nobody_else() {
    let Some(pair) = Pair::new_as("user", "per-workspace:70000") else {
        return;
    };
    let command = "echo \"rank $RANK on $(hostname) as $(id -u), $(ssh n3 id -u) there, $SECRET\"";
    let settings = json!({ "commandLine": command, "processCount": 2 });
    let properties = json!({
        "nodeCount": 2,
        "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
        "customMpiSettings": settings,
        "environmentVariables": [{ "name": "PATH", "value": PATH }],
        "secrets": [{ "name": "SECRET", "value": "known" }],
    });
    pair.e.submit_with("who", properties);
    let (job, log, errors) = pair.end("who");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        let line = format!("rank {rank} on {node} as 70001, 70001 there, known\n");
        assert!(log.contains(&line), "{log} {errors}");
    }
}

#[test]
fn ranks_are_in_containers_on_both_machines() {
    let Some(pair) = Pair::new_as("boxed", "per-workspace:70000") else {
        return;
    };
    // Of the root that this machine has itself, which is not written to.
    let kept = format!("/tmp/batchai-boxed-{}", std::process::id());
    let command = format!(
        "touch {kept}; [ -e {kept} ] && echo \"rank $RANK on $(hostname) as $(id -u) in $(stat -f -c %T /), $SECRET\""
    );
    let properties = json!({
        "nodeCount": 2,
        "containerSettings": { "imageSourceRegistry": { "image": "rootfs:/" } },
        "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
        "customMpiSettings": { "commandLine": command, "processCount": 2 },
        "environmentVariables": [{ "name": "PATH", "value": PATH }],
        "secrets": [{ "name": "SECRET", "value": "known" }],
    });
    pair.e.submit_with("boxed", properties);
    let (job, log, errors) = pair.end("boxed");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    for (rank, node) in [(0, "n2"), (1, "n3")] {
        let line = format!("rank {rank} on {node} as 70001 in overlayfs, known\n");
        assert!(log.contains(&line), "{log} {errors}");
    }
    assert!(!Path::new(&kept).exists());
}

#[test]
fn processes_in_a_container_reach_the_containers_of_other_nodes_as_by_ssh() {
    let Some(pair) = Pair::new_as("boxssh", "per-workspace:70000") else {
        return;
    };
    // By address and by name, to the other node and back.
    let told = "echo \"$(hostname) as $(id -u) in $(stat -f -c %T /)\"";
    let script = format!(
        "set -e; ssh 10.78.0.3 '{told}'; echo typed | ssh n3 cat; ssh n3 ssh n2 hostname; ssh n3 'echo $SECRET'"
    );
    let properties = json!({
        "nodeCount": 2,
        "containerSettings": { "imageSourceRegistry": { "image": "rootfs:/" } },
        "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
        "customToolkitSettings": { "commandLine": script },
        "environmentVariables": [{ "name": "PATH", "value": PATH }],
        "secrets": [{ "name": "SECRET", "value": "known" }],
    });
    pair.e.submit_with("boxssh", properties);
    let (job, log, errors) = pair.end("boxssh");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_eq!(
        log, "n3 as 70001 in overlayfs\ntyped\nn2\nknown\n",
        "{errors}"
    );
}

#[test]
fn processes_in_an_image_without_libraries_reach_the_other_machine() {
    let hint = "apt-get install busybox-static";
    let Some(pair) = Pair::new_as("bare", "per-workspace:70000") else {
        return;
    };
    if requirement::program("busybox", hint).is_none() {
        return;
    }
    let root = pair.e.path().join("rootfs");
    busybox_root(&root);
    let command = "ssh n3 'echo $(cat /etc/this-is-the-image) on $(hostname) as $(id -u), $SECRET'; \
                   LD_LIBRARY_PATH=/none ssh n3 true && ls -d /lib* /usr/lib* || echo none here";
    let properties = json!({
        "nodeCount": 2,
        "containerSettings": { "imageSourceRegistry": { "image": format!("rootfs:{}", root.display()) } },
        "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
        "customToolkitSettings": { "commandLine": command },
        "secrets": [{ "name": "SECRET", "value": "known" }],
    });
    pair.e.submit_with("bare", properties);
    let (job, log, errors) = pair.end("bare");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    assert_eq!(log, "yes on n3 as 70001, known\nnone here\n", "{errors}");
}

#[test]
fn whatever_of_an_mpi_job_is_killed_it_ends_and_nothing_is_left() {
    let Some(mut pair) = Pair::new("kill") else {
        return;
    };
    let path = pair.e.path().display().to_string();
    for (name, mark) in [
        ("rank", "sleep 60001"),
        ("mpirun", "sleep 60002"),
        ("tree", "sleep 60003"),
        ("agent", "sleep 60005"),
    ] {
        let command = format!("echo $$ > {path}/{name}-$RANK; exec {mark}");
        pair.command(name, &command, 2);
        let ranks = [0, 1].map(|rank| pair.file(&format!("{name}-{rank}")));
        let of = |program: &str| {
            let all = processes_of(pair.e.path());
            let found = all
                .into_iter()
                .filter(|(_, line)| line.starts_with(program));
            found.map(|(pid, _)| pid).collect::<Vec<_>>()
        };
        let pids = match name {
            "rank" => vec![ranks[1].parse().unwrap()],
            "mpirun" => of("mpirun"),
            "agent" => vec![pair.e.agents["n3"].child.id() as i32],
            _ => [
                of("orted"),
                of("/usr/bin/orted"),
                vec![ranks[1].parse().unwrap()],
            ]
            .concat(),
        };
        assert!(
            !pids.is_empty(),
            "{name}: {:?}",
            processes_of(pair.e.path())
        );
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if name == "agent" {
            // What it had started there ends with it, whether there is another one or not.
            pair.until_gone("orted");
            pair.e.agents.remove("n3");
            pair.start_agent("n3");
        }
        let (job, _, errors) = pair.end(name);
        assert_eq!(job["state"], "FAILED", "{job}");
        let error = job["errors"][0]["message"].as_str().unwrap();
        match name {
            // mpirun says which of them it was.
            "rank" => assert!(errors.contains("rank 1 with PID"), "{errors}"),
            "mpirun" => assert!(
                error.contains("rank 0 on nodes/n2 was ended by SIGKILL"),
                "{error}"
            ),
            "agent" => assert!(errors.contains("ssh: nodes/n3: the way to"), "{errors}"),
            _ => assert!(errors.contains("10.78.0.3"), "{errors}"),
        }
        for left in [mark, "orted", "mpirun", "remote-shell"] {
            pair.until_gone(left);
        }
    }
}

#[test]
fn processes_of_a_job_reach_its_nodes_as_by_ssh_also_while_no_coordinator_is_there() {
    let Some(mut pair) = Pair::new("ssh") else {
        return;
    };
    let path = pair.e.path().display().to_string();
    let script = format!(
        r#"
ssh 10.78.0.3 'hostname; echo to error >&2; exit 3'; echo code $?
echo typed | ssh n3 cat
echo 'echo read by $(hostname)' | ssh n3
head -c 3000000 /dev/zero | ssh n3 'wc -c'
ssh n3 'head -c 3000000 /dev/zero' | wc -c
ssh -x n3 "ssh n2 hostname"
ssh n3 'kill -9 $$'; echo code $?
ssh 10.78.0.1 true; echo code $?
BATCHAI_REMOTE_TOKEN=wrong ssh n3 true; echo code $?
env -u BATCHAI_REMOTE_TOKEN ssh n3 true; echo code $?
number=6000
ssh n3 "sleep ${{number}}4" & begun=$!
ssh n3 'until grep -qs "sleep.60004" /proc/[0-9]*/cmdline; do sleep 0.05; done'
kill -9 $begun
echo > {path}/told
until [ -e {path}/go ]; do sleep 0.05; done
ssh n3 'echo alone on $(hostname)' > {path}/alone
until [ -e {path}/end ]; do sleep 0.05; done
"#
    );
    let properties = json!({
        "nodeCount": 2,
        "customToolkitSettings": { "commandLine": script },
        "environmentVariables": [{ "name": "PATH", "value": PATH }],
    });
    pair.e.submit_with("reaches", properties);
    pair.file("told");
    pair.until_gone("sleep 60004");
    pair.e.kill(1);
    std::fs::write(pair.e.path().join("go"), "").unwrap();
    assert_eq!(pair.file("alone"), "alone on n3");
    pair.e.restart(1);
    std::fs::write(pair.e.path().join("end"), "").unwrap();
    let (job, log, errors) = pair.end("reaches");
    assert_eq!(job["state"], "SUCCEEDED", "{job} {log} {errors}");
    let expected = "n3\ncode 3\ntyped\nread by n3\n3000000\n3000000\nn2\ncode 137\ncode 255\ncode 255\ncode 255\n";
    assert_eq!(log, expected, "{errors}");
    for said in [
        "to error",
        "ssh: 10.78.0.1 is no node of this job, which has 10.78.0.2, 10.78.0.3",
        "ssh: only processes of a job that runs here",
        "ssh: this is no process of a job",
    ] {
        assert!(errors.contains(said), "{said} in {errors}");
    }
}

/// What an agent says to who comes with credentials and wants something of an attempt.
fn asked(e: &Ensemble, of: &Path, node: &Value, attempt: &str) -> Code {
    let port = node["facts"]["agentPort"].as_u64().unwrap();
    let (id, uid) = (
        node["name"].as_str().unwrap(),
        node["uid"].as_str().unwrap(),
    );
    let who = Identity::node(id.trim_start_matches("nodes/"), uid).unwrap();
    let config = Credentials::read(of).unwrap().client_of(who).unwrap();
    let hello = RemoteHello {
        attempt: attempt.to_owned(),
        command_line: format!("touch {}", e.path().join("touched").display()),
        ..RemoteHello::default()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let address = SocketAddr::from(([127, 0, 0, 1], port as u16));
        let channel = connector::connect_to(address, config).await.unwrap();
        let message = Some(Message::Hello(hello));
        let request = tokio_stream::once(StartRemoteRequest { message });
        let answer = PeerServiceClient::new(channel).start_remote(request).await;
        answer.map_or_else(|status| status.code(), |_| Code::Ok)
    })
}

#[test]
fn nobody_but_its_own_nodes_starts_anything_beside_an_attempt() {
    let e = Ensemble::with_cluster(2);
    let path = e.path().display().to_string();
    let held = format!("until [ -e {path}/end ]; do sleep 0.05; done");
    let command = |command: &str| json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command } });
    e.submit("one", command(&held));
    let one = e.until_job("one", "RUNNING");
    let attempt = one["attempt"]["id"].as_str().unwrap();
    // A process of another job, which pretends to be of that one.
    let shell = under_test().display().to_string();
    let script = format!(
        "BATCHAI_ATTEMPT=${{BATCHAI_ATTEMPT%%/*}}/{attempt} {shell} node-agent remote-shell 127.0.0.1 touch {path}/touched"
    );
    e.submit("two", command(&script));
    assert_eq!(e.wait("two"), 255);
    let said = e.log("two", "stderr.txt");
    assert!(
        said.contains("only processes of a job that runs here"),
        "{said}"
    );
    let nodes = e.json(&["node", "list"]);
    let busy = one["attempt"]["nodes"][0]["node"].as_str().unwrap();
    let (own, other): (Vec<_>, Vec<_>) = nodes
        .as_array()
        .unwrap()
        .iter()
        .partition(|node| node["name"] == busy);
    let of = |node: &Value| {
        let id = node["name"]
            .as_str()
            .unwrap()
            .trim_start_matches("nodes/")
            .to_owned();
        e.path().join("agents").join(id).join("credentials.pem")
    };
    let ask = |credentials: &Path, attempt: &str| asked(&e, credentials, own[0], attempt);
    assert_eq!(ask(&of(other[0]), attempt), Code::PermissionDenied);
    assert_eq!(ask(&of(own[0]), "1-999"), Code::PermissionDenied);
    assert_eq!(ask(&e.credentials(), attempt), Code::Unauthenticated);
    // Its own node could: it is the others that may not.
    assert!(!e.path().join("touched").exists());
    assert_eq!(ask(&of(own[0]), attempt), Code::Ok);
    std::fs::write(e.path().join("end"), "").unwrap();
    assert_eq!(e.wait("one"), 0);
}
