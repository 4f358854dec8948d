//! Clusters.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Labels, Update};
use batchai_proto::v1::cluster_service_server::ClusterService;
use batchai_proto::v1::{
    Cluster, CreateClusterRequest, DeleteClusterRequest, GetClusterRequest,
    ListClusterRemoteLoginInformationRequest, ListClusterRemoteLoginInformationResponse,
    ListClustersRequest, ListClustersResponse, ManualScaleSettings, ResizeClusterRequest,
    ScaleSettings, UpdateClusterRequest, WatchClusterRequest, WatchClusterResponse,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::access::demand;
use super::faults::Faults;
use super::{Api, Replies, cluster_spec, fields, not_found, parse, remote_login, seal, volumes};
use crate::access::{RUN_JOBS, SET_UP};
use crate::call::caller;
use crate::state::file_servers;

/// What can be changed of a cluster.
const CHANGEABLE: [&str; 2] = ["scale_settings", "labels"];

#[tonic::async_trait]
impl ClusterService for Api {
    async fn create_cluster(
        &self,
        request: Request<CreateClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let shown = seal::cluster_without_secrets(&request);
        let once = faults.once(&request.request_id, request.validate_only, &shown);
        let (parent, id) = (&request.parent, &request.cluster_id);
        let name = faults.new_name(Noun::Cluster, parent, "cluster_id", id);
        let cluster = cluster_spec::check(&mut faults, request.cluster.unwrap_or_default());
        let field = "cluster.node_setup.mount_volumes";
        let volumes = cluster.node_setup.as_ref();
        let volumes = volumes.and_then(|setup| setup.mount_volumes.as_ref());
        self.check_servers(&mut faults, field, volumes);
        let name = faults.finish(name)?;
        if cluster.node_setup.as_ref().is_some_and(|setup| {
            setup.setup_task.is_some() || volumes::have_commands(setup.mount_volumes.as_ref())
        }) {
            demand(&caller(), SET_UP, name.as_str())?;
        }
        let state = self.replica.published().borrow().state.clone();
        for server in file_servers::named(&state, volumes) {
            demand(&caller(), RUN_JOBS, server)?;
        }
        let mut cluster = Cluster {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            ..cluster
        };
        self.seal_cluster(&mut cluster, &once).await?;
        let state = self.write_once(Kind::CreateCluster(cluster), once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_cluster(
        &self,
        request: Request<GetClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_clusters(
        &self,
        request: Request<ListClustersRequest>,
    ) -> Result<Response<ListClustersResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (clusters, next_page_token) = self.list(&request.parent, page, &request.filter).await?;
        Ok(Response::new(ListClustersResponse {
            clusters,
            next_page_token,
        }))
    }

    async fn update_cluster(
        &self,
        request: Request<UpdateClusterRequest>,
    ) -> Result<Response<Cluster>, Status> {
        let request = request.into_inner();
        let given = request.cluster.unwrap_or_default();
        let mut faults = Faults::default();
        let name = faults.name("cluster.name", Noun::Cluster, &given.name);
        let about = ("cluster", "Cluster");
        let mask = request.update_mask;
        let changes = fields::masked(&mut faults, about, &given, mask, &CHANGEABLE);
        let scale_settings = changes.contains(&"scale_settings").then(|| {
            let scale = given.scale_settings.unwrap_or_default();
            cluster_spec::check_scale(&mut faults, "cluster.scale_settings", scale)
        });
        faults.labels("cluster.labels", &given.labels);
        let name: String = faults.finish(name)?.into();
        let labels = changes.contains(&"labels").then_some(Labels {
            labels: given.labels,
        });
        let update = Update {
            name: name.clone(),
            etag: given.etag,
            labels,
            scale_settings,
            ..Update::default()
        };
        self.show(&*self.update(update).await?, &name)
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
        let manual = cluster_spec::check_manual(&mut faults, "", manual);
        let name: String = faults.finish(name)?.into();
        let update = Update {
            name: name.clone(),
            etag: request.etag,
            scale_settings: Some(ScaleSettings {
                manual: Some(manual),
                auto_scale: None,
            }),
            ..Update::default()
        };
        self.show(&*self.update(update).await?, &name)
    }

    async fn delete_cluster(
        &self,
        request: Request<DeleteClusterRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteClusterRequest { name, etag, force } = request.into_inner();
        self.delete(Noun::Cluster, &name, etag, force).await?;
        Ok(Response::new(()))
    }

    type WatchClusterStream = Replies<WatchClusterResponse>;

    async fn watch_cluster(
        &self,
        request: Request<WatchClusterRequest>,
    ) -> Result<Response<Self::WatchClusterStream>, Status> {
        let WatchClusterRequest { name, revision } = request.into_inner();
        let reply = |revision, clusters, deleted| WatchClusterResponse {
            revision,
            clusters,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }

    async fn list_cluster_remote_login_information(
        &self,
        request: Request<ListClusterRemoteLoginInformationRequest>,
    ) -> Result<Response<ListClusterRemoteLoginInformationResponse>, Status> {
        let request = request.into_inner();
        let name = parse(Noun::Cluster, &request.name)?;
        let state = self.read().await?;
        let cluster = state.clusters.get(name.as_str());
        let cluster = cluster.ok_or_else(|| not_found(Noun::Cluster, &name))?;
        let page = (request.page_size, request.page_token.as_str());
        let nodes = cluster.members.iter().cloned().collect();
        let (remote_login_information, next_page_token) =
            remote_login::page(&state, name.as_str(), nodes, page)?;
        Ok(Response::new(ListClusterRemoteLoginInformationResponse {
            remote_login_information,
            next_page_token,
        }))
    }
}
