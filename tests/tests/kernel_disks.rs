//! A file server on an array of raw disks, in a guest whose kernel has arrays: made, found again after a power cut, and not served without one
//! of them. Real disks as far as that kernel knows, and the real `mdadm` and `mkfs.ext4`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use batchai_tests::ensemble::{Ensemble, agent_args};
use batchai_tests::guest::{Guest, Image, image};
use batchai_tests::process::until;
use serde_json::{Value, json};

const PROGRAMS: [(&str, &str); 5] = [
    ("mdadm", "mdadm"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mount", "mount"),
    ("setpriv", "util-linux"),
    ("wipefs", "util-linux"),
];
const AT: [&str; 4] = ["-g", "g", "-w", "w"];
const SERVER: &str = "resourceGroups/g/workspaces/w/fileServers/data";
/// Neither is large enough for what is made of both, and they differ.
const MIB: [u64; 2] = [700, 900];
/// What the agent takes first: it ends the agent before or after what it does, where the test says so; or in the middle of the making of an
/// array, when one of the disks knows of it already. After the making of a file system the array is stopped too.
const WRAPPER: &str = r#"#!/bin/sh
tool=${0##*/}
cut() { rm /wrap/$tool.$1 2>/dev/null && kill -9 $PPID && sleep 9; }
cut before
/bin/$tool "$@"; code=$?
case "$1" in --create) if [ -e /wrap/half ]; then /bin/mdadm --stop "$2"; dd if=/dev/zero of=/dev/vdc bs=64k count=1; mv /wrap/half /wrap/mdadm.half; cut half; fi;; esac
if [ $tool = mkfs.ext4 ] && [ -e /wrap/mkfs.ext4.after ]; then for it; do :; done; sync; /bin/mdadm --stop $it; fi
cut after
exit $code
"#;

struct World {
    e: Ensemble,
    image: Image,
    disks: [PathBuf; 3],
}

impl World {
    /// Disks: the first has what the agent remembers.
    fn new() -> Option<World> {
        let e = Ensemble::start(0);
        let image = image()?.with(&PROGRAMS, e.path())?;
        let disks = ["data.img", "first.img", "second.img"].map(|name| e.path().join(name));
        for (path, mib) in disks.iter().zip([64, MIB[0], MIB[1]]) {
            File::create(path).unwrap().set_len(mib << 20).unwrap();
        }
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(&disks[0])
            .status();
        assert!(made.unwrap().success());
        Some(World { e, image, disks })
    }

    /// Boots the machine with these of the disks beside the first; the agent is given two.
    fn boot(&self, disks: &[usize]) -> Guest {
        let mut all: Vec<&Path> = vec![&self.disks[0]];
        all.extend(disks.iter().map(|i| &*self.disks[*i]));
        let mut guest = Guest::boot_with(&self.image, self.e.path(), &all);
        guest.ok("load disks && mount -t ext4 /dev/vda /batchai && mkdir /wrap");
        guest
    }

    fn start_agent(&self, guest: &mut Guest) {
        let [(name, token)] = self.e.join_token();
        let endpoint = Guest::url(&self.e.endpoint);
        let args = agent_args("/batchai".as_ref(), &endpoint, "a1", "job");
        let args = args[1..].join(" ");
        guest.ok(&format!(
            "export {name}={token} AGENT_GROUP= BATCHAI_TEST_STORAGE_TOOLS=/wrap; setsid /sbin/agent {args} --storage-root /srv \
             --storage-disk /dev/vdb --storage-disk /dev/vdc &"
        ));
    }

    fn node(&self) -> Value {
        self.e.json(&["node", "show", "-n", "a1"])
    }

    fn server(&self) -> Value {
        self.e
            .json(&[&["file-server", "show", "-n", "data"], &AT[..]].concat())
    }

    fn until_booted(&self, before: &Value) {
        until("the node to be there with another boot", || {
            let node = self.node();
            let boot = &node["facts"]["bootId"];
            (boot.is_string() && boot != before && node["state"] != "UNUSABLE").then_some(())
        });
    }

    fn run(&self, name: &str, command: &str) -> String {
        self.e.submit(
            name,
            json!({
                "nodeCount": 1,
                "stdOutErrPathPrefix": "/out",
                "mountVolumes": { "fileServers": [{ "fileServer": { "id": SERVER }, "relativeMountPath": "nfs" }] },
                "customToolkitSettings": { "commandLine": command },
            }),
        );
        assert_eq!(self.e.wait(name), 0, "{}", self.e.job(name));
        self.e.log(name, "stdout.txt")
    }
}

#[test]
fn two_disks_become_one_file_server_and_are_it_again() {
    let Some(w) = World::new() else {
        return;
    };
    let mut guest = w.boot(&[1, 2]);
    // It is cut down at every step, once.
    for line in WRAPPER.lines() {
        guest.ok(&format!(
            "echo '{}' >>/wrap/mdadm",
            line.replace('\'', "'\\''")
        ));
    }
    guest.ok("cd /wrap; chmod 755 mdadm; cp mdadm mkfs.ext4; cp mdadm mount");
    let points = [
        "mdadm.before",
        "half",
        "mdadm.after",
        "mkfs.ext4.before",
        "mkfs.ext4.after",
        "mount.before",
        "mount.after",
    ];
    guest.ok(&format!("cd /wrap; touch {}", points.join(" ")));
    w.start_agent(&mut guest);
    for point in points {
        until(&format!("{point} to be reached"), || {
            (guest.run(&format!("[ -e /wrap/{point} ]")).1 != 0).then_some(())
        });
    }
    w.e.until_alive(1);
    assert_eq!(guest.ok("ls -1 /wrap").trim(), "mdadm\nmkfs.ext4\nmount");
    let console = fs::read_to_string(&guest.process.log).unwrap();
    let ended = console.matches("the agent ended with 137").count();
    assert_eq!(ended, points.len(), "{console}");

    let facts = w.node()["facts"].clone();
    let bytes: u64 = facts["storageBytes"].as_str().unwrap().parse().unwrap();
    assert!(bytes > 1_300_000_000, "{facts}");
    assert_eq!(facts["storageFailure"].as_str().unwrap_or_default(), "");
    w.e.create_cluster(1);
    let create = ["file-server", "create", "-n", "data", "-s", "test-size"];
    let disks = ["--disk-count", "1", "--disk-size", "1"];
    let user = ["--storage-sku", "Standard_LRS", "-u", "ada", "-p", "pass"];
    w.e.ok(&[&create[..], &disks, &user, &AT].concat());
    let write = "cd $AZ_BATCHAI_JOB_MOUNT_ROOT/nfs && grep ' /srv ' /proc/mounts && seq 100000 >numbers && sync && md5sum <numbers";
    let said = w.run("writes", write);
    let (mounted, sum) = said.split_once('\n').unwrap();
    assert!(
        mounted.starts_with("/dev/md") && mounted.contains(" ext4 "),
        "{said}"
    );
    assert!(guest.ok("cat /proc/mdstat").contains("raid0 vd"));
    drop(guest);

    // The power is cut; the disks have other names then.
    let mut guest = w.boot(&[2, 1]);
    w.start_agent(&mut guest);
    w.until_booted(&facts["bootId"]);
    assert_eq!(
        w.run(
            "reads",
            "cd $AZ_BATCHAI_JOB_MOUNT_ROOT/nfs && md5sum <numbers"
        ),
        sum
    );
    let boot = w.node()["facts"]["bootId"].clone();
    drop(guest);

    one_of_them_is_gone(&w, &boot);
}

fn one_of_them_is_gone(w: &World, boot: &Value) {
    let mut guest = w.boot(&[2]);
    w.start_agent(&mut guest);
    w.until_booted(boot);
    let why = "--storage-disk /dev/vdc: it is not there";
    let failure = w.node()["facts"]["storageFailure"].clone();
    assert!(
        failure.as_str().unwrap_or_default().contains(why),
        "{failure}"
    );
    assert!(
        w.node()["facts"]["storageRoot"]
            .as_str()
            .unwrap_or_default()
            .is_empty()
    );
    let server = until("what is the matter to be said", || {
        let server = w.server();
        server.to_string().contains(why).then_some(server)
    });
    assert!(
        server.to_string().contains("FileServerNotServed"),
        "{server}"
    );
    assert_eq!(guest.ok("ls -A /srv 2>/dev/null || true").trim(), "");
    // The node runs what does not need it.
    w.e.submit(
        "goes-on",
        json!({ "nodeCount": 1, "stdOutErrPathPrefix": "/out", "customToolkitSettings": { "commandLine": "true" } }),
    );
    assert_eq!(w.e.wait("goes-on"), 0);
}
