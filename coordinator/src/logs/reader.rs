//! Follows one log file of an attempt from an offset to its end.
//!
//! Where the end is, the State says: the exit report of a node names its files with their final sizes. A reader that
//! is slow waits for itself only: it reads from the file, nothing is buffered for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use batchai_common::error::ApiError;
use batchai_common::limits::LOG_CHUNK_BYTES_MAX;
use batchai_common::names::Kind;
use batchai_proto::v1::StreamJobLogsResponse;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;
use batchai_proto::v1::stream_job_logs_response::End;
use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::{FileKey, LogStore};
use crate::replica::Handle;
use crate::replica::hub::{Follower, Topic};
use crate::state::State;
use crate::state::attempts::{Attempt, AttemptNode};

/// What to read.
pub struct ReadRequest {
    pub job: String,
    pub file: String,
    /// The node's full name, where one was named.
    pub node: Option<String>,
    pub offset: u64,
    /// How many bytes at most.
    pub length: Option<u64>,
    pub follow: bool,
}

/// How long a node that has ended may take to bring what it has announced.
const STALL_MAX: Duration = Duration::from_secs(60);
/// So many files are named to who asked for another.
const NAMES_MAX: usize = 20;
/// Who waits for a file is told when it is made; what depends on time alone is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

type Outbox = mpsc::Sender<Result<StreamJobLogsResponse, Status>>;

/// Sends the file into the outbox, up to its end message or an error.
pub async fn read(replica: Handle, logs: LogStore, request: ReadRequest, outbox: Outbox) {
    let job = Topic::Resource(request.job.clone());
    let mut reader = Reader {
        changes: replica.hub().follow(job),
        replica,
        logs,
        request,
    };
    let end = tokio::select! {
        end = reader.run(&outbox) => end,
        // Nobody reads any more.
        () = outbox.closed() => return,
    };
    if let Err(error) = end {
        // The reader may have gone away in this very moment.
        let _ = outbox.send(Err(error.into())).await;
    }
}

struct Reader {
    replica: Handle,
    logs: LogStore,
    request: ReadRequest,
    changes: Follower,
}

/// The file was found.
struct Found {
    file: Arc<File>,
    length: watch::Receiver<u64>,
    attempt: String,
    node: String,
}

impl Reader {
    async fn run(&mut self, outbox: &Outbox) -> Result<(), ApiError> {
        let mut found = self.find().await?;
        let mut offset = self.request.offset;
        let mut stalled = false;
        loop {
            // In this order: a length that is final was final before it was looked at.
            let last = self.last(&found);
            let length = *found.length.borrow_and_update();
            let wanted = self
                .request
                .length
                .map_or(u64::MAX, |n| self.request.offset.saturating_add(n));
            while offset < length.min(wanted) {
                let data = read_piece(found.file.clone(), offset, length.min(wanted)).await?;
                let size = data.len() as u64;
                let piece = message(&found, offset, data, End::Unspecified);
                if outbox.send(Ok(piece)).await.is_err() {
                    return Ok(());
                }
                offset += size;
            }
            let end = match last {
                _ if offset >= wanted => End::NotFollowed,
                Some(Last::Lost) => End::Truncated,
                Some(Last::Size(size)) if length >= size => End::Complete,
                Some(Last::Size(_)) if stalled => End::Truncated,
                _ if !self.request.follow => End::NotFollowed,
                None => {
                    self.changed(&mut found.length).await?;
                    continue;
                }
                // The rest is on its way, unless its node is gone for good.
                Some(Last::Size(_)) => {
                    let more = tokio::time::timeout(STALL_MAX, self.changed(&mut found.length));
                    match more.await {
                        Ok(changed) => changed?,
                        Err(_) => stalled = true,
                    }
                    continue;
                }
            };
            // The reader may have gone away: it has all there is.
            let _ = outbox
                .send(Ok(message(&found, offset, Bytes::new(), end)))
                .await;
            return Ok(());
        }
    }

    /// Waits until the file or the job has changed.
    async fn changed(&mut self, length: &mut watch::Receiver<u64>) -> Result<(), ApiError> {
        let stopped = || ApiError::Unavailable {
            why: "it is stopping".into(),
            leader: None,
        };
        tokio::select! {
            changed = length.changed() => changed.map_err(|_| stopped()),
            changed = self.changes.changed() => changed.map_err(|_| stopped()),
        }
    }

    /// Waits, if asked to follow, until the file exists.
    async fn find(&mut self) -> Result<Found, ApiError> {
        let mut announced: Option<Instant> = None;
        loop {
            let attempt = self.attempt()?;
            // Before it is looked for: what is made in between is not missed.
            let made = attempt.as_ref().map(|a| self.logs.files_made(&a.id));
            for node in attempt.iter().flat_map(|a| &a.nodes) {
                if self
                    .request
                    .node
                    .as_ref()
                    .is_some_and(|wanted| wanted != &node.node)
                {
                    continue;
                }
                let id = attempt.as_ref().map_or("", |a| a.id.as_str());
                let Some(key) = FileKey::new(id, &node.node, &self.request.file) else {
                    continue;
                };
                let open = self.logs.follow(key).await.map_err(internal)?;
                if let Some((file, length)) = open {
                    let (attempt, node) = (id.to_owned(), node.node.clone());
                    return Ok(Found {
                        file,
                        length,
                        attempt,
                        node,
                    });
                }
            }
            if let Some(elsewhere) = self.elsewhere(attempt.as_deref()) {
                return Err(elsewhere);
            }
            // Only a job that has ended gets no other attempt.
            announced = match self.job_ended() {
                true => announced.or_else(|| Some(Instant::now())),
                false => None,
            };
            let stalled = announced.is_some_and(|since| since.elapsed() > STALL_MAX);
            if stalled || !self.may_come(attempt.as_deref()) || !self.request.follow {
                return Err(self.no_such_file(attempt.as_deref()));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = next_made(made) => {}
                changed = self.changes.changed() => if changed.is_err() {
                    return Err(ApiError::Unavailable { why: "it is stopping".into(), leader: None });
                },
            }
        }
    }

    /// The job's latest attempt; none while it waits for its first.
    fn attempt(&self) -> Result<Option<Arc<Attempt>>, ApiError> {
        let published = self.replica.published();
        let state = &published.borrow().state;
        let name = &self.request.job;
        let job = state.jobs.get(name.as_str());
        let job = job.ok_or(ApiError::NotFound {
            kind: Kind::Job,
            name: name.clone(),
        })?;
        Ok(job
            .attempt
            .as_ref()
            .and_then(|id| state.attempts.get(id))
            .cloned())
    }

    /// Where to ask for a file that is not here: the leader gets what is still written; of what has ended, the replica that led
    /// when it began has it as well.
    fn elsewhere(&self, attempt: Option<&Attempt>) -> Option<ApiError> {
        let home = attempt.map_or(0, |attempt| attempt.log_home as u64);
        let ended = self.job_ended();
        if ended && home == self.replica.id() {
            return None;
        }
        if let Err(error) = self.replica.must_lead() {
            return Some(error);
        }
        let published = self.replica.published();
        let known = published.borrow().state.replicas.get(&home).cloned();
        let known = known.filter(|known| ended && !known.endpoint.is_empty());
        known.map(|known| ApiError::Unavailable {
            why: format!("replica {home} has the logs of this attempt"),
            leader: Some(known.endpoint.clone()),
        })
    }

    /// The file may exist one day: the job goes on, or one of its nodes has named it and is yet to send it.
    fn may_come(&self, attempt: Option<&Attempt>) -> bool {
        let asked = |n: &&AttemptNode| {
            self.request
                .node
                .as_ref()
                .is_none_or(|wanted| wanted == &n.node)
        };
        let nodes = attempt.iter().flat_map(|attempt| &attempt.nodes);
        let mut files = nodes.filter(asked).flat_map(|n| &n.files);
        !self.job_ended() || files.any(|f| f.name == self.request.file)
    }

    fn job_ended(&self) -> bool {
        let published = self.replica.published();
        let state = &published.borrow().state;
        state
            .jobs
            .get(self.request.job.as_str())
            .is_none_or(|job| job.ended())
    }

    fn no_such_file(&self, attempt: Option<&Attempt>) -> ApiError {
        let nodes = attempt.iter().flat_map(|a| &a.nodes);
        let mut names: Vec<_> = nodes
            .flat_map(|n| n.files.iter().map(|f| f.name.as_str()))
            .collect();
        names.sort_unstable();
        names.dedup();
        let hint = match names.is_empty() {
            true => "no file is known yet".to_owned(),
            false => format!("it has {}", names[..names.len().min(NAMES_MAX)].join(", ")),
        };
        ApiError::NoSuchFile {
            job: self.request.job.clone(),
            file: self.request.file.clone(),
            hint,
        }
    }

    fn last(&self, found: &Found) -> Option<Last> {
        let published = self.replica.published();
        let state: &State = &published.borrow().state;
        // An attempt that the State forgot has nothing more to say.
        let Some(attempt) = state.attempts.get(&found.attempt) else {
            return Some(Last::Lost);
        };
        let node = attempt.nodes.iter().find(|n| n.node == found.node)?;
        last_of(node, &self.request.file)
    }
}

/// Waits until a file is made; for ever where there is no attempt that could have any.
async fn next_made(made: Option<watch::Receiver<()>>) {
    if let Some(mut made) = made
        && made.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// What is known of a file's end.
enum Last {
    Size(u64),
    Lost,
}

fn last_of(node: &AttemptNode, file: &str) -> Option<Last> {
    let known = node.files.iter().find(|f| f.name == file);
    match (node.phase, known) {
        (NodePhase::Ended | NodePhase::Lost, Some(file)) => Some(Last::Size(
            u64::try_from(file.size_bytes).unwrap_or_default(),
        )),
        (NodePhase::Ended, None) => Some(Last::Size(0)),
        (NodePhase::Lost, None) => Some(Last::Lost),
        _ => None,
    }
}

async fn read_piece(file: Arc<File>, offset: u64, end: u64) -> Result<Bytes, ApiError> {
    let size = (end - offset).min(LOG_CHUNK_BYTES_MAX as u64) as usize;
    let read = move || {
        let mut data = vec![0; size];
        file.read_exact_at(&mut data, offset)
            .map(|()| Bytes::from(data))
    };
    tokio::task::spawn_blocking(read)
        .await
        .map_err(internal)?
        .map_err(internal)
}

fn message(found: &Found, offset: u64, data: Bytes, end: End) -> StreamJobLogsResponse {
    StreamJobLogsResponse {
        node: found.node.clone(),
        attempt: found.attempt.clone(),
        offset: offset as i64,
        data,
        end: end as i32,
    }
}

fn internal(error: impl std::fmt::Display) -> ApiError {
    let id = uuid::Uuid::new_v4().to_string();
    tracing::error!(%error, id, "cannot read a log file");
    ApiError::Internal { id }
}
