//! Seals what is secret in new resources before it becomes a command.

use batchai_common::error::ApiError;
use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{DataKey, PutDataKey};
use batchai_proto::secrets::{self, Place};
use batchai_proto::v1::{
    Cluster, CreateClusterRequest, CreateFileServerRequest, CreateJobRequest, Job,
};

use super::faults::Once;
use super::{Api, internal};
use crate::replica::ReplicaError;
use crate::state::keys::{self, workspace_of};
use crate::state::{Rejection, State};

/// How often a key is looked for that others may be making at the same time.
const TRIES_MAX: usize = 3;

impl Api {
    /// Seals the secrets of new jobs of one workspace.
    pub(super) async fn seal_jobs(&self, jobs: &mut [Job], once: &Once) -> Result<(), ApiError> {
        let workspace = jobs.first().map(|job| workspace_of(&job.name).to_owned());
        let resources = jobs.iter_mut().map(|job| {
            let uid = job.uid.clone();
            (uid, secrets::of_job(job))
        });
        self.seal(workspace, resources.collect(), once).await
    }

    /// Seals the secrets of a new cluster.
    pub(super) async fn seal_cluster(
        &self,
        cluster: &mut Cluster,
        once: &Once,
    ) -> Result<(), ApiError> {
        let (workspace, uid) = (workspace_of(&cluster.name).to_owned(), cluster.uid.clone());
        let resource = (uid, secrets::of_cluster(cluster));
        self.seal(Some(workspace), vec![resource], once).await
    }

    /// Seals the secrets of resources of a workspace, each with its UUID.
    async fn seal(
        &self,
        workspace: Option<String>,
        resources: Vec<(String, Vec<Place<'_>>)>,
        once: &Once,
    ) -> Result<(), ApiError> {
        let mut places = resources.iter().flat_map(|(_, places)| places);
        let secret = places.any(|(_, value)| !value.is_empty());
        let Some(workspace) = workspace.filter(|_| secret) else {
            return Ok(());
        };
        // What is only tried is not kept.
        if once.validate_only {
            resources
                .into_iter()
                .for_each(|(_, places)| secrets::blank(places));
            return Ok(());
        }
        let key = self.data_key(&workspace).await?;
        for (uid, places) in resources {
            let sealed = self.vault.seal((&workspace, &key), &uid, places);
            sealed.map_err(|error| ApiError::WrongState {
                name: workspace.clone(),
                why: error.to_string(),
            })?;
        }
        Ok(())
    }

    /// The key that seals the secrets of a workspace now; one is made where there is none.
    async fn data_key(&self, workspace: &str) -> Result<DataKey, ApiError> {
        for _ in 0..TRIES_MAX {
            let state = self.read().await?;
            if !state.workspaces.contains_key(workspace) {
                return Err(ApiError::NotFound {
                    kind: Noun::Workspace,
                    name: workspace.to_owned(),
                });
            }
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

/// The same of a file server's, whose password is not even kept.
pub fn file_server_without_secrets(request: &CreateFileServerRequest) -> CreateFileServerRequest {
    let mut request = request.clone();
    let server = request.file_server.as_mut();
    let ssh = server.and_then(|server| server.ssh_configuration.as_mut());
    if let Some(account) = ssh.and_then(|ssh| ssh.user_account_settings.as_mut()) {
        account.admin_user_password.clear();
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
