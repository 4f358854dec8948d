//! The verbs of clusters.

use std::process::ExitCode;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;
use batchai_proto::v1::ProvisioningState;
use batchai_proto::v1::cluster::AllocationState;

use crate::args;
use crate::auto_storage;
use crate::client::{Client, request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::exec;
use crate::file;
use crate::login;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all, get_all, labels, part};
use crate::settings::{add_mounts, enum_value, image_of, scale, set_account};

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
            let scale = scale(Some(target), None)?;
            let changed = rescale(&connection, named(&which, &parent)?, scale).await?;
            context.printer.named(&CLUSTER, &changed)?;
        }
        args::Cluster::AutoScale {
            parent,
            which,
            min,
            max,
        } => {
            let scale = scale(None, Some((min, max)))?;
            let changed = rescale(&connection, named(&which, &parent)?, scale).await?;
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
        args::Cluster::Node(command) => return node(command, &connection, context).await,
        args::Cluster::File(command) => return files(command, &connection, context).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn files(command: args::ClusterFile, client: &Client, context: &Context) -> Done {
    let args::ClusterFile::List {
        parent,
        cluster,
        path,
        expiry,
    } = command;
    expiry.note();
    let name = context.the_cluster(cluster.as_ref(), &parent)?;
    let get = v1::GetClusterRequest { name: name.clone() };
    let found = client.clusters().get_cluster(request(get)).await?;
    let task = found.into_inner().node_setup.and_then(|s| s.setup_task);
    let Some(task) = task else {
        let why = format!("{name} has no set-up task, and so no files of one at {path}");
        return Err(CliError::Failed(why));
    };
    let why = format!(
        "the files of a set-up task are not brought here yet; on every node they lie in {}/{}",
        task.std_out_err_path_prefix, task.std_out_err_path_suffix
    );
    Err(CliError::Failed(why))
}

async fn node(command: args::ClusterNode, client: &Client, context: &Context) -> Done {
    match command {
        args::ClusterNode::List { parent, cluster } => {
            let name = context.the_cluster(cluster.as_ref(), &parent)?;
            let nodes = login::of_cluster(client, name).await?;
            context.printer.list(&login::LOGIN, &nodes)?;
            Ok(ExitCode::SUCCESS)
        }
        args::ClusterNode::Exec {
            parent,
            cluster,
            exec,
        } => {
            let name = context.the_cluster(cluster.as_ref(), &parent)?;
            match exec.ssh.is_wanted() {
                true => login::exec(login::of_cluster(client, name).await?, exec),
                false => exec::on_node(client, name, exec).await,
            }
        }
    }
}

/// Changes how many nodes clusters shall have.
async fn rescale(
    client: &Client,
    names: Vec<String>,
    scale_settings: v1::ScaleSettings,
) -> Result<Vec<v1::Cluster>, CliError> {
    let mut changed = Vec::new();
    for name in names {
        let update = v1::UpdateClusterRequest {
            cluster: Some(v1::Cluster {
                name,
                scale_settings: Some(scale_settings),
                ..Default::default()
            }),
            update_mask: None,
        };
        let cluster = client.clusters().update_cluster(request(update)).await?;
        changed.push(cluster.into_inner());
    }
    Ok(changed)
}

async fn create(args: args::ClusterCreate, client: &Client, context: &Context) -> Done {
    let (parent, cluster_id) = (context.workspace(&args.parent)?, args.name.clone());
    let auto_storage = args.use_auto_storage;
    let mut cluster = cluster_of(args, context)?;
    if auto_storage {
        auto_storage::add(client, &parent, &mut cluster).await?;
    }
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
        say!(
            "batchai: {} has no effect: {}",
            warning.field,
            warning.message
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
    say!("batchai: no node has this VM size and image, so none will join. Nodes have:");
    for size in &sizes {
        say!(
            "  -s {} -i {}  ({} free)",
            size.vm_size,
            size.image,
            size.free_node_count
        );
    }
    if sizes.is_empty() {
        say!("  nothing: no node is registered; start `batchai node-agent` on one");
    }
    Ok(())
}

/// The file's settings with the command line's over them.
fn cluster_of(args: args::ClusterCreate, context: &Context) -> Result<v1::Cluster, CliError> {
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
    if cluster.scale_settings.is_none() {
        let why = "how many nodes? Give -t/--target, or --min and --max";
        return Err(CliError::Usage(why.to_owned()));
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
    if args.mounts.any() {
        let setup = cluster.node_setup.get_or_insert_default();
        let mounts = setup.mount_volumes.get_or_insert_default();
        add_mounts(mounts, &args.mounts, &args.parent, context)?;
    }
    if args.account.any() {
        let account = cluster.user_account_settings.get_or_insert_default();
        set_account(account, &args.account)?;
    }
    cluster.labels.extend(labels(args.labels));
    Ok(cluster)
}
