//! Machines that are network namespaces, and a network between them that breaks.

use std::path::Path;
use std::process::Command;

use crate::replicas::Replicas;
use crate::requirement;

/// A bridge and machines at it, numbered from 1 on. It goes with the test.
pub struct Network {
    hub: String,
    names: Vec<String>,
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {args:?}: {said}");
}

fn address(id: u64) -> String {
    format!("10.78.0.{id}")
}

impl Network {
    /// None where it cannot be: then the test was told so.
    pub fn new(test: &str, machines: u64) -> Option<Network> {
        if !nix::unistd::geteuid().is_root() {
            requirement::skip("only root makes network namespaces");
            return None;
        }
        requirement::program("ip", "iproute2 has it")?;
        requirement::program("nsenter", "util-linux has it")?;
        let name = |part: String| format!("batchai-{}-{test}-{part}", std::process::id());
        let network = Network {
            hub: name("hub".to_owned()),
            names: (1..=machines).map(|id| name(id.to_string())).collect(),
        };
        ip(&["netns", "add", &network.hub]);
        let hub = ["-n", &network.hub];
        let at_hub = |args: &[&str]| ip(&[&hub[..], args].concat());
        at_hub(&["link", "add", "br0", "type", "bridge"]);
        at_hub(&["link", "set", "br0", "up"]);
        for (id, name) in (1..).zip(&network.names) {
            ip(&["netns", "add", name]);
            let port = format!("to{id}");
            let peer = ["type", "veth", "peer", "name", "eth0", "netns", name];
            at_hub(&[&["link", "add", &port][..], &peer].concat());
            at_hub(&["link", "set", &port, "master", "br0", "up"]);
            let at = format!("{}/24", address(id));
            ip(&["-n", name, "addr", "add", &at, "dev", "eth0"]);
            ip(&["-n", name, "link", "set", "eth0", "up"]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        Some(network)
    }

    /// By what something is started on a machine.
    pub fn on(&self, id: u64) -> Vec<String> {
        let into = format!("--net=/run/netns/{}", self.names[id as usize - 1]);
        vec!["nsenter".to_owned(), into]
    }

    /// Makes a line of the bridge for a machine that is no namespace; returns by what QEMU is started for it, and the line's name.
    pub fn tap(&self) -> (Vec<String>, &'static str) {
        const TAP: &str = "tap0";
        let of = ["-n", &self.hub];
        ip(&[&of[..], &["tuntap", "add", TAP, "mode", "tap"]].concat());
        ip(&[&of[..], &["link", "set", TAP, "master", "br0", "up"]].concat());
        let into = format!("--net=/run/netns/{}", self.hub);
        (vec!["nsenter".to_owned(), into], TAP)
    }

    /// The same, as a machine that has a name of its own.
    pub fn on_named(&self, id: u64, name: &str) -> Vec<String> {
        let script = "hostname \"$0\" && exec \"$@\"";
        let named = ["unshare", "-u", "sh", "-c", script, name];
        let mut words = self.on(id);
        words.extend(named.map(str::to_owned));
        words
    }

    /// The same, where names lead to what this file of hosts says. What is mounted there is seen there only.
    pub fn on_named_by(&self, id: u64, name: &str, hosts: &Path) -> Vec<String> {
        let script = "mount --bind \"$1\" /etc/hosts && shift && hostname \"$0\" && exec \"$@\"";
        let named = ["unshare", "-um", "sh", "-c", script, name];
        let mut words = self.on(id);
        words.extend(named.map(str::to_owned));
        words.push(hosts.display().to_string());
        words
    }

    /// Three replicas, on the first three machines.
    pub fn replicas(&self, args: &[&str]) -> Replicas {
        let place = |id| (format!("https://{}:7070", address(id)), self.on(id));
        Replicas::start_at((1..=3).map(place).collect(), args)
    }

    /// One replica, on this machine.
    pub fn replica(&self, id: u64) -> Replicas {
        let place = (format!("https://{}:7070", address(id)), self.on(id));
        Replicas::start_at(vec![place], &[])
    }

    /// Plugs a machine out of the bridge, or in again.
    pub fn plug(&self, id: u64, state: &str) {
        ip(&["-n", &self.hub, "link", "set", &format!("to{id}"), state]);
    }

    /// Cuts a machine off without its noticing, as a switch that fails does: the line stays up. Or puts it back.
    pub fn lose(&self, id: u64, lost: bool) {
        let port = format!("to{id}");
        let of = ["-n", &self.hub, "link", "set", &port];
        match lost {
            true => ip(&[&of[..], &["nomaster"]].concat()),
            false => ip(&[&of[..], &["master", "br0"]].concat()),
        }
    }

    /// Has what a machine sends to the others go nowhere; it still hears them.
    pub fn mute(&self, id: u64, muted: bool) {
        for other in (1..=self.names.len() as u64).filter(|other| *other != id) {
            let to = address(other);
            let of = ["-n", &self.names[id as usize - 1], "neigh"];
            let nowhere = [
                "lladdr",
                "02:00:00:00:00:99",
                "dev",
                "eth0",
                "nud",
                "permanent",
            ];
            match muted {
                true => ip(&[&of[..], &["replace", &to], &nowhere].concat()),
                false => ip(&[&of[..], &["del", &to, "dev", "eth0"]].concat()),
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in self.names.iter().chain([&self.hub]) {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}
