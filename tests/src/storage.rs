//! Real servers of storage for tests, on loopback, with all that they keep in a directory of their own: an emulator of Azure's blobs, a
//! server of SMB shares, and one of S3 buckets. Each is also looked at by a client that is not ours.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::process::{free_port, sweep, until};
use crate::requirement;

/// The account of the emulator of Azure's blobs, which has no other, and its key.
pub const BLOB_ACCOUNT: &str = "devstoreaccount1";
pub const BLOB_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// The user of shares, and the password: as long as a key is, and nothing else looks like it.
pub const SHARE_USER: &str = "labstorage";
pub const SHARE_KEY: &str = "c2hhcmVrZXltYXJrMTIzNDU2Nzg5MGFiY2RlZg+/Zz09==";
/// The access key of buckets.
pub const BUCKET_KEY_ID: &str = "S3RVER";
pub const BUCKET_SECRET: &str = "S3RVER";

/// A server. Dropping it kills it.
pub struct Server {
    child: Child,
    pub dir: TempDir,
    pub port: u16,
}

impl Server {
    fn start(command: &mut Command, dir: TempDir, port: u16) -> Server {
        let log = fs::File::create(dir.path().join("log")).expect("a log");
        let errors = log.try_clone().expect("a second handle");
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .expect("it is on the PATH");
        let server = Server { child, dir, port };
        until("a server of storage to listen", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        server
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn settings(&self, text: &str) -> PathBuf {
        let path = self.dir.path().join("client.conf");
        fs::write(&path, text).expect("the directory is writable");
        path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // And what it has started.
        sweep(self.dir.path());
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            eprintln!("--- a server of storage\n{log}");
        }
    }
}

fn dir() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("batchai-storage-")
        .tempdir();
    dir.expect("a directory")
}

fn succeeded(command: &mut Command) -> Vec<u8> {
    let output = command.output().expect("it is on the PATH");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// The emulator of Azure's blobs.
pub struct Blobs(pub Server);

impl Blobs {
    /// `None` where it is missing.
    pub fn start() -> Option<Blobs> {
        let hint = "npm install azurite, and its node_modules/.bin on the PATH";
        let program = requirement::program("azurite-blob", hint)?;
        let (dir, port) = (dir(), free_port());
        let mut command = Command::new(program);
        command
            .args(["--blobHost", "127.0.0.1", "--blobPort"])
            .arg(port.to_string())
            .arg("--location")
            .arg(dir.path())
            .args(["--silent", "--skipApiVersionCheck", "--disableTelemetry"]);
        Some(Blobs(Server::start(&mut command, dir, port)))
    }

    /// What an alias names.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/{BLOB_ACCOUNT}", self.0.port)
    }

    /// Runs a script of python with the address and the key: a client of blobs of its own, in a few lines.
    fn ask(&self, method: &str, path: &str, query: &str, body: &str) -> (u16, String) {
        let port = self.0.port.to_string();
        let args = [&port, BLOB_ACCOUNT, BLOB_KEY, method, path, query, body];
        let mut child = Command::new("python3")
            .args(["-c", CLIENT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is python3");
        // Another test may be looking for the key in command lines.
        let mut stdin = child.stdin.take().expect("it is piped");
        let asked = serde_json::json!(args).to_string();
        stdin.write_all(asked.as_bytes()).expect("it reads");
        drop(stdin);
        let output = child.wait_with_output().expect("it is our child");
        assert!(output.status.success(), "{method} {path}");
        let output = output.stdout;
        let text = String::from_utf8(output).expect("tests write text");
        let (status, body) = text.split_once('\n').expect("a status comes first");
        (status.parse().expect("a number"), body.to_owned())
    }

    pub fn create_container(&self, name: &str) {
        let made = self.ask("PUT", name, "restype=container", "");
        assert_eq!(made.0, 201, "{made:?}");
    }

    pub fn delete_container(&self, name: &str) {
        let gone = self.ask("DELETE", name, "restype=container", "");
        assert_eq!(gone.0, 202, "{gone:?}");
    }

    pub fn put(&self, path: &str, content: &str) {
        let put = self.ask("PUT", path, "", content);
        assert_eq!(put.0, 201, "{put:?}");
    }

    pub fn get(&self, path: &str) -> Option<String> {
        let (status, body) = self.ask("GET", path, "", "");
        (status == 200).then_some(body)
    }
}

/// Signs requests as the documentation of the protocol has it, and knows nothing of what is under test.
const CLIENT: &str = r#"
import base64, email.utils, hashlib, hmac, json, sys, urllib.error, urllib.request
port, account, key, method, path, query, body = json.load(sys.stdin)
body = body.encode()
headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2018-11-09"}
if method == "PUT" and not query:
    headers["x-ms-blob-type"] = "BlockBlob"
kind = "application/octet-stream" if method == "PUT" else ""
length = str(len(body)) if body else ""
named = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
resource = f"/{account}/{account}/{path}" + "".join("\n" + part.replace("=", ":") for part in query.split("&") if part)
signed = "\n".join([method, "", "", length, "", kind, "", "", "", "", "", "", named]) + resource
tag = base64.b64encode(hmac.new(base64.b64decode(key), signed.encode(), hashlib.sha256).digest()).decode()
headers["Authorization"] = f"SharedKey {account}:{tag}"
if kind:
    headers["Content-Type"] = kind
url = f"http://127.0.0.1:{port}/{account}/{path}" + ("?" + query if query else "")
request = urllib.request.Request(url, method=method, headers=headers, data=body if method == "PUT" else None)
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status)
sys.stdout.write(answer.read().decode())
"#;

/// A server of SMB shares.
pub struct Shares(pub Server);

impl Shares {
    /// With one share, `data`; the same, where nothing travels that is not sealed, is `sealed`. `None` where it is missing.
    pub fn start() -> Option<Shares> {
        let smbd = PathBuf::from("/usr/sbin/smbd");
        if !smbd.exists() {
            requirement::skip("there is no /usr/sbin/smbd: apt-get install samba");
            return None;
        }
        requirement::program("smbclient", "apt-get install smbclient")?;
        let (dir, port) = (dir(), free_port());
        let at = dir.path().display().to_string();
        for name in ["state", "cache", "private", "lock", "pid", "rpc", "share"] {
            fs::create_dir(dir.path().join(name)).expect("an empty directory");
        }
        let settings = dir.path().join("smb.conf");
        let text = format!(
            "[global]\ninterfaces = lo\nbind interfaces only = yes\nsmb ports = {port}\nserver role = standalone server\n\
             disable netbios = yes\ndisable spoolss = yes\nload printers = no\nstate directory = {at}/state\n\
             cache directory = {at}/cache\nprivate dir = {at}/private\nlock directory = {at}/lock\npid directory = {at}/pid\n\
             ncalrpc dir = {at}/rpc\nlog file = {at}/smbd.log\npassdb backend = tdbsam:{at}/private/passdb.tdb\n\
             username map = {at}/users\n[data]\npath = {at}/share\nread only = no\n\
             [sealed]\npath = {at}/share\nread only = no\nsmb encrypt = required\n"
        );
        fs::write(&settings, text).expect("the directory is writable");
        // It has users of this machine only.
        fs::write(dir.path().join("users"), format!("root = {SHARE_USER}\n")).expect("as above");
        let mut child = Command::new("smbpasswd")
            .arg("-c")
            .arg(&settings)
            .args(["-s", "-a", "root"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("it comes with the server");
        let mut stdin = child.stdin.take().expect("it is piped");
        write!(stdin, "{SHARE_KEY}\n{SHARE_KEY}\n").expect("it reads");
        drop(stdin);
        assert!(child.wait().expect("it is our child").success());
        let mut command = Command::new(smbd);
        command.args(["--foreground", "--no-process-group", "--debug-stdout", "-s"]);
        command.arg(settings);
        Some(Shares(Server::start(&mut command, dir, port)))
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}/data", self.0.port)
    }

    fn client(&self, command: &str) -> Vec<u8> {
        let credentials = self.0.settings(&format!(
            "username = {SHARE_USER}\npassword = {SHARE_KEY}\n"
        ));
        succeeded(
            Command::new("smbclient")
                .arg("-s")
                .arg(self.0.dir.path().join("smb.conf"))
                .args(["-p", &self.0.port.to_string(), "-A"])
                .arg(credentials)
                .args(["//127.0.0.1/data", "-c", command]),
        )
    }

    pub fn put(&self, name: &str, content: &str) {
        let from = self.0.dir.path().join("given");
        fs::write(&from, content).expect("the directory is writable");
        self.client(&format!("put {} {name}", from.display()));
    }

    pub fn get(&self, name: &str) -> String {
        let to = self.0.dir.path().join("got");
        self.client(&format!("get {name} {}", to.display()));
        fs::read_to_string(to).expect("it was got")
    }

    /// Where the share lies.
    pub fn dir(&self) -> PathBuf {
        self.0.dir.path().join("share")
    }
}

/// A server of S3 buckets.
pub struct Buckets(pub Server);

impl Buckets {
    /// With one bucket. `None` where it is missing.
    pub fn start(bucket: &str) -> Option<Buckets> {
        let hint = "npm install s3rver, and its node_modules/.bin on the PATH";
        let program = requirement::program("s3rver", hint)?;
        let (dir, port) = (dir(), free_port());
        let mut command = Command::new(program);
        command.arg("-d").arg(dir.path()).args(["-a", "127.0.0.1"]);
        command.args(["-p", &port.to_string(), "--configure-bucket", bucket]);
        Some(Buckets(Server::start(&mut command, dir, port)))
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.0.port)
    }

    /// Runs `rclone` with the key of the bucket, named `r`.
    pub fn client(&self, args: &[&str]) -> String {
        let url = self.url();
        let settings = self.0.settings(&format!(
            "[r]\ntype = s3\nprovider = Other\nendpoint = {url}\nforce_path_style = true\naccess_key_id = {BUCKET_KEY_ID}\n\
             secret_access_key = {BUCKET_SECRET}\n"
        ));
        let mut command = Command::new("rclone");
        command.arg("--config").arg(settings).args(args);
        command.env_remove("AWS_CA_BUNDLE").stdin(Stdio::null());
        String::from_utf8(succeeded(&mut command)).expect("tests write text")
    }
}

/// The files that a server of shares keeps below a directory, by their paths in it.
pub fn files_below(dir: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).expect("a directory") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => dirs.push(path),
                false => {
                    let below = path.strip_prefix(dir).expect("it lies below");
                    files.push(below.display().to_string());
                }
            }
        }
    }
    files.sort();
    files
}
