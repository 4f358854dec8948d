//! What a test needs beyond cargo and python3. Where it is missing the test says so and is skipped, unless
//! `BATCHAI_TEST_REQUIRE=all`: then a skip is a failure.

use std::path::PathBuf;

/// Finds a program on the PATH. `hint` says how to get it.
///
/// # Panics
/// Where it is missing and nothing may be skipped.
pub fn program(name: &str, hint: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(&format!("{name} is not on the PATH: {hint}"));
    }
    found
}

/// Says why a test is skipped.
///
/// # Panics
/// Where nothing may be skipped.
pub fn skip(why: &str) {
    let required = std::env::var("BATCHAI_TEST_REQUIRE").is_ok_and(|value| value == "all");
    assert!(!required, "BATCHAI_TEST_REQUIRE=all, but: {why}");
    eprintln!("SKIPPED: {why}");
}
