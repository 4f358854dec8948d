//! Deliberate faults: what the tests are tried with. In every ordinary build `fault!` is the literal `false`, so that neither a fault nor
//! its name gets into the program; in one with `--cfg batchai_faults` the fault that the environment names is there. Which faults there
//! are, and who must notice them, is not said here but in `tests/src/bin/mutants/table.rs`.

/// Whether the fault of this name is there.
#[cfg(not(batchai_faults))]
#[macro_export]
macro_rules! fault {
    ($name:literal) => {
        false
    };
}

/// Whether the fault of this name is there.
#[cfg(batchai_faults)]
#[macro_export]
macro_rules! fault {
    ($name:literal) => {
        $crate::faults::is_there($name)
    };
}

/// Whether this process was begun with that fault.
#[cfg(batchai_faults)]
pub fn is_there(name: &str) -> bool {
    use std::sync::LazyLock;
    static CHOSEN: LazyLock<String> =
        LazyLock::new(|| std::env::var("BATCHAI_FAULT").unwrap_or_default());
    *CHOSEN == name
}
