//! Shows what lies in the output directories of this node's jobs and in its file servers, to whom the coordinator asks for, and writes
//! files of its file servers.
//!
//! A directory may lie on a dead mount, and a path may be anything: so a process of its own opens it (`look`, and `put` to write), beneath
//! the directory whatever links say, and this one passes on what that prints (`process`) and gives up on it when it is silent for too
//! long. Nothing is remembered. Whole files of file servers go over connections of their own: a slow end holds up nobody else.

mod look;
mod process;
mod put;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use batchai_common::error::causes;
use batchai_common::tls::Connector;
use batchai_common::tls::Route;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::answer_file_request::Part;
use batchai_proto::agent::v1::file_request::Kind;
use batchai_proto::agent::v1::{
    AnswerFileRequest, AnswerFileResponse, AnswerHello, Assignment, FileDone, FileFault,
    FileRequest, FileServerTarget,
};
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::file_servers::shares;
use crate::launch::{HostFacts, JobUser, data_name, output_directory};
use process::Starter;

pub use look::main as look;
pub use put::main as put;

/// Answers at once.
const ANSWERS_MAX: usize = 8;
/// Answers that wait for their turn.
const WAITING_MAX: usize = 64;
/// Parts of an answer that the coordinator has not taken yet.
const PARTS_MAX: usize = 4;
/// Whole files of file servers at once, and pieces to write that wait for their process.
const TRANSFERS_MAX: usize = 32;
const PIECES_MAX: usize = 4;
/// How long what was said last may take to be heard.
const HEARD_MAX: Duration = Duration::from_secs(10);

/// A connection is used for so long.
const CHANNEL_AGE_MAX: Duration = Duration::from_secs(3600);
/// How often an answer is offered.
const TRIES: u32 = 3;
/// While another leader is found.
const PAUSE: Duration = Duration::from_millis(300);

/// Answers the coordinator's questions.
pub struct Answerer {
    pub connector: Connector,
    pub hello: AnswerHello,
    pub facts: HostFacts,
    /// Where file servers lie; empty where this node offers no storage.
    pub storage: String,
    /// The arguments that lead to this program's own subcommands.
    pub own: &'static [&'static str],
    pub questions: mpsc::Receiver<FileRequest>,
    /// How many of those that look hang, and were given up.
    pub stuck: Stuck,
}

/// A count of processes.
pub type Stuck = Arc<AtomicUsize>;

/// What an answer is made of.
#[derive(Clone)]
struct Parts {
    facts: HostFacts,
    storage: String,
    starter: Starter,
    /// There is no room for it.
    full: bool,
}

impl Answerer {
    /// Answers for ever.
    pub async fn run(mut self) {
        let room = Arc::new(Semaphore::new(ANSWERS_MAX));
        let waiting = Arc::new(Semaphore::new(WAITING_MAX));
        let transfers = Arc::new(Semaphore::new(TRANSFERS_MAX));
        // Made when it is needed, again when it broke, and again now and then: what it shows is good for a time only.
        let mut channel = (self.connector.connect_lazy(), Instant::now());
        while let Some(question) = self.questions.recv().await {
            let hello = AnswerHello {
                id: question.id.clone(),
                ..self.hello.clone()
            };
            let mut parts = Parts {
                facts: self.facts.clone(),
                storage: self.storage.clone(),
                starter: Starter {
                    own: self.own,
                    stuck: self.stuck.clone(),
                },
                full: false,
            };
            if question.file_server.is_some() && question.kind() != Kind::List {
                let permit = transfers.clone().try_acquire_owned().ok();
                parts.full = permit.is_none();
                let channel = self.connector.connect_lazy();
                tokio::spawn(async move {
                    answer(channel, hello, question, parts).await;
                    drop(permit);
                });
                continue;
            }
            if channel.1.elapsed() > CHANNEL_AGE_MAX {
                channel = (self.connector.connect_lazy(), Instant::now());
            }
            let (channel, room) = (channel.0.clone(), room.clone());
            let place = waiting.clone().try_acquire_owned().ok();
            parts.full = place.is_none();
            tokio::spawn(async move {
                // Not in the loop: whoever copies does not wait for those who look.
                let turn = match place {
                    Some(_) => room.acquire_owned().await.ok(),
                    None => None,
                };
                drop(place);
                answer(channel, hello, question, parts).await;
                drop(turn);
            });
        }
    }
}

async fn answer(channel: Route, hello: AnswerHello, question: FileRequest, parts: Parts) {
    for _ in 0..TRIES {
        let asked = (question.clone(), parts.clone());
        let Err(status) = offer(channel.clone(), hello.clone(), asked).await else {
            return;
        };
        tracing::debug!(
            error = causes(&status),
            "an answer about files was not taken"
        );
        // Whoever does not lead takes none, and says who does: the channel goes there the next time.
        if status.code() != Code::Unavailable {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn offer(
    channel: Route,
    hello: AnswerHello,
    (question, parts): (FileRequest, Parts),
) -> Result<(), Status> {
    let (sender, messages) = mpsc::channel(PARTS_MAX);
    let (pieces, data) = mpsc::channel(PIECES_MAX);
    let hello = AnswerFileRequest {
        part: Some(Part::Hello(hello)),
    };
    // The channel has room: nothing was sent yet.
    let _ = sender.try_send(hello);
    tokio::task::spawn_blocking(move || {
        let send = |part: Part| {
            let part = AnswerFileRequest { part: Some(part) };
            sender.blocking_send(part).map_err(|_| Stop::Unwanted)
        };
        match tell(&question, &parts, data, &send) {
            // Nobody is there any more to hear why.
            Err(Stop::Unwanted) => {}
            Ok(done) => {
                let _ = send(Part::Done(done));
            }
            Err(Stop::Fault(fault)) => {
                let _ = send(Part::Fault(fault));
            }
        }
    });
    let mut client = AgentServiceClient::new(channel);
    let end = client.answer_file(ReceiverStream::new(messages)).await?;
    take(end.into_inner(), pieces).await
}

/// Takes what is to be written, to the end of the stream.
async fn take(
    mut incoming: Streaming<AnswerFileResponse>,
    pieces: mpsc::Sender<Bytes>,
) -> Result<(), Status> {
    while let Some(piece) = incoming.message().await? {
        if pieces.send(piece.data).await.is_err() {
            // It is over, and said why: whoever goes away early takes back what was said.
            let heard = async { while let Ok(Some(_)) = incoming.message().await {} };
            let _ = tokio::time::timeout(HEARD_MAX, heard).await;
            return Ok(());
        }
    }
    Ok(())
}

/// Why an answer ends early.
enum Stop {
    /// Nobody waits for it any more.
    Unwanted,
    Fault(FileFault),
}

fn fault(message: impl Into<String>) -> Stop {
    Stop::Fault(FileFault {
        message: message.into(),
        ..FileFault::default()
    })
}

/// What may go well when it is asked for again.
fn passing(message: &str) -> Stop {
    Stop::Fault(FileFault {
        message: message.to_owned(),
        passing: true,
        ..FileFault::default()
    })
}

type Send<'a> = &'a dyn Fn(Part) -> Result<(), Stop>;

fn tell(
    question: &FileRequest,
    parts: &Parts,
    data: mpsc::Receiver<Bytes>,
    send: Send<'_>,
) -> Result<FileDone, Stop> {
    if parts.full {
        let message = "it has as many questions about files to answer as it takes";
        return Err(Stop::Fault(FileFault {
            busy: question.file_server.is_some(),
            passing: question.file_server.is_none(),
            message: message.to_owned(),
            ..FileFault::default()
        }));
    }
    let number = |value: i64| u64::try_from(value).unwrap_or_default();
    let mut wanted = look::Wanted {
        path: question.path.clone(),
        list: question.kind() == Kind::List,
        after: question.after.clone(),
        limit: number(question.limit),
        offset: number(question.offset),
        ..look::Wanted::default()
    };
    let Some(server) = &question.file_server else {
        let user = user_of(question.attempt.as_ref(), &parts.facts)?;
        let (prefix, base) = base(question.attempt.as_ref(), &parts.facts, &question.directory)?;
        let wanted = look::Wanted {
            prefix,
            base,
            user,
            ..wanted
        };
        let mut looking = parts.starter.look(&wanted)?;
        let told = match wanted.list {
            true => looking.entries(send),
            false => looking.bytes(send),
        };
        return told
            .and_then(|()| looking.finish())
            .map(|()| FileDone::default());
    };
    let absent = || fault("this node offers no storage now: file-server show says why");
    wanted.base = data_name(&server.name, &server.uid).ok_or_else(absent)?;
    if parts.storage.is_empty() {
        return Err(absent());
    }
    let shares = shares(Path::new(&parts.storage));
    wanted.prefix = shares.to_string_lossy().into_owned();
    wanted.user = user_of(Some(&of(server)), &parts.facts)?;
    wanted.served = true;
    of_server(question, wanted, parts, data, send)
}

/// The same of a file server.
fn of_server(
    question: &FileRequest,
    wanted: look::Wanted,
    parts: &Parts,
    data: mpsc::Receiver<Bytes>,
    send: Send<'_>,
) -> Result<FileDone, Stop> {
    match question.kind() {
        Kind::Write => {
            let wanted = put::Wanted {
                prefix: wanted.prefix,
                base: wanted.base,
                path: wanted.path,
                user: wanted.user,
                size: u64::try_from(question.size_bytes).unwrap_or_default(),
                sha256: question.sha256.clone(),
                executable: question.executable,
            };
            let mut putting = parts.starter.put(&wanted)?;
            let put = putting.write(wanted.size, data, send);
            put.and_then(|()| putting.finish())?;
            Ok(FileDone::default())
        }
        Kind::List => {
            let mut looking = parts.starter.look(&wanted)?;
            looking.entries(send)?;
            looking.finish()?;
            Ok(FileDone::default())
        }
        _ if wanted.limit > 0 => {
            let mut looking = parts.starter.look(&wanted)?;
            looking.bytes(send)?;
            looking.finish()?;
            Ok(FileDone::default())
        }
        // From its beginning: the digest is of all of it.
        _ => {
            let from = wanted.offset;
            let whole = look::Wanted {
                offset: 0,
                ..wanted
            };
            let mut looking = parts.starter.look(&whole)?;
            let done = looking.whole(from, send)?;
            looking.finish()?;
            Ok(done)
        }
    }
}

/// Whom jobs of its workspace run as.
fn of(server: &FileServerTarget) -> Assignment {
    Assignment {
        workspace_number: server.workspace_number,
        ..Assignment::default()
    }
}

fn user_of(attempt: Option<&Assignment>, facts: &HostFacts) -> Result<Option<JobUser>, Stop> {
    let user = attempt.map(|attempt| facts.users.of(attempt)).transpose();
    Ok(user.map_err(|error| fault(error.to_string()))?.flatten())
}

fn base(
    attempt: Option<&Assignment>,
    facts: &HostFacts,
    id: &str,
) -> Result<(String, String), Stop> {
    let attempt = attempt.ok_or_else(|| fault("the question names no attempt"))?;
    output_directory(attempt, facts, id).map_err(|error| fault(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_copies_does_not_wait_for_those_who_look() {
        // It takes connections, and never says a word.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let (questions, asked) = mpsc::channel(100);
        let answerer = Answerer {
            connector: Connector::new(&url, None).unwrap(),
            hello: AnswerHello::default(),
            facts: HostFacts::default(),
            storage: String::new(),
            own: &[],
            questions: asked,
            stuck: Stuck::default(),
        };
        let answers = tokio::spawn(answerer.run());
        let question = |kind: Kind| FileRequest {
            kind: kind as i32,
            file_server: Some(FileServerTarget::default()),
            ..FileRequest::default()
        };
        for _ in 0..=ANSWERS_MAX {
            questions.send(question(Kind::List)).await.unwrap();
        }
        // All of these go over one connection.
        let first = silent.accept().await.unwrap();
        questions.send(question(Kind::Read)).await.unwrap();
        let second = tokio::time::timeout(Duration::from_secs(10), silent.accept()).await;
        assert!(second.is_ok(), "the copy waits");
        drop(first);
        answers.abort();
    }
}
