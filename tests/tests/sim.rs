//! Seeds of the simulator. `BATCHAI_SIM_SEEDS=N` plays so many, `BATCHAI_SIM_SEED=S` one; `BATCHAI_SIM_MINUTES=N` plays for so long, from
//! seed `BATCHAI_SIM_FIRST` on (0 where it is left out).

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchai_proto::v1::job::OnNodeLoss;
use batchai_tests::sim::{Outcome, outage, play};

/// Played with every change: as many as two cores play within a minute, as tests are built.
const SEEDS: u64 = 200;

/// What must come up among the seeds, else they do not try what they are for.
const SOMETIMES: [&str; 50] = [
    "a backup is restored",
    "an ensemble has been written to for long",
    "a cluster mounts a file server",
    "a creation is asked for again",
    "a disk is slow",
    "a disk of file servers is away",
    "a failed run is tried again",
    "a file server fails",
    "a file server is being deleted",
    "a file server is gone with all that lay on it",
    "a file server is served",
    "a file server waits for room",
    "a follower gets a snapshot",
    "a follower has a report recorded",
    "a follower is cut off together with agents",
    "a follower passes on a grant",
    "a lease is over amid a job",
    "a lease is over while its node is cut off",
    "a job mounts a file server",
    "a job mounts what an alias leads to",
    "a leader is lost while an attempt prepares",
    "a leader refuses a session",
    "a leader stands still",
    "a machine reboots amid a job",
    "a machine with file servers has another address",
    "a node has a live session already",
    "a read is answered",
    "a removed replica is told so",
    "a replica dies amid a write",
    "a replica gets a vote",
    "a replica that is alone lets its agents go",
    "a replica is added",
    "a replica is removed",
    "a replica starts from a snapshot",
    "a restore is accepted",
    "a shim dies amid a job",
    "a snapshot travels during a change of the membership",
    "a vote is split",
    "a wiped replica is replaced",
    "a write is torn",
    "an agent is killed amid a job",
    "an attempt is adopted",
    "an attempt is discarded",
    "leadership is handed over",
    "the clock of a leader jumps back",
    "the leader changes",
    "the replicas agree on what they hold",
    "what lay on a file server is missed",
    "what became of a proposal is not known",
    "what serves a file server dies",
];

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} must be a number")))
}

/// What is tried, as far as anybody knows: it may be no checkout.
fn commit() -> String {
    let git = std::process::Command::new("git")
        .args(["rev-parse", "HEAD"])
        .output();
    let said = git.ok().filter(|said| said.status.success());
    let said = said.and_then(|said| String::from_utf8(said.stdout).ok());
    said.map_or("unknown".to_owned(), |said| said.trim().to_owned())
}

fn must(seed: u64) -> Outcome {
    // Also a panic is to say in which seed it was.
    let played = std::panic::catch_unwind(AssertUnwindSafe(|| play(seed)));
    let played = played.unwrap_or_else(|_| Err("it panicked, see above".to_owned()));
    let outcome = played.unwrap_or_else(|why| {
        let commit = commit();
        panic!(
            "seed {seed}: {why}\ncommit {commit}\nagain: BATCHAI_SIM_SEED={seed} cargo test -p batchai-tests --test sim every_seed"
        )
    });
    assert!(outcome.commands >= 1000, "seed {seed}: {outcome:?}");
    outcome
}

/// Plays seeds on all cores until there are no more; returns how many, and how many saw what.
fn play_all(more: impl Fn(u64) -> bool + Sync) -> (u64, BTreeMap<&'static str, u64>) {
    let (next, played) = (AtomicU64::new(0), AtomicU64::new(0));
    let seen = Mutex::new(BTreeMap::<&str, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let count = next.fetch_add(1, Ordering::Relaxed);
                    if !more(count) {
                        return;
                    }
                    let outcome = must(number("BATCHAI_SIM_FIRST").unwrap_or(0) + count);
                    played.fetch_add(1, Ordering::Relaxed);
                    let mut seen = seen.lock().unwrap();
                    for what in outcome.sometimes {
                        *seen.entry(what).or_default() += 1;
                    }
                }
            });
        }
    });
    (played.into_inner(), seen.into_inner().unwrap())
}

#[test]
fn every_seed_keeps_what_must_hold() {
    if let Some(seed) = number("BATCHAI_SIM_SEED") {
        println!("{:?}", must(seed));
        return;
    }
    let begin = Instant::now();
    let minutes = number("BATCHAI_SIM_MINUTES").map(|minutes| Duration::from_secs(60 * minutes));
    let seeds = number("BATCHAI_SIM_SEEDS").unwrap_or(SEEDS);
    let (played, seen) = match minutes {
        Some(long) => play_all(|_| begin.elapsed() < long),
        None => play_all(|count| count < seeds),
    };
    let took = begin.elapsed();
    let rate = played as f64 / took.as_secs_f64();
    println!("{played} seeds in {took:.1?}, {rate:.2} seeds/s: {seen:#?}");
    for what in SOMETIMES {
        assert!(seen.contains_key(what), "never seen: {what}");
    }
}

/// Already two minutes are many leases of the simulator's nodes.
#[test]
fn a_job_that_waits_for_its_nodes_is_untouched_by_half_an_hour_of_an_outage() {
    let told = outage(30, OnNodeLoss::Wait).unwrap();
    assert!(told.ran_on && told.same, "{told:?}");
    assert_eq!(told.attempts, 1, "{told:?}");
    // One that is to run elsewhere is not there any more, as its leases were over.
    let told = outage(2, OnNodeLoss::Requeue).unwrap();
    assert!(!told.ran_on && !told.same, "{told:?}");
    assert_eq!(told.attempts, 2, "{told:?}");
}

#[test]
fn the_same_seed_is_the_same_story() {
    for seed in 0..3 {
        let (one, two) = (must(seed), must(seed));
        assert_eq!(
            (one.trace, one.steps, one.operations),
            (two.trace, two.steps, two.operations),
            "seed {seed}"
        );
    }
    assert_ne!(must(0).trace, must(1).trace);
}
