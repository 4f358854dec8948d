//! Bundles: uploaded in pieces, and what is kept of them.

use std::time::SystemTime;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{BUNDLE_BYTES_MAX, CALL_TIMEOUT, FILE_CHUNK_BYTES_MAX};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::v1::bundle_service_server::BundleService;
use batchai_proto::v1::upload_bundle_request::Part;
use batchai_proto::v1::{
    Bundle, BundleHeader, GetBundleRequest, Job, UploadBundleRequest, UploadBundleResponse,
};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::faults::Faults;
use super::{Api, Replies, internal, not_found, parse};
use crate::bundles::{BundleError, BundleStore};
use crate::copies::Copies;

/// Pieces that the disk has not taken yet.
const PIECES_MAX: usize = 8;

#[tonic::async_trait]
impl BundleService for Api {
    type UploadBundleStream = Replies<UploadBundleResponse>;

    async fn upload_bundle(
        &self,
        request: Request<Streaming<UploadBundleRequest>>,
    ) -> Result<Response<Self::UploadBundleStream>, Status> {
        self.replica.must_lead()?;
        let incoming = request.into_inner();
        let permit = self.bundles.transfer()?;
        let (outbox, replies) = mpsc::channel(1);
        let (copies, shutdown) = (self.copies.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            let end = tokio::select! {
                end = receive(&copies, incoming) => end,
                () = shutdown.cancelled() => Err(super::draining().into()),
            };
            let reply = end.map(|bundle| UploadBundleResponse {
                bundle: Some(bundle),
            });
            drop(permit);
            // Who sent it may be gone; it asks again.
            let _ = outbox.send(reply).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    async fn get_bundle(
        &self,
        request: Request<GetBundleRequest>,
    ) -> Result<Response<Bundle>, Status> {
        self.replica.must_lead()?;
        let name = parse(Noun::Bundle, &request.get_ref().name)?;
        // Who asks is about to name it in a job: it must not be swept before.
        self.copies.use_bundle(name.id()).await.map_err(internal)?;
        Ok(Response::new(find(&self.bundles, &name).await?))
    }
}

impl Api {
    /// The bundles of new jobs must be there; from now on they are in use.
    pub(super) async fn use_bundles(&self, jobs: &[Job]) -> Result<(), ApiError> {
        let named = jobs.iter().filter(|job| !job.bundle.is_empty());
        let mut names: Vec<_> = named.map(|job| job.bundle.clone()).collect();
        if names.is_empty() {
            // Nothing to wait for on another thread.
            return Ok(());
        }
        names.sort_unstable();
        names.dedup();
        for name in names {
            let kind = Noun::Bundle;
            let digest = batchai_common::names::last_id(&name);
            if !self.copies.use_bundle(digest).await.map_err(internal)? {
                return Err(ApiError::NotFound { kind, name });
            }
        }
        Ok(())
    }
}

async fn receive(
    copies: &Copies,
    mut incoming: Streaming<UploadBundleRequest>,
) -> Result<Bundle, Status> {
    let store = &copies.bundles;
    let first = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
    let first = first.map_err(|_| invalid("header", "did not come in time"))??;
    let Some(Part::Header(header)) = first.and_then(|request| request.part) else {
        return Err(invalid("header", "must come first").into());
    };
    let (name, size) = check(&header)?;
    if copies.use_bundle(name.id()).await.map_err(internal)? {
        copies.spread_bundle(name.id()).await?;
        return Ok(find(store, &name).await?);
    }
    let (pieces, receiver) = mpsc::channel(PIECES_MAX);
    let (keeper, digest) = (store.clone(), name.id().to_owned());
    let kept = tokio::task::spawn_blocking(move || keeper.receive(&digest, size, receiver));
    let sent = pass_on(&mut incoming, pieces).await;
    // A sender that broke off sent less than it announced: that is the lesser news.
    let kept = kept.await.map_err(internal)?;
    sent?;
    kept.map_err(|error| match error {
        BundleError::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            let what = "the disk of this replica";
            ApiError::Busy { what }
        }
        BundleError::Io(error) => internal(error),
        error => invalid("header", &error.to_string()),
    })?;
    // What is acknowledged must not go with this machine.
    copies.spread_bundle(name.id()).await?;
    Ok(find(store, &name).await?)
}

fn check(header: &BundleHeader) -> Result<(Name, u64), ApiError> {
    let mut faults = Faults::default();
    let name = faults.name("header.name", Noun::Bundle, &header.name);
    let size = u64::try_from(header.size_bytes).unwrap_or_default();
    if !(1..=BUNDLE_BYTES_MAX).contains(&size) {
        let why = format!("must be from 1 to {BUNDLE_BYTES_MAX}");
        faults.invalid("header.size_bytes", why);
    }
    Ok((faults.finish(name)?, size))
}

async fn pass_on(
    incoming: &mut Streaming<UploadBundleRequest>,
    pieces: mpsc::Sender<Bytes>,
) -> Result<(), Status> {
    loop {
        let next = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
        let next = next.map_err(|_| invalid("data", "did not come in time"))??;
        let Some(request) = next else {
            return Ok(());
        };
        match request.part {
            Some(Part::Data(data)) if data.len() <= FILE_CHUNK_BYTES_MAX => {
                // Whoever writes has given up; it says why.
                if pieces.send(data).await.is_err() {
                    return Ok(());
                }
            }
            _ => {
                let why = format!("must be pieces of at most {FILE_CHUNK_BYTES_MAX} bytes");
                return Err(invalid("data", &why).into());
            }
        }
    }
}

async fn find(store: &BundleStore, name: &Name) -> Result<Bundle, ApiError> {
    let (store, digest) = (store.clone(), name.id().to_owned());
    let found = on_a_thread(move || store.find(&digest).map_err(internal)).await?;
    let (size, used) = found.ok_or_else(|| not_found(Noun::Bundle, name))?;
    let since = used.duration_since(SystemTime::UNIX_EPOCH);
    let millis = since.map_or(0, |since| since.as_millis() as i64);
    Ok(Bundle {
        name: name.to_string(),
        size_bytes: size as i64,
        use_time: Some(batchai_common::time::from_millis(millis)),
    })
}

/// Runs what waits for the disk where it holds up nobody.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(internal)?
}

fn invalid(field: &str, why: &str) -> ApiError {
    ApiError::Invalid(vec![Fault::new(field, why)])
}
