//! Makes this host ready: sweeps earlier jobs' directories away, makes this one's, writes its files.

use std::fs;
use std::io;
use std::path::Path;

use crate::launch::Preparation;
use crate::status::FailureRecord;

/// Does it all.
pub fn prepare(plan: &Preparation) -> Result<(), FailureRecord> {
    wipe(Path::new(&plan.wipe)).map_err(|e| failure("clear", &plan.wipe, &e))?;
    for directory in &plan.directories {
        fs::create_dir_all(directory).map_err(|e| failure("make directory", directory, &e))?;
    }
    for (path, content) in &plan.files {
        fs::write(path, content).map_err(|e| failure("write", path, &e))?;
    }
    Ok(())
}

fn failure(what: &str, path: &str, error: &io::Error) -> FailureRecord {
    FailureRecord {
        code: "JobDirectoryFailed".into(),
        message: format!("cannot {what} {path}: {error}"),
        details: vec![
            ("path".into(), path.into()),
            ("error".into(), error.to_string()),
        ],
        ..FailureRecord::default()
    }
}

/// Removes what earlier jobs left. It never follows a link, and never goes into a mount.
fn wipe(root: &Path) -> io::Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let root = root.canonicalize()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let below = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .find(|point| Path::new(point) != root && Path::new(point).starts_with(&root));
    if let Some(point) = below {
        return Err(io::Error::other(format!("{point} is still mounted")));
    }
    for entry in fs::read_dir(&root)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}
