//! Mounts of jobs and clusters: real ones, some of which do not answer.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use batchai_common::tls::Identity;
use batchai_proto::v1;
use batchai_proto::v1::role_binding::Role;
use batchai_tests::api::{Api, EXPERIMENT, WORKSPACE, connector, job, refusal};
use batchai_tests::ensemble::{Ensemble, IN, SIZE, mounts_below, unmount_below};
use batchai_tests::process::{processes_of, until};
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tonic::Code;

/// How long agents of these tests wait for a mount.
const PATIENCE_S: u64 = 3;
/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";

/// Agents with little patience, and a directory that everybody may pass.
fn ensemble(agents: &[&str]) -> Ensemble {
    let mut e = Ensemble::start(0);
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    e.agent_args = vec!["--mount-patience".into(), PATIENCE_S.to_string()];
    for name in agents {
        e.start_agent_as(name, USER);
    }
    e.until_alive(agents.len());
    source(&e, "out");
    e
}

/// What these tests need beyond cargo and python3.
fn able() -> bool {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root mounts anything");
        return false;
    }
    if !Path::new("/dev/fuse").exists() {
        requirement::skip("this kernel has no FUSE");
        return false;
    }
    requirement::program("bindfs", "apt-get install bindfs").is_some()
}

/// A directory beside the agents' that everybody may write to.
fn source(e: &Ensemble, name: &str) -> PathBuf {
    let dir = e.path().join(name);
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

fn volume(command: impl Into<String>, path: &str) -> Value {
    json!({ "mountCommand": command.into(), "relativeMountPath": path })
}

fn bindfs(from: &Path) -> String {
    // As other users as well; without a cache that would answer in its stead.
    format!(
        "bindfs -o allow_other,attr_timeout=0,entry_timeout=0 '{}'",
        from.display()
    )
}

fn with(volumes: &[Value], command: &str) -> Value {
    json!({
        "nodeCount": 1,
        "mountVolumes": { "unmanagedFileSystems": volumes },
        "customToolkitSettings": { "commandLine": command },
    })
}

/// A command that says when it has begun.
fn begins(e: &Ensemble, command: &str) -> String {
    format!("touch {}; {command}", e.path().join("out/begun").display())
}

fn until_begun(e: &Ensemble) {
    let begun = e.path().join("out/begun");
    until("the job to begin", || begun.exists().then_some(()));
    fs::remove_file(begun).unwrap();
}

fn nothing_is_mounted(e: &Ensemble) {
    let left = mounts_below(&e.path().join("nodes"));
    assert!(left.is_empty(), "{left:?}");
}

fn error(job: &Value) -> (String, String) {
    let error = &job["errors"][0];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (text("code"), text("message"))
}

/// Mounts something that never answers, and stays there.
fn hung(e: &Ensemble) -> String {
    let path = e.path().join("hung.py");
    fs::write(
        &path,
        "import ctypes, os, sys, time\n\
         libc, path = ctypes.CDLL(None, use_errno=True), sys.argv[1]\n\
         fd = os.open('/dev/fuse', os.O_RDWR)\n\
         options = f'fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other'\n\
         if libc.mount(b'hung', path.encode(), b'fuse.hung', 0, options.encode()):\n\
         \x20   sys.exit(os.strerror(ctypes.get_errno()))\n\
         if os.fork(): os._exit(0)\n\
         os.setsid()\n\
         time.sleep(3600)\n",
    )
    .unwrap();
    format!("python3 '{}'", path.display())
}

#[test]
fn what_a_job_mounts_is_there_for_the_job_and_no_longer() {
    if !able() {
        return;
    }
    let mut e = ensemble(&["a1"]);
    e.create_cluster(1);
    let (logs, data) = (source(&e, "logs"), source(&e, "data"));
    fs::write(data.join("in"), "given\n").unwrap();
    let volumes = [
        volume("mount -t tmpfs -o mode=0777 tmpfs", "scratch/./fast/"),
        volume(bindfs(&data), "data"),
        volume(format!("mount --bind {}", logs.display()), "logs"),
    ];
    let mut whole = with(
        &volumes,
        "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT; for m in scratch/fast data logs; do mountpoint -q $m; done; \
         stat -f -c %T scratch/fast; cat data/in scratch/fast/prepared; id -u; echo out > data/out; \
         echo model > $AZ_BATCHAI_OUTPUT_MODEL/m; ls $AZ_BATCHAI_INPUT_DATA",
    );
    whole["stdOutErrPathPrefix"] = json!("$AZ_BATCHAI_JOB_MOUNT_ROOT/logs");
    whole["inputDirectories"] =
        json!([{ "id": "DATA", "path": "$AZ_BATCHAI_JOB_MOUNT_ROOT/data" }]);
    whole["outputDirectories"] =
        json!([{ "id": "MODEL", "pathPrefix": "$AZ_BATCHAI_JOB_MOUNT_ROOT/logs" }]);
    whole["jobPreparation"] = json!({ "commandLine": "echo prepared > $AZ_BATCHAI_JOB_MOUNT_ROOT/scratch/fast/prepared" });
    e.submit("j", whole);
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(
        e.log("j", "stdout.txt"),
        "tmpfs\ngiven\nprepared\n54321\nin\nout\n"
    );
    nothing_is_mounted(&e);
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "out\n");
    // Copies of the logs and what the job made lie in what was mounted, and nowhere else.
    let shown = e.job("j");
    let segment = shown["jobOutputDirectoryPathSegment"].as_str().unwrap();
    assert_eq!(
        shown["mountVolumes"]["unmanagedFileSystems"][1]["relativeMountPath"],
        "data"
    );
    let own = logs.join(segment);
    let copy = fs::read_to_string(own.join("stdouterr/stdout.txt")).unwrap();
    assert_eq!(copy, e.log("j", "stdout.txt"));
    assert_eq!(
        fs::read_to_string(own.join("outputs/m")).unwrap(),
        "model\n"
    );
    let served = || {
        processes_of(&data)
            .into_iter()
            .find(|(_, line)| line.contains("bindfs"))
    };
    assert_eq!(served(), None);

    // Whichever way it ends.
    e.submit("fails", with(&volumes, "exit 3"));
    assert_eq!(e.wait("fails"), 3);
    nothing_is_mounted(&e);
    e.submit("long", with(&volumes, &begins(&e, "sleep 1000")));
    until_begun(&e);
    assert_eq!(mounts_below(&e.path().join("nodes")).len(), 3);
    let mut terminate = vec!["job", "terminate", "-n", "long", "-y"];
    terminate.extend(IN);
    e.ok(&terminate);
    e.until_job("long", "FAILED");
    nothing_is_mounted(&e);

    // Wherever the job has put it meanwhile: what it puts in its place is not unmounted.
    let other = e.path().join("nodes/a1/of-somebody/data");
    fs::create_dir_all(&other).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(&other)
        .status();
    assert!(mounted.unwrap().success());
    let moves = format!(
        "cd $AZ_BATCHAI_JOB_TEMP; mv mounts elsewhere && ln -s {} mounts && mountpoint -q elsewhere/data",
        other.parent().unwrap().display()
    );
    e.submit("moves", with(&volumes, &moves));
    assert_eq!(e.wait("moves"), 0, "{}", e.job("moves"));
    assert_eq!(
        mounts_below(&e.path().join("nodes")),
        std::slice::from_ref(&other)
    );
    unmount_below(&other);

    // Also when its agent is gone.
    let go = e.path().join("go");
    let wait = format!("while [ ! -e {} ]; do sleep 0.02; done", go.display());
    let wait = begins(&e, &wait);
    e.submit("alone", with(&volumes, &wait));
    until_begun(&e);
    e.agents.get_mut("a1").unwrap().kill();
    fs::write(&go, "").unwrap();
    until("its shim to unmount", || {
        mounts_below(&e.path().join("nodes"))
            .is_empty()
            .then_some(())
    });
    e.start_agent_as("a1", USER);
    assert_eq!(e.wait("alone"), 0, "{}", e.job("alone"));

    // And when everything of it is: the next agent cleans what is its own, and nothing else.
    fs::remove_file(&go).unwrap();
    e.submit("lost", with(&volumes, &wait));
    until_begun(&e);
    let other = e.path().join("nodes/a1/jobs-of-somebody");
    fs::create_dir(&other).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(&other)
        .status();
    assert!(mounted.unwrap().success());
    e.agents.get_mut("a1").unwrap().kill();
    let dir = e.path().join("agents/a1");
    for (pid, line) in processes_of(&dir) {
        if line.contains(" shim ") {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    until("its shim to be gone", || {
        let of_shim = |(_, line): &(i32, String)| line.contains(" shim ");
        (!processes_of(&dir).iter().any(of_shim)).then_some(())
    });
    assert!(mounts_below(&e.path().join("nodes")).len() > 1);
    assert!(served().is_some());
    fs::write(&go, "").unwrap();
    e.start_agent_as("a1", USER);
    assert_eq!(e.wait("lost"), 0, "{}", e.job("lost"));
    assert_eq!(e.job("lost")["infrastructureRetryCount"], 1);
    assert_eq!(
        mounts_below(&e.path().join("nodes")),
        std::slice::from_ref(&other)
    );
    assert_eq!(served(), None);
    unmount_below(&other);
    e.assert_nothing_left();
}

#[test]
fn a_mount_that_fails_fails_its_job_and_no_other() {
    if !able() {
        return;
    }
    let mut e = ensemble(&["a1"]);
    e.create_cluster(1);
    let good = volume("mount -t tmpfs tmpfs", "good");
    for (name, command, expected) in [
        (
            "refused",
            "mount -t no-such-type none",
            "special device none does not exist",
        ),
        ("missing", "no-such-program -x", "command not found"),
        ("idle", "true", "nothing is mounted there"),
    ] {
        e.submit(name, with(&[good.clone(), volume(command, "bad")], "true"));
        let job = e.until_job(name, "FAILED");
        let (code, message) = error(&job);
        assert_eq!(code, "JobMountFailed", "{job}");
        assert!(
            message.contains("jobs/w/e") && message.contains("/mounts/bad"),
            "{message}"
        );
        assert!(message.contains(expected), "{message}");
        assert!(message.contains(command), "{message}");
        assert_eq!(job["exitCode"], Value::Null);
        nothing_is_mounted(&e);
    }
    e.submit(
        "next",
        with(&[good], "mountpoint -q $AZ_BATCHAI_JOB_MOUNT_ROOT/good"),
    );
    assert_eq!(e.wait("next"), 0, "{}", e.job("next"));
    nothing_is_mounted(&e);
    e.assert_nothing_left();
}

#[test]
fn a_mount_that_does_not_answer_hangs_nothing_but_its_job() {
    if !able() {
        return;
    }
    let mut e = ensemble(&["a1", "a2"]);
    e.create_cluster(2);
    let quick = |name: &str| {
        let begun = Instant::now();
        e.submit(name, with(&[], "true"));
        assert_eq!(e.wait(name), 0);
        begun.elapsed()
    };
    let before = quick("before");
    // From the beginning.
    let begun = Instant::now();
    e.submit("hung", with(&[volume(hung(&e), "dead")], "true"));
    let place = until("it to be mounted", || {
        mounts_below(&e.path().join("nodes")).into_iter().next()
    });
    let during = quick("during");
    assert!(
        during < before * 3 + Duration::from_millis(500),
        "{during:?} after {before:?}"
    );
    // The agent that has it answers.
    let node = if place.starts_with(e.path().join("nodes/a1")) {
        "a1"
    } else {
        "a2"
    };
    let said = e.ok(&[
        "cluster", "node", "exec", "-g", "g", "-w", "w", "-c", "c", "-n", node, "--", "echo",
        "alive",
    ]);
    assert_eq!(said.trim(), "alive");
    let job = e.until_job("hung", "FAILED");
    let took = begun.elapsed();
    let (code, message) = error(&job);
    assert_eq!(code, "JobMountFailed", "{job}");
    assert!(message.contains("does not answer"), "{message}");
    assert!(took < Duration::from_secs(PATIENCE_S + 10), "{took:?}");
    nothing_is_mounted(&e);

    // In the middle of a job, which waits for it.
    let data = source(&e, "data");
    let read =
        "cd /; while true; do ls $AZ_BATCHAI_JOB_MOUNT_ROOT/data >/dev/null; sleep 0.1; done";
    let read = begins(&e, read);
    e.submit("dies", with(&[volume(bindfs(&data), "data")], &read));
    until_begun(&e);
    let server = processes_of(&data)
        .into_iter()
        .find(|(_, line)| line.starts_with("bindfs"));
    let server = Pid::from_raw(server.expect("it is served by a process").0);
    kill(server, Signal::SIGSTOP).unwrap();
    let begun = Instant::now();
    let job = e.until_job("dies", "FAILED");
    let (code, message) = error(&job);
    assert_eq!(code, "MountUnavailable", "{job}");
    assert!(message.contains("/mounts/data"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(PATIENCE_S + 20));
    nothing_is_mounted(&e);
    assert!(kill(server, None).is_err(), "what served it is left");
    quick("after");
    e.assert_nothing_left();
}

#[test]
fn volumes_have_places_of_their_own_and_commands_are_administrators() {
    let api = Api::start(Ensemble::with_cluster(0));
    let volumes = |places: &[&str]| v1::MountVolumes {
        unmanaged_file_systems: places
            .iter()
            .map(|path| v1::UnmanagedFileSystem {
                mount_command: "mount -t tmpfs tmpfs".into(),
                relative_mount_path: (*path).into(),
            })
            .collect(),
        ..Default::default()
    };
    let given = |places: &[&str]| v1::Job {
        mount_volumes: Some(volumes(places)),
        ..job()
    };
    let at =
        |i: usize| format!("job.mount_volumes.unmanaged_file_systems[{i}].relative_mount_path");
    // All faults at once.
    let places = ["a", "../b", "/c", ".", "./a/", "a/d", "e//f", "e"];
    let status = api.create_job("x", given(&places)).unwrap_err();
    let (code, fields) = refusal(&status);
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(fields, [1, 2, 3, 4, 5, 7].map(at), "{fields:?}");
    let many: Vec<_> = (0..200).map(|i| format!("m{i}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let status = api.create_job("x", given(&many)).unwrap_err();
    assert_eq!(refusal(&status).1, ["job.mount_volumes"]);
    // A file server that is not there is named.
    let server = v1::Job {
        mount_volumes: Some(v1::MountVolumes {
            file_servers: vec![v1::FileServerMount {
                file_server: format!("{WORKSPACE}/fileServers/f"),
                relative_mount_path: "nfs".into(),
                ..Default::default()
            }],
            ..volumes(&["a"])
        }),
        ..job()
    };
    let status = api.create_job("x", server).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("fileServers/f"), "{status}");

    // They are run as root: who owns a workspace may not say what.
    let bind = v1::CreateRoleBindingRequest {
        role_binding_id: "ada".into(),
        role_binding: Some(v1::RoleBinding {
            member: "users/ada".into(),
            role: Role::Owner as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(bind)).unwrap();
    let credentials = api.e.credentials_of(&Identity::user("ada").unwrap());
    let connector = connector(&api.e.endpoint, &credentials);
    let ada = api.runtime.block_on(connector.connect()).unwrap();
    let mut jobs = v1::job_service_client::JobServiceClient::new(ada.clone());
    let create = v1::CreateJobRequest {
        parent: EXPERIMENT.into(),
        job_id: "x".into(),
        job: Some(given(&["a"])),
        ..Default::default()
    };
    let status = api.call(jobs.create_job(create.clone())).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("batchai/nodes/setUp/action"));
    let batch = v1::BatchCreateJobsRequest {
        parent: EXPERIMENT.into(),
        requests: vec![create],
        ..Default::default()
    };
    let status = api.call(jobs.batch_create_jobs(batch)).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let mut clusters = v1::cluster_service_client::ClusterServiceClient::new(ada);
    let cluster = v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "x".into(),
        cluster: Some(v1::Cluster {
            vm_size: SIZE.into(),
            node_setup: Some(v1::NodeSetup {
                mount_volumes: Some(volumes(&["a"])),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let status = api.call(clusters.create_cluster(cluster)).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    api.create_job("x", given(&["a"])).unwrap();
}

fn create_cluster(e: &Ensemble, name: &str, nodes: usize, setup: &Value) {
    let path = e.path().join(format!("{name}.json"));
    let properties = json!({
        "vmSize": SIZE,
        "scaleSettings": { "manual": { "targetNodeCount": nodes } },
        "nodeSetup": setup,
    });
    fs::write(&path, json!({ "properties": properties }).to_string()).unwrap();
    let path = path.to_string_lossy();
    e.ok(&[
        "cluster", "create", "-g", "g", "-w", "w", "-n", name, "-f", &path,
    ]);
}

fn holders(e: &Ensemble) {
    e.ok(&["group", "create", "-n", "g"]);
    e.ok(&["workspace", "create", "-g", "g", "-n", "w"]);
    e.ok(&["experiment", "create", "-g", "g", "-w", "w", "-n", "e"]);
}

fn submit_to(e: &Ensemble, cluster: &str, name: &str, command: &str) {
    let job = json!({
        "nodeCount": 1,
        "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/shared/logs",
        "customToolkitSettings": { "commandLine": command },
    });
    let path = e.job_file(name, job);
    let path = path.to_string_lossy();
    let mut args = vec!["job", "create", "-n", name, "-c", cluster, "-f", &path];
    args.extend(IN);
    e.ok(&args);
}

/// Waits for the one node of a cluster to be in a state.
fn until_node(e: &Ensemble, cluster: &str, state: &str) -> Value {
    let of = format!("resourceGroups/g/workspaces/w/clusters/{cluster}");
    until(&format!("the node of {cluster} to be {state}"), || {
        let nodes = e.json(&["node", "list"]);
        let nodes = nodes.as_array()?.clone();
        let own = nodes.into_iter().find(|node| node["cluster"] == *of)?;
        (own["state"] == state).then_some(own)
    })
}

#[test]
fn what_a_cluster_mounts_is_there_for_its_nodes_and_no_longer() {
    if !able() {
        return;
    }
    let mut e = ensemble(&["a1", "a2"]);
    holders(&e);
    let shared = source(&e, "shared");
    let check = |e: &Ensemble| {
        json!({
            "mountVolumes": { "unmanagedFileSystems": [volume(bindfs(&shared), "shared")] },
            "setupTask": {
                "commandLine": "mountpoint -q $AZ_BATCHAI_MOUNT_ROOT/shared && touch $AZ_BATCHAI_MOUNT_ROOT/shared/set-up",
                "stdOutErrPathPrefix": e.path().join("out"),
            },
        })
    };
    create_cluster(&e, "one", 1, &check(&e));
    // Without a task as well.
    let mounts = json!({ "mountVolumes": { "unmanagedFileSystems": [
        volume(format!("mount --bind {}", shared.display()), "shared")
    ] } });
    create_cluster(&e, "two", 1, &mounts);
    until_node(&e, "one", "IDLE");
    until_node(&e, "two", "IDLE");
    assert!(shared.join("set-up").exists());
    let roots = mounts_below(&e.path().join("nodes"));
    assert_eq!(roots.len(), 2, "{roots:?}");

    // Each sees what the other writes.
    let m = "$AZ_BATCHAI_MOUNT_ROOT/shared";
    submit_to(
        &e,
        "one",
        "w1",
        &format!("echo of-one > {m}/one; chmod 666 {m}/one"),
    );
    assert_eq!(e.wait("w1"), 0, "{}", e.job("w1"));
    submit_to(
        &e,
        "two",
        "w2",
        &format!("cat {m}/one; echo of-two >> {m}/one"),
    );
    assert_eq!(e.wait("w2"), 0, "{}", e.job("w2"));
    assert_eq!(e.log("w2", "stdout.txt"), "of-one\n");
    submit_to(&e, "one", "w3", &format!("cat {m}/one"));
    assert_eq!(e.wait("w3"), 0);
    assert_eq!(e.log("w3", "stdout.txt"), "of-one\nof-two\n");

    // Agents come and go.
    for name in ["a1", "a2"] {
        e.agents.get_mut(name).unwrap().kill();
    }
    assert_eq!(mounts_below(&e.path().join("nodes")).len(), 2);
    for name in ["a1", "a2"] {
        e.start_agent_as(name, USER);
    }
    e.until_alive(2);
    submit_to(&e, "one", "w4", &format!("cat {m}/one"));
    assert_eq!(e.wait("w4"), 0, "{}", e.job("w4"));
    assert_eq!(mounts_below(&e.path().join("nodes")), roots);

    // What does not answer makes its node unusable, until it is mounted anew.
    let servers = || {
        let mut all = processes_of(&shared);
        all.retain(|(_, line)| line.starts_with("bindfs"));
        all
    };
    let server = servers()[0].0;
    // A job that uses it is ended, and says why.
    submit_to(&e, "one", "dies", &begins(&e, "sleep 1000"));
    until_begun(&e);
    // Until that was seen, there is nothing to mount: it would be mounted anew within a second.
    let away = e.path().join("away");
    fs::rename(&shared, &away).unwrap();
    kill(Pid::from_raw(server), Signal::SIGSTOP).unwrap();
    let node = until_node(&e, "one", "UNUSABLE");
    let codes = ["MountUnavailable", "MountFailed"].map(Value::from);
    assert!(codes.contains(&node["errors"][0]["code"]), "{node}");
    let list = e.json(&["cluster", "show", "-g", "g", "-w", "w", "-n", "one"]);
    assert!(codes.contains(&list["errors"][0]["code"]), "{list}");
    let failed = e.until_job("dies", "FAILED");
    let (code, message) = error(&failed);
    assert_eq!(code, "MountUnavailable", "{failed}");
    assert!(
        message.contains("mounts/shared does not answer"),
        "{message}"
    );
    until_node(&e, "two", "IDLE");
    fs::rename(&away, &shared).unwrap();
    let node = until_node(&e, "one", "IDLE");
    assert_eq!(node["errors"], Value::Null, "{node}");
    submit_to(&e, "one", "w5", &format!("cat {m}/one"));
    assert_eq!(e.wait("w5"), 0, "{}", e.job("w5"));
    // Nothing is killed that might still come to itself, before its cluster is gone.
    let _ = kill(Pid::from_raw(server), Signal::SIGCONT);

    // Who holds a mount and is cut down is missed.
    let data = e.path().join("agents");
    let holders = || {
        let all = processes_of(&data).into_iter();
        all.filter(|(_, line)| line.contains(" mounts "))
            .collect::<Vec<_>>()
    };
    let cut = holders()[0].0;
    kill(Pid::from_raw(cut), Signal::SIGKILL).unwrap();
    until("it to be held again", || {
        let now = holders();
        (now.len() == 2 && now.iter().all(|(pid, _)| *pid != cut)).then_some(())
    });
    until("it to be mounted", || {
        (mounts_below(&e.path().join("nodes")).len() == 2).then_some(())
    });

    // One that cannot be mounted again at once is said, and is when it can be.
    fs::rename(&shared, &away).unwrap();
    for (pid, _) in holders() {
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
    let node = until_node(&e, "one", "UNUSABLE");
    assert_eq!(node["errors"][0]["code"], "MountUnavailable", "{node}");
    until("the reasons to be said", || {
        let nodes = e.json(&["node", "list"]).to_string();
        let said = nodes.matches("does not answer: it cannot be mounted again: ");
        (said.count() == 2).then_some(())
    });
    fs::rename(&away, &shared).unwrap();
    until_node(&e, "one", "IDLE");
    until_node(&e, "two", "IDLE");
    submit_to(&e, "one", "w6", &format!("cat {m}/one"));
    assert_eq!(e.wait("w6"), 0, "{}", e.job("w6"));

    // Gone with the nodes, and with the cluster.
    e.ok(&[
        "cluster", "resize", "-g", "g", "-w", "w", "-n", "one", "-t", "0",
    ]);
    until("the mounts of one to go", || {
        (mounts_below(&e.path().join("nodes")).len() == 1).then_some(())
    });
    e.ok(&["cluster", "delete", "-g", "g", "-w", "w", "-n", "two", "-y"]);
    until("the mounts of the other to go", || {
        mounts_below(&e.path().join("nodes"))
            .is_empty()
            .then_some(())
    });
    until("what served them to end", || {
        servers().is_empty().then_some(())
    });

    // One that cannot be mounted is said by node and cluster, and tried again for another cluster.
    let bad = json!({ "mountVolumes": { "unmanagedFileSystems": [
        volume("mount -t no-such-type none", "shared")
    ] } });
    create_cluster(&e, "bad", 2, &bad);
    let node = until_node(&e, "bad", "UNUSABLE");
    assert_eq!(node["errors"][0]["code"], "MountFailed", "{node}");
    let message = node["errors"][0]["message"].as_str().unwrap();
    assert!(
        message.contains("special device none does not exist"),
        "{message}"
    );
    e.ok(&["cluster", "delete", "-g", "g", "-w", "w", "-n", "bad", "-y"]);
    create_cluster(&e, "good", 2, &mounts);
    until("both nodes to have it", || {
        (mounts_below(&e.path().join("nodes")).len() == 2).then_some(())
    });
    until_node(&e, "good", "IDLE");
    // An agent that ends all that runs ends that as well, and the next one has it again.
    let own = e.path().join("nodes/a1");
    let ends = || mounts_below(&own).is_empty();
    e.agent_args.push("--end-jobs-on-stop".into());
    e.agents.get_mut("a1").unwrap().kill();
    e.start_agent_as("a1", USER);
    e.until_alive(2);
    assert!(!ends());
    let agent = e.agents.get_mut("a1").unwrap();
    agent.signal(Signal::SIGTERM);
    agent.wait();
    assert!(ends());
    e.start_agent_as("a1", USER);
    until("it to be mounted again", || (!ends()).then_some(()));
    e.ok(&[
        "cluster", "delete", "-g", "g", "-w", "w", "-n", "good", "-y",
    ]);
    until("the last mounts to go", || {
        mounts_below(&e.path().join("nodes"))
            .is_empty()
            .then_some(())
    });
    until("the last holders to end", || {
        holders().is_empty().then_some(())
    });
    e.assert_nothing_left();
}
