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

use super::fetch::{Image, open_as, private_dir};
use super::{Known, Room, failure, shell};
use crate::launch::{Container, JobUser, gpu_line};
use crate::status::FailureRecord;

const NONE: Option<&str> = None;
/// What jobs have of the host as it is. Processes last: nothing may lead to them before.
const DEVICES: [&str; 3] = ["/dev", "/sys", "/proc"];
const SHARED_MEMORY: &str = "/dev/shm";
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

/// Something of the host that is seen at the same path.
struct Seen {
    path: PathBuf,
    at: File,
}

/// Makes it, in this process's mount namespace, and puts this process into it.
pub fn make(
    container: &Container,
    user: Option<&JobUser>,
    image: &Image,
) -> Result<Room, FailureRecord> {
    let made = build(container, user, image);
    let failed = |error: &io::Error, infrastructure| {
        failure(
            format!("the container cannot be made: {error}"),
            infrastructure,
        )
    };
    match made {
        Ok((room, Ok(()))) => Ok(room),
        // By what the image is, or what the job wants to see in it.
        Ok((_, Err(error))) => Err(failed(&error, false)),
        Err(error) => Err(failed(&error, true)),
    }
}

/// The container, and whether everything could be put into place in it.
fn build(
    container: &Container,
    user: Option<&JobUser>,
    image: &Image,
) -> io::Result<(Room, io::Result<()>)> {
    let namespace = OwnedFd::from(File::open("/proc/self/ns/mnt")?);
    let root = over(Path::new(&container.layer), image)?;
    if Path::new(NVIDIA).exists() {
        give_gpu_libraries(&root);
    }
    let seen = seen(container, user)?;
    let names = NAMES.map(|name| (name, fs::read(name).unwrap_or_default()));
    chdir(&root)?;
    let host = format!(".host-{}", uuid::Uuid::new_v4().simple());
    DirBuilder::new().mode(0o700).create(&host)?;
    pivot_root(".", host.as_str())?;
    chdir("/")?;
    let host = Path::new("/").join(host);
    let placed = furnish(container, user, &seen, &names, &host);
    drop(seen);
    umount2(&host, MntFlags::MNT_DETACH)?;
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

/// The image's files with a layer over them. Where the disk of jobs cannot hold such a layer it is kept in memory.
fn over(layer: &Path, image: &Image) -> io::Result<PathBuf> {
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
    mount(NONE, layer, Some("tmpfs"), flags, Some("mode=0700"))?;
    private_dir(&root)?;
    try_over(layer, image, &root)?;
    Ok(root)
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

/// The driver's libraries are of the host's version: no image can have them.
fn give_gpu_libraries(root: &Path) {
    let line = gpu_line(&root.to_string_lossy());
    println!("{}", line.join(" "));
    match Command::new(&line[0]).args(&line[1..]).status() {
        Ok(status) if status.success() => {}
        Ok(status) => println!("the GPU driver's libraries are not in the container: {status}"),
        Err(error) => println!(
            "the GPU driver's libraries are not in the container, unless the image has them: {}: {error}",
            line[0]
        ),
    }
}

fn seen(container: &Container, user: Option<&JobUser>) -> io::Result<Vec<Seen>> {
    let mut seen = Vec::new();
    for path in &container.own {
        let flags = OFlag::O_PATH.bits();
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let at = opened.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?;
        let path = PathBuf::from(path);
        seen.push(Seen { path, at });
    }
    for path in &container.wanted {
        match open_as(user, path, OFlag::O_PATH) {
            Ok(at) => seen.push(Seen {
                path: PathBuf::from(path),
                at,
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
    // All places first: what is made on the way to one is the image's, and never the host's.
    for one in seen {
        make_place(&one.path, one.at.metadata()?.is_dir())
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", one.path.display())))?;
    }
    for path in DEVICES {
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
    for one in seen {
        let from = host.join(format!("proc/self/fd/{}", one.at.as_raw_fd()));
        mount(Some(&from), &one.path, NONE, bind, NONE)?;
    }
    for path in DEVICES {
        let from = host.join(&path[1..]);
        mount(Some(&from), path, NONE, bind, NONE)?;
    }
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

/// A file in the place of whatever is there; a link is not followed.
fn replace(path: &str, content: &[u8]) -> io::Result<()> {
    make_place(Path::new(path), false).or_else(|_| fs::remove_file(path))?;
    fs::remove_file(path)?;
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
