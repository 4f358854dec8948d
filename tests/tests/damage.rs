//! What a coordinator does with a data directory that is damaged, or not its own: all that was acknowledged is there, or it refuses to
//! serve and says where; it never serves less.
//!
//! A data directory that was put back from an old copy as a whole is not told from the present one, and not tried.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use batchai_tests::alone::{
    Began, Groups, QUICK, begin, create, delete, directory, fill, ids, init, runtime, same, update,
};
use batchai_tests::damage::{contents, copy, differences, hurt};
use batchai_tests::process::until;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// A data directory of a coordinator that was cut down, an earlier copy of it, and what it acknowledged.
struct Kept {
    dir: TempDir,
    acknowledged: Groups,
}

impl Kept {
    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn earlier(&self) -> PathBuf {
        self.dir.path().join("earlier")
    }

    /// Resource groups that were created, changed and deleted, most of them before the latest snapshot and some behind it.
    fn make(runtime: &Runtime) -> Kept {
        let mut kept = Kept {
            dir: directory(),
            acknowledged: Groups::new(),
        };
        let (data, log) = (kept.data(), kept.dir.path().join("log"));
        let snapshots = data.join("replica/snapshots");
        let known = || snapshots_in(&snapshots);
        init(&data);
        let mut alone = begin(&data, &log, &QUICK).ready();
        fill(runtime, &alone, &ids("a", 120), &mut kept.acknowledged);
        until("a snapshot", || (!known().is_empty()).then_some(()));
        alone.process.kill();
        copy(&data, &kept.earlier());
        let first = known();
        let mut alone = begin(&data, &log, &QUICK).ready();
        fill(runtime, &alone, &ids("b", 90), &mut kept.acknowledged);
        runtime.block_on(async {
            let route = alone.route().await.unwrap();
            for i in 0..20 {
                let (changed, deleted) = (format!("a{i}"), format!("b{i}"));
                update(&route, &changed, "changed").await.unwrap();
                kept.acknowledged.insert(changed, "changed".to_owned());
                delete(&route, &deleted).await.unwrap();
                kept.acknowledged.remove(&deleted);
            }
        });
        until("another snapshot", || {
            known()
                .iter()
                .any(|name| !first.contains(name))
                .then_some(())
        });
        fill(runtime, &alone, &ids("c", 20), &mut kept.acknowledged);
        alone.process.kill();
        kept
    }

    /// Hurts a copy and starts a coordinator on it; returns whether it has all or refuses.
    fn try_seed(&self, runtime: &Runtime, seed: u64) -> Result<(String, Outcome), String> {
        let dir = directory();
        let data = dir.path().join("data");
        copy(&self.data(), &data);
        let what = format!("seed {seed}, {}", hurt(&data, &self.earlier(), seed));
        match self.try_hurt(runtime, dir.path(), &data) {
            Ok(outcome) => Ok((what, outcome)),
            Err(why) => Err(format!("{what}: {why}")),
        }
    }

    fn try_hurt(&self, runtime: &Runtime, dir: &Path, data: &Path) -> Result<Outcome, String> {
        let log = dir.join("log");
        let before = contents(data);
        let alone = match begin(data, &log, &QUICK) {
            Began::Ready(alone) => alone,
            other => {
                other.refused(data)?;
                let after = contents(data);
                // However often it is started again.
                begin(data, &log, &QUICK).refused(data)?;
                return match differences(&before, &after) {
                    changed if changed.is_empty() => Ok(Outcome::Refused),
                    changed => Ok(Outcome::RefusedAndChanged(changed)),
                };
            }
        };
        let mut expected = self.acknowledged.clone();
        same(&expected, &alone.groups(runtime)?)?;
        // What it goes on with is as good: it takes a write, and has it and all else when it comes again.
        runtime.block_on(async { create(&alone.route().await?, "after", "it", 0).await })?;
        expected.insert("after".to_owned(), "it".to_owned());
        drop(alone);
        match begin(data, &log, &QUICK) {
            Began::Ready(alone) => same(&expected, &alone.groups(runtime)?)?,
            Began::Ended(_, said) | Began::Hung(said) => {
                return Err(format!("it starts only once: {said}"));
            }
        }
        Ok(Outcome::Complete)
    }
}

enum Outcome {
    Complete,
    Refused,
    /// And these files are not what they were.
    RefusedAndChanged(Vec<String>),
}

fn snapshots_in(dir: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "snapshot"))
        .collect()
}

/// What became of all seeds.
#[derive(Default)]
struct Trials {
    complete: usize,
    refused: usize,
    /// Those that were neither.
    bad: Vec<String>,
    /// Those that were refused, and are not what they were.
    changed: Vec<String>,
}

/// Two tests ask for them.
static TRIALS: LazyLock<Trials> = LazyLock::new(|| {
    let runtime = runtime();
    let kept = Kept::make(&runtime);
    let count = match std::env::var("BATCHAI_TEST_FULL") {
        Ok(_) => 200,
        Err(_) => 24,
    };
    let mut trials = Trials::default();
    for seed in 0..count {
        match kept.try_seed(&runtime, seed) {
            Ok((_, Outcome::Complete)) => trials.complete += 1,
            Ok((_, Outcome::Refused)) => trials.refused += 1,
            Ok((what, Outcome::RefusedAndChanged(files))) => {
                trials.refused += 1;
                trials.changed.push(format!("{what}: {files:?}"));
            }
            Err(why) => trials.bad.push(why),
        }
    }
    let (refused, complete) = (trials.refused, trials.complete);
    eprintln!("of {count} damaged directories {refused} were refused, {complete} complete");
    trials
});

#[test]
fn whatever_is_damaged_all_is_there_or_it_is_refused() {
    assert!(TRIALS.bad.is_empty(), "{}", TRIALS.bad.join("\n\n"));
    let both = TRIALS.refused > 0 && TRIALS.complete > 0;
    assert!(both, "the draw sees only one side");
}

#[test]
fn what_is_refused_for_its_damage_is_not_changed() {
    let changed = &TRIALS.changed;
    assert!(
        changed.is_empty(),
        "{} of {} refusals changed what they refused:\n{}",
        changed.len(),
        TRIALS.refused,
        changed.join("\n")
    );
}

/// A data directory of an ensemble with some groups, and one of another ensemble.
struct Two {
    one: PathBuf,
    other: PathBuf,
    log: PathBuf,
    acknowledged: Groups,
    _dir: TempDir,
}

impl Two {
    fn make(runtime: &Runtime) -> Two {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        let mut two = Two {
            one: at("one"),
            other: at("other"),
            log: at("log"),
            acknowledged: Groups::new(),
            _dir: dir,
        };
        init(&two.one);
        init(&two.other);
        let alone = begin(&two.one, &two.log, &QUICK).ready();
        fill(runtime, &alone, &ids("g", 3), &mut two.acknowledged);
        drop(alone);
        two
    }

    /// The other data directory is refused; and the store in it, put back where it belongs, has all.
    fn refused(&self, runtime: &Runtime) {
        let refused = begin(&self.other, &self.log, &QUICK).refused(&self.other);
        refused.unwrap();
        fs::remove_dir_all(self.one.join("replica")).unwrap();
        copy(&self.other.join("replica"), &self.one.join("replica"));
        let again = begin(&self.one, &self.log, &QUICK).ready();
        same(&self.acknowledged, &again.groups(runtime).unwrap()).unwrap();
    }
}

#[test]
fn the_store_of_another_ensemble_is_refused() {
    let runtime = runtime();
    let two = Two::make(&runtime);
    begin(&two.other, &two.log, &QUICK).ready();
    let store = two.other.join("replica");
    fs::remove_dir_all(&store).unwrap();
    copy(&two.one.join("replica"), &store);
    two.refused(&runtime);
}

#[test]
fn the_store_of_another_ensemble_is_refused_where_there_never_was_one() {
    let runtime = runtime();
    let two = Two::make(&runtime);
    let store = two.other.join("replica");
    copy(&two.one.join("replica"), &store);
    // What else is needed is there: nothing but the ensemble is wrong.
    fs::copy(two.one.join("secrets.key"), two.other.join("secrets.key")).unwrap();
    two.refused(&runtime);
}

/// Opening a database writes to it: which store it is must be known before.
#[test]
fn a_store_that_is_not_the_one_that_was_here_is_refused_and_not_changed() {
    let runtime = runtime();
    let two = Two::make(&runtime);
    let begun = two.one.join("begun");
    let kept = fs::read_to_string(&begun).unwrap();
    fs::write(&begun, kept.replace(|c: char| c.is_ascii_digit(), "a")).unwrap();
    let before = contents(&two.one);
    begin(&two.one, &two.log, &QUICK).refused(&two.one).unwrap();
    let changed = differences(&before, &contents(&two.one));
    assert!(changed.is_empty(), "{changed:?}");
    fs::write(&begun, kept).unwrap();
    let again = begin(&two.one, &two.log, &QUICK).ready();
    same(&two.acknowledged, &again.groups(&runtime).unwrap()).unwrap();
}

#[test]
fn a_store_beside_the_name_of_another_ensemble_is_refused() {
    let runtime = runtime();
    let two = Two::make(&runtime);
    let (own, other) = (
        two.one.join("ensemble.json"),
        two.other.join("ensemble.json"),
    );
    let kept = fs::read(&own).unwrap();
    fs::copy(other, &own).unwrap();
    begin(&two.one, &two.log, &QUICK).refused(&two.one).unwrap();
    fs::write(&own, kept).unwrap();
    let again = begin(&two.one, &two.log, &QUICK).ready();
    same(&two.acknowledged, &again.groups(&runtime).unwrap()).unwrap();
}

#[test]
fn what_a_start_that_was_cut_off_leaves_behind_does_no_harm() {
    let runtime = runtime();
    let two = Two::make(&runtime);
    // The database writes an index of itself whenever it is opened, and gives it its name when it is whole. Where it is cut off
    // before that, by a signal or for want of room, the part stays.
    let part = two.one.join("replica/log/snap.7FFFFFFFFFFFFFFF.generating");
    fs::write(part, "").unwrap();
    let again = begin(&two.one, &two.log, &QUICK).ready();
    same(&two.acknowledged, &again.groups(&runtime).unwrap()).unwrap();
}
