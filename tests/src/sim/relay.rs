//! What replicas tell the leader of their agents' sessions, and what it answers: production's `upward` at one end, its `branch` at the
//! other. The streams between them are played: each keeps its order, and breaks where the network is cut or an end of it is gone.

use std::collections::BTreeMap;

use batchai_coordinator::agents::branch::Branch;
use batchai_coordinator::agents::fate::{outcome, told};
use batchai_coordinator::replica::ReplicaError;
use batchai_proto::internal::v1::{RelayRequest, RelayResponse};

use super::{Asked, Sim};

/// The leader is told what is new this often, at least.
const TELL_STEPS: u64 = 5;
/// Either end takes the other one for gone that says nothing for so long.
const LEADER_SILENCE_STEPS: u64 = 20;
const REPLICA_SILENCE_STEPS: u64 = 40;

/// A replica's end of a stream.
pub struct Stream {
    leader: u64,
    number: u64,
    /// When the leader was heard of.
    heard: u64,
    /// Nothing of it has reached the leader.
    fresh: bool,
    /// What is to be recorded, by ticket: the node whose agent said it, and in which of its conversations.
    asked: BTreeMap<u64, (String, u64)>,
}

/// The leader's end.
pub struct Held {
    branch: Branch,
    heard: u64,
}

enum Said {
    Up(RelayRequest),
    Down(RelayResponse),
}

struct Message {
    from: u64,
    to: u64,
    stream: u64,
    said: Said,
}

/// What is on its way, by the step in which it arrives.
#[derive(Default)]
pub struct Carried {
    messages: BTreeMap<(u64, u64), Message>,
    streams: u64,
    sent: u64,
    /// When the latest message of a stream in one direction arrives: none overtakes it.
    due: BTreeMap<(u64, u64), u64>,
}

impl Sim {
    fn say(&mut self, from: u64, to: u64, stream: u64, said: Said) {
        let due = self.step + self.random.u64(1..=self.options.delay);
        let last = self.relayed.due.entry((stream, from)).or_default();
        *last = due.max(*last);
        self.relayed.sent += 1;
        let place = (*last, self.relayed.sent);
        let message = Message {
            from,
            to,
            stream,
            said,
        };
        self.relayed.messages.insert(place, message);
    }

    /// A replica tells the leader what is new.
    pub(super) fn tell_leader(&mut self, id: u64, leads: bool) {
        let (step, leader) = (self.step, self.other_leader(id));
        let stream = self.replicas[&id].stream.as_ref();
        let stale = stream.is_some_and(|stream| {
            Some(stream.leader) != leader || step > stream.heard + LEADER_SILENCE_STEPS
        });
        if stale {
            self.break_stream(id);
        }
        let Some(leader) = leader.filter(|_| !leads) else {
            return;
        };
        if self.replicas[&id].stream.is_none() {
            self.relayed.streams += 1;
            let number = self.relayed.streams;
            let replica = self.replica(id);
            replica.upward.begin();
            replica.stream = Some(Stream {
                leader,
                number,
                heard: step,
                fresh: true,
                asked: BTreeMap::new(),
            });
        }
        let replica = self.replica(id);
        let number = replica.stream.as_ref().map_or(0, |stream| stream.number);
        let news = replica.upward.news(replica.contacts.own_sessions());
        if news != RelayRequest::default() || step.is_multiple_of(TELL_STEPS) {
            self.say(id, leader, number, Said::Up(news));
        }
        let unsaid = self.unsaid(id);
        if unsaid.is_empty() {
            return;
        }
        let mut request = RelayRequest::default();
        for (command, node, conversation) in unsaid {
            if let Some(stream) = &mut self.replica(id).stream {
                stream.asked.insert(command.ticket, (node, conversation));
            }
            request.commands.push(command);
        }
        self.say(id, leader, number, Said::Up(request));
    }

    /// A replica gives its stream up. The leader notices at once, or by the silence.
    fn break_stream(&mut self, id: u64) {
        let Some(stream) = self.replica(id).stream.take() else {
            return;
        };
        self.say_all_again(id);
        if self.replicas.contains_key(&stream.leader) && self.random.bool() {
            let branches = &mut self.replica(stream.leader).branches;
            branches.remove(&(id, stream.number));
        }
    }

    fn break_if(&mut self, id: u64, number: u64) {
        let stream = self.replicas[&id].stream.as_ref();
        if stream.is_some_and(|stream| stream.number == number) {
            self.break_stream(id);
        }
    }

    /// What was said arrives.
    pub(super) fn carry(&mut self) {
        let step = self.step;
        for replica in self.replicas.values_mut() {
            let branches = &mut replica.branches;
            branches.retain(|_, held| step <= held.heard + REPLICA_SILENCE_STEPS);
        }
        let later = self.relayed.messages.split_off(&(step + 1, 0));
        let come = std::mem::replace(&mut self.relayed.messages, later);
        for ((_, place), message) in come {
            let (from, to) = (message.from, message.to);
            let paused = self.replicas[&to].paused_until > step;
            if paused && self.replicas[&to].core.is_some() {
                self.relayed.messages.insert((step + 1, place), message);
                continue;
            }
            let whole = self.listens(from, to);
            match message.said {
                Said::Up(request) if whole && self.leads(to) => {
                    self.take_up((from, to, message.stream), request);
                }
                Said::Down(response) if whole => self.take_down(to, message.stream, response),
                // Nothing is lost of a stream that goes on.
                Said::Up(..) => self.break_if(from, message.stream),
                Said::Down(_) => self.break_if(to, message.stream),
            }
        }
    }

    /// The leader hears of sessions.
    fn take_up(&mut self, (from, to, stream): (u64, u64, u64), request: RelayRequest) {
        let step = self.step;
        // One that was given up says nothing any more.
        let current = self.replicas[&from].stream.as_ref();
        if current.is_none_or(|current| current.number != stream) {
            return;
        }
        // Nor one that the leader has given up: it has ended the stream.
        let held = self.replicas[&to].branches.contains_key(&(from, stream));
        if !held && !current.is_some_and(|current| current.fresh) {
            self.break_stream(from);
            return;
        }
        if let Some(current) = &mut self.replica(from).stream {
            current.fresh = false;
        }
        let replica = self.replica(to);
        let now = replica.clock.boot(step);
        let contacts = replica.contacts.clone();
        // A later stream takes the place of an earlier one.
        let branches = &mut replica.branches;
        branches.retain(|(of, number), _| *of != from || *number == stream);
        let held = branches.entry((from, stream)).or_insert_with(|| Held {
            branch: Branch::new(contacts),
            heard: step,
        });
        held.heard = step;
        let heard = held.branch.take_in(request, now);
        let heard = heard.expect("replicas make sense");
        let revision = self.core(to).state().revision;
        let response = RelayResponse {
            revision,
            ..heard.response
        };
        self.say(to, from, stream, Said::Down(response));
        for (ticket, kind) in heard.commands {
            let back = Asked::Relayed(from, stream, ticket);
            if !self.propose(to, kind, None, back) {
                self.send_back(from, stream, ticket, Err(ReplicaError::NotLeader));
            }
        }
    }

    /// What became of something goes to the replica whose agent said it.
    pub(super) fn send_back(
        &mut self,
        replica: u64,
        stream: u64,
        ticket: u64,
        result: Result<i64, ReplicaError>,
    ) {
        let theirs = self.replicas[&replica].stream.as_ref();
        let Some(leader) = theirs.filter(|s| s.number == stream).map(|s| s.leader) else {
            return;
        };
        let response = RelayResponse {
            answers: vec![told(ticket, result)],
            ..RelayResponse::default()
        };
        self.say(leader, replica, stream, Said::Down(response));
    }

    /// A replica hears what the leader says.
    fn take_down(&mut self, id: u64, stream: u64, response: RelayResponse) {
        let step = self.step;
        let replica = self.replica(id);
        let current = replica.stream.as_mut();
        let Some(current) = current.filter(|current| current.number == stream) else {
            return;
        };
        current.heard = step;
        let now = replica.clock.boot(step);
        let taken = replica.upward.take(response, now);
        for (of, live) in taken.standings {
            replica.contacts.stand(&of.node, of.session, live);
        }
        let answered = taken.answers.into_iter().filter_map(|answer| {
            let asked = current.asked.remove(&answer.ticket)?;
            Some((asked, outcome(answer)))
        });
        for ((node, conversation), result) in answered.collect::<Vec<_>>() {
            self.checks.saw("a follower has a report recorded");
            self.answer_session(id, &node, conversation, result);
        }
    }
}
