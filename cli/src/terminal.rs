//! The terminal of this command, while something elsewhere has it: every key goes there. However this ends, the terminal is then as it was,
//! unless it is killed outright.

use std::io;

use batchai_proto::v1::TerminalSize;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The size of a terminal that does not know its own.
const SIZE: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};
/// A process that was stopped goes on.
const SIGCONT: i32 = 18;

/// The terminal that passes every key on. Dropping it makes it what it was.
pub struct Raw {
    was: Termios,
}

impl Raw {
    pub fn new() -> io::Result<Raw> {
        let raw = Raw {
            was: tcgetattr(io::stdin())?,
        };
        raw.again()?;
        Ok(raw)
    }

    /// The same, after somebody else had the terminal.
    pub fn again(&self) -> io::Result<()> {
        let mut settings = self.was.clone();
        cfmakeraw(&mut settings);
        Ok(tcsetattr(io::stdin(), SetArg::TCSANOW, &settings)?)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.was);
    }
}

/// How large the terminal is.
pub fn size() -> TerminalSize {
    let size = terminal_size::terminal_size_of(io::stdin());
    let size = size.filter(|(columns, rows)| columns.0 > 0 && rows.0 > 0);
    size.map_or(SIZE, |(columns, rows)| TerminalSize {
        rows: i32::from(rows.0),
        columns: i32::from(columns.0),
    })
}

/// What happens to the terminal, and to who has it.
pub enum Event {
    Resized,
    /// This process was stopped, and goes on.
    Back,
    /// It is told to end, by this signal.
    End(i32),
}

/// The signals that say so; where there is no terminal they do what they do to every process.
pub struct Events {
    resized: Signal,
    back: Signal,
    ends: [(i32, Signal); 4],
}

impl Events {
    pub fn new() -> io::Result<Events> {
        let end = |kind: SignalKind| Ok::<_, io::Error>((kind.as_raw_value(), signal(kind)?));
        Ok(Events {
            resized: signal(SignalKind::window_change())?,
            back: signal(SignalKind::from_raw(SIGCONT))?,
            ends: [
                end(SignalKind::hangup())?,
                end(SignalKind::interrupt())?,
                end(SignalKind::quit())?,
                end(SignalKind::terminate())?,
            ],
        })
    }

    pub async fn next(&mut self) -> Event {
        let [hangup, interrupt, quit, terminate] = &mut self.ends;
        tokio::select! {
            _ = self.resized.recv() => Event::Resized,
            _ = self.back.recv() => Event::Back,
            _ = hangup.1.recv() => Event::End(hangup.0),
            _ = interrupt.1.recv() => Event::End(interrupt.0),
            _ = quit.1.recv() => Event::End(quit.0),
            _ = terminate.1.recv() => Event::End(terminate.0),
        }
    }
}
