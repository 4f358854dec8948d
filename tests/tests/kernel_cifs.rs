//! Azure's shares by the kernel's own client, in a guest that has one and no `rclone`: with Samba's server on this machine.

use std::fs;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use batchai_tests::ensemble::{Ensemble, agent_args};
use batchai_tests::guest::{Guest, image};
use batchai_tests::process::until;
use batchai_tests::storage::{SHARE_KEY, SHARE_USER, Shares};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Of a kind that opens nothing.
const WRONG_KEY: &str = "d3JvbmdrZXltYXJrMTIzNDU2Nzg5MA==";
/// The guest is slow.
const PATIENCE_S: u64 = 15;
/// Who waits for what was written cannot be killed until the kernel gives the server up. It does that after three times a third of the
/// patience, and a third to see it; then it tries to connect once, for 5 s, and has who writes wait 10 s for that.
const GIVEN_UP_S: u64 = 40;
/// More than any server lets wait.
const WAITING_MAX: usize = 10_000;

struct World {
    guest: Guest,
    e: Ensemble,
    shares: Shares,
}

/// The server stands still, with the processes that have its connections, until this is dropped.
struct Still(Vec<Pid>);

impl Still {
    fn new(shares: &Shares) -> Still {
        let pid = shares.0.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
        let all: Vec<_> = children.chain([pid]).map(Pid::from_raw).collect();
        for pid in &all {
            kill(*pid, Signal::SIGSTOP).unwrap();
        }
        Still(all)
    }

    /// So many wait for it to take them that its kernel answers nobody else, as if the machine were off.
    fn silent(&self, shares: &Shares) -> Vec<TcpStream> {
        let address = ([127, 0, 0, 1], shares.0.port).into();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok();
        let waiting: Vec<_> = std::iter::from_fn(connect).take(WAITING_MAX).collect();
        assert!(waiting.len() < WAITING_MAX, "it answers all of them");
        waiting
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        for pid in &self.0 {
            // It may have ended.
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

impl World {
    fn start() -> Option<World> {
        let image = image()?;
        let shares = Shares::start()?;
        let e = Ensemble::start(0);
        let mut guest = Guest::boot(image, e.path());
        guest.ok("load nfs && load cifs");
        let [(name, token)] = e.join_token();
        let endpoint = Guest::url(&e.endpoint);
        let args = agent_args("/batchai".as_ref(), &endpoint, "a1", "job");
        let args = args[1..].join(" ");
        guest.ok(&format!(
            "export {name}={token} AGENT_GROUP=; setsid /sbin/agent {args} --mount-patience {PATIENCE_S} &"
        ));
        e.until_alive(1);
        e.create_cluster(1);
        Some(World { guest, e, shares })
    }

    /// Submits a job that mounts this part of the server at `afs`.
    fn submit(&self, name: &str, of: &str, key: &str, command: &str) {
        let url = Guest::url(&self.shares.url()).replace("/data", of);
        let share = json!({
            "accountName": SHARE_USER,
            "azureFileUrl": url,
            "credentials": { "accountKey": key },
            "relativeMountPath": "deep/afs",
            "fileMode": "0640",
            "directoryMode": "0750",
        });
        self.e.submit(
            name,
            json!({
                "nodeCount": 1,
                "stdOutErrPathPrefix": "/out",
                "mountVolumes": { "azureFileShares": [share] },
                "customToolkitSettings": { "commandLine": format!("cd $AZ_BATCHAI_JOB_MOUNT_ROOT/deep/afs; {command}") },
            }),
        );
    }

    fn end(&self, name: &str) -> Value {
        until(&format!("{name} to end, now {}", self.e.job(name)), || {
            let job = self.e.job(name);
            (job["state"] == "SUCCEEDED" || job["state"] == "FAILED").then_some(job)
        })
    }

    fn error(&self, name: &str) -> (String, String) {
        let error = &self.end(name)["errors"][0];
        let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
        (text("code"), text("message"))
    }

    fn nothing_is_mounted(&mut self) {
        let guest = &mut self.guest;
        until("nothing to be mounted", || {
            (guest.run("grep -q ' cifs ' /proc/mounts").1 != 0).then_some(())
        });
    }

    /// A job writes to a file until the server stands still.
    fn stops_amid_writing(&self, name: &str) -> Still {
        let writes =
            "echo x >log; while echo x >>log2; do sync log2; usleep 50000; done; sleep 600";
        self.submit(name, "/data", SHARE_KEY, writes);
        let log = self.shares.dir().join("log2");
        until("it to write", || log.exists().then_some(()));
        Still::new(&self.shares)
    }

    fn quick(&self, name: &str) -> Duration {
        let begun = Instant::now();
        self.e.submit(
            name,
            json!({ "nodeCount": 1, "stdOutErrPathPrefix": "/out", "customToolkitSettings": { "commandLine": "true" } }),
        );
        assert_eq!(self.end(name)["state"], "SUCCEEDED");
        begun.elapsed()
    }
}

#[test]
fn a_share_is_mounted_by_the_kernel_and_a_server_that_falls_silent_hangs_nothing() {
    let Some(mut w) = World::start() else {
        return;
    };
    w.shares.put("a.txt", "given\n");
    w.submit(
        "j",
        "/data",
        SHARE_KEY,
        "set -e; grep -c ' cifs ' /proc/mounts; cat a.txt; stat -c '%a %u %g' . a.txt; mkdir -p out; echo one > out/one; \
         for i in 1 2 3 4 5; do echo $i > tmp; mv tmp model; done; echo first > log; echo second >> log; rm a.txt; \
         seq 100000 > numbers; md5sum < numbers",
    );
    let job = w.end("j");
    assert_eq!(
        job["state"],
        "SUCCEEDED",
        "{job}: {}",
        w.e.log("j", "stderr.txt")
    );
    let said = w.e.log("j", "stdout.txt");
    assert!(
        said.starts_with("1\ngiven\n750 1000 1000\n640 1000 1000\n"),
        "{said}"
    );
    w.nothing_is_mounted();
    assert_eq!(w.shares.get("model"), "5\n");
    assert_eq!(w.shares.get("log"), "first\nsecond\n");
    assert_eq!(w.shares.get("out/one"), "one\n");
    let numbers: String = (1..=100_000).map(|i| format!("{i}\n")).collect();
    assert_eq!(
        fs::read_to_string(w.shares.dir().join("numbers")).unwrap(),
        numbers
    );
    // Of a directory of it only that is there.
    w.submit("inner", "/data/out", SHARE_KEY, "ls");
    let job = w.end("inner");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    assert_eq!(w.e.log("inner", "stdout.txt"), "one\n");

    // As Azure has it: what travels is to be sealed.
    w.submit(
        "sealed",
        "/sealed",
        SHARE_KEY,
        "cat log; echo third >> log; cat log",
    );
    let job = w.end("sealed");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    let said = w.e.log("sealed", "stdout.txt");
    assert_eq!(said, "first\nsecond\nfirst\nsecond\nthird\n");

    what_cannot_be_opened_is_said(&mut w);
    one_that_falls_silent_hangs_nothing(&mut w);
}

fn what_cannot_be_opened_is_said(w: &mut World) {
    for (name, of, key, why) in [
        ("key", "/data", WRONG_KEY, "wrong account or key"),
        ("share", "/missing", SHARE_KEY, "no such share or directory"),
        (
            "directory",
            "/data/missing",
            SHARE_KEY,
            "no such share or directory",
        ),
    ] {
        w.submit(name, of, key, "true");
        let (code, message) = w.error(name);
        assert_eq!(code, "AZFMountError", "{message}");
        assert!(
            message.contains("the share //10.0.2.2") && message.contains(why),
            "{message}"
        );
        assert!(!message.contains(key), "{message}");
        w.nothing_is_mounted();
    }
}

fn one_that_falls_silent_hangs_nothing(w: &mut World) {
    let still = w.stops_amid_writing("dies");
    let silent = still.silent(&w.shares);
    let begun = Instant::now();
    let (code, message) = w.error("dies");
    assert_eq!(code, "MountUnavailable", "{message}");
    let took = begun.elapsed();
    let most = Duration::from_secs(PATIENCE_S + GIVEN_UP_S);
    assert!(took < most, "{took:?}");
    w.nothing_is_mounted();
    // Its agent waits for nothing of that: a job takes a few seconds, how many the machine says.
    let after = w.quick("after");
    assert!(after < Duration::from_secs(PATIENCE_S), "{after:?}");
    // One that is silent from the beginning.
    w.submit("late", "/data", SHARE_KEY, "true");
    let (code, message) = w.error("late");
    assert_eq!(code, "AZFMountError", "{message}");
    w.nothing_is_mounted();
    drop((silent, still));
    w.submit("again", "/data", SHARE_KEY, "cat log");
    let job = w.end("again");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    assert_eq!(w.e.log("again", "stdout.txt"), "x\n");
}

/// The kernel of such a server takes connections: then the kernel of the node tries for ever, and who waits for what was written cannot be
/// killed.
#[test]
fn where_the_kernel_does_not_give_up_the_node_says_so() {
    let Some(mut w) = World::start() else {
        return;
    };
    let still = w.stops_amid_writing("waits");
    // It is in nobody's way.
    w.nothing_is_mounted();
    let error = until("the node to say what does not die", || {
        w.e.json(&["node", "show", "-n", "a1"])["errors"]
            .get(0)
            .cloned()
    });
    assert_eq!(error["code"], "ProcessesDoNotDie", "{error}");
    drop(still);
    let (code, message) = w.error("waits");
    assert_eq!(code, "MountUnavailable", "{message}");
    w.nothing_is_mounted();
    w.quick("after");
}
