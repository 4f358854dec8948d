//! A whole ensemble on one machine: a coordinator and some agents, as processes of their own.
//!
//! They are this very program, started again. They are in process groups of their own, so that Ctrl-C reaches only this
//! process, which then ends them in order: agents with their jobs first. If this process is killed, the kernel tells
//! them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use batchai_common::limits::TERMINATION_GRACE;
use batchai_common::shutdown;
use batchai_proto::v1::{self, ListNodesRequest, node};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::access::NewToken;
use crate::args::Dev;
use crate::client::{Client, Target, request};
use crate::error::CliError;

/// The same on every machine, so that what a newcomer reads can be typed as it stands.
const VM_SIZE: &str = "dev";
const ADMIN: &str = "admin";
const START_MAX: Duration = Duration::from_secs(20);
/// Beyond the grace that jobs get.
const STOP_MARGIN: Duration = Duration::from_secs(15);
const STEP: Duration = Duration::from_millis(5);

/// A running ensemble. Dropping it kills what still runs of it.
pub struct Ensemble {
    pub target: Target,
    dir: PathBuf,
    coordinator: Option<Child>,
    agents: Vec<Child>,
}

/// `batchai dev`.
pub async fn run(args: Dev) -> Result<ExitCode, CliError> {
    let token = shutdown::on_signal()?;
    let started = Instant::now();
    let mut ensemble = tokio::select! {
        started = Ensemble::start(&args.data, args.listen, args.agents) => started?,
        () = token.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    // Where nobody reads it, the ensemble runs all the same.
    let _ = io::stdout().write_all(welcome(&ensemble, args.agents, started.elapsed()).as_bytes());
    let ended = tokio::select! {
        () = token.cancelled() => None,
        died = ensemble.died() => Some(died),
    };
    ensemble.stop().await;
    match ended {
        None => Ok(ExitCode::SUCCESS),
        Some(who) => Err(CliError::Failed(format!(
            "{who} ended by itself; everything was ended"
        ))),
    }
}

fn welcome(ensemble: &Ensemble, agents: u16, took: Duration) -> String {
    let Ensemble { target, dir, .. } = ensemble;
    let (endpoint, credentials) = (&target.endpoint, target.credentials.as_deref());
    let credentials = credentials.unwrap_or(dir).display();
    format!(
        "batchai is ready at {endpoint} after {} ms: a coordinator and {agents} nodes.\n\
         In another terminal:\n\n    \
         export BATCHAI_ENDPOINT={endpoint}\n    \
         export BATCHAI_CREDENTIALS={credentials}\n    \
         batchai node list -o table\n\n\
         Data and logs lie in {}. Ctrl-C ends it, with its jobs.\n",
        took.as_millis(),
        dir.display()
    )
}

impl Ensemble {
    /// Starts it all and waits until every node has registered.
    pub async fn start(dir: &Path, listen: SocketAddr, agents: u16) -> Result<Ensemble, CliError> {
        fs::create_dir_all(dir).map_err(|source| CliError::File {
            path: dir.to_owned(),
            source,
        })?;
        let dir = dir.canonicalize()?;
        let mut ensemble = Ensemble {
            target: Target::default(),
            dir,
            coordinator: None,
            agents: Vec::new(),
        };
        let address = ensemble.start_coordinator(listen).await?;
        ensemble.target.endpoint = format!("https://{address}");
        let token = ensemble.join_token(agents).await?;
        for number in 1..=agents {
            ensemble.start_agent(number, &token)?;
        }
        ensemble.until_registered(usize::from(agents)).await?;
        Ok(ensemble)
    }

    async fn start_coordinator(&mut self, listen: SocketAddr) -> Result<String, CliError> {
        let (log, data) = (
            self.dir.join("coordinator.log"),
            self.dir.join("coordinator"),
        );
        let credentials = data.join(batchai_coordinator::ADMIN_FILE);
        if !credentials.exists() {
            let begin = batchai_coordinator::Begin {
                names: Vec::new(),
                admin: ADMIN.to_owned(),
                replicas: BTreeMap::new(),
            };
            batchai_coordinator::init(&data, begin)?;
        }
        self.target.credentials = Some(credentials);
        let mut child = daemon("coordinator", &log)?
            .arg("--data")
            .arg(data)
            .args(["--listen", &listen.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take();
        self.coordinator = Some(child);
        let first = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            let stdout = stdout.ok_or_else(|| io::Error::other("a pipe is missing"))?;
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        });
        let line = match tokio::time::timeout(START_MAX, first).await {
            Ok(line) => line.map_err(io::Error::other)??,
            Err(_) => return Err(CliError::Failed(format!("no start: see {}", log.display()))),
        };
        match line.trim().strip_prefix("ready ") {
            Some(address) => Ok(address.to_owned()),
            None => Err(CliError::Failed(last_line(&log))),
        }
    }

    /// A token by which all the agents join.
    async fn join_token(&self, agents: u16) -> Result<String, CliError> {
        let client = Client::connect(&self.target).await?;
        let new = NewToken {
            id: format!("dev-{}", uuid::Uuid::new_v4().simple()),
            settings: v1::Token {
                kind: v1::token::Kind::Node as i32,
                use_count_max: agents.into(),
                ..Default::default()
            },
        };
        new.create(&client, &self.target).await
    }

    fn start_agent(&mut self, number: u16, token: &str) -> Result<(), CliError> {
        let log = self.dir.join(format!("node-{number}.log"));
        let child = daemon("node-agent", &log)?
            .args(["--coordinator", &self.target.endpoint])
            .env("BATCHAI_JOIN_TOKEN", token)
            .args(["--name", &format!("node-{number}")])
            .arg("--data")
            .arg(agent_data(&self.dir, usize::from(number)))
            .arg("--root")
            .arg(self.dir.join("nodes").join(number.to_string()))
            .args(["--vm-size", VM_SIZE])
            .args(["--job-user", "self"])
            .arg("--end-jobs-on-stop")
            .stdout(Stdio::null())
            .spawn()?;
        self.agents.push(child);
        Ok(())
    }

    async fn until_registered(&mut self, count: usize) -> Result<(), CliError> {
        let client = Client::connect(&self.target).await?;
        let until = Instant::now() + START_MAX;
        loop {
            let list = client
                .nodes()
                .list_nodes(request(ListNodesRequest::default()))
                .await;
            let alive = list.map(|list| {
                let unusable = node::State::Unusable;
                list.into_inner()
                    .nodes
                    .iter()
                    .filter(|node| node.state() != unusable)
                    .count()
            });
            // A coordinator that has just started may not lead yet.
            if alive.is_ok_and(|alive| alive >= count) {
                return Ok(());
            }
            if let Some(who) = self.dead() {
                return Err(CliError::Failed(last_line(
                    &self.dir.join(format!("{who}.log")),
                )));
            }
            if Instant::now() > until {
                let why = format!("the nodes do not register: see {}", self.dir.display());
                return Err(CliError::Failed(why));
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// Waits until one of the processes has ended; says which.
    pub async fn died(&mut self) -> String {
        loop {
            if let Some(who) = self.dead() {
                return who;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn dead(&mut self) -> Option<String> {
        let ended = |child: &mut Child| child.try_wait().is_ok_and(|status| status.is_some());
        if self.coordinator.as_mut().is_some_and(ended) {
            return Some("coordinator".to_owned());
        }
        let dead = self.agents.iter_mut().position(ended)?;
        Some(format!("node-{}", dead + 1))
    }

    /// Ends agents with their jobs, then the coordinator.
    pub async fn stop(&mut self) {
        let until = Instant::now() + TERMINATION_GRACE + STOP_MARGIN;
        for agent in &self.agents {
            terminate(agent);
        }
        for agent in &mut self.agents {
            reap(agent, until).await;
        }
        self.end_jobs_of_dead_agents();
        if let Some(coordinator) = &mut self.coordinator {
            terminate(coordinator);
            reap(coordinator, until).await;
        }
    }
}

impl Ensemble {
    /// An agent that was cut down could not end its jobs.
    fn end_jobs_of_dead_agents(&self) {
        for number in 1..=self.agents.len() {
            let data = agent_data(&self.dir, number);
            if !data.exists() {
                continue;
            }
            if let Err(error) = batchai_node_agent::end_jobs(&data) {
                say!("batchai: jobs of node-{number} may be left: {error}");
            }
        }
    }
}

fn agent_data(dir: &Path, number: usize) -> PathBuf {
    dir.join("agents").join(number.to_string())
}

impl Drop for Ensemble {
    fn drop(&mut self) {
        for child in self.agents.iter_mut().chain(&mut self.coordinator) {
            if let Ok(None) = child.try_wait() {
                // Not killed: agents end their jobs first, by themselves.
                terminate(child);
                let _ = child.wait();
            }
        }
        self.end_jobs_of_dead_agents();
    }
}

/// One of the daemons that this program carries.
fn daemon(name: &str, log: &Path) -> Result<Command, CliError> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .map_err(|source| CliError::File {
            path: log.to_owned(),
            source,
        })?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(format!("batchai-{name}"))
        .arg(name)
        .args(["--die-with-parent", &std::process::id().to_string()])
        .process_group(0)
        .stdin(Stdio::null())
        .stderr(file);
    Ok(command)
}

fn terminate(child: &Child) {
    // One that has ended is not reaped yet, so the pid is still its own.
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
}

async fn reap(child: &mut Child, until: Instant) {
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < until => tokio::time::sleep(STEP).await,
            Ok(None) => {
                say!("batchai: process {} does not end; killing it", child.id());
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            _ => return,
        }
    }
}

/// What a daemon said last, without time and colours: why it ended.
fn last_line(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    match text.lines().last() {
        Some(line) => line.to_owned(),
        None => format!("a daemon ended without a word: {}", log.display()),
    }
}
