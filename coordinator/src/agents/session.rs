//! One session of one node, from its Hello to its end.

use std::time::Duration;

use batchai_common::crash_point;
use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::HEARTBEAT_INTERVAL;
use batchai_common::time::boot_millis;
use batchai_proto::agent::v1::{
    Assignment, ClusterMounts, FileServerReport, Hello, LeaseGrant, Report, SessionRequest,
    SessionResponse, Welcome, session_request, session_response,
};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{RecordReport, RegisterNode};
use batchai_proto::secrets;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::contacts::Live;
use super::files::{Attendance, QUESTIONS_MAX, Question};
use super::hello::{check, check_ensemble, check_epoch, check_report};
use super::link::Uplink;
use super::service::Agents;
use crate::access::Caller;
use crate::call::caller;
use crate::replica::handle;
use crate::replica::hub::Topic;
use crate::replica::{Handle, ReplicaError};
use crate::secrets::Vault;
use crate::state::keys::workspace_of;
use crate::state::{
    Rejection, State, assignments::assignments, file_servers, nodes, restore, setup,
};

/// What a session may have to send and the agent has not taken: it reads at once or is cut off.
pub const OUTBOX_MAX: usize = 16;
/// Reports of an agent that wait to be recorded.
const REPORTS_MAX: usize = 8;
/// Certificates are looked at this often while a session lasts.
const EXPIRY_LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// Where what a cluster mounts stands in it.
const MOUNTS: &str = "node_setup.mount_volumes";
/// Where the secrets of a set-up task stand.
const SETUP_TASK: &str = "node_setup.setup_task.";

/// A node that said Hello and was accepted.
pub struct Session {
    replica: Handle,
    uplink: Uplink,
    name: String,
    uid: String,
    incarnation: String,
    live: Live,
    vault: Vault,
    /// How long leases are that are granted here.
    lease: Duration,
    caller: Caller,
    /// Taken by whoever sends.
    questions: Option<mpsc::Receiver<(String, Question)>>,
    /// For as long as the session lasts.
    _attendance: Attendance,
}

impl Session {
    /// Accepts a node: registers it and takes in what it holds.
    pub async fn open(agents: &Agents, hello: Hello) -> Result<Session, Status> {
        let (replica, contacts, desk) = (agents.replica.clone(), &agents.contacts, &agents.desk);
        let facts = hello.facts.clone().unwrap_or_default();
        let name = check(&hello, &facts)?.to_string();
        let own = replica.published().borrow().state.ensemble.clone();
        check_ensemble(&name, &hello.ensemble, &own)?;
        check_epoch(&name, hello.epoch, replica.published().borrow().state.epoch)?;
        let live = contacts.claim(&name).ok_or_else(|| second(&name))?;
        let uplink = agents.uplink.clone();
        if !uplink.confirm(&live).await? {
            return Err(second(&name));
        }
        live.pace().await;
        // A list that lacks what was placed since would have the agent end it.
        let state = replica.read().await;
        let state = state.map_err(|error| status(&replica, error))?;
        let incarnation = format!("{}/{}", hello.journal_id, facts.boot_id);
        let uid = hello.uid.clone();
        let register = RegisterNode {
            name: name.clone(),
            uid,
            incarnation: incarnation.clone(),
            facts: Some(facts),
            empty: hello.empty,
        };
        if !nodes::is_registered(&state, &register) {
            let registered = uplink.propose(Kind::RegisterNode(register)).await;
            registered.map_err(|error| status(&replica, error))?;
        }
        let (asked, questions) = mpsc::channel(QUESTIONS_MAX);
        let attendance = desk.attend(&name, asked);
        let questions = Some(questions);
        let session = Session {
            replica,
            uplink,
            questions,
            name,
            uid: hello.uid,
            incarnation,
            live,
            vault: agents.vault.clone(),
            lease: agents.lease,
            caller: caller(),
            _attendance: attendance,
        };
        session.report(hello.report.unwrap_or_default()).await?;
        session.live.heard(boot_millis());
        Ok(session)
    }

    /// Relays until either side ends.
    pub async fn run(
        mut self,
        mut incoming: Streaming<SessionRequest>,
        outbox: mpsc::Sender<Result<SessionResponse, Status>>,
        shutdown: CancellationToken,
    ) {
        tracing::info!(node = %self.name, "session opened");
        let questions = self.questions.take();
        let end = tokio::select! {
            end = self.take_in(&mut incoming) => end,
            end = self.send_out(&outbox, questions) => end,
            () = self.live.standing(false) => Err(second(&self.name)),
            () = self.uplink.alone() => Err(unavailable("no leader answers this replica")),
            () = shutdown.cancelled() => Err(unavailable("the coordinator is shutting down")),
        };
        match end {
            Ok(()) => tracing::info!(node = %self.name, "session ended by the agent"),
            Err(status) => {
                tracing::info!(node = %self.name, reason = status.message(), "session ended");
                // The agent may be gone; it learns the reason only if it is not.
                let _ = outbox.try_send(Err(status));
            }
        }
    }

    async fn take_in(&self, incoming: &mut Streaming<SessionRequest>) -> Result<(), Status> {
        let (reports, mut next) = mpsc::channel(REPORTS_MAX);
        let record = async {
            while let Some(mut report) = next.recv().await {
                self.live.pace().await;
                // Each says all that the node sees: the latest is enough.
                while let Ok(later) = next.try_recv() {
                    report = later;
                }
                self.report(report).await?;
            }
            Ok(())
        };
        let ((), ()) = tokio::try_join!(self.read(incoming, reports), record)?;
        Ok(())
    }

    /// Heartbeats count while reports wait to be recorded.
    async fn read(
        &self,
        incoming: &mut Streaming<SessionRequest>,
        reports: mpsc::Sender<Report>,
    ) -> Result<(), Status> {
        while let Some(request) = incoming.message().await? {
            self.live.heard(boot_millis());
            match request.message {
                Some(session_request::Message::Heartbeat(beat)) => {
                    self.live.beat(beat.number, boot_millis())
                }
                Some(session_request::Message::Report(report)) => {
                    // Who sends more waits, and nobody with him. The end of the other side is seen there.
                    let _ = reports.send(report).await;
                }
                Some(session_request::Message::Hello(_)) | None => {
                    let fault = Fault::new("message", "only the first message is a hello");
                    return Err(ApiError::Invalid(vec![fault]).into());
                }
            }
        }
        Ok(())
    }

    async fn report(&self, report: Report) -> Result<(), Status> {
        check_report(&report)?;
        let report = self.own(report);
        if report == Report::default() {
            return Ok(());
        }
        let command = RecordReport {
            node: self.name.clone(),
            uid: self.uid.clone(),
            incarnation: self.incarnation.clone(),
            report: Some(report),
        };
        let recorded = self.uplink.propose(Kind::RecordReport(command)).await;
        recorded.map_err(|error| status(&self.replica, error))?;
        crash_point!("coordinator_recorded_a_report");
        Ok(())
    }

    /// What the State would ignore need not enter the log: attempts that it does not know, or that are others'.
    fn own(&self, mut report: Report) -> Report {
        let published = self.replica.published();
        let state = &published.borrow().state;
        report.attempts.retain(|seen| {
            let known = state.attempts.get(&seen.attempt);
            known.is_some_and(|known| known.nodes.iter().any(|node| node.node == self.name))
        });
        report.strays = report.strays.filter(|list| {
            let known = restore::of_node(state, &self.name).map(|(_, known)| &known.stray);
            let same = known.flatten().eq(&list.strays);
            let node = state.nodes.get(&self.name);
            !same || node.is_some_and(|node| node.epoch != list.epoch)
        });
        report.mounts = report.mounts.filter(|said| {
            let node = state.nodes.get(&self.name);
            node.is_some_and(|node| setup::is_news(state, node, said))
        });
        let news = |said: &FileServerReport| file_servers::is_news(state, &self.name, said);
        report.file_servers.retain(news);
        report
    }

    /// The node gets the secrets of its work as they are.
    fn unseal(&self, state: &State, assignment: &mut Assignment) {
        let Some(job) = &mut assignment.job else {
            return;
        };
        let (workspace, uid) = (workspace_of(&job.name).to_owned(), job.uid.clone());
        let mut places = secrets::of_job(job);
        if assignment.set_up {
            // They were sealed where they stand in the cluster.
            for (path, _) in &mut places {
                path.insert_str(0, SETUP_TASK);
            }
        }
        let opened = self.vault.unseal(state, &workspace, &uid, places);
        if let Err(error) = opened {
            tracing::error!(%error, job = job.name, "its secrets cannot be opened");
            assignment.fault = format!("the job's secrets cannot be opened: {error}");
            secrets::blank(secrets::of_job(job));
        }
    }

    /// So it does those of what its cluster mounts.
    fn unseal_mounts(&self, state: &State, mounts: &mut ClusterMounts) {
        let workspace = workspace_of(&mounts.cluster).to_owned();
        let places = secrets::of_mounts(MOUNTS, mounts.volumes.as_mut());
        let opened = self.vault.unseal(state, &workspace, &mounts.uid, places);
        if let Err(error) = opened {
            tracing::error!(%error, cluster = mounts.cluster, "its secrets cannot be opened");
            mounts.fault = format!("the cluster's secrets cannot be opened: {error}");
            secrets::blank(secrets::of_mounts(MOUNTS, mounts.volumes.as_mut()));
        }
    }

    async fn send_out(
        &self,
        outbox: &mpsc::Sender<Result<SessionResponse, Status>>,
        questions: Option<mpsc::Receiver<(String, Question)>>,
    ) -> Result<(), Status> {
        let Some(mut questions) = questions else {
            return Ok(());
        };
        let topic = Topic::Assignments(self.name.clone());
        let mut changes = self.replica.hub().follow(topic.clone());
        let mut grants = self.live.grants();
        let published = self.replica.published();
        let welcome = Welcome {
            ensemble: published.borrow().state.ensemble.clone(),
            epoch: published.borrow().state.epoch,
            heartbeat_interval: prost_types::Duration::try_from(HEARTBEAT_INTERVAL).ok(),
        };
        send(outbox, session_response::Message::Welcome(welcome))?;
        let (mut sent, mut granted) = (-1, 0);
        loop {
            // Before the State is looked at: what had been taken from the node by then is not in its list any more.
            let heartbeat = self.live.granted();
            // Cloned, so that the list is not made while the replica waits to publish.
            let state = published.borrow().state.clone();
            if let Some(refusal) = self.caller.refusal(&state) {
                return Err(refusal.into());
            }
            // The list is made where it is new: this is passed at each heartbeat.
            let news = state.nodes.get(&self.name).map(|node| node.assigned);
            if news.is_some_and(|assigned| assigned > sent) {
                let mut list = assignments(&state, &self.name);
                sent = list.revision;
                for assignment in &mut list.assignments {
                    self.unseal(&state, assignment);
                }
                if let Some(mounts) = &mut list.mounts {
                    self.unseal_mounts(&state, mounts);
                }
                crash_point!(
                    "coordinator_is_to_send_assignments",
                    !list.assignments.is_empty()
                );
                send(outbox, session_response::Message::Assignments(list))?;
            }
            let lease = self.lease.min(longest_lease(&state));
            if heartbeat > granted && !lease.is_zero() {
                granted = heartbeat;
                let lease = prost_types::Duration::try_from(lease).ok();
                let grant = LeaseGrant { heartbeat, lease };
                send(outbox, session_response::Message::LeaseGrant(grant))?;
            }
            tokio::select! {
                () = expiry(&self.caller) => {
                    let why = "the certificate has expired";
                    return Err(ApiError::Unauthenticated { why }.into());
                }
                changed = changes.changed() => if changed.is_err() {
                    if published.has_changed().is_err() {
                        return Err(unavailable("the replica has stopped"));
                    }
                    // The State has jumped, by a snapshot.
                    changes = self.replica.hub().follow(topic.clone());
                },
                Ok(()) = grants.changed() => grants.mark_unchanged(),
                Some((_, question)) = questions.recv() => {
                    // Assignments go before: who asked is told that there is no answer.
                    if outbox.capacity() > OUTBOX_MAX / 2 {
                        send(outbox, asked(question))?;
                    }
                }
            }
        }
    }
}

fn asked(question: Question) -> session_response::Message {
    match question {
        Question::File(question) => session_response::Message::FileRequest(question),
        Question::Exec(question) => session_response::Message::ExecRequest(question),
    }
}

fn second(name: &str) -> Status {
    let why = "it has a live session already; a second agent must not use its name".to_owned();
    let name = name.to_owned();
    ApiError::WrongState { name, why }.into()
}

/// As long as every later leader will wait.
fn longest_lease(state: &State) -> Duration {
    Duration::from_millis(u64::try_from(state.longest_lease_ms).unwrap_or_default())
}

/// When what somebody has shown is good no more.
async fn expiry(caller: &Caller) {
    let Some(shown) = &caller.certificate else {
        return std::future::pending().await;
    };
    while !shown.expired() {
        tokio::time::sleep(EXPIRY_LOOK_INTERVAL).await;
    }
}

fn send(
    outbox: &mpsc::Sender<Result<SessionResponse, Status>>,
    message: session_response::Message,
) -> Result<(), Status> {
    outbox
        .try_send(Ok(SessionResponse {
            message: Some(message),
        }))
        .map_err(|_| {
            ApiError::Busy {
                what: "the agent's session",
            }
            .into()
        })
}

fn unavailable(why: &str) -> Status {
    ApiError::Unavailable {
        why: why.to_owned(),
        leader: None,
    }
    .into()
}

/// Where a report cannot be recorded the session ends: the agent comes again with all it knows.
fn status(replica: &Handle, error: ReplicaError) -> Status {
    match error {
        ReplicaError::Rejected(Rejection::WrongState { name, why }) => {
            ApiError::WrongState { name, why }.into()
        }
        error => handle::unavailable(replica, &error).into(),
    }
}
