//! One session of one node, from its Hello to its end.

use std::collections::BTreeSet;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{HEARTBEAT_INTERVAL, LAST_WORDS_BYTES_MAX};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::agent::v1::{
    Assignment, AttemptObservation, FileRequest, Hello, LeaseGrant, Report, SessionRequest,
    SessionResponse, Welcome, session_request, session_response,
};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{RecordReport, RegisterNode};
use batchai_proto::secrets;
use batchai_proto::v1::{NodeFacts, ResourceError};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::contacts::Live;
use super::service::Agents;
use crate::access::Caller;
use crate::call::caller;
use crate::replica::handle;
use crate::replica::hub::Topic;
use crate::replica::{Handle, ReplicaError};
use crate::secrets::Vault;
use crate::state::keys::workspace_of;
use crate::state::{Rejection, State, assignments::assignments, restore};

/// What a session may have to send and the agent has not taken: it reads at once or is cut off.
pub const OUTBOX_MAX: usize = 16;
/// Texts of an agent about itself are short.
const TEXT_BYTES_MAX: usize = 1024;
/// Certificates are looked at this often while a session lasts.
const EXPIRY_LOOK_INTERVAL: Duration = Duration::from_secs(60);
const LIST_MAX: usize = 64;
/// Where the secrets of a set-up task stand.
const SETUP_TASK: &str = "node_setup.setup_task.";
const FACTS_BYTES_MAX: usize = 64 << 10;
/// Attempts that one node can hold: one that runs, and some that are not forgotten yet.
const ATTEMPTS_MAX: usize = 1000;
/// As many as a job may have processes.
const RANKS_MAX: usize = 10_000;
/// What a node says about a failure.
const FAILURE_BYTES_MAX: usize = 64 << 10;

/// A node that said Hello and was accepted.
pub struct Session {
    replica: Handle,
    name: String,
    uid: String,
    incarnation: String,
    live: Live,
    vault: Vault,
    /// How long leases are that are granted here.
    lease: Duration,
    caller: Caller,
    /// Taken by whoever sends.
    questions: Option<mpsc::Receiver<FileRequest>>,
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
        let Some(live) = contacts.claim(&name) else {
            let why = "it has a live session already; a second agent must not use its name".into();
            return Err(ApiError::WrongState { name, why }.into());
        };
        live.pace().await;
        let incarnation = format!("{}/{}", hello.journal_id, facts.boot_id);
        let uid = hello.uid.clone();
        let register = RegisterNode {
            name: name.clone(),
            uid,
            incarnation: incarnation.clone(),
            facts: Some(facts),
            empty: hello.empty,
        };
        let unchanged = is_registered(&replica.published().borrow().state, &register);
        if !unchanged {
            let registered = replica.propose(Kind::RegisterNode(register)).await;
            registered.map_err(|error| status(&replica, error))?;
        }
        let questions = Some(desk.attend(&name));
        let session = Session {
            replica,
            questions,
            name,
            uid: hello.uid,
            incarnation,
            live,
            vault: agents.vault.clone(),
            lease: agents.lease,
            caller: caller(),
        };
        session.report(hello.report.unwrap_or_default()).await?;
        session.live.heard();
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
            () = self.replica.deposed() => {
                Err(handle::unavailable(&self.replica, &ReplicaError::NotLeader).into())
            }
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
        while let Some(request) = incoming.message().await? {
            self.live.heard();
            match request.message {
                Some(session_request::Message::Heartbeat(beat)) => self.live.beat(beat.number),
                Some(session_request::Message::Report(report)) => {
                    // Who sends more waits, and nobody with him.
                    self.live.pace().await;
                    self.report(report).await?;
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
        if report.attempts.is_empty() && report.strays.is_none() {
            return Ok(());
        }
        let command = RecordReport {
            node: self.name.clone(),
            uid: self.uid.clone(),
            incarnation: self.incarnation.clone(),
            report: Some(report),
        };
        let recorded = self.replica.propose(Kind::RecordReport(command)).await;
        recorded.map_err(|error| status(&self.replica, error))?;
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

    async fn send_out(
        &self,
        outbox: &mpsc::Sender<Result<SessionResponse, Status>>,
        questions: Option<mpsc::Receiver<FileRequest>>,
    ) -> Result<(), Status> {
        let Some(mut questions) = questions else {
            return Ok(());
        };
        let topic = Topic::Assignments(self.name.clone());
        let mut changes = self.replica.hub().follow(topic);
        let mut grants = self.live.grants();
        let published = self.replica.published();
        let welcome = Welcome {
            ensemble: published.borrow().state.ensemble.clone(),
            epoch: published.borrow().state.epoch,
            heartbeat_interval: prost_types::Duration::try_from(HEARTBEAT_INTERVAL).ok(),
        };
        send(outbox, session_response::Message::Welcome(welcome))?;
        let mut sent = -1;
        loop {
            // Cloned, so that the list is not made while the replica waits to publish.
            let state = published.borrow().state.clone();
            if let Some(refusal) = self.caller.refusal(&state) {
                return Err(refusal.into());
            }
            let mut list = assignments(&state, &self.name);
            if list.revision > sent {
                sent = list.revision;
                for assignment in &mut list.assignments {
                    self.unseal(&state, assignment);
                }
                send(outbox, session_response::Message::Assignments(list))?;
            }
            tokio::select! {
                () = expiry(&self.caller) => {
                    let why = "the certificate has expired";
                    return Err(ApiError::Unauthenticated { why }.into());
                }
                changed = changes.changed() => {
                    changed.map_err(|_| unavailable("the replica has stopped"))?;
                }
                Ok(()) = grants.changed() => {
                    let heartbeat = *grants.borrow_and_update();
                    let lease = self.lease.min(longest_lease(&state));
                    if heartbeat > 0 && !lease.is_zero() {
                        let lease = prost_types::Duration::try_from(lease).ok();
                        send(outbox, session_response::Message::LeaseGrant(LeaseGrant { heartbeat, lease }))?;
                    }
                }
                Some(question) = questions.recv() => {
                    // Assignments go before: who asked is told that there is no answer.
                    if outbox.capacity() > OUTBOX_MAX / 2 {
                        send(outbox, session_response::Message::FileRequest(question))?;
                    }
                }
            }
        }
    }
}

/// Whether the State knows all that a node says of itself.
fn is_registered(state: &State, register: &RegisterNode) -> bool {
    let known = state.nodes.get(&register.name);
    known.is_some_and(|known| {
        known.uid == register.uid
            && known.incarnation == register.incarnation
            && Some(&*known.facts) == register.facts.as_ref()
    })
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

/// A node belongs to one ensemble; one that has not met any belongs to this one from now on.
fn check_ensemble(name: &str, theirs: &str, own: &str) -> Result<(), Status> {
    if own.is_empty() {
        return Err(unavailable("the ensemble is being set up"));
    }
    if theirs.is_empty() || theirs == own {
        return Ok(());
    }
    let why = format!(
        "it belongs to ensemble {theirs}, this one is {own}; give its agent another --data directory to have it join"
    );
    Err(ApiError::WrongState {
        name: name.to_owned(),
        why,
    }
    .into())
}

/// What an ensemble began anew from is over for those who have met what it became.
fn check_epoch(name: &str, met: i64, own: i64) -> Result<(), Status> {
    if met <= own {
        return Ok(());
    }
    let why = format!(
        "it has met epoch {met} of the ensemble, and this coordinator is of epoch {own}: the ensemble began anew from a backup. Stop \
         this coordinator, or have it join the other ones under a new id"
    );
    Err(ApiError::WrongState {
        name: name.to_owned(),
        why,
    }
    .into())
}

/// Checks the sizes of a report before it enters the log.
fn check_report(report: &Report) -> Result<(), Status> {
    let strays = report.strays.iter().flat_map(|list| &list.strays);
    let told = strays.clone().filter_map(|stray| stray.seen.as_ref());
    let small = strays.clone().all(|stray| {
        let hosts = stray.hosts.iter().all(|host| {
            host.node.len() <= TEXT_BYTES_MAX
                && (0..=65_535).contains(&host.port)
                && [&host.address, &host.boot_id, &host.root]
                    .iter()
                    .all(|text| text.is_empty())
        });
        let texts = stray.job.len() <= TEXT_BYTES_MAX && stray.job_uid.len() <= TEXT_BYTES_MAX;
        hosts && texts && stray.hosts.len() <= RANKS_MAX && stray.seen.is_some()
    });
    if !small || !fit(told) || !fit(report.attempts.iter()) {
        let fault = Fault::new("report", "it is larger than a report can be");
        return Err(ApiError::Invalid(vec![fault]).into());
    }
    Ok(())
}

/// Whether observations are few enough, each once, and each small enough.
fn fit<'a>(seen: impl Iterator<Item = &'a AttemptObservation> + Clone) -> bool {
    let text_of = |error: &ResourceError| {
        let details = error
            .details
            .iter()
            .map(|d| d.name.len() + d.value.len())
            .sum::<usize>();
        error.code.len() + error.message.len() + details
    };
    let fits = |seen: &'a AttemptObservation| {
        let error = seen
            .failure
            .as_ref()
            .and_then(|failure| failure.error.as_ref());
        seen.attempt.len() <= TEXT_BYTES_MAX
            && seen.last_words.len() <= LAST_WORDS_BYTES_MAX
            && seen.ranks.len() <= RANKS_MAX
            && seen
                .ranks
                .iter()
                .all(|rank| (0..RANKS_MAX as i32).contains(&rank.rank))
            && seen.files.len() <= 2 * RANKS_MAX + LIST_MAX
            && seen
                .files
                .iter()
                .all(|file| file.name.len() <= TEXT_BYTES_MAX)
            && error.is_none_or(|error| text_of(error) <= FAILURE_BYTES_MAX)
    };
    let (ids, count): (BTreeSet<_>, _) = (
        seen.clone().map(|seen| &seen.attempt).collect(),
        seen.clone().count(),
    );
    count <= ATTEMPTS_MAX && ids.len() == count && seen.clone().all(fits)
}

/// Checks everything an agent says about itself; returns its full name.
fn check(hello: &Hello, facts: &NodeFacts) -> Result<Name, Status> {
    let mut faults = Vec::new();
    let name = Name::top(Noun::Node, &hello.node_id);
    if let Err(error) = &name {
        faults.push(Fault::new("hello.node_id", error.to_string()));
    }
    for (field, text) in [
        ("hello.uid", &hello.uid),
        ("hello.journal_id", &hello.journal_id),
    ] {
        if uuid::Uuid::try_parse(text).is_err() {
            faults.push(Fault::new(field, "must be a UUID"));
        }
    }
    if !hello.ensemble.is_empty() && uuid::Uuid::try_parse(&hello.ensemble).is_err() {
        faults.push(Fault::new("hello.ensemble", "must be a UUID"));
    }
    let texts = [
        &facts.vm_size,
        &facts.image,
        &facts.boot_id,
        &facts.root,
        &facts.agent_version,
    ];
    let gpus = facts.gpus.iter().flat_map(|gpu| [&gpu.uuid, &gpu.model]);
    let long = texts.into_iter().chain(gpus).chain(&facts.addresses);
    if long.into_iter().any(|text| text.len() > TEXT_BYTES_MAX) {
        faults.push(Fault::new(
            "hello.facts",
            format!("texts have at most {TEXT_BYTES_MAX} bytes"),
        ));
    }
    let longest = [
        facts.gpus.len(),
        facts.addresses.len(),
        facts.disks.len(),
        facts.numa_nodes.len(),
        facts.rdma_devices.len(),
    ];
    if facts.encoded_len() > FACTS_BYTES_MAX {
        faults.push(Fault::new("hello.facts", "are larger than facts can be"));
    }
    if longest.into_iter().any(|length| length > LIST_MAX) {
        faults.push(Fault::new(
            "hello.facts",
            format!("lists have at most {LIST_MAX} elements"),
        ));
    }
    let ports = (1..=65_535).contains(&facts.first_port)
        && (1..=65_535).contains(&facts.last_port)
        && facts.first_port <= facts.last_port;
    if !ports {
        faults.push(Fault::new(
            "hello.facts.first_port",
            "must begin a range of ports",
        ));
    }
    if facts.vm_size.is_empty() || facts.boot_id.is_empty() || facts.addresses.is_empty() {
        faults.push(Fault::new(
            "hello.facts",
            "vm_size, boot_id and addresses must be given",
        ));
    }
    match (name, faults.is_empty()) {
        (Ok(name), true) => Ok(name),
        _ => Err(ApiError::Invalid(faults).into()),
    }
}
