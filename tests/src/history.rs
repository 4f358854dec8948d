//! Whether what clients saw of one object could have happened one thing after another: a checker of linearizability, after Wing,
//! Gong and Lowe.
//!
//! The object is a register that can be absent, with a revision: created, read, written, written if it still has a revision,
//! deleted. Several objects are several histories: whoever has a history of many checks each by itself, which says as much and costs
//! far less. Nothing is said here of how one object's changes lie to another's, and nothing of watches and lists.
//!
//! Nobody can know beforehand which revision a change gets, and who never had an answer does not learn it. So the model knows of a
//! revision either what it is, or from where on it lies: each change that is not known raises that bound by one, since it takes at least
//! one revision, and the first answer that shows the revision settles it. Every object that could be there lies within what the model
//! says of it, so nothing that could have happened is called impossible; and all that is forgotten is that a conditional write
//! that was never answered did *not* happen because its revision had passed, which is as good as one that never came.
//!
//! An operation without an answer may have happened at any time since it began, or never. `search` says what keeps many of those from
//! costing all their subsets.
//!
//! There is no clock, randomness or I/O in it: times are whatever numbers the caller gives, and the same history always gets the same
//! verdict.

use std::fmt;

mod search;

use search::Search;

/// What is written. Histories in which nothing is written twice can be judged best.
pub type Value = u64;
/// Which state of the object it is; every change has a higher one than all before it.
pub type Revision = u64;

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Read,
    Create(Value),
    Write(Value),
    WriteIf(Revision, Value),
    Delete,
    DeleteIf(Revision),
}

/// What it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The object as it was read, or as what was asked for has left it.
    Shown(Value, Revision),
    /// It was carried out; nothing was shown.
    Done,
    /// There is no such object.
    Absent,
    /// There is one already.
    Exists,
    /// It has this revision, and not the one that was asked for.
    Stale(Revision),
}

/// One operation on the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// Who: for explanations only.
    pub client: u64,
    pub call: Call,
    pub begun: u64,
    /// When the answer came, and what it was; none where it never came.
    pub ended: Option<(u64, Outcome)>,
}

/// What is known of the object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Object {
    /// None where it is absent.
    value: Option<Value>,
    /// Its revision is known; else `revision` is the lowest that it can be.
    exact: bool,
    /// Of the latest change, deletion included.
    revision: Revision,
}

/// What the checker has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Linearizable,
    /// It could not have happened; why not.
    Not(Explanation),
    /// The budget was used up before it was known: not a pass.
    Undecided,
}

/// The shortest part of a history, from its beginning on, that could not have happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The answer by which it is impossible.
    pub last: Op,
    /// How many answers there were before it.
    pub answers_before: usize,
    /// The end of an order that explains all answers before it, and what the object then is.
    pub order: Vec<Op>,
    pub object: String,
    /// What was asked for and not answered, or not yet, at that time.
    pub open: Vec<Op>,
}

/// So much of an order is shown.
const SHOWN_MAX: usize = 12;

impl Object {
    fn is_there_at(&self, revision: Revision) -> bool {
        self.value.is_some() && self.may_have(revision)
    }

    fn may_have(&self, revision: Revision) -> bool {
        match self.exact {
            true => revision == self.revision,
            false => revision >= self.revision,
        }
    }

    /// The same, with its revision known from an answer.
    fn settled(self, revision: Revision) -> Option<Object> {
        let exact = true;
        self.is_there_at(revision).then_some(Object {
            exact,
            revision,
            ..self
        })
    }

    /// What a call that is carried out makes of it; none where it would have been refused, or changes nothing.
    fn changed(self, call: Call) -> Option<Object> {
        let to = |value, before: Revision| {
            let (exact, revision) = (false, before.saturating_add(1));
            Some(Object {
                value,
                exact,
                revision,
            })
        };
        match call {
            Call::Create(value) if self.value.is_none() => to(Some(value), self.revision),
            Call::Write(value) if self.value.is_some() => to(Some(value), self.revision),
            Call::Delete if self.value.is_some() => to(None, self.revision),
            Call::WriteIf(at, value) if self.is_there_at(at) => to(Some(value), at),
            Call::DeleteIf(at) if self.is_there_at(at) => to(None, at),
            _ => None,
        }
    }

    /// What it is after an operation; none where that cannot have ended so.
    fn after(self, op: &Op) -> Option<Object> {
        let Some((_, outcome)) = op.ended else {
            return self.changed(op.call);
        };
        match (outcome, op.call) {
            (Outcome::Shown(value, revision), Call::Read) => {
                self.settled(revision).filter(|_| self.value == Some(value))
            }
            (Outcome::Shown(value, revision), call) => {
                let changed = self.changed(call)?;
                let written = changed.value == Some(value);
                changed.settled(revision).filter(|_| written)
            }
            (Outcome::Done, call) => self.changed(call),
            (Outcome::Absent, Call::Create(_)) => None,
            (Outcome::Absent, _) => self.value.is_none().then_some(self),
            (Outcome::Exists, Call::Create(_)) => self.value.is_some().then_some(self),
            (Outcome::Stale(actual), Call::WriteIf(at, _) | Call::DeleteIf(at)) => {
                self.settled(actual).filter(|_| actual != at)
            }
            (Outcome::Exists | Outcome::Stale(_), _) => None,
        }
    }

    /// The highest revision that the object can have before an operation, where its answer says so.
    fn limit(op: &Op) -> Option<Revision> {
        match (op.call, op.ended?.1) {
            (Call::WriteIf(at, _) | Call::DeleteIf(at), Outcome::Shown(..) | Outcome::Done) => {
                Some(at)
            }
            (Call::Read, Outcome::Shown(_, revision)) | (_, Outcome::Stale(revision)) => {
                Some(revision)
            }
            (_, Outcome::Shown(_, revision)) => Some(revision.saturating_sub(1)),
            _ => None,
        }
    }

    /// The lowest revision that it can have after an operation, as far as its answer says.
    fn least(op: &Op) -> Revision {
        match (op.call, op.ended) {
            (_, Some((_, Outcome::Shown(_, revision) | Outcome::Stale(revision)))) => revision,
            (Call::WriteIf(at, _) | Call::DeleteIf(at), Some((_, Outcome::Done))) => at + 1,
            _ => 0,
        }
    }

    /// Whether everything that can follow another one can follow this one as well.
    fn covers(&self, other: &Object) -> bool {
        let within = !self.exact && self.revision <= other.revision;
        self == other || (self.value == other.value && within)
    }
}

/// Says whether a history could have happened, one operation after another, to an object that is absent in the beginning. Operations
/// of which one ends at the very time at which another one begins may have had any order. The budget is a number of steps.
pub fn check(history: &[Op], budget: u64) -> Verdict {
    let mut budget = budget;
    match search(history, &mut budget).0 {
        Some(true) => return Verdict::Linearizable,
        Some(false) => {}
        None => return Verdict::Undecided,
    }
    // Whatever begins like an impossible history and goes on is impossible: the shortest such beginning is found by halving.
    let mut ends: Vec<u64> = history.iter().filter_map(|op| Some(op.ended?.0)).collect();
    ends.sort_unstable();
    let (mut good, mut bad) = (0, ends.len());
    while bad - good > 1 {
        let middle = (good + bad) / 2;
        match search(&until(history, ends[middle - 1]), &mut budget).0 {
            Some(true) => good = middle,
            Some(false) => bad = middle,
            None => return Verdict::Undecided,
        }
    }
    let before = match good {
        0 => Vec::new(),
        good => until(history, ends[good - 1]),
    };
    let (_, search) = search(&before, &mut budget);
    Verdict::Not(explain(
        &until(history, ends[bad - 1]),
        search,
        ends[bad - 1],
    ))
}

fn search<'a>(ops: &'a [Op], budget: &mut u64) -> (Option<bool>, Search<'a>) {
    let mut search = Search::new(ops);
    (search.run(budget), search)
}

/// What was known of a history at a time.
fn until(history: &[Op], time: u64) -> Vec<Op> {
    let then = history.iter().filter(|op| op.begun <= time);
    let cut = |op: &Op| Op {
        ended: op.ended.filter(|(at, _)| *at <= time),
        ..*op
    };
    then.map(cut).collect()
}

fn explain(ops: &[Op], search: Search<'_>, time: u64) -> Explanation {
    let last = ops
        .iter()
        .find(|op| op.ended.is_some_and(|(at, _)| at == time));
    let open = |op: &&Op| op.ended.is_none() && op.call != Call::Read;
    let (order, object) = search.furthest();
    Explanation {
        last: *last.expect("the time is that of an answer"),
        answers_before: ops.iter().filter(|op| op.ended.is_some()).count() - 1,
        order,
        object: object.to_string(),
        open: ops.iter().filter(open).copied().collect(),
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = if self.exact { "" } else { "at least " };
        match self.value {
            Some(value) => write!(f, "{value} at revision {at}{}", self.revision),
            None => write!(f, "absent since revision {at}{}", self.revision),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "client {}: {:?}, from {}",
            self.client, self.call, self.begun
        )?;
        match self.ended {
            Some((at, outcome)) => write!(f, " to {at}: {outcome:?}"),
            None => write!(f, ", no answer"),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (last, before) = (&self.last, self.answers_before);
        writeln!(f, "after {before} answers this one is impossible: {last}")?;
        writeln!(f, "one order of those before ends with:")?;
        for op in &self.order {
            writeln!(f, "  {op}")?;
        }
        writeln!(f, "then it is {}; open at that time:", self.object)?;
        for op in self.open.iter().rev().take(SHOWN_MAX) {
            writeln!(f, "  {op}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
