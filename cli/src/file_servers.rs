//! The verbs of file servers.

use std::process::ExitCode;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;

use crate::args;
use crate::client::{request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::file;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all, get_all, part};
use crate::settings::{enum_value, set_account};

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
        ]
    },
};

pub async fn file_server(command: args::FileServer, context: &Context) -> Done {
    let mut client = context.client().await?.file_servers();
    let named = |which: &args::Which, parent: &args::InWorkspace| {
        context.which(which, Kind::FileServer, || context.workspace(parent))
    };
    match command {
        args::FileServer::Create(create) => {
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
            context.printer.show(&FILE_SERVER, &server)?;
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
            confirm: c,
        } => {
            let delete = |name| v1::DeleteFileServerRequest {
                name,
                etag: String::new(),
            };
            delete_all!(
                client.delete_file_server,
                get_file_server,
                (delete, GetFileServerRequest),
                named(&which, &parent)?,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
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
