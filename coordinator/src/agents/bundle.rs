//! Sends a node the bundle that its work names.

use std::fs::File;
use std::io::Read as _;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_common::names::{Kind, Name, hex};
use batchai_proto::agent::v1::{FetchBundleRequest, FetchBundleResponse};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tonic::Status;

use crate::bundles::BundleStore;
use crate::copies::Copies;
use crate::replica::Handle;
use crate::state::assignments::assignments;

/// Pieces that the agent has not taken yet.
pub const PIECES_MAX: usize = 8;
/// An agent that takes nothing for so long gets no more.
const SLOW_MAX: Duration = Duration::from_secs(30);

/// Opens the bundle, if it is the node's business.
pub async fn open(
    replica: &Handle,
    copies: &Copies,
    request: &FetchBundleRequest,
) -> Result<File, ApiError> {
    let invalid = |field: &str, why: String| ApiError::Invalid(vec![Fault::new(field, why)]);
    let node = Name::top(Kind::Node, &request.node_id)
        .map_err(|error| invalid("node_id", error.to_string()))?;
    let bundle = Name::parse(Kind::Bundle, &request.bundle)
        .map_err(|error| invalid("bundle", error.to_string()))?;
    let state = replica
        .read()
        .await
        .map_err(|error| unavailable(&error.to_string()))?;
    let registered = state.has_node(node.as_str(), &request.uid);
    let work = assignments(&state, node.as_str()).assignments;
    let mut jobs = work.iter().filter_map(|work| work.job.as_ref());
    let absent = || ApiError::NotFound {
        kind: Kind::Bundle,
        name: bundle.to_string(),
    };
    if !registered || !jobs.any(|job| job.bundle == bundle.as_str()) {
        return Err(absent());
    }
    match find(copies, bundle.id()).await {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(absent()),
        Err(error) => {
            tracing::error!(%error, bundle = bundle.as_str(), "a bundle cannot be read");
            Err(unavailable("its disk does not give the bundle"))
        }
    }
}

/// The file, fetched from another replica where it is not here.
async fn find(copies: &Copies, digest: &str) -> std::io::Result<Option<File>> {
    copies.use_bundle(digest).await?;
    let (store, digest) = (copies.bundles.clone(), digest.to_owned());
    let opened = tokio::task::spawn_blocking(move || store.open(&digest)).await;
    opened.map_err(std::io::Error::other)?
}

fn unavailable(why: &str) -> ApiError {
    ApiError::Unavailable {
        why: why.to_owned(),
        leader: None,
    }
}

/// Sends a bundle as fast as the agent takes it. It waits for the disk. One that turns out to be damaged is removed: who
/// sends it again then replaces it.
pub fn send(
    mut file: File,
    (store, digest): (&BundleStore, &str),
    outbox: &mpsc::Sender<Result<FetchBundleResponse, Status>>,
) {
    let mut hash = Sha256::new();
    let runtime = tokio::runtime::Handle::current();
    loop {
        let mut piece = vec![0; FILE_CHUNK_BYTES_MAX];
        let piece = match file.read(&mut piece) {
            Ok(0) if hex(&hash.clone().finalize()) == digest => return,
            Ok(0) => {
                let removed = store.remove(digest);
                tracing::error!(digest, ?removed, "a bundle is damaged; it was removed");
                Err(unavailable("the bundle was damaged, and is removed").into())
            }
            Ok(read) => {
                piece.truncate(read);
                hash.update(&piece);
                Ok(FetchBundleResponse {
                    data: Bytes::from(piece),
                })
            }
            Err(error) => {
                tracing::error!(%error, "a bundle cannot be read");
                Err(unavailable("its disk does not give the bundle").into())
            }
        };
        let failed = piece.is_err();
        // An agent that is gone asks again when it is back.
        let sent = runtime.block_on(outbox.send_timeout(piece, SLOW_MAX));
        if sent.is_err() || failed {
            return;
        }
    }
}
