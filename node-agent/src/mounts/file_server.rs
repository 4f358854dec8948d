//! Mounts directories of file servers: by NFS from other machines, and as they are where they lie on this one.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use batchai_common::mount_options::{self, Flag, MountOptions};
use batchai_common::time::boot_millis;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;

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

/// Mounts by NFS, until some time in milliseconds of the boot clock.
pub fn nfs(source: &Source, options: &str, place: &Path, until: i64) -> io::Result<()> {
    let options = mount_options::parse(options).map_err(io::Error::other)?;
    let left = u64::try_from(until - boot_millis()).unwrap_or_default();
    let end = Instant::now() + Duration::from_millis(left).saturating_sub(SPARE);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let tried = try_nfs(source, &options, place, left.max(PAUSE));
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
    options: &MountOptions,
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
        let data = data(version, address, own.ip(), options);
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
fn data(version: &str, address: SocketAddr, own: IpAddr, options: &MountOptions) -> String {
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

/// Mounts what lies on this machine. Whatever anybody put below what is shared, nothing leads out of that.
pub fn local(shared: &Path, directory: &str, options: &str, place: &Path) -> io::Result<()> {
    let options = mount_options::parse(options).map_err(io::Error::other)?;
    let path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let named = |path: &Path, error: Errno| {
        io::Error::other(format!("{}: {}", path.display(), io::Error::from(error)))
    };
    let root = open(shared, path | OFlag::O_NOFOLLOW, Mode::empty());
    let mut found = root.map_err(|error| named(shared, error))?;
    if !directory.is_empty() {
        let how = OpenHow::new()
            .flags(path)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let below = openat2(&found, directory, how);
        found = below.map_err(|error| named(&shared.join(directory), error))?;
    }
    let source = format!("/proc/self/fd/{}", found.as_raw_fd());
    let none: Option<&str> = None;
    mount(Some(&*source), place, none, MsFlags::MS_BIND, none)?;
    // A bind mount takes its flags only when it is there.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | SAFE | flags(&options);
    mount(none, place, none, flags, none)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_all_it_would_ask_for() {
        let data = |version: &str, address: &str, options: &str| {
            let options = mount_options::parse(options).unwrap();
            let own = "10.0.0.9".parse().unwrap();
            super::data(version, address.parse().unwrap(), own, &options)
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
}
