//! Directories in the mount root, where jobs of several users have theirs: made by root, step by step, and through no link.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown, geteuid};

use crate::launch::JobUser;

/// Everybody may make something in it, and take away only what is his.
const SHARED: Mode = Mode::from_bits_truncate(0o1777);
const OWN: Mode = Mode::from_bits_truncate(0o700);

/// Makes the mount root.
pub fn make_root(root: &Path) -> io::Result<()> {
    fs::create_dir_all(root)?;
    fs::set_permissions(root, Permissions::from_mode(SHARED.bits()))
}

/// Makes a user's own directory below the root, and what leads to it. Behind a link or in a mount nothing is made: there the
/// user's own rights count.
pub fn make_own(root: &Path, path: &Path, user: &JobUser) -> io::Result<()> {
    let below = path.strip_prefix(root).map_err(io::Error::other)?;
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut dir = open(root, flags, Mode::empty())?;
    let device = fstat(&dir)?.st_dev;
    let mut names = below.components().peekable();
    while let Some(Component::Normal(name)) = names.next() {
        let last = names.peek().is_none();
        let next = match openat(&dir, name, flags, Mode::empty()) {
            Ok(next) => next,
            Err(Errno::ENOENT) => make(&dir, Path::new(name), last.then_some(user))?,
            Err(Errno::ELOOP | Errno::ENOTDIR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let found = fstat(&next)?;
        if found.st_dev != device {
            return Ok(());
        }
        let own = found.st_uid == user.uid;
        let shared = !last && found.st_uid == geteuid().as_raw();
        if !own && !shared {
            let why = format!(
                "{} belongs to user {}",
                Path::new(name).display(),
                found.st_uid
            );
            return Err(io::Error::other(why));
        }
        dir = next;
    }
    Ok(())
}

fn make(dir: &OwnedFd, name: &Path, owner: Option<&JobUser>) -> io::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match mkdirat(dir, name, OWN) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let made = openat(dir, name, flags, Mode::empty())?;
    // Somebody else may have been faster: what is his stays his.
    if fstat(&made)?.st_uid != geteuid().as_raw() {
        return Ok(made);
    }
    match owner {
        Some(user) => fchown(
            &made,
            Some(Uid::from_raw(user.uid)),
            Some(Gid::from_raw(user.gid)),
        )?,
        None => fchmod(&made, SHARED)?,
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    fn user(uid: u32) -> JobUser {
        JobUser {
            uid,
            gid: uid,
            ..JobUser::default()
        }
    }

    #[test]
    fn what_leads_to_a_job_is_shared_and_what_is_its_own_is_not() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("mounts");
        make_root(&root).unwrap();
        let path = |name: &str| root.join("logs/e/g").join(name);
        make_own(&root, &path("one"), &user(71_001)).unwrap();
        make_own(&root, &path("two"), &user(71_002)).unwrap();
        make_own(&root, &path("one"), &user(71_001)).unwrap();
        let of = |path: &Path| {
            let found = fs::metadata(path).unwrap();
            (found.uid(), found.mode() & 0o7777)
        };
        for shared in ["", "logs", "logs/e", "logs/e/g"] {
            assert_eq!(of(&root.join(shared)), (0, 0o1777), "{shared}");
        }
        assert_eq!(of(&path("one")), (71_001, 0o700));
        assert_eq!(of(&path("two")), (71_002, 0o700));
        // Another's is not taken, and no way leads through it.
        assert!(make_own(&root, &path("one"), &user(71_002)).is_err());
        assert!(make_own(&root, &path("one/x"), &user(71_002)).is_err());
        // Links lead nowhere.
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        make_own(&root, &root.join("link/x/y"), &user(71_001)).unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
