//! Wakes those who wait for a resource to change. It carries revisions only: who wakes reads the published State.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::state::Event;

/// What can be waited for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// A resource, by full name.
    Resource(String),
    /// The assignments of a node, by full name.
    Assignments(String),
}

/// Who waits for what.
#[derive(Default)]
pub struct Hub {
    topics: Mutex<HashMap<Topic, watch::Sender<i64>>>,
}

impl Hub {
    /// Wakes whenever the topic changed after this call.
    pub fn subscribe(&self, topic: Topic) -> watch::Receiver<i64> {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        topics
            .entry(topic)
            .or_insert_with(|| watch::Sender::new(0))
            .subscribe()
    }

    /// Called with the events of commands whose State is published.
    pub fn notify(&self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            let (topic, revision) = match event {
                Event::Changed { name, revision } | Event::Deleted { name, revision } => {
                    (Topic::Resource(name), revision)
                }
                Event::Assigned { node, revision } => (Topic::Assignments(node), revision),
            };
            if topics
                .get(&topic)
                .is_some_and(|sender| sender.send(revision).is_err())
            {
                topics.remove(&topic);
            }
        }
    }
}
