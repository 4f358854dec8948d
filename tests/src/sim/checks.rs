//! What must hold, by name, and what must be seen now and then.

use std::collections::{BTreeMap, BTreeSet};

use batchai_coordinator::api::views::Resource as _;
use batchai_coordinator::duties::Heard;
use batchai_coordinator::replica::core::Core;
use batchai_coordinator::state::attempts::{self, Work};
use batchai_coordinator::state::digest::Digest;
use batchai_coordinator::state::{State, invariants};
use batchai_proto::v1;

use super::agents::Agent;
use super::disk::Disk;
use super::replicas::Replica;
use super::servers::Servers;

/// Entries of the log after which all of the State is compared, what follows from the rest included, and its digest; else the revision
/// of everything in it.
const WHOLE_EVERY: u64 = 32;
/// Whole States that are kept: a replica that is further behind gets a snapshot.
const WHOLE_KEPT: usize = 8;

/// What was seen so far.
#[derive(Default)]
pub struct Checks {
    pub sometimes: BTreeSet<&'static str>,
    /// The latest revision that anybody was told of.
    pub acknowledged: i64,
    /// Jobs whose creation, and whose deletion, was acknowledged.
    pub jobs: BTreeSet<String>,
    pub deleted: BTreeSet<String>,
    pub servers: Servers,
    /// Who led in a term, and who asked for votes in those that nobody led yet.
    leaders: BTreeMap<u64, u64>,
    candidates: BTreeMap<u64, BTreeSet<u64>>,
    /// What the State is after an entry of the log, on every replica that has applied it.
    states: BTreeMap<u64, u32>,
    whole: BTreeMap<u64, State>,
    /// What replicas said that their State was.
    digests: BTreeMap<u64, Digest>,
    /// How jobs ended, by UUID.
    ended: BTreeMap<String, i32>,
    /// How far each replica was when it was looked at, and the time in its State.
    looked: BTreeMap<u64, (u64, (i64, i32))>,
    latest: i64,
    /// The revision that the ensemble began with, and how many there were before it began anew.
    began: i64,
    before: i64,
    trace: u32,
}

impl Checks {
    pub fn saw(&mut self, what: &'static str) {
        self.sometimes.insert(what);
    }

    /// Commands that were applied.
    pub fn commands(&self) -> i64 {
        self.before + self.latest - self.began
    }

    /// Everything begins anew with the State of a backup: what came after it is forgotten, and nothing of it is used again.
    pub fn restored(&mut self, state: &State) -> Result<(), String> {
        invariants::check(state)?;
        self.servers.restored(state);
        if state.revision <= self.latest {
            return Err(format!("revisions_are_used_once: {}", state.revision));
        }
        self.before = self.commands();
        (self.began, self.latest) = (state.revision, state.revision);
        self.acknowledged = state.revision;
        self.jobs
            .retain(|job| state.jobs.contains_key(job.as_str()));
        self.deleted.retain(|job| {
            let job = state.jobs.get(job.as_str());
            job.is_none_or(|job| job.deleting.is_some())
        });
        let ended = state.jobs.values().filter(|job| job.ended());
        self.ended = ended
            .map(|job| (job.spec.uid.clone(), job.state as i32))
            .collect();
        self.leaders.clear();
        self.candidates.clear();
        self.states.clear();
        self.whole.clear();
        self.digests.clear();
        self.looked.clear();
        Ok(())
    }

    pub fn trace(&self) -> u32 {
        self.trace
    }

    /// A replica may have applied something.
    pub fn applied(&mut self, id: u64, core: &mut Core<Disk>, heard: &Heard) -> Result<(), String> {
        self.one_leader_per_term(id, core)?;
        let index = core.state().applied_index;
        if self
            .looked
            .get(&id)
            .is_some_and(|(known, _)| *known == index)
        {
            return Ok(());
        }
        self.time_never_goes_back(id, core.state())?;
        let mut digest = revisions(core.state());
        if index.is_multiple_of(WHOLE_EVERY) {
            // It is kept up with what changed, and compared with the one of the whole in the end.
            digest.update(&core.digest().bytes());
        }
        let (state, digest) = (core.state(), digest.finalize());
        self.latest = self.latest.max(state.revision);
        self.trace = crc32fast::hash(&[self.trace.to_le_bytes(), digest.to_le_bytes()].concat());
        if let Some(known) = self.states.insert(index, digest) {
            self.applied_prefix_equal(id, state, known == digest)?;
        } else {
            // What is equal need be looked at once.
            if index.is_multiple_of(WHOLE_EVERY) {
                self.whole.insert(index, state.clone());
            }
            while self.whole.len() > WHOLE_KEPT {
                self.whole.pop_first();
            }
            invariants::check(state)?;
            gangs_are_whole(state)?;
            if state.jobs.values().any(|job| job.retries > 0) {
                self.saw("a failed run is tried again");
            }
            self.terminal_states_never_leave(state)?;
            if state.revision == self.latest {
                let saw = self.servers.applied(state)?;
                self.sometimes.extend(saw);
            }
        }
        match index.is_multiple_of(WHOLE_EVERY) {
            true => node_counts_add_up(state, heard),
            false => Ok(()),
        }
    }

    /// What anybody has applied is committed: nobody ever has another entry there.
    fn applied_prefix_equal(&self, id: u64, state: &State, equal: bool) -> Result<(), String> {
        let index = state.applied_index;
        let whole = self.whole.get(&index).is_none_or(|whole| whole == state);
        match equal && whole {
            true => Ok(()),
            false => Err(format!(
                "applied_prefix_equal, committed_never_lost: entry {index} on {id}"
            )),
        }
    }

    fn time_never_goes_back(&mut self, id: u64, state: &State) -> Result<(), String> {
        let now = (state.time.seconds, state.time.nanos);
        let news = (state.applied_index, now);
        match self.looked.insert(id, news) {
            // One that started again has less than it had.
            Some((index, before)) if index < state.applied_index && before > now => {
                Err(format!("time_never_goes_back: {before:?}, {now:?} on {id}"))
            }
            _ => Ok(()),
        }
    }

    /// A replica asks for votes.
    pub fn campaigns(&mut self, term: u64, id: u64) {
        self.candidates.entry(term).or_default().insert(id);
    }

    fn one_leader_per_term(&mut self, id: u64, core: &Core<Disk>) -> Result<(), String> {
        let (term, leads) = core.term();
        if !leads {
            return Ok(());
        }
        if let Some(leader) = self.leaders.get(&term) {
            return match *leader == id {
                true => Ok(()),
                false => Err(format!(
                    "one_leader_per_term: {leader} and {id} lead in term {term}"
                )),
            };
        }
        self.leaders.insert(term, id);
        if self.leaders.len() > 1 {
            self.saw("the leader changes");
        }
        let later = self.candidates.split_off(&term);
        let earlier = std::mem::replace(&mut self.candidates, later);
        let split =
            |(term, all): (&u64, &BTreeSet<u64>)| all.len() > 1 && !self.leaders.contains_key(term);
        if earlier.iter().any(split) {
            self.saw("a vote is split");
        }
        Ok(())
    }

    fn terminal_states_never_leave(&mut self, state: &State) -> Result<(), String> {
        for job in state.jobs.values().filter(|job| job.ended()) {
            let ended = job.state as i32;
            match self.ended.get(&job.spec.uid) {
                Some(known) if *known != ended => {
                    return Err(format!("terminal_states_never_leave: {}", job.spec.name));
                }
                Some(_) => {}
                None => drop(self.ended.insert(job.spec.uid.clone(), ended)),
            }
        }
        // A replica that is behind does not know yet; one that is not would be wrong.
        if state.revision < self.latest {
            return Ok(());
        }
        let open = state.jobs.values().filter(|job| !job.ended());
        let mut back = open.filter(|job| self.ended.contains_key(&job.spec.uid));
        match back.next() {
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
        members: &[u64],
    ) -> Result<(), String> {
        replicas.retain(|id, _| members.contains(id));
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
            .find(|job| !state.jobs.contains_key(job.as_str()) && !self.deleted.contains(*job));
        match lost {
            Some(job) => Err(format!("no_acknowledged_job_lost: {job}")),
            None => Ok(()),
        }
    }
}

/// An attempt has as many nodes as its job asks for, or there is none; that they are busy with it and nobody else's is an invariant of
/// every State.
fn gangs_are_whole(state: &State) -> Result<(), String> {
    for attempt in attempts::live(state) {
        let wanted = match attempt.work {
            Work::Job(_) => attempt.spec.node_count as usize,
            Work::SetUp => 1,
        };
        let nodes: BTreeSet<_> = attempt.nodes.iter().map(|n| &n.node).collect();
        let there = nodes.iter().all(|name| {
            let node = state.nodes.get(*name);
            node.is_some_and(|node| node.attempt.as_ref() == Some(&attempt.id))
        });
        if nodes.len() != wanted || attempt.nodes.len() != wanted || !there {
            let id = &attempt.id;
            return Err(format!("gangs_are_whole: {id}: {nodes:?} of {wanted}"));
        }
    }
    Ok(())
}

/// The nodes of a cluster that a reply counts are those that the State has, each counted once, and as what it is.
fn node_counts_add_up(state: &State, heard: &Heard) -> Result<(), String> {
    for name in state.clusters.keys() {
        let view = v1::Cluster::view(state, heard, name).ok_or("a cluster is not shown")?;
        let counts = view.node_state_counts.unwrap_or_default();
        let all = counts.idle_node_count
            + counts.running_node_count
            + counts.leaving_node_count
            + counts.preparing_node_count
            + counts.unusable_node_count;
        let mine = |node: &&std::sync::Arc<batchai_coordinator::state::Node>| {
            node.cluster.as_ref() == Some(name)
        };
        let nodes: Vec<_> = state.nodes.values().filter(mine).collect();
        let busy = nodes.iter().filter(|node| node.attempt.is_some()).count();
        let leaving = nodes.iter().filter(|node| node.leaving).count();
        let right = all == view.current_node_count
            && all as usize == nodes.len()
            && counts.running_node_count as usize <= busy
            && counts.idle_node_count as usize + busy <= nodes.len()
            && counts.leaving_node_count as usize <= leaving;
        if !right {
            return Err(format!("node_counts_add_up: {name}: {counts:?}"));
        }
    }
    Ok(())
}

/// What tells States apart without looking at all of them.
fn revisions(state: &State) -> crc32fast::Hasher {
    let mut digest = crc32fast::Hasher::new();
    let mut number = |number: i64| digest.update(&number.to_le_bytes());
    number(state.revision);
    number(state.submissions);
    number(state.time.seconds);
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
    for replica in state.replicas.values() {
        number(replica.role.into());
    }
    digest
}
