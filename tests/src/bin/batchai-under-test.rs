//! The `batchai` command as these tests were built with it: `cargo test` never starts a stale binary.

fn main() -> std::process::ExitCode {
    batchai::main()
}
