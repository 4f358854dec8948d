//! Makes this host ready: sweeps earlier jobs' directories away, makes this one's, writes its files.
//!
//! It is a process of its own, a child of the shim: directories may lie on dead mounts, and the shim must be able to give
//! up on them.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use batchai_common::paths;
use batchai_common::time::boot_time;
use nix::unistd::geteuid;

use super::root::MARKER;
use super::unpack::{bound_memory, unpack};
use crate::cgroups::unescape;
use crate::journal::{AttemptDir, SETUP_FAILED};
use crate::launch::Preparation;
use crate::launch::shared::{FAILED, WaitFor};
use crate::share;
use crate::status::FailureRecord;
use crate::user::{take_groups, with_files_of};

/// Between two looks at whether something is there.
const PAUSE: Duration = Duration::from_millis(10);

/// What of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    All,
    /// What things are mounted on, and all that does not lie in what is mounted.
    BeforeMounts,
    /// The rest.
    AfterMounts,
}

/// Prepares an attempt; returns an exit code. What went wrong is left in a file of the attempt's directory.
pub fn run(dir: &AttemptDir, plan: &Preparation, part: Part) -> i32 {
    let Err(failure) = prepare(plan, part) else {
        return 0;
    };
    if let Err(error) = dir.write(SETUP_FAILED, &failure, false) {
        super::tell(&format!("{}: {error}", failure.message));
    }
    1
}

fn prepare(plan: &Preparation, part: Part) -> Result<(), FailureRecord> {
    if part != Part::AfterMounts {
        make_way(plan)?;
    }
    if part == Part::BeforeMounts {
        return Ok(());
    }
    if let Some(wanted) = &plan.wait_for {
        wait_for(wanted)?;
    }
    let bundle = match &plan.bundle {
        None => None,
        // That the node has lost its copy is no fault of the job.
        Some((bundle, into)) => {
            let opened = fs::File::open(bundle);
            let opened = opened.map_err(|e| failure("open the bundle", bundle, &e, true))?;
            Some((opened, into))
        }
    };
    if let Some(user) = &plan.user {
        let groups = take_groups(user);
        groups.map_err(|e| failure("take the groups of", &user.name, &e, true))?;
    }
    // What the job chooses is done with the rights that the job has.
    with_files_of(plan.user.as_ref(), || for_job(plan, bundle))
}

/// Clears what earlier jobs left, and makes what is the service's to make.
fn make_way(plan: &Preparation) -> Result<(), FailureRecord> {
    // What an earlier job left is no fault of this one.
    let wiped = wipe(Path::new(&plan.wipe));
    wiped.map_err(|e| failure("clear", &plan.wipe, &e, true))?;
    let made = plan.directories.iter().chain(&plan.mount_points);
    for directory in made.filter(|path| is_own(plan, path)) {
        let made = make_own(Path::new(&plan.wipe), Path::new(directory), plan);
        made.map_err(|e| failure("make directory", directory, &e, true))?;
    }
    share_mount_root(plan)
}

/// Waits for what another node of this machine makes.
fn wait_for(wanted: &WaitFor) -> Result<(), FailureRecord> {
    let until = boot_time() + Duration::from_secs(wanted.most_s);
    while !Path::new(&wanted.path).exists() {
        if boot_time() >= until {
            return Err(FailureRecord {
                code: FAILED.to_owned(),
                message: format!("{}: not made within {} s", wanted.what, wanted.most_s),
                infrastructure: true,
                ..FailureRecord::default()
            });
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn for_job(plan: &Preparation, bundle: Option<(fs::File, &String)>) -> Result<(), FailureRecord> {
    for directory in plan.directories.iter().filter(|path| !is_own(plan, path)) {
        let made = fs::create_dir_all(directory);
        made.map_err(|e| failure("make directory", directory, &e, false))?;
    }
    for (path, content) in &plan.files {
        write(Path::new(path), content).map_err(|e| failure("write", path, &e, true))?;
    }
    if let Some((file, into)) = bundle {
        let failed = |error: io::Error, infrastructure| FailureRecord {
            code: "JobBundleFailed".into(),
            ..failure("unpack the bundle into", into, &error, infrastructure)
        };
        bound_memory().map_err(|error| failed(error, true))?;
        unpack(file, Path::new(into)).map_err(|error| {
            let full = error.kind() == io::ErrorKind::StorageFull;
            failed(error, full)
        })?;
    }
    Ok(())
}

/// Writes a file; a script can be run.
fn write(path: &Path, content: &str) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(path, content)?;
    match content.starts_with("#!") {
        true => fs::set_permissions(path, Permissions::from_mode(0o755)),
        false => Ok(()),
    }
}

/// A directory below that of all jobs is the service's to make; the others are where the job wants them, or in what is mounted.
fn is_own(plan: &Preparation, path: &str) -> bool {
    let mounted = |point: &String| path != point && paths::is_within(path, point);
    Path::new(path).starts_with(&plan.wipe) && !plan.mount_points.iter().any(mounted)
}

/// Makes a directory of the job's below that of all jobs: its user's, and nobody else's to look into.
fn make_own(root: &Path, path: &Path, plan: &Preparation) -> io::Result<()> {
    fs::create_dir_all(root)?;
    match &plan.user {
        Some(user) => share::make_for(root, path, user),
        None => fs::create_dir_all(path),
    }
}

/// Where nothing is mounted, what leads to the directories of jobs is root's, so that no job can take away, redirect or look into
/// another's. The set-up of a node writes as root: nothing that leads there may be anybody else's, wherever it is.
fn share_mount_root(plan: &Preparation) -> Result<(), FailureRecord> {
    let Some(root) = plan.directories.first().map(Path::new) else {
        return Ok(());
    };
    let made = fs::create_dir_all(root);
    made.map_err(|e| failure("make", "the mount root", &e, true))?;
    if plan.user.is_some() {
        let open = fs::set_permissions(root, Permissions::from_mode(0o755));
        open.map_err(|e| failure("open", "the mount root", &e, true))?;
        // What is mounted has rights of its own, also where it is of the same file system.
        let points = mount_points(root).map_err(|e| failure("look for", "mounts", &e, true))?;
        let here = |own: &&String| !points.iter().any(|point| Path::new(own).starts_with(point));
        for own in plan.own.iter().filter(here) {
            let made = share::make_own(root, Path::new(own), plan.user.as_ref());
            made.map_err(|e| failure("make directory", own, &e, false))?;
        }
    } else if plan.may_gain && geteuid().is_root() {
        let made = share::make_own(Path::new("/"), Path::new(&plan.copy_to), None);
        made.map_err(|e| failure("make directory", &plan.copy_to, &e, false))?;
    }
    Ok(())
}

fn failure(what: &str, path: &str, error: &io::Error, infrastructure: bool) -> FailureRecord {
    FailureRecord {
        code: "JobDirectoryFailed".into(),
        message: format!("cannot {what} {path}: {error}"),
        details: vec![
            ("path".into(), path.into()),
            ("error".into(), error.to_string()),
        ],
        infrastructure,
        ..FailureRecord::default()
    }
}

/// What is mounted below a directory, as that directory is named here.
fn mount_points(root: &Path) -> io::Result<Vec<PathBuf>> {
    let real = root.canonicalize()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(unescape).filter(|point| *point != real);
    let below = points.filter_map(|point| Some(root.join(point.strip_prefix(&real).ok()?)));
    Ok(below.collect())
}

/// Removes what earlier jobs left. It never follows a link, and never goes into a mount.
fn wipe(root: &Path) -> io::Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let root = root.canonicalize()?;
    if let Some(point) = mount_points(&root)?.first() {
        return Err(io::Error::other(format!(
            "{} is still mounted",
            point.display()
        )));
    }
    for entry in fs::read_dir(&root)? {
        let entry = entry?;
        if entry.file_name() == MARKER {
            continue;
        }
        match entry.file_type()?.is_dir() {
            true => remove_dir(&entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// Removes a directory also where its owner made parts of it read-only.
fn remove_dir(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_up(path)?;
            fs::remove_dir_all(path)
        }
        other => other,
    }
}

fn open_up(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_up(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wiping_removes_everything_but_the_marker_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = dir.path().join("jobs");
        let outside = dir.path().join("outside");
        fs::create_dir_all(jobs.join("w/e/j/read-only/deep")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        fs::write(jobs.join(MARKER), "u").unwrap();
        std::os::unix::fs::symlink(&outside, jobs.join("w/link")).unwrap();
        std::os::unix::fs::symlink(&outside, jobs.join("link")).unwrap();
        let closed = Permissions::from_mode(0o500);
        fs::set_permissions(jobs.join("w/e/j/read-only"), closed).unwrap();
        wipe(&jobs).unwrap();
        let left: Vec<_> = fs::read_dir(&jobs)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, [MARKER]);
        assert!(outside.join("precious").exists());
    }
}
