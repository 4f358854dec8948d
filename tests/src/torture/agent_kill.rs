//! Agents are cut down again and again while ranks run, and in the end everything is compared with what the ranks themselves have to
//! say: how often each was begun, how it ended, and to the byte what it printed. What is killed when is drawn.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::ensemble::Ensemble;
use crate::process::until;

/// An agent lives for so many milliseconds at least and at most, from its start on.
const LIVES_MS: std::ops::Range<u64> = 5..500;

/// A rank: it prints until the file `stop` is there, keeps a digest of what it prints, and ends with a code of its own. It takes no hint to
/// end: its code would be another one.
const RANK: &str = r#"python3 -c '
import hashlib, os, random, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank, here = int(os.environ["RANK"]), sys.argv[1]
begun = os.open(f"{here}/begun.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(begun, f"{os.getpid()}\n".encode())
digests = {1: hashlib.sha256(), 2: hashlib.sha256()}
draw = random.Random(rank)
def say(to, text):
    data = text.encode()
    digests[to].update(data)
    while data:
        data = data[os.write(to, data):]
while not os.path.exists(f"{here}/stop"):
    for _ in range(200 if draw.random() < 0.02 else 1):
        say(1, f"{rank} {draw.getrandbits(400):x}\n")
    if draw.random() < 0.1:
        say(2, f"{rank} {draw.getrandbits(80):x}\n")
    time.sleep(0.03)
say(1, "the last words have no end of line")
with open(f"{here}/said.{rank}.new", "w") as said:
    said.write(f"{digests[1].hexdigest()} {digests[2].hexdigest()}")
os.rename(f"{here}/said.{rank}.new", f"{here}/said.{rank}")
os._exit(rank + 1)
' DIRECTORY"#;

/// What was gone through.
#[derive(Debug)]
pub struct Outcome {
    pub kills: usize,
    pub ranks: usize,
    /// What they printed, and was compared.
    pub bytes: usize,
    pub took: Duration,
}

/// Cuts down one of two agents at random, so many times, while so many ranks run, half of them with each.
///
/// # Panics
/// A rank died, was started twice, ended with another code than its own, or its log is not what it printed.
pub fn agent_kill(kills: usize, ranks: usize) -> Outcome {
    let begin = Instant::now();
    let mut e = Ensemble::with_cluster(2);
    let here = e.path().join("ranks");
    fs::create_dir(&here).expect("the directory is writable");
    let command = RANK.replace("DIRECTORY", &here.to_string_lossy());
    e.submit(
        "j",
        json!({
            "nodeCount": 2,
            "customToolkitSettings": { "commandLine": command, "processesPerNode": ranks / 2 },
        }),
    );
    until("all ranks to run", || {
        let begun = (0..ranks).filter(|rank| here.join(format!("begun.{rank}")).exists());
        (begun.count() == ranks).then_some(())
    });
    for _ in 0..kills {
        let name = if fastrand::bool() { "a1" } else { "a2" };
        let agent = e.agents.get_mut(name).expect("both are there");
        agent.kill();
        e.start_agent(name);
        std::thread::sleep(Duration::from_millis(fastrand::u64(LIVES_MS)));
    }
    fs::write(here.join("stop"), "").expect("the directory is writable");
    let job = e.until_job("j", "FAILED");
    let mut bytes = 0;
    for rank in 0..ranks {
        let begun = read(&here.join(format!("begun.{rank}")));
        assert_eq!(begun.lines().count(), 1, "rank {rank} was started again");
        let nodes = job["attempt"]["nodes"].as_array().into_iter().flatten();
        let mut all = nodes.flat_map(|node| node["ranks"].as_array().into_iter().flatten());
        // A rank that is 0 is left out of JSON, as numbers are that are 0.
        let known = all.find(|known| known["rank"].as_i64().unwrap_or(0) == rank as i64);
        let code = known.and_then(|known| known["exitCode"].as_i64());
        assert_eq!(code, Some(rank as i64 + 1), "of rank {rank}: {job}");
        let said = read(&here.join(format!("said.{rank}")));
        let mut said = said.split(' ');
        for stream in ["stdout", "stderr"] {
            let log = e.log("j", &format!("{stream}-{rank}.txt"));
            bytes += log.len();
            let digest = batchai_common::names::hex(&Sha256::digest(&log));
            assert_eq!(Some(&*digest), said.next(), "{stream} of rank {rank}");
        }
    }
    assert_eq!(job["attempt"]["number"], 1, "{job}");
    e.assert_nothing_left();
    Outcome {
        kills,
        ranks,
        bytes,
        took: begin.elapsed(),
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
