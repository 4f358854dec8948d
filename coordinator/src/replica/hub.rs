//! What changed, for those who want to know: live, and as far back as is remembered.
//!
//! Each revision travels with the State it led to, so that all of what it changed can be shown together, as it was then.
//! Who is too slow is not waited for: it misses revisions, and is told so.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use batchai_common::names::Kind;
use prost::Message as _;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use crate::state::{Event, State};

/// Revisions that are remembered, and about how much of memory they take: each keeps what it changed.
const HISTORY_MAX: usize = 1024;
const HISTORY_BYTES_MAX: usize = 32 << 20;
/// What a change costs beside the resource itself: a piece of each ordered map that it went through.
const CHANGE_BYTES: usize = 4 << 10;
/// What one node of an attempt costs.
const ATTEMPT_NODE_BYTES: usize = 256;
/// Revisions that a follower of one resource, or of all of a kind, may be behind: as many as one batch brings at once.
const REVISIONS_BACKLOG_MAX: usize = 256;
/// Who follows assignments looks at the latest only: there may be one for every node.
const ASSIGNMENTS_BACKLOG_MAX: usize = 16;
/// Topics that nobody follows any more are looked for when there are so many, or twice as many as there were then.
const TOPICS_SWEEP_MIN: usize = 64;

/// What can be followed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// A resource, by full name.
    Resource(String),
    /// All resources of a kind.
    Kind(Kind),
    /// The assignments of a node, by full name.
    Assignments(String),
}

/// A revision that changed something.
#[derive(Debug)]
pub struct Revision {
    /// What it led to.
    pub state: Arc<State>,
    /// What it changed.
    pub events: Vec<Event>,
}

impl Revision {
    /// About how much memory it keeps that nothing else does.
    fn bytes(&self) -> usize {
        let cost = |event: &Event| match event {
            Event::Changed { name } => self.state.jobs.get(name.as_str()).map_or(0, |job| {
                let attempt = job
                    .attempt
                    .as_ref()
                    .and_then(|id| self.state.attempts.get(id));
                let nodes = attempt.map_or(0, |attempt| attempt.nodes.len());
                job.spec.encoded_len() + nodes * ATTEMPT_NODE_BYTES
            }),
            Event::Deleted { .. } | Event::Assigned { .. } => 0,
        };
        let costs = self.events.iter().map(|event| CHANGE_BYTES + cost(event));
        costs.sum()
    }

    fn topics(&self) -> HashSet<Topic> {
        let topics = self.events.iter().flat_map(|event| match event {
            Event::Changed { name } | Event::Deleted { name } => {
                let kind = Kind::of(name).map(Topic::Kind);
                [Some(Topic::Resource(name.clone())), kind]
            }
            Event::Assigned { node } => [Some(Topic::Assignments(node.clone())), None],
        });
        topics.flatten().collect()
    }
}

/// Revisions are missing: those up to this one are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgotten(pub i64);

/// Who follows what, and what was.
#[derive(Default)]
pub struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    topics: HashMap<Topic, broadcast::Sender<Arc<Revision>>>,
    sweep_at: usize,
    history: VecDeque<(usize, Arc<Revision>)>,
    history_bytes: usize,
    /// The last revision that anyone was told of.
    latest: i64,
    /// The last revision that is forgotten.
    forgotten: i64,
}

impl Hub {
    /// Follows a topic from now on.
    pub fn follow(&self, topic: Topic) -> Follower {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.topics.len() >= inner.sweep_at {
            inner.topics.retain(|_, sender| sender.receiver_count() > 0);
            inner.sweep_at = TOPICS_SWEEP_MIN.max(inner.topics.len() * 2);
        }
        let backlog = match topic {
            Topic::Kind(_) | Topic::Resource(_) => REVISIONS_BACKLOG_MAX,
            Topic::Assignments(_) => ASSIGNMENTS_BACKLOG_MAX,
        };
        let sender = inner.topics.entry(topic);
        let sender = sender.or_insert_with(|| broadcast::Sender::new(backlog));
        Follower {
            revisions: sender.subscribe(),
        }
    }

    /// The revisions behind one, in their order.
    pub fn since(&self, revision: i64) -> Result<Vec<Arc<Revision>>, Forgotten> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if revision < inner.forgotten {
            return Err(Forgotten(inner.forgotten));
        }
        let from = inner
            .history
            .partition_point(|(_, known)| known.state.revision <= revision);
        let since = inner.history.range(from..);
        Ok(since.map(|(_, known)| known.clone()).collect())
    }

    /// One revision, if it is remembered.
    pub fn at(&self, revision: i64) -> Option<Arc<Revision>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |known: &(usize, Arc<Revision>)| known.1.state.revision;
        let found = inner.history.binary_search_by_key(&revision, known).ok()?;
        Some(inner.history[found].1.clone())
    }

    /// Up to which revision a follower has seen everything of its topic; none where something waits for it.
    pub fn caught_up(&self, follower: &Follower) -> Option<i64> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        follower.revisions.is_empty().then_some(inner.latest)
    }

    /// Called when the State has jumped, by a snapshot, to a revision: what led there is not known. Whoever follows begins anew.
    pub fn jump(&self, revision: i64) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.topics.clear();
        inner.history.clear();
        inner.history_bytes = 0;
        (inner.latest, inner.forgotten) = (revision, revision);
    }

    /// Called when nothing will change any more: whoever follows learns it.
    pub fn close(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.topics.clear();
    }

    /// Called with revisions that are published.
    pub fn notify(&self, revisions: Vec<Revision>) {
        if revisions.is_empty() {
            return;
        }
        let revisions: Vec<_> = revisions
            .into_iter()
            .map(|revision| (revision.topics(), revision.bytes(), Arc::new(revision)))
            .collect();
        let mut forgotten = Vec::new();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        for (topics, bytes, revision) in revisions {
            inner.latest = revision.state.revision;
            for topic in topics {
                // Where nobody follows any more, nobody misses it.
                if let Some(sender) = inner.topics.get(&topic) {
                    let _ = sender.send(revision.clone());
                }
            }
            inner.history_bytes += bytes;
            inner.history.push_back((bytes, revision));
            while inner.history.len() > HISTORY_MAX
                || (inner.history_bytes > HISTORY_BYTES_MAX && inner.history.len() > 1)
            {
                let Some((bytes, oldest)) = inner.history.pop_front() else {
                    break;
                };
                inner.history_bytes -= bytes;
                inner.forgotten = oldest.state.revision;
                forgotten.push(oldest);
            }
        }
        // What they alone keep is freed when nobody has to wait for it.
        drop(inner);
        drop(forgotten);
    }
}

/// The replica has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// Follows one topic.
pub struct Follower {
    revisions: broadcast::Receiver<Arc<Revision>>,
}

impl Follower {
    /// The next revision; `None` where this follower was too slow and has missed some.
    pub async fn next(&mut self) -> Result<Option<Arc<Revision>>, Stopped> {
        match self.revisions.recv().await {
            Ok(revision) => Ok(Some(revision)),
            Err(RecvError::Lagged(_)) => Ok(None),
            Err(RecvError::Closed) => Err(Stopped),
        }
    }

    /// Waits for a change, for who then looks at the published State: however many there were, it is one.
    pub async fn changed(&mut self) -> Result<(), Stopped> {
        self.next().await?;
        while !matches!(
            self.revisions.try_recv(),
            Err(TryRecvError::Empty | TryRecvError::Closed)
        ) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision(number: i64, name: &str) -> Revision {
        let state = Arc::new(State {
            revision: number,
            ..State::default()
        });
        let name = name.to_owned();
        Revision {
            state,
            events: vec![Event::Changed { name }],
        }
    }

    #[tokio::test]
    async fn a_follower_gets_every_revision_of_its_topic_or_learns_that_it_missed_some() {
        let hub = Hub::default();
        let mut one = hub.follow(Topic::Resource("nodes/a".into()));
        let mut all = hub.follow(Topic::Kind(Kind::Node));
        hub.notify(vec![revision(1, "nodes/a"), revision(2, "nodes/b")]);
        let number = |found: Option<Arc<Revision>>| found.unwrap().state.revision;
        assert_eq!(number(one.next().await.unwrap()), 1);
        assert_eq!(number(all.next().await.unwrap()), 1);
        assert_eq!(number(all.next().await.unwrap()), 2);
        let burst = 3..=2 + REVISIONS_BACKLOG_MAX as i64 + 1;
        hub.notify(burst.map(|number| revision(number, "nodes/a")).collect());
        assert_eq!(hub.caught_up(&one), None);
        assert!(one.next().await.unwrap().is_none(), "it missed one");
        one.changed().await.unwrap();
        assert!(one.revisions.is_empty(), "one wake for all of them");
        let latest = 2 + REVISIONS_BACKLOG_MAX as i64 + 1;
        assert_eq!(hub.caught_up(&one), Some(latest));
        assert_eq!(hub.at(latest).unwrap().state.revision, latest);
        assert!(hub.at(latest + 1).is_none());
        hub.close();
        assert_eq!(one.next().await.unwrap_err(), Stopped);
    }

    #[test]
    fn history_is_bounded_and_knows_what_it_forgot() {
        let hub = Hub::default();
        let last = HISTORY_MAX as i64 + 10;
        hub.notify(
            (1..=last)
                .map(|number| revision(number, "nodes/a"))
                .collect(),
        );
        assert_eq!(hub.since(9).unwrap_err(), Forgotten(10));
        let since = hub.since(10).unwrap();
        assert_eq!(since.len(), HISTORY_MAX);
        assert_eq!(since[0].state.revision, 11);
        assert!(hub.since(last).unwrap().is_empty());
        // Large ones are fewer.
        let hub = Hub::default();
        let events = vec![
            Event::Deleted {
                name: "nodes/a".into()
            };
            HISTORY_BYTES_MAX / CHANGE_BYTES / 4
        ];
        for number in 1..=10 {
            let state = Arc::new(State {
                revision: number,
                ..State::default()
            });
            let events = events.clone();
            hub.notify(vec![Revision { state, events }]);
        }
        assert_eq!(hub.since(6).unwrap().len(), 4);
        assert_eq!(hub.since(5).unwrap_err(), Forgotten(6));
    }

    #[test]
    fn topics_that_nobody_follows_are_forgotten() {
        let hub = Hub::default();
        for number in 0..10 * TOPICS_SWEEP_MIN {
            drop(hub.follow(Topic::Resource(format!("nodes/{number}"))));
        }
        assert!(hub.inner.lock().unwrap().topics.len() <= TOPICS_SWEEP_MIN);
    }
}
