//! What the coordinator takes in of volumes of storage accounts and of storage aliases, and what it gives back.

use batchai_common::tls::Identity;
use batchai_proto::v1;
use batchai_proto::v1::storage_alias::Target;
use batchai_tests::api::{Api, CLUSTER, EXPERIMENT, GROUP, WORKSPACE, connector, job, refusal};
use batchai_tests::ensemble::{Ensemble, SIZE};
use batchai_tests::process::until;
use tonic::Code;

const KEY: &str = "bWFya2VkLWtleS1vZi1zdG9yYWdl";

fn credentials(key: &str) -> Option<v1::StorageCredentials> {
    Some(v1::StorageCredentials {
        account_key: key.into(),
        account_key_secret_reference: None,
    })
}

fn volumes() -> v1::MountVolumes {
    v1::MountVolumes {
        azure_file_shares: vec![v1::AzureFileShare {
            account_name: "acc".into(),
            azure_file_url: "https://acc.file.core.windows.net/data".into(),
            credentials: credentials(KEY),
            relative_mount_path: "afs".into(),
            file_mode: "0640".into(),
            directory_mode: "0750".into(),
        }],
        azure_blob_file_systems: vec![v1::AzureBlobFileSystem {
            account_name: "acc".into(),
            container_name: "data".into(),
            credentials: credentials(KEY),
            relative_mount_path: "bfs".into(),
            mount_options: "-o ro".into(),
        }],
        ..Default::default()
    }
}

fn cluster(volumes: v1::MountVolumes) -> v1::CreateClusterRequest {
    v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "mounts".into(),
        cluster: Some(v1::Cluster {
            vm_size: SIZE.into(),
            node_setup: Some(v1::NodeSetup {
                mount_volumes: Some(volumes),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
fn volumes_of_accounts_are_checked_whole_and_given_back_without_their_keys() {
    let api = Api::start(Ensemble::with_cluster(0));
    // All faults at once.
    let mut bad = volumes();
    let share = &mut bad.azure_file_shares[0];
    share.account_name = "a\nb".into();
    share.azure_file_url = "https://acc".into();
    share.credentials = credentials("two\nlines");
    share.file_mode = "rw".into();
    share.directory_mode = "7777".into();
    let blob = &mut bad.azure_blob_file_systems[0];
    blob.account_name = String::new();
    blob.container_name = "UP".into();
    blob.credentials = None;
    blob.mount_options = "--tmp-path=/etc -o ro,suid".into();
    blob.relative_mount_path = "../x".into();
    let given = |mount_volumes| v1::Job {
        cluster: CLUSTER.into(),
        mount_volumes: Some(mount_volumes),
        ..job()
    };
    let status = api.create_job("x", given(bad)).unwrap_err();
    let (code, mut fields) = refusal(&status);
    assert_eq!(code, Code::InvalidArgument);
    fields.sort();
    let expected = [
        "azure_blob_file_systems[0].account_name",
        "azure_blob_file_systems[0].container_name",
        "azure_blob_file_systems[0].credentials",
        "azure_blob_file_systems[0].mount_options",
        "azure_blob_file_systems[0].relative_mount_path",
        "azure_file_shares[0].account_name",
        "azure_file_shares[0].azure_file_url",
        "azure_file_shares[0].credentials.account_key",
        "azure_file_shares[0].directory_mode",
        "azure_file_shares[0].file_mode",
    ];
    assert_eq!(
        fields,
        expected.map(|field| format!("job.mount_volumes.{field}"))
    );
    assert!(!status.message().contains("two"), "{status}");
    // Who may submit jobs may: nothing of theirs is run as root.
    let mut expected = volumes();
    expected.azure_file_shares[0].credentials = credentials("");
    expected.azure_blob_file_systems[0].credentials = credentials("");
    let created = api.create_job("x", given(volumes())).unwrap();
    assert_eq!(created.mount_volumes, Some(expected.clone()));
    let get = v1::GetJobRequest {
        name: format!("{EXPERIMENT}/jobs/x"),
    };
    let got = api.call(api.jobs().get_job(get)).unwrap();
    assert_eq!(got.mount_volumes, Some(expected.clone()));
    let created = api.call(api.clusters().create_cluster(cluster(volumes())));
    let setup = created.unwrap().node_setup.unwrap();
    assert_eq!(setup.mount_volumes, Some(expected));
}

fn request(id: &str, alias: v1::StorageAlias) -> v1::CreateStorageAliasRequest {
    v1::CreateStorageAliasRequest {
        storage_alias_id: id.into(),
        storage_alias: Some(alias),
        ..Default::default()
    }
}

fn for_share(target: Target) -> v1::StorageAlias {
    v1::StorageAlias {
        account_name: "acc".into(),
        share_name: "data".into(),
        target: Some(target),
        ..Default::default()
    }
}

fn to_server(file_server: &str, directory: &str) -> Target {
    Target::FileServer(v1::FileServerDirectory {
        file_server: file_server.into(),
        directory: directory.into(),
    })
}

fn for_container(target: Target) -> v1::StorageAlias {
    v1::StorageAlias {
        share_name: String::new(),
        container_name: "data".into(),
        ..for_share(target)
    }
}

#[test]
fn storage_aliases_are_administrators_and_stand_for_one_thing_each() {
    let api = Api::start(Ensemble::with_cluster(0));
    let create = |id: &str, alias: v1::StorageAlias| {
        api.call(
            api.storage_aliases()
                .create_storage_alias(request(id, alias)),
        )
    };
    let path = Target::Path("/lab/data".into());
    let bucket = v1::S3Bucket {
        endpoint: "https://minio.lab:9000".into(),
        bucket: "train".into(),
    };
    for (alias, expected) in [
        (
            v1::StorageAlias::default(),
            vec!["account_name", "path", "share_name"],
        ),
        (for_share(Target::Path("lab".into())), vec!["path"]),
        (for_share(Target::Path("/lab/../etc".into())), vec!["path"]),
        (
            for_share(Target::Url("https://blobs.lab".into())),
            vec!["url"],
        ),
        (
            for_container(Target::Url("https://blobs.lab/acc".into())),
            vec!["url"],
        ),
        (
            for_container(Target::S3Bucket(v1::S3Bucket::default())),
            vec!["s3_bucket.bucket", "s3_bucket.endpoint"],
        ),
        (
            v1::StorageAlias {
                container_name: "data".into(),
                ..for_share(path.clone())
            },
            vec!["container_name"],
        ),
        (
            for_share(to_server("jobs/f", "../x")),
            vec!["file_server.directory", "file_server.file_server"],
        ),
    ] {
        let status = create("x", alias.clone()).unwrap_err();
        let (code, mut fields) = refusal(&status);
        fields.sort();
        let expected: Vec<_> = expected
            .iter()
            .map(|field| format!("storage_alias.{field}"))
            .collect();
        assert_eq!(
            (code, fields),
            (Code::InvalidArgument, expected),
            "{alias:?}"
        );
    }
    let lab = create("lab", for_share(path.clone())).unwrap();
    assert_eq!(lab.name, "storageAliases/lab");
    assert!(!lab.etag.is_empty() && lab.create_time.is_some());
    assert_eq!(
        (lab.share_name.as_str(), lab.target),
        ("data", Some(path.clone()))
    );
    // One for each share, and for each container.
    let status = create("other", for_share(Target::Url("smb://nas/x".into()))).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("storageAliases/lab"), "{status}");
    let status = create("lab", for_container(path.clone())).unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let made = create("bucket", for_container(Target::S3Bucket(bucket.clone()))).unwrap();
    assert_eq!(made.container_name, "data");
    assert_eq!(made.target, Some(Target::S3Bucket(bucket)));

    // Whoever has a workspace reads them, and makes none: they lead to paths of nodes.
    let bind = v1::CreateRoleBindingRequest {
        role_binding_id: "ada".into(),
        role_binding: Some(v1::RoleBinding {
            member: "users/ada".into(),
            role: v1::role_binding::Role::Owner as i32,
            scope: WORKSPACE.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(bind)).unwrap();
    let credentials = api.e.credentials_of(&Identity::user("ada").unwrap());
    let connector = connector(&api.e.endpoint, &credentials);
    let ada = api.runtime.block_on(connector.connect()).unwrap();
    let mut aliases = v1::storage_alias_service_client::StorageAliasServiceClient::new(ada);
    let list = v1::ListStorageAliasesRequest::default();
    let listed = api.call(aliases.list_storage_aliases(list)).unwrap();
    let names: Vec<_> = listed
        .storage_aliases
        .iter()
        .map(|alias| alias.name.as_str())
        .collect();
    assert_eq!(names, ["storageAliases/bucket", "storageAliases/lab"]);
    let own = request("own", for_share(Target::Path("/etc".into())));
    let status = api.call(aliases.create_storage_alias(own)).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let delete = v1::DeleteStorageAliasRequest {
        name: "storageAliases/lab".into(),
        ..Default::default()
    };
    let status = api
        .call(aliases.delete_storage_alias(delete.clone()))
        .unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    api.call(api.storage_aliases().delete_storage_alias(delete))
        .unwrap();
    create("other", for_share(Target::Url("smb://nas/x".into()))).unwrap();
}

/// A file server that no node serves.
fn create_server(api: &Api, id: &str) -> String {
    let account = v1::UserAccountSettings {
        admin_user_name: "ada".into(),
        admin_user_password: "pass".into(),
        ..Default::default()
    };
    let server = v1::FileServer {
        vm_size: SIZE.into(),
        ssh_configuration: Some(v1::SshConfiguration {
            user_account_settings: Some(account),
            ..Default::default()
        }),
        data_disks: Some(v1::DataDisks {
            disk_size_in_gb: 1,
            disk_count: 1,
            storage_account_type: v1::data_disks::StorageAccountType::StandardLrs as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    let create = v1::CreateFileServerRequest {
        parent: WORKSPACE.into(),
        file_server_id: id.into(),
        file_server: Some(server),
        ..Default::default()
    };
    let created = api.call(api.file_servers().create_file_server(create));
    created.unwrap().name
}

#[test]
fn a_share_leads_to_a_file_server_for_those_who_may_use_it() {
    let api = Api::start(Ensemble::with_cluster(1));
    let create = |id: &str, alias: v1::StorageAlias| {
        let request = request(id, alias);
        api.call(api.storage_aliases().create_storage_alias(request))
    };
    let absent = format!("{WORKSPACE}/fileServers/f");
    let target = to_server(&absent, "sets//one/");
    let status = create("f", for_share(target.clone())).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains(&absent), "{status}");
    let server = create_server(&api, "f");
    // What mounts the share already was not asked whether it may use the file server.
    let early = api.call(api.clusters().create_cluster(cluster(volumes())));
    let early = early.unwrap().name;
    let status = create("f", for_share(target.clone())).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(&early), "{status}");
    let delete = v1::DeleteClusterRequest {
        name: early,
        ..Default::default()
    };
    api.call(api.clusters().delete_cluster(delete)).unwrap();
    let made = until("the cluster to be gone", || {
        create("f", for_share(target.clone())).ok()
    });
    assert_eq!(made.target, Some(target));
    let Some(Target::FileServer(inside)) = made.target else {
        panic!("another target");
    };
    assert_eq!(
        (inside.file_server, inside.directory),
        (server.clone(), "sets//one/".into())
    );

    // A job waits for it, which is what its cluster would do as well.
    let mounting = v1::Job {
        mount_volumes: Some(volumes()),
        ..job()
    };
    let waits = api.create_job("waits", mounting.clone()).unwrap();
    assert!(waits.pending_reason.contains(&server), "{waits:?}");
    let delete = v1::DeleteFileServerRequest {
        name: server.clone(),
        ..Default::default()
    };
    let status = api.call(api.file_servers().delete_file_server(delete.clone()));
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("jobs/waits mounts it"),
        "{status}"
    );
    let delete_alias = v1::DeleteStorageAliasRequest {
        name: made.name.clone(),
        ..Default::default()
    };
    let delete_alias = || {
        api.call(
            api.storage_aliases()
                .delete_storage_alias(delete_alias.clone()),
        )
    };
    let status = delete_alias().unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("jobs/waits"), "{status}");

    // The key opens nothing: who may not run jobs in its workspace does not get there by its share.
    let create = v1::CreateWorkspaceRequest {
        parent: GROUP.into(),
        workspace_id: "other".into(),
        ..Default::default()
    };
    let other = api
        .call(api.workspaces().create_workspace(create))
        .unwrap()
        .name;
    let bind = v1::CreateRoleBindingRequest {
        role_binding_id: "ada".into(),
        role_binding: Some(v1::RoleBinding {
            member: "users/ada".into(),
            role: v1::role_binding::Role::Contributor as i32,
            scope: other.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(bind)).unwrap();
    let credentials = api.e.credentials_of(&Identity::user("ada").unwrap());
    let connector = connector(&api.e.endpoint, &credentials);
    let ada = api.runtime.block_on(connector.connect()).unwrap();
    let mut clusters = v1::cluster_service_client::ClusterServiceClient::new(ada.clone());
    let request = v1::CreateClusterRequest {
        parent: other.clone(),
        ..cluster(volumes())
    };
    let status = api
        .call(clusters.create_cluster(request.clone()))
        .unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("jobs/write"), "{status}");
    let mut jobs = v1::job_service_client::JobServiceClient::new(ada.clone());
    let mut experiments = v1::experiment_service_client::ExperimentServiceClient::new(ada);
    let create = v1::CreateExperimentRequest {
        parent: other.clone(),
        experiment_id: "e".into(),
        ..Default::default()
    };
    let experiment = api
        .call(experiments.create_experiment(create))
        .unwrap()
        .name;
    let plain = v1::CreateClusterRequest {
        cluster: Some(v1::Cluster {
            node_setup: None,
            ..request.cluster.clone().unwrap()
        }),
        ..request.clone()
    };
    let own = api.call(clusters.create_cluster(plain)).unwrap().name;
    let create = |id: &str, mount_volumes| v1::CreateJobRequest {
        parent: experiment.clone(),
        job_id: id.into(),
        job: Some(v1::Job {
            cluster: own.clone(),
            mount_volumes,
            ..job()
        }),
        ..Default::default()
    };
    api.call(jobs.create_job(create("plain", None))).unwrap();
    let by_alias = create("by-alias", Some(volumes()));
    let status = api.call(jobs.create_job(by_alias)).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);

    // Once nothing mounts it the alias goes, and the file server after it; or both ways by force.
    let terminate = v1::TerminateJobRequest { name: waits.name };
    api.call(api.jobs().terminate_job(terminate)).unwrap();
    let status = api.call(api.file_servers().delete_file_server(delete.clone()));
    let status = status.unwrap_err();
    assert!(
        status.message().contains("storageAliases/f leads to it"),
        "{status}"
    );
    let force = v1::DeleteFileServerRequest {
        force: true,
        ..delete
    };
    api.call(api.file_servers().delete_file_server(force))
        .unwrap();
    let status = api.create_job("late", mounting).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("does not exist any more"),
        "{status}"
    );
    delete_alias().unwrap();
}
