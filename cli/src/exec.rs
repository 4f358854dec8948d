//! Runs commands on nodes, as if they ran here: what is typed goes there, what they print comes here, and their exit code is that of this
//! command. Through the coordinator and the node's agent; nobody needs to reach the node itself.

use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use batchai_common::limits::{EXEC_CHUNK_BYTES_MAX, EXEC_CHUNKS_MAX};
use batchai_common::names::last_id;
use batchai_proto::v1;
use batchai_proto::v1::exec_input::Input;
use batchai_proto::v1::exec_output::Output;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Response, Status, Streaming};

use crate::args::NodeExec;
use crate::client::Client;
use crate::error::CliError;
use crate::resources::Done;
use crate::terminal::{self, Event, Events, Raw};

/// A node or a leader that is not reached is looked for so long.
const PATIENCE: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_millis(200);
/// What waits for the network to take it.
const OUTBOX_MAX: usize = 2 * EXEC_CHUNKS_MAX + 16;
/// What a shell says of a command that a signal has ended.
const OF_SIGNALS: i32 = 128;
/// Nobody reads what is printed.
const BROKEN_PIPE: i32 = 141;

type Inputs = mpsc::Sender<v1::ExecInput>;
type Outputs = Streaming<v1::ExecOutput>;

/// Runs something beside the processes of a job.
pub async fn beside_job(client: &Client, name: String, args: NodeExec) -> Done {
    let how = How::of(&args)?;
    let start = v1::ExecJobStart {
        name,
        node: node(&args),
        command: Some(how.command(&args)),
    };
    use v1::exec_job_request::Message;
    let request = |message| v1::ExecJobRequest {
        message: Some(message),
    };
    let open = async || {
        let (inputs, rest) = opened(move |input| request(Message::Input(input)));
        let first = tokio_stream::once(request(Message::Start(start.clone())));
        let answer = client.execs().exec_job(first.chain(rest)).await;
        answer.map(|answer| (inputs, answer))
    };
    run(&how, open).await
}

/// Runs something on a node of a cluster.
pub async fn on_node(client: &Client, name: String, args: NodeExec) -> Done {
    let how = How::of(&args)?;
    let start = v1::ExecNodeStart {
        name,
        node: node(&args),
        command: Some(how.command(&args)),
    };
    use v1::exec_node_request::Message;
    let request = |message| v1::ExecNodeRequest {
        message: Some(message),
    };
    let open = async || {
        let (inputs, rest) = opened(move |input| request(Message::Input(input)));
        let first = tokio_stream::once(request(Message::Start(start.clone())));
        let answer = client.execs().exec_node(first.chain(rest)).await;
        answer.map(|answer| (inputs, answer))
    };
    run(&how, open).await
}

fn node(args: &NodeExec) -> String {
    let node = args.node.as_deref().map(last_id);
    node.map(|id| format!("nodes/{id}")).unwrap_or_default()
}

/// What a command is given after its start.
fn opened<R: Send + 'static>(
    request: impl Fn(v1::ExecInput) -> R + Send + 'static,
) -> (Inputs, impl Stream<Item = R> + Send + 'static) {
    let (inputs, rest) = mpsc::channel(OUTBOX_MAX);
    (inputs, ReceiverStream::new(rest).map(request))
}

/// How what runs there and what is here are joined.
struct How {
    terminal: bool,
    input: bool,
}

impl How {
    fn of(args: &NodeExec) -> Result<How, CliError> {
        let console = io::stdin().is_terminal();
        if args.tty && !console {
            let why =
                "--tty: this is no terminal; leave it out, and give --stdin to pass a file on";
            return Err(CliError::Usage(why.to_owned()));
        }
        // What people do there, and what the original ran in a shell.
        let shell = args.program.is_empty();
        let terminal = args.tty || (shell && console && io::stdout().is_terminal());
        Ok(How {
            terminal,
            input: terminal || shell || args.stdin,
        })
    }

    fn command(&self, args: &NodeExec) -> v1::ExecCommand {
        let arguments = match &args.command {
            Some(line) => vec!["/bin/bash".to_owned(), "-lc".to_owned(), line.clone()],
            None => args.program.clone(),
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || "-+._".contains(c);
        let known = std::env::var("TERM").unwrap_or_default();
        let known = Some(known).filter(|known| self.terminal && known.chars().all(legal));
        v1::ExecCommand {
            arguments,
            terminal: self.terminal.then(terminal::size),
            terminal_type: known.unwrap_or_default(),
            input: self.input,
        }
    }
}

async fn run(
    how: &How,
    open: impl AsyncFn() -> Result<(Inputs, Response<Outputs>), Status>,
) -> Done {
    let begun = Instant::now();
    let (inputs, answer) = loop {
        match open().await {
            // Nothing was run: another replica may lead, or the node be on its way back.
            Err(status) if status.code() == Code::Unavailable && begun.elapsed() < PATIENCE => {
                tokio::time::sleep(PAUSE).await;
            }
            opened => break opened?,
        }
    };
    let events = how.terminal.then(Events::new).transpose()?;
    // Last: what is said until then is said to a terminal as people have it.
    let raw = how.terminal.then(Raw::new).transpose()?;
    let mut talk = Talk {
        inputs,
        outputs: answer.into_inner(),
        typed: how.input.then(read),
        printer: Some(print()),
        sent: 0,
        given: 0,
        taken: 0,
        raw,
    };
    let mut events = events;
    let end = match talk.run(&mut events).await {
        Ok(End::Code(code)) => Ok(code),
        Ok(End::Told(signal)) => return Ok(exit(OF_SIGNALS + signal)),
        Err(error) => Err(error),
    };
    // What came is printed before it is said why no more does; the terminal is as it was by then.
    let finish = talk.finish();
    tokio::pin!(finish);
    let printed = loop {
        tokio::select! {
            printed = &mut finish => break printed,
            event = event(&mut events) => if let Event::End(signal) = event {
                return Ok(exit(OF_SIGNALS + signal));
            }
        }
    };
    let code = end?;
    Ok(exit(if printed { code } else { BROKEN_PIPE }))
}

fn exit(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Why no more is passed on.
enum End {
    /// The command has ended, with this exit code.
    Code(i32),
    /// This one is told to, by this signal.
    Told(i32),
}

/// What goes on while a command runs.
struct Talk {
    inputs: Inputs,
    outputs: Outputs,
    /// What is read here; none where nothing is, or not any more.
    typed: Option<mpsc::Receiver<Bytes>>,
    printer: Option<Printer>,
    /// Pieces that were sent, and those that the command was given.
    sent: i64,
    given: i64,
    /// Pieces that were printed.
    taken: i64,
    raw: Option<Raw>,
}

impl Talk {
    /// Runs to the command's end, or to that of this one.
    async fn run(&mut self, events: &mut Option<Events>) -> Result<End, CliError> {
        loop {
            let room = self.sent - self.given < EXEC_CHUNKS_MAX as i64;
            let Some(printer) = &mut self.printer else {
                return Ok(End::Code(BROKEN_PIPE));
            };
            tokio::select! {
                output = self.outputs.message() => {
                    let output = output?.and_then(|output| output.output);
                    let output = output.ok_or_else(|| {
                        CliError::Failed("the command was broken off, and its exit code is not known".to_owned())
                    })?;
                    if let Some(code) = self.take(output).await {
                        return Ok(End::Code(code));
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
                    self.tell(input).await;
                }
                printed = printer.printed.recv() => match printed {
                    Some(()) => {
                        self.taken += 1;
                        self.tell(Input::Taken(self.taken)).await;
                    }
                    None => return Ok(End::Code(BROKEN_PIPE)),
                },
                event = event(events) => match event {
                    Event::Resized => self.tell(Input::Resize(terminal::size())).await,
                    Event::Back => {
                        self.raw.as_ref().map(Raw::again).transpose()?;
                        self.tell(Input::Resize(terminal::size())).await;
                    }
                    Event::End(signal) => return Ok(End::Told(signal)),
                },
            }
        }
    }

    async fn take(&mut self, output: Output) -> Option<i32> {
        let (error, data) = match output {
            Output::Stdout(data) => (false, data),
            Output::Stderr(data) => (true, data),
            Output::Taken(given) => {
                self.given = self.given.max(given.min(self.sent));
                return None;
            }
            Output::ExitCode(code) => return Some(code),
        };
        if let Some(printer) = &self.printer {
            // Who keeps to what is agreed finds room.
            let _ = printer.pieces.send((error, data)).await;
        }
        None
    }

    async fn tell(&self, input: Input) {
        // That nobody is there any more is told by what they print no more.
        let input = Some(input);
        let _ = self.inputs.send(v1::ExecInput { input }).await;
    }

    /// Waits until everything is printed; says whether it could be. The terminal is as it was then.
    async fn finish(self) -> bool {
        let Some(Printer {
            pieces,
            mut printed,
            failed,
        }) = self.printer
        else {
            return false;
        };
        drop(pieces);
        while printed.recv().await.is_some() {}
        drop(self.raw);
        failed.await.is_err()
    }
}

async fn next(typed: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

async fn event(events: &mut Option<Events>) -> Event {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

/// Reads on a thread of its own, which nobody waits for.
fn read() -> mpsc::Receiver<Bytes> {
    let (typed, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; EXEC_CHUNK_BYTES_MAX];
        loop {
            let read = match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
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

/// A thread that prints: one that waits for who reads holds up nothing else.
struct Printer {
    /// Whether it is for standard error, and what.
    pieces: mpsc::Sender<(bool, Bytes)>,
    /// One for each piece.
    printed: mpsc::Receiver<()>,
    /// Says so where it could not print; otherwise it is dropped.
    failed: tokio::sync::oneshot::Receiver<()>,
}

fn print() -> Printer {
    let (pieces, mut to_print) = mpsc::channel::<(bool, Bytes)>(OUTBOX_MAX);
    let (tell, printed) = mpsc::channel(OUTBOX_MAX);
    let (fail, failed) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        while let Some((error, data)) = to_print.blocking_recv() {
            let done = match error {
                false => write(&mut io::stdout().lock(), &data),
                true => write(&mut io::stderr().lock(), &data),
            };
            if done.is_err() {
                let _ = fail.send(());
                return;
            }
            // Nobody counts any more at the end.
            let _ = tell.blocking_send(());
        }
    });
    Printer {
        pieces,
        printed,
        failed,
    }
}

fn write(to: &mut impl io::Write, data: &[u8]) -> io::Result<()> {
    to.write_all(data)?;
    to.flush()
}
