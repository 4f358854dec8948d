//! PURE. Resource groups.

use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1;

use super::{Rejection, Step, check_empty, check_etag, etag, not_found};

pub(super) fn create(step: &mut Step<'_>, group: &v1::ResourceGroup) -> Result<(), Rejection> {
    let state = &mut *step.state;
    if state.resource_groups.contains_key(&group.name) {
        return Err(Rejection::Exists {
            kind: Kind::ResourceGroup,
            name: group.name.clone(),
        });
    }
    let stored = v1::ResourceGroup {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..group.clone()
    };
    state
        .resource_groups
        .insert(group.name.clone(), Arc::new(stored));
    step.changed(&group.name);
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let state = &mut *step.state;
    let group = state
        .resource_groups
        .get(name)
        .ok_or_else(|| not_found(Kind::ResourceGroup, name))?;
    check_etag(name, &command.etag, &group.etag)?;
    check_empty(name, &state.workspaces, Kind::Workspace)?;
    state.resource_groups.remove(name);
    step.deleted(name);
    Ok(())
}
