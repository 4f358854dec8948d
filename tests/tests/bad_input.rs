//! What a newcomer or a broken client sends: refused whole, with every fault named, and nothing else disturbed.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::node_service_client::NodeServiceClient;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::process::Process;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

const EXPERIMENT: &str = "resourceGroups/g/workspaces/w/experiments/e";

struct Api {
    e: Ensemble,
    runtime: tokio::runtime::Runtime,
    channel: Route,
}

impl Api {
    fn start(e: Ensemble) -> Api {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let channel = batchai_tests::api::connect(&runtime, &e);
        Api {
            e,
            runtime,
            channel,
        }
    }

    fn create_job(&self, id: &str, job: v1::Job) -> Result<v1::Job, Status> {
        let request = v1::CreateJobRequest {
            parent: EXPERIMENT.into(),
            job_id: id.into(),
            job: Some(job),
            request_id: String::new(),
            validate_only: false,
        };
        let mut client = JobServiceClient::new(self.channel.clone());
        let reply = self.runtime.block_on(client.create_job(request));
        reply.map(tonic::Response::into_inner)
    }

    fn refused(&self, job: v1::Job) -> (Code, Vec<String>) {
        let status = self.create_job("j", job).unwrap_err();
        let details = status.get_error_details();
        let info = details.error_info().expect("exactly one ErrorInfo");
        assert_eq!(info.domain, "batchai");
        let fields = details.bad_request().unwrap().field_violations.iter();
        (
            status.code(),
            fields.map(|violation| violation.field.clone()).collect(),
        )
    }
}

fn job() -> v1::Job {
    v1::Job {
        cluster: "resourceGroups/g/workspaces/w/clusters/c".into(),
        node_count: 1,
        std_out_err_path_prefix: "/tmp/never-written".into(),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: "true".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
fn bad_jobs_are_refused_with_every_fault_and_nothing_is_stored() {
    let api = Api::start(Ensemble::with_cluster(0));
    let invalid = Code::InvalidArgument;
    let none = v1::Job {
        custom_toolkit_settings: None,
        ..job()
    };
    assert_eq!(api.refused(none), (invalid, vec!["job".to_owned()]));
    let two = v1::Job {
        py_torch_settings: Some(v1::PyTorchSettings {
            python_script_file_path: "a.py".into(),
            ..Default::default()
        }),
        ..job()
    };
    assert_eq!(api.refused(two), (invalid, vec!["job".to_owned()]));
    let negative = v1::Job {
        node_count: -1,
        cluster: "nonsense".into(),
        ..job()
    };
    let fields = vec!["job.cluster".to_owned(), "job.node_count".to_owned()];
    assert_eq!(api.refused(negative), (invalid, fields));
    let not_served = v1::Job {
        container_settings: Some(v1::ContainerSettings {
            image_source_registry: Some(v1::ImageSourceRegistry {
                image: "ubuntu".into(),
                credentials: Some(v1::PrivateRegistryCredentials {
                    username: "reader".into(),
                    password_secret_reference: Some(v1::KeyVaultSecretReference {
                        source_vault: "v".into(),
                        secret_url: "https://v/s".into(),
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..job()
    };
    let field =
        "job.container_settings.image_source_registry.credentials.password_secret_reference";
    assert_eq!(
        api.refused(not_served),
        (Code::Unimplemented, vec![field.to_owned()])
    );

    for (id, code) in [
        ("", invalid),
        ("a/b", invalid),
        ("..", invalid),
        ("ä", invalid),
    ] {
        assert_eq!(
            api.create_job(id, job()).unwrap_err().code(),
            code,
            "{id:?}"
        );
    }
    let nowhere = v1::Job {
        cluster: "resourceGroups/g/workspaces/w/clusters/no".into(),
        ..job()
    };
    let status = api.create_job("j", nowhere).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(
        status.message().contains("clusters/no"),
        "{}",
        status.message()
    );
    let mut list = vec!["job", "list"];
    list.extend(IN);
    assert_eq!(api.e.json(&list), json!([]));

    // A field of 5 MiB is more than a message may have.
    let text = "x".repeat(5 << 20);
    let huge = v1::Job {
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: text,
            ..Default::default()
        }),
        ..job()
    };
    let status = api.create_job("j", huge).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let said = status.message();
    assert!(said.contains("more than 4194304 bytes"), "{said}");
    assert!(api.create_job("j", job()).is_ok(), "the server goes on");
    assert_eq!(
        api.create_job("j", job()).unwrap_err().code(),
        Code::AlreadyExists
    );
}

#[test]
fn unknown_names_bad_names_stale_etags_and_bad_pages() {
    let api = Api::start(Ensemble::with_cluster(0));
    let mut groups = ResourceGroupServiceClient::new(api.channel.clone());
    let mut nodes = NodeServiceClient::new(api.channel.clone());
    let get = |name: &str| v1::GetResourceGroupRequest { name: name.into() };
    for (name, code) in [
        ("resourceGroups/none", Code::NotFound),
        ("none", Code::InvalidArgument),
        ("", Code::InvalidArgument),
        ("resourceGroups/..", Code::InvalidArgument),
    ] {
        let status = api
            .runtime
            .block_on(groups.get_resource_group(get(name)))
            .unwrap_err();
        assert_eq!(status.code(), code, "{name:?}: {}", status.message());
    }
    let delete = v1::DeleteResourceGroupRequest {
        name: "resourceGroups/g".into(),
        etag: "\"999\"".into(),
        force: false,
    };
    let status = api
        .runtime
        .block_on(groups.delete_resource_group(delete))
        .unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    let delete = v1::DeleteResourceGroupRequest {
        name: "resourceGroups/g".into(),
        ..Default::default()
    };
    let status = api
        .runtime
        .block_on(groups.delete_resource_group(delete))
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("workspaces/w"),
        "{}",
        status.message()
    );
    for (page_size, page_token) in [(-1, ""), (0, "nonsense")] {
        let list = v1::ListNodesRequest {
            page_size,
            page_token: page_token.into(),
            filter: String::new(),
        };
        let status = api.runtime.block_on(nodes.list_nodes(list)).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
}

#[test]
fn the_command_says_what_was_typed_wrong() {
    let e = Ensemble::with_cluster(0);
    let fails = |args: &[&str]| e.fails(args);
    let (code, message) = fails(&["workspace", "show", "-g", "g", "-n", "none"]);
    assert_eq!(
        (code, message.contains("workspaces/none does not exist")),
        (3, true),
        "{message}"
    );
    let (code, message) = fails(&["workspace", "create", "-g", "g", "-n", "a b"]);
    assert_eq!((code, message.contains("\"a b\"")), (1, true), "{message}");
    let (code, _) = fails(&["workspace", "create", "-g", "g"]);
    assert_eq!(code, 2);
    let (code, message) = fails(&["group", "delete", "-n", "g"]);
    assert_eq!((code, message.contains("--yes")), (2, true), "{message}");
    let cluster = [
        "cluster", "create", "-g", "g", "-w", "w", "-n", "x", "-s", "s", "-t", "-4",
    ];
    let (code, message) = fails(&cluster);
    assert_eq!(
        (code, message.contains("target_node_count")),
        (1, true),
        "{message}"
    );
    let (code, message) = fails(&["--endpoint", "http://127.0.0.1:1", "group", "list"]);
    assert_eq!(
        (code, message.contains("batchai dev")),
        (1, true),
        "{message}"
    );
    let (code, _) = fails(&["--endpoint", "ftp://x", "group", "list"]);
    assert_eq!(code, 2);

    let file = e.path().join("bad.json");
    let path = file.to_string_lossy().into_owned();
    let mut create = vec!["job", "create", "-n", "j", "-c", "c", "-f", &path];
    create.extend(IN);
    let (code, message) = fails(&create);
    assert_eq!((code, message.contains("bad.json")), (1, true), "{message}");
    for (content, expected) in [
        ("{", "not JSON"),
        ("{}", "\"properties\" is missing"),
        (
            r#"{"properties": {"nodeCont": 1}}"#,
            "did you mean \"nodeCount\"?",
        ),
        (r#"{"properties": {"nodeCount": "many"}}"#, "nodeCount"),
        (
            r#"{"properties": {"nodeCount": -2, "customToolkitSettings": {"commandLine": "x"}}}"#,
            "job.node_count",
        ),
        (r#"{"properties": {"vmPriority": 1}}"#, "vmPriority"),
    ] {
        std::fs::write(&file, content).unwrap();
        let (code, message) = fails(&create);
        assert_eq!(
            (code, message.contains(expected)),
            (1, true),
            "{content}: {message}"
        );
    }
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let e = Ensemble::start(0);
    let address = e.endpoint.trim_start_matches("https://").to_owned();
    let mut garbage = vec![b"\0\xff\x13 not http at all\r\n\r\n".to_vec()];
    garbage.push(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec());
    garbage.push(
        (0..200_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect(),
    );
    let mut preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    preface.extend([0xff; 64]);
    garbage.push(preface);
    for bytes in garbage {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        // It may be closed in the middle of the garbage.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        let _ = stream.take(1 << 16).read_to_end(&mut answer);
        e.ok(&["group", "list"]);
    }
    // Connections that say nothing at all.
    let silent: Vec<_> = (0..200)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    e.ok(&["group", "list"]);
    drop(silent);
}

#[test]
fn a_data_directory_has_one_daemon_and_a_name_one_agent() {
    let mut e = Ensemble::start(1);
    let log = e.path().join("second.log");
    let data = e.path().join("coordinator").to_string_lossy().into_owned();
    let second = ["coordinator", "--listen", "127.0.0.1:0", "--data", &data];
    let mut process = Process::start(second, &log);
    assert_eq!(process.wait().code(), Some(1));
    assert!(
        process
            .log_text()
            .contains("another coordinator uses this data directory")
    );

    let data = e.path().join("agents/a1").to_string_lossy().into_owned();
    let root = e.path().join("other-root").to_string_lossy().into_owned();
    let second = [
        "node-agent",
        "--coordinator",
        &e.endpoint,
        "--name",
        "a9",
        "--data",
        &data,
        "--root",
        &root,
    ];
    let mut process = Process::start(second, &log);
    assert_eq!(process.wait().code(), Some(1));
    assert!(
        process
            .log_text()
            .contains("another agent uses this data directory")
    );

    let data = e.path().join("agents/other").to_string_lossy().into_owned();
    let second = [
        "node-agent",
        "--coordinator",
        &e.endpoint,
        "--name",
        "a1",
        "--data",
        &data,
        "--root",
        &root,
    ];
    let mut process = Process::start_with(second, &e.join_token(), &log);
    assert_eq!(process.wait().code(), Some(1));
    batchai_tests::process::until("the second agent to be refused", || {
        process
            .log_text()
            .contains("another machine is that node")
            .then_some(())
    });
    drop(process);
    e.assert_nothing_left();
}

#[test]
fn a_coordinator_is_open_to_everybody_only_when_told() {
    let e = Ensemble::without_daemons();
    let log = e.path().join("wide.log");
    let data = e.path().join("wide").to_string_lossy().into_owned();
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--data", &data];
    let mut process = Process::start(args, &log);
    assert_eq!(process.wait().code(), Some(1));
    let said = process.log_text();
    assert!(said.contains("batchai coordinator init --data"), "{said}");
    assert!(!e.path().join("wide").exists(), "nothing was made");
    let mut process = Process::start(args.into_iter().chain(["--insecure-lab"]), &log);
    let address = process.line("ready ");
    let said = process.log_text();
    assert!(said.contains("everybody is an administrator"), "{said}");
    let endpoint = format!("http://{address}");
    e.ok(&["group", "create", "-n", "g", "--endpoint", &endpoint]);
}

#[test]
fn a_request_with_an_id_is_carried_out_once() {
    let mut api = Api::start(Ensemble::with_cluster(0));
    let id = "5e1ec7ed-0000-4000-8000-000000000001";
    let create = |request_id: &str, job_id: &str| v1::CreateJobRequest {
        parent: EXPERIMENT.into(),
        job_id: job_id.into(),
        job: Some(job()),
        request_id: request_id.into(),
        validate_only: false,
    };
    let send = |api: &Api, request| {
        let mut client = JobServiceClient::new(api.channel.clone());
        api.runtime
            .block_on(client.create_job(request))
            .map(tonic::Response::into_inner)
    };
    let first = send(&api, create(id, "j")).unwrap();
    // The coordinator dies before the client has heard: nobody knows what became of it.
    api.e.coordinator.as_mut().unwrap().kill();
    api.e.start_coordinator();
    api.channel = batchai_tests::api::connect(&api.runtime, &api.e);
    assert_eq!(send(&api, create(id, "j")).unwrap().uid, first.uid);
    assert_eq!(
        send(&api, create("", "j")).unwrap_err().code(),
        Code::AlreadyExists
    );
    let status = send(&api, create(id, "other")).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains(id), "{}", status.message());
    let status = send(&api, create("not-a-uuid", "other")).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[test]
fn a_batch_is_created_whole_and_what_is_only_validated_is_not_stored() {
    let api = Api::start(Ensemble::with_cluster(0));
    let one = |id: String, job: v1::Job| v1::CreateJobRequest {
        job_id: id,
        job: Some(job),
        ..Default::default()
    };
    let batch = |requests, validate_only| v1::BatchCreateJobsRequest {
        parent: EXPERIMENT.into(),
        requests,
        validate_only,
        ..Default::default()
    };
    let send = |request| {
        let mut client = JobServiceClient::new(api.channel.clone());
        api.runtime
            .block_on(client.batch_create_jobs(request))
            .map(tonic::Response::into_inner)
    };
    let count = || {
        let mut list = vec!["job", "list"];
        list.extend(IN);
        api.e.json(&list).as_array().unwrap().len()
    };
    let thousand = || {
        (0..1000)
            .map(|i| one(format!("j{i}"), job()))
            .collect::<Vec<_>>()
    };
    let mut bad = thousand();
    bad[7].job.as_mut().unwrap().node_count = -1;
    bad[999].job_id = "a b".into();
    let status = send(batch(bad, false)).unwrap_err();
    let details = status.get_error_details();
    let fields: Vec<_> = details
        .bad_request()
        .unwrap()
        .field_violations
        .iter()
        .map(|v| v.field.as_str())
        .collect();
    assert_eq!(
        fields,
        ["requests[7].job.node_count", "requests[999].job_id"]
    );
    assert_eq!(
        send(batch(Vec::new(), false)).unwrap_err().code(),
        Code::InvalidArgument
    );
    let tried = send(batch(thousand(), true)).unwrap();
    assert_eq!((tried.jobs.len(), count()), (1000, 0));
    let created = send(batch(thousand(), false)).unwrap();
    assert_eq!(created.jobs[999].name, format!("{EXPERIMENT}/jobs/j999"));
    assert_eq!(count(), 1000);
    assert_eq!(
        send(batch(vec![one("j5".into(), job())], true))
            .unwrap_err()
            .code(),
        Code::AlreadyExists
    );
}
