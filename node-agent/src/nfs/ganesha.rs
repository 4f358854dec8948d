//! A directory shared by NFS-Ganesha: versions 4.2 and 4.1, with locks, by `ganesha.nfsd` and its module for directories of this machine
//! (VFS).
//!
//! ```text
//! DIR/ganesha.conf     what it is told; written here from `config.json`, and read by it again at SIGHUP
//! DIR/ganesha/         who has what open or locked, so that clients have it again when it was cut down
//! DIR/ganesha.pid      its own
//! ```
//! This process starts it, and it ends with this process, however that ends. It asks the system's D-Bus nothing. Where a portmapper runs it
//! is told that version 4 is served; nobody needs that, and it is as well where none runs.
//!
//! Two things are less than with `Embedded`. Handles are not sealed: root of a client may guess those of other files of the same
//! file system, and reach what everybody may there. And it cannot listen at a loopback address of a machine that has no other.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use batchai_common::shutdown;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_util::sync::CancellationToken;

use super::backend::Backend;
use super::export::Export;
use super::{Config, ServerError, Status, follow, sys, tell};
use crate::words::Words;

/// What it is told.
pub const CONFIGURATION: &str = "ganesha.conf";
const PROGRAM: &str = "ganesha.nfsd";
/// Its module for directories of this machine.
const MODULE: &str = "libfsalvfs.so";
/// Who has not been heard for so long loses what it has locked.
const LEASE_S: u32 = 20;
/// After it was cut down nothing is opened anew for so long, or until all who had something open have it again: mostly at once.
const GRACE_S: u32 = 30;
/// It listens by then.
const START_MAX: Duration = Duration::from_secs(20);
/// One that was cut down lets go of its port by then.
const PORT_MAX: Duration = Duration::from_secs(5);
/// It has ended by then; who tells this process to end waits a little longer.
const END_MAX: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_millis(200);

/// NFS-Ganesha.
pub struct Ganesha;

impl Backend for Ganesha {
    fn name(&self) -> &'static str {
        "ganesha"
    }

    fn version(&self) -> i32 {
        4
    }

    fn ready(&self, address: IpAddr) -> Result<(), String> {
        if address.is_loopback() {
            return Err(format!("{address} is this machine's own"));
        }
        installed().map(drop)
    }

    fn serve(&self, dir: &Path, config: Config) -> Result<(), ServerError> {
        let installed = installed().map_err(|why| ServerError::Missing {
            backend: self.name(),
            why,
        })?;
        // It would only write down that it cannot share it.
        drop(Export::open(&config.root, dir, config.generation)?);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let stop = shutdown::on_signal()?;
            run(dir, config, &installed, &stop).await
        })
    }
}

/// Where it lies.
pub struct Installed {
    pub program: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
}

/// Where it lies on this machine; else what is missing.
pub fn installed() -> Result<Installed, String> {
    find(&env::var_os("PATH").unwrap_or_default())
}

/// The first one of a PATH, with the module that is installed with it.
fn find(path: &OsStr) -> Result<Installed, String> {
    let runs = |path: &PathBuf| {
        let found = fs::metadata(path);
        found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let directories = env::split_paths(path).filter(|dir| dir.is_absolute());
    let program = directories.map(|dir| dir.join(PROGRAM)).find(runs);
    let program = program.and_then(|found| found.canonicalize().ok());
    let program = program.ok_or_else(|| {
        format!(
            "there is no {PROGRAM} on the agent's PATH: install nfs-ganesha and nfs-ganesha-vfs"
        )
    })?;
    let prefix = program.parent().and_then(Path::parent);
    let prefix = prefix.unwrap_or(Path::new("/"));
    let mut places = vec![prefix.join("lib64"), prefix.join("lib")];
    // Debian has a directory there for each kind of machine.
    let below = fs::read_dir(prefix.join("lib")).into_iter().flatten();
    let mut below: Vec<_> = below.flatten().map(|entry| entry.path()).collect();
    below.sort();
    places.extend(below);
    let mut modules = places.into_iter().map(|place| place.join("ganesha"));
    let modules = modules.find(|place| place.join(MODULE).is_file());
    let modules = modules.ok_or_else(|| {
        let program = program.display();
        format!("{program} has no {MODULE}: install nfs-ganesha-vfs")
    })?;
    Ok(Installed { program, modules })
}

/// What it is told.
pub fn configuration(dir: &Path, config: &Config, modules: &Path) -> Result<String, ServerError> {
    let (address, port) = (config.listen.ip(), config.listen.port());
    let (modules, root, state) = (
        quoted(modules)?,
        quoted(&config.root)?,
        quoted(&state_of(dir))?,
    );
    let rights = format!(
        "Squash = Root_Squash; Anonymous_Uid = {}; Anonymous_Gid = {}; PrivilegedPort = {}; SecType = sys; Protocols = 4; Transports = TCP;",
        config.squash_uid, config.squash_gid, !config.any_port
    );
    let clients: Vec<_> = config.clients.iter().map(IpAddr::to_string).collect();
    let clients = match clients.is_empty() {
        true => String::new(),
        false => format!(
            "\n  CLIENT {{ Clients = {}; Access_Type = RW; {rights} }}",
            clients.join(", ")
        ),
    };
    // By the protocol clients may take servers of one owner for one: each is its own.
    let own = format!("batchai-{:016x}", config.generation);
    // Others of this machine change files too: what it knows of them is asked for anew each time.
    Ok(format!(
        "NFS_CORE_PARAM {{\n  Bind_addr = {address}; NFS_Port = {port}; Protocols = 4; Plugins_Dir = {modules};\n  \
           Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;\n}}\n\
         NFSV4 {{\n  Minor_Versions = 1, 2; Lease_Lifetime = {LEASE_S}; Grace_Period = {GRACE_S};\n  \
           RecoveryBackend = fs; RecoveryRoot = {state}; Delegations = false;\n  \
           Allow_Numeric_Owners = true; Only_Numeric_Owners = true;\n  \
           Server_Owner = \"{own}\"; Server_Scope = \"{own}\";\n}}\n\
         NFS_KRB5 {{ Active_krb5 = false; }}\n\
         MDCACHE {{ Dir_Chunk = 0; }}\n\
         EXPORT {{\n  Export_Id = 1; Path = {root}; Pseudo = \"/\"; Access_Type = None; {rights}\n  \
           Disable_ACL = true; Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }}{clients}\n}}\n\
         LOG {{ Default_Log_Level = EVENT; }}\n"
    ))
}

fn state_of(dir: &Path) -> PathBuf {
    dir.join("ganesha")
}

/// A path as its configuration takes it. What would mean something else there is refused.
fn quoted(path: &Path) -> Result<String, ServerError> {
    let text = path.to_str().filter(|text| {
        let special = |c: char| c.is_control() || c == '"' || c == '\\';
        !text.contains(special)
    });
    let text = text.ok_or_else(|| ServerError::Name(path.to_owned()))?;
    Ok(format!("\"{text}\""))
}

async fn run(
    dir: &Path,
    mut config: Config,
    installed: &Installed,
    stop: &CancellationToken,
) -> Result<(), ServerError> {
    let address = config.listen;
    let write = |config: &Config| {
        let path = dir.join(CONFIGURATION);
        let text = configuration(dir, config, &installed.modules)?;
        fs::write(&path, text).map_err(|error| ServerError::File { path, error })
    };
    write(&config)?;
    fs::create_dir_all(state_of(dir))?;
    is_free(address).await?;
    let mut server = Server::start(dir, installed)?;
    let begun = Instant::now();
    while TcpStream::connect_timeout(&address, START_MAX).is_err() {
        if stop.is_cancelled() {
            return server.end();
        }
        server.runs()?;
        if begun.elapsed() > START_MAX {
            let why = "it does not listen".to_owned();
            return Err(ServerError::Ended(why));
        }
        tokio::time::sleep(PAUSE).await;
    }
    tell(
        dir,
        &Status {
            pid: std::process::id(),
            address: Some(address),
            error: None,
        },
    )?;
    tracing::info!(%address, root = %config.root.display(), "files are served by NFS-Ganesha");
    // What came since the file was read is read once more.
    let mut last = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return server.end(),
            () = tokio::time::sleep(LOOK) => {}
        }
        server.runs()?;
        if let Some(told) = follow(dir, &config, &mut last)? {
            write(&told)?;
            config = told;
            server.signal(Signal::SIGHUP);
        }
    }
}

/// Waits until nobody listens at an address. It would say so in its log alone; and who is cut down has its port for a moment.
async fn is_free(address: SocketAddr) -> Result<(), ServerError> {
    let begun = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Ok(_) => return Ok(()),
            Err(error) if begun.elapsed() > PORT_MAX => {
                return Err(ServerError::Listen { address, error });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The process.
struct Server {
    child: Child,
    words: Words,
}

impl Server {
    fn start(dir: &Path, installed: &Installed) -> Result<Server, ServerError> {
        let mut command = Command::new(&installed.program);
        command
            .arg("-F")
            .arg("-f")
            .arg(dir.join(CONFIGURATION))
            .arg("-p")
            .arg(dir.join("ganesha.pid"))
            .args(["-L", "STDERR"])
            // Else by the second when it began, which is the same for two that begin together.
            .args(["-E", &fastrand::u32(1..).to_string()])
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            // The bus knows one of that name: that of the machine's administrator, who may have one.
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/dev/null")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        sys::end_together(&mut command);
        let mut child = command.spawn()?;
        let words = Words::passed_on(&mut child);
        Ok(Server { child, words })
    }

    /// An error with its last words where it does not run any more.
    fn runs(&mut self) -> Result<(), ServerError> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(ServerError::Ended(self.last_words(status))),
        }
    }

    fn last_words(&self, status: ExitStatus) -> String {
        let said = self.words.last();
        // Time, epoch, host, process, function, component, how bad it is, and what.
        let fatal = |line: &&str| line.contains(":FATAL :");
        let mut lines = said.lines().rev();
        let line = lines.clone().find(fatal).or_else(|| lines.next());
        let words = line.and_then(|line| line.rsplit(" :").next());
        format!("{status}: {}", words.unwrap_or_default().trim())
    }

    fn signal(&self, signal: Signal) {
        // It may have ended just now.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    fn end(mut self) -> Result<(), ServerError> {
        self.signal(Signal::SIGTERM);
        let end = Instant::now() + END_MAX;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > end {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &Path, mode: u32) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(PROGRAM), "").unwrap();
        fs::set_permissions(dir.join(PROGRAM), fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn it_is_found_with_its_module_or_what_is_missing_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (first, second) = (root.join("1/bin"), root.join("2/sbin"));
        let path = env::join_paths([Path::new("bin"), &first, &second]).unwrap();
        let missing = || find(&path).err().unwrap_or_default();
        assert!(missing().contains("no ganesha.nfsd"), "{}", missing());
        program(&first, 0o644);
        assert!(missing().contains("no ganesha.nfsd"), "{}", missing());
        program(&second, 0o755);
        assert!(missing().contains("no libfsalvfs.so"), "{}", missing());
        let modules = root.join("2/lib/x86_64-linux-gnu/ganesha");
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join(MODULE), "").unwrap();
        let found = find(&path).unwrap();
        assert_eq!(found.program, second.join(PROGRAM));
        assert_eq!(found.modules, modules);
        // The first one counts, also where it lacks something.
        program(&first, 0o755);
        assert!(missing().contains("1/bin"), "{}", missing());
    }

    #[test]
    fn it_is_told_who_may_come_and_nothing_else() {
        let config = |root: &str, clients: &[&str]| Config {
            root: root.into(),
            listen: "10.0.0.1:4000".parse().unwrap(),
            generation: 1,
            clients: clients.iter().map(|c| c.parse().unwrap()).collect(),
            squash_uid: 65_534,
            squash_gid: 65_533,
            squash_all: false,
            linger_s: 0,
            any_port: false,
            backend: "ganesha".into(),
        };
        let told = |config: &Config| configuration("/d".as_ref(), config, "/m".as_ref());
        let nobody = told(&config("/srv/a b", &[])).unwrap();
        assert!(!nobody.contains("CLIENT"), "{nobody}");
        let own = "Server_Owner = \"batchai-0000000000000001\"; Server_Scope = \"batchai-0000000000000001\";";
        assert!(nobody.contains(own), "{nobody}");
        for part in [
            "Bind_addr = 10.0.0.1; NFS_Port = 4000; Protocols = 4;",
            "Path = \"/srv/a b\"; Pseudo = \"/\"; Access_Type = None; Squash = Root_Squash; Anonymous_Uid = 65534; Anonymous_Gid = 65533; PrivilegedPort = true;",
            "RecoveryRoot = \"/d/ganesha\"",
            "Plugins_Dir = \"/m\"",
        ] {
            assert!(nobody.contains(part), "{part}: {nobody}");
        }
        let some = told(&config("/srv", &["10.0.0.2", "fe80::1"])).unwrap();
        let clients =
            "CLIENT { Clients = 10.0.0.2, fe80::1; Access_Type = RW; Squash = Root_Squash;";
        assert!(some.contains(clients), "{some}");
        for bad in ["/srv/\"; x", "/srv/\n", "/srv/\\"] {
            let refused = told(&config(bad, &[])).err().map(|why| why.to_string());
            assert!(refused.is_some_and(|why| why.contains("/srv")), "{bad:?}");
        }
    }
}
