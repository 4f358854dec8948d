//! Watches: what there is, then what every revision changes, for as long as the watcher keeps up.
//!
//! All that one revision changed goes in one message, as it was at that revision. Nothing is stored up for a watcher but
//! what the hub remembers for everyone.

use std::collections::BTreeSet;
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
const OUTBOX_MAX: usize = 1;
/// What exists at the beginning goes in parts of about this size.
const PART_BYTES_MAX: usize = 256 << 10;
/// A watcher that takes nothing for so long is cut off.
const SLOW_MAX: Duration = Duration::from_secs(30);
/// So long it may take to come to the present.
const CATCH_UP_MAX: Duration = Duration::from_secs(300);
/// A watcher that has nothing to see is told this often how far it has come, so that it can go on from there.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

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
        let mut watcher = Watcher {
            api: self.clone(),
            follower,
            seen: revision,
            told: revision,
            reply,
            pattern,
        };
        let backlog = match revision {
            0 => Vec::new(),
            _ => watcher.backlog(state.revision)?,
        };
        let pattern = &watcher.pattern;
        let known = |revision: &Arc<Revision>| !watcher.names(revision).is_empty();
        let absent = !pattern.is_pattern() && !state.contains(M::KIND, pattern.as_str());
        if absent && !backlog.iter().any(known) {
            return Err(super::not_found(M::KIND, pattern).into());
        }
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX + 1);
        // Room for the last word to who takes nothing.
        let last = outbox.clone().reserve_owned().await;
        let last = last.map_err(|_| Status::cancelled("the watcher is gone"))?;
        let (api, shutdown) = (self.clone(), self.shutdown.clone());
        api.may_show(M::KIND)?;
        tokio::spawn(async move {
            let deposed = async {
                api.replica.deposed().await;
                // Watches of what needs no leader go on.
                match api.may_show(M::KIND) {
                    Err(error) => error,
                    Ok(()) => std::future::pending().await,
                }
            };
            let end = tokio::select! {
                end = watcher.run(state, backlog, &outbox) => end,
                () = outbox.closed() => return,
                error = deposed => Err(error),
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
    /// Up to here nothing is missing.
    seen: i64,
    /// The last revision that the watcher was told.
    told: i64,
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
        state: Arc<State>,
        backlog: Vec<Arc<Revision>>,
        outbox: &Outbox<R>,
    ) -> Result<(), ApiError> {
        let caught_up = self.catch_up(state, backlog, outbox);
        let caught_up = tokio::time::timeout(CATCH_UP_MAX, caught_up).await;
        let mut next = caught_up.map_err(|_| self.too_slow())??;
        while next == Next::More {
            // Nothing of it has happened up to here, however much of other things has.
            if let Some(latest) = self.api.replica.hub().caught_up(&self.follower) {
                self.seen = self.seen.max(latest);
            }
            let waited = tokio::time::timeout(PROGRESS_INTERVAL, self.follower.next()).await;
            let revisions = match waited {
                Err(_) => {
                    next = self.progress(outbox).await?;
                    continue;
                }
                Ok(Err(_)) => return Err(super::draining()),
                Ok(Ok(Some(revision))) => vec![revision],
                // It was too slow for the live ones; perhaps not for what is remembered.
                Ok(Ok(None)) => self.backlog(i64::MAX)?,
            };
            next = self.pass_on_all(revisions, outbox).await?;
        }
        Ok(())
    }

    /// Sends what there is, or what has happened since.
    async fn catch_up(
        &mut self,
        state: Arc<State>,
        backlog: Vec<Arc<Revision>>,
        outbox: &Outbox<R>,
    ) -> Result<Next, ApiError> {
        if self.seen == 0 {
            return self.existing(&state, outbox).await;
        }
        if self.pass_on_all(backlog, outbox).await? == Next::Over {
            return Ok(Next::Over);
        }
        let heard = self.api.contacts.heard_lately();
        let single = M::view(&state, &heard, self.pattern.as_str());
        Ok(self.next(single.as_ref()))
    }

    async fn pass_on_all(
        &mut self,
        revisions: Vec<Arc<Revision>>,
        outbox: &Outbox<R>,
    ) -> Result<Next, ApiError> {
        for revision in revisions {
            if self.pass_on(&revision, outbox).await? == Next::Over {
                return Ok(Next::Over);
            }
        }
        Ok(Next::More)
    }

    async fn progress(&mut self, outbox: &Outbox<R>) -> Result<Next, ApiError> {
        match self.seen > self.told {
            true => self.send(outbox, self.seen, Vec::new(), Vec::new()).await,
            false => Ok(Next::More),
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

    async fn existing(&mut self, state: &State, outbox: &Outbox<R>) -> Result<Next, ApiError> {
        let heard = self.api.contacts.heard_lately();
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
                if self.send(outbox, 0, part, Vec::new()).await? == Next::Over {
                    return Ok(Next::Over);
                }
            }
        }
        self.seen = state.revision;
        match self.send(outbox, state.revision, part, Vec::new()).await? {
            Next::More => Ok(next),
            Next::Over => Ok(Next::Over),
        }
    }

    /// What a revision changed of what is asked for.
    fn names<'r>(&self, revision: &'r Revision) -> BTreeSet<&'r String> {
        let names = revision.events.iter().filter_map(|event| match event {
            Event::Changed { name } | Event::Deleted { name } => Some(name),
            Event::Assigned { .. } => None,
        });
        names
            .filter(|name| Noun::of(name) == Some(M::KIND) && self.pattern.covers(name))
            .collect()
    }

    /// Sends what a revision changed, if that is asked for and not known.
    async fn pass_on(&mut self, revision: &Revision, outbox: &Outbox<R>) -> Result<Next, ApiError> {
        let state = &revision.state;
        if state.revision <= self.seen {
            return Ok(Next::More);
        }
        let names = self.names(revision);
        if names.is_empty() {
            self.seen = state.revision;
            return Ok(Next::More);
        }
        let heard = self.api.contacts.heard_lately();
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
        let sent = self.send(outbox, state.revision, changed, deleted).await?;
        self.seen = state.revision;
        match sent {
            Next::More => Ok(next),
            Next::Over => Ok(Next::Over),
        }
    }

    /// The watch of a single resource ends with it.
    fn next(&self, resource: Option<&M>) -> Next {
        match resource {
            _ if self.pattern.is_pattern() => Next::More,
            Some(resource) if !resource.is_over() => Next::More,
            _ => Next::Over,
        }
    }

    async fn send(
        &mut self,
        outbox: &Outbox<R>,
        revision: i64,
        changed: Vec<M>,
        deleted: Vec<String>,
    ) -> Result<Next, ApiError> {
        let reply = (self.reply)(revision, changed, deleted);
        match tokio::time::timeout(SLOW_MAX, outbox.send(Ok(reply))).await {
            Ok(Ok(())) => {
                self.told = self.told.max(revision);
                Ok(Next::More)
            }
            // Who is gone needs no more.
            Ok(Err(_)) => Ok(Next::Over),
            Err(_) => Err(self.too_slow()),
        }
    }

    fn too_slow(&self) -> ApiError {
        ApiError::TooSlow {
            revision: self.told,
        }
    }
}
