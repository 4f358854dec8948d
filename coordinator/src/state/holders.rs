//! PURE. Resource groups, workspaces and experiments: they hold others, have labels, and nothing else happens to them.
//!
//! One that is deleted with what it holds stays, `DELETING`, until all of that is gone; what takes it away, one by one,
//! are the leader's duties.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::sync::Arc;

use batchai_common::names::{self, Kind};
use batchai_proto::internal::v1::{Delete, Update};
use batchai_proto::v1::{self, ProvisioningState};
use imbl::OrdMap;
use prost_types::Timestamp;

use super::{Rejection, State, Step, access, check_etag, check_new, children, etag, not_found};

/// The fields that all of them have.
pub(super) struct Fields<'a> {
    name: &'a str,
    etag: &'a mut String,
    create_time: &'a mut Option<Timestamp>,
    labels: &'a mut BTreeMap<String, String>,
    provisioning_state: &'a mut i32,
    provisioning_time: &'a mut Option<Timestamp>,
}

/// A resource that holds others.
pub(super) trait Holder: Clone {
    const KIND: Kind;
    /// What it holds.
    const HELD: &'static [Kind];
    fn table(state: &mut State) -> &mut OrdMap<String, Arc<Self>>;
    fn fields(&mut self) -> Fields<'_>;
    fn etag(&self) -> &str;
    /// Gets what its parent has and it has not, and what is its own.
    fn settle(&mut self, _: &mut State) {}
    /// Changes what only such a one has; whether that was anything.
    fn change_own(&mut self, _: &Update) -> bool {
        false
    }
}

macro_rules! fields {
    ($labels:ident) => {
        fn etag(&self) -> &str {
            &self.etag
        }

        fn fields(&mut self) -> Fields<'_> {
            Fields {
                name: &self.name,
                etag: &mut self.etag,
                create_time: &mut self.create_time,
                labels: &mut self.$labels,
                provisioning_state: &mut self.provisioning_state,
                provisioning_time: &mut self.provisioning_state_transition_time,
            }
        }
    };
}

impl Holder for v1::ResourceGroup {
    const KIND: Kind = Kind::ResourceGroup;
    const HELD: &'static [Kind] = &[Kind::Workspace];

    fn table(state: &mut State) -> &mut OrdMap<String, Arc<Self>> {
        &mut state.resource_groups
    }

    fields!(tags);
}

impl Holder for v1::Workspace {
    const KIND: Kind = Kind::Workspace;
    const HELD: &'static [Kind] = &[Kind::Experiment, Kind::Cluster, Kind::FileServer];

    fn table(state: &mut State) -> &mut OrdMap<String, Arc<Self>> {
        &mut state.workspaces
    }

    fields!(tags);

    fn settle(&mut self, state: &mut State) {
        state.workspaces_made += 1;
        self.number = state.workspaces_made;
        let group = names::parent(&self.name).and_then(|group| state.resource_groups.get(group));
        if let (true, Some(group)) = (self.location.is_empty(), group) {
            self.location.clone_from(&group.location);
        }
    }

    fn change_own(&mut self, update: &Update) -> bool {
        if let Some(kept) = &update.log_retention {
            self.log_retention = kept.retention;
        }
        if let Some(quota) = &update.log_quota {
            self.log_quota_mib = quota.mib;
        }
        update.log_retention.is_some() || update.log_quota.is_some()
    }
}

impl Holder for v1::Experiment {
    const KIND: Kind = Kind::Experiment;
    const HELD: &'static [Kind] = &[Kind::Job];

    fn table(state: &mut State) -> &mut OrdMap<String, Arc<Self>> {
        &mut state.experiments
    }

    fields!(labels);
}

pub(super) fn create<H: Holder>(step: &mut Step<'_>, given: &H) -> Result<(), Rejection> {
    let mut stored = given.clone();
    let name = stored.fields().name.to_owned();
    check_new(step.state, H::KIND, &name)?;
    stored.settle(step.state);
    let (revision, time) = (step.state.revision, step.state.time);
    let fields = stored.fields();
    *fields.etag = etag(revision);
    *fields.create_time = Some(time);
    *fields.provisioning_state = ProvisioningState::Succeeded as i32;
    *fields.provisioning_time = Some(time);
    H::table(step.state).insert(name.clone(), Arc::new(stored));
    step.made(H::KIND, &name);
    step.changed(&name);
    Ok(())
}

pub(super) fn update<H: Holder>(step: &mut Step<'_>, command: &Update) -> Result<(), Rejection> {
    let name = &command.name;
    find::<H>(step, name, &command.etag)?;
    let revision = step.state.revision;
    if let Some(labels) = &command.labels {
        change::<H>(step, name, |fields| *fields.labels = labels.labels.clone());
    }
    if let Some(found) = H::table(step.state).get_mut(name) {
        let mut changed = H::clone(found);
        if changed.change_own(command) {
            *changed.fields().etag = etag(revision);
            *found = Arc::new(changed);
            // Said once.
            if command.labels.is_none() {
                step.changed(name);
            }
        }
    }
    Ok(())
}

pub(super) fn delete<H: Holder>(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    find::<H>(step, name, &command.etag)?;
    let Some((kind, child)) = first_child(step.state, H::HELD, name) else {
        H::table(step.state).remove(name);
        step.state.deleting.remove(name);
        step.state.data_keys.remove(name);
        step.gone(H::KIND, name);
        access::forget_scope(step, name);
        step.deleted(name);
        return Ok(());
    };
    if !command.force {
        let why = format!(
            "it still holds {} {child}; delete that first, or force it",
            kind.noun()
        );
        return Err(Rejection::WrongState {
            name: name.clone(),
            why,
        });
    }
    let time = step.state.time;
    if step.state.deleting.insert(name.clone()).is_none() {
        change::<H>(step, name, |fields| {
            *fields.provisioning_state = ProvisioningState::Deleting as i32;
            *fields.provisioning_time = Some(time);
        });
    }
    Ok(())
}

fn find<H: Holder>(step: &mut Step<'_>, name: &str, expected: &str) -> Result<(), Rejection> {
    let found = H::table(step.state).get(name);
    let found = found.ok_or_else(|| not_found(H::KIND, name))?;
    check_etag(name, expected, found.etag())
}

fn change<H: Holder>(step: &mut Step<'_>, name: &str, change: impl FnOnce(&mut Fields<'_>)) {
    let revision = step.state.revision;
    if let Some(found) = H::table(step.state).get_mut(name) {
        let mut fields = Arc::make_mut(found).fields();
        change(&mut fields);
        *fields.etag = etag(revision);
        step.changed(name);
    }
}

/// The first resource of some kinds that a name holds.
fn first_child(state: &State, kinds: &[Kind], name: &str) -> Option<(Kind, String)> {
    let first = |kind: &Kind| {
        let child = match kind {
            Kind::Workspace => first_of(&state.workspaces, name, *kind),
            Kind::Experiment => first_of(&state.experiments, name, *kind),
            Kind::Cluster => first_of(&state.clusters, name, *kind),
            Kind::FileServer => first_of(&state.file_servers, name, *kind),
            _ => first_of(&state.jobs, name, *kind),
        };
        Some((*kind, child?))
    };
    kinds.iter().find_map(first)
}

fn first_of<K: Ord + Borrow<str>, T>(
    table: &OrdMap<K, T>,
    parent: &str,
    kind: Kind,
) -> Option<String> {
    children(table, parent, kind, "")
        .next()
        .map(|(name, _)| name.to_owned())
}
