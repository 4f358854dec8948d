//! The commands for resource groups, workspaces, clusters, experiments and nodes.

use std::path::PathBuf;
use std::process::ExitCode;

use batchai_common::names::last_id;
use batchai_proto::v1;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption;

use crate::args::{self, Global, InExperiment, InGroup, InWorkspace};
use crate::client::{Client, request, request_id, send_once};
use crate::error::CliError;
use crate::file;
use crate::output::{View, confirm};

type Done = Result<ExitCode, CliError>;

const GROUP: View<v1::ResourceGroup> = View {
    message: "ResourceGroup",
    columns: &["Name", "Location"],
    row: |g| vec![last_id(&g.name).into(), g.location.clone()],
};

const WORKSPACE: View<v1::Workspace> = View {
    message: "Workspace",
    columns: &["Name", "Resource Group", "Location"],
    row: |w| {
        vec![
            last_id(&w.name).into(),
            part(&w.name, 0),
            w.location.clone(),
        ]
    },
};

const EXPERIMENT: View<v1::Experiment> = View {
    message: "Experiment",
    columns: &["Name", "Resource Group", "Workspace"],
    row: |e| vec![last_id(&e.name).into(), part(&e.name, 0), part(&e.name, 1)],
};

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
        vec![
            last_id(&c.name).into(),
            part(&c.name, 0),
            part(&c.name, 1),
            c.vm_size.clone(),
            c.allocation_state().as_str_name().to_lowercase(),
            counts.idle_node_count.to_string(),
            counts.running_node_count.to_string(),
            counts.preparing_node_count.to_string(),
            counts.leaving_node_count.to_string(),
            counts.unusable_node_count.to_string(),
        ]
    },
};

const NODE: View<v1::Node> = View {
    message: "Node",
    columns: &[
        "Name", "State", "Cluster", "Job", "VM Size", "Cores", "Memory", "GPUs", "Address",
    ],
    row: |n| {
        let facts = n.facts.clone().unwrap_or_default();
        vec![
            last_id(&n.name).into(),
            n.state().as_str_name().to_lowercase(),
            last_id(&n.cluster).into(),
            last_id(&n.job).into(),
            facts.vm_size,
            facts.cpu_cores.to_string(),
            format!("{} MiB", facts.memory_mib),
            facts.gpus.len().to_string(),
            facts.addresses.first().cloned().unwrap_or_default(),
        ]
    },
};

/// The i-th id of a full name.
pub fn part(name: &str, i: usize) -> String {
    batchai_common::names::ids(name)
        .get(i)
        .copied()
        .unwrap_or_default()
        .to_owned()
}

impl InGroup {
    pub fn name(&self) -> String {
        format!("resourceGroups/{}", self.group)
    }
}

impl InWorkspace {
    pub fn name(&self) -> String {
        format!("{}/workspaces/{}", self.group.name(), self.workspace)
    }
}

impl InExperiment {
    pub fn name(&self) -> String {
        format!("{}/experiments/{}", self.workspace.name(), self.experiment)
    }
}

/// Asks for page after page.
macro_rules! all_pages {
    ($client:ident . $call:ident, $request:expr, $field:ident) => {{
        let mut all = Vec::new();
        let mut list = $request;
        loop {
            let mut page = $client.$call(request(list.clone())).await?.into_inner();
            all.append(&mut page.$field);
            if page.next_page_token.is_empty() {
                break all;
            }
            list.page_token = page.next_page_token;
        }
    }};
}
pub(crate) use all_pages;

pub async fn group(command: args::Group, global: &Global) -> Done {
    let mut client = Client::connect(&global.endpoint).await?.groups();
    let named = |name: &str| {
        InGroup {
            group: name.to_owned(),
        }
        .name()
    };
    match command {
        args::Group::Create { name, location } => {
            let resource_group = Some(v1::ResourceGroup {
                location,
                ..Default::default()
            });
            let create = v1::CreateResourceGroupRequest {
                resource_group_id: name,
                resource_group,
                request_id: request_id(),
                validate_only: false,
            };
            let group = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_resource_group(r).await }
            })
            .await?;
            GROUP.show(global.output, &group)?;
        }
        args::Group::List => {
            let list = v1::ListResourceGroupsRequest::default();
            let all = all_pages!(client.list_resource_groups, list, resource_groups);
            GROUP.list(global.output, &all)?;
        }
        args::Group::Show { name } => {
            let get = v1::GetResourceGroupRequest { name: named(&name) };
            let group = client.get_resource_group(request(get)).await?.into_inner();
            GROUP.show(global.output, &group)?;
        }
        args::Group::Delete { name, confirm: c } => {
            confirm(&format!("Delete resource group {name}?"), c.yes)?;
            let delete = v1::DeleteResourceGroupRequest {
                name: named(&name),
                ..Default::default()
            };
            client.delete_resource_group(request(delete)).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn workspace(command: args::Workspace, global: &Global) -> Done {
    let mut client = Client::connect(&global.endpoint).await?.workspaces();
    let named = |parent: &InGroup, name: &str| format!("{}/workspaces/{name}", parent.name());
    match command {
        args::Workspace::Create {
            parent,
            name,
            location,
        } => {
            let create = v1::CreateWorkspaceRequest {
                parent: parent.name(),
                workspace_id: name,
                workspace: Some(v1::Workspace {
                    location,
                    ..Default::default()
                }),
                request_id: request_id(),
                validate_only: false,
            };
            let workspace = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_workspace(r).await }
            })
            .await?;
            WORKSPACE.show(global.output, &workspace)?;
        }
        args::Workspace::List { parent } => {
            let list = v1::ListWorkspacesRequest {
                parent: parent.name(),
                ..Default::default()
            };
            let all = all_pages!(client.list_workspaces, list, workspaces);
            WORKSPACE.list(global.output, &all)?;
        }
        args::Workspace::Show { parent, name } => {
            let get = v1::GetWorkspaceRequest {
                name: named(&parent, &name),
            };
            let workspace = client.get_workspace(request(get)).await?.into_inner();
            WORKSPACE.show(global.output, &workspace)?;
        }
        args::Workspace::Delete {
            parent,
            name,
            confirm: c,
        } => {
            confirm(&format!("Delete workspace {name}?"), c.yes)?;
            let name = named(&parent, &name);
            let delete = v1::DeleteWorkspaceRequest {
                name,
                ..Default::default()
            };
            client.delete_workspace(request(delete)).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn experiment(command: args::Experiment, global: &Global) -> Done {
    let mut client = Client::connect(&global.endpoint).await?.experiments();
    let named = |parent: &InWorkspace, name: &str| format!("{}/experiments/{name}", parent.name());
    match command {
        args::Experiment::Create { parent, name } => {
            let create = v1::CreateExperimentRequest {
                parent: parent.name(),
                experiment_id: name,
                experiment: None,
                request_id: request_id(),
                validate_only: false,
            };
            let experiment = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_experiment(r).await }
            })
            .await?;
            EXPERIMENT.show(global.output, &experiment)?;
        }
        args::Experiment::List { parent } => {
            let list = v1::ListExperimentsRequest {
                parent: parent.name(),
                ..Default::default()
            };
            let all = all_pages!(client.list_experiments, list, experiments);
            EXPERIMENT.list(global.output, &all)?;
        }
        args::Experiment::Show { parent, name } => {
            let get = v1::GetExperimentRequest {
                name: named(&parent, &name),
            };
            let experiment = client.get_experiment(request(get)).await?.into_inner();
            EXPERIMENT.show(global.output, &experiment)?;
        }
        args::Experiment::Delete {
            parent,
            name,
            confirm: c,
        } => {
            confirm(&format!("Delete experiment {name}?"), c.yes)?;
            let name = named(&parent, &name);
            let delete = v1::DeleteExperimentRequest {
                name,
                ..Default::default()
            };
            client.delete_experiment(request(delete)).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn cluster(command: args::Cluster, global: &Global) -> Done {
    let mut client = Client::connect(&global.endpoint).await?.clusters();
    let named = |parent: &InWorkspace, name: &str| format!("{}/clusters/{name}", parent.name());
    match command {
        args::Cluster::Create {
            parent,
            name,
            file,
            vm_size,
            image,
            target,
        } => {
            let create = v1::CreateClusterRequest {
                parent: parent.name(),
                cluster_id: name,
                cluster: Some(cluster_of(file, vm_size, image, target)?),
                request_id: request_id(),
                validate_only: false,
            };
            let cluster = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_cluster(r).await }
            })
            .await?;
            CLUSTER.show(global.output, &cluster)?;
        }
        args::Cluster::Resize {
            parent,
            name,
            target,
        } => {
            let resize = v1::ResizeClusterRequest {
                name: named(&parent, &name),
                target_node_count: Some(target),
                node_deallocation_option: NodeDeallocationOption::Requeue as i32,
                etag: String::new(),
            };
            let cluster = client.resize_cluster(request(resize)).await?.into_inner();
            CLUSTER.show(global.output, &cluster)?;
        }
        args::Cluster::List { parent } => {
            let list = v1::ListClustersRequest {
                parent: parent.name(),
                ..Default::default()
            };
            let all = all_pages!(client.list_clusters, list, clusters);
            CLUSTER.list(global.output, &all)?;
        }
        args::Cluster::Show { parent, name } => {
            let get = v1::GetClusterRequest {
                name: named(&parent, &name),
            };
            let cluster = client.get_cluster(request(get)).await?.into_inner();
            CLUSTER.show(global.output, &cluster)?;
        }
        args::Cluster::Delete {
            parent,
            name,
            confirm: c,
        } => {
            confirm(&format!("Delete cluster {name}?"), c.yes)?;
            let name = named(&parent, &name);
            let delete = v1::DeleteClusterRequest {
                name,
                ..Default::default()
            };
            client.delete_cluster(request(delete)).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The file's settings with the command line's over them.
fn cluster_of(
    file: Option<PathBuf>,
    vm_size: Option<String>,
    image: Option<String>,
    target: Option<i32>,
) -> Result<v1::Cluster, CliError> {
    let mut cluster = match file {
        Some(path) => file::read(&path, "Cluster")?,
        None => v1::Cluster::default(),
    };
    if let Some(vm_size) = vm_size {
        cluster.vm_size = vm_size;
    }
    if let Some(target_node_count) = target {
        let manual = v1::ManualScaleSettings {
            target_node_count,
            ..Default::default()
        };
        cluster.scale_settings = Some(v1::ScaleSettings {
            manual: Some(manual),
            auto_scale: None,
        });
    }
    if let Some(image) = image {
        let parts: Vec<_> = image.split(':').map(str::to_owned).collect();
        let [publisher, offer, sku, version] = <[String; 4]>::try_from(parts).map_err(|_| {
            let why = "must be publisher:offer:sku:version, as `batchai node list` shows it";
            CliError::Usage(format!("--image {why}"))
        })?;
        let image_reference = Some(v1::ImageReference {
            publisher,
            offer,
            sku,
            version,
            ..Default::default()
        });
        cluster.virtual_machine_configuration =
            Some(v1::VirtualMachineConfiguration { image_reference });
    }
    Ok(cluster)
}

pub async fn node(command: args::Node, global: &Global) -> Done {
    let mut client = Client::connect(&global.endpoint).await?.nodes();
    match command {
        args::Node::List => {
            let list = v1::ListNodesRequest::default();
            let all = all_pages!(client.list_nodes, list, nodes);
            NODE.list(global.output, &all)?;
        }
        args::Node::Show { name } => {
            let get = v1::GetNodeRequest {
                name: format!("nodes/{name}"),
            };
            let node = client.get_node(request(get)).await?.into_inner();
            NODE.show(global.output, &node)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
