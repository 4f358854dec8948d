//! PURE. Who somebody is.

use std::fmt;

use crate::names::{Kind, check_id};

/// The scheme of the URI that names an identity in a certificate.
const SCHEME: &str = "batchai:";
const USER_BYTES_MAX: usize = 64;

/// Who somebody is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// A person, or a program that acts for one.
    User { name: String },
    /// A node's agent.
    Node { id: String, uid: String },
    /// A coordinator.
    Replica { id: u64 },
}

/// Why a text names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names nobody: {form} is expected")]
pub struct IdentityError {
    text: String,
    form: &'static str,
}

impl Identity {
    /// A user of this name.
    ///
    /// # Errors
    /// The name has other characters than letters, digits and `-_.@`, or not 1 to 64 of them.
    pub fn user(name: &str) -> Result<Identity, IdentityError> {
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        let sized = (1..=USER_BYTES_MAX).contains(&name.len());
        match sized && name.chars().all(legal) {
            true => Ok(Identity::User {
                name: name.to_owned(),
            }),
            false => Err(error(name, "1 to 64 characters of [-A-Za-z0-9_.@]")),
        }
    }

    /// A node of this id and UUID.
    pub fn node(id: &str, uid: &str) -> Result<Identity, IdentityError> {
        let well_formed = check_id(Kind::Node, id).is_ok() && is_canonical(uid);
        match well_formed {
            true => Ok(Identity::Node {
                id: id.to_owned(),
                uid: uid.to_owned(),
            }),
            false => Err(error(
                &format!("{id}/{uid}"),
                "the id of a node and its UUID",
            )),
        }
    }

    /// What stands in a certificate.
    pub fn uri(&self) -> String {
        match self {
            Identity::Node { id, uid } => format!("{SCHEME}nodes/{id}/{uid}"),
            other => format!("{SCHEME}{other}"),
        }
    }

    /// Whether a URI is meant to name somebody here.
    pub fn is_ours(uri: &str) -> bool {
        uri.starts_with(SCHEME)
    }

    /// Reads what stands in a certificate.
    pub fn parse(uri: &str) -> Result<Identity, IdentityError> {
        let form = "batchai:users/NAME, batchai:nodes/ID/UUID or batchai:replicas/NUMBER";
        let parts: Vec<_> = uri
            .strip_prefix(SCHEME)
            .unwrap_or_default()
            .split('/')
            .collect();
        match parts[..] {
            ["users", name] => Identity::user(name),
            ["nodes", id, uid] => Identity::node(id, uid),
            ["replicas", id] => {
                let id = id.parse().map_err(|_| error(uri, form))?;
                Ok(Identity::Replica { id })
            }
            _ => Err(error(uri, form)),
        }
    }
}

/// One spelling of each UUID: names are compared as texts.
fn is_canonical(uid: &str) -> bool {
    uuid::Uuid::try_parse(uid).is_ok_and(|parsed| parsed.to_string() == uid)
}

fn error(text: &str, form: &'static str) -> IdentityError {
    let text = text.chars().take(2 * USER_BYTES_MAX).collect();
    IdentityError { text, form }
}

/// As it stands in role bindings and the audit log.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::User { name } => write!(f, "users/{name}"),
            Identity::Node { id, .. } => write!(f, "nodes/{id}"),
            Identity::Replica { id } => write!(f, "replicas/{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_a_certificate_comes_back_and_nothing_else_is_somebody() {
        let uid = "6c98e5a2-45c8-4cc2-975b-c7ef73faf83b";
        for identity in [
            Identity::user("ada@lab.example").unwrap(),
            Identity::node("gpu-1", uid).unwrap(),
            Identity::Replica { id: 7 },
        ] {
            assert_eq!(Identity::parse(&identity.uri()), Ok(identity));
        }
        for uri in [
            "",
            "batchai:",
            "batchai:users/",
            "batchai:users/a/b",
            "batchai:users/a b",
            "users/a",
            "batchai:nodes/a",
            "batchai:nodes/a/b",
            "batchai:nodes/a/6C98E5A2-45c8-4cc2-975b-c7ef73faf83b",
            "batchai:nodes/../6c98e5a2-45c8-4cc2-975b-c7ef73faf83b",
            "batchai:replicas/x",
            "batchai:replicas/-1",
            "spiffe://x/users/a",
        ] {
            assert!(Identity::parse(uri).is_err(), "{uri}");
        }
        assert!(Identity::user(&"x".repeat(65)).is_err());
    }
}
