//! A coordinator from its configuration to its end: storage, replica, servers, signal, drain.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use batchai_common::limits;
use batchai_common::limits::{
    CALL_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX,
};
use batchai_common::tls::acceptor::incoming;
use batchai_proto::agent::v1::agent_service_server::AgentServiceServer;
use batchai_proto::agent::v1::join_service_server::JoinServiceServer;
use batchai_proto::internal::v1::ReplicaIdentity;
use batchai_proto::v1::access_service_server::AccessServiceServer;
use batchai_proto::v1::bundle_service_server::BundleServiceServer;
use batchai_proto::v1::cluster_service_server::ClusterServiceServer;
use batchai_proto::v1::experiment_service_server::ExperimentServiceServer;
use batchai_proto::v1::file_server_service_server::FileServerServiceServer;
use batchai_proto::v1::information_service_server::InformationServiceServer;
use batchai_proto::v1::job_service_server::JobServiceServer;
use batchai_proto::v1::node_service_server::NodeServiceServer;
use batchai_proto::v1::resource_group_service_server::ResourceGroupServiceServer;
use batchai_proto::v1::vm_size_service_server::VmSizeServiceServer;
use batchai_proto::v1::workspace_service_server::WorkspaceServiceServer;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;

use crate::agents::contacts::Contacts;
use crate::agents::files::FileDesk;
use crate::agents::join::Join;
use crate::agents::service::Agents;
use crate::api::Api;
use crate::audit::Audit;
use crate::bundles::BundleStore;
use crate::config::{self, Config};
use crate::custody;
use crate::duties::Leader;
use crate::gate::Gate;
use crate::gate::quota::{Quota, Shares};
use crate::leader;
use crate::logs::LogStore;
use crate::pki::{self, FIRST_REPLICA, Pki, PkiError};
use crate::replica::core::{Core, CoreError, SnapshotPolicy};
use crate::replica::store::disk::DiskStore;
use crate::replica::store::{FORMAT, StoreError};
use crate::replica::{self, Handle, Running};
use crate::secrets::{KeyringError, Vault};

/// How long open calls may take to end when the coordinator does.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Calls that one connection may have open at once.
const CALLS_PER_CONNECTION_MAX: usize = 1024;
/// Calls and streams that one connection may have open at once.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// How long a new ensemble may take to get its name.
const NAMED_MAX: Duration = Duration::from_secs(10);
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// Why a coordinator does not start or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("--admin: {0}")]
    Admin(#[from] batchai_common::tls::IdentityError),
    #[error("cannot listen on {address}: {source}")]
    Bind {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("{path}: {source}", path = .path.display())]
    Data { path: PathBuf, source: io::Error },
    #[error("{path}: another coordinator uses this data directory", path = .path.display())]
    Locked { path: PathBuf },
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Replica(#[from] CoreError),
    #[error("the replica's thread panicked; its last words are in the log above")]
    ReplicaPanicked,
    #[error("serving failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("{0}")]
    System(#[from] io::Error),
}

/// Runs until the token is cancelled.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), ServerError> {
    let pki = open_pki(&config)?;
    match limits::raise_open_files() {
        Ok((_, limit)) => tracing::info!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files cannot be raised"),
    }
    let _lock = lock(&config.data)?;
    let logs = in_data(&config, "logs", LogStore::new)?;
    let bundles = in_data(&config, "bundles", BundleStore::new)?;
    let audit = in_data(&config, "audit", Audit::new)?;
    let new = !config.data.join("replica").exists();
    let vault = Vault::open(config::keys(config.secrets_key.as_ref(), &config.data), new)?;
    let (replica, running, leader) = start_replica(&config)?;
    let mut failed = running.failed;
    let bound = TcpListener::bind(config.listen).await;
    let listener = bound.map_err(|source| ServerError::Bind {
        address: config.listen,
        source,
    })?;
    let address = listener.local_addr()?;
    let (contacts, desk) = (Contacts::default(), FileDesk::default());
    let (health, health_service) = tonic_health::server::health_reporter();
    let duties = tokio::spawn(leader::run(
        replica.clone(),
        contacts.clone(),
        logs.clone(),
        bundles.clone(),
        vault.clone(),
        leader,
        shutdown.clone(),
    ));
    let keys = tokio::spawn(custody::run(
        replica.clone(),
        contacts.clone(),
        vault.clone(),
        shutdown.clone(),
    ));
    let watch = tokio::spawn(report_health(health, replica.clone(), shutdown.clone()));
    let shared = Shared {
        replica: replica.clone(),
        contacts,
        logs,
        bundles,
        desk,
        audit,
        vault,
        shutdown: shutdown.clone(),
    };
    let connections = incoming(listener, pki.as_ref().map(Pki::server));
    let serve = shared
        .routes(pki.as_ref(), &config)?
        .add_service(health_service)
        .serve_with_incoming_shutdown(connections, shutdown.clone().cancelled_owned());
    let fresh = tokio::spawn(keep_fresh(pki, shutdown.clone()));
    until_named(&replica, &mut failed, &shutdown).await?;
    announce(address)?;
    let end = until_drained(serve, failed, shutdown.clone()).await;
    shutdown.cancel();
    replica.stop();
    for task in [duties, keys, watch, fresh] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the coordinator failed");
        }
    }
    // The directory's lock must outlive whoever writes into it. A panic was reported where it happened.
    let _ = tokio::task::spawn_blocking(move || running.thread.join()).await;
    end
}

/// Opens what lies in a directory of the data directory.
fn in_data<T>(
    config: &Config,
    name: &str,
    open: impl FnOnce(PathBuf) -> io::Result<T>,
) -> Result<T, ServerError> {
    let path = config.data.join(name);
    open(path.clone()).map_err(|source| ServerError::Data { path, source })
}

/// One process per data directory. The lock goes with the process.
fn lock(data: &PathBuf) -> Result<Flock<File>, ServerError> {
    let failed = |source| ServerError::Data {
        path: data.clone(),
        source,
    };
    let data = &std::path::absolute(data).map_err(failed)?;
    let new = data.ancestors().take_while(|dir| !dir.exists()).count();
    fs::create_dir_all(data).map_err(failed)?;
    // The way to a new directory must survive a power cut as what is written into it does.
    for dir in data.ancestors().skip(1).take(new) {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed)?;
    }
    // Environments of jobs, logs and keys: nobody else's business.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(data, private).map_err(failed)?;
    let file = File::create(data.join("lock")).map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => ServerError::Locked { path: data.clone() },
        error => failed(error.into()),
    })
}

type Started = (Handle, Running, Leader);

fn start_replica(config: &Config) -> Result<Started, ServerError> {
    let new = ReplicaIdentity {
        format: FORMAT,
        ensemble: uuid::Uuid::new_v4().to_string(),
        replica_id: FIRST_REPLICA,
        voters: vec![FIRST_REPLICA],
    };
    let (store, recovered) = DiskStore::open(&config.data.join("replica"), &new)?;
    let leader = Leader {
        replica: recovered.identity.replica_id as i64,
        ensemble: recovered.identity.ensemble.clone(),
    };
    tracing::info!(
        ensemble = leader.ensemble,
        replica = leader.replica,
        snapshot = recovered
            .snapshot
            .as_ref()
            .map_or(0, |(mark, _)| mark.index),
        entries = recovered.entries.len(),
        "log opened"
    );
    let life = uuid::Uuid::new_v4().as_u64_pair().0;
    let policy = SnapshotPolicy {
        entries: config.snapshot_entries,
        kept: SnapshotPolicy::default().kept.min(config.snapshot_entries),
        ..SnapshotPolicy::default()
    };
    let core = Core::new(store, recovered, life, policy)?;
    let (handle, running) = replica::start(core)?;
    Ok((handle, running, leader))
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
    replica: Handle,
    contacts: Contacts,
    logs: LogStore,
    bundles: BundleStore,
    desk: FileDesk,
    audit: Audit,
    vault: Vault,
    shutdown: CancellationToken,
}

impl Shared {
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
        let api = Api {
            replica: self.replica.clone(),
            contacts: self.contacts.clone(),
            logs: self.logs.clone(),
            bundles: self.bundles.clone(),
            desk: self.desk.clone(),
            authority,
            audit: self.audit,
            vault: self.vault.clone(),
            shutdown: self.shutdown.clone(),
        };
        let agents = Agents {
            replica: self.replica,
            contacts: self.contacts,
            logs: self.logs,
            bundles: self.bundles,
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
        .add_service(limited!(ExperimentServiceServer, api.clone()))
        .add_service(limited!(BundleServiceServer, api.clone()))
        .add_service(limited!(VmSizeServiceServer, api.clone()))
        .add_service(limited!(InformationServiceServer, api.clone()))
        .add_service(limited!(NodeServiceServer, api.clone()))
        .add_service(limited!(AccessServiceServer, api.clone()))
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

/// Nobody meets an ensemble without a name, if this replica can give it one soon; where it cannot, because it is not
/// alone and there is no leader yet, calls are answered UNAVAILABLE until there is.
async fn until_named(
    replica: &Handle,
    failed: &mut oneshot::Receiver<CoreError>,
    shutdown: &CancellationToken,
) -> Result<(), ServerError> {
    let mut published = replica.published();
    let named = published.wait_for(|published| !published.state.ensemble.is_empty());
    tokio::select! {
        _ = tokio::time::timeout(NAMED_MAX, named) => Ok(()),
        () = shutdown.cancelled() => Ok(()),
        ended = failed => Err(ended.map_or(ServerError::ReplicaPanicked, Into::into)),
    }
}

/// "" says that the process serves; the name of a service, that the service can do its work here and now.
async fn report_health(health: HealthReporter, replica: Handle, shutdown: CancellationToken) {
    let mut published = replica.published();
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
