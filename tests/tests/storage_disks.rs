//! Raw disks that an agent is given to make its storage root of: one, on this machine, behind a loop device. Several are an array, and made in a
//! guest (`kernel_disks`), whose kernel has arrays.
//!
//! The agents here have no token: each ends when its storage is there, and says so by what it lacks then.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::Command;

use batchai_tests::disks::Disk;
use batchai_tests::process::under_test;
use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 64;
/// What an agent says that has done all that comes before it joins.
const JOINS: &str = "is no node yet";

struct World {
    dir: TempDir,
}

impl World {
    fn new() -> World {
        let dir = tempfile::Builder::new().prefix("batchai-disks-").tempdir();
        let world = World { dir: dir.unwrap() };
        // What agents take first: programs that end whoever has started them, when the test says so.
        fs::create_dir(world.at("wrap")).unwrap();
        for tool in ["mkfs.ext4", "mount"] {
            let path = world.at("wrap").join(tool);
            let wrap = world.at("wrap").display().to_string();
            let text = format!(
                "#!/bin/sh\ncut() {{ rm {wrap}/{tool}.$1 2>/dev/null && kill -9 $PPID && sleep 9; }}\ncut before\n\
                 PATH=/usr/sbin:/usr/bin:/sbin:/bin {tool} \"$@\"; code=$?\ncut after\nexit $code\n"
            );
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        world
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn disk(&self, name: &str) -> Option<Disk> {
        Disk::blank(&self.at(name), MIB)
    }

    /// Runs an agent until it would join; returns what it said, nothing where it was cut down.
    fn agent(&self, data: &str, disks: &[&str]) -> String {
        let mut command = Command::new(under_test());
        command.args(["node-agent", "--coordinator", "https://127.0.0.1:1"]);
        for (option, name) in [
            ("--data", data),
            ("--root", "root"),
            ("--storage-root", "srv"),
        ] {
            command.arg(option).arg(self.at(name));
        }
        for disk in disks {
            command.args(["--storage-disk", disk]);
        }
        let output = command
            .args(["--job-user", "self"])
            .env("BATCHAI_TEST_STORAGE_TOOLS", self.at("wrap"))
            .output()
            .unwrap();
        assert!(!output.status.success(), "nobody let it join");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// The same where storage was made: the agent goes on, whatever is there.
    fn again(&self, disks: &[&str], served: bool) -> String {
        let said = self.agent("data", disks);
        assert!(said.contains(JOINS), "{said}");
        assert_eq!(said.contains("no file server is served"), !served, "{said}");
        said
    }

    fn record(&self) -> Value {
        let text = fs::read(self.at("data/storage.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn is_mounted(&self, disk: &Disk) -> bool {
        let device = fs::metadata(&disk.device).unwrap().rdev();
        fs::metadata(self.at("srv")).is_ok_and(|found| found.dev() == device)
    }
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

/// What begins a volume of LVM, with the sum by which it is known.
fn lvm_label() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(b"LABELONE");
    sector[8..16].copy_from_slice(&1u64.to_le_bytes());
    sector[20..24].copy_from_slice(&32u32.to_le_bytes());
    sector[24..32].copy_from_slice(b"LVM2 001");
    sector[32..64].copy_from_slice(b"abcdefghijklmnopqrstuvwxyz012345");
    let mut sum = 0xf597_a6cf_u32;
    for byte in &sector[20..] {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    sector[16..20].copy_from_slice(&sum.to_le_bytes());
    sector
}

/// One partition, as DOS had them.
fn partition_table() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 3, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn write_at(disk: &Disk, at: usize, bytes: &[u8]) {
    let mut all = disk.bytes();
    all[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(&disk.device, all).unwrap();
}

#[test]
fn a_disk_that_holds_anything_is_refused_and_not_touched() {
    let w = World::new();
    let (Some(blank), Some(disk)) = (w.disk("blank"), w.disk("disk")) else {
        return;
    };
    let device = disk.device.clone();
    let unknown = "data of no known kind";
    let cases: [(&str, &dyn Fn()); 7] = [
        ("ext4, UUID", &|| run("mkfs.ext4", &["-q", "-F", &device])),
        // Its beginning is lost, and all else is there.
        (unknown, &|| {
            run("mkfs.ext4", &["-q", "-F", &device]);
            write_at(&disk, 0, &[0; 4096]);
        }),
        // As what is encrypted looks.
        (unknown, &|| {
            // The same each time: by chance some would look like something.
            let mut word = 1_u64;
            let words = (0..MIB << 17).flat_map(|_| {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word.to_le_bytes()
            });
            let random: Vec<u8> = words.collect();
            fs::write(&disk.device, random).unwrap();
        }),
        (unknown, &|| write_at(&disk, (MIB << 20) as usize - 1, &[1])),
        ("swap, UUID", &|| run("mkswap", &["-q", &device])),
        ("dos", &|| write_at(&disk, 0, &partition_table())),
        ("LVM2_member", &|| write_at(&disk, 512, &lvm_label())),
    ];
    for (held, make) in cases {
        fs::write(&disk.device, vec![0; (MIB << 20) as usize]).unwrap();
        make();
        run("sync", &[&disk.device]);
        let (before, blank_before) = (disk.bytes(), blank.bytes());
        assert!(before.iter().any(|byte| *byte != 0));
        // Alone, and beside one that is blank.
        for disks in [&[&*device][..], &[&blank.device, &device]] {
            let said = w.agent("data", disks);
            let expected = format!("--storage-disk {device}: it is not blank: it holds {held}");
            assert!(said.contains(&expected), "{held}: {said}");
            assert!(said.contains("blkdiscard -z"), "{said}");
            assert_eq!(w.record(), Value::Null, "nothing was begun");
        }
        run("sync", &[&disk.device, &blank.device]);
        assert!(
            disk.bytes() == before && blank.bytes() == blank_before,
            "{held}"
        );
    }
}

#[test]
fn what_is_no_blank_disk_of_its_own_is_refused() {
    let w = World::new();
    let Some(disk) = w.disk("disk") else {
        return;
    };
    let refused = |disks: &[&str], why: &str| {
        let said = w.agent("data", disks);
        assert!(said.contains(why) && !said.contains(JOINS), "{why}: {said}");
        assert_eq!(w.record(), Value::Null, "nothing was begun");
        assert!(disk.bytes().iter().all(|byte| *byte == 0), "{why}");
    };
    let (file, missing) = (w.at("disk"), w.at("missing"));
    refused(&[&file.to_string_lossy()], "it is no disk");
    refused(&[&missing.to_string_lossy()], "it is not there");
    refused(&[&disk.device, &disk.device], "the same disk");
    let link = w.at("link");
    std::os::unix::fs::symlink(&disk.device, &link).unwrap();
    refused(&[&disk.device, &link.to_string_lossy()], "the same disk");
    let mut held = OpenOptions::new();
    let held = held.read(true).write(true).custom_flags(nix::libc::O_EXCL);
    let held = held.open(&disk.device).unwrap();
    refused(&[&disk.device], "it is in use");
    drop(held);
    let locked = fs::File::open(&disk.device).unwrap();
    let locked = nix::fcntl::Flock::lock(locked, nix::fcntl::FlockArg::LockSharedNonblock);
    refused(&[&disk.device], "another program has locked it");
    drop(locked.unwrap());
    fs::write(w.at("srv/lies"), "here").unwrap();
    refused(&[&disk.device], "it is not empty");
    assert_eq!(fs::read_to_string(w.at("srv/lies")).unwrap(), "here");
}

#[test]
fn a_blank_disk_is_made_once_and_an_agent_may_be_cut_down_at_any_step() {
    let w = World::new();
    let (Some(disk), Some(other)) = (w.disk("disk"), w.disk("other")) else {
        return;
    };
    let cut = |point: &str| {
        fs::write(w.at("wrap").join(point), "").unwrap();
        let said = w.agent("data", &[&disk.device]);
        assert!(
            !said.contains(JOINS) && !w.at("wrap").join(point).exists(),
            "{point}: {said}"
        );
    };
    cut("mkfs.ext4.before");
    let begun = w.record();
    assert_eq!(begun["made"], false, "{begun}");
    cut("mkfs.ext4.after");
    assert_eq!(w.record()["made"], false);
    // Begun, and taken by somebody else meanwhile.
    run("mkswap", &["-q", "-f", &disk.device]);
    let said = w.agent("data", &[&disk.device]);
    assert!(said.contains("it holds") && said.contains("swap"), "{said}");
    fs::write(&disk.device, vec![0; (MIB << 20) as usize]).unwrap();
    cut("mkfs.ext4.after");
    what_was_begun_is_not_made_anew_where_it_was_used(&w, &disk, &other);
    let begun = w.record();
    cut("mount.before");
    let made = w.record();
    assert_eq!(made["made"], true, "{made}");
    assert_eq!(made["file_system"], begun["file_system"]);
    cut("mount.after");
    assert!(w.is_mounted(&disk));
    fs::write(w.at("srv/lies"), "here").unwrap();
    w.again(&[&disk.device], true);
    assert!(disk.unmount());
    w.again(&[&disk.device], true);
    assert_eq!(fs::read_to_string(w.at("srv/lies")).unwrap(), "here");
    assert_eq!(w.record(), made);
    assert!(disk.unmount());
    what_was_made_is_never_made_again(&w, &disk, &other);
}

fn what_was_begun_is_not_made_anew_where_it_was_used(w: &World, disk: &Disk, other: &Disk) {
    let begun = w.record();
    let refused = |disks: &[&str], why: &str| {
        run("sync", &[&disk.device]);
        let before = disk.bytes();
        let said = w.agent("data", disks);
        assert!(said.contains(why) && !said.contains(JOINS), "{why}: {said}");
        run("sync", &[&disk.device]);
        assert!(disk.bytes() == before, "{why}");
    };
    refused(&[], "is not known to be whole");
    refused(&[&disk.device, &other.device], "names not just those");
    let record = w.at("data/storage.json");
    let mut moved = begun.clone();
    moved["machine"] = "another".into();
    fs::write(&record, moved.to_string()).unwrap();
    refused(&[&disk.device], "was written on another machine");
    fs::write(&record, begun.to_string()).unwrap();
    let blank = disk.bytes();
    let srv = w.at("srv").to_string_lossy().into_owned();
    run("mount", &[&disk.device, &srv]);
    fs::write(w.at("srv/lies"), "here").unwrap();
    assert!(disk.unmount());
    refused(&[&disk.device], "was mounted since");
    fs::write(&disk.device, blank).unwrap();
    assert_eq!(w.record(), begun);
}

fn what_was_made_is_never_made_again(w: &World, disk: &Disk, other: &Disk) {
    // Not there, another, too many, or none: nothing is served, and nothing is made.
    let blank = other.bytes();
    for (disks, why) in [
        (
            &[&*w.at("missing").to_string_lossy()][..],
            "it is not there",
        ),
        (
            &[&other.device],
            "it holds nothing, and nothing of the 1 disks",
        ),
        (
            &[&disk.device, &other.device],
            "made of 1 disks, and --storage-disk names 2",
        ),
        (&[], "made of 1 disks, and --storage-disk names 0"),
    ] {
        let said = w.again(disks, false);
        assert!(said.contains(why), "{why}: {said}");
        assert!(!w.is_mounted(disk) && !w.is_mounted(other));
    }
    assert!(other.bytes() == blank);
    let record = w.record();
    let mut moved = record.clone();
    moved["machine"] = "another".into();
    fs::write(w.at("data/storage.json"), moved.to_string()).unwrap();
    let said = w.again(&[&disk.device], false);
    assert!(said.contains("was written on another machine"), "{said}");
    assert!(!w.is_mounted(disk));
    fs::write(w.at("data/storage.json"), record.to_string()).unwrap();
    // The disk of another agent is not this one's.
    let said = w.agent("data2", &[&disk.device]);
    assert!(
        said.contains("it holds ext4")
            && said.contains("label batchai: file servers of another agent"),
        "{said}"
    );
    assert!(
        !said.contains("wipefs") && said.contains("mount them"),
        "{said}"
    );
    // Whoever mounts it by hand need not name it.
    let srv = w.at("srv");
    run("mount", &[&disk.device, &srv.to_string_lossy()]);
    w.again(&[], true);
    assert_eq!(fs::read_to_string(srv.join("lies")).unwrap(), "here");
    let root = fs::metadata(srv).unwrap();
    assert_eq!((root.uid(), root.mode() & 0o777), (0, 0o755));
}
