//! PURE. Who runs next, and where: from an immutable State to placements, which `apply` validates again.
//!
//! Three steps, a file each: `order` (whose turn it is), `fit` (which nodes and ports), `explain` (why a job waits). All three ask
//! `images` which nodes can have the image of a job.
//! There is no back-filling and no preemption.

pub mod explain;
pub mod fit;
pub mod heard;
pub mod images;
pub mod order;

use batchai_common::fault;
use batchai_proto::internal::v1::Place;

use crate::scheduler::heard::Heard;
use crate::state::State;

/// At most so many placements at once: what is left is planned from the State that these lead to.
pub const PLACEMENTS_MAX: usize = 256;

/// The placements that are possible now.
pub fn schedule(state: &State, heard: &Heard, log_home: i64) -> Vec<Place> {
    let mut plan = Vec::new();
    if state.restored {
        return plan;
    }
    let mut ports = fit::Ports::of(state);
    let waiting = state
        .clusters
        .values()
        .filter(|cluster| !cluster.queue.is_empty() && cluster.deleting.is_none());
    for cluster in waiting {
        let mut free = fit::Free::of(state, heard, cluster);
        if free.count() == 0 {
            // Nobody of a queue fits, however long it is.
            continue;
        }
        for job in order::candidates(state, heard, cluster) {
            if plan.len() >= PLACEMENTS_MAX {
                return plan;
            }
            match fit::place(state, &mut free, &mut ports, job, log_home) {
                Some(placement) => plan.push(placement),
                None if fault!("queue_overtaken") => {}
                // First come, first served: nobody overtakes the job whose turn it is.
                None => break,
            }
        }
    }
    plan
}
