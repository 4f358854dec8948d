//! Agents, shims and coordinators die at every named point, once each, and a job on two nodes is run all the same: nothing of it starts
//! twice, no two of its attempts run at once, its exit code is right, and its log is what it printed.
//!
//! The points are in builds with `--cfg batchai_faults` only; in any other this looks after their names.

use std::collections::BTreeSet;

use batchai_tests::sources;

/// Who dies at a point, and in how many attempts the job may end: only what a shim held is begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Agent,
    /// Before the attempt has begun: another shim begins it.
    EarlyShim,
    Shim,
    Coordinator,
}
use Victim::{Agent, Coordinator, EarlyShim, Shim};

const POINTS: &[(&str, Victim)] = &[
    ("agent_made_a_directory", Agent),
    ("agent_wrote_a_plan", Agent),
    ("agent_started_a_shim", Agent),
    ("agent_is_to_launch", Agent),
    ("agent_launched", Agent),
    ("agent_is_to_report", Agent),
    ("agent_saw_an_end", Agent),
    ("agent_shipped_a_log", Agent),
    ("agent_is_to_stop", Agent),
    ("agent_stopped", Agent),
    ("agent_forgot_in_part", Agent),
    ("agent_swept", Agent),
    ("shim_has_its_lock", EarlyShim),
    ("shim_begins", Shim),
    ("shim_began", Shim),
    ("shim_forked_its_helper", Shim),
    ("shim_forked_the_preparation", Shim),
    ("shim_is_ready", Shim),
    ("shim_said_it_is_ready", Shim),
    ("shim_forked_a_rank", Shim),
    ("shim_launched", Shim),
    ("shim_said_it_launched", Shim),
    ("shim_saw_a_rank_end", Shim),
    ("shim_said_a_rank_ended", Shim),
    ("shim_is_to_write_its_record", Shim),
    ("shim_wrote_its_record", Shim),
    ("replica_is_to_write", Coordinator),
    ("replica_wrote", Coordinator),
    ("replica_applied", Coordinator),
    ("coordinator_is_to_send_assignments", Coordinator),
    ("coordinator_recorded_a_report", Coordinator),
    ("coordinator_kept_a_chunk", Coordinator),
];

#[test]
fn every_point_is_tried_and_is_there_once() {
    let there = sources::given_to("crash_point");
    let mut tried: Vec<_> = POINTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    tried.sort();
    assert_eq!(there, tried);
    let unique: BTreeSet<_> = tried.iter().collect();
    assert_eq!(unique.len(), tried.len(), "a name stands twice");
    assert!(POINTS.iter().any(|(_, victim)| *victim == EarlyShim));
}

#[cfg(batchai_faults)]
mod with_faults {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use batchai_tests::ensemble::{Ensemble, IN};
    use batchai_tests::process::until;
    use serde_json::{Value, json};

    use super::*;

    /// A job is given so long: two attempts, a restart, and a machine that is busy.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Each rank stamps a file of its own as long as it lives. The first ends with code 3, which ends the second: that one never does by
    /// itself.
    const SCRIPT: &str = r#"python3 - <<'END'
import os, sys, time
attempt, rank = os.environ["BATCHAI_ATTEMPT_TAG_VARIABLE"].split("/")[1], int(os.environ["RANK"])
stamps = os.open(f"STAMPS/{attempt}.{rank}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
stamp = lambda: os.write(stamps, f"{time.clock_gettime(time.CLOCK_BOOTTIME)}\n".encode())
print("begin", flush=True)
for i in range(20 if rank == 0 else 100000):
    stamp()
    time.sleep(0.02)
print("end", flush=True)
sys.exit(3)
END"#;

    struct World {
        ensemble: Ensemble,
        armed: PathBuf,
        stamps: PathBuf,
    }

    impl World {
        fn new() -> World {
            let mut ensemble = Ensemble::without_daemons();
            let (armed, stamps) = (
                ensemble.path().join("armed"),
                ensemble.path().join("stamps"),
            );
            fs::create_dir(&armed).unwrap();
            fs::create_dir(&stamps).unwrap();
            let points = armed.to_string_lossy().into_owned();
            ensemble.variables = vec![("BATCHAI_CRASH_POINTS".to_owned(), points)];
            ensemble.start_coordinator();
            ensemble.start_agent("a1");
            ensemble.start_agent("a2");
            ensemble.until_alive(2);
            ensemble.create_cluster(2);
            World {
                ensemble,
                armed,
                stamps,
            }
        }

        fn arm(&self, point: &str) {
            fs::write(self.armed.join(point), "").unwrap();
        }

        /// Starts again who has died.
        fn revive(&mut self) {
            let dead = |process: &mut batchai_tests::process::Process| {
                process.child.try_wait().unwrap().is_some()
            };
            if self.ensemble.coordinator.as_mut().is_some_and(dead) {
                self.ensemble.start_coordinator();
            }
            for name in ["a1", "a2"] {
                if self.ensemble.agents.get_mut(name).is_some_and(dead) {
                    self.ensemble.start_agent(name);
                }
            }
        }

        /// Waits until something is so, and starts again who dies meanwhile.
        fn until(&mut self, what: &str, mut so: impl FnMut(&World) -> bool) {
            let end = Instant::now() + PATIENCE;
            while !so(self) {
                assert!(Instant::now() < end, "waited too long: {what}");
                self.revive();
                std::thread::sleep(Duration::from_millis(20));
            }
        }

        fn submit(&self, name: &str) {
            let stamps = self.stamps.join(name);
            fs::create_dir(&stamps).unwrap();
            let script = SCRIPT
                .replace("BATCHAI_ATTEMPT_TAG_VARIABLE", TAG)
                .replace("STAMPS", &stamps.to_string_lossy());
            self.ensemble.submit(
                name,
                json!({
                    "nodeCount": 2,
                    "jobPreparation": { "commandLine": "true" },
                    "customToolkitSettings": { "commandLine": script, "processesPerNode": 1 },
                }),
            );
        }

        /// By attempt: when its first process was seen first, and its last one last. Each rank of an attempt is one process.
        fn lives(&self, name: &str) -> BTreeMap<String, (f64, f64)> {
            let mut lives: BTreeMap<String, (f64, f64)> = BTreeMap::new();
            let mut ranks = BTreeSet::new();
            for entry in fs::read_dir(self.stamps.join(name)).unwrap() {
                let path = entry.unwrap().path();
                let file = path.file_name().unwrap().to_string_lossy().into_owned();
                let parts: Vec<_> = file.split('.').collect();
                assert!(
                    ranks.insert((parts[0].to_owned(), parts[1].to_owned())),
                    "{name}: rank {} of {} was started twice",
                    parts[1],
                    parts[0]
                );
                let text = fs::read_to_string(&path).unwrap();
                let stamps: Vec<f64> = text.lines().filter_map(|l| l.parse().ok()).collect();
                let (Some(first), Some(last)) = (stamps.first(), stamps.last()) else {
                    continue;
                };
                let life = lives.entry(parts[0].to_owned()).or_insert((*first, *last));
                *life = (life.0.min(*first), life.1.max(*last));
            }
            lives
        }
    }

    const TAG: &str = batchai_node_agent::launch::ATTEMPT_TAG;

    fn play(world: &mut World, point: &str, victim: Victim) {
        let name = point;
        // An agent sweeps what a shim has left.
        if point == "agent_swept" {
            world.arm("shim_said_it_launched");
        }
        // A coordinator writes all the time: it is to die amid the job.
        if victim != Coordinator {
            world.arm(point);
        }
        world.submit(name);
        if victim == Coordinator {
            world.arm(point);
        }
        let ended = |job: &Value| job["state"] == "FAILED" || job["state"] == "SUCCEEDED";
        world.until(&format!("{point}: the job to end"), |world| {
            ended(&world.ensemble.job(name))
        });
        // Some are reached when it has ended for others already.
        let armed = world.armed.join(point);
        world.until(&format!("{point}: it to be reached"), |_| !armed.exists());
        let job = world.ensemble.job(name);
        let text = format!("{point}: {job}");
        assert_eq!(
            (&job["state"], &job["exitCode"]),
            (&json!("FAILED"), &json!(3)),
            "{text}"
        );
        let begun_anew = victim == Shim || point == "agent_swept";
        let number = job["attempt"]["number"].as_i64().unwrap();
        assert!(number == 1 || (begun_anew && number == 2), "{text}");
        let mut lives: Vec<_> = world.lives(name).into_values().collect();
        lives.sort_by(|a, b| a.0.total_cmp(&b.0));
        let apart = lives.windows(2).all(|pair| pair[0].1 < pair[1].0);
        assert!(apart, "{text}: {lives:?}");
        let stream = ["job", "file", "stream", "-j", name, "-f", "stdout-0.txt"];
        let log = world.ensemble.run(&[&stream[..], &IN].concat());
        assert_eq!(
            String::from_utf8_lossy(&log.stdout),
            "begin\nend\n",
            "{text}"
        );
        // What a shim had in its log when it died may not be all.
        assert!(log.status.success() || victim == Shim, "{text}: {log:?}");
        // The next one finds both nodes idle.
        world.revive();
        world.ensemble.until_alive(2);
    }

    #[test]
    fn a_job_is_run_whoever_dies_wherever() {
        let mut world = World::new();
        for (point, victim) in POINTS {
            let begun = Instant::now();
            play(&mut world, point, *victim);
            println!(
                "{point:<36} {victim:?} {:.1} s",
                begun.elapsed().as_secs_f64()
            );
        }
        let data = world.ensemble.path().join("agents");
        until("all attempts to be forgotten", || {
            let none = |agent: &str| {
                let attempts = data.join(agent).join("attempts");
                fs::read_dir(attempts).is_ok_and(|mut left| left.next().is_none())
            };
            (none("a1") && none("a2")).then_some(())
        });
        world.ensemble.assert_nothing_left();
    }
}
