//! Shows what lies in the output directories of this node's jobs, to whom the coordinator asks for.
//!
//! A directory may lie on a dead mount, and a path may be anything: so a process of its own opens it (`look`), beneath the
//! directory whatever links say, and this one passes on what that prints and gives up on it when it is silent for too
//! long. Nothing is remembered.

mod look;

use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use batchai_common::error::causes;
use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_common::tls::Connector;
use batchai_common::tls::Route;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::answer_file_request::Part;
use batchai_proto::agent::v1::file_request::Kind;
use batchai_proto::agent::v1::{
    AnswerFileRequest, AnswerHello, Assignment, FileDone, FileEntries, FileFault, FileRequest,
};
use batchai_proto::v1::JobFile;
use batchai_proto::v1::job_file::FileType;
use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::launch::{HostFacts, output_directory};

pub use look::main as look;

/// Answers at once.
const ANSWERS_MAX: usize = 8;
/// Parts of an answer that the coordinator has not taken yet.
const PARTS_MAX: usize = 4;
/// Entries in one message.
const ENTRIES_MAX: usize = 500;
/// How long the process that looks may be silent: less than the coordinator waits.
const SILENCE_MAX_MS: u16 = 20_000;

/// A connection is used for so long.
const CHANNEL_AGE_MAX: Duration = Duration::from_secs(3600);
/// Processes that look and are stuck in the kernel: with so many, no other is started.
const STUCK_MAX: usize = 8;
/// How often an answer is offered.
const TRIES: u32 = 3;
/// While another leader is found.
const PAUSE: Duration = Duration::from_millis(300);

/// Answers the coordinator's questions.
pub struct Answerer {
    pub connector: Connector,
    pub hello: AnswerHello,
    pub facts: HostFacts,
    /// The arguments that lead to this program's own subcommands.
    pub own: &'static [&'static str],
    pub questions: mpsc::Receiver<FileRequest>,
    /// How many of those that look hang, and were given up.
    pub stuck: Stuck,
}

/// A count of processes.
pub type Stuck = Arc<AtomicUsize>;

impl Answerer {
    /// Answers for ever.
    pub async fn run(mut self) {
        let room = Arc::new(Semaphore::new(ANSWERS_MAX));
        // Made when it is needed, again when it broke, and again now and then: what it shows is good for a time only.
        let mut channel = (self.connector.connect_lazy(), Instant::now());
        while let Some(question) = self.questions.recv().await {
            let Ok(permit) = room.clone().acquire_owned().await else {
                return;
            };
            let hello = AnswerHello {
                id: question.id.clone(),
                ..self.hello.clone()
            };
            if channel.1.elapsed() > CHANNEL_AGE_MAX {
                channel = (self.connector.connect_lazy(), Instant::now());
            }
            let (channel, facts) = (channel.0.clone(), self.facts.clone());
            let starter = Starter {
                own: self.own,
                stuck: self.stuck.clone(),
            };
            tokio::spawn(async move {
                answer(channel, hello, question, facts, starter).await;
                drop(permit);
            });
        }
    }
}

async fn answer(
    channel: Route,
    hello: AnswerHello,
    question: FileRequest,
    facts: HostFacts,
    starter: Starter,
) {
    for _ in 0..TRIES {
        let asked = (question.clone(), facts.clone(), starter.clone());
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
    (question, facts, starter): (FileRequest, HostFacts, Starter),
) -> Result<(), Status> {
    let (sender, parts) = mpsc::channel(PARTS_MAX);
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
        match tell(&question, &facts, &starter, &send) {
            // Nobody is there any more to hear why.
            Err(Stop::Unwanted) => {}
            Ok(()) => {
                let _ = send(Part::Done(FileDone {}));
            }
            Err(Stop::Fault(fault)) => {
                let _ = send(Part::Fault(fault));
            }
        }
    });
    let mut client = AgentServiceClient::new(channel);
    let end = client.answer_file(ReceiverStream::new(parts)).await?;
    end.into_inner().message().await.map(|_| ())
}

/// Why an answer ends early.
enum Stop {
    /// Nobody waits for it any more.
    Unwanted,
    Fault(FileFault),
}

fn fault(message: impl Into<String>) -> Stop {
    Stop::Fault(FileFault {
        absent: false,
        message: message.into(),
    })
}

fn tell(
    question: &FileRequest,
    facts: &HostFacts,
    starter: &Starter,
    send: &dyn Fn(Part) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let (prefix, base) = base(question.attempt.as_ref(), facts, &question.directory)?;
    let number = |value: i64| u64::try_from(value).unwrap_or_default();
    let user = question
        .attempt
        .as_ref()
        .map(|attempt| facts.users.of(attempt));
    let user = user.transpose().map_err(|error| fault(error.to_string()))?;
    let wanted = look::Wanted {
        prefix,
        base,
        path: question.path.clone(),
        list: question.kind() == Kind::List,
        after: question.after.clone(),
        limit: number(question.limit),
        offset: number(question.offset),
        user: user.flatten(),
    };
    let mut looking = starter.start(&wanted)?;
    let told = match wanted.list {
        true => looking.entries(send),
        false => looking.bytes(send),
    };
    told.and_then(|()| looking.finish())
}

fn base(
    attempt: Option<&Assignment>,
    facts: &HostFacts,
    id: &str,
) -> Result<(String, String), Stop> {
    let attempt = attempt.ok_or_else(|| fault("the question names no attempt"))?;
    output_directory(attempt, facts, id).map_err(|error| fault(error.to_string()))
}

/// Starts processes that look.
#[derive(Clone)]
struct Starter {
    own: &'static [&'static str],
    stuck: Stuck,
}

impl Starter {
    fn start(&self, wanted: &look::Wanted) -> Result<Looking, Stop> {
        let stuck = self.stuck.load(Ordering::Relaxed);
        if stuck >= STUCK_MAX {
            let why = format!("{stuck} earlier looks still hang on this node: is a mount dead?");
            return Err(fault(why));
        }
        let started = self.spawn(wanted);
        started.map_err(|error| fault(error.to_string()))
    }

    fn spawn(&self, wanted: &look::Wanted) -> io::Result<Looking> {
        let question = serde_json::to_vec(wanted).map_err(io::Error::other)?;
        // The very file that this agent runs, even if it was replaced meanwhile.
        let child = Command::new("/proc/self/exe")
            .arg0("batchai-look")
            .args(self.own)
            .arg("look")
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut looking = Looking {
            child,
            stuck: self.stuck.clone(),
        };
        if let Some(mut stdin) = looking.child.stdin.take() {
            stdin.write_all(&question)?;
        }
        Ok(looking)
    }
}

/// The next bytes that a process prints; none at the end.
fn next(pipe: Option<&mut (impl io::Read + AsFd)>, buffer: &mut [u8]) -> Result<usize, Stop> {
    let pipe = pipe.ok_or_else(|| fault("its output is not piped"))?;
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(SILENCE_MAX_MS)) {
        Ok(0) => return Err(fault("the directory does not answer: is its mount dead?")),
        Ok(_) => {}
        Err(error) => return Err(fault(error.to_string())),
    }
    pipe.read(buffer).map_err(|error| fault(error.to_string()))
}

/// A process that looks.
struct Looking {
    child: Child,
    stuck: Stuck,
}

impl Looking {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Stop> {
        next(self.child.stdout.as_mut(), buffer)
    }

    fn bytes(&mut self, send: &dyn Fn(Part) -> Result<(), Stop>) -> Result<(), Stop> {
        let mut buffer = vec![0; FILE_CHUNK_BYTES_MAX];
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(()),
                read => send(Part::Data(Bytes::copy_from_slice(&buffer[..read])))?,
            }
        }
    }

    fn entries(&mut self, send: &dyn Fn(Part) -> Result<(), Stop>) -> Result<(), Stop> {
        let (mut text, mut buffer) = (Vec::new(), vec![0; FILE_CHUNK_BYTES_MAX]);
        loop {
            match self.read(&mut buffer)? {
                0 => break,
                read => text.extend_from_slice(&buffer[..read]),
            }
        }
        if text.is_empty() {
            return Ok(());
        }
        let found: Vec<look::Entry> =
            serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
        for part in found.chunks(ENTRIES_MAX) {
            let entries = part.iter().map(entry).collect();
            send(Part::Entries(FileEntries { entries }))?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Stop> {
        let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
        loop {
            match next(self.child.stderr.as_mut(), &mut buffer)? {
                0 => break,
                read => said.extend_from_slice(&buffer[..read]),
            }
        }
        let status = self
            .child
            .wait()
            .map_err(|error| fault(error.to_string()))?;
        match status.code() {
            Some(0) => Ok(()),
            code => Err(Stop::Fault(FileFault {
                absent: code == Some(look::ABSENT),
                message: String::from_utf8_lossy(&said).trim().to_owned(),
            })),
        }
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // One that is stuck in the kernel is left to the kernel; who waits for it is a thread of its own.
            let _ = self.child.kill();
            let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
            let stuck = self.stuck.clone();
            stuck.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || {
                let _ = nix::sys::wait::waitpid(pid, None);
                stuck.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }
}

fn entry(found: &look::Entry) -> JobFile {
    let file_type = match found.directory {
        true => FileType::Directory,
        false => FileType::File,
    };
    JobFile {
        name: found.name.clone(),
        file_type: file_type as i32,
        content_length: found.length as i64,
        last_modified: Some(batchai_common::time::from_millis(found.modified_ms)),
        node: String::new(),
    }
}
