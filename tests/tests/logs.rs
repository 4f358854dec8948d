//! Logs of jobs: who reads them gets every byte once, whatever happens on the way.

use std::collections::BTreeMap;
use std::process::{Command, Output};
use std::time::Duration;

use batchai_proto::v1;
use batchai_proto::v1::stream_job_logs_response::End;
use batchai_tests::api::{Api, WORKSPACE, refusal};
use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::{Background, processes_of, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::requirement;
use nix::sys::signal::Signal;
use serde_json::json;
use tonic::{Code, Status};

const JOB: &str = "resourceGroups/g/workspaces/w/experiments/e/jobs/j";

/// What was read of a stream: the bytes of each file, how many were dropped, and how it ended.
#[derive(Debug, Default)]
struct Got {
    text: String,
    dropped: i64,
    pieces: Vec<v1::StreamJobLogsResponse>,
    end: i32,
}

fn read(api: &Api, change: impl FnOnce(&mut v1::StreamJobLogsRequest)) -> Result<Got, Status> {
    drain(api, open(api, change)?)
}

type Pieces = tonic::Streaming<v1::StreamJobLogsResponse>;

fn open(api: &Api, change: impl FnOnce(&mut v1::StreamJobLogsRequest)) -> Result<Pieces, Status> {
    let mut request = v1::StreamJobLogsRequest {
        name: JOB.into(),
        file: "stdout.txt".into(),
        ..Default::default()
    };
    change(&mut request);
    api.call(api.jobs().stream_job_logs(request))
}

fn drain(api: &Api, mut stream: Pieces) -> Result<Got, Status> {
    let mut got = Got::default();
    while let Some(piece) = api.runtime.block_on(stream.message())? {
        got.text.push_str(&String::from_utf8_lossy(&piece.data));
        got.dropped += piece.dropped_bytes;
        got.end = piece.end;
        got.pieces.push(piece);
    }
    Ok(got)
}

fn command(line: &str) -> serde_json::Value {
    json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": line } })
}

fn stream<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["job", "file", "stream", "-j", "j"], more, &IN[..]].concat()
}

/// Lines `{rank} {number}` of several ranks: of each all numbers from one on, in their order and once.
fn assert_numbered(output: &Output, ranks: usize, last: usize) {
    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let [prefix, rank, number] = words[..] else {
            panic!("{line:?} is not one line of one rank");
        };
        assert_eq!(prefix, format!("[{rank}]"), "{line:?}");
        let next = next.entry(rank.to_owned()).or_insert(1);
        assert_eq!(number, next.to_string(), "{line:?}");
        *next += 1;
    }
    assert_eq!(
        next.len(),
        ranks,
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(next.values().all(|n| *n == last + 1), "{next:?}");
}

/// Prints its numbers in pieces that end amid lines.
fn counting(last: usize, pause: &str) -> String {
    let python = format!(
        "import os, sys, time\n\
         for n in range(1, {last} + 1):\n \
         sys.stdout.write(os.environ['RANK'] + ' '); sys.stdout.flush()\n \
         sys.stdout.write(str(n) + '\\n'); time.sleep({pause})\n"
    );
    format!("python3 -c \"{python}\"")
}

#[test]
fn the_last_lines_and_what_came_since_a_time_are_read() {
    let api = Api::start(Ensemble::with_cluster(1));
    let (go, out) = (api.e.path().join("go"), api.e.path().join("out"));
    let line = format!(
        "seq 1 100000; sleep 2.5; echo later; until [ -e {} ]; do sleep 0.05; done; echo last; printf end",
        go.display()
    );
    api.e.submit("j", command(&line));
    let now = |change: fn(&mut v1::StreamJobLogsRequest)| read(&api, change);
    until("the second part", || {
        let got = now(|_| ()).ok()?;
        got.text.ends_with("later\n").then_some(())
    });
    let tail = now(|r| r.tail_lines = Some(3)).unwrap();
    assert_eq!(tail.text, "99999\n100000\nlater\n");
    assert_eq!((tail.end, tail.dropped), (End::NotFollowed as i32, 0));
    assert_eq!(tail.pieces[0].file, "stdout.txt");
    assert_eq!(now(|r| r.tail_lines = Some(0)).unwrap().text, "");
    assert_eq!(
        now(|r| r.tail_lines = Some(100_000))
            .unwrap()
            .text
            .lines()
            .next(),
        Some("2")
    );
    // Since the second part began, by the clock of the log: the first came two seconds before.
    let logs = api.call(api.jobs().list_job_files(v1::ListJobFilesRequest {
        name: JOB.into(),
        ..Default::default()
    }));
    let logs = logs.unwrap().files;
    let changed = logs.iter().find(|f| f.name == "stdout.txt").unwrap();
    let mut at = changed.last_modified.unwrap();
    at.seconds -= 1;
    let since = read(&api, |r| r.since = Some(at)).unwrap().text;
    assert_eq!(since, "later\n");
    at.seconds += 3600;
    assert_eq!(
        read(&api, |r| r.since = Some(at)).unwrap().text,
        "",
        "nothing came since"
    );
    // Who follows from now on gets what comes, to the last byte.
    let tail = Background::start(&mut api.e.command(&stream(&["-f", "stdout.txt", "--tail", "1"])));
    std::thread::sleep(Duration::from_millis(500));
    std::fs::write(go, "").unwrap();
    let printed = tail.finish();
    assert!(printed.status.success());
    assert_eq!(String::from_utf8_lossy(&printed.stdout), "later\nlast\nend");
    for (field, bad) in [
        (
            "tail_lines",
            v1::StreamJobLogsRequest {
                tail_lines: Some(-1),
                ..Default::default()
            },
        ),
        (
            "positions",
            v1::StreamJobLogsRequest {
                positions: vec![v1::LogPosition::default()],
                ..Default::default()
            },
        ),
        (
            "file",
            v1::StreamJobLogsRequest {
                all_ranks: true,
                file: "stdout.txt".into(),
                ..Default::default()
            },
        ),
        (
            "all_ranks",
            v1::StreamJobLogsRequest {
                all_ranks: true,
                offset: 1,
                file: String::new(),
                ..Default::default()
            },
        ),
        (
            "since",
            v1::StreamJobLogsRequest {
                directory: "MODEL".into(),
                since: Some(at),
                ..Default::default()
            },
        ),
    ] {
        let refused = read(&api, |r| {
            let file = match bad.all_ranks {
                true => bad.file.clone(),
                false => r.file.clone(),
            };
            *r = v1::StreamJobLogsRequest {
                name: JOB.into(),
                file,
                ..bad.clone()
            };
        });
        assert_eq!(
            refusal(&refused.unwrap_err()),
            (Code::InvalidArgument, vec![field.to_owned()])
        );
    }
    assert!(!out.join("none").exists());
}

#[test]
fn all_ranks_are_followed_line_by_line_through_restarts_of_agent_and_coordinator() {
    let mut e = Ensemble::with_cluster(2);
    let properties = json!({
        "nodeCount": 2,
        "customToolkitSettings": { "commandLine": counting(600, "0.01"), "processesPerNode": 3 },
    });
    e.submit("j", properties);
    e.until_job("j", "RUNNING");
    let follower = Background::start(&mut e.command(&stream(&["--all-ranks"])));
    std::thread::sleep(Duration::from_millis(1500));
    e.agents.get_mut("a1").unwrap().kill();
    e.coordinator.as_mut().unwrap().kill();
    e.start_coordinator();
    std::thread::sleep(Duration::from_millis(700));
    e.start_agent("a1");
    e.coordinator.as_mut().unwrap().kill();
    e.start_coordinator();
    let printed = follower.finish();
    assert!(
        printed.status.success(),
        "{}",
        String::from_utf8_lossy(&printed.stderr)
    );
    assert_numbered(&printed, 6, 600);
    assert_eq!(e.wait("j"), 0);
    // The same of a job that has ended; one stream, one node, the last lines.
    assert_numbered(&e.run(&stream(&["--all-ranks", "--no-follow"])), 6, 600);
    let tail = e.run(&stream(&[
        "--all-ranks",
        "-f",
        "stdout",
        "--node",
        "a2",
        "--tail",
        "2",
    ]));
    let mut lines: Vec<_> = std::str::from_utf8(&tail.stdout).unwrap().lines().collect();
    lines.sort_unstable();
    let expected = (3..6).flat_map(|r| [599, 600].map(|n| format!("[{r}] {r} {n}")));
    assert_eq!(lines, expected.collect::<Vec<_>>());
    assert!(
        e.run(&stream(&["--all-ranks", "-f", "stderr"]))
            .stdout
            .is_empty()
    );
}

/// A coordinator and agents that keep so many MiB of each log file.
fn keeping(mib: u32, agents: usize) -> Ensemble {
    let mut e = Ensemble::without_daemons();
    let mib = mib.to_string();
    e.variables.push(("BATCHAI_LOG_MIB".into(), mib));
    e.start_coordinator();
    for name in 1..=agents {
        e.start_agent(&format!("a{name}"));
    }
    e.until_alive(agents);
    e.create_cluster(agents);
    e
}

/// A line of sixteen bytes for each number: what stands at an offset follows from it.
fn assert_rings_true(got: &Got, size: i64) {
    let mut next = 0;
    for piece in &got.pieces {
        assert_eq!(
            piece.offset,
            next + piece.dropped_bytes,
            "nothing is missing unsaid"
        );
        for (at, byte) in (piece.offset..).zip(&piece.data[..]) {
            let line = format!("{:015}\n", at / 16);
            assert_eq!(*byte, line.as_bytes()[at as usize % 16], "byte {at}");
        }
        next = piece.offset + piece.data.len() as i64;
    }
    assert_eq!((next, got.end), (size, End::Complete as i32));
}

/// What the files of one name below a directory take of the disk.
fn disk_bytes(below: &std::path::Path, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(below).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type().unwrap().is_dir() {
        true => disk_bytes(&entry.path(), name),
        false if entry.file_name() == name => entry.metadata().unwrap().blocks() * 512,
        false => 0,
    });
    sizes.sum()
}

const MIB: u64 = 1 << 20;
/// What a file may take that is kept to one MiB.
const ONE_MIB_MAX: u64 = MIB + MIB / 4;

#[test]
fn files_that_rotate_take_no_more_disk_and_readers_know_what_they_missed() {
    let mut api = Api::start(keeping(1, 1));
    let (go, size) = (api.e.path().join("go"), 8 << 20);
    let numbers = "seq -f %015.0f";
    let line = format!(
        "{numbers} 0 262143; until [ -e {} ]; do sleep 0.05; done; {numbers} 262144 524287",
        go.display()
    );
    api.e.submit("j", command(&line));
    let small = |api: &Api| {
        let node = disk_bytes(&api.e.path().join("agents/a1/attempts"), "stdout.txt");
        let home = disk_bytes(&api.e.path().join("coordinator/logs"), "stdout.txt");
        assert!(node <= ONE_MIB_MAX && home <= ONE_MIB_MAX, "{node} {home}");
        home
    };
    let half = until("half of it to arrive", || {
        let got = read(&api, |_| ()).ok()?;
        (got.pieces.last()?.offset == size / 2).then_some(got)
    });
    assert!(half.dropped >= size / 2 - ONE_MIB_MAX as i64 && half.text.len() as u64 >= MIB);
    assert!(small(&api) > 0);
    // While nobody takes its log the rank goes on: what its node gave up meanwhile nobody has.
    api.e.coordinator.as_mut().unwrap().kill();
    std::fs::write(&go, "").unwrap();
    until("the rank to end", || {
        let status = glob(&api.e.path().join("agents/a1/attempts"), "status.json")?;
        let status = std::fs::read_to_string(status).ok()?;
        status.contains("\"exit_code\":0").then_some(())
    });
    api.e.start_coordinator();
    assert_eq!(api.e.wait("j"), 0);
    api.channel = api.connect();
    // Who follows it as it comes may get what is given up behind him.
    assert_rings_true(&read(&api, |r| r.follow = true).unwrap(), size);
    let got = read(&api, |_| ()).unwrap();
    assert_rings_true(&got, size);
    assert!(got.dropped >= size - ONE_MIB_MAX as i64, "{}", got.dropped);
    assert!(got.text.len() as u64 >= MIB);
    small(&api);
    // The command says so, and a range that is gone is none.
    let printed = api.e.run(&stream(&["-f", "stdout.txt"]));
    assert!(printed.status.success());
    assert_eq!(printed.stdout.len(), got.text.len());
    let said = String::from_utf8_lossy(&printed.stderr);
    assert!(
        said.contains("bytes of stdout.txt before byte") && said.contains("kept no more"),
        "{said}"
    );
    let range = read(&api, |r| (r.offset, r.length) = (1000, 100)).unwrap();
    assert_eq!((range.text.as_str(), range.dropped), ("", 100));
    assert_eq!(range.end, End::NotFollowed as i32);
    assert_eq!(
        read(&api, |r| r.tail_lines = Some(1)).unwrap().text,
        "000000000524287\n"
    );
}

fn glob(below: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    let mut entries = std::fs::read_dir(below).ok()?.flatten();
    entries.find_map(|entry| match entry.file_type().ok()?.is_dir() {
        true => glob(&entry.path(), name),
        false => (entry.file_name() == name).then(|| entry.path()),
    })
}

#[test]
fn what_is_too_old_goes_while_the_job_runs() {
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = vec!["--log-age".into(), "2".into()];
    e.start_coordinator();
    e.start_agent("a1");
    e.until_alive(1);
    e.create_cluster(1);
    let api = Api::start(e);
    api.e
        .submit("j", command("echo old; sleep 5; echo new; sleep 600"));
    let got = until("the old to go", || {
        read(&api, |_| ()).ok().filter(|got| got.dropped > 0)
    });
    assert_eq!((got.text.as_str(), got.dropped), ("new\n", 4));
    // Also where nothing follows.
    let got = until("the new to go", || {
        read(&api, |_| ()).ok().filter(|got| got.dropped > 4)
    });
    assert_eq!((got.text.as_str(), got.dropped), ("", 8));
}

#[test]
fn retention_and_quota_of_a_workspace_bound_its_logs() {
    let api = Api::start(Ensemble::with_cluster(1));
    let update = |workspace: v1::Workspace, paths: &[&str]| {
        let update = v1::UpdateWorkspaceRequest {
            workspace: Some(v1::Workspace {
                name: WORKSPACE.into(),
                ..workspace
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            }),
        };
        api.call(api.workspaces().update_workspace(update))
    };
    let kept = |seconds| v1::Workspace {
        log_retention: Some(prost_types::Duration { seconds, nanos: 0 }),
        ..Default::default()
    };
    for (bad, field) in [
        (kept(0), "log_retention"),
        (
            v1::Workspace {
                log_quota_mib: -1,
                ..Default::default()
            },
            "log_quota_mib",
        ),
    ] {
        let refused = update(bad, &[field]).unwrap_err();
        assert_eq!(
            refusal(&refused),
            (Code::InvalidArgument, vec![format!("workspace.{field}")])
        );
    }
    let of = |job: &str| {
        let name = format!("{}{job}", JOB.trim_end_matches('j'));
        read(&api, |r| r.name = name)
    };
    let run = |name: &str, kib: u32| {
        api.e.submit(
            name,
            command(&format!("head -c {kib}K /dev/zero | tr '\\0' x")),
        );
        assert_eq!(api.e.wait(name), 0);
        until("its log", || {
            of(name)
                .ok()
                .filter(|got| got.text.len() == kib as usize * 1024)
        });
    };
    // Those of a job that ended long enough ago go, and nothing but how much it was is known.
    run("first", 700);
    assert_eq!(
        update(kept(1), &["log_retention"])
            .unwrap()
            .log_retention
            .unwrap()
            .seconds,
        1
    );
    // Who was reading it then has read a part.
    let got = until("the first to go", || {
        of("first").ok().filter(|got| got.dropped == 700 * 1024)
    });
    assert_eq!(got.text, "");
    assert_eq!(got.end, End::Complete as i32);
    let cleared = update(v1::Workspace::default(), &["log_retention"]).unwrap();
    assert_eq!(cleared.log_retention, None);
    // Beyond the quota those go first that ended first.
    run("second", 700);
    run("third", 700);
    let quota = [
        "workspace",
        "update",
        "-g",
        "g",
        "-n",
        "w",
        "--log-quota",
        "1",
    ];
    assert!(api.e.ok(&quota).contains("\"logQuotaMib\": \"1\""));
    until("the second to go", || {
        of("second").ok().filter(|got| got.dropped == 700 * 1024)
    });
    assert_eq!(of("third").unwrap().dropped, 0);
    // What runs is bound, too, when nothing else is left.
    api.e
        .submit("j", command("head -c 4M /dev/zero | tr '\\0' x; sleep 600"));
    until("what runs to be cut", || {
        let got = of("j").ok()?;
        (got.dropped as u64 >= 3 * MIB - MIB / 4 && got.text.len() as u64 >= MIB).then_some(())
    });
    assert_eq!(of("third").unwrap().text, "");
    assert_eq!(api.e.job("j")["state"], "RUNNING");
}

#[test]
fn a_reader_goes_on_with_the_next_leader() {
    let mut e = Replicas::start(3, &[]);
    e.make_token();
    e.start_agent("a1");
    e.create_cluster(1);
    let properties = json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": counting(800, "0.01"), "processesPerNode": 2 },
    });
    e.submit_with("j", properties);
    let endpoints = e.list();
    let all = Background::start(&mut e.command_at(&endpoints, &stream(&["--all-ranks"])));
    let one = Background::start(&mut e.command_at(&endpoints, &stream(&["--rank", "1"])));
    until("the ranks to run", || {
        (e.job("j")["state"] == "RUNNING").then_some(())
    });
    std::thread::sleep(Duration::from_millis(1500));
    // It hands over and lives on: its readers must not wait with it.
    let first = e.leader();
    let next = if first == 1 { 2 } else { 1 };
    e.ok(&["admin", "replica", "lead", "--id", &next.to_string()]);
    std::thread::sleep(Duration::from_millis(1500));
    let leader = e.leader();
    assert_ne!(leader, first);
    e.kill(leader);
    let all = all.finish();
    assert!(
        all.status.success(),
        "{}",
        String::from_utf8_lossy(&all.stderr)
    );
    assert_numbered(&all, 2, 800);
    let one = String::from_utf8(one.finish().stdout).unwrap();
    let expected: String = (1..=800).map(|n| format!("1 {n}\n")).collect();
    assert_eq!(one, expected);
}

/// The shim of an agent's only attempt: its helpers have the same command line, and are its children.
fn shim_of(e: &Ensemble, agent: &str) -> i32 {
    let all = processes_of(&e.path().join("agents").join(agent));
    let shims: Vec<_> = all
        .iter()
        .filter(|(_, command)| command.contains(" shim "))
        .map(|(pid, _)| *pid)
        .collect();
    let parent = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let rest = stat.rsplit_once(") ")?.1;
        rest.split(' ').nth(1)?.parse::<i32>().ok()
    };
    let own = |pid: &&i32| parent(**pid).is_none_or(|parent| !shims.contains(&parent));
    *shims.iter().find(own).expect("a shim")
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[test]
fn the_log_of_a_node_that_is_lost_says_so_and_has_all_that_came() {
    let e = Ensemble::with_cluster(1);
    let mut job = command("seq 1 50000; sleep 600");
    job["onNodeLoss"] = "FAIL".into();
    e.submit("j", job);
    let printed: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    let mut api = Api::start(e);
    let attempt = |api: &Api, number: i32| {
        let latest = api.e.job("j")["attempt"].clone();
        let got = read(api, |_| ()).ok()?;
        let is = latest["number"] == number && latest["id"] == got.pieces[0].attempt;
        (is && got.text == printed).then_some(())
    };
    until("its log", || attempt(&api, 1));
    let one = open(&api, |r| r.follow = true).unwrap();
    let all = open(&api, |r| {
        (r.all_ranks, r.follow, r.file) = (true, true, "".into())
    })
    .unwrap();
    // Its shim dies, and its agent tells how much it left; the job runs again.
    kill(shim_of(&api.e, "a1"));
    for stream in [one, all] {
        let got = drain(&api, stream).unwrap();
        assert_eq!((got.text == printed, got.end), (true, End::NodeLost as i32));
    }
    until("its second log", || attempt(&api, 2));
    // All of its machine is gone for good.
    let follower = Background::start(&mut api.e.command(&stream(&["-f", "stdout.txt"])));
    api.e.agents.remove("a1").unwrap().kill();
    kill(shim_of(&api.e, "a1"));
    until("its loss to be confirmed", || {
        let confirm = ["node", "confirm-lost", "-n", "a1", "-y"];
        api.e.run(&confirm).status.success().then_some(())
    });
    let followed = follower.finish();
    let said = String::from_utf8_lossy(&followed.stderr);
    assert!(!followed.status.success());
    assert!(
        followed.stdout == printed.as_bytes(),
        "{} bytes; {said}",
        followed.stdout.len()
    );
    assert!(
        said.contains("truncated, node lost: stdout.txt of nodes/a1"),
        "{said}"
    );
}

/// The most memory that a process ever had, in MiB.
fn peak_mib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() / 1024
}

/// No process has a log in memory, whatever ranks print and readers do.
const MEMORY_MIB_MAX: u64 = 400;

#[test]
fn a_gibibyte_without_a_line_disturbs_nobody() {
    let api = Api::start(keeping(16, 2));
    let named = |name: &str| format!("{}{name}", JOB.trim_end_matches('j'));
    let go = api.e.path().join("go");
    // Its shim is to be seen when all of it was printed.
    let flood = format!(
        "head -c 1073741824 /dev/zero | tr '\\0' x; until [ -e {} ]; do sleep 0.05; done",
        go.display()
    );
    api.e.submit("flood", command(&flood));
    api.e.submit(
        "j",
        command("for i in $(seq 1 100); do echo $i; sleep 0.05; done"),
    );
    let request = v1::StreamJobLogsRequest {
        name: named("flood"),
        all_ranks: true,
        file: "stdout".into(),
        follow: true,
        ..Default::default()
    };
    let mut flood = api.call(api.jobs().stream_job_logs(request)).unwrap();
    let first = api.runtime.block_on(flood.message()).unwrap();
    assert!(!first.unwrap().data.is_empty());
    // Beside it another one is followed, and the ensemble answers.
    let lines = api.e.run(&stream(&["-f", "stdout.txt"]));
    let expected: String = (1..=100).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&lines.stdout), expected);
    let begin = std::time::Instant::now();
    api.e.ok(&["group", "create", "-n", "beside"]);
    assert!(begin.elapsed() < Duration::from_secs(5));
    let peak = peak_mib(shim_of_flood(&api.e));
    assert!(peak < 64, "{peak}");
    std::fs::write(go, "").unwrap();
    // Its reader, which stood still meanwhile, learns what it has missed.
    let (mut next, mut dropped) = (None, 0);
    let mut end = End::Unspecified;
    while let Some(piece) = api.runtime.block_on(flood.message()).unwrap() {
        assert!(piece.data.len() <= 256 << 10);
        if piece.file.is_empty() {
            end = piece.end();
            continue;
        }
        let from = next.unwrap_or(piece.offset - piece.dropped_bytes);
        assert_eq!(from + piece.dropped_bytes, piece.offset);
        assert!(
            piece.data.iter().all(|byte| *byte == b'x'),
            "nothing is made up"
        );
        dropped += piece.dropped_bytes;
        next = Some(piece.offset + piece.data.len() as i64);
    }
    assert_eq!((next, end), (Some(1 << 30), End::Complete));
    assert_eq!(api.e.wait("flood"), 0);
    assert!(dropped > 0, "it was slower than the rank");
    let most = 16 * (MIB + MIB / 4);
    let home = disk_bytes(&api.e.path().join("coordinator/logs"), "stdout.txt");
    assert!(home <= most, "{home}");
    for process in api.e.agents.values().chain(&api.e.coordinator) {
        let peak = peak_mib(process.pid());
        assert!(peak < MEMORY_MIB_MAX, "{peak}");
    }
}

/// Either node may have the flood: its shim is the one that may grow.
fn shim_of_flood(e: &Ensemble) -> i32 {
    let all = processes_of(&e.path().join("agents"));
    let shims = all.iter().filter(|(_, command)| command.contains(" shim "));
    shims
        .map(|(pid, _)| *pid)
        .max_by_key(|pid| peak_mib(*pid))
        .expect("the flood has not ended")
}

#[test]
fn readers_that_stop_hold_up_neither_rank_nor_other_readers() {
    let api = Api::start(Ensemble::with_cluster(1));
    let size = 64 << 20;
    api.e.submit(
        "j",
        command(&format!(
            "head -c {size} /dev/zero | tr '\\0' x; echo; echo end"
        )),
    );
    let mut stopped = Vec::new();
    for all_ranks in [false, true].repeat(8) {
        let request = v1::StreamJobLogsRequest {
            name: JOB.into(),
            file: if all_ranks { "stdout" } else { "stdout.txt" }.into(),
            all_ranks,
            follow: true,
            ..Default::default()
        };
        // Each has its connection, so that only what is theirs can fill up.
        let mut jobs = v1::job_service_client::JobServiceClient::new(api.connect());
        let mut stream = api.call(jobs.stream_job_logs(request)).unwrap();
        assert!(api.runtime.block_on(stream.message()).unwrap().is_some());
        stopped.push(stream);
    }
    assert_eq!(api.e.wait("j"), 0);
    let read = api.e.run(&stream(&["-f", "stdout.txt"]));
    assert_eq!(read.stdout.len(), size + 5);
    assert!(read.stdout.ends_with(b"x\nend\n"));
    let peak = peak_mib(api.e.coordinator.as_ref().unwrap().pid());
    assert!(peak < MEMORY_MIB_MAX, "{peak}");
    // Who goes on gets the rest.
    let mut stream = stopped.remove(0);
    let mut rest = 0;
    while let Some(piece) = api.runtime.block_on(stream.message()).unwrap() {
        rest += piece.data.len();
    }
    assert!((1..=size + 5).contains(&rest), "{rest}");
}

/// A mount that goes with the test.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_log_disk_stops_neither_jobs_nor_the_control_plane_and_loses_nothing() {
    let mut e = Ensemble::without_daemons();
    let logs = e.path().join("coordinator/logs");
    let mount = |options: &str| {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&logs)
            .output();
        mount.is_ok_and(|output| output.status.success())
    };
    // What `init` makes must be there before.
    e.start_coordinator();
    e.coordinator.as_mut().unwrap().kill();
    if !mount("size=4m") {
        return requirement::skip("a small tmpfs cannot be mounted: run as root");
    }
    let mounted = Mounted(logs.clone());
    e.start_coordinator();
    for name in ["a1", "a2"] {
        e.start_agent(name);
    }
    e.until_alive(2);
    e.create_cluster(2);
    let size = 16 << 20;
    e.submit(
        "j",
        command(&format!("head -c {size} /dev/zero | tr '\\0' x; echo end")),
    );
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    let log = || std::fs::read_to_string(e.path().join("coordinator.log")).unwrap();
    until("the disk to be full", || {
        log().contains("cannot keep a log file").then_some(())
    });
    // Everything else goes on.
    for turn in 0..5 {
        e.ok(&["group", "create", "-n", &format!("beside{turn}")]);
        let name = format!("other{turn}");
        e.submit(&name, command("true"));
        assert_eq!(e.wait(&name), 0, "{}", e.job(&name));
    }
    let now = stream(&["-f", "stdout.txt", "--no-follow"]);
    assert!(e.run(&now).stdout.len() < 4 << 20, "no more fits");
    // With room again what is missing comes: the node has kept it.
    assert!(mount("remount,size=64m"));
    let whole = e.run(&stream(&["-f", "stdout.txt"]));
    assert!(
        whole.status.success(),
        "{}",
        String::from_utf8_lossy(&whole.stderr)
    );
    assert_eq!(whole.stdout.len(), size + 4);
    assert!(whole.stdout.ends_with(b"xend\n"));
    e.agents.clear();
    e.coordinator = None;
    drop(mounted);
}
