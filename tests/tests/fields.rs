//! The ledger of fields: none of them is accepted and ignored.
//!
//! `fields.toml` says of every field of every resource that it works, and which test shows it; or that it is recorded, and
//! then the resource's warnings name it; or that it is refused, by name. Here the ledger is compared with the descriptors,
//! and every field that is recorded or refused is sent to a real coordinator.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use batchai_proto::reflect::{descriptor, dynamic, is_output_only, pool};
use batchai_proto::v1;
use batchai_tests::api::{Api, CLUSTER, WORKSPACE, job, refusal};
use batchai_tests::ensemble::Ensemble;
use prost::Message as _;
use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage as _, Value,
};
use tonic::Code;

const REFUSED: &str = "refused";
const RECORDED: &str = "recorded";

type Ledger = BTreeMap<String, BTreeMap<String, String>>;

fn ledger() -> Ledger {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fields.toml");
    toml::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Every path of a message, down to where the ledger says that all below is refused or recorded.
fn paths(
    message: &MessageDescriptor,
    above: &str,
    entries: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut found = Vec::new();
    for field in message.fields() {
        let path = format!("{above}{}", field.name());
        let whole = matches!(
            entries.get(&path).map(String::as_str),
            Some(REFUSED | RECORDED)
        );
        if let Some(inner) = inner(&field).filter(|_| !whole) {
            found.extend(paths(&inner, &format!("{path}."), entries));
        }
        found.push(path);
    }
    found
}

/// The message that a field has fields of, where it is one of ours.
fn inner(field: &FieldDescriptor) -> Option<MessageDescriptor> {
    let Kind::Message(inner) = field.kind() else {
        return None;
    };
    (!field.is_map() && inner.package_name() == "batchai.v1").then_some(inner)
}

#[test]
fn the_ledger_has_every_field_and_no_other() {
    let ledger = ledger();
    let resources: BTreeSet<_> = ledger.keys().cloned().collect();
    assert_eq!(resources, self::resources());
    let tests = tests();
    let mut unnamed = Vec::new();
    for (resource, entries) in &ledger {
        let paths: BTreeSet<_> = paths(&descriptor(resource), "", entries)
            .into_iter()
            .collect();
        let known: BTreeSet<_> = entries.keys().cloned().collect();
        let missing: Vec<_> = paths.difference(&known).collect();
        let surplus: Vec<_> = known.difference(&paths).collect();
        assert!(
            missing.is_empty(),
            "{resource}: not in fields.toml: {missing:?}"
        );
        assert!(
            surplus.is_empty(),
            "{resource}: not in the API: {surplus:?}"
        );
        for (path, entry) in entries {
            if [REFUSED, RECORDED].contains(&entry.as_str()) {
                continue;
            }
            let body = tests.get(entry);
            let body = body.unwrap_or_else(|| panic!("{resource}.{path}: no test {entry}"));
            let field = path.rsplit('.').next().unwrap();
            let body = body.to_lowercase();
            if !body.contains(field) && !body.contains(&camel(field).to_lowercase()) {
                unnamed.push(format!("{resource}.{path}: {entry}"));
            }
        }
    }
    assert!(
        unnamed.is_empty(),
        "tests that do not even name the field: {unnamed:#?}"
    );
}

/// Everything that calls return, alone or in lists.
fn resources() -> BTreeSet<String> {
    let services = pool()
        .services()
        .filter(|s| s.package_name() == "batchai.v1");
    let methods = services.flat_map(|s| s.methods().collect::<Vec<_>>());
    let outputs = methods.map(|method| method.output());
    outputs
        .filter(|output| output.package_name() == "batchai.v1")
        .flat_map(|output| match output.name().ends_with("Response") {
            false => vec![output],
            true => output.fields().filter_map(|field| inner(&field)).collect(),
        })
        .map(|message| message.name().to_owned())
        .collect()
}

fn camel(snake: &str) -> String {
    let mut parts = snake.split('_');
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |text, part| {
        text + &part[..1].to_uppercase() + &part[1..]
    })
}

/// All tests of the workspace and what is in them, helpers of their file that they call included.
fn tests() -> BTreeMap<String, String> {
    fn collect(dir: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                collect(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let functions = functions(&text);
                for (name, (is_test, body)) in &functions {
                    if *is_test {
                        let called = functions.iter().filter(|(other, (is_test, _))| {
                            !is_test && body.contains(&format!("{other}("))
                        });
                        let helpers: String = called.map(|(_, (_, body))| body.as_str()).collect();
                        found.insert(name.clone(), format!("{body}{helpers}"));
                    }
                }
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = BTreeMap::new();
    for dir in [
        "proto",
        "common",
        "coordinator",
        "node-agent",
        "cli",
        "tests",
    ] {
        collect(&root.join(dir), &mut found);
    }
    assert!(found.len() > 100);
    found
}

/// The functions of a file: whether each is a test that runs, and its text.
fn functions(text: &str) -> BTreeMap<String, (bool, String)> {
    let mut functions = BTreeMap::new();
    let (mut is_test, mut current) = (false, String::new());
    for line in text.lines() {
        let code = line.trim();
        let named = code
            .split("fn ")
            .nth(1)
            .filter(|_| code.ends_with(['{', '(', ',']));
        if let Some(rest) = named.filter(|_| line.find("fn ").is_some_and(|at| at < 24)) {
            current = rest.split(['(', '<']).next().unwrap().to_owned();
            functions.insert(current.clone(), (is_test, String::new()));
        }
        if let Some((_, body)) = functions.get_mut(&current) {
            body.push_str(line);
            body.push('\n');
        }
        is_test = code.starts_with("#[test]")
            || code.starts_with("#[tokio::test")
            || (is_test && code.starts_with(['#', '/']) && !code.contains("ignore"));
    }
    functions
}

/// A value that a check lets pass.
fn sample(field: &FieldDescriptor) -> Value {
    let one = match field.kind() {
        // Every volume has a place of its own, every variable a name.
        Kind::String if ["relative_mount_path", "name"].contains(&field.name()) => {
            Value::String(field.parent_message().name().to_owned())
        }
        Kind::String => Value::String(text(field.name()).to_owned()),
        Kind::Bool => Value::Bool(true),
        Kind::Int32 => Value::I32(1),
        Kind::Int64 => Value::I64(1),
        // The last one: the first means that nothing was said.
        Kind::Enum(values) => Value::EnumNumber(values.values().last().unwrap().number()),
        Kind::Message(message) => Value::Message(message_sample(&message)),
        other => panic!("{other:?}"),
    };
    match field.is_list() {
        true => Value::List(vec![one]),
        false => one,
    }
}

fn text(name: &str) -> &'static str {
    match name {
        "file_mode" | "directory_mode" => "0777",
        "file_server" => "resourceGroups/g/workspaces/w/fileServers/f",
        "std_out_err_path_prefix" => "/out",
        "server_url" => "docker.io",
        "public_ips_to_allow" => "10.0.0.0/24",
        _ => "x",
    }
}

/// All of its fields, but for those that exclude others and those that only the service sets.
fn message_sample(message: &MessageDescriptor) -> DynamicMessage {
    let mut sample_of = DynamicMessage::new(message.clone());
    for field in message.fields() {
        let excluded = field.name().ends_with("_secret_reference")
            || ["config_file_path", "language_type"].contains(&field.name());
        if !excluded && !is_output_only(&field) {
            sample_of.set_field(&field, sample(&field));
        }
    }
    sample_of
}

const VOLUME: [(&str, &str); 4] = [
    ("account_name", "acc"),
    ("azure_file_url", "https://acc.file.core.windows.net/data"),
    ("container_name", "data"),
    ("relative_mount_path", "m"),
];

/// Sets a path, and everything that what lies on the way needs.
fn set(message: &mut DynamicMessage, path: &str) {
    let (first, rest) = path
        .split_once('.')
        .map_or((path, None), |(a, b)| (a, Some(b)));
    let descriptor = prost_reflect::ReflectMessage::descriptor(message);
    let field = descriptor.get_field_by_name(first).unwrap();
    match rest {
        None => {
            // A reference stands in the place of a value.
            if let Some(value) = first.strip_suffix("_secret_reference") {
                message.clear_field_by_name(value);
            }
            message.set_field(&field, sample(&field));
        }
        Some(rest) => {
            let mut inner = match message.get_field(&field).into_owned() {
                Value::Message(inner) if message.has_field(&field) => inner,
                _ if ["image_reference", "setup_task", "image_source_registry"]
                    .contains(&first) =>
                {
                    message_sample(&inner(&field).unwrap())
                }
                _ => DynamicMessage::new(inner(&field).unwrap()),
            };
            // Whatever is the matter with the elements of a list, each has a name.
            if let (true, Some(name)) = (
                field.is_list(),
                inner.descriptor().get_field_by_name("name"),
            ) {
                inner.set_field(&name, sample(&name));
            }
            // So has a volume what names it.
            for (name, text) in VOLUME {
                if let Some(known) = inner.descriptor().get_field_by_name(name)
                    && field.is_list()
                {
                    inner.set_field(&known, Value::String(text.to_owned()));
                }
            }
            set(&mut inner, rest);
            let inner = Value::Message(inner);
            message.set_field(
                &field,
                if field.is_list() {
                    Value::List(vec![inner])
                } else {
                    inner
                },
            );
        }
    }
}

fn cluster() -> v1::Cluster {
    v1::Cluster {
        vm_size: "x".into(),
        ..Default::default()
    }
}

/// Sends a cluster in which a path is set.
fn send_cluster(api: &Api, path: &str, validate_only: bool) -> Result<v1::Cluster, tonic::Status> {
    let mut given = dynamic("Cluster", &cluster());
    set(&mut given, path);
    let request = v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "new".into(),
        cluster: Some(given.transcode_to().unwrap()),
        validate_only,
        ..Default::default()
    };
    api.call(api.clusters().create_cluster(request))
}

fn send_job(api: &Api, path: &str) -> Result<v1::Job, tonic::Status> {
    let mut base = v1::Job {
        cluster: CLUSTER.into(),
        ..job()
    };
    let first = path.split('.').next().unwrap();
    if first.ends_with("_settings") && first != "container_settings" {
        base.custom_toolkit_settings = None;
    }
    let mut given = dynamic("Job", &base);
    set(&mut given, path);
    let request = v1::CreateJobRequest {
        parent: batchai_tests::api::EXPERIMENT.into(),
        job_id: "new".into(),
        job: Some(given.transcode_to().unwrap()),
        ..Default::default()
    };
    api.call(api.jobs().create_job(request))
}

fn assert_refused(status: &tonic::Status, field: &str) {
    let (code, fields) = refusal(status);
    let fields: Vec<_> = fields
        .iter()
        .map(|field| field.replace("[0]", ""))
        .collect();
    assert_eq!(code, Code::Unimplemented, "{field}: {}", status.message());
    // The field itself, or one that it lies in or holds: never just the resource.
    let below = |whole: &str, part: &str| {
        part == whole
            || part
                .strip_prefix(whole)
                .is_some_and(|rest| rest.starts_with('.'))
    };
    let named = |named: &String| {
        // A long name is cut short.
        let cut = named
            .strip_suffix('…')
            .is_some_and(|begin| field.starts_with(begin));
        named.contains('.') && (cut || below(named, field) || below(field, named))
    };
    assert!(fields.iter().any(named), "{field}: {fields:?}");
}

#[test]
fn what_is_recorded_is_warned_of_and_what_is_refused_is_refused_by_name() {
    let api = Api::start(Ensemble::with_cluster(0));
    let ledger = ledger();
    let (mut refused, mut recorded) = (0, 0);
    for (path, entry) in &ledger["Cluster"] {
        match entry.as_str() {
            REFUSED => {
                let status = send_cluster(&api, path, false).expect_err(path);
                assert_refused(&status, &format!("cluster.{path}"));
                refused += 1;
            }
            RECORDED => {
                let cluster = send_cluster(&api, path, true).unwrap();
                let named = cluster
                    .warnings
                    .iter()
                    .any(|warning| &warning.field == path);
                assert!(named, "{path}: {:?}", cluster.warnings);
                recorded += 1;
            }
            _ => {}
        }
    }
    for (path, entry) in &ledger["Job"] {
        assert_ne!(entry, RECORDED, "of jobs nothing is recorded only: {path}");
        if entry == REFUSED {
            let status = send_job(&api, path).expect_err(path);
            assert_refused(&status, &format!("job.{path}"));
            refused += 1;
        }
    }
    let name = format!("{WORKSPACE}/clusters/new");
    let stored = api.call(api.clusters().get_cluster(v1::GetClusterRequest { name }));
    assert_eq!(
        stored.unwrap_err().code(),
        Code::NotFound,
        "what is refused is not stored"
    );
    let name = format!("{}/jobs/new", batchai_tests::api::EXPERIMENT);
    let stored = api.call(api.jobs().get_job(v1::GetJobRequest { name }));
    assert_eq!(
        stored.unwrap_err().code(),
        Code::NotFound,
        "what is refused is not stored"
    );
    assert!(refused >= 3 && recorded >= 5, "{refused} {recorded}");
    // Of file servers nothing is refused.
    let whole = message_sample(&descriptor("FileServer"));
    let create = v1::CreateFileServerRequest {
        parent: WORKSPACE.into(),
        file_server_id: "f".into(),
        file_server: Some(v1::FileServer {
            node: String::new(),
            ..v1::FileServer::decode(&*whole.encode_to_vec()).unwrap()
        }),
        validate_only: true,
        ..Default::default()
    };
    let server = api.call(api.file_servers().create_file_server(create));
    let warnings = server.unwrap().warnings;
    for (path, entry) in &ledger["FileServer"] {
        assert_ne!(entry, REFUSED, "{path}");
        let named = warnings.iter().any(|warning| &warning.field == path);
        assert_eq!(named, entry == RECORDED, "{path}: {warnings:?}");
    }
    for resource in [
        "ResourceGroup",
        "Workspace",
        "Experiment",
        "Node",
        "VmSizeAlias",
        "StorageAlias",
    ] {
        let all = ledger[resource].values();
        assert!(
            all.into_iter()
                .all(|entry| entry != REFUSED && entry != RECORDED)
        );
    }
}
