//! What a coordinator does before it serves: its data directory, its store, its replica.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use batchai_common::tls::CredentialsError;
use batchai_common::tls::credentials::write_private;
use batchai_proto::internal::v1::{PeerHello, ReplicaIdentity};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::config::Config;
use crate::duties::Leader;
use crate::ensemble::{Ensemble, EnsembleError};
use crate::pki::PkiError;
use crate::replica::core::{Core, CoreError, SnapshotPolicy};
use crate::replica::peers::Peers;
use crate::replica::store::disk::DiskStore;
use crate::replica::store::{FORMAT, Recovered, Snapshots, StoreError};
use crate::replica::{self, Handle, Running};
use crate::secrets::KeyringError;
use crate::state::agreement::FEATURE_LEVEL;

/// Says which store this data directory has had: beside it, so that it does not go with it.
pub const BEGUN: &str = "begun";

/// A store that is being made of a backup, before it is moved to its place.
pub const RESTORED: &str = "restored";

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
    Ensemble(#[from] EnsembleError),
    #[error(
        "{path}: the log in it is of replica {found}, and its ensemble.json says that this is replica {told}; they must not be mixed",
        path = .path.display()
    )]
    OtherReplica {
        path: PathBuf,
        told: u64,
        found: u64,
    },
    #[error(
        "{path}: the log in it is of ensemble {found}, and its ensemble.json says that this is ensemble {told}; they must not be mixed",
        path = .path.display()
    )]
    OtherEnsemble {
        path: PathBuf,
        told: String,
        found: String,
    },
    #[error(
        "the ensemble has removed this replica; to have it back, join under a new id with an empty data directory"
    )]
    Removed,
    #[error(
        "{path}: the store that this replica had is not there, and what it promised with it. Bring it back from where it is; or \
         remove this replica, and have it join under a new id with an empty data directory. One that is alone and is to begin \
         anew takes an empty data directory as well",
        path = .path.display()
    )]
    Gone { path: PathBuf },
    #[error(
        "{path}: a restore from a backup was cut off: run it again",
        path = .path.display()
    )]
    CutOff { path: PathBuf },
    #[error(transparent)]
    Mark(#[from] CredentialsError),
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

/// Opens what lies in a directory of the data directory.
pub fn in_data<T>(
    config: &Config,
    name: &str,
    open: impl FnOnce(PathBuf) -> io::Result<T>,
) -> Result<T, ServerError> {
    let path = config.data.join(name);
    open(path.clone()).map_err(|source| ServerError::Data { path, source })
}

/// One process per data directory. The lock goes with the process.
pub fn lock(data: &PathBuf) -> Result<Flock<File>, ServerError> {
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

/// A replica that runs, and what belongs to it.
pub struct Started {
    pub handle: Handle,
    pub running: Running,
    pub leader: Leader,
    pub peers: Peers,
    pub snapshots: Arc<Mutex<Box<dyn Snapshots>>>,
    pub ensemble: Ensemble,
}

/// Opens the store, or makes one where there never was one.
fn open_store(config: &Config, ensemble: &Ensemble) -> Result<(DiskStore, Recovered), ServerError> {
    let new = ReplicaIdentity {
        format: FORMAT,
        ensemble: ensemble.uuid.clone(),
        replica_id: ensemble.replica,
        voters: ensemble.voters(),
        store: uuid::Uuid::new_v4().to_string(),
    };
    let (path, begun) = (config.data.join("replica"), config.data.join(BEGUN));
    let known = match fs::read_to_string(&begun) {
        Ok(store) => Some(store),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => {
            return Err(ServerError::Data {
                path: begun,
                source,
            });
        }
    };
    let restored = config.data.join(RESTORED);
    if !path.exists() && restored.exists() {
        return Err(ServerError::CutOff { path: restored });
    }
    if known.is_some() && !path.exists() {
        return Err(ServerError::Gone { path });
    }
    let meant = |found: &ReplicaIdentity| is_meant(config, ensemble, known.as_deref(), found);
    let (store, recovered) = DiskStore::open_if(&path, &new, meant)?;
    if known.is_none() {
        write_private(&begun, &recovered.identity.store)?;
    }
    Ok((store, recovered))
}

/// Whether a store is the one that this data directory had, of the replica and the ensemble that it is told to be.
fn is_meant(
    config: &Config,
    told: &Ensemble,
    known: Option<&str>,
    found: &ReplicaIdentity,
) -> Result<(), ServerError> {
    let path = config.data.clone();
    if known.is_some_and(|store| store != found.store) {
        return Err(ServerError::Gone {
            path: path.join("replica"),
        });
    }
    if found.replica_id != told.replica {
        return Err(ServerError::OtherReplica {
            path,
            told: told.replica,
            found: found.replica_id,
        });
    }
    if Ensemble::is_told(&config.data) && found.ensemble != told.uuid {
        return Err(ServerError::OtherEnsemble {
            path,
            told: told.uuid.clone(),
            found: found.ensemble.clone(),
        });
    }
    Ok(())
}

/// Starts the replica whose store lies in the data directory, or a new one.
pub fn start_replica(config: &Config) -> Result<Started, ServerError> {
    let ensemble = Ensemble::read(&config.data)?;
    let (store, recovered) = open_store(config, &ensemble)?;
    let identity = &recovered.identity;
    let leader = Leader {
        replica: identity.replica_id as i64,
        ensemble: identity.ensemble.clone(),
        replicas: ensemble.replicas(),
        lease_ms: config.lease as i64 * 1000,
    };
    let endpoint = config.advertise.clone();
    let first = ensemble.first.get(&identity.replica_id).cloned();
    let peers = Peers::new(PeerHello {
        ensemble: identity.ensemble.clone(),
        from: identity.replica_id,
        to: 0,
        store: identity.store.clone(),
        endpoint: endpoint.or(first).unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        feature_level: FEATURE_LEVEL,
        epoch: 0,
    });
    let snapshot = recovered.snapshot.as_ref();
    tracing::info!(
        ensemble = leader.ensemble,
        replica = leader.replica,
        snapshot = snapshot.map_or(0, |(mark, _)| mark.index),
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
    let snapshots = Arc::new(Mutex::new(core.snapshots()));
    let election = Duration::from_millis(config.election_timeout);
    let (handle, running) = replica::start(core, peers.clone(), election)?;
    Ok(Started {
        handle,
        running,
        leader,
        peers,
        snapshots,
        ensemble,
    })
}
