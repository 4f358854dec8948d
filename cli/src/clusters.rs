//! The verbs of clusters and file servers.

use std::path::PathBuf;
use std::process::ExitCode;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;
use batchai_proto::v1::ProvisioningState;
use batchai_proto::v1::cluster::AllocationState;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption;

use crate::args;
use crate::client::{Client, request, request_id, send_once};
use crate::context::{Context, full_name};
use crate::error::CliError;
use crate::file;
use crate::login;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all, get_all, labels, part};

const CLUSTER: View<v1::Cluster> = View {
    message: "Cluster",
    columns: &[
        "Name",
        "Resource Group",
        "Workspace",
        "VM Size",
        "State",
        "Idle",
        "Running",
        "Preparing",
        "Leaving",
        "Unusable",
    ],
    row: |c| {
        let counts = c.node_state_counts.unwrap_or_default();
        let state = match c.provisioning_state() {
            ProvisioningState::Deleting => c.provisioning_state().as_str_name(),
            _ => c.allocation_state().as_str_name(),
        };
        vec![
            last_id(&c.name).into(),
            part(&c.name, 0),
            part(&c.name, 1),
            c.vm_size.clone(),
            state.to_lowercase(),
            counts.idle_node_count.to_string(),
            counts.running_node_count.to_string(),
            counts.preparing_node_count.to_string(),
            counts.leaving_node_count.to_string(),
            counts.unusable_node_count.to_string(),
        ]
    },
};

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

pub async fn cluster(command: args::Cluster, context: &Context) -> Done {
    let connection = context.client().await?;
    let mut client = connection.clusters();
    let named = |which: &args::Which, parent: &args::InWorkspace| {
        context.which(which, Kind::Cluster, || context.workspace(parent))
    };
    match command {
        args::Cluster::Create(create) => return self::create(*create, &connection, context).await,
        args::Cluster::Resize {
            parent,
            which,
            target,
        } => {
            let mut changed = Vec::new();
            for name in named(&which, &parent)? {
                let resize = v1::ResizeClusterRequest {
                    name,
                    target_node_count: Some(target),
                    node_deallocation_option: NodeDeallocationOption::Requeue as i32,
                    etag: String::new(),
                };
                changed.push(client.resize_cluster(request(resize)).await?.into_inner());
            }
            context.printer.named(&CLUSTER, &changed)?;
        }
        args::Cluster::AutoScale {
            parent,
            which,
            min,
            max,
        } => {
            let mut changed = Vec::new();
            for name in named(&which, &parent)? {
                let update = v1::UpdateClusterRequest {
                    cluster: Some(v1::Cluster {
                        name,
                        scale_settings: Some(scale(None, Some((min, max)))?),
                        ..Default::default()
                    }),
                    update_mask: None,
                };
                changed.push(client.update_cluster(request(update)).await?.into_inner());
            }
            context.printer.named(&CLUSTER, &changed)?;
        }
        args::Cluster::List { parent } => {
            let list = v1::ListClustersRequest {
                parent: context.workspace(&parent)?,
                ..Default::default()
            };
            let all = all_pages!(client.list_clusters, list, clusters);
            context.printer.list(&CLUSTER, &all)?;
        }
        args::Cluster::Show { parent, which } => {
            let names = named(&which, &parent)?;
            let found = get_all!(client.get_cluster, GetClusterRequest, names);
            context.printer.named(&CLUSTER, &found)?;
        }
        args::Cluster::Delete {
            parent,
            which,
            confirm: c,
        } => {
            let delete = |name| v1::DeleteClusterRequest {
                name,
                etag: String::new(),
                force: true,
            };
            delete_all!(
                client.delete_cluster,
                get_cluster,
                (delete, GetClusterRequest),
                named(&which, &parent)?,
                &c
            );
        }
        args::Cluster::Node(args::ClusterNode::List { parent, cluster }) => {
            let name = context.the_cluster(cluster.as_ref(), &parent)?;
            let nodes = login::of_cluster(&connection, name).await?;
            context.printer.list(&login::LOGIN, &nodes)?;
        }
        args::Cluster::Node(args::ClusterNode::Exec {
            parent,
            cluster,
            exec,
        }) => {
            let name = context.the_cluster(cluster.as_ref(), &parent)?;
            let nodes = login::of_cluster(&connection, name).await?;
            return login::exec(nodes, exec);
        }
        args::Cluster::File(args::ClusterFile::List {
            parent,
            cluster,
            path: _,
        }) => {
            let name = context.the_cluster(cluster.as_ref(), &parent)?;
            let get = v1::GetClusterRequest { name: name.clone() };
            client.get_cluster(request(get)).await?;
            let why = format!("{name} has no set-up task, and so no files of one");
            return Err(CliError::Failed(why));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(args: args::ClusterCreate, client: &Client, context: &Context) -> Done {
    let (parent, cluster_id) = (context.workspace(&args.parent)?, args.name.clone());
    let cluster = cluster_of(args, context)?;
    let create = v1::CreateClusterRequest {
        parent,
        cluster_id,
        cluster: Some(cluster),
        request_id: request_id(),
        validate_only: false,
    };
    let cluster = send_once(create, |r| {
        let mut clusters = client.clusters();
        async move { clusters.create_cluster(r).await }
    })
    .await?;
    context.printer.show(&CLUSTER, &cluster)?;
    for warning in &cluster.warnings {
        eprintln!(
            "batchai: {} has no effect: {}",
            warning.field, warning.message
        );
    }
    if cluster.allocation_state() == AllocationState::Resizing {
        say_what_there_is(client, &cluster).await?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A cluster that no machine fits waits for ever: whoever made it learns which machines there are.
async fn say_what_there_is(client: &Client, cluster: &v1::Cluster) -> Result<(), CliError> {
    let mut vm_sizes = client.vm_sizes();
    let sizes = vm_sizes
        .list_vm_sizes(request(v1::ListVmSizesRequest {}))
        .await?;
    let sizes = sizes.into_inner().vm_sizes;
    let image = cluster.virtual_machine_configuration.as_ref();
    let image = image.and_then(|configuration| configuration.image_reference.as_ref());
    let wanted = image.map(|i| format!("{}:{}:{}:{}", i.publisher, i.offer, i.sku, i.version));
    let fits = |size: &v1::VmSize| {
        (size.vm_size == cluster.vm_size || size.aliases.contains(&cluster.vm_size))
            && wanted.as_ref().is_none_or(|wanted| *wanted == size.image)
    };
    if sizes.iter().any(fits) {
        return Ok(());
    }
    eprintln!("batchai: no node has this VM size and image, so none will join. Nodes have:");
    for size in &sizes {
        eprintln!(
            "  -s {} -i {}  ({} free)",
            size.vm_size, size.image, size.free_node_count
        );
    }
    if sizes.is_empty() {
        eprintln!("  nothing: no node is registered; start `batchai node-agent` on one");
    }
    Ok(())
}

/// The file's settings with the command line's over them.
fn cluster_of(args: args::ClusterCreate, context: &Context) -> Result<v1::Cluster, CliError> {
    if args.use_auto_storage {
        let why = "--use-auto-storage: there is no storage account of the service's own here; keep \
                   what jobs share on the nodes or on a share of yours";
        return Err(CliError::Usage(why.to_owned()));
    }
    let mut cluster: v1::Cluster = match &args.file {
        Some(path) => file::read(path, "Cluster")?,
        None => v1::Cluster::default(),
    };
    if let Some(vm_size) = args.vm_size {
        cluster.vm_size = vm_size;
    }
    if args.target.is_some() || args.min.is_some() {
        cluster.scale_settings = Some(scale(args.target, args.min.zip(args.max))?);
    }
    if let Some(image) = &args.image {
        let image_reference = Some(v1::ImageReference {
            virtual_machine_image_id: args.custom_image.unwrap_or_default(),
            ..image_of(image)?
        });
        cluster.virtual_machine_configuration =
            Some(v1::VirtualMachineConfiguration { image_reference });
    }
    if let Some(priority) = &args.vm_priority {
        cluster.vm_priority = enum_value(
            priority,
            "--vm-priority",
            v1::cluster::VmPriority::from_str_name,
        )? as i32;
    }
    if let Some(subnet) = args.subnet {
        cluster.subnet = subnet;
    }
    if let Some(command_line) = args.setup_task {
        let setup = cluster.node_setup.get_or_insert_default();
        setup.setup_task = Some(v1::SetupTask {
            command_line,
            std_out_err_path_prefix: args.setup_task_output.unwrap_or_default(),
            ..Default::default()
        });
    }
    if let Some(mounts) = mounts_of(&args.mounts, &args.parent, context)? {
        cluster.node_setup.get_or_insert_default().mount_volumes = Some(mounts);
    }
    if let Some(account) = account_of(&args.account)? {
        cluster.user_account_settings = Some(account);
    }
    cluster.labels.extend(labels(args.labels));
    Ok(cluster)
}

/// A fixed number of nodes, or bounds.
fn scale(target: Option<i32>, bounds: Option<(i32, i32)>) -> Result<v1::ScaleSettings, CliError> {
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

fn image_of(text: &str) -> Result<v1::ImageReference, CliError> {
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
fn enum_value<E>(text: &str, option: &str, parse: fn(&str) -> Option<E>) -> Result<E, CliError> {
    let upper = text.replace('-', "_").to_ascii_uppercase();
    let spelled = match upper.as_str() {
        "LOWPRIORITY" => "LOW_PRIORITY",
        other => other,
    };
    parse(spelled)
        .ok_or_else(|| CliError::Usage(format!("{option}: {text:?} is not one of its values")))
}

/// The account, where one is given.
fn account_of(given: &args::Account) -> Result<Option<v1::UserAccountSettings>, CliError> {
    let named = given.user.is_some() || given.ssh_key.is_some() || given.password.is_some();
    if !named && !given.generate_ssh_keys {
        return Ok(None);
    }
    let own = || std::env::var("USER").unwrap_or_default();
    let key = match (&given.ssh_key, &given.password) {
        (Some(key), _) => read_key(key)?,
        (None, Some(_)) if !given.generate_ssh_keys => String::new(),
        (None, _) => read_key(&login::default_key(given.generate_ssh_keys)?.to_string_lossy())?,
    };
    Ok(Some(v1::UserAccountSettings {
        admin_user_name: given.user.clone().unwrap_or_else(own),
        admin_user_ssh_public_key: key,
        admin_user_password: given.password.clone().unwrap_or_default(),
    }))
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

/// What to mount, where anything is to be.
pub fn mounts_of(
    given: &args::Mounts,
    workspace: &args::InWorkspace,
    context: &Context,
) -> Result<Option<v1::MountVolumes>, CliError> {
    let mut mounts = v1::MountVolumes::default();
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
        let file_server = match server.contains('/') {
            true => full_name(Kind::FileServer, server)?,
            false => format!("{}/fileServers/{server}", context.workspace(workspace)?),
        };
        mounts.file_servers.push(v1::FileServerMount {
            file_server,
            relative_mount_path: given.nfs_mount_path.clone(),
            ..Default::default()
        });
    }
    let any = mounts != v1::MountVolumes::default();
    Ok(any.then_some(mounts))
}

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
    if let Some(account) = account_of(&args.account)? {
        let ssh = server.ssh_configuration.get_or_insert_default();
        ssh.user_account_settings = Some(account);
    }
    Ok(server)
}
