//! Deliberate faults: what the tests are tried with. In every ordinary build `fault!` is the literal `false`, so that neither a fault nor
//! its name gets into the program; in one with `--cfg batchai_faults` the fault that the environment names is there. Which faults there
//! are, and who must notice them, is not said here but in `tests/src/bin/mutants/table.rs`. With the same flag a process can be made to
//! die at named points, once: `tests/tests/crash.rs` goes through all of them.

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

/// A point at which the process may die, where something is so.
#[cfg(not(batchai_faults))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal $(, $so:expr)?) => {};
}

/// A point at which the process may die, where something is so.
#[cfg(batchai_faults)]
#[macro_export]
macro_rules! crash_point {
    ($name:literal $(, $so:expr)?) => {
        if true $(&& $so)? {
            $crate::faults::die_at($name);
        }
    };
}

/// Dies as by SIGKILL where a file of this name lies in the directory that the environment names: once, for the file is gone then.
#[cfg(batchai_faults)]
pub fn die_at(name: &str) {
    use nix::sys::signal::{Signal, kill};
    let Some(armed) = std::env::var_os("BATCHAI_CRASH_POINTS") else {
        return;
    };
    if std::fs::remove_file(std::path::Path::new(&armed).join(name)).is_ok() {
        let _ = kill(nix::unistd::getpid(), Signal::SIGKILL);
    }
}
