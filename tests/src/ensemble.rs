//! An ensemble of real daemons in a directory of its own, each of which a test can stop and start as it likes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use batchai_common::tls::credentials::write_private;
use batchai_common::tls::{Authority, Identity};
use batchai_node_agent::cgroups::Group;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Process, free_port, processes_of, sweep, under_test, until};

/// The resource group, workspace and experiment that every test uses.
pub const IN: [&str; 6] = ["-g", "g", "-w", "w", "-e", "e"];
/// The VM size that test agents register.
pub const SIZE: &str = "test-size";

/// Creates a resource group `g`, a workspace `w`, an experiment `e` and a cluster `c` of so many nodes.
pub fn create_cluster(nodes: usize, ok: impl Fn(&[&str]) -> String) {
    ok(&["group", "create", "-n", "g"]);
    ok(&["workspace", "create", "-g", "g", "-n", "w"]);
    ok(&["experiment", "create", "-g", "g", "-w", "w", "-n", "e"]);
    let target = nodes.to_string();
    ok(&[
        "cluster", "create", "-g", "g", "-w", "w", "-n", "c", "-s", SIZE, "-t", &target,
    ]);
}

/// The arguments that create a file server of one gigabyte in the workspace `w`.
pub fn create_file_server<'a>(name: &'a str, size: &'a str) -> [&'a str; 19] {
    [
        "file-server",
        "create",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        name,
        "-s",
        size,
        "--disk-count",
        "1",
        "--disk-size",
        "1",
        "--storage-sku",
        "Standard_LRS",
        "-u",
        "ada",
        "-ppass",
    ]
}

/// What an agent is told whose directories lie below one.
pub fn agent_args(below: &Path, coordinator: &str, name: &str, user: &str) -> Vec<String> {
    let dir = |what: &str| below.join(what).join(name).to_string_lossy().into_owned();
    let (data, root) = (dir("agents"), dir("nodes"));
    let args = [
        "node-agent",
        "--coordinator",
        coordinator,
        "--name",
        name,
        "--data",
        &data,
        "--root",
        &root,
        "--vm-size",
        SIZE,
        "--job-user",
        user,
    ];
    args.map(str::to_owned).to_vec()
}

/// Writes a job.json with these properties.
pub fn job_file(below: &Path, name: &str, mut properties: Value) -> PathBuf {
    if properties.get("stdOutErrPathPrefix").is_none() {
        let logs = below.join("out");
        properties["stdOutErrPathPrefix"] = logs.to_string_lossy().into_owned().into();
    }
    let path = below.join(format!("{name}.json"));
    let file = serde_json::json!({ "$schema": "job.json", "properties": properties });
    std::fs::write(&path, file.to_string()).expect("the directory is writable");
    path
}

/// What is mounted at or below a directory, the last first.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").expect("this is Linux");
    let places = text.lines().filter_map(|line| line.split(' ').nth(4));
    let below = places
        .map(PathBuf::from)
        .filter(|path| path.starts_with(dir));
    let mut below: Vec<_> = below.collect();
    below.reverse();
    below
}

/// Gets everything out of the way that is mounted below a directory: what removes it must not go in there.
pub fn unmount_below(dir: &Path) {
    for path in mounts_below(dir) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg("-f")
            .arg(&path)
            .output();
        let _ = Command::new("umount").arg("-l").arg(&path).output();
    }
    assert!(mounts_below(dir).is_empty(), "{:?}", mounts_below(dir));
}

/// A coordinator, agents and their directory.
pub struct Ensemble {
    dir: TempDir,
    pub endpoint: String,
    /// By it new agents join.
    token: String,
    /// More arguments of the coordinator.
    pub coordinator_args: Vec<String>,
    /// More arguments of agents.
    pub agent_args: Vec<String>,
    /// Variables that its daemons get, beyond those of the test.
    pub variables: Vec<(String, String)>,
    pub coordinator: Option<Process>,
    pub agents: BTreeMap<String, Process>,
}

impl Ensemble {
    /// A coordinator and some agents, `a1` and so on, registered.
    pub fn start(agents: usize) -> Ensemble {
        let names: Vec<_> = (1..=agents).map(|number| format!("a{number}")).collect();
        let mut ensemble = Ensemble::without_daemons();
        ensemble.start_coordinator();
        for name in names {
            ensemble.start_agent(&name);
        }
        ensemble.until_alive(agents);
        ensemble
    }

    /// A directory and an endpoint; the daemons are the test's to start.
    pub fn without_daemons() -> Ensemble {
        let dir = tempfile::Builder::new()
            .prefix("batchai-test-")
            .tempdir()
            .expect("a directory");
        let mut ensemble = Ensemble {
            dir,
            endpoint: String::new(),
            token: String::new(),
            coordinator_args: Vec::new(),
            agent_args: Vec::new(),
            variables: Vec::new(),
            coordinator: None,
            agents: BTreeMap::new(),
        };
        // Kept over restarts of the coordinator.
        ensemble.endpoint = format!("https://127.0.0.1:{}", free_port());
        ensemble
    }

    /// The same with a cluster `c` of all agents, a resource group `g`, a workspace `w` and an experiment `e`.
    pub fn with_cluster(agents: usize) -> Ensemble {
        let ensemble = Ensemble::start(agents);
        ensemble.create_cluster(agents);
        ensemble
    }

    /// Creates what `with_cluster` has.
    pub fn create_cluster(&self, agents: usize) {
        create_cluster(agents, |args| self.ok(args));
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The administrator's credentials.
    pub fn credentials(&self) -> PathBuf {
        self.path().join("coordinator/admin.pem")
    }

    pub fn start_coordinator(&mut self) {
        let log = self.path().join("coordinator.log");
        let data = self.path().join("coordinator");
        if !self.credentials().exists() {
            self.ok(&["coordinator", "init", "--data", &data.to_string_lossy()]);
        }
        let listen = self.endpoint.trim_start_matches("https://").to_owned();
        let data = data.to_string_lossy();
        let args = ["coordinator", "--listen", &listen, "--data", &data];
        let more = self.coordinator_args.iter().map(String::as_str);
        let args = args.into_iter().chain(more);
        let mut process = Process::start_with(args, &self.variables(), &log);
        process.line("ready ");
        self.coordinator = Some(process);
        if self.token.is_empty() {
            let token = ["node", "token", "create", "-n", "test", "--uses", "1000"];
            self.token = self.ok(&token).trim().to_owned();
        }
    }

    pub fn start_agent(&mut self, name: &str) {
        self.start_agent_as(name, "self");
    }

    /// The same; its jobs run as a user.
    pub fn start_agent_as(&mut self, name: &str, user: &str) {
        let log = self.path().join(format!("{name}.log"));
        let mut args = agent_args(self.path(), &self.endpoint, name, user);
        // What is given counts.
        let given = |arg: &String| arg.starts_with("--") && self.agent_args.contains(arg);
        while let Some(at) = args.iter().position(given) {
            args.drain(at..at + 2);
        }
        args.extend(self.agent_args.iter().cloned());
        let variables = [&self.variables()[..], &self.join_token()].concat();
        let process = Process::start_with(args, &variables, &log);
        self.agents.insert(name.to_owned(), process);
    }

    fn variables(&self) -> Vec<(&str, &str)> {
        let variables = self.variables.iter();
        variables.map(|(n, v)| (n.as_str(), v.as_str())).collect()
    }

    /// The variable by which new agents join.
    pub fn join_token(&self) -> [(&str, &str); 1] {
        [("BATCHAI_JOIN_TOKEN", &self.token)]
    }

    /// Credentials of anybody: what an administrator with the authority's key could make.
    pub fn credentials_of(&self, identity: &Identity) -> PathBuf {
        let authority = Authority::read(&self.path().join("coordinator/pki"));
        let authority = authority.expect("the ensemble has an authority");
        let lifetime = Duration::from_secs(3600);
        let credentials = authority.credentials(identity, &[], lifetime);
        let path = self
            .path()
            .join(format!("{}.pem", identity.to_string().replace('/', "-")));
        write_private(&path, &credentials.expect("it can sign"))
            .expect("the directory is writable");
        path
    }

    /// Waits until so many nodes are in contact.
    pub fn until_alive(&self, count: usize) {
        until("the nodes to be in contact", || {
            let nodes = self.json(&["node", "list"]);
            let alive = nodes
                .as_array()?
                .iter()
                .filter(|node| node["state"] != "UNUSABLE");
            (alive.count() >= count).then_some(())
        });
    }

    /// Runs the command under test against this ensemble.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args)
            .output()
            .expect("the command under test can be started")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(under_test());
        command
            .args(args)
            .env("BATCHAI_ENDPOINT", &self.endpoint)
            .env("BATCHAI_CREDENTIALS", self.credentials())
            .stdin(Stdio::null());
        command
    }

    /// Runs it and expects success; returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Runs it and expects failure; returns exit code and message.
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?} succeeded");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap_or(-1), message)
    }

    /// Runs it and reads what it printed.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// Writes a job.json with these properties.
    pub fn job_file(&self, name: &str, properties: Value) -> PathBuf {
        job_file(self.path(), name, properties)
    }

    /// Submits a job to the cluster `c`.
    pub fn submit(&self, name: &str, properties: Value) {
        let path = self.job_file(name, properties);
        let path = path.to_string_lossy();
        let mut args = vec!["job", "create", "-n", name, "-c", "c", "-f", &path];
        args.extend(IN);
        self.ok(&args);
    }

    /// A verb on a job, as JSON.
    pub fn job(&self, name: &str) -> Value {
        let mut args = vec!["job", "show", "-n", name];
        args.extend(IN);
        self.json(&args)
    }

    /// Waits until the job is in a state.
    pub fn until_job(&self, name: &str, state: &str) -> Value {
        until(
            &format!("job {name} to be {state}, now {}", self.job(name)),
            || {
                let job = self.job(name);
                (job["state"] == state).then_some(job)
            },
        )
    }

    /// `job wait`: its exit code.
    pub fn wait(&self, name: &str) -> i32 {
        let mut args = vec!["job", "wait", "-n", name];
        args.extend(IN);
        self.run(&args).status.code().unwrap_or(-1)
    }

    /// A whole log file.
    pub fn log(&self, name: &str, file: &str) -> String {
        let mut args = vec!["job", "file", "stream", "-j", name, "-f", file];
        args.extend(IN);
        self.ok(&args)
    }

    /// Where its agents may have groups of processes.
    pub fn groups(&self) -> Vec<Group> {
        let agents = std::fs::read_dir(self.path().join("agents"));
        let agents = agents.into_iter().flatten().flatten();
        let uids = agents.filter_map(|agent| {
            let node = std::fs::read(agent.path().join("node.json")).ok()?;
            let node: Value = serde_json::from_slice(&node).ok()?;
            Some(node["uid"].as_str()?.to_owned())
        });
        uids.flat_map(|uid| batchai_node_agent::homes(&uid).unwrap_or_default())
            .collect()
    }

    /// Ends the daemons in order and asserts that nothing of the ensemble is left.
    pub fn assert_nothing_left(&mut self) {
        for process in self.agents.values_mut().chain(&mut self.coordinator) {
            process.signal(Signal::SIGTERM);
            process.wait();
        }
        self.agents.clear();
        self.coordinator = None;
        let left = processes_of(self.path());
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

impl Drop for Ensemble {
    fn drop(&mut self) {
        self.agents.clear();
        self.coordinator = None;
        // Shims outlive their agents by design.
        sweep(self.dir.path());
        unmount_below(self.dir.path());
        for home in self.groups() {
            let _ = home.end();
        }
    }
}
