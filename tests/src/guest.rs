//! A machine of its own kernel, in QEMU: Debian's kernel, busybox, and the node agent. It has what the kernel of the machine that tests
//! run on may lack, and lacks what that has: control groups of version 2 with all controllers, or none at all, and NFS.
//!
//! It reaches the host's loopback as 10.0.2.2, and what it runs comes over its second serial line, one line of shell at a time.

mod archive;
mod image;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::network::Network;
use crate::process::{PATIENCE, Process, until};

pub use image::{Image, image};

/// Begins the line that says how a command ended.
const MARK: &str = "=== ";
/// As the guest calls the host.
const HOST: &str = "10.0.2.2";
/// For the kernel: that its last words are seen, and that it neither waits for nor guards against what is not there. It has random
/// numbers at once: from a processor without them it would have none for minutes, and no program a secret.
const KERNEL_ARGS: &str =
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on";

/// A guest that runs. Dropping it pulls its plug.
pub struct Guest {
    control: BufReader<UnixStream>,
    pub process: Process,
}

impl Guest {
    /// Boots one; what it needs lies in a directory of the test's.
    pub fn boot(image: &Image, dir: &Path) -> Guest {
        Guest::boot_with(image, dir, &[])
    }

    /// The same with disks, each an image in a file: `/dev/vda` and so on. `load disks` makes them known.
    pub fn boot_with(image: &Image, dir: &Path, disks: &[&Path]) -> Guest {
        Guest::boot_by(&["env".to_owned()], image, dir, "user,id=n0", disks)
    }

    /// Boots one at a network of machines, where it has this address.
    pub fn boot_at(image: &Image, dir: &Path, network: &Network, address: &str) -> Guest {
        let (by, tap) = network.tap();
        let line = format!("tap,id=n0,ifname={tap},script=no,downscript=no");
        let mut guest = Guest::boot_by(&by, image, dir, &line, &[]);
        guest.ok("ip addr flush dev eth0");
        guest.ok(&format!("ip addr add {address}/24 dev eth0"));
        guest
    }

    fn boot_by(by: &[String], image: &Image, dir: &Path, line: &str, disks: &[&Path]) -> Guest {
        let (console, socket) = (dir.join("console.log"), dir.join("control"));
        let network = ["-netdev", line, "-device", "virtio-net-pci,netdev=n0"];
        let disks = disks.iter().enumerate().flat_map(|(i, path)| {
            let drive = format!("file={},format=raw,if=none,id=d{i}", path.display());
            let device = format!("virtio-blk-pci,drive=d{i}");
            ["-drive".to_owned(), drive, "-device".to_owned(), device]
        });
        let child = Command::new(&by[0])
            .args(&by[1..])
            .arg(&image.qemu)
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-M", "pc", "-accel", "tcg"])
            .args(["-cpu", "qemu64,+rdrand", "-smp", "1", "-m", "512"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initramfs)
            .args(["-append", KERNEL_ARGS])
            .args(network)
            .args(disks)
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-serial")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("qemu.log")).expect("the directory is writable"))
            .spawn()
            .expect("QEMU can be started");
        let process = Process {
            child,
            log: console,
        };
        let control = until("QEMU to listen", || UnixStream::connect(&socket).ok());
        let patience = control.set_read_timeout(Some(PATIENCE));
        patience.expect("it is not zero");
        let mut guest = Guest {
            control: BufReader::new(control),
            process,
        };
        guest.answer("ready");
        guest
    }

    /// All until the mark, and what follows on that.
    fn answer(&mut self, to: &str) -> (String, String) {
        let mut said = String::new();
        loop {
            let mut line = Vec::new();
            let read = self.control.read_until(b'\n', &mut line);
            let read = read.unwrap_or_else(|error| panic!("{to}: {error}; until then: {said}"));
            assert!(read > 0, "the guest is gone; {to}: {said}");
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(mark) = line.strip_prefix(MARK) {
                // The end of the line before the mark's own.
                said.pop();
                return (said, mark.trim_end().to_owned());
            }
            said.push_str(&line);
        }
    }

    /// Runs one line of shell; returns what it printed, and its exit code.
    pub fn run(&mut self, line: &str) -> (String, i32) {
        assert!(!line.contains('\n'), "one line: {line}");
        let control = self.control.get_mut();
        let sent = control.write_all(format!("{line}\n").as_bytes());
        sent.expect("the guest runs");
        let (said, code) = self.answer(line);
        (said, code.parse().expect("control says a number"))
    }

    /// The same, and expects success.
    pub fn ok(&mut self, line: &str) -> String {
        let (said, code) = self.run(line);
        assert_eq!(code, 0, "{line}: {said}");
        said
    }

    /// What runs in it, by its number and command line; not what belongs to the kernel, nor this question. What nobody has waited for
    /// since it ended has no command line.
    pub fn processes(&mut self) -> Vec<(i32, String)> {
        let said = self.ok("ps -o pid,stat,args");
        let lines = said.lines().skip(1).filter_map(|line| {
            let mut parts = line.split_whitespace();
            let (pid, stat) = (parts.next()?.parse().ok()?, parts.next()?);
            // Before a command line that names another program there stands what the kernel calls it.
            let args = parts.skip_while(|part| part.starts_with('{') && part.ends_with('}'));
            let args = args.collect::<Vec<_>>().join(" ");
            let kernels = args.starts_with('[') && !stat.starts_with('Z');
            (!kernels && args != "ps -o pid,stat,args" && !args.starts_with("sh -c ps"))
                .then_some((pid, args))
        });
        lines.collect()
    }

    /// What leads from it to a port of the host's loopback.
    pub fn url(endpoint: &str) -> String {
        endpoint.replace("127.0.0.1", HOST)
    }
}
