//! What mpirun is told, for every toolkit of MPI, number of hosts and of processes, and each of the mpiruns there are.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use batchai_proto::v1;
use proptest::prelude::*;

use super::tests::{assignment, facts, plan_of};
use super::*;

const OPEN_MPI: &str = "mpirun (Open MPI) 4.1.4";
const MPICH: &str = "HYDRA build details:\n    Version:   4.0.2";
const INTEL: &str = "Intel(R) MPI Library for Linux* OS, Version 2021.6 Build 20220227";

/// What a process of mpirun's is told by each of them.
const OF_RANK_1: [(&str, &str); 8] = [
    ("OMPI_COMM_WORLD_RANK", "1"),
    ("OMPI_COMM_WORLD_SIZE", "2"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ("PMI_RANK", "1"),
    ("PMI_SIZE", "2"),
    ("MPI_LOCALRANKID", "1"),
    ("MPI_LOCALNRANKS", "2"),
];

/// One job of each kind, and what the process of each rank is.
fn jobs(count: i32) -> [(&'static str, Job, Vec<&'static str>); 8] {
    let script = || "$AZ_BATCHAI_INPUT_SCRIPTS/it's.py".to_owned();
    let arguments = || "--rank ${AZ_BATCHAI_TASK_INDEX} --name 'two $HOME words' ''".to_owned();
    let given = ["--rank", "1", "--name", "two $HOME words", ""];
    let of = |program: &[&'static str]| [program, &given].concat();
    macro_rules! scripted {
        ($field:ident, $settings:ident) => {
            Job {
                $field: Some(v1::$settings {
                    python_script_file_path: script(),
                    command_line_args: arguments(),
                    process_count: count,
                    ..Default::default()
                }),
                ..Job::default()
            }
        };
    }
    let python = || of(&["python3", "/here/s/it's.py"]);
    let mut torch = scripted!(py_torch_settings, PyTorchSettings);
    let settings = torch.py_torch_settings.as_mut().unwrap();
    settings.communication_backend = "mpi".into();
    settings.python_interpreter_path = "$AZ_BATCHAI_JOB_TEMP/python3".into();
    let brain = v1::CntkSettings {
        config_file_path: "$AZ_BATCHAI_INPUT_SCRIPTS/a.cntk".into(),
        command_line_args: "parallelTrain=true".into(),
        process_count: count,
        ..Default::default()
    };
    let solver = v1::CaffeSettings {
        config_file_path: "$AZ_BATCHAI_INPUT_SCRIPTS/solver.prototxt".into(),
        command_line_args: "--gpu=all".into(),
        process_count: count,
        ..Default::default()
    };
    let custom = v1::CustomMpiSettings {
        command_line: "tell $AZ_BATCHAI_INPUT_SCRIPTS/x \"$RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE\"; [ . -ef $AZ_BATCHAI_JOB_TEMP ] && tell at home".into(),
        process_count: count,
    };
    let place = vec!["/here/s/x", "1 of 2, 1 of 2", "at", "home"];
    [
        (
            "horovod",
            scripted!(horovod_settings, HorovodSettings),
            python(),
        ),
        (
            "chainer",
            scripted!(chainer_settings, ChainerSettings),
            python(),
        ),
        ("cntk", scripted!(cntk_settings, CntkSettings), python()),
        ("caffe", scripted!(caffe_settings, CaffeSettings), python()),
        ("pytorch", torch, python()),
        (
            "brainscript",
            Job {
                cntk_settings: Some(brain),
                ..Job::default()
            },
            vec!["cntk", "configFile=/here/s/a.cntk", "parallelTrain=true"],
        ),
        (
            "solver",
            Job {
                caffe_settings: Some(solver),
                ..Job::default()
            },
            vec![
                "caffe",
                "train",
                "--solver=/here/s/solver.prototxt",
                "--gpu=all",
            ],
        ),
        (
            "custom",
            Job {
                custom_mpi_settings: Some(custom),
                ..Job::default()
            },
            place,
        ),
    ]
}

fn with_input(mut job: Job) -> Job {
    job.input_directories = vec![v1::InputDirectory {
        id: "SCRIPTS".into(),
        path: "$AZ_BATCHAI_JOB_MOUNT_ROOT/s".into(),
    }];
    job
}

/// A directory of programs that tell what they are given.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new(version: &str) -> Programs {
        let programs = Programs(tempfile::tempdir().unwrap());
        let tell = "for word in \"$0\" \"$@\"; do printf '%s\\0' \"${word#${0%/*}/}\"; done";
        let mpirun = format!("[ \"$1\" != --version ] || {{ echo '{version}'; exit; }}\n{tell}");
        programs.add("mpirun", &mpirun);
        for name in ["python3", "cntk", "caffe"] {
            programs.add(name, tell);
        }
        programs.add("tell", "for word; do printf '%s\\0' \"$word\"; done");
        programs
    }

    fn add(&self, name: &str, script: &str) {
        let path = self.0.path().join(name);
        fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn path(&self) -> String {
        format!("{}:/usr/bin:/bin", self.0.path().display())
    }

    /// What a program that a process starts is given.
    fn told(&self, argv: &[String], env: &BTreeMap<String, String>) -> Vec<String> {
        let output = Command::new(&argv[0])
            .args(&argv[1..])
            .env_clear()
            .envs(env)
            .env("PATH", self.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let words = said.split_terminator('\0').map(str::to_owned).collect();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said} {error}");
        words
    }

    /// What a rank runs on a host where all lies elsewhere than on the master.
    fn of_a_rank(&self, command_line: &str, env: &BTreeMap<String, String>) -> Vec<String> {
        let mut env = env.clone();
        let temp = self.0.path().to_str().unwrap();
        for (name, value) in OF_RANK_1.iter().chain(&[
            ("AZ_BATCHAI_INPUT_SCRIPTS", "/here/s"),
            ("AZ_BATCHAI_JOB_TEMP", temp),
        ]) {
            env.insert((*name).to_owned(), (*value).to_owned());
        }
        let interpreter = "/bin/bash".to_owned();
        self.told(&[interpreter, "-c".into(), command_line.into()], &env)
    }
}

fn root_option() -> &'static [&'static str] {
    match nix::unistd::geteuid().is_root() {
        true => &["--allow-run-as-root"],
        false => &[],
    }
}

#[test]
fn mpirun_is_told_hosts_processes_and_the_command_by_each_toolkit() {
    let (open_mpi, mpich, intel) = (
        Programs::new(OPEN_MPI),
        Programs::new(MPICH),
        Programs::new(INTEL),
    );
    for hosts in 1..=3_usize {
        for count in [1, 2, 8].into_iter().filter(|count| *count >= hosts) {
            for (name, job, expected) in jobs(count as i32) {
                let what = format!("{name}, {hosts} hosts, {count} processes");
                let job = with_input(job);
                let plan = plan_of(hosts, 0, job.clone());
                let [process] = &plan.processes[..] else {
                    panic!("{what}")
                };
                let names = (process.rank, &*process.stdout, &*process.stderr);
                assert_eq!(names, (0, "stdout.txt", "stderr.txt"), "{what}");
                for index in 1..hosts {
                    assert!(plan_of(hosts, index, job.clone()).processes.is_empty());
                }
                let number = count.to_string();
                let command = process.argv.last().unwrap().as_str();
                let ranks = ["/bin/bash", "--norc", "-c", command];
                let file = "/r/jobs/w/e/j/hostfile";
                let given = ["mpirun", "--hostfile", file, "-n", &number];
                let bound = ["--map-by", "slot", "--bind-to", "none", "--wdir", "/"];
                let by_open_mpi =
                    [&given[..3], root_option(), &bound, &given[3..], &ranks].concat();
                assert_eq!(
                    open_mpi.told(&process.argv, &process.env),
                    by_open_mpi,
                    "{what}"
                );
                let file = "/r/jobs/w/e/j/.hostfile.hydra";
                let given = [
                    "mpirun",
                    "-machinefile",
                    file,
                    "-localhost",
                    "10.0.0.4",
                    "-genvnone",
                    "-wdir",
                    "/",
                ];
                let hydra = [&given[..], &["-n", &number], &ranks].concat();
                assert_eq!(mpich.told(&process.argv, &process.env), hydra, "{what}");
                assert_eq!(intel.told(&process.argv, &process.env), hydra, "{what}");
                let in_sh = with_shell(&process.argv, "/bin/sh");
                assert_eq!(open_mpi.told(&in_sh, &process.env), by_open_mpi, "{what}");
                assert_eq!(intel.told(&in_sh, &process.env), hydra, "{what}");
                assert_eq!(
                    open_mpi.of_a_rank(command, &process.env),
                    expected,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn a_rank_has_the_environment_that_torch_reads_and_no_interfaces_of_containers() {
    let [.., (_, torch, _), _, _, _] = jobs(2);
    let env = &plan_of(2, 0, with_input(torch)).processes[0].env;
    for (name, value) in [
        ("AZ_BATCHAI_PYTORCH_INIT_METHOD", "tcp://10.0.0.4:20000"),
        ("AZ_BATCHAI_PYTORCH_BACKEND", "mpi"),
        ("MASTER_ADDR", "10.0.0.4"),
        ("MASTER_PORT", "20000"),
        ("OMPI_MCA_btl_tcp_if_exclude", "docker0,lo"),
    ] {
        assert_eq!(env[name], value);
    }
    let [.., (_, mut custom, _)] = jobs(2);
    custom.environment_variables = vec![v1::NameValuePair {
        name: "OMPI_MCA_btl_tcp_if_include".into(),
        value: "ib0".into(),
    }];
    let env = &plan_of(2, 0, custom).processes[0].env;
    assert!(
        !env.contains_key("OMPI_MCA_btl_tcp_if_exclude"),
        "the job says it"
    );
}

#[test]
fn a_mpirun_that_is_missing_or_unknown_is_named() {
    let [.., (_, custom, _)] = jobs(1);
    let process = &plan_of(1, 0, custom).processes[0];
    let run = |path: String| {
        let output = Command::new(&process.argv[0])
            .args(&process.argv[1..])
            .env_clear()
            .env("PATH", path)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    };
    let (code, said) = run("/nowhere".into());
    assert_eq!(code, Some(127));
    assert!(
        said.contains("no mpirun on the PATH of this node (/nowhere)"),
        "{said}"
    );
    let (code, said) = run(Programs::new("mpirun of LAM 7.1").path());
    assert_eq!(code, Some(126));
    assert!(said.contains("calls itself: mpirun of LAM 7.1"), "{said}");
}

#[test]
fn hosts_of_one_address_are_one_line() {
    let [.., (_, custom, _)] = jobs(5);
    let mut assignment = assignment(3, 0, custom);
    assignment.hosts[2].address = assignment.hosts[0].address.clone();
    let files = plan(&assignment, &facts()).unwrap().preparation.files;
    let file = |name: &str| {
        &files
            .iter()
            .find(|(path, _)| path.ends_with(name))
            .unwrap()
            .1
    };
    let lines = "10.0.0.4 slots=3 max-slots=3\n10.0.0.5 slots=2 max-slots=2\n";
    assert_eq!(file("/hostfile"), lines);
    assert_eq!(file("/.hostfile.hydra"), "10.0.0.4:3\n10.0.0.5:2\n");
}

proptest! {
    #[test]
    fn every_host_is_used_and_no_value_is_on_a_command_line(
        hosts in 1..40_usize,
        more in 0..100_usize,
        kind in 0..8_usize,
        value in "[a-zA-Z0-9]{12,40}",
    ) {
        let count = hosts + more;
        let (_, mut job, _) = jobs(count as i32).into_iter().nth(kind).unwrap();
        job.environment_variables = vec![v1::NameValuePair { name: "OWN".into(), value: value.clone() }];
        job.secrets = vec![v1::EnvironmentVariableWithSecretValue {
            name: "SECRET".into(),
            value: format!("s{value}"),
            ..Default::default()
        }];
        let plan = plan_of(hosts, 0, with_input(job));
        let slots: Vec<usize> = plan.preparation.files[1].1.lines()
            .map(|line| line.rsplit_once(':').unwrap().1.parse().unwrap())
            .collect();
        prop_assert_eq!(slots.len(), hosts);
        prop_assert!(slots.iter().all(|slots| *slots > 0));
        prop_assert_eq!(slots.iter().sum::<usize>(), count);
        for process in &plan.processes {
            prop_assert_eq!(&process.env["OWN"], &value);
            prop_assert!(process.argv.iter().all(|word| !word.contains(&value)));
        }
    }
}

#[test]
fn what_runs_on_another_host_has_the_environment_that_the_job_has_there() {
    let [.., (_, custom, _)] = jobs(2);
    let mut job = with_input(custom);
    job.environment_variables = vec![v1::NameValuePair {
        name: "PATH".into(),
        value: "/own".into(),
    }];
    let (env, cwd) = beside(&assignment(2, 1, job.clone()), &facts()).unwrap();
    assert_eq!(cwd, "/r/jobs/w/e/j");
    let ssh = "/r/jobs/w/e/j/.bin/ssh";
    for (name, value) in [
        ("AZ_BATCHAI_INPUT_SCRIPTS", "/r/jobs/w/e/j/mounts/s"),
        ("MASTER_ADDR", "10.0.0.4"),
        ("OMPI_MCA_btl_tcp_if_exclude", "docker0,lo"),
        ("OMPI_MCA_plm_rsh_agent", ssh),
        ("HYDRA_LAUNCHER_EXEC", ssh),
        ("I_MPI_HYDRA_BOOTSTRAP_EXEC", ssh),
        ("PATH", "/r/jobs/w/e/j/.bin:/own"),
    ] {
        assert_eq!(env[name], value);
    }
    let file = |hosts, facts: &HostFacts| {
        let plan = plan(&assignment(hosts, 0, job.clone()), facts).unwrap();
        let files = plan.preparation.files.into_iter();
        files
            .filter(|(path, _)| path == ssh)
            .map(|(_, script)| script)
            .next()
    };
    let script = "#!/bin/sh\nexec '/it'\\''s/batchai' 'remote-shell' \"$@\"\n";
    assert_eq!(file(2, &facts()).unwrap(), script);
    // Nobody is to be reached, or in no way.
    assert_eq!(file(1, &facts()), None);
    let no_way = HostFacts {
        remote_shell: Vec::new(),
        ..facts()
    };
    assert_eq!(file(2, &no_way), None);
}

/// Names that a launcher might have for itself.
const OWN: [&str; 9] = [
    "asked", "given", "gloo", "hosts", "leads", "over", "port", "python", "version",
];

#[test]
fn horovod_goes_by_gloo_where_it_has_no_mpi_or_the_job_wants_that() {
    let [(_, job, _), ..] = jobs(2);
    let process = &plan_of(2, 0, with_input(job)).processes[0];
    let command = process.argv.last().unwrap();
    let gloo = include_str!("horovod_gloo.py");
    let by_gloo = ["python3", "-c", gloo, "2", command, "20000"];
    let (none, asked, built) = (
        "there is no mpirun on the PATH",
        "the job's HOROVOD_CONTROLLER is ",
        "it was built without MPI",
    );
    let cases = [
        // What mpi_built() leads to: not known, yes, no.
        (1, true, "", None),
        (0, true, "", None),
        (3, true, "", Some(built)),
        (0, true, "gloo", Some(asked)),
        (0, true, "Gloo", Some(asked)),
        (0, false, "GLOO", Some(asked)),
        (0, false, "", Some(none)),
        (0, true, "mpi", None),
        (3, true, "MPI", None),
        (0, false, "mpi", None),
    ];
    for (shell, (code, mpirun, controller, over_gloo)) in SHELLS
        .iter()
        .flat_map(|shell| cases.map(|case| (*shell, case)))
    {
        let what = format!("{shell}, {code}, {mpirun}, {controller}");
        let programs = Programs::new(OPEN_MPI);
        let tell = "printf '%s\\0' \"${0##*/}\" \"$@\"; env -0 >\"${0%/*}/env\"";
        programs.add(
            "python3",
            &format!("[[ $2 != *mpi_built* ]] || exit {code}\n{tell}"),
        );
        programs.add(
            "mpirun",
            &format!("[ \"$1\" != --version ] || {{ echo '{OPEN_MPI}'; exit; }}\n{tell}"),
        );
        let mut argv = with_shell(&process.argv, shell);
        if !mpirun {
            argv[2] = argv[2].replace("command -v mpirun", "command -v no-such-program");
        }
        let output = Command::new(&argv[0])
            .args(&argv[1..])
            .env_clear()
            .envs(&process.env)
            .envs(OWN.map(|name| (name, "the job's")))
            .env("HOROVOD_CONTROLLER", controller)
            .env("PATH", programs.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        if !mpirun && over_gloo.is_none() {
            assert_eq!(output.status.code(), Some(127), "{what}: {said}");
            assert!(said.contains(none) && !said.contains("gloo"), "{said}");
            continue;
        }
        let told = String::from_utf8(output.stdout).unwrap();
        let told: Vec<_> = told.split_terminator('\0').collect();
        match over_gloo {
            Some(why) => {
                let line = format!("batchai: Horovod's ranks are started over gloo: {why}");
                assert!(said.starts_with(&line), "{what}: {said}");
                assert_eq!(said.lines().count(), 1, "{what}: {said}");
                assert_eq!(told, by_gloo, "{what}");
            }
            None => {
                assert_eq!(told[..2], ["mpirun", "--hostfile"], "{what}: {said}");
                assert_eq!(said, "", "{what}");
            }
        }
        let env = fs::read_to_string(programs.0.path().join("env")).unwrap();
        for name in OWN {
            let own = format!("{name}=the job's");
            assert!(env.split('\0').any(|line| line == own), "{what}: {name}");
        }
    }
}

#[test]
fn ranks_of_horovod_know_what_started_them() {
    let [(_, job, _), ..] = jobs(2);
    let process = &plan_of(2, 0, with_input(job)).processes[0];
    let place = process.argv.last().unwrap().rsplit_once("exec ").unwrap().0;
    let tell =
        format!("{place} echo $HOROVOD_CONTROLLER $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE");
    // By mpirun the job's word holds; a rank of gloo's has its place in Horovod's own variables.
    for (controller, expected) in [("", "mpi"), ("MPI", "MPI"), ("gloo", "gloo")] {
        let output = Command::new("/bin/bash")
            .args(["-c", &tell])
            .env_clear()
            .envs([
                ("HOROVOD_CONTROLLER", controller),
                ("HOROVOD_RANK", "2"),
                ("HOROVOD_SIZE", "4"),
                ("HOROVOD_LOCAL_RANK", "0"),
                ("HOROVOD_LOCAL_SIZE", "3"),
                ("AZ_BATCHAI_JOB_TEMP", "/"),
            ])
            .output()
            .unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        assert_eq!(told, format!("{expected} 2/4 0/3\n"));
    }
}

#[test]
fn ranks_are_of_sh_in_an_image_without_bash() {
    let [.., (_, custom, _)] = jobs(2);
    let process = &plan_of(1, 0, custom).processes[0];
    let mut argv = with_shell(&process.argv, "/bin/sh");
    argv[2] = argv[2].replace("-x /bin/bash", "-x /no/bash");
    for version in [OPEN_MPI, MPICH] {
        let told = Programs::new(version).told(&argv, &process.env);
        let ranks = ["-n", "2", "/bin/sh", "-c", process.argv.last().unwrap()];
        assert_eq!(told[told.len() - 5..], ranks);
    }
}

const GLOO: &str = include_str!("horovod_gloo.py");

/// As much of Horovod as is asked by what starts its ranks over gloo.
const HOROVOD: [(&str, &str); 3] = [
    (
        "common/util.py",
        "import os\ndef gloo_built():\n    return 'NO_GLOO' not in os.environ\n",
    ),
    (
        "runner/common/util/hosts.py",
        r#"
from types import SimpleNamespace
class HostInfo:
    def __init__(self, hostname, slots):
        self.hostname, self.slots = hostname, slots
def get_host_assignments(hosts, least, most):
    of = [(i, j, host) for i, host in enumerate(hosts) for j in range(host.slots)]
    assert least == most == len(of)
    return [SimpleNamespace(hostname=host.hostname, rank=rank, size=len(of), local_rank=j, local_size=host.slots, cross_rank=i,
        cross_size=sum(other.slots > j for other in hosts)) for rank, (i, j, host) in enumerate(of)]
"#,
    ),
    (
        "runner/http/http_server.py",
        r#"
import socketserver
from http.server import HTTPServer, SimpleHTTPRequestHandler
class RendezvousHandler(SimpleHTTPRequestHandler):
    def do_PUT(self):
        self.server.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.kept[self.path])
    def log_message(self, *_):
        pass
class RendezvousHTTPServer(socketserver.ThreadingMixIn, HTTPServer):
    def __init__(self, address, handler, verbose):
        super().__init__(address, handler)
        self.kept = None
    def init(self, slots):
        self.kept = {}
"#,
    ),
];

/// What asks the server of a rendezvous, and tells what it answers.
const PROBE: &str = r#"
import http.client, os, socket
at = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
print("at", *at)
def ask(method, source, body=None, headers={}, at=at):
    try:
        line = http.client.HTTPConnection(*at, timeout=20, source_address=(source, 0))
        line.request(method, "/global/1", body, headers)
        answer = line.getresponse()
        print(method, answer.status, answer.read()[:9] if method == "GET" else "")
    except OSError as error:
        print(method, "from", source, "to", at[0], "refused")
ask("PUT", "127.0.0.1", b"here")
ask("GET", "127.0.0.2")
ask("PUT", "127.0.0.1", None, {"Content-Length": "16777217"})
ask("PUT", "127.0.0.1", None, {"Content-Length": "-1"})
ask("HEAD", "127.0.0.1")
ask("GET", "127.0.0.3")
ask("GET", "127.0.0.3")
ask("GET", "127.0.0.1", at=("127.0.0.2", at[1]))
"#;

/// A directory of a job of Horovod's, in which its ranks are started over gloo.
struct Gloo {
    programs: Programs,
    env: Vec<(&'static str, &'static str)>,
}

impl Gloo {
    /// Hosts with their numbers of processes.
    fn of(hosts: &[(&str, usize)]) -> Gloo {
        let programs = Programs(tempfile::tempdir().unwrap());
        let dir = programs.0.path();
        for (path, module) in HOROVOD {
            let path = dir.join("modules/horovod").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, module).unwrap();
        }
        let (file, _) = mpi::host_files(hosts.iter().copied());
        fs::write(dir.join("hostfile"), file).unwrap();
        fs::write(dir.join("probe.py"), PROBE).unwrap();
        // The job's own, of which nothing is asked.
        fs::write(dir.join("shutil.py"), "raise SystemExit('the job s')").unwrap();
        programs.add("ssh", "[ $# = 2 ] && BY_SSH=$1 exec /bin/sh -c \"$2\"");
        programs.add("getent", "echo \"${NAMED:-$HOROVOD_HOSTNAME} STREAM n\"");
        let env = Vec::new();
        Gloo { programs, env }
    }

    fn with(mut self, name: &'static str, value: &'static str) -> Gloo {
        self.env.push((name, value));
        self
    }

    /// With which code it ends, and what was printed. Nothing of it is left.
    fn run(&self, launcher: &str, count: usize, command: &str, port: u16) -> (i32, String, String) {
        let dir = self.programs.0.path();
        let file = |name: &str| fs::File::create(dir.join(name)).unwrap();
        // Ranks that are left would hold pipes.
        let mut child = Command::new("/usr/bin/timeout")
            .args(["60", "/usr/bin/python3", "-c", launcher, &count.to_string()])
            .args([command, &port.to_string()])
            .current_dir(dir)
            .env_clear()
            .env("PATH", self.programs.path())
            .env("PYTHONPATH", dir.join("modules"))
            .env("AZ_BATCHAI_MPI_HOST_FILE", dir.join("hostfile"))
            .envs(self.env.iter().copied())
            .stdout(file("out"))
            .stderr(file("err"))
            .process_group(0)
            .spawn()
            .unwrap();
        let group = nix::unistd::Pid::from_raw(child.id() as i32);
        let status = child.wait().unwrap();
        // The ranks that its end leaves, which are ended by the node.
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        (status.code().unwrap(), read("out"), read("err"))
    }
}

#[test]
fn an_early_end_of_a_rank_over_gloo_is_not_missed() {
    let job = Gloo::of(&[("127.0.0.1", 20)]);
    let (code, _, said) = job.run(GLOO, 20, "[ $HOROVOD_RANK != 0 ] || exit 7; sleep 5", 0);
    let line = "batchai: rank 0 on 127.0.0.1 ended with 7, and so ends the job\n";
    assert_eq!((code, &*said), (7, line));
    let (code, _, said) = job.run(GLOO, 20, "[ $HOROVOD_RANK = 0 ] || sleep 1", 0);
    assert_eq!((code, &*said), (0, ""));
    let (code, _, said) = job.run(GLOO, 20, "[ $HOROVOD_RANK != 9 ] || kill -9 $$; sleep 1", 0);
    assert_eq!(code, 137, "{said}");
}

#[test]
fn ranks_of_gloo_meet_at_the_jobs_port_where_nobody_else_is_let() {
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = held.local_addr().unwrap().port();
    let job = Gloo::of(&[("127.0.0.1", 1), ("127.0.0.2", 1)]);
    let command = "[ $HOROVOD_RANK != 0 ] || exec /usr/bin/python3 probe.py";
    let taken = job.run(GLOO, 2, command, port);
    drop(held);
    let (code, told, said) = job.run(GLOO, 2, command, port);
    let refused = "batchai: 127.0.0.3, which is no address of the job's nodes, is not let to where its ranks meet\n";
    assert_eq!((code, &*said), (0, refused), "{told}");
    let expected = format!(
        "at 127.0.0.1 {port}\nPUT 200 \nGET 200 b'here'\nPUT 413 \nPUT 413 \nHEAD 501 \n\
         GET from 127.0.0.3 to 127.0.0.1 refused\nGET from 127.0.0.3 to 127.0.0.1 refused\n\
         GET from 127.0.0.1 to 127.0.0.2 refused\n"
    );
    assert_eq!(told, expected);
    let (code, told, said) = taken;
    let line =
        format!("batchai: port {port} of 127.0.0.1 is in use: the ranks meet at a free one\n");
    assert_eq!((code, &*said), (0, &*format!("{line}{refused}")));
    let after = |text: &str| text.split_once('\n').map(|(_, after)| after.to_owned());
    assert_eq!(after(&told), after(&expected));
    assert!(
        !told.starts_with(&format!("at 127.0.0.1 {port}\n")),
        "{told}"
    );
}

#[test]
fn ranks_of_gloo_have_their_place_whatever_the_job_sets() {
    let [(_, job, _), ..] = jobs(4);
    let command = plan_of(2, 0, with_input(job)).processes[0]
        .argv
        .last()
        .unwrap()
        .clone();
    let place = command.rsplit_once("exec ").unwrap().0;
    let tell = format!(
        "{place} sleep 0.$RANK; echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $HOROVOD_CROSS_RANK/$HOROVOD_CROSS_SIZE \
         $HOROVOD_CONTROLLER $HOROVOD_CPU_OPERATIONS $HOROVOD_HOSTNAME at $HOROVOD_GLOO_RENDEZVOUS_ADDR \
         in $HOROVOD_GLOO_TIMEOUT_SECONDS by $BY_SSH$leads"
    );
    let of = || {
        let job = Gloo::of(&[("127.0.0.1", 2), ("127.0.0.2", 2)]).with("AZ_BATCHAI_JOB_TEMP", "/");
        let job = job.with("MASTER_ADDR", "10.9.9.9").with("leads", "-");
        OF_RANK_1
            .iter()
            .fold(job, |job, (name, value)| job.with(name, value))
    };
    let expected = |seconds: &str| {
        let line = |rank: usize, local: usize, cross: usize| {
            let host = format!("127.0.0.{}", cross + 1);
            let by = if cross == 0 {
                "-".to_owned()
            } else {
                format!("{host}-")
            };
            format!(
                "{rank}/4 {local}/2 {cross}/2 gloo gloo {host} at 127.0.0.1 in {seconds} by {by}\n"
            )
        };
        [line(0, 0, 0), line(1, 1, 0), line(2, 0, 1), line(3, 1, 1)].concat()
    };
    let lines = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let (code, told, said) = of().run(GLOO, 4, &tell, 0);
    assert_eq!((code, &*said), (0, ""), "{told}");
    assert_eq!(lines(&told), lines(&expected("600")));
    // The job's own word holds; and the first rank of each host tells where its name leads.
    let job = of().with("HOROVOD_GLOO_TIMEOUT_SECONDS", "30");
    let (code, told, said) = job.with("NAMED", "127.0.1.1").run(GLOO, 4, &tell, 0);
    assert_eq!(code, 0, "{said}");
    assert_eq!(lines(&told), lines(&expected("30")));
    assert_eq!(said.lines().count(), 2, "{said}");
    for (rank, address) in [(0, "127.0.0.1"), (2, "127.0.0.2")] {
        let begin = format!("batchai: rank {rank}: the name of this node, ");
        let line = said.lines().find(|line| line.starts_with(&begin)).unwrap();
        assert!(line.contains(", leads to '127.0.1.1'."), "{line}");
        assert!(line.contains(&format!("let that be {address}")), "{line}");
    }
    // One host has nobody who would find it by its name.
    let alone = Gloo::of(&[("127.0.0.1", 2)]).with("NAMED", "127.0.1.1");
    assert_eq!(
        alone.run(GLOO, 2, "true", 0),
        (0, String::new(), String::new())
    );
    let without_bash = GLOO.replace("/bin/bash", "/no/bash");
    let (_, told, _) = alone.run(&without_bash, 2, "echo $0", 0);
    assert_eq!(told, "/bin/sh\n/bin/sh\n");
}

#[test]
fn what_cannot_be_started_over_gloo_is_said_before_any_rank_is() {
    let two = || Gloo::of(&[("127.0.0.1", 1), ("127.0.0.2", 1)]);
    let without_ssh = two();
    fs::remove_file(without_ssh.programs.0.path().join("ssh")).unwrap();
    let no_horovod = two();
    fs::remove_dir_all(no_horovod.programs.0.path().join("modules")).unwrap();
    // There may be an ssh of this machine's.
    let bare = GLOO.replace(
        "which(\"ssh\")",
        "which(\"ssh\", path=os.environ[\"PATH\"].split(\":\")[0])",
    );
    for (job, launcher, code, why) in [
        (
            without_ssh,
            &*bare,
            127,
            "there is no ssh on the PATH of this node",
        ),
        (
            two().with("NO_GLOO", "1"),
            GLOO,
            1,
            "Horovod was built without gloo here",
        ),
        (
            no_horovod,
            GLOO,
            1,
            "has no Horovod that starts ranks over gloo (No module named ",
        ),
        (
            Gloo::of(&[("::1", 1), ("fd00::2", 1)]),
            GLOO,
            1,
            "Horovod's ranks cannot meet over IPv6, and ::1 is a node",
        ),
        (
            Gloo::of(&[("192.0.2.1", 1)]),
            GLOO,
            1,
            "of 192.0.2.1, the address of this node: ",
        ),
    ] {
        let (ended, told, said) = job.run(
            launcher,
            2 - usize::from(why.starts_with("of ")),
            "echo started",
            0,
        );
        assert_eq!((ended, &*told), (code, ""), "{said}");
        assert!(
            said.starts_with("batchai: ") && said.contains(why),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn python_is_python3_or_else_what_there_is_of_it() {
    let [(_, mpi, _), ..] = jobs(1);
    let torch = Job {
        py_torch_settings: Some(v1::PyTorchSettings {
            python_script_file_path: "t.py".into(),
            process_count: 1,
            ..Default::default()
        }),
        ..Job::default()
    };
    let contained = Job {
        container_settings: Some(v1::ContainerSettings {
            image_source_registry: Some(v1::ImageSourceRegistry {
                image: "tensorflow:1.8.0-gpu".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..mpi.clone()
    };
    let of_mpi = |job: Job| plan_of(1, 0, with_input(job)).processes[0].argv[5].clone();
    let in_bash = |line: String| ["/bin/bash".into(), "-c".into(), line].to_vec();
    let by_mpi = in_bash(of_mpi(mpi));
    let alone_contained = Job {
        container_settings: contained.container_settings.clone(),
        ..torch.clone()
    };
    let contained = in_bash(of_mpi(contained));
    let [alone, alone_contained] =
        [torch, alone_contained].map(|job| plan_of(1, 0, job).processes[0].argv.clone());
    for (there, expected, in_container) in [
        (&["python", "python3"][..], "python3", "python"),
        (&["python"], "python", "python"),
        (&["python3"], "python3", "python3"),
        (&[], "", ""),
    ] {
        let programs = Programs(tempfile::tempdir().unwrap());
        for name in there {
            programs.add(name, &format!("echo {name}"));
        }
        for (argv, expected) in [
            (&alone, expected),
            (&by_mpi, expected),
            (&contained, in_container),
            (&alone_contained, in_container),
        ] {
            let output = Command::new(&argv[0])
                .args(&argv[1..])
                .env_clear()
                .envs([("AZ_BATCHAI_JOB_TEMP", "/")])
                .env("PATH", programs.0.path())
                .output()
                .unwrap();
            let said = String::from_utf8(output.stdout).unwrap();
            assert_eq!(said.trim(), expected, "{argv:?}");
            let error = String::from_utf8(output.stderr).unwrap();
            let code = if there.is_empty() { 127 } else { 0 };
            assert_eq!(output.status.code(), Some(code), "{error}");
            assert!(!there.is_empty() || error.contains("python3"), "{error}");
        }
    }
}
