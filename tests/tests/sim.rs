//! Seeds of the simulator. `BATCHAI_SIM_SEEDS=N` plays so many, `BATCHAI_SIM_SEED=S` one.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use batchai_tests::sim::{Outcome, play};

/// Played with every change.
const SEEDS: u64 = 40;

/// What must come up among the seeds, else they do not try what they are for.
const SOMETIMES: [&str; 11] = [
    "a follower gets a snapshot",
    "a leader is lost while an attempt prepares",
    "a leader stands still",
    "a machine reboots amid a job",
    "a read is answered",
    "a replica starts from a snapshot",
    "a shim dies amid a job",
    "an agent is killed amid a job",
    "the leader changes",
    "the replicas agree on what they hold",
    "what became of a proposal is not known",
];

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} must be a number")),
    )
}

fn must(seed: u64) -> Outcome {
    play(seed).unwrap_or_else(|why| {
        panic!(
            "seed {seed}: {why}\nagain: BATCHAI_SIM_SEED={seed} cargo test -p batchai-tests --test sim"
        )
    })
}

#[test]
fn every_seed_keeps_what_must_hold() {
    if let Some(seed) = number("BATCHAI_SIM_SEED") {
        println!("{:?}", must(seed));
        return;
    }
    let seeds = number("BATCHAI_SIM_SEEDS").unwrap_or(SEEDS);
    let (next, begin) = (AtomicU64::new(0), Instant::now());
    let seen = Mutex::new(BTreeMap::<&str, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let outcome = must(seed);
                    assert!(outcome.commands >= 1000, "seed {seed}: {outcome:?}");
                    let mut seen = seen.lock().unwrap();
                    for what in outcome.sometimes {
                        *seen.entry(what).or_default() += 1;
                    }
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    println!("{seeds} seeds in {:?}: {seen:#?}", begin.elapsed());
    for what in SOMETIMES {
        assert!(seen.contains_key(what), "never seen: {what}");
    }
}

#[test]
fn the_same_seed_is_the_same_story() {
    for seed in 0..3 {
        let (one, two) = (must(seed), must(seed));
        assert_eq!(
            (one.trace, one.steps),
            (two.trace, two.steps),
            "seed {seed}"
        );
    }
    assert_ne!(must(0).trace, must(1).trace);
}
