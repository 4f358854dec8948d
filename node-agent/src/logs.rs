//! Ships log files to the coordinator: bounded pieces with byte offsets, on a connection of its own.
//!
//! Where to go on, the coordinator says: it answers every piece with how much of the file it keeps. So nothing is sent
//! twice for long and nothing is left out, whoever of the two was restarted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use batchai_common::crash_point;
use batchai_common::error::causes;
use batchai_common::limits::LOG_CHUNK_BYTES_MAX;
use batchai_common::tls::Connector;
use batchai_common::tls::Route;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::{
    LogChunk, LogHello, ShipLogsRequest, ShipLogsResponse, ship_logs_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::journal::{AttemptDir, Journal, JournalError, LOGS};
use crate::session::backoff;
use crate::watch::Watch;

/// Pieces on their way that were not answered yet.
const WINDOW: usize = 16;
/// Files are looked at this often, whatever wakes or does not wake the loop.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait for more after a file has grown.
const GATHER: Duration = Duration::from_millis(10);

type Key = (String, String);

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

/// What one connection knows of a file.
#[derive(Default)]
struct Sending {
    /// How far it was sent; nothing is sent before the first answer.
    sent: Option<u64>,
    asked: bool,
    /// Bytes that are kept there, and those of them that survive a power cut.
    stored: u64,
    synced: u64,
    /// As it was when it was last looked at.
    size: u64,
    unanswered: usize,
    /// Nobody wants it now; it is asked again, for the coordinator may only have been behind.
    unwanted_since: Option<Instant>,
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
        let (outbox, requests) = mpsc::channel(WINDOW);
        let hello = ship_logs_request::Message::Hello(self.hello.clone());
        // The channel has room: nothing was sent yet.
        let _ = outbox.try_send(ShipLogsRequest {
            message: Some(hello),
        });
        let mut client = AgentServiceClient::new(channel);
        let mut replies = match client.ship_logs(ReceiverStream::new(requests)).await {
            Ok(replies) => replies.into_inner(),
            Err(status) => return status.message().to_owned(),
        };
        let mut files: BTreeMap<Key, Sending> = BTreeMap::new();
        loop {
            match self.send_what_is_new(&mut files, &outbox).await {
                Ok(true) => {}
                Ok(false) => return "the coordinator takes nothing more".to_owned(),
                Err(error) => tracing::error!(%error, "log files cannot be read"),
            }
            let look = tokio::time::sleep(LOOK_INTERVAL);
            tokio::select! {
                reply = replies.message() => match reply {
                    Ok(Some(reply)) => {
                        if self.answered(&mut files, &reply) {
                            *failures = 0;
                        }
                    }
                    Ok(None) => return "the coordinator ended it".to_owned(),
                    Err(status) => return status.message().to_owned(),
                },
                // What is printed in many small writes is gathered.
                () = self.watch.logs.notified() => tokio::time::sleep(GATHER).await,
                () = look => {}
            }
        }
    }

    /// Whether the answer was to something that was sent: one to a mere question does not say that files are taken.
    fn answered(&self, files: &mut BTreeMap<Key, Sending>, reply: &ShipLogsResponse) -> bool {
        let stored = u64::try_from(reply.stored_bytes).unwrap_or_default();
        self.shipped.set(reply);
        let key = (reply.attempt.clone(), reply.file.clone());
        let Some(file) = files.get_mut(&key) else {
            return false;
        };
        let sent = file.sent.is_some();
        file.unanswered = file.unanswered.saturating_sub(1);
        file.unwanted_since = reply.unwanted.then(Instant::now);
        // The first answer says where to begin; a last one that is behind says that something is missing.
        if file.sent.is_none() || file.unanswered == 0 {
            file.sent = Some(stored);
        }
        // An attempt may wait for its last file to arrive.
        file.stored = stored;
        file.synced = file
            .synced
            .max(u64::try_from(reply.synced_bytes).unwrap_or_default());
        if reply.unwanted || file.synced >= file.size {
            crash_point!("agent_shipped_a_log");
            self.watch.status.notify_one();
        }
        sent
    }

    /// `false` where the connection has ended.
    async fn send_what_is_new(
        &self,
        files: &mut BTreeMap<Key, Sending>,
        outbox: &mpsc::Sender<ShipLogsRequest>,
    ) -> Result<bool, JournalError> {
        let mut present = BTreeSet::new();
        for dir in self.journal.attempts()? {
            for (file, size) in dir.logs()? {
                present.insert((dir.id(), file.clone()));
                let sending = files.entry((dir.id(), file.clone())).or_default();
                sending.size = size;
                while let Some(chunk) = next_chunk(&dir, &file, size, sending) {
                    sending.unanswered += 1;
                    let message = Some(ship_logs_request::Message::Chunk(chunk));
                    if outbox.send(ShipLogsRequest { message }).await.is_err() {
                        return Ok(false);
                    }
                }
            }
        }
        files.retain(|key, _| present.contains(key));
        Ok(true)
    }
}

/// The next piece of a file, if it may be sent now.
fn next_chunk(dir: &AttemptDir, file: &str, size: u64, sending: &mut Sending) -> Option<LogChunk> {
    let chunk = |offset: u64, data: Vec<u8>| LogChunk {
        attempt: dir.id(),
        file: file.to_owned(),
        offset: offset as i64,
        data: data.into(),
    };
    let again = sending
        .unwanted_since
        .is_some_and(|since| since.elapsed() > LOOK_INTERVAL);
    if !sending.asked || again {
        (sending.asked, sending.sent, sending.unwanted_since) = (true, None, None);
        return Some(chunk(0, Vec::new()));
    }
    let sent = sending.sent?;
    if sending.unwanted_since.is_some() || sending.unanswered >= WINDOW {
        return None;
    }
    if sent >= size {
        // All of it is there. When nothing more can come, it must also be safe there.
        let unsynced = sending.unanswered == 0 && sending.stored >= size && sending.synced < size;
        let over = || dir.shim().is_ok_and(|shim| shim.is_none());
        return (unsynced && over()).then(|| chunk(size, Vec::new()));
    }
    let length = (size - sent).min(LOG_CHUNK_BYTES_MAX as u64) as usize;
    let mut data = vec![0; length];
    let read = tokio::task::block_in_place(|| {
        let opened = File::open(dir.path.join(LOGS).join(file))?;
        opened.read_exact_at(&mut data, sent)
    });
    if let Err(error) = read {
        tracing::warn!(%error, file, "a log file cannot be read");
        return None;
    }
    sending.sent = Some(sent + length as u64);
    Some(chunk(sent, data))
}
