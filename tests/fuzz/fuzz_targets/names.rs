#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| batchai_common::fuzz::names(bytes));
