//! An NFS server as a process of its own: `nfs-server --dir DIR`, which exports one directory to some clients, by one of several back ends
//! (`backend`): by NFS-Ganesha (`ganesha`), or by itself, for which nothing need be installed (`Embedded`).
//!
//! Whoever starts it writes `DIR/config.json` (by renaming it into place) and reads `DIR/status.json`, which is there once it listens, or says in
//! words why it does not. One process at a time holds `DIR/lock`. Which clients may come, and whom root is taken for, is read again when the
//! file changes; what else is in it holds as long as the process.
//!
//! `Embedded` serves NFS version 3 and its MOUNT protocol on one TCP port, without a portmapper and without locks (`nolock`):
//!
//! - `server` takes connections from the clients alone, as many as `clients` says, and `connection` calls from them, in bounds. `rpc` and
//!   `xdr` read these, `calls` sends them to `look`, `listing`, `change` and `write`. `said` keeps the log short.
//! - `identity` has each call run with its caller's rights, so that the kernel decides. Clients are believed who their users are, so only
//!   their root may call: from a port below 1024, unless `any_port` is set.
//! - `handle` and `export` keep clients in the export. Handles are the kernel's own, with a seal: they last over renames and restarts.
//! - What is answered to a change of names or attributes is on the disk. Writes are when the client was told (`unstable`); those that were
//!   not told to be, a client writes again after the server, or its host, was cut down.
//! - `replay` answers a call that comes twice as it did the first time.
//!
//! Root of a client is nobody here, devices are not made (pipes and sockets are), and it runs as root. An export may belong to one user
//! whole: then every caller is that one.

mod backend;
mod calls;
mod change;
mod clients;
mod connection;
mod export;
pub mod ganesha;
mod handle;
mod identity;
mod listing;
mod look;
mod protocol;
mod replay;
mod rpc;
mod said;
mod server;
mod sys;
mod unstable;
mod write;
mod xdr;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use batchai_common::{limits, shutdown, telemetry};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::getppid;
use serde::{Deserialize, Serialize};

use crate::journal::{AttemptDir, JournalError};

pub use backend::{Backend, choose, named};
#[cfg(any(test, fuzzing))]
pub use calls::any as any_call;

/// What the server is told.
pub const CONFIG: &str = "config.json";
/// What it says of itself.
pub const STATUS: &str = "status.json";
/// What it prints, begun anew at a start when it is large.
pub const LOG: &str = "nfs.log";
const LOG_BYTES_MAX: u64 = 1 << 20;
/// How many clients an export may have.
pub const CLIENTS_MAX: usize = 4096;
/// How many calls are done at once: of one client no more than `clients::CALLS_OF_ONE`.
const CALLS_AT_ONCE: usize = 128;
/// For those that are being done when it is to end.
const LAST_CALLS: Duration = Duration::from_secs(5);
/// What one is called that was made before there were others.
pub const EMBEDDED: &str = "embedded";

/// What the server is told: `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The exported directory.
    pub root: PathBuf,
    /// Where it listens. With port 0 the kernel draws one, and clients are lost at the next start.
    pub listen: SocketAddr,
    /// Handles hold for one generation: another number makes all of them stale.
    pub generation: u64,
    /// The addresses that may come.
    pub clients: Vec<IpAddr>,
    /// Whom root of a client is taken for.
    pub squash_uid: u32,
    pub squash_gid: u32,
    /// Whether everybody else is taken for that one as well, who may then be root: all of it belongs to one user.
    #[serde(default)]
    pub squash_all: bool,
    /// How long clients that are connected when it is to end are waited for.
    #[serde(default)]
    pub linger_s: u64,
    /// Whether calls may come from any port: then every user of a client may claim to be any other. It is for clients behind a
    /// translation of addresses.
    #[serde(default)]
    pub any_port: bool,
    /// What shares it. A server that knows no other one reads this file too.
    #[serde(default = "own", skip_serializing_if = "is_embedded")]
    pub backend: String,
}

fn own() -> String {
    EMBEDDED.to_owned()
}

fn is_embedded(name: &str) -> bool {
    name == EMBEDDED
}

/// What the server says of itself: `status.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    /// Where it listens.
    pub address: Option<SocketAddr>,
    /// Why it does not.
    pub error: Option<String>,
}

/// Why the server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("another server runs with {}", .0.display())]
    Running(PathBuf),
    #[error("{} is not as it must be: {why}", path.display())]
    Config { path: PathBuf, why: String },
    #[error("only root can serve files for others: run the agent as root")]
    NotRoot,
    #[error(
        "the agent lacks {}: without it no files can be served as those whose they are; let its unit or container have it",
        .0.join(" and ")
    )]
    Rights(Vec<&'static str>),
    #[error(
        "the agent may not set its groups ({0}), as in a user namespace that denies it: run it outside of one"
    )]
    Groups(io::Error),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Export(#[from] export::ExportError),
    #[error("cannot listen on {address}: {error}")]
    Listen {
        address: SocketAddr,
        error: io::Error,
    },
    #[error("root, listen, generation and backend hold as long as the server runs: start it anew")]
    Changed,
    #[error("it is shared by {0}, which this agent does not know: start an agent that does")]
    Unknown(String),
    #[error("it is shared by {backend}, which is not there any more: {why}")]
    Missing { backend: &'static str, why: String },
    #[error("NFS-Ganesha takes no such name: {}", .0.display())]
    Name(PathBuf),
    #[error("NFS-Ganesha has ended: {0}")]
    Ended(String),
    #[error("the system: {0}")]
    System(#[from] io::Error),
}

impl Config {
    /// Reads what the server is told.
    pub fn read(dir: &Path) -> Result<Config, ServerError> {
        let path = dir.join(CONFIG);
        let bytes = fs::read(&path).map_err(|error| ServerError::File {
            path: path.clone(),
            error,
        })?;
        let bad = |why: String| ServerError::Config {
            path: path.clone(),
            why,
        };
        let config: Config = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let faults = config.faults();
        match faults.is_empty() {
            true => Ok(config),
            false => Err(bad(faults.join("; "))),
        }
    }

    /// Whether another one is for the same server.
    fn is_of(&self, other: &Config) -> bool {
        let fixed = |c: &Config| (c.root.clone(), c.listen, c.generation, c.backend.clone());
        fixed(self) == fixed(other)
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.root.is_absolute() {
            faults.push("root must be an absolute path".to_owned());
        }
        if self.clients.len() > CLIENTS_MAX {
            faults.push(format!("clients has more than {CLIENTS_MAX}"));
        }
        for (name, id) in [
            ("squash_uid", self.squash_uid),
            ("squash_gid", self.squash_gid),
        ] {
            if id == u32::MAX || (id == 0 && !self.squash_all) {
                faults.push(format!("{name} must be nobody's number, not {id}"));
            }
        }
        faults
    }
}

/// Starts a server. `own` are the arguments that lead to this program's own subcommands. One that is `held` goes with this process.
pub fn start(own: &[&str], dir: &AttemptDir, held: bool) -> io::Result<Child> {
    let path = dir.path.join(LOG);
    let long = fs::metadata(&path).is_ok_and(|log| log.len() > LOG_BYTES_MAX);
    if long {
        fs::remove_file(&path)?;
    }
    let log = File::options().create(true).append(true).open(&path)?;
    // This program, even if it was replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("batchai-nfs-server")
        .args(own)
        .args(["nfs-server", "--dir"])
        .arg(&dir.path);
    if held {
        command.arg("--held").arg(std::process::id().to_string());
    }
    command
        .env_clear()
        // Where what it may need is installed.
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
}

/// The server as a process. `held`: it goes with the process that started it, with this pid.
pub fn main(dir: &Path, held: Option<i32>) -> ExitCode {
    telemetry::init();
    match serve(dir, held) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("batchai-nfs-server: {error}");
            // The status is that of the one that runs.
            if !matches!(error, ServerError::Running(_)) {
                let status = Status {
                    pid: std::process::id(),
                    address: None,
                    error: Some(error.to_string()),
                };
                if let Err(error) = tell(dir, &status) {
                    eprintln!("batchai-nfs-server: {error}");
                }
            }
            ExitCode::FAILURE
        }
    }
}

fn serve(dir: &Path, held: Option<i32>) -> Result<(), ServerError> {
    // A shim blocks what it reads from a descriptor, and who it starts would not hear that it is to end.
    let none = SigSet::empty();
    none.thread_set_mask().map_err(io::Error::from)?;
    let _lock = alone(dir)?;
    let config = Config::read(dir)?;
    if !nix::unistd::geteuid().is_root() {
        return Err(ServerError::NotRoot);
    }
    limits::raise_open_files().map_err(io::Error::from)?;
    may_be_killed(Path::new("/proc/self/oom_score_adj"))?;
    match held {
        // What goes with who started it is our own.
        Some(_) => embedded(dir, config, held),
        None => named(&config.backend)?.serve(dir, config),
    }
}

/// Our own server of version 3.
pub struct Embedded;

impl Backend for Embedded {
    fn name(&self) -> &'static str {
        EMBEDDED
    }

    fn version(&self) -> i32 {
        3
    }

    fn ready(&self, _: IpAddr) -> Result<(), String> {
        Ok(())
    }

    fn serve(&self, dir: &Path, config: Config) -> Result<(), ServerError> {
        embedded(dir, config, None)
    }
}

fn embedded(dir: &Path, config: Config, held: Option<i32>) -> Result<(), ServerError> {
    // Modes are as callers ask; and threads that are started from here have the rights that are left.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let missing = sys::missing_rights()?;
    if !missing.is_empty() {
        return Err(ServerError::Rights(missing));
    }
    sys::give_up_rights()?;
    sys::set_thread_groups(&[]).map_err(ServerError::Groups)?;
    if let Some(parent) = held {
        // After the rights are given up, which may undo it.
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)?;
        if getppid().as_raw() != parent {
            return Ok(());
        }
    }
    let export = export::Export::open(&config.root, dir, config.generation)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(CALLS_AT_ONCE)
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let stop = shutdown::on_signal()?;
        server::run(dir, config, export, stop).await
    });
    runtime.shutdown_timeout(LAST_CALLS);
    ended
}

/// How a file of configuration is known to be another one.
type Mark = Option<(u64, i64, i64)>;

/// What a server is told now, if that may be something else than when it was last looked at. What cannot be read leaves it as it is.
fn follow(dir: &Path, known: &Config, last: &mut Mark) -> Result<Option<Config>, ServerError> {
    let found = fs::metadata(dir.join(CONFIG)).ok();
    let now = found.map(|found| (found.ino(), found.mtime(), found.mtime_nsec()));
    if now.is_none() || now == *last {
        return Ok(None);
    }
    *last = now;
    match Config::read(dir) {
        Ok(config) if config == *known => Ok(None),
        Ok(config) if known.is_of(&config) => Ok(Some(config)),
        Ok(_) => Err(ServerError::Changed),
        Err(error) => {
            tracing::error!(%error, "what was told before still holds");
            Ok(None)
        }
    }
}

/// What spares the agent where memory is short is not for its servers: a client that has one take memory must not have jobs die for it.
fn may_be_killed(score: &Path) -> Result<(), ServerError> {
    let file = |error| ServerError::File {
        path: score.to_owned(),
        error,
    };
    let spared = fs::read_to_string(score).map_err(file)?;
    match spared.trim_end().starts_with('-') {
        true => fs::write(score, "0").map_err(file),
        false => Ok(()),
    }
}

/// Has one server at a time use a directory. Who started it sees by the lock that it runs.
fn alone(dir: &Path) -> Result<File, ServerError> {
    let path = dir.to_owned();
    let lock = AttemptDir { path }.take_lock()?;
    lock.ok_or_else(|| ServerError::Running(dir.to_owned()))
}

/// Writes the status.
fn tell(dir: &Path, status: &Status) -> Result<(), ServerError> {
    let (draft, path) = (dir.join("status.json.new"), dir.join(STATUS));
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(status)?)?;
        fs::rename(&draft, &path)
    };
    write().map_err(|error| ServerError::File {
        path: path.clone(),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_not_spared_where_memory_is_short() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (inherited, left) in [("-900\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")] {
            fs::write(file.path(), inherited).unwrap();
            may_be_killed(file.path()).unwrap();
            assert_eq!(fs::read_to_string(file.path()).unwrap(), left);
        }
    }

    #[test]
    fn what_it_is_told_is_read_whole_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let text = r#"{"root": "/srv", "listen": "10.0.0.1:20490", "generation": 7,
            "clients": ["10.0.0.2", "fe80::1"], "squash_uid": 65534, "squash_gid": 65534}"#;
        fs::write(&path, text).unwrap();
        let config = Config::read(dir.path()).unwrap();
        assert!(!config.any_port);
        assert_eq!(config.backend, "embedded");
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        assert_eq!(Config::read(dir.path()).unwrap(), config);
        let bad = text
            .replace("\"/srv\"", "\"srv\"")
            .replace("_uid\": 65534", "_uid\": 0");
        fs::write(&path, &bad).unwrap();
        let error = Config::read(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("root") && error.contains("squash_uid"),
            "{error}"
        );
        let all = bad.replace("\"srv\"", "\"/srv\"");
        assert!(all.contains("_uid\": 0"));
        let all = all.replace("\"generation\"", "\"squash_all\": true, \"generation\"");
        fs::write(&path, &all).unwrap();
        assert_eq!(Config::read(dir.path()).unwrap().squash_uid, 0);
        for bad in [
            "",
            "{}",
            &text.replace("10.0.0.2", "host"),
            &text.replace("generation", "g"),
        ] {
            fs::write(&path, bad).unwrap();
            assert!(Config::read(dir.path()).is_err(), "{bad}");
        }
    }
}
