//! Commands and shells on nodes, through the coordinator and the agent: with real processes, in real terminals.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use batchai_common::limits::{EXEC_CHUNK_BYTES_MAX, EXEC_CHUNKS_MAX};
use batchai_common::names::hex;
use batchai_common::tls::{Identity, Route};
use batchai_proto::v1;
use batchai_proto::v1::exec_input::Input;
use batchai_proto::v1::exec_job_request::Message;
use batchai_proto::v1::exec_output::Output as Said;
use batchai_proto::v1::exec_service_client::ExecServiceClient;
use batchai_proto::v1::role_binding::Role;
use batchai_tests::api::{Api, EXPERIMENT, WORKSPACE, connector, refusal};
use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::{Background, Process, processes_of, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::terminal::Terminal;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// What a job does that waits until it is let go.
fn held(dir: &Path, name: &str) -> String {
    format!(
        "until [ -e {}/{name}.go ]; do sleep 0.05; done",
        dir.display()
    )
}

/// A job that runs until it is let go, with a variable and a secret.
fn submit(e: &Ensemble, name: &str) {
    let properties = json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": held(e.path(), name) },
        "environmentVariables": [{ "name": "COLOUR", "value": "green" }],
        "secrets": [{ "name": "KEY", "value": "hush" }],
    });
    e.submit(name, properties);
    until_running(e, name);
}

/// Running, also as its node sees it.
fn until_running(e: &Ensemble, name: &str) {
    until("the job to run", || {
        let job = e.job(name);
        assert_ne!(job["state"], "FAILED", "{job}");
        let phase = &job["attempt"]["nodes"][0]["phase"];
        (job["state"] == "RUNNING" && phase == "RUNNING").then_some(())
    });
}

fn let_go(e: &Ensemble, name: &str) {
    fs::write(e.path().join(format!("{name}.go")), "").unwrap();
}

/// The arguments for something beside a job.
fn beside<'a>(job: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["job", "node", "exec", "-j", job][..], &IN, more].concat()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command that ends by itself came to: code, standard output and standard error.
fn came(output: &Output) -> (Option<i32>, String, String) {
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    (output.status.code(), out, error)
}

/// How long something sleeps, in seconds: nothing else on this machine sleeps as long.
fn nap(number: u32) -> u32 {
    std::process::id() * 10 + number
}

/// The processes on this machine that sleep for so long.
fn sleeping(number: u32) -> Vec<i32> {
    let wanted = format!("sleep\0{}\0", nap(number));
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let sleeps = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline"));
        line.is_ok_and(|line| line == wanted.as_bytes())
    };
    pids.filter(sleeps).collect()
}

fn until_sleeping(number: u32, count: usize) {
    until(&format!("{count} times nap {number}"), || {
        (sleeping(number).len() == count).then_some(())
    });
}

#[test]
fn a_shell_beside_a_job_is_like_one_here() {
    let e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let mut shell = Terminal::start(&e.command(&beside("j", &[])), 33, 101);
    let before = shell.settings();
    shell.line("PS1='$ '; echo $((6 * 7)) done", "42 done");
    assert_ne!(shell.settings(), before, "keys go there as they are");
    shell.line("stty size; echo $TERM", "33 101\r\nxterm-256color");
    shell.resize(20, 50);
    // The shell hears of it between two commands.
    until("the size to come", || {
        let shown = shell.line("stty size; echo end-of-it", "\nend-of-it");
        shown.contains("20 50").then_some(())
    });
    let here = shell.line(
        "pwd; echo [$AZ_BATCHAI_JOB_TEMP] [$COLOUR] [$KEY] $SHELL",
        "/bash",
    );
    let home = e.path().join("nodes/a1/jobs/w/e/j").display().to_string();
    assert!(
        here.contains(&format!("{home}\r\n[{home}] [green] [hush] ")),
        "{here}"
    );
    // Keys that mean something here mean it there.
    let sleep = format!("sleep {}", nap(1));
    shell.line(&format!("{sleep}; echo came $?"), &sleep);
    until_sleeping(1, 1);
    shell.press("\x03");
    shell.line("echo still $((40 + 2))", "still 42");
    until_sleeping(1, 0);
    // What is typed before the shell has given the terminal back is the shell's.
    shell.line("echo begun; cat; echo read $?", "begun\r\n");
    shell.press("typed\n\x04");
    shell.expect("read 0");
    shell.press("exit 7\n");
    assert_eq!(shell.wait().code(), Some(7));
    assert_eq!(shell.settings(), before, "the terminal is as it was");
    // Told to end, it leaves the terminal as it was as well.
    let mut shell = Terminal::start(&e.command(&beside("j", &[])), 24, 80);
    let before = shell.settings();
    let sleep = format!("echo $((1 + 1)) up; trap '' HUP; sleep {}", nap(2));
    shell.line(&sleep, "2 up");
    until_sleeping(2, 1);
    shell.signal(Signal::SIGTERM);
    assert_eq!(shell.wait().code(), Some(143));
    assert_eq!(shell.settings(), before);
    until_sleeping(2, 0);
    // With a terminal, and without a shell.
    let tty = beside(
        "j",
        &["-t", "--", "sh", "-c", "tty; test -t 0 -a -t 1 -a -t 2"],
    );
    let mut terminal = Terminal::start(&e.command(&tty), 24, 80);
    terminal.expect("/dev/pts/");
    assert_eq!(terminal.wait().code(), Some(0));
    assert_eq!(e.job("j")["state"], "RUNNING");
    let_go(&e, "j");
    assert_eq!(e.wait("j"), 0);
}

#[test]
fn without_a_terminal_streams_are_apart_and_the_exit_code_is_the_commands() {
    let e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let run = |more: &[&str]| came(&e.run(&beside("j", more)));
    let apart = run(&["--", "sh", "-c", "echo out; echo error >&2; exit 3"]);
    assert_eq!(apart, (Some(3), "out\n".into(), "error\n".into()));
    // The signal that ended it; what is no program; what is none to start.
    assert_eq!(run(&["--", "sh", "-c", "kill -TERM $$"]).0, Some(143));
    let (code, _, said) = run(&["--", "no-such-program"]);
    assert!(
        code == Some(127) && said.contains("no-such-program"),
        "{said}"
    );
    assert_eq!(run(&["--", "/etc/passwd"]).0, Some(126));
    // Arguments are passed on as they are.
    let (_, said, _) = run(&["--", "printf", "[%s]", "a b", "", "-t", "$HOME"]);
    assert_eq!(said, "[a b][][-t][$HOME]");
    let (_, said, _) = run(&["--exec", "echo \"$0\" $((1 + 2)) $COLOUR"]);
    assert_eq!(said, "/bin/bash 3 green\n");
    // Without --stdin there is nothing to read; a shell reads.
    assert_eq!(run(&["--", "cat"]), (Some(0), String::new(), String::new()));
    let mut piped = e.command(&beside("j", &[]));
    let mut piped = piped
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = piped.stdin.take().unwrap();
    stdin
        .write_all(b"read line\nhello\necho $line, $COLOUR; exit 9\n")
        .unwrap();
    drop(stdin);
    let output = piped.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(9), "hello, green\n".into())
    );
    // What it leaves behind ends with it, and holds it up no longer than that takes.
    let begun = Instant::now();
    let left = format!(
        "trap '' HUP; sleep {0} & setsid sleep {0} & echo left; exit 4",
        nap(3)
    );
    assert_eq!(
        run(&["--", "sh", "-c", &left]),
        (Some(4), "left\n".into(), String::new())
    );
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    until_sleeping(3, 0);
    let (code, _, said) = came(&e.run(&beside("j", &["-t", "--", "true"])));
    assert!(code == Some(2) && said.contains("no terminal"), "{said}");
    // On the node, outside of any job.
    let on_node = [
        "cluster",
        "node",
        "exec",
        "-g",
        "g",
        "-w",
        "w",
        "-c",
        "c",
        "--node",
        "a1",
        "--",
        "sh",
        "-c",
        "echo [$AZ_BATCHAI_JOB_TEMP]; cd && pwd; exit 5",
    ];
    let (code, said, _) = came(&e.run(&on_node));
    let home = std::env::var("HOME").unwrap_or_else(|_| "/".into());
    assert_eq!((code, said), (Some(5), format!("[]\n{home}\n")));
    let_go(&e, "j");
}

/// So many bytes that do not repeat soon.
fn noise(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u64(..).to_le_bytes())
        .take(bytes / 8)
        .flatten()
        .collect()
}

#[test]
fn what_is_piped_through_comes_out_whole() {
    let e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let (path, data) = (e.path().join("data"), noise(100 << 20));
    fs::write(&path, &data).unwrap();
    let expected = hex(&Sha256::digest(&data));
    let through = |more: &[&str]| {
        let mut command = e.command(&beside("j", more));
        let begun = Instant::now();
        let output = command.stdin(File::open(&path).unwrap()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        println!("{more:?}: {:?}", begun.elapsed());
        output.stdout
    };
    let there = through(&["-i", "--", "sha256sum"]);
    assert_eq!(text(&there), format!("{expected}  -\n"));
    let back = through(&["-i", "--", "cat"]);
    assert_eq!(
        (back.len(), hex(&Sha256::digest(&back))),
        (data.len(), expected)
    );
    // Who reads a part of it only ends when he has that; who sends the rest is not kept from anything.
    let part = through(&["-i", "--", "head", "-c", "100000"]);
    assert_eq!(part, data[..100_000]);
    // Many small pieces in both directions are no other thing.
    let small = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i + 1)); done";
    let printed = text(&e.run(&beside("j", &["--", "bash", "-c", small])).stdout);
    assert_eq!(printed.lines().count(), 20_000);
    let_go(&e, "j");
}

/// The memory of a process, in MiB.
fn memory(process: &Process) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() / 1024
}

#[test]
fn who_does_not_read_costs_no_memory_and_holds_up_nobody() {
    let e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let daemons = || {
        let coordinator = e.coordinator.as_ref().unwrap();
        [memory(coordinator), memory(&e.agents["a1"])]
    };
    let before = daemons();
    // One prints much at a time, the other very little, again and again.
    let much = ["--", "head", "-c", "64M", "/dev/zero"];
    let little = ["--", "bash", "-c", "while true; do echo x; done"];
    let start = |more: &[&str]| {
        let mut command = e.command(&beside("j", more));
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let (mut stopped, mut other) = (start(&much), start(&little));
    std::thread::sleep(Duration::from_secs(5));
    let (code, said, _) = came(&e.run(&beside("j", &["--", "echo", "still here"])));
    assert_eq!((code, said.as_str()), (Some(0), "still here\n"));
    let after = daemons();
    for (before, after) in before.iter().zip(after) {
        assert!(after < before + 48, "{before} MiB, then {after} MiB");
    }
    // Nothing was lost by waiting.
    let mut all = Vec::new();
    stopped
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut all)
        .unwrap();
    assert!(stopped.wait().unwrap().success() && all.len() == 64 << 20);
    // It still prints: many small pieces that nobody read broke nothing.
    let mut more = vec![0; 256 << 10];
    other
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut more)
        .unwrap();
    assert!(more.chunks(2).all(|line| line == b"x\n"));
    // Who does not want more of it ends it.
    drop(other.stdout.take());
    assert_eq!(other.wait().unwrap().code(), Some(141));
    let_go(&e, "j");
}

#[test]
fn what_is_hung_up_ends_with_all_that_it_started() {
    let mut e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let tree = format!(
        "trap 'echo hung up > HUNG' HUP; (trap '' HUP TERM; setsid sleep {0}) & setsid sleep {0} & while true; do sleep 0.1; done",
        nap(4)
    );
    let start = |e: &Ensemble| {
        let mut command = e.command(&beside("j", &["--", "bash", "-c", &tree]));
        let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
        let client = command.spawn().unwrap();
        until_sleeping(4, 2);
        client
    };
    // The caller vanishes.
    let mut client = start(&e);
    client.kill().unwrap();
    client.wait().unwrap();
    until_sleeping(4, 0);
    let mark = e.path().join("nodes/a1/jobs/w/e/j/HUNG");
    assert_eq!(fs::read_to_string(mark).unwrap(), "hung up\n");
    // Somebody kills the process that holds it.
    let client = start(&e);
    for (pid, command) in processes_of(e.path()) {
        if command.contains(" exec ") && command.starts_with("batchai-exec") {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
    }
    let output = client.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
    // What is in no group is beyond its reach then.
    if e.json(&["node", "show", "-n", "a1"])["facts"]["isolation"] == "process-tree" {
        for pid in sleeping(4) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
    }
    until_sleeping(4, 0);
    // The agent is cut down: the caller is told, and the job goes on.
    let client = start(&e);
    e.agents.get_mut("a1").unwrap().kill();
    let output = client.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("agent has ended"),
        "{said}"
    );
    until_sleeping(4, 0);
    e.start_agent("a1");
    until("the agent to be back", || {
        let output = e.run(&beside("j", &["--", "echo", "back"]));
        (text(&output.stdout) == "back\n").then_some(())
    });
    // So it is where the agent, or the coordinator, is told to end.
    let client = start(&e);
    e.agents["a1"].signal(Signal::SIGTERM);
    let output = client.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    until_sleeping(4, 0);
    e.agents.get_mut("a1").unwrap().wait();
    e.start_agent("a1");
    until("the agent to be back", || {
        let output = e.run(&beside("j", &["--", "echo", "back"]));
        (text(&output.stdout) == "back\n").then_some(())
    });
    let client = start(&e);
    e.coordinator.as_mut().unwrap().signal(Signal::SIGTERM);
    let output = client.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("shutting down"),
        "{said}"
    );
    until_sleeping(4, 0);
    e.coordinator.as_mut().unwrap().wait();
    e.start_coordinator();
    let_go(&e, "j");
    assert_eq!(e.wait("j"), 0);
    assert_eq!(e.job("j")["attempt"]["number"], 1);
    e.assert_nothing_left();
}

fn ends_with_its_job(isolation: Option<&str>) {
    let mut e = Ensemble::start(0);
    let mut args = batchai_tests::ensemble::agent_args(e.path(), &e.endpoint, "a1", "self");
    let isolation = isolation.into_iter().flat_map(|way| ["--isolation", way]);
    args.extend(isolation.map(str::to_owned));
    let log = e.path().join("a1.log");
    let agent = Process::start_with(args, &e.join_token(), &log);
    e.agents.insert("a1".to_owned(), agent);
    e.until_alive(1);
    e.create_cluster(1);
    // It hears of nothing, and leaves a part in another session.
    let deaf = format!(
        "trap '' HUP TERM INT; setsid sleep {} & while true; do sleep 0.1; done",
        nap(5)
    );
    for (name, ends) in [("done", true), ("terminated", false)] {
        submit(&e, name);
        let mut command = e.command(&beside(name, &["--", "bash", "-c", &deaf]));
        let beside = Background::start(&mut command);
        until_sleeping(5, 1);
        let begun = Instant::now();
        match ends {
            true => let_go(&e, name),
            false => {
                e.ok(&[&["job", "terminate", "-n", name, "--yes"][..], &IN].concat());
            }
        }
        let code = beside.finish().status.code();
        assert!(matches!(code, Some(137 | 143)), "{code:?}");
        until_sleeping(5, 0);
        let job = e.until_job(name, if ends { "SUCCEEDED" } else { "FAILED" });
        // Far less than what a job gets that does not end when it is told to.
        assert!(
            begun.elapsed() < Duration::from_secs(8),
            "{:?}: {job}",
            begun.elapsed()
        );
    }
    until("the groups to be removed", || {
        let left = e.groups().iter().any(|home| home.path.exists());
        (!left).then_some(())
    });
    e.assert_nothing_left();
}

#[test]
fn it_ends_with_its_job_and_keeps_it_from_nothing() {
    ends_with_its_job(None);
    ends_with_its_job(Some("process-tree"));
}

fn with_role(api: &Api, user: &str, role: Role, scope: &str) -> Route {
    let create = v1::CreateRoleBindingRequest {
        role_binding_id: user.into(),
        role_binding: Some(v1::RoleBinding {
            member: format!("users/{user}"),
            role: role as i32,
            scope: scope.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(create)).unwrap();
    let credentials = api.e.credentials_of(&Identity::user(user).unwrap());
    let connector = connector(&api.e.endpoint, &credentials);
    api.runtime.block_on(connector.connect()).unwrap()
}

/// A call that runs something beside a job.
fn exec_job(
    api: &Api,
    channel: Route,
    arguments: &[&str],
) -> Result<(mpsc::Sender<Input>, Streaming<v1::ExecOutput>), Status> {
    let start = v1::ExecJobStart {
        name: format!("{EXPERIMENT}/jobs/j"),
        command: Some(v1::ExecCommand {
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            input: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = |message| v1::ExecJobRequest {
        message: Some(message),
    };
    let (inputs, rest) = mpsc::channel(100);
    let rest = ReceiverStream::new(rest)
        .map(move |input| request(Message::Input(v1::ExecInput { input: Some(input) })));
    let requests = tokio_stream::once(request(Message::Start(start))).chain(rest);
    let mut client = ExecServiceClient::new(channel);
    let outputs = api.call(client.exec_job(requests))?;
    Ok((inputs, outputs))
}

#[test]
fn what_is_run_is_on_record_and_takes_a_right_of_its_own() {
    let api = Api::start(Ensemble::with_cluster(1));
    let e = &api.e;
    submit(e, "j");
    let reader = with_role(&api, "rita", Role::Reader, WORKSPACE);
    let elsewhere = with_role(&api, "ewa", Role::Owner, "resourceGroups/h");
    let owner = with_role(&api, "olga", Role::Owner, WORKSPACE);
    let refused = exec_job(&api, reader, &["true"]).unwrap_err();
    assert_eq!(refusal(&refused).0, Code::PermissionDenied);
    let refused = exec_job(&api, elsewhere, &["rm", "-rf", "/"]).unwrap_err();
    assert_eq!(refusal(&refused).0, Code::PermissionDenied);
    let permission = "batchai/workspaces/experiments/jobs/exec/action";
    assert!(
        refused.message().contains(permission),
        "{}",
        refused.message()
    );
    let (_inputs, mut outputs) = exec_job(&api, owner, &["echo", "a secret of mine"]).unwrap();
    let next = api.runtime.block_on(outputs.message()).unwrap().unwrap();
    assert!(matches!(next.output, Some(Said::Stdout(_))), "{next:?}");
    // Machines are the administrator's.
    let credentials = e.credentials_of(&Identity::user("olga").unwrap());
    let on_node = [
        "cluster", "node", "exec", "-g", "g", "-w", "w", "-c", "c", "--", "id",
    ];
    let mut as_olga = e.command(&on_node);
    let output = as_olga
        .env("BATCHAI_CREDENTIALS", credentials)
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert!(
        !output.status.success() && said.contains("batchai/nodes/exec/action"),
        "{said}"
    );
    e.ok(&on_node);
    let told = e.ok(&["audit", "tail", "-n", "20", "-o", "tsv"]);
    assert!(told.contains("\t\"echo\" \"a secret of mine\"\n"), "{told}");
    let records = e.ok(&["audit", "tail", "-n", "20"]);
    let records = serde_json::Deserializer::from_str(&records).into_iter();
    let records: Vec<serde_json::Value> = records.map(Result::unwrap).collect();
    let found = |caller: &str, method: &str| {
        let of = |r: &&serde_json::Value| r["caller"] == caller && r["method"] == method;
        let record = records
            .iter()
            .find(of)
            .unwrap_or_else(|| panic!("{records:?}"));
        let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
        (text("result"), text("name"), record["command"].clone())
    };
    let (on_job, on_node) = (
        "batchai.v1.ExecService/ExecJob",
        "batchai.v1.ExecService/ExecNode",
    );
    let job = format!("{EXPERIMENT}/jobs/j");
    // Who may nowhere is refused before it is read what he wants.
    assert_eq!(found("users/rita", on_job).0, "PERMISSION_DENIED");
    let refused = "PERMISSION_DENIED".to_owned();
    let ewa = (refused, job.clone(), json!(["rm", "-rf", "/"]));
    assert_eq!(found("users/ewa", on_job), ewa);
    let olga = ("OK".into(), job, json!(["echo", "a secret of mine"]));
    assert_eq!(found("users/olga", on_job), olga);
    assert_eq!(found("users/olga", on_node).0, "PERMISSION_DENIED");
    let admin = (
        "OK".into(),
        format!("{WORKSPACE}/clusters/c"),
        json!(["id"]),
    );
    assert_eq!(found("users/admin", on_node), admin);
    let_go(e, "j");
}

#[test]
fn whoever_loses_the_right_is_cut_off() {
    let api = Api::start(Ensemble::with_cluster(1));
    submit(&api.e, "j");
    let owner = with_role(&api, "olga", Role::Owner, WORKSPACE);
    let (_inputs, mut outputs) = exec_job(&api, owner, &["sleep", &nap(6).to_string()]).unwrap();
    until_sleeping(6, 1);
    let delete = v1::DeleteRoleBindingRequest {
        name: "roleBindings/olga".into(),
        ..Default::default()
    };
    api.call(api.access().delete_role_binding(delete)).unwrap();
    let end = async { tokio::time::timeout(Duration::from_secs(20), outputs.message()).await };
    let end = api.runtime.block_on(end).expect("in time").unwrap_err();
    assert_eq!(end.code(), Code::PermissionDenied);
    until_sleeping(6, 0);
    let_go(&api.e, "j");
}

#[test]
fn a_caller_gets_no_more_than_he_says_that_he_takes() {
    let api = Api::start(Ensemble::with_cluster(1));
    submit(&api.e, "j");
    let script = "cat; echo error >&2; head -c 4000000 /dev/zero; exit 6";
    let (inputs, mut outputs) = exec_job(&api, api.channel.clone(), &["sh", "-c", script]).unwrap();
    let mut next = |within: u64| {
        let next =
            async { tokio::time::timeout(Duration::from_millis(within), outputs.message()).await };
        let next = api.runtime.block_on(next).ok()?;
        Some(next.unwrap().expect("it goes on").output.unwrap())
    };
    let say = |input: Input| api.runtime.block_on(inputs.send(input)).unwrap();
    say(Input::Data("in".into()));
    let (mut stdout, mut stderr, mut taken) = (Vec::new(), Vec::new(), 0);
    // That it was given what was sent is no output: it needs no room.
    while stdout.is_empty() || taken == 0 {
        match next(20_000).unwrap() {
            Said::Stdout(data) => stdout.extend_from_slice(&data),
            Said::Taken(count) => taken = count,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((&stdout[..], taken), (&b"in"[..], 1));
    say(Input::End(true));
    let mut pieces = 1;
    while let Some(said) = next(1500) {
        pieces += 1;
        match said {
            Said::Stdout(data) => {
                assert!(data.len() <= EXEC_CHUNK_BYTES_MAX);
                stdout.extend_from_slice(&data);
            }
            Said::Stderr(data) => stderr.extend_from_slice(&data),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        (pieces, stderr),
        (EXEC_CHUNKS_MAX as i64, b"error\n".to_vec())
    );
    let exit_code = loop {
        // When all is on its way, nobody listens any more.
        let _ = api.runtime.block_on(inputs.send(Input::Taken(pieces)));
        match next(20_000).unwrap() {
            Said::Stdout(data) => stdout.extend_from_slice(&data),
            Said::ExitCode(exit_code) => break exit_code,
            other => panic!("{other:?}"),
        }
        pieces += 1;
    };
    assert_eq!((exit_code, stdout.len()), (6, 4_000_002));
    let_go(&api.e, "j");
}

#[test]
fn what_cannot_be_run_is_refused_with_what_to_do() {
    let mut e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let (code, said) = e.fails(&beside("none", &["--", "true"]));
    assert!(
        code == 3 && said.contains("jobs/none does not exist"),
        "{said}"
    );
    let (_, said) = e.fails(&beside("j", &["--node", "a9", "--", "true"]));
    assert!(
        said.contains("nodes/a9 has no part in it; its nodes are a1"),
        "{said}"
    );
    let on_node = ["cluster", "node", "exec", "-g", "g", "-w", "w", "-c", "c"];
    let (code, said) = e.fails(&[&on_node[..], &["--node", "a9", "--", "true"]].concat());
    assert!(
        code == 3 && said.contains("nodes/a9 does not exist"),
        "{said}"
    );
    e.submit(
        "waits",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "true" } }),
    );
    let (_, said) = e.fails(&beside("waits", &["--", "true"]));
    assert!(said.contains("it does not run now"), "{said}");
    // As many as a node takes, and no more; whoever ends makes room.
    let sleepers: Vec<_> = (0..16)
        .map(|_| {
            Background::start(&mut e.command(&beside("j", &["--", "sleep", &nap(7).to_string()])))
        })
        .collect();
    until_sleeping(7, 16);
    let (_, said) = e.fails(&beside("j", &["--", "true"]));
    assert!(said.contains("room for commands is full"), "{said}");
    drop(sleepers);
    until("there to be room", || {
        e.run(&beside("j", &["--", "true"]))
            .status
            .success()
            .then_some(())
    });
    until_sleeping(7, 0);
    // A node that is not there.
    e.agents.get_mut("a1").unwrap().kill();
    let begun = Instant::now();
    let (_, said) = e.fails(&beside("j", &["--", "true"]));
    assert!(
        said.contains("is not in contact; `batchai node show -n a1`"),
        "{said}"
    );
    assert!(begun.elapsed() < Duration::from_secs(30));
    e.start_agent("a1");
    let_go(&e, "j");
    assert_eq!(e.wait("j"), 0);
    let (_, said) = e.fails(&beside("j", &["--", "true"]));
    assert!(said.contains("it does not run now"), "{said}");
}

#[test]
fn jobs_users_are_whom_it_runs_as() {
    if !nix::unistd::geteuid().is_root() {
        batchai_tests::requirement::skip("only root starts jobs as somebody else");
        return;
    }
    let mut e = Ensemble::without_daemons();
    // Somebody else's jobs must get at its directories.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(e.path(), open).unwrap();
    e.start_coordinator();
    e.start_agent_as("a1", "per-workspace:7000000");
    e.until_alive(1);
    e.create_cluster(1);
    e.submit(
        "j",
        json!({
            "nodeCount": 1,
            "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
            "customToolkitSettings": { "commandLine": held(e.path(), "j") },
        }),
    );
    until_running(&e, "j");
    let who = "id -u; id -G; grep -c 'NoNewPrivs.*1' /proc/self/status; echo x > /dev/stdout; pwd";
    let (code, said, error) = came(&e.run(&beside("j", &["--", "sh", "-c", who])));
    let home = e.path().join("nodes/a1/jobs/w/e/j");
    let expected = format!("7000001\n7000001\n1\nx\n{}\n", home.display());
    assert_eq!((code, said, error), (Some(0), expected, String::new()));
    // His terminal is his.
    let tty = beside(
        "j",
        &[
            "-t",
            "--",
            "sh",
            "-c",
            "echo x > $(tty) && stat -c %u $(tty)",
        ],
    );
    let mut terminal = Terminal::start(&e.command(&tty), 24, 80);
    terminal.expect("x\r\n7000001");
    assert_eq!(terminal.wait().code(), Some(0));
    let on_node = [
        "cluster", "node", "exec", "-g", "g", "-w", "w", "-c", "c", "--",
    ];
    let (code, said, _) = came(&e.run(&[&on_node[..], &["sh", "-c", "id -u; pwd"]].concat()));
    assert_eq!((code, said.as_str()), (Some(0), "7000001\n/\n"));
    let_go(&e, "j");
    assert_eq!(e.wait("j"), 0);
}

#[test]
fn an_agent_at_a_follower_runs_commands_as_well() {
    let mut e = Replicas::start(3, &[]);
    let leader = e.leader();
    let follower = (1..=3).find(|id| *id != leader).unwrap();
    let endpoint = e.endpoint(follower).to_owned();
    e.start_agent_at("a1", &endpoint);
    until("the node to be alive", || {
        let nodes = e.json_at(&e.list(), &["node", "list"]);
        (nodes
            .as_array()?
            .iter()
            .any(|node| node["state"] != "UNUSABLE"))
        .then_some(())
    });
    e.create_cluster(1);
    let held = held(e.path(), "j");
    e.submit("j", &held);
    until("the job to run", || {
        let job = e.job("j");
        let phase = &job["attempt"]["nodes"][0]["phase"];
        (job["state"] == "RUNNING" && phase == "RUNNING").then_some(())
    });
    // Whichever replica is asked first.
    for id in 1..=3 {
        let mut list = vec![e.endpoint(id).to_owned()];
        list.extend(
            (1..=3)
                .filter(|other| *other != id)
                .map(|id| e.endpoint(id).to_owned()),
        );
        let args = beside("j", &["--", "sh", "-c", "echo here; exit 8"]);
        let output = e.command_at(&list.join(","), &args).output().unwrap();
        let said = came(&output);
        assert_eq!(
            said,
            (Some(8), "here\n".into(), String::new()),
            "asked {id}"
        );
    }
    // What runs goes on where another one leads.
    let mut command = e.command_at(&e.list(), &beside("j", &["-i", "--", "cat"]));
    let mut cat = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
    let mut echo = |text: &[u8]| {
        stdin.write_all(text).unwrap();
        let mut back = vec![0; text.len()];
        stdout.read_exact(&mut back).unwrap();
        assert_eq!(back, text);
    };
    echo(b"before\n");
    e.ok(&["admin", "replica", "lead"]);
    echo(b"after\n");
    drop(stdin);
    assert!(cat.wait().unwrap().success());
    fs::write(e.path().join("j.go"), "").unwrap();
}

#[test]
fn nothing_of_it_is_left_in_files() {
    let e = Ensemble::with_cluster(1);
    submit(&e, "j");
    let mut cat = e.command(&beside("j", &["-i", "--", "cat"]));
    let mut cat = cat
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let typed = "Qm7typed5and9shown";
    cat.stdin
        .take()
        .unwrap()
        .write_all(typed.as_bytes())
        .unwrap();
    assert_eq!(text(&cat.wait_with_output().unwrap().stdout), typed);
    let_go(&e, "j");
    assert_eq!(e.wait("j"), 0);
    let grep = Command::new("grep")
        .args(["-rl", typed])
        .arg(e.path())
        .output()
        .unwrap();
    assert_eq!(text(&grep.stdout), "");
    assert!(
        processes_of(e.path())
            .iter()
            .all(|(_, command)| !command.contains(" exec "))
    );
}
