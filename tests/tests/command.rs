//! The `batchai` command as people use it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use batchai_tests::ensemble::{Ensemble, IN, SIZE};
use batchai_tests::process::{Background, processes_of, until};
use serde_json::{Value, json};

/// The verbs' options are kept in a configuration file of the ensemble's own.
fn kept(e: &Ensemble, args: &[&str]) -> Command {
    let mut command = e.command(args);
    command
        .env("BATCHAI_CONFIG", e.path().join("config.json"))
        .env_remove("BATCHAI_ENDPOINT")
        .env_remove("BATCHAI_CREDENTIALS")
        .current_dir(e.path());
    command
}

fn run(e: &Ensemble, args: &[&str]) -> Output {
    kept(e, args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn ok(e: &Ensemble, args: &[&str]) -> String {
    let output = run(e, args);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn fails(e: &Ensemble, args: &[&str]) -> (i32, String) {
    let output = run(e, args);
    assert!(
        !output.status.success(),
        "{args:?}: {}",
        text(&output.stdout)
    );
    (output.status.code().unwrap(), text(&output.stderr))
}

/// Keeps everything that the verbs want to know.
fn keep(e: &Ensemble) {
    for (setting, value) in [
        ("endpoint", e.endpoint.as_str()),
        ("credentials", &e.credentials().to_string_lossy()),
        ("group", "g"),
        ("workspace", "w"),
        ("experiment", "e"),
        ("cluster", "c"),
    ] {
        ok(e, &["config", "set", setting, value]);
    }
}

#[test]
fn what_is_kept_need_not_be_typed() {
    let e = Ensemble::with_cluster(0);
    let credentials = e.credentials().to_string_lossy().into_owned();
    let known = ["--endpoint", &e.endpoint, "--credentials", &credentials];
    let (code, said) = fails(&e, &[&["cluster", "list"][..], &known].concat());
    assert_eq!(code, 2);
    assert!(said.contains("batchai config set workspace NAME"), "{said}");
    for (setting, value) in [
        ("workspace", "a/b"),
        ("endpoint", "nonsense"),
        ("cluster", "a/b"),
    ] {
        assert_eq!(
            fails(&e, &["config", "set", setting, value]).0,
            2,
            "{setting}"
        );
    }
    keep(&e);
    let table = ok(&e, &["config", "show", "-o", "table"]);
    assert!(table.contains("workspace    w"), "{table}");
    let clusters: Value = serde_json::from_str(&ok(&e, &["cluster", "list"])).unwrap();
    assert_eq!(clusters[0]["vmSize"], SIZE);
    // The environment goes before what is kept, an option before both.
    let of = |workspace: &str, args: &[&str]| {
        let mut command = kept(&e, args);
        let output = command
            .env("BATCHAI_WORKSPACE", workspace)
            .output()
            .unwrap();
        output.status.code().unwrap()
    };
    assert_eq!(of("none", &["cluster", "list"]), 3);
    assert_eq!(of("none", &["cluster", "list", "-w", "w"]), 0);
    ok(&e, &["config", "unset", "workspace"]);
    assert_eq!(fails(&e, &["cluster", "list"]).0, 2);
    fs::write(e.path().join("config.json"), "{").unwrap();
    let (_, said) = fails(&e, &["cluster", "list"]);
    assert!(said.contains("config.json"), "{said}");
}

#[test]
fn what_is_printed_has_the_form_that_was_asked_for() {
    let e = Ensemble::with_cluster(0);
    keep(&e);
    assert_eq!(ok(&e, &["group", "list", "-o", "tsv"]), "g\tlocal\n");
    let colours = ok(&e, &["group", "show", "-n", "g", "-o", "jsonc"]);
    assert!(
        colours.contains("\x1b[34m\"location\"\x1b[0m: \x1b[32m\"local\"\x1b[0m"),
        "{colours}"
    );
    let query = [
        "cluster",
        "list",
        "--query",
        "[].{size: vmSize, state: allocationState}",
        "-o",
    ];
    let print = |format| ok(&e, &[&query[..], &[format]].concat());
    assert_eq!(print("tsv"), format!("{SIZE}\tSTEADY\n"));
    assert_eq!(
        print("table"),
        format!("size       state\n{SIZE}  STEADY\n")
    );
    assert_eq!(
        ok(&e, &["cluster", "show", "-n", "c", "--query", "vmSize"]),
        format!("\"{SIZE}\"\n")
    );
    assert_eq!(fails(&e, &["cluster", "list", "--query", "[?"]).0, 2);
    // Full names, ours and the original's.
    let ours = "resourceGroups/g/workspaces/w/clusters/c";
    let azure =
        "/subscriptions/s/resourceGroups/g/providers/Microsoft.BatchAI/workspaces/w/clusters/c";
    let several: Value =
        serde_json::from_str(&ok(&e, &["cluster", "show", "--ids", ours, azure])).unwrap();
    assert_eq!(
        (&several[0]["name"], &several[1]["name"]),
        (&json!(ours), &json!(ours))
    );
    assert_eq!(fails(&e, &["cluster", "show", "--ids", "nonsense"]).0, 2);
    assert_eq!(fails(&e, &["cluster", "show", "-n", "none"]).0, 3);
    assert_eq!(fails(&e, &["cluster", "show"]).0, 2);
    let script = ok(&e, &["completion", "bash"]);
    assert!(script.contains("_batchai()"), "{}", &script[..200]);
}

#[test]
fn labels_usages_sizes_and_the_state_of_everything_are_shown() {
    let e = Ensemble::with_cluster(1);
    keep(&e);
    until("the node to join", || {
        let status = ok(&e, &["status", "-o", "table"]);
        status.contains("nodes     1 idle").then_some(())
    });
    let status: Value = serde_json::from_str(&ok(&e, &["status"])).unwrap();
    assert_eq!(
        (&status["clusters"], &status["jobs"]),
        (&json!("1 steady"), &json!("none"))
    );
    let usages = ok(&e, &["list-usages", "-o", "table"]);
    assert!(
        usages.lines().nth(1).unwrap().starts_with("Clusters"),
        "{usages}"
    );
    ok(
        &e,
        &[
            "vm-size",
            "alias",
            "create",
            "-n",
            "Standard_NC6",
            "-s",
            SIZE,
        ],
    );
    let sizes = ok(&e, &["vm-size", "list", "-o", "tsv"]);
    assert!(
        sizes.starts_with(SIZE) && sizes.ends_with("1\t0\tStandard_NC6\t0\n"),
        "{sizes}"
    );
    let tagged = ok(
        &e,
        &[
            "workspace",
            "update",
            "-n",
            "w",
            "--tags",
            "team=vision",
            "cost=7",
        ],
    );
    assert!(tagged.contains("\"team\": \"vision\""), "{tagged}");
    ok(
        &e,
        &["experiment", "update", "-n", "e", "--labels", "paper=icml"],
    );
    assert_eq!(ok(&e, &["workspace", "list", "-o", "tsv"]), "w\tg\tlocal\n");
    let idle = ok(
        &e,
        &["node", "list", "--filter", "state = IDLE", "-o", "tsv"],
    );
    assert!(idle.starts_with("a1\tidle\tc"), "{idle}");
    let (code, said) = fails(&e, &["node", "list", "--filter", "stat = IDLE"]);
    assert!(
        code == 1 && said.contains("filter: \"stat\" is not a field of Node"),
        "{said}"
    );
    // A cluster by an alias finds its node; by a name that nothing has it says what there is.
    let created = run(
        &e,
        &["cluster", "create", "-n", "none", "-s", "huge", "-t", "1"],
    );
    let said = text(&created.stderr);
    assert!(
        created.status.success() && said.contains("none will join"),
        "{said}"
    );
    assert!(said.contains(&format!("-s {SIZE} -i ")), "{said}");
    let created = run(
        &e,
        &[
            "cluster",
            "create",
            "-n",
            "some",
            "-s",
            "Standard_NC6",
            "-t",
            "1",
        ],
    );
    assert!(created.status.success() && created.stderr.is_empty());
    ok(
        &e,
        &["vm-size", "alias", "delete", "-n", "Standard_NC6", "-y"],
    );
    // Names are free when the command that deletes them is done.
    ok(&e, &["cluster", "delete", "-n", "some", "-y"]);
    ok(
        &e,
        &["cluster", "create", "-n", "some", "-s", SIZE, "-t", "0"],
    );
}

#[test]
fn what_is_not_served_is_refused_by_every_way_to_ask_for_it() {
    let e = Ensemble::with_cluster(0);
    keep(&e);
    let create = ["cluster", "create", "-n", "x", "-s", SIZE];
    let auto = ["--min", "1", "--max", "2"];
    let (code, said) = fails(&e, &[&create[..], &auto].concat());
    assert_eq!(code, 1, "{said}");
    let field = "cluster.scale_settings.auto_scale";
    assert!(
        said.contains("not served yet") && said.contains(field),
        "{said}"
    );
    for args in [
        vec!["--min", "2", "--max", "1"],
        vec!["--min", "1"],
        vec!["--afs-name", "s"],
        vec!["-i", "nonsense"],
        vec!["--vm-priority", "urgent"],
    ] {
        assert_eq!(fails(&e, &[&create[..], &args].concat()).0, 2, "{args:?}");
    }
    // No node offers storage, and nothing is made.
    let auto = ["-t", "1", "--use-auto-storage"];
    let (code, said) = fails(&e, &[&create[..], &auto].concat());
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("--storage-root"), "{said}");
    assert_eq!(ok(&e, &["file-server", "list", "-o", "tsv"]), "");
    let (_, said) = fails(
        &e,
        &[
            "cluster",
            "auto-scale",
            "-n",
            "c",
            "--min",
            "0",
            "--max",
            "4",
        ],
    );
    assert!(said.contains("cluster.scale_settings.auto_scale"), "{said}");
    ok(
        &e,
        &[
            "cluster",
            "auto-scale",
            "-n",
            "c",
            "--min",
            "3",
            "--max",
            "3",
        ],
    );
    assert!(ok(&e, &["cluster", "show", "-n", "c"]).contains("\"targetNodeCount\": 3"));
    // What has no counterpart is kept, and said to have no effect.
    let account = [
        "-u",
        "ada",
        "-k",
        "ssh-ed25519 AAAA",
        "--vm-priority",
        "lowpriority",
        "-t",
        "1",
        "--subnet",
        "s",
    ];
    let created = run(&e, &[&create[..], &account].concat());
    let said = text(&created.stderr);
    assert!(
        created.status.success() && said.contains("subnet has no effect"),
        "{said}"
    );
    assert!(text(&created.stdout).contains("\"adminUserName\": \"ada\""));
    // nfs.json.
    let nfs = e.path().join("nfs.json");
    let properties = json!({
        "vmSize": "STANDARD_D2",
        "sshConfiguration": {
            "publicIPsToAllow": ["10.0.0.0/24"],
            "userAccountSettings": { "adminUserName": "ada", "adminUserPassword": "p" },
        },
        "dataDisks": { "diskSizeInGB": 10, "diskCount": 2, "storageAccountType": "Standard_LRS" },
    });
    fs::write(&nfs, json!({ "properties": properties }).to_string()).unwrap();
    let create = ["file-server", "create", "-n", "f", "--no-wait", "-f"];
    let created = ok(&e, &[&create[..], &[&nfs.to_string_lossy()]].concat());
    assert!(created.contains("NoStorageNode"), "{created}");
    ok(&e, &["file-server", "delete", "-n", "f", "-y"]);
    assert!(ok(&e, &["file-server", "list"]).starts_with("[]"));
    assert_eq!(fails(&e, &["file-server", "show", "-n", "f"]).0, 3);
    assert_eq!(fails(&e, &["file-server", "delete", "-n", "f", "-y"]).0, 3);
    assert!(
        fails(&e, &["cluster", "file", "list"])
            .1
            .contains("has no set-up task")
    );
}

fn sources(dir: &Path) {
    fs::create_dir_all(dir.join("lib")).unwrap();
    fs::create_dir_all(dir.join(".git")).unwrap();
    fs::write(dir.join(".git/HEAD"), "x").unwrap();
    fs::write(dir.join("lib/name.txt"), "bundle").unwrap();
    // The rank that fails ends the job: the other must have printed before.
    let printed = dir.with_file_name("printed-by-$WORLD_SIZE");
    let script = format!(
        "test ! -e .git || exit 9\necho $RANK of $WORLD_SIZE from the $(cat lib/name.txt): \"$@\"\n\
         echo to stderr >&2\n[ $RANK = 1 ] || touch {0}\nuntil [ -e {0} ]; do sleep 0.1; done\nexit $((RANK * 7))\n",
        printed.display()
    );
    fs::write(dir.join("train.sh"), script).unwrap();
}

#[test]
fn a_command_runs_on_the_nodes_as_if_it_ran_here() {
    let e = Ensemble::with_cluster(2);
    keep(&e);
    let dir = e.path().join("src");
    sources(&dir);
    let dir = dir.to_string_lossy().into_owned();
    let one = run(
        &e,
        &[
            "run",
            "--dir",
            &dir,
            "--",
            "bash",
            "train.sh",
            "two words",
            "$HOME",
        ],
    );
    assert_eq!(one.status.code(), Some(0), "{}", text(&one.stderr));
    assert_eq!(
        text(&one.stdout),
        "0 of 1 from the bundle: two words $HOME\n"
    );
    assert!(
        text(&one.stderr).ends_with("to stderr\n"),
        "{}",
        text(&one.stderr)
    );
    let two = run(
        &e,
        &[
            "run", "--nodes", "2", "-n", "mine", "--dir", &dir, "--", "bash", "train.sh",
        ],
    );
    assert_eq!(
        two.status.code(),
        Some(7),
        "the code of the rank that failed"
    );
    let mut lines: Vec<_> = text(&two.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(
        lines,
        ["[0] 0 of 2 from the bundle:", "[1] 1 of 2 from the bundle:"]
    );
    assert_eq!(
        ok(&e, &["job", "show", "-n", "mine", "--query", "state"]),
        "\"FAILED\"\n"
    );
    let nothing = run(&e, &["run", "--no-dir", "--", "true"]);
    assert_eq!(nothing.status.code(), Some(0), "{}", text(&nothing.stderr));
    for args in [
        &["run", "--dir", "/none", "--", "true"][..],
        &["run", "--nodes", "2"],
    ] {
        assert_eq!(fails(&e, args).0, 2, "{args:?}");
    }
}

#[test]
fn ctrl_c_ends_a_command_on_its_nodes() {
    let e = Ensemble::with_cluster(1);
    keep(&e);
    let child = long_run(&e, "long", "sleep 600");
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(255), "{}", text(&output.stderr));
    assert_eq!(e.job("long")["state"], "FAILED");
    let left = processes_of(e.path());
    assert!(
        !left.iter().any(|(_, line)| line.contains("sleep 600")),
        "{left:?}"
    );
}

/// Starts `batchai run` of something that takes long, and returns when it has printed.
fn long_run(e: &Ensemble, name: &str, command: &str) -> std::process::Child {
    let command = format!("echo begun; {command}");
    let args = ["run", "-n", name, "--no-dir", "--", "bash", "-c", &command];
    let mut command = kept(e, &args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut begun = [0; 6];
    let out = child.stdout.as_mut().unwrap();
    std::io::Read::read_exact(out, &mut begun).unwrap();
    assert_eq!(&begun, b"begun\n");
    child
}

fn interrupt(child: &std::process::Child) {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

#[test]
fn a_command_that_nobody_follows_any_more_is_left_and_named() {
    let mut e = Ensemble::with_cluster(1);
    keep(&e);
    // Nobody reads what it prints.
    let mut child = long_run(&e, "unread", "while sleep 0.1; do echo more; done");
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("jobs/unread goes on"), "{said}");
    assert_eq!(e.job("unread")["state"], "RUNNING");
    ok(&e, &["job", "terminate", "-n", "unread", "-y"]);
    // The coordinator is gone: the job cannot be ended, and the second Ctrl-C does not wait for that.
    let child = long_run(&e, "left", "sleep 600");
    e.coordinator.take().unwrap().kill();
    interrupt(&child);
    std::thread::sleep(std::time::Duration::from_millis(300));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let said = text(&output.stderr);
    assert!(said.contains("jobs/left may still run"), "{said}");
    // Nobody listens at all: a command that waits for its coordinator can be interrupted.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut command = kept(&e, &["run", "--endpoint", &endpoint, "--", "true"]);
    command.current_dir(e.path());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    silent.accept().unwrap();
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn files_go_along_with_a_job_and_come_back() {
    let e = Ensemble::with_cluster(1);
    keep(&e);
    let script = e.path().join("hello.sh");
    fs::write(&script, "mkdir -p $AZ_BATCHAI_OUTPUT_MODEL/deep\necho model > $AZ_BATCHAI_OUTPUT_MODEL/deep/m\necho hello\n").unwrap();
    let out = e.path().join("out").to_string_lossy().into_owned();
    let job = e.job_file(
        "hello",
        json!({
            "nodeCount": 1,
            "customToolkitSettings": { "commandLine": "bash hello.sh" },
            "outputDirectories": [{ "id": "MODEL", "pathPrefix": out }],
        }),
    );
    let job = job.to_string_lossy().into_owned();
    let script = script.to_string_lossy().into_owned();
    let create = [
        "job", "create", "-n", "hello", "-f", &job, "--script", &script, "--labels", "fold=3",
    ];
    ok(&e, &create);
    assert_eq!(
        run(&e, &["job", "wait", "-n", "hello", "--interval", "1"])
            .status
            .code(),
        Some(0)
    );
    assert!(
        ok(
            &e,
            &["job", "list", "--filter", "labels.fold = 3", "-o", "tsv"]
        )
        .starts_with("hello\tc\tg\tw\tcustom")
    );
    let listed = ok(
        &e,
        &[
            "job", "file", "list", "-j", "hello", "-d", "MODEL", "-o", "tsv",
        ],
    );
    assert!(listed.starts_with("deep\tdirectory\t0\t"), "{listed}");
    let to = e.path().join("back").to_string_lossy().into_owned();
    ok(
        &e,
        &[
            "job", "file", "download", "-j", "hello", "-d", "MODEL", "--to", &to,
        ],
    );
    assert_eq!(
        fs::read_to_string(e.path().join("back/deep/m")).unwrap(),
        "model\n"
    );
    ok(
        &e,
        &[
            "job",
            "file",
            "download",
            "-j",
            "hello",
            "-f",
            "stdout.txt",
            "--to",
            &to,
        ],
    );
    assert_eq!(
        fs::read_to_string(e.path().join("back/stdout.txt")).unwrap(),
        "hello\n"
    );
    let range = [
        "job",
        "file",
        "stream",
        "-j",
        "hello",
        "-f",
        "stdout.txt",
        "--offset",
        "1",
        "--length",
        "3",
    ];
    assert_eq!(ok(&e, &range), "ell");
    let missing = [
        "job", "file", "download", "-j", "hello", "-d", "MODEL", "-f", "none", "--to", &to,
    ];
    assert_eq!(fails(&e, &missing).0, 3);
    assert!(!e.path().join("back/none").exists());
    let deep = [
        "job", "file", "stream", "-j", "hello", "-d", "MODEL", "-p", "deep", "-f", "m",
    ];
    assert_eq!(ok(&e, &deep), "model\n");
    assert!(
        ok(&e, &["job", "update", "-n", "hello", "--labels", "fold=4"]).contains("\"fold\": \"4\"")
    );
    ok(&e, &["job", "delete", "-n", "hello", "-y"]);
    assert_eq!(fails(&e, &["job", "show", "-n", "hello"]).0, 3);
    // What still runs is ended first, and its name is free when the command is done.
    e.submit(
        "long",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 600" } }),
    );
    e.until_job("long", "RUNNING");
    ok(&e, &["experiment", "delete", "-n", "e", "-y"]);
    ok(&e, &["experiment", "create", "-n", "e"]);
    let mut args = vec!["job", "show", "-n", "long"];
    args.extend(IN);
    assert_eq!(e.fails(&args).0, 3);
}

#[test]
fn logging_in_starts_ssh_as_it_is_told() {
    let e = Ensemble::with_cluster(2);
    keep(&e);
    until("the nodes to join", || {
        let nodes = ok(&e, &["cluster", "node", "list", "-o", "tsv"]);
        (nodes == "a1\t127.0.0.1\t22\na2\t127.0.0.1\t22\n").then_some(())
    });
    // It prints how it was started, and asks for the password if it was given one.
    let bin = e.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let script =
        "#!/bin/sh\necho \"$@\"\n[ -z \"$SSH_ASKPASS\" ] || \"$SSH_ASKPASS\" 'password:'\n";
    fs::write(bin.join("ssh"), script).unwrap();
    fs::set_permissions(bin.join("ssh"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let ssh = |args: &[&str]| {
        let output = kept(&e, args).env("PATH", &path).output().unwrap();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        text(&output.stdout)
    };
    let exec = ["cluster", "node", "exec"];
    let plain = [&exec[..], &["--ssh"]].concat();
    assert_eq!(ssh(&plain), "-p 22 -- 127.0.0.1\n");
    let with = [
        "-n",
        "a2",
        "--exec",
        "echo 'it is'",
        "-u",
        "ada",
        "-k",
        "key",
        "-L",
        "6006:localhost:6006",
    ];
    assert_eq!(
        ssh(&[&exec[..], &with].concat()),
        "-p 22 -L 6006:localhost:6006 -i key -t -- ada@127.0.0.1 bash -lc \"echo 'it is'\"\n"
    );
    let ports = ["-L", "1:h:2", "-p", "secret"];
    assert_eq!(
        ssh(&[&exec[..], &ports].concat()),
        "-p 22 -L 1:h:2 -o SendEnv=-* -N -- 127.0.0.1\nsecret\n"
    );
    let (code, said) = fails(&e, &["cluster", "node", "exec", "-n", "a9", "--ssh"]);
    assert!(code == 1 && said.contains("no node a9"), "{said}");
    e.submit(
        "j",
        json!({ "nodeCount": 2, "customToolkitSettings": { "commandLine": "true" } }),
    );
    assert_eq!(e.wait("j"), 0);
    assert_eq!(
        ssh(&["job", "node", "exec", "-j", "j", "-n", "a2", "--ssh"]),
        "-p 22 -- 127.0.0.1\n"
    );
    assert_eq!(
        ok(&e, &["job", "node", "list", "-j", "j", "-o", "tsv"])
            .lines()
            .count(),
        2
    );
}

#[test]
fn waiting_says_what_happens_and_survives_the_coordinator() {
    let mut e = Ensemble::with_cluster(1);
    e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 3; exit 5" } }),
    );
    let mut args = vec!["job", "wait", "-n", "j"];
    args.extend(IN);
    let waiting = Background::start(&mut e.command(&args));
    e.until_job("j", "RUNNING");
    e.coordinator.take().unwrap().kill();
    e.start_coordinator();
    let output = waiting.finish();
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("JobFailed"),
        "{}",
        text(&output.stderr)
    );
    let said = text(&output.stderr);
    assert!(
        said.lines().any(|line| line.ends_with("Z failed")),
        "{said}"
    );
}
