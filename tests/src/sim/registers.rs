//! Users of whom every answer is written down: they create, read, write and delete a few resource groups, and `history` judges whether
//! one coordinator could have answered so.
//!
//! What they do not learn the end of is left open: it may have happened, or may happen yet.

use std::collections::BTreeMap;

use batchai_coordinator::replica::core::Proposed;
use batchai_coordinator::state::{Rejection, State};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Delete, Labels, RequestKey, Update};
use batchai_proto::v1;

use crate::history::{Call, Op, Outcome, Revision, Verdict, check};

use super::replicas::{PATIENCE_STEPS, Reading};
use super::{Asked, Sim};

/// Resource groups that are asked.
const OBJECTS: usize = 3;
const USERS: usize = 4;
/// How often a user begins something, in each step.
const OFTEN: f64 = 0.05;
/// How often a creation is asked for under one name, while nobody says what became of it.
const TRIES: u32 = 4;
/// What looking for an order may cost.
const BUDGET: u64 = 2_000_000;
/// The tag that is the value.
const TAG: &str = "value";

/// What a user is about.
struct Doing {
    object: usize,
    call: Call,
    /// By it the answer is known for one to this.
    begun: u64,
    /// When it was asked for last: in moments, and in steps.
    asked: (u64, u64),
    sent: bool,
    tries: u32,
}

/// Users and what they saw.
#[derive(Default)]
pub struct Registers {
    doing: [Option<Doing>; USERS],
    /// Who was told nothing is from then on another one.
    names: u64,
    known: [Revision; OBJECTS],
    values: u64,
    /// Rises with everything that is seen: no two things happen at once.
    moment: u64,
    histories: [Vec<Op>; OBJECTS],
    /// Of ensembles that are gone.
    past: Vec<(usize, Vec<Op>)>,
}

fn group(object: usize) -> String {
    format!("resourceGroups/h{object}")
}

fn revision(etag: &str) -> Revision {
    let number = etag.trim_matches('"').parse();
    number.expect("an etag is a quoted revision")
}

fn look(state: &State, object: usize) -> Outcome {
    let found = state.resource_groups.get(&group(object));
    found.map_or(Outcome::Absent, |found| {
        let value = found.tags[TAG].parse();
        let value = value.expect("only numbers are written");
        Outcome::Shown(value, revision(&found.etag))
    })
}

fn command(object: usize, call: Call) -> Option<Kind> {
    let name = group(object);
    let tags = |value: u64| BTreeMap::from([(TAG.to_owned(), value.to_string())]);
    let etag = |at: Revision| format!("\"{at}\"");
    let write = |name: String, etag: String, value: u64| {
        Kind::Update(Update {
            name,
            etag,
            labels: Some(Labels {
                labels: tags(value).into_iter().collect(),
            }),
            ..Default::default()
        })
    };
    let delete = |name: String, etag: String| {
        Kind::Delete(Delete {
            name,
            etag,
            force: false,
        })
    };
    Some(match call {
        Call::Read => return None,
        Call::Create(value) => Kind::CreateResourceGroup(v1::ResourceGroup {
            name,
            tags: tags(value),
            ..Default::default()
        }),
        Call::Write(value) => write(name, String::new(), value),
        Call::WriteIf(at, value) => write(name, etag(at), value),
        Call::Delete => delete(name, String::new()),
        Call::DeleteIf(at) => delete(name, etag(at)),
    })
}

/// What an answer says; none where the call was not carried out, for a reason that says nothing of the object.
fn outcome(call: Call, result: &Result<i64, Rejection>) -> Option<Outcome> {
    Some(match (result, call) {
        (Ok(_), Call::Delete | Call::DeleteIf(_)) | (Ok(_), Call::Read) => Outcome::Done,
        (Ok(at), Call::Create(value) | Call::Write(value) | Call::WriteIf(_, value)) => {
            Outcome::Shown(value, u64::try_from(*at).expect("it counts from 0 on"))
        }
        (Err(Rejection::NotFound { .. }), _) => Outcome::Absent,
        (Err(Rejection::Exists { .. }), _) => Outcome::Exists,
        (Err(Rejection::StaleEtag { actual, .. }), _) => Outcome::Stale(revision(actual)),
        (Err(_), _) => return None,
    })
}

impl Registers {
    pub fn is_busy(&self) -> bool {
        self.doing.iter().any(Option::is_some)
    }

    fn now(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    fn note(&mut self, user: usize, doing: &Doing, begun: u64, outcome: Option<Outcome>) {
        let ended = outcome.map(|outcome| (self.now(), outcome));
        if let Some(Outcome::Shown(_, at) | Outcome::Stale(at)) = outcome {
            self.known[doing.object] = at;
        }
        self.names += u64::from(ended.is_none());
        self.histories[doing.object].push(Op {
            client: user as u64 + USERS as u64 * self.names,
            call: doing.call,
            begun,
            ended,
        });
    }

    fn wish(&mut self, random: &mut fastrand::Rng, step: u64) -> Doing {
        let object = random.usize(..OBJECTS);
        self.values += 1;
        let (value, at) = (self.values, self.known[object]);
        let call = match random.u32(..100) {
            0..45 => Call::Read,
            45..63 => Call::Create(value),
            63..73 => Call::Write(value),
            73..90 => Call::WriteIf(at, value),
            90..95 => Call::Delete,
            _ => Call::DeleteIf(at),
        };
        let begun = self.now();
        Doing {
            object,
            call,
            begun,
            asked: (begun, step),
            sent: false,
            tries: 0,
        }
    }

    /// Everything begins anew with the State of a backup. What was not answered until then may have happened.
    pub fn begin_anew(&mut self, state: &State) {
        for user in 0..USERS {
            if let Some(doing) = self.doing[user].take() {
                self.note(user, &doing, doing.begun, None);
            }
        }
        for object in 0..OBJECTS {
            let past = std::mem::take(&mut self.histories[object]);
            self.past.push((object, past));
            let there = look(state, object);
            if let Outcome::Shown(value, _) = there {
                self.look_at(object, Call::Create(value), there);
            }
        }
    }

    fn look_at(&mut self, object: usize, call: Call, seen: Outcome) {
        let begun = self.now();
        let ended = Some((self.now(), seen));
        let client = 0;
        self.histories[object].push(Op {
            client,
            call,
            begun,
            ended,
        });
    }

    /// In the end the State says what there is.
    pub fn judge(&mut self, state: &State) -> Result<usize, String> {
        for object in 0..OBJECTS {
            self.look_at(object, Call::Read, look(state, object));
        }
        let last = self.histories.iter().enumerate();
        let past = self.past.iter().map(|(object, history)| (*object, history));
        let mut all = 0;
        for (object, history) in past.chain(last) {
            all += history.len();
            match check(history, BUDGET) {
                Verdict::Linearizable => {}
                Verdict::Undecided => {
                    let (ops, name) = (history.len(), group(object));
                    return Err(format!("histories_are_judged: {name}, {ops} operations"));
                }
                Verdict::Not(why) => {
                    return Err(format!("linearizable: {}: {why}", group(object)));
                }
            }
        }
        Ok(all)
    }
}

impl Sim {
    pub(super) fn step_users(&mut self) {
        for user in 0..USERS {
            if self.registers.doing[user].is_none() {
                if !self.healed && self.random.f64() < OFTEN {
                    let wish = self.registers.wish(&mut self.random, self.step);
                    self.registers.doing[user] = Some(wish);
                } else {
                    continue;
                }
            }
            self.ask(user);
        }
    }

    fn ask(&mut self, user: usize) {
        let Some(doing) = &self.registers.doing[user] else {
            return;
        };
        let (object, call, begun) = (doing.object, doing.call, doing.begun);
        let late = doing.asked.1 + PATIENCE_STEPS < self.step;
        if doing.sent && call == Call::Read && late {
            // Who has read nothing has seen nothing.
            self.registers.doing[user] = None;
            return;
        }
        if doing.sent {
            return;
        }
        let sent = match command(object, call) {
            None => self.ask_somebody(user, begun),
            Some(kind) => self.ask_leader(user, begun, kind),
        };
        let (step, moment) = (self.step, self.registers.now());
        if let Some(doing) = &mut self.registers.doing[user] {
            if sent {
                (doing.sent, doing.asked, doing.tries) = (true, (moment, step), doing.tries + 1);
            } else if doing.tries == 0 {
                // It never began.
                self.registers.doing[user] = None;
            }
        }
    }

    fn ask_somebody(&mut self, user: usize, begun: u64) -> bool {
        let Some(id) = self.random.choice(self.ids()) else {
            return false;
        };
        self.tickets += 1;
        let (ticket, since) = (self.tickets, self.step);
        let asked = self.is_up(id) && self.core(id).read(ticket);
        if asked {
            let reading = Reading {
                least: self.checks.acknowledged,
                since,
                user: Some((user, begun)),
                lease: false,
            };
            self.replica(id).reading.insert(ticket, reading);
        }
        asked
    }

    fn ask_leader(&mut self, user: usize, begun: u64, kind: Kind) -> bool {
        let Some(leader) = self.find_leader() else {
            return false;
        };
        // A creation has a name, under which it is carried out once, however often it is asked for.
        let once = matches!(kind, Kind::CreateResourceGroup(_));
        let key = once.then(|| RequestKey {
            caller: format!("users/h{user}"),
            id: begun.to_string(),
            digest: vec![0],
        });
        self.propose(leader, kind, key, Asked::User(user, begun))
    }

    fn take_doing(&mut self, user: usize, begun: u64) -> Option<Doing> {
        self.registers.doing[user].take_if(|doing| doing.begun == begun)
    }

    /// A read is answered.
    pub(super) fn show(&mut self, (user, begun): (usize, u64), state: &State) {
        if let Some(doing) = self.take_doing(user, begun) {
            let seen = look(state, doing.object);
            self.registers.note(user, &doing, begun, Some(seen));
        }
    }

    pub(super) fn answer_user(&mut self, user: usize, begun: u64, proposed: &Proposed) {
        let Some(mut doing) = self.take_doing(user, begun) else {
            return;
        };
        let (again, call) = (doing.asked.0, doing.call);
        let registers = &mut self.registers;
        let unsure = doing.tries > 1;
        match proposed {
            Proposed::Applied(result) => match outcome(call, result) {
                // What is shown is there by now, and may have been for some time.
                Some(Outcome::Shown(..)) if unsure => {
                    registers.note(user, &doing, begun, Some(Outcome::Done));
                    self.checks.saw("a creation is asked for again");
                }
                Some(seen) if unsure => {
                    // It was not carried out under its name so far; what was sent first may yet be on its way.
                    registers.note(user, &doing, again, Some(seen));
                    registers.note(user, &doing, begun, None);
                }
                Some(seen) => registers.note(user, &doing, begun, Some(seen)),
                None if unsure => registers.note(user, &doing, begun, None),
                None => {}
            },
            Proposed::NotLeader if !unsure => {}
            Proposed::Unknown | Proposed::NotLeader => {
                if matches!(call, Call::Create(_)) && doing.tries < TRIES {
                    doing.sent = false;
                    registers.doing[user] = Some(doing);
                } else {
                    registers.note(user, &doing, begun, None);
                }
            }
        }
    }
}
