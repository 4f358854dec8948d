//! The verbs of file servers.

use std::process::ExitCode;
use std::time::Duration;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1::file_server_service_client::FileServerServiceClient;
use batchai_proto::v1::{self, ProvisioningState};

use crate::args;
use crate::client::{Retry, Secured, request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::file;
use crate::output::{View, confirm, shown};
use crate::resources::{Done, all_pages, delete_all, get_all, part};
use crate::server_files;
use crate::settings::{enum_value, set_account};

/// Between two looks at a file server that is not served yet.
const LOOK_EVERY: Duration = Duration::from_millis(250);

const FILE_SERVER: View<v1::FileServer> = View {
    message: "FileServer",
    columns: &[
        "Name",
        "RG",
        "Size",
        "Disks",
        "Public IP",
        "Internal IP",
        "Mount Point",
        "Node",
        "State",
    ],
    row: |f| {
        let disks = f.data_disks.unwrap_or_default();
        let mount = f.mount_settings.clone().unwrap_or_default();
        vec![
            last_id(&f.name).into(),
            part(&f.name, 0),
            f.vm_size.clone(),
            format!("{} x {} Gb", disks.disk_count, disks.disk_size_in_gb),
            mount.file_server_public_ip,
            mount.file_server_internal_ip,
            mount.mount_point,
            last_id(&f.node).into(),
            f.provisioning_state().as_str_name().to_lowercase(),
        ]
    },
};

pub async fn file_server(command: args::FileServer, context: &Context) -> Done {
    let connected = context.client().await?;
    let mut client = connected.file_servers();
    let named = |which: &args::Which, parent: &args::InWorkspace| {
        context.which(which, Kind::FileServer, || context.workspace(parent))
    };
    match command {
        args::FileServer::Create(create) => {
            let wait = !create.no_wait;
            let create = v1::CreateFileServerRequest {
                parent: context.workspace(&create.parent)?,
                file_server_id: create.name.clone(),
                file_server: Some(file_server_of(*create)?),
                request_id: request_id(),
                validate_only: false,
            };
            let server = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_file_server(r).await }
            })
            .await?;
            let server = match wait {
                true => served(&mut client, server).await?,
                false => server,
            };
            context.printer.show(&FILE_SERVER, &server)?;
            return Ok(said_of(&server));
        }
        args::FileServer::List { parent } => {
            let list = v1::ListFileServersRequest {
                parent: context.workspace(&parent)?,
                ..Default::default()
            };
            let all = all_pages!(client.list_file_servers, list, file_servers);
            context.printer.list(&FILE_SERVER, &all)?;
        }
        args::FileServer::Show { parent, which } => {
            let names = named(&which, &parent)?;
            let found = get_all!(client.get_file_server, GetFileServerRequest, names);
            context.printer.named(&FILE_SERVER, &found)?;
        }
        args::FileServer::Delete {
            parent,
            which,
            force,
            purge,
            confirm: c,
        } => {
            let delete = |name| v1::DeleteFileServerRequest {
                name,
                etag: String::new(),
                force,
                purge,
            };
            delete_all!(
                client.delete_file_server,
                get_file_server,
                (delete, GetFileServerRequest),
                named(&which, &parent)?,
                &c
            );
        }
        args::FileServer::File(command) => {
            return server_files::run(command, &connected, context).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until a file server is served, or cannot be; says what it waits for.
pub async fn served(
    client: &mut FileServerServiceClient<Secured>,
    mut server: v1::FileServer,
) -> Result<v1::FileServer, CliError> {
    let (mut said, mut retry) = (Vec::new(), Retry::default());
    while server.provisioning_state() == ProvisioningState::Creating {
        let errors: Vec<_> = server
            .errors
            .iter()
            .map(|error| error.message.clone())
            .collect();
        for error in errors.iter().filter(|error| !said.contains(*error)) {
            say!("batchai: waiting: {}", shown(error));
        }
        said = errors;
        tokio::time::sleep(LOOK_EVERY).await;
        let name = server.name.clone();
        let get = request(v1::GetFileServerRequest { name });
        match client.get_file_server(get).await {
            Ok(found) => {
                retry.reset();
                server = found.into_inner();
            }
            Err(status) => retry.again(status).await?,
        }
    }
    Ok(server)
}

/// Says what is to be known of a new file server, and what that makes of the command.
fn said_of(server: &v1::FileServer) -> ExitCode {
    for warning in &server.warnings {
        let (field, why) = (&warning.field, &warning.message);
        say!("batchai: {field} has no effect: {why}");
    }
    for error in &server.errors {
        say!("batchai: {}: {}", error.code, shown(&error.message));
    }
    match server.provisioning_state() {
        ProvisioningState::Failed => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

fn file_server_of(args: args::FileServerCreate) -> Result<v1::FileServer, CliError> {
    use v1::data_disks::{CachingType, StorageAccountType};
    let mut server: v1::FileServer = match &args.file {
        Some(path) => file::read(path, "FileServer")?,
        None => v1::FileServer::default(),
    };
    if let Some(vm_size) = args.vm_size {
        server.vm_size = vm_size;
    }
    if let Some(subnet) = args.subnet {
        server.subnet = subnet;
    }
    if let Some(node) = args.node {
        server.node = match node.contains('/') {
            true => node,
            false => format!("{}/{node}", Kind::Node.collection()),
        };
    }
    let disks = server.data_disks.get_or_insert_default();
    disks.disk_count = args.disk_count.unwrap_or(disks.disk_count);
    disks.disk_size_in_gb = args.disk_size.unwrap_or(disks.disk_size_in_gb);
    if let Some(sku) = &args.storage_sku {
        let sku = enum_value(sku, "--storage-sku", StorageAccountType::from_str_name)?;
        disks.storage_account_type = sku as i32;
    }
    if let Some(caching) = &args.caching_type {
        let caching = enum_value(caching, "--caching-type", CachingType::from_str_name)?;
        disks.caching_type = caching as i32;
    }
    if args.account.any() {
        let ssh = server.ssh_configuration.get_or_insert_default();
        let account = ssh.user_account_settings.get_or_insert_default();
        set_account(account, &args.account)?;
    }
    Ok(server)
}
