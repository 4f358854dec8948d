//! The gRPC face of sessions, log shipping, and all else that agents call.

use std::pin::Pin;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::last_id;
use batchai_proto::agent::v1::agent_service_server::AgentService;
use batchai_proto::agent::v1::{
    AnswerFileRequest, AnswerFileResponse, FetchBundleRequest, FetchBundleResponse,
    ServeExecRequest, ServeExecResponse, SessionRequest, SessionResponse, ShipLogsRequest,
    ShipLogsResponse, session_request,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::bundle;
use super::contacts::Contacts;
use super::execs::{self, ExecDesk};
use super::files::{self, FileDesk};
use super::link::Uplink;
use super::log_intake;
use super::session::{OUTBOX_MAX, Session};
use crate::access::{Caller, WORK};
use crate::call::caller;
use crate::copies::Copies;
use crate::logs::LogStore;
use crate::replica::handle::unavailable;
use crate::replica::{Handle, ReplicaError};
use crate::secrets::Vault;

/// Serves node agents.
pub struct Agents {
    pub replica: Handle,
    pub contacts: Contacts,
    pub uplink: Uplink,
    pub logs: LogStore,
    pub copies: Copies,
    pub desk: FileDesk,
    pub execs: ExecDesk,
    pub vault: Vault,
    /// How long leases are.
    pub lease: Duration,
    pub shutdown: CancellationToken,
}

/// So much of an id is repeated.
const NODE_ID_CHARS_MAX: usize = 64;

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Agents {
    type SessionStream = Replies<SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.uplink.must_reach()?;
        let mut incoming = request.into_inner();
        let first = incoming
            .message()
            .await?
            .and_then(|request| request.message);
        let Some(session_request::Message::Hello(hello)) = first else {
            let fault = Fault::new("message", "the first message must be a hello");
            return Err(ApiError::Invalid(vec![fault]).into());
        };
        check_own(&hello.node_id, &hello.uid)?;
        let session = Session::open(self, hello).await?;
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX);
        tokio::spawn(session.run(incoming, outbox, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type ShipLogsStream = Replies<ShipLogsResponse>;

    async fn ship_logs(
        &self,
        request: Request<Streaming<ShipLogsRequest>>,
    ) -> Result<Response<Self::ShipLogsStream>, Status> {
        self.replica.must_lead()?;
        let (outbox, replies) = mpsc::channel(log_intake::OUTBOX_MAX);
        let intake = log_intake::Intake::new(self.replica.clone(), self.logs.clone(), caller());
        let incoming = request.into_inner();
        tokio::spawn(intake.run(incoming, outbox, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type AnswerFileStream = Replies<AnswerFileResponse>;

    async fn answer_file(
        &self,
        request: Request<Streaming<AnswerFileRequest>>,
    ) -> Result<Response<Self::AnswerFileStream>, Status> {
        self.replica.must_lead()?;
        let incoming = request.into_inner();
        let (outbox, replies) = mpsc::channel(files::PIECES_MAX);
        let caller = caller();
        let (desk, replica, shutdown) = (
            self.desk.clone(),
            self.replica.clone(),
            self.shutdown.clone(),
        );
        tokio::spawn(async move {
            let registered = |node: &str, uid: &str| {
                caller.is_node(last_id(node), uid) && is_registered(&replica, node, uid)
            };
            let end = tokio::select! {
                end = desk.take_in(registered, incoming, &outbox) => end,
                () = replica.deposed() => Err(unavailable(&replica, &ReplicaError::NotLeader).into()),
                () = shutdown.cancelled() => Ok(()),
            };
            if let Err(status) = end {
                // The agent may be gone; then nobody needs to know.
                let _ = outbox.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type ServeExecStream = Replies<ServeExecResponse>;

    async fn serve_exec(
        &self,
        request: Request<Streaming<ServeExecRequest>>,
    ) -> Result<Response<Self::ServeExecStream>, Status> {
        let incoming = request.into_inner();
        let (outbox, replies) = mpsc::channel(execs::OUTBOX_MAX);
        let caller = caller();
        let (desk, replica, shutdown) = (
            self.execs.clone(),
            self.replica.clone(),
            self.shutdown.clone(),
        );
        tokio::spawn(async move {
            let registered = |node: &str, uid: &str| {
                caller.is_node(last_id(node), uid) && is_registered(&replica, node, uid)
            };
            let end = tokio::select! {
                end = desk.take_in(registered, incoming, outbox.clone()) => end,
                () = shutdown.cancelled() => return,
            };
            // Whoever leads may be the one who waits for it.
            let end = end.map_err(|error| replica.must_lead().err().unwrap_or(error));
            if let Err(error) = end {
                // The agent may be gone; then nobody needs to know.
                let _ = outbox.send(Err(error.into())).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type FetchBundleStream = Replies<FetchBundleResponse>;

    async fn fetch_bundle(
        &self,
        request: Request<FetchBundleRequest>,
    ) -> Result<Response<Self::FetchBundleStream>, Status> {
        let request = request.into_inner();
        let (outbox, replies) = mpsc::channel(bundle::PIECES_MAX);
        check_own(&request.node_id, &request.uid)?;
        let permit = self.copies.bundles().transfer()?;
        let file = bundle::open(&self.replica, &self.copies, &request).await?;
        let store = self.copies.bundles().clone();
        tokio::task::spawn_blocking(move || {
            let digest = batchai_common::names::last_id(&request.bundle);
            bundle::send(file, (&store, digest), &outbox);
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

/// A node's agent speaks for its own node only.
pub(super) fn check_own(node_id: &str, uid: &str) -> Result<(), Status> {
    check_owner(&caller(), node_id, uid)
}

/// The same where another task asks.
pub(super) fn check_owner(caller: &Caller, node_id: &str, uid: &str) -> Result<(), Status> {
    if caller.is_node(node_id, uid) {
        return Ok(());
    }
    let id: String = node_id.chars().take(NODE_ID_CHARS_MAX).collect();
    tracing::warn!(
        caller = caller.label(),
        node = id,
        "speaks for another node; refused"
    );
    Err(ApiError::Forbidden {
        caller: caller.label(),
        permission: WORK.to_owned(),
        name: format!("nodes/{id}"),
    }
    .into())
}

/// Whether a node is the one that the State knows under its name.
pub(super) fn is_registered(replica: &Handle, node: &str, uid: &str) -> bool {
    let published = replica.published();
    published.borrow().state.has_node(node, uid)
}
