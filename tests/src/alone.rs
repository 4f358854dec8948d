//! A coordinator that is alone, on a data directory wherever that lies, and what it acknowledged. It may refuse to start, end by
//! itself or hang: each is an answer here, in bounded time. It has no agents.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::api::connector;
use crate::process::{PATIENCE, Process, under_test};

/// Writes that are on their way together.
const TOGETHER: usize = 6;
/// A short wait for its own election, and many snapshots.
pub const QUICK: [&str; 6] = [
    "--election-timeout",
    "100",
    "--snapshot-entries",
    "60",
    "--calls-per-second",
    "1000000",
];
/// How long a call may take: more than a coordinator gives it.
const CALL_MAX: Duration = Duration::from_secs(60);
/// What carries the value of a resource group.
const VALUE: &str = "value";

/// The value of every resource group, by its id.
pub type Groups = BTreeMap<String, String>;

/// What became of a coordinator that was started.
pub enum Began {
    /// It serves.
    Ready(Alone),
    /// It ended, with this code and these words; none where a signal ended it.
    Ended(Option<i32>, String),
    /// It did neither.
    Hung(String),
}

/// A coordinator that serves. Dropping it kills it.
pub struct Alone {
    pub process: Process,
    endpoint: String,
    credentials: std::path::PathBuf,
}

/// Makes certificates in a data directory.
pub fn init(data: &Path) {
    let mut command = Command::new(under_test());
    let made = command
        .args(["coordinator", "init", "--data"])
        .arg(data)
        .output();
    let made = made.expect("the command under test can be started");
    assert!(made.status.success(), "{made:?}");
}

/// Starts a coordinator on a data directory, with more arguments, and waits until it is known what became of it.
pub fn begin(data: &Path, log: &Path, more: &[&str]) -> Began {
    let path = data.to_string_lossy();
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--data", &path];
    let mut process = Process::start(args.iter().chain(more), log);
    let stdout = process.child.stdout.take().expect("it is piped");
    let (lines, said) = channel();
    // It ends with the process, whose output it reads to its end.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = lines.send(line);
        }
    });
    let end = Instant::now() + PATIENCE;
    loop {
        match said.recv_timeout(end - Instant::now().min(end)) {
            Ok(line) => {
                if let Some(address) = line.strip_prefix("ready ") {
                    return Began::Ready(Alone {
                        process,
                        endpoint: format!("https://{address}"),
                        credentials: data.join("admin.pem"),
                    });
                }
            }
            Err(RecvTimeoutError::Timeout) => return Began::Hung(process.log_text()),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    match ended(&mut process, end) {
        Some(code) => Began::Ended(code, process.log_text()),
        None => Began::Hung(process.log_text()),
    }
}

/// The code of a process that ends before a moment.
pub fn ended(process: &mut Process, before: Instant) -> Option<Option<i32>> {
    loop {
        let status = process.child.try_wait().expect("it is our child");
        if let Some(status) = status {
            return Some(status.code());
        }
        if Instant::now() >= before {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the last words of a coordinator are its own, and name a path.
pub fn names(said: &str, path: &Path) -> bool {
    let own = |line: &&str| line.starts_with("batchai-coordinator: ");
    let last = said.lines().rfind(own);
    last.is_some_and(|line| line.contains(&*path.to_string_lossy()))
}

impl Began {
    /// It serves.
    ///
    /// # Panics
    /// It does not.
    pub fn ready(self) -> Alone {
        match self {
            Began::Ready(alone) => alone,
            Began::Ended(code, said) => panic!("it ended with {code:?}: {said}"),
            Began::Hung(said) => panic!("it hangs: {said}"),
        }
    }

    /// It refuses, in words of its own that name a path; returns all that it said.
    ///
    /// # Errors
    /// Says what it did instead.
    pub fn refused(self, path: &Path) -> Result<String, String> {
        match self {
            Began::Ended(Some(1), said) if names(&said, path) => Ok(said),
            Began::Ended(code, said) => Err(format!("it ended with {code:?}, and said: {said}")),
            Began::Hung(said) => Err(format!("it hangs: {said}")),
            Began::Ready(alone) => Err(format!("it starts: {}", alone.process.log_text())),
        }
    }
}

impl Alone {
    /// A connection, as the administrator.
    pub async fn route(&self) -> Result<Route, String> {
        let connector = connector(&self.endpoint, &self.credentials);
        within(connector.connect()).await
    }

    /// Everything that it has.
    ///
    /// # Errors
    /// It does not answer, or not well.
    pub fn groups(&self, runtime: &Runtime) -> Result<Groups, String> {
        runtime.block_on(async {
            let route = self.route().await?;
            let mut client = ResourceGroupServiceClient::new(route);
            let (mut found, mut page_token) = (Groups::new(), String::new());
            loop {
                let request = v1::ListResourceGroupsRequest {
                    page_size: 1000,
                    page_token,
                    ..Default::default()
                };
                let page = within(client.list_resource_groups(request))
                    .await?
                    .into_inner();
                for group in page.resource_groups {
                    let id = group.name.trim_start_matches("resourceGroups/").to_owned();
                    let value = group.tags.get(VALUE).cloned().unwrap_or_default();
                    found.insert(id, value);
                }
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    return Ok(found);
                }
            }
        })
    }
}

fn group(id: &str, value: &str, filler: usize) -> v1::ResourceGroup {
    let mut tags = BTreeMap::from([(VALUE.to_owned(), value.to_owned())]);
    tags.extend((0..filler).map(|i| (format!("filler{i}"), "x".repeat(250))));
    v1::ResourceGroup {
        name: format!("resourceGroups/{id}"),
        tags,
        ..Default::default()
    }
}

/// Creates a resource group with a value, and some more tags that make it large: at most 60, of 250 bytes each.
///
/// # Errors
/// It was not acknowledged.
pub async fn create(route: &Route, id: &str, value: &str, filler: usize) -> Result<(), String> {
    let request = v1::CreateResourceGroupRequest {
        resource_group_id: id.to_owned(),
        resource_group: Some(v1::ResourceGroup {
            name: String::new(),
            ..group(id, value, filler)
        }),
        ..Default::default()
    };
    let mut client = ResourceGroupServiceClient::new(route.clone());
    within(client.create_resource_group(request))
        .await
        .map(|_| ())
}

/// Gives a resource group another value.
///
/// # Errors
/// It was not acknowledged.
pub async fn update(route: &Route, id: &str, value: &str) -> Result<(), String> {
    let request = v1::UpdateResourceGroupRequest {
        resource_group: Some(group(id, value, 0)),
        ..Default::default()
    };
    let mut client = ResourceGroupServiceClient::new(route.clone());
    within(client.update_resource_group(request))
        .await
        .map(|_| ())
}

/// Deletes a resource group.
///
/// # Errors
/// It was not acknowledged.
pub async fn delete(route: &Route, id: &str) -> Result<(), String> {
    let request = v1::DeleteResourceGroupRequest {
        name: format!("resourceGroups/{id}"),
        ..Default::default()
    };
    let mut client = ResourceGroupServiceClient::new(route.clone());
    within(client.delete_resource_group(request))
        .await
        .map(|_| ())
}

async fn within<T, E: Debug>(call: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(CALL_MAX, call).await {
        Ok(answer) => answer.map_err(|error| format!("{error:?}")),
        Err(_) => Err(format!("no answer in {CALL_MAX:?}")),
    }
}

/// A runtime for a test that waits for one call after the other, and for the tasks beside it.
pub fn runtime() -> Runtime {
    let built = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    built.expect("a runtime")
}

/// A directory that goes with the test.
pub fn directory() -> TempDir {
    tempfile::Builder::new()
        .prefix("batchai-test-")
        .tempdir()
        .expect("a directory")
}

/// Creates some resource groups, several at a time, and notes them.
pub fn fill(runtime: &Runtime, alone: &Alone, ids: &[String], acknowledged: &mut Groups) {
    runtime.block_on(async {
        let route = alone.route().await.expect("it serves");
        for (part, ids) in ids.chunks(TOGETHER).enumerate() {
            let mut running = JoinSet::new();
            for (i, id) in ids.iter().cloned().enumerate() {
                let (route, value) = (route.clone(), format!("{part}/{i}"));
                // Some fill most of a chunk of the log.
                let filler = if i == 0 { 55 } else { 0 };
                running.spawn(async move {
                    let created = create(&route, &id, &value, filler).await;
                    created.expect("it takes writes");
                    (id, value)
                });
            }
            acknowledged.extend(running.join_all().await);
        }
    });
}

/// So many ids.
pub fn ids(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{prefix}{i}")).collect()
}

/// Whether what is found is exactly what was acknowledged.
///
/// # Errors
/// Says what is not the same.
pub fn same(expected: &Groups, found: &Groups) -> Result<(), String> {
    if expected == found {
        return Ok(());
    }
    let of = |all: &Groups, id: &String| all.get(id).cloned();
    let all: BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let differ = all
        .into_iter()
        .filter(|id| of(expected, id) != of(found, id))
        .map(|id| format!("{id} {:?} instead of {:?}", of(found, id), of(expected, id)));
    Err(format!(
        "not what was acknowledged: {:?}",
        differ.collect::<Vec<_>>()
    ))
}
