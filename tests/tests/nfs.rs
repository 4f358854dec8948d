//! The NFS server of the node agent: real processes, asked by Debian's libnfs and, where its tools have no words for it, by a client of
//! another crate.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchai_tests::guest::{Guest, image};
use batchai_tests::nfs::{
    Client, Failure, Handle, LOOPBACK, NOBODY, Server, User, connect, credentials, run, run_by,
    settings, status, write_config,
};
use batchai_tests::process::{free_port, until};
use batchai_tests::requirement;
use batchai_tests::volume::Volume;
use nfs3_client::nfs3_types::nfs3::{nfsstat3 as Status, stable_how::*, *};
use nfs3_client::nfs3_types::rpc::{call_body, msg_body, opaque_auth, rpc_msg};
use nfs3_client::nfs3_types::xdr_codec::{Opaque, Pack};
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// Two people.
const ANN: u32 = 1001;
const BOB: u32 = 1002;
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2));
const BLOCK: usize = 64 << 10;

/// A directory that everybody may write to, and beside it a server of it.
struct World {
    server: Server,
    dir: TempDir,
}

impl World {
    /// None where only root could make it.
    fn start() -> Option<World> {
        let dir = directory()?;
        let server = Server::start(&dir.path().join("server"), &dir.path().join("export"));
        Some(World { server, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("export").join(name)
    }

    /// What libnfs calls a file of the export.
    fn url(&self, name: &str, user: u32) -> String {
        let port = self.server.config.listen.port();
        let path = self.path(name);
        format!(
            "nfs://127.0.0.1{}?version=3&nfsport={port}&mountport={port}&uid={user}&gid={user}",
            path.display()
        )
    }
}

fn directory() -> Option<TempDir> {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root serves files for others");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let export = dir.path().join("export");
    fs::create_dir(&export).unwrap();
    open_to_all(&export);
    Some(dir)
}

fn open_to_all(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
}

fn refused<T>(what: Result<T, Failure>) -> Status {
    match what {
        Ok(_) => Status::NFS3_OK,
        Err(failure) => failure.status(),
    }
}

/// A program of libnfs.
fn tool(name: &str, args: &[&str]) -> Option<String> {
    let program = requirement::program(name, "apt-get install libnfs-utils")?;
    let ended = Command::new(program).args(args).output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        ended.status.success(),
        "{name} {args:?}: {}",
        said(&ended.stderr)
    );
    Some(said(&ended.stdout))
}

fn digest(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece).unwrap() {
            0 => return hasher.finalize().to_vec(),
            read => hasher.update(&piece[..read]),
        }
    }
}

/// Bytes that no other block has.
fn block(number: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(number);
    std::iter::repeat_with(|| rng.u8(..)).take(BLOCK).collect()
}

#[test]
fn a_large_file_comes_and_goes_unchanged() {
    let Some(w) = World::start() else { return };
    let full = std::env::var_os("BATCHAI_TEST_FULL").is_some();
    let blocks = if full { 16 << 10 } else { 4 << 10 };
    let (own, back) = (w.dir.path().join("own"), w.dir.path().join("back"));
    let mut file = File::create(&own).unwrap();
    let first = block(0);
    for number in 0..blocks as u64 {
        // Cheaply unlike every other.
        let mut bytes = first.clone();
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        file.write_all(&bytes).unwrap();
    }
    let (from, to) = (own.to_str().unwrap(), back.to_str().unwrap());
    let url = w.url("large", ANN);
    if tool("nfs-cp", &[from, &url]).is_none() {
        return;
    }
    tool("nfs-cp", &[&url, to]);
    let expected = digest(&own);
    assert_eq!(digest(&w.path("large")), expected, "on the server");
    assert_eq!(digest(&back), expected, "fetched back");
    assert_eq!(fs::metadata(w.path("large")).unwrap().uid(), ANN);
}

#[test]
fn libnfs_lists_and_prints_names_of_all_languages() {
    let Some(w) = World::start() else { return };
    let names = ["naïve Datei", "数据集", "🦀.txt", "a&b=c"];
    for name in names {
        fs::write(w.path(name), name).unwrap();
        open_to_all(&w.path(name));
    }
    let Some(listed) = tool("nfs-ls", &[&w.url("", ANN)]) else {
        return;
    };
    for name in names {
        assert!(listed.contains(name), "{name} is missing in:\n{listed}");
    }
    let printed = tool("nfs-cat", &[&w.url("数据集", ANN)]);
    assert_eq!(printed.unwrap(), "数据集");
}

#[test]
fn ten_thousand_files_are_made_and_listed_once_each() {
    const FILES: usize = 10_000;
    const CLIENTS: usize = 8;
    let Some(w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    let root = client.root.clone();
    let many = client.mkdir(&root, b"many", 0o755).unwrap();
    std::thread::scope(|threads| {
        for part in 0..CLIENTS {
            let (many, server) = (&many, &w.server);
            threads.spawn(move || {
                let mut client = server.client(ANN, ANN);
                for number in (part..FILES).step_by(CLIENTS) {
                    let name = format!("file-{number:05}");
                    let file = client.create(many, name.as_bytes(), 0o644).unwrap();
                    client.write(&file, 0, name.as_bytes(), UNSTABLE).unwrap();
                }
            });
        }
    });
    let of = |names: Vec<Vec<u8>>| {
        let count = names.len();
        let names: BTreeSet<_> = names.into_iter().collect();
        assert_eq!(names.len(), count, "each once");
        names
    };
    assert_eq!(of(client.names(&many).unwrap()).len(), FILES);
    assert_eq!(fs::read_dir(w.path("many")).unwrap().count(), FILES);
    let last = fs::read_to_string(w.path("many/file-09999")).unwrap();
    assert_eq!(last, "file-09999");
    // While what was listed is removed, what was not is listed all the same; also with a server that never saw the beginning.
    let (mut cookie, mut seen, mut pages) = (0, Vec::new(), 0);
    let mut w = w;
    loop {
        let page = client.page(&many, cookie, pages % 2 == 0).unwrap();
        pages += 1;
        for (name, next) in &page.names {
            cookie = *next;
            if name.starts_with(b"file-") {
                seen.push(name.clone());
                fs::remove_file(w.path("many").join(str::from_utf8(name).unwrap())).unwrap();
            }
        }
        if page.end {
            break;
        }
        if pages == 10 {
            w.server.restart();
            client = w.server.client(ANN, ANN);
        }
    }
    assert_eq!(of(seen).len(), FILES);
    assert!(client.names(&many).unwrap().is_empty());
    client.rmdir(&root, b"many").unwrap();
}

#[test]
fn names_are_renamed_linked_and_refused_as_the_protocol_says() {
    let Some(w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    let root = client.root.clone();
    let a = client.mkdir(&root, b"a", 0o755).unwrap();
    let b = client.mkdir(&root, b"b", 0o755).unwrap();
    let file = client.create(&a, b"file", 0o644).unwrap();
    client.write(&file, 0, b"content", FILE_SYNC).unwrap();
    client.rename((&a, b"file"), (&b, b"moved")).unwrap();
    assert_eq!(
        client.read(&file, 0, 100).unwrap(),
        (b"content".to_vec(), true)
    );
    assert_eq!(client.lookup(&b, b"moved").unwrap(), file);
    assert_eq!(refused(client.lookup(&a, b"file")), Status::NFS3ERR_NOENT);
    client.link(&file, &a, b"linked").unwrap();
    assert_eq!(client.attributes(&file).unwrap().nlink, 2);
    assert_eq!(refused(client.remove(&b, b"moved")), Status::NFS3_OK);
    assert_eq!(fs::read(w.path("a/linked")).unwrap(), b"content");
    // A file in the place of another.
    client.create(&b, b"target", 0o644).unwrap();
    client.rename((&a, b"linked"), (&b, b"target")).unwrap();
    assert_eq!(client.lookup(&b, b"target").unwrap(), file);
    for (got, expected) in [
        (refused(client.rmdir(&root, b"b")), Status::NFS3ERR_NOTEMPTY),
        (refused(client.rmdir(&b, b"target")), Status::NFS3ERR_NOTDIR),
        (refused(client.remove(&root, b"b")), Status::NFS3ERR_ISDIR),
        (
            refused(client.mkdir(&root, b"b", 0o755)),
            Status::NFS3ERR_EXIST,
        ),
        (
            refused(client.create(&b, b"target", 0o644)),
            Status::NFS3ERR_EXIST,
        ),
        (refused(client.lookup(&file, b"x")), Status::NFS3ERR_NOTDIR),
        (refused(client.read(&b, 0, 1)), Status::NFS3ERR_ISDIR),
        (
            refused(client.rename((&root, b"b"), (&b, b"b"))),
            Status::NFS3ERR_INVAL,
        ),
        (
            refused(client.create(&a, &[b'n'; 256], 0o644)),
            Status::NFS3ERR_NAMETOOLONG,
        ),
        (
            refused(client.create(&a, &[b'n'; 255], 0o644)),
            Status::NFS3_OK,
        ),
        // Not text, and none the less a name.
        (
            refused(client.create(&a, &[0xff, 0xfe, b'\n'], 0o644)),
            Status::NFS3_OK,
        ),
        (
            refused(client.lookup(&a, &[0xff, 0xfe, b'\n'])),
            Status::NFS3_OK,
        ),
    ] {
        assert_eq!(got, expected);
    }
    for name in ["", ".", "..", "a/b", "../etc", "a\0b", "/"] {
        let name = name.as_bytes();
        let refusals = [
            refused(client.lookup(&a, name)),
            refused(client.create(&a, name, 0o644)),
            refused(client.mkdir(&a, name, 0o755)),
            refused(client.symlink(&a, name, b"x")),
            refused(client.remove(&a, name)),
            refused(client.rmdir(&a, name)),
            refused(client.rename((&b, b"target"), (&a, name))),
            refused(client.rename((&a, name), (&b, b"new"))),
            refused(client.link(&file, &a, name)),
        ];
        let known = [Status::NFS3ERR_INVAL, Status::NFS3ERR_ACCES];
        let all = refusals.iter().all(|status| known.contains(status));
        assert!(all, "{name:?}: {refusals:?}");
    }
    client.remove(&b, b"target").unwrap();
    until("the file to be closed here, too", || {
        let gone = client.attributes(&file).err()?;
        (gone.status() == Status::NFS3ERR_STALE).then_some(())
    });
}

#[test]
fn sizes_times_and_modes_are_set() {
    let Some(w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    let root = client.root.clone();
    let file = client.create(&root, b"file", 0o640).unwrap();
    client.write(&file, 0, &[7; 5000], UNSTABLE).unwrap();
    client.set(&file, settings(None, Some(3)), None).unwrap();
    assert_eq!(client.read(&file, 0, 10).unwrap(), (vec![7; 3], true));
    client.set(&file, settings(None, Some(5)), None).unwrap();
    assert_eq!(client.read(&file, 2, 10).unwrap(), (vec![7, 0, 0], true));
    assert_eq!(client.read(&file, 5, 10).unwrap(), (vec![], true));
    assert_eq!(client.read(&file, u64::MAX, 10).unwrap(), (vec![], true));
    let far = client.write(&file, u64::MAX, b"x", UNSTABLE);
    assert_eq!(refused(far), Status::NFS3ERR_FBIG);
    let time = nfstime3 {
        seconds: 1_000_000_000,
        nseconds: 123_456_789,
    };
    let new = sattr3 {
        mtime: set_mtime::SET_TO_CLIENT_TIME(time),
        atime: set_atime::SET_TO_SERVER_TIME,
        ..settings(Some(0o4751), None)
    };
    let change = client.set(&file, new, None).unwrap();
    let (before, after) = (change.before.unwrap(), change.after.unwrap());
    assert_eq!((before.size, after.size, after.mode), (5, 5, 0o4751));
    let now = client.attributes(&file).unwrap();
    assert_eq!((now.mtime, now.ctime), (time, after.ctime));
    assert!(now.atime.seconds > time.seconds);
    // Only if nobody changed it meanwhile.
    let stale = client.set(&file, settings(Some(0o600), None), Some(time));
    assert_eq!(refused(stale), Status::NFS3ERR_NOT_SYNC);
    let fresh = client.set(&file, settings(Some(0o600), None), Some(now.ctime));
    assert_eq!(refused(fresh), Status::NFS3_OK);
    // A file that is there is opened, and made empty where that is asked.
    let open = createhow3::UNCHECKED(settings(Some(0o666), None));
    assert_eq!(client.create_how(&root, b"file", open).unwrap(), file);
    assert_eq!(client.attributes(&file).unwrap().size, 5);
    let empty = createhow3::UNCHECKED(settings(None, Some(0)));
    assert_eq!(client.create_how(&root, b"file", empty).unwrap(), file);
    assert_eq!(client.attributes(&file).unwrap().size, 0);
    // The same call once more finds its own file, another's not.
    let only = |mark| createhow3::EXCLUSIVE(createverf3([mark; 8]));
    let own = client.create_how(&root, b"own", only(3)).unwrap();
    assert_eq!(client.create_how(&root, b"own", only(3)).unwrap(), own);
    let others = client.create_how(&root, b"own", only(4));
    assert_eq!(refused(others), Status::NFS3ERR_EXIST);
}

#[test]
fn what_is_made_has_the_owner_and_the_times_that_are_asked_for() {
    let Some(w) = World::start() else { return };
    let listen = w.server.config.listen;
    let connect = |user: User| Client::connect(listen, LOOPBACK, "/", user).unwrap();
    let mut client = connect((ANN, ANN, &[4242]));
    let root = client.root.clone();
    let time = nfstime3 {
        seconds: 1_000_000_000,
        nseconds: 123_456_789,
    };
    let asked = sattr3 {
        gid: Nfs3Option::Some(4242),
        mtime: set_mtime::SET_TO_CLIENT_TIME(time),
        ..settings(Some(0o751), None)
    };
    let made = [
        client.mkdir_with(&root, b"dir", asked.clone()),
        client.symlink_with(&root, b"link", b"dir", asked.clone()),
        client.create_how(&root, b"file", createhow3::GUARDED(asked.clone())),
        client.special(&root, b"pipe", mknoddata3::NF3FIFO(asked.clone())),
        client.special(&root, b"socket", mknoddata3::NF3SOCK(asked.clone())),
    ];
    for made in made {
        let made = client.attributes(&made.unwrap()).unwrap();
        assert_eq!((made.uid, made.gid, made.mtime), (ANN, 4242, time));
        let link = made.type_ == ftype3::NF3LNK;
        assert_eq!(made.mode, if link { 0o777 } else { 0o751 });
    }
    use std::os::unix::fs::FileTypeExt as _;
    let kind = |name: &str| fs::symlink_metadata(w.path(name)).unwrap().file_type();
    assert!(kind("pipe").is_fifo() && kind("socket").is_socket());
    // Some clients say whose all is that they make.
    let own = |id| sattr3 {
        uid: Nfs3Option::Some(id),
        gid: Nfs3Option::Some(id),
        ..settings(Some(0o755), None)
    };
    client.mkdir_with(&root, b"own", own(ANN)).unwrap();
    let theirs = client.mkdir_with(&root, b"theirs", own(BOB));
    assert_eq!(refused(theirs), Status::NFS3ERR_PERM);
    let mut squashed = connect((0, 0, &[]));
    let made = squashed.mkdir_with(&root, b"roots", own(0)).unwrap();
    assert_eq!(squashed.attributes(&made).unwrap().uid, NOBODY);
    // Only files have a size.
    let size = settings(None, Some(1));
    let refusals = [
        refused(client.mkdir_with(&root, b"x", size.clone())),
        refused(client.symlink_with(&root, b"x", b"y", size.clone())),
        refused(client.special(&root, b"x", mknoddata3::NF3FIFO(size))),
        refused(client.lookup(&root, b"x")),
    ];
    let inval = Status::NFS3ERR_INVAL;
    assert_eq!(refusals, [inval, inval, inval, Status::NFS3ERR_NOENT]);
    // Devices are not made, and what is no kind of them is none.
    let device = || devicedata3 {
        dev_attributes: settings(Some(0o666), None),
        spec: specdata3 {
            specdata1: 1,
            specdata2: 3,
        },
    };
    let refusals = [
        refused(client.special(&root, b"null", mknoddata3::NF3CHR(device()))),
        refused(client.special(&root, b"null", mknoddata3::NF3BLK(device()))),
        refused(client.special(&root, b"pipe", mknoddata3::NF3FIFO(settings(None, None)))),
    ];
    let none = Status::NFS3ERR_NOTSUPP;
    assert_eq!(refusals, [none, none, Status::NFS3ERR_EXIST]);
    assert!(!w.path("null").exists());
    let mut bytes = call(
        7,
        11,
        &MKNOD3args {
            where_: diropargs3 {
                dir: root,
                name: b"x"[..].into(),
            },
            what: mknoddata3::NF3FIFO(settings(None, None)),
        },
    );
    // Of no kind that is made so: nothing comes behind it.
    let mut nothing = Vec::new();
    settings(None, None).pack(&mut nothing).unwrap();
    bytes.truncate(bytes.len() - nothing.len());
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&1_u32.to_be_bytes());
    let mark = (bytes.len() as u32 - 4) | 1 << 31;
    bytes[..4].copy_from_slice(&mark.to_be_bytes());
    let mut stream = raw(listen);
    stream.write_all(&bytes).unwrap();
    let status = answer(&mut stream).unwrap()[24..28].to_vec();
    assert_eq!(status, 10007_u32.to_be_bytes());
}

#[test]
fn two_clients_write_to_different_parts_of_a_file() {
    const BLOCKS: u64 = 128;
    let Some(w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    let root = client.root.clone();
    let file = client.create(&root, b"shared", 0o666).unwrap();
    std::thread::scope(|threads| {
        for (part, user) in [ANN, BOB].into_iter().enumerate() {
            let (file, server) = (&file, &w.server);
            threads.spawn(move || {
                let mut client = server.client(user, user);
                for number in (part as u64..BLOCKS).step_by(2) {
                    let at = number * BLOCK as u64;
                    client.write(file, at, &block(number), UNSTABLE).unwrap();
                }
                client.commit(file).unwrap();
            });
        }
    });
    for number in 0..BLOCKS {
        let at = number * BLOCK as u64;
        let (data, end) = client.read(&file, at, BLOCK as u32).unwrap();
        assert!(data == block(number), "block {number}");
        assert_eq!(end, number == BLOCKS - 1);
    }
}

#[test]
fn the_kernel_decides_who_may_do_what() {
    let Some(w) = World::start() else { return };
    let user = |user: User| Client::connect(w.server.config.listen, LOOPBACK, "/", user).unwrap();
    let (mut ann, mut bob) = (user((ANN, ANN, &[])), user((BOB, BOB, &[])));
    let mut root = user((0, 0, &[0]));
    let top = ann.root.clone();
    let file = ann.create(&top, b"private", 0o600).unwrap();
    ann.write(&file, 0, b"secret", UNSTABLE).unwrap();
    let owned = fs::metadata(w.path("private")).unwrap();
    assert_eq!(
        (owned.uid(), owned.gid(), owned.mode() & 0o7777),
        (ANN, ANN, 0o600)
    );
    for client in [&mut bob, &mut root] {
        assert_eq!(refused(client.read(&file, 0, 9)), Status::NFS3ERR_ACCES);
        assert_eq!(
            refused(client.write(&file, 0, b"x", UNSTABLE)),
            Status::NFS3ERR_ACCES
        );
        let cut = client.set(&file, settings(None, Some(0)), None);
        assert_eq!(refused(cut), Status::NFS3ERR_ACCES);
        let opened = client.set(&file, settings(Some(0o666), None), None);
        assert_eq!(refused(opened), Status::NFS3ERR_PERM);
        assert_eq!(client.access(&file, 63).unwrap(), 0);
    }
    assert_eq!(fs::read(w.path("private")).unwrap(), b"secret");
    let all = ACCESS3_READ | ACCESS3_MODIFY | ACCESS3_EXTEND;
    assert_eq!(ann.access(&file, 63).unwrap(), all);
    // Root is nobody, also where it makes something.
    root.create(&top, b"roots", 0o644).unwrap();
    let owned = fs::metadata(w.path("roots")).unwrap();
    assert_eq!((owned.uid(), owned.gid()), (NOBODY, NOBODY));
    let given = sattr3 {
        uid: Nfs3Option::Some(BOB),
        ..sattr3::default()
    };
    assert_eq!(refused(ann.set(&file, given, None)), Status::NFS3ERR_PERM);
    // A directory of one: others neither look into it nor make anything in it.
    let dir = ann.mkdir(&top, b"own", 0o700).unwrap();
    ann.create(&dir, b"inside", 0o666).unwrap();
    assert_eq!(refused(bob.lookup(&dir, b"inside")), Status::NFS3ERR_ACCES);
    assert_eq!(refused(bob.names(&dir)), Status::NFS3ERR_ACCES);
    assert_eq!(
        refused(bob.create(&dir, b"x", 0o666)),
        Status::NFS3ERR_ACCES
    );
    assert_eq!(refused(bob.remove(&dir, b"inside")), Status::NFS3ERR_ACCES);
    // Who may read a directory and not pass it is told the names.
    fs::set_permissions(w.path("own"), fs::Permissions::from_mode(0o704)).unwrap();
    assert_eq!(bob.names(&dir).unwrap(), [b"inside".to_vec()]);
    assert_eq!(refused(bob.lookup(&dir, b"inside")), Status::NFS3ERR_ACCES);
    // Further groups count, but root's.
    fs::write(w.path("group"), "of some").unwrap();
    fs::set_permissions(w.path("group"), fs::Permissions::from_mode(0o040)).unwrap();
    let found = bob.lookup(&top, b"group").unwrap();
    let mut with_roots = user((BOB, BOB, &[0]));
    assert_eq!(
        refused(with_roots.read(&found, 0, 9)),
        Status::NFS3ERR_ACCES
    );
    std::os::unix::fs::chown(w.path("group"), None, Some(4242)).unwrap();
    assert_eq!(refused(bob.read(&found, 0, 9)), Status::NFS3ERR_ACCES);
    let mut member = user((BOB, BOB, &[7, 4242]));
    assert_eq!(member.read(&found, 0, 9).unwrap().0, b"of some");
    // Who made a file writes to it whatever its mode is, and who may execute one reads it.
    let made = ann.create(&top, b"read-only", 0o444).unwrap();
    ann.write(&made, 0, b"by its maker", UNSTABLE).unwrap();
    assert_eq!(
        refused(bob.write(&made, 0, b"x", UNSTABLE)),
        Status::NFS3ERR_ACCES
    );
    let program = ann.create(&top, b"program", 0o711).unwrap();
    ann.write(&program, 0, b"#!", UNSTABLE).unwrap();
    assert_eq!(bob.read(&program, 0, 9).unwrap().0, b"#!");
}

#[test]
fn nothing_beyond_the_export_is_reached() {
    let Some(w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    let root = client.root.clone();
    let outside = w.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    open_to_all(&outside);
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::set_permissions(outside.join("secret"), fs::Permissions::from_mode(0o666)).unwrap();
    for (name, to) in [
        ("absolute", outside.to_str().unwrap()),
        ("relative", "../outside"),
    ] {
        std::os::unix::fs::symlink(to, w.path(name)).unwrap();
        let link = client.lookup(&root, name.as_bytes()).unwrap();
        assert_eq!(client.readlink(&link).unwrap(), to.as_bytes());
        assert_eq!(
            refused(client.lookup(&link, b"secret")),
            Status::NFS3ERR_NOTDIR
        );
        assert_eq!(
            refused(client.create(&link, b"new", 0o644)),
            Status::NFS3ERR_NOTDIR
        );
        assert_eq!(refused(client.names(&link)), Status::NFS3ERR_NOTDIR);
        let path = format!("/{name}");
        let mounted = Client::connect(w.server.config.listen, LOOPBACK, &path, (ANN, ANN, &[]));
        assert!(mounted.is_err(), "a mount of {path}");
    }
    let link = client
        .symlink(&root, b"to-file", b"../outside/secret")
        .unwrap();
    assert_eq!(refused(client.read(&link, 0, 9)), Status::NFS3ERR_INVAL);
    let write = client.write(&link, 0, b"x", FILE_SYNC);
    assert_eq!(refused(write), Status::NFS3ERR_INVAL);
    let cut = client.set(&link, settings(None, Some(0)), None);
    assert_eq!(refused(cut), Status::NFS3ERR_INVAL);
    let open = createhow3::UNCHECKED(settings(None, Some(0)));
    assert_eq!(
        refused(client.create_how(&root, b"to-file", open)),
        Status::NFS3ERR_EXIST
    );
    for path in ["/..", "/../outside", "/a/../..", "/etc", "relative/../.."] {
        let mounted = Client::connect(w.server.config.listen, LOOPBACK, path, (ANN, ANN, &[]));
        assert!(mounted.is_err(), "a mount of {path}");
    }
    // Handles are not guessed.
    let made = root.data.to_vec();
    for at in 0..made.len() {
        let mut forged = made.clone();
        forged[at] ^= 1;
        let forged = nfs_fh3 {
            data: Opaque::owned(forged),
        };
        let status = refused(client.attributes(&forged));
        let known = [Status::NFS3ERR_STALE, Status::NFS3ERR_BADHANDLE];
        assert!(known.contains(&status), "byte {at}: {status:?}");
    }
    // A directory that leaves the export, and one that another file system is mounted on.
    let leaving = client.mkdir(&root, b"leaving", 0o777).unwrap();
    fs::rename(w.path("leaving"), outside.join("left")).unwrap();
    assert_eq!(refused(client.names(&leaving)), Status::NFS3ERR_STALE);
    assert_eq!(
        refused(client.create(&leaving, b"x", 0o644)),
        Status::NFS3ERR_STALE
    );
    // Nothing is opened but files.
    let pipe = w.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    let pipe = client.lookup(&root, b"pipe").unwrap();
    assert_eq!(refused(client.read(&pipe, 0, 9)), Status::NFS3ERR_INVAL);
    let write = client.write(&pipe, 0, b"x", UNSTABLE);
    assert_eq!(refused(write), Status::NFS3ERR_INVAL);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outside.join("left")).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_told_and_a_mount_within_is_not_entered() {
    let Some(dir) = directory() else { return };
    let export = dir.path().join("export");
    let (image, inner) = (dir.path().join("image"), dir.path().join("inner"));
    let Some(volume) = Volume::make(&image, &export, 24) else {
        return;
    };
    open_to_all(volume.path());
    fs::create_dir(export.join("within")).unwrap();
    let within = Volume::make(&inner, &export.join("within"), 8).unwrap();
    open_to_all(within.path());
    fs::write(within.path().join("hidden"), "x").unwrap();
    let server = Server::start(&dir.path().join("server"), &export);
    let mut client = server.client(ANN, ANN);
    let root = client.root.clone();
    let entered = client.lookup(&root, b"within");
    assert_eq!(refused(entered), Status::NFS3ERR_ACCES);
    assert!(client.names(&root).unwrap().contains(&b"within".to_vec()));
    let space = client.space().unwrap();
    assert!(space.tbytes < 24 << 20 && space.abytes <= space.fbytes);
    let file = client.create(&root, b"file", 0o644).unwrap();
    client.write(&file, 0, b"before", FILE_SYNC).unwrap();
    let filler = volume.fill();
    assert!(client.space().unwrap().abytes < 64 << 10);
    let mut at = 4096;
    let full = until("the disk to be full", || {
        let written = client.write(&file, at, &block(0), FILE_SYNC);
        let Ok(written) = written else {
            return written.err();
        };
        // As much as there was room for.
        at += u64::from(written.count);
        None
    });
    assert_eq!(full.status(), Status::NFS3ERR_NOSPC);
    assert_eq!(client.read(&file, 0, 6).unwrap().0, b"before");
    fs::remove_file(filler).unwrap();
    client.write(&file, at, &block(0), FILE_SYNC).unwrap();
    drop(server);
}

#[test]
fn another_subvolume_is_another_file_system() {
    let Some(dir) = directory() else { return };
    let hint = "apt-get install btrfs-progs";
    let (Some(make), Some(btrfs)) = (
        requirement::program("mkfs.btrfs", hint),
        requirement::program("btrfs", hint),
    ) else {
        return;
    };
    let (image, export) = (dir.path().join("image"), dir.path().join("export"));
    File::create(&image).unwrap().set_len(128 << 20).unwrap();
    assert!(
        Command::new(make)
            .arg("-q")
            .arg(&image)
            .status()
            .unwrap()
            .success()
    );
    let volume = match Volume::mount(&image, &export) {
        Ok(volume) => volume,
        Err(why) => return requirement::skip(&format!("the kernel has no Btrfs: {why}")),
    };
    let subvolume = |name: &str| {
        let path = export.join(name);
        let mut make = Command::new(&btrfs);
        let made = make.args(["subvolume", "create"]).arg(&path).output();
        assert!(made.unwrap().status.success());
        open_to_all(&path);
        path
    };
    let root = subvolume("root");
    fs::create_dir(root.join("plain")).unwrap();
    open_to_all(&root.join("plain"));
    let within = subvolume("root/within");
    fs::write(within.join("other"), "x").unwrap();
    let server = Server::start(&dir.path().join("server"), &root);
    let mut client = server.client(ANN, ANN);
    let top = client.root.clone();
    let plain = client.lookup(&top, b"plain").unwrap();
    let file = client.create(&plain, b"file", 0o644).unwrap();
    client.write(&file, 0, b"content", UNSTABLE).unwrap();
    client.commit(&file).unwrap();
    assert_eq!(client.read(&file, 0, 9).unwrap().0, b"content");
    // There numbers begin anew: two files would have the same.
    let numbers = |path: &Path| fs::metadata(path).unwrap().ino();
    assert_eq!(numbers(&within.join("other")), numbers(&root.join("plain")));
    assert_eq!(
        refused(client.lookup(&top, b"within")),
        Status::NFS3ERR_ACCES
    );
    assert!(client.names(&top).unwrap().contains(&b"within".to_vec()));
    let mounted = Client::connect(server.config.listen, LOOPBACK, "/within", (ANN, ANN, &[]));
    assert!(mounted.is_err());
    drop((server, volume));
}

#[test]
fn only_clients_come_and_only_their_root() {
    let Some(mut w) = World::start() else { return };
    let listen = w.server.config.listen;
    let user = (ANN, ANN, &[][..]);
    let stranger = Client::connect(listen, OTHER, "/", user);
    assert!(stranger.is_err(), "it is not listed");
    w.server.tell(|config| config.clients.push(OTHER));
    let mut other = until("the other one to be a client", || {
        Client::connect(listen, OTHER, "/", user).ok()
    });
    let mut client = w.server.client(ANN, ANN);
    let root = other.root.clone();
    other.mkdir(&root, b"made", 0o755).unwrap();
    // It is cut off while it is connected, and nobody else is.
    w.server
        .tell(|config| config.clients.retain(|client| *client != OTHER));
    until("the other one to be cut off", || {
        matches!(other.attributes(&root), Err(Failure::Gone(_))).then_some(())
    });
    assert!(Client::connect(listen, OTHER, "/", user).is_err());
    client.attributes(&root).unwrap();
    // What cannot be read changes nothing.
    fs::write(w.server.dir.join("config.json"), "{").unwrap();
    let log = || w.server.process.log_text();
    until("the fault to be told", || {
        log().contains("still holds").then_some(())
    });
    client.attributes(&root).unwrap();
    // From any port everybody could claim to be anybody.
    let mut unprivileged = TcpStream::connect(listen).unwrap();
    let patience = Some(Duration::from_secs(30));
    unprivileged.set_read_timeout(patience).unwrap();
    assert_eq!(unprivileged.read(&mut [0]).unwrap_or(0), 0, "it is closed");
    assert!(log().contains("not only root"), "{}", log());
    // A fixed part that changes ends it.
    w.server.tell(|config| config.generation += 1);
    assert!(!w.server.process.wait().success());
    let said = status(&w.server.dir).unwrap();
    assert!(said.error.unwrap().contains("generation"));
}

#[test]
fn what_was_acknowledged_outlives_a_server_that_is_cut_down() {
    const BLOCKS: u64 = 640;
    const TOGETHER: u64 = 8;
    let Some(mut w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    let root = client.root.clone();
    let file = client.create(&root, b"written", 0o600).unwrap();
    let dir = client.mkdir(&root, b"dir", 0o700).unwrap();
    let (listen, done) = (w.server.config.listen, AtomicU64::new(0));
    std::thread::scope(|threads| {
        let (file, done) = (&file, &done);
        let writer = threads.spawn(move || {
            let mut writer = Persistent::new(listen);
            for first in (0..BLOCKS).step_by(TOGETHER as usize) {
                writer.write_until_it_is_stable(file, first..first + TOGETHER);
                done.store(first + TOGETHER, Ordering::SeqCst);
            }
            writer.again
        });
        for part in 1..=3 {
            until("something to be written", || {
                (done.load(Ordering::SeqCst) >= part * BLOCKS / 5).then_some(())
            });
            w.server.restart();
        }
        assert!(writer.join().unwrap() > 0, "nothing was cut off");
    });
    // Handles are as they were, also of what is called otherwise now.
    fs::rename(w.path("written"), w.path("dir/renamed")).unwrap();
    w.server.restart();
    let mut client = w.server.client(ANN, ANN);
    assert_eq!(client.root, root);
    for number in 0..BLOCKS {
        let at = number * BLOCK as u64;
        let (data, _) = client.read(&file, at, BLOCK as u32).unwrap();
        assert!(data == block(number), "block {number}");
    }
    assert_eq!(client.lookup(&dir, b"renamed").unwrap(), file);
}

/// A client that does what a hard mount does.
struct Persistent {
    listen: SocketAddr,
    client: Option<Client>,
    /// How often it had to begin anew.
    again: usize,
}

impl Persistent {
    fn new(listen: SocketAddr) -> Persistent {
        Persistent {
            listen,
            client: None,
            again: 0,
        }
    }

    /// Asks until it is answered.
    fn ask<T>(&mut self, mut question: impl FnMut(&mut Client) -> Result<T, Failure>) -> T {
        until("an answer", || {
            let user = (ANN, ANN, &[][..]);
            let connect = || Client::connect(self.listen, LOOPBACK, "/", user).ok();
            let client = match &mut self.client {
                Some(client) => client,
                none => none.insert(connect()?),
            };
            match question(client) {
                Ok(answer) => Some(answer),
                Err(Failure::Gone(_)) => {
                    self.client = None;
                    self.again += 1;
                    None
                }
                Err(Failure::Status(status)) => panic!("refused: {status:?}"),
            }
        })
    }

    fn write_until_it_is_stable(&mut self, file: &Handle, blocks: std::ops::Range<u64>) {
        until("blocks to be stable", || {
            let mut verifiers = BTreeSet::new();
            for number in blocks.clone() {
                let data = block(number);
                let at = number * BLOCK as u64;
                let written = self.ask(|client| client.write(file, at, &data, UNSTABLE));
                assert_eq!(written.count as usize, BLOCK);
                verifiers.insert(written.verf.0);
            }
            verifiers.insert(self.ask(|client| client.commit(file)).0);
            (verifiers.len() == 1).then_some(())
        });
    }
}

/// A disk whose power is cut after each answer: nothing that comes later makes it last.
struct Cut {
    volume: Volume,
    dir: PathBuf,
}

impl Cut {
    fn then(&self, what: &str, holds: impl FnOnce(&Path) -> bool) {
        let (copy, at) = (self.dir.join("copy"), self.dir.join("found"));
        self.volume.cut_power(&copy);
        let found = Volume::mount(&copy, &at).unwrap();
        assert!(holds(found.path()), "{what} was lost");
    }
}

#[test]
fn what_was_acknowledged_outlives_a_power_cut() {
    let Some(dir) = directory() else { return };
    let export = dir.path().join("export");
    let Some(volume) = Volume::make(&dir.path().join("image"), &export, 16) else {
        return;
    };
    open_to_all(volume.path());
    let server = Server::start(&dir.path().join("server"), &export);
    let mut client = server.client(ANN, ANN);
    let root = client.root.clone();
    let disk = Cut {
        volume,
        dir: dir.path().to_owned(),
    };
    let mode = |path: PathBuf| fs::metadata(path).map_or(0, |found| found.mode() & 0o7777);
    let synced = client.create(&root, b"synced", 0o640).unwrap();
    disk.then("CREATE", |at| mode(at.join("synced")) == 0o640);
    let told = client.write(&synced, 0, &block(1), FILE_SYNC).unwrap();
    assert_eq!(told.committed, FILE_SYNC);
    disk.then("WRITE", |at| {
        fs::read(at.join("synced")).unwrap() == block(1)
    });
    let committed = client.create(&root, b"committed", 0o600).unwrap();
    for number in 0..16 {
        let at = number * BLOCK as u64;
        let told = client.write(&committed, at, &block(number), UNSTABLE);
        assert_eq!(told.unwrap().committed, UNSTABLE);
    }
    client.commit(&committed).unwrap();
    let whole: Vec<u8> = (0..16).flat_map(block).collect();
    disk.then("COMMIT", |at| {
        fs::read(at.join("committed")).unwrap() == whole
    });
    let from = client.mkdir(&root, b"from", 0o755).unwrap();
    disk.then("MKDIR", |at| at.join("from").is_dir());
    let to = client.mkdir(&root, b"to", 0o755).unwrap();
    client.create(&from, b"a", 0o600).unwrap();
    client.rename((&from, b"a"), (&to, b"renamed")).unwrap();
    disk.then("RENAME", |at| {
        at.join("to/renamed").exists() && !at.join("from/a").exists()
    });
    client.create(&from, b"b", 0o600).unwrap();
    client.remove(&from, b"b").unwrap();
    disk.then("REMOVE", |at| !at.join("from/b").exists());
    client.rmdir(&root, b"from").unwrap();
    disk.then("RMDIR", |at| !at.join("from").exists());
    client.link(&synced, &to, b"linked").unwrap();
    disk.then("LINK", |at| fs::read(at.join("to/linked")).is_ok());
    client.symlink(&to, b"link", b"renamed").unwrap();
    disk.then("SYMLINK", |at| fs::read_link(at.join("to/link")).is_ok());
    let pipe = mknoddata3::NF3FIFO(settings(Some(0o600), None));
    client.special(&to, b"pipe", pipe).unwrap();
    disk.then("MKNOD", |at| at.join("to/pipe").exists());
    let link = client.lookup(&to, b"link").unwrap();
    let time = nfstime3 {
        seconds: 1_000_000_000,
        nseconds: 0,
    };
    let old = sattr3 {
        mtime: set_mtime::SET_TO_CLIENT_TIME(time),
        ..sattr3::default()
    };
    client.set(&link, old, None).unwrap();
    disk.then("a time of a link", |at| {
        let link = fs::symlink_metadata(at.join("to/link"));
        link.is_ok_and(|link| link.mtime() == i64::from(time.seconds))
    });
    client
        .set(&synced, settings(Some(0o604), None), None)
        .unwrap();
    disk.then("a mode", |at| mode(at.join("synced")) == 0o604);
    let cut = settings(None, Some(BLOCK as u64));
    client.set(&committed, cut, None).unwrap();
    disk.then("a size", |at| {
        fs::read(at.join("committed")).unwrap() == block(0)
    });
    drop(server);
}

#[test]
fn a_refused_change_syncs_nothing() {
    let Some(dir) = directory() else { return };
    let (image, export) = (dir.path().join("image"), dir.path().join("export"));
    let Some(volume) = Volume::make(&image, &export, 16) else {
        return;
    };
    open_to_all(volume.path());
    let server = Server::start(&dir.path().join("server"), &export);
    let mut client = server.client(ANN, ANN);
    let root = client.root.clone();
    let link = client.symlink(&root, b"link", b"nowhere").unwrap();
    // The kernel may write what others have written at any time: not five times amid this.
    let synced = |number: u64| {
        let data = block(number);
        fs::write(export.join("others"), &data).unwrap();
        let given = sattr3 {
            uid: Nfs3Option::Some(BOB),
            ..sattr3::default()
        };
        assert_eq!(
            refused(client.set(&link, given, None)),
            Status::NFS3ERR_PERM
        );
        client.set(&link, sattr3::default(), None).unwrap();
        let disk = fs::read(&image).unwrap();
        disk.chunks(4096).any(|chunk| chunk == &data[..4096])
    };
    assert!(!(0..5).all(synced), "all that others wrote is synced");
    drop((server, volume));
}

/// A call as bytes.
fn call(xid: u32, procedure: u32, arguments: &impl Pack) -> Vec<u8> {
    let head = rpc_msg {
        xid,
        body: msg_body::CALL(call_body {
            rpcvers: 2,
            prog: PROGRAM,
            vers: VERSION,
            proc: procedure,
            cred: credentials((ANN, ANN, &[])),
            verf: opaque_auth::default(),
        }),
    };
    let mut bytes = vec![0; 4];
    head.pack(&mut bytes).unwrap();
    arguments.pack(&mut bytes).unwrap();
    let mark = (bytes.len() as u32 - 4) | 1 << 31;
    bytes[..4].copy_from_slice(&mark.to_be_bytes());
    bytes
}

/// A connection of one's own.
fn raw(listen: SocketAddr) -> TcpStream {
    raw_from(listen, LOOPBACK)
}

fn raw_from(listen: SocketAddr, from: IpAddr) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let stream = runtime.block_on(connect(listen, from)).unwrap();
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    let patience = Some(Duration::from_secs(30));
    stream.set_read_timeout(patience).unwrap();
    stream
}

/// The next answer; None where the connection is closed.
fn answer(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut mark = [0; 4];
    stream.read_exact(&mut mark).ok()?;
    let mut answer = vec![0; (u32::from_be_bytes(mark) & !(1 << 31)) as usize];
    stream.read_exact(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn a_call_that_comes_again_is_answered_as_the_first_time() {
    let Some(w) = World::start() else { return };
    let client = w.server.client(ANN, ANN);
    let args = || MKDIR3args {
        where_: diropargs3 {
            dir: client.root.clone(),
            name: b"made"[..].into(),
        },
        attributes: settings(Some(0o700), None),
    };
    let asked = |stream: &mut TcpStream, xid| {
        stream.write_all(&call(xid, 9, &args())).unwrap();
        answer(stream).unwrap()
    };
    let mut stream = raw(w.server.config.listen);
    let first = asked(&mut stream, 77);
    // By a connection of its own, as after a broken one.
    drop(stream);
    let mut stream = raw(w.server.config.listen);
    assert_eq!(asked(&mut stream, 77), first);
    let status = |answer: &[u8]| u32::from_be_bytes(*answer[24..].first_chunk().unwrap());
    let anew = asked(&mut stream, 78);
    assert_eq!(
        (status(&first), status(&anew)),
        (0, Status::NFS3ERR_EXIST as u32)
    );
}

#[test]
fn what_is_no_call_does_no_harm() {
    const CONNECTIONS_OF_ONE: usize = 32;
    let Some(w) = World::start() else { return };
    let listen = w.server.config.listen;
    // Longer than any call, and pieces without end.
    for bytes in [&[0xff; 4][..], &[0x10, 0, 0, 0], &[0; 8]] {
        let mut stream = raw(listen);
        stream.write_all(bytes).unwrap();
        assert_eq!(answer(&mut stream), None);
    }
    // A call in two pieces; one of nothing that is known; one that claims more than it has.
    let mut stream = raw(listen);
    let null = call(5, 0, &nfs3_client::nfs3_types::xdr_codec::Void);
    let (one, other) = null[4..].split_at(16);
    for (mark, piece) in [(16, one), (other.len() as u32 | 1 << 31, other)] {
        stream.write_all(&mark.to_be_bytes()).unwrap();
        stream.write_all(piece).unwrap();
    }
    assert_eq!(answer(&mut stream).unwrap()[..4], [0, 0, 0, 5]);
    let told = |stream: &mut TcpStream, bytes: &[u8]| {
        stream.write_all(bytes).unwrap();
        answer(stream).unwrap()[20..24].to_vec()
    };
    let unknown = call(6, 99, &nfs3_client::nfs3_types::xdr_codec::Void);
    assert_eq!(told(&mut stream, &unknown), [0, 0, 0, 3]);
    let claims = call(7, 1, &u32::MAX);
    assert_eq!(told(&mut stream, &claims), [0, 0, 0, 4]);
    let longer = call(8, 1, &[0_u8; 64]);
    assert_eq!(
        told(&mut stream, &longer),
        [0, 0, 0, 4],
        "more than there is to say"
    );
    drop(stream);
    // Of one client no more connections than it may have, and they count as long as they last.
    for _ in 0..2 {
        let served = until("connections to be free", || {
            let mut streams: Vec<_> = (0..CONNECTIONS_OF_ONE + 4).map(|_| raw(listen)).collect();
            let mut served = 0;
            for stream in &mut streams {
                let asked = stream.write_all(&null).is_ok();
                served += usize::from(asked && answer(stream).is_some());
            }
            (served >= CONNECTIONS_OF_ONE).then_some(served)
        });
        assert_eq!(served, CONNECTIONS_OF_ONE);
    }
}

#[test]
fn a_client_cannot_fill_the_log() {
    let Some(w) = World::start() else { return };
    for _ in 0..50 {
        let mut stream = raw(w.server.config.listen);
        // Longer than any call.
        stream.write_all(&[0x10, 0, 0, 0]).unwrap();
        assert_eq!(answer(&mut stream), None);
    }
    let log = w.server.process.log_text();
    assert_eq!(log.matches("too long").count(), 1, "{log}");
}

#[test]
fn a_connection_is_asked_whether_its_client_is_there() {
    let Some(w) = World::start() else { return };
    let mut client = w.server.client(ANN, ANN);
    // It is taken when it is answered.
    client.space().unwrap();
    let own = format!(":{:04X}", w.server.config.listen.port());
    let sockets = fs::read_to_string("/proc/net/tcp").unwrap();
    let mut served = 0;
    for socket in sockets.lines().skip(1) {
        let fields: Vec<_> = socket.split_whitespace().collect();
        // Of those that are connected, the ends that the server has.
        if fields[1].ends_with(&own) && fields[3] == "01" {
            served += 1;
            let [timer, when] = fields[5].split(':').collect::<Vec<_>>()[..] else {
                panic!("{socket}")
            };
            let when = u64::from_str_radix(when, 16).unwrap() / 100;
            assert_eq!(timer, "02", "no timer of keepalive: {socket}");
            assert!(when <= 60, "it is asked after {when} s");
        }
    }
    assert!(served > 0);
}

/// A file system to which nothing is written until this is dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn new(at: &Path) -> Frozen {
        let frozen = Frozen(at.to_owned());
        frozen.tell("--freeze");
        frozen
    }

    fn tell(&self, what: &str) {
        let told = Command::new("fsfreeze").arg(what).arg(&self.0).status();
        assert!(told.unwrap().success(), "fsfreeze {what}");
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.tell("--unfreeze");
    }
}

/// A number that the kernel tells of a process.
fn told(pid: i32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.unwrap().trim_start_matches(':').split_whitespace();
    number.take(1).collect::<String>().parse().unwrap()
}

fn write_args<'a>(file: &Handle, data: &'a [u8]) -> WRITE3args<'a> {
    WRITE3args {
        file: file.clone(),
        offset: 0,
        count: data.len() as u32,
        stable: UNSTABLE,
        data: Opaque::borrowed(data),
    }
}

#[test]
fn a_client_whose_calls_stand_still_stops_nobody_else() {
    const CALLS: u32 = 64;
    let Some(dir) = directory() else { return };
    let export = dir.path().join("export");
    let Some(volume) = Volume::make(&dir.path().join("image"), &export, 16) else {
        return;
    };
    open_to_all(volume.path());
    let mut server = Server::start(&dir.path().join("server"), &export);
    server.tell(|config| config.clients.push(OTHER));
    let listen = server.config.listen;
    let mut other = until("the other one to be a client", || {
        Client::connect(listen, OTHER, "/", (BOB, BOB, &[])).ok()
    });
    let mut client = server.client(ANN, ANN);
    let root = client.root.clone();
    let file = client.create(&root, b"file", 0o644).unwrap();
    let frozen = Frozen::new(volume.path());
    let mut stream = raw(listen);
    for xid in 0..CALLS {
        let bytes = call(xid, 7, &write_args(&file, b"x"));
        stream.write_all(&bytes).unwrap();
    }
    until("its calls to be under way", || {
        (told(server.process.pid(), "Threads") > 16).then_some(())
    });
    // All that come at once are under way then.
    std::thread::sleep(Duration::from_millis(500));
    let answered = other.attributes(&root);
    drop(frozen);
    answered.expect("it has nothing to do with what stands still");
    for _ in 0..CALLS {
        answer(&mut stream).expect("also these are done");
    }
}

/// Waits until something has not changed for a while.
fn settled(mut probe: impl FnMut() -> u64) -> u64 {
    let (mut last, mut since) = (probe(), std::time::Instant::now());
    until("it to stand still", || {
        let now = probe();
        if now != last {
            (last, since) = (now, std::time::Instant::now());
        }
        (since.elapsed() > Duration::from_secs(1)).then_some(last)
    })
}

#[test]
fn what_clients_send_and_do_not_take_has_a_bound_in_memory() {
    const CLIENTS: u8 = 40;
    const CALLS: u32 = 16;
    const MOST_KIB: u64 = 400 << 10;
    let Some(dir) = directory() else { return };
    let export = dir.path().join("export");
    let Some(volume) = Volume::make(&dir.path().join("image"), &export, 16) else {
        return;
    };
    open_to_all(volume.path());
    let large: Vec<u8> = (0..16).flat_map(block).collect();
    fs::write(export.join("large"), &large).unwrap();
    let mut server = Server::start(&dir.path().join("server"), &export);
    let addresses: Vec<IpAddr> = (1..=CLIENTS).map(|n| [127, 0, 1, n].into()).collect();
    server.tell(|config| config.clients.extend(&addresses));
    let (listen, pid) = (server.config.listen, server.process.pid());
    let last = *addresses.last().unwrap();
    until("all to be clients", || {
        Client::connect(listen, last, "/", (ANN, ANN, &[])).ok()
    });
    let mut client = server.client(ANN, ANN);
    let root = client.root.clone();
    let found = client.lookup(&root, b"large").unwrap();
    let file = client.create(&root, b"file", 0o644).unwrap();
    // 640 MiB are asked for, and nothing is taken.
    let mut streams = Vec::new();
    for address in &addresses {
        let mut stream = raw_from(listen, *address);
        for xid in 0..CALLS {
            let args = READ3args {
                file: found.clone(),
                offset: 0,
                count: large.len() as u32,
            };
            stream.write_all(&call(xid, 6, &args)).unwrap();
        }
        streams.push(stream);
    }
    settled(|| told(pid, "VmRSS"));
    let most = told(pid, "VmHWM");
    assert!(most < MOST_KIB, "{most} KiB for answers");
    std::thread::scope(|threads| {
        for mut stream in streams {
            let large = &large;
            threads.spawn(move || {
                for _ in 0..CALLS {
                    let answer = answer(&mut stream).expect("all are answered");
                    assert!(answer.ends_with(large), "the data");
                }
            });
        }
    });
    // 640 MiB are sent, and nothing is written.
    let frozen = Frozen::new(volume.path());
    let sent = AtomicU64::new(0);
    std::thread::scope(|threads| {
        for address in addresses.iter().flat_map(|a| [*a; CALLS as usize]) {
            let (sent, bytes) = (&sent, call(1, 7, &write_args(&file, &large)));
            threads.spawn(move || {
                let mut stream = raw_from(listen, address);
                for piece in bytes.chunks(BLOCK) {
                    stream.write_all(piece).unwrap();
                    sent.fetch_add(1, Ordering::SeqCst);
                }
                let answer = answer(&mut stream).expect("all are done");
                assert_eq!(answer[20..28], [0; 8], "well done");
            });
        }
        settled(|| sent.load(Ordering::SeqCst));
        drop(frozen);
    });
    let most = told(pid, "VmHWM");
    println!("{} MiB at most", most >> 10);
    assert!(most < MOST_KIB, "{most} KiB for calls");
    assert_eq!(fs::read(export.join("file")).unwrap(), large);
    drop((server, volume));
}

#[test]
fn linux_mounts_it_and_goes_on_when_it_comes_back() {
    let Some(w) = World::start() else { return };
    let Some(image) = image() else { return };
    let machine = w.dir.path().join("machine");
    fs::create_dir(&machine).unwrap();
    let mut guest = Guest::boot(image, &machine);
    let mut server = w.server;
    let export = w.dir.path().join("export");
    // The guest's addresses and ports are translated.
    server.tell(|config| config.any_port = true);
    let (host, port) = ("10.0.2.2", server.config.listen.port());
    guest.ok("load nfs; mkdir /files");
    let options = format!(
        "vers=3,proto=tcp,port={port},mountport={port},mountproto=tcp,mountvers=3,nolock,hard,timeo=50,addr={host},mountaddr={host}"
    );
    let mount = format!(
        "mount -t nfs -o {options} {host}:{} /files",
        export.display()
    );
    until("the server to take it", || {
        (guest.run(&mount).1 == 0).then_some(())
    });
    guest.ok("cd /files && mkdir d && echo one > d/a && ln d/a d/b && ln -s a d/c && mv d/b e && chmod 4640 e && cat d/c");
    assert_eq!(fs::read_to_string(export.join("e")).unwrap(), "one\n");
    let made = fs::symlink_metadata(export.join("e")).unwrap();
    assert_eq!(
        (made.uid(), made.nlink(), made.mode() & 0o7777),
        (NOBODY, 2, 0o4640)
    );
    guest.ok("cd /files && mkdir many && for i in $(seq 1 300); do echo $i > many/$i; done");
    assert_eq!(guest.ok("ls /files/many | wc -l").trim(), "300");
    assert_eq!(
        guest.ok("cat /files/many/* | sort -n | tail -n 1").trim(),
        "300"
    );
    guest.ok("cd /files && rm -r many d && echo more >> e && test ! -e d");
    assert_eq!(fs::read_to_string(export.join("e")).unwrap(), "one\nmore\n");
    // What is written while the server is cut down is written, by the same open file.
    let work = "dd if=/dev/urandom of=/tmp/own bs=64k count=128 && dd if=/tmp/own of=/files/copy bs=64k conv=fsync && echo done";
    guest.ok(&format!("mkdir -p /tmp; ({work}) > /tmp/said 2>&1 &"));
    for _ in 0..3 {
        let size = || fs::metadata(export.join("copy")).map_or(0, |copy| copy.len());
        let before = size();
        until("something to be written", || {
            (size() > before || before == 8 << 20).then_some(())
        });
        server.restart();
    }
    until("all to be written", || {
        guest.ok("cat /tmp/said").contains("done").then_some(())
    });
    let own = guest.ok("sha256sum < /tmp/own");
    assert_eq!(guest.ok("sha256sum < /files/copy"), own);
    let hex: String = digest(&export.join("copy"))
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert!(own.starts_with(&hex), "{own} and here {hex}");
    guest.ok("cd /; umount /files");
}

#[test]
fn a_server_says_why_it_does_not_serve() {
    let Some(mut w) = World::start() else { return };
    // A second one with the same directory leaves the first one's word alone.
    let mut second = run(&w.server.dir);
    assert!(!second.wait().success());
    assert!(second.log_text().contains("another server runs"));
    let said = status(&w.server.dir).unwrap();
    assert_eq!(
        (said.pid as i32, said.error),
        (w.server.process.pid(), None)
    );
    let dir = w.dir.path().join("second");
    fs::create_dir(&dir).unwrap();
    let fails = |change: &dyn Fn(&mut batchai_node_agent::nfs::Config)| {
        let mut config = w.server.config.clone();
        config.listen.set_port(free_port());
        change(&mut config);
        write_config(&dir, &config);
        assert!(!run(&dir).wait().success());
        let said = status(&dir).unwrap();
        assert_eq!(said.address, None);
        said.error.unwrap()
    };
    let taken = w.server.config.listen;
    let error = fails(&|config| config.listen = taken);
    assert!(error.contains("cannot listen on 127.0.0.1"), "{error}");
    let error = fails(&|config| config.root = "/nowhere".into());
    assert!(error.contains("cannot open /nowhere"), "{error}");
    let error = fails(&|config| config.root = "/proc".into());
    assert!(error.contains("no lasting handles"), "{error}");
    let error = fails(&|config| config.squash_uid = 0);
    assert!(error.contains("squash_uid"), "{error}");
    // The key is nobody's business.
    let key = fs::metadata(w.server.dir.join("key")).unwrap();
    assert_eq!(key.mode() & 0o777, 0o600);
    w.server.process.signal(Signal::SIGTERM);
    assert!(w.server.process.wait().success());
}

/// A user namespace that has all users. Dropping it ends it.
struct Namespace(std::process::Child);

impl Namespace {
    fn new() -> Namespace {
        let holder = Command::new("unshare")
            .args(["--user", "sleep", "600"])
            .spawn();
        let namespace = Namespace(holder.unwrap());
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
        let pid = namespace.pid();
        until("the namespace to be there", || {
            (of(&pid) != of("self")).then_some(())
        });
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{map}"), "0 0 65536").unwrap();
        }
        namespace
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_server_says_which_right_it_lacks() {
    let Some(dir) = directory() else { return };
    let own = dir.path().join("server");
    fs::create_dir(&own).unwrap();
    let config = batchai_node_agent::nfs::Config {
        root: dir.path().join("export"),
        listen: SocketAddr::new(LOOPBACK, free_port()),
        generation: 7,
        clients: vec![LOOPBACK],
        squash_uid: NOBODY,
        squash_gid: NOBODY,
        squash_all: false,
        linger_s: 0,
        any_port: false,
        backend: "embedded".to_owned(),
    };
    write_config(&own, &config);
    let fails = |prefix: &[&str]| {
        assert!(!run_by(prefix, &own).wait().success(), "{prefix:?}");
        status(&own).unwrap().error.unwrap()
    };
    let said = fails(&["setpriv", "--bounding-set=-dac_read_search"]);
    assert!(said.contains("lacks CAP_DAC_READ_SEARCH:"), "{said}");
    let said = fails(&["setpriv", "--bounding-set=-setuid,-setgid"]);
    assert!(said.contains("lacks CAP_SETGID and CAP_SETUID:"), "{said}");
    let said = fails(&["unshare", "--user", "--map-root-user"]);
    assert!(said.contains("may not set its groups"), "{said}");
    let namespace = Namespace::new();
    let pid = namespace.pid();
    let said = fails(&["nsenter", "--user", "--target", &pid, "-S", "0", "-G", "0"]);
    assert!(said.contains("in a user namespace only"), "{said}");
}
