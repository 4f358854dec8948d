//! Finds the log file that a reader asks for, waits for it where it is to be followed, and says where it is to be had if not here.
//!
//! How a file that was found is read, `follow` knows, and `ranks` what all ranks print.

use std::sync::Arc;
use std::time::{Duration, Instant};

use batchai_common::error::ApiError;
use batchai_common::names::Kind;
use batchai_proto::v1::StreamJobLogsResponse;
use tokio::sync::{Semaphore, mpsc, watch};
use tonic::Status;

use super::follow::{Begin, Follow, Found, STALL_MAX, stopping};
use super::ranks::{Merge, Ranks};
use super::{FileKey, LogStore, is_whole};
use crate::replica::Handle;
use crate::replica::hub::{Follower, Topic};
use crate::state::attempts::{Attempt, AttemptNode};

/// What to read.
#[derive(Clone)]
pub struct ReadRequest {
    pub job: String,
    pub what: What,
    /// The node's full name, where one was named.
    pub node: Option<String>,
    pub begin: Begin,
    /// How many bytes at most.
    pub length: Option<u64>,
    pub follow: bool,
}

/// Of which files.
#[derive(Clone)]
pub enum What {
    File(String),
    Ranks(Ranks),
}

/// So many files are named to who asked for another.
const NAMES_MAX: usize = 20;
/// Who waits for a file is told when it is made; what depends on time alone is looked at this often.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

pub(super) type Outbox = mpsc::Sender<Result<StreamJobLogsResponse, Status>>;

/// Sends what is asked for into the outbox, up to its end message or an error.
pub async fn read(replica: Handle, logs: LogStore, request: ReadRequest, outbox: Outbox) {
    let serving = Serving {
        replica,
        logs,
        job: request.job.clone(),
    };
    let what = request.what.clone();
    let read = async {
        match what {
            What::File(file) => Reader::new(serving, request, file).run(&outbox).await,
            What::Ranks(ranks) => Merge::new(serving, request, ranks).run(&outbox).await,
        }
    };
    let end = tokio::select! {
        end = read => end,
        // Nobody reads any more.
        () = outbox.closed() => return,
    };
    if let Err(error) = end {
        // The reader may have gone away in this very moment.
        let _ = outbox.send(Err(error.into())).await;
    }
}

/// From what a reader of a job is served.
#[derive(Clone)]
pub(super) struct Serving {
    pub replica: Handle,
    pub logs: LogStore,
    pub job: String,
}

impl Serving {
    /// The job's latest attempt; none while it waits for its first.
    pub(super) fn attempt(&self, name: &str) -> Result<Option<Arc<Attempt>>, ApiError> {
        let published = self.replica.published();
        let state = &published.borrow().state;
        let job = state.jobs.get(name);
        let job = job.ok_or(ApiError::NotFound {
            kind: Kind::Job,
            name: name.to_owned(),
        })?;
        Ok(job
            .attempt
            .as_ref()
            .and_then(|id| state.attempts.get(id))
            .cloned())
    }

    pub(super) fn job_ended(&self) -> bool {
        let published = self.replica.published();
        let state = &published.borrow().state;
        let job = state.jobs.get(self.job.as_str());
        job.is_none_or(|job| job.ended())
    }

    /// Whether the logs of an attempt are to be had here: with the leader, who gets what is still written, or where all of them are.
    ///
    /// # Errors
    /// Says who leads.
    pub(super) async fn may_serve(&self, attempt: Option<&Attempt>) -> Result<(), ApiError> {
        let Err(elsewhere) = self.replica.must_lead() else {
            return Ok(());
        };
        let Some(attempt) = attempt else {
            return Err(elsewhere);
        };
        let here = self.logs.files(&attempt.id).await.map_err(internal)?;
        match is_whole(attempt, &here) {
            true => Ok(()),
            false => Err(elsewhere),
        }
    }

    pub(super) fn no_such_file(
        &self,
        request: &ReadRequest,
        attempt: Option<&Attempt>,
    ) -> ApiError {
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
        let file = match &request.what {
            What::File(file) => file.clone(),
            What::Ranks(_) => "of any rank".to_owned(),
        };
        ApiError::NoSuchFile {
            job: self.job.clone(),
            file,
            hint,
        }
    }
}

/// Reads one file.
struct Reader {
    serving: Serving,
    request: ReadRequest,
    file: String,
    changes: Follower,
}

impl Reader {
    fn new(serving: Serving, request: ReadRequest, file: String) -> Reader {
        let job = Topic::Resource(request.job.clone());
        Reader {
            changes: serving.replica.hub().follow(job),
            serving,
            request,
            file,
        }
    }

    async fn run(mut self, outbox: &Outbox) -> Result<(), ApiError> {
        let found = self.find().await?;
        let follow = Follow {
            serving: self.serving,
            changes: self.changes,
            found,
            begin: self.request.begin,
            length: self.request.length,
            follow: self.request.follow,
            lines: false,
            turns: Arc::new(Semaphore::new(1)),
        };
        follow.run(outbox).await.map(drop)
    }

    /// Waits, if asked to follow, until the file exists.
    async fn find(&mut self) -> Result<Found, ApiError> {
        let mut announced: Option<Instant> = None;
        loop {
            let attempt = self.serving.attempt(&self.request.job)?;
            // Before it is looked for: what is made in between is not missed.
            let made = attempt
                .as_ref()
                .map(|a| self.serving.logs.files_made(&a.id));
            self.serving.may_serve(attempt.as_deref()).await?;
            if let Some(found) = self.look(attempt.as_deref()).await? {
                return Ok(found);
            }
            // Only a job that has ended gets no other attempt.
            announced = match self.serving.job_ended() {
                true => announced.or_else(|| Some(Instant::now())),
                false => None,
            };
            let stalled = announced.is_some_and(|since| since.elapsed() > STALL_MAX);
            if stalled || !self.may_come(attempt.as_deref()) || !self.request.follow {
                return Err(self.serving.no_such_file(&self.request, attempt.as_deref()));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = next_made(made) => {}
                changed = self.changes.changed() => changed.map_err(|_| stopping())?,
            }
        }
    }

    /// The first node that has the file.
    async fn look(&self, attempt: Option<&Attempt>) -> Result<Option<Found>, ApiError> {
        let Some(attempt) = attempt else {
            return Ok(None);
        };
        for node in attempt.nodes.iter().filter(|node| self.asked(node)) {
            let Some(key) = FileKey::new(&attempt.id, &node.node, &self.file) else {
                continue;
            };
            let open = self.serving.logs.find(key).await.map_err(internal)?;
            if let Some(file) = open {
                return Ok(Some(Found {
                    file,
                    attempt: attempt.id.clone(),
                    node: node.node.clone(),
                    name: self.file.clone(),
                    rank: Ranks::default().rank_of(attempt, &self.file),
                }));
            }
        }
        Ok(None)
    }

    fn asked(&self, node: &AttemptNode) -> bool {
        let asked = self.request.node.as_ref();
        asked.is_none_or(|asked| asked == &node.node)
    }

    /// The file may exist one day: the job goes on, or one of its nodes has named it and is yet to send it.
    fn may_come(&self, attempt: Option<&Attempt>) -> bool {
        let nodes = attempt.iter().flat_map(|attempt| &attempt.nodes);
        let nodes = nodes.filter(|node| self.asked(node));
        let mut files = nodes.flat_map(|n| &n.files);
        !self.serving.job_ended() || files.any(|f| f.name == self.file)
    }
}

/// Waits until a file is made; for ever where there is no attempt that could have any.
pub(super) async fn next_made(made: Option<watch::Receiver<()>>) {
    if let Some(mut made) = made
        && made.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

pub(super) fn internal(error: impl std::fmt::Display) -> ApiError {
    let id = uuid::Uuid::new_v4().to_string();
    tracing::error!(%error, id, "cannot read a log file");
    ApiError::Internal { id }
}
