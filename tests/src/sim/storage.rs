//! File servers on a machine: production's `serving` over a disk and processes that are played here, and who reaches what they serve.

use std::collections::{BTreeMap, BTreeSet};

use batchai_node_agent::serving::{Found, PORTS, Todo, port, report, todo};
use batchai_proto::agent::v1::{
    AssignmentList, FileServerPlace, FileServerReport, FileServerSource, ServedFileServer,
};

const GB: i64 = 1_000_000_000;
/// What the disk of the machine has, and what the file system has on which it is mounted.
const DISK_GB: i64 = 100;
const BELOW_GB: i64 = 30;
/// Ports that are tried first: few, so that they meet.
const FIRST_PORTS: u16 = 3;

/// What lies in a directory of file servers.
#[derive(Debug, Default)]
struct Disk {
    data: BTreeSet<String>,
    /// Of what is being taken away.
    rest: BTreeSet<String>,
    /// What that lay in, when all of it is gone.
    shells: BTreeSet<String>,
}

/// One in the journal, and its process.
#[derive(Debug, Default)]
pub struct Kept {
    /// Its port, once it is written down, and who may mount it.
    pub port: u16,
    pub clients: BTreeSet<String>,
    runs: bool,
    /// It serves.
    up: bool,
    purged: bool,
}

/// What is done to a file server that nobody may do at any time.
#[derive(Debug)]
pub enum Deed {
    Made(String),
    /// And whether it was served meanwhile.
    Purged(String, bool),
    Missed,
}

/// What is served: where, and who may mount it.
pub type Exports = BTreeMap<(String, i32), (String, BTreeSet<String>)>;

/// The storage of a machine.
#[derive(Debug)]
pub struct Storage {
    /// It offers any.
    pub offered: bool,
    /// Its disk is not mounted until then.
    away_until: u64,
    /// What is below the place where the disk is mounted, and the disk.
    disks: [Disk; 2],
    pub kept: BTreeMap<String, Kept>,
    /// What the agent measured when it began: all, and what is free.
    pub bytes: (i64, i64),
    /// Of the agent: it goes with it.
    wanted: Vec<ServedFileServer>,
    done: BTreeMap<String, (Todo, Option<&'static str>)>,
}

impl Storage {
    pub fn new(offered: bool) -> Storage {
        Storage {
            offered,
            away_until: 0,
            disks: [Disk::default(), Disk::default()],
            kept: BTreeMap::new(),
            bytes: (DISK_GB * GB, DISK_GB * GB),
            wanted: Vec::new(),
            done: BTreeMap::new(),
        }
    }

    fn is_away(&self, step: u64) -> bool {
        self.away_until > step
    }

    fn disk(&mut self, step: u64) -> &mut Disk {
        let mounted = usize::from(!self.is_away(step));
        &mut self.disks[mounted]
    }

    /// The agent begins anew, and measures.
    pub fn begin(&mut self, step: u64) {
        let gb = if self.is_away(step) {
            BELOW_GB
        } else {
            DISK_GB
        };
        self.bytes = (gb * GB, gb * GB);
        (self.wanted, self.done) = (Vec::new(), BTreeMap::new());
    }

    /// What serves is gone.
    pub fn stop_all(&mut self) {
        for kept in self.kept.values_mut() {
            (kept.runs, kept.up) = (false, false);
        }
    }

    /// One of those that serve dies; whether there was one.
    pub fn stop_one(&mut self, random: &mut fastrand::Rng) -> bool {
        let up: Vec<_> = self.kept.values_mut().filter(|kept| kept.up).collect();
        let Some(kept) = random.choice(up) else {
            return false;
        };
        (kept.runs, kept.up) = (false, false);
        true
    }

    /// The disk is away for some time, and what served it ends.
    pub fn take_away(&mut self, until: u64) {
        self.away_until = until;
        self.stop_all();
    }

    /// Whether anything is served.
    pub fn serves(&self) -> bool {
        self.kept.values().any(|kept| kept.up)
    }

    /// Whether what serves one is there, and where it listens.
    pub fn served(&self, uid: &str) -> Option<u16> {
        let kept = self.kept.get(uid).filter(|kept| kept.runs)?;
        Some(kept.port)
    }

    /// Whether anything lies anywhere that was one's.
    pub fn has(&self, uid: &str) -> bool {
        let mut disks = self.disks.iter();
        disks.any(|disk| disk.data.contains(uid) || disk.rest.contains(uid))
    }

    /// Whether what lies on one can be read.
    pub fn can_read(&self, uid: &str, step: u64) -> bool {
        self.disks[usize::from(!self.is_away(step))]
            .data
            .contains(uid)
    }

    /// What the processes do by themselves.
    pub fn work(&mut self, step: u64, random: &mut fastrand::Rng) {
        // What was made while the disk was away is not seen any more.
        let back = self.away_until == step;
        for kept in self.kept.values_mut() {
            if back {
                (kept.runs, kept.up) = (false, false);
            }
            kept.up |= kept.runs && random.f64() < 0.2;
        }
    }

    fn find(&mut self, uid: &str, step: u64) -> Found {
        let disk = self.disk(step);
        let data = disk.data.contains(uid);
        let rest = disk.rest.contains(uid) || disk.shells.contains(uid);
        let kept = self.kept.get(uid);
        Found {
            clients: kept
                .filter(|kept| kept.port != 0)
                .map(|kept| kept.clients.clone()),
            runs: kept.is_some_and(|kept| kept.runs),
            data,
            rest,
            purged: kept.is_some_and(|kept| kept.purged),
        }
    }

    /// As the agent's look, with what comes of it.
    pub fn look(
        &mut self,
        list: &AssignmentList,
        step: u64,
        random: &mut fastrand::Rng,
    ) -> Vec<Deed> {
        self.wanted = list.file_servers.clone();
        let mut deeds = Vec::new();
        for wanted in &list.file_servers {
            let uid = &wanted.uid;
            let found = self.find(uid, step);
            let what = todo(Some(wanted), list.restored, &found);
            let mut why = None;
            match &what {
                Todo::Serve { clients, make } => {
                    if *make {
                        self.make(uid, step);
                        deeds.push(Deed::Made(uid.clone()));
                    }
                    why = self.serve(uid, clients, step, random);
                }
                Todo::Miss => {
                    deeds.push(Deed::Missed);
                    why = Some("it is missed");
                }
                Todo::Purge if self.purge(uid, step, random) => {
                    deeds.push(Deed::Purged(uid.clone(), found.runs));
                }
                Todo::End => self.end(uid, random),
                Todo::Purge | Todo::Nothing | Todo::Gone | Todo::Forget => {}
            }
            self.done.insert(uid.clone(), (what, why));
        }
        let others = self.kept.keys().cloned().collect::<Vec<_>>();
        for uid in others {
            if list.file_servers.iter().any(|wanted| wanted.uid == uid) {
                continue;
            }
            let found = self.find(&uid, step);
            match todo(None, list.restored, &found) {
                Todo::End => self.end(&uid, random),
                Todo::Forget => drop(self.kept.remove(&uid)),
                _ => {}
            }
        }
        deeds
    }

    fn make(&mut self, uid: &str, step: u64) {
        self.disk(step).data.insert(uid.to_owned());
    }

    fn serve(
        &mut self,
        uid: &str,
        clients: &BTreeSet<String>,
        step: u64,
        random: &mut fastrand::Rng,
    ) -> Option<&'static str> {
        let others = self.kept.values().map(|kept| kept.port).collect();
        let first = PORTS.start + random.u16(..FIRST_PORTS);
        let readable = self.disk(step).data.contains(uid);
        let kept = self.kept.entry(uid.to_owned()).or_default();
        if kept.port == 0 {
            kept.port = port(first, &others, &(20_000..=20_099), |_| true)?;
        }
        kept.clients.clone_from(clients);
        kept.purged = false;
        kept.runs |= readable;
        (!readable).then_some("it cannot be read")
    }

    fn end(&mut self, uid: &str, random: &mut fastrand::Rng) {
        if let Some(kept) = self.kept.get_mut(uid)
            && random.f64() < 0.3
        {
            (kept.runs, kept.up) = (false, false);
        }
    }

    /// Goes on with it; whether something was taken away.
    fn purge(&mut self, uid: &str, step: u64, random: &mut fastrand::Rng) -> bool {
        if random.f64() > 0.2 {
            return false;
        }
        // Out of the way, and away; that is written down; what it lay in goes last.
        let purged = self.kept.get(uid).is_some_and(|kept| kept.purged);
        let disk = self.disk(step);
        if disk.data.remove(uid) {
            disk.rest.insert(uid.to_owned());
            self.kept.entry(uid.to_owned()).or_default().purged = false;
        } else if disk.rest.remove(uid) {
            disk.shells.insert(uid.to_owned());
        } else if purged {
            disk.shells.remove(uid);
        } else {
            self.kept.entry(uid.to_owned()).or_default().purged = true;
        }
        true
    }

    pub fn report(&self, address: &str) -> Vec<FileServerReport> {
        let told = self.wanted.iter().map(|wanted| {
            let uid = &wanted.uid;
            let done = self.done.get(uid).cloned();
            let (what, why) = done.unwrap_or_default();
            let kept = self.kept.get(uid).filter(|kept| kept.up);
            let place = kept.map(|kept| FileServerPlace {
                address: address.to_owned(),
                port: i32::from(kept.port),
                path: uid.clone(),
                ..FileServerPlace::default()
            });
            report(wanted, &what, place, why)
        });
        told.collect()
    }

    /// Adds what is served here.
    pub fn exports(&self, address: &str, exports: &mut Exports) {
        for (uid, kept) in self.kept.iter().filter(|(_, kept)| kept.up) {
            let at = (address.to_owned(), i32::from(kept.port));
            exports.insert(at, (uid.clone(), kept.clients.clone()));
        }
    }

    /// Whether all of these can be mounted here.
    pub fn reaches(
        &self,
        sources: &[FileServerSource],
        address: &str,
        exports: &Exports,
        step: u64,
    ) -> bool {
        sources.iter().all(|source| {
            let Some(place) = &source.place else {
                return false;
            };
            if source.local {
                return self.can_read(&source.uid, step);
            }
            let served = exports.get(&(place.address.clone(), place.port));
            served.is_some_and(|(uid, to)| *uid == source.uid && to.contains(address))
        })
    }
}
