//! PURE. What lies behind shares and containers of storage accounts.

use std::collections::BTreeMap;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_common::storage;
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1::storage_alias::Target;
use batchai_proto::v1::{MountVolumes, StorageAlias};

use super::{Rejection, State, Step, check_etag, check_new, etag, file_servers, not_found};

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
    aliasable(volumes).filter_map(|(path, account, share, container)| {
        let alias = find(state, (account, &share, container))?;
        Some((path, alias))
    })
}

/// The volumes that there may be aliases for: relative mount path, account, share and container.
fn aliasable(
    volumes: Option<&MountVolumes>,
) -> impl Iterator<Item = (&String, &str, String, &str)> {
    let shares = volumes.into_iter().flat_map(|v| &v.azure_file_shares);
    let shares = shares.filter_map(|share| {
        // The API takes in no other.
        let parsed = storage::share(&share.azure_file_url).ok()?;
        let (path, account) = (&share.relative_mount_path, share.account_name.as_str());
        Some((path, account, parsed.share, ""))
    });
    let blobs = volumes.into_iter().flat_map(|v| &v.azure_blob_file_systems);
    let blobs = blobs.map(|blob| {
        let (path, account) = (&blob.relative_mount_path, blob.account_name.as_str());
        (path, account, String::new(), blob.container_name.as_str())
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
        // Whether whoever made it may use the file server was not asked then.
        let already = |volumes| {
            let mut all = aliasable(volumes);
            all.any(|(_, account, share, container)| of(alias) == (account, &*share, container))
        };
        check_unused(state, &alias.name, already)?;
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

/// What mounts something mounts it to its end: what lies behind it does not become a file server meanwhile, nor anything else.
fn check_unused<'a>(
    state: &'a State,
    name: &str,
    such: impl Fn(Option<&'a MountVolumes>) -> bool,
) -> Result<(), Rejection> {
    match file_servers::user(state, such) {
        Some(user) => Err(Rejection::WrongState {
            name: name.to_owned(),
            why: format!("{user} mounts what it is for; delete that first"),
        }),
        None => Ok(()),
    }
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = step.state.storage_aliases.get(name);
    let found = found.ok_or_else(|| not_found(Kind::StorageAlias, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    if file_server(found).is_some_and(|name| step.state.file_servers.contains_key(name)) {
        // What mounts it would be shut out of it.
        let by_it = |v| of_volumes(step.state, v).any(|(_, alias)| alias.name == *name);
        check_unused(step.state, name, by_it)?;
    }
    step.state.storage_aliases.remove(name);
    step.deleted(name);
    Ok(())
}
