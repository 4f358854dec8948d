//! The connection to a coordinator.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use batchai_common::limits::{CALL_TIMEOUT, MESSAGE_BYTES_MAX};
use batchai_common::tls::Route;
use batchai_common::tls::{Connector, Credentials};
use batchai_proto::v1::access_service_client::AccessServiceClient;
use batchai_proto::v1::admin_service_client::AdminServiceClient;
use batchai_proto::v1::bundle_service_client::BundleServiceClient;
use batchai_proto::v1::cluster_service_client::ClusterServiceClient;
use batchai_proto::v1::exec_service_client::ExecServiceClient;
use batchai_proto::v1::experiment_service_client::ExperimentServiceClient;
use batchai_proto::v1::file_server_service_client::FileServerServiceClient;
use batchai_proto::v1::information_service_client::InformationServiceClient;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::node_service_client::NodeServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::storage_alias_service_client::StorageAliasServiceClient;
use batchai_proto::v1::vm_size_service_client::VmSizeServiceClient;
use batchai_proto::v1::workspace_service_client::WorkspaceServiceClient;
use tokio::sync::watch;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::CliError;

/// What broke is tried again for so long before the command gives up; each try waits a little.
const RETRY_MAX: Duration = Duration::from_secs(30);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Who has much to do waits for room so long, and looks for it this often.
const BUSY_MAX: Duration = Duration::from_secs(600);
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// What goes away in its own time is looked for this often.
pub const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// What calls are made over.
pub type Secured = InterceptedService<Route, Bearer>;

/// A connection.
#[derive(Clone)]
pub struct Client {
    secured: Secured,
}

/// Shows a token with every call, where there is one.
#[derive(Clone)]
pub struct Bearer {
    header: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(header) = &self.header {
            request
                .metadata_mut()
                .insert("authorization", header.clone());
        }
        Ok(request)
    }
}

/// Where the coordinator is, and what to show there.
#[derive(Clone, Debug, Default)]
pub struct Target {
    pub endpoint: String,
    pub credentials: Option<PathBuf>,
    pub token: Option<String>,
}

impl Client {
    /// Connects.
    pub async fn connect(target: &Target) -> Result<Client, CliError> {
        let header = match &target.token {
            None => None,
            Some(token) => {
                let header = format!("Bearer {token}").parse();
                let bad = |_| CliError::Usage("BATCHAI_TOKEN is no token".to_owned());
                Some(header.map_err(bad)?)
            }
        };
        let connected = connector(target)?.connect().await;
        let channel = connected.map_err(|source| CliError::Connect {
            endpoint: target.endpoint.clone(),
            source,
        })?;
        let secured = InterceptedService::new(channel, Bearer { header });
        Ok(Client { secured })
    }

    pub fn groups(&self) -> ResourceGroupServiceClient<Secured> {
        ResourceGroupServiceClient::new(self.secured.clone())
    }

    pub fn workspaces(&self) -> WorkspaceServiceClient<Secured> {
        WorkspaceServiceClient::new(self.secured.clone())
    }

    pub fn clusters(&self) -> ClusterServiceClient<Secured> {
        ClusterServiceClient::new(self.secured.clone())
    }

    pub fn file_servers(&self) -> FileServerServiceClient<Secured> {
        FileServerServiceClient::new(self.secured.clone())
    }

    pub fn storage_aliases(&self) -> StorageAliasServiceClient<Secured> {
        StorageAliasServiceClient::new(self.secured.clone())
    }

    pub fn vm_sizes(&self) -> VmSizeServiceClient<Secured> {
        VmSizeServiceClient::new(self.secured.clone())
    }

    pub fn information(&self) -> InformationServiceClient<Secured> {
        InformationServiceClient::new(self.secured.clone())
    }

    pub fn bundles(&self) -> BundleServiceClient<Secured> {
        BundleServiceClient::new(self.secured.clone())
    }

    pub fn execs(&self) -> ExecServiceClient<Secured> {
        ExecServiceClient::new(self.secured.clone())
    }

    pub fn experiments(&self) -> ExperimentServiceClient<Secured> {
        ExperimentServiceClient::new(self.secured.clone())
    }

    pub fn nodes(&self) -> NodeServiceClient<Secured> {
        NodeServiceClient::new(self.secured.clone())
    }

    pub fn jobs(&self) -> JobServiceClient<Secured> {
        JobServiceClient::new(self.secured.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub fn admin(&self) -> AdminServiceClient<Secured> {
        AdminServiceClient::new(self.secured.clone())
    }

    pub fn access(&self) -> AccessServiceClient<Secured> {
        AccessServiceClient::new(self.secured.clone())
    }
}

/// How to come to a coordinator.
fn connector(target: &Target) -> Result<Connector, CliError> {
    // A lab without TLS asks nobody who he is.
    let plain = Connector::is_plain(&target.endpoint);
    if plain && target.token.is_some() {
        let why = "BATCHAI_TOKEN is not sent in plain text: use an https:// endpoint, or unset it";
        return Err(CliError::Usage(why.to_owned()));
    }
    let client = match target.credentials.as_ref().filter(|_| !plain) {
        None => None,
        Some(path) => {
            let read = Credentials::read(path).and_then(|read| match &target.token {
                // Who shows a token is who it says.
                Some(_) => read.anonymous().client(),
                None => read.client(),
            });
            let read = read.map_err(|source| CliError::Credentials {
                path: path.clone(),
                source,
            })?;
            Some(watch::Sender::new(read).subscribe())
        }
    };
    Ok(Connector::new(&target.endpoint, client)?)
}

/// A request that has an answer in time or none.
pub fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// Knows since when nothing has worked.
#[derive(Default)]
pub struct Retry {
    since: Option<Instant>,
    /// Since when there is no room.
    full: Option<Instant>,
    patient: bool,
}

impl Retry {
    /// One that waits for room for long: what it is wanted for takes its time as well.
    pub fn patient() -> Retry {
        Retry {
            patient: true,
            ..Retry::default()
        }
    }

    /// It worked.
    pub fn reset(&mut self) {
        (self.since, self.full) = (None, None);
    }

    /// Waits a little where trying again makes sense, else gives the error back.
    pub async fn again(&mut self, status: Status) -> Result<(), CliError> {
        match self.pause(&status) {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return Err(status.into()),
        }
        Ok(())
    }

    /// How long to wait before trying again; none where that makes no sense.
    fn pause(&mut self, status: &Status) -> Option<Duration> {
        // What tonic calls Unknown, Cancelled or Internal here is a connection that broke at some moment or other.
        let broken = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::OutOfRange
        );
        let info = status.get_details_error_info();
        let reason = info.map(|info| info.reason).unwrap_or_default();
        if self.patient && reason == "BUSY" {
            // Who says so is there.
            self.since = None;
            let full = *self.full.get_or_insert_with(Instant::now);
            return (full.elapsed() <= BUSY_MAX).then_some(BUSY_PAUSE);
        }
        let again = broken || ["OUTCOME_UNKNOWN", "BUSY"].contains(&reason.as_str());
        let since = *self.since.get_or_insert_with(Instant::now);
        (again && since.elapsed() <= RETRY_MAX).then_some(RETRY_PAUSE)
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

#[cfg(test)]
mod tests {
    use batchai_common::error::ApiError;

    use super::*;

    #[test]
    fn who_copies_waits_longer_for_room_than_for_an_answer() {
        let busy = Status::from(ApiError::Busy { what: "room" });
        let gone = Status::unavailable("gone");
        let wrong = Status::failed_precondition("wrong");
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        let mut other = Retry {
            since: ago(31),
            ..Retry::default()
        };
        assert_eq!(other.pause(&busy), None);
        let mut retry = Retry {
            since: ago(31),
            ..Retry::patient()
        };
        assert_eq!(retry.pause(&gone), None);
        assert_eq!(retry.pause(&busy), Some(BUSY_PAUSE));
        retry.full = ago(500);
        assert_eq!(retry.pause(&busy), Some(BUSY_PAUSE));
        assert_eq!(retry.pause(&gone), Some(RETRY_PAUSE));
        assert_eq!(retry.pause(&wrong), None);
        retry.full = ago(601);
        assert_eq!(retry.pause(&busy), None);
    }
}
