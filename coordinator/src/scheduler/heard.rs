//! PURE. What a replica heard of the nodes, and since when it has seen what: not part of the State.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use batchai_common::fault;
use batchai_common::limits::{LEASE_DRIFT, LEASE_MARGIN, SUSPECT_AFTER};
use batchai_proto::internal::v1::RecordReplica;

use crate::state::State;
use crate::state::attempts::{self, Phase};

/// Since when attempts are where they shall not be for long: kept from one look at the State to the next, by the boot clock.
#[derive(Clone, Debug, Default)]
pub struct Since {
    /// Each attempt that prepares.
    pub preparing: BTreeMap<String, i64>,
    /// Each node, by attempt and name, that is heard of and has not said that it started the processes of an attempt whose nodes all
    /// were ready. One that falls silent is not among them: its lease decides then.
    pub launching: BTreeMap<(String, String), i64>,
}

impl Since {
    /// Looks at a State: what is as it was keeps its time.
    pub fn look(&mut self, state: &State, heard: &Heard) {
        let (mut preparing, mut launching) = (BTreeMap::new(), BTreeMap::new());
        for attempt in attempts::live(state) {
            let unstarted = attempt.unstarted();
            for (_, node) in unstarted.filter(|(_, node)| heard.is_alive(&node.node)) {
                let key = (attempt.id.clone(), node.node.clone());
                let since = self.launching.get(&key).copied();
                launching.insert(key, since.unwrap_or(heard.now));
            }
            if attempt.phase == Phase::Preparing {
                let since = self.preparing.get(&attempt.id).copied();
                preparing.insert(attempt.id.clone(), since.unwrap_or(heard.now));
            }
        }
        *self = Since {
            preparing,
            launching,
        };
    }
}

/// All times are milliseconds of the boot clock of the machine that asks, so that no jump of its wall clock matters;
/// only `wall` is for people.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub now: i64,
    /// The wall clock at `now`, in milliseconds since 1970.
    pub wall: i64,
    /// When each node was last heard of.
    pub last: BTreeMap<String, i64>,
    /// Since when attempts are seen to be where they are, as far as that matters.
    pub since: Since,
    /// In which term this replica leads and since when, where it does, and when the heartbeats came for which nodes have their leases.
    pub leading: Option<(u64, i64)>,
    pub granted: Arc<BTreeMap<String, i64>>,
    /// The replicas that were met, this one included.
    pub replicas: Vec<RecordReplica>,
    /// The ids of data keys that cannot be opened here: what is sealed by them cannot run.
    pub closed: Arc<BTreeSet<String>>,
}

impl Heard {
    /// The node was heard of lately enough to be given work.
    pub fn is_alive(&self, node: &str) -> bool {
        let limit = SUSPECT_AFTER.as_millis() as i64;
        self.last
            .get(node)
            .is_some_and(|last| self.now - last < limit)
    }

    /// Whether this replica leads, and has for so long.
    pub fn leads_for(&self, time: Duration) -> bool {
        let since = self.leading.map(|(_, since)| since);
        since.is_some_and(|since| self.now - since >= time.as_millis() as i64)
    }

    /// Nothing that is fenced runs on the node any more: no leader can have granted it a lease that is not over there. Clocks run differently
    /// fast, and a lease is counted from earlier there than here.
    pub fn lease_is_over(&self, node: &str, longest_ms: i64) -> bool {
        let margin = longest_ms / LEASE_DRIFT + LEASE_MARGIN.as_millis() as i64;
        // Who is heard of is not lost, whether it has its first grant already or not.
        let latest = self.granted.get(node).max(self.last.get(node)).copied();
        let over = |since: i64| self.now - latest.unwrap_or(since).max(since) > longest_ms + margin;
        let since = match fault!("new_leader_does_not_wait") {
            true => Some(0),
            false => self.leading.map(|(_, since)| since),
        };
        longest_ms > 0 && since.is_some_and(over)
    }

    /// When the node was last heard of, by the wall clock.
    pub fn last_wall(&self, node: &str) -> Option<i64> {
        self.last
            .get(node)
            .map(|last| self.wall - (self.now - last))
    }
}
