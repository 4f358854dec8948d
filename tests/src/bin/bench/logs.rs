//! `bench logs`: what one rank prints, through shim, agent and coordinator to a reader, beside a bare stream of the same bytes; and how
//! late lines come where many ranks print at once.

use std::pin::Pin;
use std::time::{Duration, Instant};

use batchai_common::tls::Route;
use batchai_proto::v1;
use batchai_proto::v1::bundle_service_client::BundleServiceClient;
use batchai_proto::v1::bundle_service_server::{BundleService, BundleServiceServer};
use batchai_proto::v1::job_service_client::JobServiceClient;
use batchai_proto::v1::upload_bundle_request::Part;
use batchai_tests::api::connector;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::smoke::{Dev, create, job};
use crate::measure::{Better, print, quantile};

/// What the one rank prints: lines of eighty bytes.
const BYTES: usize = 256 << 20;
const CHUNK_BYTES: usize = 64 << 10;
const WINDOW_BYTES: u32 = 8 << 20;
/// How often each of many ranks prints, and for how long.
const TURNS_PER_S: u64 = 20;
const PRINTING_S: u64 = 10;

/// The ranks, and how many lines each prints a second.
pub fn run(ranks: usize, lines: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let bare = bare().await;
        print("bare_stream", bare, "MB/s", None, Better::Higher);
        let dir = tempfile::tempdir().expect("a directory");
        let dev = Dev::start(dir.path(), 1);
        let credentials = dir.path().join("coordinator/admin.pem");
        let route = connector(&dev.endpoint, &credentials).connect().await;
        let route = route.expect("dev is ready");
        create(&route).await.expect("the resources are new");
        let ours = one_rank(&route, dir.path()).await;
        print(
            "log_of_one_rank",
            ours,
            "MB/s",
            Some(bare / 2.0),
            Better::Higher,
        );
        many_ranks(&route, dir.path(), ranks, lines).await;
    });
}

/// Takes bytes and throws them away.
struct Sink;

#[tonic::async_trait]
impl BundleService for Sink {
    type UploadBundleStream =
        Pin<Box<dyn Stream<Item = Result<v1::UploadBundleResponse, Status>> + Send>>;

    async fn get_bundle(
        &self,
        _: Request<v1::GetBundleRequest>,
    ) -> Result<Response<v1::Bundle>, Status> {
        Err(Status::unimplemented("nothing is kept"))
    }

    async fn upload_bundle(
        &self,
        request: Request<Streaming<v1::UploadBundleRequest>>,
    ) -> Result<Response<Self::UploadBundleStream>, Status> {
        let mut pieces = request.into_inner();
        while pieces.message().await?.is_some() {}
        Ok(Response::new(Box::pin(tokio_stream::empty())))
    }
}

/// The same bytes, in pieces of the same size, over a connection without TLS: nothing else is done with them.
async fn bare() -> f64 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("loopback has a port");
    let at = listener.local_addr().expect("it is bound");
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    // As tonic has it, the windows would be what is measured.
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .add_service(BundleServiceServer::new(Sink));
    let serving = tokio::spawn(server.serve_with_incoming(incoming));
    let client = BundleServiceClient::connect(format!("http://{at}")).await;
    let mut client = client.expect("it listens");
    let data = bytes::Bytes::from(vec![b'x'; CHUNK_BYTES]);
    let piece = move |_| v1::UploadBundleRequest {
        part: Some(Part::Data(data.clone())),
    };
    let begin = Instant::now();
    let pieces = tokio_stream::iter(0..BYTES / CHUNK_BYTES).map(piece);
    let answer = client.upload_bundle(pieces).await;
    answer.expect("everything is taken");
    serving.abort();
    BYTES as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

fn read(name: &str, file: &str) -> v1::StreamJobLogsRequest {
    v1::StreamJobLogsRequest {
        name: name.to_owned(),
        file: file.to_owned(),
        follow: true,
        ..Default::default()
    }
}

/// MB/s from the first byte that a follower gets to the last.
async fn one_rank(route: &Route, dir: &std::path::Path) -> f64 {
    let line = "x".repeat(79);
    let command = format!("yes {line} | head -c {BYTES}");
    let mut client = JobServiceClient::new(route.clone());
    let job = client.create_job(job(dir, "one", &command)).await;
    let job = job.expect("it is valid").into_inner();
    let pieces = client.stream_job_logs(read(&job.name, "stdout.txt")).await;
    let mut pieces = pieces.expect("it exists").into_inner();
    let (mut begin, mut size) = (None, 0);
    while let Some(piece) = pieces.message().await.expect("dev runs") {
        begin.get_or_insert_with(Instant::now);
        size += piece.data.len();
    }
    assert_eq!(size, BYTES, "all of it comes");
    let begin = begin.expect("something came");
    BYTES as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

/// One follower reads what all ranks print: how late each line is that begins with the time at which it was printed.
async fn many_ranks(route: &Route, dir: &std::path::Path, ranks: usize, lines: usize) {
    let each = lines as u64 / TURNS_PER_S;
    // A process of each rank: what it costs itself is not to count much.
    let command = format!(
        "exec {} stamps {each} {TURNS_PER_S} {PRINTING_S}",
        std::env::current_exe()
            .expect("this very program")
            .display()
    );
    let mut request = job(dir, "many", &command);
    if let Some(settings) = request
        .job
        .as_mut()
        .and_then(|job| job.custom_toolkit_settings.as_mut())
    {
        settings.processes_per_node = i32::try_from(ranks).expect("it is a number of ranks");
    }
    let mut client = JobServiceClient::new(route.clone());
    let job = client.create_job(request).await;
    let job = job.expect("it is valid").into_inner();
    let wanted = ranks as u64 * each * TURNS_PER_S * PRINTING_S;
    let mut late = Vec::with_capacity(usize::try_from(wanted).expect("they fit into memory"));
    let all = v1::StreamJobLogsRequest {
        all_ranks: true,
        ..read(&job.name, "stdout")
    };
    let pieces = client.stream_job_logs(all).await;
    let mut pieces = pieces.expect("it exists").into_inner();
    let (mut first, mut last) = (f64::MAX, 0.0);
    while let Some(piece) = pieces.message().await.expect("dev runs") {
        let now = now_ms();
        // Pieces have whole lines.
        for line in piece.data.split_inclusive(|byte| *byte == b'\n') {
            let stamp = line.split(|byte| *byte == b' ').next();
            let stamp = stamp.and_then(|stamp| std::str::from_utf8(stamp).ok()?.parse().ok());
            let stamp: f64 = stamp.expect("every line has its time");
            late.push(now - stamp);
            (first, last) = (stamp.min(first), now);
        }
    }
    assert_eq!(late.len() as u64, wanted, "no line is lost");
    eprintln!("{ranks} ranks, {lines} lines/s each");
    // From the first that was printed to the last that came.
    let rate = late.len() as f64 / ((last - first) / 1000.0);
    print("lines_of_many_ranks", rate, "1/s", None, Better::Higher);
    let p50 = quantile(&mut late, 0.5);
    print("line_latency_p50", p50, "ms", None, Better::Lower);
    let p99 = quantile(&mut late, 0.99);
    print("line_latency_p99", p99, "ms", Some(500.0), Better::Lower);
}

fn now_ms() -> f64 {
    batchai_common::time::boot_time().as_secs_f64() * 1000.0
}

/// What a rank of `many_ranks` does: `stamps {lines each turn} {turns a second} {seconds}`.
pub fn stamps(args: &[u64]) {
    use std::io::Write as _;
    let &[each, turns, seconds] = args else {
        panic!("three numbers");
    };
    let (begin, mut out) = (Instant::now(), std::io::stdout());
    for turn in 0..turns * seconds {
        let due = Duration::from_millis(1000 * turn / turns);
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        let line = format!("{:.3} {}\n", now_ms(), "x".repeat(60));
        let text = line.repeat(usize::try_from(each).expect("it is small"));
        out.write_all(text.as_bytes()).expect("somebody reads");
    }
}
