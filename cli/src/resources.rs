//! The verbs of resource groups, workspaces and experiments, and what the verbs of all resources share.

use std::collections::BTreeMap;
use std::process::ExitCode;

use crate::client::Secured;
use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;
use batchai_proto::v1::experiment_service_client::ExperimentServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::workspace_service_client::WorkspaceServiceClient;

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

/// Asks for each of some resources, by its name alone.
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
            let mut retry = $crate::client::Retry::default();
            loop {
                let get = v1::$show { name: name.clone() };
                match $client.$get(request(get)).await {
                    Err(status) if status.code() == tonic::Code::NotFound => break,
                    Err(status) => retry.again(status).await?,
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

async fn create_group(
    client: ResourceGroupServiceClient<Secured>,
    (name, location, given): (String, String, args::Labels),
    context: &Context,
) -> Result<(), CliError> {
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
    Ok(())
}

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
            create_group(client, (name, location, given), context).await?;
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

async fn create_workspace(
    client: WorkspaceServiceClient<Secured>,
    parent: &args::InGroup,
    (name, location, given, logs): (String, String, args::Labels, args::LogKeeping),
    context: &Context,
) -> Result<(), CliError> {
    let create = v1::CreateWorkspaceRequest {
        parent: context.group(parent)?,
        workspace_id: name,
        workspace: Some(v1::Workspace {
            location,
            tags: labels(given),
            log_retention: logs.log_retention.and_then(retention),
            log_quota_mib: logs.log_quota.unwrap_or_default(),
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
    Ok(())
}

fn retention(seconds: i64) -> Option<prost_types::Duration> {
    (seconds > 0).then_some(prost_types::Duration { seconds, nanos: 0 })
}

/// Changes what was given; the tags also where nothing was: then they go.
async fn update_workspaces(
    mut client: WorkspaceServiceClient<Secured>,
    names: Vec<String>,
    given: args::Labels,
    logs: &args::LogKeeping,
) -> Result<Vec<v1::Workspace>, CliError> {
    let tags = labels(given);
    let only_logs = logs.log_retention.or(logs.log_quota).is_some() && tags.is_empty();
    let paths = [
        ("tags", !only_logs),
        ("log_retention", logs.log_retention.is_some()),
        ("log_quota_mib", logs.log_quota.is_some()),
    ];
    let paths = paths.iter().filter(|(_, set)| *set);
    let paths: Vec<_> = paths.map(|(path, _)| (*path).to_owned()).collect();
    let mut changed = Vec::new();
    for name in names {
        let update = v1::UpdateWorkspaceRequest {
            workspace: Some(v1::Workspace {
                name,
                tags: tags.clone(),
                log_retention: logs.log_retention.and_then(retention),
                log_quota_mib: logs.log_quota.unwrap_or_default(),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: paths.clone(),
            }),
        };
        changed.push(client.update_workspace(request(update)).await?.into_inner());
    }
    Ok(changed)
}

async fn rotate_keys(
    mut client: WorkspaceServiceClient<Secured>,
    names: Vec<String>,
    context: &Context,
) -> Result<(), CliError> {
    let changed = get_all!(
        client.rotate_workspace_key,
        RotateWorkspaceKeyRequest,
        names
    );
    Ok(context.printer.named(&WORKSPACE, &changed)?)
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
            logs,
        } => {
            let given = (name, location, given, logs);
            create_workspace(client, &parent, given, context).await?;
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
            logs,
        } => {
            let names = named(&which, &parent)?;
            let changed = update_workspaces(client, names, given, &logs).await?;
            context.printer.named(&WORKSPACE, &changed)?;
        }
        args::Workspace::RotateKey { parent, which } => {
            rotate_keys(client, named(&which, &parent)?, context).await?;
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

async fn create_experiment(
    client: ExperimentServiceClient<Secured>,
    parent: &args::InWorkspace,
    (name, given): (String, args::Labels),
    context: &Context,
) -> Result<(), CliError> {
    let create = v1::CreateExperimentRequest {
        parent: context.workspace(parent)?,
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
    Ok(())
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
            create_experiment(client, &parent, (name, given), context).await?;
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
