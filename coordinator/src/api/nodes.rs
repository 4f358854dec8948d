//! Nodes.

use batchai_common::error::ApiError;
use batchai_common::limits::SUSPECT_AFTER;
use batchai_common::names::Kind as Noun;
use batchai_common::time::{boot_millis, now_millis};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{ConfirmNodeLost, ExpelNode};
use batchai_proto::v1::node;
use batchai_proto::v1::node_service_server::NodeService;
use batchai_proto::v1::{
    ConfirmNodeLostRequest, ExpelNodeRequest, GetNodeRequest, ListNodesRequest, ListNodesResponse,
    Node, WatchNodeRequest, WatchNodeResponse,
};
use tonic::{Request, Response, Status};

use super::{Api, Replies, not_found, parse};

#[tonic::async_trait]
impl NodeService for Api {
    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (nodes, next_page_token) = self.list("", page, &request.filter).await?;
        Ok(Response::new(ListNodesResponse {
            nodes,
            next_page_token,
        }))
    }

    type WatchNodeStream = Replies<WatchNodeResponse>;

    async fn watch_node(
        &self,
        request: Request<WatchNodeRequest>,
    ) -> Result<Response<Self::WatchNodeStream>, Status> {
        let WatchNodeRequest { name, revision } = request.into_inner();
        let reply = |revision, nodes, deleted| WatchNodeResponse {
            revision,
            nodes,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }

    async fn confirm_node_lost(
        &self,
        request: Request<ConfirmNodeLostRequest>,
    ) -> Result<Response<Node>, Status> {
        let name = parse(Noun::Node, &request.get_ref().name)?;
        let node = name.to_string();
        self.replica.must_lead()?;
        let heard = self.contacts.heard(boot_millis(), now_millis());
        let refuse = |why: &str| {
            let (name, why) = (node.clone(), why.to_owned());
            Err(ApiError::WrongState { name, why }.into())
        };
        if heard.is_alive(&node) {
            return refuse("it is in contact; expel it to have its work ended");
        }
        if !heard.leads_for(SUSPECT_AFTER) {
            return refuse(
                "this coordinator has led for seconds only and may not have heard of it yet: ask again soon",
            );
        }
        let known = self.read().await?.nodes.get(&node).cloned();
        let known = known.ok_or_else(|| not_found(Noun::Node, &name))?;
        let confirm = ConfirmNodeLost {
            node: node.clone(),
            incarnation: known.incarnation.clone(),
            attempt: known.attempt.clone().unwrap_or_default(),
        };
        let state = self.write(Kind::ConfirmNodeLost(confirm)).await?;
        self.show(&state, &node)
    }

    async fn expel_node(
        &self,
        request: Request<ExpelNodeRequest>,
    ) -> Result<Response<Node>, Status> {
        let name: String = parse(Noun::Node, &request.get_ref().name)?.into();
        let expel = ExpelNode { name: name.clone() };
        let state = self.write(Kind::ExpelNode(expel)).await?;
        if !state.nodes.contains_key(&name) {
            // It has joined, and never said what it is.
            let state = node::State::Expelled as i32;
            return Ok(Response::new(Node {
                name,
                state,
                ..Default::default()
            }));
        }
        self.show(&state, &name)
    }
}
