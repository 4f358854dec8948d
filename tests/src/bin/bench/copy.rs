//! `bench copy`: what `batchai file-server file` moves in a second to and from a file server, through coordinator and agent, beside what tonic
//! alone does with messages of the same size.
//!
//! The command's copies are whole ones: authenticated, by TLS twice, compared by SHA-256 and, where they are written, on the disk. Tonic's are
//! nothing of that: one server, one client, one stream on loopback, and the bytes are thrown away. Needs root, as serving files does.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::pin::Pin;
use std::time::Instant;

use batchai_proto::internal::v1::copy_service_client::CopyServiceClient;
use batchai_proto::internal::v1::copy_service_server::{CopyService, CopyServiceServer};
use batchai_proto::internal::v1::peer_service_client::PeerServiceClient;
use batchai_proto::internal::v1::peer_service_server::{PeerService, PeerServiceServer};
use batchai_proto::internal::v1::{
    ExchangeRequest, FetchCopyRequest, FetchCopyResponse, KeepBundleRequest, KeepBundleResponse,
    PeerWelcome, SendSnapshotRequest, SnapshotTaken,
};
use batchai_tests::ensemble::{Ensemble, SIZE, create_file_server};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::measure::{Better, print};

const LARGE: usize = 512 << 20;
const FILES: usize = 1000;
const SMALL: usize = 4096;
const PIECE: usize = 64 << 10;

pub fn run() {
    let e = ensemble();
    let local = e.path().join("local");
    fs::create_dir_all(local.join("many")).expect("it is new");
    fs::write(local.join("large"), random(LARGE)).expect("there is room");
    for number in 0..FILES {
        let path = local.join(format!("many/{number}"));
        fs::write(path, random(SMALL)).expect("there is room");
    }
    let rate = |what: &str, value, unit| print(what, value, unit, None, Better::Higher);
    for (what, name, amount, unit) in [
        ("copy", "large", LARGE as f64 / 1e6, "MB/s"),
        ("copy_small", "many", FILES as f64, "1/s"),
    ] {
        let from = local.join(name);
        let seconds = copied(&e, "upload", &[text(&from), "-p", "sets"]);
        rate(&format!("{what}_upload"), amount / seconds, unit);
        let (path, to) = (format!("sets/{name}"), e.path().join("back"));
        let seconds = copied(&e, "download", &["-p", &path, "-d", text(&to)]);
        rate(&format!("{what}_download"), amount / seconds, unit);
    }
    let same = fs::read(local.join("large")).ok() == fs::read(e.path().join("back/large")).ok();
    assert!(same, "what came back is what was sent");
    drop(e);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let (up, down) = runtime.expect("a runtime").block_on(tonic_alone());
    rate("tonic_upload", LARGE as f64 / 1e6 / up, "MB/s");
    rate("tonic_download", LARGE as f64 / 1e6 / down, "MB/s");
}

/// A node that serves a file server `data`.
fn ensemble() -> Ensemble {
    let mut e = Ensemble::start(0);
    let storage = e.path().join("storage");
    fs::create_dir(&storage).expect("it is new");
    for (path, mode) in [(e.path(), 0o755), (&*storage, 0o700)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
    }
    let storage = text(&storage).to_owned();
    e.agent_args = vec!["--storage-root".to_owned(), storage];
    e.start_agent_as("store", "54321:54322");
    e.until_alive(1);
    e.create_cluster(1);
    e.ok(&create_file_server("data", SIZE));
    e
}

/// How long the command takes.
fn copied(e: &Ensemble, verb: &str, more: &[&str]) -> f64 {
    let all = [
        "file-server",
        "file",
        verb,
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        "data",
    ];
    let begin = Instant::now();
    e.ok(&[&all[..], more].concat());
    begin.elapsed().as_secs_f64()
}

fn random(size: usize) -> Vec<u8> {
    std::iter::repeat_with(|| fastrand::u8(..))
        .take(size)
        .collect()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("it is text")
}

/// Seconds to send and to fetch as much.
async fn tonic_alone() -> (f64, f64) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("a port is free");
    let address = listener.local_addr().expect("it listens");
    let server = Server::builder()
        .add_service(PeerServiceServer::new(Thrower))
        .add_service(CopyServiceServer::new(Thrower))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(server);
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("a URL");
    let channel = endpoint.connect().await.expect("it listens");
    let pieces = || std::iter::repeat_n(vec![7; PIECE], LARGE / PIECE);
    let sent = tokio_stream::iter(pieces().map(|data| SendSnapshotRequest {
        data: data.into(),
        ..Default::default()
    }));
    let begin = Instant::now();
    let answer = PeerServiceClient::new(channel.clone())
        .send_snapshot(sent)
        .await;
    let taken = answer.expect("an answer").into_inner().message().await;
    assert!(taken.expect("all is taken").is_some());
    let up = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    let answer = CopyServiceClient::new(channel)
        .fetch_copy(FetchCopyRequest::default())
        .await;
    let mut came = answer.expect("an answer").into_inner();
    let mut size = 0;
    while let Some(piece) = came.message().await.expect("it goes on") {
        size += piece.data.len();
    }
    assert_eq!(size, LARGE);
    let down = begin.elapsed().as_secs_f64();
    server.abort();
    (up, down)
}

/// Takes what comes, gives what is wanted, and keeps nothing.
struct Thrower;

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl PeerService for Thrower {
    type ExchangeStream = Replies<PeerWelcome>;
    type SendSnapshotStream = Replies<SnapshotTaken>;

    async fn exchange(
        &self,
        _: Request<Streaming<ExchangeRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        Err(Status::unimplemented("nothing is exchanged here"))
    }

    async fn send_snapshot(
        &self,
        request: Request<Streaming<SendSnapshotRequest>>,
    ) -> Result<Response<Self::SendSnapshotStream>, Status> {
        let (mut incoming, mut size) = (request.into_inner(), 0);
        while let Some(piece) = incoming.message().await? {
            size += piece.data.len();
        }
        assert_eq!(size, LARGE);
        let taken = tokio_stream::once(Ok(SnapshotTaken {}));
        Ok(Response::new(Box::pin(taken)))
    }
}

#[tonic::async_trait]
impl CopyService for Thrower {
    type FetchCopyStream = Replies<FetchCopyResponse>;
    type KeepBundleStream = Replies<KeepBundleResponse>;

    async fn fetch_copy(
        &self,
        _: Request<FetchCopyRequest>,
    ) -> Result<Response<Self::FetchCopyStream>, Status> {
        let pieces = std::iter::repeat_n(vec![7; PIECE], LARGE / PIECE);
        let pieces = tokio_stream::iter(pieces).map(|data| {
            Ok(FetchCopyResponse {
                data: data.into(),
                ..Default::default()
            })
        });
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn keep_bundle(
        &self,
        _: Request<KeepBundleRequest>,
    ) -> Result<Response<Self::KeepBundleStream>, Status> {
        Err(Status::unimplemented("nothing is kept here"))
    }
}
