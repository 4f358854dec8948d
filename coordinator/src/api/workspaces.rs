//! Workspaces.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::Delete;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1::workspace_service_server::WorkspaceService;
use batchai_proto::v1::{
    CreateWorkspaceRequest, DeleteWorkspaceRequest, GetWorkspaceRequest, ListWorkspacesRequest,
    ListWorkspacesResponse, Workspace,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::page::page;
use super::{Api, Faults, not_found, parse};

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
        let (parent, id) = (&request.parent, &request.workspace_id);
        let name = faults.new_name(Noun::Workspace, parent, "workspace_id", id);
        faults.location("workspace.location", &given.location);
        faults.output_only("workspace.name", !given.name.is_empty());
        faults.output_only("workspace.uid", !given.uid.is_empty());
        faults.output_only("workspace.etag", !given.etag.is_empty());
        faults.output_only("workspace.create_time", given.create_time.is_some());
        let name = faults.finish(name)?;
        let workspace = Workspace {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            location: given.location,
            ..Default::default()
        };
        let state = self
            .write_once(Kind::CreateWorkspace(workspace), once)
            .await?;
        let workspace = state.workspaces.get(name.as_str());
        let workspace = workspace.ok_or_else(|| not_found(Noun::Workspace, &name))?;
        Ok(Response::new(Workspace::clone(workspace)))
    }

    async fn get_workspace(
        &self,
        request: Request<GetWorkspaceRequest>,
    ) -> Result<Response<Workspace>, Status> {
        let name = parse(Noun::Workspace, &request.get_ref().name)?;
        let state = self.read().await?;
        let workspace = state.workspaces.get(name.as_str());
        let workspace = workspace.ok_or_else(|| not_found(Noun::Workspace, &name))?;
        Ok(Response::new(Workspace::clone(workspace)))
    }

    async fn list_workspaces(
        &self,
        request: Request<ListWorkspacesRequest>,
    ) -> Result<Response<ListWorkspacesResponse>, Status> {
        let request = request.into_inner();
        let parent = self.parent(Noun::Workspace, &request.parent)?;
        let state = self.read().await?;
        if !state.resource_groups.contains_key(parent.as_str()) {
            return Err(not_found(Noun::ResourceGroup, &parent).into());
        }
        let page_of = (request.page_size, request.page_token.as_str());
        let (workspaces, next_page_token) = page(
            &state.workspaces,
            Some(&parent),
            Noun::Workspace,
            page_of,
            |_, workspace| Workspace::clone(workspace),
        )?;
        Ok(Response::new(ListWorkspacesResponse {
            workspaces,
            next_page_token,
        }))
    }

    async fn delete_workspace(
        &self,
        request: Request<DeleteWorkspaceRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteWorkspaceRequest { name, etag } = request.into_inner();
        let name = parse(Noun::Workspace, &name)?.into();
        self.write(Kind::DeleteWorkspace(Delete { name, etag }))
            .await?;
        Ok(Response::new(()))
    }
}
