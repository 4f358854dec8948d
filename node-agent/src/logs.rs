//! Ships log files to the coordinator: bounded pieces with byte offsets, on a connection of its own.
//!
//! Where to go on, the coordinator says: it answers every piece with how much of the file it keeps. So nothing is sent
//! twice for long and nothing is left out, whoever of the two was restarted. What is to be sent next `shipment` decides; files are
//! looked at when they grow, and an answer costs no look at any of them. Files are not written here.

mod shipment;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use batchai_common::crash_point;
use batchai_common::error::causes;
use batchai_common::holes;
use batchai_common::tls::Connector;
use batchai_common::tls::Route;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::{
    LogChunk, LogHello, ShipLogsRequest, ShipLogsResponse, ship_logs_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use self::shipment::{IN_FLIGHT_MAX, Key, Piece, Seen, Shipment};
use crate::journal::{AttemptDir, Journal, JournalError, LOGS};
use crate::session::backoff;
use crate::watch::Watch;

/// Files are looked at this often, whatever wakes or does not wake the loop.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait for more after a file has grown. Answers are taken meanwhile.
const GATHER: Duration = Duration::from_millis(10);

/// How far each file has got.
#[derive(Clone, Debug, Default)]
pub struct Shipped {
    files: Arc<Mutex<BTreeMap<Key, Progress>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Bytes that survive a power cut there.
    synced: u64,
    unwanted: bool,
}

impl Shipped {
    /// Whether all log files of an attempt have arrived, or nobody wants them.
    pub fn is_done(&self, dir: &AttemptDir) -> Result<bool, JournalError> {
        let logs = dir.logs()?;
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let id = dir.id();
        Ok(logs.into_iter().all(|(file, size)| {
            let known = files.get(&(id.clone(), file));
            known.is_some_and(|progress| progress.unwanted || progress.synced >= size)
        }))
    }

    /// Forgets an attempt.
    pub fn forget(&self, attempt: &str) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|(known, _), _| known != attempt);
    }

    /// Another coordinator may have less than the one before.
    fn begin_anew(&self) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.clear();
    }

    fn set(&self, reply: &ShipLogsResponse) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (reply.attempt.clone(), reply.file.clone());
        let synced = u64::try_from(reply.synced_bytes).unwrap_or_default();
        files.insert(
            key,
            Progress {
                synced,
                unwanted: reply.unwanted,
            },
        );
    }
}

/// Ships for ever; dropping it ends it.
pub struct Shipper {
    pub journal: Arc<Journal>,
    pub watch: Arc<Watch>,
    pub shipped: Shipped,
    pub connector: Connector,
    pub hello: LogHello,
}

impl Shipper {
    /// Connects again whenever a connection ends.
    pub async fn run(self) {
        let mut failures = 0;
        loop {
            let error = match self.connector.connect().await {
                Ok(channel) => self.ship(channel, &mut failures).await,
                Err(error) => causes(&error),
            };
            tracing::debug!(error, "log shipping interrupted");
            tokio::time::sleep(backoff(failures)).await;
            failures += 1;
        }
    }

    /// Ships on one connection; returns why it ended.
    async fn ship(&self, channel: Route, failures: &mut u32) -> String {
        // Room for the hello and for all that may be unanswered: sending never waits.
        let (outbox, requests) = mpsc::channel(IN_FLIGHT_MAX + 1);
        let hello = ship_logs_request::Message::Hello(self.hello.clone());
        let _ = outbox.try_send(ShipLogsRequest {
            message: Some(hello),
        });
        let mut client = AgentServiceClient::new(channel);
        let mut replies = match client.ship_logs(ReceiverStream::new(requests)).await {
            Ok(replies) => replies.into_inner(),
            Err(status) => return status.message().to_owned(),
        };
        self.shipped.begin_anew();
        let mut shipment = Shipment::default();
        let mut look = Instant::now();
        let mut gathers = false;
        loop {
            if Instant::now() >= look {
                if let Err(error) = tokio::task::block_in_place(|| self.look(&mut shipment)) {
                    tracing::error!(%error, "log files cannot be read");
                }
                (look, gathers) = (Instant::now() + LOOK_INTERVAL, false);
            }
            if !self.send(&mut shipment, &outbox) {
                return "the coordinator takes nothing more".to_owned();
            }
            tokio::select! {
                reply = replies.message() => match reply {
                    Ok(Some(reply)) => {
                        if self.answered(&mut shipment, &reply) {
                            *failures = 0;
                        }
                    }
                    Ok(None) => return "the coordinator ended it".to_owned(),
                    Err(status) => return status.message().to_owned(),
                },
                // What is printed in many small writes is gathered.
                () = self.watch.logs.notified(), if !gathers => {
                    (look, gathers) = (look.min(Instant::now() + GATHER), true);
                }
                () = tokio::time::sleep_until(look.into()) => {}
            }
        }
    }

    /// Whether the answer was to something that was sent: one to a mere question does not say that files are taken.
    fn answered(&self, shipment: &mut Shipment, reply: &ShipLogsResponse) -> bool {
        self.shipped.set(reply);
        let bytes = |count: i64| u64::try_from(count).unwrap_or_default();
        let answer = shipment::Answer {
            stored: bytes(reply.stored_bytes),
            synced: bytes(reply.synced_bytes),
            unwanted: reply.unwanted,
        };
        let key = (reply.attempt.clone(), reply.file.clone());
        let taken = shipment.answered(&key, answer, Instant::now());
        if taken.settled {
            // An attempt may wait for its last file to arrive.
            crash_point!("agent_shipped_a_log");
            self.watch.status.notify_one();
        }
        taken.data
    }

    /// Notes how large the files are now.
    fn look(&self, shipment: &mut Shipment) -> Result<(), JournalError> {
        let mut seen = BTreeMap::new();
        for dir in self.journal.attempts()? {
            // Before the files: what no shim holds grows no more.
            let over = dir.shim().is_ok_and(|shim| shim.is_none());
            for (file, size) in dir.logs()? {
                seen.insert((dir.id(), file), Seen { size, over });
            }
        }
        shipment.seen(seen);
        Ok(())
    }

    /// Sends what may be sent now; `false` where the connection has ended.
    fn send(&self, shipment: &mut Shipment, outbox: &mpsc::Sender<ShipLogsRequest>) -> bool {
        let now = Instant::now();
        let Some(first) = shipment.next(now) else {
            return true;
        };
        tokio::task::block_in_place(|| {
            let mut next = Some(first);
            while let Some(piece) = next {
                match self.chunk(&piece) {
                    Ok(chunk) => {
                        let end = chunk.offset as u64 + chunk.data.len() as u64;
                        shipment.sent(&piece, end);
                        let message = Some(ship_logs_request::Message::Chunk(chunk));
                        if outbox.try_send(ShipLogsRequest { message }).is_err() {
                            return false;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, file = piece.key.1, "a log file cannot be read");
                        shipment.failed(&piece, now);
                    }
                }
                next = shipment.next(now);
            }
            true
        })
    }

    fn chunk(&self, piece: &Piece) -> std::io::Result<LogChunk> {
        let (attempt, file) = &piece.key;
        let (mut data, mut offset) = (Vec::new(), piece.offset);
        if piece.length > 0 {
            let dir = self.journal.attempt(attempt);
            let dir = dir.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotFound))?;
            let opened = File::open(dir.path.join(LOGS).join(file))?;
            (offset, data) = read_kept(&opened, piece.offset, piece.length)?;
        }
        Ok(LogChunk {
            attempt: attempt.clone(),
            file: file.clone(),
            offset: offset as i64,
            data: data.into(),
            gap: offset > piece.offset,
        })
    }
}

/// Bytes of a file from an offset on, or from where its shim keeps them.
fn read_kept(file: &File, mut offset: u64, length: usize) -> std::io::Result<(u64, Vec<u8>)> {
    loop {
        let end = file.metadata()?.len();
        let most = end.saturating_sub(offset).min(length as u64);
        let mut data = vec![0; most as usize];
        file.read_exact_at(&mut data, offset)?;
        // In this order: what is given up while it is read may have been read as zeros.
        let kept = holes::first_kept(file)?;
        if kept <= offset {
            return Ok((offset, data));
        }
        offset = kept;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn what_was_given_up_is_not_read_as_something() {
        let align = holes::HOLE_ALIGN;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![b'x'; 3 * align as usize]).unwrap();
        holes::give_up(&file, align).unwrap();
        let (offset, data) = read_kept(&file, 5, 100).unwrap();
        assert_eq!((offset, data), (align, vec![b'x'; 100]));
        let (offset, data) = read_kept(&file, 3 * align - 5, 100).unwrap();
        assert_eq!((offset, data.len()), (3 * align - 5, 5));
        holes::give_up(&file, 4 * align).unwrap();
        assert_eq!(read_kept(&file, 5, 100).unwrap(), (3 * align, Vec::new()));
    }
}
