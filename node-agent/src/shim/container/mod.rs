//! The container of an attempt on this host: made by a process of its own, held by the shim, entered by every process of the job.
//!
//! There is no engine between the shim and a rank. A container is a mount namespace with the image's root file system (`room`): ranks
//! are the shim's children in the attempt's group, as without one, so that limits, logs, exit codes and every way to end them are the
//! same. An engine (`engine`) is asked for images only (`fetch`), which are unpacked once (`layers`, `apart`) and kept (`store`). The shim has
//! the namespace open: it is there as long as the shim is. What was written in it beside the host's directories (its layer) is removed when nothing
//! of the attempt runs any more; a shim that was cut down leaves that to the next job's preparation.

mod apart;
mod engine;
mod fetch;
mod layers;
mod room;
mod store;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{dup2_stderr, dup2_stdout, pipe2};
use serde::{Deserialize, Serialize};

use super::logs::Stream;
use super::process;
use super::run::{CONTAINER, Running, Shim};
use crate::journal::{AttemptDir, CONTAINER as RECORD, LOGS};
use crate::launch::{Ability, Container, Engine, JobUser, SHELLS, inside, with_shell};
use crate::status::FailureRecord;

/// What goes wrong with a container, in the original's word.
const FAILED: &str = "FailedStartingContainer";
/// Where docker's daemon listens.
const DOCKER: &str = "/var/run/docker.sock";
/// What takes longer to remove is the next job's.
const CLEAR_MAX: Duration = Duration::from_secs(30);
/// The variables of an image, at most: those of a process may not be much more.
const TOLD_BYTES_MAX: usize = 128 << 10;
/// Why there is no container, at most: an image may have a say in that.
const MESSAGE_BYTES_MAX: usize = 4096;

/// What is known of a container that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Known {
    /// The variables of the image.
    env: BTreeMap<String, String>,
    /// What reads command lines in it.
    shell: String,
    /// The number of the shim's descriptor of its namespace.
    namespace: RawFd,
}

/// A container that is there, and stays as long as this does.
pub struct Room {
    known: Known,
    namespace: OwnedFd,
    /// Its image is not removed meanwhile.
    _image: Option<OwnedFd>,
}

impl Room {
    /// That of an attempt which a living shim holds.
    pub fn of(dir: &AttemptDir) -> io::Result<Option<Room>> {
        let Some(known) = dir.read::<Known>(RECORD).map_err(io::Error::other)? else {
            return Ok(None);
        };
        let shim = dir.shim().map_err(io::Error::other)?;
        let shim = shim.ok_or_else(|| io::Error::other("the job's container is gone"))?;
        let namespace = File::open(format!("/proc/{shim}/fd/{}", known.namespace))?;
        Ok(Some(Room {
            known,
            namespace: namespace.into(),
            _image: None,
        }))
    }

    /// What a process is in whose place this is.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// What is started in it, and with which variables.
    pub fn fit(
        &self,
        argv: &[String],
        env: &BTreeMap<String, String>,
    ) -> (Vec<String>, BTreeMap<String, String>) {
        let argv = with_shell(argv, &self.known.shell);
        (argv, inside(env, &self.known.env))
    }

    /// What reads command lines in it.
    pub fn shell(&self) -> &str {
        &self.known.shell
    }
}

/// The way from the process that makes a container to the shim.
pub(super) struct Coming {
    socket: OwnedFd,
}

impl Shim {
    /// Has the container made.
    pub(super) fn furnish(&mut self, container: &Container) {
        self.log
            .say(&format!("making the container: {:?}", container.source));
        if let Err(error) = self.start_furnishing(container) {
            self.fail(failure(
                format!("the container cannot be made: {error}"),
                true,
            ));
        }
    }

    fn start_furnishing(&mut self, container: &Container) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let (output, printed) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let path = self.dir.path.join(LOGS).join(&container.log);
        let stream = Stream::new(output, &path, self.plan.log_limit)?;
        let user = self.plan.user.clone();
        let password = self.password.take();
        let work = || {
            let told = dup2_stdout(&printed).and_then(|()| dup2_stderr(&printed));
            if told.is_err() {
                return 1;
            }
            make(container, user.as_ref(), password.as_deref(), &far)
        };
        // What it takes is not the job's: an image may be larger than the memory that the job asks for.
        let pid = process::helper((self.plan.group.as_ref(), &[]), work)?;
        self.streams.push(stream);
        self.coming = Some(Coming { socket });
        self.running.push(Running {
            rank: CONTAINER,
            pid,
            stderr: container.log.clone(),
        });
        Ok(())
    }

    /// Takes over what was made.
    ///
    /// # Errors
    /// Why nothing was, as far as who should have made it could say.
    pub(super) fn take_room(&mut self, exit: &str, stderr: &str) -> Result<(), FailureRecord> {
        let unsaid = |error| {
            let why =
                format!("the process that makes the container {exit}, and says nothing: {error}");
            failure(why, true)
        };
        let coming = self.coming.take();
        let coming = coming.ok_or_else(|| unsaid(io::Error::other("nobody makes it")))?;
        let mut room = match receive(&coming.socket) {
            Ok(room) => room,
            Err(Untold::Failed(mut failure)) => {
                let output = self.last_words(stderr);
                failure.details.push(("output".to_owned(), output));
                return Err(failure);
            }
            Err(Untold::System(error)) => return Err(unsaid(error)),
        };
        room.known.namespace = room.namespace.as_raw_fd();
        let written = self.dir.write(RECORD, &room.known, false);
        written.map_err(|error| failure(format!("the container cannot be kept: {error}"), true))?;
        self.room = Some(room);
        Ok(())
    }
}

impl Shim {
    /// Nothing of the attempt runs any more: what was written in its container goes. Where that takes too long the next job's preparation does it.
    pub(super) fn leave_room(&mut self) {
        // What is mounted in it is not held by it any more.
        self.room = None;
        let Some(container) = &self.plan.container else {
            return;
        };
        let layer = &container.layer;
        let clear = || match fs::remove_dir_all(layer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                super::tell(&format!("{layer} cannot be removed: {error}"));
                1
            }
            _ => 0,
        };
        let cleared = process::helper((None, &[]), clear).map_err(|error| error.to_string());
        if let Err(why) = cleared.and_then(|pid| process::await_end(pid, CLEAR_MAX, &mut || false))
        {
            let text =
                format!("what was written in the container stays until the next job comes: {why}");
            self.log.say(&text);
        }
    }
}

/// Why there is no container to take over.
enum Untold {
    /// It could not be made.
    Failed(FailureRecord),
    /// That is not known.
    System(io::Error),
}

impl<E: Into<io::Error>> From<E> for Untold {
    fn from(error: E) -> Untold {
        Untold::System(error.into())
    }
}

pub(super) fn failure(mut message: String, infrastructure: bool) -> FailureRecord {
    let fits = |at: &usize| message.is_char_boundary(*at);
    let end = (0..=MESSAGE_BYTES_MAX.min(message.len())).rev().find(fits);
    message.truncate(end.unwrap_or_default());
    FailureRecord {
        code: FAILED.to_owned(),
        message,
        infrastructure,
        ..FailureRecord::default()
    }
}

/// Makes a container and hands it over, or why there is none; returns an exit code.
fn make(
    container: &Container,
    user: Option<&JobUser>,
    password: Option<&str>,
    to: &OwnedFd,
) -> i32 {
    // The agent's own may be stricter: the job's user must get to what is made in its container.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let made = fetch::fetch(container, user, password).and_then(|image| {
        let room = room::make(container, user, &image)?;
        Ok((image, room))
    });
    let told = match &made {
        Ok((image, room)) => {
            if !image.left_out.is_empty() {
                println!(
                    "of what the image says this is left out: {}; the job has its own user, directory and commands",
                    image.left_out.join(", ")
                );
            }
            let lock = image.lock.as_ref().map(|lock| lock.as_fd());
            let fds = std::iter::once(room.namespace()).chain(lock);
            send(to, &Ok(room.known.clone()), fds)
        }
        Err(failure) => {
            println!("{}", failure.message);
            send(to, &Err(failure.clone()), std::iter::empty())
        }
    };
    match told {
        Ok(()) => 0,
        Err(error) => {
            let why = format!("the container cannot be handed over: {error}");
            println!("{why}");
            // What was too much to say has nothing in its way.
            let short = send(to, &Err(failure(why, false)), std::iter::empty());
            i32::from(short.is_err())
        }
    }
}

fn send<'a>(
    to: &OwnedFd,
    told: &Result<Known, FailureRecord>,
    fds: impl Iterator<Item = BorrowedFd<'a>>,
) -> io::Result<()> {
    let text = serde_json::to_vec(told)?;
    if text.len() > TOLD_BYTES_MAX {
        return Err(io::Error::other(
            "the image has more variables than a process may have",
        ));
    }
    let fds: Vec<_> = fds.map(|fd| fd.as_raw_fd()).collect();
    let message = [ControlMessage::ScmRights(&fds)];
    let text = [IoSlice::new(&text)];
    sendmsg::<UnixAddr>(to.as_raw_fd(), &text, &message, MsgFlags::empty(), None)?;
    Ok(())
}

fn receive(from: &OwnedFd) -> Result<Room, Untold> {
    let mut text = vec![0; TOLD_BYTES_MAX];
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut slices = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(from.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let length = message.bytes;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            fds.extend(received.into_iter().map(process::received));
        }
    }
    let told: Result<Known, FailureRecord> = serde_json::from_slice(&text[..length])?;
    let known = told.map_err(Untold::Failed)?;
    let mut fds = fds.into_iter();
    let namespace = fds.next();
    let namespace = namespace.ok_or_else(|| io::Error::other("no namespace came"))?;
    Ok(Room {
        known,
        namespace,
        _image: fds.next(),
    })
}

/// What this host can do for containers, with images kept in a directory. Podman needs nobody; a docker without a daemon to ask is none.
pub fn able(images: PathBuf) -> Ability {
    let mut tried = Command::new("true");
    process::in_its_own_namespace(&mut tried);
    let tried = tried.status();
    let able = tried.as_ref().is_ok_and(|status| status.success());
    if !able {
        tracing::info!(?tried, "no containers here");
    }
    let daemon = std::env::var_os("DOCKER_HOST").is_some() || Path::new(DOCKER).exists();
    let engine = match is_there("podman") {
        true => Some(Engine::Podman),
        false => (daemon && is_there("docker")).then_some(Engine::Docker),
    };
    let maps = fs::read_to_string("/proc/self/maps");
    if let Err(error) = &maps {
        tracing::warn!(%error, "processes in containers may not reach other nodes: this agent's libraries are not known");
    }
    Ability {
        able,
        engine,
        images: images.to_string_lossy().into_owned(),
        libraries: with_links(libraries(&maps.unwrap_or_default())),
    }
}

/// The libraries of a program, by what the kernel says of its memory.
fn libraries(maps: &str) -> Vec<String> {
    let files = maps.lines().filter_map(|line| {
        let (rights, path) = (line.split(' ').nth(1)?, line.find('/')?);
        // Where it was replaced since, the new one lies there.
        let path = line[path..].trim_end_matches(" (deleted)");
        let name = path.rsplit('/').next()?;
        (rights.contains('x') && name.contains(".so")).then(|| path.to_owned())
    });
    let mut files: Vec<_> = files.collect();
    files.sort();
    files.dedup();
    files
}

/// Libraries with the links beside them that lead there: by those names programs ask for them.
fn with_links(libraries: Vec<String>) -> Vec<String> {
    let links = libraries.iter().flat_map(|library| {
        let library = Path::new(library);
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.split(['-', '.']).next().unwrap_or_default().to_owned();
        let beside = library.parent().and_then(|dir| fs::read_dir(dir).ok());
        let beside = beside.into_iter().flatten().flatten().filter(move |entry| {
            let name = entry.file_name();
            name.to_str()
                .is_some_and(|name| name.starts_with(&stem) && name.contains(".so"))
        });
        let leads = move |path: &PathBuf| path.canonicalize().is_ok_and(|real| real == library);
        beside.map(|entry| entry.path()).filter(leads)
    });
    let links = links.map(|link| link.to_string_lossy().into_owned());
    let mut all: Vec<_> = links.collect();
    all.extend(libraries);
    all.sort();
    all.dedup();
    all
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Which of the shells is there.
fn shell() -> String {
    let found = SHELLS.iter().find(|shell| Path::new(shell).exists());
    (*found.unwrap_or(&SHELLS[0])).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_libraries_are_read_from_its_memory() {
        let maps = "\
555-556 r-xp 00000000 fe:00 12                         /usr/bin/batchai
7f0-7f1 r--p 00000000 fe:00 13                         /usr/lib/libc.so.6
7f1-7f2 r-xp 00001000 fe:00 13                         /usr/lib/libc.so.6
7f3-7f4 r-xp 00000000 fe:00 14                         /opt/a b/ld-linux-x86-64.so.2 (deleted)
7f5-7f6 r--s 00000000 fe:00 15                         /etc/ld.so.cache
7f7-7f8 r-xp 00000000 00:00 0                          [vdso]
";
        let found = libraries(maps);
        assert_eq!(
            found,
            ["/opt/a b/ld-linux-x86-64.so.2", "/usr/lib/libc.so.6"]
        );
        // Of systems that name them by their versions programs ask for the links.
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["libc-2.31.so", "libcap.so.2", "libc.a"] {
            fs::write(path(name), "").unwrap();
        }
        std::os::unix::fs::symlink("libc-2.31.so", path("libc.so.6")).unwrap();
        let text = |name: &str| path(name).to_string_lossy().into_owned();
        let both = with_links(vec![text("libc-2.31.so")]);
        assert_eq!(both, [text("libc-2.31.so"), text("libc.so.6")]);
        // Of this one: they are there.
        let own = libraries(&fs::read_to_string("/proc/self/maps").unwrap());
        assert!(own.iter().all(|path| Path::new(path).is_file()), "{own:?}");
    }
}
