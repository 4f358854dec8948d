//! Runs commands for callers, beside attempts of this node or apart from them; and for the agents of other nodes of an attempt.
//!
//! Each of a caller has a connection of its own to the coordinator (what one of them prints and nobody reads holds up nothing else), and a process of
//! this program that holds it (`shim::exec`) and ends with this one. Nothing is remembered, and who may run what was decided by the
//! coordinator.

mod command;
mod streams;
mod talk;

pub use command::secrets;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use batchai_common::error::causes;
use batchai_common::limits::EXEC_CHUNKS_MAX;
use batchai_common::tls::Connector;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::exec_fault::Kind;
use batchai_proto::agent::v1::serve_exec_request::Message;
use batchai_proto::agent::v1::{
    AnswerHello, Assignment, ExecFault, ExecRequest, ExecStarted, ServeExecRequest,
    ServeExecResponse,
};
use batchai_proto::v1::{ExecCommand, ExecInput};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Status, Streaming};

use crate::journal::Journal;
use crate::launch::HostFacts;
use talk::Talk;

/// Commands at once.
const EXECS_MAX: usize = 16;
/// Refusals at once: whoever asks for more than that hears nothing.
const REFUSALS_MAX: usize = 16;
/// What waits for the network to take it: all that may be sent ahead, in data and in what is said of the command's own queue.
const OUTBOX_MAX: usize = 2 * EXEC_CHUNKS_MAX + 16;
/// How long the coordinator may take to say that a command is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an attempt is waited for that is about to begin: less than the coordinator waits.
const EARLY_MAX: Duration = Duration::from_secs(5);
/// The same for another node of it, which has no other way.
const PEER_EARLY_MAX: Duration = Duration::from_secs(30);
const EARLY_STEP: Duration = Duration::from_millis(100);
/// How often it is offered.
const TRIES: u32 = 5;
/// While another leader is found.
const PAUSE: Duration = Duration::from_millis(300);

/// What a command is made of.
#[derive(Clone)]
pub struct Parts {
    pub facts: HostFacts,
    pub journal: Arc<Journal>,
    /// The arguments that lead to this program's own subcommands.
    pub own: &'static [&'static str],
}

/// Runs what the coordinator asks for.
pub struct Execs {
    pub connector: Connector,
    pub hello: AnswerHello,
    pub facts: HostFacts,
    /// The arguments that lead to this program's own subcommands.
    pub own: &'static [&'static str],
    pub journal: Arc<Journal>,
    pub questions: mpsc::Receiver<ExecRequest>,
}

impl Execs {
    /// What a command is made of here.
    pub fn parts(&self) -> Parts {
        Parts {
            facts: self.facts.clone(),
            journal: self.journal.clone(),
            own: self.own,
        }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let room = Arc::new(Semaphore::new(EXECS_MAX));
        let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
        while let Some(question) = self.questions.recv().await {
            let place = room.clone().try_acquire_owned();
            let full = place.is_err();
            let Ok(permit) = place.or_else(|_| refusals.clone().try_acquire_owned()) else {
                continue;
            };
            let hello = AnswerHello {
                id: question.token.clone(),
                ..self.hello.clone()
            };
            let parts = self.parts();
            let connector = self.connector.clone();
            tokio::spawn(async move {
                serve(&connector, hello, question, parts, full).await;
                drop(permit);
            });
        }
    }
}

/// What is said to who wants a command.
pub type Outbox = mpsc::Sender<ServeExecRequest>;
/// What it gets, until who wants it goes away.
pub type Inputs = Pin<Box<dyn Stream<Item = ExecInput> + Send>>;

/// Where what is said to another agent waits.
pub fn outbox() -> (Outbox, mpsc::Receiver<ServeExecRequest>) {
    mpsc::channel(OUTBOX_MAX)
}

/// A command that another node of an attempt wants beside it here.
pub struct ForPeer {
    pub assignment: Assignment,
    pub command: ExecCommand,
    /// What it has beyond the environment of the attempt here.
    pub more: BTreeMap<String, String>,
}

/// Runs such a command to its end; returns what that was, for the log.
pub async fn run_for_peer(
    what: ForPeer,
    parts: &Parts,
    outbox: Outbox,
    inputs: Inputs,
) -> &'static str {
    // The other node may have launched a moment before this one.
    let begun = Instant::now();
    let early = || tokio::task::block_in_place(|| command::is_early(&what.assignment, parts));
    while early() && begun.elapsed() < PEER_EARLY_MAX {
        tokio::time::sleep(EARLY_STEP).await;
    }
    let started = tokio::task::block_in_place(|| command::start_for_peer(what, parts));
    begin(started, outbox, inputs).await
}

async fn serve(
    connector: &Connector,
    hello: AnswerHello,
    question: ExecRequest,
    parts: Parts,
    full: bool,
) {
    // A connection of its own, for as long as the command runs.
    let channel = connector.connect_lazy();
    for _ in 0..TRIES {
        let client = AgentServiceClient::new(channel.clone());
        match offer(client, hello.clone()).await {
            Ok((outbox, incoming)) => {
                let begun = Instant::now();
                let end = run(&question, &parts, full, outbox, incoming).await;
                let seconds = begun.elapsed().as_secs();
                tracing::info!(seconds, end, "a command that was asked for is over");
                return;
            }
            // Whoever does not lead may not wait for it, and says who does: the channel goes there the next time.
            Err(status) if status.code() == Code::Unavailable => tokio::time::sleep(PAUSE).await,
            Err(status) => {
                tracing::debug!(error = causes(&status), "nobody waits for a command");
                return;
            }
        }
    }
}

/// Comes to whoever waits for a command.
async fn offer(
    mut client: AgentServiceClient<batchai_common::tls::Route>,
    hello: AnswerHello,
) -> Result<(Outbox, Streaming<ServeExecResponse>), Status> {
    let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
    say(&outbox, Message::Hello(hello));
    let accepted = async {
        let answer = client.serve_exec(ReceiverStream::new(messages)).await?;
        let mut incoming = answer.into_inner();
        match incoming.message().await? {
            Some(_) => Ok(incoming),
            None => Err(Status::cancelled("it ended")),
        }
    };
    let accepted = tokio::time::timeout(PATIENCE, accepted).await;
    let incoming = accepted.map_err(|_| Status::deadline_exceeded("no answer"))??;
    Ok((outbox, incoming))
}

/// Runs a command to its end; returns what that was, for the log.
async fn run(
    question: &ExecRequest,
    parts: &Parts,
    full: bool,
    outbox: Outbox,
    incoming: Streaming<ServeExecResponse>,
) -> &'static str {
    // The coordinator knows a moment before that an attempt begins.
    let attempt = question.attempt.clone().unwrap_or_default();
    let early = || tokio::task::block_in_place(|| command::is_early(&attempt, parts));
    let begun = Instant::now();
    while !full && early() && begun.elapsed() < EARLY_MAX {
        tokio::time::sleep(EARLY_STEP).await;
    }
    let started = match full {
        true => Err(ExecFault {
            kind: Kind::TooMany as i32,
            message: format!("{EXECS_MAX} commands run on this node already"),
        }),
        // It reads files of the attempt.
        false => tokio::task::block_in_place(|| command::start(question, parts)),
    };
    let inputs = incoming.map_while(|said| Some(said.ok()?.input.unwrap_or_default()));
    begin(started, outbox, Box::pin(inputs)).await
}

async fn begin(
    started: Result<command::Started, ExecFault>,
    outbox: Outbox,
    mut inputs: Inputs,
) -> &'static str {
    match started {
        Ok(started) => {
            say(&outbox, Message::Started(ExecStarted {}));
            Talk::new(started, outbox, inputs).run().await
        }
        Err(fault) => {
            say(&outbox, Message::Fault(fault));
            drop(outbox);
            // Until it is heard: who goes away early takes back what was said.
            let heard = async { while inputs.next().await.is_some() {} };
            let _ = tokio::time::timeout(PATIENCE, heard).await;
            "it was refused"
        }
    }
}

/// Says something, where there is room: whoever keeps to what is agreed always has some.
fn say(outbox: &Outbox, message: Message) -> bool {
    let message = Some(message);
    outbox.try_send(ServeExecRequest { message }).is_ok()
}

fn fault(kind: Kind, message: impl Into<String>) -> ExecFault {
    ExecFault {
        kind: kind as i32,
        message: message.into(),
    }
}
