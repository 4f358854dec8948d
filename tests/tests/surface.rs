//! What every resource can do, over the wire of a real coordinator.

use std::time::{Duration, Instant};

use batchai_common::tls::Identity;
use batchai_proto::v1;
use batchai_proto::v1::ProvisioningState;
use batchai_proto::v1::cluster::{AllocationState, VmPriority};
use batchai_proto::v1::job::{SchedulingPriority, State, ToolType};
use batchai_tests::api::{Api, CLUSTER, EXPERIMENT, GROUP, WORKSPACE, connector, job, refusal};
use batchai_tests::ensemble::{Ensemble, SIZE};
use batchai_tests::process::until;
use prost_types::FieldMask;
use serde_json::json;
use tonic::Code;

type Map = std::collections::BTreeMap<String, String>;

fn map(pairs: &[(&str, &str)]) -> Map {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn mask(paths: &[&str]) -> Option<FieldMask> {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    Some(FieldMask { paths })
}

/// What the service sets on every resource.
macro_rules! assert_is_made {
    ($resource:expr, $name:expr) => {
        assert_eq!($resource.name, $name);
        assert_eq!($resource.uid.len(), 36);
        assert!($resource.etag.starts_with('"') && $resource.etag.len() > 2);
        assert!($resource.create_time.unwrap().seconds > 1_600_000_000);
        assert_eq!($resource.provisioning_state(), ProvisioningState::Succeeded);
        let since = $resource.provisioning_state_transition_time;
        assert_eq!(since, $resource.create_time);
    };
}

#[test]
fn what_is_created_is_shown_whole_with_its_defaults() {
    let api = Api::start(Ensemble::start(0));
    let group = api.call(
        api.groups()
            .create_resource_group(v1::CreateResourceGroupRequest {
                resource_group_id: "g".into(),
                resource_group: Some(v1::ResourceGroup {
                    location: "north".into(),
                    tags: map(&[("owner", "ada")]),
                    ..Default::default()
                }),
                ..Default::default()
            }),
    );
    let group = group.unwrap();
    assert_is_made!(group, GROUP);
    assert_eq!(
        (group.location.as_str(), &group.tags["owner"]),
        ("north", &"ada".to_owned())
    );
    let workspace = api.call(
        api.workspaces()
            .create_workspace(v1::CreateWorkspaceRequest {
                parent: GROUP.into(),
                workspace_id: "w".into(),
                workspace: Some(v1::Workspace {
                    tags: map(&[("team", "vision")]),
                    ..Default::default()
                }),
                ..Default::default()
            }),
    );
    let workspace = workspace.unwrap();
    assert_is_made!(workspace, WORKSPACE);
    assert_eq!(workspace.location, "north", "the resource group's");
    assert_eq!(workspace.tags["team"], "vision");
    let experiment = api.call(
        api.experiments()
            .create_experiment(v1::CreateExperimentRequest {
                parent: WORKSPACE.into(),
                experiment_id: "e".into(),
                experiment: Some(v1::Experiment {
                    labels: map(&[("paper", "icml")]),
                    ..Default::default()
                }),
                ..Default::default()
            }),
    );
    let experiment = experiment.unwrap();
    assert_is_made!(experiment, EXPERIMENT);
    assert_eq!(experiment.labels["paper"], "icml");
    let cluster = create_cluster(&api);
    assert_is_made!(cluster, CLUSTER);
    let job = create_job(&api);
    assert_is_made!(job, format!("{EXPERIMENT}/jobs/j"));
    let segment = &job.job_output_directory_path_segment;
    assert!(segment.ends_with(&format!("g/workspaces/w/experiments/e/jobs/j/{}", job.uid)));
    let got = api.call(api.jobs().get_job(v1::GetJobRequest {
        name: job.name.clone(),
    }));
    assert_eq!(got.unwrap(), job);
}

fn create_cluster(api: &Api) -> v1::Cluster {
    let image = v1::ImageReference {
        publisher: "Canonical".into(),
        offer: "UbuntuServer".into(),
        sku: "16.04-LTS".into(),
        virtual_machine_image_id: "/images/mine".into(),
        ..Default::default()
    };
    let given = v1::Cluster {
        vm_size: "Standard_NC6".into(),
        vm_priority: VmPriority::LowPriority as i32,
        virtual_machine_configuration: Some(v1::VirtualMachineConfiguration {
            image_reference: Some(image),
        }),
        user_account_settings: Some(v1::UserAccountSettings {
            admin_user_name: "ada".into(),
            admin_user_ssh_public_key: "ssh-ed25519 AAAA".into(),
            admin_user_password: "hunter22".into(),
        }),
        subnet: "/networks/mine".into(),
        labels: map(&[("rack", "7")]),
        ..Default::default()
    };
    let request = v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "c".into(),
        cluster: Some(given),
        ..Default::default()
    };
    let cluster = api.call(api.clusters().create_cluster(request)).unwrap();
    assert_eq!(cluster.allocation_state(), AllocationState::Steady);
    assert_eq!(
        cluster.allocation_state_transition_time,
        cluster.create_time
    );
    assert_eq!(cluster.current_node_count, 0);
    let image = cluster.virtual_machine_configuration.clone().unwrap();
    assert_eq!(image.image_reference.unwrap().version, "latest");
    let scale = cluster.scale_settings.unwrap().manual.unwrap();
    assert_eq!(scale.target_node_count, 0);
    let requeue = v1::manual_scale_settings::NodeDeallocationOption::Requeue;
    assert_eq!(scale.node_deallocation_option(), requeue);
    let account = cluster.user_account_settings.clone().unwrap();
    assert_eq!(account.admin_user_name, "ada");
    assert_eq!(account.admin_user_password, "", "secrets never come out");
    let warned: Vec<_> = cluster.warnings.iter().map(|w| w.field.as_str()).collect();
    let image = "virtual_machine_configuration.image_reference.virtual_machine_image_id";
    let expected = ["vm_priority", "user_account_settings", "subnet", image];
    assert_eq!(warned, expected);
    assert!(cluster.warnings.iter().all(|w| !w.message.is_empty()));
    assert_eq!(cluster.labels["rack"], "7");
    cluster
}

fn create_job(api: &Api) -> v1::Job {
    let job = v1::Job {
        input_directories: vec![v1::InputDirectory {
            id: "DATA".into(),
            path: "/data".into(),
        }],
        labels: map(&[("run", "1")]),
        ..job()
    };
    let job = api.create_job("j", job).unwrap();
    assert_eq!(job.state(), State::Queued);
    assert_eq!(job.scheduling_priority(), SchedulingPriority::Normal);
    assert_eq!(job.tool_type(), ToolType::Custom);
    let limit = job.constraints.unwrap().max_wall_clock_time.unwrap();
    assert_eq!(limit.seconds, 7 * 24 * 3600);
    assert_eq!(job.labels["run"], "1");
    assert_eq!(job.input_directories[0].path, "/data");
    assert!(
        job.pending_reason
            .contains("cannot start unless the cluster is resized")
    );
    assert_eq!(job.state_transition_time, job.create_time);
    job
}

#[test]
fn lists_take_filters_and_reach_over_parents() {
    let api = Api::start(Ensemble::with_cluster(0));
    let other = v1::CreateExperimentRequest {
        parent: WORKSPACE.into(),
        experiment_id: "other".into(),
        ..Default::default()
    };
    api.call(api.experiments().create_experiment(other))
        .unwrap();
    for (parent, count) in [
        (EXPERIMENT, 5),
        (&format!("{WORKSPACE}/experiments/other"), 3),
    ] {
        let requests = (0..count).map(|i| v1::CreateJobRequest {
            job_id: format!("j{i}"),
            job: Some(v1::Job {
                labels: map(&[("fold", if i % 2 == 0 { "even" } else { "odd" })]),
                ..job()
            }),
            ..Default::default()
        });
        let batch = v1::BatchCreateJobsRequest {
            parent: parent.to_owned(),
            requests: requests.collect(),
            ..Default::default()
        };
        api.call(api.jobs().batch_create_jobs(batch)).unwrap();
    }
    let list = |parent: &str, filter: &str| {
        let (mut names, mut token) = (Vec::new(), String::new());
        loop {
            let list = v1::ListJobsRequest {
                parent: parent.into(),
                page_size: 2,
                page_token: token,
                filter: filter.into(),
            };
            let page = api.call(api.jobs().list_jobs(list)).unwrap();
            names.extend(page.jobs.into_iter().map(|job| job.name));
            token = page.next_page_token;
            if token.is_empty() {
                return names;
            }
        }
    };
    assert_eq!(list(EXPERIMENT, "").len(), 5);
    let everywhere = format!("{WORKSPACE}/experiments/-");
    assert_eq!(list(&everywhere, "").len(), 8);
    let even = list(
        "resourceGroups/-/workspaces/-/experiments/-",
        "labels.fold = even",
    );
    assert_eq!(even.len(), 5, "{even:?}");
    assert!(list(&everywhere, "state = RUNNING").is_empty());
    let bad = v1::ListJobsRequest {
        parent: "nonsense".into(),
        page_size: -1,
        page_token: "nonsense".into(),
        filter: "stat = RUNNING".into(),
    };
    let refused = api.call(api.jobs().list_jobs(bad)).unwrap_err();
    let fields = ["parent", "page_size", "filter", "page_token"].map(str::to_owned);
    assert_eq!(refusal(&refused), (Code::InvalidArgument, fields.to_vec()));
    let absent = v1::ListJobsRequest {
        parent: format!("{WORKSPACE}/experiments/none"),
        ..Default::default()
    };
    let refused = api.call(api.jobs().list_jobs(absent)).unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

#[test]
fn updates_change_what_their_mask_names() {
    let api = Api::start(Ensemble::with_cluster(1));
    let get = || {
        let name = CLUSTER.to_owned();
        api.call(api.clusters().get_cluster(v1::GetClusterRequest { name }))
            .unwrap()
    };
    let update = |cluster: v1::Cluster, update_mask: Option<FieldMask>| {
        let update = v1::UpdateClusterRequest {
            cluster: Some(cluster),
            update_mask,
        };
        api.call(api.clusters().update_cluster(update))
    };
    // As a reader got it, with two changes; only one of them is named.
    let mut cluster = get();
    cluster.labels = map(&[("rack", "8")]);
    cluster.scale_settings = Some(v1::ScaleSettings {
        manual: Some(v1::ManualScaleSettings::default()),
        auto_scale: None,
    });
    cluster.etag = String::new();
    let changed = update(cluster.clone(), mask(&["labels"])).unwrap();
    assert_eq!(changed.labels["rack"], "8");
    assert_eq!(
        changed
            .scale_settings
            .unwrap()
            .manual
            .unwrap()
            .target_node_count,
        1
    );
    // What cannot be changed, and what is not there, is refused and changes nothing.
    for (paths, field) in [(["vm_size"], "update_mask"), (["nonsense"], "update_mask")] {
        let refused = update(cluster.clone(), mask(&paths)).unwrap_err();
        assert_eq!(
            refusal(&refused),
            (Code::InvalidArgument, vec![field.to_owned()])
        );
    }
    let auto = v1::Cluster {
        scale_settings: Some(v1::ScaleSettings {
            manual: None,
            auto_scale: Some(v1::AutoScaleSettings {
                maximum_node_count: 1,
                ..Default::default()
            }),
        }),
        ..cluster.clone()
    };
    let refused = update(auto, mask(&["scale_settings"])).unwrap_err();
    let field = "cluster.scale_settings.auto_scale".to_owned();
    assert_eq!(refusal(&refused), (Code::Unimplemented, vec![field]));
    // A stale etag changes nothing; the present one does, and without a mask what is set is changed.
    let stale = v1::Cluster {
        name: CLUSTER.into(),
        etag: "\"1\"".into(),
        labels: map(&[("rack", "9")]),
        ..Default::default()
    };
    assert_eq!(
        update(stale.clone(), None).unwrap_err().code(),
        Code::Aborted
    );
    let present = v1::Cluster {
        etag: get().etag,
        ..stale
    };
    let changed = update(present, None).unwrap();
    assert_eq!(changed.labels["rack"], "9");
    assert_eq!(
        changed
            .scale_settings
            .unwrap()
            .manual
            .unwrap()
            .target_node_count,
        1
    );
    let all = update(cluster, mask(&["*"])).unwrap();
    assert_eq!(
        all.scale_settings
            .unwrap()
            .manual
            .unwrap()
            .target_node_count,
        0
    );
    // The others have labels or tags.
    let workspace = v1::Workspace {
        name: WORKSPACE.into(),
        tags: map(&[("a", "b")]),
        ..Default::default()
    };
    let update = v1::UpdateWorkspaceRequest {
        workspace: Some(workspace),
        update_mask: None,
    };
    let workspace = api.call(api.workspaces().update_workspace(update)).unwrap();
    assert_eq!(workspace.tags["a"], "b");
    let group = v1::UpdateResourceGroupRequest {
        resource_group: Some(v1::ResourceGroup {
            name: GROUP.into(),
            tags: map(&[("bad name", "b")]),
            ..Default::default()
        }),
        update_mask: None,
    };
    let refused = api
        .call(api.groups().update_resource_group(group))
        .unwrap_err();
    let field = "resource_group.tags[\"bad name\"]".to_owned();
    assert_eq!(refusal(&refused), (Code::InvalidArgument, vec![field]));
}

#[test]
fn deleting_a_workspace_takes_all_it_holds_along_and_its_name_is_free() {
    let api = Api::start(Ensemble::with_cluster(1));
    api.e.submit(
        "runs",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 600" } }),
    );
    api.e.submit(
        "waits",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "true" } }),
    );
    api.e.until_job("runs", "RUNNING");
    let delete = |force| {
        let delete = v1::DeleteWorkspaceRequest {
            name: WORKSPACE.into(),
            force,
            ..Default::default()
        };
        api.call(api.workspaces().delete_workspace(delete))
    };
    let refused = delete(false).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    delete(true).unwrap();
    let get = || {
        let get = v1::GetWorkspaceRequest {
            name: WORKSPACE.into(),
        };
        api.call(api.workspaces().get_workspace(get))
    };
    until("the workspace to be gone", || get().err());
    assert_eq!(get().unwrap_err().code(), Code::NotFound);
    until("the node to be free", || {
        let nodes = api.e.json(&["node", "list"]);
        (nodes[0]["state"] == "AVAILABLE").then_some(())
    });
    let again = v1::CreateWorkspaceRequest {
        parent: GROUP.into(),
        workspace_id: "w".into(),
        ..Default::default()
    };
    api.call(api.workspaces().create_workspace(again)).unwrap();
}

/// What a watch sent: its revision, the ids of what changed, and the names of what was deleted.
type Seen = (i64, Vec<String>, Vec<String>);

struct Jobs {
    stream: tonic::Streaming<v1::WatchJobResponse>,
    /// What there was at the beginning was said.
    begun: bool,
}

impl Jobs {
    fn watch(api: &Api, name: &str, revision: i64) -> Result<Jobs, tonic::Status> {
        let name = name.to_owned();
        let watch = v1::WatchJobRequest { name, revision };
        let stream = api.call(api.jobs().watch_job(watch))?;
        Ok(Jobs {
            stream,
            begun: revision > 0,
        })
    }

    fn next(&mut self, api: &Api) -> Option<Seen> {
        // One without anything in it says how far the stream has come; the first says that there is nothing.
        let message = loop {
            let message = api.runtime.block_on(self.stream.message()).unwrap()?;
            let says = !message.jobs.is_empty() || !message.deleted.is_empty();
            if says || !std::mem::replace(&mut self.begun, true) {
                break message;
            }
        };
        self.begun = true;
        let id = |job: &v1::Job| job.name.rsplit('/').next().unwrap().to_owned();
        let changed = message.jobs.iter().map(id).collect();
        Some((message.revision, changed, message.deleted))
    }
}

#[test]
fn a_watch_shows_each_revision_whole_and_goes_on_where_it_broke_off() {
    let api = Api::start(Ensemble::with_cluster(0));
    let all = format!("{EXPERIMENT}/jobs/-");
    let mut watch = Jobs::watch(&api, &all, 0).unwrap();
    let (begin, existing, _) = watch.next(&api).unwrap();
    assert!(begin > 0 && existing.is_empty());
    let batch = v1::BatchCreateJobsRequest {
        parent: EXPERIMENT.into(),
        requests: ["a", "b", "c"]
            .map(|id| v1::CreateJobRequest {
                job_id: id.into(),
                job: Some(job()),
                ..Default::default()
            })
            .into(),
        ..Default::default()
    };
    api.call(api.jobs().batch_create_jobs(batch)).unwrap();
    let (created, changed, _) = watch.next(&api).unwrap();
    assert_eq!(changed, ["a", "b", "c"], "one revision is one message");
    let name = format!("{EXPERIMENT}/jobs/b");
    let terminate = v1::TerminateJobRequest { name: name.clone() };
    api.call(api.jobs().terminate_job(terminate)).unwrap();
    let delete = v1::DeleteJobRequest {
        name: name.clone(),
        ..Default::default()
    };
    api.call(api.jobs().delete_job(delete)).unwrap();
    let (ended, changed, _) = watch.next(&api).unwrap();
    assert!(ended > created);
    assert_eq!(changed, ["b"]);
    let (last, changed, deleted) = watch.next(&api).unwrap();
    assert_eq!((changed, deleted), (vec![], vec![name.clone()]));
    // Another one that goes on behind the first revision sees the same.
    let mut again = Jobs::watch(&api, &all, begin).unwrap();
    assert_eq!(again.next(&api).unwrap().1, ["a", "b", "c"]);
    assert_eq!(again.next(&api).unwrap().0, ended);
    assert_eq!(again.next(&api).unwrap().2, std::slice::from_ref(&name));
    // One of a single job sees that one only, and ends with it.
    let mut one = Jobs::watch(&api, &name, created).unwrap();
    assert_eq!(one.next(&api).unwrap().0, ended);
    assert_eq!(one.next(&api), None);
    // What exists at the beginning comes first, and nothing that is older.
    let mut late = Jobs::watch(&api, &all, 0).unwrap();
    let (now, existing, _) = late.next(&api).unwrap();
    assert!(now >= last);
    assert_eq!(existing, ["a", "c"]);
}

#[test]
fn a_watch_of_what_is_forgotten_or_never_was_is_refused() {
    let mut api = Api::start(Ensemble::with_cluster(0));
    let all = format!("{EXPERIMENT}/jobs/-");
    let code = |api: &Api, name: &str, revision| {
        let refused = Jobs::watch(api, name, revision).map(|_| ()).unwrap_err();
        refused.code()
    };
    assert_eq!(
        code(&api, &format!("{EXPERIMENT}/jobs/none"), 0),
        Code::NotFound
    );
    assert_eq!(code(&api, "nonsense", 0), Code::InvalidArgument);
    assert_eq!(code(&api, &all, -1), Code::InvalidArgument);
    assert_eq!(code(&api, &all, 1_000_000), Code::OutOfRange);
    // More revisions than are remembered.
    for i in 0..1100 {
        let workspace = v1::Workspace {
            name: WORKSPACE.into(),
            tags: map(&[("i", &i.to_string())]),
            ..Default::default()
        };
        let update = v1::UpdateWorkspaceRequest {
            workspace: Some(workspace),
            update_mask: None,
        };
        api.call(api.workspaces().update_workspace(update)).unwrap();
    }
    let refused = Jobs::watch(&api, &all, 1).map(|_| ()).unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);
    assert!(refused.message().contains("watch again from revision 0"));
    // A coordinator that was restarted remembers as much again.
    let mut watch = Jobs::watch(&api, &all, 0).unwrap();
    let (now, ..) = watch.next(&api).unwrap();
    api.create_job("j", job()).unwrap();
    api.e.coordinator.take().unwrap().kill();
    api.e.start_coordinator();
    api.channel = api.connect();
    let mut watch = Jobs::watch(&api, &all, now).unwrap();
    assert_eq!(watch.next(&api).unwrap().1, ["j"]);
}

#[test]
fn a_watcher_that_takes_nothing_is_cut_off_and_holds_up_nobody() {
    let api = Api::start(Ensemble::with_cluster(0));
    let labels = map(&[("x", &"x".repeat(250))]);
    let big = v1::Job {
        environment_variables: vec![v1::NameValuePair {
            name: "BIG".into(),
            value: "x".repeat(100_000),
        }],
        labels,
        ..job()
    };
    api.create_job("j", big).unwrap();
    let update = |count: u32| {
        let began = Instant::now();
        for i in 0..count {
            let job = v1::Job {
                name: format!("{EXPERIMENT}/jobs/j"),
                labels: map(&[("i", &i.to_string())]),
                ..Default::default()
            };
            let update = v1::UpdateJobRequest {
                job: Some(job),
                update_mask: None,
            };
            api.call(api.jobs().update_job(update)).unwrap();
        }
        began.elapsed()
    };
    // How fast this machine is, and whatever else it does now.
    let alone = update(300);
    let all = format!("{EXPERIMENT}/jobs/-");
    let mut slow = Jobs::watch(&api, &all, 0).unwrap();
    // More than buffers on the way hold, in far more revisions than are remembered.
    let beside = update(1500);
    assert!(
        beside < alone * 5 * 3 + Duration::from_secs(5),
        "it held up others: 300 took {alone:?} without it, 1500 beside it {beside:?}"
    );
    let end = loop {
        match api.runtime.block_on(slow.stream.message()) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::OutOfRange, "{end:?}");
}

#[test]
fn usages_operations_sizes_and_logins_say_what_there_is() {
    let api = Api::start(Ensemble::with_cluster(2));
    until("the nodes to join", || {
        let name = CLUSTER.to_owned();
        let mut clusters = api.clusters();
        let get = clusters.get_cluster(v1::GetClusterRequest { name });
        (api.call(get).unwrap().current_node_count == 2).then_some(())
    });
    let list = v1::ListUsagesRequest::default();
    let usages = api
        .call(api.information().list_usages(list))
        .unwrap()
        .usages;
    let usage = |name: &str| {
        let found = usages
            .iter()
            .find(|u| u.name.as_ref().unwrap().value == name);
        let found = found.unwrap_or_else(|| panic!("{name} in {usages:?}"));
        (found.current_value, found.limit)
    };
    assert!(
        usages
            .iter()
            .all(|usage| usage.unit() == v1::usage::Unit::Count)
    );
    let labels = usages
        .iter()
        .map(|usage| &usage.name.as_ref().unwrap().localized_value);
    assert!(labels.into_iter().any(|label| label == "Clusters"));
    assert_eq!(usage("clusters"), (1, 1000));
    assert_eq!(usage(&format!("nodes/{SIZE}")), (2, 2));
    let (used, all) = usage("cores");
    assert!(used > 0 && used == all);
    let elsewhere = v1::ListUsagesRequest {
        location: "elsewhere".into(),
    };
    let elsewhere = api
        .call(api.information().list_usages(elsewhere))
        .unwrap()
        .usages;
    assert_eq!(elsewhere[0].current_value, 0);
    let list = v1::ListOperationsRequest {};
    let operations = api
        .call(api.information().list_operations(list))
        .unwrap()
        .operations;
    assert!(operations.iter().any(|operation| {
        operation.method == "batchai.v1.JobService/TerminateJob"
            && operation.name == "batchai/workspaces/experiments/jobs/terminate/action"
    }));
    let alias = v1::CreateVmSizeAliasRequest {
        vm_size_alias_id: "Standard_NC6".into(),
        vm_size_alias: Some(v1::VmSizeAlias {
            vm_size: SIZE.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let alias = api
        .call(api.vm_sizes().create_vm_size_alias(alias))
        .unwrap();
    assert_eq!(
        (alias.name.as_str(), alias.vm_size.as_str()),
        ("vmSizeAliases/Standard_NC6", SIZE)
    );
    assert!(!alias.etag.is_empty() && alias.create_time.is_some());
    let list = v1::ListVmSizesRequest {};
    let sizes = api
        .call(api.vm_sizes().list_vm_sizes(list))
        .unwrap()
        .vm_sizes;
    assert_eq!(sizes.len(), 1);
    assert_eq!((sizes[0].vm_size.as_str(), sizes[0].node_count), (SIZE, 2));
    assert_eq!(
        (sizes[0].free_node_count, &sizes[0].aliases[..]),
        (0, &["Standard_NC6".to_owned()][..])
    );
    assert!(sizes[0].image.split(':').count() == 4);
    let login = v1::ListClusterRemoteLoginInformationRequest {
        name: CLUSTER.into(),
        page_size: 1,
        ..Default::default()
    };
    let page = api
        .call(
            api.clusters()
                .list_cluster_remote_login_information(login.clone()),
        )
        .unwrap();
    let first = &page.remote_login_information[0];
    assert_eq!(
        (first.node.as_str(), first.ip_address.as_str(), first.port),
        ("nodes/a1", "127.0.0.1", 22)
    );
    let login = v1::ListClusterRemoteLoginInformationRequest {
        page_token: page.next_page_token,
        ..login
    };
    let page = api
        .call(api.clusters().list_cluster_remote_login_information(login))
        .unwrap();
    assert_eq!(page.remote_login_information[0].node, "nodes/a2");
    assert_eq!(page.next_page_token, "");
    api.e.submit(
        "j",
        json!({ "nodeCount": 2, "customToolkitSettings": { "commandLine": "true" } }),
    );
    assert_eq!(api.e.wait("j"), 0);
    let login = v1::ListJobRemoteLoginInformationRequest {
        name: format!("{EXPERIMENT}/jobs/j"),
        ..Default::default()
    };
    let page = api
        .call(api.jobs().list_job_remote_login_information(login))
        .unwrap();
    assert_eq!(page.remote_login_information.len(), 2);
}

#[test]
fn a_command_runs_on_every_node_as_often_as_is_asked() {
    let e = Ensemble::with_cluster(2);
    let command = "echo $RANK of $WORLD_SIZE, $LOCAL_RANK here, at $MASTER_ADDR:$MASTER_PORT";
    e.submit(
        "j",
        json!({
            "nodeCount": 2,
            "customToolkitSettings": { "commandLine": command, "processesPerNode": 2 }
        }),
    );
    assert_eq!(e.wait("j"), 0);
    for rank in 0..4 {
        let line = e.log("j", &format!("stdout-{rank}.txt"));
        let expected = format!("{rank} of 4, {} here, at 127.0.0.1:", rank % 2);
        assert!(line.starts_with(&expected), "{line}");
    }
    e.submit("fails", json!({
        "nodeCount": 2,
        "customToolkitSettings": { "commandLine": "test $RANK != 1 || exit 7; sleep 600", "processesPerNode": 1 }
    }));
    assert_eq!(e.wait("fails"), 7);
}

#[test]
fn nodes_are_shown_whole() {
    let api = Api::start(Ensemble::with_cluster(1));
    until("the node to join", || {
        let nodes = api.e.json(&["node", "list"]);
        (nodes[0]["state"] == "IDLE").then_some(())
    });
    let name = "nodes/a1".to_owned();
    let node = api
        .call(api.nodes().get_node(v1::GetNodeRequest { name }))
        .unwrap();
    assert_eq!(
        (node.name.as_str(), node.cluster.as_str(), node.job.as_str()),
        ("nodes/a1", CLUSTER, "")
    );
    assert_eq!((node.uid.len(), node.etag.is_empty()), (36, false));
    let (created, heard) = (node.create_time.unwrap(), node.last_contact_time.unwrap());
    assert!(created.seconds > 1_600_000_000 && heard.seconds >= created.seconds - 1);
    let facts = node.facts.unwrap();
    assert_eq!(facts.vm_size, SIZE);
    assert_eq!(facts.image.split(':').count(), 4);
    assert!(facts.cpu_cores > 0 && facts.memory_mib > 100);
    assert_eq!(facts.addresses, ["127.0.0.1"]);
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(facts.boot_id, boot_id.trim());
    assert_eq!(facts.agent_version, env!("CARGO_PKG_VERSION"));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(facts.kernel_version, kernel.trim());
    // As the kernel of this machine and the rights of this test have it.
    let ways = ["cgroup-kill", "cgroup-freezer", "process-tree"];
    assert!(ways.contains(&facts.isolation.as_str()));
    assert!(facts.root.ends_with("nodes/a1"));
    assert_eq!(
        (facts.first_port, facts.last_port, facts.ssh_port),
        (20_000, 29_999, 22)
    );
    let port = u16::try_from(facts.agent_port).unwrap();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    // A busy node says for what.
    let properties =
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 600" } });
    api.e.submit("runs", properties);
    let busy = until("the node to be busy", || {
        let nodes = api.e.json(&["node", "list"]);
        (nodes[0]["state"] == "RUNNING").then(|| nodes[0].clone())
    });
    assert_eq!(busy["job"], format!("{EXPERIMENT}/jobs/runs"));
}

#[test]
fn clusters_say_what_their_nodes_do() {
    let mut api = Api::start(Ensemble::with_cluster(2));
    let counts = |api: &Api| {
        let name = CLUSTER.to_owned();
        let get = api.call(api.clusters().get_cluster(v1::GetClusterRequest { name }));
        let cluster = get.unwrap();
        (cluster.node_state_counts.unwrap(), cluster)
    };
    until("the nodes to be idle", || {
        (counts(&api).0.idle_node_count == 2).then_some(())
    });
    let properties =
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": "sleep 600" } });
    api.e.submit("runs", properties);
    until("one to run", || {
        let counts = counts(&api).0;
        assert_eq!(counts.preparing_node_count, 0, "there is no node set-up");
        ((counts.idle_node_count, counts.running_node_count) == (1, 1)).then_some(())
    });
    // The running one leaves when its job has ended.
    let update = v1::ResizeClusterRequest {
        name: CLUSTER.into(),
        target_node_count: Some(0),
        node_deallocation_option: 3,
        ..Default::default()
    };
    api.call(api.clusters().resize_cluster(update)).unwrap();
    until("one to leave", || {
        let (counts, cluster) = counts(&api);
        let resizing = cluster.allocation_state() == AllocationState::Resizing;
        ((counts.leaving_node_count, cluster.current_node_count) == (1, 1) && resizing)
            .then_some(())
    });
    // More than there are: the cluster says what is missing and what there is.
    let more = v1::CreateClusterRequest {
        parent: WORKSPACE.into(),
        cluster_id: "more".into(),
        cluster: Some(v1::Cluster {
            vm_size: "huge".into(),
            scale_settings: Some(v1::ScaleSettings {
                manual: Some(v1::ManualScaleSettings {
                    target_node_count: 3,
                    ..Default::default()
                }),
                auto_scale: None,
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let cluster = api.call(api.clusters().create_cluster(more)).unwrap();
    let error = &cluster.errors[0];
    assert_eq!(error.code, "TooFewNodes");
    assert!(error.message.contains(SIZE), "{}", error.message);
    let detail = |name: &str| {
        error
            .details
            .iter()
            .find(|d| d.name == name)
            .unwrap()
            .value
            .clone()
    };
    assert_eq!(
        (detail("missing").as_str(), detail("vmSize").as_str()),
        ("3", "huge")
    );
    // A node that is cut down is unusable when it has been silent for too long.
    api.e.agents.remove("a1").unwrap().kill();
    api.e.agents.remove("a2").unwrap().kill();
    until("the nodes to be unusable", || {
        let nodes = api.e.json(&["node", "list"]);
        (nodes[0]["state"] == "UNUSABLE" && nodes[1]["state"] == "UNUSABLE").then_some(())
    });
    assert_eq!(counts(&api).0.unusable_node_count, 1);
}

#[test]
fn jobs_tell_of_their_life() {
    let api = Api::start(Ensemble::with_cluster(1));
    let command = "echo out; exit 3";
    api.e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command } }),
    );
    assert_eq!(api.e.wait("j"), 3);
    let name = format!("{EXPERIMENT}/jobs/j");
    let job = api
        .call(api.jobs().get_job(v1::GetJobRequest { name }))
        .unwrap();
    assert_eq!((job.state(), job.exit_code), (State::Failed, Some(3)));
    let seconds = |time: Option<prost_types::Timestamp>| time.unwrap().seconds;
    assert!(seconds(job.create_time) <= seconds(job.start_time));
    assert!(seconds(job.start_time) <= seconds(job.end_time));
    assert_eq!(job.state_transition_time, job.end_time);
    assert_eq!(job.pending_reason, "");
    let attempt = job.attempt.unwrap();
    assert!(attempt.id.starts_with("1-") && attempt.number == 1);
    let node = &attempt.nodes[0];
    assert_eq!(node.node, "nodes/a1");
    assert_eq!(node.phase(), v1::job_attempt_node::Phase::Ended);
    assert_eq!((node.ranks[0].rank, node.ranks[0].exit_code), (0, Some(3)));
    let stdout = node
        .files
        .iter()
        .find(|file| file.name == "stdout.txt")
        .unwrap();
    assert_eq!(stdout.size_bytes, 4);
    let error = &job.errors[0];
    assert_eq!(error.code, "JobFailed");
    assert!(
        error.message.contains("ended with exit code 3"),
        "{}",
        error.message
    );
    assert!(
        error
            .details
            .iter()
            .any(|d| d.name == "exitCode" && d.value == "3")
    );
}

#[test]
fn what_is_being_deleted_says_so_and_since_when() {
    let api = Api::start(Ensemble::with_cluster(1));
    // It takes its time to end.
    let stubborn = "trap '' TERM; sleep 600 & wait; sleep 600";
    api.e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": stubborn } }),
    );
    api.e.until_job("j", "RUNNING");
    std::thread::sleep(Duration::from_millis(1100));
    let delete = v1::DeleteResourceGroupRequest {
        name: GROUP.into(),
        force: true,
        ..Default::default()
    };
    api.call(api.groups().delete_resource_group(delete))
        .unwrap();
    macro_rules! assert_deleting {
        ($client:ident . $get:ident($request:ident { $name:expr })) => {
            until("it to be deleted", || {
                let name = $name.to_owned();
                let found = api.call(api.$client().$get(v1::$request { name })).unwrap();
                let deleting = found.provisioning_state() == ProvisioningState::Deleting;
                deleting.then(|| {
                    let since = found.provisioning_state_transition_time.unwrap();
                    assert!(since.seconds > found.create_time.unwrap().seconds);
                })
            });
        };
    }
    assert_deleting!(groups.get_resource_group(GetResourceGroupRequest { GROUP }));
    assert_deleting!(workspaces.get_workspace(GetWorkspaceRequest { WORKSPACE }));
    assert_deleting!(experiments.get_experiment(GetExperimentRequest { EXPERIMENT }));
    assert_deleting!(clusters.get_cluster(GetClusterRequest { CLUSTER }));
    assert_deleting!(jobs.get_job(GetJobRequest { format!("{EXPERIMENT}/jobs/j") }));
    // Nothing new is made in it.
    let late = api.create_job("late", job()).unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    assert!(
        late.message().contains("being deleted"),
        "{}",
        late.message()
    );
}

#[test]
fn allocation_states_have_their_time() {
    let api = Api::start(Ensemble::with_cluster(1));
    let get = || {
        let name = CLUSTER.to_owned();
        api.call(api.clusters().get_cluster(v1::GetClusterRequest { name }))
            .unwrap()
    };
    let time = |cluster: &v1::Cluster| {
        let time = cluster.allocation_state_transition_time.unwrap();
        (time.seconds, time.nanos)
    };
    let steady = until("the cluster to be steady", || {
        let cluster = get();
        (cluster.allocation_state() == AllocationState::Steady).then_some(cluster)
    });
    let resize = v1::ResizeClusterRequest {
        name: CLUSTER.into(),
        target_node_count: Some(2),
        ..Default::default()
    };
    let resizing = api.call(api.clusters().resize_cluster(resize)).unwrap();
    assert_eq!(resizing.allocation_state(), AllocationState::Resizing);
    assert!(time(&resizing) > time(&steady));
}

#[test]
fn devices_are_shown_as_their_agent_registers_them() {
    use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
    use batchai_proto::agent::v1::{Hello, SessionRequest, session_request};
    let api = Api::start(Ensemble::start(0));
    let gpu = v1::Gpu {
        uuid: "GPU-1".into(),
        model: "Tesla K80".into(),
        memory_mib: 11_441,
        vendor: "NVIDIA".into(),
        nv_link_count: 4,
    };
    let disk = v1::Disk {
        name: "nvme0n1".into(),
        size_bytes: 3_840_755_982_336,
        rotational: true,
    };
    let numa = v1::NumaNode {
        id: 1,
        cpus: "0-15".into(),
        memory_mib: 128,
    };
    let rdma = v1::RdmaDevice {
        name: "mlx5_0/1".into(),
        link_layer: "InfiniBand".into(),
        port_state: "ACTIVE".into(),
        rate: "200 Gb/sec (4X HDR)".into(),
    };
    let facts = v1::NodeFacts {
        vm_size: "Standard_NC6".into(),
        image: "debian:debian:12:latest".into(),
        boot_id: "boot".into(),
        addresses: vec!["10.0.0.4".into()],
        first_port: 20_000,
        last_port: 29_999,
        gpus: vec![gpu.clone()],
        disks: vec![disk.clone()],
        numa_nodes: vec![numa.clone()],
        rdma_devices: vec![rdma.clone()],
        ..Default::default()
    };
    let hello = Hello {
        node_id: "gpu-node".into(),
        uid: "00000000-0000-0000-0000-000000000001".into(),
        journal_id: "00000000-0000-0000-0000-000000000002".into(),
        facts: Some(facts),
        ..Default::default()
    };
    let hello = SessionRequest {
        message: Some(session_request::Message::Hello(hello)),
    };
    let uid = "00000000-0000-0000-0000-000000000001";
    let identity = Identity::node("gpu-node", uid).unwrap();
    let credentials = api.e.credentials_of(&identity);
    let connector = connector(&api.e.endpoint, &credentials);
    let channel = api.runtime.block_on(connector.connect()).unwrap();
    let mut agent = AgentServiceClient::new(channel);
    let session = api
        .call(agent.session(tokio_stream::iter([hello])))
        .unwrap();
    let name = "nodes/gpu-node".to_owned();
    let node = api
        .call(api.nodes().get_node(v1::GetNodeRequest { name }))
        .unwrap();
    let shown = node.facts.unwrap();
    assert_eq!(shown.gpus, [gpu]);
    assert_eq!(
        (shown.disks, shown.numa_nodes, shown.rdma_devices),
        (vec![disk], vec![numa], vec![rdma])
    );
    drop(session);
}

#[test]
fn every_kind_of_resource_can_be_watched() {
    let api = Api::start(Ensemble::with_cluster(1));
    macro_rules! watched {
        ($client:ident . $watch:ident($request:ident { $name:expr }) . $field:ident) => {{
            let name = $name.to_owned();
            let watch = v1::$request { name, revision: 0 };
            let mut stream = api.call(api.$client().$watch(watch)).unwrap();
            let first = api.runtime.block_on(stream.message()).unwrap().unwrap();
            assert!(first.revision > 0);
            first.$field.len()
        }};
    }
    assert_eq!(
        watched!(
            groups
                .watch_resource_group(WatchResourceGroupRequest { GROUP })
                .resource_groups
        ),
        1
    );
    assert_eq!(
        watched!(workspaces.watch_workspace(WatchWorkspaceRequest { "resourceGroups/-/workspaces/-" }).workspaces),
        1
    );
    assert_eq!(
        watched!(
            experiments
                .watch_experiment(WatchExperimentRequest { EXPERIMENT })
                .experiments
        ),
        1
    );
    assert_eq!(
        watched!(
            clusters
                .watch_cluster(WatchClusterRequest { CLUSTER })
                .clusters
        ),
        1
    );
    assert_eq!(
        watched!(nodes.watch_node(WatchNodeRequest { "nodes/-" }).nodes),
        1
    );
    assert_eq!(
        watched!(storage_aliases.watch_storage_alias(WatchStorageAliasRequest { "storageAliases/-" }).storage_aliases),
        0
    );
    assert_eq!(
        watched!(vm_sizes.watch_vm_size_alias(WatchVmSizeAliasRequest { "vmSizeAliases/-" }).vm_size_aliases),
        0
    );
}

#[test]
fn a_quiet_watch_misses_nothing_and_one_that_comes_too_late_ends() {
    let api = Api::start(Ensemble::with_cluster(0));
    api.create_job("quiet", job()).unwrap();
    let name = format!("{EXPERIMENT}/jobs/quiet");
    let mut watch = Jobs::watch(&api, &name, 0).unwrap();
    let (begin, ..) = watch.next(&api).unwrap();
    // More of other things than is remembered, then more of it at once than a follower may be behind.
    for i in 0..1100 {
        let workspace = v1::Workspace {
            name: WORKSPACE.into(),
            tags: map(&[("i", &i.to_string())]),
            ..Default::default()
        };
        let update = v1::UpdateWorkspaceRequest {
            workspace: Some(workspace),
            update_mask: None,
        };
        api.call(api.workspaces().update_workspace(update)).unwrap();
    }
    let updates = (0..200).map(|i| {
        let job = v1::Job {
            name: name.clone(),
            labels: map(&[("i", &i.to_string())]),
            ..Default::default()
        };
        let update = v1::UpdateJobRequest {
            job: Some(job),
            update_mask: None,
        };
        let mut client = api.jobs();
        async move { client.update_job(update).await.unwrap() }
    });
    api.runtime.block_on(async {
        let mut all = tokio::task::JoinSet::new();
        updates.for_each(|update| {
            all.spawn(update);
        });
        all.join_all().await
    });
    let terminate = v1::TerminateJobRequest { name: name.clone() };
    let ended = api.call(api.jobs().terminate_job(terminate)).unwrap();
    let (mut last, mut seen) = (0, 0);
    while let Some((revision, ..)) = watch.next(&api) {
        (last, seen) = (revision, seen + 1);
    }
    assert_eq!((seen, format!("\"{last}\"")), (201, ended.etag));
    // A single job that has ended: there is nothing to wait for, from whatever revision.
    assert_eq!(Jobs::watch(&api, &name, last).unwrap().next(&api), None);
    let none = Jobs::watch(&api, &format!("{EXPERIMENT}/jobs/none"), last)
        .map(|_| ())
        .unwrap_err();
    assert_eq!(none.code(), Code::NotFound);
    assert!(begin < last);
}
