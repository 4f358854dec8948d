//! Sessions of agents at the replicas that have them, as production's `session` leads them: claimed in production's contacts, confirmed
//! by whoever leads, opened once it is certain that the State is not an old one, and over when the leader refuses them or none answers.

use batchai_coordinator::agents::contacts::Live;
use batchai_coordinator::replica::ReplicaError;
use batchai_coordinator::replica::core::Core;
use batchai_coordinator::state::nodes;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{RelayedCommand, relayed_command};

use super::{Asked, Sim};

/// The leader may take so long to say whether a session is the live one, and a replica to get leave to read.
const CONFIRM_STEPS: u64 = 60;
/// What nobody has recorded is said again for so long.
const PATIENCE_STEPS: u64 = 200;
/// Without an answer of a leader for so long, agents are let go.
const ALONE_MS: i64 = 4000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The leader has not said whether it is the live one.
    Claimed,
    /// It is not certain that the State here is not an old one.
    Reading,
    /// It has what the agent needs.
    Open,
}

/// Something that an agent has said, to be recorded.
struct Saying {
    kind: Kind,
    since: u64,
    sent: bool,
    /// The revision from which on the State has it.
    recorded: Option<i64>,
}

/// One session.
pub struct Serving {
    agent: usize,
    conversation: u64,
    live: Live,
    stage: Stage,
    since: u64,
    saying: Option<Saying>,
    /// The latest heartbeat for which the agent got its lease.
    granted: u64,
}

impl Sim {
    /// An agent says hello. Says whether a session was begun.
    pub(super) fn greet(&mut self, id: u64, agent: usize, conversation: u64, node: &str) -> bool {
        let step = self.step;
        let replica = self.replica(id);
        if replica.upward.is_alone(replica.clock.boot(step), ALONE_MS) {
            return false;
        }
        let Some(live) = replica.contacts.claim(node) else {
            self.checks.saw("a node has a live session already");
            return false;
        };
        let serving = Serving {
            agent,
            conversation,
            live,
            stage: Stage::Claimed,
            since: step,
            saying: None,
            granted: 0,
        };
        replica.sessions.insert(node.to_owned(), serving);
        true
    }

    /// Whether the session of a conversation goes on.
    pub(super) fn serves(&self, id: u64, node: &str, conversation: u64) -> bool {
        let serving = self.replicas[&id].sessions.get(node);
        serving.is_some_and(|serving| serving.conversation == conversation)
    }

    /// A heartbeat comes.
    pub(super) fn beat(&mut self, id: u64, node: &str, number: u64) {
        let step = self.step;
        let replica = self.replica(id);
        let now = replica.clock.boot(step);
        if let Some(serving) = replica.sessions.get(node) {
            serving.live.beat(number, now);
        }
    }

    /// Something is to be recorded.
    pub(super) fn say_for(&mut self, id: u64, node: &str, kind: Kind) {
        let since = self.step;
        if let Some(serving) = self.replica(id).sessions.get_mut(node) {
            serving.saying = Some(Saying {
                kind,
                since,
                sent: false,
                recorded: None,
            });
        }
    }

    /// Everything of a replica's sessions that time brings.
    pub(super) fn step_sessions(&mut self, id: u64) {
        let (step, leads) = (self.step, self.leads(id));
        let replica = self.replica(id);
        let now = replica.clock.boot(step);
        if leads {
            replica.upward.reached(now);
            replica.stream = None;
        } else {
            replica.branches.clear();
        }
        let revision = replica
            .core
            .as_ref()
            .map_or(0, |core| core.state().revision);
        for due in replica.upward.due(revision) {
            let contacts = &replica.contacts;
            contacts.granted(&due.node, due.session, due.beat);
        }
        if replica.upward.is_alone(now, ALONE_MS) && !replica.sessions.is_empty() {
            replica.sessions.clear();
            self.checks
                .saw("a replica that is alone lets its agents go");
        }
        let nodes: Vec<_> = self.replicas[&id].sessions.keys().cloned().collect();
        for node in nodes {
            if !self.step_session(id, &node, leads) {
                let over = self.replica(id).sessions.remove(&node);
                if let Some(over) = over.filter(|over| over.live.stands() == Some(false)) {
                    self.checks.saw("a leader refuses a session");
                    self.agents[over.agent].dropped(over.conversation);
                }
            }
        }
        self.tell_leader(id, leads);
    }

    /// One session; `false` where it is over.
    fn step_session(&mut self, id: u64, node: &str, leads: bool) -> bool {
        let noticed = self.healed || self.random.f64() < 0.2;
        let step = self.step;
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let Some(serving) = replica.sessions.get_mut(node) else {
            return true;
        };
        // That an agent is gone is noticed sooner or later.
        if self.agents[serving.agent].conversation != serving.conversation && noticed {
            return false;
        }
        let standing = serving.live.stands();
        if standing == Some(false) {
            return false;
        }
        if serving.stage != Stage::Open && step > serving.since + CONFIRM_STEPS {
            return false;
        }
        if serving.stage == Stage::Claimed && (leads || standing == Some(true)) {
            serving.stage = Stage::Reading;
            self.tickets += 1;
            let ticket = self.tickets;
            let opening = (node.to_owned(), serving.conversation);
            replica.openings.insert(ticket, opening);
            return self.core(id).read(ticket);
        }
        let granted = serving.live.granted();
        if granted > serving.granted {
            serving.granted = granted;
            let (agent, conversation) = (serving.agent, serving.conversation);
            if !leads {
                self.checks.saw("a follower passes on a grant");
            }
            self.grant(agent, conversation, granted);
        }
        self.step_saying(id, node, leads)
    }

    /// It is certain that the State has all that was acknowledged when this was asked for.
    pub(super) fn admit(&mut self, id: u64, (node, conversation): (String, u64)) {
        if !self.serves(id, &node, conversation) {
            return;
        }
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        if let Some(serving) = replica.sessions.get_mut(&node) {
            serving.stage = Stage::Open;
            let agent = serving.agent;
            let register = self.agents[agent].registration();
            if nodes::is_registered(self.core(id).state(), &register) {
                self.agents[agent].recorded(conversation);
            } else {
                self.say_for(id, &node, Kind::RegisterNode(register));
            }
        }
    }

    /// What an agent has said is recorded, or said again, or it was in vain: then it is `false`.
    fn step_saying(&mut self, id: u64, node: &str, leads: bool) -> bool {
        let step = self.step;
        let replica = self.replicas.get_mut(&id).expect("it is one of them");
        let known = replica
            .core
            .as_ref()
            .map_or(0, |core| core.state().revision);
        let Some(serving) = replica.sessions.get_mut(node) else {
            return true;
        };
        let (agent, conversation) = (serving.agent, serving.conversation);
        let Some(saying) = &mut serving.saying else {
            return true;
        };
        if saying.recorded.is_some_and(|revision| revision <= known) {
            serving.saying = None;
            self.agents[agent].recorded(conversation);
            return true;
        }
        if step > saying.since + PATIENCE_STEPS {
            return false;
        }
        // Over the stream to the leader where another one leads.
        if !leads || saying.sent || saying.recorded.is_some() {
            return true;
        }
        saying.sent = true;
        let kind = saying.kind.clone();
        let asked = Asked::Session(id, node.to_owned(), conversation);
        if !self.propose(id, kind, None, asked) {
            self.say_again(id, node);
        }
        true
    }

    fn say_again(&mut self, id: u64, node: &str) {
        if let Some(serving) = self.replica(id).sessions.get_mut(node)
            && let Some(saying) = &mut serving.saying
        {
            saying.sent = false;
        }
    }

    /// What is to be sent to the leader, of all that agents have said: of which node, and in which conversation.
    pub(super) fn unsaid(&mut self, id: u64) -> Vec<(RelayedCommand, String, u64)> {
        let mut tickets = self.tickets;
        let sessions = self.replica(id).sessions.iter_mut();
        let unsaid = sessions.filter_map(|(node, serving)| {
            let conversation = serving.conversation;
            let saying = serving.saying.as_mut();
            let saying = saying.filter(|saying| !saying.sent && saying.recorded.is_none())?;
            saying.sent = true;
            tickets += 1;
            let kind = Some(match saying.kind.clone() {
                Kind::RegisterNode(register) => relayed_command::Kind::RegisterNode(register),
                Kind::RecordReport(report) => relayed_command::Kind::RecordReport(report),
                other => unreachable!("agents do not say {other:?}"),
            });
            let ticket = tickets;
            let command = RelayedCommand { ticket, kind };
            Some((command, node.clone(), conversation))
        });
        let unsaid = unsaid.collect();
        self.tickets = tickets;
        unsaid
    }

    /// The stream to the leader broke: what was not answered is said again.
    pub(super) fn say_all_again(&mut self, id: u64) {
        for serving in self.replica(id).sessions.values_mut() {
            if let Some(saying) = &mut serving.saying {
                saying.sent = false;
            }
        }
    }

    /// What became of what an agent has said.
    pub(super) fn answer_session(
        &mut self,
        id: u64,
        node: &str,
        conversation: u64,
        result: Result<i64, ReplicaError>,
    ) {
        let replica = self.replica(id);
        let serving = replica.sessions.get_mut(node);
        let Some(serving) = serving.filter(|serving| serving.conversation == conversation) else {
            return;
        };
        match (result, &mut serving.saying) {
            (Ok(revision), Some(saying)) => saying.recorded = Some(revision),
            (Err(ReplicaError::NotLeader | ReplicaError::Unknown), Some(saying)) => {
                saying.sent = false;
            }
            (Err(ReplicaError::Rejected(_) | ReplicaError::Refused(_)), _) => {
                let agent = serving.agent;
                replica.sessions.remove(node);
                self.agents[agent].dropped(conversation);
            }
            _ => {}
        }
    }

    /// Whom a replica takes for the leader, if that is another one.
    pub(super) fn other_leader(&self, id: u64) -> Option<u64> {
        let core = self.replicas[&id].core.as_ref();
        core.and_then(Core::leader).filter(|leader| *leader != id)
    }
}
