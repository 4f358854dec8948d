//! Performs the leader's duties: asks `duties` what the State calls for, and proposes it.
//!
//! It remembers nothing. A command that is rejected was overtaken; the next look at the State decides anew.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::agents::contacts::Contacts;
use crate::duties::{Leader, duties};
use crate::logs::LogStore;
use crate::replica::Handle;
use crate::state::attempts::Phase;

/// What depends on time alone (nodes that fall silent, deadlines) is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Looks between two sweeps of the log files.
const SWEEP_EVERY: u32 = 20;

/// Runs until the replica stops or the token is cancelled.
pub async fn run(
    replica: Handle,
    contacts: Contacts,
    logs: LogStore,
    leader: Leader,
    shutdown: CancellationToken,
) {
    let mut published = replica.published();
    let mut interval = tokio::time::interval(LOOK_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = 0;
    loop {
        tokio::select! {
            changed = published.changed() => if changed.is_err() { return },
            _ = interval.tick() => {
                looks += 1;
                if looks % SWEEP_EVERY == 0 {
                    sweep(&logs, &replica).await;
                }
            }
            () = shutdown.cancelled() => return,
        }
        let (state, leads) = {
            let seen = published.borrow_and_update();
            (seen.state.clone(), seen.leads)
        };
        if !leads {
            continue;
        }
        for result in replica
            .propose_all(duties(&state, &contacts.heard(), &leader))
            .await
        {
            if let Err(error) = result {
                tracing::debug!(%error, "a duty was overtaken");
            }
        }
    }
}

/// Removes the log files of attempts that the State does not know.
async fn sweep(logs: &LogStore, replica: &Handle) {
    let (logs, published) = (logs.clone(), replica.published());
    let sweep = move || {
        // Listed before the State is looked at: an attempt that begins in between is not taken for unknown.
        let kept = logs.attempts()?;
        let state = published.borrow().state.clone();
        // Before the first command nothing is known.
        if state.ensemble.is_empty() {
            return Ok(());
        }
        let phase = |id: &str| state.attempts.get(id).map(|attempt| attempt.phase);
        logs.close(|id| phase(id).is_none_or(|phase| phase == Phase::Ended));
        logs.remove(kept.into_iter().filter(|id| phase(id).is_none()))
    };
    match tokio::task::spawn_blocking(sweep).await {
        Ok(Err(error)) => tracing::warn!(%error, "cannot sweep the log files"),
        Err(error) => tracing::error!(%error, "sweeping the log files failed"),
        Ok(Ok(())) => {}
    }
}
