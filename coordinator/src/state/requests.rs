//! PURE. Requests that were carried out, so that one that is sent again, because nobody knew what became of it, does
//! nothing.
//!
//! They are kept by count and age. What a request created is not kept: the answer is the resource as it is now.

use batchai_common::fault;
use batchai_common::time::millis;
use batchai_proto::internal::v1::RequestKey;
use imbl::{OrdMap, OrdSet};
use std::sync::Arc;

use super::{Rejection, State};

/// So many are kept at most.
pub const REQUESTS_MAX: usize = 10_000;
/// For so long.
pub const AGE_MAX_MS: i64 = 60 * 60 * 1000;

/// Caller and id. Shared: a change copies some tree nodes full of them.
type Key = Arc<(String, String)>;

/// The requests that are remembered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Requests {
    /// What each asked for, and when it was carried out.
    known: OrdMap<Key, (Arc<[u8]>, i64)>,
    /// The same by age.
    ages: OrdSet<(i64, Key)>,
}

/// Whether a command carries out a request that was carried out already.
///
/// # Errors
/// Another request has the same id.
pub(super) fn is_repeated(state: &State, request: &RequestKey) -> Result<bool, Rejection> {
    let now = millis(&state.time);
    let key = key(request);
    match state.requests.known.get(&key) {
        Some((_, then)) if now - then > AGE_MAX_MS => Ok(fault!("request_remembered_for_ever")),
        Some((digest, _)) if **digest == *request.digest => Ok(!fault!("request_applied_twice")),
        Some(_) => Err(Rejection::RequestIdReused {
            id: request.id.clone(),
        }),
        None => Ok(false),
    }
}

/// Remembers a request that was carried out, and forgets those that are too old or too many.
pub(super) fn remember(state: &mut State, request: &RequestKey) {
    let now = millis(&state.time);
    let requests = &mut state.requests;
    let key = key(request);
    if let Some((_, then)) = requests
        .known
        .insert(key.clone(), (request.digest.as_slice().into(), now))
    {
        requests.ages.remove(&(then, key.clone()));
    }
    requests.ages.insert((now, key));
    while let Some((then, key)) = requests.ages.get_min().cloned() {
        if now - then <= AGE_MAX_MS && requests.known.len() <= REQUESTS_MAX {
            return;
        }
        requests.known.remove(&key);
        requests.ages.remove(&(then, key));
    }
}

fn key(request: &RequestKey) -> Key {
    Arc::new((request.caller.clone(), request.id.clone()))
}

impl Requests {
    /// What each asked for, by caller and id, and when it was carried out, in milliseconds.
    pub(super) fn known(&self) -> &OrdMap<Key, (Arc<[u8]>, i64)> {
        &self.known
    }

    /// Remembers what was remembered before.
    pub(super) fn restore(&mut self, request: &RequestKey, time: i64) {
        let key = key(request);
        self.known
            .insert(key.clone(), (request.digest.as_slice().into(), time));
        self.ages.insert((time, key));
    }

    /// How many are remembered.
    pub fn count(&self) -> usize {
        self.known.len()
    }
}
