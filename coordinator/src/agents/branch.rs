//! The live sessions that another replica has, as the leader holds them. How it is told of them is not decided here.

use std::collections::BTreeMap;

use super::contacts::{Contacts, Live};
use crate::state::limit;
use batchai_common::names::Kind;

/// The sessions of one replica.
pub struct Branch {
    contacts: Contacts,
    held: BTreeMap<String, Held>,
}

/// A session that is with the replica.
struct Held {
    /// By its count.
    session: u64,
    live: Live,
    /// The latest heartbeat that it was told is granted.
    granted: u64,
}

impl Branch {
    /// One that has none.
    pub fn new(contacts: Contacts) -> Branch {
        Branch {
            contacts,
            held: BTreeMap::new(),
        }
    }

    /// Claims the live session of a node; `false` where another has it, or the replica has more than there may be nodes.
    pub fn hold(&mut self, node: &str, session: u64, now: i64) -> bool {
        // What it says last is so.
        self.held.remove(node);
        if self.held.len() >= limit(Kind::Node) {
            return false;
        }
        let Some(live) = self.contacts.claim_for_another(node) else {
            return false;
        };
        live.heard(now);
        let held = Held {
            session,
            live,
            granted: 0,
        };
        self.held.insert(node.to_owned(), held);
        true
    }

    /// A session is over. Says whether it was held.
    pub fn release(&mut self, node: &str, session: u64) -> bool {
        let held = self.held.get(node);
        let same = held.is_some_and(|held| held.session == session);
        if same {
            self.held.remove(node);
        }
        same
    }

    /// A heartbeat has come; one of a session that is not held counts for nothing.
    pub fn beat(&self, node: &str, session: u64, number: u64, now: i64) {
        let held = self.held.get(node);
        if let Some(held) = held.filter(|held| held.session == session) {
            held.live.beat(number, now);
        }
    }

    /// Nodes, sessions, and heartbeats of them that were granted since this was asked last.
    pub fn granted(&mut self) -> Vec<(String, u64, u64)> {
        let granted = self.held.iter_mut().filter_map(|(node, held)| {
            let number = held.live.granted();
            (number > held.granted).then(|| {
                held.granted = number;
                (node.clone(), held.session, number)
            })
        });
        granted.collect()
    }

    /// Whether a node's live session is with the replica.
    pub fn holds(&self, node: &str) -> bool {
        self.held.contains_key(node)
    }

    /// Whose sessions they are.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.held.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_and_an_end_of_another_session_count_for_nothing() {
        let contacts = Contacts::default();
        let mut branch = Branch::new(contacts.clone());
        assert!(branch.hold("nodes/a", 7, 1));
        assert!(!Branch::new(contacts.clone()).hold("nodes/a", 1, 1));
        branch.beat("nodes/a", 6, 3, 2);
        assert_eq!(contacts.beats(), []);
        branch.beat("nodes/a", 7, 4, 2);
        contacts.grant(&contacts.beats()[0]);
        assert_eq!(branch.granted(), [("nodes/a".to_owned(), 7, 4)]);
        assert_eq!(branch.granted(), []);
        assert!(!branch.release("nodes/a", 6) && branch.holds("nodes/a"));
        assert!(branch.release("nodes/a", 7));
        assert!(contacts.claim("nodes/a").is_some());
    }
}
