//! Serves: takes connections of clients until it is told to stop, reads again what it is told, and syncs what clients leave alone.
//!
//! `clients` says who may have a connection, `connection` what is done with one.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::calls;
use super::clients::{Clients, listed};
use super::connection::{self, Memory};
use super::export::Export;
use super::identity::Squash;
use super::protocol::Procedure;
use super::replay::Replay;
use super::rpc;
use super::xdr::Reader;
use super::{Config, LAST_CALLS, ServerError, Status, said, tell};

const LOOK: Duration = Duration::from_millis(200);
const SETTLE: Duration = Duration::from_secs(1);
/// After a connection that could not be taken, and between two looks at whether some are left.
const RECOVER: Duration = Duration::from_millis(100);

/// What all connections have in common.
pub struct Server {
    export: Export,
    replay: Replay,
    config: watch::Receiver<Arc<Config>>,
    clients: Clients,
    pub memory: Memory,
    /// Connections and calls.
    pub tracker: TaskTracker,
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
        clients: Clients::new()?,
        memory: Memory::new(),
        tracker: TaskTracker::new(),
    });
    tell(dir, &status)?;
    tracing::info!(address = ?status.address, root = %server.export.path.display(), "files are served");
    let gone = CancellationToken::new();
    let ended = tokio::select! {
        ended = follow(dir, &server, &tell_config) => ended,
        () = settle(&server) => Ok(()),
        () = accept(&server, listener, &gone) => Ok(()),
        () = last_clients(&server, &stop) => Ok(()),
    };
    gone.cancel();
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
async fn follow(
    dir: &Path,
    server: &Server,
    tell: &watch::Sender<Arc<Config>>,
) -> Result<(), ServerError> {
    // What came since the file was read is read once more.
    let mut last = None;
    loop {
        let known = Arc::clone(&tell.borrow());
        if let Some(config) = super::follow(dir, &known, &mut last)? {
            let clients = config.clients.iter().map(IpAddr::to_canonical);
            let clients: HashSet<_> = clients.collect();
            tell.send_replace(Arc::new(config));
            server.clients.keep(|address| clients.contains(&address));
            server.replay.keep(|address| clients.contains(&address));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until it is told to stop, and until those who are connected then have gone, as long as it may.
async fn last_clients(server: &Server, stop: &CancellationToken) {
    stop.cancelled().await;
    let most = Duration::from_secs(server.config.borrow().linger_s);
    let none = async {
        while server.clients.any_connected() {
            tokio::time::sleep(RECOVER).await;
        }
    };
    // Who has not gone by then is cut off.
    let _ = tokio::time::timeout(most, none).await;
}

/// Syncs what clients leave alone.
async fn settle(server: &Arc<Server>) {
    loop {
        tokio::time::sleep(SETTLE).await;
        let server = Arc::clone(server);
        let settled = tokio::task::spawn_blocking(move || server.export.unstable.settle(false));
        if let Err(error) = settled.await
            && said::may_say("not settled", None)
        {
            tracing::error!(%error, "files that were left alone are not synced");
        }
    }
}

async fn accept(server: &Arc<Server>, listener: TcpListener, stop: &CancellationToken) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if said::may_say("not accepted", None) {
                    tracing::warn!(%error, "a connection could not be taken");
                }
                tokio::time::sleep(RECOVER).await;
                continue;
            }
        };
        let config = Arc::clone(&server.config.borrow());
        let Some(seat) = server.clients.seat(&config, peer) else {
            continue;
        };
        let (tracker, stop) = (&server.tracker, stop.child_token());
        let server = Arc::clone(server);
        tracker.spawn(async move {
            let address = seat.address;
            let gone = server.gone(address);
            tokio::select! {
                () = connection::serve(&server, stream, &seat, &stop) => {}
                () = gone => {
                    if said::may_say("no client", Some(address)) {
                        tracing::info!(client = %address, "is no client any more");
                    }
                }
                () = stop.cancelled() => {}
            }
            // Ends the tasks of the connection.
            stop.cancel();
        });
    }
}

impl Server {
    /// Waits until somebody is no client any more.
    async fn gone(&self, address: IpAddr) {
        let mut config = self.config.clone();
        // The sender lives as long as the server does.
        let _ = config.wait_for(|config| !listed(config, address)).await;
    }

    /// Answers one call. None: nobody is to be answered.
    pub fn answer(&self, client: IpAddr, record: &[u8]) -> Option<Vec<u8>> {
        let mut arguments = Reader(record);
        let head = match rpc::head(&mut arguments) {
            Ok(head) => head,
            Err((xid, refused)) => return Some(rpc::refusal(xid?, refused)),
        };
        let config = Arc::clone(&self.config.borrow());
        let squash = Squash {
            uid: config.squash_uid,
            gid: config.squash_gid,
            all: config.squash_all,
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
