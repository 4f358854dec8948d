//! Jobs in containers: real root file systems, archives, and what podman pulls from a real registry.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use batchai_tests::ensemble::{Ensemble, IN, mounts_below};
use batchai_tests::image::busybox_root;
use batchai_tests::process::{Background, free_port, processes_of, until};
use batchai_tests::requirement;
use flate2::Compression;
use flate2::write::GzEncoder;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";

fn able() -> bool {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root has containers");
        return false;
    }
    requirement::program("busybox", "apt-get install busybox-static").is_some()
}

/// A cluster of one agent whose jobs are nobody's, with such variables.
fn ensemble(variables: impl FnOnce(&Ensemble) -> Vec<(String, String)>) -> Ensemble {
    let mut e = Ensemble::start(0);
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let out = e.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
    e.variables = variables(&e);
    fs::create_dir_all(e.path().join("nodes/a1/jobs")).unwrap();
    // A mask that is stricter than most: of this thread only, and of what it starts.
    unshare(CloneFlags::CLONE_FS).unwrap();
    let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
    e.start_agent_as("a1", USER);
    umask(before);
    e.until_alive(1);
    e.create_cluster(1);
    e
}

/// A root file system with nothing but busybox.
fn rootfs(e: &Ensemble) -> PathBuf {
    let root = e.path().join("rootfs");
    busybox_root(&root);
    root
}

fn of(image: &str, more: Value) -> Value {
    let mut whole = json!({
        "nodeCount": 1,
        "containerSettings": { "imageSourceRegistry": { "image": image } },
    });
    whole
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    whole
}

fn rooted(root: &Path, command: &str) -> Value {
    let image = format!("rootfs:{}", root.display());
    of(
        &image,
        json!({ "customToolkitSettings": { "commandLine": command } }),
    )
}

#[test]
fn a_job_in_a_container_has_the_images_files_and_all_that_is_its_own() {
    if !able() {
        return;
    }
    let mut e = ensemble(|_| Vec::new());
    let root = rootfs(&e);
    let mut whole = rooted(
        &root,
        "set -e; cat /etc/this-is-the-image; ls / | tr '\\n' ' '; echo; id -u; whoami; echo $HOME $SECRET $PLAIN $RANK; \
         cat $AZ_BATCHAI_JOB_MOUNT_ROOT/scratch/prepared; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; \
         echo $RANK > $AZ_BATCHAI_OUTPUT_MODEL/of-$RANK; touch /tmp/x /here 2>&1 | sed 's/.*: //'; pwd; echo $PATH; \
         cat $AZ_BATCHAI_INPUT_MEMORY/given; cat $AZ_BATCHAI_INPUT_DEVICES/null; ls -d $AZ_BATCHAI_INPUT_KERNEL; \
         cd $AZ_BATCHAI_JOB_MOUNT_ROOT/scratch; touch done-$RANK; until test -e done-0 -a -e done-1; do sleep 1; done; exit 7",
    );
    whole["customToolkitSettings"]["processesPerNode"] = json!(2);
    whole["containerSettings"]["shmSize"] = json!("4m");
    whole["environmentVariables"] = json!([{ "name": "PLAIN", "value": "plain" }]);
    whole["secrets"] = json!([{ "name": "SECRET", "value": "hidden" }]);
    whole["mountVolumes"] = json!({ "unmanagedFileSystems": [
        { "mountCommand": "mount -t tmpfs -o mode=0777 tmpfs", "relativeMountPath": "scratch" } ] });
    whole["jobPreparation"] = json!({ "commandLine": "cp /etc/this-is-the-image $AZ_BATCHAI_JOB_MOUNT_ROOT/scratch/prepared" });
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(memory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(memory.path().join("given"), "given in memory\n").unwrap();
    whole["inputDirectories"] = json!([
        { "id": "MEMORY", "path": memory.path() }, { "id": "DEVICES", "path": "/dev" }, { "id": "KERNEL", "path": "/sys/kernel" } ]);
    whole["outputDirectories"] = json!([{ "id": "MODEL", "pathPrefix": e.path().join("out") }]);
    e.submit("j", whole);
    assert_eq!(e.wait("j"), 7, "{}", e.job("j"));
    let temp = e.path().join("nodes/a1/jobs/w/e/j");
    let temp = temp.display();
    for rank in 0..2 {
        let expected = format!(
            "yes\nbin dev etc proc sys tmp usr var \n54321\n54321\n{temp} hidden plain {rank}\nyes\n4096\nPermission denied\n\
             {temp}\n/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
             given in memory\n/sys/kernel\n"
        );
        assert_eq!(e.log("j", &format!("stdout-{rank}.txt")), expected);
        let made = e.path().join("out").join(segment(&e, "j"));
        let made = made.join(format!("outputs/of-{rank}"));
        assert_eq!(fs::read_to_string(&made).unwrap(), format!("{rank}\n"));
        assert_eq!(fs::metadata(&made).unwrap().uid(), 54321);
    }
    let shown = &e.job("j")["containerSettings"];
    assert_eq!(shown["shmSize"], "4m");
    let image = format!("rootfs:{}", root.display());
    assert_eq!(shown["imageSourceRegistry"]["image"], image);
    assert_eq!(e.job("j")["errors"][0]["code"], "JobFailed");
    assert!(!root.join("here").exists() && !root.join("tmp/x").exists());
    let layers = e.path().join("nodes/a1/jobs/.container");
    assert_eq!(fs::read_dir(layers).unwrap().count(), 0);
    assert!(mounts_below(&e.path().join("nodes")).is_empty());

    // What fails in it fails as elsewhere.
    let mut fails = rooted(&root, "true");
    fails["jobPreparation"] = json!({ "commandLine": "cat /etc/debian_version; exit 5" });
    e.submit("fails", fails);
    assert_eq!(e.wait("fails"), 5);
    assert_eq!(failure(&e, "fails").0, "JobPreparationFailed");
    e.submit("killed", rooted(&root, "kill -9 $$"));
    assert_eq!(e.wait("killed"), 137);
    let mut script = of(&format!("rootfs:{}", root.display()), json!({}));
    script["pyTorchSettings"] =
        json!({ "pythonScriptFilePath": "/t.py", "pythonInterpreterPath": "/no/python" });
    e.submit("none", script);
    assert_eq!(e.wait("none"), 127, "{}", e.job("none"));
    // An image of a time when python was Python 2.
    fs::write(root.join("bin/python"), "#!/bin/sh\necho python \"$@\"\n").unwrap();
    fs::set_permissions(root.join("bin/python"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut script = of(&format!("rootfs:{}", root.display()), json!({}));
    script["pyTorchSettings"] =
        json!({ "pythonScriptFilePath": "/t.py", "commandLineArgs": "'two words'" });
    e.submit("old", script);
    assert_eq!(e.wait("old"), 0, "{}", e.job("old"));
    assert_eq!(e.log("old", "stdout-0.txt"), "python /t.py two words\n");
    e.assert_nothing_left();
}

fn segment(e: &Ensemble, job: &str) -> String {
    let job = e.job(job);
    job["jobOutputDirectoryPathSegment"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn failure(e: &Ensemble, job: &str) -> (String, String) {
    let error = &e.job(job)["errors"][0];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (text("code"), text("message"))
}

/// A job that cannot have its container, and why.
fn refused(e: &Ensemble, name: &str, image: &str, why: &str) {
    e.submit(
        name,
        of(
            image,
            json!({ "customToolkitSettings": { "commandLine": "true" } }),
        ),
    );
    e.until_job(name, "FAILED");
    let (code, message) = failure(e, name);
    assert!(
        code == "FailedStartingContainer" && message.contains(why),
        "{code}: {message}"
    );
}

/// Holds a container until the test lets it go.
fn holding(e: &Ensemble, name: &str, root: &Path, exit: i32) -> PathBuf {
    let (begun, go) = (e.path().join("out/begun"), e.path().join("out/go"));
    let _ = fs::remove_file(&go);
    // What it leaves behind has no variables, and another parent.
    let command = format!(
        "env -i setsid sleep 3333 & touch {}; until [ -e {} ]; do sleep 0.05; done; exit {exit}",
        begun.display(),
        go.display()
    );
    let mut whole = rooted(root, &command);
    whole["inputDirectories"] = json!([{ "id": "OUT", "path": e.path().join("out") }]);
    e.submit(name, whole);
    until("the job to begin", || begun.exists().then_some(()));
    fs::remove_file(begun).unwrap();
    go
}

/// Those that are in a container with this image, by the mark that it has.
fn inside(mark: &str) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let image = |pid: &i32| {
        let read = fs::read_to_string(format!("/proc/{pid}/root/etc/this-is-the-image"));
        read.is_ok_and(|read| read == mark)
    };
    pids.filter(image).collect()
}

#[test]
fn a_container_ends_with_its_job_however_that_ends() {
    if !able() {
        return;
    }
    let mut e = ensemble(|_| Vec::new());
    let root = rootfs(&e);
    let marker = format!("{}\n", e.path().display());
    fs::write(root.join("etc/this-is-the-image"), &marker).unwrap();
    let nothing_inside = || {
        until("the container to be empty", || {
            inside(&marker).is_empty().then_some(())
        })
    };
    let of_job =
        |verb: &[&'static str], name: &'static str| [verb, &["-n", name, "-y"], &IN].concat();

    holding(&e, "ended", &root, 0);
    assert!(inside(&marker).len() >= 2);
    // What is run beside it is in it as well, as its user and with its variables.
    let beside = ["job", "node", "exec", "-j", "ended"];
    let beside = [
        &beside[..],
        &IN,
        &[
            "--",
            "sh",
            "-c",
            "cat /etc/this-is-the-image; id -u; echo $SHELL $HOME",
        ],
    ]
    .concat();
    let temp = e.path().join("nodes/a1/jobs/w/e/ended");
    assert_eq!(
        e.ok(&beside),
        format!("{marker}54321\n/bin/sh {}\n", temp.display())
    );
    e.ok(&of_job(&["job", "terminate"], "ended"));
    e.until_job("ended", "FAILED");
    assert_eq!(inside(&marker), [0; 0]);

    let mut short = rooted(&root, "sleep 3333 & sleep 3333");
    short["constraints"] = json!({ "maxWallClockTime": "PT2S" });
    e.submit("short", short);
    e.until_job("short", "FAILED");
    assert_eq!(failure(&e, "short").0, "JobWallClockTimeExceeded");
    assert_eq!(inside(&marker), [0; 0]);

    let able = e.json(&["node", "list"])[0]["facts"]["enforcedLimits"].to_string();
    if able.contains("memory") {
        let mut large = rooted(&root, "dd if=/dev/zero of=/dev/null bs=96M count=1");
        large["resourceLimits"] = json!({ "memoryMib": "32" });
        e.submit("large", large);
        e.until_job("large", "FAILED");
        assert_eq!(failure(&e, "large").0, "JobOutOfMemory");
    }

    // Its agent is cut down: it goes on, and its exit code arrives.
    let go = holding(&e, "alone", &root, 9);
    e.agents.get_mut("a1").unwrap().kill();
    assert!(inside(&marker).len() >= 2);
    e.start_agent_as("a1", USER);
    fs::write(&go, "").unwrap();
    assert_eq!(e.wait("alone"), 9, "{}", e.job("alone"));
    assert_eq!(inside(&marker), [0; 0]);

    // And so is its shim: nothing of the first attempt runs any more when the second begins.
    let go = holding(&e, "lost", &root, 4);
    let agent = e.path().join("agents/a1");
    let first = inside(&marker);
    for (pid, line) in processes_of(&agent) {
        if line.contains(" shim ") {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
    }
    until("the second attempt", || {
        (e.path().join("out/begun").exists()).then_some(())
    });
    let second = inside(&marker);
    assert!(
        first.iter().all(|pid| !second.contains(pid)),
        "{first:?} {second:?}"
    );
    fs::write(&go, "").unwrap();
    assert_eq!(e.wait("lost"), 4, "{}", e.job("lost"));
    assert_eq!(e.job("lost")["infrastructureRetryCount"], 1);
    nothing_inside();
    assert!(mounts_below(e.path()).is_empty());
    e.assert_nothing_left();
}

type Layer<'a> = &'a [(&'a str, EntryType, &'a str)];

/// An archive of entries; of a link the content is where it leads.
fn packed(layer: Layer<'_>) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, content) in layer {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(if name.starts_with("set/") {
            0o4755
        } else {
            0o755
        });
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        let leads = matches!(kind, EntryType::Symlink | EntryType::Link);
        if leads {
            header.set_link_name(content).unwrap();
        }
        let (uid, data) = (
            if name.contains("own") { 777 } else { 0 },
            if leads { "" } else { content },
        );
        header.set_uid(uid);
        header.set_gid(uid);
        header.set_size(data.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// An image as `docker save` writes it.
fn saved(path: &Path, layers: &[Vec<u8>], spoil: impl FnOnce(&mut Value)) {
    let ids = layers
        .iter()
        .map(|layer| format!("sha256:{}", sha256(layer)));
    let mut config = json!({
        "config": { "Env": ["FROM_IMAGE=yes", "PATH=/opt/tools:/bin"] },
        "rootfs": { "diff_ids": ids.collect::<Vec<_>>() },
    });
    spoil(&mut config);
    let names: Vec<_> = (0..layers.len())
        .map(|i| format!("{i}/layer.tar"))
        .collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": null, "Layers": names }]);
    let texts = [
        ("config.json", config.to_string()),
        ("manifest.json", manifest.to_string()),
    ];
    let texts = texts.map(|(name, text)| (name.to_owned(), text.into_bytes()));
    let mut builder = Builder::new(fs::File::create(path).unwrap());
    // The last one is compressed, and counts as what it is.
    let mut kept = layers.to_vec();
    if let Some(last) = kept.last_mut() {
        // In two members, as what compresses in parallel writes it.
        let parts = last.split_at(last.len() / 2);
        let packed = [parts.0, parts.1].map(|part| {
            let mut gz = GzEncoder::new(Vec::new(), Compression::fast());
            gz.write_all(part).unwrap();
            gz.finish().unwrap()
        });
        *last = packed.concat();
    }
    for (name, content) in names.into_iter().zip(kept).chain(texts) {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder
            .append_data(&mut header, name, &content[..])
            .unwrap();
    }
    builder.finish().unwrap();
}

/// Layers with all that they can do to each other.
fn layers(root: &Path) -> Vec<Vec<u8>> {
    use EntryType::{Char, Directory, Link, Regular, Symlink};
    let mut first = Builder::new(Vec::new());
    first.follow_symlinks(false);
    first.append_dir_all("bin", root.join("bin")).unwrap();
    let second = packed(&[
        ("run/", Directory, ""),
        ("etc/", Directory, ""),
        ("etc/resolv.conf", Symlink, "../run/none/resolv.conf"),
        ("var/", Directory, ""),
        ("var/run", Symlink, "/run"),
        ("a/", Directory, ""),
        ("a/old", Regular, "x"),
        ("b/", Directory, ""),
        ("b/old", Regular, "x"),
        ("turns", Regular, "x"),
        ("gone", Regular, "x"),
        ("mnt", Symlink, "/proc/1/root/tmp"),
        ("srv", Symlink, "../../../../../../tmp"),
    ]);
    let third = packed(&[
        ("var/run/through", Regular, "x"),
        (".wh.gone", Regular, ""),
        ("a/new", Regular, "x"),
        ("a/.wh..wh..opq", Regular, ""),
        ("b/own", Regular, "x"),
        ("b/again", Link, "b/own"),
        ("turns/", Directory, ""),
        ("turns/in", Regular, "x"),
        ("null", Char, ""),
        ("set/", Directory, ""),
        ("set/uid", Regular, "x"),
    ]);
    vec![first.into_inner().unwrap(), second, third]
}

#[test]
fn an_archive_is_unpacked_layer_by_layer_and_what_is_none_is_refused() {
    if !able() {
        return;
    }
    let mut e = ensemble(|_| Vec::new());
    let layers = layers(&rootfs(&e));
    let image = e.path().join("image.tar");
    saved(&image, &layers, |config| {
        config["config"]["User"] = json!("app");
        config["config"]["Volumes"] = json!({ "/data": {} });
        config["config"]["WorkingDir"] = json!("");
    });
    let named = |path: &Path| format!("docker-archive:{}", path.display());
    let command = "cd /; ls a b run turns; [ -e gone ] || echo gone; [ -e null ] || echo no device; stat -c '%u %h' b/again; \
                   stat -c %a set/uid; echo $FROM_IMAGE $PATH; readlink mnt; readlink srv; [ -L etc/resolv.conf ] || cat etc/resolv.conf";
    let names = fs::read_to_string("/etc/resolv.conf").unwrap();
    let again = |name: &str| {
        e.submit(
            name,
            of(
                &named(&image),
                json!({ "customToolkitSettings": { "commandLine": command } }),
            ),
        );
        assert_eq!(e.wait(name), 0, "{}", e.job(name));
        let listed = e.log(name, "stdout.txt");
        let expected = format!(
            "a:\nnew\n\nb:\nagain\nold\nown\n\nrun:\nthrough\n\nturns:\nin\ngone\nno device\n777 2\n4755\n\
             yes /opt/tools:/bin\n/proc/1/root/tmp\n../../../../../../tmp\n{names}"
        );
        assert_eq!(listed, expected);
        let log = e.log(name, "container.log");
        assert!(
            log.contains("left out: USER \"app\", VOLUME {\"/data\":{}};"),
            "{log}"
        );
        log
    };
    assert!(again("first").contains("unpacking"));
    assert!(!again("second").contains("unpacking"), "it is kept");
    // An agent was cut down while it removed the image: what is left of it is none.
    let images = e.path().join("agents/a1/images");
    let kept = fs::read_dir(&images).unwrap().flatten();
    let kept = kept.map(|entry| entry.path().join("image.json"));
    let known: Vec<_> = kept.filter(|path| path.exists()).collect();
    assert_eq!(known.len(), 1);
    fs::remove_file(&known[0]).unwrap();
    assert!(again("third").contains("unpacking"));

    let bad = e.path().join("bad.tar");
    for (at, content, why) in [
        (
            "text",
            &b"no archive, but longer than nothing"[..],
            "it is no archive",
        ),
        ("empty", b"", "it is no archive"),
        ("gzip", b"\x1f\x8b\x08\x00\x00", "gunzip"),
    ] {
        fs::write(&bad, content).unwrap();
        refused(&e, at, &named(&bad), why);
    }
    fs::write(&bad, packed(&[("a", EntryType::Regular, "x")])).unwrap();
    refused(&e, "other", &named(&bad), "manifest.json is not in it");
    saved(&bad, &layers, |config| {
        config["rootfs"]["diff_ids"][1] = json!(format!("sha256:{}", "00".repeat(32)))
    });
    refused(
        &e,
        "digest",
        &named(&bad),
        "layer 2: it is not what the image names",
    );
    // Who has only the name of an image that others have is refused as well.
    let mut others = layers.clone();
    others[1] = packed(&[("mine", EntryType::Regular, "x")]);
    saved(&image, &layers, |_| {});
    again_with(&e, "plain", &named(&image));
    let ids = layers
        .iter()
        .map(|layer| format!("sha256:{}", sha256(layer)));
    let ids: Vec<_> = ids.collect();
    saved(&bad, &others, |config| {
        config["rootfs"]["diff_ids"] = json!(ids)
    });
    refused(
        &e,
        "name-alone",
        &named(&bad),
        "layer 2: it is not what the image names",
    );
    // It is known to be another one before any of it is unpacked: that would fail otherwise.
    saved(
        &bad,
        &[packed(&[("a", EntryType::Link, "none")])],
        |config| config["rootfs"]["diff_ids"] = json!([format!("sha256:{}", "00".repeat(32))]),
    );
    refused(&e, "before", &named(&bad), "it is not what the image names");
    saved(&bad, &layers[..1], |config| {
        config["config"]["Env"] = json!([format!("LARGE={}", "x".repeat(100_000))])
    });
    refused(
        &e,
        "variables",
        &named(&bad),
        "its variables take more than 96 KiB",
    );
    greedy(&bad);
    refused(
        &e,
        "greedy",
        &named(&bad),
        "takes more memory than any image needs",
    );
    refused(&e, "special", "rootfs:/proc/sys", "cannot be below another");
    saved(&bad, &layers[..1], |config| {
        config["rootfs"]["diff_ids"] = json!([])
    });
    refused(&e, "count", &named(&bad), "other layers");
    saved(
        &bad,
        &[packed(&[("../../x", EntryType::Regular, "x")])],
        |_| {},
    );
    refused(&e, "climbs", &named(&bad), "leads out of it");
    // What is on the way to the agent's directories leads into the image, and never to the host.
    let astray = packed(&[("tmp", EntryType::Symlink, "/proc/1/root/etc")]);
    saved(&bad, &[astray], |_| {});
    refused(&e, "astray", &named(&bad), "the container cannot be made");
    let name = e.path().file_name().unwrap();
    assert!(!Path::new("/etc").join(name).exists());
    refused(
        &e,
        "absent",
        &named(&e.path().join("absent.tar")),
        "No such file",
    );
    refused(
        &e,
        "directory",
        &named(&e.path().join("out")),
        "it is no file",
    );
    refused(
        &e,
        "file",
        &format!("rootfs:{}", image.display()),
        "Not a directory",
    );

    // What its user may not see without a container he does not see by one.
    let closed = e.path().join("closed");
    fs::create_dir_all(closed.join("root")).unwrap();
    fs::copy(&image, closed.join("image.tar")).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    refused(
        &e,
        "hidden",
        &format!("rootfs:{}/root", closed.display()),
        "Permission denied",
    );
    refused(
        &e,
        "hidden-2",
        &named(&closed.join("image.tar")),
        "Permission denied",
    );
    let kept = fs::read_dir(e.path().join("agents/a1/images"))
        .unwrap()
        .flatten();
    let kept: Vec<_> = kept
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    let whole = kept.iter().filter(|name| name.len() == 64).count();
    assert_eq!(
        (whole, kept.len()),
        (3, 4),
        "no image is half there: {kept:?}"
    );
    e.assert_nothing_left();
}

/// Runs a job in an image.
fn again_with(e: &Ensemble, name: &str, image: &str) {
    let command = json!({ "customToolkitSettings": { "commandLine": "true" } });
    e.submit(name, of(image, command));
    assert_eq!(e.wait(name), 0, "{}", e.job(name));
}

/// A file that takes no room, and says that the name of its first entry is of half a terabyte.
fn greedy(path: &Path) {
    let size = 1 << 39;
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(size);
    header.set_cksum();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(size + 1024).unwrap();
}

/// A small disk in the place of a directory; the ensemble takes it away with all else that is mounted below it.
fn disk(at: &Path, bytes: u64) {
    fs::create_dir_all(at).unwrap();
    let options = format!("size={bytes},mode=0700");
    let kind = Some("tmpfs");
    mount(kind, at, kind, MsFlags::empty(), Some(&*options)).unwrap();
}

/// What is left free on every disk.
const SPARE: u64 = 256 << 20;

#[test]
fn a_full_disk_takes_images_that_nobody_uses_and_is_never_the_jobs_fault() {
    if !able() {
        return;
    }
    let mut e = ensemble(|e| {
        disk(&e.path().join("agents/a1/images"), SPARE + (32 << 20));
        Vec::new()
    });
    let base = layers(&rootfs(&e)).remove(0);
    let image = |name: &str, size: usize| {
        let path = e.path().join(format!("{name}.tar"));
        let content = "x".repeat(size);
        let large = packed(&[(name, EntryType::Regular, &content)]);
        saved(&path, &[base.clone(), large], |_| {});
        format!("docker-archive:{}", path.display())
    };
    let unpacked = |name: &str| e.log(name, "container.log").contains("unpacking");
    let (one, two) = (image("one", 20 << 20), image("two", 20 << 20));
    again_with(&e, "j1", &one);
    again_with(&e, "j2", &one);
    assert!(!unpacked("j2"));
    again_with(&e, "j3", &two);
    let log = e.log("j3", "container.log");
    assert!(
        log.contains("removing") && log.contains("tried again"),
        "{log}"
    );
    again_with(&e, "j4", &one);
    assert!(unpacked("j4"));

    let command = json!({ "customToolkitSettings": { "commandLine": "true" } });
    e.submit("j5", of(&image("three", 40 << 20), command));
    e.until_job("j5", "FAILED");
    let (code, message) = failure(&e, "j5");
    assert_eq!(code, "FailedStartingContainer");
    assert!(
        message.contains("more than the disk of the agent's --data has"),
        "{message}"
    );
    assert_eq!(e.job("j5")["infrastructureRetryCount"], 3);
    // Nothing went for what could never fit.
    again_with(&e, "j6", &one);
    assert!(!unpacked("j6"));
    e.assert_nothing_left();
}

#[test]
fn the_example_runs_as_it_is() {
    if !able() {
        return;
    }
    let mut e = ensemble(|_| Vec::new());
    let mounts = e.path().join("nodes/a1/mounts");
    for (name, mode) in [("images", 0o755), ("logs", 0o777)] {
        fs::create_dir_all(mounts.join(name)).unwrap();
        fs::set_permissions(mounts.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    saved(
        &mounts.join("images/train.tar"),
        &layers(&rootfs(&e))[..1],
        |_| {},
    );
    let example = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/container/job.json"
    );
    let submit = ["job", "create", "-n", "container", "-c", "c", "-f", example];
    e.ok(&[&submit[..], &IN].concat());
    assert_eq!(e.wait("container"), 0, "{}", e.job("container"));
    assert_eq!(
        e.log("container", "stdout.txt"),
        "the image has bin dev etc proc sys tmp var\ntrained by user 54321\n"
    );
    e.assert_nothing_left();
}

const PASSWORD: &str = "hunter2-of-the-registry";
/// The same, as a registry keeps it.
const HASH: &str = "$2b$04$rGxSX3/bAVQs6D/GNZn8EOTuOP4sfsScS0vShWT9sCN8pFVZZxoxa";

/// A registry that only lets in who knows the password, and what podman needs to use it.
struct Registry {
    _process: Background,
    host: String,
    variables: Vec<(String, String)>,
}

impl Registry {
    fn start(dir: &Path) -> Registry {
        let host = format!("127.0.0.1:{}", free_port());
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let at = dir.display();
        let users = write("users", format!("reader:{HASH}\n"));
        let config = write(
            "registry.yml",
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: '{at}/registry'}}}}\n\
             http: {{addr: '{host}'}}\nauth: {{htpasswd: {{realm: test, path: '{users}'}}}}\n"
            ),
        );
        let storage = write(
            "storage.conf",
            format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = \"{at}/engine\"\nrunroot = \"{at}/engine-run\"\n"
            ),
        );
        let registries = write(
            "registries.conf",
            format!("[[registry]]\nlocation = \"{host}\"\ninsecure = true\n"),
        );
        let variables = [
            ("CONTAINERS_STORAGE_CONF", storage),
            ("CONTAINERS_REGISTRIES_CONF", registries),
        ];
        let process = Background::start(Command::new("docker-registry").args(["serve", &config]));
        until("the registry to listen", || {
            std::net::TcpStream::connect(&host).ok()
        });
        Registry {
            _process: process,
            host,
            variables: variables
                .map(|(name, value)| (name.to_owned(), value))
                .to_vec(),
        }
    }

    fn podman(&self, args: &[&str]) {
        let mut podman = Command::new("podman");
        let done = podman
            .args(args)
            .envs(self.variables.iter().cloned())
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
}

/// Looks at all command lines of this machine until it is dropped.
struct Eye {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<(usize, Vec<String>)>>,
}

impl Eye {
    fn open(secrets: Vec<String>) -> Eye {
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let (mut pulls, mut seen) = (0, Vec::new());
            while !ended.load(Ordering::Relaxed) {
                for entry in fs::read_dir("/proc").unwrap().flatten() {
                    let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    let line = String::from_utf8_lossy(&line).replace('\0', " ");
                    pulls += usize::from(line.contains("podman pull --authfile"));
                    if secrets.iter().any(|secret| line.contains(secret)) {
                        seen.push(line);
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            (pulls, seen)
        });
        Eye {
            end,
            thread: Some(thread),
        }
    }

    /// How often it saw somebody pull, and the lines with a secret.
    fn close(mut self) -> (usize, Vec<String>) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

#[test]
fn an_image_is_pulled_by_who_may_and_nobody_sees_how() {
    let tools = [
        ("podman", "apt-get install podman"),
        ("docker-registry", "apt-get install docker-registry"),
    ];
    if !able()
        || tools
            .iter()
            .any(|(tool, hint)| requirement::program(tool, hint).is_none())
    {
        return;
    }
    let mut registry = None;
    let mut e = ensemble(|e| {
        disk(&e.path().join("agents/a1/images"), SPARE + (20 << 20));
        registry.insert(Registry::start(e.path())).variables.clone()
    });
    let registry = registry.unwrap();
    let tar = e.path().join("rootfs.tar");
    let mut builder = Builder::new(fs::File::create(&tar).unwrap());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", rootfs(&e)).unwrap();
    builder.finish().unwrap();
    let (tar, host) = (tar.display().to_string(), registry.host.clone());
    let image = format!("{host}/vision/train:1");
    registry.podman(&["import", "--change", "ENV FROM_IMAGE=yes", &tar, &image]);
    registry.podman(&["push", "--creds", &format!("reader:{PASSWORD}"), &image]);
    registry.podman(&["tag", &image, "localhost/mine:2"]);
    registry.podman(&["untag", &image, &image]);

    let pulled = |password: &str| {
        let command = "cat /etc/this-is-the-image; echo $FROM_IMAGE; env | grep -c hunter2 || true";
        let mut whole = of(
            &image,
            json!({ "customToolkitSettings": { "commandLine": command } }),
        );
        let source = &mut whole["containerSettings"]["imageSourceRegistry"];
        source["serverUrl"] = json!(format!("http://{host}/"));
        source["credentials"] = json!({ "username": "reader", "password": password });
        whole
    };
    let both = BASE64_STANDARD.encode(format!("reader:{PASSWORD}"));
    let eye = Eye::open(vec![PASSWORD.to_owned(), both.clone()]);
    e.submit("pulled", pulled(PASSWORD));
    // The file that it was submitted with.
    fs::remove_file(e.path().join("pulled.json")).unwrap();
    assert_eq!(e.wait("pulled"), 0, "{}", e.job("pulled"));
    let (pulls, seen) = eye.close();
    assert_eq!(
        e.log("pulled", "stdout.txt"),
        "yes\nyes\n0\n",
        "{}",
        e.job("pulled")
    );
    assert!(pulls > 0 && seen.is_empty(), "{pulls} {seen:?}");
    let shown = &e.job("pulled")["containerSettings"]["imageSourceRegistry"];
    assert_eq!(shown["credentials"], json!({ "username": "reader" }));
    assert_eq!(shown["serverUrl"], format!("http://{host}/"));
    for secret in [PASSWORD, &both] {
        let found = Command::new("grep")
            .args(["-rlF", secret])
            .arg(e.path())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    }
    let log = e.log("pulled", "container.log");
    assert!(
        log.contains("podman pull --authfile") && log.contains("unpacking"),
        "{log}"
    );

    // It is there, and still nobody has it who may not pull it.
    refused(&e, "nobody", &image, "cannot pull");
    e.submit("wrong", pulled("wrong"));
    e.until_job("wrong", "FAILED");
    let (code, message) = failure(&e, "wrong");
    assert!(
        code == "FailedStartingContainer" && message.contains("cannot pull"),
        "{message}"
    );
    let details = e.job("wrong")["errors"][0]["details"].to_string();
    assert!(
        details.contains("unauthorized") || details.contains("authentication"),
        "{details}"
    );
    refused(
        &e,
        "unknown",
        "localhost/nobodys",
        "podman has no image localhost/nobodys",
    );
    let command =
        json!({ "customToolkitSettings": { "commandLine": "cat /etc/this-is-the-image" } });
    e.submit("local", of("localhost/mine:2", command));
    assert_eq!(e.wait("local"), 0, "{}", e.job("local"));
    assert!(!e.log("local", "container.log").contains("unpacking"));

    // It would be there twice, in a file and unpacked, and there is no room for that: nobody asks for the file.
    let mut root = Builder::new(fs::File::create(&tar).unwrap());
    let content = vec![b'x'; 16 << 20];
    let mut header = Header::new_gnu();
    header.set_size(content.len() as u64);
    root.append_data(&mut header, "large", &content[..])
        .unwrap();
    root.finish().unwrap();
    registry.podman(&["import", &tar, "localhost/large:1"]);
    let command = json!({ "customToolkitSettings": { "commandLine": "true" } });
    e.submit("large", of("localhost/large:1", command));
    e.until_job("large", "FAILED");
    let (code, message) = failure(&e, "large");
    assert_eq!(code, "FailedStartingContainer");
    assert!(
        message.contains("more than the disk of the agent's --data has"),
        "{message}"
    );
    assert_eq!(e.job("large")["infrastructureRetryCount"], 3);
    let log = e.log("large", "container.log");
    assert!(!log.contains("podman save"), "{log}");
    drop(registry);
    e.assert_nothing_left();
}

#[test]
fn a_node_that_has_no_such_image_says_so() {
    if !able() {
        return;
    }
    let mut e = ensemble(|e| {
        let programs = e.path().join("programs");
        fs::create_dir(&programs).unwrap();
        for program in ["true", "sh"] {
            let found = requirement::program(program, "").unwrap();
            symlink(found, programs.join(program)).unwrap();
        }
        vec![("PATH".to_owned(), programs.display().to_string())]
    });
    let node = &e.json(&["node", "list"])[0];
    assert_eq!(
        node["facts"]["imageSources"],
        json!(["rootfs", "docker-archive"])
    );
    let command = json!({ "customToolkitSettings": { "commandLine": "true" } });
    e.submit("j", of("ubuntu:22.04", command));
    // It is given to no node that would refuse it, and keeps nobody else waiting.
    let why = until("it to be said why it waits", || {
        let why = e.job("j")["pendingReason"].as_str()?.to_owned();
        (!why.is_empty()).then_some(why)
    });
    assert_eq!(
        why,
        "the job wants 1 nodes that have docker or podman for its image (facts.imageSources), cluster c has 0: it starts when more of them \
         have it"
    );
    again_with(&e, "able", &format!("rootfs:{}", rootfs(&e).display()));
    e.ok(&[&["job", "terminate", "-n", "j", "-y"][..], &IN].concat());
    e.assert_nothing_left();
}
