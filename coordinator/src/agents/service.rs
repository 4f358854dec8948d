//! The gRPC face of sessions and log shipping.

use std::pin::Pin;

use batchai_common::error::{ApiError, Fault};
use batchai_proto::agent::v1::agent_service_server::AgentService;
use batchai_proto::agent::v1::{
    SessionRequest, SessionResponse, ShipLogsRequest, ShipLogsResponse, session_request,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::contacts::Contacts;
use super::log_intake;
use super::session::{OUTBOX_MAX, Session};
use crate::logs::LogStore;
use crate::replica::Handle;

/// Serves node agents.
pub struct Agents {
    pub replica: Handle,
    pub contacts: Contacts,
    pub logs: LogStore,
    pub shutdown: CancellationToken,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Agents {
    type SessionStream = Replies<SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut incoming = request.into_inner();
        let first = incoming
            .message()
            .await?
            .and_then(|request| request.message);
        let Some(session_request::Message::Hello(hello)) = first else {
            let fault = Fault::new("message", "the first message must be a hello");
            return Err(ApiError::Invalid(vec![fault]).into());
        };
        let session = Session::open(self.replica.clone(), &self.contacts, hello).await?;
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX);
        tokio::spawn(session.run(incoming, outbox, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type ShipLogsStream = Replies<ShipLogsResponse>;

    async fn ship_logs(
        &self,
        request: Request<Streaming<ShipLogsRequest>>,
    ) -> Result<Response<Self::ShipLogsStream>, Status> {
        let (outbox, replies) = mpsc::channel(log_intake::OUTBOX_MAX);
        let intake = log_intake::Intake::new(self.replica.clone(), self.logs.clone());
        let incoming = request.into_inner();
        tokio::spawn(intake.run(incoming, outbox, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}
