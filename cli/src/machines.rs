//! The verbs of nodes, VM sizes and usages, and the state of everything.

use std::collections::BTreeMap;
use std::process::ExitCode;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;

use crate::access;
use crate::args;
use crate::client::{request, request_id, send_once};
use crate::context::Context;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all, get_all};

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
    columns: &["VM Size", "Image", "Nodes", "Free", "Aliases", "Storage"],
    row: |s| {
        vec![
            s.vm_size.clone(),
            s.image.clone(),
            s.node_count.to_string(),
            s.free_node_count.to_string(),
            s.aliases.join(", "),
            s.storage_node_count.to_string(),
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
        args::Node::Expel { which, confirm: c } => {
            let names = context.which(&which, Kind::Node, || Ok(String::new()))?;
            confirm(&format!("Expel {}?", names.join(", ")), c.yes)?;
            let mut expelled = Vec::new();
            for name in names {
                let expel = v1::ExpelNodeRequest { name };
                expelled.push(client.expel_node(request(expel)).await?.into_inner());
            }
            context.printer.named(&NODE, &expelled)?;
        }
        args::Node::ConfirmLost { which, confirm: c } => {
            let names = context.which(&which, Kind::Node, || Ok(String::new()))?;
            let question = format!(
                "Does nothing run on {} any more, for sure?",
                names.join(", ")
            );
            confirm(&question, c.yes)?;
            let mut lost = Vec::new();
            for name in names {
                let confirmed = v1::ConfirmNodeLostRequest { name };
                let node = client.confirm_node_lost(request(confirmed)).await?;
                lost.push(node.into_inner());
            }
            context.printer.named(&NODE, &lost)?;
        }
        args::Node::Token(command) => return access::node_token(command, context).await,
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
