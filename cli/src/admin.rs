//! The verbs of the ensemble itself.

use std::process::ExitCode;

use batchai_proto::v1;

use crate::args::{Admin, Replica};
use crate::backup;
use crate::client::request;
use crate::context::Context;
use crate::output::{View, confirm};
use crate::resources::Done;

const REPLICA: View<v1::ReplicaStatus> = View {
    message: "ReplicaStatus",
    columns: &["Id", "Role", "Endpoint", "Version", "Heard", "Log"],
    row: |r| {
        let ago = r
            .last_contact
            .and_then(|ago| std::time::Duration::try_from(ago).ok());
        vec![
            r.id.to_string(),
            r.role().as_str_name().to_lowercase(),
            r.endpoint.clone(),
            r.version.clone(),
            ago.map_or("never".to_owned(), |ago| {
                format!("{:.1} s ago", ago.as_secs_f64())
            }),
            match (r.matched_index, r.receives_snapshot) {
                (_, true) => "gets a snapshot".to_owned(),
                (Some(index), false) => format!("up to {index}"),
                (None, false) => String::new(),
            },
        ]
    },
};

const STATUS: View<v1::ClusterStatus> = View {
    message: "ClusterStatus",
    columns: &["Ensemble", "Leader", "Term", "Applied", "Log", "Snapshot"],
    row: |s| {
        vec![
            s.ensemble.clone(),
            s.leader_id.to_string(),
            s.term.to_string(),
            s.applied_index.to_string(),
            format!("{} to {}", s.first_index, s.last_index),
            s.snapshot_index.to_string(),
        ]
    },
};

pub async fn admin(command: Admin, context: &Context) -> Done {
    let mut client = match command {
        Admin::Snapshot(command) => return backup::snapshot(command, context).await,
        Admin::Stray(command) => return backup::stray(command, context).await,
        _ => context.client().await?.admin(),
    };
    match command {
        Admin::Status => {
            let status = client.get_cluster_status(request(v1::GetClusterStatusRequest {}));
            context.printer.show(&STATUS, &status.await?.into_inner())?;
        }
        Admin::TakeSnapshot => {
            let taken = client.take_snapshot(request(v1::TakeSnapshotRequest {}));
            let index = taken.await?.into_inner().index;
            say!("batchai: a snapshot up to entry {index} was written");
        }
        Admin::Replica(command) => return replica(command, context).await,
        Admin::Snapshot(_) | Admin::Stray(_) => unreachable!("they went elsewhere"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn replica(command: Replica, context: &Context) -> Done {
    let mut client = context.client().await?.admin();
    match command {
        Replica::List => {
            let status = client.get_cluster_status(request(v1::GetClusterStatusRequest {}));
            let replicas = status.await?.into_inner().replicas;
            context.printer.list(&REPLICA, &replicas)?;
        }
        Replica::Add { id, at } => {
            let add = v1::AddLearnerRequest {
                replica_id: id,
                endpoint: at,
            };
            client.add_learner(request(add)).await?;
            say!(
                "batchai: replica {id} gets the log; give it a vote: batchai admin replica promote --id {id}"
            );
        }
        Replica::Promote { id } => {
            let promote = v1::PromoteReplicaRequest { replica_id: id };
            client.promote_replica(request(promote)).await?;
        }
        Replica::Remove { id, confirm: c } => {
            confirm(
                &format!("Remove replica {id}? Its number is not used again."),
                c.yes,
            )?;
            let remove = v1::RemoveReplicaRequest { replica_id: id };
            client.remove_replica(request(remove)).await?;
        }
        Replica::Lead { id } => {
            let transfer = v1::TransferLeadershipRequest { replica_id: id };
            let led = client.transfer_leadership(request(transfer)).await?;
            say!("batchai: replica {} leads", led.into_inner().leader_id);
        }
    }
    Ok(ExitCode::SUCCESS)
}
