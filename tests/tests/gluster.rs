//! A file system of the users' own, for real: a GlusterFS volume with a brick on each of two machines, mounted by jobs on two others. The
//! machines are network namespaces. Every daemon of Gluster's is in a process namespace of its machine, which ends with the test, and has
//! directories of its own in the place of those that the packages have.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use batchai_tests::ensemble::{IN, mounts_below};
use batchai_tests::network::Network;
use batchai_tests::process::{processes_of, until};
use batchai_tests::replicas::Replicas;
use batchai_tests::requirement;
use serde_json::{Value, json};

/// The machines of the bricks; the jobs' are the two after them, and the coordinator is on the last.
const BRICKS: [u64; 2] = [1, 2];
const NODES: [u64; 2] = [3, 4];
/// How long agents of this test wait for a mount.
const PATIENCE_S: u64 = 10;
/// Puts a machine's own directories in the place of those that Gluster uses, and becomes a command.
const OWN: &str = "set -e; dir=$0; mkdir -p \"$dir/run/gluster\"; \
     for at in /var/lib/glusterd /run /var/log/glusterfs; do mkdir -p \"$dir$at\"; mount --bind \"$dir$at\" $at; done; \
     exec \"$@\"";

/// Machines with a volume and nodes. What uses the network ends before it.
struct World {
    e: Replicas,
    daemons: Vec<Child>,
    network: Network,
}

impl Drop for World {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            end(daemon);
        }
    }
}

/// Cuts a machine's daemon down, and with it all that it has started.
fn end(daemon: &mut Child) {
    // It may be so already.
    let _ = daemon.kill();
    let _ = daemon.wait();
}

fn able() -> bool {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root mounts anything");
        return false;
    }
    let hint = "apt-get install glusterfs-server glusterfs-client";
    ["glusterd", "gluster", "mount.glusterfs"]
        .iter()
        .all(|program| requirement::program(program, hint).is_some())
}

impl World {
    fn new() -> Option<World> {
        if !able() {
            return None;
        }
        let network = Network::new("gluster", 4)?;
        let mut e = network.replica(4);
        let list = e.list();
        for machine in NODES {
            let mut by = network.on(machine);
            by.extend([
                "env".to_owned(),
                format!("BATCHAI_MOUNT_PATIENCE={PATIENCE_S}"),
            ]);
            e.start_agent_by(&by, &format!("n{machine}"), &list);
        }
        let mut world = World {
            e,
            daemons: Vec::new(),
            network,
        };
        for machine in BRICKS {
            let own = ["--pid", "--fork", "--kill-child", "--mount-proc"];
            let mut daemon = world.on(machine, &own);
            let daemon = daemon.args(["glusterd", "--no-daemon"]).spawn();
            world.daemons.push(daemon.expect("it can be started"));
        }
        world.make_volume();
        until("the nodes to be in contact", || {
            let nodes = world.e.json_at(&list, &["node", "list"]);
            let alive = nodes.as_array()?.iter();
            let alive = alive.filter(|node| node["state"] != "UNUSABLE");
            (alive.count() == NODES.len()).then_some(())
        });
        world.e.create_cluster(NODES.len());
        Some(world)
    }

    fn dir(&self, machine: u64) -> PathBuf {
        self.e.path().join(format!("gluster-{machine}"))
    }

    fn brick(&self, machine: u64) -> PathBuf {
        self.dir(machine).join("brick")
    }

    /// What a machine of Gluster's runs something by.
    fn on(&self, machine: u64, namespaces: &[&str]) -> Command {
        let into = self.network.on(machine);
        let mut command = Command::new(&into[0]);
        command
            .args(&into[1..])
            .args(["unshare", "--mount"])
            .args(namespaces)
            .args(["sh", "-c", OWN])
            .arg(self.dir(machine))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// Tells the first machine's daemon something, until it does that: they take a moment to find each other.
    fn gluster(&self, args: &[&str]) {
        until(&args.join(" "), || {
            let mut command = self.on(BRICKS[0], &[]);
            let command = command.args(["gluster", "--mode=script"]).args(args);
            let output = command.stderr(Stdio::piped()).stdout(Stdio::piped());
            let output = output.output().unwrap();
            if output.status.success() {
                return Some(());
            }
            eprintln!("{args:?}: {output:?}");
            std::thread::sleep(Duration::from_millis(200));
            None
        });
    }

    fn make_volume(&self) {
        self.gluster(&["peer", "probe", "10.78.0.2"]);
        let brick = |machine| format!("10.78.0.{machine}:{}", self.brick(machine).display());
        let bricks = BRICKS.map(brick);
        let create = ["volume", "create", "lab", "replica", "2"];
        self.gluster(&[&create[..], &[&bricks[0], &bricks[1], "force"]].concat());
        self.gluster(&["volume", "start", "lab"]);
    }

    /// A job that mounts a volume.
    fn submit(&self, name: &str, nodes: usize, volume: &str, command: &str) {
        let log = self.e.path().join(format!("{name}.client.log"));
        let mount = format!(
            "mount -t glusterfs -o backup-volfile-servers=10.78.0.2,log-file={} 10.78.0.1:/{volume}",
            log.display()
        );
        let job = json!({
            "nodeCount": nodes,
            "stdOutErrPathPrefix": self.e.path().join("out"),
            "mountVolumes": { "unmanagedFileSystems": [
                { "mountCommand": mount, "relativeMountPath": "lab" },
            ] },
            "customToolkitSettings": {
                "commandLine": format!("set -e; cd $AZ_BATCHAI_JOB_MOUNT_ROOT/lab; {command}"),
                "processesPerNode": 1,
            },
        });
        self.e.submit_with(name, job);
    }

    fn until_job(&self, name: &str, state: &str) -> Value {
        until(&format!("{name} to be {state}"), || {
            let job = self.e.job(name);
            let ended = ["SUCCEEDED", "FAILED"].iter().any(|s| job["state"] == *s);
            assert!(!ended || job["state"] == state, "{job}");
            (job["state"] == state).then_some(job)
        })
    }

    /// Neither a mount nor a client of one is there any more.
    fn nothing_is_mounted(&self) {
        let left = mounts_below(&self.e.path().join("nodes"));
        assert!(left.is_empty(), "{left:?}");
        until("the clients to be gone", || {
            let all = processes_of(&self.e.path().join("nodes"));
            let clients = all.iter().filter(|(_, line)| line.contains("glusterfs"));
            (clients.count() == 0).then_some(())
        });
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn a_volume_of_two_bricks_is_mounted_by_jobs_and_outlives_one_of_them() {
    let Some(mut w) = World::new() else {
        return;
    };
    // Two nodes see what the other writes, and it lies on both bricks.
    w.submit(
        "share",
        2,
        "lab",
        "mountpoint -q .; echo from $RANK > $RANK; until [ -s $((1 - RANK)) ]; do sleep 0.1; done; \
         cat $((1 - RANK)) > seen-$RANK; stat -f -c %T . > type",
    );
    w.until_job("share", "SUCCEEDED");
    for machine in BRICKS {
        let brick = w.brick(machine);
        assert_eq!(read(&brick.join("seen-0")), "from 1\n");
        assert_eq!(read(&brick.join("seen-1")), "from 0\n");
        assert_eq!(read(&brick.join("type")), "fuseblk\n");
    }
    w.nothing_is_mounted();

    // A volume that is none fails its job, and says what Gluster said.
    w.submit("none", 1, "none", "true");
    let job = w.until_job("none", "FAILED");
    assert_eq!(job["errors"][0]["code"], "JobMountFailed", "{job}");
    w.nothing_is_mounted();

    // One brick is lost while a job writes: it goes on, and no line is missing on the other.
    let stop = w.e.path().join("stop");
    let write = format!(
        "i=0; until [ -e '{}' ]; do i=$((i + 1)); echo $i >> lines; sleep 0.05; done; echo $i > count",
        stop.display()
    );
    w.submit("goes-on", 1, "lab", &write);
    let lines = w.brick(BRICKS[1]).join("lines");
    let count = || read(&lines).lines().count();
    until("the job to write", || (count() > 3).then_some(()));
    end(&mut w.daemons[0]);
    let before = count();
    until("the job to go on", || (count() > before + 20).then_some(()));
    fs::write(&stop, "").unwrap();
    w.until_job("goes-on", "SUCCEEDED");
    let written = read(&lines);
    let expected: String = (1..=count()).map(|i| format!("{i}\n")).collect();
    assert_eq!(written, expected);
    let said = read(&w.brick(BRICKS[1]).join("count"));
    assert_eq!(said, format!("{}\n", count()));
    w.nothing_is_mounted();

    // Both are lost: the job fails for that, and its node takes others.
    w.submit("lost", 1, "lab", "echo begun > more; cd /; sleep 600");
    let more = w.brick(BRICKS[1]).join("more");
    until("the job to write", || {
        (!read(&more).is_empty()).then_some(())
    });
    end(&mut w.daemons[1]);
    let job = w.until_job("lost", "FAILED");
    assert_eq!(job["errors"][0]["code"], "MountUnavailable", "{job}");
    w.nothing_is_mounted();
    w.e.submit("after", "true");
    w.until_job("after", "SUCCEEDED");
    let list = [&["job", "list"][..], &IN].concat();
    let jobs = w.e.json_at(&w.e.list(), &list);
    assert_eq!(jobs.as_array().map(Vec::len), Some(5), "{jobs}");
}
