//! Resource groups.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Labels, Update};
use batchai_proto::v1::resource_group_service_server::ResourceGroupService;
use batchai_proto::v1::{
    CreateResourceGroupRequest, DeleteResourceGroupRequest, GetResourceGroupRequest,
    ListResourceGroupsRequest, ListResourceGroupsResponse, ResourceGroup,
    UpdateResourceGroupRequest, WatchResourceGroupRequest, WatchResourceGroupResponse,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::faults::Faults;
use super::{Api, Replies, fields};

/// Where a resource group is when nobody says so.
const LOCATION_DEFAULT: &str = "local";

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
        let name = faults.new_name(
            Noun::ResourceGroup,
            "",
            "resource_group_id",
            &request.resource_group_id,
        );
        fields::check_output_only(&mut faults, "resource_group", "ResourceGroup", &given);
        faults.location("resource_group.location", &given.location);
        faults.labels("resource_group.tags", &given.tags);
        let name = faults.finish(name)?;
        let location = match given.location.is_empty() {
            true => LOCATION_DEFAULT.to_owned(),
            false => given.location,
        };
        let resource_group = ResourceGroup {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            tags: given.tags,
            location,
            ..Default::default()
        };
        let create = Kind::CreateResourceGroup(resource_group);
        let state = self.write_once(create, once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_resource_group(
        &self,
        request: Request<GetResourceGroupRequest>,
    ) -> Result<Response<ResourceGroup>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_resource_groups(
        &self,
        request: Request<ListResourceGroupsRequest>,
    ) -> Result<Response<ListResourceGroupsResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (resource_groups, next_page_token) = self.list("", page, &request.filter).await?;
        Ok(Response::new(ListResourceGroupsResponse {
            resource_groups,
            next_page_token,
        }))
    }

    async fn update_resource_group(
        &self,
        request: Request<UpdateResourceGroupRequest>,
    ) -> Result<Response<ResourceGroup>, Status> {
        let request = request.into_inner();
        let given = request.resource_group.unwrap_or_default();
        let mut faults = Faults::default();
        let name = faults.name("resource_group.name", Noun::ResourceGroup, &given.name);
        let about = ("resource_group", "ResourceGroup");
        let changes = fields::masked(&mut faults, about, &given, request.update_mask, &["tags"]);
        faults.labels("resource_group.tags", &given.tags);
        let name: String = faults.finish(name)?.into();
        let labels = (!changes.is_empty()).then_some(Labels { labels: given.tags });
        let update = Update {
            name: name.clone(),
            etag: given.etag,
            labels,
            ..Update::default()
        };
        self.show(&*self.update(update).await?, &name)
    }

    async fn delete_resource_group(
        &self,
        request: Request<DeleteResourceGroupRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteResourceGroupRequest { name, etag, force } = request.into_inner();
        self.delete(Noun::ResourceGroup, &name, etag, force).await?;
        Ok(Response::new(()))
    }

    type WatchResourceGroupStream = Replies<WatchResourceGroupResponse>;

    async fn watch_resource_group(
        &self,
        request: Request<WatchResourceGroupRequest>,
    ) -> Result<Response<Self::WatchResourceGroupStream>, Status> {
        let WatchResourceGroupRequest { name, revision } = request.into_inner();
        let reply = |revision, resource_groups, deleted| WatchResourceGroupResponse {
            revision,
            resource_groups,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }
}
