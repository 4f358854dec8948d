//! What several verbs make of their options: scale, image, account, mounts.

use std::path::PathBuf;

use batchai_proto::v1;

use crate::args;
use crate::context::Context;
use crate::error::CliError;
use crate::login;

/// A fixed number of nodes, or bounds.
pub fn scale(
    target: Option<i32>,
    bounds: Option<(i32, i32)>,
) -> Result<v1::ScaleSettings, CliError> {
    let manual = |target_node_count| v1::ScaleSettings {
        manual: Some(v1::ManualScaleSettings {
            target_node_count,
            ..Default::default()
        }),
        auto_scale: None,
    };
    match (target, bounds) {
        (None, Some((min, max))) if min > max => Err(CliError::Usage(
            "--min must not be greater than --max".to_owned(),
        )),
        // As the original's command had it: no room to scale is a fixed number.
        (target, Some((min, max))) if min == max => Ok(manual(target.unwrap_or(min))),
        (target, Some((minimum_node_count, maximum_node_count))) => Ok(v1::ScaleSettings {
            manual: None,
            auto_scale: Some(v1::AutoScaleSettings {
                minimum_node_count,
                maximum_node_count,
                initial_node_count: target.unwrap_or_default(),
            }),
        }),
        (target, None) => Ok(manual(target.unwrap_or_default())),
    }
}

pub fn image_of(text: &str) -> Result<v1::ImageReference, CliError> {
    let text = match text {
        "UbuntuLTS" => "Canonical:UbuntuServer:16.04-LTS:latest",
        "UbuntuDSVM" => "microsoft-ads:linux-data-science-vm-ubuntu:linuxdsvmubuntu:latest",
        text => text,
    };
    let parts: Vec<_> = text.split(':').map(str::to_owned).collect();
    let [publisher, offer, sku, version] = <[String; 4]>::try_from(parts).map_err(|_| {
        let why = "must be publisher:offer:sku:version, as `batchai vm-size list` shows it";
        CliError::Usage(format!("--image {why}"))
    })?;
    Ok(v1::ImageReference {
        publisher,
        offer,
        sku,
        version,
        ..Default::default()
    })
}

/// A value of an enum, in whatever case and with or without its dashes.
pub fn enum_value<E>(
    text: &str,
    option: &str,
    parse: fn(&str) -> Option<E>,
) -> Result<E, CliError> {
    let upper = text.replace('-', "_").to_ascii_uppercase();
    let spelled = match upper.as_str() {
        "LOWPRIORITY" => "LOW_PRIORITY",
        other => other,
    };
    parse(spelled)
        .ok_or_else(|| CliError::Usage(format!("{option}: {text:?} is not one of its values")))
}

/// Puts what is given of an account over what a file says of it.
pub fn set_account(
    account: &mut v1::UserAccountSettings,
    given: &args::Account,
) -> Result<(), CliError> {
    if let Some(user) = &given.user {
        account.admin_user_name.clone_from(user);
    } else if account.admin_user_name.is_empty() {
        account.admin_user_name = std::env::var("USER").unwrap_or_default();
    }
    if let Some(password) = &given.password {
        account.admin_user_password.clone_from(password);
    }
    let has_other =
        !account.admin_user_password.is_empty() || !account.admin_user_ssh_public_key.is_empty();
    if let Some(key) = &given.ssh_key {
        account.admin_user_ssh_public_key = read_key(key)?;
    } else if given.generate_ssh_keys || !has_other {
        let default = login::default_key(given.generate_ssh_keys)?;
        account.admin_user_ssh_public_key = read_key(&default.to_string_lossy())?;
    }
    Ok(())
}

/// A public key, or what is in the file of that name.
fn read_key(text: &str) -> Result<String, CliError> {
    let path = PathBuf::from(text);
    if text.starts_with("ssh-") || text.starts_with("ecdsa-") {
        return Ok(text.to_owned());
    }
    let key = std::fs::read_to_string(&path).map_err(|source| CliError::File { path, source })?;
    Ok(key.trim().to_owned())
}

/// Adds what is given to what a file mounts.
pub fn add_mounts(
    mounts: &mut v1::MountVolumes,
    given: &args::Mounts,
    workspace: &args::InWorkspace,
    context: &Context,
) -> Result<(), CliError> {
    let account = || {
        let missing = "give --storage-account-name and --storage-account-key as well";
        let both = given
            .storage_account_name
            .clone()
            .zip(given.storage_account_key.clone());
        both.ok_or_else(|| CliError::Usage(missing.to_owned()))
    };
    let credentials = |account_key| {
        Some(v1::StorageCredentials {
            account_key,
            ..Default::default()
        })
    };
    if let Some(share) = &given.afs_name {
        let (account_name, key) = account()?;
        mounts.azure_file_shares.push(v1::AzureFileShare {
            azure_file_url: format!("https://{account_name}.file.core.windows.net/{share}"),
            account_name,
            credentials: credentials(key),
            relative_mount_path: given.afs_mount_path.clone(),
            ..Default::default()
        });
    }
    if let Some(container) = &given.bfs_name {
        let (account_name, key) = account()?;
        mounts
            .azure_blob_file_systems
            .push(v1::AzureBlobFileSystem {
                account_name,
                container_name: container.clone(),
                credentials: credentials(key),
                relative_mount_path: given.bfs_mount_path.clone(),
                ..Default::default()
            });
    }
    if let Some(server) = &given.nfs {
        let file_server = context.file_server(server, workspace)?;
        mounts.file_servers.push(v1::FileServerMount {
            file_server,
            relative_mount_path: given.nfs_mount_path.clone(),
            ..Default::default()
        });
    }
    Ok(())
}
