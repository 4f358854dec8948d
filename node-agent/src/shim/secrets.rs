//! The way of a job's secrets from the agent into the environment of its processes, and to what mounts its volumes.
//!
//! A shim gets them once, when it starts, and lives as long as the attempt does: an agent that comes later has none to give.

use std::collections::BTreeMap;

use batchai_proto::agent::v1::Assignment;
use serde::{Deserialize, Serialize};

use crate::launch::{Keys, keys};

/// Values by the names of their variables.
pub type Secrets = BTreeMap<String, String>;

/// What a shim gets.
#[derive(Default, Serialize, Deserialize)]
pub struct Handed {
    /// For the processes of the job.
    pub variables: Secrets,
    /// For what mounts its volumes, and for nobody else.
    pub keys: Keys,
    /// Of the registry that the job's image is pulled from: no process of the job gets it.
    #[serde(default)]
    pub password: Option<String>,
}

/// The secrets of an assignment's work.
pub fn of(assignment: &Assignment) -> Handed {
    let secrets = assignment.job.iter().flat_map(|job| &job.secrets);
    let volumes = assignment.job.as_ref();
    Handed {
        variables: secrets
            .map(|secret| (secret.name.clone(), secret.value.clone()))
            .collect(),
        keys: keys(volumes.and_then(|job| job.mount_volumes.as_ref())),
        password: registry_password(assignment),
    }
}

fn registry_password(assignment: &Assignment) -> Option<String> {
    let container = assignment.job.as_ref()?.container_settings.as_ref()?;
    let registry = container.image_source_registry.as_ref()?;
    Some(registry.credentials.as_ref()?.password.clone())
}
