//! The `batchai` command.

fn main() -> std::process::ExitCode {
    batchai::main()
}
