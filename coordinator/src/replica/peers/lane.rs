//! The ways to other replicas: one task for each, which empties a queue into one ordered stream.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use batchai_common::error::{ApiError, NODE_EXPELLED, causes};
use batchai_common::tls::Connector;
use batchai_proto::internal::v1::peer_service_client::PeerServiceClient;
use batchai_proto::internal::v1::{
    ExchangeRequest, PeerHello, PeerWelcome, SendSnapshotRequest, SnapshotMark,
};
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::Message;
use rustls::ClientConfig;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tonic_types::StatusExt as _;

use super::{Outgoing, PEER_BYTES_MAX, Peers, held};
use crate::replica::Handle;
use crate::replica::store::snapshot;
use crate::state::{State, replicas};

/// Messages that may wait for a peer: one that lags is served from the log, some at a time.
const QUEUE_MAX: usize = 1024;
/// Bytes that go in one message of the stream, but for the last of them.
const BATCH_BYTES: usize = 512 << 10;
/// Messages of the stream that the network has not taken.
const OUTBOX_MAX: usize = 4;
const PIECE_BYTES: usize = 64 << 10;
const PIECES_MAX: usize = 4;
const GREETING_MAX: Duration = Duration::from_secs(5);
/// How long a snapshot may take on its way.
const SNAPSHOT_MAX: Duration = Duration::from_secs(600);
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// The State is looked at this often for replicas that came, went or moved.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Whom the lanes go to, and how.
pub struct Lanes {
    pub peers: Peers,
    pub replica: Handle,
    /// Where replicas are before the State says it.
    pub first: BTreeMap<u64, String>,
    /// None in a lab.
    pub credentials: Option<watch::Receiver<Arc<ClientConfig>>>,
}

impl Lanes {
    /// Keeps a lane to every replica of the ensemble until the token is cancelled.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut open: BTreeMap<u64, (String, CancellationToken)> = BTreeMap::new();
        let published = self.replica.published();
        loop {
            let state = published.borrow().state.clone();
            let book = self.peers.book(&self.first, &state);
            open.retain(|id, (endpoint, end)| {
                let stays = book.get(id) == Some(endpoint);
                if !stays {
                    held(&self.peers.shared.lanes).remove(id);
                    end.cancel();
                }
                stays
            });
            for (id, endpoint) in book {
                if let Entry::Vacant(place) = open.entry(id) {
                    let end = shutdown.child_token();
                    self.open(id, &endpoint, end.clone());
                    place.insert((endpoint, end));
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    fn open(&self, id: u64, endpoint: &str, end: CancellationToken) {
        let connector = match Connector::new(endpoint, self.credentials.clone()) {
            Ok(connector) => connector,
            Err(error) => {
                tracing::error!(%error, replica = id, "cannot be reached");
                return;
            }
        };
        // One that waited in a lane that was closed did not arrive.
        self.replica.tell_snapshot_sent(id, false);
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        held(&self.peers.shared.lanes).insert(id, sender);
        let lane = Lane {
            hello: PeerHello {
                to: id,
                ..self.peers.own().clone()
            },
            peers: self.peers.clone(),
            replica: self.replica.clone(),
            connector,
            queue,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = lane.run() => {}
                () = end.cancelled() => {}
            }
        });
    }
}

/// The way to one peer.
struct Lane {
    hello: PeerHello,
    peers: Peers,
    replica: Handle,
    connector: Connector,
    queue: mpsc::Receiver<Outgoing>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error("cannot connect: {}", causes(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", .0.message())]
    Refused(#[from] Status),
    #[error("it does not answer")]
    Silent,
    #[error("it ended the stream")]
    Ended,
    #[error("{0}")]
    Stranger(ApiError),
}

impl LaneError {
    /// The machine answers that nobody listens: unlike silence, a process that has ended and not a way that is cut.
    fn is_refusal_of_the_machine(&self) -> bool {
        let LaneError::Connect(error) = self else {
            return false;
        };
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let io = cause.downcast_ref::<std::io::Error>();
            if io.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused) {
                return true;
            }
            source = cause.source();
        }
        false
    }
}

impl Lane {
    async fn run(mut self) {
        let (mut pause, mut said) = (BACKOFF_FIRST, String::new());
        loop {
            let begun = Instant::now();
            let error = match self.talk().await {
                Ok(()) => return,
                Err(error) => error,
            };
            let lasted = begun.elapsed() > BACKOFF_MAX;
            if lasted {
                pause = BACKOFF_FIRST;
            }
            if let LaneError::Refused(status) = &error
                && status
                    .get_details_error_info()
                    .is_some_and(|info| info.reason == NODE_EXPELLED)
            {
                tracing::error!("replica {} says that this one was removed", self.hello.to);
                self.peers.removed().cancel();
                return;
            }
            // The same again and again is said once.
            let text = error.to_string();
            if said != text {
                tracing::warn!(
                    error = text,
                    replica = self.hello.to,
                    "no stream to a peer; trying again"
                );
                said = text;
            }
            // What waited is too old when it can be sent.
            while let Ok(outgoing) = self.queue.try_recv() {
                if matches!(outgoing, Outgoing::Snapshot(_)) {
                    self.replica.tell_snapshot_sent(self.hello.to, false);
                }
            }
            self.replica.unreachable(self.hello.to);
            if error.is_refusal_of_the_machine() {
                self.replica.gone(self.hello.to);
            }
            if lasted {
                // Whether its process has ended is known at once.
                continue;
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }

    async fn talk(&mut self) -> Result<(), LaneError> {
        let greeting = tokio::time::timeout(GREETING_MAX, self.greet()).await;
        let (outbox, mut incoming) = greeting.map_err(|_| LaneError::Silent)??;
        loop {
            let first = tokio::select! {
                first = self.queue.recv() => first,
                end = incoming.message() => return Err(end.err().map_or(LaneError::Ended, Into::into)),
            };
            let Some(first) = first else {
                return Ok(());
            };
            let request = self.batch(first);
            if request.messages.is_empty() && request.digests.is_empty() {
                continue;
            }
            tokio::select! {
                sent = outbox.send(request) => sent.map_err(|_| LaneError::Ended)?,
                end = incoming.message() => return Err(end.err().map_or(LaneError::Ended, Into::into)),
            }
        }
    }

    async fn greet(
        &self,
    ) -> Result<(mpsc::Sender<ExchangeRequest>, Streaming<PeerWelcome>), LaneError> {
        let channel = self.connector.connect().await?;
        let mut client = PeerServiceClient::new(channel).max_encoding_message_size(PEER_BYTES_MAX);
        let (outbox, requests) = mpsc::channel(OUTBOX_MAX);
        let hello = ExchangeRequest {
            hello: Some(PeerHello {
                epoch: self.replica.published().borrow().state.epoch,
                ..self.hello.clone()
            }),
            ..ExchangeRequest::default()
        };
        outbox.send(hello).await.map_err(|_| LaneError::Ended)?;
        let answer = client.exchange(ReceiverStream::new(requests)).await?;
        let mut incoming = answer.into_inner();
        let welcome = incoming.message().await?.and_then(|welcome| welcome.hello);
        let theirs = welcome.ok_or(LaneError::Ended)?;
        let state = self.replica.published().borrow().state.clone();
        if theirs.from != self.hello.to {
            let why = format!("who answers at its address is replica {}", theirs.from);
            let name = replicas::name(self.hello.to);
            return Err(LaneError::Stranger(ApiError::WrongState { name, why }));
        }
        self.peers
            .check(&state, &theirs)
            .map_err(LaneError::Stranger)?;
        self.peers.heard(&theirs);
        tracing::info!(
            replica = theirs.from,
            version = theirs.version,
            "stream to a peer"
        );
        Ok((outbox, incoming))
    }

    /// What waits, as far as it goes into one message.
    fn batch(&mut self, first: Outgoing) -> ExchangeRequest {
        let (mut batch, mut size, mut next) = (ExchangeRequest::default(), 0, Some(first));
        while let Some(outgoing) = next {
            match outgoing {
                Outgoing::Message(message) => {
                    let bytes = message.write_to_bytes();
                    let bytes = bytes.expect("what is in memory can be encoded");
                    size += bytes.len();
                    batch.messages.push(bytes.into());
                }
                Outgoing::Digest(digest) => batch.digests.push(digest),
                Outgoing::Snapshot(snapshot) => self.send_snapshot(*snapshot),
            }
            next = match size < BATCH_BYTES {
                true => self.queue.try_recv().ok(),
                false => None,
            };
        }
        batch
    }

    /// Beside the stream: it may take long.
    fn send_snapshot(&self, (message, mark, state): (Message, SnapshotMark, State)) {
        let (connector, hello, replica) = (
            self.connector.clone(),
            self.hello.clone(),
            self.replica.clone(),
        );
        tokio::spawn(async move {
            let (to, index) = (hello.to, mark.index);
            let sending = send_snapshot(connector, hello, (message, mark, state));
            let sent = tokio::time::timeout(SNAPSHOT_MAX, sending).await;
            let sent = sent.unwrap_or(Err(LaneError::Silent));
            match &sent {
                Ok(()) => tracing::info!(replica = to, index, "snapshot sent"),
                Err(error) => {
                    tracing::warn!(%error, replica = to, index, "a snapshot did not arrive")
                }
            }
            replica.tell_snapshot_sent(to, sent.is_ok());
        });
    }
}

async fn send_snapshot(
    connector: Connector,
    hello: PeerHello,
    (message, mark, state): (Message, SnapshotMark, State),
) -> Result<(), LaneError> {
    let channel = connector.connect().await?;
    let (outbox, pieces) = mpsc::channel(PIECES_MAX);
    let first = SendSnapshotRequest {
        hello: Some(hello),
        message: message
            .write_to_bytes()
            .expect("what is in memory can be encoded"),
        data: Bytes::new(),
    };
    outbox.send(first).await.map_err(|_| LaneError::Ended)?;
    tokio::task::spawn_blocking(move || {
        let pieces = snapshot::Pieces::new(outbox, |data| SendSnapshotRequest {
            data,
            ..SendSnapshotRequest::default()
        });
        let mut out = std::io::BufWriter::with_capacity(PIECE_BYTES, pieces);
        // Who takes them says what went wrong.
        let _ = snapshot::encode(&mut out, &mark, &state)
            .and_then(|()| std::io::Write::flush(&mut out));
    });
    let mut client = PeerServiceClient::new(channel);
    let answer = client.send_snapshot(ReceiverStream::new(pieces)).await?;
    let taken = answer.into_inner().message().await?;
    taken.map(|_| ()).ok_or(LaneError::Ended)
}
