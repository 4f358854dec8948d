//! The agent's live session with the coordinator: says hello, sends heartbeats and reports, takes assignments.
//!
//! It decides nothing. When it ends, for whatever reason, it is opened again with everything the journal holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use batchai_common::crash_point;
use batchai_common::limits::HEARTBEAT_INTERVAL;
use batchai_common::time::boot_millis;
use batchai_common::tls::Connector;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::{
    AssignmentList, ExecRequest, FileRequest, Heartbeat, Hello, LeaseGrant, Report, SessionRequest,
    SessionResponse, Welcome, session_request, session_response,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use batchai_common::error::{NODE_EXPELLED, causes};
use tonic_types::StatusExt as _;

use crate::journal::{Identity, Journal};
use crate::lease::Lease;

/// What the session may have to send and the network has not taken.
const OUTBOX_MAX: usize = 16;
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How long to wait before trying again: longer each time, and never alike for two agents.
pub fn backoff(failures: u32) -> Duration {
    let longest = BACKOFF_FIRST
        .saturating_mul(1 << failures.min(10))
        .min(BACKOFF_MAX);
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot connect: {}", causes(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", .0.message())]
    Refused(#[from] tonic::Status),
    #[error("the coordinator ended it")]
    Ended,
    #[error(
        "this node belongs to ensemble {own}, the coordinator is of {other}; give the agent another --data \
         directory to join that"
    )]
    OtherEnsemble { own: String, other: String },
    #[error(
        "the coordinator is of epoch {other} of the ensemble, and this node has met epoch {own}: the ensemble began anew from a backup"
    )]
    EarlierEpoch { own: i64, other: i64 },
    #[error(transparent)]
    Journal(#[from] crate::journal::JournalError),
}

/// The session and what it connects.
pub struct Session {
    pub connector: Connector,
    pub hello: Hello,
    pub identity: Identity,
    pub journal: Arc<Journal>,
    pub observed: watch::Receiver<Report>,
    pub assignments: watch::Sender<Option<AssignmentList>>,
    pub questions: mpsc::Sender<FileRequest>,
    pub execs: mpsc::Sender<ExecRequest>,
    /// The lease of the node, and until when it lasts, in milliseconds of the boot clock.
    pub lease: Lease,
    pub leased: watch::Sender<i64>,
    /// The node was expelled: it must end what it does.
    pub expelled: Arc<AtomicBool>,
}

impl Session {
    /// Opens sessions until the node is expelled; dropping it ends the one that is open.
    pub async fn run(mut self) {
        let mut failures = 0;
        let mut said = String::new();
        loop {
            let error = match self.once(&mut failures).await {
                Ok(()) => SessionError::Ended,
                Err(SessionError::Refused(status)) if is_expelled(&status) => {
                    self.expelled.store(true, Ordering::Relaxed);
                    return;
                }
                Err(error) => error,
            };
            // The same reason again and again is said once.
            let text = error.to_string();
            if said != text {
                tracing::warn!(
                    error = text,
                    "no session with the coordinator; trying again"
                );
                said = text;
            }
            tokio::time::sleep(backoff(failures)).await;
            failures += 1;
        }
    }

    async fn once(&mut self, failures: &mut u32) -> Result<(), SessionError> {
        let channel = self.connector.connect().await?;
        let (outbox, requests) = mpsc::channel(OUTBOX_MAX);
        let report = self.observed.borrow_and_update().clone();
        let hello = Hello {
            report: Some(report),
            empty: self.journal.attempts()?.is_empty(),
            ensemble: self.identity.ensemble.clone().unwrap_or_default(),
            epoch: self.identity.epoch,
            ..self.hello.clone()
        };
        // The channel has room: nothing was sent yet.
        let _ = outbox.try_send(request(session_request::Message::Hello(hello)));
        let mut client = AgentServiceClient::new(channel);
        let mut incoming = client
            .session(ReceiverStream::new(requests))
            .await?
            .into_inner();
        self.talk(&outbox, &mut incoming, failures).await
    }

    async fn talk(
        &mut self,
        outbox: &mpsc::Sender<SessionRequest>,
        incoming: &mut Streaming<SessionResponse>,
        failures: &mut u32,
    ) -> Result<(), SessionError> {
        let mut heartbeat = every(HEARTBEAT_INTERVAL);
        loop {
            let message = tokio::select! {
                response = incoming.message() => {
                    let Some(response) = response? else {
                        return Ok(());
                    };
                    match response.message {
                        Some(session_response::Message::Welcome(welcome)) => {
                            heartbeat = every(self.welcome(welcome)?);
                        }
                        Some(session_response::Message::Assignments(list)) => {
                            // Only now it is a session: the coordinator took the node as it is.
                            *failures = 0;
                            self.take(list);
                        }
                        Some(session_response::Message::LeaseGrant(grant)) => self.lease(&grant),
                        Some(session_response::Message::FileRequest(question)) => {
                            // Who has asked too much at once is not answered, and asks again.
                            let _ = self.questions.try_send(question);
                        }
                        Some(session_response::Message::ExecRequest(exec)) => {
                            let _ = self.execs.try_send(exec);
                        }
                        // What a later coordinator says that this agent does not know.
                        None => {}
                    }
                    continue;
                }
                _ = heartbeat.tick() => {
                    let number = self.lease.beat(boot_millis());
                    session_request::Message::Heartbeat(Heartbeat { number })
                }
                changed = self.observed.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let report = self.observed.borrow_and_update().clone();
                    session_request::Message::Report(report)
                }
            };
            crash_point!(
                "agent_is_to_report",
                matches!(message, session_request::Message::Report(_))
            );
            if outbox.send(request(message)).await.is_err() {
                return Ok(());
            }
        }
    }

    /// A node belongs to the first ensemble it meets. Returns how often to send a heartbeat.
    fn welcome(&mut self, welcome: Welcome) -> Result<Duration, SessionError> {
        match &self.identity.ensemble {
            Some(own) if *own != welcome.ensemble => {
                return Err(SessionError::OtherEnsemble {
                    own: own.clone(),
                    other: welcome.ensemble,
                });
            }
            Some(_) if self.identity.epoch > welcome.epoch => {
                return Err(SessionError::EarlierEpoch {
                    own: self.identity.epoch,
                    other: welcome.epoch,
                });
            }
            Some(_) if self.identity.epoch == welcome.epoch => {}
            _ => {
                // Before anything of that epoch is done here.
                self.identity.ensemble = Some(welcome.ensemble.clone());
                self.identity.epoch = welcome.epoch;
                self.journal.keep(&self.identity)?;
            }
        }
        let (ensemble, epoch) = (welcome.ensemble, welcome.epoch);
        tracing::info!(ensemble, epoch, "session opened");
        let interval = welcome
            .heartbeat_interval
            .and_then(|i| Duration::try_from(i).ok());
        Ok(interval
            .filter(|i| !i.is_zero())
            .unwrap_or(HEARTBEAT_INTERVAL))
    }

    /// Work that may begin anew elsewhere runs longer.
    fn lease(&mut self, grant: &LeaseGrant) {
        let lease = grant.lease.and_then(|lease| Duration::try_from(lease).ok());
        let lease = lease.unwrap_or_default().as_millis() as i64;
        let Some(held) = self.lease.granted(grant.heartbeat, lease) else {
            return;
        };
        match self.journal.keep_lease(held) {
            // Shims know of it before anything is begun for it.
            Ok(()) => drop(self.leased.send_replace(held.until)),
            Err(error) => tracing::error!(%error, "shims cannot be told that the lease goes on"),
        }
    }

    /// A list that is older than the last is ignored.
    fn take(&self, list: AssignmentList) {
        self.assignments.send_if_modified(|known| {
            let newer = known
                .as_ref()
                .is_none_or(|known| list.revision > known.revision);
            if newer {
                *known = Some(list);
            }
            newer
        });
    }
}

fn is_expelled(status: &tonic::Status) -> bool {
    status
        .get_details_error_info()
        .is_some_and(|info| info.reason == NODE_EXPELLED)
}

fn every(interval: Duration) -> Interval {
    let mut interval = tokio::time::interval(interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn request(message: session_request::Message) -> SessionRequest {
    SessionRequest {
        message: Some(message),
    }
}
