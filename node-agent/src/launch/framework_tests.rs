//! What launchers make of jobs of several shapes: golden ones, and what holds for all of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::tests::{assignment, facts};
use super::*;
use batchai_proto::v1;

const SECRET: &str = "do-not-show-me";

fn tensorflow(workers: i32, servers: i32) -> Job {
    Job {
        tensor_flow_settings: Some(v1::TensorFlowSettings {
            python_script_file_path: "$AZ_BATCHAI_JOB_TEMP/t.py".into(),
            master_command_line_args: "--job_name=worker --index=$AZ_BATCHAI_TASK_INDEX \
                                       --ps=$AZ_BATCHAI_PS_HOSTS --workers=${AZ_BATCHAI_WORKER_HOSTS} --master"
                .into(),
            worker_command_line_args: "--job_name=worker --index=$AZ_BATCHAI_TASK_INDEX".into(),
            parameter_server_command_line_args: "--job_name=ps --index=$AZ_BATCHAI_TASK_INDEX"
                .into(),
            worker_count: workers,
            parameter_server_count: servers,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn caffe2() -> Job {
    Job {
        caffe2_settings: Some(v1::Caffe2Settings {
            python_script_file_path: "r.py".into(),
            python_interpreter_path: "/opt/py/bin/python".into(),
            command_line_args:
                "--num_shards 2 --shard_id $AZ_BATCHAI_TASK_INDEX --file_store_path \
                                $AZ_BATCHAI_SHARED_JOB_TEMP"
                    .into(),
        }),
        ..Default::default()
    }
}

fn pytorch(processes: i32) -> Job {
    Job {
        py_torch_settings: Some(v1::PyTorchSettings {
            python_script_file_path: "t.py".into(),
            process_count: processes,
            communication_backend: "gloo".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn custom(each: i32) -> Job {
    Job {
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: "true".into(),
            processes_per_node: each,
        }),
        ..Default::default()
    }
}

/// On hosts that share a machine, or do not. All hosts have the same first port, as those of several machines may.
fn plans(job: &Job, hosts: usize, one_machine: bool) -> Vec<Plan> {
    let plan_of = |index: usize| {
        let mut assignment = assignment(hosts, index, job.clone());
        for (i, host) in assignment.hosts.iter_mut().enumerate() {
            if one_machine {
                host.boot_id = "same".into();
                host.port = 2222 + 100 * i as i32;
            } else {
                host.port = 2222;
            }
        }
        plan(&assignment, &facts()).unwrap()
    };
    (0..hosts).map(plan_of).collect()
}

/// Who runs where, with what and under which name.
fn golden(job: &Job, hosts: usize, variables: &[&str]) -> String {
    let mut text = String::new();
    for (host, plan) in plans(job, hosts, true).iter().enumerate() {
        writeln!(text, "host {host} listens at {:?}", plan.preparation.ports).unwrap();
        for process in &plan.processes {
            let found = format!("/bin/bash -c exec {} \"$@\" python ", script::python(false));
            let argv = process.argv.join(" ").replace(&found, "python3 ");
            let rank = process.rank;
            writeln!(text, "  rank {rank} to {}: {argv}", process.stdout).unwrap();
            for name in variables {
                let value = process.env.get(*name).map_or("-", String::as_str);
                writeln!(text, "    {name}={value}").unwrap();
            }
        }
    }
    text
}

fn same(golden: &str, expected: &str) {
    let plain = |text: &str| -> Vec<String> {
        let lines = text.lines().map(|line| line.trim().to_owned());
        lines.filter(|line| !line.is_empty()).collect()
    };
    assert_eq!(plain(golden), plain(expected), "\n{golden}");
}

#[test]
fn servers_and_workers_are_where_the_originals_dump_has_them() {
    let mut job = tensorflow(3, 1);
    let settings = job.tensor_flow_settings.as_mut().unwrap();
    settings.master_command_line_args = "master".into();
    // The dump is of three machines, each of which counts from 2222.
    let of = plans(&job, 3, false);
    let config = |host: usize, process: usize| -> Value {
        serde_json::from_str(&of[host].processes[process].env["TF_CONFIG"]).unwrap()
    };
    let cluster = json!({
        "ps": ["10.0.0.4:2222"],
        "worker": ["10.0.0.4:2223", "10.0.0.5:2222", "10.0.0.6:2222"],
    });
    for (host, process, role, index) in [
        (0, 0, "ps", 0),
        (0, 1, "worker", 0),
        (1, 0, "worker", 1),
        (2, 0, "worker", 2),
    ] {
        let expected = json!({
            "cluster": cluster,
            "task": { "type": role, "index": index },
            "environment": "cloud",
        });
        assert_eq!(config(host, process), expected);
        let env = &of[host].processes[process].env;
        assert_eq!(env["AZ_BATCHAI_PS_HOSTS"], "10.0.0.4:2222");
        assert_eq!(
            env["AZ_BATCHAI_WORKER_HOSTS"],
            "10.0.0.4:2223,10.0.0.5:2222,10.0.0.6:2222"
        );
    }
    let expected = "
        host 0 listens at [2222, 2223]
        rank 3 to stdout-ps-0.txt: python3 /r/jobs/w/e/j/t.py --job_name=ps --index=0
        rank 0 to stdout-wk-0.txt: python3 /r/jobs/w/e/j/t.py master
        host 1 listens at [2322]
        rank 1 to stdout-wk-1.txt: python3 /r/jobs/w/e/j/t.py --job_name=worker --index=1
        host 2 listens at [2422]
        rank 2 to stdout-wk-2.txt: python3 /r/jobs/w/e/j/t.py --job_name=worker --index=2";
    same(&golden(&job, 3, &[]), expected);
}

#[test]
fn one_process_has_the_masters_arguments_and_no_cluster() {
    let names = [
        "AZ_BATCHAI_PS_HOSTS",
        "AZ_BATCHAI_WORKER_HOSTS",
        "AZ_BATCHAI_TASK_INDEX",
        "TF_CONFIG",
    ];
    let expected = "
        host 0 listens at [2222]
        rank 0 to stdout-wk-0.txt: python3 /r/jobs/w/e/j/t.py --job_name=worker --index=0 --ps= --workers=10.0.0.4:2222 --master
        AZ_BATCHAI_PS_HOSTS=
        AZ_BATCHAI_WORKER_HOSTS=10.0.0.4:2222
        AZ_BATCHAI_TASK_INDEX=0
        TF_CONFIG=-";
    same(&golden(&tensorflow(1, 0), 1, &names), expected);
}

#[test]
fn workers_without_servers_have_no_empty_role() {
    let expected = r#"
        host 0 listens at [2222]
        rank 0 to stdout-wk-0.txt: python3 t.py
        TF_CONFIG={"cluster":{"worker":["10.0.0.4:2222","10.0.0.5:2322"]},"environment":"cloud","task":{"index":0,"type":"worker"}}
        host 1 listens at [2322]
        rank 1 to stdout-wk-1.txt: python3 t.py
        TF_CONFIG={"cluster":{"worker":["10.0.0.4:2222","10.0.0.5:2322"]},"environment":"cloud","task":{"index":1,"type":"worker"}}"#;
    let job = Job {
        tensor_flow_settings: Some(v1::TensorFlowSettings {
            python_script_file_path: "t.py".into(),
            worker_count: 2,
            ..Default::default()
        }),
        ..Default::default()
    };
    same(&golden(&job, 2, &["TF_CONFIG"]), expected);
}

#[test]
fn servers_have_nodes_of_their_own_where_there_are_more_nodes_than_workers() {
    let mut job = tensorflow(2, 1);
    let settings = job.tensor_flow_settings.as_mut().unwrap();
    settings.master_command_line_args.clear();
    let expected = "
        host 0 listens at [2222]
        rank 0 to stdout-wk-0.txt: python3 /r/jobs/w/e/j/t.py
        AZ_BATCHAI_PS_HOSTS=10.0.0.6:2422
        host 1 listens at [2322]
        rank 1 to stdout-wk-1.txt: python3 /r/jobs/w/e/j/t.py --job_name=worker --index=1
        AZ_BATCHAI_PS_HOSTS=10.0.0.6:2422
        host 2 listens at [2422]
        rank 2 to stdout-ps-0.txt: python3 /r/jobs/w/e/j/t.py --job_name=ps --index=0
        AZ_BATCHAI_PS_HOSTS=10.0.0.6:2422";
    same(&golden(&job, 3, &["AZ_BATCHAI_PS_HOSTS"]), expected);
}

#[test]
fn every_role_has_its_arguments_and_all_have_one_script_and_interpreter() {
    let job = Job {
        tensor_flow_settings: Some(v1::TensorFlowSettings {
            python_script_file_path: "t.py".into(),
            python_interpreter_path: "$AZ_BATCHAI_MOUNT_ROOT/python".into(),
            master_command_line_args: "--name 'the first'".into(),
            worker_command_line_args: "--name another".into(),
            parameter_server_command_line_args: "--name server".into(),
            worker_count: 2,
            parameter_server_count: 1,
        }),
        ..Default::default()
    };
    let plans = plans(&job, 1, true);
    let of = |i: usize| plans[0].processes[i].argv.clone();
    let python = "/r/mounts/python";
    assert_eq!(of(0), [python, "t.py", "--name", "server"]);
    assert_eq!(of(1), [python, "t.py", "--name", "the first"]);
    assert_eq!(of(2), [python, "t.py", "--name", "another"]);
}

#[test]
fn a_caffe2_job_has_its_interpreter_script_and_arguments() {
    let job = Job {
        caffe2_settings: Some(v1::Caffe2Settings {
            python_script_file_path: "r.py".into(),
            python_interpreter_path: String::new(),
            command_line_args: "--node $AZ_BATCHAI_TASK_INDEX".into(),
        }),
        ..Default::default()
    };
    let plans = plans(&job, 3, true);
    for (node, plan) in plans.iter().enumerate() {
        assert_eq!(plan.processes.len(), 1);
        let argv = ["python", "r.py", "--node", &node.to_string()];
        assert_eq!(plan.processes[0].argv[3..], argv);
    }
}

#[test]
fn caffe2_runs_once_on_every_node_over_a_shared_directory() {
    let expected = "
        host 0 listens at [2222]
        rank 0 to stdout-0.txt: /opt/py/bin/python r.py --num_shards 2 --shard_id 0 --file_store_path /root0/jobs/w/e/j/shared
        AZ_BATCHAI_TASK_INDEX=0
        host 1 listens at []
        rank 1 to stdout-1.txt: /opt/py/bin/python r.py --num_shards 2 --shard_id 1 --file_store_path /root0/jobs/w/e/j/shared
        AZ_BATCHAI_TASK_INDEX=1";
    same(&golden(&caffe2(), 2, &["AZ_BATCHAI_TASK_INDEX"]), expected);
}

#[test]
fn nodes_of_several_machines_share_what_the_masters_serves() {
    // The first two are on one machine, the others are not.
    let mut assignment = assignment(4, 0, caffe2());
    for (host, boot_id) in assignment.hosts.iter_mut().zip(["a", "a", "b", "b"]) {
        host.boot_id = boot_id.into();
    }
    let plan_at = |index: usize| {
        let assignment = Assignment {
            host_index: index as i32,
            ..assignment.clone()
        };
        let facts = HostFacts {
            root: format!("/root{index}"),
            ..facts()
        };
        plan(&assignment, &facts).unwrap()
    };
    let here = "/root0/jobs/w/e/j/shared";
    for (index, path) in [
        here,
        here,
        "/root2/jobs/w/e/j/shared",
        "/root3/jobs/w/e/j/shared",
    ]
    .into_iter()
    .enumerate()
    {
        let plan = plan_at(index);
        let env = &plan.processes[0].env;
        assert_eq!(env["AZ_BATCHAI_SHARED_JOB_TEMP"], path, "{index}");
        assert!(plan.processes[0].argv.contains(&path.to_owned()));
        let preparation = &plan.preparation;
        let makes = preparation.directories.iter().any(|made| made == here);
        assert_eq!(makes, index == 0, "{index}");
        let last = preparation.directories.last().map(String::as_str);
        assert_eq!(last == Some("/root0/jobs/.shared/1-7"), index == 0);
        let waits = preparation.wait_for.as_ref().map(|it| it.path.as_str());
        let waits = waits == Some("/root0/jobs/.shared/1-7");
        assert_eq!(waits, index == 1, "{index}");
        let mounted: Vec<_> = preparation.mount_points.iter().collect();
        assert_eq!(mounted == [path], index > 1, "{index}");
    }
    let served = plan_at(0).preparation.serve.unwrap();
    assert_eq!(served.node, "nodes/n0");
    assert_eq!(served.directory, here);
    // Behind that of the rendezvous, which rank 0 listens to.
    assert_eq!(served.listen.to_string(), "10.0.0.4:20001");
    let clients: Vec<_> = served.clients.iter().map(ToString::to_string).collect();
    assert_eq!(clients, ["10.0.0.6", "10.0.0.7"]);
    assert_eq!(plan_at(0).preparation.ports, [20_000]);
    assert!((1..4).all(|index| plan_at(index).preparation.serve.is_none()));
    let [mount] = &plan_at(2).mounts[..] else {
        panic!("{:?}", plan_at(2).mounts)
    };
    let how = How::Nfs {
        address: "10.0.0.4".into(),
        port: 20_001,
        version: 3,
        directory: "/".into(),
        options: String::new(),
        fresh: true,
    };
    assert_eq!((&mount.how, mount.wait_s), (&how, 300));
    assert_eq!(
        mount.what,
        "$AZ_BATCHAI_SHARED_JOB_TEMP on nodes/n2, from nodes/n0"
    );
}

#[test]
fn a_job_that_does_not_name_what_its_nodes_share_serves_mounts_and_awaits_nothing() {
    for one_machine in [true, false] {
        for plan in plans(&pytorch(2), 2, one_machine) {
            let Preparation {
                serve,
                wait_for,
                directories,
                ..
            } = plan.preparation;
            assert!(serve.is_none() && wait_for.is_none() && plan.mounts.is_empty());
            assert!(!directories.iter().any(|path| path.contains("/.shared/")));
        }
    }
    // Nor one of a single node that does, nor one of one machine but that its nodes wait for the first.
    let alone = plans(&caffe2(), 1, false).remove(0).preparation;
    assert!(alone.serve.is_none() && alone.wait_for.is_none());
    let [first, second] = &plans(&caffe2(), 2, true)[..] else {
        panic!()
    };
    assert!(first.preparation.serve.is_none() && first.preparation.wait_for.is_none());
    assert!(second.mounts.is_empty() && second.preparation.wait_for.is_some());
}

#[test]
fn what_is_served_is_behind_the_ports_of_all_processes_and_not_for_a_crowd() {
    let named = |mut job: Job| {
        job.job_preparation = Some(v1::JobPreparation {
            command_line: "ls $AZ_BATCHAI_SHARED_JOB_TEMP".into(),
        });
        job
    };
    for job in [tensorflow(5, 2), custom(2), custom(0), pytorch(2)] {
        let job = named(job);
        let plans = plans(&job, 2, false);
        let own = &plans[0].preparation;
        let port = own.serve.as_ref().unwrap().listen.port();
        assert!(own.ports.iter().all(|own| *own < port), "{port}");
        let most = own.ports.len().max(1) as u16;
        assert_eq!(port, 2222 + most);
        let How::Nfs { port: mounted, .. } = &plans[1].mounts[0].how else {
            panic!()
        };
        assert_eq!(*mounted, port);
        assert!(plans.iter().all(|plan| {
            let env = &plan.preparation.command.as_ref().unwrap().env;
            env.contains_key("AZ_BATCHAI_SHARED_JOB_TEMP")
        }));
    }
    let mut crowd = assignment(300, 0, named(custom(1)));
    for (i, host) in crowd.hosts.iter_mut().enumerate() {
        host.address = format!("10.0.{}.{}", i / 200, i % 200 + 1);
    }
    let refused = plan(&crowd, &facts()).unwrap_err().to_string();
    assert!(
        refused.contains("299") && refused.contains("256"),
        "{refused}"
    );
}

#[test]
fn pytorch_meets_in_a_file_where_the_job_says_so() {
    let mut job = pytorch(2);
    let settings = job.py_torch_settings.as_mut().unwrap();
    settings.command_line_args = "--dist-url file://$AZ_BATCHAI_SHARED_JOB_TEMP/meet".into();
    let expected = "
        host 0 listens at [2222]
        rank 0 to stdout-0.txt: python3 t.py --dist-url file:///root0/jobs/w/e/j/shared/meet
        host 1 listens at []
        rank 1 to stdout-1.txt: python3 t.py --dist-url file:///root0/jobs/w/e/j/shared/meet";
    same(&golden(&job, 2, &[]), expected);
}

/// Jobs of every kind that this agent launches, over one to three hosts, with one, two or eight processes.
fn any_job() -> impl Strategy<Value = (Job, usize)> {
    let shapes = (1..4_usize, prop::sample::select(vec![1, 2, 8]));
    let job = (shapes, 0..4_usize, 0..4_i32).prop_map(|((hosts, processes), kind, servers)| {
        let least = hosts as i32;
        let job = match kind {
            0 => pytorch(processes.max(least)),
            1 => tensorflow(processes.max(least - servers), servers.min(least)),
            2 => caffe2(),
            _ => custom(processes),
        };
        (job, hosts)
    });
    job.prop_map(|(job, hosts)| {
        let secrets = vec![v1::EnvironmentVariableWithSecretValue {
            name: "TOKEN".into(),
            value: SECRET.into(),
            ..Default::default()
        }];
        let shown = vec![v1::NameValuePair {
            name: "SHOWN".into(),
            value: "$AZ_BATCHAI_JOB_TEMP".into(),
        }];
        let job = Job {
            secrets,
            environment_variables: shown,
            ..job
        };
        (job, hosts)
    })
}

proptest! {
    #[test]
    fn ranks_are_all_there_once_and_nothing_is_shared_that_must_not((job, hosts) in any_job()) {
        let plans = plans(&job, hosts, true);
        let all: Vec<_> = plans.iter().flat_map(|plan| &plan.processes).collect();
        let mut ranks: Vec<_> = all.iter().map(|process| process.rank).collect();
        ranks.sort_unstable();
        prop_assert_eq!(ranks, (0..all.len() as i32).collect::<Vec<_>>());
        let mut ports: Vec<_> = plans.iter().flat_map(|p| p.preparation.ports.clone()).collect();
        ports.sort_unstable();
        ports.dedup();
        prop_assert_eq!(ports.len(), plans.iter().map(|p| p.preparation.ports.len()).sum::<usize>());
        let mut files = BTreeMap::new();
        for process in &all {
            *files.entry(&process.stdout).or_insert(0) += 1;
            *files.entry(&process.stderr).or_insert(0) += 1;
            prop_assert!(process.argv.iter().all(|word| !word.contains(SECRET)));
            prop_assert!(!process.env.values().any(|value| value.contains(SECRET)));
            prop_assert_eq!(&process.env["SHOWN"], "/r/jobs/w/e/j");
        }
        prop_assert!(files.values().all(|count| *count == 1), "{:?}", files);
        for plan in &plans {
            prop_assert!(!plan.processes.is_empty(), "a host is unused");
        }
        if job.tensor_flow_settings.is_some() {
            // Every process has an address of its own, at a port that its host probes.
            let env = &all[0].env;
            let lists = ["AZ_BATCHAI_PS_HOSTS", "AZ_BATCHAI_WORKER_HOSTS"].map(|name| env[name].clone());
            let mut addresses: Vec<_> = lists.iter().flat_map(|list| list.split(',')).collect();
            addresses.retain(|address| !address.is_empty());
            prop_assert_eq!(addresses.len(), all.len());
            for address in &addresses {
                let (host, port) = address.rsplit_once(':').unwrap();
                let at = (0..hosts).find(|i| host == format!("10.0.0.{}", i + 4)).unwrap();
                prop_assert!(plans[at].preparation.ports.contains(&port.parse().unwrap()));
            }
            addresses.sort_unstable();
            addresses.dedup();
            prop_assert_eq!(addresses.len(), all.len());
        }
    }
}

const GPUS: [&str; 3] = [
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
];

#[test]
fn workers_of_tensorflow_share_gpus_out_and_servers_see_none() {
    let mut job = tensorflow(3, 1);
    let settings = job.tensor_flow_settings.as_mut().unwrap();
    settings.master_command_line_args.clear();
    settings.worker_command_line_args.clear();
    settings.parameter_server_command_line_args.clear();
    let expected = "
        host 0 listens at [2222, 2223, 2224]
        rank 3 to stdout-ps-0.txt: python3 /r/jobs/w/e/j/t.py
        CUDA_DEVICE_ORDER=PCI_BUS_ID
        CUDA_VISIBLE_DEVICES=
        ROCR_VISIBLE_DEVICES=-
        rank 0 to stdout-wk-0.txt: python3 /r/jobs/w/e/j/t.py
        CUDA_DEVICE_ORDER=PCI_BUS_ID
        CUDA_VISIBLE_DEVICES=0,1
        ROCR_VISIBLE_DEVICES=-
        rank 1 to stdout-wk-1.txt: python3 /r/jobs/w/e/j/t.py
        CUDA_DEVICE_ORDER=PCI_BUS_ID
        CUDA_VISIBLE_DEVICES=2,3
        ROCR_VISIBLE_DEVICES=-
        host 1 listens at [2322]
        rank 2 to stdout-wk-2.txt: python3 /r/jobs/w/e/j/t.py
        CUDA_DEVICE_ORDER=PCI_BUS_ID
        CUDA_VISIBLE_DEVICES=0,1,2,3
        ROCR_VISIBLE_DEVICES=-";
    same(&golden(&job, 2, &GPUS), expected);
}

#[test]
fn ranks_see_all_gpus_of_their_host_unless_the_job_says_otherwise() {
    let seen = |job: &Job, name: &str| -> Vec<Option<String>> {
        let plans = plans(job, 2, true);
        let processes = plans.iter().flat_map(|plan| &plan.processes);
        processes.map(|it| it.env.get(name).cloned()).collect()
    };
    let all = Some("0,1,2,3".to_owned());
    for (job, ranks) in [
        (pytorch(4), 4),
        (custom(2), 4),
        (custom(0), 1),
        (caffe2(), 2),
    ] {
        assert_eq!(seen(&job, GPUS[1]), vec![all.clone(); ranks]);
        assert_eq!(seen(&job, GPUS[2]), vec![None; ranks]);
    }
    let mut own = pytorch(4);
    own.job_preparation = Some(v1::JobPreparation {
        command_line: "true".into(),
    });
    own.environment_variables = vec![v1::NameValuePair {
        name: GPUS[1].into(),
        value: "$AZ_BATCHAI_TASK_INDEX".into(),
    }];
    let expected = ["0", "1", "2", "3"].map(|rank| Some(rank.to_owned()));
    assert_eq!(seen(&own, GPUS[1]), expected);
}

#[test]
fn a_host_without_gpus_says_nothing_of_them() {
    let none = HostFacts {
        gpus: Vec::new(),
        ..facts()
    };
    for job in [pytorch(2), custom(0), tensorflow(2, 1), caffe2()] {
        let plan = plan(&assignment(1, 0, job), &none).unwrap();
        assert!(plan.preparation.gpus.is_empty());
        for process in &plan.processes {
            assert_eq!(process.env["AZ_BATCHAI_NUM_GPUS"], "0");
            assert!(GPUS.iter().all(|name| !process.env.contains_key(*name)));
        }
    }
}

/// Golden: no program that reads these was run with such a device.
#[test]
fn infiniband_is_told_of_where_all_hosts_have_it() {
    let names = ["I_MPI_FABRICS", "NCCL_IB_HCA", "UCX_NET_DEVICES"];
    let told = |ports: &[&str], hosts: [bool; 2], own: &[(&str, &str)]| -> Vec<String> {
        let facts = HostFacts {
            infiniband: ports.iter().map(|port| (*port).to_owned()).collect(),
            ..facts()
        };
        let own = own.iter().map(|(name, value)| v1::NameValuePair {
            name: (*name).to_owned(),
            value: (*value).to_owned(),
        });
        let mut assignment = assignment(2, 0, custom(1));
        let job = assignment.job.as_mut().unwrap();
        job.environment_variables = own.collect();
        for (host, has) in assignment.hosts.iter_mut().zip(hosts) {
            host.infiniband = has;
        }
        let plan = plan(&assignment, &facts).unwrap();
        let env = &plan.processes[0].env;
        let values = names.iter().filter_map(|name| env.get(*name));
        values.cloned().collect()
    };
    let one = ["shm:ofi", "=mlx5_0:1"];
    assert_eq!(told(&["mlx5_0:1"], [true, true], &[]), one);
    let two = ["shm:ofi", "=mlx5_0:1,mlx5_2:1"];
    assert_eq!(told(&["mlx5_0:1", "mlx5_2:1"], [true, true], &[]), two);
    let own = [("I_MPI_FABRICS", "dapl"), ("NCCL_IB_HCA", "mlx5_9")];
    let expected = ["dapl", "mlx5_9"];
    assert_eq!(told(&["mlx5_0:1"], [true, true], &own), expected);
    // By TCP, all of them.
    assert!(told(&["mlx5_0:1"], [true, false], &[]).is_empty());
    assert!(told(&[], [true, true], &[]).is_empty());
}
