//! Watches: what there is, then what every revision changes, for as long as the watcher keeps up.
//!
//! All that one revision changed goes in one message, as it was at that revision. Nothing is stored up for a watcher but
//! what the hub remembers for everyone.

use std::sync::Arc;
use std::time::Duration;

use batchai_common::error::ApiError;
use batchai_common::names::{Kind as Noun, Name};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::faults::Faults;
use super::views::Resource;
use super::{Api, Replies};
use crate::replica::hub::{Follower, Revision, Topic};
use crate::state::{Event, State};

/// Messages that a watcher has not taken yet.
const OUTBOX_MAX: usize = 4;
/// What exists at the beginning goes in parts of about this size: a message has a bound.
const PART_BYTES_MAX: usize = 2 << 20;
/// A watcher that takes nothing for so long is cut off.
const SLOW_MAX: Duration = Duration::from_secs(30);

/// How the messages of one kind of watch are made: of a revision, what changed, and the names of what was deleted.
pub type Reply<M, R> = fn(i64, Vec<M>, Vec<String>) -> R;

type Outbox<R> = mpsc::Sender<Result<R, Status>>;

impl Api {
    /// Begins a watch of one resource or, where its name has dashes for ids, of many.
    pub(super) async fn watch<M: Resource, R: Send + 'static>(
        &self,
        name: &str,
        revision: i64,
        reply: Reply<M, R>,
    ) -> Result<Response<Replies<R>>, Status> {
        let mut faults = Faults::default();
        let pattern = faults.pattern("name", M::KIND, name);
        if revision < 0 {
            faults.invalid("revision", "must not be negative");
        }
        let pattern = faults.finish(pattern)?;
        // Followed before it is looked at, so that nothing falls in between.
        let topic = match pattern.is_pattern() {
            true => Topic::Kind(M::KIND),
            false => Topic::Resource(pattern.to_string()),
        };
        let follower = self.replica.hub().follow(topic);
        let state = self.read().await?;
        let absent = !pattern.is_pattern() && !state.contains(M::KIND, pattern.as_str());
        if absent && revision == 0 {
            return Err(super::not_found(M::KIND, &pattern).into());
        }
        let mut watcher = Watcher {
            api: self.clone(),
            pattern,
            follower,
            seen: revision,
            reply,
        };
        let backlog = match revision {
            0 => Vec::new(),
            _ => watcher.backlog(state.revision)?,
        };
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX + 1);
        // Room for the last word to who takes nothing.
        let last = outbox.clone().reserve_owned().await;
        let last = last.map_err(|_| Status::cancelled("the watcher is gone"))?;
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let end = tokio::select! {
                end = watcher.run(state, backlog, &outbox) => end,
                () = outbox.closed() => return,
                () = shutdown.cancelled() => Err(super::draining()),
            };
            if let Err(error) = end {
                last.send(Err(error.into()));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

struct Watcher<M, R> {
    api: Api,
    pattern: Name,
    follower: Follower,
    /// The last revision that the watcher knows.
    seen: i64,
    reply: Reply<M, R>,
}

/// Whether anything can follow.
#[derive(PartialEq)]
enum Next {
    More,
    Over,
}

impl<M: Resource, R> Watcher<M, R> {
    async fn run(
        &mut self,
        state: State,
        backlog: Vec<Arc<Revision>>,
        outbox: &Outbox<R>,
    ) -> Result<(), ApiError> {
        if self.seen == 0 && self.existing(&state, outbox).await? == Next::Over {
            return Ok(());
        }
        drop(state);
        let mut revisions = backlog;
        loop {
            for revision in revisions {
                if self.pass_on(&revision, outbox).await? == Next::Over {
                    return Ok(());
                }
            }
            let next = self.follower.next().await;
            revisions = match next.map_err(|_| super::draining())? {
                Some(revision) => vec![revision],
                // It was too slow for the live ones; perhaps not for what is remembered.
                None => self.backlog(i64::MAX)?,
            };
        }
    }

    fn backlog(&self, latest: i64) -> Result<Vec<Arc<Revision>>, ApiError> {
        let forgotten = |oldest| ApiError::Forgotten {
            revision: self.seen,
            oldest,
            latest: self.api.replica.published().borrow().state.revision,
        };
        if self.seen > latest {
            return Err(forgotten(latest));
        }
        let since = self.api.replica.hub().since(self.seen);
        since.map_err(|oldest| forgotten(oldest.0))
    }

    /// Sends what there is.
    async fn existing(&mut self, state: &State, outbox: &Outbox<R>) -> Result<Next, ApiError> {
        let heard = self.api.contacts.heard();
        let (mut part, mut bytes, mut next) = (Vec::new(), 0, Next::More);
        for name in state.names(M::KIND, self.pattern.prefix(), "") {
            if !self.pattern.covers(name) {
                continue;
            }
            if let Some(resource) = M::view(state, &heard, name) {
                next = self.next(Some(&resource));
                bytes += resource.encoded_len();
                part.push(resource);
            }
            if bytes > PART_BYTES_MAX {
                bytes = 0;
                let part = std::mem::take(&mut part);
                self.send(outbox, (self.reply)(0, part, Vec::new())).await?;
            }
        }
        self.seen = state.revision;
        self.send(outbox, (self.reply)(self.seen, part, Vec::new()))
            .await?;
        Ok(next)
    }

    /// Sends what a revision changed, if that is asked for and not known.
    async fn pass_on(&mut self, revision: &Revision, outbox: &Outbox<R>) -> Result<Next, ApiError> {
        let state = &revision.state;
        if state.revision <= self.seen {
            return Ok(Next::More);
        }
        self.seen = state.revision;
        let mut names: Vec<_> = revision
            .events
            .iter()
            .filter_map(|event| match event {
                Event::Changed { name } | Event::Deleted { name } => Some(name),
                Event::Assigned { .. } => None,
            })
            .filter(|name| Noun::of(name) == Some(M::KIND) && self.pattern.covers(name))
            .collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Ok(Next::More);
        }
        let heard = self.api.contacts.heard();
        let (mut changed, mut deleted) = (Vec::new(), Vec::new());
        let mut next = Next::More;
        for name in names {
            let resource = M::view(state, &heard, name);
            next = self.next(resource.as_ref());
            match resource {
                Some(resource) => changed.push(resource),
                None => deleted.push(name.clone()),
            }
        }
        self.send(outbox, (self.reply)(self.seen, changed, deleted))
            .await?;
        Ok(next)
    }

    /// The watch of a single resource ends with it.
    fn next(&self, resource: Option<&M>) -> Next {
        match resource {
            _ if self.pattern.is_pattern() => Next::More,
            Some(resource) if !resource.is_over() => Next::More,
            _ => Next::Over,
        }
    }

    async fn send(&self, outbox: &Outbox<R>, reply: R) -> Result<(), ApiError> {
        match tokio::time::timeout(SLOW_MAX, outbox.send(Ok(reply))).await {
            // Who is gone needs no more; the stream's end is seen elsewhere.
            Ok(_) => Ok(()),
            Err(_) => Err(ApiError::Forgotten {
                revision: self.seen,
                oldest: self.seen,
                latest: self.api.replica.published().borrow().state.revision,
            }),
        }
    }
}
