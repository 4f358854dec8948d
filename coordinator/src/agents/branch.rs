//! The live sessions that another replica has, as the leader holds them, and what is made of that replica's messages. How they come,
//! and what becomes of what they want recorded, is not decided here.

use std::collections::BTreeMap;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::agent::v1::Report;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{
    NodeBeat, NodeSession, RelayRequest, RelayResponse, relayed_command,
};
use tonic::Status;

use super::contacts::{Contacts, Live};
use super::fate::told;
use super::hello::{check_register, check_report};
use crate::replica::ReplicaError;
use crate::state::limit;

/// What a message of the replica led to.
#[derive(Default)]
pub struct Heard {
    /// To be sent, with the revision that the State is at by then: what was given away before the grants in it were made is in it.
    pub response: RelayResponse,
    /// Nodes whose sessions are not held any more, and then those whose are.
    pub ended: Vec<String>,
    pub begun: Vec<String>,
    /// What is to be recorded, and the tickets by which it is answered.
    pub commands: Vec<(u64, Kind)>,
}

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

    /// Takes in a message.
    ///
    /// # Errors
    /// It makes no sense: the replica is not to be listened to.
    pub fn take_in(&mut self, request: RelayRequest, now: i64) -> Result<Heard, Status> {
        let mut heard = Heard::default();
        for of in request.ended {
            if self.release(&of.node, of.session) {
                heard.ended.push(of.node);
            }
        }
        for of in request.begun {
            Name::parse(Noun::Node, &of.node).map_err(|error| {
                ApiError::Invalid(vec![Fault::new("begun.node", error.to_string())])
            })?;
            match self.hold(&of.node, of.session, now) {
                true => {
                    heard.begun.push(of.node.clone());
                    heard.response.accepted.push(of);
                }
                false => heard.response.refused.push(of),
            }
        }
        for beat in request.beats {
            let NodeSession { node, session } = beat.session.unwrap_or_default();
            self.beat(&node, session, beat.number, now);
        }
        // Between two messages that say what is new there are many of those that have something recorded.
        if request.commands.is_empty() {
            heard.response.granted = self.granted();
        }
        for command in request.commands {
            match self.check(command.kind) {
                Ok(kind) => heard.commands.push((command.ticket, kind)),
                Err(why) => {
                    let refused = told(command.ticket, Err(ReplicaError::Refused(why)));
                    heard.response.answers.push(refused);
                }
            }
        }
        Ok(heard)
    }

    /// What is to be recorded must be of a node whose session is held, and no larger than agents' own words may be.
    fn check(&self, kind: Option<relayed_command::Kind>) -> Result<Kind, String> {
        let text = |status: Status| status.message().to_owned();
        let (node, kind) = match kind {
            Some(relayed_command::Kind::RegisterNode(register)) => {
                check_register(&register).map_err(text)?;
                (register.name.clone(), Kind::RegisterNode(register))
            }
            Some(relayed_command::Kind::RecordReport(report)) => {
                check_report(report.report.as_ref().unwrap_or(&Report::default())).map_err(text)?;
                (report.node.clone(), Kind::RecordReport(report))
            }
            None => return Err("it is of a kind that this replica does not know".to_owned()),
        };
        match self.held.contains_key(&node) {
            true => Ok(kind),
            false => Err(format!("{node} has no live session there")),
        }
    }

    /// Claims the live session of a node; `false` where another has it, or the replica has more than there may be nodes.
    fn hold(&mut self, node: &str, session: u64, now: i64) -> bool {
        // What it says last is so.
        self.held.remove(node);
        if self.held.len() >= limit(Noun::Node) {
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
    fn release(&mut self, node: &str, session: u64) -> bool {
        let held = self.held.get(node);
        let same = held.is_some_and(|held| held.session == session);
        if same {
            self.held.remove(node);
        }
        same
    }

    /// A heartbeat has come; one of a session that is not held counts for nothing.
    fn beat(&self, node: &str, session: u64, number: u64, now: i64) {
        let held = self.held.get(node);
        if let Some(held) = held.filter(|held| held.session == session) {
            held.live.beat(number, now);
        }
    }

    /// The heartbeats that were granted since this was asked last.
    fn granted(&mut self) -> Vec<NodeBeat> {
        let granted = self.held.iter_mut().filter_map(|(node, held)| {
            let number = held.live.granted();
            (number > held.granted).then(|| {
                held.granted = number;
                let (node, session) = (node.clone(), held.session);
                let session = Some(NodeSession { node, session });
                NodeBeat { session, number }
            })
        });
        granted.collect()
    }
}

#[cfg(test)]
mod tests {
    use batchai_proto::internal::v1::{RecordReport, RelayedCommand};

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
        let heard = |branch: &mut Branch| branch.take_in(RelayRequest::default(), 3).unwrap();
        let granted = heard(&mut branch).response.granted;
        assert_eq!(granted[0].session, Some(of("nodes/a", 7)));
        assert_eq!((granted.len(), granted[0].number), (1, 4));
        assert_eq!(heard(&mut branch).response.granted, []);
        assert!(!branch.release("nodes/a", 6) && branch.held.contains_key("nodes/a"));
        assert!(branch.release("nodes/a", 7));
        assert!(contacts.claim("nodes/a").is_some());
    }

    fn of(node: &str, session: u64) -> NodeSession {
        let node = node.to_owned();
        NodeSession { node, session }
    }

    #[test]
    fn a_session_makes_way_in_one_message_and_only_who_has_one_has_something_recorded() {
        let contacts = Contacts::default();
        let mut branch = Branch::new(contacts);
        let report = |ticket, node: &str| RelayedCommand {
            ticket,
            kind: Some(relayed_command::Kind::RecordReport(RecordReport {
                node: node.to_owned(),
                ..RecordReport::default()
            })),
        };
        let first = RelayRequest {
            begun: vec![of("nodes/a", 1)],
            ..RelayRequest::default()
        };
        assert_eq!(branch.take_in(first, 1).unwrap().begun, ["nodes/a"]);
        let next = RelayRequest {
            ended: vec![of("nodes/a", 1)],
            begun: vec![of("nodes/a", 2)],
            commands: vec![report(5, "nodes/a"), report(6, "nodes/b")],
            ..RelayRequest::default()
        };
        let heard = branch.take_in(next, 2).unwrap();
        assert_eq!(
            (heard.ended, heard.begun),
            (vec!["nodes/a".to_owned()], vec!["nodes/a".to_owned()])
        );
        assert_eq!(heard.response.accepted, [of("nodes/a", 2)]);
        assert_eq!(heard.commands.len(), 1);
        assert_eq!(
            (heard.commands[0].0, heard.response.answers[0].ticket),
            (5, 6)
        );
        let bad = RelayRequest {
            begun: vec![of("nodes/../a", 1)],
            ..RelayRequest::default()
        };
        assert!(branch.take_in(bad, 3).is_err());
    }
}
