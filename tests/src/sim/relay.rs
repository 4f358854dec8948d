//! What replicas tell the leader of their agents' sessions, and what it answers: production's `upward` at one end, its `branch` at the
//! other. The streams between them are played: each keeps its order, and breaks where the network is cut or an end of it is gone.

use std::collections::BTreeMap;

use batchai_coordinator::agents::branch::Branch;
use batchai_coordinator::agents::upward::{Known, News};
use batchai_proto::internal::v1::command::Kind;

use super::sessions::Fate;
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
}

/// The leader's end.
pub struct Held {
    branch: Branch,
    heard: u64,
}

/// What became of what an agent has said: its node, in which conversation, and how.
pub type Answer = (String, u64, Fate);

#[derive(Default)]
struct Reply {
    revision: i64,
    accepted: Vec<(String, u64)>,
    refused: Vec<(String, u64)>,
    granted: Vec<(String, u64, u64)>,
    answers: Vec<Answer>,
}

enum Said {
    /// What is new, and what agents have said.
    Up(News, Vec<(String, u64, Kind)>),
    Down(Reply),
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
            });
        }
        let replica = self.replica(id);
        let number = replica.stream.as_ref().map_or(0, |stream| stream.number);
        let news = replica.upward.news(replica.contacts.own_sessions());
        let unsaid = self.unsaid(id);
        let quiet = news == News::default() && unsaid.is_empty();
        if !quiet || step.is_multiple_of(TELL_STEPS) {
            self.say(id, leader, number, Said::Up(news, unsaid));
        }
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
                Said::Up(news, said) if whole && self.leads(to) => {
                    self.take_up((from, to, message.stream), news, said);
                }
                Said::Down(reply) if whole => self.take_down(to, message.stream, reply),
                // Nothing is lost of a stream that goes on.
                Said::Up(..) => self.break_if(from, message.stream),
                Said::Down(_) => self.break_if(to, message.stream),
            }
        }
    }

    /// The leader hears of sessions.
    fn take_up(
        &mut self,
        (from, to, stream): (u64, u64, u64),
        news: News,
        said: Vec<(String, u64, Kind)>,
    ) {
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
        let revision = replica
            .core
            .as_ref()
            .map_or(0, |core| core.state().revision);
        let held = replica
            .branches
            .entry((from, stream))
            .or_insert_with(|| Held {
                branch: Branch::new(contacts),
                heard: step,
            });
        held.heard = step;
        let mut reply = Reply {
            revision,
            ..Reply::default()
        };
        for (node, session) in news.ended {
            held.branch.release(&node, session);
        }
        for (node, session) in news.begun {
            match held.branch.hold(&node, session, now) {
                true => reply.accepted.push((node, session)),
                false => reply.refused.push((node, session)),
            }
        }
        for beat in news.beats {
            held.branch.beat(&beat.node, beat.session, beat.beat, now);
        }
        reply.granted = held.branch.granted();
        let mut asked = Vec::new();
        for (node, conversation, kind) in said {
            match held.branch.holds(&node) {
                true => asked.push((node, conversation, kind)),
                false => reply.answers.push((node, conversation, Fate::NotRecorded)),
            }
        }
        self.say(to, from, stream, Said::Down(reply));
        for (node, conversation, kind) in asked {
            let back = Asked::Relayed(from, stream, node.clone(), conversation);
            if !self.propose(to, kind, None, back) {
                self.send_back(from, stream, (node, conversation, Fate::NotRecorded));
            }
        }
    }

    /// What became of something goes to the replica whose agent said it.
    pub(super) fn send_back(&mut self, replica: u64, stream: u64, answer: Answer) {
        let theirs = self.replicas[&replica].stream.as_ref();
        let Some(leader) = theirs.filter(|s| s.number == stream).map(|s| s.leader) else {
            return;
        };
        let reply = Reply {
            answers: vec![answer],
            ..Reply::default()
        };
        self.say(leader, replica, stream, Said::Down(reply));
    }

    /// A replica hears what the leader says.
    fn take_down(&mut self, id: u64, stream: u64, reply: Reply) {
        let step = self.step;
        let replica = self.replica(id);
        let current = replica.stream.as_mut();
        let Some(current) = current.filter(|current| current.number == stream) else {
            return;
        };
        current.heard = step;
        replica.upward.reached(replica.clock.boot(step));
        for (node, session) in reply.accepted {
            if replica.upward.accepted(&node, session) {
                replica.contacts.stand(&node, session, true);
            }
        }
        for (node, session) in reply.refused {
            replica.contacts.stand(&node, session, false);
        }
        for (node, session, beat) in reply.granted {
            let known = Known {
                node,
                session,
                beat,
            };
            replica.upward.granted(reply.revision, known);
        }
        for (node, conversation, fate) in reply.answers {
            self.checks.saw("a follower has a report recorded");
            self.answer_session(id, &node, conversation, fate);
        }
    }
}
