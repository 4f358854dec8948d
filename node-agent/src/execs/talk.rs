//! What goes on between a command and who wants it, the coordinator or another node's agent, while it runs.
//!
//! Who wants it is always listened to, and never sent more ahead than it has said that it took: what is printed and not read stays
//! where it is, and the command waits.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use batchai_common::limits::EXEC_CHUNKS_MAX;
use batchai_proto::agent::v1::exec_fault::Kind;
use batchai_proto::agent::v1::serve_exec_request::Message;
use batchai_proto::v1::exec_input::Input;
use batchai_proto::v1::exec_output::Output;
use batchai_proto::v1::{ExecInput, ExecOutput};
use bytes::Bytes;
use tokio::sync::oneshot;
use tokio_stream::StreamExt as _;

use super::command::{Holder, Started};
use super::streams;
use super::streams::Streams;
use super::{Inputs, Outbox, PATIENCE, fault, say};

/// What a command has printed is there when it has ended. Somebody who has left its tree may hold its pipes open for ever.
const QUIET: Duration = Duration::from_secs(1);

/// How long what is hung up may take to end: longer than the process that holds it tries.
const HANG_UP_MAX: Duration = Duration::from_secs(15);

/// A command that runs.
pub struct Talk {
    streams: Streams,
    exited: oneshot::Receiver<i32>,
    /// Hung up when this is dropped.
    holder: Holder,
    outbox: Outbox,
    incoming: Inputs,
    /// What it has not read yet.
    input: VecDeque<Bytes>,
    /// How many pieces came, and how many of them the command was given.
    received: i64,
    given: i64,
    ended: bool,
    sent: i64,
    taken: i64,
    code: Option<i32>,
}

/// What happens next.
enum Event {
    Said(Option<ExecInput>),
    Wrote(io::Result<()>),
    Printed(bool, io::Result<Bytes>),
    Exited(i32),
    Quiet,
}

impl Talk {
    pub fn new(started: Started, outbox: Outbox, incoming: Inputs) -> Talk {
        Talk {
            streams: started.streams,
            exited: started.exited,
            holder: started.holder,
            outbox,
            incoming,
            input: VecDeque::new(),
            received: 0,
            given: 0,
            ended: false,
            sent: 0,
            taken: 0,
            code: None,
        }
    }

    /// Runs to the end of the command, or of who wants it; says which, for the log.
    pub async fn run(mut self) -> &'static str {
        loop {
            let open = self.streams.output.is_some() || self.streams.error.is_some();
            if let (Some(code), false) = (self.code, open) {
                return self.leave(code).await;
            }
            let end = match self.next().await {
                Event::Said(Some(said)) => self.take(said),
                Event::Said(None) => Some("who wanted it is gone"),
                Event::Wrote(wrote) => self.wrote(wrote),
                Event::Printed(error, printed) => self.printed(error, printed),
                Event::Exited(code) => {
                    self.code = Some(code);
                    None
                }
                Event::Quiet => {
                    (self.streams.output, self.streams.error) = (None, None);
                    None
                }
            };
            if let Some(end) = end {
                self.hang_up(end).await;
                return end;
            }
        }
    }

    /// Ends it, and says why, should anybody be there. What it still says is thrown away: it would be in the way of what it does at its
    /// end, were it not read.
    async fn hang_up(self, why: &str) {
        say(&self.outbox, Message::Fault(fault(Kind::Unspecified, why)));
        let Talk {
            streams,
            mut exited,
            holder,
            code,
            outbox,
            // Who goes away early takes back what was said.
            incoming: _incoming,
            ..
        } = self;
        drop((holder, outbox));
        let (mut output, mut error) = (streams.output, streams.error);
        let ended = async {
            while code.is_none() {
                tokio::select! {
                    _ = &mut exited => return,
                    said = read(output.as_ref()) => if is_last(&said) { output = None },
                    said = read(error.as_ref()) => if is_last(&said) { error = None },
                }
            }
        };
        let _ = tokio::time::timeout(HANG_UP_MAX, ended).await;
    }

    async fn next(&mut self) -> Event {
        let room = self.sent - self.taken < EXEC_CHUNKS_MAX as i64;
        let Streams {
            input,
            output,
            error,
            ..
        } = &self.streams;
        let front = self.input.front_mut();
        let writing = input.as_ref().zip(front);
        let printing = |end: &Option<streams::Output>| end.is_some() && room;
        let (output_open, error_open) = (printing(output), printing(error));
        let exited = self.code.is_some();
        tokio::select! {
            said = self.incoming.next() => Event::Said(said),
            wrote = write(writing) => Event::Wrote(wrote),
            printed = read(output.as_ref()), if output_open => Event::Printed(false, printed),
            printed = read(error.as_ref()), if error_open => Event::Printed(true, printed),
            code = &mut self.exited, if !exited => Event::Exited(code.unwrap_or(-1)),
            () = tokio::time::sleep(QUIET), if exited && room => Event::Quiet,
        }
    }

    /// What the command gets.
    fn take(&mut self, said: ExecInput) -> Option<&'static str> {
        match said.input {
            Some(Input::Data(_)) if self.ended => {
                return Some("there was more than all of the input");
            }
            Some(Input::Data(data)) => {
                if self.input.len() >= EXEC_CHUNKS_MAX {
                    return Some("more input came than was agreed");
                }
                self.received += 1;
                self.input.push_back(data);
                self.skip();
            }
            Some(Input::End(_)) if !self.ended => {
                self.ended = true;
                match self.streams.last_input() {
                    Some(last) => self.input.push_back(last),
                    None => self.close(),
                }
            }
            Some(Input::Resize(size)) => self.streams.resize(&size),
            // Nobody can have taken what was not sent.
            Some(Input::Taken(taken)) => self.taken = self.taken.max(taken.min(self.sent)),
            Some(Input::End(_)) | None => {}
        }
        None
    }

    /// What nobody reads is as good as read, and so is nothing.
    fn skip(&mut self) {
        let closed = self.streams.input.is_none();
        while self
            .input
            .front()
            .is_some_and(|front| closed || front.is_empty())
        {
            self.input.pop_front();
            // What is typed at the end came from nobody.
            if self.given < self.received {
                self.given += 1;
                self.tell(Output::Taken(self.given));
            }
        }
        self.close();
    }

    /// A pipe ends when all that came was written.
    fn close(&mut self) {
        if self.ended && self.input.is_empty() && self.streams.last_input().is_none() {
            self.streams.input = None;
        }
    }

    fn wrote(&mut self, wrote: io::Result<()>) -> Option<&'static str> {
        if wrote.is_err() {
            // It does not read any more; that is no reason for it to end.
            self.streams.input = None;
        }
        self.skip();
        None
    }

    fn printed(&mut self, error: bool, printed: io::Result<Bytes>) -> Option<&'static str> {
        let end = match error {
            false => &mut self.streams.output,
            true => &mut self.streams.error,
        };
        match printed {
            Ok(data) if !data.is_empty() => {
                self.sent += 1;
                let output = match error {
                    false => Output::Stdout(data),
                    true => Output::Stderr(data),
                };
                (!self.tell(output)).then_some("nobody takes what it prints")
            }
            _ => {
                *end = None;
                None
            }
        }
    }

    fn tell(&mut self, output: Output) -> bool {
        let output = Some(output);
        say(&self.outbox, Message::Output(ExecOutput { output }))
    }

    /// The last word, and the time that it takes to be heard.
    async fn leave(mut self, code: i32) -> &'static str {
        match code {
            0..=255 => self.tell(Output::ExitCode(code)),
            _ => {
                let unknown = fault(Kind::Unspecified, "how it ended is not known");
                say(&self.outbox, Message::Fault(unknown))
            }
        };
        let Talk {
            outbox,
            mut incoming,
            ..
        } = self;
        drop(outbox);
        let heard = async { while incoming.next().await.is_some() {} };
        let _ = tokio::time::timeout(PATIENCE, heard).await;
        "it has ended"
    }
}

fn is_last(said: &io::Result<Bytes>) -> bool {
    said.as_ref().map_or(true, Bytes::is_empty)
}

async fn read(end: Option<&streams::Output>) -> io::Result<Bytes> {
    match end {
        Some(end) => end.read().await,
        None => std::future::pending().await,
    }
}

async fn write(what: Option<(&streams::Input, &mut Bytes)>) -> io::Result<()> {
    match what {
        Some((end, data)) => end.write(data).await,
        None => std::future::pending().await,
    }
}
