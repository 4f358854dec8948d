#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| batchai_coordinator::fuzz::peer_messages(bytes));
