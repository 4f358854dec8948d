//! Directories that root makes where others have a say: step by step from one that is root's, through no link, and by what is
//! open, never again by name.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, fchown, geteuid};

use crate::launch::JobUser;

/// What leads to somebody's directory: everybody may pass.
const WAY: Mode = Mode::from_bits_truncate(0o755);
/// Somebody's directory: nobody else looks into it.
const OWN: Mode = Mode::from_bits_truncate(0o700);
const FLAGS: OFlag = OFlag::O_DIRECTORY
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// A step on the way to a directory.
enum Step {
    /// It was there.
    Found(OwnedFd, FileStat),
    /// It was not, and is now: root's, and closed.
    Made(OwnedFd),
    /// A link of somebody.
    Link(u32),
}

fn step(dir: &OwnedFd, name: &Path) -> io::Result<Step> {
    let made = match mkdirat(dir, name, OWN) {
        Ok(()) => true,
        Err(Errno::EEXIST) => false,
        Err(error) => return Err(error.into()),
    };
    match openat(dir, name, FLAGS, Mode::empty()) {
        Ok(next) => {
            let found = fstat(&next)?;
            // One that was made just now and is somebody else's was put in its place.
            Ok(match made && is_ours(found.st_uid) {
                true => Step::Made(next),
                false => Step::Found(next, found),
            })
        }
        Err(Errno::ELOOP | Errno::ENOTDIR) => {
            let found = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            match found.st_mode & nix::libc::S_IFMT == nix::libc::S_IFLNK {
                true => Ok(Step::Link(found.st_uid)),
                false => Err(refused(name, "is no directory")),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn is_ours(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

fn refused(name: &Path, why: &str) -> io::Error {
    io::Error::other(format!("{} {why}", name.display()))
}

fn names(path: &Path) -> impl Iterator<Item = &Path> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(Path::new(name)),
        _ => None,
    })
}

/// Makes a directory of a user's, or of root's where there is none, that nobody else can look into; what leads to it from
/// `begin` is root's alone, so that nobody can put anything in its place. In a mount, or behind a link of root's, nothing is made
/// for a user: there his own rights count.
pub fn make_own(begin: &Path, path: &Path, user: Option<&JobUser>) -> io::Result<()> {
    let below = path.strip_prefix(begin).map_err(io::Error::other)?;
    let mut dir = open(begin, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let device = fstat(&dir)?.st_dev;
    let mut names = names(below).peekable();
    while let Some(name) = names.next() {
        let last = names.peek().is_none();
        let (next, owner) = match step(&dir, name)? {
            Step::Made(next) => (next, None),
            Step::Found(next, found) if found.st_dev == device => (next, Some(found.st_uid)),
            // What is mounted there has rights of its own.
            Step::Found(next, _) => match user {
                Some(_) => return Ok(()),
                None => {
                    dir = next;
                    continue;
                }
            },
            Step::Link(owner) if is_ours(owner) && user.is_some() => return Ok(()),
            Step::Link(_) => return Err(refused(name, "is a link")),
        };
        match (last, user, owner) {
            (true, Some(user), Some(owner)) if owner == user.uid => {}
            (_, _, Some(owner)) if !is_ours(owner) => {
                return Err(refused(name, &format!("belongs to user {owner}")));
            }
            (true, Some(user), _) => give(&next, user)?,
            (true, None, None) => fchmod(&next, OWN)?,
            (false, _, None) => fchmod(&next, WAY)?,
            _ => {}
        }
        dir = next;
    }
    Ok(())
}

/// Makes a directory and what leads to it from `begin`, all of it a user's. They are given to him when all of them are made.
pub fn make_for(begin: &Path, path: &Path, user: &JobUser) -> io::Result<()> {
    let below = path.strip_prefix(begin).map_err(io::Error::other)?;
    let mut dir = open(begin, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut made = Vec::new();
    for name in names(below) {
        let next = match step(&dir, name)? {
            Step::Made(next) => {
                made.push(next.try_clone()?);
                next
            }
            Step::Found(next, found) if found.st_uid == user.uid => next,
            Step::Found(_, found) => {
                return Err(refused(name, &format!("belongs to user {}", found.st_uid)));
            }
            Step::Link(_) => return Err(refused(name, "is a link")),
        };
        dir = next;
    }
    made.iter().rev().try_for_each(|dir| give(dir, user))
}

fn give(dir: &OwnedFd, user: &JobUser) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    fchown(dir, Some(uid), Some(gid))?;
    Ok(fchmod(dir, OWN)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, chown, symlink};

    use super::*;

    fn user(uid: u32) -> JobUser {
        JobUser {
            uid,
            gid: uid,
            ..JobUser::default()
        }
    }

    fn of(path: &Path) -> (u32, u32) {
        let found = fs::metadata(path).unwrap();
        (found.uid(), found.mode() & 0o7777)
    }

    #[test]
    fn what_leads_to_a_directory_is_roots_and_the_rest_is_its_users() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("mounts");
        fs::create_dir(&root).unwrap();
        let (one, two) = (user(71_001), user(71_002));
        let path = |name: &str| root.join("logs/e/g").join(name);
        make_own(&root, &path("one"), Some(&one)).unwrap();
        make_own(&root, &path("two"), Some(&two)).unwrap();
        make_own(&root, &path("one"), Some(&one)).unwrap();
        for way in ["logs", "logs/e", "logs/e/g"] {
            assert_eq!(of(&root.join(way)), (0, 0o755), "{way}");
        }
        assert_eq!(of(&path("one")), (71_001, 0o700));
        assert_eq!(of(&path("two")), (71_002, 0o700));
        // Another's is not taken, and no way leads through it, not even root's.
        assert!(make_own(&root, &path("one"), Some(&two)).is_err());
        assert!(make_own(&root, &path("one/x"), Some(&two)).is_err());
        assert!(make_own(&root, &path("one/x"), None).is_err());
        make_own(&root, &path("task"), None).unwrap();
        assert_eq!(of(&path("task")), (0, 0o700));
        // Links: root's own are followed by users with their rights only, those of others by nobody.
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        make_own(&root, &root.join("link/x/y"), Some(&one)).unwrap();
        assert!(make_own(&root, &root.join("link/x/y"), None).is_err());
        std::os::unix::fs::lchown(root.join("link"), Some(71_001), None).unwrap();
        assert!(make_own(&root, &root.join("link/x/y"), Some(&one)).is_err());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn a_users_directories_are_his_and_lead_nowhere_else() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (jobs, outside) = (dir.path().join("jobs"), dir.path().join("outside"));
        fs::create_dir(&jobs).unwrap();
        fs::create_dir(&outside).unwrap();
        let one = user(71_001);
        make_for(&jobs, &jobs.join("w/e/j"), &one).unwrap();
        make_for(&jobs, &jobs.join("w/e/j/mounts"), &one).unwrap();
        for path in ["w", "w/e", "w/e/j", "w/e/j/mounts"] {
            assert_eq!(of(&jobs.join(path)), (71_001, 0o700), "{path}");
        }
        assert!(make_for(&jobs, &jobs.join("w/e/k"), &user(71_002)).is_err());
        symlink(&outside, jobs.join("w/f")).unwrap();
        assert!(make_for(&jobs, &jobs.join("w/f/j"), &one).is_err());
        chown(&outside, Some(0), None).unwrap();
        assert_eq!(
            (of(&outside).0, fs::read_dir(&outside).unwrap().count()),
            (0, 0)
        );
    }
}
