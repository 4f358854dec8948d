//! Takes in, on the leader, what other replicas have to say for the agents whose sessions they have.
//!
//! One stream for each replica. It holds the live sessions of its nodes for as long as it lasts and the replica gives signs of life;
//! what is told for other nodes is not taken. It knows nothing of what commands mean.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::agent::v1::FileRequest;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::relay_service_server::RelayService;
use batchai_proto::internal::v1::{
    NodeBeat, NodeSession, PeerHello, RelayRequest, RelayResponse, RelayedAnswer, RelayedCommand,
    RelayedQuestion, RelayedRefusal, relayed_answer, relayed_command,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::contacts::{Contacts, Live};
use super::files::FileDesk;
use crate::replica::Handle;
use crate::replica::handle::{self, ReplicaError};
use crate::replica::peers::{Peers, check_peer};
use crate::state::{Rejection, limit};

/// A replica that says nothing for so long holds no sessions any more: it tells what is new several times a second.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// Answers that the replica has not taken: it reads at once or is cut off.
const OUTBOX_MAX: usize = 64;
/// Questions to agents that are not sent.
const QUESTIONS_MAX: usize = 64;

/// Serves replicas that have agents' sessions.
pub struct Relay {
    pub replica: Handle,
    pub peers: Peers,
    pub contacts: Contacts,
    pub desk: FileDesk,
    pub shutdown: CancellationToken,
}

#[tonic::async_trait]
impl RelayService for Relay {
    type RelayStream = Pin<Box<dyn Stream<Item = Result<RelayResponse, Status>> + Send>>;

    async fn relay(
        &self,
        request: Request<Streaming<RelayRequest>>,
    ) -> Result<Response<Self::RelayStream>, Status> {
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(SILENCE_MAX, incoming.message()).await;
        let first = first.map_err(|_| invalid("hello", "did not come in time"))??;
        let hello = check_peer(
            &self.peers,
            &self.replica,
            first.and_then(|first| first.hello),
        )?;
        self.replica.must_lead()?;
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX);
        let (asked, questions) = mpsc::channel(QUESTIONS_MAX);
        let mut branch = Branch {
            replica: self.replica.clone(),
            peers: self.peers.clone(),
            contacts: self.contacts.clone(),
            desk: self.desk.clone(),
            hello,
            held: BTreeMap::new(),
            asked,
            outbox,
        };
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let deposed = branch.replica.clone();
            let end = tokio::select! {
                end = branch.take_in(incoming, questions) => end,
                () = deposed.deposed() => {
                    Err(handle::unavailable(&deposed, &ReplicaError::NotLeader).into())
                }
                () = shutdown.cancelled() => Err(Status::unavailable("it is shutting down")),
            };
            branch.leave(end);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

/// The sessions of one replica.
struct Branch {
    replica: Handle,
    peers: Peers,
    contacts: Contacts,
    desk: FileDesk,
    hello: PeerHello,
    held: BTreeMap<String, Held>,
    /// Where questions to its nodes are put.
    asked: mpsc::Sender<(String, FileRequest)>,
    outbox: mpsc::Sender<Result<RelayResponse, Status>>,
}

/// A session that is with the replica.
struct Held {
    /// By its count.
    session: u64,
    live: Live,
    /// The latest heartbeat that it was told is granted.
    granted: u64,
}

impl Branch {
    async fn take_in(
        &mut self,
        mut incoming: Streaming<RelayRequest>,
        mut questions: mpsc::Receiver<(String, FileRequest)>,
    ) -> Result<(), Status> {
        let silence = tokio::time::sleep(SILENCE_MAX);
        tokio::pin!(silence);
        loop {
            let response = tokio::select! {
                request = incoming.message() => {
                    let Some(request) = request? else {
                        return Ok(());
                    };
                    silence.as_mut().reset(tokio::time::Instant::now() + SILENCE_MAX);
                    self.answer(request)?
                }
                Some((node, question)) = questions.recv() => RelayResponse {
                    questions: vec![RelayedQuestion { node, question: Some(question) }],
                    ..RelayResponse::default()
                },
                () = &mut silence => return Err(Status::deadline_exceeded("it is not heard of")),
            };
            let sent = self.outbox.try_send(Ok(response));
            sent.map_err(|_| Status::resource_exhausted("it does not read"))?;
        }
    }

    fn answer(&mut self, request: RelayRequest) -> Result<RelayResponse, Status> {
        // It may have been removed since it said hello.
        let state = self.replica.published().borrow().state.clone();
        self.peers.check_known(&state, &self.hello)?;
        let mut response = RelayResponse::default();
        for ended in request.ended {
            self.release(&ended);
        }
        for begun in request.begun {
            match self.hold(&begun)? {
                true => response.accepted.push(begun),
                false => response.refused.push(begun),
            }
        }
        for beat in request.beats {
            let session = beat.session.unwrap_or_default();
            let held = self.held.get(&session.node);
            if let Some(held) = held.filter(|held| held.session == session.session) {
                held.live.beat(beat.number);
            }
        }
        response.granted = self.granted();
        self.record(request.commands);
        Ok(response)
    }

    /// Claims the live session of a node; `false` where another has it.
    fn hold(&mut self, begun: &NodeSession) -> Result<bool, Status> {
        Name::parse(Noun::Node, &begun.node)
            .map_err(|error| invalid("begun.node", &error.to_string()))?;
        // What it says last is so.
        self.held.remove(&begun.node);
        if self.held.len() >= limit(Noun::Node) {
            return Err(Status::resource_exhausted(
                "it has more sessions than there may be nodes",
            ));
        }
        let Some(live) = self.contacts.claim_for_another(&begun.node) else {
            return Ok(false);
        };
        live.heard();
        self.desk.attend(&begun.node, self.asked.clone());
        let held = Held {
            session: begun.session,
            live,
            granted: 0,
        };
        self.held.insert(begun.node.clone(), held);
        Ok(true)
    }

    fn release(&mut self, ended: &NodeSession) {
        let held = self.held.get(&ended.node);
        if held.is_some_and(|held| held.session == ended.session) {
            self.held.remove(&ended.node);
            self.desk.leave(&ended.node, &self.asked);
        }
    }

    /// The heartbeats that were granted since it was last told.
    fn granted(&mut self) -> Vec<NodeBeat> {
        let granted = self.held.iter_mut().filter_map(|(node, held)| {
            let number = held.live.granted();
            (number > held.granted).then(|| {
                held.granted = number;
                NodeBeat {
                    session: Some(NodeSession {
                        node: node.clone(),
                        session: held.session,
                    }),
                    number,
                }
            })
        });
        granted.collect()
    }

    /// Has what agents said recorded; the answer follows when the log has decided.
    fn record(&self, commands: Vec<RelayedCommand>) {
        if commands.is_empty() {
            return;
        }
        let (mut tickets, mut kinds, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        for command in commands {
            let (node, kind) = match command.kind {
                Some(relayed_command::Kind::RegisterNode(register)) => {
                    (register.name.clone(), Kind::RegisterNode(register))
                }
                Some(relayed_command::Kind::RecordReport(report)) => {
                    (report.node.clone(), Kind::RecordReport(report))
                }
                None => continue,
            };
            if self.held.contains_key(&node) {
                tickets.push(command.ticket);
                kinds.push(kind);
            } else {
                let unheld = ReplicaError::Refused(format!("{node} has no live session there"));
                answers.push(told(command.ticket, Err(unheld)));
            }
        }
        let (replica, outbox) = (self.replica.clone(), self.outbox.clone());
        tokio::spawn(async move {
            let results = replica.propose_all(kinds, None).await;
            answers.extend(
                tickets
                    .into_iter()
                    .zip(results)
                    .map(|(t, result)| told(t, result)),
            );
            let response = RelayResponse {
                answers,
                ..RelayResponse::default()
            };
            // A stream that has ended leaves them unknown, as it says.
            let _ = outbox.send(Ok(response)).await;
        });
    }

    fn leave(self, end: Result<(), Status>) {
        for node in self.held.keys() {
            self.desk.leave(node, &self.asked);
        }
        if let Err(status) = end {
            let (replica, reason) = (self.hello.from, status.message());
            tracing::info!(replica, reason, "agents of another replica are not relayed");
            // It may be gone.
            let _ = self.outbox.try_send(Err(status));
        }
    }
}

fn told(ticket: u64, result: Result<i64, ReplicaError>) -> RelayedAnswer {
    let outcome = match result {
        Ok(revision) => relayed_answer::Outcome::Revision(revision),
        Err(ReplicaError::Rejected(Rejection::WrongState { name, why })) => {
            relayed_answer::Outcome::Refusal(RelayedRefusal { name, why })
        }
        Err(error) => relayed_answer::Outcome::Unknown(error.to_string()),
    };
    RelayedAnswer {
        ticket,
        outcome: Some(outcome),
    }
}

fn invalid(field: &str, why: &str) -> Status {
    ApiError::Invalid(vec![Fault::new(field, why)]).into()
}
