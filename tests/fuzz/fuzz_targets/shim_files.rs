#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| batchai_node_agent::fuzz::shim_files(bytes));
