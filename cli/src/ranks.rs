//! Prints what the ranks of a job print, as they print it: whole lines, which do not mix, each with its rank in front.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use batchai_proto::v1::{StreamJobLogsRequest, StreamJobLogsResponse};

use crate::client::Client;
use crate::error::CliError;
use crate::logs;

/// Where lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    Stdout,
    Stderr,
}

/// So much of a line is kept until its end comes.
const LINE_BYTES_MAX: usize = 64 << 10;

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
    let present = async |file: String, out: &mut Lines| {
        match logs::follow(client, stream(file), out).await {
            // A job that failed before its processes began has no such files: its state says why.
            Err(error) if error.exit_code() == 3 => Ok(()),
            end => end.map(drop),
        }
    };
    // Where one fails, the other is not waited for.
    tokio::try_join!(
        present(format!("stdout-{rank}.txt"), &mut stdout),
        present(format!("stderr-{rank}.txt"), &mut stderr),
    )?;
    Ok(())
}

/// What all ranks print: each line with its rank in front, standard error to standard error.
#[derive(Default)]
pub struct AllRanks {
    files: BTreeMap<(String, String), Lines>,
    turn: Turn,
}

impl logs::Sink for AllRanks {
    fn take(&mut self, piece: &StreamJobLogsResponse) -> io::Result<()> {
        let file = (piece.node.clone(), piece.file.clone());
        let Some(rank) = piece.rank else {
            return Ok(());
        };
        if piece.end != 0 {
            // What it ends with without a line's end is written out now.
            self.files.remove(&file);
            return Ok(());
        }
        let to = match piece.file.starts_with("stderr") {
            true => To::Stderr,
            false => To::Stdout,
        };
        let lines = self.files.entry(file);
        let lines =
            lines.or_insert_with(|| Lines::new((format!("[{rank}] "), to), self.turn.clone()));
        lines.write_all(&piece.data)?;
        lines.flush()
    }
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
        let mut rest = &self.pending[..length];
        while !rest.is_empty() {
            let end = (0..rest.len()).find(|at| ends_line(rest, *at));
            let (line, behind) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
            text.extend_from_slice(self.prefix.as_bytes());
            text.extend_from_slice(line);
            rest = behind;
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

/// A progress bar goes back to its line's beginning: what it wrote so far is a line, too.
fn ends_line(text: &[u8], at: usize) -> bool {
    match text[at] {
        b'\n' => true,
        b'\r' => text.get(at + 1).is_some_and(|next| *next != b'\n'),
        _ => false,
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
            false if self.pending.len() > LINE_BYTES_MAX => Some(self.pending.len()),
            false => (0..self.pending.len())
                .rfind(|at| ends_line(&self.pending, *at))
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
