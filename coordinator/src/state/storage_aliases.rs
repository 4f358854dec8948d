//! PURE. What lies behind shares and containers of storage accounts.

use std::collections::BTreeMap;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_common::storage;
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1::storage_alias::Target;
use batchai_proto::v1::{MountVolumes, StorageAlias};

use super::{Rejection, State, Step, check_etag, check_new, etag, file_servers, nodes, not_found};

/// What is mounted in the stead of volumes, by their relative mount paths.
pub fn resolve(state: &State, volumes: Option<&MountVolumes>) -> BTreeMap<String, StorageAlias> {
    let all = of_volumes(state, volumes);
    all.map(|(path, alias)| (path.clone(), alias.clone()))
        .collect()
}

/// The aliases for some volumes, with the relative mount paths of those.
fn of_volumes<'a>(
    state: &'a State,
    volumes: Option<&'a MountVolumes>,
) -> impl Iterator<Item = (&'a String, &'a StorageAlias)> {
    let volumes = volumes.filter(|_| !state.storage_aliases.is_empty());
    let shares = volumes.into_iter().flat_map(|v| &v.azure_file_shares);
    let shares = shares.filter_map(|share| {
        // The API takes in no other.
        let parsed = storage::share(&share.azure_file_url).ok()?;
        let alias = find(state, (&share.account_name, &parsed.share, ""))?;
        Some((&share.relative_mount_path, alias))
    });
    let blobs = volumes.into_iter().flat_map(|v| &v.azure_blob_file_systems);
    let blobs = blobs.filter_map(|blob| {
        let alias = find(state, (&blob.account_name, "", &blob.container_name))?;
        Some((&blob.relative_mount_path, alias))
    });
    shares.chain(blobs)
}

/// The file servers that are mounted in the stead of volumes, each with the alias that leads to it.
pub fn file_servers<'a>(
    state: &'a State,
    volumes: Option<&'a MountVolumes>,
) -> impl Iterator<Item = (&'a StorageAlias, &'a str)> {
    of_volumes(state, volumes).filter_map(|(_, alias)| Some((alias, file_server(alias)?)))
}

/// The file server that an alias leads to.
fn file_server(alias: &StorageAlias) -> Option<&str> {
    match &alias.target {
        Some(Target::FileServer(directory)) => Some(&directory.file_server),
        _ => None,
    }
}

/// The first alias that leads to a file server.
pub(super) fn leading_to<'a>(state: &'a State, server: &str) -> Option<&'a str> {
    let all = state.storage_aliases.values();
    let mut leading = all.filter(|alias| file_server(alias) == Some(server));
    leading.next().map(|alias| alias.name.as_str())
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
    if let Some(server) = file_server(alias) {
        file_servers::check_one(state, server)?;
    }
    let stored = StorageAlias {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..alias.clone()
    };
    state.storage_aliases.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    if let Some(server) = file_server(alias) {
        // What mounts the share or the container already will mount it from now on.
        let server = step.state.file_servers.get(server);
        if let Some(node) = server.and_then(|server| server.node.clone()) {
            nodes::assign(step, &node);
        }
    }
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = step.state.storage_aliases.get(name);
    let found = found.ok_or_else(|| not_found(Kind::StorageAlias, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    if file_server(found).is_some() {
        // Those that mount it would be shut out of it.
        let by_it = |v| of_volumes(step.state, v).any(|(_, alias)| alias.name == *name);
        if let Some(user) = file_servers::user(step.state, by_it) {
            let why = format!("{user} mounts a file server by it; delete that first");
            let name = name.clone();
            return Err(Rejection::WrongState { name, why });
        }
    }
    step.state.storage_aliases.remove(name);
    step.deleted(name);
    Ok(())
}
