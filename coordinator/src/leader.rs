//! Performs the leader's duties: asks `duties` what the State calls for, and proposes it.
//!
//! It remembers nothing but since when attempts prepare or begin. A command that is rejected was overtaken; the next look at the State decides anew.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use batchai_common::names::last_id;
use batchai_common::time::{boot_millis, now_millis};
use batchai_proto::internal::v1::command::Kind;

use crate::agents::contacts::Contacts;
use crate::bundles::BundleStore;
use crate::duties::{Leader, duties};
use crate::logs::LogStore;
use crate::replica::Handle;
use crate::replica::peers::Peers;
use crate::scheduler::heard::Since;
use crate::secrets::Vault;
use crate::state::attempts::Phase;
use crate::state::restore;

/// What depends on time alone (nodes that fall silent, deadlines) is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Looks between two sweeps of the log files.
const SWEEP_EVERY: u32 = 20;

/// Runs until the replica stops or the token is cancelled.
pub async fn run(
    replica: Handle,
    contacts: Contacts,
    logs: LogStore,
    bundles: BundleStore,
    vault: Vault,
    (leader, peers): (Leader, Peers),
    shutdown: CancellationToken,
) {
    let mut published = replica.published();
    let mut interval = tokio::time::interval(LOOK_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = 0;
    let mut since = Since::default();
    loop {
        tokio::select! {
            changed = published.changed() => if changed.is_err() { return },
            _ = interval.tick() => {
                looks += 1;
                if looks % SWEEP_EVERY == 0 {
                    sweep(&logs, &bundles, &replica).await;
                }
            }
            () = shutdown.cancelled() => return,
        }
        let (state, leads, now) = {
            let seen = published.borrow_and_update();
            (seen.state.clone(), seen.leads, seen.term)
        };
        if !leads {
            continue;
        }
        let mut heard = contacts.heard(boot_millis(), now_millis());
        // What was granted in an earlier term says nothing: another one may have led since.
        heard.leading = heard.leading.filter(|(term, _)| *term == now);
        since.look(&state, &heard);
        heard.since = since.clone();
        heard.closed = vault.closed(&state);
        heard.replicas = peers.records();
        let duties = duties(&state, &heard, &leader);
        contacts.hold(losses(&duties));
        let results = replica.propose_all(duties, Some(now)).await;
        contacts.hold(BTreeSet::new());
        for result in results {
            if let Err(error) = result {
                tracing::debug!(%error, "a duty was overtaken");
            }
        }
    }
}

/// The nodes that are taken for lost: until that is applied, or cannot be any more, none of them gets a lease.
fn losses(duties: &[Kind]) -> BTreeSet<String> {
    let lost = duties.iter().filter_map(|duty| match duty {
        Kind::LoseNode(lost) => Some(lost.node.clone()),
        _ => None,
    });
    lost.collect()
}

/// Removes the log files of attempts that the State does not know, and the bundles that no job of it names.
async fn sweep(logs: &LogStore, bundles: &BundleStore, replica: &Handle) {
    // Listed before the State is looked at, and a State that is not behind: what is there and is not known is over.
    let Ok(kept) = on_a_thread(logs, |logs| logs.attempts()).await else {
        return;
    };
    let Ok(state) = replica.read().await else {
        return;
    };
    let bundles = bundles.clone();
    let sweep = move |logs: LogStore| {
        let used = state.jobs.values().map(|job| last_id(&job.spec.bundle));
        if let Err(error) = bundles.sweep(&used.collect()) {
            tracing::warn!(%error, "cannot sweep the bundles");
        }
        let phase = |id: &str| state.attempts.get(id).map(|attempt| attempt.phase);
        let is_stray = |id: &str| restore::of_attempt(&state, id).next().is_some();
        logs.close(|id| phase(id).is_none_or(|phase| phase == Phase::Ended));
        // What is of no job any more goes also where nothing can be given up of what is.
        if let Err(error) = crate::logs::give_up(&logs, &kept, &state, now_millis()) {
            tracing::warn!(%error, "log files cannot be kept within their bounds");
        }
        let unknown = kept.iter().filter(|id| phase(id).is_none());
        for attempt in unknown.filter(|id| !is_stray(id)) {
            if let Err(error) = logs.remove(attempt) {
                tracing::warn!(%error, attempt, "log files cannot be removed");
            }
        }
        Ok(())
    };
    // What went wrong was said; the next sweep tries again.
    let _ = on_a_thread(logs, sweep).await;
}

/// Runs what waits for the disk where it holds up nobody.
async fn on_a_thread<T: Send + 'static>(
    logs: &LogStore,
    work: impl FnOnce(LogStore) -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    let logs = logs.clone();
    let done = tokio::task::spawn_blocking(move || work(logs)).await;
    let done = done.map_err(std::io::Error::other).and_then(|done| done);
    done.inspect_err(|error| tracing::warn!(%error, "cannot sweep log files and bundles"))
}
