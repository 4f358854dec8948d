//! PURE. Workspaces.

use std::sync::Arc;

use batchai_common::names::{self, Kind};
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1;

use super::{Rejection, Step, check_empty, check_etag, check_new, etag, not_found};

pub(super) fn create(step: &mut Step<'_>, workspace: &v1::Workspace) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &workspace.name;
    check_new(
        Kind::Workspace,
        name,
        &state.workspaces,
        &state.resource_groups,
    )?;
    let mut stored = v1::Workspace {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..workspace.clone()
    };
    let group = names::parent(name).and_then(|group| state.resource_groups.get(group));
    if let (true, Some(group)) = (stored.location.is_empty(), group) {
        stored.location = group.location.clone();
    }
    state.workspaces.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let state = &mut *step.state;
    let workspace = state
        .workspaces
        .get(name)
        .ok_or_else(|| not_found(Kind::Workspace, name))?;
    check_etag(name, &command.etag, &workspace.etag)?;
    check_empty(name, &state.experiments, Kind::Experiment)?;
    check_empty(name, &state.clusters, Kind::Cluster)?;
    state.workspaces.remove(name);
    step.deleted(name);
    Ok(())
}
