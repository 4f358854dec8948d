//! What TLS costs: a coordinator with it beside one without.

use std::path::Path;
use std::time::{Duration, Instant};

use batchai_common::tls::Route;
use batchai_common::tls::{Authority, Connector, Credentials, Identity};
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::{Hello, SessionRequest, SessionResponse, session_request};
use batchai_proto::v1;
use batchai_proto::v1::bundle_service_client::BundleServiceClient;
use batchai_proto::v1::information_service_client::InformationServiceClient;
use batchai_proto::v1::upload_bundle_request::Part;
use batchai_tests::process::{Process, under_test};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::measure::{Better, print, private_mib, quantile};

const CALLS: usize = 3_000;
const BUNDLE_BYTES: usize = 128 << 20;
const PIECE_BYTES: usize = 64 << 10;
const HANDSHAKES: usize = 1_000;
const AT_ONCE: usize = 16;
const SESSIONS: usize = 2_000;

pub fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    batchai_common::limits::raise_open_files().expect("more files may be open");
    for tls in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let coordinator = Coordinator::start(dir.path(), tls);
        runtime.block_on(measure(&coordinator));
    }
}

struct Coordinator {
    process: Process,
    endpoint: String,
    authority: Option<Authority>,
    admin: Option<Connector>,
}

impl Coordinator {
    fn start(dir: &Path, tls: bool) -> Coordinator {
        let data = dir.join("data");
        let text = data.to_string_lossy().into_owned();
        let mut args = vec!["coordinator", "--listen", "127.0.0.1:0", "--data", &text];
        match tls {
            true => {
                let init = std::process::Command::new(under_test())
                    .args(["coordinator", "init", "--data", &text])
                    .output();
                assert!(init.expect("it starts").status.success());
            }
            false => args.push("--insecure-lab"),
        }
        let mut process = Process::start(args, &dir.join("log"));
        let address = process.line("ready ");
        let mut coordinator = Coordinator {
            process,
            endpoint: match tls {
                true => format!("https://{address}"),
                false => format!("http://{address}"),
            },
            authority: None,
            admin: None,
        };
        if tls {
            coordinator.authority = Authority::read(&data.join("pki")).ok();
            let credentials = Credentials::read(&data.join("admin.pem")).expect("credentials");
            coordinator.admin = Some(coordinator.connector(&credentials));
        }
        coordinator
    }

    fn kind(&self) -> &'static str {
        match self.authority {
            Some(_) => "tls",
            None => "plain",
        }
    }

    fn connector(&self, credentials: &Credentials) -> Connector {
        let client = credentials.client().expect("they can be used");
        let latest = watch::Sender::new(client).subscribe();
        Connector::new(&self.endpoint, Some(latest)).expect("an endpoint")
    }

    fn admin(&self) -> Connector {
        let plain = || Connector::new(&self.endpoint, None).expect("an endpoint");
        self.admin.clone().unwrap_or_else(plain)
    }

    fn node(&self, number: usize) -> Connector {
        let Some(authority) = &self.authority else {
            return self.admin();
        };
        let identity = Identity::node(&format!("n{number}"), &uid(number)).expect("a node");
        let made = authority.credentials(&identity, &[], Duration::from_secs(3600));
        let credentials = Credentials::parse(made.expect("it signs").as_bytes());
        self.connector(&credentials.expect("credentials"))
    }
}

fn uid(number: usize) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

async fn measure(coordinator: &Coordinator) {
    let kind = coordinator.kind();
    let channel = coordinator.admin().connect().await.expect("it listens");
    let mut calls = Vec::new();
    for _ in 0..CALLS {
        let mut client = InformationServiceClient::new(channel.clone());
        let begin = Instant::now();
        let answer = client.list_usages(v1::ListUsagesRequest::default()).await;
        answer.expect("an answer");
        calls.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    let p50 = quantile(&mut calls, 0.5);
    print(&format!("unary_p50_{kind}"), p50, "us", None, Better::Lower);
    let seconds = upload(channel).await;
    let rate = BUNDLE_BYTES as f64 / seconds / 1e6;
    print(
        &format!("stream_{kind}"),
        rate,
        "MB/s",
        None,
        Better::Higher,
    );
    let rate = connections(coordinator).await;
    print(
        &format!("connections_{kind}"),
        rate,
        "1/s",
        None,
        Better::Higher,
    );
    sessions(coordinator).await;
}

async fn upload(channel: Route) -> f64 {
    let mut bytes = vec![0; BUNDLE_BYTES];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (at.wrapping_mul(2_654_435_761) >> 13) as u8;
    }
    let digest: String = Sha256::digest(&bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let bytes = Bytes::from(bytes);
    let (sender, parts) = tokio::sync::mpsc::channel(8);
    let header = v1::BundleHeader {
        name: format!("bundles/{digest}"),
        size_bytes: BUNDLE_BYTES as i64,
    };
    let begin = Instant::now();
    let sending = tokio::spawn(async move {
        let send = |part| v1::UploadBundleRequest { part: Some(part) };
        sender
            .send(send(Part::Header(header)))
            .await
            .expect("taken");
        for at in (0..BUNDLE_BYTES).step_by(PIECE_BYTES) {
            let piece = bytes.slice(at..at + PIECE_BYTES);
            sender.send(send(Part::Data(piece))).await.expect("taken");
        }
    });
    let answer = BundleServiceClient::new(channel)
        .upload_bundle(ReceiverStream::new(parts))
        .await;
    let kept = answer.expect("an answer").into_inner().message().await;
    assert!(kept.expect("it is kept").is_some());
    let seconds = begin.elapsed().as_secs_f64();
    sending.await.expect("all was sent");
    seconds
}

/// New connections a second, each with a call.
async fn connections(coordinator: &Coordinator) -> f64 {
    let begin = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let connector = coordinator.admin();
        workers.spawn(async move {
            for _ in 0..HANDSHAKES / AT_ONCE {
                let channel = connector.connect().await.expect("a connection");
                let mut client = InformationServiceClient::new(channel);
                let call = client.list_usages(v1::ListUsagesRequest::default());
                call.await.expect("an answer");
            }
        });
    }
    workers.join_all().await;
    (HANDSHAKES / AT_ONCE * AT_ONCE) as f64 / begin.elapsed().as_secs_f64()
}

async fn sessions(coordinator: &Coordinator) {
    let kind = coordinator.kind();
    let before = private_mib(coordinator.process.pid());
    let mut open = Vec::new();
    for number in 0..SESSIONS {
        open.push(session(&coordinator.node(number), number).await);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = (private_mib(coordinator.process.pid()) - before) * 1024.0 / SESSIONS as f64;
    let name = format!("memory_per_idle_session_{kind}");
    print(&name, used, "KiB", None, Better::Lower);
}

type Open = (
    Streaming<SessionResponse>,
    tokio::sync::mpsc::Sender<SessionRequest>,
);

async fn session(connector: &Connector, number: usize) -> Open {
    let (sender, requests) = tokio::sync::mpsc::channel(1);
    let hello = Hello {
        node_id: format!("n{number}"),
        uid: uid(number),
        journal_id: uid(number),
        facts: Some(v1::NodeFacts {
            vm_size: "x".into(),
            boot_id: "b".into(),
            addresses: vec!["10.0.0.1".into()],
            first_port: 20_000,
            last_port: 29_999,
            ..Default::default()
        }),
        ..Default::default()
    };
    let hello = SessionRequest {
        message: Some(session_request::Message::Hello(hello)),
    };
    sender.send(hello).await.expect("there is room");
    let channel = connector.connect().await.expect("a connection");
    let opened = AgentServiceClient::new(channel)
        .session(ReceiverStream::new(requests))
        .await;
    let mut stream = opened.expect("a session").into_inner();
    let welcome = stream.message().await.expect("a welcome");
    assert!(welcome.is_some());
    (stream, sender)
}
