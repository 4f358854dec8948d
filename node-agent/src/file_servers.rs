//! The file servers of this node: compared with what is wanted at each look, by what lies in their directories. Nothing here waits.
//!
//! Each is a process of its own (`nfs`, which has several back ends) that outlives the agent, as shims do, and is started again when it has died: at the same port and
//! with the same handles, so that who mounts it goes on.
//!
//! ```text
//! STORAGE/file-servers/           root's alone: what users may do here they do through what serves them
//! STORAGE/file-servers/NAME-UID/  what is shared; made once. It stays when the file server goes, unless it is to be purged
//! DIR/config.json                 what to serve to whom; written here
//! DIR/status.json                 where it is served, or why not; written by the process
//! DIR/nfs.log                     what the process said
//! DIR/purge                       all that is shared is being taken away
//! ```
//! STORAGE is the agent's `--storage-root`, DIR a directory of the journal. What was shared once and is not there is missed, and never made
//! anew: its disk may not be mounted.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use batchai_common::names::{Kind, check_id, last_id};
use batchai_proto::agent::v1::{
    AssignmentList, FileServerPlace, FileServerReport, ServedFileServer,
};
use batchai_proto::v1::{NameValuePair, NodeFacts, ResourceError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::journal::{AttemptDir, Journal, JournalError};
use crate::launch::data_name;
use crate::mounts::is_mounted_below;
use crate::nfs::{self, CLIENTS_MAX, CONFIG, Config, LOG, STATUS, Status, start};

/// One that ends at once is not started more often than this.
const STARTS_EVERY: Duration = Duration::from_secs(1);
/// One that does not end by itself is killed.
const END_MAX: Duration = Duration::from_secs(5);
/// What could not be purged is tried again after this.
const PURGES_EVERY: Duration = Duration::from_secs(30);
/// Whose root on those who mount it is: nobody's.
const NOBODY: u32 = 65_534;
/// The ports that they listen at: none that the kernel gives away, for each keeps its own over restarts.
const PORTS: std::ops::Range<u16> = 19_000..20_000;
const SHARES: &str = "file-servers";
const PURGE: &str = "purge";

/// The file servers of a node.
pub struct FileServers {
    journal: Arc<Journal>,
    own: &'static [&'static str],
    /// Where they lie; none where this node offers no storage.
    shares: Option<PathBuf>,
    /// Why it offers none.
    no_storage: String,
    /// Where they are reached.
    address: String,
    /// The ports of jobs.
    jobs_ports: std::ops::RangeInclusive<i32>,
    /// What the latest list says.
    wanted: Vec<ServedFileServer>,
    /// What this agent has seen of them, by UUID.
    seen: HashMap<String, Seen>,
}

#[derive(Default)]
struct Seen {
    /// What this agent has started.
    child: Option<Child>,
    started: Option<Instant>,
    /// Since when it is to end.
    ending: Option<Instant>,
    purge: Option<JoinHandle<io::Result<()>>>,
    purged: Option<Instant>,
    failure: Option<String>,
    /// How it ended the last time.
    end: Option<String>,
    gone: bool,
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
            shares: storage.map(|root| shares(Path::new(root))),
            no_storage: match facts.storage_failure.as_str() {
                "" => "its agent was given no --storage-root".to_owned(),
                failure => failure.to_owned(),
            },
            address: facts.addresses.first().cloned().unwrap_or_default(),
            jobs_ports: facts.first_port..=facts.last_port,
            wanted: Vec::new(),
            seen: HashMap::new(),
        }
    }

    /// Compares what is served with what is wanted now.
    pub fn look(&mut self, list: &AssignmentList) -> Result<(), JournalError> {
        let named = |server: &&ServedFileServer| check_id(Kind::Node, &server.uid).is_ok();
        self.wanted = list.file_servers.iter().filter(named).cloned().collect();
        self.reap();
        for server in self.wanted.clone() {
            let done = match (server.ending, list.restored) {
                (false, restored) => self.serve(&server, restored),
                (true, false) => self.finish(&server),
                (true, true) => Ok(()),
            };
            self.seen(&server.uid).failure = done.err().map(|error| error.to_string());
        }
        if list.restored {
            return Ok(());
        }
        let wanted = |uid: &str| list.file_servers.iter().any(|server| server.uid == uid);
        for dir in self.journal.file_servers()? {
            let uid = dir.id();
            if !wanted(&uid) && self.end(&dir)? {
                dir.remove()?;
                self.seen.remove(&uid);
            }
        }
        self.seen
            .retain(|uid, seen| wanted(uid) || seen.child.is_some());
        Ok(())
    }

    fn seen(&mut self, uid: &str) -> &mut Seen {
        self.seen.entry(uid.to_owned()).or_default()
    }

    /// Takes in what has ended.
    fn reap(&mut self) {
        for (uid, seen) in &mut self.seen {
            let Some(child) = &mut seen.child else {
                continue;
            };
            let how = match child.try_wait() {
                Ok(None) => continue,
                Ok(Some(status)) => status.to_string(),
                Err(error) => error.to_string(),
            };
            seen.child = None;
            let log = self.journal.file_server(uid).path.join(LOG);
            let last = last_line(&log).unwrap_or_default();
            seen.end = Some(format!("what serves it ended: {how} {last}"));
        }
    }

    /// How they stand.
    pub fn report(&self) -> Vec<FileServerReport> {
        let nothing = Seen::default();
        let seen = |uid: &str| self.seen.get(uid).unwrap_or(&nothing);
        let reports = self.wanted.iter().map(|server| {
            let seen = seen(&server.uid);
            let (place, why) = match (server.ending, self.place(server)) {
                (true, _) => (None, seen.failure.clone()),
                (false, Ok(Some(place))) => (Some(place), seen.failure.clone()),
                (false, Ok(None)) => (None, seen.failure.clone().or_else(|| seen.end.clone())),
                (false, Err(error)) => (None, Some(error.to_string())),
            };
            FileServerReport {
                uid: server.uid.clone(),
                place,
                failure: why.map(|why| failure(server, &why)),
                gone: seen.gone,
                purged: seen.gone && server.purge,
            }
        });
        reports.collect()
    }

    /// Where one is served now.
    fn place(&self, server: &ServedFileServer) -> Result<Option<FileServerPlace>, ServeError> {
        let dir = self.journal.file_server(&server.uid);
        let Some(status) = dir.read::<Status>(STATUS)? else {
            return Ok(None);
        };
        // What one that is gone has left says nothing about one that has just begun.
        let runs = dir.shim()?.is_some_and(|pid| pid == status.pid as i32);
        match (status.address, status.error) {
            (Some(address), _) if runs => {
                let config: Option<Config> = dir.read(CONFIG)?;
                let backend = config.and_then(|config| nfs::named(&config.backend).ok());
                Ok(Some(FileServerPlace {
                    address: address.ip().to_string(),
                    port: i32::from(address.port()),
                    path: self.data(server)?.to_string_lossy().into(),
                    backend: backend.map_or("", |it| it.name()).to_owned(),
                    nfs_version: backend.map_or(0, |it| it.version()),
                }))
            }
            (None, Some(error)) => Err(ServeError::Server(error)),
            _ => Ok(None),
        }
    }

    /// Where a file server lies.
    fn data(&self, server: &ServedFileServer) -> Result<PathBuf, ServeError> {
        let shares = self.shares.as_ref();
        let shares = shares.ok_or_else(|| ServeError::NoStorage(self.no_storage.clone()))?;
        let data = data_name(&server.name, &server.uid).ok_or_else(|| ServeError::Name {
            name: server.name.clone(),
        })?;
        Ok(shares.join(data))
    }

    /// Has one served, to those who may mount it. Where the State is a backup's, also to those it does not know of.
    fn serve(&mut self, server: &ServedFileServer, restored: bool) -> Result<(), ServeError> {
        let data = self.data(server)?;
        let dir = self.journal.file_server(&server.uid);
        dir.create()?;
        let known: Option<Config> = dir.read(CONFIG)?;
        let clients = server.clients.iter().filter_map(|c| c.parse().ok());
        let mut clients: Vec<IpAddr> = clients.collect();
        if let Some(known) = known.as_ref().filter(|_| restored) {
            clients.extend(&known.clients);
        }
        clients.sort();
        clients.dedup();
        if clients.len() > CLIENTS_MAX {
            return Err(ServeError::TooMany);
        }
        let address = self.address.parse().map_err(|_| ServeError::Address {
            address: self.address.clone(),
        })?;
        let config = match &known {
            Some(known) => Config {
                root: data,
                // The machine may have moved.
                listen: SocketAddr::new(address, known.listen.port()),
                clients,
                ..known.clone()
            },
            None => {
                match server.existing {
                    true if !data.is_dir() => return Err(ServeError::Missing { path: data }),
                    true => {}
                    false => make_data(&data)?,
                }
                self.new_config(data, address, clients)?
            }
        };
        if known.as_ref() != Some(&config) {
            dir.write(CONFIG, &config, true)?;
        }
        let own = self.own;
        let seen = self.seen(&server.uid);
        let lately = seen.started.is_some_and(|at| at.elapsed() < STARTS_EVERY);
        if dir.shim()?.is_none() && seen.child.is_none() && !lately {
            seen.started = Some(Instant::now());
            seen.child = Some(start(own, &dir, false)?);
        }
        Ok(())
    }

    /// With a port that is free now, and is its own from now on.
    fn new_config(
        &self,
        root: PathBuf,
        address: IpAddr,
        clients: Vec<IpAddr>,
    ) -> Result<Config, ServeError> {
        let mut taken = Vec::new();
        for dir in self.journal.file_servers()? {
            let other: Option<Config> = dir.read(CONFIG)?;
            taken.extend(other.map(|other| other.listen.port()));
        }
        let free = |port: &u16| {
            !taken.contains(port)
                && !self.jobs_ports.contains(&i32::from(*port))
                && TcpListener::bind(SocketAddr::new(address, *port)).is_ok()
        };
        let first = fastrand::u16(PORTS);
        let mut ports = (first..PORTS.end).chain(PORTS.start..first);
        let port = ports.find(free).ok_or(ServeError::NoPort)?;
        Ok(Config {
            root,
            listen: SocketAddr::new(address, port),
            generation: fastrand::u64(1..),
            clients,
            squash_uid: NOBODY,
            squash_gid: NOBODY,
            squash_all: false,
            linger_s: 0,
            any_port: false,
            backend: nfs::choose(address).name().to_owned(),
        })
    }

    /// Has the process of one end; whether it has.
    fn end(&mut self, dir: &AttemptDir) -> Result<bool, JournalError> {
        let runs = dir.shim()?;
        let seen = self.seen(&dir.id());
        let since = *seen.ending.get_or_insert_with(Instant::now);
        if let Some(pid) = runs {
            let signal = match since.elapsed() < END_MAX {
                true => Signal::SIGTERM,
                false => Signal::SIGKILL,
            };
            // It may have ended just now.
            let _ = kill(Pid::from_raw(pid), signal);
        }
        Ok(runs.is_none() && seen.child.is_none())
    }

    /// Has one be gone.
    fn finish(&mut self, server: &ServedFileServer) -> Result<(), ServeError> {
        let dir = self.journal.file_server(&server.uid);
        if !self.end(&dir)? || (server.purge && !self.purge(&dir, server)?) {
            return Ok(());
        }
        // Its directory goes when nobody asks for it any more.
        self.seen(&server.uid).gone = true;
        Ok(())
    }

    /// Has all that is shared be taken away; whether it is.
    fn purge(&mut self, dir: &AttemptDir, server: &ServedFileServer) -> Result<bool, ServeError> {
        let data = match dir.read::<Config>(CONFIG)? {
            Some(config) => config.root,
            None => self.data(server)?,
        };
        let seen = self.seen(&server.uid);
        if let Some(purge) = seen.purge.take_if(|purge| purge.is_finished()) {
            seen.failure = match purge.join() {
                Ok(done) => done.err().map(|error| error.to_string()),
                Err(_) => Some("what purges it has panicked".to_owned()),
            };
        }
        if seen.purge.is_some() {
            return Ok(false);
        }
        if !dir.has(PURGE) {
            if server.existing && !data.try_exists()? {
                return Err(ServeError::Missing { path: data });
            }
            dir.create()?;
            dir.write(PURGE, &true, true)?;
        }
        if !data.try_exists()? && !purged(&data).try_exists()? {
            return Ok(true);
        }
        if let Some(why) = &seen.failure
            && seen.purged.is_some_and(|at| at.elapsed() < PURGES_EVERY)
        {
            return Err(ServeError::Purge(why.clone()));
        }
        // It may be large. Whoever waits for it waits for the disk.
        seen.purged = Some(Instant::now());
        seen.purge = Some(std::thread::spawn(move || purge(&data)));
        Ok(false)
    }
}

/// Why a file server is not served, or not gone.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("this node offers no storage any more: {0}")]
    NoStorage(String),
    #[error("{name} is no name of a file server")]
    Name { name: String },
    #[error("{address} is no address to listen at")]
    Address { address: String },
    #[error("none of the ports {} to {} is free", PORTS.start, PORTS.end - 1)]
    NoPort,
    #[error("more than {CLIENTS_MAX} addresses mount it")]
    TooMany,
    #[error(
        "what lies on it is not there: {} does not exist; is its disk mounted? If it is lost: batchai file-server delete --force", path.display()
    )]
    Missing { path: PathBuf },
    #[error("{0}")]
    Server(String),
    #[error("{0}")]
    Purge(String),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{0}")]
    System(#[from] io::Error),
}

fn failure(server: &ServedFileServer, why: &str) -> ResourceError {
    let name = last_id(&server.name);
    let code = match server.ending {
        true => "FileServerNotPurged",
        false => "FileServerNotServed",
    };
    ResourceError {
        code: code.to_owned(),
        message: format!("{name}: {why}"),
        details: vec![NameValuePair {
            name: "error".to_owned(),
            value: why.to_owned(),
        }],
    }
}

/// Where file servers lie below the agent's `--storage-root`.
pub fn shares(storage_root: &Path) -> PathBuf {
    storage_root.join(SHARES)
}

/// Everybody may write there, as on a disk of one's own; what belongs to whom the server sees to.
fn make_data(data: &Path) -> io::Result<()> {
    let at = |path: &Path, error: io::Error| {
        let why = format!("{} cannot be made: {error}", path.display());
        io::Error::new(error.kind(), why)
    };
    let make = |path: &Path| match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.map_err(|error| at(path, error)),
    };
    let shares = data.parent().expect("it lies below the shares");
    make(shares)?;
    fs::set_permissions(shares, fs::Permissions::from_mode(0o700))?;
    make(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o1777))?;
    fs::File::open(shares)?.sync_all()
}

fn purged(data: &Path) -> PathBuf {
    let name = data.file_name().unwrap_or_default().to_string_lossy();
    data.with_file_name(format!(".purged-{name}"))
}

/// Out of the way first: what is half gone is nobody's any more.
fn purge(data: &Path) -> io::Result<()> {
    let gone = purged(data);
    for path in [data, &gone] {
        // What an administrator has mounted there was never part of it.
        if is_mounted_below(path).unwrap_or(true) {
            let why = format!("something is mounted below {}: unmount it", path.display());
            return Err(io::Error::other(why));
        }
    }
    if data.try_exists()? && !gone.try_exists()? {
        fs::rename(data, &gone)?;
    }
    fs::remove_dir_all(&gone)
}

fn last_line(log: &Path) -> io::Result<String> {
    const TAIL: i64 = 1 << 10;
    let mut file = fs::File::open(log)?;
    // A shorter one is read from its beginning.
    let _ = file.seek(io::SeekFrom::End(-TAIL));
    let mut tail = Vec::new();
    file.take(TAIL as u64).read_to_end(&mut tail)?;
    let tail = String::from_utf8_lossy(&tail);
    let last = tail.lines().rfind(|line| !line.trim().is_empty());
    Ok(last.unwrap_or_default().to_owned())
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
