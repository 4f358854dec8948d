//! What is sent along with jobs, and what they leave behind.

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::job_file::FileType;
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::stream_job_logs_response::End;
use batchai_proto::v1::upload_bundle_request::Part;
use batchai_tests::api::{Api, CLUSTER, job, refusal};
use batchai_tests::ensemble::Ensemble;
use batchai_tests::process::until;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};

const JOB: &str = "resourceGroups/g/workspaces/w/experiments/e/jobs/j";

fn list(api: &Api, directory: &str, path: &str) -> Result<Vec<v1::JobFile>, Status> {
    let (mut files, mut page_token) = (Vec::new(), String::new());
    loop {
        let list = v1::ListJobFilesRequest {
            name: JOB.into(),
            directory: directory.into(),
            path: path.into(),
            page_size: 2,
            page_token,
            ..Default::default()
        };
        let page = api.call(api.jobs().list_job_files(list))?;
        files.extend(page.files);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(files);
        }
    }
}

fn names(files: &[v1::JobFile]) -> Vec<&str> {
    files.iter().map(|file| file.name.as_str()).collect()
}

fn read(
    api: &Api,
    change: impl FnOnce(&mut v1::StreamJobLogsRequest),
) -> Result<(String, End), Status> {
    let mut request = v1::StreamJobLogsRequest {
        name: JOB.into(),
        ..Default::default()
    };
    change(&mut request);
    let mut stream = api.call(api.jobs().stream_job_logs(request))?;
    let (mut bytes, mut end) = (Vec::new(), End::Unspecified);
    while let Some(piece) = api.runtime.block_on(stream.message())? {
        assert_eq!(piece.node, "nodes/a1");
        bytes.extend_from_slice(&piece.data);
        end = piece.end();
    }
    Ok((String::from_utf8(bytes).unwrap(), end))
}

/// A job with two output directories below one prefix.
fn with_outputs(e: &Ensemble, command: &str) -> Value {
    let out = e.path().join("out").to_string_lossy().into_owned();
    json!({
        "nodeCount": 1,
        "customToolkitSettings": { "commandLine": command },
        "outputDirectories": [
            { "id": "MODEL", "pathPrefix": out, "pathSuffix": "Models" },
            { "id": "LABEL", "pathPrefix": out, "pathSuffix": "Labels" },
        ],
    })
}

#[test]
fn files_of_every_directory_are_listed_and_read() {
    let mut api = Api::start(Ensemble::with_cluster(1));
    let command = "cd $AZ_BATCHAI_OUTPUT_MODEL; mkdir -p checkpoints/deep; seq 1 100000 > big.txt; \
                   echo 0123456789 > checkpoints/model.bin; ln -s checkpoints/model.bin inside; \
                   ln -s /etc/passwd outside; ln -s ../../../../../.. up; echo printed; echo oops >&2";
    api.e.submit("j", with_outputs(&api.e, command));
    assert_eq!(api.e.wait("j"), 0);
    let logs = until("the logs to arrive", || {
        let logs = list(&api, "", "").unwrap();
        (logs.len() == 3 && logs.iter().any(|f| f.content_length == 8)).then_some(logs)
    });
    assert_eq!(names(&logs), ["execution.log", "stderr.txt", "stdout.txt"]);
    assert_eq!(
        (logs[2].content_length, logs[2].node.as_str()),
        (8, "nodes/a1")
    );
    let files = list(&api, "MODEL", "").unwrap();
    assert_eq!(
        names(&files),
        ["big.txt", "checkpoints", "inside"],
        "what leads out is not shown"
    );
    assert_eq!(
        (files[0].file_type(), files[0].content_length),
        (FileType::File, 588_895)
    );
    assert!(files[0].last_modified.unwrap().seconds > 1_600_000_000);
    assert_eq!(
        (files[1].file_type(), files[1].content_length),
        (FileType::Directory, 0)
    );
    assert_eq!(files[2].content_length, 11, "a link shows what it leads to");
    assert_eq!(
        names(&list(&api, "MODEL", "checkpoints").unwrap()),
        ["deep", "model.bin"]
    );
    assert!(list(&api, "LABEL", "").unwrap().is_empty());
    let file = |file: &str, offset, length| {
        read(&api, |request| {
            request.directory = "MODEL".into();
            request.file = file.into();
            (request.offset, request.length) = (offset, length);
        })
    };
    let (text, end) = file("big.txt", 0, 0).unwrap();
    assert_eq!((text.lines().count(), end), (100_000, End::Complete));
    assert_eq!(
        file("checkpoints/model.bin", 3, 4).unwrap(),
        ("3456".into(), End::NotFollowed)
    );
    assert_eq!(file("inside", 8, 0).unwrap().0, "89\n");
    for (name, code) in [
        ("outside", Code::FailedPrecondition),
        ("up/etc/passwd", Code::FailedPrecondition),
        ("checkpoints", Code::FailedPrecondition),
        ("../Labels", Code::InvalidArgument),
        ("/etc/passwd", Code::InvalidArgument),
        ("none", Code::NotFound),
    ] {
        assert_eq!(file(name, 0, 0).unwrap_err().code(), code, "{name}");
    }
    assert_eq!(list(&api, "NONE", "").unwrap_err().code(), Code::NotFound);
    assert_eq!(
        list(&api, "MODEL", "..").unwrap_err().code(),
        Code::InvalidArgument
    );
    let range = read(&api, |request| {
        request.file = "stdout.txt".into();
        (request.offset, request.length) = (2, 3);
    });
    assert_eq!(range.unwrap(), ("int".into(), End::NotFollowed));
    // A node that is not in contact cannot show what only it has; the logs are here.
    api.e.agents.remove("a1").unwrap().kill();
    let gone = until("the node to be out of contact", || {
        list(&api, "MODEL", "").err()
    });
    assert_eq!(gone.code(), Code::Unavailable);
    assert!(gone.message().contains("nodes/a1"), "{}", gone.message());
    assert_eq!(list(&api, "stdouterr", "").unwrap().len(), 3);
}

#[test]
fn a_file_in_an_output_directory_is_followed_to_the_end_of_the_job() {
    let api = Api::start(Ensemble::with_cluster(1));
    let go = api.e.path().join("go");
    let command = format!(
        "cd $AZ_BATCHAI_OUTPUT_MODEL; echo 1 > log.txt; until [ -e {} ]; do sleep 0.1; done; \
         for i in 2 3; do echo $i >> log.txt; sleep 1; done",
        go.display()
    );
    api.e.submit("j", with_outputs(&api.e, &command));
    let mut stream = open(&api, api.channel.clone(), "log.txt", true);
    let first = api.runtime.block_on(stream.message()).unwrap().unwrap();
    assert_eq!(&first.data[..], b"1\n");
    let job = api.e.job("j");
    assert_eq!(job["state"], "RUNNING", "it comes as it is written");
    std::fs::write(go, "").unwrap();
    let (mut text, mut end) = (Vec::new(), End::Unspecified);
    while let Some(piece) = api.runtime.block_on(stream.message()).unwrap() {
        text.extend_from_slice(&piece.data);
        end = piece.end();
    }
    assert_eq!((&text[..], end), (&b"2\n3\n"[..], End::Complete));
}

/// Begins to read a file of an output directory.
fn open(
    api: &Api,
    channel: Route,
    file: &str,
    follow: bool,
) -> tonic::Streaming<v1::StreamJobLogsResponse> {
    let request = v1::StreamJobLogsRequest {
        name: JOB.into(),
        directory: "MODEL".into(),
        file: file.into(),
        follow,
        ..Default::default()
    };
    let mut jobs = JobServiceClient::new(channel);
    api.call(jobs.stream_job_logs(request)).unwrap()
}

#[test]
fn readers_that_pause_hold_up_nobody_and_a_broken_answer_is_said() {
    let mut api = Api::start(Ensemble::with_cluster(1));
    let command = "cd $AZ_BATCHAI_OUTPUT_MODEL; truncate -s 64M big; echo small > small; sleep 600";
    api.e.submit("j", with_outputs(&api.e, command));
    until("the files", || {
        list(&api, "MODEL", "")
            .ok()
            .filter(|found| found.len() == 2)
    });
    // Each has its connection, so that only what is theirs can fill up.
    let mut paused = Vec::new();
    for _ in 0..12 {
        let mut stream = open(&api, api.connect(), "big", false);
        let first = api.runtime.block_on(stream.message());
        assert!(first.unwrap().is_some());
        paused.push(stream);
    }
    let read = |api: &Api, file: &str| {
        read(api, |request| {
            request.directory = "MODEL".into();
            request.file = file.into();
        })
    };
    assert_eq!(read(&api, "small").unwrap().0, "small\n");
    // What is missing of a file is not taken for its end.
    api.e.agents.remove("a1").unwrap().kill();
    let mut stream = paused.remove(0);
    let mut size = 0;
    let end = loop {
        match api.runtime.block_on(stream.message()) {
            Ok(piece) => size += piece.expect("an end is said").data.len(),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Unavailable, "{}", end.message());
    assert!((1..64 << 20).contains(&size), "{size}");
    // The way back to the others: the agent adopts what runs, and shows it again.
    api.e.start_agent("a1");
    until("the agent to answer again", || read(&api, "small").ok());
}

#[test]
fn a_bundle_that_was_damaged_is_replaced() {
    let api = Api::start(Ensemble::with_cluster(1));
    let (name, bytes) = pack("hello.sh", "echo hello");
    let send = || upload(&api, &name, bytes.len() as i64, &bytes).unwrap();
    send();
    let kept = format!("{}.tar.gz", name.strip_prefix("bundles/").unwrap());
    let kept = api.e.path().join("coordinator/bundles").join(kept);
    let mut damaged = std::fs::read(&kept).unwrap();
    damaged[30] ^= 1;
    std::fs::write(&kept, damaged).unwrap();
    let job = || v1::Job {
        bundle: name.clone(),
        node_count: 1,
        cluster: CLUSTER.into(),
        std_out_err_path_prefix: api.e.path().join("out").to_string_lossy().into_owned(),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: "bash hello.sh".into(),
            processes_per_node: 1,
        }),
        ..job()
    };
    api.create_job("first", job()).unwrap();
    assert_eq!(api.e.wait("first"), 255, "{}", api.e.job("first"));
    assert_eq!(api.e.job("first")["errors"][0]["code"], "JobBundleFailed");
    assert!(!kept.exists(), "it is offered to nobody else");
    send();
    api.create_job("second", job()).unwrap();
    assert_eq!(api.e.wait("second"), 0, "{}", api.e.job("second"));
}

/// A bundle of one file.
fn pack(name: &str, content: &str) -> (String, Vec<u8>) {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(content.len() as u64);
    header.set_cksum();
    builder
        .append_data(&mut header, name, content.as_bytes())
        .unwrap();
    let bytes = builder.into_inner().unwrap().finish().unwrap();
    let digest: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    (format!("bundles/{digest}"), bytes)
}

fn upload(api: &Api, name: &str, size: i64, bytes: &[u8]) -> Result<v1::Bundle, Status> {
    let header = v1::BundleHeader {
        name: name.to_owned(),
        size_bytes: size,
    };
    let mut parts = vec![Part::Header(header)];
    let pieces = bytes
        .chunks(40)
        .map(|piece| Part::Data(bytes::Bytes::copy_from_slice(piece)));
    parts.extend(pieces);
    let parts: Vec<_> = parts
        .into_iter()
        .map(|part| v1::UploadBundleRequest { part: Some(part) })
        .collect();
    let call = async {
        let mut client = v1::bundle_service_client::BundleServiceClient::new(api.channel.clone());
        let mut replies = client
            .upload_bundle(tokio_stream::iter(parts))
            .await?
            .into_inner();
        let reply = replies.message().await?;
        Ok(reply.and_then(|reply| reply.bundle).expect("the bundle"))
    };
    api.runtime.block_on(call)
}

#[test]
fn a_bundle_is_where_the_job_begins() {
    let api = Api::start(Ensemble::with_cluster(2));
    let (name, bytes) = pack("lib/hello.sh", "echo hello from $RANK");
    let size = bytes.len() as i64;
    // What is not what it says is refused, and a job that names what is not there as well.
    for (size, sent) in [
        (size - 1, &bytes[..]),
        (size + 1, &bytes[..]),
        (size, &bytes[1..]),
    ] {
        assert_eq!(
            upload(&api, &name, size, sent).unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    let mut other = bytes.clone();
    other[20] ^= 1;
    assert_eq!(
        upload(&api, &name, size, &other).unwrap_err().code(),
        Code::InvalidArgument
    );
    for (name, size) in [
        ("bundles/x", 1),
        (name.as_str(), 0),
        (name.as_str(), 1 << 40),
    ] {
        assert_eq!(
            upload(&api, name, size, b"x").unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    let with = |bundle: &str| v1::Job {
        bundle: bundle.into(),
        node_count: 2,
        cluster: CLUSTER.into(),
        std_out_err_path_prefix: api.e.path().join("out").to_string_lossy().into_owned(),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: "bash lib/hello.sh; rm -r lib".into(),
            processes_per_node: 1,
        }),
        job_preparation: Some(v1::JobPreparation {
            command_line: "test -x lib/hello.sh".into(),
        }),
        ..job()
    };
    assert_eq!(
        api.create_job("j", with(&name)).unwrap_err().code(),
        Code::NotFound
    );
    let bad = api.create_job("j", with("bundles/x")).unwrap_err();
    assert_eq!(
        refusal(&bad),
        (Code::InvalidArgument, vec!["job.bundle".to_owned()])
    );
    let bundle = upload(&api, &name, size, &bytes).unwrap();
    assert_eq!(
        (bundle.name.as_str(), bundle.size_bytes),
        (name.as_str(), size)
    );
    assert!(bundle.use_time.is_some());
    assert_eq!(
        upload(&api, &name, size, b"").unwrap().name,
        name,
        "it is there already"
    );
    let get = v1::GetBundleRequest { name: name.clone() };
    let mut client = v1::bundle_service_client::BundleServiceClient::new(api.channel.clone());
    assert_eq!(api.call(client.get_bundle(get)).unwrap().size_bytes, size);
    let created = api.create_job("j", with(&name)).unwrap();
    assert_eq!(created.bundle, name);
    assert_eq!(api.e.wait("j"), 0, "{}", api.e.job("j"));
    for rank in ["0", "1"] {
        let log = api.e.log("j", &format!("stdout-{rank}.txt"));
        assert_eq!(log, format!("hello from {rank}\n"));
    }
    // The next job of the same bundle finds it whole again.
    api.create_job("again", with(&name)).unwrap();
    assert_eq!(api.e.wait("again"), 0);
    // One that a node cannot unpack says so.
    let (bad, bytes) = pack("shared", "x");
    upload(&api, &bad, bytes.len() as i64, &bytes).unwrap();
    api.create_job("refused", with(&bad)).unwrap();
    assert_eq!(api.e.wait("refused"), 255);
    let error = &api.e.job("refused")["errors"][0];
    assert_eq!(error["code"], "JobBundleFailed");
    assert!(
        error["message"].as_str().unwrap().contains("shared"),
        "{error}"
    );
}
