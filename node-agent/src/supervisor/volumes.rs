//! What is mounted for the cluster of the node, and what is left of mounts whose holder is gone: compared with what is wanted at each
//! look, by what was written down and what the kernel says. Nothing here waits.
//!
//! The mounts of a cluster are begun by the set-up of the node, which waits for them, and taken away when the node has left the cluster,
//! or that wants others. A holder that died while it was wanted is started again.

use std::collections::{BTreeMap, HashMap};
use std::process::Child;
use std::sync::Arc;

use batchai_common::names::hex;
use batchai_proto::agent::v1::{ClusterMounts, MountsReport};
use batchai_proto::secrets;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::journal::{AttemptDir, Journal, JournalError};
use crate::launch::{ATTEMPT_TAG, HostFacts, Keys, LaunchError, Mount, keys, mounts as plan};
use crate::mounts::{self, Phase};
use crate::reconcile::failure;
use crate::shim;
use crate::status::FailureRecord;

/// What the tags of processes begin with that serve mounts of a cluster.
pub const TAG: &str = "mounts-";

/// How far the mounts of a cluster are.
#[derive(Debug, PartialEq, Eq)]
pub enum Mounted {
    Yes,
    NotYet,
    Never(FailureRecord),
}

pub struct Volumes {
    pub journal: Arc<Journal>,
    pub own: &'static [&'static str],
    pub facts: HostFacts,
    pub patience_s: u64,
    /// What the cluster of the node wants, as the latest list says.
    wanted: Option<ClusterMounts>,
    /// Holders that this agent has started.
    holders: HashMap<String, Child>,
    /// Processes that clean up, by the directory that they do it for.
    cleaners: HashMap<String, Child>,
    /// For which set-up mounts were begun last.
    begun_for: HashMap<String, String>,
}

impl Volumes {
    pub fn new(
        journal: Arc<Journal>,
        own: &'static [&'static str],
        facts: HostFacts,
        patience_s: u64,
    ) -> Volumes {
        Volumes {
            journal,
            own,
            facts,
            patience_s,
            wanted: None,
            holders: HashMap::new(),
            cleaners: HashMap::new(),
            begun_for: HashMap::new(),
        }
    }

    /// Writes down what is to be mounted for an attempt, before anything is.
    pub fn write_down(&self, dir: &AttemptDir, mounts: &[Mount]) -> Result<(), JournalError> {
        if mounts.is_empty() {
            return Ok(());
        }
        let plan = mounts::Plan {
            mounts: mounts.to_vec(),
            root: self.facts.root.clone(),
            patience_s: self.patience_s,
            again: false,
            env: self.env(&dir.id()),
        };
        dir.write(mounts::PLAN, &plan, true)
    }

    /// What mounts has of the agent's environment, and the tag by which all that it leaves is found.
    fn env(&self, tag: &str) -> BTreeMap<String, String> {
        let mut env = self.facts.base_env.clone();
        let tag = format!("{}/{tag}", self.facts.node_uid);
        env.insert(ATTEMPT_TAG.to_owned(), tag);
        env
    }

    /// Whether nothing is left of what a holder that is gone had mounted; sees to it otherwise.
    pub fn is_clean(&mut self, dir: &AttemptDir) -> bool {
        let key = dir.path.to_string_lossy().into_owned();
        if let Some(cleaner) = self.cleaners.get_mut(&key) {
            match cleaner.try_wait() {
                Ok(None) => return false,
                Ok(Some(status)) if !status.success() => {
                    tracing::error!(
                        dir = key,
                        "what is left is still mounted; see its mounts.log"
                    );
                }
                Ok(Some(_)) => {}
                Err(error) => tracing::error!(dir = key, %error, "cannot be waited for"),
            }
            self.cleaners.remove(&key);
        }
        match mounts::any_left(dir) {
            Ok(false) => return true,
            Ok(true) => {}
            Err(error) => tracing::error!(dir = key, %error, "what it mounted is not known"),
        }
        match mounts::clean(self.own, dir) {
            Ok(cleaner) => drop(self.cleaners.insert(key, cleaner)),
            Err(error) => tracing::error!(dir = key, %error, "nothing can be unmounted"),
        }
        false
    }

    /// Compares what is mounted for clusters with what is wanted now.
    pub fn look(&mut self, wanted: Option<&ClusterMounts>) -> Result<(), JournalError> {
        self.wanted = wanted.cloned();
        self.holders
            .retain(|_, holder| matches!(holder.try_wait(), Ok(None)));
        let key = wanted.map(key);
        for dir in self.journal.cluster_mounts()? {
            let held = self.is_held(&dir)?;
            if key.as_deref() != Some(&dir.id()) {
                match held {
                    true if !dir.has(mounts::UNMOUNT) => {
                        dir.write(mounts::UNMOUNT, &true, false)?
                    }
                    true => {}
                    false => self.forget(&dir)?,
                }
                continue;
            }
            // It was ready once, and whoever held it was cut down.
            let status = mounts::status(&dir)?;
            if !held && status.phase == Phase::Ready && self.is_gone(&dir) {
                tracing::warn!(dir = %dir.path.display(), "mounted again");
                mounts::renew(&dir)?;
                self.begin(&dir);
            }
        }
        Ok(())
    }

    /// Whether the mounts of the cluster are there, for a set-up of the node.
    pub fn look_for(&mut self, attempt: &str) -> Result<Mounted, JournalError> {
        let Some(wanted) = self.wanted.clone() else {
            return Ok(Mounted::Yes);
        };
        if !wanted.fault.is_empty() {
            return Ok(never(wanted.fault));
        }
        let dir = self.journal.cluster_mount(&key(&wanted));
        let others = self.journal.cluster_mounts()?;
        if others.iter().any(|other| *other != dir) {
            return Ok(Mounted::NotYet);
        }
        let status = mounts::status(&dir)?;
        let tried = self
            .begun_for
            .get(&dir.id())
            .is_some_and(|id| id == attempt);
        match (status.phase, self.is_held(&dir)?) {
            (Phase::Ready, true) if !dir.has(mounts::UNMOUNT) => match status.failure {
                None => Ok(Mounted::Yes),
                // It is tried until it is there, and said meanwhile.
                Some(_) => Ok(Mounted::NotYet),
            },
            (_, true) => Ok(Mounted::NotYet),
            (Phase::Failed, false) if tried => {
                let unsaid = || never("they cannot be mounted".to_owned());
                Ok(status.failure.map_or_else(unsaid, Mounted::Never))
            }
            (_, false) if dir.path.exists() && !self.is_gone(&dir) => Ok(Mounted::NotYet),
            (_, false) => match self.plan(&wanted) {
                Err(error) => Ok(never(error.to_string())),
                Ok(mounts) => {
                    self.prepare(&dir, mounts)?;
                    self.begun_for.insert(dir.id(), attempt.to_owned());
                    mounts::forget(&dir);
                    self.begin(&dir);
                    Ok(Mounted::NotYet)
                }
            },
        }
    }

    /// How what is mounted for the cluster stands.
    pub fn report(&self) -> Option<MountsReport> {
        let wanted = self.wanted.as_ref()?;
        let dir = self.journal.cluster_mount(&key(wanted));
        let status = mounts::status(&dir).ok()?;
        (status.phase == Phase::Ready).then(|| MountsReport {
            cluster_uid: wanted.uid.clone(),
            failure: status.failure.and_then(|record| failure(record).error),
        })
    }

    /// What is mounted for the cluster and has answered no more for as long as it may, so that jobs which use it wait for nothing.
    pub fn lost(&self) -> Option<FailureRecord> {
        let dir = self.journal.cluster_mount(&key(self.wanted.as_ref()?));
        let status = mounts::status(&dir).ok()?;
        // What is only being mounted again has no details.
        let failure = status.failure.filter(|it| !it.details.is_empty());
        failure.filter(|_| status.phase == Phase::Ready)
    }

    /// Whatever knows no users belongs to root: the jobs of a cluster may run as several.
    fn plan(&self, wanted: &ClusterMounts) -> Result<Vec<Mount>, LaunchError> {
        let root = format!("{}/mounts", self.facts.root);
        let (volumes, sources) = (wanted.volumes.as_ref(), &wanted.file_servers);
        plan(volumes, &wanted.storage, sources, &root, (0, 0))
    }

    /// What opens what the cluster wants.
    fn keys(&self) -> Keys {
        let wanted = self.wanted.as_ref();
        keys(wanted.and_then(|wanted| wanted.volumes.as_ref()))
    }

    fn prepare(&self, dir: &AttemptDir, mounts: Vec<Mount>) -> Result<(), JournalError> {
        dir.create()?;
        let plan = mounts::Plan {
            mounts,
            root: self.facts.root.clone(),
            patience_s: self.patience_s,
            again: true,
            env: self.env(&format!("{TAG}{}", dir.id())),
        };
        dir.write(mounts::PLAN, &plan, true)
    }

    fn begin(&mut self, dir: &AttemptDir) {
        match mounts::hold(self.own, dir, false, &self.keys()) {
            Ok(holder) => drop(self.holders.insert(dir.id(), holder)),
            Err(error) => tracing::error!(%error, "nothing can be mounted; it is tried again"),
        }
    }

    fn is_held(&self, dir: &AttemptDir) -> Result<bool, JournalError> {
        Ok(self.holders.contains_key(&dir.id()) || dir.shim()?.is_some())
    }

    /// Whether nothing is left of mounts without a holder, and of what served them.
    fn is_gone(&mut self, dir: &AttemptDir) -> bool {
        if !self.is_clean(dir) {
            return false;
        }
        let tag = format!("{TAG}{}", dir.id());
        let swept = shim::sweep(&self.journal, &self.facts.node_uid, |attempt| {
            attempt != tag
        });
        if let Err(error) = swept {
            tracing::error!(%error, "what served a mount is left");
        }
        true
    }

    fn forget(&mut self, dir: &AttemptDir) -> Result<(), JournalError> {
        if self.is_gone(dir) {
            // Nobody waits for it any more: the log is where it can be said.
            if let Some(lost) = mounts::lost(dir) {
                let what = lost.message;
                tracing::error!(dir = %dir.path.display(), what, "at the end of a cluster's mounts");
            }
            self.begun_for.remove(&dir.id());
            dir.remove()?;
        }
        Ok(())
    }
}

fn never(message: String) -> Mounted {
    Mounted::Never(FailureRecord {
        code: mounts::FAILED.to_owned(),
        message,
        ..FailureRecord::default()
    })
}

/// Whose they are, what they are, and where file servers are: others have another one. What opens them says nothing of that, and is not to be
/// guessed by it; what is mounted stays when another storage alias is made.
fn key(wanted: &ClusterMounts) -> String {
    let mut what = ClusterMounts {
        cluster: wanted.cluster.clone(),
        uid: wanted.uid.clone(),
        volumes: wanted.volumes.clone(),
        file_servers: wanted.file_servers.clone(),
        ..ClusterMounts::default()
    };
    secrets::blank(secrets::of_mounts("", what.volumes.as_mut()));
    hex(&Sha256::digest(what.encode_to_vec()))[..32].to_owned()
}

#[cfg(test)]
mod tests {
    use batchai_proto::agent::v1::{FileServerPlace, FileServerSource};
    use batchai_proto::v1::{AzureFileShare, MountVolumes, StorageCredentials};

    use super::*;

    #[test]
    fn what_is_mounted_is_another_one_when_a_file_server_has_moved_and_not_with_another_key() {
        let wanted = |port: i32, account_key: &str| ClusterMounts {
            uid: "u".into(),
            volumes: Some(MountVolumes {
                azure_file_shares: vec![AzureFileShare {
                    credentials: Some(StorageCredentials {
                        account_key: account_key.into(),
                        ..StorageCredentials::default()
                    }),
                    ..AzureFileShare::default()
                }],
                ..MountVolumes::default()
            }),
            file_servers: vec![FileServerSource {
                place: Some(FileServerPlace {
                    port,
                    ..FileServerPlace::default()
                }),
                ..FileServerSource::default()
            }],
            ..ClusterMounts::default()
        };
        assert_eq!(key(&wanted(1, "a")), key(&wanted(1, "b")));
        assert_ne!(key(&wanted(1, "a")), key(&wanted(2, "a")));
    }
}
