//! Takes in the log files that one agent ships.

use batchai_common::crash_point;
use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{CALL_TIMEOUT, LOG_CHUNK_BYTES_MAX};
use batchai_common::names::{Kind, Name};
use batchai_proto::agent::v1::{LogChunk, ShipLogsRequest, ShipLogsResponse, ship_logs_request};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::service::check_owner;
use crate::access::Caller;
use crate::logs::{FileKey, LogStore};
use crate::replica::{Handle, ReplicaError, handle};

/// Answers that the agent has not taken: it reads them as it sends.
pub const OUTBOX_MAX: usize = 64;

/// One agent's shipment.
pub struct Intake {
    replica: Handle,
    logs: LogStore,
    caller: Caller,
}

impl Intake {
    /// A shipment that has not said who it is yet.
    pub fn new(replica: Handle, logs: LogStore, caller: Caller) -> Intake {
        Intake {
            replica,
            logs,
            caller,
        }
    }

    /// Takes in chunks until either side ends.
    pub async fn run(
        self,
        mut incoming: Streaming<ShipLogsRequest>,
        outbox: mpsc::Sender<Result<ShipLogsResponse, Status>>,
        shutdown: CancellationToken,
    ) {
        let end = tokio::select! {
            end = self.take_in(&mut incoming, &outbox) => end,
            () = self.replica.deposed() => Err(handle::unavailable(&self.replica, &ReplicaError::NotLeader).into()),
            () = shutdown.cancelled() => Err(ApiError::Unavailable {
                why: "the coordinator is shutting down".into(),
                leader: None,
            }.into()),
        };
        if let Err(status) = end {
            // The agent may be gone; it learns the reason only if it is not.
            let _ = outbox.try_send(Err(status));
        }
    }

    async fn take_in(
        &self,
        incoming: &mut Streaming<ShipLogsRequest>,
        outbox: &mpsc::Sender<Result<ShipLogsResponse, Status>>,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
        let first = first.map_err(|_| invalid("message", "the hello did not come in time"))?;
        let first = first?.and_then(|request| request.message);
        let Some(ship_logs_request::Message::Hello(hello)) = first else {
            return Err(invalid("message", "the first message must be a hello"));
        };
        let node = Name::top(Kind::Node, &hello.node_id)
            .map_err(|e| invalid("hello.node_id", &e.to_string()))?;
        check_owner(&self.caller, node.id(), &hello.uid)?;
        while let Some(request) = incoming.message().await? {
            let Some(ship_logs_request::Message::Chunk(chunk)) = request.message else {
                return Err(invalid("message", "only the first message is a hello"));
            };
            let answer = self.keep(node.as_str(), &hello.uid, chunk).await?;
            if outbox.send(Ok(answer)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn keep(
        &self,
        node: &str,
        uid: &str,
        chunk: LogChunk,
    ) -> Result<ShipLogsResponse, Status> {
        if chunk.data.len() > LOG_CHUNK_BYTES_MAX {
            return Err(invalid("chunk.data", "it is larger than a chunk may be"));
        }
        let offset = u64::try_from(chunk.offset)
            .map_err(|_| invalid("chunk.offset", "must not be negative"))?;
        let (attempt, file) = (chunk.attempt, chunk.file);
        let mut answer = ShipLogsResponse {
            attempt: attempt.clone(),
            file: file.clone(),
            stored_bytes: 0,
            unwanted: false,
            synced_bytes: 0,
        };
        if !self.wanted(node, uid, &attempt) {
            // The State here may only be behind: the agent throws away what is not wanted.
            self.replica
                .read()
                .await
                .map_err(|error| unavailable(&error.to_string()))?;
            answer.unwanted = !self.wanted(node, uid, &attempt);
        }
        if !answer.unwanted {
            let Some(key) = FileKey::new(&attempt, node, &file) else {
                tracing::warn!(attempt, node, file, "not the name of a log file");
                return Ok(ShipLogsResponse {
                    unwanted: true,
                    ..answer
                });
            };
            let kept = match chunk.data.is_empty() && !chunk.gap {
                true => self.logs.sync(key).await.inspect(|synced| {
                    answer.synced_bytes = *synced as i64;
                }),
                false => {
                    self.logs
                        .append(key, offset, chunk.data, (chunk.gap, None))
                        .await
                }
            };
            crash_point!("coordinator_kept_a_chunk");
            let stored = kept.map_err(|error| {
                tracing::error!(%error, attempt, node, file, "cannot keep a log file");
                unavailable("its disk takes no more logs")
            })?;
            answer.stored_bytes = stored as i64;
        }
        Ok(answer)
    }

    /// Only files of a node's own attempts are kept, and only while the State knows the attempt.
    fn wanted(&self, node: &str, uid: &str, attempt: &str) -> bool {
        let published = self.replica.published();
        let state = &published.borrow().state;
        let registered = state.has_node(node, uid);
        let known = state.attempts.get(attempt);
        let wanted = match known {
            Some(known) => known.nodes.iter().any(|n| n.node == node),
            // It may be adopted. Where it is not reported, the next sweep takes it away.
            None => batchai_common::attempt::epoch(attempt).is_some_and(|e| e < state.epoch),
        };
        registered && wanted
    }
}

fn unavailable(why: &str) -> Status {
    ApiError::Unavailable {
        why: why.to_owned(),
        leader: None,
    }
    .into()
}

fn invalid(field: &str, reason: &str) -> Status {
    ApiError::Invalid(vec![Fault::new(field, reason)]).into()
}
