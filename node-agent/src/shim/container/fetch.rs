//! An image as a directory on this host: as it lies there, or unpacked from an archive, which an engine may have had to write first.
//!
//! What was unpacked is kept under the digest of the image, for every job that names it, and is written to by none. What the job names on
//! this host is opened as its user, and used by what is open: nobody gets to see by a container what he may not see without one.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use batchai_common::images::is_sha256;
use batchai_common::time::boot_time;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, chroot, pipe2, syncfs, write};

use super::super::process;
use super::super::unpack::bound_memory;
use super::{failure, layers};
use crate::launch::{Container, JobUser, Reference, Source, login_names};
use crate::status::FailureRecord;
use crate::user::{take_groups, with_files_of};

/// An engine that has not done in this time what it was asked for never will.
const ENGINE_MAX: Duration = Duration::from_secs(50 * 60);
const LOOK: Duration = Duration::from_millis(50);
/// What an engine says of an image, at most.
const SAID_BYTES_MAX: u64 = 4096;
/// So many unpacked images are kept, and those in use.
const IMAGES_KEPT: usize = 8;
/// Where one is made before it is one.
const NEW: &str = ".new";
const ROOT: &str = "root";
const KNOWN: &str = "image.json";
const USED: &str = "used";
/// How the process that unpacks says what went wrong: it is the archive, or the disk.
const FAULTY: i32 = 2;
const FULL: i32 = 3;

/// An image that is there.
pub struct Image {
    /// Its root file system.
    pub root: File,
    pub env: BTreeMap<String, String>,
    /// As long as this is open it is not removed.
    pub lock: Option<File>,
}

/// Comes to an image, in a mount namespace of this process's own from here on.
pub fn fetch(
    container: &Container,
    user: Option<&JobUser>,
    password: Option<&str>,
) -> Result<Image, FailureRecord> {
    let own = |what: &str, error: io::Error| failure(format!("cannot {what}: {error}"), true);
    unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| {
            let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        })
        .map_err(|error| own("have file systems of its own", error.into()))?;
    if let Some(user) = user {
        let taken = take_groups(user);
        taken.map_err(|error| own("take the groups of the job's user", error))?;
    }
    match &container.source {
        Source::Rootfs(path) => {
            println!("the image is the directory {path}");
            let flags = OFlag::O_DIRECTORY | OFlag::O_PATH;
            let root = open_as(user, path, flags);
            let root =
                root.map_err(|e| failure(format!("cannot use the image {path}: {e}"), false))?;
            Ok(Image {
                root,
                env: BTreeMap::new(),
                lock: None,
            })
        }
        Source::Archive(path) => {
            let unusable = |error: io::Error| {
                let full = error.kind() == io::ErrorKind::StorageFull;
                failure(format!("cannot use the image {path}: {error}"), full)
            };
            let file = open_as(user, path, OFlag::O_NONBLOCK).map_err(unusable)?;
            if !file.metadata().map_err(unusable)?.is_file() {
                return Err(unusable(io::Error::other("it is no file")));
            }
            let store = Store::open(&container.images).map_err(|e| own("keep images", e))?;
            let image = layers::read(&file).map_err(unusable)?;
            let name = image.digest.clone();
            store.have(&name, || Ok((file, image))).map_err(unusable)
        }
        Source::Engine(reference) => by_engine(container, reference, password),
    }
}

/// Opens what a job names as whoever it runs as may.
pub(super) fn open_as(user: Option<&JobUser>, path: &str, flags: OFlag) -> io::Result<File> {
    with_files_of(user, || {
        OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(path)
    })
}

/// What an engine has, or pulls.
fn by_engine(
    container: &Container,
    reference: &Reference,
    password: Option<&str>,
) -> Result<Image, FailureRecord> {
    let Reference { engine, name, .. } = reference;
    let program = engine.name();
    let unusable = |error: io::Error| {
        let full = error.kind() == io::ErrorKind::StorageFull;
        failure(
            format!("{program} gives no image {name} that can be used: {error}"),
            full,
        )
    };
    match &reference.registry {
        Some(registry) => {
            let login = Login::write(&container.layer, registry, reference, password);
            let login = login.map_err(|e| failure(format!("cannot say who pulls: {e}"), true))?;
            let at = login.as_ref().map(|login| login.at.to_string_lossy());
            ask(&engine.pull(name, at.as_deref()), None)
                .map_err(|error| failure(format!("cannot pull {name}: {error}"), false))?;
        }
        None => println!("{name} is in no registry: {program} must have it"),
    }
    let mut said = Vec::new();
    ask(&engine.inspect(name), Some(&mut said))
        .map_err(|error| failure(format!("{program} has no image {name}: {error}"), false))?;
    let said = String::from_utf8_lossy(&said);
    let digest = said.trim().trim_start_matches("sha256:").to_owned();
    if !is_sha256(&digest) {
        let error = io::Error::other(format!("it knows it by {digest:?}"));
        return Err(unusable(error));
    }
    let store = Store::open(&container.images);
    let store = store.map_err(|e| failure(format!("cannot keep images: {e}"), true))?;
    let saved = store.at.join(NEW).join("image.tar");
    let saves = || {
        ask(&engine.save(&digest, &saved.to_string_lossy()), None)?;
        let file = File::open(&saved)?;
        let image = layers::read(&file)?;
        Ok((file, image))
    };
    store.have(&digest, saves).map_err(unusable)
}

/// Runs an engine, which prints where this process does.
fn ask(line: &[String], said: Option<&mut Vec<u8>>) -> io::Result<()> {
    println!("{}", line.join(" "));
    let program = line.first().map_or("", String::as_str);
    let mut command = Command::new(program);
    command.args(&line[1..]).stdin(Stdio::null());
    if said.is_some() {
        command.stdout(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{program} cannot be started: {error}"),
        )
    })?;
    let until = boot_time() + ENGINE_MAX;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if boot_time() > until => {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::other(format!(
                    "{program} took longer than {} minutes",
                    ENGINE_MAX.as_secs() / 60
                )));
            }
            None => std::thread::sleep(LOOK),
        }
    };
    if let (Some(said), Some(output)) = (said, child.stdout.take()) {
        output.take(SAID_BYTES_MAX).read_to_end(said)?;
    }
    match status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{program} failed ({status}); container.log says why"
        ))),
    }
}

/// Who pulls, in a file that is in memory, in this process's namespace only.
struct Login {
    at: PathBuf,
}

impl Login {
    fn write(
        layer: &str,
        registry: &str,
        reference: &Reference,
        password: Option<&str>,
    ) -> io::Result<Option<Login>> {
        let Some(username) = &reference.username else {
            return Ok(None);
        };
        let at = Path::new(layer).join("login");
        private_dir(&at)?;
        let none = None::<&str>;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(none, &at, Some("tmpfs"), flags, Some("size=1m,mode=0700"))?;
        let login = Login { at };
        let words = format!("{username}:{}", password.unwrap_or_default());
        let auth = serde_json::json!({ "auth": BASE64_STANDARD.encode(words) });
        let names = login_names(registry).into_iter();
        let auths: serde_json::Map<_, _> = names.map(|n| (n.to_owned(), auth.clone())).collect();
        let text = serde_json::to_vec(&serde_json::json!({ "auths": auths }))?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options
            .open(login.at.join("config.json"))?
            .write_all(&text)?;
        Ok(Some(login))
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.at, MntFlags::MNT_DETACH) {
            println!("who pulled is forgotten with this process only: {error}");
        }
    }
}

pub(super) fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The unpacked images of a node, held by this process.
struct Store {
    at: PathBuf,
    _held: Flock<File>,
}

impl Store {
    fn open(at: &str) -> io::Result<Store> {
        let at = PathBuf::from(at);
        private_dir(&at)?;
        let file = File::create(at.join(".lock"))?;
        // Another job of this node may be unpacking: it ends, or is ended.
        let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let new = at.join(NEW);
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        private_dir(&new)?;
        Ok(Store { at, _held: held })
    }

    /// The image of a digest: kept, or unpacked from what comes.
    fn have(
        &self,
        digest: &str,
        come: impl FnOnce() -> io::Result<(File, layers::Image)>,
    ) -> io::Result<Image> {
        let kept = self.at.join(digest);
        if !kept.join(KNOWN).exists() {
            let (archive, image) = come()?;
            println!("unpacking {digest}");
            let new = self.at.join(NEW);
            let root = new.join(ROOT);
            // Of the image's own root: everybody may pass, and nobody passes what is above it.
            DirBuilder::new().mode(0o755).create(&root)?;
            unpack(&archive, &image, &root)?;
            let _ = fs::remove_file(new.join("image.tar"));
            fs::write(new.join(KNOWN), serde_json::to_vec(&image.env)?)?;
            File::create(new.join(USED))?;
            // What is kept is whole, also after a power cut.
            syncfs(File::open(&new)?)?;
            fs::rename(&new, &kept)?;
            self.make_room(digest);
        }
        let used = File::options().write(true).open(kept.join(USED))?;
        used.set_modified(SystemTime::now())?;
        let locked = Flock::lock(used.try_clone()?, FlockArg::LockShared);
        // Both descriptors have the lock: it is held while one of them is open.
        std::mem::forget(locked.map_err(|(_, error)| error)?);
        Ok(Image {
            root: File::open(kept.join(ROOT))?,
            env: serde_json::from_slice(&fs::read(kept.join(KNOWN))?)?,
            lock: Some(used),
        })
    }

    /// Removes what was not used for longest, where it is too much and not in use.
    fn make_room(&self, except: &str) {
        let entries = fs::read_dir(&self.at).into_iter().flatten().flatten();
        let used = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let at = fs::metadata(entry.path().join(USED))
                .ok()?
                .modified()
                .ok()?;
            (is_sha256(&name) && name != except).then(|| (at, entry.path()))
        });
        let mut used: Vec<_> = used.collect();
        used.sort_by(|a, b| b.cmp(a));
        for (_, path) in used.into_iter().skip(IMAGES_KEPT - 1) {
            let Ok(file) = File::open(path.join(USED)) else {
                continue;
            };
            if Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err() {
                continue;
            }
            println!("removing {}", path.display());
            // Without this it is no image, however much of it is left.
            let removed =
                fs::remove_file(path.join(KNOWN)).and_then(|()| fs::remove_dir_all(&path));
            if let Err(error) = removed {
                println!("{} cannot be removed: {error}", path.display());
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Where it became an image it is not there any more; what this leaves the next one removes.
        let _ = fs::remove_dir_all(self.at.join(NEW));
    }
}

/// Unpacks in a process that sees nothing else: links in an image lead nowhere but into it.
fn unpack(archive: &File, image: &layers::Image, into: &Path) -> io::Result<()> {
    let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
    let work = || {
        let unpacked = bound_memory().and_then(|()| {
            chroot(into)?;
            chdir("/")?;
            layers::unpack(archive, image)
        });
        let Err(error) = unpacked else {
            return 0;
        };
        let full = error.kind() == io::ErrorKind::StorageFull;
        let why = error.to_string();
        let said = write(&to, why.as_bytes());
        match (said, full) {
            (Ok(_), false) => FAULTY,
            (Ok(_), true) => FULL,
            (Err(_), _) => 1,
        }
    };
    let pid = process::helper((None, &[]), work)?;
    drop(to);
    let mut why = String::new();
    File::from(from)
        .take(SAID_BYTES_MAX)
        .read_to_string(&mut why)?;
    match waitpid(Pid::from_raw(pid), None)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        WaitStatus::Exited(_, FULL) => Err(io::Error::new(io::ErrorKind::StorageFull, why)),
        WaitStatus::Exited(_, FAULTY) => Err(io::Error::other(why)),
        other => Err(io::Error::other(format!(
            "what unpacks it has ended: {other:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_and_what_is_in_use_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().to_string_lossy()).unwrap();
        let name = |at: usize| format!("{at:064}");
        let count = IMAGES_KEPT + 4;
        for at in 0..count {
            let path = dir.path().join(name(at));
            private_dir(&path.join(ROOT)).unwrap();
            fs::write(path.join(KNOWN), "{}").unwrap();
            let used = File::create(path.join(USED)).unwrap();
            let age = Duration::from_secs((count - at) as u64);
            used.set_modified(SystemTime::now() - age).unwrap();
        }
        let never = || -> io::Result<(File, layers::Image)> { panic!("it is there") };
        // The oldest one, before it is used.
        let held = File::open(dir.path().join(name(0)).join(USED)).unwrap();
        let held = Flock::lock(held, FlockArg::LockShared).unwrap();
        let used = store.have(&name(1), never).unwrap();
        store.make_room(&name(count - 1));
        let left: Vec<_> = (0..count)
            .filter(|at| dir.path().join(name(*at)).join(KNOWN).exists())
            .collect();
        let expected: Vec<_> = [0, 1]
            .into_iter()
            .chain(count - IMAGES_KEPT + 1..count)
            .collect();
        assert_eq!(left, expected);
        drop((held, used));
    }
}
