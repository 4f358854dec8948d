//! PURE. Where a job fits: whole nodes, all of its nodes at once or none, and a port on each.

use batchai_common::fault;
use std::collections::BTreeSet;
use std::sync::Arc;

use batchai_proto::internal::v1::{Place, PlaceNode};

use crate::scheduler::heard::Heard;
use crate::state::attempts::ports_by_machine;
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
    if count == 0 || free.count() < count {
        return None;
    }
    let chosen = &free.nodes[..count];
    let nodes: Option<Vec<_>> = chosen
        .iter()
        .map(|(name, node)| {
            let port = ports.take(state, node)?;
            Some(PlaceNode {
                node: name.clone(),
                node_revision: node.revision,
                port,
            })
        })
        .collect();
    let nodes = nodes?;
    free.nodes.drain(..count);
    Some(Place {
        job: job.spec.name.clone(),
        job_revision: job.revision,
        nodes,
        log_home,
    })
}

/// The ports in use, by machine: nodes with the same boot id share one.
pub struct Ports {
    taken: BTreeSet<(String, i32)>,
}

impl Ports {
    /// Those of live attempts.
    pub fn of(state: &State) -> Ports {
        Ports {
            taken: ports_by_machine(state),
        }
    }

    /// The next free port of the node's range. Where to begin follows from ensemble and revision: ensembles that share
    /// a machine then seldom meet, and a port that was just given back is not given out at once.
    fn take(&mut self, state: &State, node: &Node) -> Option<i32> {
        let first = node.facts.first_port;
        let count = i64::from(node.facts.last_port) - i64::from(first) + 1;
        if count <= 0 {
            return None;
        }
        let seed = crc32fast::hash(state.ensemble.as_bytes());
        let begin = (i64::from(seed) + state.revision) % count;
        let machine = &node.facts.boot_id;
        let port = (0..count)
            .map(|i| first + ((begin + i) % count) as i32)
            .find(|port| {
                fault!("port_given_twice") || !self.taken.contains(&(machine.clone(), *port))
            })?;
        self.taken.insert((machine.clone(), port));
        Some(port)
    }
}
