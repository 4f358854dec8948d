//! Connections: who may have one, and in what bounds calls come and answers go.
//!
//! A client has a number of calls that are being done or whose answers it has not taken; then no more are read from it. So nobody keeps
//! others from being served, and memory has a bound: connections times the largest record, and clients times their calls.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::calls;
use super::export::Export;
use super::identity::Squash;
use super::protocol::{IO_MAX, Procedure};
use super::replay::Replay;
use super::rpc;
use super::xdr::Reader;
use super::{Config, LAST_CALLS, ServerError, Status, tell};

const CONNECTIONS_MAX: usize = 256;
/// Of one client: more than Linux's `nconnect` allows.
const CONNECTIONS_OF_ONE: usize = 32;
const CALLS_OF_ONE: usize = 32;
/// What a call has beside the data that it writes is less.
const RECORD_MAX: usize = IO_MAX as usize + (8 << 10);
/// After this a client connects anew when it has something to say.
const IDLE: Duration = Duration::from_secs(15 * 60);
/// For what is under way in either direction.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);
const SETTLE: Duration = Duration::from_secs(1);
/// After a connection that could not be taken.
const RECOVER: Duration = Duration::from_millis(100);
/// Below it only root binds.
const PORTS_OF_ROOT: u16 = 1024;
/// Of how many strangers a line is logged.
const STRANGERS_MAX: usize = 64;

/// What a client has left.
#[derive(Clone)]
struct Client {
    connections: Arc<Semaphore>,
    calls: Arc<Semaphore>,
}

struct Server {
    export: Export,
    replay: Replay,
    config: watch::Receiver<Arc<Config>>,
    clients: Mutex<HashMap<IpAddr, Client>>,
    strangers: Mutex<HashSet<IpAddr>>,
    connections: Arc<Semaphore>,
    /// Connections and calls.
    tracker: TaskTracker,
}

/// Serves until it is told to stop.
pub async fn run(
    dir: &Path,
    config: Config,
    export: Export,
    stop: CancellationToken,
) -> Result<(), ServerError> {
    let address = config.listen;
    let bound = TcpListener::bind(address).await;
    let listener = bound.map_err(|error| ServerError::Listen { address, error })?;
    let status = Status {
        pid: std::process::id(),
        address: Some(listener.local_addr()?),
        error: None,
    };
    let (tell_config, told) = watch::channel(Arc::new(config));
    let server = Arc::new(Server {
        export,
        replay: Replay::default(),
        config: told,
        clients: Mutex::default(),
        strangers: Mutex::default(),
        connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        tracker: TaskTracker::new(),
    });
    tell(dir, &status)?;
    tracing::info!(address = ?status.address, root = %server.export.path.display(), "files are served");
    let ended = tokio::select! {
        ended = follow(dir, &tell_config) => ended,
        () = settle(&server) => Ok(()),
        () = accept(&server, listener, &stop) => Ok(()),
        () = stop.cancelled() => Ok(()),
    };
    stop.cancel();
    server.tracker.close();
    if tokio::time::timeout(LAST_CALLS, server.tracker.wait())
        .await
        .is_err()
    {
        tracing::warn!("calls are under way still: their clients send them again");
    }
    let settled = Arc::clone(&server);
    let last = tokio::task::spawn_blocking(move || settled.export.unstable.settle(true));
    if tokio::time::timeout(LAST_CALLS, last).await.is_err() {
        tracing::warn!("files are written to the disk still");
    }
    ended
}

/// Reads what the server is told when it changes.
async fn follow(dir: &Path, tell: &watch::Sender<Arc<Config>>) -> Result<(), ServerError> {
    // What came since the file was read is read once more.
    let mut last = None;
    loop {
        let known = Arc::clone(&tell.borrow());
        if let Some(config) = super::follow(dir, &known, &mut last)? {
            tell.send_replace(Arc::new(config));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Syncs what clients leave alone.
async fn settle(server: &Arc<Server>) {
    loop {
        tokio::time::sleep(SETTLE).await;
        let server = Arc::clone(server);
        let settled = tokio::task::spawn_blocking(move || server.export.unstable.settle(false));
        if let Err(error) = settled.await {
            tracing::error!(%error, "files that were left alone are not synced");
        }
    }
}

async fn accept(server: &Arc<Server>, listener: TcpListener, stop: &CancellationToken) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(RECOVER).await;
                continue;
            }
        };
        let Some(seat) = server.seat(peer) else {
            continue;
        };
        let (tracker, stop) = (&server.tracker, stop.child_token());
        let server = Arc::clone(server);
        tracker.spawn(async move {
            let address = seat.address;
            let gone = server.gone(address);
            tokio::select! {
                () = connection(&server, stream, &seat, &stop) => {}
                () = gone => tracing::info!(client = %address, "is no client any more"),
                () = stop.cancelled() => {}
            }
            // Ends the tasks of the connection.
            stop.cancel();
        });
    }
}

/// A place for a connection. Dropping it frees it.
struct Seat {
    address: IpAddr,
    client: Client,
    _held: [OwnedSemaphorePermit; 2],
}

impl Server {
    /// Whether somebody may come, and has not come too often.
    fn seat(&self, peer: SocketAddr) -> Option<Seat> {
        let address = peer.ip().to_canonical();
        let config = Arc::clone(&self.config.borrow());
        if !listed(&config, address) {
            self.refuse(address, "it is not among the clients");
            return None;
        }
        if !config.any_port && peer.port() >= PORTS_OF_ROOT {
            self.refuse(address, "it comes from a port that not only root may use");
            return None;
        }
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|address, _| listed(&config, *address));
        let client = clients.entry(address).or_insert_with(|| Client {
            connections: Arc::new(Semaphore::new(CONNECTIONS_OF_ONE)),
            calls: Arc::new(Semaphore::new(CALLS_OF_ONE)),
        });
        let own = Arc::clone(&client.connections).try_acquire_owned().ok();
        let all = Arc::clone(&self.connections).try_acquire_owned().ok();
        let (Some(own), Some(all)) = (own, all) else {
            tracing::warn!(client = %address, "a connection too many");
            return None;
        };
        Some(Seat {
            address,
            client: client.clone(),
            _held: [own, all],
        })
    }

    /// Says once of somebody that it may not come.
    fn refuse(&self, address: IpAddr, why: &str) {
        let mut known = self
            .strangers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.len() < STRANGERS_MAX && known.insert(address) {
            tracing::warn!(client = %address, "refused: {why}");
        }
    }

    /// Waits until somebody is no client any more.
    async fn gone(&self, address: IpAddr) {
        let mut config = self.config.clone();
        // The sender lives as long as the server does.
        let _ = config.wait_for(|config| !listed(config, address)).await;
    }

    /// Answers one call. None: nobody is to be answered.
    fn answer(&self, client: IpAddr, record: &[u8]) -> Option<Vec<u8>> {
        let mut arguments = Reader(record);
        let head = match rpc::head(&mut arguments) {
            Ok(head) => head,
            Err((xid, refused)) => return Some(rpc::refusal(xid?, refused)),
        };
        let config = Arc::clone(&self.config.borrow());
        let squash = Squash {
            uid: config.squash_uid,
            gid: config.squash_gid,
        };
        let answer = || calls::answer(&self.export, &head, squash, arguments);
        let procedure = Procedure::of(head.procedure);
        let once = head.program == rpc::NFS && procedure.is_some_and(Procedure::once);
        if once {
            self.replay.once(client, head.xid, record, answer)
        } else {
            Some(answer())
        }
    }
}

fn listed(config: &Config, address: IpAddr) -> bool {
    config
        .clients
        .iter()
        .any(|client| client.to_canonical() == address)
}

/// Reads calls until the client goes, or does what it may not.
async fn connection(
    server: &Arc<Server>,
    stream: TcpStream,
    seat: &Seat,
    stop: &CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::warn!(%error, "answers are slow");
    }
    let (mut read, write) = stream.into_split();
    let (send, answers) = mpsc::channel(CALLS_OF_ONE);
    let writing = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = write_answers(write, answers) => writing.cancel(),
            () = writing.cancelled() => {}
        }
    });
    while let Some(record) = next_record(&mut read, seat.address).await {
        let Ok(permit) = Arc::clone(&seat.client.calls).acquire_owned().await else {
            return;
        };
        let (own, send, address) = (Arc::clone(server), send.clone(), seat.address);
        // It is done to its end, also where the connection ends before.
        server.tracker.spawn_blocking(move || {
            if let Some(answer) = own.answer(address, &record) {
                // There is room for as many as there are permits; a client that is gone wants none.
                let _ = send.try_send((rpc::whole(answer), permit));
            }
        });
    }
}

type Answer = (Vec<u8>, OwnedSemaphorePermit);

/// Ends when the client does not take its answers.
async fn write_answers(mut write: OwnedWriteHalf, mut answers: mpsc::Receiver<Answer>) {
    while let Some((answer, permit)) = answers.recv().await {
        let written = tokio::time::timeout(PATIENCE, write.write_all(&answer)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
        drop(permit);
    }
}

/// The next call. None where there is none, or it is too long or too slow.
async fn next_record(read: &mut OwnedReadHalf, client: IpAddr) -> Option<Vec<u8>> {
    let mut mark = [0; 4];
    tokio::time::timeout(IDLE, read.read_exact(&mut mark))
        .await
        .ok()?
        .ok()?;
    let rest = async {
        let mut record = Vec::new();
        loop {
            let (length, last) = rpc::piece(mark);
            if record.len() + length > RECORD_MAX || (length == 0 && !last) {
                tracing::warn!(%client, "a call that is too long");
                return None;
            }
            record.reserve_exact(length);
            let end = record.len() + length;
            let mut piece = (&mut *read).take(length as u64);
            while record.len() < end {
                if piece.read_buf(&mut record).await.ok()? == 0 {
                    return None;
                }
            }
            if last {
                return Some(record);
            }
            read.read_exact(&mut mark).await.ok()?;
        }
    };
    tokio::time::timeout(PATIENCE, rest).await.ok()?
}
