//! The file servers of this node: compared with what is wanted at each look, by what lies in their directories. Nothing here waits.
//!
//! Each is a process of its own (`nfs`, which has several back ends) that outlives the agent, as shims do, and is started again when it has died: at the same port and
//! with the same handles, so that who mounts it goes on.
//!
//! ```text
//! STORAGE/NAME-UID/          what is shared; stays when the file server goes, unless it is to be purged
//! DIR/config.json            what to serve to whom; written here
//! DIR/status.json            where it is served, or why not; written by the process
//! ```
//! STORAGE is the agent's `--storage-root`, DIR a directory of the journal.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use batchai_common::names::{Kind, check_id, last_id};
use batchai_proto::agent::v1::{FileServerPlace, FileServerReport, ServedFileServer};
use batchai_proto::v1::{NameValuePair, NodeFacts, ResourceError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::journal::{AttemptDir, Journal, JournalError};
use crate::nfs::{self, CONFIG, Config, STATUS, Status};

/// One that ends at once is not started more often than this.
const STARTS_EVERY: Duration = Duration::from_secs(1);
/// One that does not end by itself is killed.
const END_MAX: Duration = Duration::from_secs(5);
/// Whose root on those who mount it is: nobody's.
const NOBODY: u32 = 65_534;

/// The file servers of a node.
pub struct FileServers {
    journal: Arc<Journal>,
    own: &'static [&'static str],
    /// Where they lie; none where this node offers no storage.
    storage: Option<PathBuf>,
    /// Where they are reached.
    address: String,
    /// What the latest list says.
    wanted: Vec<ServedFileServer>,
    /// Those that this agent has started.
    children: HashMap<String, Child>,
    started: HashMap<String, Instant>,
    /// Since when they are to end.
    ending: HashMap<String, Instant>,
    /// What is taken away, and how that went.
    purges: HashMap<String, JoinHandle<io::Result<()>>>,
    failures: HashMap<String, String>,
}

impl FileServers {
    pub fn new(
        journal: Arc<Journal>,
        own: &'static [&'static str],
        facts: &NodeFacts,
    ) -> FileServers {
        let storage = Some(&facts.storage_root).filter(|root| !root.is_empty());
        FileServers {
            journal,
            own,
            storage: storage.map(PathBuf::from),
            address: facts.addresses.first().cloned().unwrap_or_default(),
            wanted: Vec::new(),
            children: HashMap::new(),
            started: HashMap::new(),
            ending: HashMap::new(),
            purges: HashMap::new(),
            failures: HashMap::new(),
        }
    }

    /// Compares what is served with what is wanted now.
    pub fn look(&mut self, wanted: &[ServedFileServer]) -> Result<(), JournalError> {
        let named = |server: &&ServedFileServer| check_id(Kind::Node, &server.uid).is_ok();
        self.wanted = wanted.iter().filter(named).cloned().collect();
        self.children
            .retain(|_, child| matches!(child.try_wait(), Ok(None)));
        for server in self.wanted.clone() {
            if server.ending {
                self.end_and_purge(&server)?;
                continue;
            }
            match self.serve(&server) {
                Ok(()) => drop(self.failures.remove(&server.uid)),
                Err(error) => drop(self.failures.insert(server.uid, error.to_string())),
            }
        }
        let wanted: Vec<_> = self.wanted.iter().map(|server| &server.uid).collect();
        let all = self.journal.file_servers()?;
        let others = all.iter().filter(|dir| !wanted.contains(&&dir.id()));
        for dir in others.cloned().collect::<Vec<_>>() {
            self.end(&dir)?;
        }
        Ok(())
    }

    /// How they stand.
    pub fn report(&self) -> Vec<FileServerReport> {
        self.wanted
            .iter()
            .map(|server| self.report_of(server))
            .collect()
    }

    fn report_of(&self, server: &ServedFileServer) -> FileServerReport {
        let dir = self.journal.file_server(&server.uid);
        let mut report = FileServerReport {
            uid: server.uid.clone(),
            ..FileServerReport::default()
        };
        if server.ending {
            let left = dir.path.exists() || (server.purge && self.has_data(server));
            report.gone = !left;
            let purge = self.failures.get(&server.uid);
            report.failure = purge.map(|why| failure("FileServerNotPurged", server, why));
            return report;
        }
        let status: Option<Status> = dir.read(STATUS).unwrap_or_default();
        let status = status.unwrap_or_default();
        let runs = dir.shim().unwrap_or_default().is_some();
        let config: Option<Config> = dir.read(CONFIG).unwrap_or_default();
        let backend = config.and_then(|config| nfs::named(&config.backend).ok());
        match (status.address, self.failures.get(&server.uid)) {
            (Some(address), None) if runs => {
                report.place = Some(FileServerPlace {
                    address: address.ip().to_string(),
                    port: i32::from(address.port()),
                    path: self
                        .data(server)
                        .unwrap_or_default()
                        .to_string_lossy()
                        .into(),
                    backend: backend.map_or("", |it| it.name()).to_owned(),
                    nfs_version: backend.map_or(0, |it| it.version()),
                });
            }
            (_, why) => {
                let why = why.cloned().or(status.error);
                report.failure = why.map(|why| failure("FileServerNotServed", server, &why));
            }
        }
        report
    }

    /// Where a file server lies.
    fn data(&self, server: &ServedFileServer) -> Option<PathBuf> {
        let data = data_name(&server.name, &server.uid)?;
        Some(self.storage.as_ref()?.join(data))
    }

    fn has_data(&self, server: &ServedFileServer) -> bool {
        self.data(server)
            .is_some_and(|data| data.exists() || purged(&data).exists())
    }

    /// Has one served, to those who may mount it.
    fn serve(&mut self, server: &ServedFileServer) -> Result<(), ServeError> {
        let data = self.data(server).ok_or(ServeError::NoStorage)?;
        make_data(&data)?;
        let dir = self.journal.file_server(&server.uid);
        dir.create()?;
        let known: Option<Config> = dir.read(CONFIG)?;
        let clients = server.clients.iter().filter_map(|c| c.parse().ok());
        let config = Config {
            clients: clients.collect(),
            root: data,
            ..match &known {
                Some(known) => known.clone(),
                None => self.new_config()?,
            }
        };
        if known.as_ref() != Some(&config) {
            dir.write(CONFIG, &config, true)?;
        }
        let lately = self.started.get(&server.uid);
        let lately = lately.is_some_and(|at| at.elapsed() < STARTS_EVERY);
        if dir.shim()?.is_none() && !self.children.contains_key(&server.uid) && !lately {
            let child = start(self.own, &dir)?;
            self.children.insert(server.uid.clone(), child);
            self.started.insert(server.uid.clone(), Instant::now());
        }
        Ok(())
    }

    /// A port that is free now, for good.
    fn new_config(&self) -> Result<Config, ServeError> {
        let address: IpAddr = self.address.parse().map_err(|_| ServeError::Address {
            address: self.address.clone(),
        })?;
        let listener = TcpListener::bind(SocketAddr::new(address, 0))?;
        Ok(Config {
            root: PathBuf::new(),
            listen: listener.local_addr()?,
            generation: fastrand::u64(1..),
            clients: Vec::new(),
            squash_uid: NOBODY,
            squash_gid: NOBODY,
            any_port: false,
            backend: nfs::choose(address).name().to_owned(),
        })
    }

    /// Has one end; whether it has.
    fn end(&mut self, dir: &AttemptDir) -> Result<bool, JournalError> {
        if !dir.path.exists() {
            return Ok(true);
        }
        let since = *self.ending.entry(dir.id()).or_insert_with(Instant::now);
        if let Some(pid) = dir.shim()? {
            let signal = match since.elapsed() < END_MAX {
                true => Signal::SIGTERM,
                false => Signal::SIGKILL,
            };
            // It may have ended just now.
            let _ = kill(Pid::from_raw(pid), signal);
            return Ok(false);
        }
        if self.children.contains_key(&dir.id()) {
            return Ok(false);
        }
        self.ending.remove(&dir.id());
        dir.remove()?;
        Ok(true)
    }

    fn end_and_purge(&mut self, server: &ServedFileServer) -> Result<(), JournalError> {
        let dir = self.journal.file_server(&server.uid);
        let (true, true) = (self.end(&dir)?, server.purge) else {
            return Ok(());
        };
        let Some(data) = self.data(server) else {
            return Ok(());
        };
        if let Some(purge) = self.purges.get(&server.uid) {
            if !purge.is_finished() {
                return Ok(());
            }
            let ended = self.purges.remove(&server.uid).map(JoinHandle::join);
            match ended {
                Some(Ok(Ok(()))) | None => drop(self.failures.remove(&server.uid)),
                Some(Ok(Err(error))) => {
                    self.failures.insert(server.uid.clone(), error.to_string());
                }
                Some(Err(_)) => {
                    let why = "what purges it has panicked".to_owned();
                    self.failures.insert(server.uid.clone(), why);
                }
            }
        }
        if self.has_data(server) {
            // It may be large. Whoever waits for it waits for the disk.
            let purge = std::thread::spawn(move || purge(&data));
            self.purges.insert(server.uid.clone(), purge);
        }
        Ok(())
    }
}

/// Why a file server is not served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("this node offers no storage any more: its agent was given no --storage-root")]
    NoStorage,
    #[error("{address} is no address to listen at")]
    Address { address: String },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{0}")]
    System(#[from] io::Error),
}

fn failure(code: &str, server: &ServedFileServer, why: &str) -> ResourceError {
    let name = last_id(&server.name);
    ResourceError {
        code: code.to_owned(),
        message: format!("{name}: {why}"),
        details: vec![NameValuePair {
            name: "error".to_owned(),
            value: why.to_owned(),
        }],
    }
}

/// What the directory of a file server is called.
pub fn data_name(name: &str, uid: &str) -> Option<String> {
    let name = last_id(name);
    // The coordinator has checked both; here they become a path.
    check_id(Kind::Node, name).ok()?;
    check_id(Kind::Node, uid).ok()?;
    Some(format!("{name}-{uid}"))
}

/// Everybody may write there, as on a disk of one's own; what belongs to whom the server sees to.
fn make_data(data: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(data) {
        Ok(()) => fs::set_permissions(data, fs::Permissions::from_mode(0o1777)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match data.is_dir() {
            true => Ok(()),
            false => Err(error),
        },
        Err(error) => {
            let why = format!("{} cannot be made: {error}", data.display());
            Err(io::Error::new(error.kind(), why))
        }
    }
}

fn purged(data: &Path) -> PathBuf {
    let name = data.file_name().unwrap_or_default().to_string_lossy();
    data.with_file_name(format!(".purged-{name}"))
}

/// Out of the way first: what is half gone is nobody's any more.
fn purge(data: &Path) -> io::Result<()> {
    let gone = purged(data);
    if data.exists() && !gone.exists() {
        fs::rename(data, &gone)?;
    }
    fs::remove_dir_all(&gone)
}

fn start(own: &[&str], dir: &AttemptDir) -> io::Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let log = fs::File::create(dir.path.join("nfs.log"))?;
    // This program, even if it was replaced meanwhile.
    Command::new("/proc/self/exe")
        .arg0("batchai-nfs-server")
        .args(own)
        .args(["nfs-server", "--dir"])
        .arg(&dir.path)
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

/// Has all of them end, without waiting for it; whether one still runs.
pub fn end_all(journal: &Journal) -> Result<bool, JournalError> {
    let mut alive = false;
    for dir in journal.file_servers()? {
        if let Some(pid) = dir.shim()? {
            alive = true;
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
    Ok(alive)
}
