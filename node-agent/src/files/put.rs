//! The process that writes a file of a file server, or makes a directory, as jobs of its workspace would: whole or not at all.
//!
//! ```text
//! DIR/.NAME.part-KEY         what came so far of an upload of one content, which KEY stands for; renamed to NAME when all of it is there
//! ```
//! It is locked while somebody writes it, synced now and then, and stays when an upload breaks off: the next one of the same content goes
//! on where it ends. Lists do not show it. It is taken away when nothing came of it for a week and another content of the same file comes,
//! when it turns out to be damaged, and when the disk is full; else it stays until that content, or a job, comes.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, Read, Seek as _, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use batchai_common::names::hex;
use batchai_common::{executable, parts};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::look::{ABSENT, Base, beneath, directory};
use super::process::Pulse;
use crate::launch::JobUser;
use crate::user::{become_user, give_up_privileges};

/// Its exit code where another one writes the same.
pub const BUSY: i32 = 4;
/// Its exit code where what lay there was damaged: sent again, it begins anew.
pub const DAMAGED: i32 = 5;
/// How long another one that is about to end is waited for.
const LOCK_MAX: Duration = Duration::from_secs(5);
const LOCK_STEP: Duration = Duration::from_millis(50);
const BUFFER_BYTES: usize = 256 << 10;
/// Little enough for a slow disk that many write to at once: until it is synced nothing is said.
const SYNC_EVERY: u64 = 8 << 20;
/// What came so far of an upload that nobody goes on with is kept for so long, and looked for among so many entries.
const PART_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
const ENTRIES_MAX: usize = 10_000;

/// What is wanted: one line of JSON on standard input, before the bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Wanted {
    /// Where file servers lie.
    pub prefix: String,
    /// Below it, the directory that is not left.
    pub base: String,
    /// The file's path in it; that of a directory ends with a slash.
    pub path: String,
    pub size: u64,
    /// The digest of all of it.
    pub sha256: String,
    /// Who may read it may execute it, else nobody may.
    pub executable: bool,
    /// As whom; the agent's own user where it is none.
    pub user: Option<JobUser>,
}

/// What it says on standard output, a line each.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// What is there already is read, which takes its time.
    Alive,
    /// Bytes are wanted from there on.
    From(u64),
}

/// The process. It ends well when the file has its name and is on the disk.
pub fn main() -> ExitCode {
    let mut input = io::BufReader::with_capacity(BUFFER_BYTES, io::stdin().lock());
    let mut question = String::new();
    let done = input
        .read_line(&mut question)
        .and_then(|_| serde_json::from_str(&question).map_err(io::Error::other))
        .and_then(|wanted: Wanted| {
            let base = directory(&wanted.prefix, &wanted.base)?;
            if let Some(user) = &wanted.user {
                become_user(&user.into())?;
            }
            give_up_privileges(false)?;
            put(&base, &wanted, &mut input, &mut io::stdout().lock())
        });
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    let _ = writeln!(io::stderr(), "{error}");
    ExitCode::from(match error.kind() {
        io::ErrorKind::NotFound => ABSENT as u8,
        io::ErrorKind::WouldBlock => BUSY as u8,
        io::ErrorKind::InvalidData => DAMAGED as u8,
        _ => 1,
    })
}

fn put(
    base: &OwnedFd,
    wanted: &Wanted,
    input: &mut impl Read,
    out: &mut impl Write,
) -> io::Result<()> {
    if let Some(path) = wanted.path.strip_suffix('/') {
        made(base, path)?;
        return say(out, &Progress::From(wanted.size));
    }
    let (above, name) = wanted.path.rsplit_once('/').unwrap_or(("", &wanted.path));
    let dir = made(base, above)?;
    if is_there(&dir, name, wanted, out)? {
        return say(out, &Progress::From(wanted.size));
    }
    let part = part_name(name, wanted);
    let mut file = open_part(&dir, &part)?;
    if file.metadata()?.len() > wanted.size {
        file.set_len(0)?;
    }
    let mut hash = Sha256::new();
    let offset = read_all(&mut file, &mut hash, out)?;
    if offset == 0 {
        // They are in nobody's way: what cannot be taken away stays.
        let _ = forget_others(&dir, name, &part);
    }
    say(out, &Progress::From(offset))?;
    let forget = || unlinkat(&dir, part.as_str(), UnlinkatFlags::NoRemoveDir);
    let came = copy(input, &mut file, &mut hash, wanted.size - offset);
    // Also of what broke off: it is gone on with.
    let came = came.and_then(|came| file.sync_all().map(|()| came));
    if came.as_ref().is_err_and(is_full) {
        forget()?;
    }
    if offset + came.map_err(full)? < wanted.size {
        let why = "it broke off; what came of it stays, for when it is sent again";
        return Err(io::Error::other(why));
    }
    if hex(&hash.finalize()) != wanted.sha256 {
        forget()?;
        return Err(match offset {
            0 => io::Error::other(
                "what came has another SHA-256 than was announced: did it change while it was sent? Send it again",
            ),
            _ => io::Error::new(
                io::ErrorKind::InvalidData,
                "what lay there of an earlier upload was damaged, or what came: it is taken away, send it again",
            ),
        });
    }
    executable::set(&file, wanted.executable)?;
    renameat(&dir, part.as_str(), &dir, name).map_err(|error| at(name, error.into()))?;
    nix::unistd::fsync(&dir)?;
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// What to do where there is no room.
fn full(error: io::Error) -> io::Error {
    match is_full(&error) {
        true => io::Error::other(format!(
            "the file server's disk is full: {error}; what came is taken away: make room, then send it again"
        )),
        false => error,
    }
}

/// Takes away what nobody went on with of earlier uploads of other contents of a file.
fn forget_others(dir: &OwnedFd, name: &str, own: &str) -> io::Result<()> {
    let base = Base {
        fd: dir.as_fd(),
        links: false,
    };
    let listed = beneath(base, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    for entry in Dir::from_fd(listed)?.iter().take(ENTRIES_MAX) {
        let entry = entry?;
        let Ok(other) = entry.file_name().to_str() else {
            continue;
        };
        if other == own || !parts::is_part_of(name, other) {
            continue;
        }
        // It may be another user's, or just got its name.
        let Ok(opened) = beneath(base, other, OFlag::O_RDONLY | OFlag::O_NONBLOCK) else {
            continue;
        };
        let file = File::from(opened);
        let metadata = file.metadata()?;
        // One of the future is as good as new.
        let age = metadata.modified()?.elapsed().unwrap_or_default();
        if !metadata.is_file() || age < PART_AGE_MAX {
            continue;
        }
        // Nobody writes it, and it is still this one.
        if let Ok(_locked) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && lies_at(dir, other, &metadata)
        {
            unlinkat(dir, other, UnlinkatFlags::NoRemoveDir)?;
        }
    }
    Ok(())
}

fn lies_at(dir: &OwnedFd, name: &str, metadata: &Metadata) -> bool {
    let now = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW);
    now.is_ok_and(|now| (now.st_dev, now.st_ino) == (metadata.dev(), metadata.ino()))
}

fn say(out: &mut impl Write, what: &Progress) -> io::Result<()> {
    serde_json::to_writer(&mut *out, what).map_err(io::Error::other)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Opens a directory for what is made in it; what is missing on the way is made.
fn made(base: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let open = |dir: &OwnedFd, name: &str| {
        let base = Base {
            fd: dir.as_fd(),
            links: false,
        };
        beneath(base, name, flags)
    };
    let mut dir = open(base, "")?;
    for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
        match mkdirat(&dir, name, Mode::from_bits_truncate(0o777)) {
            Ok(()) => nix::unistd::fsync(&dir)?,
            Err(Errno::EEXIST) => {}
            Err(error) => return Err(at(name, error.into())),
        }
        dir = open(&dir, name).map_err(|error| at(name, error))?;
    }
    Ok(dir)
}

/// Whether the very file is there already. What is there and no file is not replaced.
fn is_there(dir: &OwnedFd, name: &str, wanted: &Wanted, out: &mut impl Write) -> io::Result<bool> {
    let found = match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => return Ok(false),
        found => found?,
    };
    let kind = found.st_mode & nix::libc::S_IFMT;
    if kind != nix::libc::S_IFREG {
        let what = match kind {
            nix::libc::S_IFLNK => "a symbolic link lies there, which is not followed",
            nix::libc::S_IFDIR => "a directory lies there",
            _ => "something lies there that is no file",
        };
        return Err(io::Error::other(what));
    }
    if found.st_size != wanted.size as i64 {
        return Ok(false);
    }
    let base = Base {
        fd: dir.as_fd(),
        links: false,
    };
    // What cannot be read is written anew.
    let Ok(opened) = beneath(base, name, OFlag::O_RDONLY | OFlag::O_NONBLOCK) else {
        return Ok(false);
    };
    let (mut file, mut hash) = (File::from(opened), Sha256::new());
    read_all(&mut file, &mut hash, out)?;
    let same = hex(&hash.finalize()) == wanted.sha256;
    // What has another owner is written anew where its mode is another one, and so is what has other names.
    let as_wanted = executable::is(&file.metadata()?) == wanted.executable;
    let may_be = found.st_nlink == 1 && same && executable::set(&file, wanted.executable).is_ok();
    Ok(same && (as_wanted || may_be))
}

/// What is not whole yet is called after its file and its content.
fn part_name(name: &str, wanted: &Wanted) -> String {
    parts::name(name, &format!("{name}/{}/{}", wanted.size, wanted.sha256))
}

/// Opens it for nobody else.
fn open_part(dir: &OwnedFd, part: &str) -> io::Result<Flock<File>> {
    let begun = Instant::now();
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    loop {
        let mode = Mode::from_bits_truncate(0o666);
        let file = File::from(openat(dir, part, flags | OFlag::O_CLOEXEC, mode)?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(at(
                part,
                io::Error::other("something lies there that is no file"),
            ));
        }
        // Whoever had it may have given it its name meanwhile.
        if let Ok(locked) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && lies_at(dir, part, &metadata)
        {
            return Ok(locked);
        }
        if begun.elapsed() > LOCK_MAX {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        std::thread::sleep(LOCK_STEP);
    }
}

/// Takes all of a file into a digest; how much that is. It stands at its end then.
fn read_all(file: &mut File, hash: &mut Sha256, out: &mut impl Write) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    read_on(file, hash, out)
}

fn read_on(file: &mut impl Read, hash: &mut Sha256, out: &mut impl Write) -> io::Result<u64> {
    let (mut buffer, mut size, mut pulse) = (vec![0; BUFFER_BYTES], 0, Pulse::default());
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(size);
        }
        hash.update(&buffer[..read]);
        size += read as u64;
        if pulse.is_due() {
            say(out, &Progress::Alive)?;
        }
    }
}

/// Writes what comes, so much at most; how much that was. Synced now and then: the end of it takes no long time.
fn copy(input: &mut impl Read, file: &mut File, hash: &mut Sha256, most: u64) -> io::Result<u64> {
    let (mut buffer, mut came, mut unsynced) = (vec![0; BUFFER_BYTES], 0, 0);
    let mut input = input.take(most);
    loop {
        let read = input.read(&mut buffer)?;
        if read == 0 {
            return Ok(came);
        }
        file.write_all(&buffer[..read])?;
        hash.update(&buffer[..read]);
        came += read as u64;
        unsynced += read as u64;
        if unsynced >= SYNC_EVERY {
            unsynced = 0;
            file.sync_data()?;
        }
    }
}

fn at(name: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn wanted(base: &Path, path: &str, content: &[u8]) -> Wanted {
        Wanted {
            prefix: base.parent().unwrap().to_string_lossy().into_owned(),
            base: base.file_name().unwrap().to_string_lossy().into_owned(),
            path: path.to_owned(),
            size: content.len() as u64,
            sha256: hex(&Sha256::digest(content)),
            executable: false,
            user: None,
        }
    }

    fn run(wanted: &Wanted, mut input: &[u8]) -> (io::Result<()>, Vec<Progress>) {
        let mut out = Vec::new();
        let base = directory(&wanted.prefix, &wanted.base).unwrap();
        let done = put(&base, wanted, &mut input, &mut out);
        let lines = out.split(|byte| *byte == b'\n').filter(|l| !l.is_empty());
        let said = lines.map(|line| serde_json::from_slice(line).unwrap());
        (done, said.collect())
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_is_made_where_it_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        for _ in 0..2 {
            let (done, said) = run(&wanted(&base, "sets/one/", b""), b"");
            done.unwrap();
            assert_eq!(said, [Progress::From(0)]);
            assert!(base.join("sets/one").is_dir() && names(&base) == ["sets"]);
        }
        fs::write(base.join("file"), b"x").unwrap();
        symlink("/etc", base.join("link")).unwrap();
        for path in ["file/", "link/", "link/x/"] {
            let (done, said) = run(&wanted(&base, path, b""), b"");
            assert!(done.is_err() && said.is_empty(), "{path}");
        }
        assert!(!Path::new("/etc/x").exists());
    }

    #[test]
    fn what_broke_off_is_gone_on_with_and_only_what_is_whole_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        let content = b"0123456789";
        let wanted = wanted(&base, "sets/one/file", content);
        let (done, said) = run(&wanted, &content[..4]);
        assert!(done.unwrap_err().to_string().contains("broke off"));
        assert_eq!(said, [Progress::From(0)]);
        let parent = base.join("sets/one");
        assert!(names(&parent)[0].starts_with(".file.part-"));
        // Another content is another upload.
        let other = Wanted {
            sha256: hex(&Sha256::digest(b"9876543210")),
            ..wanted_again(&wanted)
        };
        assert_eq!(run(&other, b"98").1, [Progress::From(0)]);
        let (done, said) = run(&wanted, &content[4..]);
        done.unwrap();
        assert_eq!(said, [Progress::From(4)]);
        assert_eq!(fs::read(parent.join("file")).unwrap(), content);
        // Once more, with nothing to send.
        let (done, said) = run(&wanted, b"");
        done.unwrap();
        assert_eq!(said, [Progress::From(10)]);
        // What differs from what was announced has no name, and is not gone on with.
        for (sent, why) in [(&b"xxxxxxxx"[..], "taken away"), (b"98xxxxxxxx", "SHA-256")] {
            let error = run(&other, sent).0.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(names(&parent), ["file"]);
        assert_eq!(fs::read(parent.join("file")).unwrap(), content);
    }

    fn wanted_again(wanted: &Wanted) -> Wanted {
        serde_json::from_str(&serde_json::to_string(wanted).unwrap()).unwrap()
    }

    #[test]
    fn nothing_is_written_outside_or_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (base, outside) = (dir.path().join("base"), dir.path().join("outside"));
        fs::create_dir(&base).unwrap();
        fs::create_dir_all(outside.join("sub")).unwrap();
        fs::create_dir(base.join("dir")).unwrap();
        symlink(&outside, base.join("out")).unwrap();
        symlink("../outside", base.join("up")).unwrap();
        symlink("dir", base.join("inside")).unwrap();
        symlink(outside.join("file"), base.join("link")).unwrap();
        for (path, why) in [
            ("out/x", "link"),
            ("up/sub/x", "link"),
            ("inside/x", "link"),
            ("link", "link"),
            ("../x", "leads out"),
            ("dir/../../x", "leads out"),
            ("dir", "a directory"),
        ] {
            let (done, said) = run(&wanted(&base, path, b"x"), b"x");
            let error = done.unwrap_err().to_string();
            assert!(error.contains(why) && said.is_empty(), "{path}: {error}");
        }
        assert_eq!(names(&outside), ["sub"]);
        assert_eq!(names(dir.path()), ["base", "outside"]);
    }

    #[test]
    fn two_that_write_the_same_do_not_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = File::open(dir.path()).unwrap();
        let dir = OwnedFd::from(dir);
        let held = open_part(&dir, "part").unwrap();
        assert_eq!(
            open_part(&dir, "part").unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(held);
        assert!(open_part(&dir, "part").is_ok());
    }

    #[test]
    fn what_was_damaged_meanwhile_is_sent_again_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        let wanted = wanted(&base, "file", b"0123456789");
        run(&wanted, b"0123").0.unwrap_err();
        fs::write(base.join(&names(&base)[0]), "01x3").unwrap();
        let (done, said) = run(&wanted, b"456789");
        assert_eq!(done.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(said, [Progress::From(4)]);
        let (done, said) = run(&wanted, b"0123456789");
        done.unwrap();
        assert_eq!(said, [Progress::From(0)]);
        assert_eq!(names(&base), ["file"]);
    }

    #[test]
    fn what_nobody_goes_on_with_is_not_kept_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::create_dir(&base).unwrap();
        let aged = |part: &str, days: u64| {
            let file = File::create(base.join(part)).unwrap();
            let age = Duration::from_secs(days * 24 * 3600);
            file.set_modified(std::time::SystemTime::now() - age)
                .unwrap();
            file
        };
        let old = parts::name("file", "old");
        let written = parts::name("file", "written");
        let new = parts::name("file", "new");
        let of_other = parts::name("other", "old");
        aged(&old, 8);
        let held = Flock::lock(aged(&written, 8), FlockArg::LockExclusive).unwrap();
        aged(&new, 6);
        aged(&of_other, 8);
        aged(".file.part-mine", 8);
        run(&wanted(&base, "file", b"content"), b"content")
            .0
            .unwrap();
        let mut left = [written.as_str(), &new, &of_other, ".file.part-mine", "file"];
        left.sort_unstable();
        assert_eq!(names(&base), left);
        drop(held);
    }

    /// Reads a little at a time, slowly.
    struct Slow(u8);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(300));
            self.0 = self.0.saturating_sub(1);
            buffer[0] = b'x';
            Ok(usize::from(self.0.min(1)))
        }
    }

    #[test]
    fn who_waits_is_told_in_time_however_slow_the_disk_is() {
        let mut out = Vec::new();
        let size = read_on(&mut Slow(6), &mut Sha256::new(), &mut out).unwrap();
        assert_eq!(size, 5);
        assert!(out.starts_with(b"\"Alive\"\n"));
    }
}
