//! PURE. What lies behind shares and containers of storage accounts.

use std::collections::BTreeMap;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_common::storage;
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1::{MountVolumes, StorageAlias};

use super::{Rejection, State, Step, check_etag, check_new, etag, not_found};

/// What is mounted in the stead of volumes, by their relative mount paths.
pub fn resolve(state: &State, volumes: Option<&MountVolumes>) -> BTreeMap<String, StorageAlias> {
    let mut stead = BTreeMap::new();
    let Some(volumes) = volumes.filter(|_| !state.storage_aliases.is_empty()) else {
        return stead;
    };
    for share in &volumes.azure_file_shares {
        // The API takes in no other.
        let Ok(parsed) = storage::share(&share.azure_file_url) else {
            continue;
        };
        if let Some(alias) = find(state, (&share.account_name, &parsed.share, "")) {
            stead.insert(share.relative_mount_path.clone(), alias.clone());
        }
    }
    for blob in &volumes.azure_blob_file_systems {
        if let Some(alias) = find(state, (&blob.account_name, "", &blob.container_name)) {
            stead.insert(blob.relative_mount_path.clone(), alias.clone());
        }
    }
    stead
}

/// The one for a share or a container of an account.
fn find<'a>(state: &'a State, wanted: (&str, &str, &str)) -> Option<&'a StorageAlias> {
    let all = state.storage_aliases.values().map(Arc::as_ref);
    all.into_iter().find(|alias| of(alias) == wanted)
}

fn of(alias: &StorageAlias) -> (&str, &str, &str) {
    (
        &alias.account_name,
        &alias.share_name,
        &alias.container_name,
    )
}

pub(super) fn create(step: &mut Step<'_>, alias: &StorageAlias) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &alias.name;
    check_new(state, Kind::StorageAlias, name)?;
    if let Some(other) = find(state, of(alias)) {
        let why = format!("{} is for the same already", other.name);
        let name = name.clone();
        return Err(Rejection::WrongState { name, why });
    }
    let stored = StorageAlias {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..alias.clone()
    };
    state.storage_aliases.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = step.state.storage_aliases.get(name);
    let found = found.ok_or_else(|| not_found(Kind::StorageAlias, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    step.state.storage_aliases.remove(name);
    step.deleted(name);
    Ok(())
}
