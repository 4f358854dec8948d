//! Tells the story of file servers: served by a node, mounted by clusters and jobs, shared with whom that makes mount them, and gone.

use batchai_proto::agent::v1::{FileServerPlace, FileServerReport, Report};
use batchai_proto::internal::v1::command::Kind as C;
use batchai_proto::internal::v1::{
    AcceptRestore, Delete, DeleteFileServer, ExpelNode, PlaceFileServer, RecordReport, RegisterNode,
};
use batchai_proto::v1::job::State as JobState;
use batchai_proto::v1::job_attempt_node::Phase as P;

use crate::scheduler::explain::pending_reason;
use crate::scheduler::schedule;
use crate::state::assignments::assignments;
use crate::state::tests::{Ensemble, through_a_snapshot};
use crate::state::*;

const WORKSPACE: &str = "resourceGroups/g/workspaces/w";
const SERVER: &str = "resourceGroups/g/workspaces/w/fileServers/f";
const STORE: &str = "nodes/store";

/// A node that offers storage.
fn store(e: &mut Ensemble, name: &str, free_gb: i64) {
    let facts = v1::NodeFacts {
        vm_size: "storage".into(),
        boot_id: format!("boot of {name}"),
        storage_root: "/srv".into(),
        storage_free_bytes: free_gb * 1_000_000_000,
        storage_bytes: free_gb * 1_000_000_000,
        addresses: vec!["10.0.0.9".into()],
        first_port: 20_000,
        last_port: 20_099,
        ..Default::default()
    };
    e.ok(C::RegisterNode(RegisterNode {
        name: name.into(),
        uid: format!("uid-{name}"),
        incarnation: "1".into(),
        facts: Some(facts),
        empty: true,
    }));
    e.heard.last.insert(name.into(), e.heard.now);
    e.settle();
}

fn spec() -> v1::FileServer {
    v1::FileServer {
        name: SERVER.into(),
        uid: "uid-f".into(),
        vm_size: "storage".into(),
        data_disks: Some(v1::DataDisks {
            disk_count: 2,
            disk_size_in_gb: 50,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn mounts() -> v1::MountVolumes {
    v1::MountVolumes {
        file_servers: vec![v1::FileServerMount {
            file_server: SERVER.into(),
            relative_mount_path: "data".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn report(node: &str, said: FileServerReport) -> C {
    C::RecordReport(RecordReport {
        node: node.into(),
        uid: format!("uid-{node}"),
        incarnation: "1".into(),
        report: Some(Report {
            file_servers: vec![said],
            ..Report::default()
        }),
    })
}

fn served(port: i32) -> FileServerReport {
    FileServerReport {
        uid: "uid-f".into(),
        place: Some(FileServerPlace {
            address: "10.0.0.9".into(),
            port,
            path: "/srv/f".into(),
            backend: "ganesha".into(),
            nfs_version: 4,
        }),
        ..FileServerReport::default()
    }
}

fn delete(force: bool, purge: bool) -> C {
    let delete = Delete {
        name: SERVER.into(),
        etag: String::new(),
        force,
    };
    C::DeleteFileServer(DeleteFileServer {
        delete: Some(delete),
        purge,
    })
}

/// One that is served, with a cluster of two nodes beside it.
fn begun() -> Ensemble {
    let mut e = Ensemble::with_nodes(2, 2);
    store(&mut e, STORE, 200);
    e.ok(C::CreateFileServer(spec()));
    e.settle();
    e.ok(report(STORE, served(2049)));
    e
}

fn server(e: &Ensemble) -> &FileServer {
    &e.state.file_servers[SERVER]
}

fn clients(e: &Ensemble) -> Vec<String> {
    let list = assignments(&e.state, STORE);
    list.file_servers[0].clients.clone()
}

#[test]
fn one_is_served_by_a_node_of_its_size_with_storage_and_room() {
    let mut e = Ensemble::with_nodes(1, 1);
    e.ok(C::CreateFileServer(spec()));
    store(&mut e, "nodes/full", 99);
    assert_eq!(server(&e).node, None);
    assert_eq!(server(&e).state(), v1::ProvisioningState::Creating);
    store(&mut e, STORE, 100);
    assert_eq!(server(&e).node.as_deref(), Some(STORE));
    let list = assignments(&e.state, STORE);
    assert_eq!(list.file_servers[0].uid, "uid-f");
    assert!(list.revision > 0 && list.file_servers[0].clients.is_empty());
    // Others do not speak for it.
    e.ok(report("nodes/full", served(1)));
    assert_eq!(server(&e).place, None);
    let failure = v1::ResourceError {
        code: "FileServerNotServed".into(),
        ..Default::default()
    };
    e.ok(report(
        STORE,
        FileServerReport {
            uid: "uid-f".into(),
            failure: Some(failure),
            ..FileServerReport::default()
        },
    ));
    assert_eq!(server(&e).state(), v1::ProvisioningState::Failed);
    e.ok(report(STORE, served(2049)));
    assert_eq!(server(&e).state(), v1::ProvisioningState::Succeeded);
    // Saying it again changes nothing.
    let revision = server(&e).revision;
    e.ok(report(STORE, served(2049)));
    assert_eq!(server(&e).revision, revision);
}

#[test]
fn a_job_waits_for_what_it_mounts_and_its_nodes_may_mount_it_while_it_runs() {
    let mut e = Ensemble::with_nodes(2, 2);
    e.ok(C::CreateFileServer(spec()));
    let job = e.submit("j", 1, |job| job.mount_volumes = Some(mounts()));
    // Others do not wait for it.
    let other = e.submit("k", 1, |_| {});
    assert_eq!(e.state_of(&job), JobState::Queued);
    assert_eq!(e.state_of(&other), JobState::Running);
    let reason = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(reason.contains(SERVER), "{reason}");
    store(&mut e, STORE, 200);
    e.ok(report(STORE, served(2049)));
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Running);
    let node = e.attempt(&job).nodes[0].node.clone();
    let assigned = &assignments(&e.state, &node).assignments[0];
    assert_eq!(assigned.file_servers[0].place.as_ref().unwrap().port, 2049);
    assert!(!assigned.file_servers[0].local);
    let revision = e.state.nodes[STORE].assigned;
    assert_eq!(clients(&e), ["10.0.0.1"]);
    let refused = e.try_apply(delete(false, false)).unwrap_err().to_string();
    assert!(refused.contains(&job), "{refused}");
    e.see(&job, 0, P::Ready, &[]);
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert!(e.state.nodes[STORE].assigned > revision);
    assert!(clients(&e).is_empty());
}

#[test]
fn what_was_planned_is_not_placed_when_its_file_server_has_gone_meanwhile() {
    let mut e = begun();
    let job = e.queue("j", 1, |job| job.mount_volumes = Some(mounts()));
    let mut plans = schedule(&e.state, &e.heard, 1);
    assert_eq!(plans.len(), 1);
    e.ok(delete(true, false));
    let placed = e.try_apply(C::Place(plans.remove(0)));
    assert!(placed.is_err(), "{placed:?}");
    assert_eq!(e.state_of(&job), JobState::Queued);
    let reason = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(reason.contains("is being deleted"), "{reason}");
}

#[test]
fn nodes_are_told_when_a_restore_is_accepted() {
    let mut e = begun();
    e.ok(delete(false, true));
    let mut state = e.state.clone();
    state.restored = true;
    e.become_state(state);
    let list = assignments(&e.state, STORE);
    assert!(list.restored && list.file_servers[0].ending);
    e.ok(C::AcceptRestore(AcceptRestore { force: true }));
    let told = assignments(&e.state, STORE);
    assert!(!told.restored && told.revision > list.revision);
}

#[test]
fn a_cluster_is_set_up_when_its_file_server_is_there_and_anew_when_that_moves() {
    let mut e = Ensemble::with_nodes(0, 2);
    e.ok(C::CreateFileServer(spec()));
    let cluster = format!("{WORKSPACE}/clusters/mounting");
    e.ok(C::CreateCluster(v1::Cluster {
        name: cluster.clone(),
        vm_size: "small".into(),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(v1::ManualScaleSettings {
                target_node_count: 1,
                ..Default::default()
            }),
            auto_scale: None,
        }),
        node_setup: Some(v1::NodeSetup {
            mount_volumes: Some(mounts()),
            ..Default::default()
        }),
        ..Default::default()
    }));
    e.settle();
    let node = e.state.clusters[&cluster]
        .members
        .get_min()
        .unwrap()
        .clone();
    assert_eq!(e.state.nodes[&node].attempt, None, "set up too early");
    store(&mut e, STORE, 200);
    e.ok(report(STORE, served(2049)));
    e.settle();
    let list = assignments(&e.state, &node);
    assert_eq!(list.mounts.unwrap().file_servers[0].uid, "uid-f");
    assert_eq!(clients(&e), ["10.0.0.1"]);
    let finish = |e: &mut Ensemble| {
        let attempt = e.state.nodes[&node].attempt.clone().unwrap();
        let attempt = e.state.attempts[&attempt].clone();
        e.see_attempt(&attempt, 0, P::Ready, &[], None);
        e.see_attempt(&attempt, 0, P::Ended, &[(0, Some(0))], None);
    };
    finish(&mut e);
    assert!(setup::is_done(&e.state, &e.state.nodes[&node]));
    let revision = e.state.nodes[&node].assigned;
    e.ok(report(STORE, served(2050)));
    assert!(e.state.nodes[&node].assigned > revision);
    assert!(!setup::is_done(&e.state, &e.state.nodes[&node]));
    e.settle();
    finish(&mut e);
    assert!(setup::is_done(&e.state, &e.state.nodes[&node]));
    // A snapshot has all of it.
    assert_eq!(through_a_snapshot(&e.state), e.state);
}

#[test]
fn what_is_deleted_goes_when_its_node_has_said_so_or_was_expelled() {
    let mut e = begun();
    e.ok(delete(false, true));
    assert_eq!(server(&e).state(), v1::ProvisioningState::Deleting);
    let list = assignments(&e.state, STORE);
    assert!(list.file_servers[0].ending && list.file_servers[0].purge);
    let job = v1::Job {
        name: format!("{WORKSPACE}/experiments/e/jobs/late"),
        cluster: format!("{WORKSPACE}/clusters/c"),
        mount_volumes: Some(mounts()),
        ..Default::default()
    };
    let refused = e.try_apply(C::CreateJob(job)).unwrap_err().to_string();
    assert!(refused.contains("is being deleted"), "{refused}");
    let gone = FileServerReport {
        uid: "uid-f".into(),
        gone: true,
        ..FileServerReport::default()
    };
    // One that is served no more is not purged yet.
    e.ok(report(STORE, gone.clone()));
    assert!(e.state.file_servers.contains_key(SERVER));
    let purged = FileServerReport {
        purged: true,
        ..gone.clone()
    };
    e.ok(report(STORE, purged));
    assert!(!e.state.file_servers.contains_key(SERVER));
    assert!(assignments(&e.state, STORE).file_servers.is_empty());
    // One whose disk is lost is let go of.
    let mut e = begun();
    e.ok(delete(false, true));
    e.ok(delete(false, false));
    assert!(server(&e).purge);
    e.ok(delete(true, false));
    assert!(!server(&e).purge);
    e.ok(report(STORE, gone.clone()));
    assert!(!e.state.file_servers.contains_key(SERVER));
    // One that is to stay is not gone because its node says so.
    let mut e = begun();
    e.ok(report(STORE, gone));
    assert_eq!(server(&e).state(), v1::ProvisioningState::Succeeded);
    e.ok(C::ExpelNode(ExpelNode { name: STORE.into() }));
    assert_eq!(
        server(&e).failure.as_ref().unwrap().code,
        "FileServerNodeExpelled"
    );
    e.ok(delete(false, false));
    assert!(!e.state.file_servers.contains_key(SERVER));
}

#[test]
fn room_is_promised_once() {
    let mut e = Ensemble::with_nodes(0, 0);
    store(&mut e, STORE, 250);
    let names = ["a", "b", "c"].map(|id| format!("{WORKSPACE}/fileServers/{id}"));
    for name in &names {
        let (name, uid) = (name.clone(), format!("uid of {name}"));
        e.ok(C::CreateFileServer(v1::FileServer {
            name,
            uid,
            ..spec()
        }));
    }
    e.settle();
    let nodes = |e: &Ensemble| {
        names
            .each_ref()
            .map(|name| e.state.file_servers[name].node.is_some())
    };
    assert_eq!(nodes(&e), [true, true, false]);
    assert!(e.state.nodes[STORE].facts.storage_bytes < 300_000_000_000);
    let third = C::PlaceFileServer(PlaceFileServer {
        name: names[2].clone(),
        node: STORE.into(),
    });
    assert!(e.try_apply(third).is_err(), "the State sees it as well");
    store(&mut e, "nodes/more", 100);
    assert_eq!(nodes(&e), [true; 3]);
}

#[test]
fn what_was_served_once_is_looked_for_and_never_made_anew() {
    let mut e = Ensemble::with_nodes(0, 0);
    store(&mut e, STORE, 200);
    e.ok(C::CreateFileServer(spec()));
    e.settle();
    let existing = |e: &Ensemble| assignments(&e.state, STORE).file_servers[0].existing;
    assert!(!existing(&e));
    e.ok(report(STORE, served(2049)));
    assert!(existing(&e));
    // Its machine may have been made anew, under the same name.
    e.ok(C::ExpelNode(ExpelNode { name: STORE.into() }));
    let facts = e.state.nodes[STORE].facts.clone();
    e.ok(C::RegisterNode(RegisterNode {
        name: STORE.into(),
        uid: "anew".into(),
        incarnation: "1".into(),
        facts: Some(v1::NodeFacts::clone(&facts)),
        empty: true,
    }));
    assert!(existing(&e));
    // Of what a backup does not know nothing is ended.
    assert!(!assignments(&e.state, STORE).restored);
    let mut state = e.state.clone();
    state.restored = true;
    assert!(assignments(&state, STORE).restored);
}

#[test]
fn a_job_whose_file_server_will_not_come_says_so() {
    let mut e = begun();
    e.ok(C::ExpelNode(ExpelNode { name: STORE.into() }));
    let job = e.submit("j", 1, |job| job.mount_volumes = Some(mounts()));
    let reason = |e: &Ensemble| pending_reason(&e.state, &e.heard, e.job(&job));
    assert_eq!(e.state_of(&job), JobState::Queued);
    assert!(reason(&e).contains("was expelled"), "{}", reason(&e));
    let refused = e.try_apply(delete(false, false)).unwrap_err().to_string();
    assert!(refused.contains(&job), "{refused}");
    e.ok(delete(true, false));
    assert!(
        reason(&e).contains("does not exist any more"),
        "{}",
        reason(&e)
    );
}

#[test]
fn a_workspace_goes_with_its_file_servers() {
    let mut e = begun();
    let delete = |force| {
        C::Delete(Delete {
            name: WORKSPACE.into(),
            etag: String::new(),
            force,
        })
    };
    e.ok(delete(true));
    e.settle();
    let server = server(&e);
    assert!(server.deleting.is_some() && !server.purge);
    let gone = FileServerReport {
        uid: "uid-f".into(),
        gone: true,
        ..FileServerReport::default()
    };
    e.ok(report(STORE, gone));
    e.settle();
    assert!(!e.state.workspaces.contains_key(WORKSPACE));
}

const ALIAS: &str = "storageAliases/data";

/// Volumes that a storage alias is for.
fn share() -> v1::MountVolumes {
    v1::MountVolumes {
        azure_file_shares: vec![v1::AzureFileShare {
            account_name: "acc".into(),
            azure_file_url: "https://acc.file.core.windows.net/data/below".into(),
            relative_mount_path: "afs".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn alias() -> C {
    let inside = v1::FileServerDirectory {
        file_server: SERVER.into(),
        directory: "sets".into(),
    };
    C::CreateStorageAlias(v1::StorageAlias {
        name: ALIAS.into(),
        account_name: "acc".into(),
        share_name: "data".into(),
        target: Some(v1::storage_alias::Target::FileServer(inside)),
        ..Default::default()
    })
}

fn delete_alias() -> C {
    C::Delete(Delete {
        name: ALIAS.into(),
        ..Default::default()
    })
}

#[test]
fn what_a_storage_alias_leads_to_is_mounted_as_if_it_were_named() {
    let mut e = Ensemble::with_nodes(2, 2);
    let refused = e.try_apply(alias()).unwrap_err().to_string();
    assert!(refused.contains(SERVER), "{refused}");
    e.ok(C::CreateFileServer(spec()));
    e.ok(alias());
    let job = e.submit("j", 1, |job| job.mount_volumes = Some(share()));
    assert_eq!(e.state_of(&job), JobState::Queued);
    let reason = pending_reason(&e.state, &e.heard, e.job(&job));
    assert!(reason.contains(SERVER), "{reason}");
    // Neither goes while it waits, nor while it runs.
    let stay = |e: &mut Ensemble| {
        for gone in [delete(false, false), delete_alias()] {
            let refused = e.try_apply(gone).unwrap_err().to_string();
            assert!(refused.contains("jobs/j mounts"), "{refused}");
        }
    };
    stay(&mut e);
    store(&mut e, STORE, 200);
    e.ok(report(STORE, served(2049)));
    e.settle();
    assert_eq!(e.state_of(&job), JobState::Running);
    let node = e.attempt(&job).nodes[0].node.clone();
    let assigned = assignments(&e.state, &node).assignments.remove(0);
    assert_eq!(assigned.file_servers[0].place.as_ref().unwrap().port, 2049);
    assert_eq!(assigned.storage["afs"].name, ALIAS);
    assert_eq!(clients(&e), ["10.0.0.1"]);
    stay(&mut e);
    e.see(&job, 0, P::Ready, &[]);
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    assert!(clients(&e).is_empty());
    let refused = e.try_apply(delete(false, false)).unwrap_err().to_string();
    assert!(
        refused.contains("storageAliases/data leads to it"),
        "{refused}"
    );
    assert_eq!(through_a_snapshot(&e.state), e.state);
    e.ok(delete_alias());
    e.ok(delete(false, false));
}

#[test]
fn an_alias_that_leads_to_nothing_any_more_is_named() {
    let mut e = begun();
    e.ok(alias());
    // One that came in time keeps nobody from mending it.
    e.submit("waits", 9, |job| job.mount_volumes = Some(share()));
    assert!(e.try_apply(delete_alias()).is_err());
    e.ok(delete(true, false));
    let job = v1::Job {
        name: format!("{WORKSPACE}/experiments/e/jobs/late"),
        cluster: format!("{WORKSPACE}/clusters/c"),
        mount_volumes: Some(share()),
        ..Default::default()
    };
    let create = || C::CreateJob(job.clone());
    let refused = e.try_apply(create()).unwrap_err().to_string();
    assert!(refused.contains("is being deleted"), "{refused}");
    let gone = FileServerReport {
        uid: "uid-f".into(),
        gone: true,
        ..FileServerReport::default()
    };
    e.ok(report(STORE, gone));
    let refused = e.try_apply(create()).unwrap_err().to_string();
    for part in [ALIAS, SERVER, "does not exist any more"] {
        assert!(refused.contains(part), "{refused}");
    }
    e.ok(delete_alias());
    e.ok(create());
}

#[test]
fn what_is_mounted_already_does_not_become_a_file_server() {
    let mut e = begun();
    let job = e.submit("j", 1, |job| job.mount_volumes = Some(share()));
    let refused = e.try_apply(alias()).unwrap_err().to_string();
    assert!(
        refused.contains("jobs/j mounts what it is for"),
        "{refused}"
    );
    // Other shares of the account, and others' targets, are nothing to it.
    let C::CreateStorageAlias(own) = alias() else {
        panic!("it makes one");
    };
    e.ok(C::CreateStorageAlias(v1::StorageAlias {
        name: "storageAliases/other".into(),
        share_name: "other".into(),
        ..own.clone()
    }));
    e.ok(C::CreateStorageAlias(v1::StorageAlias {
        target: Some(v1::storage_alias::Target::Path("/lab".into())),
        ..own
    }));
    e.ok(delete_alias());
    e.see(&job, 0, P::Ready, &[]);
    e.see(&job, 0, P::Ended, &[(0, Some(0))]);
    e.ok(alias());
    assert!(clients(&e).is_empty());
}
