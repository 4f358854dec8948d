//! Jobs run as somebody else than an agent that is root.

use std::os::unix::fs::MetadataExt as _;

use batchai_tests::ensemble::Ensemble;
use batchai_tests::requirement;
use serde_json::json;

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";

#[test]
fn jobs_have_the_rights_of_their_user_and_no_way_to_more() {
    if !nix::unistd::geteuid().is_root() {
        return requirement::skip("only root starts jobs as somebody else");
    }
    let mut e = Ensemble::start(0);
    // The way to its directories must be open to the jobs' user.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(e.path(), open).unwrap();
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    e.create_cluster(1);
    let agent = e.path().join("agents/a1");
    let command = format!(
        "id -u; id -g; id -G; umask; grep NoNewPrivs /proc/self/status | tr -s '\\t' ' '; pwd; echo $HOME; \
         cat hostfile >/dev/null && echo own; \
         cat {agent}/credentials.pem {agent}/node.json 2>/dev/null || echo closed; \
         ls {agent}/attempts 2>/dev/null || echo closed; \
         cat /proc/$PPID/environ 2>/dev/null || echo closed; \
         kill -0 $PPID 2>/dev/null || echo closed; \
         touch $AZ_BATCHAI_JOB_TEMP_DIR/x 2>/dev/null || echo closed; \
         echo model > $AZ_BATCHAI_OUTPUT_MODEL/m; umask 077; echo secret > $AZ_BATCHAI_OUTPUT_MODEL/s",
        agent = agent.display()
    );
    e.submit(
        "j",
        json!({
            "nodeCount": 1,
            "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
            "jobPreparation": { "commandLine": "id -u" },
            "customToolkitSettings": { "commandLine": command },
            "outputDirectories": [{ "id": "MODEL", "pathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/out" }],
        }),
    );
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    let printed = e.log("j", "stdout.txt");
    let temp = e.path().join("nodes/a1/jobs/w/e/j");
    let expected = format!(
        "54321\n54322\n54322\n0022\nNoNewPrivs: 1\n{}\n/\nown\n{}",
        temp.display(),
        "closed\n".repeat(5)
    );
    assert_eq!(printed, expected);
    assert_eq!(e.log("j", "stdout-job_prep.txt"), "54321\n");
    // Its files are its user's: what it made, what was made for it, and the copies of its logs.
    let mounts = e.path().join("nodes/a1/mounts");
    let owner = |path: &std::path::Path| {
        let metadata = std::fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
    };
    assert_eq!(owner(&temp), (54321, 54322, 0o700));
    assert_eq!(owner(&mounts), (0, 0, 0o755));
    let segment = e.job("j")["jobOutputDirectoryPathSegment"]
        .as_str()
        .unwrap()
        .to_owned();
    let copied = mounts
        .join("logs")
        .join(&segment)
        .join("stdouterr/stdout.txt");
    assert_eq!(owner(&copied), (54321, 54322, 0o644));
    let model = mounts.join("out").join(&segment).join("outputs/s");
    assert_eq!(owner(&model), (54321, 54322, 0o600));
    // Shown with the rights of the job: what it may read, and nothing that it only points to.
    let of: Vec<_> = ["-j", "j", "-d", "MODEL"]
        .into_iter()
        .chain(batchai_tests::ensemble::IN)
        .collect();
    let read = |file: &str| {
        let args = [
            &["job", "file", "stream", "-f", file, "--no-follow"][..],
            &of,
        ]
        .concat();
        e.ok(&args)
    };
    assert_eq!(
        (read("m").as_str(), read("s").as_str()),
        ("model\n", "secret\n")
    );
    // The next job clears what the last one left, whoever that was.
    e.submit(
        "next",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "true" } }),
    );
    assert_eq!(
        e.wait("next"),
        255,
        "a directory of root's is not the job's to write into"
    );
    let error = &e.job("next")["errors"][0];
    assert_eq!(error["code"], "JobDirectoryFailed");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("Permission denied"),
        "{error}"
    );
    assert!(!temp.exists());
}

#[test]
fn an_agent_that_is_root_must_be_told_whom_jobs_run_as() {
    if !nix::unistd::geteuid().is_root() {
        return requirement::skip("only root starts jobs as somebody else");
    }
    let e = Ensemble::start(0);
    let dir = |what: &str| e.path().join(what).to_string_lossy().into_owned();
    let (data, root) = (dir("data"), dir("root"));
    let args = [
        "node-agent",
        "--coordinator",
        &e.endpoint,
        "--name",
        "n",
        "--data",
        &data,
        "--root",
        &root,
    ];
    let start = |user: Option<&str>| {
        let mut command = e.command(&args);
        match user {
            Some(user) => command.env("BATCHAI_JOB_USER", user),
            None => command.env_remove("BATCHAI_JOB_USER"),
        };
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(start(None).contains("--job-user batchai-job"));
    assert!(start(Some("no-such-user")).contains("there is no such user"));
}

#[test]
fn workspaces_have_users_of_their_own_that_see_nothing_of_each_other() {
    if !nix::unistd::geteuid().is_root() {
        return requirement::skip("only root starts jobs as somebody else");
    }
    let mut e = Ensemble::start(0);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(e.path(), open).unwrap();
    e.start_agent_as("a1", "per-workspace:300000");
    e.until_alive(1);
    e.create_cluster(1);
    e.ok(&["workspace", "create", "-g", "g", "-n", "other"]);
    e.ok(&["experiment", "create", "-g", "g", "-w", "other", "-n", "e"]);
    let number = |workspace: &str| {
        let shown = e.json(&["workspace", "show", "-g", "g", "-n", workspace]);
        shown["number"].as_str().unwrap().parse::<u32>().unwrap()
    };
    let (first, second) = (300_000 + number("w"), 300_000 + number("other"));
    assert_ne!(first, second);
    let run = |workspace: &str, name: &str, command: &str| {
        let path = e.job_file(
            name,
            json!({
                "nodeCount": 1,
                "cluster": "resourceGroups/g/workspaces/w/clusters/c",
                "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
                "customToolkitSettings": { "commandLine": command },
                "outputDirectories": [{ "id": "MODEL", "pathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/out" }],
            }),
        );
        let of = ["-g", "g", "-w", workspace, "-e", "e"];
        let path = path.to_string_lossy();
        let create = ["job", "create", "-n", name, "-f", &path];
        e.ok(&[&create[..], &of].concat());
        let wait = e.run(&[&["job", "wait", "-n", name][..], &of].concat());
        let shown = e.ok(&[&["job", "show", "-n", name][..], &of].concat());
        assert!(wait.status.success(), "{shown}");
        let stream = ["job", "file", "stream", "-j", name, "-f", "stdout.txt"];
        e.ok(&[&stream[..], &of].concat())
    };
    let printed = run(
        "w",
        "j",
        "id -u; echo model > $AZ_BATCHAI_OUTPUT_MODEL/m; chmod 666 $AZ_BATCHAI_OUTPUT_MODEL/m; touch /tmp/batchai-$$; \
         rm /tmp/batchai-$$",
    );
    assert_eq!(printed, format!("{first}\n"));
    // Whatever the first one allows, what leads to its files is closed to the second.
    let mounts = e.path().join("nodes/a1/mounts");
    let printed = run(
        "other",
        "k",
        "id -u; find $AZ_BATCHAI_MOUNT_ROOT -name m 2>/dev/null; find $AZ_BATCHAI_MOUNT_ROOT -name '*.txt' 2>/dev/null | \
         grep -v /k/; rm -r $AZ_BATCHAI_MOUNT_ROOT/out 2>/dev/null || echo closed",
    );
    assert_eq!(printed, format!("{second}\nclosed\n"));
    let mut models = Vec::new();
    let mut look = vec![mounts.join("out")];
    while let Some(dir) = look.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => look.push(path),
                false => models.push(path),
            }
        }
    }
    assert_eq!(models.len(), 1, "{models:?}");
    assert_eq!(std::fs::metadata(&models[0]).unwrap().uid(), first);
    // Who may see the job sees its files.
    let of = ["-g", "g", "-w", "w", "-e", "e", "-j", "j", "-d", "MODEL"];
    let stream = ["job", "file", "stream", "-f", "m", "--no-follow"];
    assert_eq!(e.ok(&[&stream[..], &of].concat()), "model\n");
}

#[test]
fn processes_may_take_what_they_are_told_to() {
    let e = Ensemble::start(0);
    let agent = |name: &str, limits: &str| {
        let dir = |what: &str| {
            e.path()
                .join(what)
                .join(name)
                .to_string_lossy()
                .into_owned()
        };
        let args = [
            "node-agent",
            "--coordinator",
            &e.endpoint,
            "--name",
            name,
            "--data",
            &dir("agents"),
            "--root",
            &dir("nodes"),
            "--vm-size",
            batchai_tests::ensemble::SIZE,
            "--job-limit",
            limits,
        ];
        let log = e.path().join(format!("{name}.log"));
        batchai_tests::process::Process::start_with(args, &e.join_token(), &log)
    };
    let _agent = agent("a1", "core=0,nofile=321,stack=4194304");
    e.until_alive(1);
    e.create_cluster(1);
    e.submit(
        "j",
        json!({
            "nodeCount": 1,
            "customToolkitSettings": { "commandLine": "ulimit -c; ulimit -n; ulimit -Hn; ulimit -s" },
        }),
    );
    assert_eq!(e.wait("j"), 0);
    assert_eq!(e.log("j", "stdout.txt"), "0\n321\n321\n4096\n");
    // More than the kernel gives anybody: said at once.
    let mut refused = agent("a2", "nofile=1099511627776");
    assert_eq!(refused.wait().code(), Some(1));
    let said = refused.log_text();
    assert!(
        said.contains("this agent may give at most") && said.contains("LimitNOFILE="),
        "{said}"
    );
}
