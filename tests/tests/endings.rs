//! Why a job ended, for every way there is, with real processes: code, exit code and details.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::{processes_of, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A way for a job to end.
struct Ending {
    name: &'static str,
    properties: Value,
    /// What is done to it once it runs.
    inject: Option<fn(&Ensemble, &str)>,
    code: &'static str,
    exit_code: Option<i64>,
    /// What the message has in it.
    says: &'static [&'static str],
    details: Vec<(&'static str, String)>,
}

impl Ending {
    fn new(name: &'static str, properties: Value, code: &'static str) -> Ending {
        Ending {
            name,
            properties,
            inject: None,
            code,
            exit_code: None,
            says: &[],
            details: Vec::new(),
        }
    }

    fn exit(mut self, code: i64) -> Ending {
        self.exit_code = Some(code);
        self.detail("exitCode", &code.to_string())
    }

    fn says(mut self, says: &'static [&'static str]) -> Ending {
        self.says = says;
        self
    }

    fn detail(mut self, name: &'static str, value: &str) -> Ending {
        self.details.push((name, value.to_owned()));
        self
    }

    fn inject(mut self, inject: fn(&Ensemble, &str)) -> Ending {
        self.inject = Some(inject);
        self
    }
}

fn custom(command_line: &str) -> Value {
    json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command_line } })
}

/// What it has on top.
fn with(mut properties: Value, more: Value) -> Value {
    let all = properties.as_object_mut().unwrap();
    all.extend(more.as_object().unwrap().clone());
    properties
}

fn prepared_by(command_line: &str) -> Value {
    with(
        custom("echo must not run; touch $AZ_BATCHAI_JOB_TEMP/ran"),
        json!({ "jobPreparation": { "commandLine": command_line } }),
    )
}

fn interpreted_by(interpreter: &Path) -> Value {
    json!({
        "nodeCount": 1,
        "pyTorchSettings": { "pythonScriptFilePath": "/x.py", "pythonInterpreterPath": interpreter },
    })
}

/// The process of a job that runs for ever.
const SLEEP: &str = "exec sleep 600";

fn sleeping(e: &Ensemble) -> Pid {
    let pid = until("the process to run", || {
        let all = processes_of(e.path());
        all.into_iter()
            .find(|(_, line)| line.starts_with("sleep 600"))
    });
    Pid::from_raw(pid.0)
}

/// The shim that holds what runs: the helper that copies its logs looks alike, and is its child.
fn shim(e: &Ensemble) -> Pid {
    sleeping(e);
    let all = processes_of(e.path());
    let shims = all
        .iter()
        .filter(|(_, line)| line.starts_with("batchai-shim"));
    let shims: Vec<_> = shims.map(|(pid, _)| *pid).collect();
    let parent = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let (_, rest) = stat.rsplit_once(')')?;
        rest.split_whitespace().nth(1)?.parse().ok()
    };
    let first = shims
        .iter()
        .find(|pid| parent(**pid).is_none_or(|parent: i32| !shims.contains(&parent)));
    Pid::from_raw(*first.unwrap())
}

fn verb(e: &Ensemble, verb: &str, name: &str) {
    let mut args = vec!["job", verb, "-y", "-n", name];
    args.extend(IN);
    e.ok(&args);
}

/// Two processes of one node: the second fails, and the first does as soon as that one is gone.
const ONE_AFTER_THE_OTHER: &str = "
if [ $RANK = 1 ]; then echo $$ > $AZ_BATCHAI_JOB_TEMP/new; mv $AZ_BATCHAI_JOB_TEMP/new $AZ_BATCHAI_JOB_TEMP/pid; sleep 1; echo first >&2; exit 3; fi
until [ -e $AZ_BATCHAI_JOB_TEMP/pid ]; do sleep 0.05; done
while kill -0 $(cat $AZ_BATCHAI_JOB_TEMP/pid) 2>/dev/null; do sleep 0.01; done
trap '' TERM; echo second >&2; exit 4";

/// The agent stands still meanwhile, and then tells of both at once.
fn one_report_of_both(e: &Ensemble, name: &str) {
    let pid = e.path().join(format!("nodes/a1/jobs/w/e/{name}/pid"));
    until("the second to run", || pid.exists().then_some(()));
    e.agents["a1"].signal(Signal::SIGSTOP);
    until("both to end", || {
        let all = processes_of(e.path());
        let left = all.iter().any(|(_, line)| line.contains("echo second"));
        (!left).then_some(())
    });
    e.agents["a1"].signal(Signal::SIGCONT);
}

/// The ways in which processes of the job end.
fn of_processes(e: &Ensemble) -> Vec<Ending> {
    let plain = e.path().join("plain");
    std::fs::write(&plain, "not a program").unwrap();
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    let missing = e.path().join("missing");
    let lines: Vec<_> = (81..=100).map(|i| i.to_string()).collect();
    vec![
        Ending::new("code", custom("seq 100 >&2; exit 7"), "JobFailed")
            .exit(7)
            .says(&["Job failed with non-zero exit code: rank 0 on nodes/", "ended with exit code 7"])
            .detail("rank", "0")
            .detail("stderr", &lines.join("\n")),
        Ending::new("segv", custom("kill -SEGV $$"), "JobFailed")
            .exit(139)
            .says(&["was ended by SIGSEGV"])
            .detail("signal", "SIGSEGV"),
        Ending::new("shell-segv", custom("bash -c 'kill -SEGV $$'; exit $?"), "JobFailed")
            .exit(139)
            .says(&["ended with exit code 139", "a shell whose command SIGSEGV"])
            .detail("signal", "SIGSEGV"),
        Ending::new("killed", custom(SLEEP), "JobFailed")
            .inject(|e, _| kill(sleeping(e), Signal::SIGKILL).unwrap())
            .exit(137)
            .says(&["was ended by SIGKILL"])
            .detail("signal", "SIGKILL"),
        Ending::new("shell-missing", custom("/no/such/program"), "JobFailed")
            .exit(127)
            .says(&["no such command"])
            .detail("stderr", "/bin/bash: line 1: /no/such/program: No such file or directory"),
        Ending::new("missing", interpreted_by(&missing), "JobFailed")
            .exit(127)
            .says(&["cannot start", "No such file"])
            .detail("program", &missing.to_string_lossy())
            .detail("rank", "0"),
        Ending::new("shell-plain", custom(&plain.to_string_lossy()), "JobFailed")
            .exit(126)
            .says(&["not executable"]),
        Ending::new("plain", interpreted_by(&plain), "JobFailed")
            .exit(126)
            .says(&["cannot start", "Permission denied"])
            .detail("program", &plain.to_string_lossy()),
        Ending::new(
            "two",
            json!({
                "nodeCount": 1,
                "customToolkitSettings": { "commandLine": ONE_AFTER_THE_OTHER, "processesPerNode": 2 },
            }),
            "JobFailed",
        )
        .inject(one_report_of_both)
        .exit(3)
        .says(&["rank 1 on nodes/"])
        .detail("rank", "1")
        .detail("stderr", "first"),
    ]
}

/// The ways in which a job ends before its own processes do, or by somebody's will.
fn of_the_rest(e: &Ensemble) -> Vec<Ending> {
    let file = e.path().join("file");
    std::fs::write(&file, "").unwrap();
    let below = file.join("below");
    let outputs = json!({ "outputDirectories": [{ "id": "M", "pathPrefix": below }] });
    let unknown =
        json!({ "environmentVariables": [{ "name": "A", "value": "$AZ_BATCHAI_OUTPUT_X" }] });
    let short = json!({ "constraints": { "maxWallClockTime": "PT1S", "maxRetries": 5 } });
    let retries = json!({ "constraints": { "maxRetries": 5 } });
    vec![
        Ending::new(
            "prep",
            prepared_by("echo why >&2; exit 5"),
            "JobPreparationFailed",
        )
        .exit(5)
        .says(&["the job preparation command ended with exit code 5"])
        .detail("stderr", "why"),
        Ending::new(
            "prep-segv",
            prepared_by("kill -SEGV $$"),
            "JobPreparationFailed",
        )
        .exit(139)
        .says(&["the job preparation command was ended by SIGSEGV"])
        .detail("signal", "SIGSEGV"),
        Ending::new(
            "slow",
            with(custom(SLEEP), short.clone()),
            "JobWallClockTimeExceeded",
        )
        .says(&["maxWallClockTime of 1 s"])
        .detail("seconds", "1"),
        Ending::new(
            "slow-prep",
            with(prepared_by(SLEEP), short),
            "JobWallClockTimeExceeded",
        ),
        Ending::new(
            "terminated",
            with(custom(SLEEP), retries.clone()),
            "JobTerminated",
        )
        .inject(|e, name| {
            sleeping(e);
            verb(e, "terminate", name);
        })
        .says(&["terminated by the user"]),
        Ending::new(
            "output",
            with(custom("true"), outputs),
            "JobDirectoryFailed",
        )
        .says(&["cannot make directory", "file/below", "Not a directory"])
        .detail("error", "Not a directory (os error 20)"),
        Ending::new(
            "logs",
            with(custom("true"), json!({ "stdOutErrPathPrefix": below })),
            "JobDirectoryFailed",
        )
        .says(&["cannot make directory", "stdouterr"]),
        Ending::new(
            "refused",
            with(with(custom("true"), unknown), retries),
            "JobStartRefused",
        )
        .says(&["$AZ_BATCHAI_OUTPUT_X", "no output directory has that id"]),
    ]
}

fn value_of<'a>(error: &'a Value, name: &str) -> Option<&'a str> {
    let details = error["details"].as_array()?;
    let found = details.iter().find(|detail| detail["name"] == name)?;
    found["value"].as_str()
}

fn check(e: &Ensemble, ending: &Ending) {
    let name = ending.name;
    e.submit(name, ending.properties.clone());
    if let Some(inject) = ending.inject {
        inject(e, name);
    }
    let job = e.until_job(name, "FAILED");
    assert_eq!(
        job.get("exitCode").and_then(Value::as_i64),
        ending.exit_code,
        "{name}: {job:#}"
    );
    let errors = job["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 1, "{name}: {job:#}");
    let error = &errors[0];
    assert_eq!(error["code"], ending.code, "{name}: {job:#}");
    let message = error["message"].as_str().unwrap();
    for part in ending.says {
        assert!(message.contains(part), "{name}: {part:?} in {message:?}");
    }
    for (detail, value) in &ending.details {
        assert_eq!(
            value_of(error, detail),
            Some(value.as_str()),
            "{name}: {detail} in {error:#}"
        );
    }
    // Everything but a user's word happened somewhere.
    let node = job["attempt"]["nodes"][0]["node"].as_str();
    let expected = node.filter(|_| ending.code != "JobTerminated");
    assert_eq!(value_of(error, "node"), expected, "{name}: {error:#}");
    assert!(
        !error.to_string().to_lowercase().contains("memory"),
        "{name}: {error:#}"
    );
    assert_eq!(job["attempt"]["number"], 1, "{name}: {job:#}");
}

#[test]
fn every_way_to_fail_has_its_code_exit_code_and_details() {
    let mut e = Ensemble::with_cluster(1);
    for ending in of_processes(&e).iter().chain(&of_the_rest(&e)) {
        check(&e, ending);
    }
    let ranks = e.job("segv")["attempt"]["nodes"][0]["ranks"].clone();
    assert_eq!(
        (&ranks[0]["exitCode"], &ranks[0]["signal"]),
        (&json!(139), &json!("SIGSEGV"))
    );
    assert!(
        e.log("prep", "execution.log")
            .contains("ended with exit code 5")
    );
    e.submit("deleted", custom(SLEEP));
    sleeping(&e);
    verb(&e, "delete", "deleted");
    assert!(e.job("deleted").is_null(), "it is gone");
    let left = processes_of(e.path());
    assert!(
        !left.iter().any(|(_, line)| line.starts_with("sleep")),
        "{left:?}"
    );
    e.assert_nothing_left();
}

#[test]
fn of_two_nodes_the_rank_that_fails_is_named_and_the_other_is_ended() {
    let e = Ensemble::with_cluster(2);
    let script = "import os, sys, time, signal
if os.environ['RANK'] == '0':
    time.sleep(600)
print('it was me', file=sys.stderr)
os.kill(os.getpid(), signal.SIGABRT)";
    let path = e.path().join("script.py");
    std::fs::write(&path, script).unwrap();
    let settings = json!({ "nodeCount": 2, "pyTorchSettings": { "pythonScriptFilePath": path } });
    e.submit("j", settings);
    let job = e.until_job("j", "FAILED");
    let error = &job["errors"][0];
    assert_eq!(
        (&error["code"], &job["exitCode"]),
        (&json!("JobFailed"), &json!(134)),
        "{job:#}"
    );
    let nodes = &job["attempt"]["nodes"];
    for (name, value) in [
        ("rank", json!("1")),
        ("node", nodes[1]["node"].clone()),
        ("signal", json!("SIGABRT")),
        ("stderr", json!("it was me")),
    ] {
        assert_eq!(value_of(error, name), value.as_str(), "{name}: {job:#}");
    }
    let ended = &nodes[0]["ranks"][0];
    assert_eq!(
        (&ended["exitCode"], &ended["signal"]),
        (&json!(143), &json!("SIGTERM")),
        "{job:#}"
    );
}

#[test]
fn what_the_node_is_to_blame_for_runs_again_three_times_and_says_why() {
    let e = Ensemble::with_cluster(1);
    let retries = json!({ "constraints": { "maxRetries": 9 } });
    for (name, signal, code) in [
        ("lost", Signal::SIGKILL, "NodeLost"),
        ("stopped", Signal::SIGTERM, "NodeStopped"),
    ] {
        e.submit(name, with(custom(SLEEP), retries.clone()));
        for attempt in 1..=4 {
            let job = until("the next attempt", || {
                let job = e.job(name);
                let runs = job["attempt"]["nodes"][0]["phase"] == "RUNNING";
                (runs && job["attempt"]["number"] == attempt).then_some(job)
            });
            if attempt > 1 {
                assert_eq!(job["infrastructureRetryCount"], attempt - 1, "{job:#}");
                assert_eq!(job["errors"][0]["code"], code, "{job:#}");
                assert_eq!(
                    value_of(&job["errors"][0], "node"),
                    Some("nodes/a1"),
                    "{job:#}"
                );
            }
            kill(shim(&e), signal).unwrap();
        }
        let job = e.until_job(name, "FAILED");
        assert_eq!(
            (&job["errors"][0]["code"], &job["attempt"]["number"]),
            (&json!(code), &json!(4)),
            "{job:#}"
        );
        let message = job["errors"][0]["message"].as_str().unwrap();
        assert!(message.contains("3 times before"), "{message}");
        assert_eq!(job.get("exitCode"), None, "{job:#}");
        assert!(job["retryCount"].as_i64().unwrap_or(0) == 0, "{job:#}");
    }
}

#[test]
fn who_reaches_no_coordinator_for_as_long_as_a_lease_lasts_says_so_and_runs_again() {
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = ["--lease", "20"].map(str::to_owned).to_vec();
    e.start_coordinator();
    e.start_agent("a1");
    e.until_alive(1);
    e.create_cluster(1);
    e.submit("j", custom(SLEEP));
    let first = sleeping(&e);
    // No leader is there that could take the node for lost, and the next one waits for longer than the lease.
    e.coordinator.take().unwrap().kill();
    until("the shim to end what runs", || {
        kill(first, None).is_err().then_some(())
    });
    e.start_coordinator();
    let job = until("the next attempt", || {
        let job = e.job("j");
        (job["attempt"]["number"] == 2).then_some(job)
    });
    let error = &job["errors"][0];
    assert_eq!(
        (&error["code"], &job["infrastructureRetryCount"]),
        (&json!("NodeLeaseExpired"), &json!(1)),
        "{job:#}"
    );
    assert_eq!(value_of(error, "node"), Some("nodes/a1"), "{job:#}");
}

#[test]
fn a_failed_run_is_tried_again_and_finds_what_it_left() {
    let e = Ensemble::with_cluster(2);
    let command = "echo attempt $AZ_BATCHAI_ATTEMPT $MINE of $(cat $AZ_BATCHAI_JOB_TEMP/prepared); ls $AZ_BATCHAI_JOB_TEMP/left 2>&1; \
                   cat $AZ_BATCHAI_OUTPUT_M/checkpoint; touch $AZ_BATCHAI_JOB_TEMP/left; \
                   echo step $AZ_BATCHAI_ATTEMPT >> $AZ_BATCHAI_OUTPUT_M/checkpoint; \
                   [ $AZ_BATCHAI_ATTEMPT = 3 ] || exit $AZ_BATCHAI_ATTEMPT";
    let more = json!({
        "constraints": { "maxRetries": 2 },
        "jobPreparation": { "commandLine": "echo $AZ_BATCHAI_ATTEMPT > $AZ_BATCHAI_JOB_TEMP/prepared" },
        "environmentVariables": [{ "name": "MINE", "value": "$AZ_BATCHAI_ATTEMPT" }],
        "outputDirectories": [{ "id": "M", "pathPrefix": e.path().join("out") }],
    });
    e.submit("j", with(custom(command), more.clone()));
    assert_eq!(e.wait("j"), 0, "{:#}", e.job("j"));
    let job = e.job("j");
    assert_eq!(
        (&job["attempt"]["number"], &job["retryCount"]),
        (&json!(3), &json!(2)),
        "{job:#}"
    );
    assert_eq!(job["constraints"]["maxRetries"], 2);
    assert!(
        job.get("errors").is_none_or(|errors| errors == &json!([])),
        "{job:#}"
    );
    let log = e.log("j", "stdout.txt");
    assert!(log.starts_with("attempt 3 3 of 3\n"), "{log}");
    assert!(
        log.contains("No such file") && log.ends_with("step 1\nstep 2\n"),
        "{log}"
    );
    // The copies of logs are those of the latest attempt.
    let segment = job["jobOutputDirectoryPathSegment"].as_str().unwrap();
    let copy = e
        .path()
        .join("out")
        .join(segment)
        .join("stdouterr/stdout.txt");
    assert_eq!(std::fs::read_to_string(copy).unwrap(), log);
    // One that fails too often says how it failed last, and it had another id each time.
    let mut ids = std::collections::BTreeSet::new();
    let always = with(
        custom("sleep 1; exit 9"),
        json!({ "constraints": { "maxRetries": 1 } }),
    );
    e.submit("k", always);
    let job = until("the job to end", || {
        let job = e.job("k");
        ids.extend(job["attempt"]["id"].as_str().map(str::to_owned));
        (job["state"] == "FAILED").then_some(job)
    });
    assert_eq!(
        (&job["exitCode"], &job["retryCount"]),
        (&json!(9), &json!(1)),
        "{job:#}"
    );
    assert_eq!((ids.len(), &job["attempt"]["number"]), (2, &json!(2)));
}
