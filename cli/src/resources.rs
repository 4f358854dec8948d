//! The verbs of resource groups, workspaces, experiments, nodes, VM sizes and usages.

use std::collections::BTreeMap;
use std::process::ExitCode;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;

use crate::args;
use crate::client::{request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::output::{View, confirm};

pub type Done = Result<ExitCode, CliError>;

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

const VM_SIZE: View<v1::VmSize> = View {
    message: "VmSize",
    columns: &["VM Size", "Image", "Nodes", "Free", "Aliases"],
    row: |s| {
        vec![
            s.vm_size.clone(),
            s.image.clone(),
            s.node_count.to_string(),
            s.free_node_count.to_string(),
            s.aliases.join(", "),
        ]
    },
};

const ALIAS: View<v1::VmSizeAlias> = View {
    message: "VmSizeAlias",
    columns: &["Name", "VM Size"],
    row: |a| vec![last_id(&a.name).into(), a.vm_size.clone()],
};

const USAGE: View<v1::Usage> = View {
    message: "Usage",
    columns: &["Value", "Usage", "Limit"],
    row: |u| {
        vec![
            u.name.clone().unwrap_or_default().localized_value,
            u.current_value.to_string(),
            u.limit.to_string(),
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

/// Asks for each of some resources.
macro_rules! get_all {
    ($client:ident . $call:ident, $request:ident, $names:expr) => {{
        let mut found = Vec::new();
        for name in $names {
            let get = v1::$request { name };
            found.push($client.$call(request(get)).await?.into_inner());
        }
        found
    }};
}
pub(crate) use get_all;

/// Asks, deletes each of some resources, and waits until they are gone, unless told not to.
macro_rules! delete_all {
    ($client:ident . $call:ident, $get:ident, ($delete:expr, $show:ident), $names:expr, $confirm:expr) => {{
        let (names, asked): (Vec<String>, &args::Confirm) = ($names, $confirm);
        confirm(&format!("Delete {}?", names.join(", ")), asked.yes)?;
        for name in &names {
            $client.$call(request($delete(name.clone()))).await?;
        }
        for name in names.into_iter().filter(|_| !asked.no_wait) {
            loop {
                let get = v1::$show { name: name.clone() };
                match $client.$get(request(get)).await {
                    Err(status) if status.code() == tonic::Code::NotFound => break,
                    Err(status) => return Err(status.into()),
                    Ok(_) => tokio::time::sleep(crate::client::LOOK_PAUSE).await,
                }
            }
        }
    }};
}
pub(crate) use delete_all;

/// Labels or tags, as they were typed.
pub fn labels(given: args::Labels) -> BTreeMap<String, String> {
    given.labels.into_iter().collect()
}

/// Replaces the labels or tags of some resources.
macro_rules! update_all {
    ($client:ident . $call:ident, $request:ident { $field:ident: $message:ident . $labels:ident }, $names:expr, $given:expr) => {{
        let (names, given): (Vec<String>, args::Labels) = ($names, $given);
        let mut changed = Vec::new();
        for name in names {
            let update = v1::$request {
                $field: Some(v1::$message {
                    name,
                    $labels: labels(given.clone()),
                    ..Default::default()
                }),
                update_mask: Some(prost_types::FieldMask {
                    paths: vec![stringify!($labels).to_owned()],
                }),
            };
            changed.push($client.$call(request(update)).await?.into_inner());
        }
        changed
    }};
}
pub(crate) use update_all;

pub async fn group(command: args::Group, context: &Context) -> Done {
    let mut client = context.client().await?.groups();
    let named =
        |which: &args::Which| context.which(which, Kind::ResourceGroup, || Ok(String::new()));
    match command {
        args::Group::Create {
            name,
            location,
            labels: given,
        } => {
            let resource_group = Some(v1::ResourceGroup {
                location,
                tags: labels(given),
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
            context.printer.show(&GROUP, &group)?;
        }
        args::Group::List => {
            let list = v1::ListResourceGroupsRequest::default();
            let all = all_pages!(client.list_resource_groups, list, resource_groups);
            context.printer.list(&GROUP, &all)?;
        }
        args::Group::Show { which } => {
            let found = get_all!(
                client.get_resource_group,
                GetResourceGroupRequest,
                named(&which)?
            );
            context.printer.named(&GROUP, &found)?;
        }
        args::Group::Update {
            which,
            labels: given,
        } => {
            let changed = update_all!(
                client.update_resource_group,
                UpdateResourceGroupRequest {
                    resource_group: ResourceGroup.tags
                },
                named(&which)?,
                given
            );
            context.printer.named(&GROUP, &changed)?;
        }
        args::Group::Delete { which, confirm: c } => {
            let delete = |name| v1::DeleteResourceGroupRequest {
                name,
                etag: String::new(),
                force: true,
            };
            delete_all!(
                client.delete_resource_group,
                get_resource_group,
                (delete, GetResourceGroupRequest),
                named(&which)?,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn workspace(command: args::Workspace, context: &Context) -> Done {
    let mut client = context.client().await?.workspaces();
    let named = |which: &args::Which, parent: &args::InGroup| {
        context.which(which, Kind::Workspace, || context.group(parent))
    };
    match command {
        args::Workspace::Create {
            parent,
            name,
            location,
            labels: given,
        } => {
            let create = v1::CreateWorkspaceRequest {
                parent: context.group(&parent)?,
                workspace_id: name,
                workspace: Some(v1::Workspace {
                    location,
                    tags: labels(given),
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
            context.printer.show(&WORKSPACE, &workspace)?;
        }
        args::Workspace::List { parent } => {
            let list = v1::ListWorkspacesRequest {
                parent: context.any_group(&parent),
                ..Default::default()
            };
            let all = all_pages!(client.list_workspaces, list, workspaces);
            context.printer.list(&WORKSPACE, &all)?;
        }
        args::Workspace::Show { parent, which } => {
            let names = named(&which, &parent)?;
            let found = get_all!(client.get_workspace, GetWorkspaceRequest, names);
            context.printer.named(&WORKSPACE, &found)?;
        }
        args::Workspace::Update {
            parent,
            which,
            labels: given,
        } => {
            let changed = update_all!(
                client.update_workspace,
                UpdateWorkspaceRequest {
                    workspace: Workspace.tags
                },
                named(&which, &parent)?,
                given
            );
            context.printer.named(&WORKSPACE, &changed)?;
        }
        args::Workspace::Delete {
            parent,
            which,
            confirm: c,
        } => {
            let delete = |name| v1::DeleteWorkspaceRequest {
                name,
                etag: String::new(),
                force: true,
            };
            delete_all!(
                client.delete_workspace,
                get_workspace,
                (delete, GetWorkspaceRequest),
                named(&which, &parent)?,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn experiment(command: args::Experiment, context: &Context) -> Done {
    let mut client = context.client().await?.experiments();
    let named = |which: &args::Which, parent: &args::InWorkspace| {
        context.which(which, Kind::Experiment, || context.workspace(parent))
    };
    match command {
        args::Experiment::Create {
            parent,
            name,
            labels: given,
        } => {
            let create = v1::CreateExperimentRequest {
                parent: context.workspace(&parent)?,
                experiment_id: name,
                experiment: Some(v1::Experiment {
                    labels: labels(given),
                    ..Default::default()
                }),
                request_id: request_id(),
                validate_only: false,
            };
            let experiment = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_experiment(r).await }
            })
            .await?;
            context.printer.show(&EXPERIMENT, &experiment)?;
        }
        args::Experiment::List { parent } => {
            let list = v1::ListExperimentsRequest {
                parent: context.workspace(&parent)?,
                ..Default::default()
            };
            let all = all_pages!(client.list_experiments, list, experiments);
            context.printer.list(&EXPERIMENT, &all)?;
        }
        args::Experiment::Show { parent, which } => {
            let names = named(&which, &parent)?;
            let found = get_all!(client.get_experiment, GetExperimentRequest, names);
            context.printer.named(&EXPERIMENT, &found)?;
        }
        args::Experiment::Update {
            parent,
            which,
            labels: given,
        } => {
            let changed = update_all!(
                client.update_experiment,
                UpdateExperimentRequest {
                    experiment: Experiment.labels
                },
                named(&which, &parent)?,
                given
            );
            context.printer.named(&EXPERIMENT, &changed)?;
        }
        args::Experiment::Delete {
            parent,
            which,
            confirm: c,
        } => {
            let delete = |name| v1::DeleteExperimentRequest {
                name,
                etag: String::new(),
                force: true,
            };
            delete_all!(
                client.delete_experiment,
                get_experiment,
                (delete, GetExperimentRequest),
                named(&which, &parent)?,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn node(command: args::Node, context: &Context) -> Done {
    let mut client = context.client().await?.nodes();
    match command {
        args::Node::List { filter } => {
            let list = v1::ListNodesRequest {
                filter,
                ..Default::default()
            };
            let all = all_pages!(client.list_nodes, list, nodes);
            context.printer.list(&NODE, &all)?;
        }
        args::Node::Show { which } => {
            let names = context.which(&which, Kind::Node, || Ok(String::new()))?;
            let found = get_all!(client.get_node, GetNodeRequest, names);
            context.printer.named(&NODE, &found)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn vm_size(command: args::VmSize, context: &Context) -> Done {
    let mut client = context.client().await?.vm_sizes();
    match command {
        args::VmSize::List => {
            let sizes = client
                .list_vm_sizes(request(v1::ListVmSizesRequest {}))
                .await?;
            context
                .printer
                .list(&VM_SIZE, &sizes.into_inner().vm_sizes)?;
        }
        args::VmSize::Alias(args::VmSizeAlias::Create { name, vm_size }) => {
            let create = v1::CreateVmSizeAliasRequest {
                vm_size_alias_id: name,
                vm_size_alias: Some(v1::VmSizeAlias {
                    vm_size,
                    ..Default::default()
                }),
                request_id: request_id(),
                validate_only: false,
            };
            let alias = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_vm_size_alias(r).await }
            })
            .await?;
            context.printer.show(&ALIAS, &alias)?;
        }
        args::VmSize::Alias(args::VmSizeAlias::List) => {
            let list = v1::ListVmSizeAliasesRequest::default();
            let all = all_pages!(client.list_vm_size_aliases, list, vm_size_aliases);
            context.printer.list(&ALIAS, &all)?;
        }
        args::VmSize::Alias(args::VmSizeAlias::Delete { which, confirm: c }) => {
            let delete = |name| v1::DeleteVmSizeAliasRequest {
                name,
                etag: String::new(),
            };
            delete_all!(
                client.delete_vm_size_alias,
                get_vm_size_alias,
                (delete, GetVmSizeAliasRequest),
                context.which(&which, Kind::VmSizeAlias, || Ok(String::new()))?,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn list_usages(location: String, context: &Context) -> Done {
    let mut client = context.client().await?.information();
    let usages = client
        .list_usages(request(v1::ListUsagesRequest { location }))
        .await?;
    context.printer.list(&USAGE, &usages.into_inner().usages)?;
    Ok(ExitCode::SUCCESS)
}

/// `batchai status`: the coordinator, the nodes, the clusters and the jobs in a few lines.
pub async fn status(context: &Context) -> Done {
    let client = context.client().await?;
    let (mut nodes, mut clusters, mut jobs) = (client.nodes(), client.clusters(), client.jobs());
    let nodes = all_pages!(nodes.list_nodes, v1::ListNodesRequest::default(), nodes);
    let list = v1::ListClustersRequest {
        parent: "resourceGroups/-/workspaces/-".to_owned(),
        ..Default::default()
    };
    let clusters = all_pages!(clusters.list_clusters, list, clusters);
    let live = v1::ListJobsRequest {
        parent: "resourceGroups/-/workspaces/-/experiments/-".to_owned(),
        page_size: 1000,
        filter: "state != SUCCEEDED AND state != FAILED".to_owned(),
        ..Default::default()
    };
    let jobs = all_pages!(jobs.list_jobs, live, jobs);
    let mut rows: Vec<(String, String)> = vec![("endpoint".into(), context.endpoint())];
    let mut count = |what: &str, all: Vec<String>| {
        let mut states = BTreeMap::<String, usize>::new();
        for state in &all {
            *states.entry(state.to_lowercase()).or_default() += 1;
        }
        let states: Vec<_> = states
            .iter()
            .map(|(state, n)| format!("{n} {state}"))
            .collect();
        let states = match states.is_empty() {
            true => "none".to_owned(),
            false => states.join(", "),
        };
        rows.push((what.to_owned(), states));
    };
    count(
        "nodes",
        nodes
            .iter()
            .map(|n| n.state().as_str_name().into())
            .collect(),
    );
    count(
        "clusters",
        clusters
            .iter()
            .map(|c| c.allocation_state().as_str_name().into())
            .collect(),
    );
    count(
        "jobs",
        jobs.iter()
            .map(|j| j.state().as_str_name().into())
            .collect(),
    );
    let value = rows
        .iter()
        .map(|(what, how)| (what.clone(), how.clone().into()))
        .collect();
    let rows = rows
        .into_iter()
        .map(|(what, how)| vec![what, how])
        .collect();
    let value = serde_json::Value::Object(value);
    context.printer.print(&value, &["What", "How"], rows)?;
    Ok(ExitCode::SUCCESS)
}
