//! The requests of the original's last API version (2018-05-01), in our form: each gets the documented answer, or the
//! refusal that the ledger of fields announces.

use batchai_proto::v1;
use batchai_tests::api::{Api, CLUSTER, EXPERIMENT, GROUP, WORKSPACE};
use batchai_tests::ensemble::{Ensemble, SIZE};
use batchai_tests::process::until;
use serde_json::{Value, json};
use tonic::{Code, Status};

/// A file of the original, sent by the command.
struct Example {
    name: &'static str,
    properties: Value,
}

const ROOT: &str = "$AZ_BATCHAI_JOB_MOUNT_ROOT";

fn job(settings: Value) -> Value {
    let mut properties = json!({
        "nodeCount": 2,
        "stdOutErrPathPrefix": format!("{ROOT}/logs"),
    });
    let all = properties.as_object_mut().unwrap();
    all.extend(settings.as_object().unwrap().clone());
    properties
}

/// What the recipes have: shares for logs and scripts, a container for data, an image.
fn recipe(image: &str, settings: Value) -> Value {
    let share = |name: &str| {
        json!({
            "accountName": "account",
            "azureFileUrl": format!("https://account.file.core.windows.net/{name}"),
            "relativeMountPath": name,
            "credentials": { "accountKey": "key" },
        })
    };
    let mut properties = job(settings);
    properties["mountVolumes"] = json!({
        "azureFileShares": [share("logs"), share("scripts")],
        "azureBlobFileSystems": [{
            "accountName": "account",
            "containerName": "data",
            "relativeMountPath": "data",
            "credentials": { "accountKey": "key" },
        }],
    });
    properties["containerSettings"] = json!({ "imageSourceRegistry": { "image": image } });
    properties
}

fn script(name: &str) -> String {
    format!("{ROOT}/scripts/{name}")
}

#[test]
fn the_job_files_of_the_recipes_are_taken_as_they_are() {
    let api = Api::start(Ensemble::with_cluster(0));
    let outputs = |ids: &[(&str, &str)]| {
        let one = |(id, suffix): &(&str, &str)| json!({ "id": id, "pathPrefix": format!("{ROOT}/logs"), "pathSuffix": suffix });
        ids.iter().map(one).collect::<Value>()
    };
    let distributed = "--ps_hosts=$AZ_BATCHAI_PS_HOSTS --worker_hosts=$AZ_BATCHAI_WORKER_HOSTS \
                       --task_index=$AZ_BATCHAI_TASK_INDEX";
    let examples = [
        Example {
            name: "tensorflow",
            properties: recipe(
                "tensorflow/tensorflow:1.8.0-gpu",
                json!({
                    "nodeCount": 1,
                    "tensorFlowSettings": { "pythonScriptFilePath": script("convolutional.py") },
                }),
            ),
        },
        Example {
            name: "tensorflow-distributed",
            properties: recipe(
                "tensorflow/tensorflow:1.8.0-gpu",
                json!({
                    "tensorFlowSettings": {
                        "pythonScriptFilePath": script("mnist_replica.py"),
                        "masterCommandLineArgs": format!("--job_name=worker {distributed}"),
                        "workerCommandLineArgs": format!("--job_name=worker {distributed}"),
                        "parameterServerCommandLineArgs": format!("--job_name=ps {distributed}"),
                        "workerCount": 2,
                        "parameterServerCount": 1,
                    },
                    "outputDirectories": outputs(&[("MODEL", "Models"), ("TENSORBOARD", "Logs")]),
                }),
            ),
        },
        Example {
            name: "cntk-python",
            properties: recipe(
                "microsoft/cntk:2.5.1-gpu-python2.7-cuda9.0-cudnn7.0",
                json!({
                    "cntkSettings": {
                        "pythonScriptFilePath": script("ConvNet_CIFAR10.py"),
                        "commandLineArgs": "-datadir $AZ_BATCHAI_JOB_TEMP -outputdir $AZ_BATCHAI_OUTPUT_MODEL",
                        "processCount": 2,
                    },
                    "jobPreparation": { "commandLine": format!("bash {}", script("download.sh")) },
                    "outputDirectories": outputs(&[("MODEL", "Models")]),
                }),
            ),
        },
        Example {
            name: "cntk-brainscript",
            properties: recipe(
                "microsoft/cntk:2.5.1",
                json!({
                    "cntkSettings": {
                        "languageType": "BrainScript",
                        "configFilePath": script("ConvNet_MNIST.cntk"),
                        "commandLineArgs": "rootDir=$AZ_BATCHAI_INPUT_DATASET parallelTrain=true",
                    },
                }),
            ),
        },
        Example {
            name: "horovod",
            properties: recipe(
                "tensorflow/tensorflow:1.8.0-gpu",
                json!({
                    "horovodSettings": { "pythonScriptFilePath": script("tensorflow_mnist.py") },
                    "jobPreparation": { "commandLine": "apt update; apt install mpi-default-dev -y" },
                }),
            ),
        },
        Example {
            name: "pytorch",
            properties: recipe(
                "pytorch/pytorch:0.4_cuda9_cudnn7",
                json!({
                    "pyTorchSettings": {
                        "pythonScriptFilePath": script("mnist_trainer.py"),
                        "communicationBackend": "gloo",
                        "commandLineArgs": "--epochs 10 --rank $AZ_BATCHAI_TASK_INDEX",
                    },
                }),
            ),
        },
        Example {
            name: "caffe2",
            properties: recipe(
                "caffe2ai/caffe2",
                json!({
                    "caffe2Settings": {
                        "pythonScriptFilePath": script("resnet50_trainer.py"),
                        "commandLineArgs": "--num_shards 2 --shard_id $AZ_BATCHAI_TASK_INDEX",
                    },
                }),
            ),
        },
        Example {
            name: "chainer",
            properties: recipe(
                "batchaitraining/chainermn:openMPI",
                json!({
                    "chainerSettings": {
                        "pythonScriptFilePath": script("train_mnist.py"),
                        "commandLineArgs": "-g -o $AZ_BATCHAI_OUTPUT_MODEL",
                    },
                    "outputDirectories": outputs(&[("MODEL", "model")]),
                }),
            ),
        },
        Example {
            name: "custom-mpi",
            properties: recipe(
                "tensorflow/tensorflow:1.7.0-gpu",
                json!({
                    "customMpiSettings": { "commandLine": "python $AZ_BATCHAI_INPUT_SCRIPT/score.py" },
                    "inputDirectories": [{ "id": "SCRIPT", "path": script("") }],
                }),
            ),
        },
        Example {
            name: "caffe",
            properties: recipe(
                "bvlc/caffe:gpu",
                json!({
                    "nodeCount": 1,
                    "caffeSettings": { "configFilePath": "$AZ_BATCHAI_INPUT_SAMPLE/lenet_solver.prototxt" },
                    "inputDirectories": [{ "id": "SAMPLE", "path": script("caffe") }],
                }),
            ),
        },
    ];
    let names = examples.each_ref().map(|example| example.name);
    for example in examples {
        let path = api.e.job_file(example.name, example.properties);
        let path = path.to_string_lossy();
        let mut args = vec!["job", "create", "-n", example.name, "-c", "c", "-f", &path];
        args.extend(batchai_tests::ensemble::IN);
        let made: Value = serde_json::from_str(&api.e.ok(&args)).unwrap();
        assert_eq!(made["state"], "QUEUED", "{made}");
        assert!(!made.to_string().contains("accountKey"), "{made}");
    }
    let list = v1::ListJobsRequest {
        parent: EXPERIMENT.into(),
        ..Default::default()
    };
    let list = api.call(api.jobs().list_jobs(list)).unwrap();
    assert_eq!(list.jobs.len(), names.len());
}

#[test]
fn the_smoke_test_of_the_original_runs() {
    let e = Ensemble::with_cluster(1);
    let out = e.path().join("out").to_string_lossy().into_owned();
    e.submit("smoke", json!({
        "nodeCount": 1,
        "stdOutErrPathPrefix": out,
        "customToolkitSettings": { "commandLine": "echo hi | tee $AZ_BATCHAI_OUTPUT_OUTPUT/result.txt" },
        "outputDirectories": [{ "id": "OUTPUT", "pathPrefix": out }],
    }));
    assert_eq!(e.wait("smoke"), 0);
    assert_eq!(e.log("smoke", "stdout.txt"), "hi\n");
    let segment = e.job("smoke")["jobOutputDirectoryPathSegment"]
        .as_str()
        .unwrap()
        .to_owned();
    let logs = e.path().join("out").join(&segment);
    let logs = logs.join("stdouterr/stdout.txt");
    assert_eq!(std::fs::read_to_string(logs).unwrap(), "hi\n");
    let result = e
        .path()
        .join("out")
        .join(segment)
        .join("outputs/result.txt");
    assert_eq!(std::fs::read_to_string(result).unwrap(), "hi\n");
}

#[test]
fn the_cluster_and_file_server_files_of_the_original_are_taken_or_refused_by_name() {
    let api = Api::start(Ensemble::with_cluster(0));
    let account = json!({ "adminUserName": "admin", "adminUserPassword": "pa55word" });
    let cluster = |more: Value| {
        let mut properties = json!({
            "vmSize": "STANDARD_NC6",
            "vmPriority": "dedicated",
            "userAccountSettings": account,
        });
        let all = properties.as_object_mut().unwrap();
        all.extend(more.as_object().unwrap().clone());
        properties
    };
    let manual = json!({ "manual": { "targetNodeCount": 1 } });
    let create_cluster = |id: &str, properties: Value| {
        let path = api.e.job_file(id, properties);
        // `job_file` writes any file of the original; this field is a job's.
        let text = std::fs::read_to_string(&path).unwrap();
        let mut file: Value = serde_json::from_str(&text).unwrap();
        file["properties"]
            .as_object_mut()
            .unwrap()
            .remove("stdOutErrPathPrefix");
        std::fs::write(&path, file.to_string()).unwrap();
        let path = path.to_string_lossy().into_owned();
        api.e.run(&[
            "cluster", "create", "-g", "g", "-w", "w", "-n", id, "-f", &path,
        ])
    };
    let taken = create_cluster(
        "manual",
        cluster(json!({
            "scaleSettings": { "manual": { "targetNodeCount": 1, "nodeDeallocationOption": "waitforjobcompletion" } },
            "virtualMachineConfiguration": {
                "imageReference": { "publisher": "Canonical", "offer": "UbuntuServer", "sku": "16.04-LTS" }
            },
            "subnet": { "id": "/subscriptions/s/subnets/n" },
        })),
    );
    assert!(
        taken.status.success(),
        "{}",
        String::from_utf8_lossy(&taken.stderr)
    );
    let shown: Value = serde_json::from_slice(&taken.stdout).unwrap();
    assert_eq!(shown["allocationState"], "RESIZING");
    assert_eq!(shown["warnings"][0]["field"], "user_account_settings");
    let task = json!({
        "commandLine": "echo set up",
        "environmentVariables": [{ "name": "A", "value": "b" }],
        "secrets": [{ "name": "S", "value": "hidden" }],
        "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
    });
    let set_up = json!({ "scaleSettings": manual, "nodeSetup": { "setupTask": task } });
    let taken = create_cluster("setup", cluster(set_up));
    let shown: Value = serde_json::from_slice(&taken.stdout).unwrap();
    let task = &shown["nodeSetup"]["setupTask"];
    assert_eq!(task["commandLine"], "echo set up", "{shown}");
    assert_eq!(task["secrets"], json!([{ "name": "S" }]));
    let scale = json!({ "autoScale": { "minimumNodeCount": 0, "maximumNodeCount": 10 } });
    let refused = create_cluster("auto", cluster(json!({ "scaleSettings": scale })));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{said}");
    assert!(said.contains("not served yet"), "{said}");
    assert!(said.contains("cluster.scale_settings.auto_scale"), "{said}");
    let file_server = v1::FileServer {
        vm_size: "STANDARD_NC6".into(),
        ssh_configuration: Some(v1::SshConfiguration {
            public_ips_to_allow: vec!["*".into()],
            user_account_settings: Some(v1::UserAccountSettings {
                admin_user_name: "admin".into(),
                admin_user_password: "pa55word".into(),
                ..Default::default()
            }),
        }),
        data_disks: Some(v1::DataDisks {
            disk_size_in_gb: 10,
            disk_count: 2,
            storage_account_type: v1::data_disks::StorageAccountType::StandardLrs as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    let create = v1::CreateFileServerRequest {
        parent: WORKSPACE.into(),
        file_server_id: "f".into(),
        file_server: Some(file_server),
        ..Default::default()
    };
    let server = api
        .call(api.file_servers().create_file_server(create))
        .unwrap();
    let account = server.ssh_configuration.unwrap().user_account_settings;
    assert_eq!(account.unwrap().admin_user_password, "");
    assert_eq!(server.errors[0].code, "NoStorageNode");
    let mounts = json!({ "fileServers": [{
        "fileServer": { "id": "/subscriptions/s/resourceGroups/g/providers/Microsoft.BatchAI/workspaces/w/fileServers/f" },
        "relativeMountPath": "nfs",
        "mountOptions": "rw",
    }] });
    let given = json!({ "scaleSettings": manual, "nodeSetup": { "mountVolumes": mounts } });
    let taken = create_cluster("mounts", cluster(given));
    let shown: Value = serde_json::from_slice(&taken.stdout).unwrap();
    let mounted = &shown["nodeSetup"]["mountVolumes"]["fileServers"][0];
    assert_eq!(mounted["fileServer"], format!("{WORKSPACE}/fileServers/f"));
}

fn code<T>(answer: Result<T, Status>) -> Code {
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

/// Every verb of the original that is not a creation, with its documented answer.
#[test]
fn the_other_verbs_answer_as_documented() {
    let api = Api::start(Ensemble::with_cluster(1));
    let name = |text: &str| text.to_owned();
    // workspaces: list of the subscription and of the group, get, update of tags.
    for parent in ["resourceGroups/-", GROUP] {
        let list = v1::ListWorkspacesRequest {
            parent: name(parent),
            ..Default::default()
        };
        let list = api.call(api.workspaces().list_workspaces(list)).unwrap();
        assert_eq!(list.workspaces[0].name, WORKSPACE);
    }
    let get = v1::GetWorkspaceRequest {
        name: name(WORKSPACE),
    };
    assert_eq!(
        code(api.call(api.workspaces().get_workspace(get))),
        Code::Ok
    );
    // clusters: list, get, update of the scale, remote login.
    let list = v1::ListClustersRequest {
        parent: name(WORKSPACE),
        ..Default::default()
    };
    let clusters = api
        .call(api.clusters().list_clusters(list))
        .unwrap()
        .clusters;
    assert_eq!(
        (clusters[0].name.as_str(), clusters[0].vm_size.as_str()),
        (CLUSTER, SIZE)
    );
    until("the node to join", || {
        let login = v1::ListClusterRemoteLoginInformationRequest {
            name: name(CLUSTER),
            ..Default::default()
        };
        let page = api
            .call(api.clusters().list_cluster_remote_login_information(login))
            .unwrap();
        (page.remote_login_information.len() == 1).then_some(())
    });
    // experiments: list, get.
    let list = v1::ListExperimentsRequest {
        parent: name(WORKSPACE),
        ..Default::default()
    };
    let list = api.call(api.experiments().list_experiments(list)).unwrap();
    assert_eq!(list.experiments[0].name, EXPERIMENT);
    // jobs: terminate of a queued, a running and an ended one, delete of a running one.
    let long = json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 600" } });
    api.e.submit("running", long.clone());
    api.e.submit("queued", long.clone());
    api.e.until_job("running", "RUNNING");
    let terminate = |id: &str| {
        let name = format!("{EXPERIMENT}/jobs/{id}");
        api.call(api.jobs().terminate_job(v1::TerminateJobRequest { name }))
            .unwrap()
    };
    let queued = terminate("queued");
    assert_eq!(queued.state(), v1::job::State::Failed);
    assert_eq!(
        (queued.errors[0].code.as_str(), queued.exit_code),
        ("JobTerminated", None)
    );
    assert!(queued.start_time.is_some() && queued.end_time.is_some());
    assert_eq!(terminate("running").state(), v1::job::State::Terminating);
    let ended = api.e.until_job("running", "FAILED");
    assert_eq!(ended["errors"][0]["code"], "JobTerminated");
    assert_eq!(
        terminate("running").state(),
        v1::job::State::Failed,
        "it stays as it is"
    );
    api.e.submit("goes", long);
    api.e.until_job("goes", "RUNNING");
    let delete = |name: String| {
        let delete = v1::DeleteJobRequest {
            name,
            ..Default::default()
        };
        code(api.call(api.jobs().delete_job(delete)))
    };
    let goes = format!("{EXPERIMENT}/jobs/goes");
    assert_eq!(delete(goes.clone()), Code::Ok);
    until("the job to be gone", || {
        let get = v1::GetJobRequest { name: goes.clone() };
        (code(api.call(api.jobs().get_job(get))) == Code::NotFound).then_some(())
    });
    assert_eq!(delete(goes), Code::NotFound);
    // file servers: get and delete of what is not there.
    let absent = format!("{WORKSPACE}/fileServers/f");
    let get = v1::GetFileServerRequest {
        name: absent.clone(),
    };
    assert_eq!(
        code(api.call(api.file_servers().get_file_server(get))),
        Code::NotFound
    );
    let delete = v1::DeleteFileServerRequest {
        name: absent,
        ..Default::default()
    };
    assert_eq!(
        code(api.call(api.file_servers().delete_file_server(delete))),
        Code::NotFound
    );
}

#[test]
fn the_rest_of_the_examples_are_answered() {
    let api = Api::start(Ensemble::with_cluster(1));
    let command = json!({ "commandLine": "echo hello; sleep 600" });
    api.e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": command }),
    );
    api.e.until_job("j", "RUNNING");
    let job = format!("{EXPERIMENT}/jobs/j");
    let job = job.as_str();
    // What is sent, and a part of what is answered: where it lies, and what it is.
    for (method, request, at, answered) in [
        (
            "WorkspaceService/UpdateWorkspace",
            json!({ "workspace": { "name": WORKSPACE, "tags": { "a": "b" } }, "updateMask": "tags" }),
            "/tags/a",
            json!("b"),
        ),
        (
            "ClusterService/GetCluster",
            json!({ "name": CLUSTER }),
            "/vmSize",
            json!(SIZE),
        ),
        (
            "ClusterService/UpdateCluster",
            json!({ "cluster": { "name": CLUSTER, "scaleSettings": { "manual": { "targetNodeCount": 2 } } } }),
            "/scaleSettings/manual/targetNodeCount",
            json!(2),
        ),
        (
            "ExperimentService/GetExperiment",
            json!({ "name": EXPERIMENT }),
            "/name",
            json!(EXPERIMENT),
        ),
        (
            "JobService/GetJob",
            json!({ "name": job }),
            "/state",
            json!("RUNNING"),
        ),
        (
            "JobService/ListJobs",
            json!({ "parent": EXPERIMENT }),
            "/jobs/0/name",
            json!(job),
        ),
        (
            "JobService/ListJobFiles",
            json!({ "name": job }),
            "/files/0/name",
            json!("execution.log"),
        ),
        (
            "JobService/ListJobRemoteLoginInformation",
            json!({ "name": job }),
            "/remoteLoginInformation/0/node",
            json!("nodes/a1"),
        ),
        (
            "InformationService/ListUsages",
            json!({}),
            "/usages/0/unit",
            json!("COUNT"),
        ),
        (
            "InformationService/ListOperations",
            json!({}),
            "/operations/0/name",
            json!("batchai/roleBindings/write"),
        ),
        (
            "FileServerService/ListFileServers",
            json!({ "parent": WORKSPACE }),
            "/fileServers",
            json!(null),
        ),
    ] {
        let method = format!("batchai.v1.{method}");
        let call = batchai_tests::raw::json(api.channel.clone(), &method, request);
        let answer = api.runtime.block_on(call).unwrap();
        let found = answer.pointer(at).cloned().unwrap_or_default();
        assert_eq!(found, answered, "{method}: {answer}");
    }
    // Deletes, the way they are asked for one after the other; the last takes all that is left with it.
    for (method, name) in [
        ("ExperimentService/DeleteExperiment", EXPERIMENT),
        ("ClusterService/DeleteCluster", CLUSTER),
        ("WorkspaceService/DeleteWorkspace", WORKSPACE),
    ] {
        let delete = format!("batchai.v1.{method}");
        let get = delete.replace("/Delete", "/Get");
        let call = |method: &str| {
            let request = match method.contains("/Delete") {
                true => json!({ "name": name, "force": true }),
                false => json!({ "name": name }),
            };
            let call = batchai_tests::raw::json(api.channel.clone(), method, request);
            api.runtime.block_on(call)
        };
        assert_eq!(call(&delete).unwrap(), json!({}));
        until("it to be gone", || {
            (code(call(&get)) == Code::NotFound).then_some(())
        });
    }
}
