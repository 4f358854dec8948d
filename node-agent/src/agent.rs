//! A node agent from its configuration to its end.

use std::collections::{HashMap, HashSet};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use batchai_common::limits::TERMINATION_GRACE;
use batchai_common::time::boot_millis;
use batchai_common::tls::{Connector, Credentials};
use batchai_proto::agent::v1::{
    AnswerHello, AssignmentList, ExecRequest, FileRequest, Hello, LogHello, Report,
};
use batchai_proto::v1::NodeFacts;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::ServerConfig;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::bundles::Fetcher;
use crate::cgroups::Isolation;
use crate::config::Config;
use crate::execs::{self, Execs};
use crate::file_servers::{self, FileServers};
use crate::files::Answerer;
use crate::hardware::{self, HardwareError};
use crate::join::{self, JoinError, Shows};
use crate::journal::{Identity, Journal, JournalError, STOP};
use crate::launch::{Ability, Device, HostFacts, JobLimit, JobUsers, LogLimit};
use crate::lease::Lease;
use crate::logs::{Shipped, Shipper};
use crate::mounts::UNMOUNT;
use crate::peers::{self, Key, Peers};
use crate::session::Session;
use crate::shim::{self, Root, RootError};
use crate::storage::{self, StorageError};
use crate::supervisor::{MOUNTS_TAG, Supervisor, Volumes};
use crate::user::{self, UserError};
use crate::watch::Watch;

/// Questions about files that are not looked at yet.
const QUESTIONS_MAX: usize = 32;
/// Commands that are asked for and not looked at yet.
const EXECS_MAX: usize = 16;
/// Beyond the grace that processes get: for shims to write their records.
const END_JOBS_MARGIN: Duration = Duration::from_secs(5);
const END_JOBS_STEP: Duration = Duration::from_millis(20);

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(
        "this node was expelled, and all that ran here was ended; to join again, give the agent another --data directory and a \
         new token"
    )]
    Expelled,
    #[error("other agents cannot be listened to: {0}; give another --peer-port")]
    Listen(std::io::Error),
    #[error("--name: {0}")]
    Name(#[from] batchai_common::names::NameError),
    #[error("{0}")]
    System(#[from] std::io::Error),
}

/// Runs until the token is cancelled. Jobs go on, unless the configuration says otherwise.
pub async fn run(
    config: Config,
    own: &'static [&'static str],
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let node_id = node_id(&config)?;
    let config = config.absolute()?;
    let (journal, mut identity) = Journal::open(&config.data)?;
    let _root = Root::claim(&config.root, &identity.uid)?;
    let users = users(&config)?;
    let unwanted = || shutdown.is_cancelled();
    let (config, storage_failure) = storage::prepare(config, &journal, &unwanted)?;
    let shows = tokio::select! {
        shows = join::shows(&config, &journal, &node_id, &mut identity) => shows?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let connector = Connector::new(&config.coordinator, shows.as_ref().map(Shows::latest))
        .map_err(JoinError::from)?;
    let config = Config {
        vm_size: config.vm_size.or(identity.vm_size.clone()),
        ..config
    };
    let isolation = shim::detect(&identity.uid, config.isolation.as_deref())?;
    let containers = shim::can_contain(journal.images());
    let shown = shows.as_ref();
    let way = shown.map(|shows| way(&config, shows, &journal, &mut identity));
    let way = way.transpose()?;
    let (mut facts, gpus) = hardware::facts(own, &config, &isolation, &containers)?;
    facts.agent_port = way.as_ref().map_or(0, |_| i32::from(identity.agent_port));
    facts.storage_failure = storage_failure;
    let (uid, vm_size, image) = (&identity.uid, &facts.vm_size, &facts.image);
    let (ends, limits) = (&facts.isolation, &facts.enforced_limits);
    tracing::info!(node = node_id, uid, vm_size, image, ends, ?limits, "node");
    let watch = Watch::new()?;
    sweep_strays(&journal, &identity.uid, &watch)?;
    let fresh = shows.map(|shows| tokio::spawn(shows.keep_fresh(connector.clone())));
    let parts = Parts {
        connector,
        expelled: Arc::default(),
        users,
        limits: config.job_limits.clone(),
        log_limit: config.log_limit(),
        mount_patience_s: config.mount_patience,
        isolation,
        containers,
        node_id,
        identity,
        facts,
        gpus,
        journal: Arc::new(journal),
        watch,
        remote_shell: peers::shell::words(own),
    };
    let ended = parts.run(own, way, shutdown).await;
    if let Some(fresh) = fresh {
        fresh.abort();
    }
    let expelled = parts.expelled.load(Ordering::Relaxed);
    if config.end_jobs_on_stop || expelled {
        tokio::task::spawn_blocking(move || end_jobs_of(&parts.journal, &parts.identity.uid))
            .await
            .map_err(std::io::Error::other)??;
    }
    match expelled {
        true => Err(AgentError::Expelled),
        false => ended,
    }
}

/// Whom jobs run as, with what they may take.
fn users(config: &Config) -> Result<JobUsers, UserError> {
    let users = user::resolve(config.job_user.as_deref())?;
    tracing::info!(?users, limits = ?config.job_limits, "jobs run as");
    user::check_limits(&config.job_limits)?;
    Ok(users)
}

/// How other agents are called and answered.
struct Way {
    listener: TcpListener,
    credentials: watch::Receiver<Arc<Credentials>>,
    tls: watch::Receiver<Arc<ServerConfig>>,
}

/// Listens to the agents of other nodes, at the same port as the last time where that can be; remembers it.
fn way(
    config: &Config,
    shows: &Shows,
    journal: &Journal,
    identity: &mut Identity,
) -> Result<Way, AgentError> {
    let listener = peers::listen(config.peer_port, identity.agent_port);
    let listener = listener.map_err(AgentError::Listen)?;
    let port = listener.local_addr()?.port();
    if identity.agent_port != port || identity.key.is_empty() {
        identity.agent_port = port;
        if identity.key.is_empty() {
            let half = || uuid::Uuid::new_v4().simple().to_string();
            identity.key = half() + &half();
        }
        journal.keep(identity)?;
    }
    let (credentials, tls) = shows.of_peers();
    Ok(Way {
        listener,
        credentials,
        tls,
    })
}

/// What the agent's tasks are made of.
struct Parts {
    connector: Connector,
    expelled: Arc<AtomicBool>,
    users: JobUsers,
    limits: Vec<JobLimit>,
    log_limit: LogLimit,
    mount_patience_s: u64,
    /// What it can do with groups of processes.
    isolation: Isolation,
    /// What it can do for containers.
    containers: Ability,
    node_id: String,
    identity: Identity,
    facts: NodeFacts,
    gpus: Vec<Device>,
    journal: Arc<Journal>,
    watch: Arc<Watch>,
    remote_shell: Vec<String>,
}

impl Parts {
    async fn run(
        &self,
        own: &'static [&'static str],
        way: Option<Way>,
        shutdown: CancellationToken,
    ) -> Result<(), AgentError> {
        let shipped = Shipped::default();
        let (assign, assignments) = watch::channel(None);
        let (observe, observed) = watch::channel(Report::default());
        let (ask, questions) = mpsc::channel(QUESTIONS_MAX);
        let (ask_exec, execs) = mpsc::channel(EXECS_MAX);
        let (lease, leased) = watch::channel(0);
        let kept = self.journal.bundles();
        let mut facts = self.host_facts();
        if way.is_some() {
            facts.remote_shell.clone_from(&self.remote_shell);
        }
        let own_name = (self.node_id.clone(), self.identity.uid.clone());
        let (fetcher, bundles) =
            Fetcher::new(kept, self.connector.clone(), own_name, self.watch.clone())?;
        let answerer = self.answerer(own, facts.clone(), questions);
        let execs = self.execs(own, facts.clone(), execs);
        let (journal, patience_s) = (self.journal.clone(), self.mount_patience_s);
        let volumes = Volumes::new(journal, own, facts.clone(), patience_s);
        let file_servers = FileServers::new(self.journal.clone(), own, &self.facts);
        let peers = way.map(|way| self.peers(way, execs.parts(), assignments.clone()));
        let supervisor = Supervisor {
            volumes,
            file_servers,
            journal: self.journal.clone(),
            watch: self.watch.clone(),
            facts,
            shipped: shipped.clone(),
            bundles,
            own,
            key: Key::new(&self.identity.key),
            assignments,
            leased,
            observed: observe,
            children: HashMap::new(),
            starts: HashMap::new(),
            swept: HashSet::new(),
            unswept: HashMap::new(),
        };
        let shipper = self.shipper(shipped);
        let session = Session {
            // Any replica has sessions: agents spread over them. The rest goes to the leader.
            connector: self.connector.beginning_at(fastrand::usize(..)),
            hello: self.hello(),
            identity: self.identity.clone(),
            journal: self.journal.clone(),
            observed,
            assignments: assign,
            questions: ask,
            execs: ask_exec,
            lease: Lease::new(boot_millis()),
            leased: lease,
            expelled: self.expelled.clone(),
        };
        let mut connections = JoinSet::new();
        connections.spawn(session.run());
        connections.spawn(shipper.run());
        connections.spawn(fetcher.run());
        connections.spawn(answerer.run());
        connections.spawn(execs.run());
        if let Some(peers) = peers {
            connections.spawn(peers.run());
        }
        until_ended(tokio::spawn(supervisor.run(shutdown)), connections).await
    }

    /// This host, as launchers see it.
    fn host_facts(&self) -> HostFacts {
        let jobs = (
            self.users.clone(),
            self.limits.clone(),
            self.isolation.clone(),
        );
        let (bundles, lease) = (self.journal.bundles(), self.journal.lease());
        let paths = (&*bundles, &*lease);
        HostFacts {
            log_limit: self.log_limit,
            containers: self.containers.clone(),
            ..hardware::host_facts(&self.facts, &self.identity.uid, paths, jobs, &self.gpus)
        }
    }

    fn shipper(&self, shipped: Shipped) -> Shipper {
        Shipper {
            journal: self.journal.clone(),
            watch: self.watch.clone(),
            shipped,
            connector: self.connector.clone(),
            hello: LogHello {
                node_id: self.node_id.clone(),
                uid: self.identity.uid.clone(),
            },
        }
    }

    fn peers(
        &self,
        way: Way,
        parts: execs::Parts,
        assignments: watch::Receiver<Option<AssignmentList>>,
    ) -> Peers {
        Peers {
            parts,
            key: Key::new(&self.identity.key),
            node: format!("nodes/{}", self.node_id),
            assignments,
            credentials: way.credentials,
            tls: way.tls,
            listener: way.listener,
        }
    }

    fn answerer(
        &self,
        own: &'static [&'static str],
        facts: HostFacts,
        questions: mpsc::Receiver<FileRequest>,
    ) -> Answerer {
        Answerer {
            connector: self.connector.clone(),
            hello: self.answer_hello(),
            facts,
            storage: self.facts.storage_root.clone(),
            own,
            questions,
            stuck: Default::default(),
        }
    }

    fn execs(
        &self,
        own: &'static [&'static str],
        facts: HostFacts,
        questions: mpsc::Receiver<ExecRequest>,
    ) -> Execs {
        Execs {
            connector: self.connector.clone(),
            hello: self.answer_hello(),
            facts,
            own,
            journal: self.journal.clone(),
            questions,
        }
    }

    fn answer_hello(&self) -> AnswerHello {
        AnswerHello {
            node_id: self.node_id.clone(),
            uid: self.identity.uid.clone(),
            id: String::new(),
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            node_id: self.node_id.clone(),
            uid: self.identity.uid.clone(),
            journal_id: self.identity.journal_id.clone(),
            facts: Some(self.facts.clone()),
            report: None,
            ensemble: String::new(),
            empty: false,
            epoch: 0,
        }
    }
}

/// Runs until one of the agent's tasks ends: one that is deaf in one ear must not look alive.
async fn until_ended(
    mut supervisor: JoinHandle<()>,
    mut connections: JoinSet<()>,
) -> Result<(), AgentError> {
    let failed = tokio::select! {
        ended = &mut supervisor => ended.err(),
        ended = connections.join_next() => ended.and_then(Result::err),
    };
    connections.abort_all();
    if !supervisor.is_finished() {
        supervisor.abort();
        // It may be in the middle of starting a shim.
        let _ = supervisor.await;
    }
    match failed {
        Some(error) => Err(AgentError::System(std::io::Error::other(error))),
        None => Ok(()),
    }
}

/// Ends all jobs of the node whose agent had this data directory and is gone.
///
/// # Errors
/// Says which could not be ended; the others were.
pub fn end_jobs(data: &Path) -> Result<(), AgentError> {
    let (journal, identity) = Journal::open(data)?;
    end_jobs_of(&journal, &identity.uid)
}

fn end_jobs_of(journal: &Journal, uid: &str) -> Result<(), AgentError> {
    let until = Instant::now() + TERMINATION_GRACE + END_JOBS_MARGIN;
    loop {
        let mut alive = false;
        for dir in journal.attempts()? {
            let shim = dir.shim().unwrap_or_default();
            alive |= shim.is_some();
            // Also where no shim is seen: one may be about to begin, and then finds that it must not.
            if dir.has(STOP) {
                continue;
            }
            if let Err(error) = dir.write(STOP, &true, true) {
                tracing::error!(%error, attempt = dir.id(), "told to end by a signal");
                // One that has ended meanwhile needs none.
                let _ = shim.map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
            }
        }
        alive |= file_servers::end_all(journal)?;
        for dir in journal.cluster_mounts()? {
            alive |= dir.shim().unwrap_or_default().is_some();
            if !dir.has(UNMOUNT) {
                dir.write(UNMOUNT, &true, false)?;
            }
        }
        if !alive || Instant::now() > until {
            // What a shim left that died, and what one left that would not end.
            let swept = shim::sweep(journal, uid, |_| false);
            return Ok(swept.map_err(std::io::Error::other)?);
        }
        std::thread::sleep(END_JOBS_STEP);
    }
}

fn node_id(config: &Config) -> Result<String, AgentError> {
    let id = match &config.name {
        Some(name) => name.clone(),
        // Host names may be longer than ids, and have dots.
        None => {
            let host = nix::unistd::gethostname().map_err(std::io::Error::from)?;
            let host = host.to_string_lossy().into_owned();
            host.split('.').next().unwrap_or_default().to_owned()
        }
    };
    batchai_common::names::check_id(batchai_common::names::Kind::Node, &id)?;
    Ok(id)
}

/// Ends processes of attempts that no living shim holds: of earlier agents of this node that were cut down. One that is
/// stuck in the kernel does not keep the node out of service.
fn sweep_strays(journal: &Journal, uid: &str, watch: &Watch) -> Result<(), AgentError> {
    for dir in journal.attempts()? {
        if let Err(error) = watch.add(&dir) {
            tracing::warn!(%error, attempt = dir.id(), "changes of an attempt are noticed late");
        }
    }
    // Asked about what was found: a shim that an earlier agent has just started may begin meanwhile.
    let held = |attempt: &str| {
        // What serves a cluster's mounts is looked after with these.
        if attempt.starts_with(MOUNTS_TAG) {
            return true;
        }
        let shim = journal.attempt(attempt).map(|dir| dir.shim());
        match shim {
            None | Some(Ok(None)) => false,
            Some(Ok(Some(_))) => true,
            Some(Err(error)) => {
                tracing::error!(%error, attempt, "taken for alive");
                true
            }
        }
    };
    if let Err(error) = shim::sweep(journal, uid, held) {
        tracing::error!(%error, "strays of an earlier agent are left");
    }
    Ok(())
}
