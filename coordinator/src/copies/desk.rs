//! Gives other replicas what they ask for. Who may ask, `replica::peers` knows.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::pin::Pin;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::LOG_CHUNK_BYTES_MAX;
use batchai_common::names::{Kind, Name};
use batchai_proto::internal::v1::copy_service_server::CopyService;
use batchai_proto::internal::v1::fetch_copy_request::What;
use batchai_proto::internal::v1::{
    FetchCopyRequest, FetchCopyResponse, KeepBundleRequest, KeepBundleResponse, KnownLog, LogsCopy,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::Copies;
use crate::logs::FileKey;
use crate::replica::peers::check_peer;

/// Pieces that the other one has not taken yet.
const PIECES_MAX: usize = 4;
/// One that takes nothing for so long gets no more.
const SLOW_MAX: Duration = Duration::from_secs(30);

/// Serves other replicas.
pub struct CopyDesk {
    pub copies: Copies,
    pub shutdown: CancellationToken,
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
        check_peer(&copies.peers, &copies.replica, request.hello)?;
        let (outbox, replies) = mpsc::channel(PIECES_MAX);
        match request.what.ok_or_else(|| invalid("what"))? {
            What::Bundle(name) => {
                let name = Name::parse(Kind::Bundle, &name).map_err(|_| invalid("bundle"))?;
                let permit = copies.bundles.transfer()?;
                let (store, digest) = (copies.bundles.clone(), name.id().to_owned());
                let open = tokio::task::spawn_blocking(move || store.open(&digest));
                let opened = open.await.map_err(io::Error::other);
                let opened = opened.and_then(|opened| opened).map_err(unreadable)?;
                let file = opened.ok_or_else(|| ApiError::NotFound {
                    kind: Kind::Bundle,
                    name: name.to_string(),
                })?;
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = send_bundle(file, &outbox) {
                        let _ = outbox.blocking_send(Err(unreadable(error)));
                    }
                    drop(permit);
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
        check_peer(&copies.peers, &copies.replica, request.hello)?;
        let name = Name::parse(Kind::Bundle, &request.bundle).map_err(|_| invalid("bundle"))?;
        let permit = copies.bundles.transfer()?;
        let (outbox, replies) = mpsc::channel(1);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let kept = tokio::select! {
                kept = copies.use_bundle(name.id()) => kept,
                () = shutdown.cancelled() => return,
            };
            drop(permit);
            let reply = match kept {
                Ok(true) => Ok(KeepBundleResponse {}),
                Ok(false) => Err(Status::not_found("nobody gives it")),
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

/// The whole of a bundle: whoever takes it sees whether it is what its name says.
fn send_bundle(mut file: File, outbox: &Outbox) -> io::Result<()> {
    let runtime = tokio::runtime::Handle::current();
    let mut size = i64::try_from(file.metadata()?.len()).unwrap_or(i64::MAX);
    loop {
        let mut piece = vec![0; LOG_CHUNK_BYTES_MAX];
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok(());
        }
        piece.truncate(read);
        let piece = FetchCopyResponse {
            size: std::mem::take(&mut size),
            data: piece.into(),
            ..FetchCopyResponse::default()
        };
        let sent = runtime.block_on(outbox.send_timeout(Ok(piece), SLOW_MAX));
        if sent.is_err() {
            return Ok(());
        }
    }
}

impl Copies {
    async fn send_logs(&self, wanted: LogsCopy, outbox: &Outbox) -> Result<(), Status> {
        let known = wanted.known.iter();
        let known = known.map(|log| ((&*log.node, &*log.file), log.length));
        let known: BTreeMap<_, _> = known.collect();
        // A text that leaves the directory names no attempt.
        let exists = self
            .replica
            .published()
            .borrow()
            .state
            .attempts
            .contains_key(&wanted.attempt);
        if !exists {
            return Ok(());
        }
        let files = self.logs.files(&wanted.attempt).await.map_err(unreadable)?;
        for found in files {
            let node = format!("nodes/{}", found.node_id);
            let Some(key) = FileKey::new(&wanted.attempt, &node, &found.file) else {
                continue;
            };
            let Some(file) = self.logs.find(key).await.map_err(unreadable)? else {
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
