//! What a replica is told of its ensemble before it starts: a file in its data directory, which `init` writes.
//!
//! It says which ensemble this is, which of its replicas, and with whom it began. What changes later stands in the State.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use batchai_common::tls::Connector;
use batchai_common::tls::credentials::write_private;
use batchai_proto::internal::v1::Replica;
use batchai_proto::internal::v1::replica::Role;
use serde_json::{Value, json};

const FILE: &str = "ensemble.json";
/// The id of the only replica of an ensemble that was told of no others.
pub const FIRST_REPLICA: u64 = 1;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}", path = .path.display())]
pub struct EnsembleError {
    path: PathBuf,
    why: String,
}

/// What a replica is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ensemble {
    /// A UUID.
    pub uuid: String,
    /// Which replica this is.
    pub replica: u64,
    /// Who has a vote in the beginning, and where each is reached.
    pub first: BTreeMap<u64, String>,
}

impl Ensemble {
    /// A new ensemble, of one replica that nobody need reach or of several, seen by one of them.
    pub fn new(replicas: BTreeMap<u64, String>) -> Ensemble {
        let one = || BTreeMap::from([(FIRST_REPLICA, String::new())]);
        let first = if replicas.is_empty() { one() } else { replicas };
        let replica = first.keys().next().copied().unwrap_or(FIRST_REPLICA);
        Ensemble {
            uuid: uuid::Uuid::new_v4().to_string(),
            replica,
            first,
        }
    }

    /// Whether a data directory says something.
    pub fn is_told(data: &Path) -> bool {
        data.join(FILE).exists()
    }

    /// Reads what a data directory says; one that says nothing is of an ensemble of its own.
    pub fn read(data: &Path) -> Result<Ensemble, EnsembleError> {
        let path = data.join(FILE);
        if !Ensemble::is_told(data) {
            return Ok(Ensemble::new(BTreeMap::new()));
        }
        let bad = |why: String| EnsembleError {
            path: path.clone(),
            why,
        };
        let text = std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        Ensemble::of(&value).ok_or_else(|| bad("it is not what `coordinator init` writes".into()))
    }

    fn of(value: &Value) -> Option<Ensemble> {
        let first = value["replicas"].as_object()?.iter().map(|(id, endpoint)| {
            let id = id.parse().ok().filter(|id| *id != 0)?;
            Some((id, endpoint.as_str()?.to_owned()))
        });
        Some(Ensemble {
            uuid: uuid::Uuid::try_parse(value["ensemble"].as_str()?)
                .ok()?
                .to_string(),
            replica: value["replica"].as_u64().filter(|id| *id != 0)?,
            first: first.collect::<Option<_>>()?,
        })
    }

    /// Writes it into a data directory.
    pub fn write(
        &self,
        data: &Path,
    ) -> Result<(), batchai_common::tls::credentials::CredentialsError> {
        let replicas: serde_json::Map<_, _> = self
            .first
            .iter()
            .map(|(id, endpoint)| (id.to_string(), endpoint.clone().into()))
            .collect();
        let value = json!({ "ensemble": self.uuid, "replica": self.replica, "replicas": replicas });
        write_private(&data.join(FILE), &format!("{value:#}\n"))
    }

    /// Who has a vote in the beginning.
    pub fn voters(&self) -> Vec<u64> {
        self.first.keys().copied().collect()
    }

    /// The same for the State.
    pub fn replicas(&self) -> Vec<Replica> {
        let replicas = self.first.iter().map(|(id, endpoint)| Replica {
            id: *id,
            role: Role::Voter as i32,
            endpoint: endpoint.clone(),
            ..Replica::default()
        });
        replicas.collect()
    }
}

/// Reads `ID=URL`.
pub fn replica(text: &str) -> Result<(u64, String), String> {
    let form = "give ID=https://ADDRESS:PORT, the id a number from 1 on";
    let (id, endpoint) = text.split_once('=').ok_or(form)?;
    let id = id.parse().ok().filter(|id| *id > 0).ok_or(form)?;
    check_endpoint(endpoint)?;
    Ok((id, endpoint.to_owned()))
}

/// Whether a text says where a replica is reached.
pub fn check_endpoint(text: &str) -> Result<(), String> {
    Connector::check(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let of = |texts: &[&str]| texts.iter().map(|text| replica(text).unwrap()).collect();
        let three = Ensemble::new(of(&["2=https://b:1", "1=https://a:1", "3=https://[::1]:1"]));
        assert_eq!((three.replica, three.voters()), (1, vec![1, 2, 3]));
        three.write(dir.path()).unwrap();
        assert_eq!(Ensemble::read(dir.path()).unwrap(), three);
        for bad in [
            "",
            "1",
            "0=https://a:1",
            "x=https://a:1",
            "1=a:1",
            "1=https://a",
        ] {
            assert!(replica(bad).is_err(), "{bad}");
        }
        std::fs::write(dir.path().join(FILE), "{}").unwrap();
        assert!(Ensemble::read(dir.path()).is_err());
        let one = Ensemble::read(&dir.path().join("none")).unwrap();
        assert_eq!(one.voters(), [FIRST_REPLICA]);
    }
}
