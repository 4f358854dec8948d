//! PURE. Why a job waits, in words, from the same facts that scheduling uses.

use crate::scheduler::heard::Heard;
use crate::scheduler::images;
use crate::state::{Cluster, Job, State, file_servers, keys, loss, restore, setup};
use batchai_common::names::last_id;

use super::fit::{Free, Ports, place};
use super::order;

/// A list of jobs asks for each of them: no queue is counted to its end.
const COUNT_MAX: usize = 100;

/// Why a queued job has not started, or what node one that runs waits for; empty for any other job.
pub fn pending_reason(state: &State, heard: &Heard, job: &Job) -> String {
    let attempt = job.attempt.as_deref().unwrap_or_default();
    let lost = |node: &str| heard.lease_is_over(node, state.longest_lease_ms);
    if let Some(node) = loss::waits_for(state, attempt, lost) {
        return format!(
            "{node} is not heard of; the job waits until it is back, or lost for sure: batchai node confirm-lost"
        );
    }
    if job.state != batchai_proto::v1::job::State::Queued {
        return String::new();
    }
    if state.restored {
        return "the ensemble was restored from a backup, and nothing starts before that is accepted: batchai admin snapshot accept".to_owned();
    }
    let name = &job.spec.cluster;
    let Some(cluster) = state.clusters.get(name) else {
        return format!("cluster {name} does not exist any more");
    };
    let (wanted, reach) = (job.spec.node_count, cluster.target());
    let short = last_id(name);
    if usize::try_from(wanted).is_ok_and(|wanted| wanted > reach) {
        return format!(
            "the job wants {wanted} nodes, cluster {short} shall have {reach}: \
             it cannot start unless the cluster is resized"
        );
    }
    if let Some(key) = keys::closed(&job.spec.secrets, &heard.closed) {
        return format!(
            "its secrets cannot be opened: the coordinator's keyring lacks the key that wrapped data key {key}"
        );
    }
    if let Some((server, why)) = file_servers::awaited(state, job.spec.mount_volumes.as_ref()) {
        return format!("it waits for {server}, which it mounts: {why}");
    }
    if let Some(why) = images::out_of_reach(state, cluster, &job.spec) {
        return why;
    }
    let first = order::candidates(state, heard, cluster).next();
    if let Some(first) = first.filter(|first| first.spec.name != job.spec.name) {
        let ahead = order::candidates(state, heard, cluster)
            .take(COUNT_MAX)
            .take_while(|other| other.spec.name != job.spec.name)
            .count();
        let ahead = match ahead {
            COUNT_MAX => format!("{COUNT_MAX} or more"),
            ahead => ahead.to_string(),
        };
        return format!(
            "{ahead} jobs are ahead of it; next is {}",
            last_id(&first.spec.name)
        );
    }
    what_is_missing(state, heard, job, cluster)
}

/// Why the job whose turn it is has no nodes yet.
fn what_is_missing(state: &State, heard: &Heard, job: &Job, cluster: &Cluster) -> String {
    let (wanted, reach) = (job.spec.node_count, cluster.target());
    let short = last_id(&job.spec.cluster);
    let idle = Free::of(state, heard, cluster);
    let free = idle.count_for(job);
    let unfit = idle.count() - free;
    let silent = cluster
        .members
        .iter()
        .filter(|name| !heard.is_alive(name))
        .count();
    let members = cluster.members.iter().filter_map(|n| state.nodes.get(n));
    let unready: Vec<_> = members
        .filter(|node| !setup::is_done(state, node))
        .collect();
    let failed = unready.iter().filter(|node| setup::error(node).is_some());
    let failed = failed.count();
    let missing = reach.saturating_sub(cluster.members.len());
    let mut reason = format!("it waits for {wanted} idle nodes of cluster {short}; idle: {free}");
    if silent > 0 {
        reason += &format!(", not heard of lately: {silent}");
    }
    if unfit > 0 {
        reason += &format!(", idle but without what its image takes (facts.imageSources): {unfit}");
    }
    if unready.len() > failed {
        reason += &format!(", being set up: {}", unready.len() - failed);
        if let Some((server, why)) = file_servers::awaited(state, setup::mounts(cluster)) {
            reason += &format!(" (they wait for {server}: {why})");
        }
    }
    let strays = cluster.members.iter();
    let strays = strays
        .filter(|name| restore::may_hold_strays(state, name))
        .count();
    if strays > 0 {
        reason += &format!(", with work of before the restore, or not back since: {strays}");
    }
    if failed > 0 {
        reason += &format!(", whose set-up failed: {failed} (the cluster's errors say why)");
    }
    if missing > 0 {
        reason += &format!(
            ", still to join: {missing} of VM size {} (no registered node of that size and image \
             is free)",
            cluster.spec.vm_size
        );
    }
    if free >= usize::try_from(wanted).unwrap_or_default() {
        let (mut nodes, mut ports) = (Free::of(state, heard, cluster), Ports::of(state));
        reason += match place(state, &mut nodes, &mut ports, job, 0) {
            Some(_) => ", being placed now",
            None => {
                ", but one of them has not as many free ports as its processes there need (--ports of the node's agent)"
            }
        };
    }
    reason
}
