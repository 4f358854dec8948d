//! Sends a node the bundle that its work names.

use std::fs::File;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind, Name};
use batchai_proto::agent::v1::{FetchBundleRequest, FetchBundleResponse};
use tokio::sync::mpsc;
use tonic::Status;

use crate::bundles::BundleStore;
use crate::copies::{Copies, Found};
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
    match copies.use_bundle(bundle.id()).await {
        Ok(Found::Nowhere) => return Err(absent()),
        Ok(Found::Unknown(why)) => return Err(unavailable(&why)),
        _ => {}
    }
    let (store, digest) = (copies.bundles().clone(), bundle.id().to_owned());
    let opened = tokio::task::spawn_blocking(move || store.open(&digest)).await;
    match opened
        .map_err(std::io::Error::other)
        .and_then(|opened| opened)
    {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(absent()),
        Err(error) => {
            tracing::error!(%error, bundle = bundle.as_str(), "a bundle cannot be read");
            Err(unavailable("its disk does not give the bundle"))
        }
    }
}

fn unavailable(why: &str) -> ApiError {
    ApiError::Unavailable {
        why: why.to_owned(),
        leader: None,
    }
}

/// Sends a bundle as fast as the agent takes it. It waits for the disk.
pub fn send(
    file: File,
    (store, digest): (&BundleStore, &str),
    outbox: &mpsc::Sender<Result<FetchBundleResponse, Status>>,
) {
    let runtime = tokio::runtime::Handle::current();
    // An agent that is gone asks again when it is back.
    let send = |piece| {
        let sent = runtime.block_on(outbox.send_timeout(piece, SLOW_MAX));
        sent.is_ok()
    };
    let given = store.give(digest, file, |data| send(Ok(FetchBundleResponse { data })));
    if let Err(error) = given {
        let why = format!("the bundle cannot be given: {error}");
        send(Err(unavailable(&why).into()));
    }
}
