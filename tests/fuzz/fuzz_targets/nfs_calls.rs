#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a directory");
    batchai_node_agent::fuzz::nfs_calls(bytes, dir.path());
});
