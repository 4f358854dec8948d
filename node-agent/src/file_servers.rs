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
//! DIR/purged                      all that was shared was taken away
//! ```
//! STORAGE is the agent's `--storage-root`, DIR a directory of the journal. What was shared once and is not there is missed, and never made
//! anew: its disk may not be mounted.

mod data;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use batchai_common::names::{Kind, check_id};
use batchai_proto::agent::v1::{
    AssignmentList, FileServerPlace, FileServerReport, ServedFileServer,
};
use batchai_proto::v1::NodeFacts;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::journal::{AttemptDir, Journal, JournalError};
use crate::launch::data_name;
use crate::nfs::{self, CLIENTS_MAX, CONFIG, Config, LOG, STATUS, Status, start};
use crate::serving::{Found, PORTS, Todo, port, report, todo};

/// One that ends at once is not started more often than this.
const STARTS_EVERY: Duration = Duration::from_secs(1);
/// One that does not end by itself is killed.
const END_MAX: Duration = Duration::from_secs(5);
/// What could not be purged is tried again after this.
const PURGES_EVERY: Duration = Duration::from_secs(30);
/// Whose root on those who mount it is: nobody's.
const NOBODY: u32 = 65_534;
const SHARES: &str = "file-servers";
const PURGED: &str = "purged";

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
    /// What was to be done about it at the latest look.
    todo: Todo,
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
            let done = self.look_at(&server, list.restored);
            self.seen(&server.uid).failure = done.err().map(|error| error.to_string());
        }
        let wanted = |uid: &str| list.file_servers.iter().any(|server| server.uid == uid);
        for dir in self.journal.file_servers()? {
            let uid = dir.id();
            if wanted(&uid) {
                continue;
            }
            let found = Found {
                runs: self.runs(&dir)?,
                ..Found::default()
            };
            match todo(None, list.restored, &found) {
                Todo::End => self.end(&dir)?,
                Todo::Forget => {
                    dir.remove()?;
                    self.seen.remove(&uid);
                }
                _ => {}
            }
        }
        self.seen
            .retain(|uid, seen| wanted(uid) || seen.child.is_some());
        Ok(())
    }

    /// Does what is to be done about one that is wanted.
    fn look_at(&mut self, server: &ServedFileServer, restored: bool) -> Result<(), ServeError> {
        let seen = self.seen(&server.uid);
        // Where it cannot be seen nothing is said of it.
        seen.todo = Todo::Nothing;
        let is_purged_now = |purge: &JoinHandle<_>| !purge.is_finished();
        if server.ending && seen.purge.as_ref().is_some_and(is_purged_now) {
            return Ok(());
        }
        let dir = self.journal.file_server(&server.uid);
        let known: Option<Config> = dir.read(CONFIG)?;
        let found = self.find(server, restored, &dir, known.as_ref())?;
        let todo = todo(Some(server), restored, &found);
        self.seen(&server.uid).todo = todo.clone();
        match todo {
            Todo::Serve { clients, make } => self.serve(server, known, &clients, make),
            Todo::Miss => Err(ServeError::Missing {
                path: self.kept(server, known.as_ref())?,
            }),
            Todo::End => Ok(self.end(&dir)?),
            Todo::Purge => self.purge(&dir, server, self.kept(server, known.as_ref())?),
            // The directory of one that is gone goes when nobody asks for it any more.
            Todo::Gone | Todo::Nothing | Todo::Forget => Ok(()),
        }
    }

    /// What there is of one that is wanted. The disk is looked at where that matters only, and not while it is served: it may not answer.
    fn find(
        &self,
        server: &ServedFileServer,
        restored: bool,
        dir: &AttemptDir,
        known: Option<&Config>,
    ) -> Result<Found, ServeError> {
        let mut found = Found {
            clients: known.map(|known| known.clients.iter().map(IpAddr::to_string).collect()),
            runs: self.runs(dir)?,
            purged: dir.has(PURGED),
            ..Found::default()
        };
        let matters = match server.ending {
            true => server.purge && !restored && !found.runs,
            false => known.is_none(),
        };
        if matters {
            let data = self.kept(server, known)?;
            found.data = data.try_exists()?;
            found.rest = data::aside(&data).try_exists()?;
        }
        Ok(found)
    }

    /// Where what lies on one lies, or lay when it was served last.
    fn kept(
        &self,
        server: &ServedFileServer,
        known: Option<&Config>,
    ) -> Result<PathBuf, ServeError> {
        match known {
            Some(known) => Ok(known.root.clone()),
            None => self.data(server),
        }
    }

    /// What serves one is there, or was started just now.
    fn runs(&self, dir: &AttemptDir) -> Result<bool, JournalError> {
        let started = self.seen.get(&dir.id());
        let started = started.is_some_and(|seen| seen.child.is_some());
        Ok(started || dir.shim()?.is_some())
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
        let reports = self.wanted.iter().map(|wanted| {
            let seen = seen(&wanted.uid);
            let (place, why) = match self.place(wanted) {
                _ if wanted.ending => (None, seen.failure.clone()),
                Ok(Some(place)) => (Some(place), seen.failure.clone()),
                Ok(None) => (None, seen.failure.clone().or_else(|| seen.end.clone())),
                Err(error) => (None, Some(error.to_string())),
            };
            report(wanted, &seen.todo, place, why.as_deref())
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

    /// Has one served, to those who may mount it.
    fn serve(
        &mut self,
        server: &ServedFileServer,
        known: Option<Config>,
        clients: &BTreeSet<String>,
        make: bool,
    ) -> Result<(), ServeError> {
        let data = self.data(server)?;
        let dir = self.journal.file_server(&server.uid);
        dir.create()?;
        let clients: BTreeSet<IpAddr> = clients.iter().filter_map(|c| c.parse().ok()).collect();
        if clients.len() > CLIENTS_MAX {
            return Err(ServeError::TooMany);
        }
        let clients = clients.into_iter().collect();
        let address = self.address.parse().map_err(|_| ServeError::Address {
            address: self.address.clone(),
        })?;
        if make {
            data::make(&data)?;
        }
        forget_purge(&dir)?;
        let config = match &known {
            Some(known) => Config {
                root: data,
                // The machine may have moved.
                listen: SocketAddr::new(address, known.listen.port()),
                clients,
                ..known.clone()
            },
            None => self.new_config(data, address, clients)?,
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
        let mut taken = BTreeSet::new();
        for dir in self.journal.file_servers()? {
            let other: Option<Config> = dir.read(CONFIG)?;
            taken.extend(other.map(|other| other.listen.port()));
        }
        let free = |port| TcpListener::bind(SocketAddr::new(address, port)).is_ok();
        let first = fastrand::u16(PORTS);
        let port = port(first, &taken, &self.jobs_ports, free).ok_or(ServeError::NoPort)?;
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

    /// Has the process of one end.
    fn end(&mut self, dir: &AttemptDir) -> Result<(), JournalError> {
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
        Ok(())
    }

    /// Has all that is shared be taken away.
    fn purge(
        &mut self,
        dir: &AttemptDir,
        server: &ServedFileServer,
        data: PathBuf,
    ) -> Result<(), ServeError> {
        let seen = self.seen(&server.uid);
        if let Some(purge) = seen.purge.take_if(|purge| purge.is_finished()) {
            seen.failure = match purge.join() {
                // Something has come there since, or what was left of it stayed.
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("what purges it has panicked".to_owned()),
            };
        }
        if seen.purge.is_some() {
            return Ok(());
        }
        if let Some(why) = &seen.failure
            && seen.purged.is_some_and(|at| at.elapsed() < PURGES_EVERY)
        {
            return Err(ServeError::Purge(why.clone()));
        }
        // It may be large. Whoever waits for it waits for the disk.
        seen.purged = Some(Instant::now());
        dir.create()?;
        forget_purge(dir)?;
        let dir = dir.clone();
        seen.purge = Some(std::thread::spawn(move || {
            data::purge(&data)?;
            dir.write(PURGED, &true, true).map_err(io::Error::other)?;
            // It has served its time: whoever dies before sees it, and purges again.
            data::forget(&data)
        }));
        Ok(())
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

/// Where file servers lie below the agent's `--storage-root`.
pub fn shares(storage_root: &Path) -> PathBuf {
    storage_root.join(SHARES)
}

/// What lies there came after it was purged, if it ever was.
fn forget_purge(dir: &AttemptDir) -> io::Result<()> {
    match fs::remove_file(dir.path.join(PURGED)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
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
