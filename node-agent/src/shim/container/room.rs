//! The place that a job's processes are in instead of the host's: the image's files, over which a layer takes what is written, with the
//! host's devices, processes and kernel settings, and those directories of the host that the job has anyhow.
//!
//! An image is somebody's: it may have links where directories are expected. So nothing of the host is below the root any more when what
//! is seen in it is put into place, but in a directory whose name no image can know.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use super::apart::Trouble;
use super::fetch::open_as;
use super::store::{Image, private_dir};
use super::{Known, Room, shell};
use crate::launch::{Container, HOSTS, JobUser, SHARED_MEMORY, Source, gpu_line};
use crate::status::FailureRecord;

const NONE: Option<&str> = None;
/// Of the host, so that names mean the same.
const NAMES: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// A larger file of an image is not read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Everybody's, as `/tmp` is.
const EVERYBODYS: u32 = 0o1777;
/// There where the host has a GPU of NVIDIA.
const NVIDIA: &str = "/dev/nvidiactl";
/// What lists the libraries of a root file system; where Ubuntu has the program, as the other is a script there.
const LDCONFIG: [&str; 2] = ["/sbin/ldconfig.real", "/sbin/ldconfig"];

/// Something of the host that is seen, and where.
struct Seen {
    path: PathBuf,
    at: File,
    /// Of the host itself: nobody changes it there.
    lent: bool,
}

/// Makes it, in this process's mount namespace, and puts this process into it.
pub fn make(
    container: &Container,
    user: Option<&JobUser>,
    image: &Image,
) -> Result<Room, FailureRecord> {
    let made = build(container, user, image).and_then(|(room, placed)| {
        // By what the image is, or what the job wants to see in it.
        placed.map_err(|error| Trouble::of_image(&error))?;
        Ok(room)
    });
    made.map_err(|trouble| trouble.failure("the container cannot be made"))
}

/// The container, and whether everything could be put into place in it.
fn build(
    container: &Container,
    user: Option<&JobUser>,
    image: &Image,
) -> Result<(Room, io::Result<()>), Trouble> {
    let namespace = OwnedFd::from(File::open("/proc/self/ns/mnt")?);
    let root = over(container, image)?;
    if Path::new(NVIDIA).exists() {
        let ldconfig = LDCONFIG.into_iter().find(|path| Path::new(path).exists());
        let ldconfig = ldconfig.unwrap_or(LDCONFIG[1]);
        give_gpu_libraries(&gpu_line(&root.to_string_lossy(), ldconfig))?;
    }
    let seen = seen(container, user)?;
    let names = names(&NAMES)?;
    chdir(&root).map_err(io::Error::from)?;
    let host = format!(".host-{}", uuid::Uuid::new_v4().simple());
    DirBuilder::new().mode(0o700).create(&host)?;
    pivot_root(".", host.as_str()).map_err(io::Error::from)?;
    chdir("/").map_err(io::Error::from)?;
    let host = Path::new("/").join(host);
    let placed = furnish(container, user, &seen, &names, &host);
    drop(seen);
    umount2(&host, MntFlags::MNT_DETACH).map_err(io::Error::from)?;
    fs::remove_dir(&host)?;
    let known = Known {
        env: image.env.clone(),
        shell: shell(),
        namespace: -1,
    };
    let room = Room {
        known,
        namespace,
        _image: None,
    };
    Ok((room, placed))
}

/// The files by which the host knows names; the image's own stay where the host has none.
fn names<'a>(of: &[&'a str]) -> io::Result<Vec<(&'a str, Vec<u8>)>> {
    let mut names = Vec::new();
    for name in of {
        match fs::read(name) {
            Ok(content) => names.push((*name, content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                println!("{name} is the image's own: this host has none");
            }
            Err(error) => return Err(io::Error::new(error.kind(), format!("{name}: {error}"))),
        }
    }
    Ok(names)
}

/// The image's files with a layer over them. Where the disk of jobs cannot hold such a layer it is kept in memory.
fn over(container: &Container, image: &Image) -> Result<PathBuf, Trouble> {
    let layer = Path::new(&container.layer);
    let root = layer.join("root");
    private_dir(&root)?;
    let Err(error) = try_over(layer, image, &root) else {
        return Ok(root);
    };
    println!(
        "what is written in the container is kept in memory: its layer cannot lie in {}: {error}",
        layer.display()
    );
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(NONE, layer, Some("tmpfs"), flags, Some("mode=0700")).map_err(io::Error::from)?;
    private_dir(&root)?;
    match (try_over(layer, image, &root), &container.source) {
        (Ok(()), _) => Ok(root),
        // There is a layer: it is the directory that nothing can lie over.
        (Err(error), Source::Rootfs(path)) => Err(Trouble::Image(format!(
            "{path} lies in a file system that cannot be below another: {error}"
        ))),
        (Err(error), _) => Err(error.into()),
    }
}

fn try_over(layer: &Path, image: &Image, root: &Path) -> io::Result<()> {
    let [upper, work] = ["upper", "work"].map(|name| -> io::Result<File> {
        let path = layer.join(name);
        if !path.exists() {
            // The root of the container has its mode.
            DirBuilder::new().mode(0o755).create(&path)?;
        }
        File::open(path)
    });
    let [upper, work] = [upper?, work?];
    // By what is open: a path could have characters in it that mean something here.
    let at = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at(&image.root),
        at(&upper),
        at(&work)
    );
    // Devices of an image are none, and its programs give nobody more rights.
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(
        Some("overlay"),
        root,
        Some("overlay"),
        flags,
        Some(&*options),
    )?;
    Ok(())
}

/// The driver's libraries are of the host's version: no image can have them. Where the program that knows them is not there, an image may do
/// without; where it is and fails, no process would find its GPUs.
fn give_gpu_libraries(line: &[String]) -> Result<(), Trouble> {
    println!("{}", line.join(" "));
    let program = &line[0];
    match Command::new(program).args(&line[1..]).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Trouble::Node(format!(
            "the GPU driver's libraries are not in it: {program} failed ({status}); container.log says why"
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!(
                "the GPU driver's libraries are not in the container, unless the image has them: {program} is not on this host"
            );
            Ok(())
        }
        Err(error) => Err(Trouble::Node(format!(
            "the GPU driver's libraries are not in it: {program} cannot be started: {error}"
        ))),
    }
}

fn seen(container: &Container, user: Option<&JobUser>) -> io::Result<Vec<Seen>> {
    let mut seen = Vec::new();
    let own = container.own.iter().map(|path| (path, path, false));
    let lent = container.lent.iter().map(|(from, to)| (from, to, true));
    for (from, to, lent) in own.chain(lent) {
        let flags = OFlag::O_PATH.bits();
        let at = match OpenOptions::new().read(true).custom_flags(flags).open(from) {
            Ok(at) => at,
            // A library that was replaced since the agent began.
            Err(error) if lent && error.kind() == io::ErrorKind::NotFound => {
                println!("{from} is not in the container: {error}");
                continue;
            }
            Err(e) => return Err(io::Error::new(e.kind(), format!("{from}: {e}"))),
        };
        let path = PathBuf::from(to);
        seen.push(Seen { path, at, lent });
    }
    for path in &container.wanted {
        match open_as(user, path, OFlag::O_PATH) {
            Ok(at) => seen.push(Seen {
                path: PathBuf::from(path),
                at,
                lent: false,
            }),
            // Without a container it would not be there either.
            Err(error) => println!("{path} is not in the container: {error}"),
        }
    }
    Ok(seen)
}

/// Puts everything into place, below the new root.
fn furnish(
    container: &Container,
    user: Option<&JobUser>,
    seen: &[Seen],
    names: &[(&str, Vec<u8>)],
    host: &Path,
) -> io::Result<()> {
    let places = |in_memory: bool| {
        let seen = seen.iter();
        let of = seen.filter(move |one| one.path.starts_with(SHARED_MEMORY) == in_memory);
        of.map(|one| {
            make_place(&one.path, one.at.metadata()?.is_dir())
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", one.path.display())))
        })
    };
    // All places first: what is made on the way to one is the image's, and never the host's.
    places(false).collect::<io::Result<()>>()?;
    for path in HOSTS {
        fs::create_dir_all(path)?;
    }
    for path in ["/tmp", "/var/tmp"] {
        if !Path::new(path).exists() {
            fs::create_dir_all(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(EVERYBODYS))?;
        }
    }
    for (name, content) in names {
        replace(name, content)?;
    }
    if let Some(user) = user {
        introduce(user, container)?;
    }
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    let give = |path: &str| mount(Some(&host.join(&path[1..])), path, NONE, bind, NONE);
    let [devices, kernel @ ..] = HOSTS;
    give(devices)?;
    let size = container.shm_bytes.map(|bytes| format!(",size={bytes}"));
    let options = format!("mode=1777{}", size.unwrap_or_default());
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(
        Some("shm"),
        SHARED_MEMORY,
        Some("tmpfs"),
        flags,
        Some(&*options),
    )?;
    // In the job's own memory, which is not the host's either.
    places(true).collect::<io::Result<()>>()?;
    for one in seen {
        let from = host.join(format!("proc/self/fd/{}", one.at.as_raw_fd()));
        mount(Some(&from), &one.path, NONE, bind, NONE)?;
        if one.lent {
            // It is the host's: who is root here changes it no more than others.
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
            let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(NONE, &one.path, NONE, flags, NONE)?;
        }
    }
    // Last: nothing may lead to processes before.
    for path in kernel {
        give(path)?;
    }
    Ok(())
}

fn make_place(path: &Path, directory: bool) -> io::Result<()> {
    if directory {
        return fs::create_dir_all(path);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match path.exists() {
        true => Ok(()),
        false => File::create(path).map(drop),
    }
}

/// A file in the place of whatever is there; a link is not followed, wherever it leads.
fn replace(path: &str, content: &[u8]) -> io::Result<()> {
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        removed => removed.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?,
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o644);
    options.open(path)?.write_all(content)
}

/// Programs ask who they are: the job's user is known in it, where the image knows nobody of that number.
fn introduce(user: &JobUser, container: &Container) -> io::Result<()> {
    let JobUser { name, uid, gid, .. } = user;
    let home = &container.home;
    let person = format!("{name}:x:{uid}:{gid}::{home}:{}", shell());
    let group = format!("{name}:x:{gid}:");
    for (path, number, line) in [(PASSWD, uid, person), (GROUP, gid, group)] {
        let mut known = String::new();
        if let Ok(found) = fs::symlink_metadata(path) {
            // What is no such file of text stays as it is.
            let plain = found.is_file() && found.len() <= FILE_BYTES_MAX;
            if !plain || File::open(path)?.read_to_string(&mut known).is_err() {
                continue;
            }
        }
        let number = number.to_string();
        let knows = |line: &str| line.split(':').nth(2) == Some(&number);
        if known.lines().any(knows) {
            continue;
        }
        if !known.is_empty() && !known.ends_with('\n') {
            known.push('\n');
        }
        replace(path, (known + &line + "\n").as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_without_its_libraries_is_the_hosts_fault_unless_it_cannot_have_them() {
        let given = |program: &str| give_gpu_libraries(&[program.to_owned(), "x".to_owned()]);
        assert!(given("true").is_ok());
        assert!(given("/no/such/program").is_ok());
        assert!(matches!(given("false"), Err(Trouble::Node(_))));
        assert!(matches!(given("/dev/null"), Err(Trouble::Node(_))));
    }

    #[test]
    fn a_name_file_that_the_host_lacks_is_left_alone_and_one_that_cannot_be_read_is_not_empty() {
        let dir = tempfile::tempdir().unwrap();
        let [hosts, none] = ["hosts", "none"].map(|name| dir.path().join(name));
        fs::write(&hosts, "127.0.0.1 localhost").unwrap();
        let [hosts, none, bad] = [&*hosts, &*none, dir.path()].map(|path| path.to_str().unwrap());
        let read = names(&[hosts, none]).unwrap();
        assert_eq!(read, [(hosts, b"127.0.0.1 localhost".to_vec())]);
        assert!(names(&[bad]).is_err());
    }

    #[test]
    fn a_file_comes_into_the_place_of_a_link_that_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/resolv.conf");
        let name = path.to_str().unwrap();
        replace(name, b"first").unwrap();
        fs::remove_file(name).unwrap();
        std::os::unix::fs::symlink("../run/none/resolv.conf", name).unwrap();
        replace(name, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert!(!dir.path().join("run").exists());
        // And what it leads to stays as it is.
        let other = dir.path().join("other");
        fs::rename(&path, &other).unwrap();
        std::os::unix::fs::symlink(&other, name).unwrap();
        replace(name, b"third").unwrap();
        assert_eq!(fs::read(&other).unwrap(), b"second");
        assert_eq!(fs::read(&path).unwrap(), b"third");
    }
}
