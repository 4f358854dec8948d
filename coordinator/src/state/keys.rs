//! PURE. Data keys of workspaces, wrapped: by them secrets are sealed. Nothing is sealed or opened here.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use batchai_common::names::Kind;
use batchai_proto::internal::v1::{DataKey, PutDataKey};
use batchai_proto::secrets;
use batchai_proto::v1;

use super::tables::behind;
use super::{Rejection, State, Step, check_stays, not_found};

/// What every sealed secret begins with.
const PREFIX: &str = "sealed";

/// Data keys of one workspace: each of its secrets is looked for among them.
const KEYS_MAX: usize = 32;

/// A secret as it lies in the State, in the place of its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The id of the data key that sealed it.
    pub key: String,
    pub bytes: Vec<u8>,
}

impl fmt::Display for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = BASE64_URL_SAFE_NO_PAD.encode(&self.bytes);
        write!(f, "{PREFIX}.{}.{bytes}", self.key)
    }
}

impl Sealed {
    /// Reads one.
    pub fn parse(text: &str) -> Option<Sealed> {
        let (key, bytes) = text
            .strip_prefix(PREFIX)?
            .strip_prefix('.')?
            .split_once('.')?;
        Some(Sealed {
            key: key.to_owned(),
            bytes: BASE64_URL_SAFE_NO_PAD.decode(bytes).ok()?,
        })
    }
}

/// The workspace that a name lies in.
pub fn workspace_of(name: &str) -> &str {
    let end = name
        .match_indices('/')
        .nth(3)
        .map_or(name.len(), |(at, _)| at);
    &name[..end]
}

/// The data key that seals now, of a workspace.
pub fn current<'a>(state: &'a State, workspace: &str) -> Option<&'a DataKey> {
    state.data_keys.get(workspace)?.first()
}

/// A data key of a workspace.
pub fn find<'a>(state: &'a State, workspace: &str, id: &str) -> Option<&'a DataKey> {
    let keys = state.data_keys.get(workspace)?;
    keys.iter().find(|key| key.id == id)
}

/// The first of some keys that one of some secrets is sealed by.
pub fn closed(
    secrets: &[v1::EnvironmentVariableWithSecretValue],
    keys: &BTreeSet<String>,
) -> Option<String> {
    if keys.is_empty() {
        return None;
    }
    let sealed = secrets
        .iter()
        .filter_map(|secret| Sealed::parse(&secret.value));
    sealed
        .map(|sealed| sealed.key)
        .find(|key| keys.contains(key))
}

pub(super) fn put(step: &mut Step<'_>, command: &PutDataKey) -> Result<(), Rejection> {
    let name = &command.workspace;
    if !step.state.workspaces.contains_key(name) {
        return Err(not_found(Kind::Workspace, name));
    }
    check_stays(step.state, name)?;
    let key = command.key.clone().unwrap_or_default();
    let known = step.state.data_keys.get(name);
    let mut keys = known.map(|keys| keys.to_vec()).unwrap_or_default();
    if let Some(same) = keys.iter_mut().find(|same| same.id == key.id) {
        *same = key;
    } else {
        let last = keys.first().map_or("", |key| &key.id);
        if last != command.follows {
            return Err(Rejection::Overtaken {
                name: name.clone(),
                why: "it has another data key by now".to_owned(),
            });
        }
        keys.insert(0, key);
        // The one before may be on its way in with what it sealed just now.
        let used = used(step.state, name);
        let mut place = 0..;
        keys.retain(|key| place.next().is_some_and(|i| i < 2) || used.contains(&key.id));
        if keys.len() > KEYS_MAX {
            return Err(Rejection::WrongState {
                name: name.clone(),
                why: format!("{KEYS_MAX} of its keys are in use by jobs that have not ended"),
            });
        }
    }
    step.state.data_keys.insert(name.clone(), Arc::new(keys));
    Ok(())
}

/// The keys that something of a workspace is sealed by.
fn used(state: &State, workspace: &str) -> BTreeSet<String> {
    let below = format!("{workspace}/");
    let jobs = behind(&state.jobs, &below, "").filter(|(_, job)| !job.ended() && holds(&job.spec));
    let jobs = jobs.flat_map(|(_, job)| sealed_by(secrets::of_job(&mut (*job.spec).clone())));
    let clusters = behind(&state.clusters, &below, "");
    let clusters = clusters
        .filter(|(_, cluster)| cluster.spec.node_setup.is_some())
        .flat_map(|(_, cluster)| sealed_by(secrets::of_cluster(&mut (*cluster.spec).clone())));
    jobs.chain(clusters).collect()
}

fn sealed_by(places: Vec<secrets::Place<'_>>) -> Vec<String> {
    let sealed = places.iter().filter_map(|(_, value)| Sealed::parse(value));
    sealed.map(|sealed| sealed.key).collect()
}

/// What is new has its secrets sealed by a key that is there: an open one never enters the State.
pub(super) fn check_job(state: &State, spec: &v1::Job) -> Result<(), Rejection> {
    match holds(spec) {
        true => check(state, &spec.name, secrets::of_job(&mut spec.clone())),
        false => Ok(()),
    }
}

/// Whether there may be secrets in a job: most have none, and are not copied to find out.
fn holds(spec: &v1::Job) -> bool {
    !spec.secrets.is_empty() || spec.mount_volumes.is_some() || spec.container_settings.is_some()
}

/// The same of a cluster.
pub(super) fn check_cluster(state: &State, spec: &v1::Cluster) -> Result<(), Rejection> {
    check(state, &spec.name, secrets::of_cluster(&mut spec.clone()))
}

fn check(state: &State, name: &str, places: Vec<secrets::Place<'_>>) -> Result<(), Rejection> {
    let workspace = workspace_of(name);
    for (path, value) in places.iter().filter(|(_, value)| !value.is_empty()) {
        let sealed = Sealed::parse(value);
        if sealed.is_none_or(|sealed| find(state, workspace, &sealed.key).is_none()) {
            let why = format!("{path} is not sealed by a key of its workspace; try again");
            return Err(Rejection::Overtaken {
                name: name.to_owned(),
                why,
            });
        }
    }
    Ok(())
}

/// What will not run again needs no secrets: their names stay.
pub(super) fn forget(spec: &mut Arc<v1::Job>) {
    if !holds(spec) {
        return;
    }
    let mut copy = (**spec).clone();
    let places = secrets::of_job(&mut copy);
    if places.iter().any(|(_, value)| !value.is_empty()) {
        secrets::blank(places);
        *spec = Arc::new(copy);
    }
}
