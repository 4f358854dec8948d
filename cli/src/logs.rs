//! Follows a log file of a job through restarts of the coordinator: each time from the byte that is missing.

use std::io::Write;

use batchai_proto::v1::stream_job_logs_response::End;
use batchai_proto::v1::{StreamJobLogsRequest, WatchJobRequest, job};
use tonic::{Code, Status};

use crate::client::{Client, Retry};
use crate::error::CliError;

/// How a file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// All of it was written out.
    Complete,
    /// The node was lost: there may have been more.
    Truncated,
}

/// Writes a log file out as it grows. Where the job is put back into the queue, its next attempt is followed from its
/// beginning.
pub async fn follow(
    client: &Client,
    stream: StreamJobLogsRequest,
    out: &mut impl Write,
) -> Result<Follow, CliError> {
    let mut follower = Follower {
        stream,
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
    /// The attempt that the offset is of.
    attempt: String,
    retry: Retry,
}

impl Follower {
    /// One call. `None` where it broke and is to be made again.
    async fn read(
        &mut self,
        client: &Client,
        out: &mut impl Write,
    ) -> Result<Option<Follow>, CliError> {
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
                    out.write_all(&piece.data)?;
                    out.flush()?;
                    self.stream.offset = piece.offset + piece.data.len() as i64;
                    self.attempt.clone_from(&piece.attempt);
                    if self.stream.length > 0 {
                        self.stream.length -= piece.data.len() as i64;
                        if self.stream.length <= 0 {
                            return Ok(Some(Follow::Complete));
                        }
                    }
                    match piece.end() {
                        End::Unspecified => {}
                        End::Complete | End::NotFollowed => return Ok(Some(Follow::Complete)),
                        End::Truncated => return Ok(Some(Follow::Truncated)),
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

    /// From here on another attempt is followed, from its beginning.
    fn begin(&mut self, attempt: String) {
        say!("the job was put back into the queue; its next attempt begins");
        self.attempt = attempt;
        self.stream.offset = 0;
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
