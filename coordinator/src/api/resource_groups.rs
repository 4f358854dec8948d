//! Resource groups.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::Delete;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1::resource_group_service_server::ResourceGroupService;
use batchai_proto::v1::{
    CreateResourceGroupRequest, DeleteResourceGroupRequest, GetResourceGroupRequest,
    ListResourceGroupsRequest, ListResourceGroupsResponse, ResourceGroup,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::page::page;
use super::{Api, Faults, not_found, parse};

#[tonic::async_trait]
impl ResourceGroupService for Api {
    async fn create_resource_group(
        &self,
        request: Request<CreateResourceGroupRequest>,
    ) -> Result<Response<ResourceGroup>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let given = request.resource_group.unwrap_or_default();
        let id = &request.resource_group_id;
        let name = faults.new_name(Noun::ResourceGroup, "", "resource_group_id", id);
        faults.location("resource_group.location", &given.location);
        faults.output_only("resource_group.name", !given.name.is_empty());
        faults.output_only("resource_group.uid", !given.uid.is_empty());
        faults.output_only("resource_group.etag", !given.etag.is_empty());
        faults.output_only("resource_group.create_time", given.create_time.is_some());
        let name = faults.finish(name)?;
        let location = match given.location.is_empty() {
            true => "local".to_owned(),
            false => given.location,
        };
        let group = ResourceGroup {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            location,
            ..Default::default()
        };
        let state = self
            .write_once(Kind::CreateResourceGroup(group), once)
            .await?;
        let group = state.resource_groups.get(name.as_str());
        let group = group.ok_or_else(|| not_found(Noun::ResourceGroup, &name))?;
        Ok(Response::new(ResourceGroup::clone(group)))
    }

    async fn get_resource_group(
        &self,
        request: Request<GetResourceGroupRequest>,
    ) -> Result<Response<ResourceGroup>, Status> {
        let name = parse(Noun::ResourceGroup, &request.get_ref().name)?;
        let state = self.read().await?;
        let group = state.resource_groups.get(name.as_str());
        let group = group.ok_or_else(|| not_found(Noun::ResourceGroup, &name))?;
        Ok(Response::new(ResourceGroup::clone(group)))
    }

    async fn list_resource_groups(
        &self,
        request: Request<ListResourceGroupsRequest>,
    ) -> Result<Response<ListResourceGroupsResponse>, Status> {
        let request = request.into_inner();
        let state = self.read().await?;
        let page_of = (request.page_size, request.page_token.as_str());
        let (resource_groups, next_page_token) = page(
            &state.resource_groups,
            None,
            Noun::ResourceGroup,
            page_of,
            |_, group| ResourceGroup::clone(group),
        )?;
        Ok(Response::new(ListResourceGroupsResponse {
            resource_groups,
            next_page_token,
        }))
    }

    async fn delete_resource_group(
        &self,
        request: Request<DeleteResourceGroupRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteResourceGroupRequest { name, etag } = request.into_inner();
        let name = parse(Noun::ResourceGroup, &name)?.into();
        self.write(Kind::DeleteResourceGroup(Delete { name, etag }))
            .await?;
        Ok(Response::new(()))
    }
}
