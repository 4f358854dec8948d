//! What shares file servers: which back end a new one gets, and that it stays with that, whatever dies and whatever is installed. That of
//! these tests is NFS-Ganesha; who mounts from it is in `kernel_nfs`.

use std::path::PathBuf;

use batchai_tests::ensemble::{SIZE, create_file_server};
use batchai_tests::ganesha;
use batchai_tests::network::Network;
use batchai_tests::process::{processes_of, until};
use batchai_tests::replicas::Replicas;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// The machine of the node that serves. At loopback it would be another back end.
const STORE: u64 = 2;
const AT: [&str; 4] = ["-g", "g", "-w", "w"];

struct World {
    e: Replicas,
    network: Network,
}

impl World {
    /// None where it cannot be: then the test was told so.
    fn start() -> Option<World> {
        ganesha::installed()?;
        let network = Network::new("backends", STORE)?;
        let e = network.replica(1);
        std::fs::create_dir(e.path().join("storage")).unwrap();
        let mut world = World { e, network };
        world.start_store(&std::env::var("PATH").unwrap());
        until("the node to be in contact", || {
            let nodes = world.json(&["node", "list"]);
            (nodes.as_array()?.len() == 1).then_some(())
        });
        world.e.ok(&["group", "create", "-n", "g"]);
        world.e.ok(&["workspace", "create", "-g", "g", "-n", "w"]);
        Some(world)
    }

    fn start_store(&mut self, path: &str) {
        let storage = self.e.path().join("storage");
        let mut by = self.network.on_named(STORE, "store");
        by.push("env".to_owned());
        by.push(format!("PATH={path}"));
        by.push(format!("BATCHAI_STORAGE_ROOT={}", storage.display()));
        let all = self.e.list();
        self.e.start_agent_by(&by, "store", &all);
    }

    /// The agent ends, and another one finds something else installed. What it serves runs on meanwhile.
    fn restart_store(&mut self, path: &str) {
        let before = self.processes("");
        let mut agent = self.e.agents.remove("store").unwrap();
        agent.signal(Signal::SIGTERM);
        agent.wait();
        assert_eq!(self.processes(""), before);
        self.start_store(path);
    }

    fn json(&self, args: &[&str]) -> Value {
        self.e.json_at(&self.e.list(), args)
    }

    fn create(&self, name: &str) -> Value {
        self.json(&create_file_server(name, SIZE))
    }

    fn show(&self, name: &str) -> Value {
        self.json(&[&["file-server", "show", "-n", name][..], &AT].concat())
    }

    fn until_it_is(&self, name: &str, state: &str) -> Value {
        until("the file server to be so", || {
            let shown = self.show(name);
            (shown["provisioningState"] == state).then_some(shown)
        })
    }

    /// Those that serve, by a part of their command line.
    fn processes(&self, part: &str) -> Vec<i32> {
        let all = processes_of(&self.e.path().join("agents/store/file-servers"));
        let found = all.into_iter().filter(|(_, line)| line.contains(part));
        found.map(|(pid, _)| pid).collect()
    }

    /// Cuts one down, and waits until both it and the other one of its kind are new.
    fn cut(&self, part: &str) {
        let before = self.processes("");
        for pid in self.processes(part) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        until("it to be served anew", || {
            let now = self.processes("");
            let new = now.len() == before.len() && !now.iter().any(|pid| before.contains(pid));
            new.then_some(())
        });
    }

    /// Cuts it down for good: it says why.
    fn cut_and_fail(&self, why: &str) {
        for pid in self.processes("ganesha.nfsd") {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        until("it to say why", || {
            let shown = self.show("data");
            let error = &shown["errors"][0];
            let said = error["message"].as_str()?.contains(why);
            let so = shown["provisioningState"] == "FAILED";
            (said && so && error["code"] == "FileServerNotServed").then_some(())
        });
    }
}

#[test]
fn a_file_server_stays_with_its_backend_whatever_dies_and_is_installed() {
    let Some(mut w) = World::start() else {
        return;
    };
    let with = std::env::var("PATH").unwrap();
    let without = ganesha::hidden(w.e.path());
    let shown = w.create("data");
    assert_eq!(shown["provisioningState"], "SUCCEEDED", "{shown}");
    assert_eq!(shown["backend"], "ganesha", "{shown}");
    let place = shown["mountSettings"].clone();
    let data: PathBuf = place["mountPoint"].as_str().unwrap().into();
    assert_eq!(w.processes("").len(), 2, "it and what looks after it");
    for part in ["ganesha.nfsd", "nfs-server"] {
        w.cut(part);
        let shown = w.until_it_is("data", "SUCCEEDED");
        assert_eq!(shown["mountSettings"], place);
    }

    // It goes with what was installed: what runs runs on; then it is said what is missing.
    w.restart_store(&without);
    assert_eq!(w.create("fresh")["backend"], "embedded");
    w.cut_and_fail("shared by ganesha, which is not there any more");

    // It is back with that, and the other one stays what it is.
    w.restart_store(&with);
    let shown = w.until_it_is("data", "SUCCEEDED");
    assert_eq!(shown["backend"], "ganesha", "{shown}");
    assert_eq!(shown["mountSettings"], place);
    assert_eq!(w.show("fresh")["backend"], "embedded");

    // What cannot be shared is said.
    let aside = data.with_extension("aside");
    std::fs::rename(&data, &aside).unwrap();
    std::fs::write(&data, "").unwrap();
    w.cut_and_fail("Not a directory");
    std::fs::remove_file(&data).unwrap();
    std::fs::rename(&aside, &data).unwrap();
    w.until_it_is("data", "SUCCEEDED");

    for name in ["data", "fresh"] {
        let delete = ["file-server", "delete", "-n", name, "-y", "--purge"];
        w.e.ok(&[&delete[..], &AT].concat());
    }
    until("them to be gone", || {
        w.processes("").is_empty().then_some(())
    });
    assert!(!data.exists());
}
