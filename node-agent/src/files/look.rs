//! The process that looks: opens a path beneath a directory, and prints what is there. It ends with what it printed.
//!
//! The kernel itself keeps it beneath (`openat2`): no link and no `..` leads out, whatever changes meanwhile.

use std::borrow::Cow;
use std::collections::BinaryHeap;
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitCode;

use batchai_common::{executable, parts};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};

use crate::launch::JobUser;
use crate::user::become_user;

/// Its exit code where nothing of the name is there.
pub const ABSENT: i32 = 3;
/// Names of a directory that are held at once, where no more entries are asked for.
const NAMES_AT_ONCE: usize = 10_000;

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
    /// It is a file server's directory: the way to it is the agent's own, no link is followed, a file may be listed, and what cannot be
    /// read is listed as well, but not what came so far of files that are not whole yet.
    pub served: bool,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    File,
    Directory,
    /// A link, or what is neither file nor directory.
    Other,
    /// It may not be looked at, or its name is not UTF-8 and so not all of its name.
    Unreadable,
}

/// An entry of a directory; without a name it is what was to be listed itself, a file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub name: String,
    pub what: What,
    pub length: u64,
    pub modified_ms: i64,
    /// It is a file that its owner may execute.
    pub executable: bool,
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
    let mut directory = Dir::from_fd(directory)?;
    let prefix = match wanted.path.trim_end_matches('/') {
        "" => String::new(),
        path => format!("{path}/"),
    };
    let limit = usize::try_from(wanted.limit).unwrap_or(usize::MAX);
    let (mut shown, mut after) = (Vec::new(), wanted.after.clone());
    // What is not shown makes room for what lies behind it.
    while shown.len() < limit {
        let most = (limit - shown.len()).max(NAMES_AT_ONCE);
        let names = names(&mut directory, &after, most, wanted.served)?;
        let all = names.len() < most;
        for name in names {
            after.clone_from(&name.shown);
            if shown.len() < limit
                && let Some(entry) = entry_of(base, &prefix, name, wanted.served)
            {
                shown.push(entry);
            }
        }
        if all {
            break;
        }
    }
    Ok(shown)
}

/// The name of an entry; it is sorted by what is shown of it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    shown: String,
    whole: bool,
}

/// The first names of a directory behind one, so many at most.
fn names(dir: &mut Dir, after: &str, most: usize, served: bool) -> io::Result<Vec<Name>> {
    let mut first = BinaryHeap::new();
    for entry in dir.iter() {
        let entry = entry?;
        let shown = entry.file_name().to_string_lossy();
        let is_hidden = served && parts::is_part(&shown);
        if is_hidden || *shown == *"." || *shown == *".." || *shown <= *after {
            continue;
        }
        let whole = matches!(shown, Cow::Borrowed(_));
        let shown = shown.into_owned();
        first.push(Name { shown, whole });
        if first.len() > most {
            first.pop();
        }
    }
    Ok(first.into_sorted_vec())
}

/// An entry; none where it is not shown: what is gone meanwhile, and, but of a file server, what cannot be read.
fn entry_of(base: Base<'_>, prefix: &str, name: Name, served: bool) -> Option<Entry> {
    let path = format!("{prefix}{}", name.shown);
    let look = |flags| File::from(beneath(base, &path, OFlag::O_PATH | flags)?).metadata();
    let found = match name.whole {
        true => look(OFlag::O_NOFOLLOW),
        false => Err(io::ErrorKind::InvalidInput.into()),
    };
    let found = match found {
        Ok(own) if own.is_symlink() && !served => {
            let leads = look(OFlag::empty()).ok()?;
            // A link to a directory would be that directory again, and again below itself.
            return leads.is_file().then(|| entry(name.shown, &leads));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        found => found,
    };
    let entry = match found {
        Ok(own) => entry(name.shown, &own),
        Err(_) => Entry {
            name: name.shown,
            what: What::Unreadable,
            length: 0,
            modified_ms: 0,
            executable: false,
        },
    };
    // What leads out, dangles or is neither file nor directory is not shown.
    let readable = matches!(entry.what, What::File | What::Directory);
    (readable || served).then_some(entry)
}

fn entry(name: String, metadata: &Metadata) -> Entry {
    let what = match metadata {
        file if file.is_file() => What::File,
        dir if dir.is_dir() => What::Directory,
        _ => What::Other,
    };
    let is_file = what == What::File;
    Entry {
        name,
        what,
        length: if is_file { metadata.len() } else { 0 },
        modified_ms: metadata.mtime() * 1000 + metadata.mtime_nsec() / 1_000_000,
        executable: is_file && executable::is(metadata),
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
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt as _;
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
    fn listed(base: &Path, change: impl FnOnce(&mut Wanted)) -> Vec<(String, What)> {
        let listed = answer(base, |wanted| {
            (wanted.list, wanted.limit, wanted.served) = (true, 100, true);
            change(wanted);
        });
        let entries: Vec<Entry> = serde_json::from_str(&listed.unwrap()).unwrap();
        entries.into_iter().map(|e| (e.name, e.what)).collect()
    }

    #[test]
    fn what_cannot_be_read_of_a_file_server_is_listed_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("served");
        fs::create_dir_all(base.join("sub")).unwrap();
        fs::write(base.join("file"), "content").unwrap();
        fs::write(base.join(parts::name("file", "x")), "cont").unwrap();
        fs::write(base.join(".file.part"), "anybody's").unwrap();
        symlink("file", base.join("link")).unwrap();
        nix::unistd::mkfifo(&base.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(base.join(OsStr::from_bytes(b"bad\xff")), "x").unwrap();
        let found = listed(&base, |_| ());
        let found: Vec<_> = found.iter().map(|(n, w)| (n.as_str(), *w)).collect();
        let expected = [
            (".file.part", What::File),
            ("bad\u{fffd}", What::Unreadable),
            ("file", What::File),
            ("link", What::Other),
            ("pipe", What::Other),
            ("sub", What::Directory),
        ];
        assert_eq!(found, expected);
        // Of a job's directory what cannot be read is not shown, but links to files are.
        let of_job = names(&base, |w| w.after = ".file.part-~".into());
        assert_eq!(of_job, ["file", "link", "sub"]);
    }

    #[test]
    fn however_many_there_are_they_are_listed_page_by_page() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..100_010 {
            File::create(dir.path().join(format!("{i:06}"))).unwrap();
        }
        let page = |after: &str| {
            listed(dir.path(), |w| (w.limit, w.after) = (3, after.to_owned()))
                .into_iter()
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
        };
        assert_eq!(page(""), ["000000", "000001", "000002"]);
        assert_eq!(page("100006"), ["100007", "100008", "100009"]);
        assert!(page("100009").is_empty());
        // What is not shown takes nobody's place, however much of it there is.
        let links = tempfile::tempdir().unwrap();
        for i in 0..NAMES_AT_ONCE + 10 {
            symlink("none", links.path().join(format!("{i:06}"))).unwrap();
        }
        fs::write(links.path().join("last"), "").unwrap();
        assert_eq!(names(links.path(), |w| w.limit = 2), ["last"]);
    }
}
