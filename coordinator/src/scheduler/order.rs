//! PURE. Whose turn it is: by priority, then in the order of submission.

use std::sync::Arc;

use crate::scheduler::heard::Heard;
use crate::scheduler::images;
use crate::state::{Cluster, Job, State, file_servers, keys};

/// The queued jobs of a cluster in their order. A job that wants more nodes than the cluster shall ever have keeps
/// nobody else waiting: it is passed over until the cluster is resized. So is one whose secrets cannot be opened, whose
/// file servers are not there yet, or whose image the cluster's nodes cannot have.
pub fn candidates<'a>(
    state: &'a State,
    heard: &'a Heard,
    cluster: &'a Cluster,
) -> impl Iterator<Item = &'a Arc<Job>> {
    let reach = cluster.target();
    let queued = cluster
        .queue
        .iter()
        .filter_map(|key| state.jobs.get(&key.job));
    queued.filter(move |job| {
        let fits = usize::try_from(job.spec.node_count).is_ok_and(|n| n <= reach);
        fits && keys::closed(&job.spec.secrets, &heard.closed).is_none()
            && file_servers::awaited(state, job.spec.mount_volumes.as_ref()).is_none()
            && images::out_of_reach(state, cluster, &job.spec).is_none()
    })
}
