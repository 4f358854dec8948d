//! Nodes are lost in all ways that a network and a machine have, while jobs run there that may begin elsewhere, and one that must not.
//!
//! Each process stamps a file of its own with the boot clock of the machine that all of them share: what was begun anew must have its first
//! stamp behind the last of what there was before.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::network::Network;
use crate::replicas::Replicas;

/// Machines: three with a replica each, of which two have a node as well, and some with a node alone.
const MACHINES: u64 = 9;
const NODES: std::ops::RangeInclusive<u64> = 2..=MACHINES;
/// Jobs that lose their nodes at once; there is room elsewhere for all of them, and for the one that waits.
const JOBS: usize = 3;
const LEASE_S: &str = "20";
/// A lease, its margin, an election and a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(150);

const STAMP: &str = r#"python3 -c '
import os, sys, time
name, go = sys.argv[1], sys.argv[2]
stamps = os.open(f"{name}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
while not os.path.exists(go):
    os.write(stamps, f"{time.clock_gettime(time.CLOCK_BOOTTIME)}\n".encode())
    time.sleep(0.01)
' NAME NAME.go"#;

/// How a node is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Its agent stands still.
    Stopped,
    /// Its agent is gone, and is not begun again.
    Killed,
    /// Its machine is cut off, without its noticing.
    CutOff,
    /// The same, with a replica on it.
    CutOffWithAReplica,
}

/// What was gone through.
#[derive(Debug)]
pub struct Outcome {
    pub rounds: usize,
    /// How often nodes were lost how.
    pub ways: BTreeMap<Way, usize>,
    /// Seconds from the last sign of what there was before to the first of what was begun anew, at least and at most.
    pub gap: (f64, f64),
    pub took: Duration,
}

struct World {
    e: Replicas,
    network: Network,
    lost: BTreeMap<u64, Way>,
    ways: BTreeMap<Way, usize>,
}

/// So many jobs lose their nodes, some at a time. None where there can be no such network.
///
/// # Panics
/// Two runs of a job overlapped, or one that was to wait did not.
pub fn node_loss(rounds: usize) -> Option<Outcome> {
    let begin = Instant::now();
    let network = Network::new("loss", MACHINES)?;
    let e = network.replicas(&["--lease", LEASE_S]);
    let mut world = World {
        e,
        network,
        lost: BTreeMap::new(),
        ways: BTreeMap::new(),
    };
    for machine in NODES {
        world.start_agent(machine);
    }
    world.until_alive();
    world.e.create_cluster(NODES.count());
    world.submit("waits", "WAIT");
    let (mut done, mut gaps) = (0, Vec::new());
    while done < rounds {
        let jobs = JOBS.min(rounds - done);
        let names: Vec<_> = (done..done + jobs).map(|job| format!("j{job}")).collect();
        gaps.extend(world.round(&names));
        done += jobs;
    }
    assert_eq!(world.lives("waits").len(), 1, "it was to wait, and did not");
    world.let_go("waits");
    let min = gaps.iter().copied().fold(f64::INFINITY, f64::min);
    let max = gaps.iter().copied().fold(0.0, f64::max);
    Some(Outcome {
        rounds,
        ways: world.ways.clone(),
        gap: (min, max),
        took: begin.elapsed(),
    })
}

impl World {
    fn start_agent(&mut self, machine: u64) {
        let (prefix, all) = (self.network.on(machine), self.e.list());
        self.e.start_agent_by(&prefix, &format!("n{machine}"), &all);
    }

    fn until(&self, what: &str, mut so: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !so() {
            assert!(Instant::now() < end, "waited too long: {what}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn until_alive(&self) {
        self.until("all nodes to be in contact", || {
            let nodes = self.e.json_at(&self.e.list(), &["node", "list"]);
            let nodes = nodes.as_array().cloned().unwrap_or_default();
            let alive = nodes.iter().filter(|node| node["state"] != "UNUSABLE");
            alive.count() == NODES.count()
        });
    }

    fn stamps(&self, name: &str) -> PathBuf {
        self.e.path().join(name)
    }

    fn submit(&self, name: &str, on_node_loss: &str) {
        let command = STAMP.replace("NAME", &self.stamps(name).to_string_lossy());
        self.e.submit_with(
            name,
            json!({
                "nodeCount": 1,
                "onNodeLoss": on_node_loss,
                "customToolkitSettings": { "commandLine": command },
            }),
        );
        self.until("a job to run", || {
            self.e.job(name)["state"] == "RUNNING" && self.lives(name).len() == 1
        });
    }

    fn let_go(&self, name: &str) {
        let go = self.e.path().join(format!("{name}.go"));
        fs::write(go, "").expect("the directory is writable");
        self.until("a job to end", || {
            let state = self.e.job(name)["state"].clone();
            assert_ne!(state, "FAILED", "{}", self.e.job(name));
            state == "SUCCEEDED"
        });
    }

    /// The first and the last stamp of each process of a job, in the order in which they began.
    fn lives(&self, name: &str) -> Vec<(f64, f64)> {
        let prefix = format!("{name}.");
        let entries = fs::read_dir(self.e.path()).expect("it is there");
        let files = entries.flatten().filter(|entry| {
            let file = entry.file_name().to_string_lossy().into_owned();
            let number = file.strip_prefix(&prefix).map(str::parse::<u32>);
            matches!(number, Some(Ok(_)))
        });
        let lives = files.filter_map(|file| {
            let text = fs::read_to_string(file.path()).ok()?;
            // One that was being written when its process was killed is no number.
            let mut stamps = text.lines().filter_map(|line| line.parse::<f64>().ok());
            let first = stamps.next()?;
            Some((first, stamps.next_back().unwrap_or(first)))
        });
        let mut lives: Vec<_> = lives.collect();
        lives.sort_by(|a, b| a.0.total_cmp(&b.0));
        lives
    }

    /// Some jobs lose their nodes, are begun anew elsewhere, and end there; then all nodes are back. Returns how long nothing of each ran.
    fn round(&mut self, names: &[String]) -> Vec<f64> {
        for name in names {
            self.submit(name, "REQUEUE");
        }
        let all = names.iter().map(String::as_str).chain(["waits"]);
        for name in all.collect::<Vec<_>>() {
            let job = self.e.job(name);
            let node = job["attempt"]["nodes"][0]["node"].as_str();
            let number = node.and_then(|node| node.strip_prefix("nodes/n")?.parse().ok());
            self.lose(number.unwrap_or_else(|| panic!("no node: {job}")));
        }
        self.until("the jobs to be begun anew", || {
            names.iter().all(|name| self.lives(name).len() == 2)
        });
        for name in names {
            self.let_go(name);
        }
        self.find_again();
        let gaps = names.iter().map(|name| {
            let lives = self.lives(name);
            assert_eq!(lives.len(), 2, "{name} was begun again: {lives:?}");
            let gap = lives[1].0 - lives[0].1;
            assert!(gap > 0.0, "{name} ran twice at once: {lives:?}");
            gap
        });
        gaps.collect()
    }

    fn lose(&mut self, machine: u64) {
        let cut = self
            .lost
            .values()
            .any(|way| *way == Way::CutOffWithAReplica);
        let way = match fastrand::u32(..3) {
            0 => Way::Stopped,
            1 => Way::Killed,
            // A majority is left.
            _ if machine <= 3 && cut => Way::Killed,
            _ if machine <= 3 => Way::CutOffWithAReplica,
            _ => Way::CutOff,
        };
        let agent = self.e.agents.get_mut(&format!("n{machine}"));
        let agent = agent.expect("every node has one");
        match way {
            Way::Stopped => agent.signal(Signal::SIGSTOP),
            Way::Killed => agent.kill(),
            Way::CutOff | Way::CutOffWithAReplica => self.network.lose(machine, true),
        }
        *self.ways.entry(way).or_default() += 1;
        self.lost.insert(machine, way);
    }

    /// Everything is as it was.
    fn find_again(&mut self) {
        for (machine, way) in std::mem::take(&mut self.lost) {
            match way {
                Way::Stopped => self.e.agents[&format!("n{machine}")].signal(Signal::SIGCONT),
                Way::Killed => self.start_agent(machine),
                Way::CutOff | Way::CutOffWithAReplica => self.network.lose(machine, false),
            }
        }
        self.until_alive();
    }
}
