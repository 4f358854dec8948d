use batchai_common::error::ApiError;

use super::*;
use batchai_proto::v1::{self, PyTorchSettings};

/// A job's settings with nothing in them that a check would mind.
fn valid() -> Job {
    Job {
        cluster: "resourceGroups/g/workspaces/w/clusters/c".into(),
        node_count: 2,
        std_out_err_path_prefix: "$AZ_BATCHAI_MOUNT_ROOT/logs".into(),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line: "true".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn limited(job: &mut Job, change: fn(&mut v1::ResourceLimits)) {
    change(job.resource_limits.get_or_insert_default());
}

fn faults_of(job: Job) -> Result<Job, ApiError> {
    let mut faults = Faults::default();
    let job = check(&mut faults, job);
    faults.finish(Some(job))
}

#[test]
fn defaults_are_filled_in() {
    let job = faults_of(valid()).unwrap();
    assert_eq!(job.scheduling_priority(), SchedulingPriority::Normal);
    assert_eq!(
        job.constraints
            .unwrap()
            .max_wall_clock_time
            .unwrap()
            .seconds,
        604_800
    );
    let torch = Job {
        custom_toolkit_settings: None,
        py_torch_settings: Some(PyTorchSettings {
            python_script_file_path: "/a.py".into(),
            communication_backend: "Gloo".into(),
            ..Default::default()
        }),
        ..valid()
    };
    let torch = faults_of(torch).unwrap().py_torch_settings.unwrap();
    assert_eq!(
        (torch.process_count, torch.communication_backend.as_str()),
        (2, "gloo")
    );
}

#[test]
fn tensorflow_has_a_worker_on_every_node_and_a_server_where_servers_have_arguments() {
    let counts = |nodes: i32, change: fn(&mut v1::TensorFlowSettings)| {
        let mut settings = v1::TensorFlowSettings {
            python_script_file_path: "/a.py".into(),
            ..Default::default()
        };
        change(&mut settings);
        let job = Job {
            custom_toolkit_settings: None,
            tensor_flow_settings: Some(settings),
            node_count: nodes,
            ..valid()
        };
        let settings = faults_of(job).unwrap().tensor_flow_settings.unwrap();
        (settings.worker_count, settings.parameter_server_count)
    };
    assert_eq!(counts(1, |_| {}), (1, 0));
    assert_eq!(counts(2, |_| {}), (2, 0));
    let for_servers: fn(&mut v1::TensorFlowSettings) =
        |s| s.parameter_server_command_line_args = "--ps".into();
    assert_eq!(counts(3, for_servers), (3, 1));
    assert_eq!(counts(3, |s| s.worker_count = 3), (3, 0));
    assert_eq!(counts(2, |s| s.parameter_server_count = 2), (2, 2));
    assert_eq!(counts(2, |s| s.worker_count = 8), (8, 0));
}

#[test]
fn every_fault_is_named() {
    type Spoil = fn(&mut Job);
    let cases: [(&str, Spoil); 31] = [
        ("job.cluster", |j| j.cluster = "c".into()),
        ("job.node_count", |j| j.node_count = 0),
        ("job.node_count", |j| j.node_count = -3),
        ("job.scheduling_priority", |j| j.scheduling_priority = 9),
        ("job.std_out_err_path_prefix", |j| {
            j.std_out_err_path_prefix = "logs".into()
        }),
        ("job.std_out_err_path_prefix", |j| {
            j.std_out_err_path_prefix = "/a/../b".into()
        }),
        ("job.environment_variables[0].name", |j| {
            j.environment_variables = vec![v1::NameValuePair {
                name: "A=B".into(),
                ..Default::default()
            }];
        }),
        ("job.environment_variables[0].name", |j| {
            j.environment_variables = vec![v1::NameValuePair {
                name: "AZ_BATCHAI_X".into(),
                ..Default::default()
            }];
        }),
        ("job.environment_variables[1].name", |j| {
            j.environment_variables = vec![
                v1::NameValuePair {
                    name: "A".into(),
                    ..Default::default()
                };
                2
            ];
        }),
        ("job.input_directories[0].id", |j| {
            j.input_directories = vec![v1::InputDirectory {
                id: "a-b".into(),
                path: "p".into(),
            }];
        }),
        ("job.output_directories[0].id", |j| {
            j.output_directories = vec![v1::OutputDirectory {
                id: "stdouterr".into(),
                path_prefix: "/p".into(),
                path_suffix: String::new(),
            }];
        }),
        ("job.output_directories[0].path_suffix", |j| {
            j.output_directories = vec![v1::OutputDirectory {
                id: "A".into(),
                path_prefix: "/p".into(),
                path_suffix: "../x".into(),
            }];
        }),
        ("job.job_preparation.command_line", |j| {
            j.job_preparation = Some(v1::JobPreparation::default());
        }),
        ("job.constraints.max_wall_clock_time", |j| {
            let zero = prost_types::Duration::default();
            j.constraints = Some(JobConstraints {
                max_wall_clock_time: Some(zero),
                max_retries: 0,
            });
        }),
        ("job.constraints.max_retries", |j| {
            j.constraints = Some(JobConstraints {
                max_wall_clock_time: None,
                max_retries: 101,
            });
        }),
        ("job.constraints.max_retries", |j| {
            j.constraints = Some(JobConstraints {
                max_wall_clock_time: None,
                max_retries: -1,
            });
        }),
        ("job.resource_limits.cpus", |j| {
            limited(j, |l| l.cpus = 0.001)
        }),
        ("job.resource_limits.cpus", |j| {
            limited(j, |l| l.cpus = f64::NAN)
        }),
        ("job.resource_limits.cpus", |j| {
            limited(j, |l| l.cpus = f64::INFINITY)
        }),
        ("job.resource_limits.memory_mib", |j| {
            limited(j, |l| l.memory_mib = 15)
        }),
        ("job.resource_limits.memory_mib", |j| {
            limited(j, |l| l.memory_mib = i64::MAX)
        }),
        ("job.resource_limits.pids", |j| limited(j, |l| l.pids = -1)),
        ("job.retry_count", |j| j.retry_count = 1),
        ("job", |j| j.custom_toolkit_settings = None),
        ("job", |j| {
            j.py_torch_settings = Some(PyTorchSettings {
                python_script_file_path: "x".into(),
                ..Default::default()
            })
        }),
        ("job.custom_toolkit_settings.command_line", |j| {
            j.custom_toolkit_settings = Some(v1::CustomToolkitSettings::default());
        }),
        ("job.state", |j| j.state = 2),
        ("job.exit_code", |j| j.exit_code = Some(0)),
        ("job", |j| {
            j.job_preparation = Some(v1::JobPreparation {
                command_line: "x".repeat(100_000),
            });
            j.custom_toolkit_settings = Some(v1::CustomToolkitSettings {
                command_line: "x".repeat(100_000),
                ..Default::default()
            });
            j.std_out_err_path_prefix = "/x".into();
            j.environment_variables = vec![v1::NameValuePair {
                name: "A".into(),
                value: "x".repeat(100_000),
            }];
        }),
        ("job.py_torch_settings.process_count", |j| {
            j.custom_toolkit_settings = None;
            j.py_torch_settings = Some(PyTorchSettings {
                python_script_file_path: "x".into(),
                process_count: 1,
                ..Default::default()
            });
        }),
        ("job.py_torch_settings.command_line_args", |j| {
            j.custom_toolkit_settings = None;
            j.py_torch_settings = Some(PyTorchSettings {
                python_script_file_path: "x".into(),
                command_line_args: "a 'b".into(),
                ..Default::default()
            });
        }),
    ];
    for (field, spoil) in cases {
        let mut job = valid();
        spoil(&mut job);
        let Err(ApiError::Invalid(faults)) = faults_of(job) else {
            panic!("{field} passed")
        };
        assert_eq!(faults.len(), 1, "{field}: {faults:?}");
        assert_eq!(faults[0].field, field);
    }
}

fn in_a_container(change: impl FnOnce(&mut v1::ContainerSettings)) -> Job {
    let mut container = v1::ContainerSettings {
        image_source_registry: Some(v1::ImageSourceRegistry {
            image: "team.example.org/vision/train:1".into(),
            server_url: "https://team.example.org".into(),
            credentials: Some(v1::PrivateRegistryCredentials {
                username: "reader".into(),
                password: "hunter2".into(),
                ..Default::default()
            }),
        }),
        shm_size: "1g".into(),
    };
    change(&mut container);
    Job {
        container_settings: Some(container),
        ..valid()
    }
}

#[test]
fn several_faults_are_named_at_once_and_what_is_not_served_is_told_apart() {
    let reference = || v1::KeyVaultSecretReference {
        source_vault: "vault".into(),
        secret_url: "https://vault/secret".into(),
    };
    let mut job = in_a_container(|container| {
        let registry = container.image_source_registry.as_mut().unwrap();
        let credentials = registry.credentials.as_mut().unwrap();
        credentials.password.clear();
        credentials.password_secret_reference = Some(reference());
    });
    let Err(ApiError::NotServed(faults)) = faults_of(job.clone()) else {
        panic!()
    };
    let field =
        "job.container_settings.image_source_registry.credentials.password_secret_reference";
    assert_eq!(faults[0].field, field);
    job.node_count = 0;
    job.cluster = String::new();
    let Err(ApiError::Invalid(faults)) = faults_of(job) else {
        panic!()
    };
    assert_eq!(faults.len(), 3);
}

#[test]
fn an_image_is_well_named_and_credentials_are_for_its_registry_only() {
    type Change = fn(&mut v1::ImageSourceRegistry);
    let of = |change: Change| {
        in_a_container(|container| change(container.image_source_registry.as_mut().unwrap()))
    };
    assert!(faults_of(of(|_| {})).is_ok());
    for image in [
        "ubuntu:22.04",
        "localhost/mine",
        "rootfs:$AZ_BATCHAI_MOUNT_ROOT/images/a",
        "docker-archive:/a.tar",
    ] {
        let plain = in_a_container(|container| {
            container.image_source_registry = Some(v1::ImageSourceRegistry {
                image: image.into(),
                ..Default::default()
            });
        });
        assert!(faults_of(plain).is_ok(), "{image}");
    }
    let refused = |job: Job| {
        let Err(ApiError::Invalid(faults)) = faults_of(job) else {
            panic!("it passed")
        };
        let name = |field: &str| field.rsplit('.').next().unwrap().to_owned();
        let fields: Vec<_> = faults.iter().map(|fault| name(&fault.field)).collect();
        fields.join(" ")
    };
    assert_eq!(refused(of(|r| r.image = "--privileged".into())), "image");
    assert_eq!(refused(of(|r| r.image = "rootfs:/a".into())), "image");
    assert_eq!(refused(of(|r| r.image = "ubuntu".into())), "server_url");
    assert_eq!(refused(of(|r| r.server_url = "-x".into())), "server_url");
    let name = |r: &mut v1::ImageSourceRegistry, name: &str| {
        r.credentials.as_mut().unwrap().username = name.into();
    };
    assert_eq!(
        refused(of(|r| r.credentials = Some(Default::default()))),
        "username password"
    );
    let colon = in_a_container(|c| name(c.image_source_registry.as_mut().unwrap(), "a:b"));
    assert_eq!(refused(colon), "username");
    assert_eq!(
        refused(in_a_container(|c| c.shm_size = "much".into())),
        "shm_size"
    );
    let nothing = in_a_container(|c| c.image_source_registry = None);
    assert_eq!(refused(nothing), "image_source_registry");
}

#[test]
fn toolkits_of_mpi_have_one_process_per_node_unless_told() {
    let none = || Job {
        custom_toolkit_settings: None,
        node_count: 1,
        ..valid()
    };
    let script = || "train.py".to_owned();
    let horovod = v1::HorovodSettings {
        python_script_file_path: script(),
        ..Default::default()
    };
    let job = Job {
        horovod_settings: Some(horovod),
        ..none()
    };
    let settings = faults_of(job).unwrap().horovod_settings.unwrap();
    assert_eq!(settings.process_count, 1);
    let custom = v1::CustomMpiSettings {
        command_line: "true".into(),
        process_count: 8,
    };
    let job = Job {
        custom_mpi_settings: Some(custom),
        ..none()
    };
    let settings = faults_of(job).unwrap().custom_mpi_settings.unwrap();
    assert_eq!(settings.process_count, 8);
    let cntk = v1::CntkSettings {
        config_file_path: "a.cntk".into(),
        ..Default::default()
    };
    let job = Job {
        cntk_settings: Some(cntk),
        ..none()
    };
    let settings = faults_of(job).unwrap().cntk_settings.unwrap();
    assert_eq!(settings.language_type, "BrainScript");
    let torch = PyTorchSettings {
        python_script_file_path: script(),
        communication_backend: "MPI".into(),
        ..Default::default()
    };
    let job = Job {
        py_torch_settings: Some(torch),
        ..none()
    };
    let settings = faults_of(job).unwrap().py_torch_settings.unwrap();
    assert_eq!(settings.communication_backend, "mpi");
}

#[test]
fn blocks_that_are_not_served_are_checked_all_the_same() {
    let job = Job {
        mount_volumes: Some(v1::MountVolumes {
            azure_file_shares: vec![v1::AzureFileShare {
                account_name: "a".into(),
                azure_file_url: "https://a.invalid/share".into(),
                relative_mount_path: "../logs".into(),
                file_mode: "rwx".into(),
                ..Default::default()
            }],
            unmanaged_file_systems: vec![v1::UnmanagedFileSystem {
                mount_command: "mount -t nfs".into(),
                relative_mount_path: "/".into(),
            }],
            ..Default::default()
        }),
        secrets: vec![v1::EnvironmentVariableWithSecretValue {
            name: "S".into(),
            ..Default::default()
        }],
        ..valid()
    };
    let Err(ApiError::Invalid(faults)) = faults_of(job) else {
        panic!("it passed")
    };
    let fields: Vec<_> = faults.iter().map(|fault| fault.field.as_str()).collect();
    for field in [
        "job.secrets[0].value",
        "job.mount_volumes.azure_file_shares[0].credentials",
        "job.mount_volumes.azure_file_shares[0].file_mode",
        "job.mount_volumes.azure_file_shares[0].relative_mount_path",
        "job.mount_volumes.unmanaged_file_systems[0].relative_mount_path",
    ] {
        assert!(fields.contains(&field), "{field} in {fields:?}");
    }
    let only = |spoil: fn(&mut Job)| {
        let mut job = valid();
        job.custom_toolkit_settings = None;
        spoil(&mut job);
        match faults_of(job) {
            Err(ApiError::Invalid(faults)) => faults[0].field.clone(),
            other => panic!("{other:?}"),
        }
    };
    let caffe = only(|job| job.caffe_settings = Some(v1::CaffeSettings::default()));
    assert_eq!(caffe, "job.caffe_settings.config_file_path");
    let cntk = only(|job| {
        job.cntk_settings = Some(v1::CntkSettings {
            language_type: "Python".into(),
            config_file_path: "a.cntk".into(),
            ..Default::default()
        });
    });
    assert_eq!(cntk, "job.cntk_settings.language_type");
    let tensorflow = only(|job| {
        job.tensor_flow_settings = Some(v1::TensorFlowSettings {
            python_script_file_path: "a.py".into(),
            parameter_server_count: 3,
            ..Default::default()
        });
    });
    assert_eq!(
        tensorflow,
        "job.tensor_flow_settings.parameter_server_count"
    );
    let idle = only(|job| {
        job.node_count = 4;
        job.tensor_flow_settings = Some(v1::TensorFlowSettings {
            python_script_file_path: "a.py".into(),
            worker_count: 2,
            parameter_server_count: 1,
            ..Default::default()
        });
    });
    assert_eq!(idle, "job.tensor_flow_settings.worker_count");
    let mpi = only(|job| job.custom_mpi_settings = Some(v1::CustomMpiSettings::default()));
    assert_eq!(mpi, "job.custom_mpi_settings.command_line");
}
