//! `batchai dev` and `batchai demo`: everything starts, and nothing is left, however they end.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use batchai_tests::process::{processes_of, sweep, under_test, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A directory whose processes end with the test.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(tempfile::Builder::new()
            .prefix("batchai-test-")
            .tempdir()
            .unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        sweep(self.path());
    }
}

fn start(dir: &Dir, args: &[&str]) -> Child {
    Command::new(under_test())
        .args(args)
        .arg("--data")
        .arg(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

fn run(dir: &Dir, endpoint: &str, args: &[&str]) -> String {
    let output = Command::new(under_test())
        .args(args)
        .env("BATCHAI_ENDPOINT", endpoint)
        .env(
            "BATCHAI_CREDENTIALS",
            dir.path().join("coordinator/admin.pem"),
        )
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn dev_ends_its_jobs_and_leaves_no_process_however_it_is_ended() {
    for end in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let dir = Dir::new();
        let mut dev = start(&dir, &["dev", "--agents", "2", "--listen", "127.0.0.1:0"]);
        let lines = BufReader::new(dev.stdout.take().unwrap()).lines();
        let ready = lines
            .map_while(Result::ok)
            .find(|line| line.contains("ready at"))
            .unwrap();
        let endpoint = ready.split_whitespace().nth(4).unwrap().to_owned();
        run(&dir, &endpoint, &["group", "create", "-n", "g"]);
        run(
            &dir,
            &endpoint,
            &["workspace", "create", "-g", "g", "-n", "w"],
        );
        run(
            &dir,
            &endpoint,
            &["experiment", "create", "-g", "g", "-w", "w", "-n", "e"],
        );
        let nodes: serde_json::Value =
            serde_json::from_str(&run(&dir, &endpoint, &["node", "list"])).unwrap();
        let size = nodes[0]["facts"]["vmSize"].as_str().unwrap().to_owned();
        run(
            &dir,
            &endpoint,
            &[
                "cluster", "create", "-g", "g", "-w", "w", "-n", "c", "-s", &size, "-t", "2",
            ],
        );
        let file = dir.path().join("job.json");
        let out = dir.path().join("out");
        let job = serde_json::json!({"properties": {
            "nodeCount": 2, "stdOutErrPathPrefix": out,
            "customToolkitSettings": {"commandLine": "(setsid sleep 600 &); sleep 600"},
        }});
        std::fs::write(&file, job.to_string()).unwrap();
        let path = file.to_string_lossy();
        let parent = ["-g", "g", "-w", "w", "-e", "e"];
        run(
            &dir,
            &endpoint,
            &[
                &["job", "create", "-n", "j", "-c", "c", "-f", &path],
                &parent[..],
            ]
            .concat(),
        );
        until("the job to run", || {
            let sleeps = processes_of(dir.path())
                .into_iter()
                .filter(|(_, c)| c.starts_with("sleep"));
            (sleeps.count() == 2).then_some(())
        });
        signal(&dev, end);
        let status = until("dev to end", || dev.try_wait().unwrap());
        if end == Signal::SIGKILL {
            // The kernel tells its children, which then take their time.
            until("the rest to end", || {
                processes_of(dir.path()).is_empty().then_some(())
            });
        } else {
            assert!(status.success(), "{status}");
        }
        let left = processes_of(dir.path());
        assert!(left.is_empty(), "{end}: {left:?}");
    }
}

#[test]
fn a_dev_that_cannot_start_says_why_and_leaves_nothing() {
    let dir = Dir::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dev = start(&dir, &["dev", "--listen", &address]);
    let output = dev.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && message.contains("cannot listen on"),
        "{message}"
    );
    assert!(processes_of(dir.path()).is_empty());
}

/// What the demo must show, whichever way it trains.
fn assert_demo(stdout: &str) {
    let find = |prefix: &str| {
        let lines = stdout.lines().filter_map(|line| line.strip_prefix(prefix));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    for rank in 0..2 {
        assert_eq!(
            find(&format!("[rank {rank}] world size 2, by ")).len(),
            1,
            "{stdout}"
        );
    }
    let shard = |rank: usize| {
        find(&format!(
            "[rank {rank}] 718 of 1437 training images, shard "
        ))
    };
    assert!(shard(0).len() == 1 && shard(0) != shard(1), "{stdout}");
    let parameters = |rank: usize| find(&format!("[rank {rank}] parameters "));
    assert!(
        parameters(0).len() == 1 && parameters(0) == parameters(1),
        "{stdout}"
    );
    let epochs = find("[rank 0] epoch ");
    assert_eq!(epochs.len(), 8, "{stdout}");
    let last = epochs[7].split_whitespace().rev().nth(1).unwrap();
    assert!(last.parse::<f64>().unwrap() >= 90.0, "{stdout}");
    assert_eq!(find("state      "), ["succeeded"]);
    assert_eq!(find("exit code  "), ["0"]);
    assert!(find("duration   ")[0].ends_with(" s"));
    assert!(
        Path::new(&find("outputs    ")[0])
            .join("model/digits.json")
            .exists()
    );
}

fn demo(path: Option<&str>) -> (std::process::ExitStatus, String, String) {
    let dir = Dir::new();
    let mut command = Command::new(under_test());
    command
        .arg("demo")
        .arg("--data")
        .arg(dir.path())
        .stdin(Stdio::null());
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let output = command.output().unwrap();
    let left = processes_of(dir.path());
    assert!(left.is_empty(), "{left:?}");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let stdout = text(&output.stdout);
    if output.status.success() {
        assert_demo(&stdout);
    }
    (output.status, stdout, text(&output.stderr))
}

#[test]
fn the_demo_trains_on_two_nodes_and_proves_it() {
    let (status, _, stderr) = demo(None);
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("the job is succeeded"), "{stderr}");
}

#[test]
fn the_demo_trains_with_torch_where_there_is_one() {
    // Debian's python3-torch is for Debian's own python.
    let torch = Command::new("/usr/bin/python3")
        .args(["-c", "import torch"])
        .output();
    if !torch.is_ok_and(|output| output.status.success()) {
        return batchai_tests::requirement::skip(
            "/usr/bin/python3 cannot import torch: apt install python3-torch",
        );
    }
    let (status, stdout, stderr) = demo(Some("/usr/bin:/bin"));
    assert!(status.success(), "{stderr}");
    assert!(
        stdout.contains("by torch.distributed with gloo"),
        "{stdout}"
    );
}

#[test]
fn the_demo_without_python_says_what_to_do() {
    let dir = Dir::new();
    let output = Command::new(under_test())
        .args(["demo", "--data"])
        .arg(dir.path())
        .env("PATH", dir.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && message.contains("python3"),
        "{message}"
    );
    assert!(!message.contains("No such file"), "{message}");
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    let dir = Dir::new();
    let mut demo = start(&dir, &["demo", "--epochs", "1000"]);
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let first = lines.find_map(|line| line.ok().filter(|line| line.contains("epoch 1:")));
    assert!(first.is_some());
    signal(&demo, Signal::SIGINT);
    let status = until("the demo to end", || demo.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    let left = processes_of(dir.path());
    assert!(left.is_empty(), "{left:?}");
}
