//! What mpirun is told, for every toolkit of MPI, number of hosts and of processes, and each of the mpiruns there are.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
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
                assert_eq!(
                    open_mpi.told(&process.argv, &process.env),
                    [&given[..], &bound, root_option(), &ranks].concat(),
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

#[test]
fn horovod_goes_by_gloo_where_it_has_no_mpi_or_the_job_wants_that() {
    let [(_, job, expected), ..] = jobs(2);
    let process = &plan_of(2, 0, with_input(job)).processes[0];
    let command = process.argv.last().unwrap();
    let gloo = include_str!("horovod_gloo.py");
    let by_gloo = ["python3", "-c", gloo, "2", command];
    // What mpi_built() leads to: not known, yes, no.
    for (code, mpirun, controller, over_gloo) in [
        (1, true, "", false),
        (0, true, "", false),
        (3, true, "", true),
        (0, true, "gloo", true),
        (0, false, "", true),
        (0, true, "mpi", false),
    ] {
        let what = format!("{code}, {mpirun}, {controller}");
        let programs = Programs::new(OPEN_MPI);
        let python = format!(
            "[[ $2 != *mpi_built* ]] || exit {code}\nfor word in \"${{0##*/}}\" \"$@\"; do printf '%s\\0' \"$word\"; done"
        );
        programs.add("python3", &python);
        let mut argv = process.argv.clone();
        if !mpirun {
            argv[2] = argv[2].replace("command -v mpirun", "command -v no-such-program");
        }
        let mut env = process.env.clone();
        env.insert("HOROVOD_CONTROLLER".into(), controller.into());
        let told = programs.told(&argv, &env);
        match over_gloo {
            true => assert_eq!(told, by_gloo, "{what}"),
            false => assert_eq!(told[..2], ["mpirun", "--hostfile"], "{what}"),
        }
    }
    // A rank of gloo's has its place in Horovod's own variables.
    let place = command.rsplit_once("exec ").unwrap().0;
    let tell = format!("{place} echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE");
    let output = Command::new("/bin/bash")
        .args(["-c", &tell])
        .envs([
            ("HOROVOD_RANK", "2"),
            ("HOROVOD_SIZE", "4"),
            ("HOROVOD_LOCAL_RANK", "0"),
            ("HOROVOD_LOCAL_SIZE", "3"),
            ("AZ_BATCHAI_JOB_TEMP", "/"),
        ])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"2/4 0/3\n");
    assert_eq!(expected[0], "python3");
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
    let by_mpi = plan_of(1, 0, with_input(mpi)).processes[0].argv[5].clone();
    let alone = plan_of(1, 0, torch).processes[0].argv.clone();
    for (there, expected) in [
        (&["python", "python3"][..], "python3"),
        (&["python"], "python"),
        (&[], ""),
    ] {
        let programs = Programs(tempfile::tempdir().unwrap());
        for name in there {
            programs.add(name, &format!("echo {name}"));
        }
        let by_mpi = ["/bin/bash", "-c", &by_mpi].map(str::to_owned);
        for argv in [&alone, &by_mpi.to_vec()] {
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
