//! What jobs find as `ssh`: starts a command on another node of the job, through this node's agent, with what is read and printed here.
//!
//! It takes what mpirun and scripts say to OpenSSH, and ends as that does: with the command's exit code, or 255 and a reason. It forwards no
//! ports and has no terminal. What it started ends with it; nothing stays behind in the background.

use std::io::Read as _;
use std::process::ExitCode;

use batchai_common::limits::{EXEC_CHUNK_BYTES_MAX, EXEC_CHUNKS_MAX};
use batchai_proto::agent::v1::peer_service_client::PeerServiceClient;
use batchai_proto::agent::v1::serve_exec_request::Message as Answer;
use batchai_proto::agent::v1::start_remote_request::Message;
use batchai_proto::agent::v1::{RemoteHello, ServeExecRequest, StartRemoteRequest};
use batchai_proto::v1::ExecInput;
use batchai_proto::v1::exec_input::Input;
use batchai_proto::v1::exec_output::Output;
use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::{TOKEN, socket};
use crate::launch::ATTEMPT_TAG;

/// What OpenSSH ends with where it cannot do what it is told.
const FAILED: u8 = 255;
/// Its options that have a value, and those that have none.
const VALUED: &str = "BbcEeFIiJlmOopQSw";
const PLAIN: &str = "46AaCGgKkMNnqsTtVvXxYy";
/// Of them, those that ask for what is not done here.
const REFUSED: &str = "DfLRW";

/// What is to run, and where.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    host: String,
    command_line: String,
    input: bool,
}

/// This program as jobs start it; nothing where it does not know its own file.
pub fn words(own: &[&str]) -> Vec<String> {
    let program = std::env::current_exe().ok();
    let program = program.and_then(|path| path.into_os_string().into_string().ok());
    let Some(program) = program else {
        return Vec::new();
    };
    let own = own.iter().map(|word| (*word).to_owned());
    let words = std::iter::once(program).chain(own);
    words.chain(["remote-shell".to_owned()]).collect()
}

/// The process. It is given what ssh is.
pub fn main(arguments: &[String]) -> ExitCode {
    let asked = asked(arguments);
    let ended = asked.and_then(|asked| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        runtime.block_on(run(asked))
    });
    // At once: a thread may still wait for what there is to read.
    match ended {
        Ok(code) => std::process::exit(code),
        Err(why) => {
            eprintln!("ssh: {why}");
            ExitCode::from(FAILED)
        }
    }
}

fn asked(arguments: &[String]) -> Result<Asked, String> {
    let mut words = arguments.iter();
    let (mut host, mut input) = (None, true);
    while let Some(word) = words.next() {
        let Some(options) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            host = Some(word.as_str());
            break;
        };
        if options == "-" {
            host = words.next().map(String::as_str);
            break;
        }
        for (at, option) in options.char_indices() {
            if VALUED.contains(option) {
                // Its value is the rest of the word, or the next one.
                if at + option.len_utf8() == options.len() {
                    words.next();
                }
                break;
            }
            input &= option != 'n';
            if REFUSED.contains(option) || !PLAIN.contains(option) {
                return Err(format!("-{option} is not known between the nodes of a job"));
            }
        }
    }
    let host = host.ok_or("name a node of the job")?;
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let command: Vec<_> = words.map(String::as_str).collect();
    Ok(Asked {
        host: host.trim_matches(['[', ']']).to_owned(),
        command_line: command.join(" "),
        input,
    })
}

async fn run(asked: Asked) -> Result<i32, String> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let (tag, token) = (variable(ATTEMPT_TAG), variable(TOKEN));
    let (uid, attempt) = tag.split_once('/').unwrap_or_default();
    if token.is_empty() {
        return Err("this is no process of a job".to_owned());
    }
    let hello = RemoteHello {
        attempt: attempt.to_owned(),
        token,
        host: asked.host,
        command_line: asked.command_line,
        input: asked.input,
        ..RemoteHello::default()
    };
    let (outbox, requests) = mpsc::channel(2 * EXEC_CHUNKS_MAX + 16);
    tell(&outbox, Message::Hello(hello)).await;
    let mut client = PeerServiceClient::new(connect(uid.to_owned()).await?);
    let answers = client.start_remote(ReceiverStream::new(requests)).await;
    let answers = answers.map_err(|status| status.message().to_owned())?;
    let typed = asked.input.then(read);
    let talk = Talk {
        outbox,
        typed,
        sent: 0,
        given: 0,
        printed: 0,
    };
    talk.run(answers.into_inner()).await
}

async fn connect(uid: String) -> Result<Channel, String> {
    let dial = move |_| {
        let dialled = socket(&uid).and_then(|address| {
            let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        });
        std::future::ready(dialled.map(hyper_util::rt::TokioIo::new))
    };
    // Nobody looks at the name: the way is that one.
    let endpoint = Endpoint::from_static("http://agent.invalid");
    let connected = endpoint
        .connect_with_connector(tower::service_fn(dial))
        .await;
    connected.map_err(|_| "this node's agent is not there".to_owned())
}

async fn tell(outbox: &mpsc::Sender<StartRemoteRequest>, message: Message) {
    let message = Some(message);
    // That nobody is there any more is told by what is said no more.
    let _ = outbox.send(StartRemoteRequest { message }).await;
}

/// What goes on while a command runs.
struct Talk {
    outbox: mpsc::Sender<StartRemoteRequest>,
    /// What is read here; none where nothing is, or not any more.
    typed: Option<mpsc::Receiver<Bytes>>,
    /// Pieces that were sent, and those that the command was given.
    sent: i64,
    given: i64,
    printed: i64,
}

impl Talk {
    async fn run(mut self, mut answers: Streaming<ServeExecRequest>) -> Result<i32, String> {
        loop {
            let room = self.sent - self.given < EXEC_CHUNKS_MAX as i64;
            tokio::select! {
                answer = answers.message() => {
                    let answer = answer.map_err(|status| status.message().to_owned())?;
                    let lost = || "the command was broken off".to_owned();
                    let answer = answer.and_then(|answer| answer.message).ok_or_else(lost)?;
                    if let Some(code) = self.take(answer).await? {
                        return Ok(code);
                    }
                }
                typed = next(&mut self.typed), if room => {
                    let input = match typed {
                        Some(data) => {
                            self.sent += 1;
                            Input::Data(data)
                        }
                        None => {
                            self.typed = None;
                            Input::End(true)
                        }
                    };
                    self.say(input).await;
                }
            }
        }
    }

    async fn take(&mut self, answer: Answer) -> Result<Option<i32>, String> {
        let output = match answer {
            Answer::Fault(fault) => return Err(fault.message),
            Answer::Output(output) => output.output,
            Answer::Hello(_) | Answer::Started(_) => None,
        };
        let printed = match output {
            Some(Output::Stdout(data)) => print(&mut std::io::stdout(), &data),
            Some(Output::Stderr(data)) => print(&mut std::io::stderr(), &data),
            Some(Output::Taken(given)) => {
                self.given = self.given.max(given.min(self.sent));
                return Ok(None);
            }
            Some(Output::ExitCode(code)) => return Ok(Some(code)),
            None => return Ok(None),
        };
        printed.map_err(|error| format!("nobody reads what is printed: {error}"))?;
        self.printed += 1;
        self.say(Input::Taken(self.printed)).await;
        Ok(None)
    }

    async fn say(&self, input: Input) {
        let input = ExecInput { input: Some(input) };
        tell(&self.outbox, Message::Input(input)).await;
    }
}

fn print(to: &mut impl std::io::Write, data: &[u8]) -> std::io::Result<()> {
    to.write_all(data)?;
    to.flush()
}

async fn next(typed: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads on a thread of its own, which nobody waits for.
fn read() -> mpsc::Receiver<Bytes> {
    let (typed, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; EXEC_CHUNK_BYTES_MAX];
        loop {
            let read = match std::io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                // What cannot be read any more is at its end.
                read => read.unwrap_or(0),
            };
            let data = Bytes::copy_from_slice(&buffer[..read]);
            if read == 0 || typed.blocking_send(data).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_what_ssh_is() {
        let of = |line: &str| {
            let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
            asked(&words).map(|asked| (asked.host, asked.command_line, asked.input))
        };
        let to = |host: &str, command: &str| Ok((host.to_owned(), command.to_owned(), true));
        for (line, expected) in [
            (
                "-x 10.0.0.5 orted -mca ess env",
                to("10.0.0.5", "orted -mca ess env"),
            ),
            ("10.0.0.5 echo done", to("10.0.0.5", "echo done")),
            (
                "-o StrictHostKeyChecking=no -p23 -q me@n2 a -n",
                to("n2", "a -n"),
            ),
            ("-oBatchMode=yes n2", to("n2", "")),
            ("-- n2 -x", to("n2", "-x")),
        ] {
            assert_eq!(of(line), expected, "{line}");
        }
        assert_eq!(of("-nx n2 a"), Ok(("n2".to_owned(), "a".to_owned(), false)));
        for line in ["-L 1:n2:1 n2", "-fN n2", "-x", "--no n2"] {
            assert!(of(line).is_err(), "{line}");
        }
    }
}
