//! Follows log files of a job through restarts of the coordinator: each time from the byte that is missing.

use std::collections::BTreeMap;
use std::io::{self, Write};

use batchai_proto::v1::stream_job_logs_response::End;
use batchai_proto::v1::{
    LogPosition, StreamJobLogsRequest, StreamJobLogsResponse, WatchJobRequest, job,
};
use tonic::{Code, Status};

use crate::client::{Client, Retry};
use crate::error::CliError;

/// How a file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// All of it was written out.
    Complete,
    /// Another attempt began, or something never came.
    Truncated,
    /// The node was lost: there may have been more.
    NodeLost,
}

/// Where pieces of files go.
pub trait Sink {
    fn take(&mut self, piece: &StreamJobLogsResponse) -> io::Result<()>;
}

/// What is written of one file is the file.
impl<W: Write> Sink for W {
    fn take(&mut self, piece: &StreamJobLogsResponse) -> io::Result<()> {
        self.write_all(&piece.data)?;
        self.flush()
    }
}

/// Writes a log file, or all of them, out as they grow. Where the job is put back into the queue, its next attempt is followed from its
/// beginning.
pub async fn follow(
    client: &Client,
    stream: StreamJobLogsRequest,
    out: &mut impl Sink,
) -> Result<Follow, CliError> {
    let mut follower = Follower {
        stream,
        positions: BTreeMap::new(),
        attempt: String::new(),
        retry: Retry::default(),
    };
    loop {
        let Some(end) = follower.read(client, out).await? else {
            continue;
        };
        if !follower.stream.follow || !follower.another_attempt(client).await? {
            return Ok(end);
        }
    }
}

struct Follower {
    /// Its offset is where to go on.
    stream: StreamJobLogsRequest,
    /// Where to go on where it is of all ranks, by node and file.
    positions: BTreeMap<(String, String), i64>,
    /// The attempt that the offset is of.
    attempt: String,
    retry: Retry,
}

impl Follower {
    /// One call. `None` where it broke and is to be made again.
    async fn read(
        &mut self,
        client: &Client,
        out: &mut impl Sink,
    ) -> Result<Option<Follow>, CliError> {
        let position = |((node, file), offset): (&(String, String), &i64)| LogPosition {
            node: node.clone(),
            file: file.clone(),
            offset: *offset,
        };
        self.stream.positions = self.positions.iter().map(position).collect();
        let mut pieces = match client.jobs().stream_job_logs(self.stream.clone()).await {
            Ok(pieces) => pieces.into_inner(),
            Err(status) => return self.retry.again(status).await.map(|()| None),
        };
        loop {
            match pieces.message().await {
                Ok(Some(piece)) if self.is_another(&piece.attempt) => {
                    // What is copied as it is must be of one attempt.
                    if !self.stream.follow {
                        return Ok(Some(Follow::Truncated));
                    }
                    self.begin(piece.attempt);
                    return Ok(None);
                }
                Ok(Some(piece)) => {
                    self.retry.reset();
                    out.take(&piece)?;
                    self.note(&piece);
                    if self.stream.all_ranks && !piece.file.is_empty() {
                        continue;
                    }
                    if self.stream.length > 0 {
                        self.stream.length -= piece.dropped_bytes + piece.data.len() as i64;
                        if self.stream.length <= 0 {
                            return Ok(Some(Follow::Complete));
                        }
                    }
                    match piece.end() {
                        End::Unspecified => {}
                        End::Complete | End::NotFollowed => return Ok(Some(Follow::Complete)),
                        End::Truncated => return Ok(Some(Follow::Truncated)),
                        End::NodeLost => return Ok(Some(Follow::NodeLost)),
                    }
                }
                Ok(None) => {
                    let ended = Status::unavailable("the stream ended early");
                    return self.retry.again(ended).await.map(|()| None);
                }
                Err(status) if status.code() == Code::NotFound => return Err(status.into()),
                Err(status) => return self.retry.again(status).await.map(|()| None),
            }
        }
    }

    /// A piece was written out: what comes next begins behind it.
    fn note(&mut self, piece: &StreamJobLogsResponse) {
        if piece.dropped_bytes > 0 {
            let (count, file) = (piece.dropped_bytes, &piece.file);
            say!(
                "batchai: {count} bytes of {file} before byte {} are kept no more",
                piece.offset
            );
        }
        if piece.end() == End::NodeLost && !piece.file.is_empty() {
            let (node, file) = (&piece.node, &piece.file);
            say!("batchai: truncated, node lost: {file} of {node} may have had more");
        }
        self.attempt.clone_from(&piece.attempt);
        let next = piece.offset + piece.data.len() as i64;
        match self.stream.all_ranks {
            true if piece.file.is_empty() => {}
            true => {
                let file = (piece.node.clone(), piece.file.clone());
                self.positions.insert(file, next);
            }
            false => {
                self.stream.offset = next;
                (self.stream.tail_lines, self.stream.since) = (None, None);
            }
        }
    }

    /// From here on another attempt is followed, from its beginning.
    fn begin(&mut self, attempt: String) {
        say!("the job was put back into the queue; its next attempt begins");
        self.attempt = attempt;
        self.stream.offset = 0;
        (self.stream.tail_lines, self.stream.since) = (None, None);
        self.positions.clear();
    }

    fn is_another(&self, attempt: &str) -> bool {
        !self.attempt.is_empty() && self.attempt != attempt
    }

    /// Waits until the job has ended, or has another attempt than the one whose file was read to its end.
    async fn another_attempt(&mut self, client: &Client) -> Result<bool, CliError> {
        let watch = WatchJobRequest {
            name: self.stream.name.clone(),
            revision: 0,
        };
        loop {
            let mut changes = match client.jobs().watch_job(watch.clone()).await {
                Ok(changes) => changes.into_inner(),
                Err(status) if status.code() == Code::NotFound => return Ok(false),
                Err(status) => {
                    self.retry.again(status).await?;
                    continue;
                }
            };
            while let Ok(Some(change)) = changes.message().await {
                if !change.deleted.is_empty() {
                    return Ok(false);
                }
                // A message without a job only says how far the stream has come.
                let Some(job) = change.jobs.into_iter().next() else {
                    continue;
                };
                self.retry.reset();
                let ended = matches!(job.state(), job::State::Succeeded | job::State::Failed);
                let latest = job.attempt.map(|attempt| attempt.id).unwrap_or_default();
                if self.is_another(&latest) {
                    self.begin(latest);
                    return Ok(true);
                }
                if ended {
                    return Ok(false);
                }
            }
            self.retry
                .again(Status::unavailable("the stream ended early"))
                .await?;
        }
    }
}
