//! The way of the sessions that a replica has to the leader: one stream, which carries what `upward` says is new and what agents have
//! said, and brings back what the leader grants, refuses and asks.
//!
//! Where the replica leads itself there is no stream, and nothing is relayed. Sessions go on with the next leader; what was sent and
//! not answered is said again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use batchai_common::error::{ApiError, causes};
use batchai_common::limits::CALL_TIMEOUT;
use batchai_common::time::boot_millis;
use batchai_common::tls::Connector;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::relay_service_client::RelayServiceClient;
use batchai_proto::internal::v1::{
    PeerHello, RelayRequest, RelayResponse, RelayedCommand, relayed_command,
};
use prost::Message as _;
use rustls::ClientConfig;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::contacts::{Contacts, Live};
use super::fate::outcome;
use super::files::{FileDesk, Question};
use super::upward::Upward;
use crate::replica::handle::{self, Role};
use crate::replica::peers::{PEER_BYTES_MAX, Peers};
use crate::replica::{Handle, ReplicaError};

/// The leader is told what is new this often, at least.
const TELL_INTERVAL: Duration = Duration::from_millis(250);
/// A leader that has not answered for so long is asked over another stream.
const SILENCE_MAX: Duration = Duration::from_secs(1);
const GREETING_MAX: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// How long something is said again.
const PATIENCE: Duration = Duration::from_secs(10);
/// Messages that the network has not taken.
const OUTBOX_MAX: usize = 4;
/// What agents have said and is not sent.
const ASKS_MAX: usize = 1024;
/// Bytes that go into one message, but for the last command.
const BATCH_BYTES: usize = 512 << 10;
/// How long the leader may take to say whether a session is the live one.
const CONFIRM_MAX: Duration = Duration::from_secs(3);

type Reply = oneshot::Sender<Result<i64, ReplicaError>>;

/// What an agent has said, to be recorded.
struct Ask {
    kind: Kind,
    reply: Reply,
}

/// What sessions hold of the way to the leader. Cheap to clone.
#[derive(Clone)]
pub struct Uplink {
    replica: Handle,
    asks: mpsc::Sender<Ask>,
    alone: watch::Receiver<bool>,
}

impl Uplink {
    /// Refuses agents where no leader is heard of.
    pub fn must_reach(&self) -> Result<(), ApiError> {
        match *self.alone.borrow() {
            true => Err(handle::unavailable(
                &self.replica,
                &"no leader answers this replica",
            )),
            false => Ok(()),
        }
    }

    /// Returns when no leader has answered for too long.
    pub async fn alone(&self) {
        // Closed means stopped: nobody answers any more.
        let _ = self.alone.clone().wait_for(|alone| *alone).await;
    }

    /// Waits until the leader takes a session for the live one of its node; `false` where the node has another.
    pub async fn confirm(&self, live: &Live) -> Result<bool, ApiError> {
        let mut role = self.replica.role();
        let said = async {
            tokio::select! {
                () = live.standing(true) => true,
                () = live.standing(false) => false,
                // Then it is what was claimed here that counts.
                Ok(_) = role.wait_for(|role| role.leads) => true,
            }
        };
        let said = tokio::time::timeout(CONFIRM_MAX, said).await;
        said.map_err(|_| handle::unavailable(&self.replica, &"the leader does not answer"))
    }

    /// Has something recorded, by whoever leads. The State here has it by then. What an agent says is the same however often it is
    /// said: while another leader is found it is said again.
    pub async fn propose(&self, kind: Kind) -> Result<i64, ReplicaError> {
        let begun = Instant::now();
        loop {
            let recorded = self.propose_once(kind.clone()).await;
            let lost = matches!(
                recorded,
                Err(ReplicaError::NotLeader | ReplicaError::Unknown)
            );
            if !lost || *self.alone.borrow() || begun.elapsed() > PATIENCE {
                return recorded;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn propose_once(&self, kind: Kind) -> Result<i64, ReplicaError> {
        if self.replica.role().borrow().leads {
            return self.replica.propose(kind).await;
        }
        let (reply, answer) = oneshot::channel();
        let applied = async {
            let asked = self.asks.send(Ask { kind, reply }).await;
            asked.map_err(|_| ReplicaError::Stopped)?;
            let revision = answer.await.map_err(|_| ReplicaError::Unknown)??;
            let mut published = self.replica.published();
            let here = published.wait_for(|published| published.state.revision >= revision);
            here.await.map_err(|_| ReplicaError::Stopped)?;
            Ok(revision)
        };
        let applied = tokio::time::timeout(CALL_TIMEOUT / 2, applied).await;
        applied.map_err(|_| ReplicaError::TimedOut)?
    }
}

/// What the way goes through.
pub struct Parts {
    pub replica: Handle,
    pub peers: Peers,
    pub contacts: Contacts,
    pub desk: FileDesk,
    /// Where replicas are before the State says it.
    pub first: BTreeMap<u64, String>,
    /// None in a lab.
    pub credentials: Option<watch::Receiver<Arc<ClientConfig>>>,
    /// Without an answer of a leader for so long, agents are let go.
    pub alone_after: Duration,
}

/// The task that keeps the way open.
pub struct Link {
    parts: Parts,
    asks: mpsc::Receiver<Ask>,
    alone: watch::Sender<bool>,
    upward: Upward,
    waiting: HashMap<u64, Reply>,
    tickets: u64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("it is not known where the leader is")]
    Nowhere,
    #[error("{0}")]
    Target(#[from] batchai_common::tls::connector::TargetError),
    #[error("cannot connect: {}", causes(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", .0.message())]
    Refused(#[from] Status),
    #[error("it does not answer")]
    Silent,
    #[error("it ended the stream")]
    Ended,
}

/// A way that is not open yet.
pub fn new(parts: Parts) -> (Uplink, Link) {
    let (asks, asked) = mpsc::channel(ASKS_MAX);
    let (alone, is_alone) = watch::channel(true);
    let uplink = Uplink {
        replica: parts.replica.clone(),
        asks,
        alone: is_alone,
    };
    let link = Link {
        parts,
        asks: asked,
        alone,
        upward: Upward::default(),
        waiting: HashMap::new(),
        tickets: 0,
    };
    (uplink, link)
}

impl Link {
    /// Runs until the token is cancelled.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut said = String::new();
        let ended = shutdown.cancelled();
        tokio::pin!(ended);
        loop {
            let role = *self.parts.replica.role().borrow();
            let end = tokio::select! {
                end = self.once(role) => end,
                () = &mut ended => return,
            };
            self.give_up();
            let Err(error) = end else {
                continue;
            };
            // The same again and again is said once.
            let text = error.to_string();
            if said != text {
                tracing::warn!(error = text, leader = ?role.leader, "no way to the leader for agents; trying again");
                said = text;
            }
            self.look();
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Nobody says what became of what was asked.
    fn give_up(&mut self) {
        for (_, reply) in self.waiting.drain() {
            // Who waited may be gone.
            let _ = reply.send(Err(ReplicaError::Unknown));
        }
        while let Ok(ask) = self.asks.try_recv() {
            let _ = ask.reply.send(Err(ReplicaError::NotLeader));
        }
    }

    fn look(&self) {
        let most = self.parts.alone_after.as_millis() as i64;
        let alone = self.upward.is_alone(boot_millis(), most);
        self.alone.send_if_modified(|known| {
            let changed = *known != alone;
            *known = alone;
            changed
        });
    }

    /// As long as nobody else leads than does now.
    async fn once(&mut self, role: Role) -> Result<(), LinkError> {
        let mut changes = self.parts.replica.role();
        let other = changes.wait_for(|now| (now.leads, now.leader) != (role.leads, role.leader));
        let other = async { drop(other.await) };
        tokio::pin!(other);
        match role.leader {
            Some(leader) if leader != self.parts.replica.id() => {
                let greeted = self.ticking(greet(&self.parts, leader)?, &mut other).await;
                match greeted {
                    Some(greeted) => {
                        let (outbox, incoming) = greeted?;
                        self.talk(outbox, incoming, &mut other).await
                    }
                    None => Ok(()),
                }
            }
            _ => {
                self.stand_alone(role.leads, other).await;
                Ok(())
            }
        }
    }

    /// Nobody else is told anything.
    async fn stand_alone(&mut self, leads: bool, other: impl Future<Output = ()>) {
        let mut tick = every(TELL_INTERVAL);
        tokio::pin!(other);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    if leads {
                        self.upward.reached(boot_millis());
                    }
                    self.look();
                }
                Some(ask) = self.asks.recv() => {
                    let _ = ask.reply.send(Err(ReplicaError::NotLeader));
                }
                () = &mut other => return,
            }
        }
    }

    /// Waits for something, and for whether this replica is alone meanwhile; `None` where another one leads by now.
    async fn ticking<T>(
        &self,
        work: impl Future<Output = T>,
        other: impl Future<Output = ()>,
    ) -> Option<T> {
        let mut tick = every(TELL_INTERVAL);
        tokio::pin!(work);
        tokio::pin!(other);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                _ = tick.tick() => self.look(),
                () = &mut other => return None,
            }
        }
    }

    async fn talk(
        &mut self,
        outbox: mpsc::Sender<RelayRequest>,
        mut incoming: Streaming<RelayResponse>,
        other: impl Future<Output = ()>,
    ) -> Result<(), LinkError> {
        self.upward.begin();
        let contacts = self.parts.contacts.clone();
        let (mut tick, mut heard) = (every(TELL_INTERVAL), Instant::now());
        tokio::pin!(other);
        // The leader must hold a session before it takes what that one says.
        self.tell(&outbox);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    self.look();
                    if heard.elapsed() > SILENCE_MAX {
                        return Err(LinkError::Silent);
                    }
                    self.tell(&outbox);
                }
                () = contacts.changed() => self.tell(&outbox),
                // What finds no room waits for it.
                Some(ask) = self.asks.recv(), if outbox.capacity() > 0 => self.pass(&outbox, ask),
                response = incoming.message() => {
                    let response = response?.ok_or(LinkError::Ended)?;
                    heard = Instant::now();
                    self.take(response);
                    self.look();
                }
                () = &mut other => return Ok(()),
            }
        }
    }

    /// Sends what is new of the sessions, if there is room: else it is new the next time.
    fn tell(&mut self, outbox: &mpsc::Sender<RelayRequest>) {
        if let Ok(place) = outbox.try_reserve() {
            place.send(self.upward.news(self.parts.contacts.own_sessions()));
        }
        self.grant();
    }

    /// Sends what agents have said, as much as is there and fits.
    fn pass(&mut self, outbox: &mpsc::Sender<RelayRequest>, ask: Ask) {
        let Ok(place) = outbox.try_reserve() else {
            // Who waited may be gone.
            let _ = ask.reply.send(Err(ReplicaError::Busy));
            return;
        };
        let mut request = RelayRequest::default();
        let (mut size, mut next) = (0, Some(ask));
        while let Some(ask) = next {
            let kind = match ask.kind {
                Kind::RegisterNode(register) => relayed_command::Kind::RegisterNode(register),
                Kind::RecordReport(report) => relayed_command::Kind::RecordReport(report),
                // Agents say nothing else.
                _ => break,
            };
            self.tickets += 1;
            let command = RelayedCommand {
                ticket: self.tickets,
                kind: Some(kind),
            };
            size += command.encoded_len();
            request.commands.push(command);
            self.waiting.insert(self.tickets, ask.reply);
            next = match size < BATCH_BYTES {
                true => self.asks.try_recv().ok(),
                false => None,
            };
        }
        place.send(request);
    }

    /// Passes on what was granted, as far as the State here is.
    fn grant(&mut self) {
        let revision = self.parts.replica.published().borrow().state.revision;
        for known in self.upward.due(revision) {
            let contacts = &self.parts.contacts;
            contacts.granted(&known.node, known.session, known.beat);
        }
    }

    fn take(&mut self, response: RelayResponse) {
        self.grant();
        let taken = self.upward.take(response, boot_millis());
        for (of, live) in taken.standings {
            self.parts.contacts.stand(&of.node, of.session, live);
        }
        self.grant();
        for answer in taken.answers {
            if let Some(reply) = self.waiting.remove(&answer.ticket) {
                // Who waited may be gone.
                let _ = reply.send(outcome(answer));
            }
        }
        for asked in taken.questions {
            let question = asked.question.map(Question::File);
            // Who asked hears nothing, and gives up.
            if let Some(question) = question.or(asked.exec.map(Question::Exec)) {
                self.parts.desk.pass(&asked.node, question);
            }
        }
    }
}

type Streams = (mpsc::Sender<RelayRequest>, Streaming<RelayResponse>);

/// Opens a stream to the leader.
fn greet(
    parts: &Parts,
    leader: u64,
) -> Result<impl Future<Output = Result<Streams, LinkError>> + 'static, LinkError> {
    let state = parts.replica.published().borrow().state.clone();
    let book = parts.peers.book(&parts.first, &state);
    let endpoint = book.get(&leader).ok_or(LinkError::Nowhere)?;
    let connector = Connector::new(endpoint, parts.credentials.clone())?;
    let hello = PeerHello {
        to: leader,
        epoch: state.epoch,
        ..parts.peers.own().clone()
    };
    let greeting = async move {
        let channel = connector.connect().await?;
        let mut client = RelayServiceClient::new(channel)
            .max_encoding_message_size(PEER_BYTES_MAX)
            .max_decoding_message_size(PEER_BYTES_MAX);
        let (outbox, requests) = mpsc::channel(OUTBOX_MAX);
        let hello = RelayRequest {
            hello: Some(hello),
            ..RelayRequest::default()
        };
        // It has room: nothing was sent yet.
        let _ = outbox.try_send(hello);
        let answer = client.relay(ReceiverStream::new(requests)).await?;
        Ok((outbox, answer.into_inner()))
    };
    Ok(async move {
        let greeted = tokio::time::timeout(GREETING_MAX, greeting).await;
        greeted.unwrap_or(Err(LinkError::Silent))
    })
}

fn every(interval: Duration) -> Interval {
    let mut interval = tokio::time::interval(interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
