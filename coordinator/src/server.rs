//! A coordinator from its configuration to its end: storage, replica, servers, signal, drain.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use batchai_common::limits;
use batchai_common::limits::{
    CALL_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX,
};
use batchai_common::tls::acceptor::incoming;
use batchai_proto::agent::v1::agent_service_server::AgentServiceServer;
use batchai_proto::agent::v1::join_service_server::JoinServiceServer;
use batchai_proto::internal::v1::copy_service_server::CopyServiceServer;
use batchai_proto::internal::v1::peer_service_server::PeerServiceServer;
use batchai_proto::internal::v1::relay_service_server::RelayServiceServer;
use batchai_proto::v1::access_service_server::AccessServiceServer;
use batchai_proto::v1::admin_service_server::AdminServiceServer;
use batchai_proto::v1::bundle_service_server::BundleServiceServer;
use batchai_proto::v1::cluster_service_server::ClusterServiceServer;
use batchai_proto::v1::exec_service_server::ExecServiceServer;
use batchai_proto::v1::experiment_service_server::ExperimentServiceServer;
use batchai_proto::v1::file_server_service_server::FileServerServiceServer;
use batchai_proto::v1::information_service_server::InformationServiceServer;
use batchai_proto::v1::job_service_server::JobServiceServer;
use batchai_proto::v1::node_service_server::NodeServiceServer;
use batchai_proto::v1::resource_group_service_server::ResourceGroupServiceServer;
use batchai_proto::v1::storage_alias_service_server::StorageAliasServiceServer;
use batchai_proto::v1::vm_size_service_server::VmSizeServiceServer;
use batchai_proto::v1::workspace_service_server::WorkspaceServiceServer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;

use crate::agents::contacts::Contacts;
use crate::agents::execs::ExecDesk;
use crate::agents::files::FileDesk;
use crate::agents::granting;
use crate::agents::join::Join;
use crate::agents::link::{self, Link, Uplink};
use crate::agents::relay::{Relay, Turns};
use crate::agents::service::Agents;
use crate::api::Api;
use crate::audit::Audit;
use crate::boot::{self, ServerError};
use crate::bundles::BundleStore;
use crate::config::{self, Config};
use crate::copies::{self, Copies, CopyDesk};
use crate::custody;
use crate::duties::Leader;
use crate::gate::Gate;
use crate::gate::quota::{Quota, Shares};
use crate::leader;
use crate::logs::{Limits, LogStore};
use crate::pki::{self, Pki};
use crate::replica::Handle;
use crate::replica::core::CoreError;
use crate::replica::peers::{Lanes, PEER_BYTES_MAX, PeerDesk, Peers};
use crate::replica::store::Snapshots;
use crate::secrets::Vault;

/// Agents are let go when no leader has answered for so many of the least time that an election waits: by then another one would lead.
const ALONE_ELECTIONS: u32 = 4;
/// And not before: a single connection that stalls takes so long to be given up.
const ALONE_LEAST: Duration = Duration::from_secs(4);
/// How long open calls may take to end when the coordinator does.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Calls that one connection may have open at once.
const CALLS_PER_CONNECTION_MAX: usize = 1024;
/// Calls and streams that one connection may have open at once.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// How long a new ensemble may take to get its name.
const NAMED_MAX: Duration = Duration::from_secs(10);
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// Runs until the token is cancelled; then hands over what it leads, and ends.
pub async fn run(config: Config, told: CancellationToken) -> Result<(), ServerError> {
    let shutdown = CancellationToken::new();
    let pki = open_pki(&config)?;
    raise_open_files();
    let _lock = boot::lock(&config.data)?;
    let logs = boot::in_data(&config, "logs", |path| {
        LogStore::new(path, log_limits(&config))
    })?;
    let bundles = boot::in_data(&config, "bundles", BundleStore::new)?;
    let audit = boot::in_data(&config, "audit", Audit::new)?;
    let new = !config.data.join("replica").exists();
    let vault = Vault::open(config::keys(config.secrets_key.as_ref(), &config.data), new)?;
    let started = boot::start_replica(&config)?;
    let replica = started.handle.clone();
    let bound = TcpListener::bind(config.listen).await;
    let listener = bound.map_err(|source| ServerError::Bind {
        address: config.listen,
        source,
    })?;
    let address = listener.local_addr()?;
    let (health, health_service) = tonic_health::server::health_reporter();
    let (contacts, desk) = Default::default();
    let (lanes, uplink, link) = ways(&config, &started, pki.as_ref(), &contacts, &desk);
    let shared = Shared {
        copies: copies_of(&started, pki.as_ref(), (&logs, &bundles)),
        peers: started.peers.clone(),
        replica: replica.clone(),
        contacts,
        uplink,
        logs,
        bundles,
        desk,
        audit,
        vault,
        shutdown: shutdown.clone(),
    };
    let mut tasks = shared.tasks(started.leader, lanes);
    tasks.push(tokio::spawn(link.run(shutdown.clone())));
    let farewell = farewell(replica.clone(), told, shutdown.clone());
    let report = report_health(health, replica.clone(), shutdown.clone());
    tasks.extend([tokio::spawn(farewell), tokio::spawn(report)]);
    let desk_of_peers = shared.desk_of_peers(started.snapshots);
    let (relay, copies) = (shared.relay(), shared.desk_of_copies());
    let connections = incoming(listener, pki.as_ref().map(Pki::server));
    let serve = shared
        .routes(pki.as_ref(), &config)?
        .add_service(desk_of_peers)
        .add_service(relay)
        .add_service(copies)
        .add_service(health_service)
        .serve_with_incoming_shutdown(connections, shutdown.clone().cancelled_owned());
    tasks.push(tokio::spawn(keep_fresh(pki, shutdown.clone())));
    let ready = tokio::spawn(ready(replica.clone(), address));
    let removed = started.peers.removed();
    let end = tokio::select! {
        end = until_drained(serve, started.running.failed, shutdown.clone()) => end,
        () = removed.cancelled() => Err(ServerError::Removed),
    };
    shutdown.cancel();
    ready.abort();
    replica.stop();
    end_all(tasks).await;
    // The directory's lock must outlive whoever writes into it. A panic was reported where it happened.
    let _ = tokio::task::spawn_blocking(move || started.running.thread.join()).await;
    end
}

/// The two ways to the other replicas: raft's messages go over lanes, what agents say goes up to the leader over the link.
fn ways(
    config: &Config,
    started: &boot::Started,
    pki: Option<&Pki>,
    contacts: &Contacts,
    desk: &FileDesk,
) -> (Lanes, Uplink, Link) {
    let lanes = Lanes {
        peers: started.peers.clone(),
        replica: started.handle.clone(),
        first: started.ensemble.first.clone(),
        credentials: pki.map(Pki::client),
    };
    let (uplink, link) = link::new(link::Parts {
        replica: started.handle.clone(),
        peers: started.peers.clone(),
        contacts: contacts.clone(),
        desk: desk.clone(),
        first: started.ensemble.first.clone(),
        credentials: pki.map(Pki::client),
        alone_after: ALONE_LEAST
            .max(Duration::from_millis(config.election_timeout) * ALONE_ELECTIONS),
    });
    (lanes, uplink, link)
}

/// What this replica shares with the others beside the log.
fn copies_of(
    started: &boot::Started,
    pki: Option<&Pki>,
    (logs, bundles): (&LogStore, &BundleStore),
) -> Copies {
    Copies::new(copies::Parts {
        replica: started.handle.clone(),
        peers: started.peers.clone(),
        first: started.ensemble.first.clone(),
        credentials: pki.map(Pki::client),
        logs: logs.clone(),
        bundles: bundles.clone(),
    })
}

async fn end_all(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the coordinator failed");
        }
    }
}

fn raise_open_files() {
    match limits::raise_open_files() {
        Ok((_, limit)) => tracing::info!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files cannot be raised"),
    }
}

fn log_limits(config: &Config) -> Limits {
    Limits {
        bytes: config.log_mib << 20,
        age_ms: config.log_age.map(|seconds| seconds.saturating_mul(1000)),
    }
}

/// Hands the leadership over before it goes, so that nobody has to miss this replica first.
async fn farewell(replica: Handle, told: CancellationToken, shutdown: CancellationToken) {
    tokio::select! {
        () = told.cancelled() => {}
        () = shutdown.cancelled() => return,
    }
    let leads = replica.role().borrow().leads;
    let others = replica.published().borrow().state.replicas.len() > 1;
    if leads && others {
        match replica.hand_over(None).await {
            Ok(()) => tracing::info!("another replica leads now"),
            Err(error) => tracing::warn!(%error, "nobody else leads yet"),
        }
    }
    shutdown.cancel();
}

async fn keep_fresh(pki: Option<Pki>, shutdown: CancellationToken) {
    if let Some(pki) = pki {
        pki.keep_fresh(shutdown).await;
    }
}

type Routes =
    tonic::transport::server::Router<tower::layer::util::Stack<Gate, tower::layer::util::Identity>>;

/// What services are made of.
struct Shared {
    copies: Copies,
    peers: Peers,
    replica: Handle,
    contacts: Contacts,
    uplink: Uplink,
    logs: LogStore,
    bundles: BundleStore,
    desk: FileDesk,
    audit: Audit,
    vault: Vault,
    shutdown: CancellationToken,
}

impl Shared {
    /// What goes on beside the calls, until shutdown.
    fn tasks(&self, leader: Leader, lanes: Lanes) -> Vec<JoinHandle<()>> {
        let duties = leader::run(
            self.replica.clone(),
            self.contacts.clone(),
            self.logs.clone(),
            self.bundles.clone(),
            self.vault.clone(),
            (leader, self.peers.clone()),
            self.shutdown.clone(),
        );
        let keys = custody::run(
            self.replica.clone(),
            self.contacts.clone(),
            self.vault.clone(),
            self.shutdown.clone(),
        );
        let leases = granting::run(
            self.replica.clone(),
            self.contacts.clone(),
            self.shutdown.clone(),
        );
        let lanes = lanes.run(self.shutdown.clone());
        vec![
            tokio::spawn(duties),
            tokio::spawn(keys),
            tokio::spawn(leases),
            tokio::spawn(lanes),
            tokio::spawn(self.copies.clone().run(self.shutdown.clone())),
        ]
    }

    fn desk_of_peers(
        &self,
        snapshots: Arc<Mutex<Box<dyn Snapshots>>>,
    ) -> PeerServiceServer<PeerDesk> {
        let desk = PeerDesk {
            peers: self.peers.clone(),
            replica: self.replica.clone(),
            snapshots,
            shutdown: self.shutdown.clone(),
        };
        PeerServiceServer::new(desk).max_decoding_message_size(PEER_BYTES_MAX)
    }

    fn desk_of_copies(&self) -> CopyServiceServer<CopyDesk> {
        let desk = CopyDesk::new(self.copies.clone(), self.shutdown.clone());
        CopyServiceServer::new(desk)
    }

    fn relay(&self) -> RelayServiceServer<Relay> {
        let relay = Relay {
            turns: Turns::default(),
            replica: self.replica.clone(),
            peers: self.peers.clone(),
            contacts: self.contacts.clone(),
            desk: self.desk.clone(),
            shutdown: self.shutdown.clone(),
        };
        RelayServiceServer::new(relay).max_decoding_message_size(PEER_BYTES_MAX)
    }

    fn routes(self, pki: Option<&Pki>, config: &Config) -> Result<Routes, ServerError> {
        let authority = pki.and_then(|pki| pki.authority.clone());
        let shares = Shares {
            rate: config.calls_per_second,
            open: config.calls_open,
        };
        let gate = Gate {
            replica: self.replica.clone(),
            admin: pki::admin(config).into(),
            lab: pki.is_none(),
            audit: self.audit.clone(),
            quota: Quota::new(shares),
            strangers: Quota::new(shares),
        };
        let join = Join {
            replica: self.replica.clone(),
            authority: authority.clone(),
        };
        let execs = ExecDesk::new(self.desk.clone());
        let api = Api {
            peers: self.peers,
            execs: execs.clone(),
            replica: self.replica.clone(),
            contacts: self.contacts.clone(),
            logs: self.logs.clone(),
            bundles: self.bundles,
            copies: self.copies.clone(),
            desk: self.desk.clone(),
            authority,
            audit: self.audit,
            vault: self.vault.clone(),
            shutdown: self.shutdown.clone(),
        };
        let agents = Agents {
            lease: Duration::from_secs(config.lease),
            execs,
            replica: self.replica,
            contacts: self.contacts,
            uplink: self.uplink,
            logs: self.logs,
            copies: self.copies,
            desk: self.desk,
            vault: self.vault,
            shutdown: self.shutdown,
        };
        routes(gate, api, agents, join)
    }
}

/// Certificates, or a loud word that there are none.
fn open_pki(config: &Config) -> Result<Option<Pki>, ServerError> {
    if let Some(admin) = &config.admin {
        batchai_common::tls::Identity::user(admin)?;
    }
    let pki = Pki::open(config)?;
    if pki.is_none() {
        tracing::warn!(
            "--insecure-lab: plain text, and everybody is an administrator; anyone who reaches {} runs commands on all nodes",
            config.listen
        );
    }
    Ok(pki)
}

fn routes(gate: Gate, api: Api, agents: Agents, join: Join) -> Result<Routes, ServerError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(batchai_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    macro_rules! limited {
        ($server:ident, $service:expr) => {
            $server::new($service).max_decoding_message_size(MESSAGE_BYTES_MAX)
        };
    }
    Ok(Server::builder()
        .timeout(CALL_TIMEOUT)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION_MAX)
        .max_concurrent_streams(Some(STREAMS_PER_CONNECTION_MAX))
        .layer(gate)
        .add_service(limited!(ResourceGroupServiceServer, api.clone()))
        .add_service(limited!(WorkspaceServiceServer, api.clone()))
        .add_service(limited!(ClusterServiceServer, api.clone()))
        .add_service(limited!(FileServerServiceServer, api.clone()))
        .add_service(limited!(ExecServiceServer, api.clone()))
        .add_service(limited!(ExperimentServiceServer, api.clone()))
        .add_service(limited!(BundleServiceServer, api.clone()))
        .add_service(limited!(StorageAliasServiceServer, api.clone()))
        .add_service(limited!(VmSizeServiceServer, api.clone()))
        .add_service(limited!(InformationServiceServer, api.clone()))
        .add_service(limited!(NodeServiceServer, api.clone()))
        .add_service(limited!(AccessServiceServer, api.clone()))
        .add_service(limited!(AdminServiceServer, api.clone()))
        .add_service(limited!(JobServiceServer, api))
        .add_service(limited!(AgentServiceServer, agents))
        .add_service(limited!(JoinServiceServer, join))
        // Current clients ask by v1, older ones only by v1alpha.
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?))
}

/// Whoever started this process learns where it listens, and that it does.
fn announce(address: SocketAddr) -> io::Result<()> {
    tracing::info!(%address, "listening");
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "ready {address}")?;
    stdout.flush()
}

async fn until_drained(
    serve: impl Future<Output = Result<(), tonic::transport::Error>>,
    failed: oneshot::Receiver<CoreError>,
    shutdown: CancellationToken,
) -> Result<(), ServerError> {
    let patience = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_MAX).await;
    };
    tokio::select! {
        served = serve => Ok(served?),
        () = patience => {
            tracing::warn!("calls were still open when the time to drain was over");
            Ok(())
        }
        ended = failed => Err(ended.map_or(ServerError::ReplicaPanicked, Into::into)),
    }
}

/// Nobody is called to an ensemble without a name, if this replica can give it one soon; where it cannot, because it is not
/// alone and there is no leader yet, calls are answered UNAVAILABLE until there is. It serves its peers from the first.
async fn ready(replica: Handle, address: SocketAddr) {
    let mut published = replica.published();
    let named = published.wait_for(|published| !published.state.ensemble.is_empty());
    // Where the replica ends first, that is said elsewhere.
    let _ = tokio::time::timeout(NAMED_MAX, named).await;
    if let Err(error) = announce(address) {
        tracing::warn!(%error, "nobody reads that this coordinator is ready");
    }
}

/// "" says that the process serves; the name of a service, that the service can do its work here and now.
async fn report_health(health: HealthReporter, replica: Handle, shutdown: CancellationToken) {
    let mut published = replica.role();
    loop {
        let known = published.borrow_and_update().leader.is_some();
        match known {
            true => health.set_serving::<JobServiceServer<Api>>().await,
            false => health.set_not_serving::<JobServiceServer<Api>>().await,
        }
        let changed = async {
            while published.changed().await.is_ok() {
                if published.borrow_and_update().leader.is_some() != known {
                    return true;
                }
            }
            false
        };
        tokio::select! {
            true = changed => continue,
            () = shutdown.cancelled() => {}
        }
        health.set_not_serving::<JobServiceServer<Api>>().await;
        health
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        return;
    }
}
