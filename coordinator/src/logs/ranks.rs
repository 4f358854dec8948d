//! Follows what all ranks of an attempt print, on one stream: whole lines, each message of one rank.
//!
//! Files are followed as they appear, each by a reader of its own, and which files there are the names say: nothing here knows
//! toolkits. All readers together have a bounded part of the files in memory, however many they are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use batchai_common::error::{ApiError, Fault};
use batchai_common::ranks::Layout;
use batchai_proto::v1::StreamJobLogsResponse;
use batchai_proto::v1::stream_job_logs_response::End;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::FileKey;
use super::follow::{Begin, Follow, Found, STALL_MAX, stopping};
use super::reader::{LOOK_INTERVAL, Outbox, ReadRequest, Serving, internal, next_made};
use crate::replica::hub::{Follower, Topic};
use crate::state::attempts::{Attempt, Phase, layout};

/// Files of one stream.
pub const FILES_MAX: usize = 1024;
/// Readers of one stream that have a piece in memory.
const TURNS: usize = 2;

/// Which of a rank's two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputStream {
    Stdout,
    Stderr,
}

/// What all ranks print.
#[derive(Clone, Debug, Default)]
pub struct Ranks {
    /// Both where none is named.
    pub stream: Option<OutputStream>,
    /// Where to go on, by node and file.
    pub positions: BTreeMap<(String, String), u64>,
}

impl Ranks {
    /// The rank that a file of an attempt is of, if it is one of those that are asked for.
    pub(super) fn rank_of(&self, attempt: &Attempt, file: &str) -> Option<i32> {
        self.rank_among(layout(&attempt.spec), file)
    }

    fn rank_among(&self, layout: Layout, file: &str) -> Option<i32> {
        let (stem, stream) = match file.strip_suffix(".txt")? {
            stem if stem.starts_with("stdout") => (&stem[6..], OutputStream::Stdout),
            stem if stem.starts_with("stderr") => (&stem[6..], OutputStream::Stderr),
            _ => return None,
        };
        // One process alone has no number; with a role, processes are numbered within it.
        let (role, number) = match stem.strip_prefix('-') {
            None if stem.is_empty() => ("wk", "0"),
            None => return None,
            Some(stem) => stem.split_once('-').unwrap_or(("wk", stem)),
        };
        let number = Some(number).filter(|number| number.bytes().all(|c| c.is_ascii_digit()));
        let number: i32 = number?.parse().ok()?;
        let rank = match role {
            "wk" => number,
            "ps" => number.checked_add(i32::try_from(layout.workers).ok()?)?,
            _ => return None,
        };
        self.stream
            .is_none_or(|asked| asked == stream)
            .then_some(rank)
    }
}

type FileOf = (String, String);

/// Follows them.
pub(super) struct Merge {
    serving: Serving,
    request: ReadRequest,
    ranks: Ranks,
    changes: Follower,
    readers: JoinSet<Result<End, ApiError>>,
    begun: BTreeSet<FileOf>,
    turns: Arc<Semaphore>,
    truncated: bool,
    lost: bool,
}

impl Merge {
    pub(super) fn new(serving: Serving, request: ReadRequest, ranks: Ranks) -> Merge {
        let job = Topic::Resource(request.job.clone());
        Merge {
            changes: serving.replica.hub().follow(job),
            serving,
            request,
            ranks,
            readers: JoinSet::new(),
            begun: BTreeSet::new(),
            turns: Arc::new(Semaphore::new(TURNS)),
            truncated: false,
            lost: false,
        }
    }

    /// Sends everything into the outbox, up to the last message.
    pub(super) async fn run(mut self, outbox: &Outbox) -> Result<(), ApiError> {
        let Some(attempt) = self.attempt().await? else {
            return Err(self.serving.no_such_file(&self.request, None));
        };
        let mut stalled: Option<Instant> = None;
        loop {
            self.serving.may_serve(Some(&attempt)).await?;
            // In this order: what is over was over before its files were looked for.
            let over = self.over(&attempt.id);
            let made = self.serving.logs.files_made(&attempt.id);
            self.begin_new(&attempt, outbox).await?;
            let missing = self.missing(&attempt.id);
            let given_up = stalled.is_some_and(|since| since.elapsed() > STALL_MAX);
            let waits = !missing.is_empty() && !given_up && self.request.follow;
            let ends = over || !self.request.follow;
            if ends && !waits && self.readers.is_empty() {
                self.truncated |= !missing.is_empty();
                return self.finish(&attempt.id, over, outbox).await;
            }
            stalled = match over && !missing.is_empty() {
                true => stalled.or_else(|| Some(Instant::now())),
                false => None,
            };
            tokio::select! {
                Some(ended) = self.readers.join_next() => {
                    let end = ended.map_err(internal)??;
                    self.truncated |= end == End::Truncated;
                    self.lost |= end == End::NodeLost;
                }
                () = next_made(Some(made)) => {}
                changed = self.changes.changed() => changed.map_err(|_| stopping())?,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    }

    /// The job's latest attempt; waited for, where it is to be followed.
    async fn attempt(&mut self) -> Result<Option<Arc<Attempt>>, ApiError> {
        loop {
            let found = self.serving.attempt(&self.request.job)?;
            if found.is_some() || !self.request.follow || self.serving.job_ended() {
                return Ok(found);
            }
            self.serving.replica.must_lead()?;
            tokio::select! {
                changed = self.changes.changed() => changed.map_err(|_| stopping())?,
                () = self.serving.replica.deposed() => {}
            }
        }
    }

    /// Whether nothing new is to come of an attempt but what its nodes have announced.
    fn over(&self, id: &str) -> bool {
        let published = self.serving.replica.published();
        let state = &published.borrow().state;
        let attempt = state.attempts.get(id);
        attempt.is_none_or(|attempt| attempt.phase == Phase::Ended)
    }

    fn asked(&self, node: &str) -> bool {
        self.request.node.as_ref().is_none_or(|asked| asked == node)
    }

    async fn begin_new(&mut self, of: &Attempt, outbox: &Outbox) -> Result<(), ApiError> {
        let attempt = of.id.as_str();
        let listed = self.serving.logs.files(attempt).await.map_err(internal)?;
        for found in listed {
            let node = format!("nodes/{}", found.node_id);
            let Some(rank) = self.ranks.rank_of(of, &found.file) else {
                continue;
            };
            let file = (node, found.file);
            if !self.asked(&file.0) || self.begun.contains(&file) {
                continue;
            }
            if self.begun.len() == FILES_MAX {
                let why = format!(
                    "the job has more than {FILES_MAX} such files: name one stream, or a node"
                );
                return Err(ApiError::Invalid(vec![Fault::new("all_ranks", why)]));
            }
            let Some(key) = FileKey::new(attempt, &file.0, &file.1) else {
                continue;
            };
            // It may have been swept since it was listed.
            let Some(open) = self.serving.logs.find(key).await.map_err(internal)? else {
                continue;
            };
            let position = self.ranks.positions.get(&file);
            let begin = position.map_or(self.request.begin, |offset| Begin {
                offset: *offset,
                ..Begin::default()
            });
            let job = Topic::Resource(self.request.job.clone());
            let follow = Follow {
                serving: self.serving.clone(),
                changes: self.serving.replica.hub().follow(job),
                found: Found {
                    file: open,
                    attempt: attempt.to_owned(),
                    node: file.0.clone(),
                    name: file.1.clone(),
                    rank: Some(rank),
                },
                begin,
                length: None,
                follow: self.request.follow,
                lines: true,
                turns: self.turns.clone(),
            };
            self.begun.insert(file);
            let outbox = outbox.clone();
            self.readers.spawn(async move { follow.run(&outbox).await });
        }
        Ok(())
    }

    /// Files that nodes have announced and that are not here.
    fn missing(&self, id: &str) -> Vec<FileOf> {
        let published = self.serving.replica.published();
        let state = &published.borrow().state;
        let attempt = state.attempts.get(id);
        let Some(attempt) = attempt else {
            return Vec::new();
        };
        let nodes = attempt.nodes.iter();
        let files = nodes.flat_map(|n| n.files.iter().map(|f| (n.node.clone(), f.name.clone())));
        let asked =
            |(node, name): &FileOf| self.asked(node) && self.ranks.rank_of(attempt, name).is_some();
        let files = files.filter(asked);
        files.filter(|file| !self.begun.contains(file)).collect()
    }

    async fn finish(&self, attempt: &str, over: bool, outbox: &Outbox) -> Result<(), ApiError> {
        let end = match over {
            _ if self.truncated => End::Truncated,
            _ if self.lost => End::NodeLost,
            true => End::Complete,
            false => End::NotFollowed,
        };
        let last = StreamJobLogsResponse {
            attempt: attempt.to_owned(),
            end: end as i32,
            ..Default::default()
        };
        // The reader may have gone away: it has all there is.
        let _ = outbox.send(Ok(last)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_known_by_the_names_of_their_files() {
        let both = Ranks::default();
        let layout = Layout {
            nodes: 3,
            workers: 3,
            servers: 2,
        };
        let stdout = Ranks {
            stream: Some(OutputStream::Stdout),
            ..Ranks::default()
        };
        for (file, any, out) in [
            ("stdout.txt", Some(0), Some(0)),
            ("stderr-17.txt", Some(17), None),
            ("stdout-17.txt", Some(17), Some(17)),
            ("stdout-job_prep.txt", None, None),
            ("stdout-job_prep-n1.txt", None, None),
            ("stdout-wk-2.txt", Some(2), Some(2)),
            ("stderr-ps-1.txt", Some(4), None),
            ("stdout-ps-2147483647.txt", None, None),
            ("stdout-ps-.txt", None, None),
            ("stdout-xx-1.txt", None, None),
            ("stdout-.txt", None, None),
            ("stdout17.txt", None, None),
            ("execution.log", None, None),
        ] {
            assert_eq!(both.rank_among(layout, file), any, "{file}");
            assert_eq!(stdout.rank_among(layout, file), out, "{file}");
        }
    }
}
