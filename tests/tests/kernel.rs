//! The agent on machines of another kernel: one that has control groups of version 2 only, with all controllers, and one that has
//! none. A real coordinator runs here, and the agent in the guest joins it.

use std::time::Duration;

use batchai_common::limits::TERMINATION_GRACE;
use batchai_tests::alone::directory;
use batchai_tests::ensemble::{Ensemble, IN, agent_args};
use batchai_tests::guest::{Guest, image};
use batchai_tests::process::until;
use serde_json::{Value, json};

/// How command lines begin.
const AGENT: &str = "batchai-node-agent --coord";
const SHIM: &str = "batchai-shim ";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Host {
    V2,
    /// The same; the agent sees nothing but the group that it is in itself, as in a container.
    Inside,
    NoGroups,
}

impl Host {
    /// As systemd makes them; returns the one in which the agent begins.
    fn make_groups(self, guest: &mut Guest) -> &'static str {
        let (all, seen) = ("/run/all", "/sys/fs/cgroup");
        let at = match self {
            Host::V2 => seen,
            Host::Inside => all,
            Host::NoGroups => return "",
        };
        guest.ok(&format!("mkdir -p {at}; mount -t cgroup2 none {at}"));
        guest.ok(&format!("mkdir -p {at}/system.slice/agent.service"));
        for group in [at.to_owned(), format!("{at}/system.slice")] {
            guest.ok(&format!(
                "echo +memory +pids >{group}/cgroup.subtree_control"
            ));
        }
        match self {
            Host::Inside => {
                guest.ok(&format!(
                    "mount --bind {all}/system.slice/agent.service {seen}"
                ));
                guest.ok(&format!("umount {all}"));
                seen
            }
            _ => "/sys/fs/cgroup/system.slice/agent.service",
        }
    }
}

/// A coordinator, and a guest that is its node `a1`, with a cluster of that.
struct World {
    guest: Guest,
    e: Ensemble,
    host: Host,
    /// What runs in the guest while no job does.
    idle: Vec<String>,
}

fn start(host: Host, user: &str) -> Option<World> {
    let image = image()?;
    let e = Ensemble::start(0);
    let mut guest = Guest::boot(image, e.path());
    let group = host.make_groups(&mut guest);
    let [(name, token)] = e.join_token();
    let args = agent_args("/batchai".as_ref(), &Guest::url(&e.endpoint), "a1", user);
    let args = args[1..].join(" ");
    guest.ok(&format!(
        "export {name}={token} AGENT_GROUP={group}; setsid /sbin/agent {args} &"
    ));
    e.until_alive(1);
    e.create_cluster(1);
    let idle = commands(&mut guest);
    Some(World {
        guest,
        e,
        host,
        idle,
    })
}

fn commands(guest: &mut Guest) -> Vec<String> {
    let mut commands: Vec<_> = guest
        .processes()
        .into_iter()
        .map(|(_, args)| args)
        .collect();
    commands.sort();
    commands
}

fn job(command_line: &str) -> Value {
    limited(command_line, json!({}))
}

fn limited(command_line: &str, limits: Value) -> Value {
    json!({
        "nodeCount": 1,
        "stdOutErrPathPrefix": "/out",
        "resourceLimits": limits,
        "customToolkitSettings": { "commandLine": command_line },
    })
}

/// What a job does, by the program that is there.
fn does(what: &str) -> String {
    format!("batchai-node-agent do-{what}")
}

fn value_of<'a>(error: &'a Value, name: &str) -> Option<&'a str> {
    let details = error["details"].as_array()?;
    let found = details.iter().find(|detail| detail["name"] == name)?;
    found["value"].as_str()
}

impl World {
    fn facts(&self) -> Value {
        self.e.json(&["node", "show", "-n", "a1"])["facts"].clone()
    }

    /// Nothing of jobs is left: no process, also none that nobody waited for, and no group.
    fn until_idle(&mut self) {
        let idle = self.idle.clone();
        let guest = &mut self.guest;
        until("what ran for jobs to be gone", || {
            let now = commands(guest);
            // One that goes while it is looked at fails the search.
            let (groups, code) = guest.run("find /sys/fs/cgroup -name 'batchai-*'");
            if now == idle && groups.is_empty() && code == 0 {
                return Some(());
            }
            std::thread::sleep(Duration::from_millis(100));
            None
        });
    }

    /// How many of the tree there are.
    fn tree(&mut self) -> usize {
        let all = self.guest.processes().into_iter();
        all.filter(|(_, args)| *args == does("tree")).count()
    }

    /// Whether something is started all the time. Who lists processes may miss each of those.
    fn is_forking(&mut self) -> bool {
        let last = "cut -d' ' -f5 /proc/loadavg";
        let said = self.guest.ok(&format!("{last}; usleep 200000; {last}"));
        let pids: Vec<i32> = said.lines().map(|line| line.parse().unwrap()).collect();
        // The question itself takes two.
        pids[1] - pids[0] > 6
    }

    /// A job whose tree is up.
    fn plant(&mut self, name: &str, command_line: &str) {
        self.e.submit(name, job(command_line));
        until("the tree to be up", || {
            std::thread::sleep(Duration::from_millis(100));
            (self.tree() >= 4 && self.is_forking()).then_some(())
        });
    }

    fn until_no_tree(&mut self) {
        until("the tree to be gone", || {
            (self.tree() == 0 && !self.is_forking()).then_some(())
        });
    }

    /// Cuts down at once whatever has a command line that begins so.
    fn kill(&mut self, begins: &[&str]) {
        let guest = &mut self.guest;
        let pids = until(&format!("{begins:?} to run"), || {
            let all = guest.processes();
            let is = |begin: &&str, args: &str| args.starts_with(begin);
            let all_run = begins
                .iter()
                .all(|begin| all.iter().any(|(_, args)| is(begin, args)));
            let pids = all
                .iter()
                .filter(|(_, args)| begins.iter().any(|begin| is(begin, args)));
            let pids: Vec<_> = pids.map(|(pid, _)| pid.to_string()).collect();
            all_run.then_some(pids)
        });
        guest.ok(&format!("kill -9 {}", pids.join(" ")));
    }
}

fn runs_jobs(host: Host, user: &str) {
    let Some(mut w) = start(host, user) else {
        return;
    };
    let facts = w.facts();
    match host {
        Host::V2 => {
            assert_eq!(facts["isolation"], "cgroup-kill", "{facts:#}");
            let limits = json!(["cpu", "memory", "pids"]);
            assert_eq!(facts["enforcedLimits"], limits, "{facts:#}");
        }
        Host::Inside => {
            assert_eq!(facts["isolation"], "cgroup-kill", "{facts:#}");
            assert_eq!(facts.get("enforcedLimits"), None, "{facts:#}");
        }
        Host::NoGroups => {
            assert_eq!(facts["isolation"], "process-tree", "{facts:#}");
            assert_eq!(facts.get("enforcedLimits"), None, "{facts:#}");
        }
    }
    w.e.submit("j", job("id -u; seq 20000; echo last >&2; exit 7"));
    assert_eq!(w.e.wait("j"), 7, "{}", w.e.job("j"));
    assert_eq!(w.e.job("j")["exitCode"], 7);
    let numbers: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    let uid = if user == "self" { "0" } else { "1000" };
    assert!(w.e.log("j", "stdout.txt") == format!("{uid}\n{numbers}"));
    assert_eq!(w.e.log("j", "stderr.txt"), "last\n");
    w.until_idle();
}

fn a_tree_dies(host: Host) {
    let Some(mut w) = start(host, "self") else {
        return;
    };
    // Without the environment it carries no tag.
    w.plant("j", &format!("exec env -i PATH=/bin {}", does("tree")));
    let terminate = ["job", "terminate", "-n", "j", "--yes", "--no-wait"];
    w.e.ok(&[&terminate[..], &IN].concat());
    w.until_no_tree();
    let shown = w.e.until_job("j", "FAILED");
    assert_eq!(shown["errors"][0]["code"], "JobTerminated", "{shown:#}");
    // By the guest's clock: it is so slow that to ask it takes a part of what is measured.
    let log = w.e.log("j", "execution.log");
    let at = |what: &str| {
        let line = log.lines().rev().find_map(|line| line.split_once(what));
        let (at, _) = line.unwrap_or_else(|| panic!("no {what}: {log}"));
        let at = at.parse::<prost_types::Timestamp>().unwrap();
        Duration::new(at.seconds as u64, at.nanos as u32)
    };
    let took = at(" ended") - at(" ending: ");
    eprintln!("ended after {took:?}");
    let most = TERMINATION_GRACE + Duration::from_secs(2);
    assert!(took < most, "{took:?}: {log}");
    w.until_idle();
}

fn an_agent_that_is_cut_down_takes_its_job_over_again(host: Host) {
    let Some(mut w) = start(host, "self") else {
        return;
    };
    let counts = "echo x >>/out/began; for i in $(seq 100); do echo $i; usleep 40000; done; exit 9";
    w.e.submit("j", job(counts));
    until("the job to run", || {
        (w.guest.run("cat /out/began").0 == "x\n").then_some(())
    });
    for _ in 0..2 {
        w.kill(&[AGENT]);
        w.e.until_alive(1);
    }
    assert_eq!(w.e.wait("j"), 9, "{}", w.e.job("j"));
    let shown = w.e.job("j");
    assert_eq!(shown["attempt"]["number"], 1, "{shown:#}");
    assert_eq!(w.guest.ok("cat /out/began"), "x\n");
    let numbers: String = (1..=100).map(|number| format!("{number}\n")).collect();
    assert_eq!(w.e.log("j", "stdout.txt"), numbers);
    w.until_idle();
    // And what a shim leaves that is cut down together with its agent.
    let again = "[ -e /out/mark ] && exit 0; touch /out/mark; exec";
    let tagged = if w.host == Host::V2 {
        "env -i PATH=/bin"
    } else {
        "env"
    };
    w.plant("lost", &format!("{again} {tagged} {}", does("tree")));
    w.kill(&[AGENT, SHIM]);
    w.until_no_tree();
    assert_eq!(w.e.wait("lost"), 0, "{}", w.e.job("lost"));
    assert_eq!(w.e.job("lost")["attempt"]["number"], 2);
    w.until_idle();
}

#[test]
fn a_host_of_version_2_says_what_it_has_and_runs_jobs() {
    runs_jobs(Host::V2, "job");
}

#[test]
fn an_agent_that_sees_no_group_but_its_own_runs_jobs() {
    runs_jobs(Host::Inside, "job");
}

#[test]
fn a_host_without_groups_says_so_and_runs_jobs() {
    runs_jobs(Host::NoGroups, "job");
}

#[test]
fn a_tree_dies_by_a_group_of_version_2() {
    a_tree_dies(Host::V2);
}

#[test]
fn a_tree_dies_on_a_host_without_groups() {
    a_tree_dies(Host::NoGroups);
}

#[test]
fn jobs_of_a_host_of_version_2_outlive_its_agent() {
    an_agent_that_is_cut_down_takes_its_job_over_again(Host::V2);
}

#[test]
fn jobs_of_a_host_without_groups_outlive_its_agent() {
    an_agent_that_is_cut_down_takes_its_job_over_again(Host::NoGroups);
}

#[test]
fn a_host_of_version_2_enforces_what_jobs_may_take() {
    let Some(mut w) = start(Host::V2, "job") else {
        return;
    };
    for (name, command) in [
        ("itself", format!("exec {}", does("eat 200"))),
        ("its-child", format!("{}; exit 3", does("eat 200"))),
    ] {
        w.e.submit(name, limited(&command, json!({ "memoryMib": 64 })));
        let shown = w.e.until_job(name, "FAILED");
        let error = &shown["errors"][0];
        assert_eq!(error["code"], "JobOutOfMemory", "{shown:#}");
        // The whole group is ended: nobody is left who would say 3.
        assert_eq!(shown["exitCode"], 137, "{shown:#}");
        assert_eq!(value_of(error, "limitMib"), Some("64"), "{shown:#}");
        assert_eq!(value_of(error, "rank"), Some("0"), "{shown:#}");
    }
    let enough = limited(
        &format!("exec {}", does("eat 40")),
        json!({ "memoryMib": 64 }),
    );
    w.e.submit("enough", enough);
    assert_eq!(w.e.wait("enough"), 0, "{}", w.e.job("enough"));

    let forks = limited(&format!("exec {}", does("fork 100")), json!({ "pids": 20 }));
    w.e.submit("forks", forks);
    assert_eq!(w.e.wait("forks"), 0, "{}", w.e.job("forks"));
    assert_eq!(w.e.log("forks", "stdout.txt"), "19\n");

    let own = "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)";
    let spins = format!(
        "{0} & {0}; wait; cat {own}/cpu.max {own}/cpu.stat",
        does("spin 2")
    );
    w.e.submit("spins", limited(&spins, json!({ "cpus": 0.25 })));
    assert_eq!(w.e.wait("spins"), 0, "{}", w.e.job("spins"));
    let said = w.e.log("spins", "stdout.txt");
    assert!(said.starts_with("25000 100000\n"), "{said}");
    let number = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        let number = line.map(|number| number.trim().parse::<u64>());
        number.unwrap_or_else(|| panic!("{name}: {said}")).unwrap()
    };
    assert!(number("nr_throttled ") > 5, "{said}");
    // A quarter of what passes, which is more than the two seconds; without the limit all of it.
    assert!(number("usage_usec ") < 1_500_000, "{said}");

    // A command beside a job shares its limits, and ends with it.
    w.e.submit("long", job("exec sleep 600"));
    let shown = until("the job to run", || {
        let shown = w.e.job("long");
        (shown["attempt"]["nodes"][0]["phase"] == "RUNNING").then_some(shown)
    });
    let beside = ["job", "node", "exec", "-j", "long", "--node", "a1"];
    let command = ["--", "cat", "/proc/self/cgroup"];
    let said = w.e.ok(&[&beside[..], &IN, &command].concat());
    let attempt = shown["attempt"]["id"].as_str().unwrap();
    assert!(
        said.contains(&format!("/{attempt}/exec-")),
        "{said}: {shown:#}"
    );
    let terminate = ["job", "terminate", "-n", "long", "--yes", "--no-wait"];
    w.e.ok(&[&terminate[..], &IN].concat());
    w.until_idle();
}

#[test]
fn a_host_without_groups_refuses_what_it_cannot_enforce() {
    let Some(mut w) = start(Host::NoGroups, "job") else {
        return;
    };
    for (what, limits) in [
        ("cpu", json!({ "cpus": 1 })),
        ("memory", json!({ "memoryMib": 100 })),
        ("pids", json!({ "pids": 100 })),
    ] {
        w.e.submit(what, limited("true", limits));
        let shown = w.e.until_job(what, "FAILED");
        let error = &shown["errors"][0];
        assert_eq!(error["code"], "JobStartRefused", "{shown:#}");
        let message = error["message"].as_str().unwrap();
        let refusal = format!("nodes/a1 cannot limit {what}");
        assert!(message.contains(&refusal), "{message}");
    }
    w.until_idle();
}

#[test]
fn a_guest_says_how_commands_end_and_knows_nfs() {
    let Some(image) = image() else {
        return;
    };
    let dir = directory();
    let mut guest = Guest::boot(image, dir.path());
    assert_eq!(guest.run("printf 1; exit 3"), ("1".to_owned(), 3));
    assert_eq!(guest.run("nothing-such").1, 127);
    guest.ok("load nfs");
    let known = guest.ok("cat /proc/filesystems");
    for kind in ["nfs", "nfs4"] {
        assert!(known.contains(&format!("\t{kind}\n")), "{known}");
    }
}
