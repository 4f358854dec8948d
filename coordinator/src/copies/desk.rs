//! Gives other replicas what they ask for. Who may ask, `replica::peers` knows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind, Name};
use batchai_proto::internal::v1::copy_service_server::CopyService;
use batchai_proto::internal::v1::fetch_copy_request::What;
use batchai_proto::internal::v1::{
    FetchCopyRequest, FetchCopyResponse, KeepBundleRequest, KeepBundleResponse, KnownLog, LogsCopy,
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{Copies, Found};
use crate::bundles::BundleStore;
use crate::logs::FileKey;
use crate::replica::peers::check_peer;

/// Pieces that the other one has not taken yet.
const PIECES_MAX: usize = 4;
/// One that takes nothing for so long gets no more.
const SLOW_MAX: Duration = Duration::from_secs(30);
/// Bundles that are given at once, each by a thread, and that are fetched at once because others want them kept.
const GIVEN_MAX: usize = 16;
const KEPT_MAX: usize = 16;

/// Serves other replicas.
pub struct CopyDesk {
    copies: Copies,
    shutdown: CancellationToken,
    given: Arc<Semaphore>,
    kept: Arc<Semaphore>,
}

impl CopyDesk {
    pub fn new(copies: Copies, shutdown: CancellationToken) -> CopyDesk {
        CopyDesk {
            copies,
            shutdown,
            given: Arc::new(Semaphore::new(GIVEN_MAX)),
            kept: Arc::new(Semaphore::new(KEPT_MAX)),
        }
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Outbox = mpsc::Sender<Result<FetchCopyResponse, Status>>;

#[tonic::async_trait]
impl CopyService for CopyDesk {
    type FetchCopyStream = Replies<FetchCopyResponse>;

    async fn fetch_copy(
        &self,
        request: Request<FetchCopyRequest>,
    ) -> Result<Response<Self::FetchCopyStream>, Status> {
        let request = request.into_inner();
        let copies = &self.copies;
        check_peer(&copies.parts.peers, &copies.parts.replica, request.hello)?;
        let (outbox, replies) = mpsc::channel(PIECES_MAX);
        match request.what.ok_or_else(|| invalid("what"))? {
            What::Bundle(name) => {
                let name = Name::parse(Kind::Bundle, &name).map_err(|_| invalid("bundle"))?;
                let (store, digest) = (copies.bundles().clone(), name.id().to_owned());
                let open = tokio::task::spawn_blocking(move || store.open(&digest));
                let opened = open.await.map_err(io::Error::other);
                let opened = opened.and_then(|opened| opened).map_err(unreadable)?;
                let file = opened.ok_or_else(|| ApiError::NotFound {
                    kind: Kind::Bundle,
                    name: name.to_string(),
                })?;
                let (store, given) = (copies.bundles().clone(), self.given.clone());
                tokio::spawn(async move {
                    let permit = given.acquire_owned().await;
                    let send = move || send_bundle(&store, name.id(), file, &outbox);
                    let sent = tokio::task::spawn_blocking(send).await;
                    drop((permit, sent));
                });
            }
            What::Logs(wanted) => {
                let (copies, shutdown) = (copies.clone(), self.shutdown.clone());
                tokio::spawn(async move {
                    let sent = tokio::select! {
                        sent = copies.send_logs(wanted, &outbox) => sent,
                        () = shutdown.cancelled() => Err(Status::unavailable("it is shutting down")),
                    };
                    if let Err(status) = sent {
                        let _ = outbox.send(Err(status)).await;
                    }
                });
            }
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type KeepBundleStream = Replies<KeepBundleResponse>;

    async fn keep_bundle(
        &self,
        request: Request<KeepBundleRequest>,
    ) -> Result<Response<Self::KeepBundleStream>, Status> {
        let request = request.into_inner();
        let copies = self.copies.clone();
        check_peer(&copies.parts.peers, &copies.parts.replica, request.hello)?;
        let name = Name::parse(Kind::Bundle, &request.bundle).map_err(|_| invalid("bundle"))?;
        let (outbox, replies) = mpsc::channel(1);
        let (shutdown, kept) = (self.shutdown.clone(), self.kept.clone());
        tokio::spawn(async move {
            let keep = async {
                let _permit = kept.acquire_owned().await;
                copies.use_bundle(name.id()).await
            };
            let kept = tokio::select! {
                kept = keep => kept,
                () = shutdown.cancelled() => return,
                () = outbox.closed() => return,
            };
            let reply = match kept {
                Ok(Found::Here) => Ok(KeepBundleResponse {}),
                Ok(Found::Nowhere) => Err(Status::not_found("nobody gives it")),
                Ok(Found::Unknown(why)) => Err(Status::unavailable(why)),
                Err(error) => Err(unreadable(error)),
            };
            // It may be gone.
            let _ = outbox.send(reply).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

fn invalid(field: &str) -> Status {
    ApiError::Invalid(vec![Fault::new(field, "is not what a replica sends")]).into()
}

fn unreadable(error: io::Error) -> Status {
    tracing::error!(%error, "what another replica wants cannot be read or kept");
    Status::unavailable(format!("the disk: {error}"))
}

/// The whole of a bundle, its size in the first piece.
fn send_bundle(store: &BundleStore, digest: &str, file: File, outbox: &Outbox) {
    let runtime = tokio::runtime::Handle::current();
    let size = file.metadata().map(|found| found.len());
    let mut size = i64::try_from(size.unwrap_or_default()).unwrap_or(i64::MAX);
    let give = |data| {
        let piece = FetchCopyResponse {
            size: std::mem::take(&mut size),
            data,
            ..FetchCopyResponse::default()
        };
        let sent = runtime.block_on(outbox.send_timeout(Ok(piece), SLOW_MAX));
        sent.is_ok()
    };
    if let Err(error) = store.give(digest, file, give) {
        let _ = outbox.blocking_send(Err(Status::unavailable(error.to_string())));
    }
}

impl Copies {
    async fn send_logs(&self, wanted: LogsCopy, outbox: &Outbox) -> Result<(), Status> {
        let known = wanted.known.iter();
        let known = known.map(|log| ((&*log.node, &*log.file), log.length));
        let known: BTreeMap<_, _> = known.collect();
        // A text that leaves the directory names no attempt.
        let published = self.parts.replica.published();
        if !published
            .borrow()
            .state
            .attempts
            .contains_key(&wanted.attempt)
        {
            return Err(Status::unavailable("it does not know that attempt"));
        }
        let files = self
            .parts
            .logs
            .files(&wanted.attempt)
            .await
            .map_err(unreadable)?;
        for found in files {
            let node = format!("nodes/{}", found.node_id);
            let Some(key) = FileKey::new(&wanted.attempt, &node, &found.file) else {
                continue;
            };
            let Some(file) = self.parts.logs.find(key).await.map_err(unreadable)? else {
                continue;
            };
            let end = *file.follow().borrow();
            let begin = known.get(&(&*node, &*found.file));
            let mut offset = begin.map_or(0, |length| u64::try_from(*length).unwrap_or(u64::MAX));
            // One that is empty, or kept no more, is sent once: the other one learns that it exists, and how long it is.
            let mut first = begin.is_none();
            while offset < end || std::mem::take(&mut first) {
                let (reader, from) = (file.clone(), offset);
                let read = tokio::task::spawn_blocking(move || reader.read(from, end));
                let read = read.await.map_err(io::Error::other);
                let piece = read.and_then(|piece| piece).map_err(unreadable)?;
                offset = piece.offset + piece.data.len() as u64;
                let of = KnownLog {
                    node: node.clone(),
                    file: found.file.clone(),
                    length: i64::try_from(piece.offset).unwrap_or(i64::MAX),
                };
                let piece = FetchCopyResponse {
                    of: Some(of),
                    came_ms: file.came_at(piece.offset).unwrap_or_default(),
                    data: piece.data,
                    ..FetchCopyResponse::default()
                };
                if outbox.send_timeout(Ok(piece), SLOW_MAX).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
