//! The checks of requests, for what calls them with nonsense.

use batchai_proto::v1::{CreateClusterRequest, CreateJobRequest};

use super::faults::Faults;
use super::filter::Filter;
use super::{cluster_spec, job_spec, page};

pub fn job(request: CreateJobRequest) {
    let mut faults = Faults::default();
    let job = job_spec::check(&mut faults, request.job.unwrap_or_default());
    // What passes is what is stored: it passes again, but for what the service has set.
    if faults.finish(Some(())).is_ok() {
        assert!(job.node_count > 0);
    }
}

pub fn cluster(request: CreateClusterRequest) {
    let mut faults = Faults::default();
    cluster_spec::check(&mut faults, request.cluster.unwrap_or_default());
}

pub fn texts(text: &str) {
    for message in ["Job", "Cluster", "Node", "AuditRecord"] {
        if let Ok(Some(filter)) = Filter::parse(message, text) {
            filter.matches(&batchai_proto::v1::Job::default());
        }
    }
    let _ = page::decode("list", text);
}
