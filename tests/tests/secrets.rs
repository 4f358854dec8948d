//! Secrets go in, reach the job, and are found nowhere else.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use batchai_proto::reflect::{descriptor, is_input_only, pool};
use batchai_proto::v1;
use batchai_tests::api::{Api, EXPERIMENT, GROUP, WORKSPACE, job};
use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::{processes_of, until};
use batchai_tests::raw;
use bytes::Bytes;
use prost::Message as _;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, Value};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::{Code, Request};

/// Nothing else looks like it, in any alphabet that something may be written in.
const MARK: &str = "Xk7mark9secretQz";

/// The mark as it is, and as it is in base64 at each of three places.
fn traces() -> Vec<Vec<u8>> {
    use base64::Engine as _;
    let mut traces = vec![MARK.as_bytes().to_vec()];
    for before in ["", "a", "ab"] {
        let text = base64::prelude::BASE64_STANDARD.encode(format!("{before}{MARK}"));
        // Letters at its ends depend on what stands beside it.
        traces.push(text.as_bytes()[4..text.len() - 4].to_vec());
    }
    traces
}

fn shows(bytes: &[u8]) -> bool {
    traces()
        .iter()
        .any(|trace| bytes.windows(trace.len()).any(|part| part == trace))
}

/// The files below a directory that show the mark.
fn files_that_show(dir: &Path, found: &mut Vec<String>) -> usize {
    let mut read = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            read += files_that_show(&path, found);
        } else if let Ok(bytes) = fs::read(&path) {
            read += 1;
            if shows(&bytes) {
                found.push(path.display().to_string());
            }
        }
    }
    read
}

/// Asserts that nothing that an ensemble wrote, and no command line, shows the mark.
fn assert_hidden(e: &Ensemble) {
    let mut found = Vec::new();
    let read = files_that_show(e.path(), &mut found);
    assert!(read > 10, "{read} files are not all of them");
    assert!(found.is_empty(), "{found:?}");
    let command_lines = processes_of(e.path());
    assert!(!command_lines.is_empty());
    for (pid, line) in command_lines {
        assert!(!shows(line.as_bytes()), "{pid}: {line}");
    }
}

/// A message with the mark in every text that only goes in, wherever it stands, and enough beside it to be looked at.
fn marked(of: MessageDescriptor) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        let value = match field.kind() {
            Kind::String if is_input_only(&field) => Value::String(MARK.to_owned()),
            Kind::String if field.name() == "name" => Value::String("A".to_owned()),
            Kind::Message(inner) if !inner.full_name().starts_with("google.") => {
                Value::Message(marked(inner))
            }
            _ => continue,
        };
        match (field.is_map(), field.is_list()) {
            (true, _) => {}
            (false, true) => message.set_field(&field, Value::List(vec![value])),
            (false, false) => message.set_field(&field, value),
        }
    }
    message
}

/// Sends a request with a mark wherever one can be to every call that creates something; returns what came back.
fn send_marks_everywhere(api: &Api) -> Vec<String> {
    let services = pool()
        .services()
        .filter(|s| s.package_name() == "batchai.v1");
    let methods = services.flat_map(|service| service.methods().collect::<Vec<_>>());
    let creating = methods.filter(|m| m.name().contains("Create") && !m.is_client_streaming());
    let mut answers = Vec::new();
    for method in creating {
        let body = marked(method.input()).encode_to_vec();
        if !shows(&body) {
            continue;
        }
        let call = raw::first(
            api.channel.clone(),
            &method,
            Request::new(Bytes::from(body)),
        );
        let call = async { tokio::time::timeout(Duration::from_secs(3), call).await };
        answers.push(format!(
            "{}: {:?}",
            method.full_name(),
            api.runtime.block_on(call)
        ));
    }
    // Jobs, lists of them, clusters, file servers and tokens.
    assert_eq!(answers.len(), 5);
    answers
}

fn secret(name: &str, value: &str) -> v1::EnvironmentVariableWithSecretValue {
    v1::EnvironmentVariableWithSecretValue {
        name: name.into(),
        value: value.into(),
        ..Default::default()
    }
}

#[test]
fn a_marked_secret_reaches_the_job_and_is_found_nowhere_else() {
    let mut e = Ensemble::without_daemons();
    // The state is written down beside the log all the time, also while the secret is in use.
    e.coordinator_args = ["--snapshot-entries", "3"].map(str::to_owned).into();
    e.start_coordinator();
    for (name, alive) in [("a1", 1), ("a2", 2)] {
        e.start_agent(name);
        e.until_alive(alive);
    }
    e.create_cluster(2);
    e.start_agent("a3");
    e.until_alive(3);
    let api = Api::start(e);
    let set_up = v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "set-up".into(),
        cluster: Some(v1::Cluster {
            vm_size: batchai_tests::ensemble::SIZE.into(),
            scale_settings: Some(v1::ScaleSettings {
                manual: Some(v1::ManualScaleSettings {
                    target_node_count: 1,
                    ..Default::default()
                }),
                auto_scale: None,
            }),
            node_setup: Some(v1::NodeSetup {
                setup_task: Some(v1::SetupTask {
                    command_line: "printf %s \"$TOKEN\" | sha256sum; sleep 1".into(),
                    secrets: vec![secret("TOKEN", MARK)],
                    std_out_err_path_prefix: api.e.path().join("set-up").display().to_string(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let set_up = api.call(api.clusters().create_cluster(set_up)).unwrap();
    assert!(!shows(&set_up.encode_to_vec()));
    let suffix = set_up
        .node_setup
        .unwrap()
        .setup_task
        .unwrap()
        .std_out_err_path_suffix;
    let answers = send_marks_everywhere(&api);
    for answer in &answers {
        assert!(!shows(answer.as_bytes()), "{answer}");
    }

    // It holds its nodes until it is told, so that everything can be looked at while the secret is in use.
    let go = api.e.path().join("go");
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", go.display());
    let digest = format!("echo $(printf %s \"$TOKEN\" | sha256sum) {}", "$0");
    let spec = v1::Job {
        node_count: 2,
        secrets: vec![secret("TOKEN", MARK)],
        std_out_err_path_prefix: api.e.path().join("out").display().to_string(),
        job_preparation: Some(v1::JobPreparation {
            command_line: digest.clone(),
        }),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: format!("{digest}; {wait}"),
            processes_per_node: 1,
        }),
        ..job()
    };
    let created = api.create_job("open", spec.clone()).unwrap();
    assert_eq!(created.secrets[0].name, "TOKEN");
    assert_eq!(created.secrets[0].value, "");
    let batch = v1::BatchCreateJobsRequest {
        parent: EXPERIMENT.into(),
        requests: vec![v1::CreateJobRequest {
            job_id: "second".into(),
            job: Some(spec),
            ..Default::default()
        }],
        request_id: uuid::Uuid::new_v4().to_string(),
        ..Default::default()
    };
    let batch = api.call(api.jobs().batch_create_jobs(batch)).unwrap();
    assert!(!shows(&batch.encode_to_vec()));

    let expected = batchai_common::names::hex(&Sha256::digest(MARK));
    let mut stream = vec!["job", "file", "stream", "-j", "open", "-f", "stdout-1.txt"];
    stream.extend(IN);
    until("the job to have printed", || {
        let job = api.e.job("open");
        (job["state"] == "RUNNING" && job["attempt"]["nodes"][0]["phase"] == "RUNNING")
            .then_some(())
    });
    let snapshots = api.e.path().join("coordinator/replica/snapshots");
    until("a snapshot with the job in it", || {
        let mut files = fs::read_dir(&snapshots).ok()?.flatten();
        files.find_map(|file| {
            let bytes = fs::read(file.path()).ok()?;
            bytes.windows(5).any(|part| part == b"TOKEN").then_some(())
        })
    });
    assert_hidden(&api.e);
    for node in ["a1", "a2"] {
        let name = format!("stdout-job_prep-{node}.txt");
        fs::write(&go, "").unwrap();
        assert!(api.e.log("open", &name).starts_with(&expected), "{node}");
    }
    assert_eq!(api.e.wait("open"), 0);
    assert!(api.e.ok(&stream).starts_with(&expected));
    assert_eq!(api.e.wait("second"), 0);

    let printed = api
        .e
        .path()
        .join("set-up")
        .join(suffix)
        .join("stdout-a3.txt");
    assert!(fs::read_to_string(printed).unwrap().starts_with(&expected));

    for args in [
        vec!["job", "list"],
        vec!["job", "show", "-n", "open"],
        vec!["audit", "tail", "-n", "1000"],
    ] {
        let mut all = args.clone();
        if args[0] == "job" {
            all.extend(IN);
        }
        let text = api.e.ok(&all);
        assert!(!shows(text.as_bytes()), "{args:?}");
    }
    let get = v1::GetJobRequest {
        name: format!("{EXPERIMENT}/jobs/open"),
    };
    let ended = api.call(api.jobs().get_job(get)).unwrap();
    assert_eq!(ended.secrets, created.secrets);
    assert_hidden(&api.e);
}

#[test]
fn secrets_are_typed_by_their_names_and_survive_restarts_and_other_keys() {
    let mut e = Ensemble::with_cluster(1);
    let command = |e: &Ensemble, name: &str, words: &[&str]| {
        let mut args = vec!["run", "-c", "c", "--no-dir", "-n", name];
        args.extend(IN);
        args.extend(words);
        args.extend(["--", "sh", "-c", "printf %s \"$TOKEN$PLAIN\" | sha256sum"]);
        let mut command = e.command(&args);
        command.env("TOKEN", MARK);
        command.output().unwrap()
    };
    let digest = |text: &str| batchai_common::names::hex(&Sha256::digest(text));
    let is = |output: &std::process::Output, text: &str| {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(printed.starts_with(&digest(text)), "{printed}{said}");
    };
    is(&command(&e, "one", &["--secret", "TOKEN"]), MARK);
    let plain = ["--secret", "TOKEN", "--env", "PLAIN=x"];
    is(&command(&e, "two", &plain), &format!("{MARK}x"));
    let missing = command(&e, "none", &["--secret", "NO_SUCH_VARIABLE"]);
    assert_eq!(missing.status.code(), Some(2));

    // A job that waits while everything about its key changes.
    let data = e.path().join("coordinator");
    let keyring = data.join("secrets.key");
    let resize = |e: &Ensemble, count: &str| {
        e.ok(&[
            "cluster", "resize", "-g", "g", "-w", "w", "-n", "c", "-t", count,
        ]);
    };
    resize(&e, "0");
    let printf = "printf %s \"$TOKEN\" | sha256sum";
    e.submit(
        "waits",
        json!({
            "nodeCount": 1,
            "secrets": [{"name": "TOKEN", "value": MARK}],
            "customToolkitSettings": {"commandLine": printf}
        }),
    );
    e.ok(&["workspace", "rotate-key", "-g", "g", "-n", "w"]);
    let first = fs::read_to_string(&keyring).unwrap();
    e.ok(&[
        "coordinator",
        "rotate-key",
        "--data",
        &data.to_string_lossy(),
    ]);
    let both = fs::read_to_string(&keyring).unwrap();
    assert!(both.ends_with(&first) && both.lines().count() == 2);
    // When its log says that everything is wrapped by the new one, the old one is not needed.
    until("all to be wrapped by the new key", || {
        let log = e.coordinator.as_ref()?.log_text();
        let (_, behind) = log.split_once("another keyring")?;
        behind.contains("all data keys are wrapped").then_some(())
    });
    e.coordinator.as_mut().unwrap().kill();
    fs::write(&keyring, both.lines().next().unwrap()).unwrap();
    e.start_coordinator();
    resize(&e, "1");
    assert_eq!(e.wait("waits"), 0);
    assert!(e.log("waits", "stdout.txt").starts_with(&digest(MARK)));

    // Without its key a secret stays closed, and the job waits and says why; with it the job runs.
    resize(&e, "0");
    e.submit(
        "closed",
        json!({
            "nodeCount": 1,
            "secrets": [{"name": "TOKEN", "value": MARK}],
            "customToolkitSettings": {"commandLine": printf}
        }),
    );
    e.coordinator.as_mut().unwrap().kill();
    let kept = fs::read_to_string(&keyring).unwrap();
    fs::remove_file(&keyring).unwrap();
    let refused = e.run(&[
        "coordinator",
        "--listen",
        "127.0.0.1:0",
        "--data",
        &data.to_string_lossy(),
    ]);
    assert!(
        !refused.status.success() && !keyring.exists(),
        "a lost keyring is not made anew"
    );
    e.ok(&[
        "coordinator",
        "rotate-key",
        "--data",
        &data.to_string_lossy(),
    ]);
    e.start_coordinator();
    resize(&e, "1");
    until("the job to say why it waits", || {
        let job = e.job("closed");
        let why = job["pendingReason"]
            .as_str()?
            .contains("keyring lacks the key");
        (job["state"] == "QUEUED" && why).then_some(())
    });
    let both = format!("{}{kept}", fs::read_to_string(&keyring).unwrap());
    batchai_common::tls::credentials::write_private(&keyring, &both).unwrap();
    assert_eq!(e.wait("closed"), 0);
    assert!(e.log("closed", "stdout.txt").starts_with(&digest(MARK)));
    // The user's own files.
    for name in ["waits", "closed"] {
        fs::remove_file(e.path().join(format!("{name}.json"))).unwrap();
    }
    assert_hidden(&e);
}

#[test]
fn keys_come_from_where_one_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let start = |args: &[&str], key: Option<&str>| {
        let mut command = Command::new(batchai_tests::process::under_test());
        command
            .args([
                "coordinator",
                "--listen",
                "127.0.0.1:0",
                "--insecure-lab",
                "--data",
            ])
            .arg(dir.path())
            .args(args)
            .env_remove("KEYS")
            .envs(key.map(|key| ("KEYS", key)));
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for (args, key, why) in [
        (["--secrets-key", "env:KEYS"], None, "KEYS is not set"),
        (
            ["--secrets-key", "env:KEYS"],
            Some("secret!"),
            "line 1 is no key",
        ),
        (["--secrets-key", "command:exit 3"], None, "exit status: 3"),
        (
            ["--secrets-key", "vault:x"],
            None,
            "file:PATH, env:NAME or command:COMMAND",
        ),
        (
            ["--secrets-key", "file:/nowhere/at/all"],
            None,
            "/nowhere/at/all",
        ),
    ] {
        let said = start(&args, key);
        assert!(said.contains(why), "{args:?}: {said}");
        assert!(!said.contains("secret!"), "{said}");
    }
}

#[test]
fn an_open_secret_is_bounded_and_a_vault_elsewhere_is_refused_by_name() {
    let api = Api::start(Ensemble::with_cluster(0));
    let with = |secrets: Vec<v1::EnvironmentVariableWithSecretValue>| v1::Job { secrets, ..job() };
    let refused = |job: v1::Job| {
        let status = api.create_job("j", job).unwrap_err();
        batchai_tests::api::refusal(&status)
    };
    let large = refused(with(vec![secret("A", &"x".repeat((32 << 10) + 1))]));
    assert_eq!(
        large,
        (
            Code::InvalidArgument,
            vec!["job.secrets[0].value".to_owned()]
        )
    );
    assert_eq!(
        refused(with(vec![secret("A", "")])).0,
        Code::InvalidArgument
    );
    let twice = refused(with(vec![secret("A", "x"), secret("A", "y")]));
    assert_eq!(twice.1, ["job.secrets[1].name"]);
    let many = (0..101).map(|i| secret(&format!("A{i}"), "x")).collect();
    assert_eq!(refused(with(many)).1, ["job.secrets"]);
    let reference = v1::EnvironmentVariableWithSecretValue {
        name: "A".into(),
        value: String::new(),
        value_secret_reference: Some(v1::KeyVaultSecretReference {
            source_vault: "/vaults/v".into(),
            secret_url: "https://v/secrets/s".into(),
        }),
    };
    let elsewhere = refused(with(vec![reference]));
    let field = "job.secrets[0].value_secret_reference".to_owned();
    assert_eq!(elsewhere, (Code::Unimplemented, vec![field]));

    // What is only tried, and what lies nowhere, makes no key.
    let tried = v1::CreateJobRequest {
        parent: EXPERIMENT.into(),
        job_id: "j".into(),
        job: Some(with(vec![secret("A", "x")])),
        validate_only: true,
        ..Default::default()
    };
    let tried = api.call(api.jobs().create_job(tried)).unwrap();
    assert_eq!(tried.secrets[0].value, "");
    let nowhere = v1::CreateJobRequest {
        parent: format!("{GROUP}/workspaces/none/experiments/e"),
        job_id: "j".into(),
        job: Some(with(vec![secret("A", "x")])),
        ..Default::default()
    };
    let nowhere = api.call(api.jobs().create_job(nowhere)).unwrap_err();
    assert_eq!(nowhere.code(), Code::NotFound);
    let none = v1::RotateWorkspaceKeyRequest {
        name: format!("{WORKSPACE}-none"),
    };
    let none = api.call(api.workspaces().rotate_workspace_key(none));
    assert_eq!(none.unwrap_err().code(), Code::NotFound);
    assert!(descriptor("Job").get_field_by_name("secrets").is_some());
}
