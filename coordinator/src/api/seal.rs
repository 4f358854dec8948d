//! Seals what is secret in new resources before it becomes a command.

use batchai_common::error::ApiError;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{DataKey, PutDataKey};
use batchai_proto::secrets::{self, Place};
use batchai_proto::v1::{Cluster, CreateClusterRequest, CreateJobRequest, Job};

use super::faults::Once;
use super::{Api, internal};
use crate::replica::ReplicaError;
use crate::state::keys::{self, workspace_of};
use crate::state::{Rejection, State};

/// How often a key is looked for that others may be making at the same time.
const TRIES_MAX: usize = 3;

impl Api {
    /// Seals the secrets of a new job.
    pub(super) async fn seal_job(&self, job: &mut Job, once: &Once) -> Result<(), ApiError> {
        let (name, uid) = (job.name.clone(), job.uid.clone());
        self.seal(&name, &uid, secrets::of_job(job), once).await
    }

    /// Seals the secrets of a new cluster.
    pub(super) async fn seal_cluster(
        &self,
        cluster: &mut Cluster,
        once: &Once,
    ) -> Result<(), ApiError> {
        let (name, uid) = (cluster.name.clone(), cluster.uid.clone());
        let places = secrets::of_cluster(cluster);
        self.seal(&name, &uid, places, once).await
    }

    async fn seal(
        &self,
        name: &str,
        uid: &str,
        places: Vec<Place<'_>>,
        once: &Once,
    ) -> Result<(), ApiError> {
        let secret = |(_, value): &Place<'_>| !value.is_empty();
        if !places.iter().any(secret) {
            return Ok(());
        }
        let workspace = workspace_of(name);
        // What is only tried is not kept; what lies nowhere will be refused.
        let tried = once.validate_only;
        if tried || !self.read().await?.workspaces.contains_key(workspace) {
            secrets::blank(places);
            return Ok(());
        }
        let key = self.data_key(workspace).await?;
        let sealed = self.vault.seal((workspace, &key), uid, places);
        sealed.map_err(|error| ApiError::WrongState {
            name: workspace.to_owned(),
            why: error.to_string(),
        })
    }

    /// The key that seals the secrets of a workspace now; one is made where there is none.
    async fn data_key(&self, workspace: &str) -> Result<DataKey, ApiError> {
        for _ in 0..TRIES_MAX {
            let state = self.read().await?;
            if let Some(key) = keys::current(&state, workspace) {
                return Ok(key.clone());
            }
            self.rotate(&state, workspace).await?;
        }
        Err(internal("a data key was made and is not there"))
    }

    /// Makes another key, which seals from now on; somebody else's that came first is as good.
    pub(super) async fn rotate(&self, state: &State, workspace: &str) -> Result<(), ApiError> {
        let follows = keys::current(state, workspace).map(|key| key.id.clone());
        let put = PutDataKey {
            workspace: workspace.to_owned(),
            key: Some(self.vault.draw(workspace)),
            follows: follows.unwrap_or_default(),
        };
        match self.replica.propose(Kind::PutDataKey(put)).await {
            Ok(_) | Err(ReplicaError::Rejected(Rejection::Overtaken { .. })) => Ok(()),
            Err(error) => Err(self.error(error)),
        }
    }
}

/// A request without what is secret in it: what is remembered of it must not tell.
pub fn without_secrets(request: &CreateJobRequest) -> CreateJobRequest {
    let mut request = request.clone();
    if let Some(job) = &mut request.job {
        secrets::blank(secrets::of_job(job));
    }
    request
}

/// The same of a cluster's.
pub fn cluster_without_secrets(request: &CreateClusterRequest) -> CreateClusterRequest {
    let mut request = request.clone();
    if let Some(cluster) = &mut request.cluster {
        secrets::blank(secrets::of_cluster(cluster));
    }
    request
}
