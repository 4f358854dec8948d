//! Makes what a guest boots, in `target/kernel`: once per checkout the kernel and its modules, out of Debian's package, which is
//! downloaded and not installed; and each time the file system with the agent as it is now.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nix::fcntl::{Flock, FlockArg};

use super::archive::Archive;
use crate::process::under_test;
use crate::requirement;

/// Modules of the kernel, by the list that `load` is given; each after those that it needs.
const MODULES: [(&str, &[&str]); 4] = [
    (
        "net",
        &[
            "virtio_ring",
            "virtio",
            "virtio_pci_modern_dev",
            "virtio_pci_legacy_dev",
            "virtio_pci",
            "failover",
            "net_failover",
            "virtio_net",
        ],
    ),
    (
        "nfs",
        &[
            "netfs",
            "fscache",
            "sunrpc",
            "grace",
            "lockd",
            "nfs",
            "dns_resolver",
            "nfsv4",
            "nfs_acl",
            "nfsv3",
        ],
    ),
    (
        "disks",
        &[
            "virtio_blk",
            "md_mod",
            "raid0",
            "crc16",
            "mbcache",
            "crc32c_generic",
            "jbd2",
            "ext4",
        ],
    ),
    // After `nfs`, of which it needs some.
    (
        "cifs",
        &[
            "sha512_generic",
            "cmac",
            "ecb",
            "ctr",
            "ccm",
            "gf128mul",
            "ghash_generic",
            "gcm",
            "cifs_md4",
            "cifs_arc4",
            "cifs",
        ],
    ),
];
/// What `tests/kernel` has, and where it goes.
const SCRIPTS: [(&str, &str); 6] = [
    ("inittab", "etc/inittab"),
    ("setup", "sbin/setup"),
    ("load", "sbin/load"),
    ("control", "sbin/control"),
    ("agent", "sbin/agent"),
    ("bash", "bin/bash"),
];
const DIRECTORIES: [&str; 8] = ["bin", "sbin", "etc", "dev", "proc", "sys", "usr", "modules"];
const AGENT: &str = "batchai-in-guest";
/// How what xz has packed begins.
const XZ: &[u8] = b"\xfd7zXZ\0";
const ELF: &[u8] = b"\x7fELF";

/// What a guest boots.
pub struct Image {
    pub qemu: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl Image {
    /// The same with programs of this machine, and the libraries that they need. `None` where one is missing.
    pub fn with(&self, programs: &[(&str, &str)], dir: &Path) -> Option<Image> {
        let mut more = Archive::default();
        let mut libraries = BTreeSet::new();
        for (name, package) in programs {
            let path = requirement::program(name, &format!("apt-get install {package}"))?;
            let program = fs::read(&path).expect("a program can be read");
            more.program(&format!("bin/{name}"), &program);
            let needed = Command::new("ldd").arg(&path).output();
            let needed = needed.expect("ldd comes with the libraries").stdout;
            let needed = String::from_utf8_lossy(&needed).into_owned();
            let words = needed.split_whitespace();
            libraries.extend(
                words
                    .filter(|word| word.starts_with('/'))
                    .map(PathBuf::from),
            );
        }
        let above = |path: &PathBuf| path.ancestors().skip(1).map(Path::to_owned).collect();
        let above: BTreeSet<PathBuf> = libraries
            .iter()
            .flat_map(|it| -> Vec<_> { above(it) })
            .collect();
        for path in above.iter().filter(|path| *path != Path::new("/")) {
            more.directory(inside(path));
        }
        for path in &libraries {
            let library = fs::read(path).expect("a program needs it");
            more.program(inside(path), &library);
        }
        // The kernel unpacks one archive after the other.
        let mut bytes = fs::read(&self.initramfs).expect("it was made");
        bytes.extend(more.finish());
        let initramfs = dir.join("initramfs");
        write(&initramfs, &bytes);
        Some(Image {
            qemu: self.qemu.clone(),
            kernel: self.kernel.clone(),
            initramfs,
        })
    }
}

/// A path as an archive has it.
fn inside(path: &Path) -> &str {
    let path = path.to_str().expect("paths of libraries are text");
    path.trim_start_matches('/')
}

/// The image of this run. `None` where something is missing of which it is made: then the test was told so.
pub fn image() -> Option<&'static Image> {
    static IMAGE: OnceLock<Option<Image>> = OnceLock::new();
    IMAGE.get_or_init(make).as_ref()
}

fn make() -> Option<Image> {
    if cfg!(not(target_arch = "x86_64")) {
        requirement::skip("guests are of this machine's kind, and only x86_64 is prepared");
        return None;
    }
    let qemu = requirement::program("qemu-system-x86_64", "install qemu-system-x86")?;
    let busybox = requirement::program("busybox", "install busybox-static")?;
    let busybox = fs::read(busybox).expect("a program can be read");
    if !is_static(&busybox) {
        requirement::skip("busybox needs shared libraries: install busybox-static instead");
        return None;
    }
    let agent = agent();
    let dir = target().join("kernel");
    fs::create_dir_all(&dir).expect("the target folder is writable");
    let lock = File::create(dir.join("lock")).expect("the target folder is writable");
    let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error);
    let _lock = lock.expect("it waits until it has it");
    let kernel = dir.join("vmlinux");
    let mut modules = MODULES.iter().flat_map(|(_, names)| *names);
    if !kernel.exists() || !modules.all(|name| dir.join("modules").join(name).exists()) {
        unpack(&dir)?;
    }
    let initramfs = dir.join("initramfs");
    let bytes = file_system(&dir, &busybox, &agent);
    write(&initramfs, &bytes);
    Some(Image {
        qemu,
        kernel,
        initramfs,
    })
}

/// The folder of builds that this test is from.
fn profile() -> PathBuf {
    let path = under_test();
    path.parent().expect("it is in a folder").to_owned()
}

fn target() -> PathBuf {
    profile().parent().expect("target/PROFILE").to_owned()
}

/// The agent, without shared libraries. Only this one program is built with another flag, so that it is of what is built already.
fn agent() -> Vec<u8> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["rustc", "--quiet", "--locked", "--bin", AGENT])
        .arg("--target-dir")
        .arg(target());
    // What cargo tells this test of itself would have it build much anew, now and the next time.
    for (name, _) in std::env::vars_os() {
        let of_this = ["CARGO_PKG_", "CARGO_MANIFEST_"].iter();
        let name = name.to_string_lossy().into_owned();
        if of_this.clone().any(|begin| name.starts_with(begin)) {
            command.env_remove(name);
        }
    }
    if profile().ends_with("release") {
        command.arg("--release");
    }
    command.args([
        "--",
        "-C",
        "target-feature=+crt-static",
        "-C",
        "strip=symbols",
    ]);
    let status = command.status().expect("cargo runs this test");
    assert!(status.success(), "the agent of guests cannot be built");
    let agent = fs::read(profile().join(AGENT)).expect("it was just built");
    assert!(
        is_static(&agent),
        "the agent of guests needs shared libraries"
    );
    agent
}

/// Gets the kernel's package and takes the kernel and some modules out of it.
fn unpack(dir: &Path) -> Option<()> {
    for (program, package) in [("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("xz", "xz-utils")] {
        requirement::program(program, &format!("Debian's {package} has it"))?;
    }
    let work = dir.join("package");
    // What was cut off.
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).expect("the target folder is writable");
    let Some(package) = download(&work) else {
        requirement::skip("Debian's kernel cannot be had by apt-get download: try apt-get update");
        return None;
    };
    let mut files = contents(&package);
    let modules = dir.join("modules");
    fs::create_dir_all(&modules).expect("the target folder is writable");
    for name in MODULES.iter().flat_map(|(_, names)| *names) {
        let module = files.remove(*name);
        let module = module.unwrap_or_else(|| panic!("the kernel has no module {name}"));
        write(&modules.join(name), &module);
    }
    let packed = files.remove("vmlinuz").expect("the package has a kernel");
    let kernel = unpacked(&packed, &work).expect("the kernel is packed by xz");
    // Last: where it is, all is.
    write(&dir.join("vmlinux"), &kernel);
    let _ = fs::remove_dir_all(&work);
    Some(())
}

fn download(work: &Path) -> Option<PathBuf> {
    let shown = Command::new("apt-cache")
        .args(["depends", "linux-image-amd64"])
        .output()
        .ok()?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let mut depends = shown.lines();
    let package = depends.find_map(|line| line.trim().strip_prefix("Depends: "))?;
    let loaded = Command::new("apt-get")
        .args(["download", "-qq", package])
        .current_dir(work)
        .status()
        .ok()?;
    let mut found = fs::read_dir(work).ok()?.flatten().map(|entry| entry.path());
    found.find(|path| loaded.success() && path.extension().is_some_and(|it| it == "deb"))
}

/// The kernel and those of its modules that are wanted, by their names.
fn contents(package: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut reading = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .expect("dpkg-deb can be started");
    let packed = reading.stdout.take().expect("it is piped");
    let mut packed = tar::Archive::new(packed);
    let mut found = BTreeMap::new();
    for entry in packed.entries().expect("a package is an archive") {
        let mut entry = entry.expect("the package is whole");
        let path = entry.path().expect("a path").into_owned();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        // Files are named as they like, modules with underscores.
        let name = match path.extension() {
            Some(extension) if extension == "ko" => stem.replace('-', "_"),
            _ if stem.starts_with("vmlinuz-") => "vmlinuz".to_owned(),
            _ => continue,
        };
        let is_wanted = |(_, names): &(&str, &[&str])| names.contains(&&*name);
        if name == "vmlinuz" || MODULES.iter().any(is_wanted) {
            let mut content = Vec::new();
            entry
                .read_to_end(&mut content)
                .expect("the package is whole");
            found.insert(name, content);
        }
    }
    let status = reading.wait().expect("it is our child");
    assert!(status.success(), "{} is damaged", package.display());
    found
}

/// A kernel as QEMU starts it at once: the guest does not have to unpack it.
fn unpacked(packed: &[u8], work: &Path) -> Option<Vec<u8>> {
    let mut from = 0;
    while let Some(at) = find(&packed[from..], XZ) {
        from += at;
        let path = work.join("packed");
        write(&path, &packed[from..]);
        let output = Command::new("xz")
            .args(["--decompress", "--stdout", "--single-stream"])
            .stdin(File::open(&path).expect("it was just written"))
            .stderr(Stdio::null())
            .output()
            .expect("xz can be started");
        if output.stdout.starts_with(ELF) {
            return Some(output.stdout);
        }
        from += XZ.len();
    }
    None
}

fn file_system(dir: &Path, busybox: &[u8], agent: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for path in DIRECTORIES {
        archive.directory(path);
    }
    archive.character_device("dev/console", (5, 1));
    archive.program("bin/busybox", busybox);
    archive.program("bin/batchai-node-agent", agent);
    archive.link("init", "bin/busybox");
    archive.link("usr/bin", "../bin");
    let listed = Command::new("busybox").arg("--list").output();
    let listed = listed.expect("busybox can be started").stdout;
    let applets = String::from_utf8_lossy(&listed).into_owned();
    for applet in applets.lines().filter(|name| *name != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel");
    for (name, to) in SCRIPTS {
        let script = fs::read(scripts.join(name)).expect("it is of this repository");
        archive.program(to, &script);
    }
    archive.file("etc/os-release", b"ID=guest\nVERSION_ID=\"1\"\n");
    archive.file(
        "etc/passwd",
        b"root:x:0:0::/root:/bin/sh\njob:x:1000:1000::/tmp:/bin/sh\n",
    );
    archive.file("etc/group", b"root:x:0:\njob:x:1000:\n");
    archive.file("etc/hosts", b"127.0.0.1 localhost guest\n");
    for (list, names) in MODULES {
        archive.file(
            &format!("modules/{list}"),
            (names.join("\n") + "\n").as_bytes(),
        );
        for name in names {
            let module =
                fs::read(dir.join("modules").join(name)).expect("it is there with the kernel");
            archive.file(&format!("modules/{name}.ko"), &module);
        }
    }
    archive.finish()
}

/// Whole, or not at all.
fn write(path: &Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    let mut file = File::create(&new).expect("the target folder is writable");
    file.write_all(bytes).expect("the disk has room");
    fs::rename(&new, path).expect("the target folder is writable");
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

/// Whether a program needs no loader of shared libraries: none of the parts that it tells the kernel of names one.
fn is_static(program: &[u8]) -> bool {
    const NAMES_A_LOADER: u64 = 3;
    let number = |at: usize, bytes: usize| -> u64 {
        let found = program[at..at + bytes].iter().rev();
        found.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (first, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count).all(|part| number((first + part * size) as usize, 4) != NAMES_A_LOADER)
}
