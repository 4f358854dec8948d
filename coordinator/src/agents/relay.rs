//! Takes in, on the leader, what other replicas have to say for the agents whose sessions they have.
//!
//! One stream for each replica. It holds the live sessions of its nodes for as long as it lasts and the replica gives signs of life;
//! what is told for other nodes is not taken. It knows nothing of what commands mean.

use std::pin::Pin;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_common::time::boot_millis;
use batchai_proto::agent::v1::FileRequest;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::relay_service_server::RelayService;
use batchai_proto::internal::v1::{
    NodeBeat, NodeSession, PeerHello, RelayRequest, RelayResponse, RelayedAnswer, RelayedCommand,
    RelayedQuestion, RelayedRefusal, relayed_answer, relayed_command,
};
use tokio::sync::mpsc;
use tokio_stream::Stream as Sequence;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::branch::Branch;
use super::contacts::Contacts;
use super::files::FileDesk;
use crate::replica::Handle;
use crate::replica::handle::{self, ReplicaError};
use crate::replica::peers::{Peers, check_peer};
use crate::state::Rejection;

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
    type RelayStream = Pin<Box<dyn Sequence<Item = Result<RelayResponse, Status>> + Send>>;

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
        let mut stream = Stream {
            replica: self.replica.clone(),
            peers: self.peers.clone(),
            desk: self.desk.clone(),
            hello,
            held: Branch::new(self.contacts.clone()),
            asked,
            outbox,
        };
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let deposed = stream.replica.clone();
            let end = tokio::select! {
                end = stream.take_in(incoming, questions) => end,
                () = deposed.deposed() => {
                    Err(handle::unavailable(&deposed, &ReplicaError::NotLeader).into())
                }
                () = shutdown.cancelled() => Err(Status::unavailable("it is shutting down")),
            };
            stream.leave(end);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

/// What goes on with one replica.
struct Stream {
    replica: Handle,
    peers: Peers,
    desk: FileDesk,
    hello: PeerHello,
    held: Branch,
    /// Where questions to its nodes are put.
    asked: mpsc::Sender<(String, FileRequest)>,
    outbox: mpsc::Sender<Result<RelayResponse, Status>>,
}

impl Stream {
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
            let NodeSession { node, session } = beat.session.unwrap_or_default();
            self.held.beat(&node, session, beat.number, boot_millis());
        }
        let granted = self.held.granted().into_iter();
        response.granted = granted
            .map(|(node, session, number)| NodeBeat {
                session: Some(NodeSession { node, session }),
                number,
            })
            .collect();
        self.record(request.commands);
        Ok(response)
    }

    /// Claims the live session of a node; `false` where another has it.
    fn hold(&mut self, begun: &NodeSession) -> Result<bool, Status> {
        Name::parse(Noun::Node, &begun.node)
            .map_err(|error| invalid("begun.node", &error.to_string()))?;
        let held = self.held.hold(&begun.node, begun.session, boot_millis());
        if held {
            self.desk.attend(&begun.node, self.asked.clone());
        }
        Ok(held)
    }

    fn release(&mut self, ended: &NodeSession) {
        if self.held.release(&ended.node, ended.session) {
            self.desk.leave(&ended.node, &self.asked);
        }
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
            if self.held.holds(&node) {
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
        for node in self.held.nodes() {
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
