//! When each node was last heard of by this replica, and who has its live session. Not part of the State; a replica starts knowing
//! nobody. Times are milliseconds of the machine's boot clock, which callers read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchai_common::time::{boot_millis, now_millis};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::lease::Beat;
use super::upward::Known;
use crate::scheduler::heard::Heard;

/// One node's contact. The heartbeat path touches nothing else.
#[derive(Debug, Default)]
struct Contact {
    /// On the boot clock.
    last_ms: AtomicI64,
    /// The number of the live session; 0 where there is none.
    session: AtomicU64,
    /// It is with this replica, not with one that relays.
    own: AtomicBool,
    /// The number of the session's latest heartbeat.
    beat: AtomicU64,
    /// The latest heartbeat that was granted, and in which session it came.
    granted: watch::Sender<(u64, u64)>,
    /// What the leader said of a session, where that is another replica: whether it is the node's live one.
    standing: watch::Sender<(u64, Option<bool>)>,
    /// When the reports so far would have come, had they come evenly.
    even: Mutex<Option<Instant>>,
}

/// In which term this replica leads and since when, and when the heartbeats came that it has granted.
type Granted = (u64, i64, Arc<BTreeMap<String, i64>>);

/// All nodes' contacts.
#[derive(Clone, Debug, Default)]
pub struct Contacts {
    nodes: Arc<Mutex<BTreeMap<String, Arc<Contact>>>>,
    /// What was heard when somebody last asked.
    lately: Arc<Mutex<Arc<Heard>>>,
    /// The ids of data keys that cannot be opened here.
    closed: Arc<Mutex<Arc<BTreeSet<String>>>>,
    /// Since when this replica leads, and what it has granted.
    leases: Arc<Mutex<Option<Granted>>>,
    /// Nodes that the State is about to take for lost.
    losing: Arc<Mutex<BTreeSet<String>>>,
    /// How many sessions there were.
    sessions: Arc<AtomicU64>,
    /// A session of this replica has begun or ended.
    changed: Arc<Notify>,
}

/// Reports of one node: so many a second, and so many at once. A job of one short process makes five, one after the other: this
/// is no bound for them, and keeps a node that has gone mad to a small part of what the log takes.
const REPORTS_PER_S: u32 = 400;
const REPORTS_BURST: u32 = 400;
/// What was heard is good enough for readers for so long.
const LATELY_MS: i64 = 100;

/// The one live session of a node. Dropping it makes way for the next.
pub struct Live {
    contact: Arc<Contact>,
    session: u64,
    changed: Arc<Notify>,
}

impl Live {
    /// The node gave a sign of life.
    pub fn heard(&self, now: i64) {
        self.contact.last_ms.store(now, Ordering::Relaxed);
    }

    /// A heartbeat of the node came.
    pub fn beat(&self, number: u64, now: i64) {
        self.heard(now);
        // Behind the time: whoever reads the number finds a time that is not before it.
        self.contact.beat.store(number, Ordering::Release);
    }

    /// Where to wait for grants.
    pub fn grants(&self) -> watch::Receiver<(u64, u64)> {
        self.contact.granted.subscribe()
    }

    /// The latest heartbeat of this session that was granted; 0 where there is none.
    pub fn granted(&self) -> u64 {
        let (session, number) = *self.contact.granted.borrow();
        if session == self.session { number } else { 0 }
    }

    /// What the leader last said of this session, where that is another replica: whether it is the live one of its node.
    pub fn stands(&self) -> Option<bool> {
        let (session, live) = *self.contact.standing.borrow();
        live.filter(|_| session == self.session)
    }

    /// Waits until the leader says whether this is the live session of the node; it may change its mind, or be another one.
    pub async fn standing(&self, wanted: bool) {
        let mut standing = self.contact.standing.subscribe();
        let said =
            standing.wait_for(|(session, live)| (*session, *live) == (self.session, Some(wanted)));
        // The sender is in the contact, which is held here.
        let _ = said.await;
    }

    /// Waits until a report of the node may be taken in: each enters the log. It counts over its sessions.
    pub async fn pace(&self) {
        let until = {
            let even = self.contact.even.lock();
            let mut even = even.unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let next = even.unwrap_or(now).max(now) + Duration::from_secs(1) / REPORTS_PER_S;
            *even = Some(next);
            let burst = Duration::from_secs(1) * REPORTS_BURST / REPORTS_PER_S;
            next - burst.min(next - now)
        };
        tokio::time::sleep_until(until).await;
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.contact.session.store(0, Ordering::Release);
        self.changed.notify_one();
    }
}

impl Contacts {
    /// Claims the one live session of a node; `None` where another has it.
    pub fn claim(&self, node: &str) -> Option<Live> {
        self.claim_for(node, true)
    }

    /// The same for a session that is with another replica.
    pub fn claim_for_another(&self, node: &str) -> Option<Live> {
        self.claim_for(node, false)
    }

    fn claim_for(&self, node: &str, own: bool) -> Option<Live> {
        // Held to the end: nobody else claims meanwhile.
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let contact = nodes.entry(node.to_owned()).or_default().clone();
        if contact.session.load(Ordering::Acquire) != 0 {
            return None;
        }
        let session = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        // An agent that begins anew counts anew. Before the session has its number: whoever reads that finds no earlier heartbeat.
        contact.beat.store(0, Ordering::Release);
        contact.own.store(own, Ordering::Release);
        contact.session.store(session, Ordering::Release);
        self.changed.notify_one();
        let changed = self.changed.clone();
        Some(Live {
            contact,
            session,
            changed,
        })
    }

    /// Waits until a session of this replica has begun or ended. One waits.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The sessions that are with this replica.
    pub fn own_sessions(&self) -> Vec<Known> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = nodes.iter().filter_map(|(node, contact)| {
            let session = contact.session.load(Ordering::Acquire);
            let own = contact.own.load(Ordering::Acquire);
            (session != 0 && own).then(|| Known {
                node: node.clone(),
                session,
                beat: contact.beat.load(Ordering::Acquire),
            })
        });
        known.collect()
    }

    /// The leader says whether a session that is with this replica is the node's live one.
    pub fn stand(&self, node: &str, session: u64, live: bool) {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(contact) = nodes.get(node) {
            contact.standing.send_replace((session, Some(live)));
        }
    }

    /// The latest heartbeats of all live sessions.
    pub fn beats(&self) -> Vec<Beat> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let losing = self.losing.lock().unwrap_or_else(PoisonError::into_inner);
        let beats = nodes.iter().filter_map(|(node, contact)| {
            // In this order: a heartbeat of a later session than this is granted to nobody.
            let session = contact.session.load(Ordering::Acquire);
            let number = contact.beat.load(Ordering::Acquire);
            (session != 0 && number > 0 && !losing.contains(node)).then(|| Beat {
                node: node.clone(),
                session,
                number,
                arrived: contact.last_ms.load(Ordering::Relaxed),
            })
        });
        beats.collect()
    }

    /// A node's lease is renewed, in answer to a heartbeat.
    pub fn grant(&self, beat: &Beat) {
        self.granted(&beat.node, beat.session, beat.number);
    }

    /// The same where the leader said so.
    pub fn granted(&self, node: &str, session: u64, number: u64) {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(contact) = nodes.get(node) {
            contact.granted.send_replace((session, number));
        }
    }

    /// From now on these nodes get no leases: they are being taken for lost.
    pub fn hold(&self, nodes: BTreeSet<String>) {
        *self.losing.lock().unwrap_or_else(PoisonError::into_inner) = nodes;
    }

    /// What was granted so far.
    pub fn keep(&self, granted: Option<(u64, i64, &BTreeMap<String, i64>)>) {
        let granted =
            granted.map(|(term, since, granted)| (term, since, Arc::new(granted.clone())));
        *self.leases.lock().unwrap_or_else(PoisonError::into_inner) = granted;
    }

    /// From now on these data keys cannot be opened here.
    pub fn close(&self, keys: Arc<BTreeSet<String>>) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// What was heard not long ago, for readers: they share it.
    pub fn heard_lately(&self) -> Arc<Heard> {
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        if lately.now == 0 || boot_millis() - lately.now > LATELY_MS {
            *lately = Arc::new(self.heard(boot_millis(), now_millis()));
        }
        lately.clone()
    }

    /// What was heard, for duties, at a moment of the boot clock and of that of people.
    pub fn heard(&self, now: i64, wall: i64) -> Heard {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let last = nodes
            .iter()
            .map(|(name, contact)| (name.clone(), contact.last_ms.load(Ordering::Relaxed)));
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        Heard {
            leading: leases.as_ref().map(|(term, since, _)| (*term, *since)),
            granted: leases
                .clone()
                .map(|(_, _, granted)| granted)
                .unwrap_or_default(),
            now,
            wall,
            last: last.filter(|(_, last)| *last > 0).collect(),
            closed: self
                .closed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            ..Heard::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reports_beyond_a_burst_wait_whatever_session_they_come_in() {
        let (contacts, begin) = (Contacts::default(), Instant::now());
        for _ in 0..REPORTS_BURST + 10 {
            contacts.claim("nodes/a").unwrap().pace().await;
        }
        let least = Duration::from_secs(1) * 9 / REPORTS_PER_S;
        assert!(begin.elapsed() >= least);
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "the burst did not"
        );
    }

    #[test]
    fn a_node_has_one_live_session_and_is_alive_once_heard() {
        let contacts = Contacts::default();
        let live = contacts.claim("nodes/a").unwrap();
        assert!(contacts.claim("nodes/a").is_none());
        assert!(!contacts.heard(5, 0).is_alive("nodes/a"));
        live.heard(5);
        assert!(contacts.heard(5, 0).is_alive("nodes/a"));
        drop(live);
        assert!(contacts.claim("nodes/a").is_some());
    }

    #[test]
    fn grants_of_one_session_are_not_for_the_next() {
        let contacts = Contacts::default();
        let first = contacts.claim("nodes/a").unwrap();
        first.beat(7, 5);
        let beats = contacts.beats();
        drop(first);
        assert_eq!(contacts.beats(), []);
        let second = contacts.claim("nodes/a").unwrap();
        contacts.grant(&beats[0]);
        assert_eq!(second.granted(), 0);
        second.beat(1, 6);
        contacts.grant(&contacts.beats()[0]);
        assert_eq!(second.granted(), 1);
    }

    #[tokio::test]
    async fn what_is_with_another_replica_is_claimed_and_not_told_of() {
        let contacts = Contacts::default();
        let theirs = contacts.claim_for_another("nodes/a").unwrap();
        assert!(contacts.claim("nodes/a").is_none());
        assert_eq!(contacts.own_sessions(), []);
        drop(theirs);
        let live = contacts.claim("nodes/a").unwrap();
        let own = contacts.own_sessions();
        assert_eq!((own[0].node.as_str(), own[0].beat), ("nodes/a", 0));
        contacts.stand("nodes/a", own[0].session + 1, false);
        contacts.stand("nodes/a", own[0].session, true);
        live.standing(true).await;
    }
}
