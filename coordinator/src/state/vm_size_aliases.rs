//! PURE. Other names for VM sizes.

use std::sync::Arc;

use batchai_common::names::{Kind, last_id};
use batchai_proto::internal::v1::Delete;
use batchai_proto::v1::VmSizeAlias;

use super::{Node, Rejection, State, Step, check_etag, check_new, etag, not_found};

/// What a name stands for, where it is an alias.
pub fn resolve<'a>(state: &'a State, vm_size: &str) -> Option<&'a str> {
    let name = format!("{}/{vm_size}", Kind::VmSizeAlias.collection());
    let alias = state.vm_size_aliases.get(&name)?;
    Some(&alias.vm_size)
}

pub(super) fn create(step: &mut Step<'_>, alias: &VmSizeAlias) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &alias.name;
    check_new(state, Kind::VmSizeAlias, name)?;
    let is_size = |node: &Arc<Node>| node.facts.vm_size == last_id(name);
    if state.nodes.values().any(is_size) {
        // Its clusters would get other nodes than those that have it.
        let why = "registered nodes have it as their own VM size".to_owned();
        let name = name.clone();
        return Err(Rejection::WrongState { name, why });
    }
    let stored = VmSizeAlias {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..alias.clone()
    };
    state.vm_size_aliases.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    Ok(())
}

pub(super) fn delete(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = step.state.vm_size_aliases.get(name);
    let found = found.ok_or_else(|| not_found(Kind::VmSizeAlias, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    step.state.vm_size_aliases.remove(name);
    step.deleted(name);
    Ok(())
}
