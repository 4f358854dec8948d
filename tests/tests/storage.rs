//! Shares, containers and buckets as volumes of jobs and clusters, and what stands in their stead: with real servers of each kind, which
//! clients that are not ours look at from the other side.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use batchai_tests::ensemble::{Ensemble, IN, SIZE, mounts_below};
use batchai_tests::process::{processes_of, until};
use batchai_tests::requirement;
use batchai_tests::storage::{
    BLOB_ACCOUNT, BLOB_KEY, BUCKET_KEY_ID, BUCKET_SECRET, Blobs, Buckets, SHARE_KEY, SHARE_USER,
    Shares, files_below,
};
use serde_json::{Value, json};

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";
/// Generous: programs are started for every mount, on a machine that may be busy.
const PATIENCE_S: &str = "10";
/// Key and signature of a kind that opens nothing.
const WRONG_KEY: &str = "d3JvbmdrZXltYXJrMTIzNDU2Nzg5MA==";

/// What these tests need beyond the servers.
fn able() -> bool {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        requirement::skip("only root mounts anything, and where the kernel has FUSE");
        return false;
    }
    let rclone = requirement::program("rclone", "apt-get install rclone");
    let fuse = requirement::program("fusermount", "apt-get install fuse3");
    rclone.is_some() && fuse.is_some()
}

fn ensemble(agents: &[&str]) -> Ensemble {
    let mut e = Ensemble::start(0);
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    e.agent_args = vec!["--mount-patience".into(), PATIENCE_S.into()];
    for name in agents {
        e.start_agent_as(name, USER);
    }
    e.until_alive(agents.len());
    e
}

fn alias(e: &Ensemble, name: &str, account: &str, of: &[&str], to: &[&str]) {
    let mut args = vec!["storage-alias", "create", "-n", name, "-a", account];
    args.extend(of);
    args.extend(to);
    e.ok(&args);
}

fn blob(container: &str, key: &str, path: &str) -> Value {
    json!({
        "accountName": BLOB_ACCOUNT,
        "containerName": container,
        "credentials": { "accountKey": key },
        "relativeMountPath": path,
    })
}

fn share(url: &str, key: &str, path: &str) -> Value {
    json!({
        "accountName": SHARE_USER,
        "azureFileUrl": url,
        "credentials": { "accountKey": key },
        "relativeMountPath": path,
    })
}

fn job(shares: &[Value], blobs: &[Value], command: &str) -> Value {
    json!({
        "nodeCount": 1,
        "mountVolumes": { "azureFileShares": shares, "azureBlobFileSystems": blobs },
        "customToolkitSettings": { "commandLine": command },
    })
}

/// A command that goes on when the test says so.
fn pausing(e: &Ensemble, command: &str) -> (String, PathBuf, PathBuf) {
    let dir = e.path().join("out");
    if !dir.exists() {
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let (begun, go) = (dir.join("begun"), dir.join("go"));
    let wait = format!(
        "{command}; touch {}; while [ ! -e {} ]; do sleep 0.02; done",
        begun.display(),
        go.display()
    );
    (wait, begun, go)
}

fn nothing_is_mounted(e: &Ensemble) {
    let left = mounts_below(&e.path().join("nodes"));
    assert!(left.is_empty(), "{left:?}");
    let left = processes_of(&e.path().join("nodes"));
    let served: Vec<_> = left
        .iter()
        .filter(|(_, line)| line.contains("rclone"))
        .collect();
    assert!(served.is_empty(), "{served:?}");
}

/// Asserts that a key is in no command line and no environment of any process, and in no file below a directory.
fn assert_hidden(key: &str, dir: &Path) {
    let shows = |bytes: &[u8]| bytes.windows(key.len()).any(|part| part == key.as_bytes());
    let own = std::process::id().to_string();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // What asks the servers is given the key by this test.
        if name == own || !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
            assert!(!shows(&bytes), "{name}: {file}");
        }
    }
    let mounted = mounts_below(dir);
    let mut dirs = vec![dir.to_owned()];
    let mut read = 0;
    while let Some(next) = dirs.pop() {
        let Ok(entries) = fs::read_dir(next) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_symlink() || mounted.contains(&path) {
                continue;
            }
            if path.is_dir() {
                dirs.push(path);
            } else if let Ok(bytes) = fs::read(&path) {
                read += 1;
                assert!(!shows(&bytes), "{}", path.display());
            }
        }
    }
    assert!(read > 10, "{read} files are not all of them");
}

/// Submits a job, of whose file nothing is left.
fn submit(e: &Ensemble, name: &str, properties: Value) {
    e.submit(name, properties);
    fs::remove_file(e.path().join(format!("{name}.json"))).unwrap();
}

fn error(job: &Value) -> (String, String) {
    let error = &job["errors"][0];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (text("code"), text("message"))
}

#[test]
fn a_container_is_there_for_the_job_and_what_it_writes_is_in_it() {
    let Some(blobs) = Blobs::start().filter(|_| able()) else {
        return;
    };
    blobs.create_container("data");
    blobs.put("data/in/a.txt", "given\n");
    let mut e = ensemble(&["a1"]);
    e.create_cluster(1);
    let of = ["--container", "data"];
    alias(&e, "lab", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    // Also by another name first, as checkpoints are, in a directory of its own, and much at the last moment.
    let (command, begun, go) = pausing(
        &e,
        "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs; mountpoint -q .; cat in/a.txt; id -u; mkdir -p out/deep; echo one > out/deep/one; \
         for i in 1 2 3 4 5; do echo $i > tmp; mv tmp model; done; echo first > log; echo second >> log",
    );
    let command =
        format!("{command}; head -c 30000000 /dev/zero > out/large; echo last > out/last");
    let mut whole = job(&[], &[blob("data", BLOB_KEY, "bfs")], &command);
    whole["stdOutErrPathPrefix"] = json!("$AZ_BATCHAI_JOB_MOUNT_ROOT/bfs/logs");
    submit(&e, "j", whole);
    until("the job to begin", || begun.exists().then_some(()));
    assert_hidden(BLOB_KEY, e.path());
    // Nor is it told to anybody.
    let shown = e.job("j");
    assert!(!shown.to_string().contains(BLOB_KEY), "{shown}");
    assert_eq!(
        shown["mountVolumes"]["azureBlobFileSystems"][0]["containerName"],
        "data"
    );
    fs::write(&go, "").unwrap();
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.log("j", "stdout.txt"), "given\n54321\n");
    nothing_is_mounted(&e);
    let get = |path: &str| blobs.get(&format!("data/{path}"));
    assert_eq!(get("out/deep/one").as_deref(), Some("one\n"));
    assert_eq!(get("model").as_deref(), Some("5\n"));
    assert_eq!(get("tmp"), None);
    assert_eq!(get("log").as_deref(), Some("first\nsecond\n"));
    assert_eq!(get("out/last").as_deref(), Some("last\n"));
    assert_eq!(get("out/large").map(|text| text.len()), Some(30_000_000));
    let segment = e.job("j")["jobOutputDirectoryPathSegment"].clone();
    let copy = format!("logs/{}/stdouterr/stdout.txt", segment.as_str().unwrap());
    assert_eq!(get(&copy).as_deref(), Some("given\n54321\n"));
    assert_hidden(BLOB_KEY, e.path());
    e.assert_nothing_left();
}

#[test]
fn a_share_is_there_for_the_job_with_its_modes_and_what_it_writes_is_in_it() {
    let Some(shares) = Shares::start().filter(|_| able()) else {
        return;
    };
    shares.put("a.txt", "given\n");
    let mut e = ensemble(&["a1"]);
    e.create_cluster(1);
    let mut volume = share(&shares.url(), SHARE_KEY, "deep/afs");
    volume["fileMode"] = json!("0640");
    volume["directoryMode"] = json!("0750");
    let (command, begun, go) = pausing(
        &e,
        "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT/deep/afs; cat a.txt; stat -c '%a %u %g' . a.txt; mkdir -p out; echo one > out/one; \
         for i in 1 2 3 4 5; do echo $i > tmp; mv tmp model; done; echo first > log; echo second >> log; rm a.txt",
    );
    submit(
        &e,
        "j",
        job(&[volume], &[], &format!("{command}; echo last > out/last")),
    );
    until("the job to begin", || begun.exists().then_some(()));
    assert_hidden(SHARE_KEY, e.path());
    let shown = e.job("j");
    assert!(!shown.to_string().contains(SHARE_KEY), "{shown}");
    fs::write(&go, "").unwrap();
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(
        e.log("j", "stdout.txt"),
        "given\n750 54321 54322\n640 54321 54322\n"
    );
    nothing_is_mounted(&e);
    let all = ["log", "model", "out/last", "out/one"];
    assert_eq!(files_below(&shares.dir()), all);
    assert_eq!(shares.get("model"), "5\n");
    assert_eq!(shares.get("log"), "first\nsecond\n");
    assert_eq!(shares.get("out/last"), "last\n");
    assert_hidden(SHARE_KEY, e.path());

    // Of a directory of it only that is there.
    let inner = share(&format!("{}/out", shares.url()), SHARE_KEY, "inner");
    submit(
        &e,
        "inner",
        job(&[inner], &[], "ls $AZ_BATCHAI_JOB_MOUNT_ROOT/inner"),
    );
    assert_eq!(e.wait("inner"), 0, "{}", e.job("inner"));
    assert_eq!(e.log("inner", "stdout.txt"), "last\none\n");
    e.assert_nothing_left();
}

#[test]
fn what_cannot_be_opened_is_said_as_the_original_did() {
    let (Some(blobs), Some(shares)) = (Blobs::start(), Shares::start().filter(|_| able())) else {
        return;
    };
    blobs.create_container("data");
    let mut e = ensemble(&["a1"]);
    e.create_cluster(1);
    for name in ["data", "missing"] {
        let of = ["--container", name];
        alias(&e, name, BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    }
    let of = ["--container", "nowhere"];
    alias(
        &e,
        "nowhere",
        BLOB_ACCOUNT,
        &of,
        &["--url", "http://127.0.0.1:1/x"],
    );
    let (url, missing) = (shares.url(), shares.url().replace("/data", "/missing"));
    let unmounted = |name: &str, volumes: Value, code: &str, said: &[&str]| {
        submit(&e, name, volumes);
        let job = e.until_job(name, "FAILED");
        let (known, message) = error(&job);
        assert_eq!(known, code, "{job}");
        for part in said {
            assert!(message.contains(part), "{name}: {message}");
        }
        assert!(
            !message.contains(WRONG_KEY) && !message.contains("sig="),
            "{message}"
        );
        nothing_is_mounted(&e);
    };
    let of_blob = |container: &str, key: &str| job(&[], &[blob(container, key, "m")], "true");
    let of_share = |url: &str, key: &str| job(&[share(url, key, "m")], &[], "true");
    let (afs, bfs) = ("AZFMountError", "BFSMountError");
    unmounted(
        "b1",
        of_blob("data", WRONG_KEY),
        bfs,
        &["/mounts/m", "the container data", "Authorization"],
    );
    unmounted(
        "b2",
        of_blob("missing", BLOB_KEY),
        bfs,
        &["the container missing", "nothing of that name"],
    );
    unmounted(
        "b3",
        of_blob("nowhere", BLOB_KEY),
        bfs,
        &["127.0.0.1:1", "refused"],
    );
    unmounted("b4", of_blob("data", "not base64"), bfs, &["base64"]);
    unmounted(
        "s1",
        of_share(&url, WRONG_KEY),
        afs,
        &["/mounts/m", "the share //127.0.0.1", "logon is invalid"],
    );
    unmounted(
        "s2",
        of_share(&missing, SHARE_KEY),
        afs,
        &["share name cannot be found"],
    );
    unmounted(
        "s3",
        of_share("https://127.0.0.1:1/data", SHARE_KEY),
        afs,
        &["127.0.0.1:1", "refused"],
    );
    // What is missing on a node is named with what has it.
    let path = e.path().join("empty").display().to_string();
    e.variables = vec![("PATH".into(), format!("{path}:/bin-without"))];
    drop(e);
}
