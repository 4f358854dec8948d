//! Shares, containers and buckets as volumes of jobs and clusters, and what stands in their stead: with real servers of each kind, which
//! clients that are not ours look at from the other side.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use batchai_tests::ensemble::{Ensemble, SIZE, mounts_below, unmount_below};
use batchai_tests::process::{processes_of, until};
use batchai_tests::requirement;
use batchai_tests::storage::{
    BLOB_ACCOUNT, BLOB_KEY, BUCKET_KEY_ID, BUCKET_SECRET, Blobs, Buckets, SHARE_KEY, SHARE_USER,
    Shares, files_below,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";
/// Generous: programs are started for every mount, on a machine that may be busy.
const PATIENCE_S: u64 = 10;
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

/// One agent, a cluster with it where that is wanted, and a directory that everybody may write to.
fn ensemble(patience_s: u64, cluster: bool) -> Ensemble {
    furnished(Ensemble::start(0), patience_s, cluster)
}

fn furnished(mut e: Ensemble, patience_s: u64, cluster: bool) -> Ensemble {
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let out = e.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
    e.agent_args = vec!["--mount-patience".into(), patience_s.to_string()];
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    if cluster {
        e.create_cluster(1);
    }
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
    let (begun, go) = (e.path().join("out/begun"), e.path().join("out/go"));
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
    let mut e = ensemble(PATIENCE_S, true);
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
    let mut e = ensemble(PATIENCE_S, true);
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

/// Answers whoever speaks TLS as servers do that do not.
fn speaks_no_tls(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut first = [0; 1];
            let _ = stream.read(&mut first);
            let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
        }
    });
}

#[test]
fn a_share_and_a_container_are_there_for_preparation_and_job_and_not_for_the_next() {
    let (Some(blobs), Some(shares)) = (Blobs::start(), Shares::start().filter(|_| able())) else {
        return;
    };
    blobs.create_container("data");
    blobs.put("data/given", "blob\n");
    shares.put("given", "share\n");
    let mut e = ensemble(PATIENCE_S, true);
    let of = ["--container", "data"];
    alias(&e, "lab", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    let both = "cat $AZ_BATCHAI_JOB_MOUNT_ROOT/afs/given $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs/given";
    let mut whole = job(
        &[share(&shares.url(), SHARE_KEY, "afs")],
        &[blob("data", BLOB_KEY, "bfs")],
        &format!(
            "{both} $AZ_BATCHAI_JOB_MOUNT_ROOT/afs/prepared; echo job > $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs/out"
        ),
    );
    let prepare = format!("{both}; echo prepared > $AZ_BATCHAI_JOB_MOUNT_ROOT/afs/prepared");
    whole["jobPreparation"] = json!({ "commandLine": prepare });
    submit(&e, "j", whole);
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.log("j", "stdout-job_prep.txt"), "share\nblob\n");
    assert_eq!(e.log("j", "stdout.txt"), "share\nblob\nprepared\n");
    assert_eq!(shares.get("prepared"), "prepared\n");
    assert_eq!(blobs.get("data/out").as_deref(), Some("job\n"));
    nothing_is_mounted(&e);
    // The next job on that node has its own mounts, and these are not among them.
    let next = "ls -A $AZ_BATCHAI_JOB_MOUNT_ROOT; grep -c \"$AZ_BATCHAI_JOB_TEMP_DIR\" /proc/self/mountinfo";
    submit(&e, "next", job(&[], &[], &format!("{next}; true")));
    assert_eq!(e.wait("next"), 0, "{}", e.job("next"));
    assert_eq!(e.log("next", "stdout.txt"), "0\n");
    e.assert_nothing_left();
}

#[test]
fn what_cannot_be_opened_is_said_as_the_original_did() {
    let (Some(blobs), Some(shares)) = (Blobs::start(), Shares::start().filter(|_| able())) else {
        return;
    };
    blobs.create_container("data");
    let mut e = ensemble(PATIENCE_S, true);
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
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/{BLOB_ACCOUNT}", plain.local_addr().unwrap());
    speaks_no_tls(plain);
    let of = ["--container", "plain"];
    alias(&e, "plain", BLOB_ACCOUNT, &of, &["--url", &url]);
    let (url, missing) = (shares.url(), shares.url().replace("/data", "/missing"));
    let unmounted = |e: &Ensemble, name: &str, volumes: Value, code: &str, said: &[&str]| {
        submit(e, name, volumes);
        let job = e.until_job(name, "FAILED");
        let (known, message) = error(&job);
        assert_eq!(known, code, "{job}");
        for part in said {
            assert!(message.contains(part), "{name}: {message}");
        }
        let said = format!("{message}{job}");
        assert!(
            !said.contains(WRONG_KEY) && !said.contains("sig="),
            "{said}"
        );
        nothing_is_mounted(e);
    };
    let of_blob = |container: &str, key: &str| job(&[], &[blob(container, key, "m")], "true");
    let of_share = |url: &str, key: &str| job(&[share(url, key, "m")], &[], "true");
    let (afs, bfs) = ("AZFMountError", "BFSMountError");
    unmounted(
        &e,
        "b1",
        of_blob("data", WRONG_KEY),
        bfs,
        &["/mounts/m", "the container data", "Authorization"],
    );
    unmounted(
        &e,
        "b2",
        of_blob("missing", BLOB_KEY),
        bfs,
        &["the container missing", "nothing of that name"],
    );
    unmounted(
        &e,
        "b3",
        of_blob("nowhere", BLOB_KEY),
        bfs,
        &["127.0.0.1:1", "refused"],
    );
    unmounted(&e, "b4", of_blob("data", "not base64"), bfs, &["base64"]);
    unmounted(
        &e,
        "s1",
        of_share(&url, WRONG_KEY),
        afs,
        &["/mounts/m", "the share //127.0.0.1", "logon is invalid"],
    );
    unmounted(
        &e,
        "s2",
        of_share(&missing, SHARE_KEY),
        afs,
        &["share name cannot be found"],
    );
    unmounted(
        &e,
        "s3",
        of_share("https://127.0.0.1:1/data", SHARE_KEY),
        afs,
        &["127.0.0.1:1", "refused"],
    );
    // What rclone says after a while has the whole URL, and what opens the container is a part of that.
    e.agents.get_mut("a1").unwrap().kill();
    e.agent_args = vec!["--mount-patience".into(), "100".into()];
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    let said = ["HTTP response to HTTPS client", "?[hidden]"];
    unmounted(&e, "b5", of_blob("plain", BLOB_KEY), bfs, &said);
    // A program that is missing is named with the package that has it.
    let only = e.path().join("bin");
    fs::create_dir(&only).unwrap();
    for agent in e.agents.values_mut() {
        agent.kill();
    }
    e.variables = vec![("PATH".into(), only.display().to_string())];
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    submit(&e, "none", of_share(&url, SHARE_KEY));
    let job = e.until_job("none", "FAILED");
    let (code, message) = error(&job);
    assert_eq!(code, afs, "{job}");
    assert!(
        message.contains("rclone is not installed: apt-get install rclone"),
        "{message}"
    );
    e.assert_nothing_left();
}

#[test]
fn what_stands_in_their_stead_is_mounted_and_the_files_of_the_original_run_as_they_are() {
    let (Some(buckets), Some(shares)) =
        (Buckets::start("train"), Shares::start().filter(|_| able()))
    else {
        return;
    };
    let mut e = ensemble(PATIENCE_S, true);
    let lab = e.path().join("lab");
    for dir in [lab.clone(), lab.join("logs")] {
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    fs::write(lab.join("given"), "by path\n").unwrap();
    let (account, path) = ("mystorage", lab.display().to_string());
    let url = format!("smb://127.0.0.1:{}/data/inner", shares.0.port);
    fs::create_dir(shares.dir().join("inner")).unwrap();
    fs::write(shares.dir().join("inner/given"), "by share\n").unwrap();
    alias(
        &e,
        "path",
        account,
        &["--share", "logs"],
        &["--path", &path],
    );
    alias(
        &e,
        "share",
        SHARE_USER,
        &["--share", "nas"],
        &["--url", &url],
    );
    let url = buckets.url();
    let bucket = [
        "--s3-bucket",
        "train",
        "--s3-endpoint",
        &url,
        "--s3-region",
        "eu-central-1",
    ];
    alias(
        &e,
        "bucket",
        BUCKET_KEY_ID,
        &["--container", "datasets"],
        &bucket,
    );
    let table = e.ok(&["storage-alias", "list", "-o", "table"]);
    assert!(
        table.contains("mystorage") && table.contains("train at http://"),
        "{table}"
    );
    fs::write(e.path().join("given"), "by bucket\n").unwrap();
    buckets.client(&[
        "copy",
        &e.path().join("given").display().to_string(),
        "r:train/in",
    ]);

    // As it was written for Azure.
    let azure = |account: &str, share: &str, path: &str, key: &str| {
        json!({
            "accountName": account,
            "azureFileUrl": format!("https://{account}.file.core.windows.net/{share}"),
            "credentials": { "accountKey": key },
            "relativeMountPath": path,
        })
    };
    let volumes = [
        azure(account, "logs", "afs", WRONG_KEY),
        azure(SHARE_USER, "nas", "nas", SHARE_KEY),
    ];
    let mut data = blob("datasets", BUCKET_SECRET, "bfs");
    data["accountName"] = json!(BUCKET_KEY_ID);
    let mut whole = job(
        &volumes,
        std::slice::from_ref(&data),
        "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT; cat afs/given nas/given bfs/in/given; echo out > bfs/out; echo out > nas/out; \
         findmnt -n -o OPTIONS afs | grep -q nosuid; grep -c afs /proc/self/mountinfo",
    );
    whole["stdOutErrPathPrefix"] = json!("$AZ_BATCHAI_JOB_MOUNT_ROOT/afs/logs");
    submit(&e, "j", whole);
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(
        e.log("j", "stdout.txt"),
        "by path\nby share\nby bucket\n1\n"
    );
    nothing_is_mounted(&e);
    assert_eq!(buckets.client(&["cat", "r:train/out"]), "out\n");
    assert_eq!(shares.get("inner/out"), "out\n");
    let shown = e.job("j");
    let segment = shown["jobOutputDirectoryPathSegment"].as_str().unwrap();
    let copy = lab.join("logs").join(segment).join("stdouterr/stdout.txt");
    assert_eq!(fs::read_to_string(copy).unwrap(), e.log("j", "stdout.txt"));
    assert_hidden(SHARE_KEY, e.path());

    // A directory of a share is one of what stands in its stead.
    for (dir, text) in [
        (lab.join("in/deep"), "deep by path\n"),
        (shares.dir().join("inner/more"), "deep by share\n"),
    ] {
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("given"), text).unwrap();
    }
    let volumes = [
        azure(account, "logs/in/deep", "afs", WRONG_KEY),
        azure(SHARE_USER, "nas/more", "nas", SHARE_KEY),
    ];
    let reads = "cd $AZ_BATCHAI_JOB_MOUNT_ROOT; cat afs/given nas/given";
    submit(&e, "deep", job(&volumes, &[], reads));
    assert_eq!(e.wait("deep"), 0, "{}", e.job("deep"));
    assert_eq!(e.log("deep", "stdout.txt"), "deep by path\ndeep by share\n");

    // Read only where the container is to be.
    let of = ["--container", "frozen"];
    alias(&e, "frozen", account, &of, &["--path", &path]);
    let mut frozen = blob("frozen", WRONG_KEY, "m");
    frozen["accountName"] = json!(account);
    frozen["mountOptions"] = json!("-o ro");
    submit(
        &e,
        "frozen",
        job(&[], &[frozen], "! touch $AZ_BATCHAI_JOB_MOUNT_ROOT/m/x"),
    );
    assert_eq!(e.wait("frozen"), 0, "{}", e.job("frozen"));

    // A link that a user has put there is not followed, and what has something mounted in it is not there by halves.
    let over = e.path().join("over");
    fs::create_dir_all(over.join("below")).unwrap();
    let below = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(over.join("below"))
        .status();
    assert!(below.unwrap().success());
    let link = e.path().join("link");
    std::os::unix::fs::symlink("/root", &link).unwrap();
    std::os::unix::fs::lchown(&link, Some(54321), None).unwrap();
    for (name, to, said) in [
        ("links", &link, "link is a link of a user"),
        ("covers", &over, "below is mounted below"),
    ] {
        let to = to.display().to_string();
        alias(&e, name, account, &["--share", name], &["--path", &to]);
        let volume = azure(account, name, "m", WRONG_KEY);
        submit(&e, name, job(&[volume], &[], "true"));
        let failed = e.until_job(name, "FAILED");
        let (code, message) = error(&failed);
        assert_eq!(code, "AZFMountError", "{failed}");
        assert!(message.contains(said), "{message}");
    }
    unmount_below(&over);

    // What is wrong with one is said, by the error of what was asked for.
    let mut wrong = data.clone();
    wrong["accountName"] = json!("NOBODY");
    for (name, of, to, volume) in [
        (
            "key",
            ["--container", "datasets"],
            bucket.to_vec(),
            wrong.clone(),
        ),
        (
            "dir",
            ["--container", "other"],
            vec!["--path", "/no/such/dir"],
            {
                let mut other = wrong;
                other["containerName"] = json!("other");
                other
            },
        ),
    ] {
        alias(&e, name, "NOBODY", &of, &to);
        submit(&e, name, job(&[], &[volume], "true"));
        let failed = e.until_job(name, "FAILED");
        let (code, message) = error(&failed);
        assert_eq!(code, "BFSMountError", "{failed}");
        let said = ["InvalidAccessKeyId", "/no/such/dir is no directory"];
        assert!(said.iter().any(|part| message.contains(part)), "{message}");
    }
    // Deleted, it stands for nothing any more.
    e.ok(&["storage-alias", "delete", "-n", "dir", "-y"]);
    e.fails(&["storage-alias", "show", "-n", "dir"]);
    e.assert_nothing_left();
}

/// Waits for the one node to be in a state.
fn until_node(e: &Ensemble, state: &str) -> Value {
    until(&format!("the node to be {state}"), || {
        let nodes = e.json(&["node", "list"]);
        let node = nodes.as_array()?.first()?.clone();
        (node["state"] == state).then_some(node)
    })
}

fn create_cluster(e: &Ensemble, name: &str, volumes: &Value) {
    let path = e.path().join(format!("{name}.json"));
    let properties = json!({
        "vmSize": SIZE,
        "scaleSettings": { "manual": { "targetNodeCount": 1 } },
        "nodeSetup": { "mountVolumes": volumes },
    });
    fs::write(&path, json!({ "properties": properties }).to_string()).unwrap();
    let file = path.to_string_lossy();
    let create = [
        "cluster", "create", "-g", "g", "-w", "w", "-n", name, "-f", &file,
    ];
    e.ok(&create);
    fs::remove_file(&path).unwrap();
}

#[test]
fn a_cluster_has_them_for_as_long_as_it_has_the_node_whoever_dies() {
    let (Some(blobs), Some(shares)) = (Blobs::start(), Shares::start().filter(|_| able())) else {
        return;
    };
    blobs.create_container("data");
    let mut e = ensemble(PATIENCE_S, false);
    e.ok(&["group", "create", "-n", "g"]);
    e.ok(&["workspace", "create", "-g", "g", "-n", "w"]);
    e.ok(&["experiment", "create", "-g", "g", "-w", "w", "-n", "e"]);
    let of = ["--container", "data"];
    alias(&e, "lab", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    let volumes = |key: &str| {
        json!({
            "azureFileShares": [share(&shares.url(), key, "afs")],
            "azureBlobFileSystems": [blob("data", BLOB_KEY, "bfs")],
        })
    };
    // One that cannot be opened makes the node unusable, and says why.
    create_cluster(&e, "bad", &volumes(WRONG_KEY));
    let node = until_node(&e, "UNUSABLE");
    assert_eq!(node["errors"][0]["code"], "AZFMountError", "{node}");
    let message = node["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains("logon is invalid"), "{message}");
    e.ok(&["cluster", "delete", "-g", "g", "-w", "w", "-n", "bad", "-y"]);
    until("the mounts of the other to go", || {
        mounts_below(&e.path().join("nodes"))
            .is_empty()
            .then_some(())
    });

    create_cluster(&e, "c", &volumes(SHARE_KEY));
    until_node(&e, "IDLE");
    assert_eq!(mounts_below(&e.path().join("nodes")).len(), 2);
    assert_hidden(SHARE_KEY, e.path());
    assert_hidden(BLOB_KEY, e.path());
    let shown = e
        .json(&["cluster", "show", "-g", "g", "-w", "w", "-n", "c"])
        .to_string();
    assert!(
        !shown.contains(SHARE_KEY) && !shown.contains(BLOB_KEY),
        "{shown}"
    );
    let runs = |e: &Ensemble, name: &str| {
        let command = format!(
            "set -e; cd $AZ_BATCHAI_MOUNT_ROOT; echo {name} > afs/{name}; echo {name} > bfs/{name}; cat afs/{name} bfs/{name}"
        );
        let whole = json!({
            "nodeCount": 1,
            "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/afs/logs",
            "customToolkitSettings": { "commandLine": command },
        });
        submit(e, name, whole);
        assert_eq!(e.wait(name), 0, "{}", e.job(name));
        let blob = format!("data/{name}");
        until("it to be written back", || blobs.get(&blob));
        until("it to be written back", || {
            shares.dir().join(name).exists().then_some(())
        });
    };
    runs(&e, "first");
    // Agents come and go.
    e.agents.get_mut("a1").unwrap().kill();
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    runs(&e, "second");
    // Who holds them is cut down: whoever does next has the keys again.
    let holders = || {
        let all = processes_of(&e.path().join("agents")).into_iter();
        all.filter(|(_, line)| line.contains(" mounts ") && !line.contains("--clean"))
            .collect::<Vec<_>>()
    };
    let cut = holders()[0].0;
    kill(Pid::from_raw(cut), Signal::SIGKILL).unwrap();
    until("they to be held again", || {
        let now = holders();
        (now.len() == 1 && now[0].0 != cut).then_some(())
    });
    until("they to be mounted again", || {
        (mounts_below(&e.path().join("nodes")).len() == 2).then_some(())
    });
    until_node(&e, "IDLE");
    runs(&e, "third");
    e.ok(&["cluster", "delete", "-g", "g", "-w", "w", "-n", "c", "-y"]);
    until("the last mounts to go", || {
        mounts_below(&e.path().join("nodes"))
            .is_empty()
            .then_some(())
    });
    until("the last holder to end", || {
        holders().is_empty().then_some(())
    });
    nothing_is_mounted(&e);
    assert_hidden(SHARE_KEY, e.path());
    assert_hidden(BLOB_KEY, e.path());
    e.assert_nothing_left();
}

/// Something of this name below a directory.
fn found(dir: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.ends_with(name) {
            return Some(path);
        }
        let below = match path.is_dir() && !path.is_symlink() {
            true => found(&path, name),
            false => None,
        };
        if below.is_some() {
            return below;
        }
    }
    None
}

#[test]
fn what_cannot_be_written_back_is_said_and_is_no_success() {
    let Some(blobs) = Blobs::start().filter(|_| able()) else {
        return;
    };
    blobs.create_container("data");
    // Ten times as much is what writing back may take.
    let mut e = ensemble(3, true);
    let of = ["--container", "data"];
    alias(&e, "lab", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    let submit_one = |name: &str, command: &str| {
        let command = format!("cd $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs; {command}");
        submit(
            &e,
            name,
            job(&[], &[blob("data", BLOB_KEY, "bfs")], &command),
        );
    };
    let server = Pid::from_raw(blobs.0.pid());
    let (command, begun, go) = pausing(&e, "exec 3> model");
    submit_one("j", &format!("{command}; echo model >&3"));
    until("the job to begin", || begun.exists().then_some(()));
    // Its service is there, and answers no more.
    kill(server, Signal::SIGSTOP).unwrap();
    fs::write(&go, "").unwrap();
    let failed = e.until_job("j", "FAILED");
    let (code, message) = error(&failed);
    assert_eq!(code, "MountUnavailable", "{failed}");
    assert!(
        message.contains("1 files were not written back"),
        "{message}"
    );
    nothing_is_mounted(&e);

    // Nor where whoever writes it back is cut down: nobody knows then what has arrived.
    kill(server, Signal::SIGCONT).unwrap();
    for file in [&begun, &go] {
        fs::remove_file(file).unwrap();
    }
    submit_one("cut", &format!("{command}; echo model >&3"));
    until("the job to begin", || begun.exists().then_some(()));
    kill(server, Signal::SIGSTOP).unwrap();
    fs::write(&go, "").unwrap();
    let agents = e.path().join("agents");
    until("it to be unmounted", || found(&agents, "unmount"));
    assert!(found(&agents, "vfsMeta").is_some());
    let held = processes_of(&agents).into_iter();
    let mut held = held.filter(|(_, line)| line.contains(" mounts ") && line.contains("--held"));
    let holder = held.next().expect("it writes back").0;
    kill(Pid::from_raw(holder), Signal::SIGKILL).unwrap();
    let failed = e.until_job("cut", "FAILED");
    let (code, message) = error(&failed);
    assert_eq!(code, "MountUnavailable", "{failed}");
    assert!(message.contains("may be lost in part"), "{message}");
    until("the node to be clean", || {
        let clean = mounts_below(&e.path().join("nodes")).is_empty();
        (clean && found(&agents, "vfsMeta").is_none()).then_some(())
    });
    nothing_is_mounted(&e);
    kill(server, Signal::SIGCONT).unwrap();

    // What is known of why is said.
    for file in [&begun, &go] {
        fs::remove_file(file).unwrap();
    }
    blobs.create_container("gone");
    let of = ["--container", "gone"];
    alias(&e, "gone", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    let command = format!("cd $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs; {command}; echo model >&3");
    let volume = blob("gone", BLOB_KEY, "bfs");
    submit(&e, "why", job(&[], &[volume], &command));
    until("the job to begin", || begun.exists().then_some(()));
    blobs.delete_container("gone");
    fs::write(&go, "").unwrap();
    let failed = e.until_job("why", "FAILED");
    let (code, message) = error(&failed);
    assert_eq!(code, "MountUnavailable", "{failed}");
    assert!(
        message.contains("what serves it said last: ") && message.contains("Container"),
        "{message}"
    );
    assert!(!failed.to_string().contains("sig="), "{failed}");

    // One that is gone while a job runs ends it.
    fs::remove_file(&begun).unwrap();
    submit_one("dies", &format!("touch {}; sleep 1000", begun.display()));
    until("the job to begin", || begun.exists().then_some(()));
    kill(server, Signal::SIGKILL).unwrap();
    let failed = e.until_job("dies", "FAILED");
    let (code, message) = error(&failed);
    assert_eq!(code, "MountUnavailable", "{failed}");
    assert!(message.contains("refused"), "{message}");
    nothing_is_mounted(&e);
    e.assert_nothing_left();
}

#[test]
fn nothing_is_written_to_a_container_when_the_lease_of_the_node_is_over() {
    const LEASE_S: u64 = 20;
    let Some(blobs) = Blobs::start().filter(|_| able()) else {
        return;
    };
    blobs.create_container("data");
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = vec!["--lease".into(), LEASE_S.to_string()];
    e.start_coordinator();
    let mut e = furnished(e, PATIENCE_S, true);
    let of = ["--container", "data"];
    alias(&e, "lab", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    // It goes on writing, and so do its logs; where it begins anew it has nothing to do.
    let begun = e.path().join("out/begun");
    let command = format!(
        "[ ! -e {0} ] || exit 0; cd $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs; exec 3> model; touch {0}; head -c 30000000 /dev/zero >&3; \
         exec 3>&-; while true; do echo more; echo more > more; sleep 0.1; done",
        begun.display()
    );
    let mut whole = job(&[], &[blob("data", BLOB_KEY, "bfs")], &command);
    whole["stdOutErrPathPrefix"] = json!("$AZ_BATCHAI_JOB_MOUNT_ROOT/bfs/logs");
    submit(&e, "j", whole);
    until("the job to begin", || begun.exists().then_some(()));
    // What is being written now is not done when the lease is over.
    let server = Pid::from_raw(blobs.0.pid());
    kill(server, Signal::SIGSTOP).unwrap();
    e.agents.get_mut("a1").unwrap().kill();
    let over = Instant::now() + Duration::from_secs(LEASE_S);
    let writes = || {
        let all = processes_of(&e.path().join("nodes"));
        all.iter().any(|(_, line)| line.contains("rclone"))
    };
    assert!(writes());
    until("what writes to end", || (!writes()).then_some(()));
    let late = Instant::now().saturating_duration_since(over);
    assert!(late < Duration::from_secs(4), "{late:?}");
    until("the mount to go", || {
        mounts_below(&e.path().join("nodes"))
            .is_empty()
            .then_some(())
    });
    kill(server, Signal::SIGCONT).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(blobs.get("data/model"), None);
    e.start_agent_as("a1", USER);
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.job("j")["infrastructureRetryCount"], 1);
    nothing_is_mounted(&e);
    e.assert_nothing_left();
}

#[test]
fn what_waits_to_be_written_back_leaves_room_on_the_disk() {
    let Some(blobs) = Blobs::start().filter(|_| able()) else {
        return;
    };
    blobs.create_container("data");
    let e = Ensemble::start(0);
    // All that the agent keeps lies on a disk of its own.
    let disk = e.path().join("agents");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=400m", "tmpfs"])
        .arg(&disk)
        .status();
    assert!(mounted.unwrap().success());
    let mut e = furnished(e, PATIENCE_S, true);
    let of = ["--container", "data"];
    alias(&e, "lab", BLOB_ACCOUNT, &of, &["--url", &blobs.url()]);
    let (command, begun, go) = pausing(&e, "exec 3> $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs/large");
    let command = format!("{command}; head -c 1000000000 /dev/zero >&3");
    submit(
        &e,
        "j",
        job(&[], &[blob("data", BLOB_KEY, "bfs")], &command),
    );
    until("the job to begin", || begun.exists().then_some(()));
    fs::write(&go, "").unwrap();
    let failed = e.until_job("j", "FAILED");
    let (code, message) = error(&failed);
    assert_eq!(code, "MountUnavailable", "{failed}");
    assert!(message.contains("nearly full"), "{message}");
    nothing_is_mounted(&e);
    // Nothing of it is left there: the next one runs.
    submit(&e, "next", job(&[], &[], "true"));
    assert_eq!(e.wait("next"), 0, "{}", e.job("next"));
    e.assert_nothing_left();
}
