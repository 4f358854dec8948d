//! Sees to it that this replica has what it should have, as long as it runs. How something is fetched, `fetch` knows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use batchai_common::names::last_id;
use batchai_proto::internal::v1::{KnownLog, LogsCopy};
use tokio_util::sync::CancellationToken;

use super::fetch::{CopyError, Ways};
use super::{Copies, Found};
use crate::logs::is_whole;
use crate::state::State;
use crate::state::attempts::{self, Attempt, Phase};

/// After a change of the State it is looked for what has ended, and this often for everything.
const GATHER: Duration = Duration::from_millis(100);
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// What is not there yet is asked for again after so long, then after twice as long, and so on.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// The nodes send what they have to the leader: it asks others only when that has not come for so long.
const PAUSE_LEADER: Duration = Duration::from_secs(8);
/// When nobody has it for so long, nobody will.
const PAUSE_MAX: Duration = Duration::from_secs(64);
/// A look takes no longer than about so long: what is new goes first in the next one.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// When something is looked at next, and how long the pause after that is.
#[derive(Clone, Copy)]
struct Later {
    at: Instant,
    pause: Duration,
}

impl Later {
    fn first(wait: Duration) -> Later {
        Later {
            at: Instant::now() + wait,
            pause: PAUSE_FIRST,
        }
    }

    fn again(self) -> Later {
        Later {
            at: Instant::now() + self.pause,
            pause: (2 * self.pause).min(PAUSE_MAX),
        }
    }
}

/// What is known of the attempts that have ended.
#[derive(Default)]
struct Ended {
    /// Those whose logs are here, as far as anybody has them.
    done: BTreeSet<String>,
    later: BTreeMap<String, Later>,
    /// Those that were not over when it was looked last.
    live: BTreeSet<String>,
}

/// How a look at the logs of an attempt has ended.
enum Seen {
    All,
    /// Nobody has more.
    NoMore,
    /// Somebody could not be asked.
    Unknown,
}

impl Copies {
    /// Fetches what is missing here until the token is cancelled.
    pub async fn run(self, shutdown: CancellationToken) {
        let other = self.clone();
        tokio::select! {
            () = self.keep_logs() => {}
            () = other.keep_bundles() => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// The bundles that jobs wait for or run with.
    async fn keep_bundles(self) {
        let mut later: BTreeMap<String, Later> = BTreeMap::new();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            if self.others().is_empty() {
                continue;
            }
            let (state, store) = (self.state(), self.bundles().clone());
            // It may look at many, and waits for the disk.
            let look = move || {
                let jobs = state.jobs.values().filter(|job| !job.ended());
                let named = jobs.map(|job| last_id(&job.spec.bundle));
                let named: BTreeSet<_> = named.filter(|digest| !digest.is_empty()).collect();
                let missing = |digest: &&str| store.find(digest).is_ok_and(|here| here.is_none());
                let missing = named.into_iter().filter(missing);
                missing.map(str::to_owned).collect::<BTreeSet<_>>()
            };
            let Ok(missing) = tokio::task::spawn_blocking(look).await else {
                return;
            };
            later.retain(|digest, _| missing.contains(digest));
            for digest in missing {
                let known = later.get(&digest).copied();
                let known = known.unwrap_or_else(|| Later::first(Duration::ZERO));
                if known.at > Instant::now() {
                    continue;
                }
                match self.use_bundle(&digest).await {
                    Ok(Found::Here) => drop(later.remove(&digest)),
                    Ok(Found::Nowhere | Found::Unknown(_)) => {
                        later.insert(digest, known.again());
                    }
                    Err(error) => {
                        tracing::warn!(%error, digest, "a bundle cannot be kept here");
                        later.insert(digest, known.again());
                    }
                }
            }
        }
    }

    async fn keep_logs(self) {
        let (mut published, mut ended) = (self.parts.replica.published(), Ended::default());
        let mut all = Instant::now();
        loop {
            let until = match ended.later.is_empty() {
                true => LOOK_INTERVAL,
                false => PAUSE_FIRST,
            };
            tokio::select! {
                changed = published.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(until) => {}
            }
            // What ends at once is looked at at once.
            tokio::time::sleep(GATHER).await;
            published.mark_unchanged();
            if self.others().is_empty() {
                continue;
            }
            let (state, leads) = (self.state(), published.borrow().leads);
            let whole = Instant::now() >= all;
            let note = move || {
                note_what_ended(&state, &mut ended, leads, whole);
                let due = due(&state, &ended);
                (ended, due)
            };
            let Ok((noted, due)) = tokio::task::spawn_blocking(note).await else {
                return;
            };
            ended = noted;
            if whole {
                all = Instant::now() + LOOK_INTERVAL;
            }
            self.look_at(due, &mut ended).await;
        }
    }

    async fn look_at(&self, due: Vec<Arc<Attempt>>, ended: &mut Ended) {
        let (begin, mut ways) = (Instant::now(), Ways::default());
        for attempt in due {
            let id = &attempt.id;
            let over = match self.look_at_logs(&attempt, &mut ways).await {
                Ok(Seen::All) => true,
                Ok(Seen::NoMore) => ended.later.get(id).is_none_or(|l| l.pause >= PAUSE_MAX),
                Ok(Seen::Unknown) => false,
                Err(error) => {
                    tracing::warn!(%error, attempt = id, "logs are not copied: the disk of this replica");
                    return;
                }
            };
            if over {
                ended.later.remove(id);
                ended.done.insert(id.clone());
            } else if let Some(later) = ended.later.get_mut(id) {
                *later = later.again();
            }
            if begin.elapsed() > LOOK_MAX {
                return;
            }
        }
    }

    async fn look_at_logs(&self, attempt: &Attempt, ways: &mut Ways) -> Result<Seen, CopyError> {
        let mut seen = Seen::NoMore;
        for other in self.others() {
            let here = self.parts.logs.files(&attempt.id).await?;
            if is_whole(attempt, &here) {
                return Ok(Seen::All);
            }
            let known = here.into_iter().map(|file| KnownLog {
                node: format!("nodes/{}", file.node_id),
                file: file.file,
                length: i64::try_from(file.length).unwrap_or(i64::MAX),
            });
            let wanted = LogsCopy {
                attempt: attempt.id.clone(),
                known: known.collect(),
            };
            match self.fetch_logs(ways, &other, wanted).await {
                Ok(()) => {}
                Err(CopyError::Disk(error)) => return Err(error.into()),
                Err(error) => {
                    let (replica, attempt) = (other.id, &attempt.id);
                    tracing::debug!(%error, replica, attempt, "logs are not copied");
                    seen = Seen::Unknown;
                }
            }
        }
        let here = self.parts.logs.files(&attempt.id).await?;
        Ok(match is_whole(attempt, &here) {
            true => Seen::All,
            false => seen,
        })
    }

    fn state(&self) -> Arc<State> {
        self.parts.replica.published().borrow().state.clone()
    }
}

/// Notes the attempts that have ended since the last look; those that began and ended in between are only found where all are looked at.
fn note_what_ended(state: &State, ended: &mut Ended, leads: bool, all: bool) {
    let live: BTreeSet<_> = attempts::live(state).map(|a| a.id.clone()).collect();
    let gone = std::mem::replace(&mut ended.live, live);
    let mut new: Vec<&str> = gone.iter().map(String::as_str).collect();
    if all {
        ended.done.retain(|id| state.attempts.contains_key(id));
        ended.later.retain(|id, _| state.attempts.contains_key(id));
        new.extend(state.attempts.keys().map(String::as_str));
    }
    let over = |id: &str| {
        state
            .attempts
            .get(id)
            .is_some_and(|a| a.phase == Phase::Ended)
    };
    for id in new {
        if over(id) && !ended.done.contains(id) && !ended.later.contains_key(id) {
            let wait = if leads { PAUSE_LEADER } else { Duration::ZERO };
            ended.later.insert(id.to_owned(), Later::first(wait));
        }
    }
}

/// The newest first: what is old was copied, or has waited for long.
fn due(state: &State, ended: &Ended) -> Vec<Arc<Attempt>> {
    let now = Instant::now();
    let due = ended.later.iter().filter(|(_, later)| later.at <= now);
    let due = due.filter_map(|(id, _)| state.attempts.get(id).cloned());
    let mut due: Vec<_> = due.collect();
    due.sort_by_key(|a| std::cmp::Reverse((a.create_time.seconds, a.create_time.nanos)));
    due
}
