#![no_main]
use batchai_proto::agent::v1::Assignment;
use prost::Message as _;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(assignment) = Assignment::decode(bytes) {
        batchai_node_agent::fuzz::assignments(&assignment);
    }
});
