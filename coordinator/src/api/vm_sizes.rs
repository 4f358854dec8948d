//! VM sizes and their aliases.

use std::collections::BTreeMap;

use batchai_common::names::{Kind as Noun, last_id};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1::vm_size_service_server::VmSizeService;
use batchai_proto::v1::{
    CreateVmSizeAliasRequest, DeleteVmSizeAliasRequest, GetVmSizeAliasRequest,
    ListVmSizeAliasesRequest, ListVmSizeAliasesResponse, ListVmSizesRequest, ListVmSizesResponse,
    VmSize, VmSizeAlias, WatchVmSizeAliasRequest, WatchVmSizeAliasResponse,
};
use tonic::{Request, Response, Status};

use super::faults::Faults;
use super::{Api, Replies, fields};
use crate::state::State;

const SIZES_MAX: usize = 1000;

#[tonic::async_trait]
impl VmSizeService for Api {
    async fn list_vm_sizes(
        &self,
        _: Request<ListVmSizesRequest>,
    ) -> Result<Response<ListVmSizesResponse>, Status> {
        let vm_sizes = vm_sizes(&*self.read().await?);
        Ok(Response::new(ListVmSizesResponse { vm_sizes }))
    }

    async fn create_vm_size_alias(
        &self,
        request: Request<CreateVmSizeAliasRequest>,
    ) -> Result<Response<VmSizeAlias>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let given = request.vm_size_alias.unwrap_or_default();
        let id = &request.vm_size_alias_id;
        let name = faults.new_name(Noun::VmSizeAlias, "", "vm_size_alias_id", id);
        fields::check_output_only(&mut faults, "vm_size_alias", "VmSizeAlias", &given);
        faults.text("vm_size_alias.vm_size", &given.vm_size, true);
        let name = faults.finish(name)?;
        let alias = VmSizeAlias {
            name: name.to_string(),
            vm_size: given.vm_size,
            ..Default::default()
        };
        let create = Kind::CreateVmSizeAlias(alias);
        let state = self.write_once(create, once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_vm_size_alias(
        &self,
        request: Request<GetVmSizeAliasRequest>,
    ) -> Result<Response<VmSizeAlias>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_vm_size_aliases(
        &self,
        request: Request<ListVmSizeAliasesRequest>,
    ) -> Result<Response<ListVmSizeAliasesResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (vm_size_aliases, next_page_token) = self.list("", page, &request.filter).await?;
        Ok(Response::new(ListVmSizeAliasesResponse {
            vm_size_aliases,
            next_page_token,
        }))
    }

    async fn delete_vm_size_alias(
        &self,
        request: Request<DeleteVmSizeAliasRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteVmSizeAliasRequest { name, etag } = request.into_inner();
        self.delete(Noun::VmSizeAlias, &name, etag, false).await?;
        Ok(Response::new(()))
    }

    type WatchVmSizeAliasStream = Replies<WatchVmSizeAliasResponse>;

    async fn watch_vm_size_alias(
        &self,
        request: Request<WatchVmSizeAliasRequest>,
    ) -> Result<Response<Self::WatchVmSizeAliasStream>, Status> {
        let WatchVmSizeAliasRequest { name, revision } = request.into_inner();
        let reply = |revision, vm_size_aliases, deleted| WatchVmSizeAliasResponse {
            revision,
            vm_size_aliases,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }
}

/// What kinds of machines there are.
fn vm_sizes(state: &State) -> Vec<VmSize> {
    let mut sizes: BTreeMap<(&str, &str), VmSize> = BTreeMap::new();
    for node in state.nodes.values() {
        let (vm_size, image) = (node.facts.vm_size.as_str(), node.facts.image.as_str());
        let size = sizes.entry((vm_size, image)).or_insert_with(|| VmSize {
            vm_size: vm_size.to_owned(),
            image: image.to_owned(),
            ..Default::default()
        });
        size.node_count += 1;
        size.free_node_count += i32::from(node.is_free());
        let storage = !node.expelled && !node.facts.storage_root.is_empty();
        size.storage_node_count += i32::from(storage);
    }
    for (name, alias) in &state.vm_size_aliases {
        let from = (alias.vm_size.as_str(), "");
        let same = sizes
            .range_mut(from..)
            .take_while(|((size, _), _)| *size == from.0);
        for (_, size) in same {
            size.aliases.push(last_id(name).to_owned());
        }
    }
    sizes.into_values().take(SIZES_MAX).collect()
}
