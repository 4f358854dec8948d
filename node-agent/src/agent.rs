//! A node agent from its configuration to its end.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use batchai_common::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, TERMINATION_GRACE};
use batchai_proto::agent::v1::{Hello, LogHello};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::config::Config;
use crate::hardware::{self, HardwareError};
use crate::journal::{Journal, JournalError};
use crate::logs::{Shipped, Shipper};
use crate::session::Session;
use crate::shim;
use crate::supervisor::Supervisor;
use crate::watch::Watch;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Beyond the grace that processes get: for shims to write their records.
const END_JOBS_MARGIN: Duration = Duration::from_secs(5);

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    #[error("{url:?} is not the URL of a coordinator: use http://ADDRESS:PORT")]
    Url { url: String },
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
    let endpoint = endpoint(&config.coordinator)?;
    let node_id = node_id(&config)?;
    let root = std::path::absolute(&config.root)?;
    let config = Config {
        root,
        data: std::path::absolute(&config.data)?,
        ..config
    };
    let (journal, identity) = Journal::open(&config.data)?;
    let journal = Arc::new(journal);
    let facts = hardware::facts(&config)?;
    tracing::info!(
        node = node_id,
        uid = identity.uid,
        vm_size = facts.vm_size,
        image = facts.image,
        "node"
    );
    let watch = Watch::new()?;
    sweep_strays(&journal, &identity.uid, &watch)?;
    let shipped = Shipped::default();
    let (assign, assignments) = watch::channel(None);
    let (observe, observed) = watch::channel(Vec::new());
    let supervisor = Supervisor {
        journal: journal.clone(),
        watch: watch.clone(),
        facts: hardware::host_facts(&facts, &identity.uid),
        shipped: shipped.clone(),
        own,
        assignments,
        observed: observe,
        children: HashMap::new(),
        starts: HashMap::new(),
        swept: HashSet::new(),
    };
    let shipper = Shipper {
        journal: journal.clone(),
        watch,
        shipped,
        endpoint: endpoint.clone(),
        hello: LogHello {
            node_id: node_id.clone(),
            uid: identity.uid.clone(),
        },
    };
    let session = Session {
        endpoint,
        hello: Hello {
            node_id,
            uid: identity.uid.clone(),
            journal_id: identity.journal_id.clone(),
            facts: Some(facts),
            report: None,
        },
        identity,
        journal,
        observed,
        assignments: assign,
    };
    // The first session says what the journal holds, so the journal is read first.
    let supervisor = tokio::spawn(supervisor.run(shutdown.clone()));
    let (session, shipper) = (tokio::spawn(session.run()), tokio::spawn(shipper.run()));
    let supervisor = supervisor.await.map_err(std::io::Error::other)?;
    session.abort();
    if config.end_jobs_on_stop {
        supervisor
            .end_jobs(TERMINATION_GRACE + END_JOBS_MARGIN)
            .await;
    }
    shipper.abort();
    Ok(())
}

fn endpoint(url: &str) -> Result<Endpoint, AgentError> {
    let bad = || AgentError::Url {
        url: url.to_owned(),
    };
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| bad())?;
    if endpoint.uri().authority().is_none() || endpoint.uri().scheme_str() != Some("http") {
        return Err(bad());
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
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

/// Ends processes of attempts that no living shim holds: of earlier agents of this node that were cut down.
fn sweep_strays(journal: &Journal, uid: &str, watch: &Watch) -> Result<(), AgentError> {
    let mut held = HashSet::new();
    for dir in journal.attempts()? {
        watch.add(&dir)?;
        if dir.shim()?.is_some() {
            held.insert(dir.id());
        }
    }
    Ok(shim::sweep(uid, |attempt| held.contains(attempt))?)
}
