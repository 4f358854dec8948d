//! The set-up task of a cluster, on real nodes.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use batchai_common::tls::Identity;
use batchai_proto::v1;
use batchai_proto::v1::role_binding::Role;
use batchai_tests::api::{Api, CLUSTER, WORKSPACE, connector, refusal};
use batchai_tests::ensemble::{Ensemble, SIZE};
use batchai_tests::process::until;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::Code;

fn cluster(nodes: i32, task: v1::SetupTask) -> v1::CreateClusterRequest {
    v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "c".into(),
        cluster: Some(v1::Cluster {
            vm_size: SIZE.into(),
            scale_settings: Some(v1::ScaleSettings {
                manual: Some(v1::ManualScaleSettings {
                    target_node_count: nodes,
                    ..Default::default()
                }),
                auto_scale: None,
            }),
            node_setup: Some(v1::NodeSetup {
                setup_task: Some(task),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn holders(e: &Ensemble) {
    e.ok(&["group", "create", "-n", "g"]);
    e.ok(&["workspace", "create", "-g", "g", "-n", "w"]);
    e.ok(&["experiment", "create", "-g", "g", "-w", "w", "-n", "e"]);
}

fn counts(api: &Api) -> v1::NodeStateCounts {
    found(api).node_state_counts.unwrap()
}

fn found(api: &Api) -> v1::Cluster {
    let name = CLUSTER.into();
    api.call(api.clusters().get_cluster(v1::GetClusterRequest { name }))
        .unwrap()
}

#[test]
fn nodes_are_set_up_as_root_before_jobs_and_say_why_they_are_not() {
    let root = nix::unistd::geteuid().is_root();
    let user = if root { "54321:54322" } else { "self" };
    let mut e = Ensemble::start(0);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(e.path(), open).unwrap();
    for name in ["a1", "a2"] {
        e.start_agent_as(name, user);
    }
    e.until_alive(2);
    holders(&e);
    let out = e.path().join("set-up");
    let (go, fail) = (e.path().join("go"), e.path().join("fail"));
    // One node fails, after it was told to; both wait until they were looked at.
    let command_line = format!(
        "id -u; printf %s $TOKEN | sha256sum; echo $PLAIN; echo broken >&2; \
         while [ ! -e {go} ]; do sleep 0.02; done; \
         case $AZ_BATCHAI_MOUNT_ROOT in *a1*) [ ! -e {fail} ] || exit 7;; esac",
        go = go.display(),
        fail = fail.display()
    );
    let task = v1::SetupTask {
        command_line,
        environment_variables: vec![v1::NameValuePair {
            name: "PLAIN".into(),
            value: "$AZ_BATCHAI_MOUNT_ROOT".into(),
        }],
        secrets: vec![v1::EnvironmentVariableWithSecretValue {
            name: "TOKEN".into(),
            value: "s3cret".into(),
            ..Default::default()
        }],
        std_out_err_path_prefix: out.display().to_string(),
        ..Default::default()
    };
    let api = Api::start(e);
    fs::write(&fail, "").unwrap();
    let created = api
        .call(api.clusters().create_cluster(cluster(2, task)))
        .unwrap();
    let task = created.node_setup.unwrap().setup_task.unwrap();
    assert_eq!(task.secrets[0].value, "");
    let suffix = task.std_out_err_path_suffix;
    assert!(suffix.contains("/workspaces/w/clusters/c/"), "{suffix}");

    api.e.submit(
        "j",
        json!({ "nodeCount": 1, "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/l",
        "customToolkitSettings": { "commandLine": "id -u" } }),
    );
    until("both nodes to be set up", || {
        (counts(&api).preparing_node_count == 2).then_some(())
    });
    let list = api.e.ok(&["node", "list", "-o", "table"]);
    assert!(list.contains("preparing"), "{list}");
    assert_eq!(api.e.job("j")["state"], "QUEUED");
    fs::write(&go, "").unwrap();
    assert_eq!(api.e.wait("j"), 0, "{}", api.e.job("j"));
    let own = nix::unistd::geteuid();
    let expected_user = if root {
        "54321".to_owned()
    } else {
        own.to_string()
    };
    assert_eq!(api.e.log("j", "stdout.txt").trim(), expected_user);

    // What each printed lies on its node, and is root's.
    for node in ["a1", "a2"] {
        let path = out.join(&suffix).join(format!("stdout-{node}.txt"));
        let printed = until("the output to be there", || fs::read_to_string(&path).ok());
        let digest = batchai_common::names::hex(&Sha256::digest("s3cret"));
        let mounts = api.e.path().join(format!("nodes/{node}/mounts"));
        let expected = format!("{own}\n{digest}  -\n{}\n", mounts.display());
        assert_eq!(printed, expected);
        assert_eq!(fs::metadata(&path).unwrap().uid(), own.as_raw());
    }

    // The node that failed says why, and so does the cluster; it takes no jobs.
    until("one node to be idle and one unusable", || {
        let seen = counts(&api);
        ((seen.idle_node_count, seen.unusable_node_count) == (1, 1)).then_some(())
    });
    let get = v1::GetNodeRequest {
        name: "nodes/a1".into(),
    };
    let node = api.call(api.nodes().get_node(get.clone())).unwrap();
    assert_eq!(node.state(), v1::node::State::Unusable);
    let error = &node.errors[0];
    assert_eq!(error.code, "SetupTaskFailed");
    assert_eq!(
        error.message,
        "the set-up task ended with exit code 7 on nodes/a1"
    );
    let detail = |name: &str| {
        let details = error.details.iter().find(|detail| detail.name == name);
        details.map(|detail| detail.value.clone())
    };
    assert_eq!(detail("stderr").as_deref(), Some("broken"));
    assert_eq!(detail("exitCode").as_deref(), Some("7"));
    assert_eq!(found(&api).errors, node.errors);
    let said = api
        .e
        .fails(&["cluster", "file", "list", "-g", "g", "-w", "w", "-c", "c"])
        .1;
    assert!(said.contains(&suffix), "{said}");

    // Taken from its cluster and given back it is tried again.
    fs::remove_file(&fail).unwrap();
    let resize = |count: &str| {
        api.e.ok(&[
            "cluster", "resize", "-g", "g", "-w", "w", "-n", "c", "-t", count,
        ]);
    };
    resize("1");
    until("the node that failed to leave", || {
        let node = api.call(api.nodes().get_node(get.clone())).ok()?;
        (node.cluster.is_empty() && node.errors.is_empty()).then_some(())
    });
    resize("2");
    until("it to be set up", || {
        (counts(&api).idle_node_count == 2).then_some(())
    });

    // An agent that starts again has nothing to do anew.
    let before = fs::metadata(out.join(&suffix).join("stdout-a1.txt"))
        .unwrap()
        .modified()
        .unwrap();
    let mut e = api.e;
    e.agents.get_mut("a1").unwrap().kill();
    e.start_agent_as("a1", user);
    e.until_alive(2);
    e.submit(
        "k",
        json!({ "nodeCount": 2, "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/l",
        "customToolkitSettings": { "commandLine": "true" } }),
    );
    assert_eq!(e.wait("k"), 0);
    let after = fs::metadata(out.join(&suffix).join("stdout-a1.txt"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after);

    // A cluster that goes takes a set-up that would never end with it.
    fs::remove_file(&go).unwrap();
    e.ok(&[
        "cluster", "resize", "-g", "g", "-w", "w", "-n", "c", "-t", "0",
    ]);
    until("the nodes to be free", || {
        let nodes = e.json(&["node", "list"]);
        nodes
            .as_array()?
            .iter()
            .all(|node| node["state"] == "AVAILABLE")
            .then_some(())
    });
    e.ok(&[
        "cluster", "resize", "-g", "g", "-w", "w", "-n", "c", "-t", "2",
    ]);
    until("a set-up to run", || {
        let nodes = e.json(&["node", "list"]);
        nodes
            .as_array()?
            .iter()
            .all(|node| node["state"] == "PREPARING")
            .then_some(())
    });
    e.ok(&["cluster", "delete", "-g", "g", "-w", "w", "-n", "c", "-y"]);
    e.assert_nothing_left();
}

#[test]
fn only_administrators_say_what_nodes_do_as_root() {
    let api = Api::start(Ensemble::start(0));
    holders(&api.e);
    let bind = v1::CreateRoleBindingRequest {
        role_binding_id: "ada".into(),
        role_binding: Some(v1::RoleBinding {
            member: "users/ada".into(),
            role: Role::Owner as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(bind)).unwrap();
    let credentials = api.e.credentials_of(&Identity::user("ada").unwrap());
    let ada = api
        .runtime
        .block_on(connector(&api.e.endpoint, &credentials).connect())
        .unwrap();
    let mut clusters = v1::cluster_service_client::ClusterServiceClient::new(ada);
    let task = v1::SetupTask {
        command_line: "true".into(),
        std_out_err_path_prefix: "/out".into(),
        ..Default::default()
    };
    let create = cluster(0, task);
    let status = api
        .call(clusters.create_cluster(create.clone()))
        .unwrap_err();
    assert_eq!(refusal(&status).0, Code::PermissionDenied);
    assert!(status.message().contains("batchai/nodes/setUp/action"));
    let mut plain = create.clone();
    plain.cluster.as_mut().unwrap().node_setup = None;
    plain.cluster_id = "plain".into();
    api.call(clusters.create_cluster(plain)).unwrap();
    api.call(api.clusters().create_cluster(create)).unwrap();
}
