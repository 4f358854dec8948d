//! PURE. Where to log in to nodes: what their agents registered.

use std::collections::BTreeSet;

use batchai_common::error::ApiError;
use batchai_common::names::Kind;
use batchai_proto::v1::RemoteLoginInformation;

use super::page::Query;
use crate::state::State;

/// A page of those nodes that are still registered; `whose` they are tells its tokens from others.
pub fn page(
    state: &State,
    whose: &str,
    nodes: BTreeSet<String>,
    page: (i32, &str),
) -> Result<(Vec<RemoteLoginInformation>, String), ApiError> {
    let query = Query::new((Kind::Node, "Node"), whose, page, "")?;
    let registered = State {
        nodes: nodes
            .into_iter()
            .filter_map(|name| {
                let node = state.nodes.get(&name)?.clone();
                Some((name, node))
            })
            .collect(),
        ..State::default()
    };
    Ok(query.page(&registered, |name| {
        let facts = &registered.nodes.get(name)?.facts;
        Some(RemoteLoginInformation {
            node: name.to_owned(),
            ip_address: facts.addresses.first()?.clone(),
            port: facts.ssh_port,
        })
    }))
}
