//! The README's 'Your machines', as it stands: three machines, which are network namespaces with files of their own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use batchai_tests::process::{processes_of, sweep, under_test, until};
use batchai_tests::requirement;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// The commands of a part of the section, and what the last of them prints.
fn commands(part: &str) -> (Vec<String>, Vec<String>) {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let begin = format!("```console machines {part}\n");
    let (_, block) = readme.split_once(&begin).unwrap();
    let (block, _) = block.split_once("```").unwrap();
    let commands = block.lines().filter_map(|line| line.strip_prefix("$ "));
    let printed = block.lines().filter(|line| !line.starts_with("$ "));
    (
        commands.map(str::to_owned).collect(),
        printed.map(str::to_owned).collect(),
    )
}

/// What a machine has that a namespace has not: sudo, and systemd to start a unit.
const PRELUDE: &str = r#"
set -euo pipefail
for dir in etc var/lib usr/local/bin mnt home run; do
    mkdir -p "$MACHINE/$dir" "/$dir"
    mount --bind "$MACHINE/$dir" "/$dir"
done
export HOME=/home USER=root BATCHAI_PROGRAM BATCHAI_CONFIG=/home/config.json
cd "$MACHINE/project"
sudo() {
    local as=root
    if [ "$1" = -u ]; then as=$2; shift 2; fi
    if [ "$1" = systemctl ]; then "$@"; else setpriv --reuid "$as" --regid "$as" --init-groups -- "$@"; fi
}
systemctl() {
    local unit=/etc/systemd/system/$3.service
    local setting user directory
    setting() { sed -n "s/^$1=//p" "$unit"; }
    user=$(setting User); user=${user:-root}
    directory=/var/lib/$(setting StateDirectory)
    install -d -m 700 -o "$user" -g "$user" "$directory"
    set -a; . "$(setting EnvironmentFile)"; set +a
    eval "set -- $(setting ExecStart)"
    setpriv --reuid "$user" --regid "$user" --init-groups -- nohup "$@" >>"$MACHINE/$user.log" 2>&1 &
}
"#;

struct Machines {
    dir: tempfile::TempDir,
    names: [String; 3],
}

const ADDRESSES: [&str; 3] = ["10.77.0.1", "10.77.0.2", "10.77.0.3"];

impl Machines {
    fn new() -> Machines {
        let dir = tempfile::Builder::new().prefix("batchai-test-").tempdir();
        let dir = dir.unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let id = std::process::id();
        let names = [0, 1, 2].map(|number| format!("batchai-{id}-{number}"));
        let machines = Machines { dir, names };
        for (number, name) in machines.names.iter().enumerate() {
            machines.ip(&["netns", "add", name]);
            machines.ip(&["-n", name, "link", "set", "lo", "up"]);
            machines.files(number);
        }
        let [hub, ..] = &machines.names;
        machines.ip(&["-n", hub, "link", "add", "br0", "type", "bridge"]);
        machines.ip(&["-n", hub, "addr", "add", "10.77.0.1/24", "dev", "br0"]);
        machines.ip(&["-n", hub, "link", "set", "br0", "up"]);
        for (name, address) in machines.names.iter().zip(ADDRESSES).skip(1) {
            let port = format!("to{}", &address[8..]);
            machines.ip(&[
                "-n", hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns",
                name,
            ]);
            machines.ip(&["-n", hub, "link", "set", &port, "master", "br0", "up"]);
            machines.ip(&[
                "-n",
                name,
                "addr",
                "add",
                &format!("{address}/24"),
                "dev",
                "eth0",
            ]);
            machines.ip(&["-n", name, "link", "set", "eth0", "up"]);
        }
        machines
    }

    fn machine(&self, number: usize) -> PathBuf {
        self.dir.path().join(number.to_string())
    }

    /// Its /etc, and the project.
    fn files(&self, number: usize) {
        let machine = self.machine(number);
        std::fs::create_dir_all(machine.join("project")).unwrap();
        let copy = Command::new("cp")
            .args(["-a", "/etc"])
            .arg(&machine)
            .status();
        assert!(copy.unwrap().success());
        let deploy = Command::new("cp")
            .arg("-r")
            .arg(root().join("deploy"))
            .arg(machine.join("project"))
            .status();
        assert!(deploy.unwrap().success());
        let hosts = machine.join("etc/hosts");
        let known = std::fs::read_to_string(&hosts).unwrap_or_default();
        // It may be a mount of its own, which is not copied over.
        let _ = std::fs::remove_file(&hosts);
        std::fs::write(&hosts, format!("{known}\n10.77.0.1 lab1\n")).unwrap();
    }

    fn ip(&self, args: &[&str]) {
        let output = Command::new("ip").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "ip {args:?}: {said}");
    }

    fn bash(&self, number: usize, script: &str) -> Output {
        Command::new("ip")
            .args([
                "netns",
                "exec",
                &self.names[number],
                "unshare",
                "--mount",
                "bash",
                "-c",
            ])
            .arg(format!("{PRELUDE}{script}"))
            .env("MACHINE", self.machine(number))
            .env("BATCHAI_PROGRAM", under_test())
            .env_remove("BATCHAI_JOB_USER")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn run(&self, number: usize, commands: &[String]) -> String {
        let output = self.bash(number, &commands.join("\n"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (printed, said) = (text(&output.stdout), text(&output.stderr));
        if !output.status.success() {
            let logs = ["batchai.log", "root.log"]
                .map(|log| std::fs::read_to_string(self.machine(number).join(log)));
            panic!("{commands:?}\n{printed}\n{said}\n{logs:?}");
        }
        printed
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        sweep(self.dir.path());
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
        if !std::thread::panicking() {
            let left = processes_of(self.dir.path());
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

#[test]
fn your_machines_works_as_it_stands() {
    if !nix::unistd::geteuid().is_root() {
        return requirement::skip("only root makes network namespaces");
    }
    for program in ["ip", "unshare", "setpriv", "useradd"] {
        if requirement::program(program, "iproute2, util-linux and passwd have it").is_none() {
            return;
        }
    }
    let machines = Machines::new();
    let (coordinator, _) = commands("lab1");
    // What is asked for right after the start waits for it here, as a person would.
    let at = coordinator
        .iter()
        .position(|command| command.contains("systemctl"))
        .unwrap()
        + 1;
    machines.run(0, &coordinator[..at]);
    until("the coordinator to listen", || {
        let listens = "exec 3<>/dev/tcp/10.77.0.1/7070";
        machines.bash(0, listens).status.success().then_some(())
    });
    machines.run(0, &coordinator[at..]);
    let token = machines.machine(0).join("project/join-token");
    for number in [1, 2] {
        std::fs::copy(&token, machines.machine(number).join("project/join-token")).unwrap();
        let (node, _) = commands("node");
        // Namespaces of one machine have one name.
        let name = format!(
            "sed -i 's/--coordinator/--name node{number} --coordinator/' /etc/systemd/system/batchai-node-agent.service"
        );
        let at = node.len() - 1;
        let node = [&node[..at], &[name], &node[at..]].concat();
        machines.run(number, &node);
    }
    until("the nodes to be in contact", || {
        let list = machines.bash(0, "batchai node list -o tsv");
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        (list.matches("available").count() == 2).then_some(())
    });
    let (job, printed) = commands("job");
    let said = machines.run(0, &job);
    let last: Vec<_> = said.lines().rev().take(printed.len()).collect();
    let last: Vec<_> = last.into_iter().rev().map(str::to_owned).collect();
    assert_eq!(last, printed, "{said}");
    // They are where they say they are.
    let list = machines.run(0, &["batchai node list -o tsv".to_owned()]);
    for address in &ADDRESSES[1..] {
        assert!(list.contains(address), "{list}");
    }
}

#[test]
fn the_units_are_well_formed() {
    if requirement::program("systemd-analyze", "systemd has it").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for unit in ["batchai-coordinator.service", "batchai-node-agent.service"] {
        let text = std::fs::read_to_string(root().join("deploy").join(unit)).unwrap();
        // The program is not installed here.
        let program = under_test().to_string_lossy().into_owned();
        let text = text.replace("/usr/local/bin/batchai", &program);
        let path = dir.path().join(unit);
        std::fs::write(&path, text).unwrap();
        let verify = Command::new("systemd-analyze")
            .arg("verify")
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&verify.stderr).into_owned();
        assert!(verify.status.success() && !said.contains(unit), "{said}");
    }
}
