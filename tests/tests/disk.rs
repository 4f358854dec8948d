//! What a coordinator does when its disk fails it: a power cut, a full disk, one that cannot be written. Nothing that was
//! acknowledged is lost, and the disk is named. A disk that loses what it said it had synced is not played.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use batchai_common::tls::Route;
use batchai_tests::alone::{
    Alone, Began, Groups, QUICK, begin, create, delete, directory, ended, fill, ids, init, names,
    runtime, same, update,
};
use batchai_tests::damage::{contents, differences};
use batchai_tests::process::{PATIENCE, until};
use batchai_tests::volume::Volume;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

const WRITERS: usize = 6;
/// So many resource groups each of them leaves there.
const LEFT: u64 = 30;

/// What writers were told.
#[derive(Clone, Default)]
struct Told {
    /// What is there, with the number that it was given last.
    there: BTreeMap<String, u64>,
    gone: BTreeSet<String>,
}

/// Writers that go on until they are stopped, or fail.
struct Writers {
    told: Arc<Mutex<Told>>,
    stop: Arc<AtomicBool>,
    running: JoinSet<Result<(), String>>,
}

impl Writers {
    fn start(runtime: &Runtime, alone: &Alone) -> Writers {
        let mut writers = Writers {
            told: Arc::default(),
            stop: Arc::default(),
            running: JoinSet::new(),
        };
        let route = runtime.block_on(alone.route()).unwrap();
        for writer in 0..WRITERS {
            let (told, stop) = (writers.told.clone(), writers.stop.clone());
            let work = write(route.clone(), writer, told, stop);
            writers.running.spawn_on(work, runtime.handle());
        }
        writers
    }

    fn told(&self) -> Told {
        self.told.lock().unwrap().clone()
    }

    /// Stops them; returns what failed.
    fn finish(mut self, runtime: &Runtime) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        runtime.block_on(async {
            let mut failed = Vec::new();
            while let Some(ended) = self.running.join_next().await {
                failed.extend(ended.unwrap().err());
            }
            failed
        })
    }
}

/// Creates, changes and deletes, one after the other, and notes what was acknowledged; ends with the first failure.
async fn write(
    route: Route,
    writer: usize,
    told: Arc<Mutex<Told>>,
    stop: Arc<AtomicBool>,
) -> Result<(), String> {
    for number in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let id = format!("w{writer}-{number}");
        create(&route, &id, &number.to_string(), (number % 30) as usize).await?;
        told.lock().unwrap().there.insert(id, number);
        let first = format!("w{writer}-0");
        update(&route, &first, &number.to_string()).await?;
        told.lock().unwrap().there.insert(first, number);
        if number > LEFT {
            let id = format!("w{writer}-{}", number - LEFT);
            // From here on nothing is known of it.
            told.lock().unwrap().there.remove(&id);
            delete(&route, &id).await?;
            told.lock().unwrap().gone.insert(id);
        }
    }
    Ok(())
}

/// All that was acknowledged is there. What was on its way may be as well: a later number, or a group nobody was told of.
fn nothing_lost(told: &Told, found: &Groups) {
    for (id, number) in &told.there {
        let value = found.get(id);
        let kept = value.and_then(|value| value.parse::<u64>().ok());
        assert!(
            kept.is_some_and(|kept| kept >= *number),
            "{id} was acknowledged with {number}, and is {value:?}"
        );
    }
    let back: Vec<_> = told
        .gone
        .iter()
        .filter(|id| found.contains_key(*id))
        .collect();
    assert!(back.is_empty(), "deleted, and there again: {back:?}");
}

/// Waits until no thread of a process runs, nor waits for the disk.
fn until_stopped(pid: i32) {
    until("a process to stand still", || {
        let mut tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let stopped = tasks.all(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            after_name.starts_with('T')
        });
        stopped.then_some(())
    });
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged() {
    let dir = directory();
    let at = |name: &str| dir.path().join(name);
    let Some(volume) = Volume::make(&at("image"), &at("disk"), 128) else {
        return;
    };
    let (data, runtime) = (volume.path().join("data"), runtime());
    init(&data);
    let mut args = QUICK;
    args[3] = "300";
    let alone = begin(&data, &at("log"), &args).ready();
    let writers = Writers::start(&runtime, &alone);
    let mut rng = fastrand::Rng::new();
    let rounds = match std::env::var("BATCHAI_TEST_FULL") {
        Ok(_) => 30,
        Err(_) => 6,
    };
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(rng.u64(100..700)));
        alone.process.signal(Signal::SIGSTOP);
        until_stopped(alone.process.pid());
        // What it said before it stopped arrives.
        std::thread::sleep(Duration::from_millis(50));
        let told = writers.told();
        volume.cut_power(&at("copy"));
        alone.process.signal(Signal::SIGCONT);
        let after = Volume::mount(&at("copy"), &at("after")).unwrap();
        let again = begin(&after.path().join("data"), &at("again"), &args).ready();
        let found = again.groups(&runtime).unwrap();
        eprintln!(
            "power cut {round}: {} there and {} deleted, as acknowledged; found {}",
            told.there.len(),
            told.gone.len(),
            found.len()
        );
        assert!(!told.there.is_empty(), "nothing was written meanwhile");
        nothing_lost(&told, &found);
        drop(again);
        drop(after);
        fs::remove_file(at("copy")).unwrap();
    }
    let told = writers.told.clone();
    let failed = writers.finish(&runtime);
    assert!(failed.is_empty(), "{failed:?}");
    drop(alone);
    let again = begin(&data, &at("again"), &args).ready();
    nothing_lost(&told.lock().unwrap(), &again.groups(&runtime).unwrap());
}

/// A coordinator whose disk was full and who ended of that, and what it had acknowledged.
struct FilledUp {
    /// The file that takes all the room.
    filler: PathBuf,
    volume: Volume,
    told: Told,
    dir: TempDir,
}

impl FilledUp {
    /// None where no volume can be made.
    fn make(runtime: &Runtime) -> Option<FilledUp> {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        let volume = Volume::make(&at("image"), &at("disk"), 64)?;
        let data = volume.path().join("data");
        init(&data);
        let mut alone = begin(&data, &at("log"), &QUICK).ready();
        let writers = Writers::start(runtime, &alone);
        let told = writers.told.clone();
        until("some writes", || {
            (told.lock().unwrap().there.len() > 30).then_some(())
        });
        let filler = volume.fill();
        let code = ended(&mut alone.process, Instant::now() + PATIENCE);
        let failed = writers.finish(runtime);
        assert_eq!(failed.len(), WRITERS, "writes that need room went on");
        let said = alone.process.log_text();
        assert_eq!(code, Some(Some(1)), "{failed:?}, and it said: {said}");
        assert!(names(&said, &data), "{said}");
        assert!(said.contains("No space left"), "{said}");
        let told = told.lock().unwrap().clone();
        Some(FilledUp {
            filler,
            volume,
            told,
            dir,
        })
    }

    fn data(&self) -> PathBuf {
        self.volume.path().join("data")
    }

    fn begin(&self) -> Began {
        begin(&self.data(), &self.dir.path().join("again"), &QUICK)
    }

    /// With room again, everything goes on.
    fn make_room(&self, runtime: &Runtime) {
        fs::remove_file(&self.filler).unwrap();
        for id in ["once", "twice"] {
            let again = self.begin().ready();
            nothing_lost(&self.told, &again.groups(runtime).unwrap());
            let route = runtime.block_on(again.route()).unwrap();
            let created = runtime.block_on(create(&route, id, "", 0));
            created.expect("there is room again");
        }
    }
}

#[test]
fn a_full_disk_is_named_and_loses_nothing_that_was_acknowledged() {
    let runtime = runtime();
    if let Some(full) = FilledUp::make(&runtime) {
        full.make_room(&runtime);
    }
}

#[test]
fn a_start_on_a_full_disk_does_no_harm() {
    let runtime = runtime();
    let Some(full) = FilledUp::make(&runtime) else {
        return;
    };
    // What needs no room it may well do.
    match full.begin() {
        Began::Ready(again) => nothing_lost(&full.told, &again.groups(&runtime).unwrap()),
        other => {
            let said = other.refused(&full.data()).unwrap();
            assert!(said.contains("No space left"), "{said}");
        }
    }
    full.make_room(&runtime);
}

#[test]
fn a_disk_that_cannot_be_written_is_named_and_nothing_of_it_is_damaged() {
    let dir = directory();
    let at = |name: &str| dir.path().join(name);
    let Some(volume) = Volume::make(&at("image"), &at("disk"), 64) else {
        return;
    };
    let (data, runtime) = (volume.path().join("data"), runtime());
    init(&data);
    let mut acknowledged = Groups::new();
    for (how, prefix) in [(Signal::SIGKILL, "a"), (Signal::SIGTERM, "b")] {
        let mut alone = begin(&data, &at("log"), &QUICK).ready();
        fill(&runtime, &alone, &ids(prefix, 70), &mut acknowledged);
        alone.process.signal(how);
        alone.process.wait();
        volume.remount("ro");
        let before = contents(&data);
        let said = begin(&data, &at("refused"), &QUICK).refused(&data).unwrap();
        assert!(said.contains("Read-only file system"), "{said}");
        assert_eq!(differences(&before, &contents(&data)), [""; 0]);
        volume.remount("rw");
        let again = begin(&data, &at("again"), &QUICK).ready();
        same(&acknowledged, &again.groups(&runtime).unwrap()).unwrap();
    }
}
