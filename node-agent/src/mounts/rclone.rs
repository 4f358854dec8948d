//! Mounts what lies on other machines and is opened with a key: shares with the kernel's cifs where it has that, everything else with
//! `rclone`, which serves it by FUSE until it is unmounted.
//!
//! The key goes to rclone as a file of its settings that is in memory only, and open in no other process. For a container it is not even
//! that: rclone gets a signature, made with the key, that opens this one container, for a year. What is mounted for longer is mounted
//! anew, with another.

mod settings;

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use batchai_common::time;
use nix::mount::{MsFlags, mount as mount_2};
use serde::Deserialize;

use super::{kernel, room};
use crate::launch::{Place, Remote};
use crate::memory;
use crate::words::Words;
pub use settings::plain;
use settings::{arguments, cifs_options, root, settings};

/// One try to reach a server; all of it has the deadline of the step.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);
/// A name that nothing has: looking for it asks for next to nothing.
const NOTHING: &str = ".batchai-looks-for-nothing";
/// For so long a signature opens something, and so long before its end it is not relied upon any more.
const SIGNED_FOR: Duration = Duration::from_secs(365 * 24 * 3600);
const SIGNED_SPARE: Duration = Duration::from_secs(24 * 3600);
/// Where something is mounted, and with what.
pub struct Point<'a> {
    pub path: &'a Path,
    /// The same, as the kernel says it.
    pub place: &'a Path,
    /// A directory for what is read and written.
    pub cache: &'a Path,
    pub env: &'a BTreeMap<String, String>,
    /// How long it may not answer.
    pub patience: Duration,
}

/// Mounts it. What serves it stays behind as an orphan.
pub fn mount(remote: &Remote, key: &str, point: &Point<'_>) -> io::Result<()> {
    if key.is_empty() {
        return Err(io::Error::other("its key is not known here"));
    }
    let server = remote.server();
    let (host, port) = server.ok_or_else(|| io::Error::other("it is nowhere"))?;
    let address = reach(&host, port)?;
    if let Some(data) = cifs_options(remote, key, address, point.patience)?
        && let Some(done) = by_kernel(remote, &data, point.path)
    {
        return done;
    }
    for (program, package) in [("rclone", "rclone"), ("fusermount", "fuse3")] {
        require(program, package, point.env)?;
    }
    let password = match remote.place {
        Place::Share { .. } => obscured(key, point.env)?,
        Place::Container { .. } | Place::Bucket { .. } => String::new(),
    };
    let until = time::now().seconds + SIGNED_FOR.as_secs() as i64;
    let settings = settings(remote, key, &password, until)?;
    check(remote, &settings, point.env)?;
    serve(remote, &settings, point)
}

/// Whether what opens something does so no more, or not for long.
pub fn is_outlived(remote: &Remote, age: Duration) -> bool {
    matches!(remote.place, Place::Container { .. }) && age > SIGNED_FOR - SIGNED_SPARE
}

/// A server that cannot be reached is said at once: what speaks to it tries for minutes.
pub fn reach(host: &str, port: u16) -> io::Result<SocketAddr> {
    let unreachable =
        |error: &dyn std::fmt::Display| io::Error::other(format!("{host}:{port}: {error}"));
    let addresses = (host, port).to_socket_addrs();
    let mut last = None;
    for address in addresses.map_err(|error| unreachable(&error))? {
        match TcpStream::connect_timeout(&address, CONNECT_MAX) {
            Ok(_) => return Ok(address),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(
        || unreachable(&"it has no address"),
        |error| unreachable(&error),
    ))
}

/// `None` where the kernel does not know how.
fn by_kernel(remote: &Remote, data: &str, path: &Path) -> Option<io::Result<()>> {
    let Place::Share {
        host,
        share,
        directory,
        ..
    } = &remote.place
    else {
        return None;
    };
    let source = format!("//{host}/{share}/{directory}");
    let source = source.trim_end_matches('/');
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    match mount_2(Some(source), path, Some("cifs"), flags, Some(data)) {
        Err(nix::Error::ENODEV) => None,
        Err(error) => Some(Err(io::Error::other(format!(
            "the kernel's cifs: {}",
            match error {
                nix::Error::EACCES => "permission denied: wrong account or key".to_owned(),
                nix::Error::ENOENT => "there is no such share or directory".to_owned(),
                error => error.desc().to_owned(),
            }
        )))),
        Ok(()) => Some(Ok(())),
    }
}

/// Says which package has a program that is missing.
fn require(program: &str, package: &str, env: &BTreeMap<String, String>) -> io::Result<()> {
    let path = env.get("PATH").map_or("/usr/bin:/bin", String::as_str);
    let found = path
        .split(':')
        .any(|dir| Path::new(dir).join(program).is_file());
    match found {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{program} is not installed: apt-get install {package}"
        ))),
    }
}

/// Passwords stand in its settings in a form of its own.
fn obscured(password: &str, env: &BTreeMap<String, String>) -> io::Result<String> {
    let mut child = Command::new("rclone")
        .args(["obscure", "-", "--config", "/dev/null"])
        .env_clear()
        .envs(env)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(password.as_bytes())?;
    }
    let words = Words::of(&mut child);
    let output = child.wait_with_output()?;
    ended_well(output.status, &words)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn rclone(settings: &str, env: &BTreeMap<String, String>) -> io::Result<Command> {
    let mut command = Command::new("rclone");
    command
        .env_clear()
        .envs(env)
        .current_dir("/")
        .stdin(memory::file(settings.as_bytes())?)
        .stdout(Stdio::null())
        .args(["--config", "/proc/self/fd/0", "--log-level", "ERROR"]);
    Ok(command)
}

/// Sees whether it is there and the key opens it: rclone would mount it all the same.
fn check(remote: &Remote, settings: &str, env: &BTreeMap<String, String>) -> io::Result<()> {
    let mut look = root(remote);
    if !matches!(remote.place, Place::Share { .. }) {
        look = format!("{look}/{NOTHING}");
    }
    let mut child = rclone(settings, env)?
        .args(["lsf", "--retries", "1", "--low-level-retries", "1", &look])
        .stderr(Stdio::piped())
        .spawn()?;
    let words = Words::of(&mut child);
    ended_well(child.wait()?, &words)
}

fn ended_well(status: ExitStatus, words: &Words) -> io::Result<()> {
    if status.success() {
        return Ok(());
    }
    let words = plain(&words.last());
    Err(io::Error::other(match words.as_str() {
        "" => format!("rclone: {status}"),
        words => format!("rclone: {words}"),
    }))
}

/// Starts what serves it, and waits until it is mounted.
fn serve(remote: &Remote, settings: &str, point: &Point<'_>) -> io::Result<()> {
    let begins = !point.cache.exists();
    std::fs::create_dir_all(point.cache)?;
    // One that goes on may make room by writing back what it has.
    if let Some(why) = room::lacking(point.cache).filter(|_| begins) {
        return Err(io::Error::other(why));
    }
    let mut child = rclone(settings, point.env)?
        .args(arguments(remote, point))
        .spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!("rclone has ended: {status}")));
        }
        let known = kernel::mounted();
        if known.is_some_and(|known| !known.at(point.place).is_empty()) {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// How much of what was written to a mount with this cache is not written back.
pub fn unwritten(cache: &Path) -> io::Result<usize> {
    #[derive(Deserialize)]
    struct Meta {
        #[serde(rename = "Dirty", default)]
        dirty: bool,
    }
    let mut dirs = vec![cache.join("vfsMeta")];
    let mut count = 0;
    while let Some(dir) = dirs.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
                continue;
            }
            let meta = match std::fs::read(entry.path()) {
                // It was removed, or gets another name.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                meta => meta?,
            };
            // One that is being written is no whole one yet: that of something new.
            let meta = serde_json::from_slice(&meta).unwrap_or(Meta { dirty: true });
            count += usize::from(meta.dirty);
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_back_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(unwritten(dir.path()).unwrap(), 0);
        let of = dir.path().join("vfsMeta/r/data");
        std::fs::create_dir_all(&of).unwrap();
        std::fs::write(of.join("a"), "{\"Size\": 1, \"Dirty\": false}").unwrap();
        std::fs::write(of.join("b"), "{\"Size\": 1, \"Dirty\": true}").unwrap();
        std::fs::write(of.join("c"), "{\"Si").unwrap();
        assert_eq!(unwritten(dir.path()).unwrap(), 2);
    }
}
