//! PURE. Who may do what: deny by default.
//!
//! A call takes a permission (`rules`), and names what it is about (`scope`). Whoever calls has grants: a role in a part of
//! the ensemble each. It is allowed where one of them has the permission there.

pub mod rules;
pub mod scope;

use std::sync::Arc;

use batchai_common::error::ApiError;
use batchai_common::names::Kind;
use batchai_common::tls::{Identity, Shown};
use batchai_proto::v1::Token;
use batchai_proto::v1::role_binding::Role;
use sha2::{Digest as _, Sha256};

use crate::state::State;
use crate::state::access::{covers, is_expired};
use rules::Place;

/// The permission of calls that only a node's agent makes: it has it for its own node, and nobody else has it.
pub const WORK: &str = "batchai/nodes/work/action";

/// The permission to say what nodes do for a cluster as their agents' own user, which is root: beside that of the call.
pub const SET_UP: &str = "batchai/nodes/setUp/action";

/// The permission to run jobs: what a job uses must be where its owner may run some.
pub const RUN_JOBS: &str = "batchai/workspaces/experiments/jobs/write";

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Anybody: the ensemble is a lab without TLS, in which everybody may do everything.
    Lab,
    /// Nobody: neither certificate nor token.
    Nobody,
    Known(Identity),
}

/// A role in a part of the ensemble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub role: Role,
    pub scope: String,
}

/// Who calls, and what he may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub who: Who,
    /// What he has shown, if it is a certificate.
    pub certificate: Option<Arc<Shown>>,
    pub grants: Vec<Grant>,
}

/// Why a token is refused. It is not said to who shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenFault {
    #[error("it is not one")]
    Form,
    #[error("it does not exist, or was revoked")]
    Unknown,
    #[error("its secret is wrong")]
    Secret,
    #[error("it has expired")]
    Expired,
    #[error("it is for something else")]
    Kind,
}

/// Finds the token that a text is of: its id, a dot and its secret. `now` is in milliseconds.
pub fn find_token<'a>(state: &'a State, text: &str, now: i64) -> Result<&'a Token, TokenFault> {
    let (id, secret) = text.split_once('.').ok_or(TokenFault::Form)?;
    let name = format!("{}/{id}", Kind::Token.collection());
    let token = state.tokens.get(&name).ok_or(TokenFault::Unknown)?;
    let digest = batchai_common::names::hex(&Sha256::digest(secret));
    // How long this takes says something of the digest, which says nothing of the secret.
    if digest != token.secret_sha256 {
        return Err(TokenFault::Secret);
    }
    match is_expired(token, now) {
        true => Err(TokenFault::Expired),
        false => Ok(token),
    }
}

impl Caller {
    /// Somebody that may do nothing.
    pub fn nobody() -> Caller {
        Caller {
            who: Who::Nobody,
            certificate: None,
            grants: Vec::new(),
        }
    }

    /// Anybody, in a lab.
    pub fn lab() -> Caller {
        let scope = String::new();
        Caller {
            who: Who::Lab,
            certificate: None,
            grants: vec![Grant {
                role: Role::Admin,
                scope,
            }],
        }
    }

    /// Who has shown a certificate. The administrator needs no binding.
    pub fn known(state: &State, identity: Identity, admin: &str) -> Caller {
        let grants = match &identity {
            Identity::User { name } if name == admin => vec![Grant {
                role: Role::Admin,
                scope: String::new(),
            }],
            Identity::User { .. } => {
                let member = identity.to_string();
                let grant = |binding: &batchai_proto::v1::RoleBinding| Grant {
                    role: binding.role(),
                    scope: binding.scope.clone(),
                };
                state.bindings_of(&member).map(grant).collect()
            }
            // They have calls of their own, and none of the API's.
            Identity::Node { .. } | Identity::Replica { .. } => Vec::new(),
        };
        Caller {
            who: Who::Known(identity),
            certificate: None,
            grants,
        }
    }

    /// Who has shown a user's token: it may what its user may, and no more than it says itself.
    pub fn bearer(state: &State, token: &Token, admin: &str) -> Result<Caller, TokenFault> {
        let name = token
            .member
            .strip_prefix("users/")
            .ok_or(TokenFault::Kind)?;
        let identity = Identity::user(name).map_err(|_| TokenFault::Kind)?;
        let mut caller = Caller::known(state, identity, admin);
        let narrow = |grant: Grant| {
            let scope = match (
                covers(&token.scope, &grant.scope),
                covers(&grant.scope, &token.scope),
            ) {
                (true, _) => grant.scope,
                (_, true) => token.scope.clone(),
                _ => return None,
            };
            let role = match token.role() {
                Role::Unspecified => grant.role,
                most => grant.role.min(most),
            };
            Some(Grant { role, scope })
        };
        caller.grants = caller.grants.into_iter().filter_map(narrow).collect();
        Ok(caller)
    }

    /// Whether he may do something to what has a name, or to the whole ensemble where it is empty.
    pub fn may(&self, permission: &str, name: &str) -> bool {
        self.grants
            .iter()
            .any(|grant| allows(grant.role, permission) && covers(&grant.scope, name))
    }

    /// Whether he may do something anywhere.
    pub fn may_somewhere(&self, permission: &str) -> bool {
        self.grants
            .iter()
            .any(|grant| allows(grant.role, permission))
    }

    /// Whether he may make a call about what it names.
    pub fn may_call(&self, permission: &str, place: &Place, name: &str) -> bool {
        match place {
            Place::Anywhere => self.may_somewhere(permission),
            Place::Ensemble => self.may(permission, ""),
            Place::Field(_) => self.may(permission, name),
        }
    }

    /// Why he is refused whatever he wants: what he has shown is good no more.
    pub fn refusal(&self, state: &State) -> Option<ApiError> {
        let (Who::Known(identity), Some(shown)) = (&self.who, &self.certificate) else {
            return None;
        };
        let member = identity.to_string();
        match identity {
            Identity::Node { uid, .. } if state.is_expelled(&member, uid) => {
                return Some(ApiError::Expelled { name: member });
            }
            _ => {}
        }
        let revoked = state.is_revoked(&member, shown.not_before);
        let why = "the certificate was revoked";
        revoked.then_some(ApiError::Unauthenticated { why })
    }

    /// Whether he is a node's agent, this one's. In a lab anybody is.
    pub fn is_node(&self, node_id: &str, node_uid: &str) -> bool {
        match &self.who {
            Who::Lab => true,
            Who::Known(Identity::Node { id, uid }) => id == node_id && uid == node_uid,
            _ => false,
        }
    }

    /// As it stands in the audit log.
    pub fn label(&self) -> String {
        match &self.who {
            Who::Lab => "lab".to_owned(),
            Who::Nobody => "nobody".to_owned(),
            Who::Known(identity) => identity.to_string(),
        }
    }
}

/// Whether a role has a permission.
pub fn allows(role: Role, permission: &str) -> bool {
    let reads = permission.ends_with("/read");
    let within = |part: &str| permission.starts_with(&format!("batchai/{part}/"));
    let administrates = [
        "tokens",
        "certificates",
        "audit",
        "replicas",
        "backups",
        "restores",
        "strayAttempts",
    ]
    .into_iter()
    .any(within);
    let binds = within("roleBindings");
    match role {
        Role::Unspecified => false,
        Role::Reader => reads && !administrates && !binds,
        Role::Contributor => {
            allows(Role::Reader, permission) || within("workspaces") || within("bundles")
        }
        Role::Owner => allows(Role::Contributor, permission) || within("resourceGroups") || binds,
        Role::Admin => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(grants: &[(Role, &str)]) -> Caller {
        let grant = |(role, scope): &(Role, &str)| Grant {
            role: *role,
            scope: (*scope).to_owned(),
        };
        Caller {
            who: Who::Nobody,
            certificate: None,
            grants: grants.iter().map(grant).collect(),
        }
    }

    #[test]
    fn a_role_reaches_as_far_as_its_scope_and_no_further() {
        let w = "resourceGroups/g/workspaces/w";
        let caller = caller(&[(Role::Contributor, w), (Role::Reader, "resourceGroups/h")]);
        let write = "batchai/workspaces/experiments/jobs/write";
        let read = "batchai/workspaces/experiments/jobs/read";
        assert!(caller.may(write, &format!("{w}/experiments/e")));
        for elsewhere in [
            "",
            "resourceGroups/g",
            "resourceGroups/g/workspaces/w2/experiments/e",
            "resourceGroups/-/workspaces/w",
            "resourceGroups/h/workspaces/w",
        ] {
            assert!(!caller.may(write, elsewhere), "{elsewhere}");
        }
        assert!(caller.may(read, "resourceGroups/h/workspaces/w"));
        assert!(caller.may_somewhere(write));
        assert!(!caller.may_somewhere("batchai/nodes/expel/action"));
        assert!(!Caller::nobody().may_somewhere(read));
    }

    #[test]
    fn roles_hold_what_the_lesser_ones_hold() {
        for (_, permission, _) in rules::RULES {
            let roles = [
                Role::Unspecified,
                Role::Reader,
                Role::Contributor,
                Role::Owner,
                Role::Admin,
            ];
            let allowed = roles.map(|role| allows(role, permission));
            assert!(allowed.is_sorted(), "{permission}: {allowed:?}");
            assert!(!allowed[0] && allowed[4], "{permission}");
        }
    }
}
