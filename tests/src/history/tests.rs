use super::*;

const BUDGET: u64 = 2_000_000;

fn op(client: u64, call: Call, begun: u64, ended: u64, outcome: Outcome) -> Op {
    let ended = Some((ended, outcome));
    Op {
        client,
        call,
        begun,
        ended,
    }
}

fn open(call: Call, begun: u64) -> Op {
    Op {
        client: 99,
        call,
        begun,
        ended: None,
    }
}

fn good(what: &str, history: &[Op]) {
    let verdict = check(history, BUDGET);
    assert_eq!(verdict, Verdict::Linearizable, "{what}");
    assert!(by_force(history), "{what}: the other way");
}

fn bad(what: &str, history: &[Op]) -> Explanation {
    assert!(!by_force(history), "{what}: the other way");
    match check(history, BUDGET) {
        Verdict::Not(explanation) => explanation,
        other => panic!("{what}: {other:?}"),
    }
}

use Call::{Create, Delete, DeleteIf, Read, Write, WriteIf};
use Outcome::{Absent, Done, Exists, Shown, Stale};

/// The object is made with the value 1 at the revision 2.
fn made() -> Op {
    op(0, Create(1), 0, 1, Shown(1, 2))
}

#[test]
fn one_client_sees_what_it_did() {
    good("nothing", &[]);
    good(
        "a life",
        &[
            op(1, Read, 0, 1, Absent),
            op(1, Create(1), 2, 3, Shown(1, 4)),
            op(1, Create(2), 4, 5, Exists),
            op(1, WriteIf(4, 2), 6, 7, Shown(2, 6)),
            op(1, WriteIf(4, 3), 8, 9, Stale(6)),
            op(1, Read, 10, 11, Shown(2, 6)),
            op(1, DeleteIf(6), 12, 13, Done),
            op(1, Write(3), 14, 15, Absent),
            op(1, Create(4), 16, 17, Shown(4, 9)),
        ],
    );
    let at = bad("a read of nothing", &[op(1, Read, 0, 1, Shown(1, 1))]);
    assert_eq!(at.answers_before, 0);
}

#[test]
fn a_stale_read_is_found() {
    let written = op(1, Write(2), 2, 5, Shown(2, 7));
    let read = |begun, ended, value, revision| op(2, Read, begun, ended, Shown(value, revision));
    good("while it is written", &[made(), written, read(3, 4, 1, 2)]);
    good("early", &[made(), written, read(3, 4, 2, 7)]);
    good("touching", &[made(), written, read(5, 6, 1, 2)]);
    bad("after it was written", &[made(), written, read(6, 7, 1, 2)]);
    let written = op(1, Write(2), 2, 6, Shown(2, 7));
    let old = op(3, Read, 4, 5, Shown(1, 2));
    let back = [made(), written, read(2, 3, 2, 7), old];
    let explanation = bad("new, then old", &back);
    assert_eq!(explanation.last, old);
    let said = explanation.to_string();
    assert!(
        said.contains("impossible: client 3: Read, from 4 to 5: Shown(1, 2)"),
        "{said}"
    );
    // What came later says nothing of it.
    let longer = [&back[..], &[read(8, 9, 2, 7)]].concat();
    assert_eq!(bad("and later", &longer).last, old);
}

#[test]
fn a_lost_update_is_found() {
    let both = [
        made(),
        op(1, WriteIf(2, 2), 2, 5, Shown(2, 3)),
        op(2, WriteIf(2, 3), 2, 5, Shown(3, 4)),
    ];
    bad("both wrote on the same revision", &both);
    let lost = [
        made(),
        op(1, Write(2), 2, 3, Shown(2, 3)),
        op(2, Read, 4, 5, Shown(1, 2)),
    ];
    bad("a write is gone", &lost);
    let deleted = [
        made(),
        op(1, Delete, 2, 3, Done),
        op(2, Read, 4, 5, Shown(1, 2)),
    ];
    bad("a deletion is gone", &deleted);
}

#[test]
fn what_is_applied_twice_is_found() {
    let once = op(1, Write(2), 2, 3, Shown(2, 3));
    let between = op(2, Write(3), 4, 5, Shown(3, 4));
    bad(
        "again",
        &[made(), once, between, op(3, Read, 6, 7, Shown(2, 5))],
    );
    bad(
        "another revision",
        &[made(), once, op(3, Read, 6, 7, Shown(2, 4))],
    );
    let twice = [
        op(1, Create(1), 0, 9, Done),
        op(2, Read, 1, 2, Shown(1, 2)),
        op(2, Delete, 3, 4, Done),
        op(2, Read, 5, 6, Shown(1, 5)),
    ];
    bad("made twice by one request", &twice);
    let gone = [made(), op(1, Delete, 2, 4, Done), op(2, Delete, 3, 5, Done)];
    bad("deleted twice", &gone);
    bad(
        "made by two",
        &[
            op(1, Create(1), 0, 2, Shown(1, 1)),
            op(2, Create(2), 0, 2, Shown(2, 2)),
        ],
    );
}

#[test]
fn revisions_only_rise() {
    let read = op(2, Read, 6, 7, Shown(2, 2));
    bad("the same", &[made(), op(1, Write(2), 2, 3, Shown(2, 2))]);
    bad("back", &[made(), op(1, Write(2), 2, 3, Shown(2, 1))]);
    let anew = op(1, Create(2), 4, 5, Shown(2, 2));
    bad(
        "of a new one",
        &[made(), op(1, Delete, 2, 3, Done), anew, read],
    );
    // The deletion had one, too.
    let anew = op(1, Create(2), 4, 5, Shown(2, 3));
    bad("next", &[made(), op(1, Delete, 2, 3, Done), anew]);
    let anew = op(1, Create(2), 4, 5, Shown(2, 4));
    good("after", &[made(), op(1, Delete, 2, 3, Done), anew]);
}

#[test]
fn what_was_never_answered_may_have_happened_late_or_never() {
    let write = open(Write(2), 2);
    let read = |at, value, revision| op(1, Read, at, at + 1, Shown(value, revision));
    good("never", &[made(), write, read(3, 1, 2)]);
    good("at once", &[made(), write, read(3, 2, 3)]);
    good(
        "late",
        &[made(), write, read(3, 1, 2), read(5, 2, 9), read(7, 2, 9)],
    );
    bad("twice", &[made(), write, read(3, 2, 3), read(5, 1, 2)]);
    bad(
        "not the same",
        &[made(), write, read(3, 2, 3), read(5, 2, 4)],
    );
    bad(
        "before it began",
        &[made(), read(1, 2, 3), open(Write(2), 9)],
    );
    let on_it = [made(), write, op(1, WriteIf(5, 3), 3, 4, Shown(3, 6))];
    good("a revision that nobody was told", &on_it);
    bad(
        "one too low",
        &[made(), write, op(1, WriteIf(1, 3), 3, 4, Shown(3, 6))],
    );
    let told = [
        made(),
        write,
        op(1, WriteIf(2, 3), 3, 4, Stale(5)),
        read(5, 2, 5),
    ];
    good("told by a refusal", &told);
    bad(
        "of nothing",
        &[made(), op(1, WriteIf(2, 3), 3, 4, Stale(5))],
    );
    let dead = [made(), open(Delete, 2), op(1, Read, 3, 4, Absent)];
    good("a deletion", &dead);
    let anew = [&dead[..], &[open(Create(7), 3), read(5, 7, 4)]].concat();
    good("and a new one", &anew);
    let back = [&anew[..], &[op(1, Read, 7, 8, Absent)]].concat();
    bad("one deletion deletes once", &back);
    good(
        "a condition",
        &[made(), open(WriteIf(2, 5), 2), read(4, 5, 3)],
    );
    bad("not met", &[made(), open(WriteIf(1, 5), 2), read(4, 5, 3)]);
}

#[test]
fn a_budget_that_is_used_up_is_no_pass() {
    assert_eq!(check(&[made()], 0), Verdict::Undecided);
    assert_eq!(check(&[made()], BUDGET), Verdict::Linearizable);
}

/// The same question, answered by trying every order, with revisions that are what they are.
fn by_force(history: &[Op]) -> bool {
    // Above all that were shown there is room for those that were not.
    let shown = history.iter().filter_map(|op| match op.ended?.1 {
        Shown(_, revision) | Stale(revision) => Some(revision),
        _ => None,
    });
    let asked = history.iter().filter_map(|op| match op.call {
        WriteIf(revision, _) | DeleteIf(revision) => Some(revision),
        _ => None,
    });
    let top = shown.chain(asked).max().unwrap_or(0) + history.len() as u64;
    force(history, &mut vec![false; history.len()], (None, 0), top)
}

type Plain = (Option<Value>, Revision);

fn force(history: &[Op], taken: &mut Vec<bool>, object: Plain, top: Revision) -> bool {
    let left = |taken: &[bool], op: usize| !taken[op];
    if (0..history.len()).all(|op| taken[op] || history[op].ended.is_none()) {
        return true;
    }
    let deadline = (0..history.len())
        .filter(|op| left(taken, *op))
        .filter_map(|op| history[op].ended)
        .map(|(at, _)| at)
        .min();
    for op in 0..history.len() {
        let early = deadline.is_none_or(|deadline| history[op].begun <= deadline);
        if taken[op] || !early {
            continue;
        }
        taken[op] = true;
        for next in nexts(&history[op], object, top) {
            if force(history, taken, next, top) {
                return true;
            }
        }
        taken[op] = false;
    }
    false
}

/// All that can come of an operation.
fn nexts(op: &Op, (value, revision): Plain, top: Revision) -> Vec<Plain> {
    let refusal = match (op.call, value) {
        (Read, None) | (Write(_) | WriteIf(..) | Delete | DeleteIf(_), None) => Some(Absent),
        (Create(_), Some(_)) => Some(Exists),
        (WriteIf(at, _) | DeleteIf(at), Some(_)) if at != revision => Some(Stale(revision)),
        _ => None,
    };
    let told = op.ended.map(|(_, outcome)| outcome);
    if let Some(refusal) = refusal {
        let fits = told.is_none_or(|told| told == refusal);
        return fits.then_some((value, revision)).into_iter().collect();
    }
    let (written, shown) = match op.call {
        Read => {
            let fits = told.is_none_or(|told| Some(told) == value.map(|v| Shown(v, revision)));
            return fits.then_some((value, revision)).into_iter().collect();
        }
        Create(value) | Write(value) | WriteIf(_, value) => (Some(value), Some(value)),
        Delete | DeleteIf(_) => (None, None),
    };
    let fits = |at: &Revision| match told {
        None | Some(Done) => true,
        Some(told) => shown.is_some_and(|value| told == Shown(value, *at)),
    };
    let all = (revision + 1)..=top;
    all.filter(fits).map(|at| (written, at)).collect()
}

/// What some clients do to a real object, at the same time; some never have an answer.
fn played(random: &mut fastrand::Rng, ops: usize, clients: u64, lost: f64) -> Vec<Op> {
    let (mut object, mut now, mut value): (Plain, u64, u64) = ((None, 0), 0, 0);
    let mut history = Vec::new();
    // Who is about what: where its operation is, and whether it was carried out.
    let mut busy: Vec<Option<(usize, Option<Outcome>)>> = vec![None; clients as usize];
    while history.len() < ops || busy.iter().any(Option::is_some) {
        now += u64::from(random.f64() < 0.8);
        let client = random.usize(..busy.len());
        match busy[client] {
            None if history.len() < ops => {
                value += 1;
                let near = object.1.saturating_sub(random.u64(..2));
                let call = match random.u32(..10) {
                    0..4 => Read,
                    4 | 5 => Create(value),
                    6 => Write(value),
                    7 | 8 => WriteIf(near, value),
                    _ if random.bool() => Delete,
                    _ => DeleteIf(near),
                };
                history.push(open(call, now));
                history.last_mut().unwrap().client = client as u64;
                busy[client] = Some((history.len() - 1, None));
            }
            None => {}
            Some((op, None)) if random.f64() < lost / 2.0 => {
                // Never carried out.
                let _ = op;
                busy[client] = None;
            }
            Some((op, None)) => {
                let (next, outcome) = carried_out(history[op].call, object);
                object = next;
                busy[client] = Some((op, Some(outcome)));
            }
            Some((_, Some(_))) if random.f64() < lost / 2.0 => busy[client] = None,
            Some((op, outcome)) => {
                history[op].ended = outcome.map(|outcome| (now, outcome));
                busy[client] = None;
            }
        }
    }
    history
}

fn carried_out(call: Call, (value, revision): Plain) -> (Plain, Outcome) {
    let shown = |value| ((Some(value), revision + 1), Shown(value, revision + 1));
    match (call, value) {
        (Read, Some(value)) => ((Some(value), revision), Shown(value, revision)),
        (Create(new), None) => shown(new),
        (Create(_), Some(_)) => ((value, revision), Exists),
        (_, None) => ((value, revision), Absent),
        (WriteIf(at, _) | DeleteIf(at), _) if at != revision => {
            ((value, revision), Stale(revision))
        }
        (Write(new) | WriteIf(_, new), _) => shown(new),
        (Delete | DeleteIf(_), _) => ((None, revision + 1), Done),
    }
}

/// Somebody is told something else.
fn spoil(random: &mut fastrand::Rng, history: &mut [Op]) {
    let at = random.usize(..history.len());
    let other = match random.u32(..6) {
        0 => Absent,
        1 => Exists,
        2 => Done,
        3 => Stale(random.u64(1..6)),
        _ => Shown(random.u64(1..6), random.u64(1..6)),
    };
    match &mut history[at].ended {
        Some((_, Shown(_, revision))) if random.bool() => *revision = random.u64(1..6),
        Some((_, outcome)) => *outcome = other,
        None => history[at].ended = Some((history[at].begun + 3, other)),
    }
}

#[test]
fn it_says_what_trying_every_order_says() {
    let mut counts = [0, 0];
    for seed in 0..4000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let ops = random.usize(2..7);
        let clients = random.u64(2..5);
        let mut history = played(&mut random, ops, clients, 0.5);
        for _ in 0..random.u32(..3) {
            spoil(&mut random, &mut history);
        }
        let expected = by_force(&history);
        let verdict = check(&history, BUDGET);
        let said = match &verdict {
            Verdict::Linearizable => true,
            Verdict::Not(_) => false,
            Verdict::Undecided => panic!("seed {seed}: undecided"),
        };
        let text: Vec<_> = history.iter().map(Op::to_string).collect();
        assert_eq!(
            said,
            expected,
            "seed {seed}: {verdict:?}\n{}",
            text.join("\n")
        );
        counts[usize::from(said)] += 1;
        if let Verdict::Not(explanation) = verdict {
            let (at, _) = explanation.last.ended.unwrap();
            assert!(!by_force(&until(&history, at)), "seed {seed}");
            let before = history.iter().filter_map(|op| Some(op.ended?.0));
            let before = before.filter(|end| *end < at).max();
            let shorter = before.map(|before| until(&history, before));
            assert!(
                shorter.is_none_or(|shorter| by_force(&shorter)),
                "seed {seed}"
            );
        }
    }
    assert!(counts.iter().all(|count| *count > 800), "{counts:?}");
}

#[test]
fn long_histories_with_many_open_ends_are_judged_in_time() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut history = played(&mut random, 2000, 12, 0.1);
        let open = history.iter().filter(|op| op.ended.is_none()).count();
        assert!(open > 100, "{open}");
        assert_eq!(
            check(&history, BUDGET),
            Verdict::Linearizable,
            "seed {seed}"
        );
        let reads = (0..history.len()).filter(|at| {
            let op = &history[*at];
            matches!((op.call, op.ended), (Read, Some((_, Shown(..)))))
        });
        let reads: Vec<_> = reads.collect();
        let (early, late) = (reads[reads.len() / 2], reads[reads.len() * 3 / 4]);
        // What was read long ago is read again.
        let outcome = history[early].ended.unwrap().1;
        history[late].ended = history[late].ended.map(|(at, _)| (at, outcome));
        match check(&history, BUDGET) {
            Verdict::Not(explanation) => {
                let at = |op: &Op| op.ended.unwrap().0;
                assert_eq!(at(&explanation.last), at(&history[late]), "seed {seed}");
            }
            other => panic!("seed {seed}: {other:?}"),
        }
    }
}

#[test]
fn a_wrong_answer_late_in_a_long_history_is_found() {
    let mut found = 0;
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut history = played(&mut random, 1000, 6, 0.02);
        let late = history.len() * 3 / 4;
        let other = match history[late].ended {
            Some((_, Absent)) => Done,
            Some((_, Exists | Stale(_) | Done)) => Absent,
            _ => Shown(7_000_000, 7_000_000),
        };
        history[late].ended = history[late].ended.map(|(at, _)| (at, other));
        // It may be possible all the same, or too much to find out; but mostly it is neither.
        found += usize::from(matches!(check(&history, BUDGET), Verdict::Not(_)));
    }
    assert!(found >= 15, "{found}");
}
