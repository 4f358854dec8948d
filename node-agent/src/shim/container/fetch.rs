//! An image as a directory on this host: as it lies there, or unpacked from an archive, which an engine may have had to write first.
//!
//! What was unpacked is kept (`store`). What the job names on this host is opened as its user, and used by what is open: nobody gets to see by a
//! container what he may not see without one; and of an archive all of it is read each time, for who has only its name has no image.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot};

use super::apart::{Trouble, apart};
use super::engine::{Inspected, Login, Unanswered, ask};
use super::store::{Image, Known, Store};
use super::{failure, layers};
use crate::launch::{Container, JobUser, Reference, Source};
use crate::status::FailureRecord;
use crate::user::{take_groups, with_files_of};

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
                left_out: Vec::new(),
                lock: None,
            })
        }
        Source::Archive(path) => {
            let file = open_as(user, path, OFlag::O_NONBLOCK);
            let had = file
                .map_err(|error| Trouble::of_image(&error))
                .and_then(|file| by_archive(container, file));
            had.map_err(|trouble| trouble.failure(&format!("cannot use the image {path}")))
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

/// What an archive holds, all of which whoever names it can read.
fn by_archive(container: &Container, file: File) -> Result<Image, Trouble> {
    if !file.metadata()?.is_file() {
        return Err(Trouble::Image("it is no file".to_owned()));
    }
    let image = apart(|| Ok(()), || layers::read(&file))?;
    let store = Store::open(&container.images)?;
    let digest = &image.digest;
    match store.kept(digest)? {
        Some(kept) => {
            // It stays without: others need not wait.
            drop(store);
            println!("{digest} is kept; the archive is checked");
            apart(|| Ok(()), || layers::check(&file, &image))?;
            Ok(kept)
        }
        None => store.keep(digest, |root| unpack(&file, &image, root)),
    }
}

/// What an engine has, or pulls.
fn by_engine(
    container: &Container,
    reference: &Reference,
    password: Option<&str>,
) -> Result<Image, FailureRecord> {
    let Reference { engine, name, .. } = reference;
    let program = engine.name();
    let unanswered = |what: String| move |error: Unanswered| error.trouble().failure(&what);
    match &reference.registry {
        Some(registry) => {
            let login = Login::write(&container.layer, registry, reference, password);
            let login = login.map_err(|e| failure(format!("cannot say who pulls: {e}"), true))?;
            let at = login.as_ref().map(|login| login.at.to_string_lossy());
            ask(&engine.pull(name, at.as_deref()), false)
                .map_err(unanswered(format!("cannot pull {name}")))?;
        }
        None => println!("{name} is in no registry: {program} must have it"),
    }
    let said = ask(&engine.inspect(name), true)
        .map_err(unanswered(format!("{program} has no image {name}")))?;
    let unusable = |trouble: Trouble| {
        trouble.failure(&format!("{program} gives no image {name} that can be used"))
    };
    let inspected = Inspected::read(&said)
        .ok_or_else(|| unusable(Trouble::Node(format!("it says of it {:?}", said.trim()))))?;
    had_by_engine(container, reference, &inspected).map_err(unusable)
}

/// The image of an engine, which writes it into a file first unless it is kept.
fn had_by_engine(
    container: &Container,
    reference: &Reference,
    inspected: &Inspected,
) -> Result<Image, Trouble> {
    let Inspected { digest, bytes } = inspected;
    let store = Store::open(&container.images)?;
    if let Some(kept) = store.kept(digest)? {
        return Ok(kept);
    }
    let at = store.scratch("image.tar");
    let mut saved = None;
    store.keep(digest, |root| {
        let (file, image) = match &saved {
            Some(saved) => saved,
            None => {
                // What a try that failed has left takes the room of this one.
                match std::fs::remove_file(&at) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(error.into());
                    }
                    _ => {}
                }
                // In the file, and unpacked from it.
                store.leaves_room(bytes.saturating_mul(2))?;
                ask(&reference.engine.save(digest, &at.to_string_lossy()), false).map_err(
                    // An engine does not say so: it may have been for want of room.
                    |error| match store.leaves_room(0) {
                        Err(full) => Trouble::from(full),
                        Ok(()) => error.trouble(),
                    },
                )?;
                let file = File::open(&at)?;
                let image = apart(|| Ok(()), || layers::read(&file))?;
                saved.insert((file, image))
            }
        };
        unpack(file, image, root)
    })
}

/// Unpacks where nothing else is seen: links in an image lead nowhere but into it.
fn unpack(archive: &File, image: &layers::Image, into: &std::path::Path) -> Result<Known, Trouble> {
    println!("unpacking {}", image.digest);
    let enter = || {
        chroot(into)?;
        Ok(chdir("/")?)
    };
    apart(enter, || layers::unpack(archive, image))?;
    Ok(Known {
        env: image.env.clone(),
        left_out: image.left_out.clone(),
    })
}
