//! Which logs of this replica are given up: those of jobs that ended longer ago than their workspace keeps them, what is beyond its
//! quota, and what became too old while its job runs.
//!
//! What is given up keeps its length: who asks for it is told how much it was. Files themselves go with their job, not here.

use std::collections::BTreeMap;
use std::io;

use batchai_common::names::last_id;
use batchai_common::time::millis;
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;

use super::{Listed, LogStore};
use crate::state::State;
use crate::state::attempts::{Attempt, Phase};
use crate::state::keys;

/// However many ranks share a quota, so much of each file that is written is kept.
const LEAST_BYTES: u64 = 1 << 20;

/// The logs of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    attempt: String,
    workspace: String,
    /// When its job ended; none while it may go on.
    ended_ms: Option<i64>,
    disk_bytes: u64,
    files: u64,
}

/// Whether all that the nodes of an attempt have announced is there. Of what a lost one has printed nobody knows.
pub fn is_whole(attempt: &Attempt, here: &[Listed]) -> bool {
    let length = |node: &str, name: &str| {
        let here = here.iter();
        let mut here = here.filter(|file| file.file == name && last_id(node) == file.node_id);
        here.next().map(|file| file.length)
    };
    attempt.nodes.iter().all(|node| {
        let mut files = node.files.iter();
        node.phase == NodePhase::Ended
            && files.all(|file| {
                let announced = u64::try_from(file.size_bytes).unwrap_or_default();
                length(&node.node, &file.name).is_some_and(|length| length >= announced)
            })
    })
}

/// What a workspace wants of its logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Policy {
    retention_ms: Option<i64>,
    quota_bytes: Option<u64>,
}

/// Of each file of an attempt no more is kept than so many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    attempt: String,
    bytes: u64,
}

/// What is to be given up of the logs of one workspace. Those of jobs that have ended go first, the oldest before the others.
fn due(mut kept: Vec<Kept>, policy: Policy, now_ms: i64) -> Vec<Bound> {
    let all = |kept: &Kept| Bound {
        attempt: kept.attempt.clone(),
        bytes: 0,
    };
    kept.sort_by_key(|kept| (kept.ended_ms.unwrap_or(i64::MAX), kept.attempt.clone()));
    let mut bounds = Vec::new();
    let mut size: u64 = kept.iter().map(|kept| kept.disk_bytes).sum();
    for found in kept.iter().filter(|kept| kept.disk_bytes > 0) {
        let Some(ended) = found.ended_ms else {
            continue;
        };
        let late = policy
            .retention_ms
            .is_some_and(|most| now_ms.saturating_sub(ended) > most);
        let over = policy.quota_bytes.is_some_and(|most| size > most);
        if late || over {
            bounds.push(all(found));
            size -= found.disk_bytes;
        }
    }
    let Some(most) = policy.quota_bytes.filter(|most| size > *most) else {
        return bounds;
    };
    // Nothing but what is written now is left: each file gets its share.
    let running = kept.iter().filter(|kept| kept.ended_ms.is_none());
    let files: u64 = running.clone().map(|kept| kept.files).sum();
    let bytes = (most / files.max(1)).max(LEAST_BYTES);
    bounds.extend(running.map(|kept| Bound {
        attempt: kept.attempt.clone(),
        bytes,
    }));
    bounds
}

fn policy(workspace: &batchai_proto::v1::Workspace) -> Policy {
    let retention = workspace.log_retention.as_ref();
    let quota = u64::try_from(workspace.log_quota_mib).unwrap_or_default();
    Policy {
        retention_ms: retention.map(|kept| kept.seconds.saturating_mul(1000)),
        quota_bytes: (quota > 0).then_some(quota << 20),
    }
}

/// Gives up what is due of the logs of some attempts. It waits for the disk.
pub fn give_up(logs: &LogStore, attempts: &[String], state: &State, now_ms: i64) -> io::Result<()> {
    let mut by_workspace: BTreeMap<&str, Vec<Kept>> = BTreeMap::new();
    for id in attempts {
        let Some(attempt) = state.attempts.get(id) else {
            continue;
        };
        // The set-up of a node belongs to no workspace's quota.
        let Some(job) = attempt.job().and_then(|job| state.jobs.get(job)) else {
            continue;
        };
        let latest = job.attempt.as_ref() == Some(id);
        let ended_ms = match attempt.phase {
            Phase::Ended if latest => job.end_time.as_ref().map(millis),
            // It made place for another one.
            Phase::Ended => Some(0),
            _ => None,
        };
        if ended_ms.is_none() {
            logs.rotate(id, u64::MAX, now_ms)?;
        }
        let workspace = keys::workspace_of(&job.spec.name);
        let known = state.workspaces.get(workspace).map(|known| policy(known));
        if known.is_none_or(|policy| policy == Policy::default()) {
            continue;
        }
        let files = logs.list(id)?;
        by_workspace.entry(workspace).or_default().push(Kept {
            attempt: id.clone(),
            workspace: workspace.to_owned(),
            ended_ms,
            disk_bytes: files.iter().map(|file: &Listed| file.disk_bytes).sum(),
            files: files.len() as u64,
        });
    }
    for (workspace, kept) in by_workspace {
        let policy = state.workspaces.get(workspace).map(|known| policy(known));
        for bound in due(kept, policy.unwrap_or_default(), now_ms) {
            let count = logs.rotate(&bound.attempt, bound.bytes, now_ms)?;
            if count > 0 {
                let Bound { attempt, bytes } = bound;
                tracing::info!(
                    workspace,
                    attempt,
                    left = bytes,
                    count,
                    "log bytes given up"
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(attempt: &str, ended_ms: Option<i64>, mib: u64, files: u64) -> Kept {
        Kept {
            attempt: attempt.to_owned(),
            workspace: "w".to_owned(),
            ended_ms,
            disk_bytes: mib << 20,
            files,
        }
    }

    fn given_up(kept: &[Kept], policy: Policy, now_ms: i64) -> Vec<(String, u64)> {
        let due = due(kept.to_vec(), policy, now_ms).into_iter();
        due.map(|bound| (bound.attempt, bound.bytes)).collect()
    }

    #[test]
    fn jobs_that_ended_long_ago_lose_their_logs_and_others_do_not() {
        let policy = Policy {
            retention_ms: Some(1000),
            quota_bytes: None,
        };
        let all = [
            kept("a", Some(0), 1, 1),
            kept("b", Some(5000), 1, 1),
            kept("c", None, 1, 1),
            kept("gone", Some(0), 0, 1),
        ];
        assert_eq!(given_up(&all, policy, 1000), []);
        assert_eq!(given_up(&all, policy, 1001), [("a".to_owned(), 0)]);
        let both = [("a".to_owned(), 0), ("b".to_owned(), 0)];
        assert_eq!(given_up(&all, policy, 10_000), both);
    }

    #[test]
    fn beyond_the_quota_the_oldest_goes_first_and_what_is_written_last() {
        let policy = |mib: u64| Policy {
            retention_ms: None,
            quota_bytes: Some(mib << 20),
        };
        let all = [
            kept("new", Some(9), 30, 1),
            kept("old", Some(1), 20, 1),
            kept("x", None, 40, 4),
            kept("y", None, 10, 6),
        ];
        assert_eq!(given_up(&all, policy(100), 0), []);
        let old = || ("old".to_owned(), 0);
        assert_eq!(given_up(&all, policy(99), 0), [old()]);
        assert_eq!(
            given_up(&all, policy(79), 0),
            [old(), ("new".to_owned(), 0)]
        );
        let bounds = given_up(&all, policy(40), 0);
        assert_eq!(
            bounds[2..],
            [("x".to_owned(), 4 << 20), ("y".to_owned(), 4 << 20)]
        );
        assert_eq!(
            given_up(&all, policy(1), 0)[3],
            ("y".to_owned(), LEAST_BYTES)
        );
    }
}
