//! Secrets: sealed before they enter the log, opened for the agent that needs them, and for nobody else.
//!
//! A secret is sealed (`seal`) by a data key of its workspace; data keys lie in the State, each wrapped by a key-encryption
//! key of the keyring, which lies elsewhere (`keyring`). What is forgotten or deleted is gone from the State; the log still has it,
//! sealed, until it is compacted, and opens to whoever has both the log and the keyring.

mod keyring;
mod seal;

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{DataKey, PutDataKey};
use batchai_proto::secrets::Place;
use imbl::OrdMap;

use crate::state::State;
use crate::state::keys::{self, Sealed};

pub use keyring::{KeyringError, Source};

use keyring::Keyring;
use seal::{Key, Unsealable};

/// Data keys that are wrapped anew at once; the rest follows.
const REWRAPPED_MAX: usize = 64;

/// Why a secret cannot be sealed or opened. It is said to users: it names keys, and never what they protect.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("the workspace has no data key {id} any more")]
    NoDataKey { id: String },
    #[error(
        "the data key {id} is wrapped by the key {wrapped_by}, which is not in the coordinator's keyring; put it back there"
    )]
    NoWrappingKey { id: String, wrapped_by: String },
    #[error("{what}: {source}")]
    Damaged { what: String, source: Unsealable },
}

/// Seals and opens. Cheap to clone.
#[derive(Clone)]
pub struct Vault {
    source: Arc<Source>,
    latest: Arc<Mutex<Latest>>,
}

struct Latest {
    ring: Arc<Keyring>,
    /// When its file was last changed, where it is one.
    modified: Option<SystemTime>,
    /// The data keys that were looked through last, and those of them that it does not open.
    closed: Option<Closed>,
}

type Closed = (OrdMap<String, Arc<Vec<DataKey>>>, Arc<BTreeSet<String>>);

impl Vault {
    /// Reads the keyring; a new ensemble gets one.
    pub fn open(source: Source, new: bool) -> Result<Vault, KeyringError> {
        if new {
            source.make()?;
        }
        let modified = modified(&source);
        let ring = Arc::new(source.read()?);
        tracing::info!(%source, key = ring.current().0, "keyring");
        Ok(Vault {
            source: Arc::new(source),
            latest: Arc::new(Mutex::new(Latest {
                ring,
                modified,
                closed: None,
            })),
        })
    }

    /// Reads the keyring anew, where it is a file that has changed. It waits for the disk.
    pub fn reload(&self) -> Result<(), KeyringError> {
        let now = modified(&self.source);
        let known = self.latest().modified;
        if now == known {
            return Ok(());
        }
        let ring = Arc::new(self.source.read()?);
        tracing::info!(source = %self.source, key = ring.current().0, "another keyring");
        *self.latest() = Latest {
            ring,
            modified: now,
            closed: None,
        };
        Ok(())
    }

    /// A new data key for a workspace, wrapped.
    pub fn draw(&self, workspace: &str) -> DataKey {
        let id = uuid::Uuid::new_v4().to_string();
        self.wrap(workspace, id, &Key::draw())
    }

    fn wrap(&self, workspace: &str, id: String, key: &Key) -> DataKey {
        let ring = self.latest().ring.clone();
        let (wrapped_by, wrapping) = ring.current();
        DataKey {
            wrapped: wrapping.seal(&about_key(workspace, &id), key.bytes()),
            wrapped_by: wrapped_by.to_owned(),
            id,
        }
    }

    fn unwrap(&self, workspace: &str, key: &DataKey) -> Result<Key, VaultError> {
        let ring = self.latest().ring.clone();
        let missing = || VaultError::NoWrappingKey {
            id: key.id.clone(),
            wrapped_by: key.wrapped_by.clone(),
        };
        let wrapping = ring.find(&key.wrapped_by).ok_or_else(missing)?;
        let opened = wrapping.open(&about_key(workspace, &key.id), &key.wrapped);
        let opened = opened.and_then(|bytes| Key::of(&bytes).ok_or(Unsealable));
        opened.map_err(|source| VaultError::Damaged {
            what: format!("the data key {}", key.id),
            source,
        })
    }

    /// Seals the secrets of the resource with a UUID.
    pub fn seal(
        &self,
        (workspace, key): (&str, &DataKey),
        uid: &str,
        places: Vec<Place<'_>>,
    ) -> Result<(), VaultError> {
        let opened = self.unwrap(workspace, key)?;
        for (path, value) in places.into_iter().filter(|(_, value)| !value.is_empty()) {
            let sealed = Sealed {
                key: key.id.clone(),
                bytes: opened.seal(&about_secret(uid, &path), value.as_bytes()),
            };
            *value = sealed.to_string();
        }
        Ok(())
    }

    /// Opens the secrets of the resource with a UUID.
    pub fn unseal(
        &self,
        state: &State,
        workspace: &str,
        uid: &str,
        places: Vec<Place<'_>>,
    ) -> Result<(), VaultError> {
        for (path, value) in places.into_iter().filter(|(_, value)| !value.is_empty()) {
            let damaged = |source| VaultError::Damaged {
                what: path.clone(),
                source,
            };
            let sealed = Sealed::parse(value).ok_or(Unsealable).map_err(damaged)?;
            let key = keys::find(state, workspace, &sealed.key);
            let key = key.ok_or(VaultError::NoDataKey { id: sealed.key })?;
            let key = self.unwrap(workspace, key)?;
            let opened = key.open(&about_secret(uid, &path), &sealed.bytes);
            let opened = opened.map_err(damaged)?;
            *value = String::from_utf8(opened.to_vec()).map_err(|_| damaged(Unsealable))?;
        }
        Ok(())
    }

    /// The ids of data keys that cannot be opened, because the keyring lacks what wrapped them. The same is not looked for twice.
    pub fn closed(&self, state: &State) -> Arc<BTreeSet<String>> {
        let mut latest = self.latest();
        if let Some((keys, closed)) = &latest.closed
            && keys.ptr_eq(&state.data_keys)
        {
            return closed.clone();
        }
        let keys = state.data_keys.values().flat_map(|keys| keys.iter());
        let closed = keys.filter(|key| latest.ring.find(&key.wrapped_by).is_none());
        let closed = Arc::new(closed.map(|key| key.id.clone()).collect());
        latest.closed = Some((state.data_keys.clone(), Arc::clone(&closed)));
        closed
    }

    /// The id of the key that wraps.
    pub fn current(&self) -> String {
        self.latest().ring.current().0.to_owned()
    }

    /// The data keys that an earlier key wrapped, wrapped by the current one; what cannot be opened stays as it is.
    pub fn rewrap(&self, state: &State) -> Vec<Kind> {
        let current = self.latest().ring.current().0.to_owned();
        let keys = state
            .data_keys
            .iter()
            .flat_map(|(workspace, keys)| keys.iter().map(move |key| (workspace, key)));
        let old = keys.filter(|(_, key)| key.wrapped_by != current);
        let anew = old.filter_map(|(workspace, key)| match self.unwrap(workspace, key) {
            Ok(opened) => Some(Kind::PutDataKey(PutDataKey {
                workspace: workspace.clone(),
                key: Some(self.wrap(workspace, key.id.clone(), &opened)),
                // Itself: where it is not there any more, it does not come back.
                follows: key.id.clone(),
            })),
            Err(error) => {
                tracing::debug!(%error, workspace, "secrets are closed");
                None
            }
        });
        anew.take(REWRAPPED_MAX).collect()
    }

    fn latest(&self) -> std::sync::MutexGuard<'_, Latest> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn modified(source: &Source) -> Option<SystemTime> {
    match source {
        Source::File(path) => fs::metadata(path).and_then(|found| found.modified()).ok(),
        Source::Variable(_) | Source::Command(_) => None,
    }
}

fn about_key(workspace: &str, id: &str) -> String {
    format!("data key {id} of {workspace}")
}

fn about_secret(uid: &str, path: &str) -> String {
    format!("{path} of {uid}")
}

#[cfg(test)]
mod tests {
    use batchai_proto::secrets;
    use batchai_proto::v1::{EnvironmentVariableWithSecretValue, Job};

    use super::*;

    const WORKSPACE: &str = "resourceGroups/g/workspaces/w";

    fn job(value: &str) -> Job {
        Job {
            uid: "u".into(),
            secrets: vec![EnvironmentVariableWithSecretValue {
                name: "TOKEN".into(),
                value: value.into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn state(keys: &[DataKey]) -> State {
        let mut state = State::default();
        state
            .data_keys
            .insert(WORKSPACE.into(), Arc::new(keys.to_vec()));
        state
    }

    #[test]
    fn a_secret_opens_for_its_resource_also_once_its_key_was_wrapped_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let source = Source::File(path.clone());
        let vault = Vault::open(source.clone(), true).unwrap();
        let key = vault.draw(WORKSPACE);
        let mut sealed = job("hunter2");
        vault
            .seal((WORKSPACE, &key), "u", secrets::of_job(&mut sealed))
            .unwrap();
        let before = state(std::slice::from_ref(&key));
        let open = |vault: &Vault, state: &State, uid: &str| {
            let mut job = sealed.clone();
            vault
                .unseal(state, WORKSPACE, uid, secrets::of_job(&mut job))
                .map(|()| job.secrets[0].value.clone())
        };
        assert_eq!(open(&vault, &before, "u").unwrap(), "hunter2");
        assert!(matches!(
            open(&vault, &before, "v"),
            Err(VaultError::Damaged { .. })
        ));
        assert!(matches!(
            open(&vault, &state(&[]), "u"),
            Err(VaultError::NoDataKey { .. })
        ));
        assert!(vault.rewrap(&before).is_empty());

        source.rotate().unwrap();
        // The clock of files may be coarse.
        let file = fs::File::open(&path).unwrap();
        file.set_modified(SystemTime::now() + std::time::Duration::from_secs(2))
            .unwrap();
        vault.reload().unwrap();
        let Kind::PutDataKey(anew) = &vault.rewrap(&before)[0] else {
            panic!("not a data key");
        };
        let after = state(&[anew.key.clone().unwrap()]);
        assert_eq!(open(&vault, &after, "u").unwrap(), "hunter2");
        let text = fs::read_to_string(&path).unwrap();
        let newest = text.lines().next().unwrap();
        fs::write(&path, newest).unwrap();
        let only = Vault::open(source.clone(), false).unwrap();
        assert_eq!(open(&only, &after, "u").unwrap(), "hunter2");
        assert!(matches!(
            open(&only, &before, "u"),
            Err(VaultError::NoWrappingKey { .. })
        ));
        assert_eq!(*only.closed(&before), [key.id].into());
        assert!(only.closed(&after).is_empty());
        fs::remove_file(&path).unwrap();
        assert!(
            Vault::open(source, false).is_err(),
            "a lost keyring is not made anew"
        );
    }
}
