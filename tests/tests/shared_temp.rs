//! The directory that the nodes of a job share (`$AZ_BATCHAI_SHARED_JOB_TEMP`) on several machines: network namespaces, and a guest, whose
//! kernel has a client of NFS.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use batchai_tests::ensemble::agent_args;
use batchai_tests::guest::{Guest, image};
use batchai_tests::network::Network;
use batchai_tests::process::{processes_of, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The machines of the first node, which is the master of all jobs, and of a second one that is no guest.
const FIRST: u64 = 2;
const SECOND: u64 = 3;
/// The guest's.
const ADDRESS: &str = "10.78.0.9";
/// Whom jobs of the first node run as: those of the guest are another one's.
const NOBODY: u32 = 65_534;

/// What both ranks do: each writes, and reads what the other one wrote; the first ends before the second, which still finds all of it.
const MEETS: &str = r#"
    cd "$AZ_BATCHAI_SHARED_JOB_TEMP" || exit 3
    wait_for() { until [ -f "$1" ]; do sleep 1; done; cat "$1"; }
    echo "from $RANK" >.draft-$RANK && mv .draft-$RANK said-$RANK
    wait_for said-$((1 - RANK))
    cat prepared-0 prepared-1
    [ "$RANK" = 1 ] || exit 0
    wait_for go
    sed -n "s,.* $AZ_BATCHAI_SHARED_JOB_TEMP \(nfs\) .*,\1,p" /proc/mounts
    echo late >late && cat late
"#;

struct World {
    guest: Guest,
    e: Replicas,
    network: Network,
    by: Vec<String>,
}

impl World {
    /// None where it cannot be: then the test was told so.
    fn start(test: &str) -> Option<World> {
        let image = image()?;
        let network = Network::new(test, FIRST)?;
        let mut e = network.replica(1);
        // Jobs of nobody pass through it.
        fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
        e.job_user = format!("{NOBODY}:{NOBODY}");
        let all = e.list();
        let by = network.on_named(FIRST, "first");
        e.start_agent_by(&by, "first", &all);
        let mut guest = Guest::boot_at(image, e.path(), &network, ADDRESS);
        guest.ok("load nfs");
        let args = agent_args("/batchai".as_ref(), &all, "guest", "job")[1..].join(" ");
        guest.ok(&format!(
            "export BATCHAI_JOIN_TOKEN={} AGENT_GROUP=; setsid /sbin/agent {args} &",
            e.join_token()
        ));
        in_contact(&e, 2);
        e.create_cluster(2);
        Some(World {
            guest,
            e,
            network,
            by,
        })
    }

    fn directory(&self, name: &str) -> PathBuf {
        self.e
            .path()
            .join(format!("nodes/first/jobs/w/e/{name}/shared"))
    }

    fn nothing_is_left(&mut self, name: &str) {
        served_to_the_end(&self.e, name);
        assert!(servers(self.e.path()).is_empty());
        assert!(!self.directory(name).exists());
        let guest = &mut self.guest;
        until("nothing to be mounted", || {
            (guest.run("grep -q ' nfs ' /proc/mounts").1 != 0).then_some(())
        });
    }
}

fn in_contact(e: &Replicas, count: usize) {
    until("the nodes to be in contact", || {
        let nodes = e.json_at(&e.list(), &["node", "list"]);
        (nodes.as_array()?.len() == count).then_some(())
    });
}

fn two_ranks(command: &str) -> Value {
    json!({
        "nodeCount": 2,
        "stdOutErrPathPrefix": "$AZ_BATCHAI_JOB_TEMP",
        "customToolkitSettings": { "commandLine": command, "processesPerNode": 1 },
    })
}

fn end(e: &Replicas, name: &str) -> Value {
    until("the job to end", || {
        let job = e.job(name);
        (job["state"] == "SUCCEEDED" || job["state"] == "FAILED").then_some(job)
    })
}

fn log(e: &Replicas, name: &str, file: &str) -> String {
    let stream = ["job", "file", "stream", "-j", name, "-f", file];
    e.ok(&[&stream[..], &["-g", "g", "-w", "w", "-e", "e"]].concat())
}

/// The first node served a job's directory, and its server ended when it was told to.
fn served_to_the_end(e: &Replicas, name: &str) {
    let said = log(e, name, "execution-first.log");
    assert!(
        said.contains("serving ") && !said.contains("killing it"),
        "{said}"
    );
}

/// The processes that serve directories on the nodes that are no guests.
fn servers(dir: &Path) -> Vec<i32> {
    let all = processes_of(&dir.join("agents"));
    let serve = all.iter().filter(|(_, line)| line.contains("nfs-server"));
    serve.map(|(pid, _)| *pid).collect()
}

fn one_server(dir: &Path) -> i32 {
    until("it to be served", || match servers(dir)[..] {
        [pid] => Some(pid),
        _ => None,
    })
}

#[test]
fn nodes_of_two_machines_share_a_directory_for_the_time_of_the_job() {
    let Some(mut w) = World::start("shared") else {
        return;
    };
    // Nothing is served for a job that does not name it.
    w.e.submit_with(
        "without",
        two_ranks("sleep 1; env | grep -c SHARED_JOB_TEMP || true"),
    );
    until("it to run", || {
        (w.e.job("without")["state"] != "QUEUED").then_some(())
    });
    assert!(servers(w.e.path()).is_empty());
    end(&w.e, "without");
    assert_eq!(log(&w.e, "without", "stdout-0.txt"), "0\n");
    assert_eq!(log(&w.e, "without", "stdout-1.txt"), "0\n");

    meet_while_the_agent_is_killed(&mut w);
    run_again_when_the_shim_is_killed(&mut w);
}

fn meet_while_the_agent_is_killed(w: &mut World) {
    let mut job = two_ranks(MEETS);
    // It is in place on every node before that begins.
    let prepares = "case $(hostname) in first) i=0;; *) i=1;; esac; \
                    echo prepared $i >\"$AZ_BATCHAI_SHARED_JOB_TEMP/prepared-$i\"";
    job["jobPreparation"] = json!({ "commandLine": prepares });
    w.e.submit_with("meet", job);
    let directory = w.directory("meet");
    until("the ranks to meet", || {
        directory.join("said-1").exists().then_some(())
    });
    let server = one_server(w.e.path());
    strangers_are_refused(w, server);
    let agent = w.e.agents.get_mut("first").unwrap();
    agent.kill();
    assert_eq!(
        one_server(w.e.path()),
        server,
        "it does not go with the agent"
    );
    let all = w.e.list();
    let by = w.by.clone();
    w.e.start_agent_by(&by, "first", &all);
    until("the first rank to end", || {
        let job = w.e.job("meet");
        let ranks = job["attempt"]["nodes"][0]["ranks"].as_array()?.clone();
        (ranks.first()?["exitCode"] == 0).then_some(())
    });
    assert_eq!(w.e.job("meet")["state"], "RUNNING");
    assert_eq!(servers(w.e.path()), [server]);
    fs::write(directory.join("go"), "go\n").unwrap();
    let job = end(&w.e, "meet");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    assert_eq!(job["attempt"]["number"], 1, "{job}");
    let both = "prepared 0\nprepared 1\n";
    let first = log(&w.e, "meet", "stdout-0.txt");
    assert_eq!(first, format!("from 1\n{both}"));
    let second = log(&w.e, "meet", "stdout-1.txt");
    assert_eq!(second, format!("from 0\n{both}go\nnfs\nlate\n"));
    w.nothing_is_left("meet");
}

/// A node whose part is cut down with all that it had: nothing is served any more, and the job runs again.
fn run_again_when_the_shim_is_killed(w: &mut World) {
    let again = "[ $AZ_BATCHAI_ATTEMPT = 1 ] && touch $AZ_BATCHAI_SHARED_JOB_TEMP/it-$RANK && sleep 600; \
                 ls -a $AZ_BATCHAI_SHARED_JOB_TEMP";
    w.e.submit_with("again", two_ranks(again));
    let directory = w.directory("again");
    until("both to run", || {
        directory.join("it-1").exists().then_some(())
    });
    let server = one_server(w.e.path());
    let all = processes_of(&w.e.path().join("agents"));
    let shims = all
        .iter()
        .filter(|(_, line)| line.starts_with("batchai-shim"));
    for (pid, _) in shims {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
    }
    until("its server to go", || {
        (!servers(w.e.path()).contains(&server)).then_some(())
    });
    let job = end(&w.e, "again");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    assert_eq!(job["attempt"]["number"], 2, "{job}");
    assert_eq!(log(&w.e, "again", "stdout-1.txt"), ".\n..\n");
    w.nothing_is_left("again");
}

/// One that is no node of the job gets no answer.
fn strangers_are_refused(w: &World, server: i32) {
    let attempts = w.e.path().join("agents/first/attempts");
    let dir = fs::read_dir(&attempts)
        .unwrap()
        .map(|it| it.unwrap().path());
    let dirs: Vec<_> = dir.filter(|it| it.join("shared").exists()).collect();
    let [dir] = &dirs[..] else {
        panic!("{dirs:?} of {server}")
    };
    let read = |file: &str| fs::read_to_string(dir.join("shared").join(file)).unwrap();
    let config: Value = serde_json::from_str(&read("config.json")).unwrap();
    assert_eq!(config["clients"], json!([ADDRESS]));
    assert_eq!(config["squash_uid"], NOBODY);
    let port = config["listen"]
        .as_str()
        .unwrap()
        .rsplit_once(':')
        .unwrap()
        .1
        .to_owned();
    let mut by = w.network.on(1);
    by.extend(["timeout", "20", "bash", "-c"].map(str::to_owned));
    by.push(format!("exec 3<>/dev/tcp/10.78.0.{FIRST}/{port}; cat <&3"));
    let asked = Command::new(&by[0]).args(&by[1..]).output().unwrap();
    assert!(
        asked.status.success() && asked.stdout.is_empty(),
        "{asked:?}"
    );
    until("it to say so", || {
        let said = read("nfs.log");
        (said.contains("10.78.0.1") && said.contains("it is not among the clients")).then_some(())
    });
}

#[test]
fn a_node_whose_kernel_mounts_no_nfs_fails_only_the_jobs_that_name_the_directory() {
    if fs::read_to_string("/proc/filesystems")
        .unwrap()
        .contains("nfs")
    {
        requirement::skip("the kernel of this machine has a client of NFS");
        return;
    }
    let Some(network) = Network::new("sharedno", SECOND) else {
        return;
    };
    let mut e = network.replica(1);
    let all = e.list();
    e.start_agent_by(&network.on_named(FIRST, "first"), "first", &all);
    // As a machine that booted another time.
    let boot_id = e.path().join("boot-id");
    fs::write(&boot_id, "7b2b5d4e-0000-4000-8000-000000000001\n").unwrap();
    let mut by = network.on_named(SECOND, "second");
    let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
    by.extend(["unshare", "-m", "sh", "-c", script].map(str::to_owned));
    by.push(boot_id.display().to_string());
    e.start_agent_by(&by, "second", &all);
    in_contact(&e, 2);
    e.create_cluster(2);
    e.submit_with("plain", two_ranks("echo $RANK"));
    let job = end(&e, "plain");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    for (name, text) in [
        ("command", two_ranks("ls $AZ_BATCHAI_SHARED_JOB_TEMP")),
        ("variable", {
            let mut job = two_ranks("true");
            job["environmentVariables"] =
                json!([{ "name": "X", "value": "$AZ_BATCHAI_SHARED_JOB_TEMP/x" }]);
            job
        }),
    ] {
        e.submit_with(name, text);
        let job = end(&e, name);
        assert_eq!(job["state"], "FAILED", "{job}");
        let error = &job["errors"][0];
        assert_eq!(error["code"], "JobSharedTempFailed", "{error}");
        let message = error["message"].as_str().unwrap();
        for part in [
            "$AZ_BATCHAI_SHARED_JOB_TEMP on nodes/second, from nodes/first",
            "no client of NFS",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(servers(e.path()).is_empty());
        served_to_the_end(&e, name);
    }
}
