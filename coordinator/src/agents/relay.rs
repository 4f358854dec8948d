//! Takes in, on the leader, what other replicas have to say for the agents whose sessions they have.
//!
//! One stream for each replica. It holds the live sessions of its nodes for as long as it lasts and the replica gives signs of life;
//! what is told for other nodes is not taken. It knows nothing of what commands mean.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::time::boot_millis;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::relay_service_server::RelayService;
use batchai_proto::internal::v1::{PeerHello, RelayRequest, RelayResponse, RelayedQuestion};
use tokio::sync::mpsc;
use tokio_stream::Stream as Sequence;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::branch::Branch;
use super::contacts::Contacts;
use super::fate::told;
use super::files::{Attendance, FileDesk, Question, Questions};
use crate::replica::Handle;
use crate::replica::handle::{self, ReplicaError};
use crate::replica::peers::{Peers, check_peer};
use crate::state::replicas;

/// A replica that says nothing for so long holds no sessions any more: it tells what is new several times a second.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// Answers that the replica has not taken: until it reads them it is not listened to.
const OUTBOX_MAX: usize = 64;
/// Questions to agents that are not sent.
const QUESTIONS_MAX: usize = 64;

/// A stream of a replica makes way for its next one.
#[derive(Clone, Debug, Default)]
struct Turn {
    over: CancellationToken,
    left: CancellationToken,
}

/// The streams of replicas.
#[derive(Clone, Debug, Default)]
pub struct Turns(Arc<Mutex<BTreeMap<u64, Turn>>>);

/// Serves replicas that have agents' sessions.
pub struct Relay {
    pub turns: Turns,
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
        self.must_belong(hello.from)?;
        let turn = Turn::default();
        let left = turn.left.clone().drop_guard();
        let before = {
            let turns = self.turns.0.lock();
            let mut turns = turns.unwrap_or_else(PoisonError::into_inner);
            turns.insert(hello.from, turn.clone())
        };
        // What the one before holds would be refused to this one.
        if let Some(before) = before {
            before.over.cancel();
            before.left.cancelled().await;
        }
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX);
        let (asked, questions) = mpsc::channel(QUESTIONS_MAX);
        let mut stream = Stream {
            replica: self.replica.clone(),
            peers: self.peers.clone(),
            desk: self.desk.clone(),
            hello,
            held: Branch::new(self.contacts.clone()),
            asked,
            attended: BTreeMap::new(),
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
                () = turn.over.cancelled() => Err(Status::aborted("a later stream took its place")),
                () = shutdown.cancelled() => Err(Status::unavailable("it is shutting down")),
            };
            stream.leave(end);
            drop(left);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

impl Relay {
    /// Raft asks nothing of strangers; this would give them the sessions of nodes.
    fn must_belong(&self, id: u64) -> Result<(), ApiError> {
        let published = self.replica.published();
        match published.borrow().state.replicas.contains_key(&id) {
            true => Ok(()),
            false => Err(ApiError::WrongState {
                name: replicas::name(id),
                why: "it does not belong to the ensemble; an administrator adds it".to_owned(),
            }),
        }
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
    asked: Questions,
    /// Its nodes are asked over this stream.
    attended: BTreeMap<String, Attendance>,
    outbox: mpsc::Sender<Result<RelayResponse, Status>>,
}

impl Stream {
    async fn take_in(
        &mut self,
        mut incoming: Streaming<RelayRequest>,
        mut questions: mpsc::Receiver<(String, Question)>,
    ) -> Result<(), Status> {
        let silence = tokio::time::sleep(SILENCE_MAX);
        tokio::pin!(silence);
        loop {
            // Who does not read is not listened to either, and then taken for silent.
            let place = tokio::select! {
                place = self.outbox.clone().reserve_owned() => place,
                () = &mut silence => return Err(Status::resource_exhausted("it does not read")),
            };
            let Ok(place) = place else {
                return Ok(());
            };
            let response = tokio::select! {
                request = incoming.message() => {
                    let Some(request) = request? else {
                        return Ok(());
                    };
                    silence.as_mut().reset(tokio::time::Instant::now() + SILENCE_MAX);
                    self.answer(request)?
                }
                Some((node, question)) = questions.recv() => RelayResponse {
                    questions: vec![relayed(node, question)],
                    ..RelayResponse::default()
                },
                () = &mut silence => return Err(Status::deadline_exceeded("it is not heard of")),
            };
            place.send(Ok(response));
        }
    }

    fn answer(&mut self, request: RelayRequest) -> Result<RelayResponse, Status> {
        // It may have been removed since it said hello.
        let state = self.replica.published().borrow().state.clone();
        self.peers.check_known(&state, &self.hello)?;
        let heard = self.held.take_in(request, boot_millis())?;
        for node in heard.ended {
            self.attended.remove(&node);
        }
        for node in heard.begun {
            let attendance = self.desk.attend(&node, self.asked.clone());
            self.attended.insert(node, attendance);
        }
        self.record(heard.commands);
        // After the grants: what was given away before is in it.
        let revision = self.replica.published().borrow().state.revision;
        Ok(RelayResponse {
            revision,
            ..heard.response
        })
    }

    /// Has what agents said recorded; the answer follows when the log has decided.
    fn record(&self, commands: Vec<(u64, Kind)>) {
        if commands.is_empty() {
            return;
        }
        let (tickets, kinds): (Vec<_>, Vec<_>) = commands.into_iter().unzip();
        let (replica, outbox) = (self.replica.clone(), self.outbox.clone());
        tokio::spawn(async move {
            let results = replica.propose_all(kinds, None).await;
            let answers = tickets.into_iter().zip(results);
            let response = RelayResponse {
                answers: answers
                    .map(|(ticket, result)| told(ticket, result))
                    .collect(),
                ..RelayResponse::default()
            };
            // A stream that has ended leaves them unknown, as it says.
            let _ = outbox.send(Ok(response)).await;
        });
    }

    fn leave(self, end: Result<(), Status>) {
        if let Err(status) = end {
            let (replica, reason) = (self.hello.from, status.message());
            tracing::info!(replica, reason, "agents of another replica are not relayed");
            // It may be gone.
            let _ = self.outbox.try_send(Err(status));
        }
    }
}

fn relayed(node: String, question: Question) -> RelayedQuestion {
    let (question, exec) = match question {
        Question::File(question) => (Some(question), None),
        Question::Exec(exec) => (None, Some(exec)),
    };
    RelayedQuestion {
        node,
        question,
        exec,
    }
}

fn invalid(field: &str, why: &str) -> Status {
    ApiError::Invalid(vec![Fault::new(field, why)]).into()
}
