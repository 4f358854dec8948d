//! The gRPC API of a real ensemble, for tests that say in code what they ask.

use std::future::Future;

use std::path::Path;

use batchai_common::tls::Route;
use batchai_common::tls::{Connector, Credentials};
use batchai_proto::v1;
use batchai_proto::v1::access_service_client::AccessServiceClient;
use batchai_proto::v1::cluster_service_client::ClusterServiceClient;
use batchai_proto::v1::experiment_service_client::ExperimentServiceClient;
use batchai_proto::v1::file_server_service_client::FileServerServiceClient;
use batchai_proto::v1::information_service_client::InformationServiceClient;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::node_service_client::NodeServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::storage_alias_service_client::StorageAliasServiceClient;
use batchai_proto::v1::vm_size_service_client::VmSizeServiceClient;
use batchai_proto::v1::workspace_service_client::WorkspaceServiceClient;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use crate::ensemble::Ensemble;

pub const GROUP: &str = "resourceGroups/g";
pub const WORKSPACE: &str = "resourceGroups/g/workspaces/w";
pub const EXPERIMENT: &str = "resourceGroups/g/workspaces/w/experiments/e";
pub const CLUSTER: &str = "resourceGroups/g/workspaces/w/clusters/c";

/// An ensemble and a connection to its coordinator.
pub struct Api {
    pub e: Ensemble,
    pub runtime: tokio::runtime::Runtime,
    pub channel: Route,
}

/// A connection to an ensemble's coordinator, as its administrator.
pub fn connect(runtime: &tokio::runtime::Runtime, e: &Ensemble) -> Route {
    let channel = runtime.block_on(connector(&e.endpoint, &e.credentials()).connect());
    channel.expect("the coordinator listens")
}

/// How to come to a coordinator, with a file of credentials.
pub fn connector(endpoint: &str, credentials: &Path) -> Connector {
    let credentials = Credentials::read(credentials).expect("credentials");
    let client = credentials.client().expect("they can be used");
    let latest = tokio::sync::watch::Sender::new(client);
    Connector::new(endpoint, Some(latest.subscribe())).expect("an endpoint")
}

impl Api {
    pub fn start(e: Ensemble) -> Api {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let channel = connect(&runtime, &e);
        Api {
            e,
            runtime,
            channel,
        }
    }

    /// Another connection.
    pub fn connect(&self) -> Route {
        connect(&self.runtime, &self.e)
    }

    /// Makes a call and waits for its answer.
    pub fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(call).map(Response::into_inner)
    }

    pub fn groups(&self) -> ResourceGroupServiceClient<Route> {
        ResourceGroupServiceClient::new(self.channel.clone())
    }

    pub fn workspaces(&self) -> WorkspaceServiceClient<Route> {
        WorkspaceServiceClient::new(self.channel.clone())
    }

    pub fn clusters(&self) -> ClusterServiceClient<Route> {
        ClusterServiceClient::new(self.channel.clone())
    }

    pub fn file_servers(&self) -> FileServerServiceClient<Route> {
        FileServerServiceClient::new(self.channel.clone())
    }

    pub fn experiments(&self) -> ExperimentServiceClient<Route> {
        ExperimentServiceClient::new(self.channel.clone())
    }

    pub fn jobs(&self) -> JobServiceClient<Route> {
        JobServiceClient::new(self.channel.clone())
    }

    pub fn nodes(&self) -> NodeServiceClient<Route> {
        NodeServiceClient::new(self.channel.clone())
    }

    pub fn storage_aliases(&self) -> StorageAliasServiceClient<Route> {
        StorageAliasServiceClient::new(self.channel.clone())
    }

    pub fn vm_sizes(&self) -> VmSizeServiceClient<Route> {
        VmSizeServiceClient::new(self.channel.clone())
    }

    pub fn access(&self) -> AccessServiceClient<Route> {
        AccessServiceClient::new(self.channel.clone())
    }

    pub fn information(&self) -> InformationServiceClient<Route> {
        InformationServiceClient::new(self.channel.clone())
    }

    pub fn create_job(&self, id: &str, job: v1::Job) -> Result<v1::Job, Status> {
        let request = v1::CreateJobRequest {
            parent: EXPERIMENT.into(),
            job_id: id.into(),
            job: Some(job),
            ..Default::default()
        };
        self.call(self.jobs().create_job(request))
    }
}

/// The smallest job.
pub fn job() -> v1::Job {
    v1::Job {
        cluster: CLUSTER.into(),
        node_count: 1,
        std_out_err_path_prefix: "/tmp/never-written".into(),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: "true".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The code of a refusal and the fields it names. It has exactly one ErrorInfo.
pub fn refusal(status: &Status) -> (Code, Vec<String>) {
    let details = status.get_error_details_vec();
    let infos = details.iter().filter(|detail| {
        matches!(detail, tonic_types::ErrorDetail::ErrorInfo(info) if info.domain == "batchai")
    });
    assert_eq!(infos.count(), 1, "{status:?}");
    let details = status.get_error_details();
    let fields = details
        .bad_request()
        .map(|request| &request.field_violations);
    let fields = fields.into_iter().flatten();
    (
        status.code(),
        fields.map(|violation| violation.field.clone()).collect(),
    )
}
