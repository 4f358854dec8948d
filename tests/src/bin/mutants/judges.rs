//! Builds the judges with the faults in them, and runs one. Whether that means anything is decided elsewhere.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::table::Judge;

/// What the simulator plays in search of a fault.
const SEEDS: &str = "120";

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Passed,
    Failed,
    /// The budget was used up.
    Hung,
}

impl Judge {
    /// As the build names it: package and target.
    fn target(self) -> (&'static str, &'static str) {
        match self {
            Judge::Coordinator => ("batchai-coordinator", "batchai_coordinator"),
            Judge::Agent => ("batchai-node-agent", "batchai_node_agent"),
            Judge::Simulator => ("batchai-tests", "sim"),
            Judge::Damage => ("batchai-tests", "damage"),
            Judge::Disk => ("batchai-tests", "disk"),
        }
    }

    /// Seconds until it counts as hung.
    pub fn budget(self) -> Duration {
        Duration::from_secs(match self {
            Judge::Coordinator | Judge::Agent => 120,
            Judge::Simulator => 300,
            Judge::Damage | Judge::Disk => 300,
        })
    }
}

/// The programs of the judges.
pub type Programs = BTreeMap<Judge, PathBuf>;

/// Builds judges, with a target folder of their own: the flags would have everything else built anew.
pub fn build(root: &Path, judges: &[Judge]) -> Result<Programs, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(root)
        .env("RUSTFLAGS", "--cfg batchai_faults")
        .args(["test", "--no-run", "--release", "--message-format", "json"])
        .args(["--target-dir", "target/faults"])
        .stderr(Stdio::inherit());
    let is_unit = |judge: &Judge| matches!(judge, Judge::Coordinator | Judge::Agent);
    for judge in judges {
        let (package, target) = judge.target();
        command.args(["-p", package]);
        if !is_unit(judge) {
            command.args(["--test", target]);
        }
    }
    // Once for all of them: cargo takes it no second time.
    if judges.iter().any(is_unit) {
        command.arg("--lib");
    }
    let built = command
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    if !built.status.success() {
        return Err("the judges cannot be built".to_owned());
    }
    let text = String::from_utf8_lossy(&built.stdout);
    let mut programs = Programs::new();
    for line in text.lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
            continue;
        };
        let Some(program) = message["executable"].as_str() else {
            continue;
        };
        let is_test = message["profile"]["test"] == true;
        let of = |judge: &&Judge| is_test && message["target"]["name"] == judge.target().1;
        if let Some(judge) = judges.iter().find(of) {
            programs.insert(*judge, program.into());
        }
    }
    match judges.iter().find(|judge| !programs.contains_key(judge)) {
        Some(missing) => Err(format!("{missing:?} was not built")),
        None => Ok(programs),
    }
}

/// Runs a judge, with a fault or, where the name is empty, without one.
pub fn run(root: &Path, judge: Judge, program: &Path, fault: &str) -> (End, Duration) {
    let begin = Instant::now();
    let mut command = Command::new(program);
    command
        .current_dir(root.join(match judge {
            Judge::Coordinator => "coordinator",
            Judge::Agent => "node-agent",
            Judge::Simulator | Judge::Damage | Judge::Disk => "tests",
        }))
        .env("BATCHAI_FAULT", fault)
        // What a fault made fail is nothing to keep among the sources.
        .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "true")
        .env("BATCHAI_SIM_SEEDS", SEEDS)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    if judge == Judge::Disk {
        // One that skips would find every fault harmless.
        command.env("BATCHAI_TEST_REQUIRE", "all");
    }
    let mut child = command.spawn().expect("the judge was built just now");
    let end = wait(&mut child, begin + judge.budget());
    // Also what it started and did not wait for.
    let group = Pid::from_raw(i32::try_from(child.id()).expect("process ids are small"));
    let _ = killpg(group, Signal::SIGKILL);
    child.wait().expect("it is our child");
    (end, begin.elapsed())
}

fn wait(child: &mut Child, until: Instant) -> End {
    while Instant::now() < until {
        match child.try_wait().expect("it is our child") {
            Some(status) if status.success() => return End::Passed,
            Some(_) => return End::Failed,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    End::Hung
}
