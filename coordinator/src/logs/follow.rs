//! Follows one log file that was found, from where a reader wants it to its end.
//!
//! Where the end is, the State says: the exit report of a node names its files with their final sizes. A reader that is slow waits
//! for itself only: it reads from the file, nothing is buffered for it. Which file is meant is not decided here.

use std::sync::Arc;
use std::time::Duration;

use batchai_common::error::ApiError;
use batchai_proto::v1::StreamJobLogsResponse;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;
use batchai_proto::v1::stream_job_logs_response::End;
use bytes::Bytes;
use tokio::sync::{Semaphore, watch};

use super::LogFile;
use super::file::Piece;
use super::reader::{Outbox, Serving, internal};
use crate::replica::hub;
use crate::state::State;
use crate::state::attempts::AttemptNode;

/// How long a node that has ended may take to bring what it has announced.
pub(super) const STALL_MAX: Duration = Duration::from_secs(60);

/// Where to begin: at the last of these places.
#[derive(Clone, Copy, Debug, Default)]
pub struct Begin {
    pub offset: u64,
    /// At the last so many lines.
    pub tail_lines: Option<u64>,
    /// At what came at this time or later.
    pub since_ms: Option<i64>,
}

/// The file was found.
#[derive(Clone)]
pub(super) struct Found {
    pub file: Arc<LogFile>,
    pub attempt: String,
    pub node: String,
    pub name: String,
    pub rank: Option<i32>,
}

/// Follows one file.
pub(super) struct Follow {
    pub serving: Serving,
    pub changes: hub::Follower,
    pub found: Found,
    pub begin: Begin,
    /// How many bytes at most.
    pub length: Option<u64>,
    pub follow: bool,
    /// Only whole lines are sent, as far as they are of a size.
    pub lines: bool,
    /// So many readers of one stream may have bytes in memory.
    pub turns: Arc<Semaphore>,
}

/// What a look at a file came to.
enum Sent {
    /// All there is to send for now.
    Rest,
    /// Nobody reads any more.
    Unwanted,
}

impl Follow {
    /// Sends the file into the outbox, up to its end message; returns how it ended.
    pub(super) async fn run(mut self, outbox: &Outbox) -> Result<End, ApiError> {
        let mut offset = self.place().await?;
        let begin = offset;
        let mut length = self.found.file.follow();
        let mut stalled = false;
        loop {
            // In this order: a length that is final was final before it was looked at.
            let last = self.last();
            let has = *length.borrow_and_update();
            let wanted = self.length.map_or(u64::MAX, |n| begin.saturating_add(n));
            let ends = match last {
                _ if has >= wanted || !self.follow => true,
                Some(Last::Size(size) | Last::Lost(size)) => has >= size || stalled,
                Some(Last::Anew) => true,
                None => false,
            };
            let sent = self
                .send(&mut offset, has.min(wanted), ends, outbox)
                .await?;
            if let Sent::Unwanted = sent {
                return Ok(End::NotFollowed);
            }
            let end = match last {
                _ if offset >= wanted => End::NotFollowed,
                Some(Last::Anew) => End::Truncated,
                Some(Last::Size(size)) if has >= size => End::Complete,
                Some(Last::Size(_)) if stalled => End::Truncated,
                Some(Last::Lost(size)) if has >= size || stalled => End::NodeLost,
                _ if !self.follow => End::NotFollowed,
                None => {
                    self.changed(&mut length).await?;
                    continue;
                }
                // The rest is on its way, unless its node is gone for good.
                Some(Last::Size(_) | Last::Lost(_)) => {
                    let more = tokio::time::timeout(STALL_MAX, self.changed(&mut length));
                    match more.await {
                        Ok(changed) => changed?,
                        Err(_) => stalled = true,
                    }
                    continue;
                }
            };
            let nothing = Piece {
                dropped: 0,
                offset,
                data: Bytes::new(),
            };
            // The reader may have gone away: it has all there is.
            let _ = outbox.send(Ok(self.message(nothing, end))).await;
            return Ok(end);
        }
    }

    /// Sends what there is up to a length, and of lines only whole ones, unless nothing follows them.
    async fn send(
        &self,
        offset: &mut u64,
        to: u64,
        ends: bool,
        outbox: &Outbox,
    ) -> Result<Sent, ApiError> {
        while *offset < to {
            let turns = self.turns.clone();
            // Nobody closes it.
            let Ok(_turn) = turns.acquire().await else {
                return Ok(Sent::Unwanted);
            };
            let (file, at) = (self.found.file.clone(), *offset);
            let read = tokio::task::spawn_blocking(move || file.read(at, to));
            let mut piece = read.await.map_err(internal)?.map_err(internal)?;
            let reaches = piece.offset + piece.data.len() as u64;
            if self.lines && !(ends && reaches == to) {
                match whole_lines(&piece.data) {
                    0 if reaches == to && piece.dropped == 0 => return Ok(Sent::Rest),
                    // A line that is larger than a piece is cut, and so is one behind which bytes are missing.
                    0 => {}
                    whole => piece.data.truncate(whole),
                }
            }
            *offset = piece.offset + piece.data.len() as u64;
            let message = self.message(piece, End::Unspecified);
            if outbox.send(Ok(message)).await.is_err() {
                return Ok(Sent::Unwanted);
            }
        }
        Ok(Sent::Rest)
    }

    async fn place(&self) -> Result<u64, ApiError> {
        let (file, begin) = (self.found.file.clone(), self.begin);
        let find = move || {
            let tail = begin.tail_lines.map(|lines| file.tail(lines)).transpose()?;
            let since = begin.since_ms.map(|at| file.since(at)).transpose()?;
            let places = [Some(begin.offset), tail, since];
            Ok::<_, std::io::Error>(places.into_iter().flatten().max().unwrap_or_default())
        };
        let found = tokio::task::spawn_blocking(find).await;
        found.map_err(internal)?.map_err(internal)
    }

    /// Waits until the file or the job has changed. Who does not lead gets no more of what is still written.
    async fn changed(&mut self, length: &mut watch::Receiver<u64>) -> Result<(), ApiError> {
        self.serving.replica.must_lead()?;
        tokio::select! {
            changed = length.changed() => changed.map_err(|_| stopping()),
            changed = self.changes.changed() => changed.map_err(|_| stopping()),
            () = self.serving.replica.deposed(), if self.serving.replica.must_lead().is_ok() => Ok(()),
        }
    }

    fn last(&self) -> Option<Last> {
        let published = self.serving.replica.published();
        let state: &State = &published.borrow().state;
        // An attempt that the State forgot has nothing more to say.
        let Some(attempt) = state.attempts.get(&self.found.attempt) else {
            return Some(Last::Anew);
        };
        let node = attempt.nodes.iter().find(|n| n.node == self.found.node)?;
        last_of(node, &self.found.name)
    }

    fn message(&self, piece: Piece, end: End) -> StreamJobLogsResponse {
        StreamJobLogsResponse {
            node: self.found.node.clone(),
            attempt: self.found.attempt.clone(),
            offset: piece.offset as i64,
            data: piece.data,
            end: end as i32,
            file: self.found.name.clone(),
            rank: self.found.rank,
            dropped_bytes: piece.dropped as i64,
        }
    }
}

pub(super) fn stopping() -> ApiError {
    ApiError::Unavailable {
        why: "it is stopping".into(),
        leader: None,
    }
}

/// How many of the bytes are whole lines. A progress bar that goes back to its line's beginning has written a line, too.
fn whole_lines(data: &[u8]) -> usize {
    let ends = |at: &usize| match data[*at] {
        b'\n' => true,
        b'\r' => data.get(at + 1).is_some_and(|next| *next != b'\n'),
        _ => false,
    };
    (0..data.len()).rev().find(ends).map_or(0, |at| at + 1)
}

/// What is known of a file's end.
enum Last {
    Size(u64),
    /// The node is lost. So much of the file its agent has found, if there is one yet.
    Lost(u64),
    /// The job has another attempt.
    Anew,
}

fn last_of(node: &AttemptNode, file: &str) -> Option<Last> {
    let known = node.files.iter().find(|f| f.name == file);
    let size = known.map(|f| u64::try_from(f.size_bytes).unwrap_or_default());
    match node.phase {
        NodePhase::Ended => Some(Last::Size(size.unwrap_or_default())),
        NodePhase::Lost => Some(Last::Lost(size.unwrap_or_default())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_where_they_end() {
        for (text, whole) in [
            ("", 0),
            ("one", 0),
            ("one\ntwo", 4),
            ("one\n", 4),
            ("50%\r60%", 4),
            ("one\r", 0),
            ("one\r\n", 5),
        ] {
            assert_eq!(whole_lines(text.as_bytes()), whole, "{text:?}");
        }
    }
}
