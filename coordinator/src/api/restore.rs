//! Backups, and what an ensemble that was restored from one does not know of the work on its nodes.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write as _};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_proto::internal::v1::SnapshotMark;
use batchai_proto::v1::{
    JobAttemptNode, ListStrayAttemptsRequest, ListStrayAttemptsResponse, SaveSnapshotResponse,
    StrayAttempt,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::faults::Faults;
use super::page::{decode, encode, page_size};
use super::{Api, Replies};
use crate::replica::store::snapshot;
use crate::state::{State, restore};

/// How long whoever asks for a backup may take for a piece of it.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Pieces that are made and not taken yet.
const PIECES_MAX: usize = 4;
/// What tokens of the list are made for.
const LIST: &str = "stray attempts";

impl Api {
    /// Sends all that was acknowledged before now.
    pub(super) async fn save(&self) -> Result<Response<Replies<SaveSnapshotResponse>>, Status> {
        let state = self.read().await?;
        let (made, mut pieces) = mpsc::channel(PIECES_MAX);
        let (outbox, replies) = mpsc::channel(PIECES_MAX);
        tokio::task::spawn_blocking(move || {
            let mark = SnapshotMark {
                index: state.applied_index,
                ..SnapshotMark::default()
            };
            let fails = made.clone();
            let pieces = snapshot::Pieces::new(made, |data| Ok(SaveSnapshotResponse { data }));
            let mut out = BufWriter::with_capacity(FILE_CHUNK_BYTES_MAX, pieces);
            let sent = snapshot::encode(&mut out, &mark, &state).and_then(|()| out.flush());
            if let Err(error) = sent {
                tracing::error!(%error, "a backup cannot be sent");
                // He may be gone, or too slow: he knows.
                let _ = fails.blocking_send(Err(Status::internal(error.to_string())));
            }
        });
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            while let Some(piece) = pieces.recv().await {
                let sent = tokio::select! {
                    sent = tokio::time::timeout(STALL_MAX, outbox.send(piece)) => sent,
                    () = shutdown.cancelled() => return,
                };
                if !matches!(sent, Ok(Ok(()))) {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    /// Lists work that the State does not know.
    pub(super) async fn strays(
        &self,
        request: &ListStrayAttemptsRequest,
    ) -> Result<ListStrayAttemptsResponse, ApiError> {
        let mut faults = Faults::default();
        let size = page_size(&mut faults, request.page_size);
        let after = match request.page_token.as_str() {
            "" => Some(String::new()),
            token => decode(LIST, token),
        };
        if after.is_none() {
            faults.invalid("page_token", "is not of this list");
        }
        let after = faults.finish(after)?;
        let state = self.read().await?;
        let ids: BTreeSet<_> = state.strays.keys().map(|(_, id)| id).collect();
        let mut behind = ids.into_iter().filter(|id| **id > after);
        let page: Vec<_> = behind.by_ref().take(size).collect();
        let last = page.last().filter(|_| behind.next().is_some());
        Ok(ListStrayAttemptsResponse {
            next_page_token: last.map_or(String::new(), |last| encode(LIST, last)),
            stray_attempts: page.iter().map(|id| stray_attempt(&state, id)).collect(),
        })
    }
}

/// The id of an attempt, as a request gives it.
pub(super) fn attempt_id(given: &str) -> Result<String, ApiError> {
    match batchai_common::attempt::epoch(given) {
        Some(_) => Ok(given.to_owned()),
        None => Err(ApiError::Invalid(vec![Fault::new(
            "attempt",
            "must be the id of an attempt, as ListStrayAttempts shows it",
        )])),
    }
}

fn stray_attempt(state: &State, id: &str) -> StrayAttempt {
    let parts: Vec<_> = restore::of_attempt(state, id).collect();
    let stray = parts.first().and_then(|(_, part)| part.stray.clone());
    let stray = stray.unwrap_or_default();
    let node = |(node, part): &(&str, &std::sync::Arc<_>)| {
        let part: &batchai_proto::internal::v1::StoredStray = part;
        let seen = part.stray.as_ref().and_then(|stray| stray.seen.clone());
        let seen = seen.unwrap_or_default();
        JobAttemptNode {
            node: (*node).to_owned(),
            phase: seen.phase,
            ranks: seen.ranks,
            files: seen.files,
        }
    };
    StrayAttempt {
        attempt: id.to_owned(),
        nodes: parts.iter().map(node).collect(),
        missing_nodes: restore::missing(state, id, &stray),
        discarded: parts.iter().all(|(_, part)| part.discarded),
        refusal: restore::adoptable(state, id).err().unwrap_or_default(),
        job: stray.job,
        job_uid: stray.job_uid,
    }
}
