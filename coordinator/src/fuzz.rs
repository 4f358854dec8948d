//! What meets bytes from outside, each as a function that no bytes may bring down: for fuzzers and tests, in no program.

use batchai_proto::internal::v1::{Command, ExchangeRequest};
use batchai_proto::v1::{CreateClusterRequest, CreateJobRequest};
use prost::Message as _;
use protobuf::Message as _;

use crate::access::{rules, scope};
use crate::api::fuzz as api;
use crate::replica::peers::is_of_peers;
use crate::replica::store::chunk;
use crate::state::keys::Sealed;
use crate::state::{State, apply, invariants};

/// What lies in the database of the log, as keys and values with their lengths before them.
pub fn log_records(mut bytes: &[u8]) {
    let mut piece = || -> Option<Vec<u8>> {
        let (length, rest) = bytes.split_first()?;
        let (piece, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        bytes = rest;
        Some(piece.to_vec())
    };
    let mut records = Vec::new();
    while let (Some(key), Some(value)) = (piece(), piece()) {
        records.push((key, value));
    }
    if let Ok(entries) = chunk::unpack_behind(0, &records) {
        let again: Vec<_> = chunk::pack(&entries)
            .into_iter()
            .flat_map(|c| c.records)
            .collect();
        assert_eq!(chunk::unpack_behind(0, &again).as_ref(), Ok(&entries));
    }
}

/// Snapshots: read whole, or refused.
pub fn snapshots(mut bytes: &[u8]) {
    // What passes its checksums was written by one of ours.
    let _ = crate::replica::store::snapshot::decode(&mut bytes);
}

/// What replicas say to each other, as far as it is read before the replica is asked.
pub fn peer_messages(bytes: &[u8]) {
    let Ok(request) = ExchangeRequest::decode(bytes) else {
        return;
    };
    let hello = request.hello.unwrap_or_default();
    for bytes in &request.messages {
        if let Ok(message) = raft::eraftpb::Message::parse_from_bytes(bytes) {
            // A message of another pair is never one of this.
            let named = (message.from, message.to) == (hello.from, hello.to);
            assert!(named || !is_of_peers(&message, &hello));
        }
    }
}

/// Commands, one after the other: whatever they are, every invariant holds.
pub fn commands(mut bytes: &[u8]) {
    let mut state = State::default();
    let mut index = 0;
    while let Ok(command) = Command::decode_length_delimited(&mut bytes) {
        index += 1;
        // What is refused changes nothing; that is looked at elsewhere.
        let _ = apply(&mut state, index, &command);
        if bytes.is_empty() {
            break;
        }
    }
    let sound = invariants::check(&state);
    assert_eq!(sound, Ok(()));
}

/// Requests that create something: checked whole, whatever they say.
pub fn requests(bytes: &[u8]) {
    if let Ok(request) = CreateJobRequest::decode(bytes) {
        api::job(request);
    }
    if let Ok(request) = CreateClusterRequest::decode(bytes) {
        api::cluster(request);
    }
    for (call, ..) in rules::RULES {
        if let Some(rules::Place::Field(path)) = rules::rule(&format!("/{call}")).map(|r| &r.place)
        {
            let _ = scope::text(bytes, path);
        }
    }
}

/// Texts: filters of lists, page tokens, sealed secrets.
pub fn texts(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    api::texts(text);
    if let Some(sealed) = Sealed::parse(text) {
        assert_eq!(Sealed::parse(&sealed.to_string()), Some(sealed));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_bring_it_down(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            log_records(&bytes);
            snapshots(&bytes);
            peer_messages(&bytes);
            commands(&bytes);
            requests(&bytes);
            texts(&bytes);
        }

        #[test]
        fn no_text_brings_it_down(
            text in "(state|labels|name|=|!=|AND|OR|NOT|\"|\\(|\\)|\\.|sealed|[a-z0-9]| |\\PC){0,20}"
        ) {
            texts(text.as_bytes());
        }
    }
}
