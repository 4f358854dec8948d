//! Nodes.

use batchai_common::names::Kind as Noun;
use batchai_proto::v1::node_service_server::NodeService;
use batchai_proto::v1::{GetNodeRequest, ListNodesRequest, ListNodesResponse, Node};
use tonic::{Request, Response, Status};

use super::page::page;
use super::{Api, not_found, parse, views};

#[tonic::async_trait]
impl NodeService for Api {
    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let name = parse(Noun::Node, &request.get_ref().name)?;
        let state = self.read().await?;
        let node = state.nodes.get(name.as_str());
        let node = node.ok_or_else(|| not_found(Noun::Node, &name))?;
        Ok(Response::new(views::node(
            &state,
            &self.contacts.heard(),
            name.as_str(),
            node,
        )))
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let (state, heard) = (self.read().await?, self.contacts.heard());
        let page_of = (request.page_size, request.page_token.as_str());
        let (nodes, next_page_token) =
            page(&state.nodes, None, Noun::Node, page_of, |name, node| {
                views::node(&state, &heard, name, node)
            })?;
        Ok(Response::new(ListNodesResponse {
            nodes,
            next_page_token,
        }))
    }
}
