//! Asks the host's engine for images: to pull one as who may, to say what it knows of it, to write it into a file.
//!
//! What it prints goes where this process prints. It removes nothing of what the engine has.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use batchai_common::images::is_sha256;
use batchai_common::time::boot_time;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::apart::Trouble;
use super::store::private_dir;
use crate::launch::{Reference, login_names};

/// An engine that has not done in this time what it was asked for never will.
const ENGINE_MAX: Duration = Duration::from_secs(50 * 60);
const LOOK: Duration = Duration::from_millis(50);
/// What an engine says of an image, at most.
const SAID_BYTES_MAX: u64 = 4096;

/// Why an engine did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    #[error("{program} cannot be started: {source}")]
    NotStarted { program: String, source: io::Error },
    #[error("{program} took longer than {} minutes", ENGINE_MAX.as_secs() / 60)]
    TooLong { program: String },
    #[error("{program} was ended by signal {signal}")]
    Signalled { program: String, signal: i32 },
    #[error("{program} failed with exit code {code}; container.log says why")]
    Failed { program: String, code: i32 },
    #[error("{program} cannot be waited for: {source}")]
    Lost { program: String, source: io::Error },
}

impl Unanswered {
    /// Only an engine that could answer has something to say about the image.
    pub fn trouble(&self) -> Trouble {
        match self {
            Unanswered::Failed { .. } => Trouble::Image(self.to_string()),
            _ => Trouble::Node(self.to_string()),
        }
    }
}

/// What an engine knows of an image.
#[derive(Debug, PartialEq, Eq)]
pub struct Inspected {
    /// The SHA-256 of its configuration.
    pub digest: String,
    /// What its files take.
    pub bytes: u64,
}

impl Inspected {
    /// By what the engine says of it.
    pub fn read(said: &str) -> Option<Inspected> {
        let (digest, bytes) = said.trim().split_once(' ')?;
        let digest = digest.trim_start_matches("sha256:").to_owned();
        let bytes = bytes.parse().ok()?;
        is_sha256(&digest).then_some(Inspected { digest, bytes })
    }
}

/// Runs an engine, which prints where this process does; returns what it says where that is asked for.
pub fn ask(line: &[String], says: bool) -> Result<String, Unanswered> {
    println!("{}", line.join(" "));
    let (program, arguments) = line.split_first().expect("a line has a program");
    let named = || program.clone();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    if says {
        command.stdout(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|source| Unanswered::NotStarted {
        program: named(),
        source,
    })?;
    let lost = |source| Unanswered::Lost {
        program: named(),
        source,
    };
    let until = boot_time() + ENGINE_MAX;
    let status = loop {
        match child.try_wait().map_err(lost)? {
            Some(status) => break status,
            None if boot_time() > until => {
                child.kill().and_then(|()| child.wait()).map_err(lost)?;
                return Err(Unanswered::TooLong { program: named() });
            }
            None => std::thread::sleep(LOOK),
        }
    };
    let mut said = Vec::new();
    if let Some(output) = child.stdout.take() {
        let mut output = output.take(SAID_BYTES_MAX);
        output.read_to_end(&mut said).map_err(lost)?;
    }
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(String::from_utf8_lossy(&said).into_owned()),
        (Some(code), _) => Err(Unanswered::Failed {
            program: named(),
            code,
        }),
        (None, signal) => Err(Unanswered::Signalled {
            program: named(),
            signal: signal.unwrap_or_default(),
        }),
    }
}

/// Who pulls, in a file that is in memory, in this process's namespace only.
pub struct Login {
    pub at: PathBuf,
}

impl Login {
    pub fn write(
        layer: &str,
        registry: &str,
        reference: &Reference,
        password: Option<&str>,
    ) -> io::Result<Option<Login>> {
        let Some(username) = &reference.username else {
            return Ok(None);
        };
        let at = Path::new(layer).join("login");
        private_dir(&at)?;
        let none = None::<&str>;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(none, &at, Some("tmpfs"), flags, Some("size=1m,mode=0700"))?;
        let login = Login { at };
        let words = format!("{username}:{}", password.unwrap_or_default());
        let auth = serde_json::json!({ "auth": BASE64_STANDARD.encode(words) });
        let names = login_names(registry).into_iter();
        let auths: serde_json::Map<_, _> = names.map(|n| (n.to_owned(), auth.clone())).collect();
        let text = serde_json::to_vec(&serde_json::json!({ "auths": auths }))?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options
            .open(login.at.join("config.json"))?
            .write_all(&text)?;
        Ok(Some(login))
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.at, MntFlags::MNT_DETACH) {
            println!("who pulled is forgotten with this process only: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_could_answer_blames_the_image() {
        let of = |words: &[&str]| {
            let line: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            ask(&line, true)
        };
        assert_eq!(of(&["echo", "a b"]).unwrap(), "a b\n");
        let blamed = |words: &[&str]| matches!(of(words).unwrap_err().trouble(), Trouble::Image(_));
        assert!(blamed(&["sh", "-c", "exit 125"]));
        assert!(!blamed(&["sh", "-c", "kill -9 $$"]));
        assert!(!blamed(&["/no/such/engine"]));
        let late = Unanswered::TooLong {
            program: "podman".to_owned(),
        };
        assert!(matches!(late.trouble(), Trouble::Node(_)));
        assert_eq!(late.to_string(), "podman took longer than 50 minutes");
    }

    #[test]
    fn what_is_said_of_an_image_is_read_or_nothing_is_known() {
        let digest = "a".repeat(64);
        let known = Inspected {
            digest: digest.clone(),
            bytes: 12,
        };
        let read = |said: &str| Inspected::read(said);
        assert_eq!(read(&format!("sha256:{digest} 12\n")), Some(known));
        for said in [
            "".to_owned(),
            digest.clone(),
            format!("{digest} -1"),
            format!("x{digest} 1"),
        ] {
            assert_eq!(read(&said), None, "{said}");
        }
    }
}
