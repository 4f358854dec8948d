//! The files of file servers: copied both ways without mounting anything, gone on with where that broke off, and out of reach of who may
//! not.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use batchai_common::names::hex;
use batchai_common::parts;
use batchai_common::tls::Identity;
use batchai_tests::ensemble::{Ensemble, SIZE, create_file_server};
use batchai_tests::process::{Background, processes_of, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::requirement;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";
/// The file server's full name.
const DATA: &str = "resourceGroups/g/workspaces/w/fileServers/data";
/// Large enough to be cut off amid it.
const LARGE: usize = 256 << 20;
/// A node that offers storage and works, and a file server `data` on it.
fn ensemble() -> Option<(Ensemble, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root serves files");
        return None;
    }
    let mut e = Ensemble::start(0);
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let storage = e.path().join("storage");
    fs::create_dir(&storage).unwrap();
    // What leads there is the agent's own.
    fs::set_permissions(&storage, fs::Permissions::from_mode(0o700)).unwrap();
    let out = e.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
    let storage = storage.to_string_lossy().into_owned();
    e.agent_args = vec!["--storage-root".to_owned(), storage];
    e.start_agent_as("store", USER);
    e.until_alive(1);
    e.create_cluster(1);
    let shown = e.json(&create_file_server("data", SIZE));
    let data = shown["mountSettings"]["mountPoint"].as_str();
    let data = data.unwrap_or_else(|| panic!("{shown}")).into();
    Some((e, data))
}

/// The arguments of a verb.
fn verb<'a>(verb: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let all = ["file-server", "file", verb, "-g", "g", "-w", "w"];
    [&all[..], &["-n", "data"], more].concat()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    said(output)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Every file below a directory with its content.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut open) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(path) = open.pop() {
        for entry in fs::read_dir(&path).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let inside = path.strip_prefix(dir).unwrap().to_owned();
                    found.insert(inside, fs::read(&path).unwrap());
                }
            }
        }
    }
    found
}

fn random(path: &Path, size: usize) {
    let mut bytes = vec![0; size];
    fastrand::Rng::with_seed(size as u64).fill(&mut bytes);
    fs::File::create(path).unwrap().write_all(&bytes).unwrap();
}

/// A thousand small files in directories, an empty one and a larger one.
fn many(dir: &Path) {
    for i in 0..1000 {
        let below = dir.join(format!("{}/{}", i % 10, i % 7));
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join(format!("file {i}")), format!("{i}\n")).unwrap();
    }
    fs::write(dir.join("empty"), "").unwrap();
    random(&dir.join("larger"), 5_000_000);
}

#[test]
fn files_go_both_ways_and_jobs_see_and_change_them() {
    let Some((mut e, data)) = ensemble() else {
        return;
    };
    let (local, back) = (e.path().join("local/set"), e.path().join("back"));
    many(&local);
    symlink("/etc/passwd", local.join("link")).unwrap();
    fs::create_dir(local.join("nothing")).unwrap();
    mode(&local.join("larger"), 0o700);
    let upload = e.run(&verb("upload", &[text(&local), "-p", "sets/a"]));
    let printed = good(&upload);
    assert_eq!(printed.matches(" of them sent").count(), 1002, "{printed}");
    assert!(
        printed.contains("link: not sent: it is no file"),
        "{printed}"
    );
    fs::remove_file(local.join("link")).unwrap();
    let expected = tree(&local);
    assert_eq!(expected.len(), 1002);
    assert!(tree(&data.join("sets/a/set")) == expected);
    assert!(data.join("sets/a/set/nothing").is_dir());
    let own = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o777)
    };
    assert_eq!(own(&data.join("sets/a/set")), (54_321, 54_322, 0o755));
    // A program is one there, for whoever may read it.
    let of_larger = || own(&data.join("sets/a/set/larger"));
    assert_eq!(of_larger(), (54_321, 54_322, 0o755));
    assert_eq!(own(&data.join("sets/a/set/empty")).2, 0o644);

    // Once more there is nothing to send; another content replaces the file.
    fs::write(local.join("empty"), "no more").unwrap();
    mode(&local.join("larger"), 0o600);
    let larger = [
        text(&local).to_owned() + "/larger",
        text(&local).to_owned() + "/empty",
    ];
    let printed = good(&e.run(&verb(
        "upload",
        &[&larger[0], &larger[1], "-p", "/sets/a/set/"],
    )));
    assert!(
        printed.contains("larger: 5000000 bytes, all there already"),
        "{printed}"
    );
    assert!(
        printed.contains("empty: 7 bytes, 7 of them sent"),
        "{printed}"
    );

    assert_eq!(of_larger(), (54_321, 54_322, 0o644));

    let listed = e.json(&verb("list", &["-p", "sets/a/set"]));
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 13);
    assert_eq!(listed[12]["path"], "sets/a/set/nothing");
    assert_eq!(listed[0]["path"], "sets/a/set/0");
    assert_eq!(listed[0]["fileType"], "DIRECTORY");
    assert_eq!(listed[11]["fileType"], "FILE");
    assert_eq!(listed[11]["path"], "sets/a/set/larger");
    assert_eq!(listed[11]["sizeBytes"], "5000000");
    assert!(listed[11]["modifyTime"].is_string());
    let one = e.json(&verb("list", &["-p", "sets/a/set/larger"]));
    assert_eq!(one.as_array().unwrap()[..], listed[11..12]);

    let job = json!({
        "nodeCount": 1,
        "mountVolumes": { "fileServers": [{
            "fileServer": { "id": "resourceGroups/g/workspaces/w/fileServers/data" },
            "relativeMountPath": "d",
        }] },
        "customToolkitSettings": { "commandLine": "cd $AZ_BATCHAI_JOB_MOUNT_ROOT/d/sets/a/set && \
            stat -c '%u:%g' larger && wc -c < larger && \
            echo more >> empty && echo new > from-job && chmod +x from-job" },
    });
    e.submit("j", job);
    assert_eq!(e.wait("j"), 0, "{}", e.log("j", "stderr.txt"));
    assert_eq!(e.log("j", "stdout.txt"), "54321:54322\n5000000\n");

    let download = verb("download", &["-p", "sets/a", "-d", text(&back)]);
    good(&e.run(&download));
    let mut expected = tree(&local);
    expected.insert("empty".into(), b"no moremore\n".to_vec());
    expected.insert("from-job".into(), b"new\n".to_vec());
    assert!(tree(&back.join("a/set")) == expected);
    let is_program = |path: &str| own(&back.join(path)).2 & 0o100 != 0;
    assert!(is_program("a/set/from-job") && !is_program("a/set/larger"));
    let one = e.json(&verb("list", &["-p", "sets/a/set/from-job"]));
    assert_eq!(one[0]["executable"], true);
    // Also where the content is there already.
    mode(&back.join("a/set/from-job"), 0o600);
    let printed = good(&e.run(&download));
    assert!(
        printed.contains("from-job: 4 bytes, all there already"),
        "{printed}"
    );
    assert!(is_program("a/set/from-job"));
    let single = verb(
        "download",
        &["-p", "sets/a/set/from-job", "-d", text(&back)],
    );
    let printed = good(&e.run(&single));
    assert!(
        printed.contains("from-job: 4 bytes, 4 of them received"),
        "{printed}"
    );
    assert_eq!(fs::read_to_string(back.join("from-job")).unwrap(), "new\n");
    let delete = [
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
    e.ok(&delete);
    e.assert_nothing_left();
}

/// What came so far of a file that is being written.
fn part_of(dir: &Path, name: &str) -> Option<u64> {
    let start = format!(".{name}.part");
    let mut entries = fs::read_dir(dir).ok()?.filter_map(Result::ok);
    let part = entries.find(|e| e.file_name().to_string_lossy().starts_with(&start))?;
    Some(part.metadata().ok()?.len())
}

fn cut_off_amid(dir: &Path, name: &str) {
    until("a good part of the file to be there", || {
        part_of(dir, name).filter(|size| *size > 32 << 20)
    });
}

/// How many bytes went over the network, as the command says.
fn moved(printed: &str) -> u64 {
    let at = printed
        .find(" of them ")
        .unwrap_or_else(|| panic!("{printed}"));
    let number = printed[..at].rsplit(' ').next().unwrap();
    number.parse().unwrap()
}

#[test]
fn what_broke_off_is_gone_on_with_whoever_was_killed() {
    let Some((mut e, data)) = ensemble() else {
        return;
    };
    let large = e.path().join("large");
    random(&large, LARGE);
    let upload = verb("upload", &[text(&large)]);
    // The agent dies, and comes again while the command waits.
    let begun = Instant::now();
    let running = Background::start(&mut e.command(&upload));
    cut_off_amid(&data, "large");
    e.agents.remove("store").unwrap().kill();
    let left = until("what wrote to have ended", || {
        let all = processes_of(&e.path().join("agents/store"));
        assert!(!data.join("large").exists(), "it was not cut off");
        let writes = all.iter().any(|(_, line)| line.contains(" put"));
        (!writes).then(|| part_of(&data, "large").unwrap())
    });
    e.start_agent_as("store", USER);
    let printed = good(&running.finish());
    println!("killed agent: {left} bytes were there, {printed}");
    // What was on its way when it died is sent twice; nothing else.
    let most = LARGE as u64 + (8 << 20);
    assert!((LARGE as u64..most).contains(&moved(&printed)), "{printed}");
    println!("{:?}", begun.elapsed());
    assert!(fs::read(data.join("large")).unwrap() == fs::read(&large).unwrap());
    assert_eq!(part_of(&data, "large"), None);

    // The command dies; the next one goes on.
    fs::rename(data.join("large"), data.join("first")).unwrap();
    let running = Background::start(&mut e.command(&upload));
    cut_off_amid(&data, "large");
    drop(running);
    let printed = good(&e.run(&upload));
    assert!(moved(&printed) <= LARGE as u64 - (32 << 20), "{printed}");
    assert!(fs::read(data.join("large")).unwrap() == fs::read(&large).unwrap());

    // The coordinator dies amid a download, and comes again.
    let back = e.path().join("back");
    let download = verb("download", &["-p", "large", "-d", text(&back)]);
    let running = Background::start(&mut e.command(&download));
    cut_off_amid(&back, "large");
    e.coordinator.take().unwrap().kill();
    assert!(!back.join("large").exists(), "it was not cut off");
    e.start_coordinator();
    assert_eq!(moved(&good(&running.finish())), LARGE as u64);
    assert!(fs::read(back.join("large")).unwrap() == fs::read(&large).unwrap());

    // What lies here of another file is not gone on with.
    fs::remove_file(back.join("large")).unwrap();
    let part = parts::name("large", &format!("{DATA}/large"));
    fs::write(back.join(part), "something else").unwrap();
    let printed = good(&e.run(&download));
    assert!(moved(&printed) >= LARGE as u64, "{printed}");
    assert!(fs::read(back.join("large")).unwrap() == fs::read(&large).unwrap());
}

#[test]
fn nobody_gets_out_of_the_directory_or_beyond_his_role() {
    let Some((e, data)) = ensemble() else {
        return;
    };
    let (outside, local) = (e.path().join("outside"), e.path().join("file"));
    fs::create_dir(&outside).unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::write(&local, "content").unwrap();
    symlink(&outside, data.join("out")).unwrap();
    symlink(outside.join("secret"), data.join("file")).unwrap();
    fs::create_dir(data.join("roots")).unwrap();
    fs::write(data.join("roots/own"), "x").unwrap();
    fs::set_permissions(data.join("roots/own"), fs::Permissions::from_mode(0o600)).unwrap();
    let local = text(&local);
    let to = e.path().join("to");
    let to = text(&to);
    for (args, why) in [
        (
            verb("list", &["-p", "none"]),
            "none of resourceGroups/g/workspaces/w/fileServers/data does not exist",
        ),
        (
            verb("list", &["-p", "../.."]),
            "path: must be a relative path",
        ),
        (verb("list", &["-p", "out"]), "symbolic link"),
        (
            verb("download", &["-p", "none", "-d", to]),
            "does not exist",
        ),
        (
            verb("download", &["-p", "out/secret", "-d", to]),
            "symbolic link",
        ),
        (verb("download", &["-p", "file", "-d", to]), "symbolic link"),
        (
            verb("download", &["-p", "roots/own", "-d", to]),
            "Permission denied",
        ),
        (
            verb("upload", &[local, "-p", "../x"]),
            "start.path: must be a relative path",
        ),
        (verb("upload", &[local, "-p", "out"]), "symbolic link"),
        (verb("upload", &[local]), "symbolic link"),
        (verb("upload", &[local, "-p", "roots"]), "Permission denied"),
        (
            verb("upload", &[local, "-p", "roots/own"]),
            "own: Not a directory",
        ),
        (verb("upload", &["/none"]), "No such file"),
    ] {
        let (_, said) = e.fails(&args);
        assert!(said.contains(why), "{args:?}: {said}");
    }
    assert_eq!(tree(&outside).len(), 1);
    let absent = [
        "file-server",
        "file",
        "list",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        "none",
    ];
    let (_, said) = e.fails(&absent);
    assert!(said.contains("fileServers/none does not exist"), "{said}");

    let reader = e.credentials_of(&Identity::user("ada").unwrap());
    let as_reader = |args: &[&str]| {
        let mut command = e.command(args);
        command
            .env("BATCHAI_CREDENTIALS", &reader)
            .output()
            .unwrap()
    };
    let list = verb("list", &[]);
    assert!(!as_reader(&list).status.success());
    let bind = |role| {
        let create = [
            "role", "create", "-u", "ada", "--role", role, "-g", "g", "-n", role,
        ];
        e.ok(&create);
    };
    bind("reader");
    good(&as_reader(&list));
    let upload = verb("upload", &[local, "-p", "sets"]);
    let refused = as_reader(&upload);
    let why = said_of(&refused);
    assert!(why.contains("fileServers/files/write"), "{why}");
    assert!(!data.join("sets").exists());
    bind("contributor");
    good(&as_reader(&upload));
    assert_eq!(fs::read(data.join("sets/file")).unwrap(), b"content");
    let download = verb("download", &["-p", "sets", "-d", to]);
    good(&as_reader(&download));
    assert_eq!(
        fs::read(Path::new(to).join("sets/file")).unwrap(),
        b"content"
    );
}

fn said_of(output: &Output) -> String {
    assert!(!output.status.success());
    said(output)
}

#[test]
fn whichever_replica_is_asked_files_come_from_the_node() {
    if !nix::unistd::geteuid().is_root() {
        return requirement::skip("only root serves files");
    }
    let mut r = Replicas::start(3, &[]);
    let storage = r.path().join("storage");
    fs::create_dir(&storage).unwrap();
    let storage = format!("BATCHAI_STORAGE_ROOT={}", storage.display());
    let all = r.list();
    r.start_agent_by(&["env".to_owned(), storage], "store", &all);
    r.create_cluster(1);
    let shown: Value = serde_json::from_str(&r.ok(&create_file_server("data", SIZE))).unwrap();
    let data: PathBuf = shown["mountSettings"]["mountPoint"]
        .as_str()
        .unwrap()
        .into();
    let leader = r.leader();
    let local = r.path().join("local");
    for id in 1..=3 {
        fs::write(&local, format!("by {id}")).unwrap();
        let at = r.endpoint(id).to_owned();
        r.ok_at(&at, &verb("upload", &[text(&local)]));
        assert_eq!(
            fs::read_to_string(data.join("local")).unwrap(),
            format!("by {id}")
        );
        let back = r.path().join(format!("back-{id}"));
        r.ok_at(&at, &verb("download", &["-p", "local", "-d", text(&back)]));
        let read = fs::read_to_string(back.join("local")).unwrap();
        assert_eq!(read, format!("by {id}"), "leader {leader}");
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn what_cannot_be_copied_is_said_by_its_name_and_the_rest_is_copied() {
    let Some((e, data)) = ensemble() else {
        return;
    };
    let set = data.join("set");
    fs::create_dir_all(set.join("nothing")).unwrap();
    let mut expected = BTreeMap::new();
    let mut good_file = |name: &str, content: &str| {
        fs::write(set.join(name), content).unwrap();
        expected.insert(PathBuf::from(name), content.as_bytes().to_vec());
    };
    // Names that a download could take for its own.
    good_file("model", "the model");
    good_file(".model.part", "another file");
    good_file(".model.part-x", "one more");
    good_file(&"l".repeat(255), "a longest name");
    good_file("\u{1b}[2Jred", "with what moves the cursor");
    // What came so far of an upload is no file yet.
    fs::write(set.join(parts::name("model", "x")), "the mo").unwrap();
    fs::write(set.join(OsStr::from_bytes(b"bad\xff")), "x").unwrap();
    fs::write(set.join("secret\u{1b}[2J"), "x").unwrap();
    mode(&set.join("secret\u{1b}[2J"), 0o600);
    fs::create_dir(set.join("closed")).unwrap();
    fs::write(set.join("closed/inside"), "x").unwrap();
    mode(&set.join("closed"), 0o744);
    fs::create_dir(set.join("shut")).unwrap();
    mode(&set.join("shut"), 0o700);
    symlink("model", set.join("link")).unwrap();

    let listed = e.json(&verb("list", &["-p", "set"]));
    let listed = listed.as_array().unwrap();
    let of = |name: &str| {
        let path = format!("set/{name}");
        let found = listed.iter().find(|file| file["path"] == path.as_str());
        let found = found.unwrap_or_else(|| panic!("{path} is not listed"));
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        (text("fileType"), text("sizeBytes"))
    };
    let is = |kind: &str, size: &str| (kind.to_owned(), size.to_owned());
    assert_eq!(of("model"), is("FILE", "9"));
    assert_eq!(of("link"), is("OTHER", ""));
    assert_eq!(of("bad\u{fffd}"), is("UNREADABLE", ""));
    assert_eq!(listed.len(), 11);
    let table = e.ok(&[&verb("list", &["-p", "set"])[..], &["-o", "table"]].concat());
    assert!(!table.contains('\u{1b}') && table.contains("unreadable") && table.contains("other"));

    let back = e.path().join("back");
    fs::create_dir_all(back.join("set")).unwrap();
    fs::write(back.join("set/.link.part"), "the user's own").unwrap();
    expected.insert(".link.part".into(), b"the user's own".to_vec());
    let download = verb("download", &["-p", "set", "-d", text(&back)]);
    let (code, printed) = e.fails(&download);
    println!("{printed}");
    assert_eq!(code, 1);
    assert!(!printed.contains('\u{1b}'), "{printed:?}");
    for line in [
        "batchai: set/bad\u{fffd}: it may not be looked at, or its name is not UTF-8",
        "batchai: set/closed/inside: it may not be looked at, or its name is not UTF-8",
        "batchai: set/link: not copied: it is a link, or no file",
        "batchai: 4 of 9 failed",
    ] {
        assert!(printed.lines().any(|l| l == line), "{line}: {printed}");
    }
    for begin in ["batchai: set/secret\\u{1b}[2J: ", "batchai: set/shut: "] {
        let line = printed.lines().find(|line| line.starts_with(begin));
        assert!(
            line.is_some_and(|l| l.contains("Permission denied")),
            "{printed}"
        );
    }
    assert!(
        tree(&back.join("set")) == expected,
        "{:?}",
        tree(&back.join("set")).keys()
    );
    assert!(back.join("set/nothing").is_dir());

    // Here as well.
    let local = e.path().join("local");
    fs::create_dir(&local).unwrap();
    fs::write(local.join("a"), "a").unwrap();
    fs::write(local.join(OsStr::from_bytes(b"b\xff")), "b").unwrap();
    fs::write(local.join(parts::name("c", "x")), "c").unwrap();
    fs::write(local.join("d"), "d").unwrap();
    fs::create_dir_all(data.join("local/a")).unwrap();
    mode(&data.join("local"), 0o777);
    let (code, printed) = e.fails(&verb("upload", &[text(&local)]));
    assert_eq!(code, 1, "{printed}");
    assert!(
        printed.contains("local/a: a directory lies there"),
        "{printed}"
    );
    assert!(
        printed.contains("b\u{fffd}: its name is not UTF-8"),
        "{printed}"
    );
    assert!(
        printed.contains("not sent: it is what came so far"),
        "{printed}"
    );
    assert!(printed.contains("batchai: 2 of 3 failed"), "{printed}");
    assert_eq!(fs::read(data.join("local/d")).unwrap(), b"d");
}

#[test]
fn what_is_there_already_is_not_sent_again_unless_it_is_damaged() {
    let Some((e, data)) = ensemble() else {
        return;
    };
    let (local, back) = (e.path().join("file"), e.path().join("back"));
    random(&local, 3_000_000);
    let content = fs::read(&local).unwrap();
    // What an earlier upload left there, and the disk damaged since.
    let key = format!("file/{}/{}", content.len(), hex(&Sha256::digest(&content)));
    let part = data.join(parts::name("file", &key));
    let mut damaged = content[..2_000_000].to_vec();
    damaged[1_000_000] ^= 1;
    fs::write(&part, damaged).unwrap();
    chown(&part, Some(54_321), Some(54_322)).unwrap();
    let printed = good(&e.run(&verb("upload", &[text(&local)])));
    assert_eq!(moved(&printed), 4_000_000, "{printed}");
    assert!(fs::read(data.join("file")).unwrap() == content && !part.exists());

    fs::write(data.join("other"), "other").unwrap();
    let download = verb("download", &["-d", text(&back)]);
    assert_eq!(
        good(&e.run(&download)).matches(" of them received").count(),
        2
    );
    let printed = good(&e.run(&download));
    assert_eq!(printed.matches("all there already").count(), 2, "{printed}");
    assert!(!printed.contains("received"), "{printed}");
    // The same size is not the same content.
    fs::write(data.join("other"), "OTHER").unwrap();
    let printed = good(&e.run(&download));
    assert!(
        printed.contains("file: 3000000 bytes, all there already"),
        "{printed}"
    );
    assert_eq!(moved(&printed), 5, "{printed}");
    assert_eq!(fs::read(back.join("other")).unwrap(), b"OTHER");
}

#[test]
fn a_full_disk_is_said_and_has_its_room_again() {
    let Some((e, data)) = ensemble() else {
        return;
    };
    let small = data.join("small");
    fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=4m,mode=0777", "tmpfs"]);
    if !mount.arg(&small).output().is_ok_and(|o| o.status.success()) {
        return requirement::skip("a small tmpfs cannot be mounted");
    }
    let local = e.path().join("local");
    fs::create_dir(&local).unwrap();
    random(&local.join("large"), 6_000_000);
    fs::write(local.join("small"), "small").unwrap();
    let (code, printed) = e.fails(&verb("upload", &[text(&local), "-p", "small"]));
    println!("{printed}");
    assert_eq!(code, 1);
    assert!(
        printed.contains("small/local/large: the file server's disk is full"),
        "{printed}"
    );
    assert!(printed.contains("1 of 2 failed"), "{printed}");
    let left: Vec<_> = tree(&small).into_keys().collect();
    assert_eq!(left, [PathBuf::from("local/small")]);
    // What unmounts it is the end of the ensemble.
}
