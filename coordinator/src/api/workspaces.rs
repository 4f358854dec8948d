//! Workspaces.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Labels, Update};
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
        let name = faults.finish(name)?;
        let workspace = Workspace {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            tags: given.tags,
            location: given.location,
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
        let changes = fields::masked(&mut faults, about, &given, request.update_mask, &["tags"]);
        faults.labels("workspace.tags", &given.tags);
        let name: String = faults.finish(name)?.into();
        let labels = (!changes.is_empty()).then_some(Labels { labels: given.tags });
        let update = Update {
            name: name.clone(),
            etag: given.etag,
            labels,
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
