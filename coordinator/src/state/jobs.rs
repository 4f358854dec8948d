//! PURE. Jobs: what a user asked for and how it stands.
//!
//! ```text
//! create -> QUEUED -> RUNNING -> SUCCEEDED | FAILED
//!             ^  |       |  \-> TERMINATING -> FAILED
//!             |  \-------|----> FAILED              (terminated while queued)
//!             \----------/                          (infrastructure lost, node taken away, a failed run with retries left)
//! ```
//! When a running job is over is decided in `attempts`; here is only what follows for the job.

use batchai_common::fault;
use std::cmp::Reverse;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::internal::v1::terminate_job::Cause;
use batchai_proto::internal::v1::{Delete, Update};
use batchai_proto::v1;
use batchai_proto::v1::job::{SchedulingPriority, State as JobState};
use prost_types::Timestamp;

use super::attempts::{self, Outcome, Verdict};
use super::clusters::QueueKey;
use super::{
    Rejection, Step, check_etag, check_new, check_stays, clusters, etag, file_servers, keys,
    not_found,
};

/// How often a job may go back to the queue because infrastructure failed.
pub const INFRASTRUCTURE_RETRIES_MAX: i32 = 3;

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// What a user set, with name, uid and output path.
    pub spec: Arc<v1::Job>,
    pub revision: i64,
    /// How many were submitted before it: its place in the queue.
    pub submitted: i64,
    pub state: JobState,
    pub state_time: Timestamp,
    pub start_time: Option<Timestamp>,
    pub end_time: Option<Timestamp>,
    pub exit_code: Option<i32>,
    pub errors: Vec<v1::ResourceError>,
    /// The latest attempt.
    pub attempt: Option<String>,
    /// How many attempts it had.
    pub attempts: i32,
    /// How many of them infrastructure ended.
    pub infrastructure_retries: i32,
    /// How many of them failed and were tried again.
    pub retries: i32,
    /// Since when it is removed as soon as it has ended.
    pub deleting: Option<Timestamp>,
}

impl Job {
    /// It will not run again.
    pub fn ended(&self) -> bool {
        matches!(self.state, JobState::Succeeded | JobState::Failed)
    }

    /// A run that fails is not its end.
    pub(super) fn has_retries(&self) -> bool {
        let allowed = self.spec.constraints.map_or(0, |c| c.max_retries);
        self.retries < allowed || fault!("failed_runs_tried_without_bound")
    }

    /// Its place in the queue of its cluster: as it goes back there, the old one.
    pub(super) fn queue_key(&self) -> QueueKey {
        let priority = match self.spec.scheduling_priority() {
            SchedulingPriority::Unspecified => SchedulingPriority::Normal,
            priority => priority,
        };
        QueueKey {
            priority: Reverse(priority as i32),
            submitted: if fault!("queue_by_name") {
                0
            } else {
                self.submitted
            },
            job: self.spec.name.as_str().into(),
        }
    }
}

/// Changes a job in place.
pub(super) fn change(step: &mut Step<'_>, name: &str, change: impl FnOnce(&mut Job)) {
    let (revision, time) = (step.state.revision, step.state.time);
    let Some(job) = step.state.jobs.get_mut(name) else {
        return;
    };
    let job = Arc::make_mut(job);
    let before = job.state;
    change(job);
    job.revision = revision;
    if job.state != before {
        job.state_time = time;
    }
    step.changed(name);
}

pub(super) fn create(step: &mut Step<'_>, spec: &v1::Job) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &spec.name;
    check_new(state, Kind::Job, name)?;
    if !state.clusters.contains_key(&spec.cluster) {
        return Err(not_found(Kind::Cluster, &spec.cluster));
    }
    check_stays(state, &spec.cluster)?;
    file_servers::check(state, spec.mount_volumes.as_ref())?;
    keys::check_job(state, spec)?;
    let segment = format!("{}/{}/{}", state.ensemble, segment_of(name), spec.uid);
    let job = Job {
        spec: Arc::new(v1::Job {
            create_time: Some(state.time),
            job_output_directory_path_segment: segment,
            ..spec.clone()
        }),
        revision: state.revision,
        submitted: state.submissions,
        state: JobState::Queued,
        state_time: state.time,
        start_time: None,
        end_time: None,
        exit_code: None,
        errors: Vec::new(),
        attempt: None,
        attempts: 0,
        infrastructure_retries: 0,
        retries: 0,
        deleting: None,
    };
    state.submissions += 1;
    let key = job.queue_key();
    state.jobs.insert(key.job.clone(), Arc::new(job));
    step.made(Kind::Job, name);
    step.changed(name);
    clusters::change(step, &spec.cluster, |cluster| {
        cluster.queue.insert(key);
    });
    Ok(())
}

/// `{group}/workspaces/{w}/experiments/{e}/jobs/{j}`: the full name without its first collection.
fn segment_of(name: &str) -> &str {
    name.split_once('/')
        .map_or(name, |(_collection, rest)| rest)
}

pub(super) fn update(step: &mut Step<'_>, command: &Update) -> Result<(), Rejection> {
    let name = &command.name;
    let job = get(step, name)?;
    check_etag(name, &command.etag, &etag(job.revision))?;
    if let Some(labels) = &command.labels {
        change(step, name, |job| {
            Arc::make_mut(&mut job.spec).labels = labels.labels.clone();
        });
    }
    Ok(())
}

pub(super) fn terminate(step: &mut Step<'_>, name: &str, cause: Cause) -> Result<(), Rejection> {
    let job = get(step, name)?;
    let outcome = Outcome::terminated(cause);
    match (job.state, &job.attempt) {
        (JobState::Queued, _) => finish(step, name, &outcome),
        (JobState::Running, Some(attempt)) => {
            change(step, name, |job| job.state = JobState::Terminating);
            attempts::decide(step, attempt, outcome);
        }
        _ => {}
    }
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let job = get(step, name)?;
    check_etag(name, &command.etag, &etag(job.revision))?;
    if job.ended() {
        remove(step, name);
        return Ok(());
    }
    if job.deleting.is_some() {
        return Ok(());
    }
    let time = step.state.time;
    change(step, name, |job| job.deleting = Some(time));
    terminate(step, name, Cause::Unspecified)
}

fn get(step: &Step<'_>, name: &str) -> Result<Arc<Job>, Rejection> {
    let job = step.state.jobs.get(name).cloned();
    job.ok_or_else(|| not_found(Kind::Job, name))
}

fn remove(step: &mut Step<'_>, name: &str) {
    if let Some(job) = step.state.jobs.remove(name)
        && let Some(attempt) = &job.attempt
    {
        step.state
            .attempts
            .remove(if fault!("attempt_outlives_job") {
                ""
            } else {
                attempt
            });
    }
    step.gone(Kind::Job, name);
    step.deleted(name);
}

/// A job got its nodes.
pub(super) fn start(step: &mut Step<'_>, name: &str, attempt: &str) {
    let Some(job) = step.state.jobs.get(name).cloned() else {
        return;
    };
    let time = step.state.time;
    if let Some(earlier) = &job.attempt {
        step.state.attempts.remove(earlier);
    }
    change(step, name, |job| {
        job.state = JobState::Running;
        job.start_time = Some(time);
        job.attempt = Some(attempt.to_owned());
        job.attempts += 1;
    });
    clusters::change(step, &job.spec.cluster, |cluster| {
        cluster.queue.remove(&job.queue_key());
        cluster.running.insert(name.to_owned());
    });
}

/// The nodes of a job are free again, or it never had any: it ends, or waits for others.
pub(super) fn finish(step: &mut Step<'_>, name: &str, outcome: &Outcome) {
    let Some(job) = step.state.jobs.get(name).cloned() else {
        return;
    };
    let requeue = match outcome.verdict {
        Verdict::Requeue | Verdict::Retry => true,
        Verdict::InfrastructureFailed => {
            fault!("retries_without_bound")
                || job.infrastructure_retries < INFRASTRUCTURE_RETRIES_MAX
        }
        Verdict::Succeeded | Verdict::Failed => false,
    } && job.deleting.is_none();
    let time = step.state.time;
    change(step, name, |job| {
        if requeue {
            job.state = JobState::Queued;
            job.infrastructure_retries +=
                i32::from(outcome.verdict == Verdict::InfrastructureFailed);
            job.retries += i32::from(outcome.verdict == Verdict::Retry);
            job.errors = outcome.errors.clone();
            return;
        }
        let succeeded = outcome.verdict == Verdict::Succeeded;
        job.state = if succeeded {
            JobState::Succeeded
        } else {
            JobState::Failed
        };
        job.start_time = job.start_time.or(Some(time));
        job.end_time = Some(time);
        job.exit_code = outcome.exit_code;
        job.errors = outcome.errors.clone();
        if outcome.verdict == Verdict::InfrastructureFailed {
            for error in &mut job.errors {
                let why = format!(
                    "; it ran again {INFRASTRUCTURE_RETRIES_MAX} times before, as often as it may"
                );
                error.message.push_str(&why);
            }
        }
        keys::forget(&mut job.spec);
    });
    clusters::change(step, &job.spec.cluster, |cluster| {
        cluster
            .running
            .remove(if fault!("job_stays_among_the_running") {
                ""
            } else {
                name
            });
        if requeue && !fault!("requeued_in_no_queue") {
            cluster.queue.insert(job.queue_key());
        } else {
            cluster.queue.remove(&job.queue_key());
        }
    });
    if job.deleting.is_some() {
        remove(step, name);
    }
}

#[cfg(test)]
#[path = "retries_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "images_tests.rs"]
mod images_tests;
