//! Prints what the ranks of a job print, as they print it: whole lines, which do not mix, each with its rank in front.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use batchai_proto::v1::StreamJobLogsRequest;

use crate::client::Client;
use crate::error::CliError;
use crate::logs;

/// Where lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    Stdout,
    Stderr,
}

/// One line at a time.
pub type Turn = Arc<Mutex<()>>;

/// Follows both streams of one rank to their ends. `prefixes` stand before its lines on standard output and standard
/// error; both go to standard output where the second says so.
pub async fn follow(
    client: &Client,
    job: &str,
    rank: usize,
    (out, err): ((String, To), (String, To)),
    turn: &Turn,
) -> Result<(), CliError> {
    let stream = |file: String| StreamJobLogsRequest {
        name: job.to_owned(),
        file,
        follow: true,
        ..Default::default()
    };
    let mut stdout = Lines::new(out, turn.clone());
    let mut stderr = Lines::new(err, turn.clone());
    let (stdout, stderr) = tokio::join!(
        logs::follow(client, stream(format!("stdout-{rank}.txt")), &mut stdout),
        logs::follow(client, stream(format!("stderr-{rank}.txt")), &mut stderr),
    );
    // A job that failed before its processes began has no such files: its state says why.
    for end in [stdout, stderr] {
        match end {
            Err(error) if error.exit_code() != 3 => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Whole lines with a prefix; those of several writers do not mix.
struct Lines {
    prefix: String,
    to: To,
    pending: Vec<u8>,
    turn: Turn,
}

impl Lines {
    fn new((prefix, to): (String, To), turn: Turn) -> Lines {
        Lines {
            prefix,
            to,
            pending: Vec::new(),
            turn,
        }
    }

    fn print(&mut self, length: usize) -> io::Result<()> {
        let _one_at_a_time = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = Vec::new();
        for line in self.pending[..length].split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(self.prefix.as_bytes());
            text.extend_from_slice(line);
        }
        self.pending.drain(..length);
        match self.to {
            To::Stdout => io::stdout()
                .write_all(&text)
                .and_then(|()| io::stdout().flush()),
            To::Stderr => io::stderr().write_all(&text),
        }
    }
}

impl Write for Lines {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Without a prefix there is nothing to keep apart: a progress bar shows at once.
        let end = match self.prefix.is_empty() {
            true => Some(self.pending.len()),
            false => self
                .pending
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map(|end| end + 1),
        };
        match end {
            Some(end) if end > 0 => self.print(end),
            _ => Ok(()),
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if !self.pending.is_empty() {
            self.pending.push(b'\n');
            // Where nobody reads any more there is nobody to tell.
            let _ = self.print(self.pending.len());
        }
    }
}
