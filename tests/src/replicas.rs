//! An ensemble of several coordinators, as processes of their own on loopback, and agents that know all of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::ensemble::{IN, agent_args, create_cluster, job_file};
use crate::process::{PATIENCE, Process, command_by, free_port, sweep, under_test, until};

/// Several coordinators.
pub struct Replicas {
    dir: TempDir,
    endpoints: BTreeMap<u64, String>,
    /// By what each is started, and whoever asks it: where they are not simply on this machine.
    prefixes: BTreeMap<u64, Vec<String>>,
    args: Vec<String>,
    pub processes: BTreeMap<u64, Process>,
    pub agents: BTreeMap<String, Process>,
    /// Whom the jobs of agents that are started run as.
    pub job_user: String,
    token: String,
}

impl Replicas {
    /// Starts so many, numbered from 1 on, each with these arguments.
    pub fn start(count: u64, args: &[&str]) -> Replicas {
        let mut replicas = Replicas::without_processes(args);
        for id in 1..=count {
            replicas.draw(id);
        }
        replicas.start_all();
        replicas
    }

    /// Starts some elsewhere than on loopback, numbered from 1 on: where each listens, and what starts it there.
    pub fn start_at(places: Vec<(String, Vec<String>)>, args: &[&str]) -> Replicas {
        let mut replicas = Replicas::without_processes(args);
        for (id, (endpoint, prefix)) in (1..).zip(places) {
            replicas.endpoints.insert(id, endpoint);
            replicas.prefixes.insert(id, prefix);
        }
        replicas.start_all();
        replicas
    }

    fn without_processes(args: &[&str]) -> Replicas {
        let dir = tempfile::Builder::new()
            .prefix("batchai-test-")
            .tempdir()
            .expect("a directory");
        Replicas {
            dir,
            endpoints: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            processes: BTreeMap::new(),
            agents: BTreeMap::new(),
            job_user: "self".to_owned(),
            token: String::new(),
        }
    }

    fn start_all(&mut self) {
        let mut init = vec!["coordinator".to_owned(), "init".to_owned()];
        init.extend(["--data".to_owned(), self.data(1).display().to_string()]);
        for (id, endpoint) in &self.endpoints {
            init.extend(["--replica".to_owned(), format!("{id}={endpoint}")]);
        }
        let made = Command::new(under_test()).args(&init).output();
        let made = made.expect("the command under test can be started");
        assert!(made.status.success(), "{made:?}");
        let all: Vec<_> = self.endpoints.keys().copied().collect();
        for id in &all[1..] {
            self.take_there(*id);
        }
        for id in &all {
            self.begin(*id);
        }
        for id in &all {
            self.ready(*id);
        }
    }

    /// Draws an address for a replica, which it keeps over its restarts.
    pub fn draw(&mut self, id: u64) -> String {
        let endpoint = format!("https://127.0.0.1:{}", free_port());
        self.endpoints.insert(id, endpoint.clone());
        endpoint
    }

    /// Takes the data directory that was made for a replica to its place.
    pub fn take_there(&self, id: u64) {
        let made = self.data(1).join("replicas").join(id.to_string());
        std::fs::rename(made, self.data(id)).expect("it was made");
    }

    pub fn data(&self, id: u64) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn endpoint(&self, id: u64) -> &str {
        &self.endpoints[&id]
    }

    /// Starts the process of a replica, and does not wait.
    pub fn begin(&mut self, id: u64) {
        let log = self.dir.path().join(format!("replica-{id}.log"));
        let listen = self.endpoints[&id]
            .trim_start_matches("https://")
            .to_owned();
        let data = self.data(id).display().to_string();
        let args = ["coordinator", "--listen", &listen, "--data", &data];
        let more = self.args.iter().map(String::as_str);
        let prefix = self.prefixes.get(&id).map_or(&[][..], Vec::as_slice);
        let process = Process::start_by(prefix, args.into_iter().chain(more), &[], &log);
        self.processes.insert(id, process);
    }

    /// Waits until it serves.
    pub fn ready(&mut self, id: u64) {
        let process = self.processes.get_mut(&id).expect("it was started");
        process.line("ready ");
    }

    pub fn restart(&mut self, id: u64) {
        self.begin(id);
        self.ready(id);
    }

    pub fn kill(&mut self, id: u64) {
        let mut process = self.processes.remove(&id).expect("it runs");
        process.kill();
    }

    /// All endpoints, as clients are given them.
    pub fn list(&self) -> String {
        let all: Vec<_> = self.endpoints.values().cloned().collect();
        all.join(",")
    }

    pub fn command_at(&self, endpoint: &str, args: &[&str]) -> Command {
        let place = self.endpoints.iter().find(|(_, at)| *at == endpoint);
        let id = place.map_or(1, |(id, _)| *id);
        self.command_from(id, endpoint, args)
    }

    /// The command where a replica is.
    pub fn command_from(&self, id: u64, endpoint: &str, args: &[&str]) -> Command {
        let prefix = self.prefixes.get(&id).map_or(&[][..], Vec::as_slice);
        let mut command = command_by(prefix);
        command
            .args(args)
            .env("BATCHAI_ENDPOINT", endpoint)
            .env("BATCHAI_CREDENTIALS", self.data(1).join("admin.pem"))
            .stdin(Stdio::null());
        command
    }

    fn output(&self, endpoint: &str, args: &[&str]) -> Output {
        let output = self.command_at(endpoint, args).output();
        output.expect("the command under test can be started")
    }

    /// Runs the command with all endpoints and expects success; returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        self.ok_at(&self.list(), args)
    }

    pub fn ok_at(&self, endpoint: &str, args: &[&str]) -> String {
        let output = self.output(endpoint, args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs it and expects failure; returns what it said.
    pub fn fails(&self, args: &[&str]) -> String {
        self.fails_at(&self.list(), args)
    }

    pub fn fails_at(&self, endpoint: &str, args: &[&str]) -> String {
        let output = self.output(endpoint, args);
        assert!(!output.status.success(), "{args:?} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    pub fn json_at(&self, endpoint: &str, args: &[&str]) -> Value {
        serde_json::from_slice(&self.output(endpoint, args).stdout).unwrap_or(Value::Null)
    }

    /// How the ensemble is, as a replica sees it.
    pub fn status_of(&self, id: u64) -> Value {
        self.json_at(&self.endpoints[&id], &["admin", "status"])
    }

    /// The replica that leads, as all that run agree.
    pub fn leader(&self) -> u64 {
        until("a leader", || {
            let seen: Vec<_> = self
                .processes
                .keys()
                .map(|id| self.status_of(*id)["leaderId"].as_str().map(str::to_owned))
                .collect();
            let first: u64 = seen.first()?.as_ref()?.parse().ok()?;
            let agreed = seen.iter().all(|other| other == &seen[0]);
            (agreed && self.processes.contains_key(&first)).then_some(first)
        })
    }

    /// Starts an agent that knows all replicas.
    pub fn start_agent(&mut self, name: &str) {
        let all = self.list();
        self.start_agent_at(name, &all);
    }

    /// Makes what agents join by.
    pub fn make_token(&mut self) {
        if self.token.is_empty() {
            let token = ["node", "token", "create", "-n", "test", "--uses", "1000"];
            self.token = self.ok(&token).trim().to_owned();
        }
    }

    /// What agents join by.
    pub fn join_token(&mut self) -> String {
        self.make_token();
        self.token.clone()
    }

    /// Starts an agent that knows some of the replicas.
    pub fn start_agent_at(&mut self, name: &str, endpoints: &str) {
        self.start_agent_by(&[], name, endpoints);
    }

    /// The same, started by another program, which becomes it.
    pub fn start_agent_by(&mut self, prefix: &[String], name: &str, endpoints: &str) {
        self.make_token();
        let log = self.dir.path().join(format!("{name}.log"));
        let args = agent_args(self.path(), endpoints, name, &self.job_user);
        let variables = [("BATCHAI_JOIN_TOKEN", &*self.token)];
        let process = Process::start_by(prefix, args, &variables, &log);
        self.agents.insert(name.to_owned(), process);
    }

    /// Starts a second agent of a node, which has a copy of all that the first one has.
    pub fn start_twin(&mut self, of: &str, name: &str, endpoints: &str) {
        let agents = self.path().join("agents");
        let copied = std::process::Command::new("cp")
            .args(["-a", "-T", "--"])
            .args([agents.join(of), agents.join(name)])
            .status();
        assert!(copied.expect("cp is there").success());
        let log = self.path().join(format!("{name}.log"));
        let mut args = agent_args(self.path(), endpoints, name, "self");
        let named = args.iter().position(|arg| arg == "--name");
        args[named.expect("it has a name") + 1] = of.to_owned();
        let process = Process::start_with(args, &[], &log);
        self.agents.insert(name.to_owned(), process);
    }

    /// Creates a cluster `c` of so many nodes, and what it lies in.
    pub fn create_cluster(&self, nodes: usize) {
        create_cluster(nodes, |args| self.ok(args));
    }

    /// Submits a job of one process.
    pub fn submit(&self, name: &str, command: &str) {
        let properties = serde_json::json!({
            "nodeCount": 1,
            "customToolkitSettings": { "commandLine": command },
        });
        self.submit_with(name, properties);
    }

    /// Submits a job with these properties.
    pub fn submit_with(&self, name: &str, properties: Value) {
        let path = job_file(self.path(), name, properties);
        let path = path.display().to_string();
        let mut args = vec!["job", "create", "-n", name, "-c", "c", "-f", &path];
        args.extend(IN);
        self.ok(&args);
    }

    pub fn job(&self, name: &str) -> Value {
        let mut args = vec!["job", "show", "-n", name];
        args.extend(IN);
        self.json_at(&self.list(), &args)
    }

    /// Waits for the end of a job, with more patience than else: what is large takes long to load where other tests run as well.
    pub fn end(&self, name: &str) -> Value {
        let end = Instant::now() + 10 * PATIENCE;
        loop {
            let job = self.job(name);
            if job["state"] == "SUCCEEDED" || job["state"] == "FAILED" {
                return job;
            }
            assert!(Instant::now() < end, "{name} does not end: {job:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends an agent or a replica as an administrator does; returns whether it ended well.
    pub fn stop(&mut self, id: u64) -> bool {
        let mut process = self.processes.remove(&id).expect("it runs");
        process.signal(Signal::SIGTERM);
        process.wait().success()
    }
}

impl Drop for Replicas {
    fn drop(&mut self) {
        self.agents.clear();
        self.processes.clear();
        // Shims outlive their agents by design.
        sweep(self.dir.path());
    }
}
