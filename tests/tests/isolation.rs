//! A job dies whole, whatever its processes do: by every way that an agent has to end them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use batchai_common::limits::TERMINATION_GRACE;
use batchai_tests::ensemble::{Ensemble, IN, agent_args};
use batchai_tests::process::{Process, processes_of, until};
use batchai_tests::requirement;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Ignores SIGTERM, leaves daemons behind in sessions of their own, and a chain whose links each live some milliseconds.
const TREE: &str = r#"
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()
if os.fork() == 0:
    while True:
        if os.fork():
            os._exit(0)
        os.setsid()
        time.sleep(0.005)
print("up", flush=True)
time.sleep(600)
"#;

/// An ensemble with one agent that has this way only. `None` where this machine does not have it.
fn start(method: &str) -> Option<(Ensemble, PathBuf)> {
    let python = requirement::program("python3", "install it")?;
    let mut e = Ensemble::start(0);
    start_agent(&mut e, method);
    e.until_alive(1);
    let shown = e.json(&["node", "show", "-n", "a1"]);
    if shown["facts"]["isolation"] != method {
        requirement::skip(&format!("{method} is not to be had: {}", shown["facts"]));
        return None;
    }
    e.create_cluster(1);
    fs::write(e.path().join("tree.py"), TREE).unwrap();
    Some((e, python))
}

fn start_agent(e: &mut Ensemble, method: &str) {
    let mut args = agent_args(e.path(), &e.endpoint, "a1", "self");
    args.extend(["--isolation".to_owned(), method.to_owned()]);
    let log = e.path().join("a1.log");
    let agent = Process::start_with(args, &e.join_token(), &log);
    e.agents.insert("a1".to_owned(), agent);
}

fn tree(dir: &Path) -> Vec<i32> {
    let all = processes_of(dir).into_iter();
    let own = all.filter(|(_, command)| command.contains("python3") && command.contains("tree.py"));
    own.map(|(pid, _)| pid).collect()
}

fn until_no_groups(e: &Ensemble) {
    until("the groups to be removed", || {
        let left = e.groups().iter().any(|home| home.path.exists());
        (!left).then_some(())
    });
}

fn dies_with_the_job(method: &str) {
    let Some((e, python)) = start(method) else {
        return;
    };
    let script = e.path().join("tree.py");
    // Without the environment it carries no tag.
    let command = format!("exec env -i {} {}", python.display(), script.display());
    e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command } }),
    );
    until("the tree to be up", || {
        (tree(e.path()).len() >= 4).then_some(())
    });
    let begun = Instant::now();
    e.ok(&[&["job", "terminate", "-n", "j", "--yes"][..], &IN].concat());
    until("the tree to be gone", || {
        tree(e.path()).is_empty().then_some(())
    });
    let took = begun.elapsed();
    let most = TERMINATION_GRACE + std::time::Duration::from_secs(2);
    assert!(took < most, "{took:?}");
    e.until_job("j", "FAILED");
    until_no_groups(&e);
    assert_eq!(tree(e.path()), [0; 0]);
}

fn dies_without_its_shim(method: &str, environment: &str) {
    let Some((mut e, python)) = start(method) else {
        return;
    };
    let (script, mark) = (e.path().join("tree.py"), e.path().join("mark"));
    // The attempt that follows ends at once.
    let command = format!(
        "[ -e {0} ] && exit 0; touch {0}; exec {environment} {1} {2}",
        mark.display(),
        python.display(),
        script.display()
    );
    e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command } }),
    );
    until("the tree to be up", || {
        (tree(e.path()).len() >= 4).then_some(())
    });
    e.agents.get_mut("a1").unwrap().kill();
    let shims = processes_of(&e.path().join("agents/a1")).into_iter();
    for (pid, _) in shims.filter(|(_, command)| command.contains(" shim ")) {
        // Its helper ends with it.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    start_agent(&mut e, method);
    until("the tree to be gone", || {
        tree(e.path()).is_empty().then_some(())
    });
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.job("j")["attempt"]["number"], 2);
    until_no_groups(&e);
}

#[test]
fn a_tree_dies_by_cgroup_kill() {
    dies_with_the_job("cgroup-kill");
}

#[test]
fn a_tree_dies_by_the_freezer() {
    dies_with_the_job("cgroup-freezer");
}

#[test]
fn a_tree_dies_where_there_are_no_groups() {
    dies_with_the_job("process-tree");
}

#[test]
fn what_a_shim_leaves_dies_by_cgroup_kill() {
    dies_without_its_shim("cgroup-kill", "env -i");
}

#[test]
fn what_a_shim_leaves_dies_by_the_freezer() {
    dies_without_its_shim("cgroup-freezer", "env -i");
}

#[test]
fn what_a_shim_leaves_dies_where_there_are_no_groups() {
    dies_without_its_shim("process-tree", "");
}

#[test]
fn an_agent_that_may_make_no_groups_says_so() {
    if !nix::unistd::geteuid().is_root() {
        return requirement::skip("only root starts an agent as somebody else");
    }
    let Some(setpriv) = requirement::program("setpriv", "install util-linux") else {
        return;
    };
    let mut e = Ensemble::start(0);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(e.path(), open).unwrap();
    for dir in ["agents", "nodes", "out"] {
        let dir = e.path().join(dir);
        fs::create_dir(&dir).unwrap();
        std::os::unix::fs::chown(&dir, Some(54_321), Some(54_321)).unwrap();
    }
    let prefix = [
        &setpriv.to_string_lossy(),
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        "--",
    ];
    let args = agent_args(e.path(), &e.endpoint, "a1", "self");
    let log = e.path().join("a1.log");
    let agent = Process::start_by(&prefix.map(str::to_owned), args, &e.join_token(), &log);
    e.agents.insert("a1".to_owned(), agent);
    e.until_alive(1);
    let shown = e.json(&["node", "show", "-n", "a1"]);
    assert_eq!(shown["facts"]["isolation"], "process-tree");
    e.create_cluster(1);
    let command = json!({ "commandLine": "(setsid sleep 600 &); id -u" });
    e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": command }),
    );
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.log("j", "stdout.txt"), "54321\n");
}

#[test]
fn what_spares_an_agent_when_memory_is_short_does_not_spare_its_jobs() {
    let e = Ensemble::with_cluster(1);
    // Upwards anybody may; what counts is that the job has another one.
    let agent = e.agents["a1"].pid();
    fs::write(format!("/proc/{agent}/oom_score_adj"), "500").unwrap();
    let command = json!({ "commandLine": "cat /proc/self/oom_score_adj" });
    e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": command }),
    );
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    assert_eq!(e.log("j", "stdout.txt"), "0\n");
}

/// A group of cgroup v1 whose processes SIGKILL does not end: they are frozen.
struct Frozen(PathBuf);

impl Frozen {
    fn new(pid: i32) -> Option<Frozen> {
        let name = format!("batchai-test-{}", std::process::id());
        let group = Path::new("/sys/fs/cgroup/freezer").join(name);
        fs::create_dir(&group).ok()?;
        let group = Frozen(group);
        fs::write(group.0.join("cgroup.procs"), pid.to_string()).ok()?;
        fs::write(group.0.join("freezer.state"), "FROZEN").ok()?;
        Some(group)
    }

    fn thaw(&self) {
        fs::write(self.0.join("freezer.state"), "THAWED").unwrap();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begun.elapsed().as_secs() < 5 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn what_does_not_die_is_named_by_its_node_which_gets_nothing_else_until_it_has() {
    let Some((e, _)) = start("cgroup-kill") else {
        return;
    };
    let run = |name: &str, command: &str| {
        let settings = json!({ "commandLine": command });
        e.submit(
            name,
            json!({ "nodeCount": 1, "customToolkitSettings": settings }),
        );
    };
    run("stuck", "exec sleep 601");
    let pid = until("the process to run", || {
        let all = processes_of(e.path());
        all.into_iter()
            .find(|(_, line)| line.starts_with("sleep 601"))
    });
    let Some(frozen) = Frozen::new(pid.0) else {
        requirement::skip("nothing can be frozen here by cgroup v1");
        return;
    };
    e.ok(&[
        &["job", "terminate", "-n", "stuck", "--yes", "--no-wait"][..],
        &IN,
    ]
    .concat());
    run("next", "true");
    let node = || e.json(&["node", "show", "-n", "a1"]);
    let error = until("the node to say what does not die", || {
        node()["errors"].get(0).cloned()
    });
    assert_eq!(error["code"], "ProcessesDoNotDie", "{error:#}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(&pid.0.to_string()), "{message}");
    let shown = node();
    assert_eq!(shown["state"], "UNUSABLE", "{shown:#}");
    assert_eq!(e.job("stuck")["state"], "TERMINATING");
    assert_eq!(e.job("next")["state"], "QUEUED");
    frozen.thaw();
    let stuck = e.until_job("stuck", "FAILED");
    // What could not be ended for a while is not why the job did not go on.
    assert_eq!(stuck["errors"][0]["code"], "JobTerminated", "{stuck:#}");
    e.until_job("next", "SUCCEEDED");
    assert_eq!(node().get("errors"), None);
}
