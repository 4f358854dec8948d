//! Mounts directories of file servers: by NFS from other machines, and as they are where they lie on this one.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use batchai_common::mount_options::{self, Flag, MountOptions};
use batchai_common::time::boot_millis;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::kernel;

/// A server that has just begun is asked again: it may not know of this node yet.
const PAUSE: Duration = Duration::from_millis(250);
/// What is left of the time when it is given up, so that there is time to say why.
const SPARE: Duration = Duration::from_secs(1);

/// What others put there gets them no rights here.
const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// A directory of a server.
pub struct Source<'a> {
    pub host: &'a str,
    pub port: u16,
    /// The version of NFS that it speaks: 3 or 4; 0 is 3.
    pub version: i32,
    /// As the server names it.
    pub directory: &'a str,
}

impl Source<'_> {
    /// What it may be mounted by, the best first.
    fn versions(&self) -> Result<&'static [&'static str], Tried> {
        match self.version {
            0 | 3 => Ok(&["3"]),
            4 => Ok(&["4.2", "4.1"]),
            other => Err(Tried::Never(format!(
                "it is served by NFS version {other}, which this agent does not know"
            ))),
        }
    }
}

/// Mounts by NFS, until some time in milliseconds of the boot clock. `fresh`: nothing is answered from memory.
pub fn nfs(
    source: &Source,
    (options, fresh): (&str, bool),
    place: &Path,
    until: i64,
) -> io::Result<()> {
    let options = mount_options::parse(options).map_err(io::Error::other)?;
    let left = u64::try_from(until - boot_millis()).unwrap_or_default();
    let how = (&options, fresh);
    let end = Instant::now() + Duration::from_millis(left).saturating_sub(SPARE);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let tried = try_nfs(source, how, place, left.max(PAUSE));
        match tried {
            Err(Tried::Soon(_)) if Instant::now() + PAUSE < end => std::thread::sleep(PAUSE),
            Err(Tried::Soon(why) | Tried::Never(why)) => return Err(io::Error::other(why)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Why it is not mounted.
enum Tried {
    /// It may be soon.
    Soon(String),
    Never(String),
}

fn try_nfs(
    source: &Source,
    (options, fresh): (&MountOptions, bool),
    place: &Path,
    most: Duration,
) -> Result<(), Tried> {
    let Source {
        host, directory, ..
    } = source;
    let versions = source.versions()?;
    let never = |error: io::Error| Tried::Never(format!("{host}: {error}"));
    let address = (*host, source.port)
        .to_socket_addrs()
        .map_err(never)?
        .next();
    let address = address.ok_or_else(|| Tried::Never(format!("{host} has no address")))?;
    // The kernel would say of a server that is silent only that time has passed.
    let reached = TcpStream::connect_timeout(&address, most);
    let reached = reached.and_then(|stream| stream.local_addr());
    let own = reached.map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => Tried::Soon(format!("nothing is heard from {address}")),
        _ => Tried::Soon(format!("{address}: {error}")),
    })?;
    let from = match address {
        SocketAddr::V4(address) => format!("{}:{directory}", address.ip()),
        SocketAddr::V6(address) => format!("[{}]:{directory}", address.ip()),
    };
    let flags = SAFE | flags(options);
    let mut mounted = Err(Errno::EPROTONOSUPPORT);
    for version in versions {
        let data = data(version, (address, own.ip()), options, fresh);
        mounted = mount(Some(&*from), place, Some("nfs"), flags, Some(&*data));
        // The server or this kernel does not have this version; an old kernel does not even know its number.
        if !matches!(mounted, Err(Errno::EPROTONOSUPPORT | Errno::EINVAL)) {
            break;
        }
    }
    mounted.map_err(|error| match error {
        Errno::ENODEV => Tried::Never(format!(
            "the kernel of this machine has no client of NFS (its modules nfs and {})",
            module(versions)
        )),
        Errno::EPROTONOSUPPORT => Tried::Soon(format!(
            "{address} or the kernel of this machine (its module {}) does not have NFS {}",
            module(versions),
            versions.join(" or ")
        )),
        Errno::EACCES | Errno::EPERM => Tried::Soon(format!(
            "{address} does not share {directory} with this node"
        )),
        Errno::ENOENT | Errno::ENOTDIR => {
            Tried::Never(format!("{address} has no directory {directory}"))
        }
        error => Tried::Soon(format!("{address}: {}", io::Error::from(error))),
    })
}

fn module(versions: &[&str]) -> &'static str {
    match versions {
        ["3"] => "nfsv3",
        _ => "nfsv4",
    }
}

/// As the kernel takes it: it asks nobody for names or ports.
fn data(
    version: &str,
    (address, own): (SocketAddr, IpAddr),
    options: &MountOptions,
    fresh: bool,
) -> String {
    let (ip, port) = (address.ip(), address.port());
    let proto = if ip.is_ipv4() { "tcp" } else { "tcp6" };
    let of_version = match version {
        "3" => {
            format!(",mountaddr={ip},mountvers=3,mountproto={proto},mountport={port},nolock")
        }
        _ => format!(",clientaddr={own}"),
    };
    let mut data =
        format!("addr={ip},vers={version},proto={proto},port={port}{of_version},sec=sys");
    // A server that is away for a while loses nothing that way: what waits for it goes on when it is back.
    if !options.has("soft") && !options.has("hard") {
        data += ",hard";
    }
    if !options.has("timeo") {
        data += ",timeo=600";
    }
    // Attributes alone would not do: what is made twice in one tick of the server's clock changes its directory once.
    if fresh {
        data += ",actimeo=0,lookupcache=none";
    }
    for option in &options.nfs {
        data += ",";
        data += option;
    }
    data
}

fn flags(options: &MountOptions) -> MsFlags {
    let flag = |flag: &Flag| match flag {
        Flag::ReadOnly => MsFlags::MS_RDONLY,
        Flag::Synchronous => MsFlags::MS_SYNCHRONOUS,
        Flag::NoAtime => MsFlags::MS_NOATIME,
        Flag::NoDirAtime => MsFlags::MS_NODIRATIME,
        Flag::RelAtime => MsFlags::MS_RELATIME,
        Flag::NoExec => MsFlags::MS_NOEXEC,
    };
    options.flags.iter().map(flag).collect()
}

/// Mounts what lies on this machine. Whatever users put into the way there, or below what is shared, leads nowhere else.
pub fn local(shared: &Path, directory: &str, options: &str, place: &Path) -> io::Result<()> {
    let options = mount_options::parse(options).map_err(io::Error::other)?;
    let named = |path: &Path, error: Errno| {
        io::Error::other(format!("{}: {}", path.display(), io::Error::from(error)))
    };
    let mut found = trusted(shared)?.map_err(|error| match error {
        Errno::ENOENT | Errno::ENOTDIR => {
            io::Error::other(format!("{} is no directory of this node", shared.display()))
        }
        error => named(shared, error),
    })?;
    if !directory.is_empty() {
        let how = OpenHow::new()
            .flags(DIRECTORY)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let below = openat2(&found, directory, how);
        found = below.map_err(|error| named(&shared.join(directory), error))?;
    }
    let source = format!("/proc/self/fd/{}", found.as_raw_fd());
    let real = std::fs::read_link(&source)?;
    let known = kernel::mounted();
    if let Some(below) = known.as_ref().and_then(|known| known.below(&real)) {
        return Err(io::Error::other(format!(
            "{} is mounted below {}, and would not be there: name that itself",
            below.display(),
            real.display()
        )));
    }
    let none: Option<&str> = None;
    mount(Some(&*source), place, none, MsFlags::MS_BIND, none)?;
    // A bind mount takes its flags only when it is there; and gives nobody what is forbidden where it comes from.
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | SAFE | flags(&options);
    let there = fstatvfs(&found)?.flags();
    for (one, same) in [
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
    ] {
        if there.contains(one) {
            flags.insert(same);
        }
    }
    mount(none, place, none, flags, none)?;
    Ok(())
}

/// Only named, and only a directory.
const DIRECTORY: OFlag = OFlag::O_PATH
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);
/// More links lead nowhere.
const LINKS_MAX: usize = 40;

/// Opens a directory by a path that may lead by links of root's, and by nobody else's.
fn trusted(path: &Path) -> io::Result<nix::Result<OwnedFd>> {
    let mut found = open("/", DIRECTORY, Mode::empty())?;
    let mut rest: VecDeque<PathBuf> = path.iter().map(PathBuf::from).collect();
    let mut links = 0;
    while let Some(part) = rest.pop_front() {
        if part == Path::new("/") {
            found = open("/", DIRECTORY, Mode::empty())?;
            continue;
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let next = match openat(&found, &part, flags, Mode::empty()) {
            Ok(next) => next,
            Err(error) => return Ok(Err(error)),
        };
        let is = fstat(&next)?;
        match SFlag::from_bits_truncate(is.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFDIR => found = next,
            SFlag::S_IFLNK if is.st_uid != 0 => {
                return Err(io::Error::other(format!(
                    "{}: {} is a link of a user, who may have it lead anywhere",
                    path.display(),
                    part.display()
                )));
            }
            SFlag::S_IFLNK if links == LINKS_MAX => return Ok(Err(Errno::ELOOP)),
            SFlag::S_IFLNK => {
                links += 1;
                let leads = PathBuf::from(readlinkat(&next, "")?);
                for part in leads.iter().rev() {
                    rest.push_front(part.into());
                }
            }
            _ => return Ok(Err(Errno::ENOTDIR)),
        }
    }
    Ok(Ok(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_all_it_would_ask_for() {
        let data = |version: &str, address: &str, options: &str| {
            let options = mount_options::parse(options).unwrap();
            let own = "10.0.0.9".parse().unwrap();
            super::data(version, (address.parse().unwrap(), own), &options, false)
        };
        let said = "addr=10.0.0.2,vers=3,proto=tcp,port=2049,mountaddr=10.0.0.2,mountvers=3,mountproto=tcp,mountport=2049,nolock,sec=sys";
        assert_eq!(
            data("3", "10.0.0.2:2049", ""),
            format!("{said},hard,timeo=600")
        );
        assert_eq!(
            data("3", "10.0.0.2:2049", "ro,soft,timeo=20,retrans=1"),
            format!("{said},soft,timeo=20,retrans=1")
        );
        let addresses = (
            "10.0.0.2:2049".parse().unwrap(),
            "10.0.0.9".parse().unwrap(),
        );
        let fresh = super::data("3", addresses, &MountOptions::default(), true);
        let until = format!("{said},hard,timeo=600");
        assert_eq!(fresh, until + ",actimeo=0,lookupcache=none");
        let six = data("3", "[fe80::1]:2049", "");
        assert!(six.starts_with("addr=fe80::1,vers=3,proto=tcp6,"), "{six}");
        assert_eq!(
            data("4.1", "10.0.0.2:2050", ""),
            "addr=10.0.0.2,vers=4.1,proto=tcp,port=2050,clientaddr=10.0.0.9,sec=sys,hard,timeo=600"
        );
    }

    #[test]
    fn what_a_server_speaks_is_tried_from_the_best_down() {
        let versions = |version: i32| {
            let source = Source {
                host: "h",
                port: 1,
                version,
                directory: "/",
            };
            match source.versions() {
                Ok(versions) => versions.join(" "),
                Err(Tried::Never(why) | Tried::Soon(why)) => why,
            }
        };
        assert_eq!(versions(0), "3");
        assert_eq!(versions(3), "3");
        assert_eq!(versions(4), "4.2 4.1");
        assert!(versions(5).contains("version 5"));
    }

    #[test]
    fn what_is_forbidden_there_is_forbidden_here() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // Its mounts are this thread's alone, and go with it.
        let thread = std::thread::spawn(|| {
            use nix::sched::{CloneFlags, unshare};
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none: Option<&str> = None;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let [disk, place] = ["disk", "place"].map(|name| dir.path().join(name));
            std::fs::create_dir(&disk).unwrap();
            std::fs::create_dir(&place).unwrap();
            mount(Some("t"), &disk, Some("tmpfs"), MsFlags::MS_NOEXEC, none).unwrap();
            local(&disk, "", "", &place).unwrap();
            let flags = nix::sys::statvfs::statvfs(&place).unwrap().flags();
            let expected = FsFlags::ST_NOEXEC | FsFlags::ST_NOSUID | FsFlags::ST_NODEV;
            assert!(flags.contains(expected), "{flags:?}");
            assert!(!flags.contains(FsFlags::ST_RDONLY), "{flags:?}");
            nix::mount::umount(&place).unwrap();
            nix::mount::umount(&disk).unwrap();
        });
        thread.join().unwrap();
    }

    #[test]
    fn only_links_of_root_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real/in");
        std::fs::create_dir_all(&real).unwrap();
        let link = |from: &str, to: &Path| {
            std::os::unix::fs::symlink(to, dir.path().join(from)).unwrap();
        };
        link("absolute", &real);
        link("relative", Path::new("absolute/../in"));
        link("loop", Path::new("loop"));
        link("users", &real);
        std::fs::write(dir.path().join("file"), "").unwrap();
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let users = dir.path().join("users");
        std::os::unix::fs::lchown(&users, Some(54321), None).unwrap();
        let leads = |name: &str| {
            let found = trusted(&dir.path().join(name))?.map_err(io::Error::from)?;
            std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
        };
        let expected = real.canonicalize().unwrap();
        for name in ["real/in", "absolute", "relative", "real/../absolute/."] {
            assert_eq!(leads(name).unwrap(), expected, "{name}");
        }
        for (name, said) in [
            ("users", "users is a link of a user"),
            ("loop", "symbolic links"),
            ("file", "Not a directory"),
            ("missing/x", "No such file"),
        ] {
            let error = leads(name).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
    }
}
