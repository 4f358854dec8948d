//! Whatever is sent is answered or refused, and says the same in both of its forms.

use batchai::descriptors::to_json;
use batchai_proto::reflect::{descriptor, pool};
use batchai_proto::v1;
use batchai_tests::api::{Api, refusal};
use batchai_tests::arbitrary;
use batchai_tests::ensemble::Ensemble;
use batchai_tests::raw;
use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use prost::Message as _;
use prost_reflect::MethodDescriptor;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

/// The calls that answer once.
fn unary() -> Vec<MethodDescriptor> {
    let services = pool()
        .services()
        .filter(|s| s.package_name() == "batchai.v1");
    let methods = services.flat_map(|s| s.methods().collect::<Vec<_>>());
    methods
        .filter(|m| !m.is_server_streaming() && !m.is_client_streaming())
        .collect()
}

fn send(api: &Api, method: &MethodDescriptor, body: Vec<u8>) -> Result<Bytes, Status> {
    let call = raw::first(api.channel.clone(), method, Request::new(Bytes::from(body)));
    api.runtime.block_on(call)
}

fn run<T: std::fmt::Debug>(
    cases: u32,
    strategy: impl Strategy<Value = T>,
    test: impl Fn(T) -> Result<(), TestCaseError>,
) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config).run(&strategy, test).unwrap();
}

/// What an answer to nonsense may be. An answer that is no status of ours names itself a fault of ours.
fn assert_is_an_answer(
    method: &MethodDescriptor,
    answer: Result<Bytes, Status>,
) -> Result<(), TestCaseError> {
    let Err(status) = answer else {
        return Ok(());
    };
    let (code, _) = refusal(&status);
    let ours = [
        Code::InvalidArgument,
        Code::Unimplemented,
        Code::NotFound,
        Code::AlreadyExists,
        Code::FailedPrecondition,
        Code::Aborted,
    ];
    prop_assert!(ours.contains(&code), "{}: {status:?}", method.full_name());
    Ok(())
}

#[test]
fn any_request_is_answered_or_refused() {
    let api = Api::start(Ensemble::with_cluster(0));
    for method in unary() {
        let requests = arbitrary::message(method.input(), |_| false);
        run(25, requests, |request| {
            assert_is_an_answer(&method, send(&api, &method, request.0.encode_to_vec()))
        });
    }
    let method = unary()
        .into_iter()
        .find(|m| m.name() == "CreateJob")
        .unwrap();
    // A job that is nearly right comes further.
    let jobs = arbitrary::message(descriptor("Job"), |field| field.number() >= 30);
    run(200, jobs, |job| {
        let mut job: v1::Job = job.0.transcode_to().unwrap();
        job = v1::Job {
            name: String::new(),
            uid: String::new(),
            etag: String::new(),
            create_time: None,
            ..job
        };
        job.custom_toolkit_settings = batchai_tests::api::job().custom_toolkit_settings;
        let request = v1::CreateJobRequest {
            parent: batchai_tests::api::EXPERIMENT.into(),
            job_id: "j".into(),
            job: Some(job),
            validate_only: true,
            ..Default::default()
        };
        assert_is_an_answer(&method, send(&api, &method, request.encode_to_vec()))
    });
    assert_nothing_panicked(&api);
}

#[test]
fn any_bytes_are_answered_or_refused_and_nobody_falls() {
    let api = Api::start(Ensemble::with_cluster(0));
    for method in unary() {
        run(15, prop::collection::vec(any::<u8>(), 0..200), |body| {
            match send(&api, &method, body) {
                Err(status) if status.get_details_error_info().is_none() => {
                    // Only what is no message of the API at all has no reason of ours.
                    prop_assert_eq!(status.code(), Code::Internal, "{:?}", status);
                    prop_assert!(status.message().contains("decode"), "{:?}", status);
                    Ok(())
                }
                answer => assert_is_an_answer(&method, answer),
            }
        });
    }
    let alive = v1::ListNodesRequest::default();
    api.call(api.nodes().list_nodes(alive)).unwrap();
    assert_nothing_panicked(&api);
}

/// A handler that panics ends its own call only: the coordinator's log tells.
fn assert_nothing_panicked(api: &Api) {
    let log = api.e.coordinator.as_ref().unwrap().log_text();
    assert!(!log.contains("panicked"), "{log}");
}

/// What is a file's: all but what only the service sets, and references, which are texts here and there.
#[test]
fn a_job_file_and_the_message_it_stands_for_say_the_same() {
    let skip =
        |field: &prost_reflect::FieldDescriptor| batchai_proto::reflect::is_output_only(field);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.json");
    for name in ["Job", "Cluster", "FileServer"] {
        run(150, arbitrary::message(descriptor(name), skip), |message| {
            let json = serde_json::to_value(&message.0).unwrap();
            let file = serde_json::json!({ "$schema": "x", "properties": &json });
            std::fs::write(&path, file.to_string()).unwrap();
            let again = match name {
                "Job" => again::<v1::Job>(name, &path)?,
                "Cluster" => again::<v1::Cluster>(name, &path)?,
                _ => again::<v1::FileServer>(name, &path)?,
            };
            prop_assert_eq!(again, json);
            Ok(())
        });
    }
}

/// A file's message, in its standard form again.
fn again<M: prost::Message + Default>(
    name: &str,
    path: &std::path::Path,
) -> Result<serde_json::Value, TestCaseError> {
    let read: M =
        batchai::file::read(path, name).map_err(|error| TestCaseError::fail(error.to_string()))?;
    Ok(to_json(name, &read))
}
