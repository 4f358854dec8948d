//! What every replica has of what never goes through the log: the bundles that jobs name, and the logs of attempts that have ended.
//!
//! A replica that lacks some of it fetches it from the others: bundles when they are needed and before what needs them is acknowledged,
//! logs when their attempt is over. So neither goes with one machine, but for logs in the moment before they are copied. What is
//! written while an attempt runs is not copied: its node has all of it, and sends it again to whoever leads next. Where anything lies is
//! not written down: who has it, has it.

mod desk;
mod fetch;
mod follow_up;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

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
use fetch::CopyError;

/// How long other replicas may take to keep a bundle before what needs it is acknowledged.
const SPREAD_MAX: Duration = Duration::from_secs(600);
/// One that was kept by most so lately is: nobody sweeps it for far longer.
const SPREAD_AGAIN: Duration = Duration::from_secs(1200);
/// A replica that was not heard of for so long is not asked: it would only be waited for.
const HEARD_MAX: Duration = Duration::from_secs(10);

/// Where a bundle is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Here,
    /// No replica has it.
    Nowhere,
    /// Those that could be asked have none, and somebody could not: why.
    Unknown(String),
}

/// Another replica.
#[derive(Clone, Debug)]
struct Other {
    id: u64,
    endpoint: String,
    lately: bool,
}

/// What a replica's copies are made with.
pub struct Parts {
    pub replica: Handle,
    pub peers: Peers,
    /// Where replicas are before the State says it.
    pub first: BTreeMap<u64, String>,
    /// None in a lab.
    pub credentials: Option<watch::Receiver<Arc<ClientConfig>>>,
    pub logs: LogStore,
    pub bundles: BundleStore,
}

/// The copies of this replica. Cheap to clone.
#[derive(Clone)]
pub struct Copies {
    parts: Arc<Parts>,
    /// Many that wait for the same bundle fetch it once.
    turns: Arc<Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>>,
    /// When most replicas had a bundle.
    spread: Arc<Mutex<BTreeMap<String, Instant>>>,
}

impl Copies {
    pub fn new(parts: Parts) -> Copies {
        Copies {
            parts: Arc::new(parts),
            turns: Arc::default(),
            spread: Arc::default(),
        }
    }

    /// The bundles that are here.
    pub fn bundles(&self) -> &BundleStore {
        &self.parts.bundles
    }

    /// Has a bundle here, and notes that somebody has a use for it.
    ///
    /// # Errors
    /// The disk does not give it, or does not take it.
    pub async fn use_bundle(&self, digest: &str) -> io::Result<Found> {
        if self.use_here(digest).await? {
            return Ok(Found::Here);
        }
        let (copies, digest) = (self.clone(), digest.to_owned());
        // In a task of its own: who asked may give up, and asks again.
        let fetch = tokio::spawn(async move { copies.fetch_somewhere(&digest).await });
        fetch.await.map_err(io::Error::other)?
    }

    async fn fetch_somewhere(&self, digest: &str) -> io::Result<Found> {
        let turn = self.turn(digest);
        let _turn = turn.lock().await;
        if self.use_here(digest).await? {
            return Ok(Found::Here);
        }
        let mut unknown = None;
        for other in self.others() {
            let id = other.id;
            if !other.lately {
                unknown = Some(format!("replica {id} was not heard of lately"));
                continue;
            }
            match self.fetch_bundle(&other, digest).await {
                Ok(true) => {
                    self.use_here(digest).await?;
                    return Ok(Found::Here);
                }
                Ok(false) => {}
                Err(CopyError::Disk(error)) => return Err(error),
                Err(error) => unknown = Some(format!("replica {id}: {error}")),
            }
        }
        Ok(unknown.map_or(Found::Nowhere, Found::Unknown))
    }

    fn turn(&self, digest: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        let known = turns.get(digest).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let turn = Arc::default();
            turns.insert(digest.to_owned(), Arc::downgrade(&turn));
            turn
        })
    }

    async fn use_here(&self, digest: &str) -> io::Result<bool> {
        let (bundles, digest) = (self.parts.bundles.clone(), digest.to_owned());
        let used = tokio::task::spawn_blocking(move || bundles.use_now(&digest)).await;
        used.map_err(io::Error::other)?
    }

    /// Has most of the replicas that vote keep a bundle that this one has, unless they did lately.
    ///
    /// # Errors
    /// Too few of them do; who asks again tries it again.
    pub async fn spread_bundle(&self, digest: &str) -> Result<(), ApiError> {
        let lately = |at: &Instant| at.elapsed() < SPREAD_AGAIN;
        let known = {
            let mut spread = self.spread.lock().unwrap_or_else(PoisonError::into_inner);
            spread.retain(|_, at| lately(at));
            spread.contains_key(digest)
        };
        if known {
            return Ok(());
        }
        let (has, of) = self.ask_to_keep(digest).await;
        if has <= of / 2 {
            let why = format!(
                "the bundle is on {has} of {of} replicas, and must be on most of them: send it again"
            );
            return Err(ApiError::Unavailable { why, leader: None });
        }
        let mut spread = self.spread.lock().unwrap_or_else(PoisonError::into_inner);
        spread.insert(digest.to_owned(), Instant::now());
        Ok(())
    }

    /// Asks all others, and waits for enough of those that vote; returns how many have it, and how many there are.
    async fn ask_to_keep(&self, digest: &str) -> (usize, usize) {
        let voters: Vec<u64> = {
            let published = self.parts.replica.published();
            let state = &published.borrow().state;
            let voters = state.replicas.iter();
            let voters = voters.filter(|(_, replica)| replica.role() == Role::Voter);
            voters.map(|(id, _)| *id).collect()
        };
        let others = self.others();
        let (kept, mut answers) = mpsc::channel(others.len().max(1));
        for other in others.into_iter().filter(|other| other.lately) {
            let (copies, digest, kept) = (self.clone(), digest.to_owned(), kept.clone());
            let votes = voters.contains(&other.id);
            // Also those that are not waited for any more go on.
            tokio::spawn(async move {
                let asked = copies.have_kept(&other, &digest);
                let asked = tokio::time::timeout(SPREAD_MAX, asked).await;
                match asked.unwrap_or(Err(CopyError::Silent)) {
                    Ok(()) if votes => drop(kept.send(()).await),
                    Ok(()) => {}
                    Err(error) => {
                        let replica = other.id;
                        tracing::warn!(%error, replica, digest, "a bundle is not kept there");
                    }
                }
            });
        }
        drop(kept);
        // One that is alone, and whose State does not even know that it is.
        let of = voters.len().max(1);
        let mut has = 1;
        while has <= of / 2 && answers.recv().await.is_some() {
            has += 1;
        }
        (has, of)
    }

    /// The other replicas, by when they were heard of last.
    fn others(&self) -> Vec<Other> {
        let book = {
            let published = self.parts.replica.published();
            let seen = published.borrow();
            self.parts.peers.book(&self.parts.first, &seen.state)
        };
        let met = self.parts.peers.met();
        let heard = |id: &u64| met.get(id).map(|met| met.last);
        let mut others: Vec<_> = book.into_iter().collect();
        others.sort_by_key(|(id, _)| std::cmp::Reverse(heard(id)));
        let other = |(id, endpoint)| Other {
            lately: heard(&id).is_some_and(|last| last.elapsed() < HEARD_MAX),
            id,
            endpoint,
        };
        others.into_iter().map(other).collect()
    }

    fn hello(&self, to: u64) -> PeerHello {
        PeerHello {
            to,
            epoch: self.parts.replica.published().borrow().state.epoch,
            ..self.parts.peers.own().clone()
        }
    }
}
