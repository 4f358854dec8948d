//! NFS-Ganesha as agents of tests find it: by what comes first on their PATH.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use batchai_node_agent::nfs::ganesha::{self, Installed};

use crate::requirement;

/// Where it lies. None where it is missing: then the test was told so.
pub fn installed() -> Option<Installed> {
    let found = ganesha::installed();
    found.map_err(|why| requirement::skip(&why)).ok()
}

/// A PATH on which there is one without what it needs: an agent shares by its own server.
pub fn hidden(dir: &Path) -> String {
    path_with(&program(dir, "exit 1"))
}

/// A PATH on which there is one that serves version 4.1 and no later one. None where it is missing.
pub fn older(dir: &Path) -> Option<String> {
    let installed = installed()?;
    let program = program(
        dir,
        // -F -f FILE: as the agent starts it.
        &format!(
            "sed -i 's/Minor_Versions = 1, 2/Minor_Versions = 1/' \"$3\" && exec {} \"$@\"",
            installed.program.display()
        ),
    );
    let modules = dir.join("lib");
    fs::create_dir_all(&modules).expect("the directory is the test's");
    symlink(installed.modules, modules.join("ganesha")).expect("the directory is the test's");
    Some(path_with(&program))
}

fn program(dir: &Path, script: &str) -> PathBuf {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin).expect("the directory is the test's");
    let program = bin.join("ganesha.nfsd");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("the directory is the test's");
    let all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&program, all).expect("the directory is the test's");
    bin
}

fn path_with(bin: &Path) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", bin.display())
}
