//! PURE. The tables of the State by kind: what they hold, in the order of names.

use std::borrow::Borrow;
use std::ops::Bound;

use batchai_common::names::Kind;
use imbl::OrdMap;

use super::State;

impl State {
    /// Whether a resource exists.
    pub fn contains(&self, kind: Kind, name: &str) -> bool {
        match kind {
            Kind::ResourceGroup => self.resource_groups.contains_key(name),
            Kind::Workspace => self.workspaces.contains_key(name),
            Kind::Cluster => self.clusters.contains_key(name),
            Kind::Experiment => self.experiments.contains_key(name),
            Kind::Job => self.jobs.contains_key(name),
            Kind::Node => self.nodes.contains_key(name),
            Kind::VmSizeAlias => self.vm_size_aliases.contains_key(name),
            Kind::StorageAlias => self.storage_aliases.contains_key(name),
            Kind::RoleBinding => self.role_bindings.contains_key(name),
            Kind::Token => self.tokens.contains_key(name),
            Kind::FileServer => self.file_servers.contains_key(name),
            Kind::Bundle => false,
        }
    }

    /// The names of a kind that begin alike, in their order, from behind a name on.
    pub fn names<'a>(
        &'a self,
        kind: Kind,
        prefix: &str,
        after: &str,
    ) -> Box<dyn Iterator<Item = &'a str> + Send + 'a> {
        fn of<'a, K: Ord + Borrow<str> + Send + Sync, T: Send + Sync>(
            table: &'a OrdMap<K, T>,
            prefix: &str,
            after: &str,
        ) -> Box<dyn Iterator<Item = &'a str> + Send + 'a> {
            Box::new(behind(table, prefix, after).map(|(name, _)| name))
        }
        match kind {
            Kind::ResourceGroup => of(&self.resource_groups, prefix, after),
            Kind::Workspace => of(&self.workspaces, prefix, after),
            Kind::Cluster => of(&self.clusters, prefix, after),
            Kind::Experiment => of(&self.experiments, prefix, after),
            Kind::Job => of(&self.jobs, prefix, after),
            Kind::Node => of(&self.nodes, prefix, after),
            Kind::VmSizeAlias => of(&self.vm_size_aliases, prefix, after),
            Kind::StorageAlias => of(&self.storage_aliases, prefix, after),
            Kind::RoleBinding => of(&self.role_bindings, prefix, after),
            Kind::Token => of(&self.tokens, prefix, after),
            Kind::FileServer => of(&self.file_servers, prefix, after),
            Kind::Bundle => Box::new(std::iter::empty()),
        }
    }

    /// How many resources of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::ResourceGroup => self.resource_groups.len(),
            Kind::Workspace => self.workspaces.len(),
            Kind::Cluster => self.clusters.len(),
            Kind::Experiment => self.experiments.len(),
            Kind::Job => self.jobs.len(),
            Kind::Node => self.nodes.len(),
            Kind::VmSizeAlias => self.vm_size_aliases.len(),
            Kind::StorageAlias => self.storage_aliases.len(),
            Kind::RoleBinding => self.role_bindings.len(),
            Kind::Token => self.tokens.len(),
            Kind::FileServer => self.file_servers.len(),
            Kind::Bundle => 0,
        }
    }
}

/// The resources of a table that one parent holds, by name, from behind a name on.
pub fn children<'a, K: Ord + Borrow<str>, T>(
    table: &'a OrdMap<K, T>,
    parent: &str,
    kind: Kind,
    after: &str,
) -> impl Iterator<Item = (&'a str, &'a T)> + use<'a, K, T> {
    let prefix = match kind.parent() {
        Some(_) => format!("{parent}/{}/", kind.collection()),
        None => format!("{}/", kind.collection()),
    };
    behind(table, &prefix, after)
}

/// The resources of a table whose names begin alike, by name, from behind a name on.
pub(super) fn behind<'a, K: Ord + Borrow<str>, T>(
    table: &'a OrdMap<K, T>,
    prefix: &str,
    after: &str,
) -> impl Iterator<Item = (&'a str, &'a T)> + use<'a, K, T> {
    let prefix = prefix.to_owned();
    let begin = match after {
        "" => Bound::Included(prefix.as_str()),
        after => Bound::Excluded(after),
    };
    table
        .range::<_, str>((begin, Bound::Unbounded))
        .map(|(name, value)| (name.borrow(), value))
        .take_while(move |(name, _): &(&str, _)| name.starts_with(&prefix))
}
