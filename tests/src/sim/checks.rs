//! What must hold, by name, and what must be seen now and then.

use std::collections::{BTreeMap, BTreeSet};

use batchai_coordinator::replica::core::Core;
use batchai_coordinator::replica::store::memory::MemoryStore;
use batchai_coordinator::state::digest::Digest;
use batchai_coordinator::state::snapshot::records;
use batchai_coordinator::state::{State, invariants};
use prost::Message as _;

use super::Replica;
use super::agents::Agent;

/// Entries of the log after which all of the State is compared.
const WHOLE_EVERY: u64 = 16;

/// What was seen so far.
#[derive(Default)]
pub struct Checks {
    pub sometimes: BTreeSet<&'static str>,
    /// The latest revision that anybody was told of.
    pub acknowledged: i64,
    /// Jobs whose creation, and whose deletion, was acknowledged.
    pub jobs: BTreeSet<String>,
    pub deleted: BTreeSet<String>,
    /// Who led in a term.
    leaders: BTreeMap<u64, u64>,
    /// What the State is after an entry of the log, on every replica that has applied it.
    states: BTreeMap<u64, u32>,
    /// What replicas said that their State was.
    digests: BTreeMap<u64, Digest>,
    /// How jobs ended, by UUID.
    ended: BTreeMap<String, i32>,
    /// How far each replica was when it was looked at.
    looked: BTreeMap<u64, u64>,
    latest: i64,
    trace: u32,
}

impl Checks {
    pub fn saw(&mut self, what: &'static str) {
        self.sometimes.insert(what);
    }

    /// The latest revision that any replica has applied.
    pub fn revision(&self) -> i64 {
        self.latest
    }

    pub fn trace(&self) -> u32 {
        self.trace
    }

    /// A replica may have applied something.
    pub fn applied(&mut self, id: u64, core: &Core<MemoryStore>) -> Result<(), String> {
        let state = core.state();
        self.one_leader_per_term(id, core)?;
        if self.looked.get(&id) == Some(&state.applied_index) {
            return Ok(());
        }
        self.looked.insert(id, state.applied_index);
        self.latest = self.latest.max(state.revision);
        let digest = digest(state);
        self.trace = crc32fast::hash(&[self.trace.to_le_bytes(), digest.to_le_bytes()].concat());
        let known = *self.states.entry(state.applied_index).or_insert(digest);
        if known != digest {
            return Err(format!(
                "applied_prefix_equal: entry {} on {id}",
                state.applied_index
            ));
        }
        invariants::check(state)?;
        self.terminal_states_never_leave(state)
    }

    fn one_leader_per_term(&mut self, id: u64, core: &Core<MemoryStore>) -> Result<(), String> {
        let (term, leads) = core.term();
        if !leads {
            return Ok(());
        }
        let leader = *self.leaders.entry(term).or_insert(id);
        if self.leaders.len() > 1 {
            self.saw("the leader changes");
        }
        match leader == id {
            true => Ok(()),
            false => Err(format!(
                "one_leader_per_term: {leader} and {id} lead in term {term}"
            )),
        }
    }

    fn terminal_states_never_leave(&mut self, state: &State) -> Result<(), String> {
        for job in state.jobs.values().filter(|job| job.ended()) {
            let ended = job.state as i32;
            let known = *self.ended.entry(job.spec.uid.clone()).or_insert(ended);
            if known != ended {
                return Err(format!("terminal_states_never_leave: {}", job.spec.name));
            }
        }
        let open = state.jobs.values().filter(|job| !job.ended());
        // A replica that is behind does not know yet; one that is not would be wrong.
        let mut back = open.filter(|job| self.ended.contains_key(&job.spec.uid));
        match back.next().filter(|_| state.revision >= self.latest) {
            Some(job) => Err(format!(
                "terminal_states_never_leave: {} runs again",
                job.spec.name
            )),
            None => Ok(()),
        }
    }

    /// After every step.
    pub fn step(&self, agents: &[Agent]) -> Result<(), String> {
        let mut attempts: BTreeMap<&str, &str> = BTreeMap::new();
        for agent in agents {
            let running: Vec<_> = agent.running().collect();
            if running.len() > 1 {
                return Err(format!(
                    "no_two_jobs_on_one_node: {running:?} on {}",
                    agent.name()
                ));
            }
            for (attempt, job) in running {
                let known = attempts.entry(job).or_insert(attempt);
                if *known != attempt {
                    return Err(format!(
                        "one_live_attempt_of_a_job: {known} and {attempt} of {job}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// A replica says what its State was.
    pub fn compared(&mut self, id: u64, index: u64, digest: Digest) -> Result<(), String> {
        let known = *self.digests.entry(index).or_insert(digest);
        match known == digest {
            true => Ok(()),
            false => Err(format!("digests_agree: entry {index} on {id}")),
        }
    }

    /// When all is over.
    pub(super) fn at_the_end(
        &mut self,
        replicas: &mut BTreeMap<u64, Replica>,
    ) -> Result<(), String> {
        for core in replicas.values_mut().filter_map(|r| r.core.as_mut()) {
            if core.digest() != Digest::of(core.state()) {
                return Err("digests_are_whole: kept up, it is another one".to_owned());
            }
            if core.state().comparison.digest.is_some() {
                self.saw("the replicas agree on what they hold");
            }
        }
        let mut states = replicas
            .values()
            .filter_map(|r| Some(r.core.as_ref()?.state()));
        let state = states.next().ok_or("nobody runs")?;
        if states.any(|other| other != state) {
            return Err("replicas_converge: they differ in what they hold".to_owned());
        }
        if state.revision < self.acknowledged {
            return Err(format!("no_acknowledged_write_lost: {}", self.acknowledged));
        }
        let lost = self
            .jobs
            .iter()
            .find(|job| !state.jobs.contains_key(*job) && !self.deleted.contains(*job));
        match lost {
            Some(job) => Err(format!("no_acknowledged_job_lost: {job}")),
            None => Ok(()),
        }
    }
}

/// What tells States apart. All of one is looked at now and then; else the revision of everything in it.
fn digest(state: &State) -> u32 {
    let mut digest = crc32fast::Hasher::new();
    if state.applied_index.is_multiple_of(WHOLE_EVERY) {
        for record in records(state) {
            digest.update(&record.encode_to_vec());
        }
        return digest.finalize();
    }
    let mut number = |number: i64| digest.update(&number.to_le_bytes());
    number(state.revision);
    number(state.submissions);
    for job in state.jobs.values() {
        number(job.revision);
        number(job.state as i64);
    }
    for attempt in state.attempts.values() {
        number(attempt.phase as i64);
    }
    for node in state.nodes.values() {
        number(node.revision);
        number(node.assigned);
    }
    for cluster in state.clusters.values() {
        number(cluster.revision);
        number(cluster.queue.len() as i64);
    }
    digest.finalize()
}
