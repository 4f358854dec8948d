//! PURE. Experiments.

use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1;

use super::{Rejection, Step, check_empty, check_etag, check_new, etag, not_found};

pub(super) fn create(step: &mut Step<'_>, experiment: &v1::Experiment) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &experiment.name;
    check_new(
        Kind::Experiment,
        name,
        &state.experiments,
        &state.workspaces,
    )?;
    let stored = v1::Experiment {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..experiment.clone()
    };
    state.experiments.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let state = &mut *step.state;
    let found = state
        .experiments
        .get(name)
        .ok_or_else(|| not_found(Kind::Experiment, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    check_empty(name, &state.jobs, Kind::Job)?;
    state.experiments.remove(name);
    step.deleted(name);
    Ok(())
}
