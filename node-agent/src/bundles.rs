//! Fetches the bundles that this node's work names, and keeps the latest.
//!
//! A bundle is at its place whole and with the right digest, or not at all. It is unpacked elsewhere, by the shim's helper.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchai_common::limits::BUNDLE_BYTES_MAX;
use batchai_common::names::{Kind, Name, hex};
use batchai_common::tls::Connector;
use batchai_proto::agent::v1::FetchBundleRequest;
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tonic::Code;

use crate::session::backoff;
use crate::watch::Watch;

/// Bundles that are asked for and not begun.
const WANTED_MAX: usize = 64;
/// How long the next piece may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// What came damaged, or could not be written, is asked for so often.
const TRIES_MAX: u32 = 5;

/// Whether a bundle is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Have {
    Yes,
    /// It is being fetched.
    NotYet,
    /// It cannot be had, and why.
    Never(String),
}

/// What is there of bundles, for who needs them.
#[derive(Clone, Debug)]
pub struct Bundles {
    root: PathBuf,
    /// Those that are being fetched, or that cannot be had.
    /// Which attempt asked is noted.
    known: Arc<Mutex<BTreeMap<String, (String, Have)>>>,
    wanted: mpsc::Sender<String>,
}

/// Why a bundle was not fetched.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{}", .0.message())]
    Refused(#[from] tonic::Status),
    #[error("{}", batchai_common::error::causes(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("nothing came for {} s", PATIENCE.as_secs())]
    Silent,
    #[error("what came is not the bundle: its SHA-256 is {found}")]
    Digest { found: String },
    #[error("{path}: {source}", path = .path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl FetchError {
    /// Asking again makes no sense, after so many times. A coordinator that is not there comes back.
    fn is_final(&self, failures: u32) -> bool {
        match self {
            FetchError::Refused(status) if status.code() == Code::NotFound => true,
            FetchError::Refused(_) | FetchError::Connect(_) | FetchError::Silent => false,
            FetchError::Digest { .. } | FetchError::Io { .. } => failures + 1 >= TRIES_MAX,
        }
    }
}

impl Bundles {
    /// Where a bundle is, once it is there.
    pub fn path(root: &Path, name: &str) -> PathBuf {
        let digest = batchai_common::names::last_id(name);
        root.join(format!("{digest}.tar.gz"))
    }

    /// Looks for a bundle, and has it fetched where it is not there.
    pub fn look_for(&self, name: &str, attempt: &str) -> Have {
        if Name::parse(Kind::Bundle, name).is_err() {
            return Have::Never(format!("{name:?} is not the name of a bundle"));
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if Bundles::path(&self.root, name).exists() {
            return Have::Yes;
        }
        match known.get(name) {
            // That an earlier attempt could not have it, for it was gone itself, says nothing for this one.
            Some((other, Have::Never(_))) if other != attempt => {}
            Some((_, known)) => return known.clone(),
            None => {}
        }
        // Where there is no room it is asked for again with the next look.
        if self.wanted.try_send(name.to_owned()).is_ok() {
            known.insert(name.to_owned(), (attempt.to_owned(), Have::NotYet));
        }
        Have::NotYet
    }

    fn set(&self, name: &str, have: Have) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match have {
            Have::Yes => known.remove(name),
            have => {
                let attempt = known.remove(name).map(|(attempt, _)| attempt);
                known.insert(name.to_owned(), (attempt.unwrap_or_default(), have))
            }
        };
    }
}

/// Fetches what is wanted.
pub struct Fetcher {
    connector: Connector,
    node_id: String,
    uid: String,
    bundles: Bundles,
    wanted: mpsc::Receiver<String>,
    watch: Arc<Watch>,
}

impl Fetcher {
    /// Keeps bundles in a directory, which is made where it does not exist.
    pub fn new(
        root: PathBuf,
        connector: Connector,
        (node_id, uid): (String, String),
        watch: Arc<Watch>,
    ) -> std::io::Result<(Fetcher, Bundles)> {
        fs::create_dir_all(&root)?;
        let (sender, wanted) = mpsc::channel(WANTED_MAX);
        let bundles = Bundles {
            root,
            known: Arc::default(),
            wanted: sender,
        };
        let fetcher = Fetcher {
            connector,
            node_id,
            uid,
            bundles: bundles.clone(),
            wanted,
            watch,
        };
        Ok((fetcher, bundles))
    }

    /// Fetches for ever, one after the other.
    pub async fn run(mut self) {
        while let Some(name) = self.wanted.recv().await {
            let mut failures = 0;
            let have = loop {
                match self.fetch(&name).await {
                    Ok(()) => break Have::Yes,
                    Err(error) if error.is_final(failures) => break Have::Never(error.to_string()),
                    Err(error) => {
                        tracing::warn!(%error, name, "cannot be fetched; trying again");
                        tokio::time::sleep(backoff(failures)).await;
                        failures += 1;
                    }
                }
            };
            self.bundles.set(&name, have);
            self.watch.status.notify_one();
        }
    }

    async fn fetch(&self, name: &str) -> Result<(), FetchError> {
        let path = Bundles::path(&self.bundles.root, name);
        if path.exists() {
            return Ok(());
        }
        let part = path.with_extension("part");
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| FetchError::Io { path, source }
        };
        // Nothing of this node's needs an earlier one any more: it has one attempt at a time, which has unpacked it.
        self.remove_others().map_err(at(&self.bundles.root))?;
        let mut client = AgentServiceClient::new(self.connector.connect().await?);
        let request = FetchBundleRequest {
            node_id: self.node_id.clone(),
            uid: self.uid.clone(),
            bundle: name.to_owned(),
        };
        let mut pieces = client.fetch_bundle(request).await?.into_inner();
        let mut file = File::create(&part).map_err(at(&part))?;
        let (mut hash, mut size) = (Sha256::new(), 0);
        loop {
            let next = tokio::time::timeout(PATIENCE, pieces.message()).await;
            let Some(piece) = next.map_err(|_| FetchError::Silent)?? else {
                break;
            };
            size += piece.data.len() as u64;
            if size > BUNDLE_BYTES_MAX {
                break;
            }
            hash.update(&piece.data);
            tokio::task::block_in_place(|| file.write_all(&piece.data)).map_err(at(&part))?;
        }
        let found = hex(&hash.finalize());
        if found != batchai_common::names::last_id(name) {
            return Err(FetchError::Digest { found });
        }
        tokio::task::block_in_place(|| file.sync_all()).map_err(at(&part))?;
        fs::rename(&part, &path).map_err(at(&path))
    }

    fn remove_others(&self) -> std::io::Result<()> {
        for entry in fs::read_dir(&self.bundles.root)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }
}
