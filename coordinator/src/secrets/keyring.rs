//! Key-encryption keys: where they come from, and which of them is meant.
//!
//! A keyring is text: one key a line, 32 bytes in base64, the first wraps from now on and the others open what they wrapped.
//! It lies in a file, in a variable of the environment, or is what a command prints; never in the log that it protects.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use batchai_common::names::hex;
use batchai_common::tls::CredentialsError;
use batchai_common::tls::credentials::write_private;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::seal::Key;

/// The largest keyring.
const TEXT_BYTES_MAX: u64 = 64 << 10;
/// Letters of an id.
const ID_CHARS: usize = 16;

/// Why there is no keyring.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    #[error("{path}: {source}", path = .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Write(#[from] CredentialsError),
    #[error("{path}: others can read the keys in it: chmod 600 {path}", path = .path.display())]
    Open { path: PathBuf },
    #[error("the variable {name} is not set")]
    Unset { name: String },
    #[error("{command}: {why}")]
    Command { command: String, why: String },
    #[error("{ring}: line {line} is no key: 32 bytes in base64, one key a line")]
    Line { ring: Source, line: usize },
    #[error("{ring}: there is no key in it")]
    Empty { ring: Source },
    #[error("{ring} is not a file: its keys are changed where they are kept")]
    NoFile { ring: Source },
}

/// Where a keyring comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    Variable(String),
    /// Run by sh; what it prints.
    Command(String),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Source, String> {
        let given = |rest: &str| (!rest.is_empty()).then(|| rest.to_owned());
        let source = match text.split_once(':') {
            Some(("file", path)) => given(path).map(|path| Source::File(path.into())),
            Some(("env", name)) => given(name).map(Source::Variable),
            Some(("command", command)) => given(command).map(Source::Command),
            _ => None,
        };
        source.ok_or_else(|| "give file:PATH, env:NAME or command:COMMAND".to_owned())
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::File(path) => write!(f, "file:{}", path.display()),
            Source::Variable(name) => write!(f, "env:{name}"),
            Source::Command(command) => write!(f, "command:{command}"),
        }
    }
}

impl Source {
    /// Reads the keyring.
    pub fn read(&self) -> Result<Keyring, KeyringError> {
        Keyring::parse(self, &self.text()?)
    }

    fn text(&self) -> Result<Zeroizing<String>, KeyringError> {
        match self {
            Source::File(path) => read_private(path),
            Source::Variable(name) => {
                let unset = || KeyringError::Unset { name: name.clone() };
                Ok(Zeroizing::new(std::env::var(name).map_err(|_| unset())?))
            }
            Source::Command(command) => {
                let failed = |why: String| KeyringError::Command {
                    command: command.clone(),
                    why,
                };
                let output = Command::new("sh")
                    .args(["-c", command])
                    .stdin(Stdio::null())
                    .stderr(Stdio::inherit())
                    .output()
                    .map_err(|error| failed(error.to_string()))?;
                let text = String::from_utf8(output.stdout).map(Zeroizing::new);
                match (output.status.success(), text) {
                    (true, Ok(text)) => Ok(text),
                    (true, Err(_)) => Err(failed("it prints no text".to_owned())),
                    (false, _) => Err(failed(output.status.to_string())),
                }
            }
        }
    }

    /// Makes the file with one key in it, where it is a file that does not exist. For a new ensemble: in an old one it would hide
    /// that the keys are lost.
    pub fn make(&self) -> Result<(), KeyringError> {
        match self {
            Source::File(path) if !path.exists() => Ok(write_private(path, &line(&Key::draw()))?),
            _ => Ok(()),
        }
    }

    /// Copies the file of keys; what comes from elsewhere comes from there on every machine.
    pub fn copy_to(&self, copy: &Path) -> Result<(), KeyringError> {
        match self {
            Source::File(path) => Ok(write_private(copy, &read_private(path)?)?),
            Source::Variable(_) | Source::Command(_) => Ok(()),
        }
    }

    /// Puts a new key before the others in the file.
    pub fn rotate(&self) -> Result<(), KeyringError> {
        let Source::File(path) = self else {
            return Err(KeyringError::NoFile { ring: self.clone() });
        };
        // One at a time: what another has written just now is not lost.
        let lock = lock(path)?;
        if !path.exists() {
            return self.make();
        }
        // What is there must be whole: a file that is not a keyring is not made one.
        let known = self.text()?;
        Keyring::parse(self, &known)?;
        let text = Zeroizing::new(format!("{}{}", *line(&Key::draw()), *known));
        let owner = fs::metadata(path).map_err(at(path))?;
        write_private(path, &text)?;
        // Whoever rotates may be root; the coordinator reads it as its own user.
        std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())).map_err(at(path))?;
        drop(lock);
        Ok(())
    }
}

fn lock(path: &Path) -> Result<Flock<fs::File>, KeyringError> {
    let beside = path.with_extension("lock");
    let file = fs::File::create(&beside).map_err(at(&beside))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| at(&beside)(error.into()))
}

fn at(path: &Path) -> impl Fn(io::Error) -> KeyringError {
    let path = path.to_owned();
    move |source| KeyringError::File {
        path: path.clone(),
        source,
    }
}

fn read_private(path: &Path) -> Result<Zeroizing<String>, KeyringError> {
    let file = fs::File::open(path).map_err(at(path))?;
    let mode = file.metadata().map_err(at(path))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(KeyringError::Open {
            path: path.to_owned(),
        });
    }
    let mut text = Zeroizing::new(String::new());
    file.take(TEXT_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(at(path))?;
    Ok(text)
}

fn line(key: &Key) -> Zeroizing<String> {
    Zeroizing::new(format!("{}\n", BASE64_STANDARD.encode(key.bytes())))
}

/// Key-encryption keys; the first wraps.
pub struct Keyring {
    keys: Vec<(String, Key)>,
}

impl Keyring {
    fn parse(source: &Source, text: &str) -> Result<Keyring, KeyringError> {
        let mut keys = Vec::new();
        for (i, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() {
                continue;
            }
            let bytes = BASE64_STANDARD.decode(line).map(Zeroizing::new).ok();
            let key = bytes.and_then(|bytes| Key::of(&bytes));
            let key = key.ok_or_else(|| KeyringError::Line {
                ring: source.clone(),
                line: i + 1,
            })?;
            keys.push((id(&key), key));
        }
        match keys.is_empty() {
            true => Err(KeyringError::Empty {
                ring: source.clone(),
            }),
            false => Ok(Keyring { keys }),
        }
    }

    /// The one that wraps, and its id.
    pub fn current(&self) -> (&str, &Key) {
        let (id, key) = &self.keys[0];
        (id, key)
    }

    /// The one of an id.
    pub fn find(&self, id: &str) -> Option<&Key> {
        let found = self.keys.iter().find(|(known, _)| known == id);
        found.map(|(_, key)| key)
    }
}

/// What says of a key which one it is, and nothing else.
fn id(key: &Key) -> String {
    let digest = Sha256::digest([b"batchai key-encryption key", key.bytes()].concat());
    hex(&digest)[..ID_CHARS].to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn a_keyring_comes_from_a_file_a_variable_or_a_command_and_grows_at_its_front() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let file = Source::from_str(&format!("file:{}", path.display())).unwrap();
        assert!(matches!(file.read(), Err(KeyringError::File { .. })));
        file.make().unwrap();
        let first = file.read().unwrap().current().0.to_owned();
        file.make().unwrap();
        assert_eq!(file.read().unwrap().current().0, first, "made once");
        file.rotate().unwrap();
        let both = file.read().unwrap();
        assert_ne!(both.current().0, first);
        assert!(both.find(&first).is_some());
        let command = Source::Command(format!("cat {}", path.display()));
        assert_eq!(command.read().unwrap().current().0, both.current().0);
        assert!(matches!(command.rotate(), Err(KeyringError::NoFile { .. })));
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(file.read(), Err(KeyringError::Open { .. })));
        assert!(matches!(
            Source::Variable("BATCHAI_NO_SUCH_VARIABLE".into()).read(),
            Err(KeyringError::Unset { .. })
        ));
        assert!(matches!(
            Source::Command("exit 3".into()).read(),
            Err(KeyringError::Command { .. })
        ));
    }

    #[test]
    fn what_is_no_keyring_is_refused_without_showing_it() {
        for (text, line) in [("c2hvcnQ=", 1), ("\n\nno base64!", 3)] {
            let error = Keyring::parse(&Source::Variable("K".into()), text).err();
            let said = error.unwrap().to_string();
            assert!(said.contains(&format!("line {line}")), "{said}");
            assert!(!said.contains(text.trim()), "{said}");
        }
        let empty = Keyring::parse(&Source::Variable("K".into()), " \n");
        assert!(matches!(empty, Err(KeyringError::Empty { .. })));
        for text in ["", "file:", "/etc/keys", "vault:x"] {
            assert!(Source::from_str(text).is_err(), "{text}");
        }
    }
}
