//! PURE. Where a job fits: whole nodes, all of its nodes at once or none, and ports on each. What a node could not run goes to the ones behind it
//! first, so that its few tries by infrastructure do not all end where the first did.

use batchai_common::fault;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use batchai_proto::internal::v1::{Place, PlaceNode};

use crate::scheduler::heard::Heard;
use crate::scheduler::images;
use crate::state::attempts::{Verdict, port_count, ports_by_machine};
use crate::state::{Cluster, Job, Node, State};
use crate::state::{restore, setup};

/// The nodes of a cluster that wait for work, by name.
pub struct Free {
    nodes: Vec<(String, Arc<Node>)>,
}

impl Free {
    /// A node is free when it is idle and set up, is not leaving and was heard of lately.
    pub fn of(state: &State, heard: &Heard, cluster: &Cluster) -> Free {
        let members = cluster
            .members
            .iter()
            .filter_map(|n| Some((n, state.nodes.get(n)?)));
        let free = members.filter(|(name, node)| {
            let idle = node.attempt.is_none() && !node.leaving;
            idle && heard.is_alive(name)
                && setup::is_done(state, node)
                && !restore::may_hold_strays(state, name)
        });
        Free {
            nodes: free
                .map(|(name, node)| (name.clone(), node.clone()))
                .collect(),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Where those are that can have the image of a job.
    fn able(&self, job: &Job) -> impl Iterator<Item = usize> {
        let all = self.nodes.iter().enumerate();
        all.filter(|(_, (_, node))| images::has(node, &job.spec))
            .map(|(at, _)| at)
    }

    /// How many can have the image of a job.
    pub fn count_for(&self, job: &Job) -> usize {
        self.able(job).count()
    }
}

/// The node that the latest try of a job failed on, where the job was not to blame.
fn failed_on<'a>(state: &'a State, job: &Job) -> Option<&'a str> {
    let latest = state.attempts.get(job.attempt.as_ref()?)?;
    let outcome = latest.outcome.as_ref()?;
    if !matches!(
        outcome.verdict,
        Verdict::InfrastructureFailed | Verdict::Requeue
    ) {
        return None;
    }
    let mut details = outcome.errors.iter().flat_map(|error| &error.details);
    let node = details.find(|detail| detail.name == "node")?;
    Some(&node.value)
}

/// Takes the job's nodes out of `free`, or leaves it alone where they do not suffice.
pub fn place(
    state: &State,
    free: &mut Free,
    ports: &mut Ports,
    job: &Job,
    log_home: i64,
) -> Option<Place> {
    let count = usize::try_from(job.spec.node_count).ok()?;
    let last = failed_on(state, job);
    let is_behind = |at: &usize| last.is_some_and(|last| *free.nodes[*at].0 > *last);
    let (behind, before): (Vec<_>, Vec<_>) = free.able(job).partition(is_behind);
    let mut chosen: Vec<_> = behind.into_iter().chain(before).take(count).collect();
    // Which they are changes, and not the order of those that are the same: what the first one does others may not be able to do.
    chosen.sort_unstable();
    if count == 0 || chosen.len() < count {
        return None;
    }
    let nodes: Option<Vec<_>> = chosen
        .iter()
        .enumerate()
        .map(|(i, at)| {
            let (name, node) = &free.nodes[*at];
            let port = ports.take(state, node, port_count(&job.spec, i))?;
            Some(PlaceNode {
                node: name.clone(),
                node_revision: node.revision,
                port,
            })
        })
        .collect();
    let nodes = nodes?;
    // The last first: the others stay where they were.
    for at in chosen.into_iter().rev() {
        free.nodes.remove(at);
    }
    Some(Place {
        job: job.spec.name.clone(),
        job_revision: job.revision,
        nodes,
        log_home,
    })
}

/// The ports in use, by machine: nodes with the same boot id share one.
pub struct Ports {
    taken: BTreeMap<String, BTreeSet<i32>>,
}

impl Ports {
    /// Those of live attempts.
    pub fn of(state: &State) -> Ports {
        let mut taken = BTreeMap::<_, BTreeSet<_>>::new();
        for (machine, port) in ports_by_machine(state) {
            taken.entry(machine).or_default().insert(port);
        }
        Ports { taken }
    }

    /// The first of so many free ports of the node's range, one after the other. Where to begin follows from ensemble and revision:
    /// ensembles that share a machine then seldom meet, and a port that was just given back is not given out at once.
    fn take(&mut self, state: &State, node: &Node, wanted: i32) -> Option<i32> {
        let first = node.facts.first_port;
        let last = node.facts.last_port;
        // Where such a row can begin.
        let count = i64::from(last) - i64::from(first) + 2 - i64::from(wanted);
        if count <= 0 {
            return None;
        }
        let seed = crc32fast::hash(state.ensemble.as_bytes());
        let begin = (i64::from(seed) + state.revision) % count;
        let taken = self.taken.entry(node.facts.boot_id.clone()).or_default();
        let mut at = 0;
        while at < count {
            let offset = (begin + at) % count;
            let port = first + offset as i32;
            let row = port..port + wanted;
            match taken.range(row.clone()).next_back() {
                Some(in_use) if !fault!("port_given_twice") => {
                    // No row that has it is free: the next one begins behind it, or anew with the first port.
                    at += i64::from(*in_use + 1 - port).min(count - offset);
                }
                _ => {
                    taken.extend(row);
                    return Some(port);
                }
            }
        }
        None
    }
}
