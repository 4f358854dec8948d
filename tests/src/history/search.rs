//! The search of [`super::check`]: depth first, and never twice from where it was.
//!
//! Among all orders that explain a history there is one with the fewest operations that were never answered. Some things follow
//! that leave most orders out, and never that one. In it no such operation is followed at once by one that leads to as much without
//! it. Of several that began and are alike, in all that anybody was shown, it takes the oldest. Nothing is gained from a place
//! where another one was that had the same answers in its order, no other unanswered operations, and an object of which as much can
//! come. And the object's revision never passes what an answer still to come says that it was; this holds in every order.

use std::collections::{BTreeSet, HashMap};

use super::{Call, Object, Op, Outcome, Revision, Value};

/// So much of an order is kept to be shown.
const SHOWN_MAX: usize = 12;

/// A place in the list of what happened: the beginnings of answered operations and their answers, by time.
#[derive(Clone, Copy)]
struct Place {
    time: u64,
    op: usize,
    answer: bool,
    before: usize,
    next: usize,
}

/// What may be next in the order.
#[derive(Clone, Copy)]
enum Candidate {
    /// By its place in the list.
    Answered(usize),
    /// Those of the unanswered ones before this.
    Open(usize),
}

/// A step of the order that is being tried, and the object before it.
struct Step {
    taken: Candidate,
    object: Object,
}

/// Which operations are in an order.
type Taken = Vec<u64>;
/// The answered ones, and what is known of the object but for a bound of its revision.
type Key = (Taken, Option<Value>, Option<Revision>);

/// A search.
pub(super) struct Search<'a> {
    given: &'a [Op],
    /// The same, but that what was never shown is one value.
    ops: Vec<Op>,
    /// The first and the last stand for the ends of the list.
    places: Vec<Place>,
    /// Where the answer of each is, if it has one.
    answers: Vec<Option<usize>>,
    /// Those that were never answered, by when they began.
    open: Vec<usize>,
    /// For each of them one before it that is alike.
    alike: Vec<Option<usize>>,
    /// Those that need a revision.
    conditional: Vec<(Revision, usize)>,
    answered_taken: Taken,
    open_taken: Taken,
    left: usize,
    /// What the answers that are not in the order yet say of the object's revision: the highest that it may have.
    limits: BTreeSet<(Revision, usize)>,
    /// The unanswered ones that were taken there, and the bound.
    seen: HashMap<Key, Vec<(Taken, Revision)>>,
    order: Vec<Step>,
    /// The order that explained most answers, and what the object then was.
    best: (usize, Vec<Op>, Object),
}

impl<'a> Search<'a> {
    pub(super) fn new(given: &'a [Op]) -> Search<'a> {
        let ops = without_hidden(given);
        let mut events = Vec::new();
        for (at, op) in ops.iter().enumerate() {
            if let Some((ended, _)) = op.ended {
                events.push((op.begun, false, at));
                events.push((ended.max(op.begun), true, at));
            }
        }
        // At one time beginnings come first: then the two may have had any order.
        events.sort_unstable();
        let none = (0, false, usize::MAX);
        let last = events.len() + 1;
        let mut answers = vec![None; ops.len()];
        let mut places = Vec::with_capacity(last + 1);
        let all = std::iter::once(none).chain(events).chain([none]);
        for (at, (time, answer, op)) in all.enumerate() {
            let (before, next) = (at.saturating_sub(1), (at + 1).min(last));
            places.push(Place {
                time,
                op,
                answer,
                before,
                next,
            });
            if answer {
                answers[op] = Some(at);
            }
        }
        let mut open: Vec<_> = (0..ops.len()).filter(|op| answers[*op].is_none()).collect();
        open.sort_by_key(|op| ops[*op].begun);
        let latest = |at: usize| {
            (0..at)
                .rev()
                .find(|b| ops[open[*b]].call == ops[open[at]].call)
        };
        let alike = (0..open.len()).map(latest).collect();
        let condition = |op: &usize| match ops[*op].call {
            Call::WriteIf(at, _) | Call::DeleteIf(at) => Some((at, *op)),
            _ => None,
        };
        let conditional = open.iter().filter_map(condition).collect();
        let limits = ops.iter().enumerate();
        let limits = limits
            .filter_map(|(at, op)| Some((Object::limit(op)?, at)))
            .collect();
        let words = ops.len().div_ceil(64);
        Search {
            given,
            alike,
            conditional,
            places,
            left: ops.len() - open.len(),
            answers,
            open,
            answered_taken: vec![0; words],
            open_taken: vec![0; words],
            ops,
            limits,
            seen: HashMap::new(),
            order: Vec::new(),
            best: (usize::MAX, Vec::new(), Object::default()),
        }
    }

    /// Whether there is an order; none where the budget was used up.
    pub(super) fn run(&mut self, budget: &mut u64) -> Option<bool> {
        if !self.revisions_rise() {
            return Some(false);
        }
        let mut object = Object::default();
        self.note(object);
        let first = |search: &Search<'_>| Candidate::Answered(search.places[0].next);
        let mut at = first(self);
        while self.left > 0 {
            *budget = budget.checked_sub(1)?;
            // Unanswered ones are tried last: only where nothing else goes on.
            let (op, next) = match at {
                Candidate::Answered(place) => {
                    let Place {
                        time,
                        op,
                        answer,
                        next,
                        ..
                    } = self.places[place];
                    if answer {
                        let begun = |op: &usize| self.ops[*op].begun <= time;
                        at = Candidate::Open(self.open.partition_point(begun));
                        continue;
                    }
                    (op, Candidate::Answered(next))
                }
                Candidate::Open(0) => {
                    let Some(step) = self.order.pop() else {
                        return Some(false);
                    };
                    at = self.put_back(step.taken);
                    object = step.object;
                    continue;
                }
                Candidate::Open(from) if !self.may_take(from - 1) => {
                    at = Candidate::Open(from - 1);
                    continue;
                }
                Candidate::Open(from) => (self.open[from - 1], Candidate::Open(from - 1)),
            };
            let Some(after) = self.goes_on(object, op) else {
                at = next;
                continue;
            };
            let taken = match at {
                Candidate::Open(_) => next,
                answered => answered,
            };
            self.order.push(Step { taken, object });
            self.take_out(taken);
            object = after;
            self.note(object);
            at = first(self);
        }
        Some(true)
    }

    /// What must hold in any order: nobody is answered from before what another one had been answered when he asked. Most of what is
    /// stale is found by this, at once.
    fn revisions_rise(&self) -> bool {
        let mut latest = 0;
        let events = &self.places[1..self.places.len() - 1];
        events.iter().all(|place| {
            let op = &self.ops[place.op];
            if place.answer {
                latest = latest.max(Object::least(op));
            }
            place.answer || Object::limit(op).is_none_or(|limit| limit >= latest)
        })
    }

    /// The end of the order that explained most, and what the object then was.
    pub(super) fn furthest(self) -> (Vec<Op>, Object) {
        (self.best.1, self.best.2)
    }

    /// One that was not taken yet, nor are there older ones that are alike.
    fn may_take(&self, at: usize) -> bool {
        let taken = |at: usize| has(&self.open_taken, self.open[at]);
        !taken(at) && self.alike[at].is_none_or(taken)
    }

    /// What the object is after one more operation, if it is worth while to go on from there.
    fn goes_on(&mut self, object: Object, op: usize) -> Option<Object> {
        let next = object.after(&self.ops[op])?;
        let passed = |(limit, other): &&(Revision, usize)| *other != op && *limit < next.revision;
        if self.limits.iter().take(2).any(|limit| passed(&limit)) {
            return None;
        }
        let unanswered = self
            .order
            .last()
            .filter(|step| matches!(step.taken, Candidate::Open(_)));
        let without = unanswered.and_then(|step| step.object.after(&self.ops[op]));
        if without.is_some_and(|without| without.covers(&next)) {
            return None;
        }
        self.is_new(op, &next).then_some(next)
    }

    fn is_new(&mut self, op: usize, next: &Object) -> bool {
        let (mut answered, mut open) = (self.answered_taken.clone(), self.open_taken.clone());
        match self.answers[op] {
            Some(_) => flip(&mut answered, op),
            None => flip(&mut open, op),
        }
        for (_, passed) in self
            .conditional
            .iter()
            .filter(|(at, _)| *at < next.revision)
        {
            // Whether it was taken makes no difference any more.
            open[passed / 64] |= 1 << (passed % 64);
        }
        let exact = next.exact.then_some(next.revision);
        let seen = self.seen.entry((answered, next.value, exact)).or_default();
        let within = |(other, revision): &(Taken, Revision)| {
            let mut words = other.iter().zip(&open);
            *revision <= next.revision && words.all(|(other, open)| other & !open == 0)
        };
        let new = !seen.iter().any(within);
        if new {
            seen.push((open, next.revision));
        }
        new
    }

    fn note(&mut self, object: Object) {
        if self.left < self.best.0 {
            let from = self.order.len().saturating_sub(SHOWN_MAX);
            let order = self.order[from..].iter().map(|step| match step.taken {
                Candidate::Answered(place) => self.given[self.places[place].op],
                Candidate::Open(at) => self.given[self.open[at]],
            });
            self.best = (self.left, order.collect(), object);
        }
    }

    fn take_out(&mut self, taken: Candidate) {
        match taken {
            Candidate::Open(at) => flip(&mut self.open_taken, self.open[at]),
            Candidate::Answered(place) => {
                let op = self.places[place].op;
                flip(&mut self.answered_taken, op);
                if let Some(limit) = Object::limit(&self.ops[op]) {
                    self.limits.remove(&(limit, op));
                }
                self.left -= 1;
                self.unlink(place);
                self.unlink(self.answers[op].expect("it was answered"));
            }
        }
    }

    /// Undoes the latest `take_out`; returns what is to be tried instead.
    fn put_back(&mut self, taken: Candidate) -> Candidate {
        match taken {
            Candidate::Open(at) => {
                flip(&mut self.open_taken, self.open[at]);
                taken
            }
            Candidate::Answered(place) => {
                let op = self.places[place].op;
                flip(&mut self.answered_taken, op);
                if let Some(limit) = Object::limit(&self.ops[op]) {
                    self.limits.insert((limit, op));
                }
                self.left += 1;
                self.link(self.answers[op].expect("it was answered"));
                self.link(place);
                Candidate::Answered(self.places[place].next)
            }
        }
    }

    fn unlink(&mut self, at: usize) {
        let Place { before, next, .. } = self.places[at];
        self.places[before].next = next;
        self.places[next].before = before;
    }

    /// Undoes the latest `unlink`.
    fn link(&mut self, at: usize) {
        let Place { before, next, .. } = self.places[at];
        self.places[before].next = at;
        self.places[next].before = at;
    }
}

/// A history in which all values that were never shown to anybody are the same one.
fn without_hidden(given: &[Op]) -> Vec<Op> {
    let shown = given.iter().filter_map(|op| match op.ended?.1 {
        Outcome::Shown(value, _) => Some(value),
        _ => None,
    });
    let shown: BTreeSet<_> = shown.collect();
    let hidden = (0..).find(|value| !shown.contains(value));
    let hidden = hidden.expect("there are more values than answers");
    let of = |value| {
        if shown.contains(&value) {
            value
        } else {
            hidden
        }
    };
    let alike = |op: &Op| Op {
        call: match op.call {
            Call::Create(value) => Call::Create(of(value)),
            Call::Write(value) => Call::Write(of(value)),
            Call::WriteIf(at, value) => Call::WriteIf(at, of(value)),
            other => other,
        },
        ..*op
    };
    given.iter().map(alike).collect()
}

fn has(taken: &Taken, op: usize) -> bool {
    taken[op / 64] & (1 << (op % 64)) != 0
}

fn flip(taken: &mut Taken, op: usize) {
    taken[op / 64] ^= 1 << (op % 64);
}
