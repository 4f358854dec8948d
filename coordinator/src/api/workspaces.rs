//! Workspaces.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Labels, LogQuota, LogRetention, Update};
use batchai_proto::v1::workspace_service_server::WorkspaceService;
use batchai_proto::v1::{
    CreateWorkspaceRequest, DeleteWorkspaceRequest, GetWorkspaceRequest, ListWorkspacesRequest,
    ListWorkspacesResponse, RotateWorkspaceKeyRequest, UpdateWorkspaceRequest,
    WatchWorkspaceRequest, WatchWorkspaceResponse, Workspace,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::faults::Faults;
use super::{Api, Replies, fields, not_found, parse};

/// What an update can change.
const CHANGEABLE: [&str; 3] = ["tags", "log_retention", "log_quota_mib"];
/// Ten years.
const RETENTION_SECONDS_MAX: i64 = 10 * 366 * 86_400;
const QUOTA_MIB_MAX: i64 = 1 << 30;

/// How logs are to be kept.
fn check_logs(faults: &mut Faults, given: &Workspace) {
    let whole = |kept: &prost_types::Duration| {
        kept.nanos == 0 && (1..=RETENTION_SECONDS_MAX).contains(&kept.seconds)
    };
    if given
        .log_retention
        .as_ref()
        .is_some_and(|kept| !whole(kept))
    {
        let why = "must be whole seconds, from one to ten years";
        faults.invalid("workspace.log_retention", why);
    }
    if !(0..=QUOTA_MIB_MAX).contains(&given.log_quota_mib) {
        let why = format!("must be 0 to {QUOTA_MIB_MAX}");
        faults.invalid("workspace.log_quota_mib", why);
    }
}

#[tonic::async_trait]
impl WorkspaceService for Api {
    async fn create_workspace(
        &self,
        request: Request<CreateWorkspaceRequest>,
    ) -> Result<Response<Workspace>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let given = request.workspace.unwrap_or_default();
        let name = faults.new_name(
            Noun::Workspace,
            &request.parent,
            "workspace_id",
            &request.workspace_id,
        );
        fields::check_output_only(&mut faults, "workspace", "Workspace", &given);
        faults.location("workspace.location", &given.location);
        faults.labels("workspace.tags", &given.tags);
        check_logs(&mut faults, &given);
        let name = faults.finish(name)?;
        let workspace = Workspace {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            tags: given.tags,
            location: given.location,
            log_retention: given.log_retention,
            log_quota_mib: given.log_quota_mib,
            ..Default::default()
        };
        let create = Kind::CreateWorkspace(workspace);
        let state = self.write_once(create, once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_workspace(
        &self,
        request: Request<GetWorkspaceRequest>,
    ) -> Result<Response<Workspace>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_workspaces(
        &self,
        request: Request<ListWorkspacesRequest>,
    ) -> Result<Response<ListWorkspacesResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (workspaces, next_page_token) =
            self.list(&request.parent, page, &request.filter).await?;
        Ok(Response::new(ListWorkspacesResponse {
            workspaces,
            next_page_token,
        }))
    }

    async fn update_workspace(
        &self,
        request: Request<UpdateWorkspaceRequest>,
    ) -> Result<Response<Workspace>, Status> {
        let request = request.into_inner();
        let given = request.workspace.unwrap_or_default();
        let mut faults = Faults::default();
        let name = faults.name("workspace.name", Noun::Workspace, &given.name);
        let about = ("workspace", "Workspace");
        let changes = fields::masked(&mut faults, about, &given, request.update_mask, &CHANGEABLE);
        faults.labels("workspace.tags", &given.tags);
        check_logs(&mut faults, &given);
        let name: String = faults.finish(name)?.into();
        let [tags, retention, quota] = CHANGEABLE.map(|field| changes.contains(&field));
        let update = Update {
            name: name.clone(),
            etag: given.etag,
            labels: tags.then_some(Labels { labels: given.tags }),
            log_retention: retention.then_some(LogRetention {
                retention: given.log_retention,
            }),
            log_quota: quota.then_some(LogQuota {
                mib: given.log_quota_mib,
            }),
            scale_settings: None,
        };
        self.show(&*self.update(update).await?, &name)
    }

    async fn rotate_workspace_key(
        &self,
        request: Request<RotateWorkspaceKeyRequest>,
    ) -> Result<Response<Workspace>, Status> {
        let name = parse(Noun::Workspace, &request.get_ref().name)?;
        let state = self.read().await?;
        if !state.workspaces.contains_key(name.as_str()) {
            return Err(not_found(Noun::Workspace, &name).into());
        }
        self.rotate(&state, name.as_str()).await?;
        self.show(&*self.read().await?, name.as_str())
    }

    async fn delete_workspace(
        &self,
        request: Request<DeleteWorkspaceRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteWorkspaceRequest { name, etag, force } = request.into_inner();
        self.delete(Noun::Workspace, &name, etag, force).await?;
        Ok(Response::new(()))
    }

    type WatchWorkspaceStream = Replies<WatchWorkspaceResponse>;

    async fn watch_workspace(
        &self,
        request: Request<WatchWorkspaceRequest>,
    ) -> Result<Response<Self::WatchWorkspaceStream>, Status> {
        let WatchWorkspaceRequest { name, revision } = request.into_inner();
        let reply = |revision, workspaces, deleted| WatchWorkspaceResponse {
            revision,
            workspaces,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }
}
