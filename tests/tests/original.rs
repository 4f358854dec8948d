//! The requests of the original's last API version (2018-05-01), in our form: each gets the documented answer, or the
//! refusal that the ledger of fields announces. And what its makers tested of its behaviour: `BEHAVIOUR` names for each of these
//! tests the one that shows the same here, in this file or another.

use std::path::Path;

use batchai_proto::v1;
use batchai_tests::api::{Api, CLUSTER, EXPERIMENT, GROUP, WORKSPACE};
use batchai_tests::ensemble::{Ensemble, IN, SIZE};
use batchai_tests::process::until;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};

/// What the original's own tests try, and the tests that show it here: a file beside this one, and a function in it.
const BEHAVIOUR: [(&str, &str); 23] = [
    (
        "a job on the host",
        "original.rs::the_smoke_test_of_the_original_runs",
    ),
    (
        "a job in a container",
        "containers.rs::a_job_in_a_container_has_the_images_files_and_all_that_is_its_own",
    ),
    (
        "output files are listed, in directories as well",
        "files.rs::files_of_every_directory_are_listed_and_read",
    ),
    (
        "a job fails",
        "endings.rs::every_way_to_fail_has_its_code_exit_code_and_details",
    ),
    (
        "preparation fails on the host",
        "endings.rs::every_way_to_fail_has_its_code_exit_code_and_details",
    ),
    (
        "preparation fails in a container",
        "containers.rs::a_job_in_a_container_has_the_images_files_and_all_that_is_its_own",
    ),
    (
        "preparation fills an input directory",
        "original.rs::preparation_and_job_have_the_same_variables_secrets_and_inputs",
    ),
    (
        "a running job is terminated",
        "original.rs::the_other_verbs_answer_as_documented",
    ),
    (
        "a queued job is terminated",
        "original.rs::the_other_verbs_answer_as_documented",
    ),
    (
        "a job that has succeeded is terminated: it stays so",
        "original.rs::a_job_that_has_succeeded_stays_so",
    ),
    (
        "a running job is deleted",
        "original.rs::the_other_verbs_answer_as_documented",
    ),
    (
        "ssh between two nodes, without a password, on hosts",
        "mpi.rs::processes_of_a_job_reach_its_nodes_as_by_ssh_also_while_no_coordinator_is_there",
    ),
    (
        "the same in containers",
        "mpi.rs::processes_in_a_container_reach_the_containers_of_other_nodes_as_by_ssh",
    ),
    (
        "a share and a container of blobs are mounted for preparation and job, and unmounted after it",
        "storage.rs::a_share_and_a_container_are_there_for_preparation_and_job_and_not_for_the_next",
    ),
    (
        "preparation and job have the job's variables",
        "original.rs::preparation_and_job_have_the_same_variables_secrets_and_inputs",
    ),
    (
        "preparation and job have the job's secrets, which nobody is told",
        "secrets.rs::a_marked_secret_reaches_the_job_and_is_found_nowhere_else",
    ),
    (
        "a set-up task has variables and secrets, and a log of each node",
        "setup.rs::nodes_are_set_up_as_root_before_jobs_and_say_why_they_are_not",
    ),
    (
        "a cluster is resized to nothing and back, and runs a job",
        "e2e.rs::resizing_moves_nodes_in_and_out",
    ),
    // There are only the machines that joined by themselves: nothing can be asked for more of them, or give them back. So it is refused,
    // by every way to ask for it.
    (
        "a cluster scales itself from nothing to one node and back",
        "command.rs::what_is_not_served_is_refused_by_every_way_to_ask_for_it",
    ),
    (
        "two clusters share a file server",
        "file_servers.rs::two_clusters_share_one_file_server_and_see_what_the_other_writes",
    ),
    (
        "an experiment is deleted, and others know nothing of it",
        "original.rs::what_is_deleted_takes_nothing_of_its_neighbours_along",
    ),
    (
        "a workspace is deleted, and others know nothing of it",
        "original.rs::what_is_deleted_takes_nothing_of_its_neighbours_along",
    ),
    (
        "usages are listed",
        "surface.rs::usages_operations_sizes_and_logins_say_what_there_is",
    ),
];

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

#[test]
fn what_the_original_was_tested_for_is_shown_by_tests_that_there_are() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for (what, shown) in BEHAVIOUR {
        let (file, function) = shown.split_once("::").unwrap();
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        let test = format!("#[test]\nfn {function}() {{\n");
        assert!(text.contains(&test), "{what}: there is no test {shown}");
    }
}

#[test]
fn preparation_and_job_have_the_same_variables_secrets_and_inputs() {
    const SECRET: &str = "nobody is told";
    let e = Ensemble::with_cluster(1);
    let tell = "echo $PLAIN; printf %s \"$TOKEN\" | sha256sum";
    let fill = "mkdir $AZ_BATCHAI_INPUT_DATA; echo filled > $AZ_BATCHAI_INPUT_DATA/file";
    e.submit(
        "j",
        json!({
            "nodeCount": 1,
            "inputDirectories": [{ "id": "DATA", "path": "$AZ_BATCHAI_JOB_TEMP/data" }],
            "environmentVariables": [{ "name": "PLAIN", "value": "$AZ_BATCHAI_INPUT_DATA/plain" }],
            "secrets": [{ "name": "TOKEN", "value": SECRET }],
            "jobPreparation": { "commandLine": format!("{fill}; {tell}") },
            "customToolkitSettings": { "commandLine": format!("cat $AZ_BATCHAI_INPUT_DATA/file; {tell}") },
        }),
    );
    assert_eq!(e.wait("j"), 0, "{}", e.job("j"));
    let digest = batchai_common::names::hex(&Sha256::digest(SECRET));
    let data = e.path().join("nodes/a1/jobs/w/e/j/data");
    let told = format!("{}/plain\n{digest}  -\n", data.display());
    assert_eq!(e.log("j", "stdout-job_prep.txt"), told);
    assert_eq!(e.log("j", "stdout.txt"), format!("filled\n{told}"));
    let list = [&["job", "list"][..], &IN].concat();
    for shown in [e.job("j"), e.json(&list)[0].clone()] {
        assert_eq!(shown["secrets"], json!([{ "name": "TOKEN" }]), "{shown}");
        let plain = &shown["environmentVariables"][0]["value"];
        assert_eq!(plain, "$AZ_BATCHAI_INPUT_DATA/plain");
        assert!(!shown.to_string().contains(SECRET), "{shown}");
    }
}

#[test]
fn a_job_that_has_succeeded_stays_so() {
    let e = Ensemble::with_cluster(1);
    e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "true" } }),
    );
    assert_eq!(e.wait("j"), 0);
    let before = e.job("j");
    let terminate = [&["job", "terminate", "-y", "-n", "j"][..], &IN].concat();
    let answer = e.json(&terminate);
    assert_eq!(
        (&answer["state"], &answer["exitCode"]),
        (&json!("SUCCEEDED"), &json!(0))
    );
    assert_eq!(e.job("j"), before);
}

#[test]
fn what_is_deleted_takes_nothing_of_its_neighbours_along() {
    let e = Ensemble::start(3);
    e.create_cluster(2);
    e.ok(&["experiment", "create", "-g", "g", "-w", "w", "-n", "stays"]);
    e.ok(&["workspace", "create", "-g", "g", "-n", "goes"]);
    e.ok(&["experiment", "create", "-g", "g", "-w", "goes", "-n", "e"]);
    e.ok(&[
        "cluster", "create", "-g", "g", "-w", "goes", "-n", "c", "-s", SIZE, "-t", "1",
    ]);
    let file = e.job_file(
        "long",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 600" } }),
    );
    let file = file.to_string_lossy();
    let places = [("w", "e"), ("w", "stays"), ("goes", "e")];
    let job = |verb: &str, (workspace, experiment): (&str, &str), more: &[&str]| {
        let place = ["-g", "g", "-w", workspace, "-e", experiment, "-n", "j"];
        e.json(&[&["job", verb][..], &place, more].concat())
    };
    for place in places {
        job("create", place, &["-c", "c", "-f", &file]);
    }
    for place in places {
        until("the job to run", || {
            (job("show", place, &[])["state"] == "RUNNING").then_some(())
        });
    }
    let stays = ("w", "stays");
    let before = job("show", stays, &[]);
    let nodes = || e.json(&["node", "list"]);
    let unchanged = |free: usize| {
        let now = job("show", stays, &[]);
        assert_eq!(
            (&now["state"], &now["attempt"]["id"]),
            (&json!("RUNNING"), &before["attempt"]["id"])
        );
        let idle = |node: &&Value| node["state"] == "IDLE" || node["state"] == "AVAILABLE";
        until("what ran there to end", || {
            let all = nodes();
            (all.as_array()?.iter().filter(idle).count() == free).then_some(())
        });
    };
    e.ok(&[
        "experiment",
        "delete",
        "-y",
        "-g",
        "g",
        "-w",
        "w",
        "-n",
        "e",
    ]);
    assert_eq!(job("show", places[0], &[]), Value::Null);
    unchanged(1);
    assert_eq!(job("show", places[2], &[])["state"], "RUNNING");
    e.ok(&["workspace", "delete", "-y", "-g", "g", "-n", "goes"]);
    assert_eq!(job("show", places[2], &[]), Value::Null);
    unchanged(2);
    let cluster = e.json(&["cluster", "show", "-g", "g", "-w", "w", "-n", "c"]);
    assert_eq!(cluster["currentNodeCount"], 2, "{cluster}");
}
