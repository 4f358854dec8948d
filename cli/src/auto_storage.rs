//! What `--use-auto-storage` gives a cluster: a share and a container, as the original made them in an account of its own. Here both are
//! directories of one file server, the workspace's default, which is made where it is absent. They are mounted as what they are: no account,
//! no key and no administrator is needed.
//!
//! Which one is the default is a matter of its id, and of nothing else: an administrator who wants it on some node, or with more
//! room, makes it before. It is deleted like any other, and never by a cluster that goes.

use std::time::Duration;

use batchai_proto::v1::data_disks::StorageAccountType;
use batchai_proto::v1::{self, ProvisioningState};
use tonic::Code;

use crate::client::{Client, request, request_id, send_once};
use crate::error::CliError;
use crate::file_servers::served;
use crate::server_files;

/// Its id: what the original called the resource group of its own accounts.
const SERVER: &str = "batchaiautostorage";
/// The share and the container: directories of it, and where the original mounted them.
const MOUNTS: [(&str, &str); 2] = [("batchaishare", "autoafs"), ("batchaicontainer", "autobfs")];
/// What there must be of room on its node. No limit.
const ROOM_GB: i32 = 1;
/// How long it may take until it is served.
const SERVED_MAX: Duration = Duration::from_secs(300);

/// Adds both to what a new cluster of a workspace mounts, when they are there.
pub async fn add(
    client: &Client,
    workspace: &str,
    cluster: &mut v1::Cluster,
) -> Result<(), CliError> {
    let name = format!("{workspace}/fileServers/{SERVER}");
    let server = match get(client, &name).await? {
        Some(server) => server,
        None => create(client, workspace, cluster).await?,
    };
    let mut servers = client.file_servers();
    let served = tokio::time::timeout(SERVED_MAX, served(&mut servers, server)).await;
    let server = served.map_err(|_| {
        CliError::Failed(format!(
            "--use-auto-storage: {name} is not served after {} minutes; delete it, or make it on another node: \
             batchai file-server create -n {SERVER} --node NODE",
            SERVED_MAX.as_secs() / 60
        ))
    })??;
    if server.provisioning_state() != ProvisioningState::Succeeded {
        let errors = server.errors.iter().map(|error| error.message.as_str());
        let why = errors.collect::<Vec<_>>().join("; ");
        let state = server.provisioning_state().as_str_name().to_lowercase();
        let why = format!("--use-auto-storage: {name} is {state}: {why}");
        return Err(CliError::Failed(why));
    }
    let setup = cluster.node_setup.get_or_insert_default();
    let mounts = setup.mount_volumes.get_or_insert_default();
    for (directory, path) in MOUNTS {
        server_files::make_directory(client, &name, directory).await?;
        mounts.file_servers.push(v1::FileServerMount {
            file_server: name.clone(),
            source_directory: directory.to_owned(),
            relative_mount_path: path.to_owned(),
            ..Default::default()
        });
    }
    say!("batchai: $AZ_BATCHAI_MOUNT_ROOT/autoafs and autobfs are directories of {name}");
    Ok(())
}

async fn get(client: &Client, name: &str) -> Result<Option<v1::FileServer>, CliError> {
    let name = name.to_owned();
    let get = v1::GetFileServerRequest { name };
    match client.file_servers().get_file_server(request(get)).await {
        Ok(found) => Ok(Some(found.into_inner())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

async fn create(
    client: &Client,
    workspace: &str,
    cluster: &v1::Cluster,
) -> Result<v1::FileServer, CliError> {
    let account = v1::UserAccountSettings {
        admin_user_name: "batchai".to_owned(),
        // One must be given. Nobody logs in by it: nothing keeps it.
        admin_user_password: request_id(),
        ..Default::default()
    };
    let server = v1::FileServer {
        vm_size: vm_size(client, &cluster.vm_size).await?,
        ssh_configuration: Some(v1::SshConfiguration {
            user_account_settings: Some(account),
            ..Default::default()
        }),
        data_disks: Some(v1::DataDisks {
            disk_size_in_gb: ROOM_GB,
            disk_count: 1,
            storage_account_type: StorageAccountType::StandardLrs as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    let create = v1::CreateFileServerRequest {
        parent: workspace.to_owned(),
        file_server_id: SERVER.to_owned(),
        file_server: Some(server),
        request_id: request_id(),
        validate_only: false,
    };
    let created = send_once(create, |r| {
        let mut servers = client.file_servers();
        async move { servers.create_file_server(r).await }
    });
    match created.await {
        // Somebody makes another cluster.
        Err(CliError::Refused(status)) if status.code() == Code::AlreadyExists => {
            let made = get(client, &format!("{workspace}/fileServers/{SERVER}")).await?;
            made.ok_or(CliError::Refused(status))
        }
        created => created,
    }
}

/// The VM size of a node that offers storage: that of the cluster, or else the first by name.
async fn vm_size(client: &Client, of_cluster: &str) -> Result<String, CliError> {
    let list = request(v1::ListVmSizesRequest {});
    let sizes = client.vm_sizes().list_vm_sizes(list).await?.into_inner();
    let mut with_storage = sizes
        .vm_sizes
        .into_iter()
        .filter(|s| s.storage_node_count > 0);
    let own = |size: &v1::VmSize| {
        size.vm_size == of_cluster || size.aliases.iter().any(|alias| alias == of_cluster)
    };
    let first = with_storage.next();
    let found = match first.as_ref().is_some_and(own) {
        true => first,
        false => with_storage.find(own).or(first),
    };
    found.map(|size| size.vm_size).ok_or_else(|| {
        let why = "--use-auto-storage: no node offers storage for the workspace's file server; start an agent with \
                   --storage-root DIR on a machine with room for what jobs share and try again, or mount \
                   something else: --nfs, --afs-name, --bfs-name";
        CliError::Failed(why.to_owned())
    })
}
