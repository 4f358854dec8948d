//! What users do with file servers: they make, delete and purge them, lead storage aliases to them, and have clusters mount them.

use batchai_coordinator::state::State;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Delete, DeleteFileServer, TerminateJob};
use batchai_proto::v1;
use batchai_proto::v1::storage_alias::Target;

use super::Sim;
use super::clients::{CLUSTER, WORKSPACE, cluster};

/// The cluster whose nodes mount one.
pub const MOUNTING: &str = "resourceGroups/g/workspaces/w/clusters/m";
const ALIAS: &str = "storageAliases/data";
const ACCOUNT: &str = "acc";
const SHARE: &str = "data";
const SERVERS_MAX: usize = 4;

/// A share that the alias is for.
fn share() -> v1::MountVolumes {
    v1::MountVolumes {
        azure_file_shares: vec![v1::AzureFileShare {
            account_name: ACCOUNT.into(),
            azure_file_url: format!("https://{ACCOUNT}.file.core.windows.net/{SHARE}"),
            relative_mount_path: "share".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn mounting(server: &str) -> v1::MountVolumes {
    v1::MountVolumes {
        file_servers: vec![v1::FileServerMount {
            file_server: server.into(),
            relative_mount_path: "data".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The file servers that somebody mounts who asks for this, by name; those that are gone as well.
pub fn mounted<'a>(state: &'a State, volumes: Option<&'a v1::MountVolumes>) -> Vec<&'a str> {
    let Some(volumes) = volumes else {
        return Vec::new();
    };
    let named = volumes.file_servers.iter();
    let mut all: Vec<_> = named.map(|mount| mount.file_server.as_str()).collect();
    let alias = state.storage_aliases.get(ALIAS);
    let led = alias.filter(|_| !volumes.azure_file_shares.is_empty());
    if let Some(Target::FileServer(to)) = led.and_then(|alias| alias.target.as_ref()) {
        all.push(&to.file_server);
    }
    all
}

impl Sim {
    /// What a new job mounts; most mount nothing.
    pub(super) fn volumes(&mut self, state: &State) -> Option<v1::MountVolumes> {
        match self.random.u32(..6) {
            0 | 1 => Some(mounting(&self.any_server(state)?)),
            2 => Some(share()),
            _ => None,
        }
    }

    fn any_server(&mut self, state: &State) -> Option<String> {
        let names: Vec<_> = state.file_servers.keys().cloned().collect();
        self.random.choice(names)
    }

    /// The cluster of a new job.
    pub(super) fn any_cluster(&mut self, state: &State) -> &'static str {
        let small = state.clusters.contains_key(MOUNTING) && self.random.u32(..3) == 0;
        if small { MOUNTING } else { CLUSTER }
    }

    /// What a user wants next of file servers.
    pub(super) fn wish_for_storage(&mut self, id: &str, state: &State) -> Option<Kind> {
        let force = self.random.u32(..4) == 0;
        let delete = |name: String, force| Delete {
            name,
            etag: String::new(),
            force,
        };
        let there = state.file_servers.len();
        Some(match self.random.u32(..10) {
            0..=3 if there < SERVERS_MAX => Kind::CreateFileServer(self.server(id)),
            4..=5 => {
                let purge = self.random.bool();
                let name = self.any_server(state)?;
                if purge {
                    let uid = state.file_servers[&name].spec.uid.clone();
                    self.checks.servers.purges.insert(uid);
                }
                Kind::DeleteFileServer(DeleteFileServer {
                    delete: Some(delete(name, force)),
                    purge,
                })
            }
            6 if state.storage_aliases.is_empty() => {
                let to = v1::FileServerDirectory {
                    file_server: self.any_server(state)?,
                    directory: String::new(),
                };
                Kind::CreateStorageAlias(v1::StorageAlias {
                    name: ALIAS.into(),
                    account_name: ACCOUNT.into(),
                    share_name: SHARE.into(),
                    target: Some(Target::FileServer(to)),
                    ..Default::default()
                })
            }
            7 => Kind::Delete(delete(ALIAS.into(), false)),
            8 if !state.clusters.contains_key(MOUNTING) => {
                let node_setup = v1::NodeSetup {
                    mount_volumes: Some(mounting(&self.any_server(state)?)),
                    ..Default::default()
                };
                Kind::CreateCluster(v1::Cluster {
                    name: MOUNTING.into(),
                    uid: format!("{MOUNTING}-{id}"),
                    node_setup: Some(node_setup),
                    ..cluster(self.random.i32(1..3))
                })
            }
            9 => Kind::Delete(delete(MOUNTING.into(), force)),
            _ => return None,
        })
    }

    fn server(&mut self, id: &str) -> v1::FileServer {
        let name = format!("{WORKSPACE}/fileServers/{id}");
        let node = self.random.usize(..4 * self.agents.len());
        let node = self.agents.get(node).map(|agent| agent.name());
        v1::FileServer {
            uid: id.to_owned(),
            name,
            vm_size: "small".into(),
            node: node.unwrap_or_default(),
            data_disks: Some(v1::DataDisks {
                disk_count: self.random.i32(1..4),
                disk_size_in_gb: 20,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// At the end the nodes of the other cluster are needed, and what waits for a file server that does not come would wait for ever.
    pub(super) fn last_wish(&mut self, state: &State) -> Option<Kind> {
        if let Some(cluster) = state.clusters.get(MOUNTING) {
            let delete = Delete {
                name: MOUNTING.into(),
                etag: String::new(),
                force: true,
            };
            return cluster.deleting.is_none().then_some(Kind::Delete(delete));
        }
        if self.random.f64() > 0.02 {
            return None;
        }
        let hopeless = state.jobs.values().find(|job| {
            let queued = job.state == v1::job::State::Queued;
            let mut servers = mounted(state, job.spec.mount_volumes.as_ref()).into_iter();
            let lost = |name: &str| {
                let server = state.file_servers.get(name);
                server.is_none_or(|server| server.place.is_none() || server.deleting.is_some())
            };
            queued && servers.any(lost)
        })?;
        Some(Kind::TerminateJob(TerminateJob {
            name: hopeless.spec.name.clone(),
            ..Default::default()
        }))
    }
}
