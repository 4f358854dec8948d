//! What is exported: objects by their handles, never beyond the root.
//!
//! Clients name objects by sealed handles, and names are looked up one at a time beneath an open directory: no path of a client is ever
//! walked, no symbolic link followed, no other mount entered and no other file system, as subvolumes of Btrfs are. A directory that was moved out of the export is stale. A file that was is
//! reached on as long as clients have its handle, as a process would that has it open.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

use super::handle::Sealer;
use super::identity::Identity;
use super::protocol::{Attributes, NAME_MAX, Status, Time};
use super::unstable::Unstable;
use super::{said, sys};

const LOCKS: usize = 64;
/// Of what `st_blocks` counts.
const BLOCK: u64 = 512;

/// Why an export cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("cannot open {}: {error}", path.display())]
    Root { path: PathBuf, error: io::Error },
    #[error(
        "the file system of {} gives its objects no lasting handles ({error}): export a directory of ext4, XFS, Btrfs or tmpfs",
        path.display()
    )]
    NoHandles { path: PathBuf, error: io::Error },
    #[error(
        "the agent lacks CAP_DAC_READ_SEARCH on this host: it has it in a user namespace only, where files cannot be served; run it outside of one"
    )]
    Namespace,
    #[error("the key of the handles: {0}")]
    Key(io::Error),
}

/// An exported directory.
pub struct Export {
    pub path: PathBuf,
    pub root: File,
    mount: i32,
    /// The file system: numbers of objects are those of one.
    system: libc::dev_t,
    generation: u64,
    sealer: Sealer,
    /// So that an answer tells what its own change made of an object, and not another's.
    locks: [Mutex<()>; LOCKS],
    pub unstable: Unstable,
    whole: Whole,
}

/// An object of the export. Opened as a place only: nothing of it is read or changed by that, also where it is a device.
pub struct Object {
    pub fd: OwnedFd,
    pub stat: FileStat,
}

impl Export {
    /// Opens a directory, with the key of handles in another one.
    pub fn open(path: &Path, keys: &Path, generation: u64) -> Result<Export, ExportError> {
        let root = |error| ExportError::Root {
            path: path.to_owned(),
            error,
        };
        let no_handles = |error| ExportError::NoHandles {
            path: path.to_owned(),
            error,
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty()).map_err(|e| root(e.into()))?;
        let (handle, mount) = sys::handle_of(&fd).map_err(no_handles)?;
        let system = fstat(&fd).map_err(|e| root(e.into()))?.st_dev;
        let directory = File::from(fd);
        match sys::open_handle(&directory, &handle, libc::O_PATH) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(ExportError::Namespace);
            }
            Err(error) => return Err(no_handles(error)),
        }
        Ok(Export {
            path: path.to_owned(),
            root: directory,
            mount,
            system,
            generation,
            sealer: Sealer::open(keys, generation).map_err(ExportError::Key)?,
            locks: std::array::from_fn(|_| Mutex::new(())),
            unstable: Unstable::new(),
            whole: Whole::default(),
        })
    }

    /// The object that a client names.
    pub fn object(&self, handle: &[u8]) -> Result<Object, Status> {
        let handle = self.sealer.read(handle)?;
        let fd = sys::open_handle(&self.root, &handle, libc::O_PATH)?;
        let object = self.own(fd)?;
        if object.kind() == SFlag::S_IFDIR && !self.beneath(&object.fd)? {
            return Err(Status::Stale);
        }
        Ok(object)
    }

    /// An object that was opened: one of this file system, as all are that are exported.
    pub fn own(&self, fd: OwnedFd) -> Result<Object, Status> {
        let stat = fstat(&fd)?;
        match stat.st_dev == self.system {
            true => Ok(Object { fd, stat }),
            false => Err(Status::Acces),
        }
    }

    /// The directory that a client names.
    pub fn directory(&self, handle: &[u8]) -> Result<Object, Status> {
        let object = self.object(handle)?;
        match object.kind() {
            SFlag::S_IFDIR => Ok(object),
            _ => Err(Status::NotDir),
        }
    }

    /// Whether a directory lies in the export now.
    fn beneath(&self, directory: &OwnedFd) -> io::Result<bool> {
        let root = std::fs::read_link(by_number(self.root.as_raw_fd()))?;
        let path = std::fs::read_link(by_number(directory.as_raw_fd()))?;
        Ok(path.starts_with(root))
    }

    /// What clients are to call an object.
    pub fn handle(&self, fd: &OwnedFd) -> Result<Vec<u8>, Status> {
        let (handle, mount) = sys::handle_of(fd)?;
        if mount != self.mount {
            return Err(Status::Acces);
        }
        Ok(self.sealer.close(&handle))
    }

    pub fn attributes(&self, stat: &FileStat) -> Attributes {
        let time = |seconds: i64, nanoseconds: i64| Time {
            seconds: seconds as u32,
            nanoseconds: nanoseconds as u32,
        };
        Attributes {
            kind: match kind(stat) {
                SFlag::S_IFDIR => 2,
                SFlag::S_IFBLK => 3,
                SFlag::S_IFCHR => 4,
                SFlag::S_IFLNK => 5,
                SFlag::S_IFSOCK => 6,
                SFlag::S_IFIFO => 7,
                _ => 1,
            },
            mode: stat.st_mode & 0o7777,
            links: stat.st_nlink as u32,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            used: stat.st_blocks as u64 * BLOCK,
            device: (
                nix::sys::stat::major(stat.st_rdev) as u32,
                nix::sys::stat::minor(stat.st_rdev) as u32,
            ),
            // The number of the device may be another one after a boot.
            system: self.generation,
            id: stat.st_ino,
            accessed: time(stat.st_atime, stat.st_atime_nsec),
            modified: time(stat.st_mtime, stat.st_mtime_nsec),
            changed: time(stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// An object's attributes as they are now.
    pub fn now(&self, object: &Object) -> Option<Attributes> {
        let stat = fstat(&object.fd).ok()?;
        Some(self.attributes(&stat))
    }

    /// Keeps others from changing an object.
    pub fn lock(&self, object: &Object) -> MutexGuard<'_, ()> {
        let lock = &self.locks[lock_of(object)];
        // It guards nothing that a panic could have left half done.
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps others from changing either of two objects.
    pub fn lock_both(
        &self,
        one: &Object,
        other: &Object,
    ) -> (MutexGuard<'_, ()>, Option<MutexGuard<'_, ()>>) {
        // Always in the same order: two calls never wait for each other.
        match lock_of(one).cmp(&lock_of(other)) {
            std::cmp::Ordering::Less => (self.lock(one), Some(self.lock(other))),
            std::cmp::Ordering::Equal => (self.lock(one), None),
            std::cmp::Ordering::Greater => (self.lock(other), Some(self.lock(one))),
        }
    }
}

fn lock_of(object: &Object) -> usize {
    object.stat.st_ino as usize % LOCKS
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// A path to what this process has open, whatever it is called now.
fn by_number(fd: i32) -> PathBuf {
    format!("/proc/self/fd/{fd}").into()
}

impl Object {
    pub fn kind(&self) -> SFlag {
        kind(&self.stat)
    }

    pub fn path(&self) -> PathBuf {
        by_number(self.fd.as_raw_fd())
    }

    /// What a name stands for in this directory, also where that is a symbolic link.
    pub fn child(&self, name: &[u8], flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        openat2(self.fd.as_fd(), name, how)
    }

    /// That it is a file, or why it cannot be read and written as one.
    pub fn is_file(&self) -> Result<(), Status> {
        match self.kind() {
            SFlag::S_IFREG => Ok(()),
            SFlag::S_IFDIR => Err(Status::IsDir),
            _ => Err(Status::Inval),
        }
    }

    /// Opens this file, to write or only to read, with a caller's rights.
    ///
    /// Beyond them its owner may, who opened it on the client before it took the right from itself, or made it without; and who may
    /// execute it may read it, for clients do the one by the other.
    pub fn data(&self, who: &Identity, write: bool) -> Result<File, Status> {
        self.is_file()?;
        let access = if write {
            OFlag::O_WRONLY
        } else {
            OFlag::O_RDONLY
        };
        let flags = access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let open = || nix::fcntl::open(&self.path(), flags, Mode::empty());
        let opened = who.act(open)?;
        let opened = match opened {
            Err(Errno::EACCES) => {
                let owner = self.stat.st_uid == who.uid;
                if !owner && (write || !who.act(|| self.executable())?) {
                    return Err(Status::Acces);
                }
                open()?
            }
            opened => opened?,
        };
        Ok(File::from(opened))
    }

    fn executable(&self) -> bool {
        self.may(nix::unistd::AccessFlags::X_OK)
    }

    /// Whether the one in whose place this thread is may do something with it.
    pub fn may(&self, access: nix::unistd::AccessFlags) -> bool {
        use nix::fcntl::AtFlags;
        let flags = AtFlags::AT_EMPTY_PATH | AtFlags::AT_EACCESS;
        nix::unistd::faccessat(&self.fd, c"", access, flags).is_ok()
    }

    /// Makes this file or directory last, with what is in it.
    pub fn sync(&self, export: &Export) -> Result<(), Status> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match self.kind() {
            SFlag::S_IFREG | SFlag::S_IFDIR => {
                let fd = nix::fcntl::open(&self.path(), flags, Mode::empty())?;
                Ok(nix::unistd::fsync(fd)?)
            }
            // Others cannot be opened.
            _ => {
                let changed = export.whole.begun();
                let sync = || nix::unistd::syncfs(&export.root);
                Ok(export.whole.sync(changed, sync)?)
            }
        }
    }
}

/// Syncs of the whole file system: one is for all that was changed before it began.
#[derive(Default)]
struct Whole {
    begun: AtomicU64,
    /// The latest that went well. Held while one is under way.
    done: Mutex<u64>,
}

impl Whole {
    /// How many have begun. It is asked after a change.
    fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// Makes last what was changed when so many had begun.
    fn sync<E>(&self, changed: u64, sync: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if *done > changed {
            return Ok(());
        }
        let own = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        sync()?;
        *done = own;
        Ok(())
    }
}

/// That a name is one, and of something in its directory.
pub fn name(name: &[u8]) -> Result<&[u8], Status> {
    if name.is_empty() || name.iter().any(|byte| [0, b'/'].contains(byte)) {
        return Err(Status::Inval);
    }
    if name == b"." || name == b".." {
        return Err(Status::Acces);
    }
    if name.len() > NAME_MAX {
        return Err(Status::NameTooLong);
    }
    Ok(name)
}

impl From<Errno> for Status {
    fn from(error: Errno) -> Status {
        match error {
            Errno::EPERM => Status::Perm,
            Errno::ENOENT => Status::NoEnt,
            Errno::EACCES | Errno::EBUSY | Errno::ETXTBSY => Status::Acces,
            Errno::EEXIST => Status::Exist,
            Errno::EXDEV => Status::Xdev,
            Errno::ENODEV => Status::Nodev,
            Errno::ENXIO => Status::Nxio,
            Errno::ENOTDIR => Status::NotDir,
            Errno::EISDIR => Status::IsDir,
            Errno::EINVAL | Errno::ELOOP => Status::Inval,
            Errno::EFBIG | Errno::EOVERFLOW => Status::Fbig,
            Errno::ENOSPC => Status::NoSpc,
            Errno::EROFS => Status::Rofs,
            Errno::EMLINK => Status::Mlink,
            Errno::ENAMETOOLONG => Status::NameTooLong,
            Errno::ENOTEMPTY => Status::NotEmpty,
            Errno::EDQUOT => Status::Dquot,
            Errno::ESTALE => Status::Stale,
            Errno::EOPNOTSUPP => Status::NotSupp,
            // The client is to try again.
            Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE => Status::Jukebox,
            Errno::EIO => Status::Io,
            error => {
                if said::may_say(error.desc(), None) {
                    tracing::warn!(%error, "a file system failed in a way that the protocol has no word for");
                }
                Status::Io
            }
        }
    }
}

impl From<io::Error> for Status {
    fn from(error: io::Error) -> Status {
        match error.raw_os_error() {
            Some(number) => Errno::from_raw(number).into(),
            None => {
                if said::may_say("failed here", None) {
                    tracing::error!(%error, "a call failed here and not in the file system");
                }
                Status::ServerFault
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sync_is_for_all_that_was_changed_before_it() {
        let (whole, made) = (Whole::default(), AtomicU64::new(0));
        let sync = |changed, result: Result<(), ()>| {
            let sync = || {
                made.fetch_add(1, Ordering::SeqCst);
                result
            };
            whole.sync(changed, sync)
        };
        let changes: Vec<_> = (0..8).map(|_| whole.begun()).collect();
        for changed in changes {
            sync(changed, Ok(())).unwrap();
        }
        assert_eq!(made.load(Ordering::SeqCst), 1);
        let later = whole.begun();
        assert_eq!(sync(later, Err(())), Err(()));
        // One that failed is for nobody.
        sync(later, Ok(())).unwrap();
        sync(later, Ok(())).unwrap();
        assert_eq!(made.load(Ordering::SeqCst), 3);
        // What is changed while one is under way is not in it.
        let mut amid = 0;
        let under_way = whole.sync(whole.begun(), || {
            amid = whole.begun();
            Ok::<_, ()>(())
        });
        under_way.unwrap();
        sync(amid, Ok(())).unwrap();
        assert_eq!(made.load(Ordering::SeqCst), 4);
    }
}
