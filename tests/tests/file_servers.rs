//! File servers: made, mounted by jobs and clusters of one machine, served on whatever dies, and gone. What crosses a network is in the
//! machines of another kernel (`kernel`), and the protocol itself in `nfs`.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use batchai_common::tls::Identity;
use batchai_tests::ensemble::{Ensemble, SIZE, create_file_server, mounts_below};
use batchai_tests::process::{Background, processes_of, until};
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";
const STORE_SIZE: &str = "storage-size";

/// A node that offers storage, and others.
fn ensemble(agents: &[&str]) -> Option<Ensemble> {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root serves files and mounts anything");
        return None;
    }
    let mut e = Ensemble::start(0);
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(e.path().join("storage")).unwrap();
    start_store(&mut e);
    e.agent_args = vec!["--mount-patience".into(), "5".into()];
    for name in agents {
        e.start_agent_as(name, USER);
    }
    e.until_alive(agents.len() + 1);
    let out = e.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
    Some(e)
}

fn start_store(e: &mut Ensemble) {
    let storage = e.path().join("storage").to_string_lossy().into_owned();
    let args = ["--storage-root", &storage, "--vm-size", STORE_SIZE];
    e.agent_args = args.map(str::to_owned).to_vec();
    e.start_agent_as("store", USER);
}

fn create(e: &Ensemble, name: &str) -> Value {
    e.json(&create_file_server(name, STORE_SIZE))
}

fn show(e: &Ensemble, name: &str) -> Value {
    e.json(&["file-server", "show", "-g", "g", "-w", "w", "-n", name])
}

fn delete(e: &Ensemble, name: &str, more: &[&str]) {
    let delete = [
        "file-server",
        "delete",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        name,
        "-y",
    ];
    e.ok(&[&delete[..], more].concat());
}

fn until_gone(e: &Ensemble, name: &str) {
    until("the file server to be gone", || {
        let show = e.run(&["file-server", "show", "-g", "g", "-w", "w", "-n", name]);
        (!show.status.success()).then_some(())
    });
}

fn server(name: &str) -> String {
    format!("resourceGroups/g/workspaces/w/fileServers/{name}")
}

fn mounting(volumes: &[Value], command: &str) -> Value {
    json!({
        "nodeCount": 1,
        "mountVolumes": { "fileServers": volumes },
        "customToolkitSettings": { "commandLine": command },
    })
}

fn volume(name: &str, directory: &str, path: &str, options: &str) -> Value {
    json!({
        "fileServer": { "id": server(name) },
        "sourceDirectory": directory,
        "relativeMountPath": path,
        "mountOptions": options,
    })
}

fn data_of(shown: &Value) -> PathBuf {
    shown["mountSettings"]["mountPoint"]
        .as_str()
        .unwrap()
        .into()
}

fn nothing_is_mounted(e: &Ensemble) {
    let left = mounts_below(&e.path().join("nodes"));
    assert!(left.is_empty(), "{left:?}");
}

/// The process that serves what lies below a directory.
fn serving(e: &Ensemble) -> Vec<i32> {
    let all = processes_of(&e.path().join("agents/store"));
    let own = all
        .into_iter()
        .filter(|(_, line)| line.contains("nfs-server"));
    own.map(|(pid, _)| pid).collect()
}

#[test]
fn a_file_server_is_made_mounted_by_jobs_and_gone() {
    let Some(mut e) = ensemble(&["a1"]) else {
        return;
    };
    e.create_cluster(1);
    let shown = create(&e, "data");
    assert_eq!(shown["provisioningState"], "SUCCEEDED", "{shown}");
    assert_eq!(shown["node"], "nodes/store");
    assert_eq!(shown["backend"], "embedded");
    let mount = &shown["mountSettings"];
    assert!(mount["port"].as_i64().unwrap() > 0, "{shown}");
    for address in ["fileServerInternalIP", "fileServerPublicIP"] {
        assert_eq!(mount[address], "127.0.0.1", "{shown}");
    }
    assert_eq!(shown["name"], server("data"));
    for field in ["etag", "createTime", "provisioningStateTransitionTime"] {
        assert!(shown[field].is_string(), "{field}: {shown}");
    }
    assert!(!shown.to_string().contains("pass\""), "{shown}");
    let data = data_of(&shown);
    assert!(data.starts_with(e.path().join("storage")));
    fs::create_dir_all(data.join("sets/one")).unwrap();
    fs::write(data.join("sets/one/in"), "given\n").unwrap();
    // A way out that somebody put there.
    symlink("/etc", data.join("out")).unwrap();

    let volumes = [
        volume("data", "", "all", "rw"),
        volume("data", "sets//one/", "one", "ro,noatime"),
    ];
    let command = "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT; mountpoint -q all; mountpoint -q one; cat one/in; \
                   ! touch one/x 2>/dev/null; echo out > all/result; findmnt -no OPTIONS one";
    e.submit("writes", mounting(&volumes, command));
    assert_eq!(e.wait("writes"), 0, "{}", e.log("writes", "stderr.txt"));
    let said = e.log("writes", "stdout.txt");
    assert!(said.starts_with("given\nro,nosuid,nodev"), "{said}");
    let result = fs::metadata(data.join("result")).unwrap();
    assert_eq!((result.uid(), result.gid()), (54_321, 54_322));
    nothing_is_mounted(&e);

    for (name, directory, why) in [
        ("link", "out", "symbolic link"),
        ("absent", "sets/two", "No such file"),
        ("file", "sets/one/in", "Not a directory"),
    ] {
        let job = mounting(&[volume("data", directory, "d", "")], "true");
        e.submit(name, job);
        let job = e.until_job(name, "FAILED");
        let error = &job["errors"][0];
        assert_eq!(error["code"], "JobMountFailed", "{job}");
        assert!(error["message"].as_str().unwrap().contains(why), "{job}");
    }
    nothing_is_mounted(&e);

    // What does not go is said at once.
    let long = mounting(&[volume("data", "", "d", "")], "sleep 600");
    e.submit("long", long);
    e.until_job("long", "RUNNING");
    let refuse = [
        "file-server",
        "delete",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        "data",
        "-y",
    ];
    let (_, said) = e.fails(&refuse);
    assert!(said.contains("jobs/long mounts it"), "{said}");
    let bad = [
        volume("absent", "", "d", ""),
        volume("data", "../x", "e", "suid"),
    ];
    let file = e.job_file("bad", mounting(&bad, "true"));
    let submit = [
        "job", "create", "-g", "g", "-w", "w", "-e", "e", "-c", "c", "-n", "bad", "-f",
    ];
    let (_, said) = e.fails(&[&submit[..], &[&file.to_string_lossy()]].concat());
    for why in ["source_directory", "suid is no option"] {
        assert!(said.contains(why), "{said}");
    }
    let file = e.job_file("bad", mounting(&bad[..1], "true"));
    let (_, said) = e.fails(&[&submit[..], &[&file.to_string_lossy()]].concat());
    assert!(said.contains("fileServers/absent does not exist"), "{said}");
    e.ok(&[
        "job",
        "terminate",
        "-g",
        "g",
        "-w",
        "w",
        "-e",
        "e",
        "-n",
        "long",
        "-y",
    ]);
    e.until_job("long", "FAILED");

    // It stays on the disk, unless it is purged.
    delete(&e, "data", &[]);
    until_gone(&e, "data");
    assert_eq!(fs::read_to_string(data.join("result")).unwrap(), "out\n");
    until("it to be served no more", || {
        serving(&e).is_empty().then_some(())
    });
    let data = data_of(&create(&e, "data"));
    fs::create_dir(data.join("deep")).unwrap();
    fs::write(data.join("deep/file"), "x").unwrap();
    delete(&e, "data", &["--purge"]);
    until_gone(&e, "data");
    assert!(!data.exists());
    let left = fs::read_dir(e.path().join("storage/file-servers"))
        .unwrap()
        .count();
    assert_eq!(left, 1, "the one that was not purged");
    e.assert_nothing_left();
}

#[test]
fn two_clusters_share_one_file_server_and_see_what_the_other_writes() {
    let Some(e) = ensemble(&["a1", "a2", "a3"]) else {
        return;
    };
    e.create_cluster(1);
    let data = data_of(&create(&e, "shared"));
    for cluster in ["one", "two"] {
        let file = e.path().join(format!("{cluster}.json"));
        let properties = json!({ "properties": {
            "vmSize": SIZE,
            "scaleSettings": { "manual": { "targetNodeCount": 1 } },
            "nodeSetup": { "mountVolumes": { "fileServers": [{
                "fileServer": { "id": server("shared") },
                "relativeMountPath": "nfs",
                "mountOptions": "rw",
            }] } },
        } });
        fs::write(&file, properties.to_string()).unwrap();
        let file = file.to_string_lossy().into_owned();
        e.ok(&[
            "cluster", "create", "-g", "g", "-w", "w", "-n", cluster, "-f", &file,
        ]);
    }
    let run = |name: &str, cluster: &str, command: &str| {
        let mut job =
            json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command } });
        job["stdOutErrPathPrefix"] = e.path().join("out").to_string_lossy().into_owned().into();
        let file = e.job_file(name, job).to_string_lossy().into_owned();
        e.ok(&[
            "job", "create", "-g", "g", "-w", "w", "-e", "e", "-c", cluster, "-n", name, "-f",
            &file,
        ]);
        assert_eq!(e.wait(name), 0, "{}", e.log(name, "stderr.txt"));
        e.log(name, "stdout.txt")
    };
    run("first", "one", "echo one > $AZ_BATCHAI_MOUNT_ROOT/nfs/from");
    let said = run(
        "second",
        "two",
        "cat $AZ_BATCHAI_MOUNT_ROOT/nfs/from; echo two >> $AZ_BATCHAI_MOUNT_ROOT/nfs/from",
    );
    assert_eq!(said, "one\n");
    assert_eq!(
        run("third", "one", "cat $AZ_BATCHAI_MOUNT_ROOT/nfs/from"),
        "one\ntwo\n"
    );
    assert_eq!(fs::read_to_string(data.join("from")).unwrap(), "one\ntwo\n");
    // With the workspace all of it goes, one after the other; the data stays.
    let delete = ["workspace", "delete", "-g", "g", "-n", "w", "-y"];
    e.ok(&delete);
    until("the workspace to be gone", || {
        let show = e.run(&["workspace", "show", "-g", "g", "-n", "w"]);
        (!show.status.success()).then_some(())
    });
    assert!(data.join("from").exists());
    nothing_is_mounted(&e);
}

#[test]
fn whatever_dies_it_is_served_again_at_the_same_place() {
    let Some(mut e) = ensemble(&[]) else {
        return;
    };
    e.create_cluster(0);
    let place = create(&e, "data")["mountSettings"].clone();
    let again = |e: &Ensemble, before: &[i32]| {
        until("it to be served again", || {
            let now = serving(e);
            let other = !now.is_empty() && now.iter().all(|pid| !before.contains(pid));
            let shown = show(e, "data");
            (other && shown["provisioningState"] == "SUCCEEDED").then_some(())
        });
        assert_eq!(show(e, "data")["mountSettings"], place);
    };
    let first = serving(&e);
    assert_eq!(first.len(), 1);
    kill(Pid::from_raw(first[0]), Signal::SIGKILL).unwrap();
    again(&e, &first);

    // The agent may go and come; it serves on meanwhile.
    let second = serving(&e);
    let mut agent = e.agents.remove("store").unwrap();
    agent.signal(Signal::SIGTERM);
    agent.wait();
    assert_eq!(serving(&e), second);
    kill(Pid::from_raw(second[0]), Signal::SIGKILL).unwrap();
    until("it to be dead", || serving(&e).is_empty().then_some(()));
    start_store(&mut e);
    again(&e, &second);

    // What it lies in is gone: that is said, and it is back when that is.
    let storage = e.path().join("storage");
    let aside = e.path().join("aside");
    fs::rename(&storage, &aside).unwrap();
    kill(Pid::from_raw(serving(&e)[0]), Signal::SIGKILL).unwrap();
    let failed = until("it to fail", || {
        let shown = show(&e, "data");
        (shown["provisioningState"] == "FAILED").then_some(shown)
    });
    let error = &failed["errors"][0];
    assert_eq!(error["code"], "FileServerNotServed", "{failed}");
    let detail = &error["details"][0];
    assert_eq!(detail["name"], "error", "{failed}");
    assert!(detail["value"].as_str().unwrap().contains("storage"));
    assert!(
        error["message"].as_str().unwrap().contains("storage"),
        "{failed}"
    );
    fs::rename(&aside, &storage).unwrap();
    until("it to be served again", || {
        (show(&e, "data")["provisioningState"] == "SUCCEEDED").then_some(())
    });
    // What was shared once and is not there is not made anew, and is not taken for purged.
    let data = data_of(&show(&e, "data"));
    let is_root_only = |path: &Path| fs::metadata(path).unwrap().mode() & 0o077 == 0;
    assert!(is_root_only(data.parent().unwrap()));
    fs::rename(&data, &aside).unwrap();
    kill(Pid::from_raw(serving(&e)[0]), Signal::SIGKILL).unwrap();
    let missing = |word: &str| {
        let failed = until("it to be missed", || {
            let shown = show(&e, "data");
            let why = shown["errors"][0]["message"].as_str()?.contains(word);
            why.then_some(shown)
        });
        assert!(!data.exists(), "{failed}");
    };
    missing("No such file");
    delete(&e, "data", &["--purge", "--no-wait"]);
    missing("is its disk mounted?");
    fs::rename(&aside, &data).unwrap();
    until_gone(&e, "data");
    assert!(!data.exists());
    let left = fs::read_dir(data.parent().unwrap()).unwrap().count();
    assert_eq!(left, 0);
    e.assert_nothing_left();
}

#[test]
fn where_others_may_write_no_file_servers_lie() {
    let Some(mut e) = ensemble(&[]) else {
        return;
    };
    let storage = e.path().join("open");
    fs::create_dir(&storage).unwrap();
    fs::set_permissions(&storage, fs::Permissions::from_mode(0o777)).unwrap();
    let args = ["--storage-root", &storage.to_string_lossy()].map(str::to_owned);
    e.agent_args = args.to_vec();
    e.start_agent_as("open", USER);
    let ended = e.agents.remove("open").unwrap().wait();
    assert!(!ended.success(), "{ended}");
    let said = fs::read_to_string(e.path().join("open.log")).unwrap();
    assert!(said.contains("nobody else may write"), "{said}");
}

#[test]
fn a_file_server_without_a_node_says_what_it_waits_for() {
    let Some(e) = ensemble(&["a1"]) else {
        return;
    };
    e.create_cluster(1);
    let base = ["file-server", "create", "-g", "g", "-w", "w"];
    let rest = [
        "--disk-count",
        "1",
        "--storage-sku",
        "Standard_LRS",
        "-u",
        "ada",
        "-p",
        "p",
        "--no-wait",
    ];
    let create = |name: &str, size: &str, gb: &str, more: &[&str]| {
        let own = ["-n", name, "-s", size, "--disk-size", gb];
        e.run(&[&base[..], &own, &rest, more].concat())
    };
    for (name, size, gb) in [("size", SIZE, "1"), ("room", STORE_SIZE, "1000000")] {
        assert!(create(name, size, gb, &[]).status.success());
        let shown = show(&e, name);
        assert_eq!(shown["provisioningState"], "CREATING", "{shown}");
        assert_eq!(shown["errors"][0]["code"], "NoStorageNode", "{shown}");
    }
    let refused = create("pinned", SIZE, "1", &["--node", "a1"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("--storage-root"), "{said}");
    // A job that mounts it waits, and says so; others do not.
    e.submit("waits", mounting(&[volume("size", "", "d", "")], "true"));
    e.submit("runs", mounting(&[], "true"));
    assert_eq!(e.wait("runs"), 0);
    let reason = e.job("waits")["pendingReason"].to_string();
    assert!(reason.contains("fileServers/size"), "{reason}");
    let is_root_only = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077 == 0;
    assert!(is_root_only(&e.path().join("agents/store")));
}

/// A share and a container of an account, as files made for Azure have them.
fn of_account(options: &str) -> Value {
    let key = json!({ "accountKey": "bm8ga2V5IG9mIGFueWJvZHk=" });
    json!({
        "azureFileShares": [{
            "accountName": "acc",
            "azureFileUrl": "https://acc.file.core.windows.net/share",
            "credentials": key,
            "relativeMountPath": "afs",
        }],
        "azureBlobFileSystems": [{
            "accountName": "acc",
            "containerName": "container",
            "credentials": key,
            "relativeMountPath": "bfs",
            "mountOptions": options,
        }],
    })
}

#[test]
fn shares_and_containers_that_lead_to_a_file_server_are_mounted_from_it() {
    let Some(mut e) = ensemble(&["a1", "a2"]) else {
        return;
    };
    e.create_cluster(1);
    let data = data_of(&create(&e, "data"));
    fs::create_dir(data.join("sets")).unwrap();
    fs::write(data.join("sets/in"), "given\n").unwrap();
    fs::set_permissions(data.join("sets"), fs::Permissions::from_mode(0o777)).unwrap();
    let alias = |name: &str, what: [&str; 2], stead: &[&str]| {
        let create = ["storage-alias", "create", "-n", name, "-a", "acc"];
        e.json(&[&create[..], &what, &["-g", "g", "-w", "w"], stead].concat())
    };
    let share = ["--file-server", "data"];
    let made = alias("share", ["--share", "share"], &share);
    assert_eq!(made["fileServer"]["fileServer"], server("data"), "{made}");
    let container = ["--file-server", &server("data"), "--directory", "sets"];
    alias("container", ["--container", "container"], &container);
    let listed = e.ok(&["storage-alias", "list", "-o", "table"]);
    assert!(
        listed.contains(&format!("/sets of {}", server("data"))),
        "{listed}"
    );

    let with = |volumes: Value, command: &str| {
        json!({
            "nodeCount": 1,
            "mountVolumes": volumes,
            "customToolkitSettings": { "commandLine": command },
        })
    };
    let command = "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT; mountpoint -q afs; mountpoint -q bfs; cat bfs/in; \
                   ! touch bfs/x 2>/dev/null; echo out > afs/result";
    e.submit("job", with(of_account("-o ro"), command));
    assert_eq!(e.wait("job"), 0, "{}", e.log("job", "stderr.txt"));
    assert_eq!(e.log("job", "stdout.txt"), "given\n");
    let result = fs::metadata(data.join("result")).unwrap();
    assert_eq!((result.uid(), result.gid()), (54_321, 54_322));
    nothing_is_mounted(&e);
    // The options that a container asks for are no others'.
    e.submit(
        "writes",
        with(
            of_account(""),
            "echo two > $AZ_BATCHAI_JOB_MOUNT_ROOT/bfs/two",
        ),
    );
    assert_eq!(e.wait("writes"), 0, "{}", e.log("writes", "stderr.txt"));
    assert_eq!(fs::read_to_string(data.join("sets/two")).unwrap(), "two\n");

    // The errors are those of the file server as well.
    fs::rename(data.join("sets"), data.join("aside")).unwrap();
    e.submit("absent", with(of_account(""), "true"));
    let job = e.until_job("absent", "FAILED");
    let error = &job["errors"][0];
    assert_eq!(error["code"], "JobMountFailed", "{job}");
    assert!(
        error["message"].as_str().unwrap().contains("No such file"),
        "{job}"
    );
    fs::rename(data.join("aside"), data.join("sets")).unwrap();

    // For a cluster too, for as long as it is there; by then neither goes. The options of the original's command say the same.
    let options = [
        "--storage-account-name",
        "acc",
        "--storage-account-key",
        "bm8ga2V5",
        "--afs-name",
        "share",
        "--bfs-name",
        "container",
        "--nfs",
        "data",
    ];
    let cluster = [
        "cluster", "create", "-g", "g", "-w", "w", "-n", "two", "-s", SIZE, "-t", "1",
    ];
    e.ok(&[&cluster[..], &options].concat());
    let job = json!({
        "nodeCount": 1,
        "stdOutErrPathPrefix": e.path().join("out").to_string_lossy(),
        "customToolkitSettings": { "commandLine":
            "cd $AZ_BATCHAI_MOUNT_ROOT; cat afs/result bfs/in nfs/result; cd $AZ_BATCHAI_JOB_MOUNT_ROOT; cat a/result b/in n/result" },
    });
    let file = e.job_file("second", job).to_string_lossy().into_owned();
    let create = [
        "job", "create", "-g", "g", "-w", "w", "-e", "e", "-c", "two", "-n", "second",
    ];
    let places = [
        "--afs-mount-path",
        "a",
        "--bfs-mount-path",
        "b",
        "--nfs-mount-path",
        "n",
    ];
    e.ok(&[&create[..], &["-f", &file], &options, &places].concat());
    assert_eq!(e.wait("second"), 0, "{}", e.log("second", "stderr.txt"));
    let said = e.log("second", "stdout.txt");
    assert_eq!(said, "out\ngiven\nout\n".repeat(2));
    let drop_alias = |name: &'static str| ["storage-alias", "delete", "-n", name, "-y"];
    let (_, said) = e.fails(&drop_alias("share"));
    assert!(
        said.contains("clusters/two mounts what it is for"),
        "{said}"
    );
    let refuse = [
        "file-server",
        "delete",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        "data",
        "-y",
    ];
    let (_, said) = e.fails(&refuse);
    assert!(said.contains("clusters/two mounts it"), "{said}");
    e.ok(&["cluster", "delete", "-g", "g", "-w", "w", "-n", "two", "-y"]);
    let (_, said) = e.fails(&refuse);
    assert!(said.contains("leads to it"), "{said}");
    for name in ["share", "container"] {
        e.ok(&drop_alias(name));
    }
    delete(&e, "data", &["--purge"]);
    until_gone(&e, "data");
    nothing_is_mounted(&e);
    e.assert_nothing_left();
}

/// The file servers of the workspace.
fn servers(e: &Ensemble) -> Vec<String> {
    let all = e.json(&["file-server", "list", "-g", "g", "-w", "w"]);
    let names = all.as_array().unwrap().iter();
    names
        .map(|server| server["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn auto_storage_is_two_directories_of_the_workspaces_own_file_server() {
    let Some(mut e) = ensemble(&["a1", "a2"]) else {
        return;
    };
    e.create_cluster(0);
    let sizes = e.json(&["vm-size", "list"]);
    let storage = |size: &str| {
        let found = sizes
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["vmSize"] == size);
        found.unwrap()["storageNodeCount"]
            .as_i64()
            .unwrap_or_default()
    };
    assert_eq!((storage(STORE_SIZE), storage(SIZE)), (1, 0), "{sizes}");
    // Whoever may make clusters may: no administrator is needed.
    e.ok(&[
        "role",
        "create",
        "-u",
        "ada",
        "--role",
        "contributor",
        "-g",
        "g",
        "-w",
        "w",
    ]);
    let ada = e.credentials_of(&Identity::user("ada").unwrap());
    let as_ada = |args: &[&str]| {
        let mut command = e.command(args);
        let output = command.env("BATCHAI_CREDENTIALS", &ada).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    let create = |name: &'static str| {
        let create = ["cluster", "create", "-g", "g", "-w", "w", "-n", name];
        let create = [&create[..], &["-s", SIZE, "-t", "1", "--use-auto-storage"]].concat();
        as_ada(&create)
    };
    let cluster = create("auto");
    let mounts = &cluster["nodeSetup"]["mountVolumes"]["fileServers"];
    let own = server("batchaiautostorage");
    for (i, directory, path) in [
        (0, "batchaishare", "autoafs"),
        (1, "batchaicontainer", "autobfs"),
    ] {
        assert_eq!(mounts[i]["fileServer"], own, "{cluster}");
        assert_eq!(mounts[i]["sourceDirectory"], directory, "{cluster}");
        assert_eq!(mounts[i]["relativeMountPath"], path, "{cluster}");
    }
    assert_eq!(servers(&e).as_slice(), std::slice::from_ref(&own));
    let shown = show(&e, "batchaiautostorage");
    assert_eq!(
        (&shown["node"], &shown["vmSize"]),
        (&json!("nodes/store"), &json!(STORE_SIZE))
    );

    // As the original's quickstart: what is sent there is there, and what a job writes is seen by jobs of another such cluster.
    let script = e.path().join("script.sh");
    fs::write(
        &script,
        "echo from the script > $AZ_BATCHAI_MOUNT_ROOT/autobfs/model\n",
    )
    .unwrap();
    let upload = [
        "file-server",
        "file",
        "upload",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        "batchaiautostorage",
    ];
    let script = script.to_string_lossy().into_owned();
    as_ada(&[&upload[..], &[&script, "-p", "batchaishare"]].concat());
    create("again");
    assert_eq!(servers(&e), [own]);
    let run = |cluster: &str, name: &str, command: &str| {
        let job = json!({
            "nodeCount": 1,
            "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/autoafs",
            "customToolkitSettings": { "commandLine": command },
        });
        let file = e.job_file(name, job).to_string_lossy().into_owned();
        let create = [
            "job", "create", "-g", "g", "-w", "w", "-e", "e", "-c", cluster, "-n", name,
        ];
        as_ada(&[&create[..], &["-f", &file]].concat());
        assert_eq!(e.wait(name), 0, "{}", e.log(name, "stderr.txt"));
        e.log(name, "stdout.txt")
    };
    run(
        "auto",
        "trains",
        "bash $AZ_BATCHAI_MOUNT_ROOT/autoafs/script.sh",
    );
    let said = run("again", "reads", "cat $AZ_BATCHAI_MOUNT_ROOT/autobfs/model");
    assert_eq!(said, "from the script\n");
    let data = data_of(&shown);
    let model = fs::read_to_string(data.join("batchaicontainer/model")).unwrap();
    assert_eq!(model, "from the script\n");
    assert!(
        data.join("batchaishare").read_dir().unwrap().count() > 1,
        "the logs are on the share"
    );

    // It stays when its clusters go, and one that goes itself is not used any more.
    for cluster in ["auto", "again"] {
        e.ok(&[
            "cluster", "delete", "-g", "g", "-w", "w", "-n", cluster, "-y",
        ]);
    }
    assert!(data.join("batchaicontainer/model").exists());
    let mut store = e.agents.remove("store").unwrap();
    store.signal(Signal::SIGKILL);
    store.wait();
    delete(&e, "batchaiautostorage", &["--no-wait"]);
    let late = [
        "cluster", "create", "-g", "g", "-w", "w", "-n", "late", "-s", SIZE, "-t", "0",
    ];
    let (_, said) = e.fails(&[&late[..], &["--use-auto-storage"]].concat());
    assert!(said.contains("batchaiautostorage is deleting"), "{said}");
    start_store(&mut e);
    until_gone(&e, "batchaiautostorage");
    nothing_is_mounted(&e);
}

#[test]
fn who_waits_for_a_new_file_server_waits_on_while_the_coordinator_is_away() {
    let Some(mut e) = ensemble(&[]) else {
        return;
    };
    e.create_cluster(0);
    // It is not served before its node works again.
    e.agents["store"].signal(Signal::SIGSTOP);
    let running = Background::start(&mut e.command(&create_file_server("data", STORE_SIZE)));
    until("the file server to be there", || {
        (show(&e, "data")["provisioningState"] == "CREATING").then_some(())
    });
    e.coordinator.take().unwrap().kill();
    // For longer than a call by itself looks for who answers it.
    std::thread::sleep(std::time::Duration::from_secs(12));
    e.start_coordinator();
    e.agents["store"].signal(Signal::SIGCONT);
    let output = running.finish();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(made["provisioningState"], "SUCCEEDED", "{made}");
}
