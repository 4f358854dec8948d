//! Resources of a real ensemble asked as registers: what is written to one is a label of it, its etag is its revision; see
//! `history`.
//!
//! What else a resource has is left alone, and so is what a list or a watch says of it.

use std::collections::BTreeMap;

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::workspace_service_client::WorkspaceServiceClient;
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::api::{EXPERIMENT, GROUP, job};
use crate::history::{Call, Outcome, Revision, Value};

/// The label that is the value.
const LABEL: &str = "value";

/// What can be asked like a register.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Group,
    Workspace,
    Job,
}

/// What became of a request.
pub enum Fate {
    Known(Outcome),
    /// It was certainly not carried out.
    NotDone,
    /// It may have been, or may be yet.
    Open,
}

fn labels(value: Value) -> BTreeMap<String, String> {
    BTreeMap::from([(LABEL.to_owned(), value.to_string())])
}

fn revision(etag: &str) -> Revision {
    etag.trim_matches('"')
        .parse()
        .expect("an etag is a quoted revision")
}

fn shown(labels: &BTreeMap<String, String>, etag: &str) -> Outcome {
    Outcome::Shown(
        labels[LABEL].parse().expect("only numbers are written"),
        revision(etag),
    )
}

/// What a call asks for: the value it writes, and the etag that it expects.
fn wish(call: Call) -> (BTreeMap<String, String>, String) {
    match call {
        Call::Create(value) | Call::Write(value) => (labels(value), String::new()),
        Call::WriteIf(at, value) => (labels(value), format!("\"{at}\"")),
        Call::DeleteIf(at) => (BTreeMap::new(), format!("\"{at}\"")),
        Call::Read | Call::Delete => (BTreeMap::new(), String::new()),
    }
}

async fn group(way: Route, id: &str, call: Call, request_id: String) -> Result<Outcome, Status> {
    let mut client = ResourceGroupServiceClient::new(way);
    let name = format!("resourceGroups/{id}");
    let (tags, etag) = wish(call);
    let asked = v1::ResourceGroup {
        tags,
        ..Default::default()
    };
    let found = match call {
        Call::Read => {
            let get = v1::GetResourceGroupRequest { name };
            client.get_resource_group(get).await?
        }
        Call::Create(_) => {
            let create = v1::CreateResourceGroupRequest {
                resource_group_id: id.to_owned(),
                resource_group: Some(asked),
                request_id,
                ..Default::default()
            };
            client.create_resource_group(create).await?
        }
        Call::Write(_) | Call::WriteIf(..) => {
            let update = v1::UpdateResourceGroupRequest {
                resource_group: Some(v1::ResourceGroup {
                    name,
                    etag,
                    ..asked
                }),
                update_mask: None,
            };
            client.update_resource_group(update).await?
        }
        Call::Delete | Call::DeleteIf(_) => {
            let force = false;
            let delete = v1::DeleteResourceGroupRequest { name, etag, force };
            client.delete_resource_group(delete).await?;
            return Ok(Outcome::Done);
        }
    };
    let found = found.into_inner();
    Ok(shown(&found.tags, &found.etag))
}

async fn workspace(
    way: Route,
    id: &str,
    call: Call,
    request_id: String,
) -> Result<Outcome, Status> {
    let mut client = WorkspaceServiceClient::new(way);
    let name = format!("{GROUP}/workspaces/{id}");
    let (tags, etag) = wish(call);
    let asked = v1::Workspace {
        tags,
        ..Default::default()
    };
    let found = match call {
        Call::Read => {
            let get = v1::GetWorkspaceRequest { name };
            client.get_workspace(get).await?
        }
        Call::Create(_) => {
            let create = v1::CreateWorkspaceRequest {
                parent: GROUP.to_owned(),
                workspace_id: id.to_owned(),
                workspace: Some(asked),
                request_id,
                ..Default::default()
            };
            client.create_workspace(create).await?
        }
        Call::Write(_) | Call::WriteIf(..) => {
            let update = v1::UpdateWorkspaceRequest {
                workspace: Some(v1::Workspace {
                    name,
                    etag,
                    ..asked
                }),
                update_mask: None,
            };
            client.update_workspace(update).await?
        }
        Call::Delete | Call::DeleteIf(_) => {
            let force = false;
            let delete = v1::DeleteWorkspaceRequest { name, etag, force };
            client.delete_workspace(delete).await?;
            return Ok(Outcome::Done);
        }
    };
    let found = found.into_inner();
    Ok(shown(&found.tags, &found.etag))
}

/// A job that waits for ever: its cluster has no nodes. One that is deleted while it waits is gone at once.
async fn waiting(way: Route, id: &str, call: Call, request_id: String) -> Result<Outcome, Status> {
    let mut client = JobServiceClient::new(way);
    let name = format!("{EXPERIMENT}/jobs/{id}");
    let (labels, etag) = wish(call);
    let found = match call {
        Call::Read => client.get_job(v1::GetJobRequest { name }).await?,
        Call::Create(_) => {
            let create = v1::CreateJobRequest {
                parent: EXPERIMENT.to_owned(),
                job_id: id.to_owned(),
                job: Some(v1::Job { labels, ..job() }),
                request_id,
                ..Default::default()
            };
            client.create_job(create).await?
        }
        Call::Write(_) | Call::WriteIf(..) => {
            let asked = v1::Job {
                name,
                etag,
                labels,
                ..Default::default()
            };
            let update = v1::UpdateJobRequest {
                job: Some(asked),
                update_mask: None,
            };
            client.update_job(update).await?
        }
        Call::Delete | Call::DeleteIf(_) => {
            client
                .delete_job(v1::DeleteJobRequest { name, etag })
                .await?;
            return Ok(Outcome::Done);
        }
    };
    let found = found.into_inner();
    Ok(shown(&found.labels, &found.etag))
}

/// What an error says of a request. Only what the service itself says is certain: what a broken connection swallowed is not.
fn fate(status: &Status) -> Fate {
    let Some(info) = status.get_details_error_info() else {
        return Fate::Open;
    };
    match info.reason.as_str() {
        "RESOURCE_NOT_FOUND" => Fate::Known(Outcome::Absent),
        "RESOURCE_EXISTS" => Fate::Known(Outcome::Exists),
        "STALE_ETAG" => Fate::Known(Outcome::Stale(revision(&info.metadata["actual"]))),
        "UNAVAILABLE" | "BUSY" => Fate::NotDone,
        "OUTCOME_UNKNOWN" => Fate::Open,
        _ => panic!("nobody expects this: {status:?}"),
    }
}

/// Asks for one thing, once, as far as the way does not ask again what was certainly not carried out. A creation has a name.
pub async fn ask(way: Route, (kind, id): (Kind, &str), call: Call, request_id: String) -> Fate {
    let answer = match kind {
        Kind::Group => group(way, id, call, request_id).await,
        Kind::Workspace => workspace(way, id, call, request_id).await,
        Kind::Job => waiting(way, id, call, request_id).await,
    };
    match answer {
        Ok(outcome) => Fate::Known(outcome),
        Err(status) => fate(&status),
    }
}
