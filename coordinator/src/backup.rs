//! Backups as files: what is in one, and how a replica begins anew from it, alone, while no coordinator runs.
//!
//! A backup is a snapshot of the State, as a replica sent it. Certificates, the keys of secrets, job logs and bundles are not in
//! it: they lie in data directories. A restore makes an ensemble of one replica with a new epoch; others join it later under new ids.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use batchai_common::tls::credentials::write_private;
use batchai_common::{names, time};
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{LogBegin, Replica, ReplicaIdentity, SnapshotMark};
use prost_types::Timestamp;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, HardState};

use crate::boot::{self, BEGUN, RESTORED, ServerError};
use crate::ensemble::Ensemble;
use crate::replica::store::disk::DiskStore;
use crate::replica::store::{FORMAT, LogStore, StoreError, snapshot};
use crate::state::digest::Digest;
use crate::state::{State, invariants, restore};

/// The term in which a restored log begins.
const TERM: u64 = 1;
/// Epochs count seconds from here on, 2020-01-01: so two restores of one backup have different ones.
const EPOCHS_BEGIN: Duration = Duration::from_secs(1_577_836_800);

/// Why a backup is of no use, or not here.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{path}: {why}", path = .path.display())]
    Backup { path: PathBuf, why: String },
    #[error(
        "{path}: a replica's log is there, and a restore does not overwrite it: stop the coordinator and set it aside, e.g. mv {path} {path}.old",
        path = .path.display()
    )]
    Exists { path: PathBuf },
    #[error(
        "{path}: it is no data directory of a coordinator: take that of a replica, or make one with `batchai coordinator init --data {path}`",
        path = .path.display()
    )]
    NoDirectory { path: PathBuf },
    #[error(
        "{path}: it was the directory of ensemble {own}, and the backup is of {other}: take the directory of a replica of that one, or a new \
         one that `coordinator init` made",
        path = .path.display()
    )]
    OtherEnsemble {
        path: PathBuf,
        own: String,
        other: String,
    },
    #[error("{path}: {source}", path = .path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Directory(#[from] Box<ServerError>),
}

impl<E: Into<ServerError>> From<E> for BackupError {
    fn from(error: E) -> BackupError {
        BackupError::Directory(Box::new(error.into()))
    }
}

/// What is in a backup.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub ensemble: String,
    pub epoch: i64,
    pub revision: i64,
    /// Of the last change.
    pub time: Timestamp,
    /// Of all that is in it, in hexadecimal: two backups with the same one are the same.
    pub hash: String,
    pub workspaces: usize,
    pub clusters: usize,
    pub nodes: usize,
    pub jobs: usize,
}

fn summary(state: &State) -> Summary {
    Summary {
        ensemble: state.ensemble.clone(),
        epoch: state.epoch,
        revision: state.revision,
        time: state.time,
        hash: names::hex(&Digest::of(state).bytes()),
        workspaces: state.workspaces.len(),
        clusters: state.clusters.len(),
        nodes: state.nodes.len(),
        jobs: state.jobs.len(),
    }
}

/// Reads all of a backup and checks all that must hold of it.
///
/// # Errors
/// It is damaged, of another version, or no backup.
pub fn verify(file: &Path) -> Result<Summary, BackupError> {
    Ok(summary(&read(file)?.1))
}

fn read(file: &Path) -> Result<(SnapshotMark, State), BackupError> {
    let bad = |why: String| BackupError::Backup {
        path: file.to_owned(),
        why,
    };
    let (mark, state) = snapshot::read(file).map_err(bad)?;
    invariants::check(&state)
        .map_err(|why| bad(format!("it breaks a rule of every State: {why}")))?;
    match state.ensemble.is_empty() || mark.index == 0 {
        true => Err(bad("it is of an ensemble that had no name yet".to_owned())),
        false => Ok((mark, state)),
    }
}

/// Makes the store of a data directory from a backup; returns what the ensemble begins with.
///
/// # Errors
/// The directory has a store, or is another ensemble's; or the backup is of no use. The directory is as before then.
pub fn begin_anew(data: &Path, file: &Path) -> Result<Summary, BackupError> {
    let data = &data.to_path_buf();
    if !Ensemble::is_told(data) {
        return Err(BackupError::NoDirectory { path: data.clone() });
    }
    let _lock = boot::lock(data)?;
    let store = data.join("replica");
    if store.exists() {
        return Err(BackupError::Exists { path: store });
    }
    let (mark, state) = read(file)?;
    let told = Ensemble::read(data)?;
    let served = data.join(BEGUN).exists();
    if served && told.uuid != state.ensemble {
        return Err(BackupError::OtherEnsemble {
            path: data.clone(),
            own: told.uuid,
            other: state.ensemble,
        });
    }
    let endpoint = told.first.get(&told.replica).cloned().unwrap_or_default();
    let own = Replica {
        id: told.replica,
        role: Role::Voter as i32,
        endpoint: endpoint.clone(),
        ..Replica::default()
    };
    let epoch = next_epoch(&state).map_err(|why| BackupError::Backup {
        path: file.to_owned(),
        why,
    })?;
    let state = restore::restored(state, epoch, own);
    let identity = ReplicaIdentity {
        format: FORMAT,
        ensemble: state.ensemble.clone(),
        replica_id: told.replica,
        voters: vec![told.replica],
        store: uuid::Uuid::new_v4().to_string(),
    };
    let alone = Ensemble {
        uuid: state.ensemble.clone(),
        first: [(told.replica, endpoint)].into(),
        ..told
    };
    let new = data.join(RESTORED);
    make_store(&new, &identity, mark.index, &state)?;
    // From here on the directory serves the restored State or nothing.
    alone.write(data)?;
    write_private(&data.join(BEGUN), &identity.store)?;
    let moved = fs::rename(&new, &store).and_then(|()| fs::File::open(data)?.sync_all());
    moved.map_err(|source| BackupError::Io {
        path: store,
        source,
    })?;
    Ok(summary(&state))
}

/// Later than the backup's, and another one at every restore.
fn next_epoch(state: &State) -> Result<i64, String> {
    let now = time::now().seconds;
    let epoch = now - EPOCHS_BEGIN.as_secs() as i64;
    match now >= state.time.seconds && epoch > state.epoch {
        true => Ok(epoch),
        false => Err("it is of later than now, by this machine's clock: set the clock".to_owned()),
    }
}

/// Makes a store that begins with a State.
fn make_store(
    path: &Path,
    identity: &ReplicaIdentity,
    index: u64,
    state: &State,
) -> Result<(), BackupError> {
    if path.exists() {
        // One that was cut off.
        fs::remove_dir_all(path).map_err(|source| BackupError::Io {
            path: path.to_owned(),
            source,
        })?;
    }
    let (mut store, _) = DiskStore::open(path, identity)?;
    begin_with(&mut store, identity.replica_id, index, state)?;
    drop(store);
    // As the coordinator will read it.
    DiskStore::open(path, identity)?;
    Ok(())
}

/// Has an empty store begin with a State as of an index, for a replica that is alone.
///
/// # Errors
/// It cannot be written.
pub fn begin_with(
    store: &mut impl LogStore,
    replica: u64,
    index: u64,
    state: &State,
) -> Result<(), StoreError> {
    let voters = ConfState::from((vec![replica], vec![]));
    let conf_state = voters.write_to_bytes();
    let mark = SnapshotMark {
        index,
        term: TERM,
        conf_state: conf_state.expect("what is in memory can be encoded"),
    };
    store.snapshots().write(&mark, state)?;
    store.install(&mark, LogBegin { index, term: TERM })?;
    let hard_state = HardState {
        term: TERM,
        commit: index,
        ..HardState::default()
    };
    store.append(&[], Some(&hard_state))
}

/// What a person is told of a backup.
impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (nodes, jobs) = (self.nodes, self.jobs);
        write!(
            f,
            "ensemble {}, epoch {}, revision {} of {}, hash {}: {} workspaces, {} clusters, {nodes} nodes, {jobs} jobs",
            self.ensemble,
            self.epoch,
            self.revision,
            self.time,
            self.hash,
            self.workspaces,
            self.clusters,
        )
    }
}
