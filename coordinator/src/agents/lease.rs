//! PURE. Leases of nodes, as the leader grants them: for a heartbeat that came before a round in which a majority confirmed that
//! this replica leads.
//!
//! An agent counts from the moment at which it sent the heartbeat, so what it holds ends before what the leader remembers of it. A leader
//! that does not know it has been replaced gets no majority, and grants nothing. A new one knows of no grants, and takes no
//! node for lost before what any leader before it can have granted is over. Who asks for the majority, and who carries the grants, is not decided
//! here; nor what becomes of the work of a node whose lease is over (see `duties`).

use std::collections::BTreeMap;

use batchai_common::fault;

/// A node's latest heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    pub node: String,
    /// The number of the session that it came in, by this replica's count.
    pub session: u64,
    /// Its number, by the node's count.
    pub number: u64,
    /// When it came, or later.
    pub arrived: i64,
}

/// What one replica has granted. All times are milliseconds of its machine's boot clock.
#[derive(Clone, Debug, Default)]
pub struct Leases {
    leading: Option<Leading>,
    round: Option<Round>,
}

#[derive(Clone, Debug)]
struct Leading {
    term: u64,
    since: i64,
    /// When the heartbeat came for which each node has its lease.
    granted: BTreeMap<String, i64>,
}

/// A majority is being asked.
#[derive(Clone, Debug)]
struct Round {
    term: u64,
    beats: Vec<Beat>,
}

impl Leases {
    /// In which term this replica leads now, if it does. Says whether that is another than before.
    pub fn look(&mut self, term: Option<u64>, now: i64) -> bool {
        let changed = self.leading.as_ref().map(|leading| leading.term) != term;
        if changed {
            self.leading = term.map(|term| Leading {
                term,
                since: now,
                granted: BTreeMap::new(),
            });
        }
        changed
    }

    /// The heartbeats that came so far are to be granted. Says whether a majority is to be asked: from now on, not before.
    pub fn begin(&mut self, beats: Vec<Beat>) -> bool {
        let Some(leading) = &self.leading else {
            return false;
        };
        let new = |beat: &Beat| {
            let granted = leading.granted.get(&beat.node);
            granted.is_none_or(|granted| *granted < beat.arrived)
        };
        let beats: Vec<_> = beats.into_iter().filter(new).collect();
        let asked = !beats.is_empty();
        self.round = asked.then_some(Round {
            term: leading.term,
            beats,
        });
        asked
    }

    /// A majority has answered, or has not in time. Returns the heartbeats that are granted.
    pub fn end(&mut self, majority: bool) -> Vec<Beat> {
        let Some(round) = self
            .round
            .take()
            .filter(|_| majority || fault!("granted_without_a_majority"))
        else {
            return Vec::new();
        };
        // The majority may have spoken for another leader by now.
        let same = |l: &&mut Leading| l.term == round.term || fault!("granted_in_another_term");
        let Some(leading) = self.leading.as_mut().filter(same) else {
            return Vec::new();
        };
        for beat in &round.beats {
            leading.granted.insert(beat.node.clone(), beat.arrived);
        }
        round.beats
    }

    /// In which term this replica leads and since when, and the latest heartbeats that it has granted.
    pub fn granted(&self) -> Option<(u64, i64, &BTreeMap<String, i64>)> {
        let leading = self.leading.as_ref()?;
        Some((leading.term, leading.since, &leading.granted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(number: u64, arrived: i64) -> Vec<Beat> {
        vec![Beat {
            node: "nodes/a".into(),
            session: 1,
            number,
            arrived,
        }]
    }

    #[test]
    fn a_leader_grants_what_came_before_a_majority_spoke() {
        let mut leases = Leases::default();
        assert!(!leases.begin(beat(1, 5)), "it does not lead");
        leases.look(Some(3), 10);
        assert!(leases.begin(beat(2, 11)));
        assert_eq!(leases.end(true), beat(2, 11));
        assert_eq!(leases.granted().unwrap().2["nodes/a"], 11);
        assert!(!leases.begin(beat(2, 11)), "there is nothing new");
        assert!(leases.begin(beat(3, 20)));
        assert_eq!(leases.end(false), []);
        assert_eq!(leases.granted().unwrap().2["nodes/a"], 11);
        assert_eq!(leases.end(true), [], "the round is over");
    }

    #[test]
    fn who_was_replaced_grants_nothing_and_who_leads_again_begins_anew() {
        let mut leases = Leases::default();
        leases.look(Some(3), 10);
        leases.begin(beat(1, 11));
        leases.look(None, 12);
        assert_eq!(leases.end(true), []);
        leases.look(Some(3), 13);
        leases.begin(beat(1, 14));
        leases.look(Some(5), 15);
        assert_eq!(leases.end(true), [], "it was asked in another term");
        let (term, since, granted) = leases.granted().unwrap();
        assert!((term, since) == (5, 15) && granted.is_empty());
    }
}
