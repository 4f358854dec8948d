//! The process that looks: opens a path beneath a directory, and prints what is there. It ends with what it printed.
//!
//! The kernel itself keeps it beneath (`openat2`): no link and no `..` leads out, whatever changes meanwhile.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitCode;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};

use crate::launch::JobUser;
use crate::user::become_user;

/// Its exit code where nothing of the name is there.
pub const ABSENT: i32 = 3;
/// A directory with more is not listed: all its names are held at once.
const NAMES_MAX: usize = 100_000;

/// What is wanted.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Wanted {
    /// What a user chose: links in it are his.
    pub prefix: String,
    /// Below it, the directory that is not left, and that the job must not have put a link in place of.
    pub base: String,
    /// A path in it; the directory itself where it is empty.
    pub path: String,
    /// Its entries, else its bytes.
    pub list: bool,
    /// Entries behind this name only.
    pub after: String,
    /// So many entries or bytes at most; 0 bytes are all.
    pub limit: u64,
    pub offset: u64,
    /// As whom; the agent's own user where it is none.
    pub user: Option<JobUser>,
    /// It is a file server's directory: the way to it is the agent's own, no link is followed, and a file may be listed.
    pub served: bool,
}

/// An entry of a directory; without a name it is what was to be listed itself, a file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub name: String,
    pub directory: bool,
    pub length: u64,
    pub modified_ms: i64,
}

/// The process: the question comes on standard input, the answer goes to standard output.
pub fn main() -> ExitCode {
    let mut question = String::new();
    let done = io::stdin()
        .read_to_string(&mut question)
        .and_then(|_| serde_json::from_str(&question).map_err(io::Error::other))
        .and_then(|wanted: Wanted| look(&wanted, &mut io::stdout().lock()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Who asked has heard enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            match error.kind() {
                io::ErrorKind::NotFound => ExitCode::from(ABSENT as u8),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn look(wanted: &Wanted, out: &mut impl Write) -> io::Result<()> {
    let become_it = || match &wanted.user {
        Some(user) => become_user(&user.into()),
        None => Ok(()),
    };
    let base = match wanted.served {
        true => {
            let base = directory(&wanted.prefix, &wanted.base)?;
            become_it()?;
            base
        }
        false => {
            // What the job may not read is not shown to who may read the job.
            become_it()?;
            directory(&wanted.prefix, &wanted.base)?
        }
    };
    let base = Base {
        fd: base.as_fd(),
        links: !wanted.served,
    };
    match wanted.list {
        true => {
            let entries = entries(base, wanted)?;
            serde_json::to_writer(out, &entries).map_err(io::Error::other)
        }
        false => bytes(base, wanted, out),
    }
}

/// Opens a directory that is not left.
pub fn directory(prefix: &str, base: &str) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let prefix = nix::fcntl::open(Path::new(prefix), flags, nix::sys::stat::Mode::empty())?;
    let how = OpenHow::new()
        .flags(flags)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(prefix, base, how).map_err(|error| match error {
        Errno::ELOOP => io::Error::other("a link lies where the directory should be"),
        error => error.into(),
    })
}

/// A directory that is not left, and whether links in it are followed.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    pub fd: BorrowedFd<'a>,
    pub links: bool,
}

/// Opens a path beneath a directory.
pub fn beneath(base: Base<'_>, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let links = match base.links {
        true => ResolveFlag::RESOLVE_NO_MAGICLINKS,
        false => ResolveFlag::RESOLVE_NO_SYMLINKS,
    };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | links);
    let path = if path.is_empty() { "." } else { path };
    openat2(base.fd, path, how).map_err(|error| match error {
        Errno::EXDEV => io::Error::other("it leads out of the directory"),
        Errno::ELOOP => io::Error::other("a symbolic link lies there, which is not followed"),
        error => error.into(),
    })
}

fn entries(base: Base<'_>, wanted: &Wanted) -> io::Result<Vec<Entry>> {
    if wanted.served {
        let own = File::from(beneath(base, &wanted.path, OFlag::O_PATH)?).metadata()?;
        if own.is_file() {
            return Ok(vec![entry(String::new(), &own)]);
        }
    }
    let directory = beneath(base, &wanted.path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let mut names = Vec::new();
    for entry in Dir::from_fd(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." && name > wanted.after {
            names.push(name);
        }
        if names.len() > NAMES_MAX {
            let why = format!("it has more than {NAMES_MAX} entries");
            return Err(io::Error::other(why));
        }
    }
    names.sort_unstable();
    let prefix = match wanted.path.trim_end_matches('/') {
        "" => String::new(),
        path => format!("{path}/"),
    };
    let shown = names.into_iter().filter_map(|name| {
        let path = format!("{prefix}{name}");
        let own = beneath(base, &path, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok()?;
        let is_link = File::from(own).metadata().ok()?.is_symlink();
        let opened = beneath(base, &path, OFlag::O_PATH).ok()?;
        let metadata = File::from(opened).metadata().ok()?;
        // A link to a directory would be that directory again, and again below itself.
        if is_link && metadata.is_dir() {
            return None;
        }
        // What leads out, dangles or is neither file nor directory is not shown.
        (metadata.is_file() || metadata.is_dir()).then(|| entry(name, &metadata))
    });
    Ok(shown
        .take(usize::try_from(wanted.limit).unwrap_or(usize::MAX))
        .collect())
}

fn entry(name: String, metadata: &Metadata) -> Entry {
    Entry {
        name,
        directory: metadata.is_dir(),
        length: if metadata.is_dir() { 0 } else { metadata.len() },
        modified_ms: metadata.mtime() * 1000 + metadata.mtime_nsec() / 1_000_000,
    }
}

fn bytes(base: Base<'_>, wanted: &Wanted, out: &mut impl Write) -> io::Result<()> {
    // A pipe or device must not be waited for, nor read.
    let opened = beneath(base, &wanted.path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let mut file = File::from(opened);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    file.seek(SeekFrom::Start(wanted.offset))?;
    let limit = if wanted.limit == 0 {
        u64::MAX
    } else {
        wanted.limit
    };
    io::copy(&mut file.take(limit), out)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn answer(base: &Path, change: impl FnOnce(&mut Wanted)) -> io::Result<String> {
        let mut wanted = Wanted {
            prefix: base.parent().unwrap().to_string_lossy().into_owned(),
            base: base.file_name().unwrap().to_string_lossy().into_owned(),
            ..Wanted::default()
        };
        change(&mut wanted);
        let mut out = Vec::new();
        look(&wanted, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn names(base: &Path, change: impl FnOnce(&mut Wanted)) -> Vec<String> {
        let listed = answer(base, |wanted| {
            (wanted.list, wanted.limit) = (true, 100);
            change(wanted);
        });
        let entries: Vec<Entry> = serde_json::from_str(&listed.unwrap()).unwrap();
        entries.into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (base, outside) = (dir.path().join("out"), dir.path().join("secret"));
        fs::create_dir_all(base.join("sub")).unwrap();
        fs::write(&outside, "secret").unwrap();
        fs::write(base.join("result.txt"), "0123456789").unwrap();
        symlink("../result.txt", base.join("sub/inside")).unwrap();
        symlink("../../secret", base.join("sub/out")).unwrap();
        symlink(&outside, base.join("absolute")).unwrap();
        symlink("/proc/self/environ", base.join("magic")).unwrap();
        symlink(dir.path(), base.join("up")).unwrap();
        symlink(".", base.join("again")).unwrap();
        symlink("/", dir.path().join("linked")).unwrap();
        let linked = answer(&dir.path().join("linked"), |w| w.path = "etc/passwd".into());
        assert!(linked.unwrap_err().to_string().contains("a link lies"));
        nix::unistd::mkfifo(&base.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(names(&base, |_| ()), ["result.txt", "sub"]);
        assert_eq!(names(&base, |w| w.path = "sub/".into()), ["inside"]);
        assert_eq!(
            answer(&base, |w| w.path = "sub/inside".into()).unwrap(),
            "0123456789"
        );
        for path in [
            "../secret",
            "sub/../../secret",
            "sub/out",
            "absolute",
            "magic",
            "up/secret",
            "/etc/passwd",
            "pipe",
            "sub",
            "",
        ] {
            assert!(answer(&base, |w| w.path = path.into()).is_err(), "{path}");
        }
        for path in ["..", "up", "sub/../.."] {
            let listed = answer(&base, |w| (w.path, w.list) = (path.into(), true));
            assert!(listed.is_err(), "{path}");
        }
        let absent = answer(&base, |w| w.path = "none".into()).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn ranges_and_pages_are_what_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..5 {
            fs::write(dir.path().join(format!("f{i}")), "0123456789").unwrap();
        }
        let read = |offset, limit| {
            answer(dir.path(), |w| {
                (w.path, w.offset, w.limit) = ("f0".into(), offset, limit)
            })
            .unwrap()
        };
        assert_eq!(read(0, 0), "0123456789");
        assert_eq!(read(3, 4), "3456");
        assert_eq!(read(8, 40), "89");
        assert_eq!(read(50, 1), "");
        assert_eq!(names(dir.path(), |w| w.limit = 2), ["f0", "f1"]);
        assert_eq!(
            names(dir.path(), |w| (w.limit, w.after) = (2, "f1".into())),
            ["f2", "f3"]
        );
    }
}
