use batchai_proto::agent::v1::Host;
use batchai_proto::v1;

use super::*;
use crate::cgroups::Method;

pub fn assignment(hosts: usize, index: usize, job: Job) -> Assignment {
    let host = |i: usize| Host {
        node: format!("nodes/n{i}"),
        address: format!("10.0.0.{}", i + 4),
        boot_id: format!("boot-{i}"),
        root: format!("/root{i}"),
        port: 20_000 + i as i32,
        ..Host::default()
    };
    Assignment {
        attempt: "1-7".into(),
        number: 3,
        hosts: (0..hosts).map(host).collect(),
        host_index: index as i32,
        job: Some(Job {
            name: "resourceGroups/g/workspaces/w/experiments/e/jobs/j".into(),
            std_out_err_path_prefix: "$AZ_BATCHAI_MOUNT_ROOT/logs".into(),
            job_output_directory_path_segment: "seg/ment".into(),
            ..job
        }),
        ..Default::default()
    }
}

pub fn facts() -> HostFacts {
    HostFacts {
        users: JobUsers::Own,
        limits: Vec::new(),
        log_limit: LogLimit::default(),
        isolation: Isolation {
            groups: Some(Group {
                method: Method::CgroupKill,
                path: "/cgroup/batchai-u".into(),
            }),
            seats: Vec::new(),
        },
        node_uid: "u".into(),
        root: "/r".into(),
        bundles: "/data/bundles".into(),
        lease: "/data/lease".into(),
        gpus: gpus(4),
        infiniband: Vec::new(),
        interface: Some("eth0".into()),
        containers: Ability {
            able: true,
            engine: Some(Engine::Podman),
            images: "/data/images".into(),
            libraries: vec!["/lib/libc.so.6".into(), "/lib/ld-linux.so.2".into()],
        },
        base_env: BTreeMap::from([("PATH".into(), "/bin".into())]),
        remote_shell: vec!["/it's/batchai".into(), "remote-shell".into()],
    }
}

/// So many of NVIDIA's.
pub fn gpus(count: u32) -> Vec<Device> {
    let device = |number| Device {
        maker: Maker::Nvidia,
        number,
        uuid: format!("GPU-{number}"),
    };
    (0..count).map(device).collect()
}

pub fn custom() -> Job {
    let command_line = "mpirun -hostfile $AZ_BATCHAI_MPI_HOST_FILE true".into();
    Job {
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn pytorch(process_count: i32) -> Job {
    Job {
        py_torch_settings: Some(v1::PyTorchSettings {
            python_script_file_path: "$AZ_BATCHAI_MOUNT_ROOT/t.py".into(),
            command_line_args: "--rank $AZ_BATCHAI_TASK_INDEX --name 'two words' --url \
                                ${AZ_BATCHAI_PYTORCH_INIT_METHOD}"
                .into(),
            process_count,
            communication_backend: "gloo".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub fn plan_of(hosts: usize, index: usize, job: Job) -> Plan {
    plan(&assignment(hosts, index, job), &facts()).unwrap()
}

#[test]
fn a_custom_job_starts_its_command_on_the_master_only() {
    let plan = plan_of(2, 0, custom());
    assert_eq!(plan.processes.len(), 1);
    let process = &plan.processes[0];
    assert_eq!(process.argv[..2], ["/bin/bash", "-c"]);
    assert!(
        process.argv[2].contains("$AZ_BATCHAI_MPI_HOST_FILE"),
        "bash expands it, not we"
    );
    assert_eq!(
        (process.stdout.as_str(), process.stderr.as_str()),
        ("stdout.txt", "stderr.txt")
    );
    assert!(plan_of(2, 1, custom()).processes.is_empty());
}

#[test]
fn the_environment_is_the_originals() {
    let mut job = custom();
    job.environment_variables = vec![v1::NameValuePair {
        name: "OUT".into(),
        value: "$AZ_BATCHAI_OUTPUT_MODEL/x".into(),
    }];
    job.input_directories = vec![v1::InputDirectory {
        id: "DATA".into(),
        path: "$AZ_BATCHAI_MOUNT_ROOT/d".into(),
    }];
    job.output_directories = vec![
        v1::OutputDirectory {
            id: "MODEL".into(),
            path_prefix: "/out/".into(),
            path_suffix: "Models".into(),
        },
        v1::OutputDirectory {
            id: "PLAIN".into(),
            path_prefix: "/out".into(),
            path_suffix: String::new(),
        },
    ];
    let plan = plan_of(2, 0, job);
    let env = &plan.processes[0].env;
    for (name, value) in [
        ("AZ_BATCHAI_MOUNT_ROOT", "/r/mounts"),
        ("AZ_BATCHAI_JOB_TEMP_DIR", "/r/jobs"),
        ("AZ_BATCHAI_JOB_TEMP", "/r/jobs/w/e/j"),
        ("AZ_BATCHAI_JOB_MOUNT_ROOT", "/r/jobs/w/e/j/mounts"),
        ("AZ_BATCHAI_MPI_HOST_FILE", "/r/jobs/w/e/j/hostfile"),
        (
            "AZ_BATCHAI_STDOUTERR_DIR",
            "/r/mounts/logs/seg/ment/stdouterr",
        ),
        ("AZ_BATCHAI_INPUT_DATA", "/r/mounts/d"),
        ("AZ_BATCHAI_OUTPUT_MODEL", "/out/seg/ment/Models"),
        ("AZ_BATCHAI_OUTPUT_PLAIN", "/out/seg/ment/outputs"),
        ("AZ_BATCHAI_NUM_GPUS", "4"),
        ("AZ_BATCHAI_ATTEMPT", "3"),
        ("AZ_BATCH_HOST_LIST", "10.0.0.4,10.0.0.5"),
        ("OUT", "/out/seg/ment/Models/x"),
        ("PATH", "/r/jobs/w/e/j/.bin:/bin"),
        (ATTEMPT_TAG, "u/1-7"),
    ] {
        assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(
        !env.contains_key("AZ_BATCHAI_SHARED_JOB_TEMP"),
        "the hosts share no machine, and the job does not name it"
    );
    let preparation = plan.preparation;
    assert!(
        preparation
            .directories
            .contains(&"/out/seg/ment/outputs".to_owned())
    );
    let hosts = "10.0.0.4 slots=1 max-slots=1\n10.0.0.5 slots=1 max-slots=1\n";
    assert_eq!(
        preparation.files[0],
        ("/r/jobs/w/e/j/hostfile".to_owned(), hosts.to_owned())
    );
    assert_eq!(preparation.execution_log, "execution-n0.log");
    let group = preparation.group.unwrap();
    assert_eq!(
        (group.method, group.path.to_str()),
        (Method::CgroupKill, Some("/cgroup/batchai-u/1-7"))
    );
}

#[test]
fn hosts_of_one_machine_share_the_masters_directory() {
    let mut assignment = assignment(2, 1, custom());
    assignment
        .hosts
        .iter_mut()
        .for_each(|host| host.boot_id = "same".into());
    let shared = "/root0/jobs/w/e/j/shared".to_owned();
    let other = plan(&assignment, &facts()).unwrap();
    assert!(
        !other.preparation.directories.contains(&shared),
        "only the master makes it"
    );
    assignment.host_index = 0;
    let master = plan(
        &assignment,
        &HostFacts {
            root: "/root0".into(),
            ..facts()
        },
    )
    .unwrap();
    assert!(master.preparation.directories.contains(&shared));
    assert_eq!(
        master.processes[0].env["AZ_BATCHAI_SHARED_JOB_TEMP"],
        shared
    );
}

#[test]
fn every_rank_exists_once_and_knows_its_place() {
    for hosts in 1..=3 {
        for total in [hosts, hosts + 1, 8] {
            let mut seen = Vec::new();
            for index in 0..hosts {
                let plan = plan_of(hosts, index, pytorch(total as i32));
                assert!(
                    !plan.processes.is_empty(),
                    "host {index} of {hosts} is unused"
                );
                let local = plan.processes.len();
                for (i, process) in plan.processes.iter().enumerate() {
                    seen.push(process.rank);
                    let env = |name: &str| process.env[name].clone();
                    assert_eq!(env("RANK"), process.rank.to_string());
                    assert_eq!(env("AZ_BATCHAI_TASK_INDEX"), env("RANK"));
                    assert_eq!(env("LOCAL_RANK"), i.to_string());
                    assert_eq!(env("LOCAL_WORLD_SIZE"), local.to_string());
                    assert_eq!(env("WORLD_SIZE"), total.to_string());
                    assert_eq!(env("MASTER_ADDR"), "10.0.0.4");
                    assert_eq!(env("MASTER_PORT"), "20000");
                    assert_eq!(env("GLOO_SOCKET_IFNAME"), "eth0");
                    assert_eq!(process.stdout, format!("stdout-{}.txt", process.rank));
                }
            }
            assert_eq!(seen, (0..total as i32).collect::<Vec<_>>());
        }
    }
}

#[test]
fn interpreter_and_backend_are_the_jobs_own() {
    let mut job = pytorch(1);
    let settings = job.py_torch_settings.as_mut().unwrap();
    settings.python_interpreter_path = "$AZ_BATCHAI_MOUNT_ROOT/env/bin/python".into();
    settings.communication_backend = "nccl".into();
    let plan = plan_of(1, 0, job);
    let process = &plan.processes[0];
    assert_eq!(process.argv[0], "/r/mounts/env/bin/python");
    assert_eq!(process.env["AZ_BATCHAI_PYTORCH_BACKEND"], "nccl");
}

#[test]
fn arguments_are_split_as_a_shell_would_and_expanded() {
    let plan = plan_of(1, 0, pytorch(1));
    let url = "tcp://10.0.0.4:20000";
    assert_eq!(
        plan.processes[0].argv[4..],
        [
            "/r/mounts/t.py",
            "--rank",
            "0",
            "--name",
            "two words",
            "--url",
            url
        ]
    );
}

#[test]
fn what_makes_no_sense_is_said() {
    let mut job = custom();
    job.environment_variables = vec![v1::NameValuePair {
        name: "S".into(),
        value: "$AZ_BATCHAI_OUTPUT_S".into(),
    }];
    let error = plan(&assignment(2, 0, job), &facts())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("environment variable S") && error.contains("no output directory"),
        "{error}"
    );
    let mut far = assignment(2, 0, custom());
    far.hosts[1].address = "127.0.0.1".into();
    let error = plan(&far, &facts()).unwrap_err().to_string();
    assert!(
        error.contains("nodes/n1") && error.contains("--address"),
        "{error}"
    );
    let mut job = pytorch(1);
    job.job_preparation = Some(v1::JobPreparation {
        command_line: "true".into(),
    });
    let value = "$AZ_BATCHAI_TASK_INDEX".into();
    job.environment_variables = vec![v1::NameValuePair {
        name: "ME".into(),
        value,
    }];
    let plan = plan_of(1, 0, job);
    assert_eq!(plan.processes[0].env["ME"], "0");
    assert!(!plan.preparation.command.unwrap().env.contains_key("ME"));
    let mut job = custom();
    job.job_preparation = Some(v1::JobPreparation {
        command_line: "true".into(),
    });
    let preparation = plan_of(1, 0, job).preparation;
    assert_eq!(preparation.command.unwrap().stdout, "stdout-job_prep.txt");
    assert_eq!(preparation.execution_log, "execution.log");
}

#[test]
fn processes_are_at_home_with_whom_they_run_as() {
    let user = JobUser {
        name: "ada".into(),
        uid: 7,
        gid: 8,
        groups: vec![8, 9],
        home: "/home/ada".into(),
    };
    let facts = HostFacts {
        users: JobUsers::One(user.clone()),
        ..facts()
    };
    let plan = plan(&assignment(1, 0, custom()), &facts).unwrap();
    assert_eq!(plan.preparation.user, Some(user));
    let env = &plan.processes[0].env;
    assert_eq!(
        (env["HOME"].as_str(), env["USER"].as_str()),
        ("/home/ada", "ada")
    );
}

#[test]
fn the_port_of_the_rendezvous_is_rank_0s_and_of_nobody_who_has_none() {
    let of = |hosts: usize, index: usize, job: Job| plan_of(hosts, index, job).preparation.ports;
    assert_eq!(of(2, 0, pytorch(2)), [20_000]);
    assert!(of(2, 1, pytorch(2)).is_empty());
    assert!(of(2, 0, custom()).is_empty());
}
