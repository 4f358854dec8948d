//! What every replica has of what never goes through the log: the bundles that jobs name, and the logs of attempts that have ended.
//!
//! A replica that lacks some of it fetches it from the others: bundles when they are needed and before an upload is acknowledged,
//! logs when their attempt is over. So neither goes with one machine. What is written while an attempt runs is not copied: its node
//! has all of it, and sends it again to whoever leads next. Where anything lies is not written down: who has it, has it.

mod desk;
mod fetch;
mod follow_up;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use batchai_common::error::ApiError;
use batchai_proto::internal::v1::PeerHello;
use batchai_proto::internal::v1::replica::Role;
use rustls::ClientConfig;
use tokio::sync::{mpsc, watch};

use crate::bundles::BundleStore;
use crate::logs::LogStore;
use crate::replica::Handle;
use crate::replica::peers::Peers;

pub use desk::CopyDesk;
pub use fetch::CopyError;

/// How long other replicas may take to keep a bundle before its upload is acknowledged.
const SPREAD_MAX: Duration = Duration::from_secs(600);

/// The copies of this replica. Cheap to clone.
#[derive(Clone)]
pub struct Copies {
    pub replica: Handle,
    pub peers: Peers,
    /// Where replicas are before the State says it.
    pub first: BTreeMap<u64, String>,
    /// None in a lab.
    pub credentials: Option<watch::Receiver<Arc<ClientConfig>>>,
    pub logs: LogStore,
    pub bundles: BundleStore,
    /// One bundle is fetched at a time: many that wait for the same one fetch it once.
    pub turn: Arc<tokio::sync::Mutex<()>>,
}

impl Copies {
    /// Has a bundle here, and notes that somebody has a use for it. `false` where no replica that can be reached has it.
    ///
    /// # Errors
    /// The disk does not give it, or does not take it.
    pub async fn use_bundle(&self, digest: &str) -> io::Result<bool> {
        if self.use_here(digest).await? {
            return Ok(true);
        }
        let _turn = self.turn.lock().await;
        if self.use_here(digest).await? {
            return Ok(true);
        }
        for (id, endpoint) in self.others() {
            match self.fetch_bundle((id, &endpoint), digest).await {
                Ok(true) => return self.use_here(digest).await,
                Ok(false) => {}
                Err(CopyError::Disk(error)) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, replica = id, digest, "a bundle is not copied");
                }
            }
        }
        Ok(false)
    }

    async fn use_here(&self, digest: &str) -> io::Result<bool> {
        let (bundles, digest) = (self.bundles.clone(), digest.to_owned());
        let used = tokio::task::spawn_blocking(move || bundles.use_now(&digest)).await;
        used.map_err(io::Error::other)?
    }

    /// Has a majority of the replicas that vote keep a bundle that this one has.
    ///
    /// # Errors
    /// Too few of them do; who sends the bundle again tries it again.
    pub async fn spread_bundle(&self, digest: &str) -> Result<(), ApiError> {
        let voters: Vec<u64> = {
            let published = self.replica.published();
            let state = &published.borrow().state;
            let voters = state.replicas.iter();
            let voters = voters.filter(|(_, replica)| replica.role() == Role::Voter);
            voters.map(|(id, _)| *id).collect()
        };
        let (others, wanted) = (self.others(), voters.len() / 2);
        let (kept, mut answers) = mpsc::channel(others.len().max(1));
        for (id, endpoint) in others {
            let (copies, digest, kept) = (self.clone(), digest.to_owned(), kept.clone());
            let votes = voters.contains(&id);
            // Also those that are not waited for any more go on.
            tokio::spawn(async move {
                let asked = copies.have_kept((id, &endpoint), &digest);
                let asked = tokio::time::timeout(SPREAD_MAX, asked).await;
                match asked.unwrap_or(Err(CopyError::Silent)) {
                    Ok(()) if votes => drop(kept.send(()).await),
                    Ok(()) => {}
                    Err(error) => {
                        tracing::warn!(%error, replica = id, digest, "a bundle is not kept there");
                    }
                }
            });
        }
        drop(kept);
        let mut count = 0;
        while count < wanted && answers.recv().await.is_some() {
            count += 1;
        }
        if count >= wanted {
            return Ok(());
        }
        let (on, of) = (count + 1, voters.len());
        let why = format!(
            "the bundle is on {on} of {of} replicas, and must be on most of them: send it again"
        );
        Err(ApiError::Unavailable { why, leader: None })
    }

    /// The other replicas, by when they were heard of last.
    fn others(&self) -> Vec<(u64, String)> {
        let published = self.replica.published();
        let book = {
            let seen = published.borrow();
            self.peers.book(&self.first, &seen.state)
        };
        let met = self.peers.met();
        let mut others: Vec<_> = book.into_iter().collect();
        others.sort_by_key(|(id, _)| std::cmp::Reverse(met.get(id).map(|met| met.last)));
        others
    }

    fn hello(&self, to: u64) -> PeerHello {
        PeerHello {
            to,
            epoch: self.replica.published().borrow().state.epoch,
            ..self.peers.own().clone()
        }
    }
}
