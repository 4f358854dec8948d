//! Compiles the `.proto` files without protoc: `protox` parses, `tonic-prost-build` generates.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let mut files = Vec::new();
    collect(&root.join("batchai"), &mut files)?;
    files.sort();
    println!("cargo:rerun-if-changed=batchai");
    println!("cargo:rerun-if-changed=google");

    let mut compiler = protox::Compiler::new([&root])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files(&files)?;
    // As bytes: the options of fields (google.api.field_behavior) are kept, as extensions, only in this form.
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    tonic_prost_build::configure()
        // The replicated State knows no order but that of its keys.
        .btree_map(".")
        // Theirs is in `secrets`, and shows no secret.
        .skip_debug([
            ".batchai.v1.EnvironmentVariableWithSecretValue",
            ".batchai.v1.StorageCredentials",
            ".batchai.v1.PrivateRegistryCredentials",
            ".batchai.v1.UserAccountSettings",
            ".batchai.v1.AppInsightsReference",
            ".batchai.agent.v1.JoinRequest",
            ".batchai.agent.v1.RemoteHello",
        ])
        .bytes(".batchai.agent.v1.LogChunk.data")
        .bytes(".batchai.v1.StreamJobLogsResponse.data")
        .bytes(".batchai.v1.UploadBundleRequest.data")
        .bytes(".batchai.agent.v1.AnswerFileRequest.data")
        .bytes(".batchai.agent.v1.AnswerFileResponse.data")
        .bytes(".batchai.v1.ReadFileServerFileResponse.data")
        .bytes(".batchai.v1.WriteFileServerFileRequest.data")
        .bytes(".batchai.v1.SaveSnapshotResponse.data")
        .bytes(".batchai.agent.v1.FetchBundleResponse.data")
        .bytes(".batchai.v1.ExecInput.data")
        .bytes(".batchai.v1.ExecOutput.stdout")
        .bytes(".batchai.v1.ExecOutput.stderr")
        .bytes(".batchai.internal.v1.ExchangeRequest.messages")
        .bytes(".batchai.internal.v1.SendSnapshotRequest.data")
        .bytes(".batchai.internal.v1.FetchCopyResponse.data")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
