//! PURE. A number by which States are told apart: the sum of the numbers of their records.
//!
//! It is a sum so that only what changed need be encoded. What changed is found by going through both States side by side: the maps'
//! own `diff`, which passes over what they share, misses changes where something is removed from a large one (imbl 6.1). What follows
//! from the rest (queues, counts) is not in it. It guards against defects, not against somebody who makes a State to fit.

use std::cmp::Ordering;
use std::sync::Arc;

use batchai_common::fault;
use batchai_proto::internal::v1::SnapshotRecord;
use batchai_proto::internal::v1::snapshot_record::Kind as Record;
use imbl::{OrdMap, OrdSet};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::access::Joined;
use super::{State, stored};

/// What tells States apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest(u128);

impl Digest {
    /// The digest of a State, looking at all of it.
    pub fn of(state: &State) -> Digest {
        // An empty State has a header as well.
        let empty = State::default();
        let header = number(stored::header(&empty));
        Digest(header).advance(&empty, state)
    }

    /// The digest of a State that came of another, which had this one.
    pub fn advance(self, before: &State, after: &State) -> Digest {
        let mut sum = Sum(self.0);
        sum.replace(stored::header(before), stored::header(after));
        sum.resources(before, after);
        sum.work(before, after);
        sum.access(before, after);
        let requests = (before.requests.known(), after.requests.known());
        sum.table(requests.0, requests.1, |key, known| {
            stored::request(key, known)
        });
        sum.table(&before.replicas, &after.replicas, |_, r| {
            Record::Replica((**r).clone())
        });
        sum.table(&before.strays, &after.strays, |_, s| {
            Record::Stray((**s).clone())
        });
        Digest(sum.0)
    }

    /// As it goes over the network and into the log.
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Reads it.
    pub fn read(bytes: &[u8]) -> Option<Digest> {
        let bytes = bytes.try_into().ok()?;
        Some(Digest(u128::from_be_bytes(bytes)))
    }
}

fn number(record: Record) -> u128 {
    let record = SnapshotRecord { kind: Some(record) };
    let hash = Sha256::digest(record.encode_to_vec());
    let (first, _) = hash.split_at(16);
    u128::from_be_bytes(first.try_into().expect("it was split there"))
}

struct Sum(u128);

/// Whether a record is the one it was. Most are shared by both States, and need not be looked into.
trait Same {
    fn same(&self, other: &Self) -> bool;
}

impl<T: PartialEq> Same for Arc<T> {
    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(self, other) || self == other
    }
}

impl Same for (Arc<[u8]>, i64) {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

impl Same for Joined {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

impl Same for i64 {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

impl Sum {
    fn add(&mut self, record: Record) {
        self.0 = self.0.wrapping_add(number(record));
    }

    fn take(&mut self, record: Record) {
        self.0 = self.0.wrapping_sub(number(record));
    }

    fn replace(&mut self, before: Record, after: Record) {
        self.take(before);
        self.add(after);
    }

    fn table<K: Ord, V: Same>(
        &mut self,
        before: &OrdMap<K, V>,
        after: &OrdMap<K, V>,
        record: impl Fn(&K, &V) -> Record,
    ) {
        if before.ptr_eq(after) {
            return;
        }
        let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some((a, _)), Some((b, _))) => a.cmp(b),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return,
            };
            let gone = old.next_if(|_| order.is_le());
            let come = new.next_if(|_| order.is_ge());
            if let (Some((_, a)), Some((_, b))) = (gone, come)
                && a.same(b)
            {
                continue;
            }
            if let Some((key, value)) = gone {
                self.take(record(key, value));
            }
            if let Some((key, value)) = come {
                self.add(record(key, value));
            }
        }
    }

    fn set<T: Ord>(
        &mut self,
        before: &OrdSet<T>,
        after: &OrdSet<T>,
        record: impl Fn(&T) -> Record,
    ) {
        for value in before.iter().filter(|value| !after.contains(value)) {
            self.take(record(value));
        }
        for value in after.iter().filter(|value| !before.contains(value)) {
            self.add(record(value));
        }
    }

    fn resources(&mut self, before: &State, after: &State) {
        let (a, b) = (&before.resource_groups, &after.resource_groups);
        self.table(a, b, |_, g| Record::ResourceGroup((**g).clone()));
        let (a, b) = (&before.workspaces, &after.workspaces);
        self.table(a, b, |_, w| Record::Workspace((**w).clone()));
        let (a, b) = (&before.clusters, &after.clusters);
        self.table(a, b, |_, c| Record::Cluster(stored::cluster(c)));
        let (a, b) = (&before.experiments, &after.experiments);
        self.table(a, b, |_, e| Record::Experiment((**e).clone()));
        let (a, b) = (&before.file_servers, &after.file_servers);
        self.table(a, b, |_, s| Record::FileServer(stored::file_server(s)));
        let (a, b) = (&before.vm_size_aliases, &after.vm_size_aliases);
        self.table(a, b, |_, a| Record::VmSizeAlias((**a).clone()));
        let (a, b) = (&before.storage_aliases, &after.storage_aliases);
        self.table(a, b, |_, a| Record::StorageAlias((**a).clone()));
    }

    fn work(&mut self, before: &State, after: &State) {
        let (a, b) = (&before.attempts, &after.attempts);
        // With all that it is: whether its job is still the same says another record.
        self.table(a, b, |_, a| Record::Attempt(stored::attempt(a, false)));
        let (a, b) = (&before.jobs, &after.jobs);
        self.table(a, b, |_, j| Record::Job(stored::job(j)));
        let (a, b) = (
            &before.nodes,
            if fault!("digest_without_nodes") {
                &before.nodes
            } else {
                &after.nodes
            },
        );
        self.table(a, b, |name, n| Record::Node(stored::node(name, n)));
        let (a, b) = (&before.deleting, &after.deleting);
        self.set(a, b, |name| Record::Deleting(name.clone()));
    }

    fn access(&mut self, before: &State, after: &State) {
        let (a, b) = (&before.role_bindings, &after.role_bindings);
        self.table(a, b, |_, b| Record::RoleBinding((**b).clone()));
        let (a, b) = (&before.tokens, &after.tokens);
        self.table(a, b, |_, t| Record::Token((**t).clone()));
        let (a, b) = (&before.joined, &after.joined);
        self.table(a, b, |node, j| stored::joined(node, j));
        let (a, b) = (&before.expelled, &after.expelled);
        self.set(a, b, |(node, uid)| stored::expelled(node, uid));
        let (a, b) = (&before.revoked, &after.revoked);
        self.table(a, b, |member, until| stored::revoked(member, *until));
        let (a, b) = (&before.data_keys, &after.data_keys);
        self.table(a, b, |workspace, keys| stored::data_keys(workspace, keys));
    }
}
