//! PURE. How what is in a State is written down: in snapshots, and to tell States apart.

use std::sync::Arc;

use batchai_proto::internal::v1::snapshot_record::Kind as Record;
use batchai_proto::internal::v1::{
    DataKey, RequestKey, StateHeader, StoredAttempt, StoredAttemptNode, StoredCluster,
    StoredDataKeys, StoredExpelled, StoredFileServer, StoredJob, StoredJoined, StoredNode,
    StoredOutcome, StoredRequest, StoredRevoked, StoredSetup,
};
use batchai_proto::v1;

use super::access::Joined;
use super::{Attempt, Cluster, FileServer, Job, Node, State};

pub(super) fn header(state: &State) -> Record {
    let comparison = &state.comparison;
    Record::Header(StateHeader {
        revision: state.revision,
        submissions: state.submissions,
        workspaces_made: state.workspaces_made,
        applied_index: state.applied_index,
        time: Some(state.time),
        ensemble: state.ensemble.clone(),
        epoch: state.epoch,
        feature_level: state.feature_level,
        comparison_begun: comparison.begun,
        comparison_decided: comparison.decided,
        comparison_digest: comparison
            .digest
            .map_or(Vec::new(), |digest| digest.bytes().to_vec()),
        restored: state.restored,
        longest_lease_ms: state.longest_lease_ms,
    })
}

pub(super) fn joined(node: &str, joined: &Joined) -> Record {
    Record::Joined(StoredJoined {
        node: node.to_owned(),
        uid: joined.uid.clone(),
        token: joined.token.clone(),
        digest: joined.digest.clone(),
        vm_size: joined.vm_size.clone(),
    })
}

pub(super) fn expelled(node: &str, uid: &str) -> Record {
    let (node, uid) = (node.to_owned(), uid.to_owned());
    Record::Expelled(StoredExpelled { node, uid })
}

pub(super) fn revoked(member: &str, until: i64) -> Record {
    let member = member.to_owned();
    Record::Revoked(StoredRevoked { member, until })
}

pub(super) fn data_keys(workspace: &str, keys: &[DataKey]) -> Record {
    let workspace = workspace.to_owned();
    let keys = keys.to_vec();
    Record::DataKeys(StoredDataKeys { workspace, keys })
}

pub(super) fn request((caller, id): &(String, String), known: &(Arc<[u8]>, i64)) -> Record {
    let (digest, time) = known;
    let key = RequestKey {
        caller: caller.clone(),
        id: id.clone(),
        digest: digest.to_vec(),
    };
    Record::Request(StoredRequest {
        key: Some(key),
        time: *time,
    })
}

pub(super) fn file_server(server: &FileServer) -> StoredFileServer {
    StoredFileServer {
        spec: Some((*server.spec).clone()),
        revision: server.revision,
        place: server.place.clone(),
        failure: server.failure.clone(),
        deleting: server.deleting,
        purge: server.purge,
        state_time: Some(server.state_time),
        node: server.node.clone().unwrap_or_default(),
    }
}

pub(super) fn cluster(cluster: &Cluster) -> StoredCluster {
    StoredCluster {
        spec: Some((*cluster.spec).clone()),
        revision: cluster.revision,
        members: cluster.members.iter().cloned().collect(),
        allocation_time: Some(cluster.allocation_time),
        deleting: cluster.deleting,
    }
}

pub(super) fn job(job: &Job) -> StoredJob {
    StoredJob {
        job: Some(v1::Job {
            state: job.state as i32,
            state_transition_time: Some(job.state_time),
            start_time: job.start_time,
            end_time: job.end_time,
            exit_code: job.exit_code,
            errors: job.errors.clone(),
            ..(*job.spec).clone()
        }),
        revision: job.revision,
        submitted: job.submitted,
        attempt: job.attempt.clone().unwrap_or_default(),
        attempts: job.attempts,
        infrastructure_retries: job.infrastructure_retries,
        deleting: job.deleting,
        retries: job.retries,
    }
}

pub(super) fn attempt(attempt: &Attempt, as_placed: bool) -> StoredAttempt {
    let nodes = attempt.nodes.iter().map(|n| StoredAttemptNode {
        seen: Some(n.view()),
        port: n.port,
        last_words: n.last_words.clone(),
        first_failed: n.first_failed,
        stuck: n.stuck.clone(),
    });
    StoredAttempt {
        id: attempt.id.clone(),
        number: attempt.number,
        job: attempt.job().unwrap_or_default().to_owned(),
        spec: (!as_placed).then(|| (*attempt.spec).clone()),
        create_time: Some(attempt.create_time),
        phase: attempt.phase as i32,
        nodes: nodes.collect(),
        outcome: attempt.outcome.as_ref().map(|outcome| StoredOutcome {
            verdict: outcome.verdict as i32,
            exit_code: outcome.exit_code,
            errors: outcome.errors.clone(),
        }),
        log_home: attempt.log_home,
    }
}

pub(super) fn node(name: &str, node: &Node) -> StoredNode {
    StoredNode {
        node: Some(v1::Node {
            name: name.to_owned(),
            uid: node.uid.clone(),
            create_time: Some(node.create_time),
            cluster: node.cluster.clone().unwrap_or_default(),
            facts: Some((*node.facts).clone()),
            ..Default::default()
        }),
        revision: node.revision,
        incarnation: node.incarnation.clone(),
        leaving: node.leaving,
        expelled: node.expelled,
        attempt: node.attempt.clone().unwrap_or_default(),
        assigned: node.assigned,
        epoch: node.epoch,
        setup: node.setup.as_ref().map(|setup| StoredSetup {
            incarnation: setup.incarnation.clone(),
            attempt: setup.attempt.clone(),
            done: setup.done,
            retries: setup.retries,
            error: setup.error.clone(),
            unavailable: setup.unavailable.clone(),
        }),
    }
}
