//! What other replicas say to this one.

use std::io::Read;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::tls::Identity;
use batchai_proto::internal::v1::peer_service_server::PeerService;
use batchai_proto::internal::v1::{
    ExchangeRequest, PeerHello, PeerWelcome, SendSnapshotRequest, SnapshotMark, SnapshotTaken,
};
use bytes::{Buf as _, Bytes};
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Message, MessageType};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Peers, is_of_peers};
use crate::access::Who;
use crate::call::caller;
use crate::replica::Handle;
use crate::replica::store::{Snapshots, snapshot};
use crate::state::digest::Digest;

/// How long the next piece of a snapshot may take.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Pieces of a snapshot that are not read yet.
const PIECES_MAX: usize = 4;

/// Serves other replicas.
pub struct PeerDesk {
    pub peers: Peers,
    pub replica: Handle,
    /// Who writes what comes: one at a time.
    pub snapshots: Arc<Mutex<Box<dyn Snapshots>>>,
    pub shutdown: CancellationToken,
}

#[tonic::async_trait]
impl PeerService for PeerDesk {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<PeerWelcome, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<ExchangeRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let mut incoming = request.into_inner();
        let first = incoming.message().await?;
        let hello = check_peer(
            &self.peers,
            &self.replica,
            first.and_then(|first| first.hello),
        )?;
        let (outbox, replies) = mpsc::channel(1);
        let welcome = PeerWelcome {
            hello: Some(PeerHello {
                to: hello.from,
                epoch: self.replica.published().borrow().state.epoch,
                ..self.peers.own().clone()
            }),
        };
        // It has room: nothing was sent yet.
        let _ = outbox.try_send(Ok(welcome));
        let turn = (hello.from, self.peers.turn(hello.from));
        let (peers, replica, shutdown) = (
            self.peers.clone(),
            self.replica.clone(),
            self.shutdown.clone(),
        );
        tokio::spawn(async move {
            let end = tokio::select! {
                end = take_in(&peers, &replica, &hello, turn, incoming) => end,
                () = shutdown.cancelled() => Err(Status::unavailable("it is shutting down")),
                () = outbox.closed() => Ok(()),
            };
            if let Err(status) = end {
                tracing::debug!(
                    replica = hello.from,
                    reason = status.message(),
                    "a peer's stream ended"
                );
                // It may be gone.
                let _ = outbox.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type SendSnapshotStream = Pin<Box<dyn Stream<Item = Result<SnapshotTaken, Status>> + Send>>;

    async fn send_snapshot(
        &self,
        request: Request<Streaming<SendSnapshotRequest>>,
    ) -> Result<Response<Self::SendSnapshotStream>, Status> {
        let mut incoming = request.into_inner();
        let first = incoming.message().await?.unwrap_or_default();
        let hello = check_peer(&self.peers, &self.replica, first.hello)?;
        let message = Message::parse_from_bytes(&first.message).map_err(|_| invalid("message"))?;
        let named = message.get_msg_type() == MessageType::MsgSnapshot;
        if !named || (message.from, message.to) != (hello.from, hello.to) {
            return Err(invalid("message"));
        }
        let (outbox, replies) = mpsc::channel(1);
        let (snapshots, replica, shutdown) = (
            self.snapshots.clone(),
            self.replica.clone(),
            self.shutdown.clone(),
        );
        tokio::spawn(async move {
            let taken = tokio::select! {
                taken = take_snapshot(snapshots, &replica, message, incoming) => taken,
                () = shutdown.cancelled() => Err(Status::unavailable("it is shutting down")),
            };
            if let Err(status) = &taken {
                let why = status.message();
                tracing::error!(why, replica = hello.from, "a snapshot is not taken in");
            }
            // It may be gone.
            let _ = outbox.send(taken.map(|()| SnapshotTaken {})).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

/// Whether who says hello is the replica whose certificate he shows, and one that the ensemble knows.
///
/// # Errors
/// Says why not.
pub fn check_peer(
    peers: &Peers,
    replica: &Handle,
    hello: Option<PeerHello>,
) -> Result<PeerHello, Status> {
    let hello = hello.ok_or_else(|| invalid("hello"))?;
    let caller = caller();
    let shown = match &caller.who {
        Who::Lab => true,
        Who::Known(Identity::Replica { id }) => *id == hello.from,
        _ => false,
    };
    if !shown {
        return Err(ApiError::Forbidden {
            caller: caller.label(),
            permission: "to speak for a replica".to_owned(),
            name: crate::state::replicas::name(hello.from),
        }
        .into());
    }
    let state = replica.published().borrow().state.clone();
    peers.check(&state, &hello)?;
    peers.heard(&hello);
    Ok(hello)
}

async fn take_in(
    peers: &Peers,
    replica: &Handle,
    hello: &PeerHello,
    turn: (u64, u64),
    mut incoming: Streaming<ExchangeRequest>,
) -> Result<(), Status> {
    while let Some(request) = incoming.message().await? {
        let mut messages = Vec::with_capacity(request.messages.len());
        for bytes in &request.messages {
            let message = Message::parse_from_bytes(bytes).map_err(|_| invalid("messages"))?;
            if !is_of_peers(&message, hello) {
                return Err(invalid("messages"));
            }
            messages.push(message);
        }
        let digests = request.digests.iter();
        let digests = digests.map(|told| Some((told.index, Digest::read(&told.digest)?)));
        let digests: Option<Vec<_>> = digests.collect();
        let digests = digests.ok_or_else(|| invalid("digests"))?;
        // It may have been removed since it said hello.
        peers.check_known(&replica.published().borrow().state, hello)?;
        peers.heard(hello);
        if !peers.deliver(turn, replica, (messages, digests)) {
            return Err(Status::aborted("a later stream has begun"));
        }
    }
    Ok(())
}

fn invalid(field: &str) -> Status {
    ApiError::Invalid(vec![Fault::new(field, "is not what a replica sends")]).into()
}

/// Reads a snapshot as it comes, and writes it: it survives a power cut before the replica is told of it.
async fn take_snapshot(
    snapshots: Arc<Mutex<Box<dyn Snapshots>>>,
    replica: &Handle,
    message: Message,
    mut incoming: Streaming<SendSnapshotRequest>,
) -> Result<(), Status> {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let read = tokio::task::spawn_blocking(move || {
        let rest = Bytes::new();
        snapshot::decode(&mut Pieces { pieces, rest })
    });
    loop {
        let piece = tokio::time::timeout(STALL_MAX, incoming.message()).await;
        let piece = piece.map_err(|_| Status::deadline_exceeded("no more of it comes"))?;
        let Some(piece) = piece? else {
            break;
        };
        if sender.send(piece.data).await.is_err() {
            // It was refused: why, is said below.
            break;
        }
    }
    drop(sender);
    let read = read.await;
    let read = read.map_err(|error| Status::internal(error.to_string()))?;
    let (mark, state) = read.map_err(Status::data_loss)?;
    check_mark(&message, &mark).map_err(Status::data_loss)?;
    let known = replica.status().await;
    let known = known.map_err(|error| Status::unavailable(error.to_string()))?;
    if known.applied >= mark.index || known.snapshot >= mark.index {
        // The log went past it meanwhile: it must not take the place of the one that the log relies on.
        return Ok(());
    }
    let written = tokio::task::spawn_blocking(move || {
        let mut snapshots = snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.write(&mark, &state).map(|()| (mark, state))
    });
    let written = written.await;
    let written = written.map_err(|error| Status::internal(error.to_string()))?;
    let (mark, state) = written.map_err(|error| Status::data_loss(error.to_string()))?;
    tracing::info!(index = mark.index, "snapshot came");
    let stepped = replica.step_snapshot(message, mark, state);
    stepped.map_err(|error| Status::unavailable(error.to_string()))
}

/// What came is what the message announces, to the replicas that vote.
fn check_mark(message: &Message, mark: &SnapshotMark) -> Result<(), String> {
    let meta = message.get_snapshot().get_metadata();
    let conf_state = ConfState::parse_from_bytes(&mark.conf_state);
    let same = conf_state.is_ok_and(|conf_state| &conf_state == meta.get_conf_state());
    match same && (mark.index, mark.term) == (meta.index, meta.term) {
        true => Ok(()),
        false => Err("it is not the one that was announced".to_owned()),
    }
}

struct Pieces {
    pieces: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.rest = piece,
                None => return Ok(0),
            }
        }
        let length = into.len().min(self.rest.len());
        self.rest.copy_to_slice(&mut into[..length]);
        Ok(length)
    }
}
