//! A command in a terminal of its own, as a person sits before one.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;

use crate::process::{PATIENCE, until};

/// A terminal, and the command in it. Dropping it kills that.
pub struct Terminal {
    keys: File,
    /// Its other end: kept open, so that what it is can be asked for at any time.
    inner: File,
    pub child: Child,
    shown: Receiver<Vec<u8>>,
    /// What was shown and not looked for yet.
    text: String,
}

impl Terminal {
    /// Starts a command in a terminal of so many rows and columns. By `setsid`, for only in a session of its own a terminal is one's own.
    pub fn start(command: &Command, rows: u16, columns: u16) -> Terminal {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let outer = posix_openpt(flags).expect("a terminal");
        grantpt(&outer).expect("it is ours");
        unlockpt(&outer).expect("it is ours");
        let path = ptsname_r(&outer).expect("it has a name");
        let inner = File::from(open(path.as_str(), flags, Mode::empty()).expect("it is ours"));
        set_size(&inner, rows, columns);
        let keys = File::from(OwnedFd::from(outer));
        let stream = || Stdio::from(inner.try_clone().expect("it is open"));
        let mut session = Command::new("setsid");
        session.arg("--ctty");
        session.arg(command.get_program()).args(command.get_args());
        let variables = command.get_envs();
        session.envs(variables.filter_map(|(name, value)| Some((name, value?))));
        session
            .env("TERM", "xterm-256color")
            .stdin(stream())
            .stdout(stream())
            .stderr(stream());
        let child = session.spawn().expect("setsid is a part of every system");
        let (show, shown) = channel();
        let mut screen = keys.try_clone().expect("it is open");
        // It ends when nobody has the terminal any more.
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = screen.read(&mut buffer) {
                if show.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal {
            keys,
            inner,
            child,
            shown,
            text: String::new(),
        }
    }

    /// Types something.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("it takes keys");
    }

    /// Types a line, and waits for what it leads to.
    pub fn line(&mut self, line: &str, shows: &str) -> String {
        self.press(&format!("{line}\n"));
        self.expect(shows)
    }

    /// Waits until something is shown; returns what was shown before it.
    pub fn expect(&mut self, wanted: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(wanted) {
                let rest = self.text.split_off(at + wanted.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let more = self.shown.recv_timeout(Duration::from_millis(100));
            let more = more.unwrap_or_default();
            self.text.push_str(&String::from_utf8_lossy(&more));
            assert!(Instant::now() < end, "no {wanted:?} in {:?}", self.text);
        }
    }

    /// Gives it another size, as a person who pulls at its corner.
    pub fn resize(&self, rows: u16, columns: u16) {
        set_size(&self.inner, rows, columns);
    }

    /// How it treats keys.
    pub fn settings(&self) -> Termios {
        tcgetattr(&self.inner).expect("it is a terminal")
    }

    /// Sends a signal to the command itself.
    pub fn signal(&self, signal: Signal) {
        // What leads no group becomes the command itself.
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("it is not reaped yet");
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        until("a command in a terminal to end", || {
            self.child.try_wait().expect("it is our child")
        })
    }
}

fn set_size(inner: &File, rows: u16, columns: u16) {
    let done = Command::new("stty")
        .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
        .stdin(inner.try_clone().expect("it is open"))
        .status();
    assert!(done.expect("stty is a part of every system").success());
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
