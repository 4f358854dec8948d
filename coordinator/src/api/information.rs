//! What there is to know about the service itself.

use std::collections::BTreeMap;

use batchai_common::names::{Kind as Noun, parent};
use batchai_proto::v1::information_service_server::InformationService;
use batchai_proto::v1::usage::Unit;
use batchai_proto::v1::{
    ListOperationsRequest, ListOperationsResponse, ListUsagesRequest, ListUsagesResponse,
    Operation, Usage, UsageName,
};
use tonic::{Request, Response, Status};

use super::Api;
use super::faults::Faults;
use crate::access::rules::RULES;
use crate::state::{State, limit};

#[tonic::async_trait]
impl InformationService for Api {
    async fn list_usages(
        &self,
        request: Request<ListUsagesRequest>,
    ) -> Result<Response<ListUsagesResponse>, Status> {
        let location = request.into_inner().location;
        let mut faults = Faults::default();
        faults.location("location", &location);
        faults.finish(Some(()))?;
        let usages = usages(&*self.read().await?, &location);
        Ok(Response::new(ListUsagesResponse { usages }))
    }

    async fn list_operations(
        &self,
        _: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let operations = RULES.iter().map(|(method, name, _)| Operation {
            name: (*name).to_owned(),
            method: (*method).to_owned(),
        });
        let operations = operations.collect();
        Ok(Response::new(ListOperationsResponse { operations }))
    }
}

/// How much is used of what there is, counted where workspaces have a location; everywhere where it is empty.
fn usages(state: &State, location: &str) -> Vec<Usage> {
    let here = |cluster: &str| {
        let workspace = parent(cluster).and_then(|workspace| state.workspaces.get(workspace));
        location.is_empty() || workspace.is_some_and(|workspace| workspace.location == location)
    };
    let clusters = state.clusters.keys().filter(|name| here(name)).count();
    let (mut cores, mut sizes) = ((0, 0), BTreeMap::<&str, (i64, i64)>::new());
    for node in state.nodes.values() {
        let used = i64::from(node.cluster.as_deref().is_some_and(here));
        let of_node = i64::from(node.facts.cpu_cores);
        cores = (cores.0 + used * of_node, cores.1 + of_node);
        let size = sizes.entry(&node.facts.vm_size).or_default();
        *size = (size.0 + used, size.1 + 1);
    }
    let count = |value: &str, label: &str, current_value: i64, limit: i64| Usage {
        unit: Unit::Count as i32,
        current_value,
        limit,
        name: Some(UsageName {
            value: value.to_owned(),
            localized_value: label.to_owned(),
        }),
    };
    let most = limit(Noun::Cluster) as i64;
    let mut usages = vec![
        count("clusters", "Clusters", clusters as i64, most),
        count("cores", "Cores of nodes in clusters", cores.0, cores.1),
    ];
    usages.extend(sizes.into_iter().map(|(size, (used, all))| {
        let label = format!("Nodes of VM size {size} in clusters");
        count(&format!("nodes/{size}"), &label, used, all)
    }));
    usages
}
