//! Many mounts of one job, and everything that can be wrong with mounts at once.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use batchai_tests::ensemble::{Ensemble, SIZE, create_file_server, mounts_below};
use batchai_tests::process::until;
use batchai_tests::requirement;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";
const SUBMIT: &[&str] = &[
    "job", "create", "-g", "g", "-w", "w", "-e", "e", "-c", "c", "-n",
];
/// As many as a job may have.
const MOST: usize = 100;
/// A refusal is one look at the request.
const REFUSED_MAX: Duration = Duration::from_secs(5);
/// Mounting and unmounting all of them takes some seconds here.
const MOUNTED_MAX: Duration = Duration::from_secs(120);

/// A node that offers storage and runs jobs, with a file server `data`; and where that lies.
fn ensemble() -> Option<(Ensemble, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root serves files and mounts anything");
        return None;
    }
    let mut e = Ensemble::start(0);
    for (name, mode) in [("", 0o755), ("storage", 0o700), ("out", 0o777)] {
        let dir = e.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
    }
    let storage = e.path().join("storage").to_string_lossy().into_owned();
    e.agent_args = vec!["--storage-root".to_owned(), storage];
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    e.create_cluster(1);
    let shown = e.json(&create_file_server("data", SIZE));
    let data = shown["mountSettings"]["mountPoint"].as_str();
    let data = data.unwrap_or_else(|| panic!("{shown}")).into();
    Some((e, data))
}

fn server() -> Value {
    json!({ "id": "resourceGroups/g/workspaces/w/fileServers/data" })
}

/// So many volumes, in turn: a tmpfs, a bind mount and a directory of the file server. Each has a file that only it has.
fn volumes(e: &Ensemble, data: &Path, count: usize) -> Value {
    let (mut servers, mut commands) = (Vec::new(), Vec::new());
    for i in 0..count {
        let path = format!("m{i}");
        let command =
            |command: String| json!({ "mountCommand": command, "relativeMountPath": path });
        match i % 3 {
            0 => commands.push(command("mount -t tmpfs -o mode=0777 tmpfs".to_owned())),
            1 => {
                let from = e.path().join(format!("bind/{i}"));
                fs::create_dir_all(&from).unwrap();
                fs::write(from.join("which"), format!("{i}\n")).unwrap();
                commands.push(command(format!("mount --bind '{}'", from.display())));
            }
            _ => {
                let from = data.join(i.to_string());
                fs::create_dir_all(&from).unwrap();
                fs::write(from.join("which"), format!("{i}\n")).unwrap();
                servers.push(json!({
                    "fileServer": server(),
                    "sourceDirectory": i.to_string(),
                    "relativeMountPath": path,
                }));
            }
        }
    }
    json!({ "fileServers": servers, "unmanagedFileSystems": commands })
}

fn job(volumes: &Value, command: &str) -> Value {
    json!({
        "nodeCount": 1,
        "mountVolumes": volumes,
        "customToolkitSettings": { "commandLine": command },
    })
}

#[test]
fn a_job_mounts_a_hundred_volumes_and_two_hundred_are_refused() {
    let Some((mut e, data)) = ensemble() else {
        return;
    };
    let many = job(&volumes(&e, &data, 2 * MOST), "true");
    let file = e.job_file("many", many).to_string_lossy().into_owned();
    let begun = Instant::now();
    let (_, said) = e.fails(&[SUBMIT, &["many", "-f", &file]].concat());
    let refused = begun.elapsed();
    assert!(said.contains("job.mount_volumes"), "{said}");
    assert!(said.contains("has more than 100 volumes"), "{said}");
    assert!(refused < REFUSED_MAX, "{refused:?}");

    // Every one is a mount of its own with what is in it, and the job may write to what is everybody's.
    let command = "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT; \
         for i in $(seq 0 99); do mountpoint -q m$i; \
         case $((i % 3)) in 0) echo $i > m$i/which;; esac; cat m$i/which; done";
    let begun = Instant::now();
    e.submit("most", job(&volumes(&e, &data, MOST), command));
    assert_eq!(e.wait("most"), 0, "{}", e.log("most", "stderr.txt"));
    let took = begun.elapsed();
    let expected: String = (0..MOST).map(|i| format!("{i}\n")).collect();
    assert_eq!(e.log("most", "stdout.txt"), expected);
    let left = mounts_below(&e.path().join("nodes"));
    assert!(left.is_empty(), "{left:?}");
    eprintln!(
        "200 volumes refused in {refused:?}; a job with 100 took {took:?} from request to end"
    );
    assert!(took < MOUNTED_MAX, "{took:?}");

    // One that fails amid them takes all of them down again, and is named.
    let mut broken = volumes(&e, &data, MOST);
    broken["fileServers"][20]["sourceDirectory"] = "absent".into();
    let begun = Instant::now();
    e.submit("broken", job(&broken, "true"));
    let failed = e.until_job("broken", "FAILED");
    assert_eq!(failed["errors"][0]["code"], "JobMountFailed", "{failed}");
    let path = broken["fileServers"][20]["relativeMountPath"]
        .as_str()
        .unwrap();
    let message = failed["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains(path), "{path}: {message}");
    assert!(begun.elapsed() < MOUNTED_MAX);
    let left = mounts_below(&e.path().join("nodes"));
    assert!(left.is_empty(), "{left:?}");
    let delete = ["file-server", "delete", "-g", "g", "-w", "w", "-n", "data"];
    e.ok(&[&delete[..], &["-y", "--purge"]].concat());
    e.assert_nothing_left();
}

#[test]
fn everything_that_is_wrong_with_mounts_is_said_in_one_refusal() {
    let Some((mut e, _)) = ensemble() else {
        return;
    };
    // One that goes as soon as its node is back.
    let mut agent = e.agents.remove("a1").unwrap();
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let base = ["-g", "g", "-w", "w", "-n", "data"];
    let delete = ["file-server", "delete", "-y", "--no-wait"];
    e.ok(&[&delete[..], &base].concat());
    let show = [&["file-server", "show"][..], &base].concat();
    assert_eq!(e.json(&show)["provisioningState"], "DELETING");

    let mount = |path: &str, directory: &str, options: &str| {
        json!({
            "fileServer": server(),
            "sourceDirectory": directory,
            "relativeMountPath": path,
            "mountOptions": options,
        })
    };
    let absent = json!({
        "fileServer": { "id": "resourceGroups/g/workspaces/w/fileServers/absent" },
        "relativeMountPath": "absent",
    });
    let volumes = json!({
        "fileServers": [mount("data", "", "rw"), mount("own", "../..", "suid,ro"), absent],
        "unmanagedFileSystems": [
            { "mountCommand": "mount -t tmpfs tmpfs", "relativeMountPath": "./data/" },
            { "mountCommand": "mount -t tmpfs tmpfs", "relativeMountPath": "../../etc" },
        ],
        "azureBlobFileSystems": [{
            "accountName": "acc",
            "containerName": "data",
            "credentials": { "accountKey": "a2V5" },
            "relativeMountPath": "data/below",
            "mountOptions": "-o ro --config-file=/etc/shadow",
        }],
    });
    let expected = [
        (
            "file_servers[0].file_server",
            "fileServers/data: it is being deleted",
        ),
        ("file_servers[1].source_directory", "without `..`"),
        ("file_servers[1].mount_options", "suid is no option"),
        (
            "file_servers[2].file_server",
            "fileServers/absent does not exist",
        ),
        (
            "unmanaged_file_systems[0].relative_mount_path",
            "the place of another volume",
        ),
        (
            "unmanaged_file_systems[1].relative_mount_path",
            "below the mount root",
        ),
        (
            "azure_blob_file_systems[0].mount_options",
            "--config-file=/etc/shadow",
        ),
    ];
    let all_said = |said: &str, above: &str| {
        for (field, why) in expected {
            let field = format!("{above}.{field}");
            assert!(said.contains(&field), "{field}: {said}");
            assert!(said.contains(why), "{why}: {said}");
        }
    };
    let file = e.job_file("bad", job(&volumes, "true"));
    let file = file.to_string_lossy().into_owned();
    let (_, said) = e.fails(&[SUBMIT, &["bad", "-f", &file]].concat());
    all_said(&said, "job.mount_volumes");
    let setup = json!({ "properties": {
        "vmSize": SIZE,
        "scaleSettings": { "manual": { "targetNodeCount": 0 } },
        "nodeSetup": { "mountVolumes": volumes },
    } });
    let file = e.path().join("cluster.json");
    fs::write(&file, setup.to_string()).unwrap();
    let create = ["cluster", "create", "-g", "g", "-w", "w", "-n", "bad", "-f"];
    let (_, said) = e.fails(&[&create[..], &[&file.to_string_lossy()]].concat());
    all_said(&said, "cluster.node_setup.mount_volumes");
    // Nothing was made of either, and alone it is what it was before: the state of the file server, not a bad request.
    let list = ["job", "list", "-g", "g", "-w", "w", "-e", "e"];
    assert_eq!(e.json(&list), json!([]));
    let alone = json!({ "fileServers": [mount("data", "", "rw")] });
    let file = e.job_file("alone", job(&alone, "true"));
    let file = file.to_string_lossy().into_owned();
    let (_, said) = e.fails(&[SUBMIT, &["alone", "-f", &file]].concat());
    assert!(
        said.contains("fileServers/data: it is being deleted"),
        "{said}"
    );
    e.start_agent_as("a1", USER);
    until("the file server to be gone", || {
        (!e.run(&show).status.success()).then_some(())
    });
}
