//! File servers as machines of another kernel mount them: by NFS, over a network that breaks. The coordinator and the node that serves are
//! network namespaces, the node that mounts is a guest. Once by the agent's own server, once by NFS-Ganesha.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use batchai_tests::ensemble::{SIZE, agent_args, create_file_server, job_file};
use batchai_tests::ganesha;
use batchai_tests::guest::{Guest, image};
use batchai_tests::network::Network;
use batchai_tests::process::{processes_of, until};
use batchai_tests::replicas::Replicas;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The machine of the node that serves.
const STORE: u64 = 2;
/// That of a node which mounts what it serves, beside the guest.
const OTHER: u64 = 3;
/// The guest's.
const ADDRESS: &str = "10.78.0.9";
const GUEST_SIZE: &str = "guest-size";
/// How long the guest's agent waits for a mount that does not answer. The guest is slow.
const PATIENCE_S: u64 = 8;
/// The same, where it answers again: the kernel takes its time between two attempts to reach a server.
const PATIENCE_LONG_S: u64 = 60;
const SERVER: &str = "resourceGroups/g/workspaces/w/fileServers/data";

/// By what the files are served.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Embedded,
    Ganesha,
    /// One that has not the latest version.
    OlderGanesha,
}

impl By {
    /// A PATH on which an agent finds it. None where it is missing: then the test was told so.
    fn path(self, dir: &Path) -> Option<String> {
        match self {
            By::Embedded => Some(ganesha::hidden(dir)),
            By::Ganesha => {
                ganesha::installed()?;
                std::env::var("PATH").ok()
            }
            By::OlderGanesha => ganesha::older(dir),
        }
    }

    /// What the kernel of the guest says of what is mounted.
    fn mounted(self) -> [&'static str; 2] {
        match self {
            By::Embedded => ["nfs", "vers=3"],
            By::Ganesha => ["nfs4", "vers=4.2"],
            By::OlderGanesha => ["nfs4", "vers=4.1"],
        }
    }
}

struct World {
    guest: Guest,
    e: Replicas,
    network: Network,
    /// What is shared, as it lies here.
    data: PathBuf,
}

fn create(e: &Replicas, name: &str) -> Value {
    e.json_at(&e.list(), &create_file_server(name, SIZE))
}

impl World {
    /// None where it cannot be: then the test was told so.
    fn start(by: By, test: &str, patience_s: u64) -> Option<World> {
        let image = image()?;
        let network = Network::new(test, OTHER)?;
        let mut e = network.replica(1);
        let all = e.list();
        let storage = e.path().join("storage");
        fs::create_dir(&storage).unwrap();
        let path = by.path(e.path())?;
        let mut on = network.on_named(STORE, "store");
        on.push("env".to_owned());
        on.push(format!("PATH={path}"));
        on.push(format!("BATCHAI_STORAGE_ROOT={}", storage.display()));
        e.start_agent_by(&on, "store", &all);
        let mut guest = Guest::boot_at(image, e.path(), &network, ADDRESS);
        guest.ok("load nfs");
        let mut args = agent_args("/batchai".as_ref(), &all, "guest", "job")[1..].join(" ");
        args = args.replace("test-size", GUEST_SIZE);
        guest.ok(&format!(
            "export BATCHAI_JOIN_TOKEN={} AGENT_GROUP=; setsid /sbin/agent {args} --mount-patience {patience_s} &",
            e.join_token()
        ));
        until("the nodes to be in contact", || {
            let nodes = e.json_at(&all, &["node", "list"]);
            (nodes.as_array()?.len() == 2).then_some(())
        });
        e.ok(&["group", "create", "-n", "g"]);
        e.ok(&["workspace", "create", "-g", "g", "-n", "w"]);
        e.ok(&["experiment", "create", "-g", "g", "-w", "w", "-n", "e"]);
        e.ok(&[
            "cluster", "create", "-g", "g", "-w", "w", "-n", "c", "-s", GUEST_SIZE, "-t", "1",
        ]);
        let shown = create(&e, "data");
        assert_eq!(
            shown["mountSettings"]["fileServerInternalIP"], "10.78.0.2",
            "{shown}"
        );
        let backend = match by {
            By::Embedded => "embedded",
            By::Ganesha | By::OlderGanesha => "ganesha",
        };
        assert_eq!(shown["backend"], backend, "{shown}");
        let data = shown["mountSettings"]["mountPoint"]
            .as_str()
            .unwrap()
            .into();
        Some(World {
            guest,
            e,
            network,
            data,
        })
    }

    fn submit(&self, name: &str, directory: &str, options: &str, command: &str) {
        let volume = json!({
            "fileServer": { "id": SERVER },
            "sourceDirectory": directory,
            "relativeMountPath": "nfs",
            "mountOptions": options,
        });
        self.e.submit_with(
            name,
            json!({
                "nodeCount": 1,
                "stdOutErrPathPrefix": "/out",
                "mountVolumes": { "fileServers": [volume] },
                "customToolkitSettings": { "commandLine": command },
            }),
        );
    }

    /// Where what serves is told what to do.
    fn told(&self) -> PathBuf {
        let all = self.e.path().join("agents/store/file-servers");
        let mut all = fs::read_dir(all).unwrap();
        all.next().unwrap().unwrap().path()
    }

    /// Whom it is shared with changes while it is mounted: a job on two other nodes mounts it, one of them by NFS. Whether that goes well
    /// is for the kernel of this machine to say.
    fn another_node_mounts_it_too(&mut self) {
        let all = self.e.list();
        let by = self.network.on_named(OTHER, "other");
        self.e.start_agent_by(&by, "other", &all);
        until("the node to be in contact", || {
            let nodes = self.e.json_at(&all, &["node", "list"]);
            (nodes.as_array()?.len() == 3).then_some(())
        });
        let at = ["-g", "g", "-w", "w"];
        let cluster = ["cluster", "create", "-n", "d", "-s", "test-size", "-t", "2"];
        self.e.ok(&[&cluster[..], &at].concat());
        let volume = json!({ "fileServer": { "id": SERVER }, "relativeMountPath": "nfs" });
        let properties = json!({
            "nodeCount": 2,
            "mountVolumes": { "fileServers": [volume] },
            "customToolkitSettings": { "commandLine": "true" },
        });
        let file = job_file(self.e.path(), "both", properties);
        let job = ["job", "create", "-n", "both", "-c", "d", "-e", "e", "-f"];
        let file = file.display().to_string();
        self.e.ok(&[&job[..], &[&file], &at].concat());
        let told = self.told();
        until("both to be let in", || {
            let said = fs::read_to_string(told.join("ganesha.conf")).ok()?;
            let both = [ADDRESS, "10.78.0.3"];
            both.iter().all(|one| said.contains(one)).then_some(())
        });
        self.end("both");
    }

    fn end(&self, name: &str) -> Value {
        until("the job to end", || {
            let job = self.e.job(name);
            (job["state"] == "SUCCEEDED" || job["state"] == "FAILED").then_some(job)
        })
    }

    fn error(&self, name: &str) -> (String, String) {
        let job = self.end(name);
        let text = |field: &str| {
            job["errors"][0][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        (text("code"), text("message"))
    }

    fn log(&self, name: &str, file: &str) -> String {
        let stream = ["job", "file", "stream", "-j", name, "-f", file];
        let at = ["-g", "g", "-w", "w", "-e", "e"];
        self.e.ok(&[&stream[..], &at].concat())
    }

    fn serving(&self) -> i32 {
        self.process("nfs-server --dir")
    }

    /// A process of the node that serves.
    fn process(&self, line: &str) -> i32 {
        until("it to run", || {
            let all = processes_of(&self.e.path().join("agents"));
            let own = all.iter().find(|(_, said)| said.contains(line));
            own.map(|(pid, _)| *pid)
        })
    }

    fn nothing_is_mounted(&mut self) {
        let guest = &mut self.guest;
        until("nothing to be mounted", || {
            (guest.run("grep -qE ' nfs4? ' /proc/mounts").1 != 0).then_some(())
        });
    }
}

/// A job that writes while what it mounts is cut down; `cut` names the process.
fn writes_and_goes_on(by: By, test: &str, cut: &str) -> Option<World> {
    let mut w = World::start(by, test, PATIENCE_LONG_S)?;
    fs::create_dir(w.data.join("set")).unwrap();
    fs::set_permissions(w.data.join("set"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(w.data.join("set/in"), "given\n").unwrap();
    let command = "set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT/nfs; grep -E ' nfs4? ' /proc/mounts; cat in; \
                   for i in $(seq 40); do echo $i >>log; sync log; usleep 100000; done | batchai-node-agent do-hold lock; \
                   echo done";
    w.submit("j", "set", "noatime,timeo=50", command);
    let log = w.data.join("set/log");
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    until("it to write", || (lines() >= 3).then_some(()));
    if by == By::Ganesha {
        w.another_node_mounts_it_too();
    }
    let (first, serving) = (w.process(cut), w.serving());
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let written = lines();
    until("it to be served again", || {
        (w.serving() != serving).then_some(())
    });
    let job = w.end("j");
    let said = w.log("j", "stderr.txt");
    assert_eq!(job["state"], "SUCCEEDED", "{said}: {job}");
    assert!(written < 40, "it had ended before");
    let said = w.log("j", "stdout.txt");
    let options: Vec<_> = said.lines().next().unwrap().split([' ', ',']).collect();
    let expected = ["nosuid", "nodev", "noatime", "hard", "timeo=50"];
    for option in by.mounted().iter().chain(&expected) {
        assert!(options.contains(option), "{option}: {said}");
    }
    assert!(said.ends_with("given\nheld\ndone\n"), "{said}");
    let all: String = (1..=40).map(|i| format!("{i}\n")).collect();
    assert_eq!(fs::read_to_string(&log).unwrap(), all);
    assert_eq!(fs::metadata(&log).unwrap().uid(), 1000);
    w.nothing_is_mounted();

    w.submit("absent", "other", "", "true");
    let (code, message) = w.error("absent");
    assert_eq!(code, "JobMountFailed", "{message}");
    assert!(message.contains("has no directory /other"), "{message}");
    w.nothing_is_mounted();
    Some(w)
}

#[test]
fn a_job_writes_by_nfs_and_goes_on_when_its_file_server_was_cut_down() {
    writes_and_goes_on(By::Embedded, "nfs", "nfs-server --dir");
}

#[test]
fn a_job_writes_by_ganesha_and_keeps_its_locks_when_that_was_cut_down() {
    if let Some(mut w) = writes_and_goes_on(By::Ganesha, "nfs42", "nfs-server --dir") {
        two_of_one_machine_are_two(&mut w);
        only_root_of_those_it_is_told_of_comes(w);
    }
}

/// Also where they begin in one moment, as when their machine does.
fn two_of_one_machine_are_two(w: &mut World) {
    let shown = create(&w.e, "more");
    assert_eq!(shown["backend"], "ganesha", "{shown}");
    let more: PathBuf = shown["mountSettings"]["mountPoint"]
        .as_str()
        .unwrap()
        .into();
    let agents = w.e.path().join("agents");
    let serving = || {
        let all = processes_of(&agents).into_iter();
        let own = all.filter(|(_, line)| line.contains("ganesha.nfsd -F"));
        own.map(|(pid, _)| pid).collect::<Vec<_>>()
    };
    let before = serving();
    assert_eq!(before.len(), 2);
    for pid in &before {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
    }
    until("both to be served again", || {
        let now = serving();
        (now.len() == 2 && now.iter().all(|pid| !before.contains(pid))).then_some(())
    });
    let volume = |server: &str, path: &str| {
        json!({
            "fileServer": { "id": server },
            "relativeMountPath": path,
        })
    };
    let other = SERVER.replace("data", "more");
    w.e.submit_with(
        "two",
        json!({
            "nodeCount": 1,
            "stdOutErrPathPrefix": "/out",
            "mountVolumes": { "fileServers": [volume(SERVER, "one"), volume(&other, "two")] },
            "customToolkitSettings": {
                "commandLine": "cd $AZ_BATCHAI_JOB_MOUNT_ROOT && echo 1 > one/in-one && echo 2 > two/in-two && ls two",
            },
        }),
    );
    let job = w.end("two");
    let said = w.log("two", "stderr.txt");
    assert_eq!(job["state"], "SUCCEEDED", "{said}: {job}");
    assert_eq!(w.log("two", "stdout.txt"), "in-two\n");
    assert!(w.data.join("in-one").exists() && !w.data.join("in-two").exists());
    assert!(more.join("in-two").exists() && !more.join("in-one").exists());
    w.nothing_is_mounted();
    let delete = ["file-server", "delete", "-n", "more", "-y", "--purge"];
    w.e.ok(&[&delete[..], &["-g", "g", "-w", "w"]].concat());
    until("it to be gone", || (serving().len() == 1).then_some(()));
    until("its directory to be gone", || {
        let all = fs::read_dir(agents.join("store/file-servers")).unwrap();
        (all.count() == 1).then_some(())
    });
}

/// Its agent is gone, and it reads what it is told all the same.
fn only_root_of_those_it_is_told_of_comes(mut w: World) {
    let mut agent = w.e.agents.remove("store").unwrap();
    agent.signal(Signal::SIGTERM);
    agent.wait();
    let told = w.told().join("config.json");
    let config: Value = serde_json::from_slice(&fs::read(&told).unwrap()).unwrap();
    assert_eq!(config["clients"], json!([]), "nobody mounts it: {config}");
    let port = config["listen"].as_str().unwrap().rsplit(':').next();
    let options = format!(
        "addr=10.78.0.2,clientaddr={ADDRESS},vers=4.2,proto=tcp,port={},sec=sys,soft,timeo=50,retrans=1",
        port.unwrap()
    );
    let mut mount = |more: &str| {
        let line = format!("batchai-node-agent do-mount 10.78.0.2:/ {options}{more}");
        w.guest.ok(&line).trim().to_owned()
    };
    assert_eq!(mount(""), "Err(EACCES)");
    let mut let_in = config.clone();
    let_in["clients"] = json!([ADDRESS, "10.78.0.77"]);
    let draft = told.with_extension("new");
    fs::write(&draft, let_in.to_string()).unwrap();
    fs::rename(&draft, &told).unwrap();
    until("it to be let in", || (mount("") == "Ok(())").then_some(()));
    assert_eq!(mount(",noresvport"), "Err(EACCES)");
    assert_eq!(mount(""), "Ok(())");
}

#[test]
fn a_server_of_an_earlier_version_is_mounted_by_that() {
    writes_and_goes_on(By::OlderGanesha, "nfs41", "ganesha.nfsd -F");
}

#[test]
fn a_file_server_that_is_silent_hangs_nothing_but_its_job() {
    hangs_nothing_but_its_job(By::Embedded, "nfsdead");
}

#[test]
fn a_ganesha_that_is_silent_hangs_nothing_but_its_job() {
    hangs_nothing_but_its_job(By::Ganesha, "nfs4dead");
}

fn hangs_nothing_but_its_job(by: By, test: &str) {
    let Some(mut w) = World::start(by, test, PATIENCE_S) else {
        return;
    };
    let quick = |w: &World, name: &str| {
        let begun = Instant::now();
        w.e.submit(name, "true");
        assert_eq!(w.end(name)["state"], "SUCCEEDED");
        begun.elapsed()
    };
    let before = quick(&w, "before");
    let writes = "cd $AZ_BATCHAI_JOB_MOUNT_ROOT/nfs; while echo x >>log; do sync log; usleep 50000; done; sleep 600";
    w.submit("dies", "", "", writes);
    let log = w.data.join("log");
    until("it to write", || log.exists().then_some(()));
    w.network.lose(STORE, true);
    let begun = Instant::now();
    let (code, message) = w.error("dies");
    assert_eq!(code, "MountUnavailable", "{message}");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(PATIENCE_S + 40), "{took:?}");
    w.nothing_is_mounted();
    // Its agent is as it was.
    let after = quick(&w, "after");
    assert!(
        after < before * 3 + Duration::from_secs(1),
        "{after:?} after {before:?}"
    );
    // One that is silent from the beginning.
    w.submit("late", "", "", "true");
    let (code, message) = w.error("late");
    assert_eq!(code, "JobMountFailed", "{message}");
    assert!(
        message.contains("nothing is heard from 10.78.0.2"),
        "{message}"
    );
    // One whose node is there, and that is not: nothing listens.
    w.network.lose(STORE, false);
    let mut agent = w.e.agents.remove("store").unwrap();
    agent.signal(Signal::SIGKILL);
    agent.wait();
    kill(Pid::from_raw(w.serving()), Signal::SIGKILL).unwrap();
    w.submit("closed", "", "", "true");
    let (code, message) = w.error("closed");
    assert_eq!(code, "JobMountFailed", "{message}");
    assert!(message.contains("refused"), "{message}");
    w.nothing_is_mounted();
    quick(&w, "last");
}
