//! The connection to a coordinator.

use std::time::Duration;

use batchai_common::limits::{
    CALL_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX,
};
use batchai_proto::v1::bundle_service_client::BundleServiceClient;
use batchai_proto::v1::cluster_service_client::ClusterServiceClient;
use batchai_proto::v1::experiment_service_client::ExperimentServiceClient;
use batchai_proto::v1::file_server_service_client::FileServerServiceClient;
use batchai_proto::v1::information_service_client::InformationServiceClient;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::node_service_client::NodeServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::vm_size_service_client::VmSizeServiceClient;
use batchai_proto::v1::workspace_service_client::WorkspaceServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::CliError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream that broke is opened again so often before the command gives up; each try waits a little.
const RETRIES_MAX: u32 = 150;
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// What goes away in its own time is looked for this often.
pub const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// A connection.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects.
    pub async fn connect(endpoint: &str) -> Result<Client, CliError> {
        let connected = parse(endpoint)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .connect()
            .await;
        let channel = connected.map_err(|source| CliError::Connect {
            endpoint: endpoint.to_owned(),
            source,
        })?;
        Ok(Client { channel })
    }

    /// Whether a text could be where a coordinator listens.
    pub fn check(endpoint: &str) -> Result<(), CliError> {
        parse(endpoint).map(|_| ())
    }

    pub fn groups(&self) -> ResourceGroupServiceClient<Channel> {
        ResourceGroupServiceClient::new(self.channel.clone())
    }

    pub fn workspaces(&self) -> WorkspaceServiceClient<Channel> {
        WorkspaceServiceClient::new(self.channel.clone())
    }

    pub fn clusters(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone())
    }

    pub fn file_servers(&self) -> FileServerServiceClient<Channel> {
        FileServerServiceClient::new(self.channel.clone())
    }

    pub fn vm_sizes(&self) -> VmSizeServiceClient<Channel> {
        VmSizeServiceClient::new(self.channel.clone())
    }

    pub fn information(&self) -> InformationServiceClient<Channel> {
        InformationServiceClient::new(self.channel.clone())
    }

    pub fn bundles(&self) -> BundleServiceClient<Channel> {
        BundleServiceClient::new(self.channel.clone())
    }

    pub fn experiments(&self) -> ExperimentServiceClient<Channel> {
        ExperimentServiceClient::new(self.channel.clone())
    }

    pub fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone())
    }

    pub fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }
}

fn parse(endpoint: &str) -> Result<Endpoint, CliError> {
    let bad = || CliError::Endpoint {
        endpoint: endpoint.to_owned(),
    };
    let parsed = Endpoint::from_shared(endpoint.to_owned()).map_err(|_| bad())?;
    match parsed.uri().scheme_str() == Some("http") && parsed.uri().authority().is_some() {
        true => Ok(parsed),
        false => Err(bad()),
    }
}

/// A request that has an answer in time or none.
pub fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// Counts how often a stream was opened again in a row.
#[derive(Default)]
pub struct Retry {
    failures: u32,
}

impl Retry {
    /// It worked.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Waits a little where trying again makes sense, else gives the error back.
    pub async fn again(&mut self, status: Status) -> Result<(), CliError> {
        // What tonic calls Unknown, Cancelled or Internal here is a connection that broke at some moment or other.
        let broken = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::OutOfRange
        );
        let again = status
            .get_details_error_info()
            .is_some_and(|info| ["OUTCOME_UNKNOWN", "BUSY"].contains(&info.reason.as_str()));
        if !(broken || again) || self.failures >= RETRIES_MAX {
            return Err(status.into());
        }
        self.failures += 1;
        tokio::time::sleep(RETRY_PAUSE).await;
        Ok(())
    }
}

/// A name for a request: sent again under it, it is carried out once.
pub fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Sends a request that has a `request_id` until it is known what became of it.
pub async fn send_once<T: Clone, R, F>(
    message: T,
    call: impl Fn(tonic::Request<T>) -> F,
) -> Result<R, CliError>
where
    F: Future<Output = Result<tonic::Response<R>, Status>>,
{
    let mut retry = Retry::default();
    loop {
        match call(request(message.clone())).await {
            Ok(reply) => return Ok(reply.into_inner()),
            Err(status) => retry.again(status).await?,
        }
    }
}
