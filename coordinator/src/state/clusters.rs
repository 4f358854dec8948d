//! PURE. Clusters: their settings, their nodes and the queue of their jobs.
//!
//! Which nodes join or leave is not decided here but in `duties`, by comparing target and members.

use batchai_common::fault;
use std::cmp::Reverse;
use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::internal::v1::{Delete, Update};
use batchai_proto::v1;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption;
use imbl::OrdSet;
use prost_types::Timestamp;

use super::{
    Rejection, State, Step, check_etag, check_new, etag, file_servers, keys, not_found, setup,
};

/// The order of a cluster's queue: urgent ones first, then in the order of submission.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueKey {
    pub priority: Reverse<i32>,
    pub submitted: i64,
    pub job: Arc<str>,
}

/// A cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// What a user set.
    pub spec: Arc<v1::Cluster>,
    pub revision: i64,
    /// The nodes it has, leaving ones included.
    pub members: OrdSet<String>,
    /// The jobs that wait for its nodes.
    pub queue: OrdSet<QueueKey>,
    /// The jobs that have nodes of it.
    pub running: OrdSet<String>,
    /// When it last began or ceased to have the nodes it shall have.
    pub allocation_time: Timestamp,
    /// Since when it is removed as soon as no job needs it.
    pub deleting: Option<Timestamp>,
}

impl Cluster {
    /// How many nodes it shall have.
    pub fn target(&self) -> usize {
        usize::try_from(self.manual().target_node_count).unwrap_or_default()
    }

    /// What happens to jobs on nodes that leave.
    pub fn deallocation(&self) -> NodeDeallocationOption {
        self.manual().node_deallocation_option()
    }

    /// Whether it has the nodes it shall have.
    pub fn steady(&self) -> bool {
        self.members.len() == self.target()
    }

    /// The jobs that wait for its nodes or have some.
    pub fn jobs(&self) -> impl Iterator<Item = &str> {
        let queued = self.queue.iter().map(|key| &*key.job);
        self.running.iter().map(String::as_str).chain(queued)
    }

    fn manual(&self) -> v1::ManualScaleSettings {
        self.spec
            .scale_settings
            .as_ref()
            .and_then(|s| s.manual)
            .unwrap_or_default()
    }

    /// Whether a node with these facts fits. `alias` is what its VM size stands for, where that is an alias.
    pub fn matches(&self, alias: Option<&str>, facts: &v1::NodeFacts) -> bool {
        let machine = self.spec.virtual_machine_configuration.as_ref();
        let image = machine.and_then(|m| m.image_reference.as_ref());
        (facts.vm_size == self.spec.vm_size || alias == Some(facts.vm_size.as_str()))
            && image.is_none_or(|image| image_text(image) == facts.image)
    }
}

/// `publisher:offer:sku:version`, as nodes register it.
pub fn image_text(image: &v1::ImageReference) -> String {
    format!(
        "{}:{}:{}:{}",
        image.publisher, image.offer, image.sku, image.version
    )
}

/// Changes a cluster in place.
pub(super) fn change(step: &mut Step<'_>, name: &str, change: impl FnOnce(&mut Cluster)) {
    let (revision, time) = (step.state.revision, step.state.time);
    if let Some(cluster) = step.state.clusters.get_mut(name) {
        let cluster = Arc::make_mut(cluster);
        let before = cluster.steady();
        change(cluster);
        cluster.revision = revision;
        if cluster.steady() != before {
            cluster.allocation_time = time;
        }
        step.changed(name);
    }
}

pub(super) fn create(step: &mut Step<'_>, cluster: &v1::Cluster) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &cluster.name;
    check_new(state, Kind::Cluster, name)?;
    let setup = cluster.node_setup.as_ref();
    file_servers::check(state, setup.and_then(|s| s.mount_volumes.as_ref()))?;
    keys::check_cluster(state, cluster)?;
    let stored = Cluster {
        spec: Arc::new(setup::named(state, cluster)),
        revision: state.revision,
        members: OrdSet::new(),
        queue: OrdSet::new(),
        running: OrdSet::new(),
        allocation_time: state.time,
        deleting: None,
    };
    state.clusters.insert(name.clone(), Arc::new(stored));
    step.made(Kind::Cluster, name);
    step.changed(name);
    Ok(())
}

pub(super) fn update(step: &mut Step<'_>, command: &Update) -> Result<(), Rejection> {
    let found = get(step.state, &command.name)?;
    check_etag(&command.name, &command.etag, &etag(found.revision))?;
    if command.labels.is_none() && command.scale_settings.is_none() {
        return Ok(());
    }
    change(step, &command.name, |cluster| {
        let spec = Arc::make_mut(&mut cluster.spec);
        if let Some(labels) = &command.labels {
            spec.labels = labels.labels.clone();
        }
        if let Some(scale) = &command.scale_settings {
            spec.scale_settings = Some(*scale);
        }
    });
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = get(step.state, name)?;
    check_etag(name, &command.etag, &etag(found.revision))?;
    if let Some(job) = found
        .jobs()
        .next()
        .filter(|_| !fault!("cluster_deleted_with_jobs"))
    {
        if command.force {
            return delete_later(step, name);
        }
        let why = format!("job {job} still needs it; terminate or delete that first, or force it");
        return Err(Rejection::WrongState {
            name: name.clone(),
            why,
        });
    }
    // A cluster without jobs has nodes that are being set up at most.
    if setup::end(step, &found) {
        return delete_later(step, name);
    }
    for node in &found.members.clone() {
        super::nodes::change(step, node, |node| {
            node.cluster = None;
            node.leaving = false;
        });
        setup::forget(step, node);
        setup::remount(step, name, node);
    }
    step.state.clusters.remove(name);
    step.state.deleting.remove(name);
    step.gone(Kind::Cluster, name);
    step.deleted(name);
    Ok(())
}

/// Its jobs are ended by the leader's duties; then it is deleted again.
fn delete_later(step: &mut Step<'_>, name: &str) -> Result<(), Rejection> {
    let time = step.state.time;
    if step.state.deleting.insert(name.to_owned()).is_none() {
        change(step, name, |cluster| cluster.deleting = Some(time));
    }
    Ok(())
}

fn get(state: &State, name: &str) -> Result<Arc<Cluster>, Rejection> {
    state
        .clusters
        .get(name)
        .cloned()
        .ok_or_else(|| not_found(Kind::Cluster, name))
}
