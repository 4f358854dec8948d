//! Clusters.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Delete, ResizeCluster};
use batchai_proto::v1;
use batchai_proto::v1::cluster_service_server::ClusterService;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption;
use batchai_proto::v1::{
    Cluster, CreateClusterRequest, DeleteClusterRequest, GetClusterRequest, ListClustersRequest,
    ListClustersResponse, ManualScaleSettings, ResizeClusterRequest,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::page::page;
use super::{Api, Faults, not_found, parse, views};
use crate::state::State;

const NODES_MAX: i32 = 10_000;
const TEXT_BYTES_MAX: usize = 256;

#[tonic::async_trait]
impl ClusterService for Api {
    async fn create_cluster(
        &self,
        request: Request<CreateClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let (parent, id) = (&request.parent, &request.cluster_id);
        let name = faults.new_name(Noun::Cluster, parent, "cluster_id", id);
        let cluster = check(&mut faults, request.cluster.unwrap_or_default());
        let name = faults.finish(name)?;
        let cluster = Cluster {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            ..cluster
        };
        let state = self.write_once(Kind::CreateCluster(cluster), once).await?;
        self.reply(&state, name.as_str())
    }

    async fn get_cluster(
        &self,
        request: Request<GetClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        let name = parse(Noun::Cluster, &request.get_ref().name)?;
        self.reply(&self.read().await?, name.as_str())
    }

    async fn list_clusters(
        &self,
        request: Request<ListClustersRequest>,
    ) -> Result<Response<ListClustersResponse>, Status> {
        let request = request.into_inner();
        let parent = self.parent(Noun::Cluster, &request.parent)?;
        let (state, heard) = (self.read().await?, self.contacts.heard());
        if !state.workspaces.contains_key(parent.as_str()) {
            return Err(not_found(Noun::Workspace, &parent).into());
        }
        let page_of = (request.page_size, request.page_token.as_str());
        let (clusters, next_page_token) = page(
            &state.clusters,
            Some(&parent),
            Noun::Cluster,
            page_of,
            |_, cluster| views::cluster(&state, &heard, cluster),
        )?;
        Ok(Response::new(ListClustersResponse {
            clusters,
            next_page_token,
        }))
    }

    async fn resize_cluster(
        &self,
        request: Request<ResizeClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let name = faults.name("name", Noun::Cluster, &request.name);
        let target = request.target_node_count;
        if target.is_none() {
            faults.invalid("target_node_count", "must be given, also where it is 0");
        }
        let manual = ManualScaleSettings {
            target_node_count: target.unwrap_or_default(),
            node_deallocation_option: request.node_deallocation_option,
        };
        let manual = check_manual(&mut faults, "", manual);
        let name: String = faults.finish(name)?.into();
        let command = ResizeCluster {
            name: name.clone(),
            manual: Some(manual),
            etag: request.etag,
        };
        let state = self.write(Kind::ResizeCluster(command)).await?;
        self.reply(&state, &name)
    }

    async fn delete_cluster(
        &self,
        request: Request<DeleteClusterRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteClusterRequest { name, etag } = request.into_inner();
        let name = parse(Noun::Cluster, &name)?.into();
        self.write(Kind::DeleteCluster(Delete { name, etag }))
            .await?;
        Ok(Response::new(()))
    }
}

impl Api {
    fn reply(&self, state: &State, name: &str) -> Result<Response<Cluster>, Status> {
        let cluster =
            state
                .clusters
                .get(name)
                .ok_or_else(|| batchai_common::error::ApiError::NotFound {
                    kind: Noun::Cluster,
                    name: name.into(),
                })?;
        Ok(Response::new(views::cluster(
            state,
            &self.contacts.heard(),
            cluster,
        )))
    }
}

/// Checks a cluster's settings and fills in defaults.
fn check(faults: &mut Faults, given: Cluster) -> Cluster {
    if given.vm_size.is_empty() || given.vm_size.len() > TEXT_BYTES_MAX {
        let why = format!("must be given, with at most {TEXT_BYTES_MAX} bytes");
        faults.invalid("cluster.vm_size", why);
    }
    let scale = given.scale_settings.unwrap_or_default();
    let auto = scale.auto_scale.is_some();
    faults.not_served("cluster.scale_settings.auto_scale", auto);
    let manual = scale.manual.unwrap_or_default();
    let manual = check_manual(faults, "cluster.scale_settings.manual.", manual);
    let image = given
        .virtual_machine_configuration
        .and_then(|c| c.image_reference);
    let image = image.map(|image| check_image(faults, image));
    for (field, set) in [
        ("cluster.name", !given.name.is_empty()),
        ("cluster.uid", !given.uid.is_empty()),
        ("cluster.etag", !given.etag.is_empty()),
        ("cluster.create_time", given.create_time.is_some()),
        ("cluster.allocation_state", given.allocation_state != 0),
        ("cluster.current_node_count", given.current_node_count != 0),
        (
            "cluster.node_state_counts",
            given.node_state_counts.is_some(),
        ),
        ("cluster.errors", !given.errors.is_empty()),
    ] {
        faults.output_only(field, set);
    }
    Cluster {
        vm_size: given.vm_size,
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(manual),
            auto_scale: None,
        }),
        virtual_machine_configuration: image.map(|image| v1::VirtualMachineConfiguration {
            image_reference: Some(image),
        }),
        ..Default::default()
    }
}

fn check_manual(
    faults: &mut Faults,
    prefix: &str,
    given: ManualScaleSettings,
) -> ManualScaleSettings {
    if !(0..=NODES_MAX).contains(&given.target_node_count) {
        let field = format!("{prefix}target_node_count");
        faults.invalid(field, format!("must be from 0 to {NODES_MAX}"));
    }
    let option = NodeDeallocationOption::try_from(given.node_deallocation_option);
    let option = option.unwrap_or_else(|_| {
        faults.invalid(
            format!("{prefix}node_deallocation_option"),
            "is not one of its values",
        );
        NodeDeallocationOption::Unspecified
    });
    let option = match option {
        NodeDeallocationOption::Unspecified => NodeDeallocationOption::Requeue,
        option => option,
    };
    ManualScaleSettings {
        node_deallocation_option: option as i32,
        ..given
    }
}

fn check_image(faults: &mut Faults, given: v1::ImageReference) -> v1::ImageReference {
    let field = "cluster.virtual_machine_configuration.image_reference";
    for (part, text, required) in [
        ("publisher", &given.publisher, true),
        ("offer", &given.offer, true),
        ("sku", &given.sku, true),
        ("version", &given.version, false),
    ] {
        if (required && text.is_empty()) || text.len() > TEXT_BYTES_MAX || text.contains(':') {
            let why = format!("must be given, without `:` and with at most {TEXT_BYTES_MAX} bytes");
            faults.invalid(format!("{field}.{part}"), why);
        }
    }
    let version = match given.version.is_empty() {
        true => "latest".to_owned(),
        false => given.version,
    };
    v1::ImageReference { version, ..given }
}
