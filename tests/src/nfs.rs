//! The NFS server of the node agent as a process, and a client of it that is not ours: `nfs3_client` speaks the protocol, this asks one
//! question after the other.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use batchai_node_agent::nfs::{Config, Status};
use nfs3_client::io::{AsyncRead, AsyncWrite};
use nfs3_client::nfs3_types::mount::dirpath;
use nfs3_client::nfs3_types::nfs3::*;
use nfs3_client::nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_client::nfs3_types::xdr_codec::Opaque;
use nfs3_client::{MountClient, Nfs3Client, RpcError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;

use crate::process::{PATIENCE, Process, free_port, until};

pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub const NOBODY: u32 = 65534;

/// A server with its directory. Dropping it kills it.
pub struct Server {
    pub dir: PathBuf,
    pub config: Config,
    pub process: Process,
}

impl Server {
    /// Serves a directory to loopback, with its own files in `dir`.
    pub fn start(dir: &Path, root: &Path) -> Server {
        let config = Config {
            root: root.to_owned(),
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
        Server::start_with(dir, config)
    }

    pub fn start_with(dir: &Path, config: Config) -> Server {
        fs::create_dir_all(dir).expect("it can be made");
        write_config(dir, &config);
        let process = run(dir);
        let server = Server {
            dir: dir.to_owned(),
            config,
            process,
        };
        server.until_it_serves();
        server
    }

    fn until_it_serves(&self) {
        until("the server to say that it serves", || {
            let status = status(&self.dir)?;
            let own = status.pid as i32 == self.process.pid();
            (own && status.address == Some(self.config.listen)).then_some(())
        });
    }

    /// Cuts it down and starts another one.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = run(&self.dir);
        self.until_it_serves();
    }

    /// Has it be told something else.
    pub fn tell(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
        write_config(&self.dir, &self.config);
    }

    /// A client of loopback.
    pub fn client(&self, uid: u32, gid: u32) -> Client {
        let as_client = Client::connect(self.config.listen, LOOPBACK, "/", (uid, gid, &[]));
        as_client.expect("it is a client")
    }
}

pub fn run(dir: &Path) -> Process {
    run_by(&[], dir)
}

/// Starts one by another program, which becomes it.
pub fn run_by(prefix: &[&str], dir: &Path) -> Process {
    let prefix: Vec<_> = prefix.iter().map(|part| (*part).to_owned()).collect();
    let args = ["node-agent", "nfs-server", "--dir"].map(PathBuf::from);
    let args = args.into_iter().chain([dir.to_owned()]);
    Process::start_by(&prefix, args, &[], &dir.join("log"))
}

pub fn write_config(dir: &Path, config: &Config) {
    let draft = dir.join("config.json.new");
    let text = serde_json::to_vec(config).expect("it is JSON");
    fs::write(&draft, text).expect("the disk has room");
    fs::rename(&draft, dir.join("config.json")).expect("it is renamed in its place");
}

/// What a server says of itself.
pub fn status(dir: &Path) -> Option<Status> {
    serde_json::from_slice(&fs::read(dir.join("status.json")).ok()?).ok()
}

/// A user with its group and further ones.
pub type User<'a> = (u32, u32, &'a [u32]);
pub type Handle = nfs_fh3;

/// Why there is no answer, or not the one that was asked for.
#[derive(Debug)]
pub enum Failure {
    Status(nfsstat3),
    Gone(String),
}

impl Failure {
    /// # Panics
    /// Where there was no answer.
    pub fn status(self) -> nfsstat3 {
        match self {
            Failure::Status(status) => status,
            Failure::Gone(why) => panic!("no answer: {why}"),
        }
    }
}

impl From<RpcError> for Failure {
    fn from(error: RpcError) -> Failure {
        Failure::Gone(error.to_string())
    }
}

fn result<T, E>(result: Nfs3Result<T, E>) -> Result<T, Failure> {
    match result {
        Nfs3Result::Ok(value) => Ok(value),
        Nfs3Result::Err((status, _)) => Err(Failure::Status(status)),
    }
}

/// Connects from a port that only root may use.
pub async fn connect(server: SocketAddr, from: IpAddr) -> io::Result<TcpStream> {
    loop {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        let own = SocketAddr::new(from, fastrand::u16(512..1024));
        match socket.bind(own) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => continue,
            Err(error) => return Err(error),
        }
        match socket.connect(server).await {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            connected => return connected,
        }
    }
}

pub fn credentials((uid, gid, groups): User) -> opaque_auth<'static> {
    opaque_auth::auth_unix(&auth_unix {
        stamp: 1,
        machinename: Opaque::owned(b"test".to_vec()),
        uid,
        gid,
        gids: groups.to_vec(),
    })
}

/// A connection that ends, and is not waited for without end: the client would ask one that is closed for ever.
struct Connection(TcpStream);

impl AsyncRead for Connection {
    async fn async_read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match tokio::time::timeout(PATIENCE, self.0.read(buf)).await {
            Ok(Ok(0)) if !buf.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl AsyncWrite for Connection {
    async fn async_write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf).await
    }
}

/// A client with its own connection.
pub struct Client {
    runtime: Runtime,
    nfs: Nfs3Client<Connection>,
    pub root: Handle,
}

/// `Nfs3Option` from an `Option`.
macro_rules! option {
    ($value:expr) => {
        match $value {
            Some(value) => Nfs3Option::Some(value),
            None => Nfs3Option::None,
        }
    };
}

pub fn settings(mode: Option<u32>, size: Option<u64>) -> sattr3 {
    sattr3 {
        mode: option!(mode),
        size: option!(size),
        ..sattr3::default()
    }
}

fn place<'a>(dir: &Handle, name: &'a [u8]) -> diropargs3<'a> {
    diropargs3 {
        dir: dir.clone(),
        name: name.into(),
    }
}

/// One page of a directory.
pub struct Page {
    /// Each with where the next one is.
    pub names: Vec<(Vec<u8>, u64)>,
    pub end: bool,
}

impl Client {
    /// Mounts a path.
    pub fn connect(
        server: SocketAddr,
        from: IpAddr,
        path: &str,
        user: User,
    ) -> Result<Client, String> {
        Client::connect_to(server, server.port(), from, path, user)
    }

    /// The same where mounts are asked for at a port of their own.
    pub fn connect_to(
        server: SocketAddr,
        mount: u16,
        from: IpAddr,
        path: &str,
        user: User,
    ) -> Result<Client, String> {
        let mount = SocketAddr::new(server.ip(), mount);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let (nfs, root) = runtime.block_on(async {
            let text = |error: &dyn std::fmt::Display| error.to_string();
            let none = opaque_auth::default;
            let io = connect(mount, from).await.map_err(|e| text(&e))?;
            let mut mount = MountClient::new_with_auth(Connection(io), credentials(user), none());
            let path = dirpath(Opaque::borrowed(path.as_bytes()));
            let mounted = mount.mnt(path).await.map_err(|e| text(&e))?;
            let io = connect(server, from).await.map_err(|e| text(&e))?;
            let nfs = Nfs3Client::new_with_auth(Connection(io), credentials(user), none());
            let root = nfs_fh3 {
                data: mounted.fhandle.0,
            };
            Ok::<_, String>((nfs, root))
        })?;
        Ok(Client { runtime, nfs, root })
    }

    pub fn attributes(&mut self, object: &Handle) -> Result<fattr3, Failure> {
        let args = GETATTR3args {
            object: object.clone(),
        };
        let answer = self.runtime.block_on(self.nfs.getattr(&args))?;
        Ok(result(answer)?.obj_attributes)
    }

    pub fn lookup(&mut self, dir: &Handle, name: &[u8]) -> Result<Handle, Failure> {
        let args = LOOKUP3args {
            what: place(dir, name),
        };
        let answer = self.runtime.block_on(self.nfs.lookup(&args))?;
        Ok(result(answer)?.object)
    }

    pub fn create(&mut self, dir: &Handle, name: &[u8], mode: u32) -> Result<Handle, Failure> {
        self.create_how(dir, name, createhow3::GUARDED(settings(Some(mode), None)))
    }

    pub fn create_how(
        &mut self,
        dir: &Handle,
        name: &[u8],
        how: createhow3,
    ) -> Result<Handle, Failure> {
        let args = CREATE3args {
            where_: place(dir, name),
            how,
        };
        let answer = self.runtime.block_on(self.nfs.create(&args))?;
        Ok(result(answer)?.obj.unwrap())
    }

    pub fn mkdir(&mut self, dir: &Handle, name: &[u8], mode: u32) -> Result<Handle, Failure> {
        self.mkdir_with(dir, name, settings(Some(mode), None))
    }

    pub fn mkdir_with(
        &mut self,
        dir: &Handle,
        name: &[u8],
        attributes: sattr3,
    ) -> Result<Handle, Failure> {
        let args = MKDIR3args {
            where_: place(dir, name),
            attributes,
        };
        let answer = self.runtime.block_on(self.nfs.mkdir(&args))?;
        Ok(result(answer)?.obj.unwrap())
    }

    pub fn symlink(&mut self, dir: &Handle, name: &[u8], to: &[u8]) -> Result<Handle, Failure> {
        self.symlink_with(dir, name, to, sattr3::default())
    }

    pub fn symlink_with(
        &mut self,
        dir: &Handle,
        name: &[u8],
        to: &[u8],
        symlink_attributes: sattr3,
    ) -> Result<Handle, Failure> {
        let args = SYMLINK3args {
            where_: place(dir, name),
            symlink: symlinkdata3 {
                symlink_attributes,
                symlink_data: nfspath3(Opaque::borrowed(to)),
            },
        };
        let answer = self.runtime.block_on(self.nfs.symlink(&args))?;
        Ok(result(answer)?.obj.unwrap())
    }

    pub fn readlink(&mut self, link: &Handle) -> Result<Vec<u8>, Failure> {
        let args = READLINK3args {
            symlink: link.clone(),
        };
        let answer = self.runtime.block_on(self.nfs.readlink(&args))?;
        Ok(result(answer)?.data.0.to_vec())
    }

    pub fn write(
        &mut self,
        file: &Handle,
        offset: u64,
        data: &[u8],
        stable: stable_how,
    ) -> Result<WRITE3resok, Failure> {
        let args = WRITE3args {
            file: file.clone(),
            offset,
            count: data.len() as u32,
            stable,
            data: Opaque::borrowed(data),
        };
        let answer = self.runtime.block_on(self.nfs.write(&args))?;
        result(answer)
    }

    pub fn commit(&mut self, file: &Handle) -> Result<writeverf3, Failure> {
        let args = COMMIT3args {
            file: file.clone(),
            offset: 0,
            count: 0,
        };
        let answer = self.runtime.block_on(self.nfs.commit(&args))?;
        Ok(result(answer)?.verf)
    }

    /// The data, and whether it reaches to the end.
    pub fn read(
        &mut self,
        file: &Handle,
        offset: u64,
        count: u32,
    ) -> Result<(Vec<u8>, bool), Failure> {
        let args = READ3args {
            file: file.clone(),
            offset,
            count,
        };
        let answer = result(self.runtime.block_on(self.nfs.read(&args))?)?;
        assert_eq!(answer.count as usize, answer.data.len());
        Ok((answer.data.into_owned(), answer.eof))
    }

    pub fn remove(&mut self, dir: &Handle, name: &[u8]) -> Result<(), Failure> {
        let args = REMOVE3args {
            object: place(dir, name),
        };
        result(self.runtime.block_on(self.nfs.remove(&args))?)?;
        Ok(())
    }

    pub fn rmdir(&mut self, dir: &Handle, name: &[u8]) -> Result<(), Failure> {
        let args = RMDIR3args {
            object: place(dir, name),
        };
        result(self.runtime.block_on(self.nfs.rmdir(&args))?)?;
        Ok(())
    }

    pub fn rename(&mut self, from: (&Handle, &[u8]), to: (&Handle, &[u8])) -> Result<(), Failure> {
        let args = RENAME3args {
            from: place(from.0, from.1),
            to: place(to.0, to.1),
        };
        result(self.runtime.block_on(self.nfs.rename(&args))?)?;
        Ok(())
    }

    pub fn link(&mut self, file: &Handle, dir: &Handle, name: &[u8]) -> Result<(), Failure> {
        let args = LINK3args {
            file: file.clone(),
            link: place(dir, name),
        };
        result(self.runtime.block_on(self.nfs.link(&args))?)?;
        Ok(())
    }

    /// Only if it was changed last at a time, where one is given.
    pub fn set(
        &mut self,
        object: &Handle,
        new: sattr3,
        guard: Option<nfstime3>,
    ) -> Result<wcc_data, Failure> {
        let args = SETATTR3args {
            object: object.clone(),
            new_attributes: new,
            guard: option!(guard),
        };
        let answer = self.runtime.block_on(self.nfs.setattr(&args))?;
        Ok(result(answer)?.obj_wcc)
    }

    /// What of some kinds of access is granted.
    pub fn access(&mut self, object: &Handle, access: u32) -> Result<u32, Failure> {
        let args = ACCESS3args {
            object: object.clone(),
            access,
        };
        let answer = self.runtime.block_on(self.nfs.access(&args))?;
        Ok(result(answer)?.access)
    }

    pub fn space(&mut self) -> Result<FSSTAT3resok, Failure> {
        let args = FSSTAT3args {
            fsroot: self.root.clone(),
        };
        result(self.runtime.block_on(self.nfs.fsstat(&args))?)
    }

    /// Makes what is no file, directory or link.
    pub fn special(
        &mut self,
        dir: &Handle,
        name: &[u8],
        what: mknoddata3,
    ) -> Result<Handle, Failure> {
        let args = MKNOD3args {
            where_: place(dir, name),
            what,
        };
        let answer = self.runtime.block_on(self.nfs.mknod(&args))?;
        Ok(result(answer)?.obj.unwrap())
    }

    /// A page of a directory, with attributes or without.
    pub fn page(&mut self, dir: &Handle, cookie: u64, plus: bool) -> Result<Page, Failure> {
        let cookieverf = cookieverf3::default();
        if !plus {
            let args = READDIR3args {
                dir: dir.clone(),
                cookie,
                cookieverf,
                count: 8 << 10,
            };
            let reply = result(self.runtime.block_on(self.nfs.readdir(&args))?)?.reply;
            let entries = reply.entries.into_inner().into_iter();
            return Ok(Page {
                names: entries.map(|e| (e.name.0.to_vec(), e.cookie)).collect(),
                end: reply.eof,
            });
        }
        let args = READDIRPLUS3args {
            dir: dir.clone(),
            cookie,
            cookieverf,
            dircount: 8 << 10,
            maxcount: 32 << 10,
        };
        let reply = result(self.runtime.block_on(self.nfs.readdirplus(&args))?)?.reply;
        let entries = reply.entries.into_inner().into_iter();
        Ok(Page {
            names: entries.map(|e| (e.name.0.to_vec(), e.cookie)).collect(),
            end: reply.eof,
        })
    }

    /// The names in a directory, without those that all have.
    pub fn names(&mut self, dir: &Handle) -> Result<Vec<Vec<u8>>, Failure> {
        let (mut names, mut cookie) = (Vec::new(), 0);
        loop {
            let page = self.page(dir, cookie, true)?;
            cookie = page.names.last().map_or(cookie, |(_, cookie)| *cookie);
            let own = page.names.into_iter().map(|(name, _)| name);
            names.extend(own.filter(|name| name != b"." && name != b".."));
            if page.end {
                return Ok(names);
            }
        }
    }
}
