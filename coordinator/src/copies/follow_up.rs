//! Sees to it that this replica has what it should have, as long as it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use batchai_common::names::last_id;
use batchai_proto::internal::v1::{KnownLog, LogsCopy};
use tokio_util::sync::CancellationToken;

use super::Copies;
use super::fetch::Ways;
use crate::state::State;
use crate::state::attempts::{Attempt, Phase};

const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// What is not there yet is asked for again after so long, then after twice as long, and so on.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// The nodes send what they have to the leader: it asks others only when that has not come for so long.
const PAUSE_LEADER: Duration = Duration::from_secs(8);
/// When nobody has it for so long, nobody will.
const PAUSE_MAX: Duration = Duration::from_secs(64);

/// What is still to be seen to.
#[derive(Default)]
struct Pending {
    /// Attempts whose logs are here, as far as anybody has them.
    done: BTreeSet<String>,
    /// When those of others are looked at again, and how long the pause after that is.
    later: BTreeMap<String, (Instant, Duration)>,
    revision: Option<i64>,
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
        let mut pending = Pending::default();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = shutdown.cancelled() => return,
            }
            tokio::select! {
                () = self.look(&mut pending) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn look(&self, pending: &mut Pending) {
        let (state, leads) = {
            let published = self.replica.published();
            let seen = published.borrow();
            (seen.state.clone(), seen.leads)
        };
        let changed = pending.revision != Some(state.revision);
        if self.others().is_empty() || (!changed && pending.later.is_empty()) {
            return;
        }
        pending.revision = Some(state.revision);
        self.look_at_bundles(&state).await;
        let first = if leads { PAUSE_LEADER } else { PAUSE_FIRST };
        let mut ways = Ways::default();
        for attempt in due(&state, pending, first) {
            let pause = pending
                .later
                .get(&attempt.id)
                .map_or(first, |(_, pause)| *pause);
            let over = match self.look_at_logs(&attempt, &mut ways).await {
                Seen::All => true,
                Seen::NoMore => pause >= PAUSE_MAX,
                Seen::Unknown => false,
            };
            if over {
                pending.later.remove(&attempt.id);
                pending.done.insert(attempt.id.clone());
            } else {
                let next = Instant::now() + pause;
                let pause = (2 * pause).min(PAUSE_MAX);
                pending.later.insert(attempt.id.clone(), (next, pause));
            }
        }
    }

    /// Those that jobs wait for or run with.
    async fn look_at_bundles(&self, state: &State) {
        let jobs = state.jobs.values().filter(|job| !job.ended());
        let named = jobs
            .map(|job| &*job.spec.bundle)
            .filter(|name| !name.is_empty());
        let named: BTreeSet<_> = named.map(last_id).collect();
        for digest in named {
            let here = self.bundles.find(digest).is_ok_and(|found| found.is_some());
            if !here && let Err(error) = self.use_bundle(digest).await {
                tracing::warn!(%error, digest, "a bundle cannot be kept here");
            }
        }
    }

    async fn look_at_logs(&self, attempt: &Attempt, ways: &mut Ways) -> Seen {
        let mut seen = Seen::NoMore;
        for (id, endpoint) in self.others() {
            let known = match self.logs.files(&attempt.id).await {
                Ok(known) => known,
                Err(error) => {
                    tracing::warn!(%error, attempt = attempt.id, "log files cannot be listed");
                    return Seen::Unknown;
                }
            };
            let known = known.into_iter().map(|file| KnownLog {
                node: format!("nodes/{}", file.node_id),
                file: file.file,
                length: i64::try_from(file.length).unwrap_or(i64::MAX),
            });
            let known: Vec<_> = known.collect();
            if !known.is_empty() && is_whole(attempt, &known) {
                return Seen::All;
            }
            let wanted = LogsCopy {
                attempt: attempt.id.clone(),
                known,
            };
            if let Err(error) = self.fetch_logs(ways, (id, &endpoint), wanted).await {
                tracing::debug!(%error, replica = id, attempt = attempt.id, "logs are not copied");
                seen = Seen::Unknown;
            }
        }
        seen
    }
}

/// All that the nodes have announced is there.
fn is_whole(attempt: &Attempt, known: &[KnownLog]) -> bool {
    let known: BTreeMap<_, _> = known
        .iter()
        .map(|log| ((&*log.node, &*log.file), log.length))
        .collect();
    let mut announced = attempt
        .nodes
        .iter()
        .flat_map(|node| node.files.iter().map(|file| (&*node.node, file)));
    announced.all(|(node, file)| {
        let length = known.get(&(node, &*file.name));
        length.is_some_and(|length| *length >= file.size_bytes)
    })
}

/// The attempts that have ended and whose logs are to be looked at now.
fn due(state: &State, pending: &mut Pending, first: Duration) -> Vec<std::sync::Arc<Attempt>> {
    let now = Instant::now();
    pending.done.retain(|id| state.attempts.contains_key(id));
    pending
        .later
        .retain(|id, _| state.attempts.contains_key(id));
    let mut due = Vec::new();
    for attempt in state.attempts.values() {
        if attempt.phase != Phase::Ended || pending.done.contains(&attempt.id) {
            continue;
        }
        match pending.later.get(&attempt.id) {
            Some((next, _)) if *next <= now => due.push(attempt.clone()),
            Some(_) => {}
            None => {
                pending
                    .later
                    .insert(attempt.id.clone(), (now + first, first));
            }
        }
    }
    due
}
