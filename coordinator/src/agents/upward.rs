//! PURE. What a replica tells the leader of the agents' sessions that it has, and when it has told nobody for too long.
//!
//! A session is live when the leader says so: no node has two, whatever replicas they are with. A leader that is new to them is told of
//! all of them. Who is told nothing new is asked all the same, for a sign of life: a replica that no leader answers must let its
//! agents go, which find another one. How it is told, and what agents hear of it, is not decided here.

use std::collections::BTreeMap;

use batchai_common::fault;
use batchai_proto::internal::v1::{
    NodeBeat, NodeSession, RelayRequest, RelayResponse, RelayedAnswer, RelayedQuestion,
};

/// A session that the replica has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub node: String,
    /// Its number, by the replica's count.
    pub session: u64,
    /// Its latest heartbeat, by the agent's count; 0 before the first.
    pub beat: u64,
}

/// What the leader has said, as far as others have to act on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Taken {
    /// Whether sessions are the live ones of their nodes.
    pub standings: Vec<(NodeSession, bool)>,
    pub answers: Vec<RelayedAnswer>,
    pub questions: Vec<RelayedQuestion>,
}

/// What one leader was told. All times are milliseconds of the machine's boot clock.
#[derive(Clone, Debug, Default)]
pub struct Upward {
    told: BTreeMap<String, Told>,
    /// Grants that wait for the State here, by node.
    granted: BTreeMap<String, Granted>,
    /// When a leader answered last, if one ever did.
    answered: Option<i64>,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    session: u64,
    accepted: bool,
    beat: u64,
}

/// A heartbeat is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Granted {
    revision: i64,
    session: u64,
    beat: u64,
}

impl Upward {
    /// From now on it is another leader, or one that may have forgotten.
    pub fn begin(&mut self) {
        self.told.clear();
        self.granted.clear();
    }

    /// Takes in what the leader says.
    pub fn take(&mut self, response: RelayResponse, now: i64) -> Taken {
        self.reached(now);
        let (mut accepted, refused) = (response.accepted, response.refused);
        accepted.retain(|session| self.accepted(session));
        let accepted = accepted.into_iter().map(|session| (session, true));
        let refused = refused.into_iter().map(|session| (session, false));
        for beat in response.granted {
            self.granted(response.revision, beat);
        }
        Taken {
            standings: accepted.chain(refused).collect(),
            answers: response.answers,
            questions: response.questions,
        }
    }

    /// The leader has granted a heartbeat, when its State was at this revision. It may have given work of the node away before: an agent must
    /// not hear of its lease before it can hear of that.
    fn granted(&mut self, revision: i64, beat: NodeBeat) {
        let NodeSession { node, session } = beat.session.unwrap_or_default();
        let granted = Granted {
            revision,
            session,
            beat: beat.number,
        };
        self.granted.insert(node, granted);
    }

    /// The grants that may be passed on where the State is at this revision.
    pub fn due(&mut self, revision: i64) -> Vec<Known> {
        let mut due = Vec::new();
        self.granted.retain(|node, granted| {
            let later = granted.revision > revision && !fault!("granted_before_the_state");
            if !later {
                due.push(Known {
                    node: node.clone(),
                    session: granted.session,
                    beat: granted.beat,
                });
            }
            later
        });
        due
    }

    /// What the leader is to be told, of all the sessions that there are.
    pub fn news(&mut self, known: Vec<Known>) -> RelayRequest {
        let mut news = RelayRequest::default();
        let named = |node: &str, session| NodeSession {
            node: node.to_owned(),
            session,
        };
        let mut told = std::mem::take(&mut self.told);
        for known in known {
            let before = told.remove(&known.node);
            let mut now = match before {
                Some(before) if before.session == known.session => before,
                before => {
                    let ended = before.map(|before| named(&known.node, before.session));
                    news.ended.extend(ended);
                    news.begun.push(named(&known.node, known.session));
                    Told {
                        session: known.session,
                        accepted: false,
                        beat: 0,
                    }
                }
            };
            if now.accepted && known.beat > now.beat {
                now.beat = known.beat;
                news.beats.push(NodeBeat {
                    session: Some(named(&known.node, known.session)),
                    number: known.beat,
                });
            }
            self.told.insert(known.node, now);
        }
        let gone = told.iter().map(|(node, gone)| named(node, gone.session));
        news.ended.extend(gone);
        news
    }

    /// The leader takes a session for the live one of its node. Says whether the session is still what it was told of.
    fn accepted(&mut self, of: &NodeSession) -> bool {
        let told = self.told.get_mut(&of.node);
        let told = told.filter(|told| told.session == of.session);
        told.is_some_and(|told| {
            told.accepted = true;
            true
        })
    }

    /// A leader has answered, or this replica leads.
    pub fn reached(&mut self, now: i64) {
        self.answered = Some(now);
    }

    /// No leader has answered for so long that agents must not rely on what they hear here.
    pub fn is_alone(&self, now: i64, most: i64) -> bool {
        let silent = |answered| now - answered > most;
        self.answered.is_none_or(silent) && !fault!("lone_replica_keeps_its_agents")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(node: &str, session: u64, beat: u64) -> Known {
        Known {
            node: node.to_owned(),
            session,
            beat,
        }
    }

    fn named(node: &str, session: u64) -> Vec<NodeSession> {
        let node = node.to_owned();
        vec![NodeSession { node, session }]
    }

    fn beat(node: &str, session: u64, number: u64) -> NodeBeat {
        let session = named(node, session).pop();
        NodeBeat { session, number }
    }

    /// The leader takes a session for the live one; whether that is said on.
    fn accepted(upward: &mut Upward, node: &str, session: u64) -> bool {
        let response = RelayResponse {
            accepted: named(node, session),
            ..RelayResponse::default()
        };
        !upward.take(response, 0).standings.is_empty()
    }

    #[test]
    fn a_leader_is_told_what_is_new_and_a_new_one_everything() {
        let mut upward = Upward::default();
        let first = upward.news(vec![known("nodes/a", 1, 5)]);
        assert_eq!(first.begun, named("nodes/a", 1));
        assert_eq!(first.beats, [], "it is not accepted yet");
        assert!(!accepted(&mut upward, "nodes/a", 7), "that is another one");
        assert_eq!(upward.news(vec![known("nodes/a", 1, 5)]).beats, []);
        assert!(accepted(&mut upward, "nodes/a", 1));
        let beats = upward.news(vec![known("nodes/a", 1, 6)]);
        assert_eq!(beats.beats, [beat("nodes/a", 1, 6)]);
        assert!(beats.begun.is_empty());
        let same = upward.news(vec![known("nodes/a", 1, 6)]);
        assert_eq!(same, RelayRequest::default());
        upward.begin();
        let all = upward.news(vec![known("nodes/a", 1, 6)]);
        assert_eq!((all.begun, all.beats), (named("nodes/a", 1), Vec::new()));
    }

    #[test]
    fn what_is_over_is_told_before_what_takes_its_place() {
        let mut upward = Upward::default();
        upward.news(vec![known("nodes/a", 1, 0), known("nodes/b", 2, 0)]);
        accepted(&mut upward, "nodes/a", 1);
        let news = upward.news(vec![known("nodes/a", 3, 9)]);
        let ended = [named("nodes/a", 1), named("nodes/b", 2)].concat();
        assert_eq!((news.ended, news.begun), (ended, named("nodes/a", 3)));
        assert_eq!(news.beats, [], "the new one is not accepted");
        assert!(!accepted(&mut upward, "nodes/a", 1));
        assert_eq!(upward.news(Vec::new()).ended, named("nodes/a", 3));
    }

    #[test]
    fn a_grant_waits_for_the_state_that_it_was_given_in() {
        let mut upward = Upward::default();
        let response = |number| RelayResponse {
            granted: vec![beat("nodes/a", 1, number)],
            revision: 9,
            ..RelayResponse::default()
        };
        upward.take(response(5), 0);
        assert_eq!(upward.due(8), []);
        assert_eq!(upward.due(9), [known("nodes/a", 1, 5)]);
        assert_eq!(upward.due(9), []);
        upward.take(response(6), 0);
        upward.begin();
        assert_eq!(upward.due(9), [], "that was another leader's");
    }

    #[test]
    fn a_refused_session_is_told_so_and_an_answer_is_a_sign_of_life() {
        let mut upward = Upward::default();
        let response = RelayResponse {
            refused: named("nodes/a", 1),
            ..RelayResponse::default()
        };
        let taken = upward.take(response, 7);
        assert_eq!(taken.standings, [(named("nodes/a", 1).remove(0), false)]);
        assert!(!upward.is_alone(8, 10));
    }

    #[test]
    fn who_hears_of_no_leader_is_alone() {
        let mut upward = Upward::default();
        assert!(upward.is_alone(0, 10), "it has never heard of one");
        upward.reached(5);
        assert!(!upward.is_alone(15, 10));
        assert!(upward.is_alone(16, 10));
    }
}
