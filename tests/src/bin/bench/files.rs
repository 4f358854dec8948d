//! `bench files`: what the node agent's NFS server moves and makes in a second, beside the disk below it and, where it is installed,
//! NFS-Ganesha on the same directory.
//!
//! The same eight clients ask both servers by version 3, each one thing after the other. What is written counts when it is on the disk: by
//! COMMIT, by a write that asks for it, or by fsync. What is read is not in the page cache before. It runs in namespaces of its own, for
//! Ganesha serves version 3 only beside a portmapper, whose port and socket are taken elsewhere. Needs root.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use batchai_node_agent::nfs::{Config, ganesha};
use batchai_tests::nfs::{Client, LOOPBACK, NOBODY, Server};
use batchai_tests::process::until;
use nfs3_client::nfs3_types::nfs3::stable_how;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::measure::{Better, print};

const CLIENTS: u64 = 8;
const MIB: u64 = 512;
const FILES: u64 = 4000;
const SMALL: usize = 4096;
const USER: u32 = 1001;
const GANESHA_PORT: u16 = 20490;
const MOUNT_PORT: u16 = 20048;

/// Starts the rest in namespaces of its own.
pub fn run() {
    let own = std::env::current_exe().expect("a process knows its own file");
    let mut command = Command::new("unshare");
    let command = command.args(["--net", "--mount", "--"]).arg(own);
    let ended = command.arg("files-within").status();
    assert!(ended.expect("unshare is there").success());
}

fn must(program: &str, args: &[&str]) {
    let ended = Command::new(program).args(args).status();
    assert!(
        ended.is_ok_and(|ended| ended.success()),
        "{program} {args:?}"
    );
}

pub fn within() {
    must("ip", &["link", "set", "lo", "up"]);
    must("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
    let dir = tempfile::tempdir().expect("a directory");
    let fresh = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).expect("it is new");
        let all = fs::Permissions::from_mode(0o777);
        fs::set_permissions(&path, all).expect("it is ours");
        path
    };
    let disk = fresh("disk");
    measure("disk", &disk, &|part| {
        Box::new(Disk {
            dir: disk.clone(),
            part,
        })
    });
    let root = fresh("ours");
    let server = Server::start(&dir.path().join("server"), &root);
    over_nfs(
        "embedded",
        &root,
        server.config.listen,
        server.config.listen.port(),
    );
    drop(server);
    let root = fresh("theirs");
    match Ganesha::start(dir.path(), &root) {
        Some(_server) => {
            let listen = SocketAddr::new(LOOPBACK, GANESHA_PORT);
            over_nfs("ganesha", &root, listen, MOUNT_PORT);
        }
        None => {
            eprintln!("not beside NFS-Ganesha: apt-get install nfs-ganesha nfs-ganesha-vfs rpcbind")
        }
    }
}

fn over_nfs(name: &str, root: &Path, listen: SocketAddr, mount: u16) {
    measure(name, root, &|part| {
        let user = (USER, USER, &[][..]);
        let path = root.to_str().expect("it is text");
        let connected = Client::connect_to(listen, mount, LOOPBACK, path, user);
        Box::new(Nfs {
            client: connected.expect("it is served"),
            part,
        })
    });
}

/// One of those that write and read.
trait Worker {
    fn write(&mut self, piece: &[u8], pieces: u64);
    fn read(&mut self, pieces: u64) -> u64;
    fn create(&mut self, name: &str, content: &[u8]);
}

/// Measures everything; files lie in `root` on the disk.
fn measure(name: &str, root: &Path, worker: &(dyn Fn(u64) -> Box<dyn Worker> + Sync)) {
    let piece: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(1 << 20)
        .collect();
    let timed = |work: &(dyn Fn(&mut dyn Worker, u64) + Sync)| {
        let barrier = std::sync::Barrier::new(CLIENTS as usize + 1);
        let mut begin = Instant::now();
        std::thread::scope(|threads| {
            for part in 0..CLIENTS {
                let barrier = &barrier;
                threads.spawn(move || {
                    let mut worker = worker(part);
                    barrier.wait();
                    work(worker.as_mut(), part);
                });
            }
            barrier.wait();
            begin = Instant::now();
        });
        begin.elapsed().as_secs_f64()
    };
    let written = timed(&|worker, _| worker.write(&piece, MIB / CLIENTS));
    forget(root);
    let read = timed(&|worker, _| assert_eq!(worker.read(MIB / CLIENTS), (MIB / CLIENTS) << 20));
    let made = timed(&|worker, part| {
        for number in 0..FILES / CLIENTS {
            worker.create(&format!("small-{part}-{number}"), &piece[..SMALL]);
        }
    });
    let rate = |what: &str, value: f64, unit| {
        print(&format!("{name}_{what}"), value, unit, None, Better::Higher);
    };
    let megabytes = (MIB << 20) as f64 / 1e6;
    rate("write", megabytes / written, "MB/s");
    rate("read", megabytes / read, "MB/s");
    rate("create", FILES as f64 / made, "1/s");
}

/// Takes the large files out of the page cache.
fn forget(root: &Path) {
    for part in 0..CLIENTS {
        let file = File::open(root.join(large(part))).expect("it was written");
        file.sync_all().expect("it is on the disk");
        let all = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(&file, 0, 0, all).expect("it is a file");
    }
}

fn large(part: u64) -> String {
    format!("large-{part}")
}

struct Disk {
    dir: std::path::PathBuf,
    part: u64,
}

impl Worker for Disk {
    fn write(&mut self, piece: &[u8], pieces: u64) {
        let file = File::create(self.dir.join(large(self.part))).expect("it is new");
        for number in 0..pieces {
            let written = file.write_all_at(piece, number << 20);
            written.expect("the disk has room");
        }
        file.sync_all().expect("the disk works");
    }

    fn read(&mut self, pieces: u64) -> u64 {
        let file = File::open(self.dir.join(large(self.part))).expect("it is there");
        let mut piece = vec![0; 1 << 20];
        let read = |number| {
            file.read_at(&mut piece, number << 20)
                .expect("the disk works") as u64
        };
        (0..pieces).map(read).sum()
    }

    fn create(&mut self, name: &str, content: &[u8]) {
        let file = File::create(self.dir.join(name)).expect("it is new");
        file.sync_all().expect("the disk works");
        let dir = File::open(&self.dir).expect("it is there");
        dir.sync_all().expect("the disk works");
        let written = file.write_all_at(content, 0);
        written.expect("the disk has room");
        file.sync_all().expect("the disk works");
    }
}

struct Nfs {
    client: Client,
    part: u64,
}

impl Worker for Nfs {
    fn write(&mut self, piece: &[u8], pieces: u64) {
        let root = self.client.root.clone();
        let name = large(self.part);
        let made = self.client.create(&root, name.as_bytes(), 0o644);
        let file = made.expect("it is new");
        for number in 0..pieces {
            let (at, how) = (number << 20, stable_how::UNSTABLE);
            let written = self.client.write(&file, at, piece, how);
            assert_eq!(written.expect("there is room").count, 1 << 20);
        }
        self.client.commit(&file).expect("the disk works");
    }

    fn read(&mut self, pieces: u64) -> u64 {
        let root = self.client.root.clone();
        let found = self.client.lookup(&root, large(self.part).as_bytes());
        let file = found.expect("it was written");
        let mut read = |number| {
            let read = self.client.read(&file, number << 20, 1 << 20);
            read.expect("the disk works").0.len() as u64
        };
        (0..pieces).map(&mut read).sum()
    }

    fn create(&mut self, name: &str, content: &[u8]) {
        let root = self.client.root.clone();
        let made = self.client.create(&root, name.as_bytes(), 0o644);
        let how = stable_how::FILE_SYNC;
        let written = self
            .client
            .write(&made.expect("it is new"), 0, content, how);
        written.expect("there is room");
    }
}

/// NFS-Ganesha with the portmapper that it needs. Dropping it kills both.
struct Ganesha([Child; 2]);

impl Ganesha {
    /// None where it is not installed.
    fn start(dir: &Path, root: &Path) -> Option<Ganesha> {
        let installed = ganesha::installed().ok()?;
        let told = Config {
            root: root.to_owned(),
            listen: SocketAddr::new(LOOPBACK, GANESHA_PORT),
            generation: 1,
            clients: vec![LOOPBACK],
            squash_uid: NOBODY,
            squash_gid: NOBODY,
            squash_all: false,
            linger_s: 0,
            any_port: false,
            backend: "ganesha".to_owned(),
        };
        let told = ganesha::configuration(dir, &told, &installed.modules).expect("a plain path");
        // As agents have it, and version 3 beside; it does not find loopback where there is nothing else.
        let loopback = format!("Bind_addr = {LOOPBACK};");
        let mount = format!("MNT_Port = {MOUNT_PORT};");
        let told = told.replace("Protocols = 4;", "Protocols = 3, 4;");
        let told = told.replace(&loopback, &mount);
        fs::create_dir_all(dir.join("ganesha")).expect("it can be made");
        let path = |name: &str| dir.join(name).to_str().expect("it is text").to_owned();
        let (file, log, pid) = (
            path(ganesha::CONFIGURATION),
            path("ganesha.log"),
            path("ganesha.pid"),
        );
        fs::write(&file, told).expect("there is room");
        let start = |program: &str, args: &[&str]| {
            let mut command = Command::new(program);
            let command = command.args(args).stdout(Stdio::null());
            command.stderr(Stdio::null()).spawn().ok()
        };
        let listens = |port: u16| {
            until("a server to listen", || {
                std::net::TcpStream::connect((LOOPBACK, port)).ok()
            });
        };
        let mut mapper = start("rpcbind", &["-w", "-f"])?;
        listens(111);
        let args = ["-F", "-f", &file, "-L", &log, "-p", &pid];
        let program = installed.program.to_str().expect("it is text");
        let Some(server) = start(program, &args) else {
            let _ = mapper.kill();
            let _ = mapper.wait();
            return None;
        };
        let server = Ganesha([server, mapper]);
        listens(GANESHA_PORT);
        listens(MOUNT_PORT);
        Some(server)
    }
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
