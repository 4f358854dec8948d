//! PURE. Role bindings, tokens, and whose certificates are good no more.
//!
//! What a role allows is not decided here; see `access`.

use std::sync::Arc;

use batchai_common::names::Kind;
use batchai_common::time::{from_millis, millis};
use batchai_proto::internal::v1::{Delete, ExpelNode, RevokeCertificates, UseToken};
use batchai_proto::v1::token::Kind as TokenKind;
use batchai_proto::v1::{RoleBinding, Token};

use super::{
    Rejection, State, Step, check_etag, check_new, etag, file_servers, loss, names, nodes,
    not_found, restore,
};

/// A machine that has joined by a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    pub uid: String,
    /// The token's full name.
    pub token: String,
    /// Of its request for a certificate.
    pub digest: Vec<u8>,
    /// The VM size that it must have; any where it is empty.
    pub vm_size: String,
}

/// No certificate is good for longer.
const CERTIFICATE_AGE_MAX_S: i64 = 366 * 24 * 3600;
/// Bindings in one part of the ensemble: its owner cannot use up those of all.
const BINDINGS_OF_SCOPE_MAX: usize = 1000;
/// How long a token is good where nobody says.
const TTL_DEFAULT_MS: i64 = 3600 * 1000;

pub(super) fn create_role_binding(
    step: &mut Step<'_>,
    binding: &RoleBinding,
) -> Result<(), Rejection> {
    let state = &mut *step.state;
    let name = &binding.name;
    check_new(state, Kind::RoleBinding, name)?;
    let same = |known: &&Arc<RoleBinding>| known.scope == binding.scope;
    if state.role_bindings.values().filter(same).count() >= BINDINGS_OF_SCOPE_MAX {
        return Err(Rejection::LimitReached {
            kind: Kind::RoleBinding,
            limit: BINDINGS_OF_SCOPE_MAX,
            place: match binding.scope.as_str() {
                "" => super::ENSEMBLE.to_owned(),
                scope => scope.to_owned(),
            },
        });
    }
    let stored = RoleBinding {
        etag: etag(state.revision),
        create_time: Some(state.time),
        ..binding.clone()
    };
    state.grants.insert((binding.member.clone(), name.clone()));
    state.role_bindings.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    Ok(())
}

pub(super) fn create_token(step: &mut Step<'_>, token: &Token) -> Result<(), Rejection> {
    forget_expired(step);
    let state = &mut *step.state;
    let name = &token.name;
    check_new(state, Kind::Token, name)?;
    let ttl = token.ttl.map(|ttl| ttl.seconds * 1000);
    let expires = millis(&state.time) + ttl.unwrap_or(TTL_DEFAULT_MS);
    let stored = Token {
        etag: etag(state.revision),
        create_time: Some(state.time),
        expire_time: Some(from_millis(expires)),
        ttl: None,
        ..token.clone()
    };
    state.tokens.insert(name.clone(), Arc::new(stored));
    step.changed(name);
    Ok(())
}

/// What is not good any more takes no room.
fn forget_expired(step: &mut Step<'_>) {
    let now = millis(&step.state.time);
    let expired = step
        .state
        .tokens
        .iter()
        .filter(|(_, token)| is_expired(token, now));
    for name in expired.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
        step.state.tokens.remove(&name);
        step.deleted(&name);
    }
}

/// Whether a token is too old at a time in milliseconds.
pub fn is_expired(token: &Token, now: i64) -> bool {
    token.expire_time.is_none_or(|end| millis(&end) <= now)
}

pub(super) fn delete_role_binding(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = step.state.role_bindings.get(name);
    let found = found.ok_or_else(|| not_found(Kind::RoleBinding, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    remove_binding(step, name);
    Ok(())
}

pub(super) fn delete_token(step: &mut Step<'_>, command: &Delete) -> Result<(), Rejection> {
    let name = &command.name;
    let found = step.state.tokens.get(name);
    let found = found.ok_or_else(|| not_found(Kind::Token, name))?;
    check_etag(name, &command.etag, &found.etag)?;
    step.state.tokens.remove(name);
    step.deleted(name);
    Ok(())
}

/// A machine joins, and has the node's name from now on.
pub(super) fn use_token(step: &mut Step<'_>, command: &UseToken) -> Result<(), Rejection> {
    let wrong = |name: &str, why: &str| Rejection::WrongState {
        name: name.to_owned(),
        why: why.to_owned(),
    };
    let now = millis(&step.state.time);
    let found = step.state.tokens.get(&command.name);
    let token = found.ok_or_else(|| not_found(Kind::Token, &command.name))?;
    if token.kind() != TokenKind::Node || is_expired(token, now) {
        return Err(wrong(&command.name, "it has expired, or is not for nodes"));
    }
    let joined = Joined {
        uid: command.uid.clone(),
        token: command.name.clone(),
        digest: command.digest.clone(),
        vm_size: token.vm_size.clone(),
    };
    let known = step.state.joined.get(&command.node);
    if known == Some(&joined) {
        // Whoever asks has not heard the answer.
        return Ok(());
    }
    if token.use_count >= token.use_count_max {
        return Err(wrong(&command.name, "it was used as often as it may be"));
    }
    if step.state.is_expelled(&command.node, &command.uid) {
        return Err(wrong(
            &command.node,
            "it was expelled; give its agent a new --data directory",
        ));
    }
    let node = step.state.nodes.get(&command.node);
    if known.is_some() || node.is_some_and(|node| !node.expelled) {
        let why = "another machine is that node; expel it first, or give this one another --name";
        return Err(wrong(&command.node, why));
    }
    let limit = super::limit(Kind::Node);
    if step.state.joined.len() >= limit {
        return Err(Rejection::LimitReached {
            kind: Kind::Node,
            limit,
            place: super::ENSEMBLE.to_owned(),
        });
    }
    let token = Token {
        use_count: token.use_count + 1,
        etag: etag(step.state.revision),
        ..Token::clone(token)
    };
    step.state
        .tokens
        .insert(command.name.clone(), Arc::new(token));
    step.state.joined.insert(command.node.clone(), joined);
    step.changed(&command.name);
    Ok(())
}

pub(super) fn revoke_certificates(
    step: &mut Step<'_>,
    command: &RevokeCertificates,
) -> Result<(), Rejection> {
    let now = step.state.time.seconds;
    // No certificate is older than that.
    let revoked = std::mem::take(&mut step.state.revoked);
    step.state.revoked = revoked
        .into_iter()
        .filter(|(_, until)| now - until <= CERTIFICATE_AGE_MAX_S)
        .collect();
    step.state.revoked.insert(command.member.clone(), now);
    if step.state.nodes.contains_key(&command.member) {
        step.assigned(&command.member);
    }
    Ok(())
}

pub(super) fn expel_node(step: &mut Step<'_>, command: &ExpelNode) -> Result<(), Rejection> {
    let name = &command.name;
    let node = step.state.nodes.get(name).cloned();
    let joined = step.state.joined.remove(name);
    if node.is_none() && joined.is_none() {
        return Err(not_found(Kind::Node, name));
    }
    // The way in goes with who came by it.
    if let Some(joined) = &joined
        && step.state.tokens.remove(&joined.token).is_some()
    {
        step.deleted(&joined.token);
    }
    let uids = [joined.map(|j| j.uid), node.as_ref().map(|n| n.uid.clone())];
    for uid in uids.into_iter().flatten() {
        step.state.expelled.insert((name.clone(), uid));
    }
    let Some(node) = node.filter(|node| !node.expelled) else {
        return Ok(());
    };
    if let Some(attempt) = &node.attempt {
        loss::gone(step, attempt, name, &format!("{name} was expelled"));
    }
    nodes::change(step, name, |node| {
        node.expelled = true;
        node.leaving |= node.cluster.is_some();
    });
    nodes::assign(step, name);
    nodes::free_if_leaving(step, name);
    file_servers::expelled(step, name);
    restore::forget(step, name);
    Ok(())
}

/// What is bound to a part of the ensemble goes with it: who gets its name later is somebody else.
pub(super) fn forget_scope(step: &mut Step<'_>, scope: &str) {
    let within = |binding: &RoleBinding| !binding.scope.is_empty() && covers(scope, &binding.scope);
    let bindings = step.state.role_bindings.iter();
    let gone: Vec<_> = bindings
        .filter(|(_, binding)| within(binding))
        .map(|(name, _)| name.clone())
        .collect();
    for name in gone {
        remove_binding(step, &name);
    }
}

fn remove_binding(step: &mut Step<'_>, name: &str) {
    if let Some(gone) = step.state.role_bindings.remove(name) {
        let grant = (gone.member.clone(), name.to_owned());
        step.state.grants.remove(&grant);
        step.deleted(name);
    }
}

impl State {
    /// Whether a certificate that somebody got at a time, in seconds, is good no more.
    pub fn is_revoked(&self, member: &str, got: i64) -> bool {
        self.revoked.get(member).is_some_and(|until| got <= *until)
    }

    /// Whether a node of this name and UUID was expelled.
    pub fn is_expelled(&self, node: &str, uid: &str) -> bool {
        self.expelled.contains(&(node.to_owned(), uid.to_owned()))
    }

    /// Whether a node is the one that is registered under its name, and not expelled.
    pub fn has_node(&self, node: &str, uid: &str) -> bool {
        let known = self.nodes.get(node);
        known.is_some_and(|known| known.uid == uid && !known.expelled)
    }

    /// The role bindings of somebody.
    pub fn bindings_of<'a>(&'a self, member: &'a str) -> impl Iterator<Item = &'a RoleBinding> {
        let from = (member.to_owned(), String::new());
        let names = self.grants.range(from..).map(|(whose, name)| (whose, name));
        let names = names.take_while(move |(whose, _)| *whose == member);
        names.filter_map(|(_, name)| self.role_bindings.get(name).map(|binding| &**binding))
    }
}

/// Whether a name lies in a part of the ensemble.
pub fn covers(scope: &str, name: &str) -> bool {
    scope.is_empty() || name == scope || names::is_below(scope, name)
}
