//! PURE. Which nodes can have the image of a job's container, by what they say of themselves.
//!
//! Whether an archive is there, or a registry has the image, shows on the node only.

use batchai_common::images::Image;
use batchai_common::names::last_id;
use batchai_proto::v1;

use crate::state::{Cluster, Node, State};

/// Where the image of a job may come from, as nodes call it: one of these has to be there. None for a job that needs none.
fn sources(job: &v1::Job) -> Option<&'static [&'static str]> {
    let registry = job.container_settings.as_ref()?;
    let registry = registry.image_source_registry.as_ref()?;
    match Image::read(&registry.image).ok()? {
        Image::Rootfs(_) => Some(&["rootfs"]),
        Image::Archive(_) => Some(&["docker-archive"]),
        Image::Local(_) | Image::Registry { .. } => Some(&["docker", "podman"]),
    }
}

/// Whether a node can have it.
pub fn has(node: &Node, job: &v1::Job) -> bool {
    sources(job).is_none_or(|sources| {
        let has = node.facts.image_sources.iter();
        has.into_iter().any(|has| sources.contains(&has.as_str()))
    })
}

/// Why the cluster cannot have the image on as many nodes as the job wants, whoever is idle there; nodes that are still to join may.
pub fn out_of_reach(state: &State, cluster: &Cluster, job: &v1::Job) -> Option<String> {
    let sources = sources(job)?;
    let members = cluster.members.iter().filter_map(|n| state.nodes.get(n));
    let able = members.filter(|node| has(node, job)).count();
    let joining = cluster.target().saturating_sub(cluster.members.len());
    let wanted = usize::try_from(job.node_count).unwrap_or_default();
    (able + joining < wanted).then(|| {
        format!(
            "the job wants {wanted} nodes that have {} for its image (facts.imageSources), cluster {} has {able}: it starts when more of \
             them have it",
            sources.join(" or "),
            last_id(&job.cluster)
        )
    })
}
