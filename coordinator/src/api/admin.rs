//! The ensemble itself.

use std::time::Instant;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::hex;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{AcceptRestore, AdoptAttempt, ChangeReplica, DiscardAttempt};
use batchai_proto::v1::admin_service_server::AdminService;
use batchai_proto::v1::replica_status;
use batchai_proto::v1::{
    AcceptRestoreRequest, AcceptRestoreResponse, AddLearnerRequest, AddLearnerResponse,
    AdoptAttemptRequest, AdoptAttemptResponse, ClusterStatus, DiscardAttemptRequest,
    DiscardAttemptResponse, GetClusterStatusRequest, ListStrayAttemptsRequest,
    ListStrayAttemptsResponse, PromoteReplicaRequest, PromoteReplicaResponse, RemoveReplicaRequest,
    RemoveReplicaResponse, ReplicaStatus, SaveSnapshotRequest, SaveSnapshotResponse,
    TakeSnapshotRequest, TakeSnapshotResponse, TransferLeadershipRequest,
    TransferLeadershipResponse,
};
use tonic::{Request, Response, Status};

use super::faults::Faults;
use super::restore::attempt_id;
use super::{Api, Replies};
use crate::call::led_to;
use crate::ensemble::check_endpoint;
use crate::replica::core;
use crate::state::replicas::members;
use crate::state::restore;

#[tonic::async_trait]
impl AdminService for Api {
    async fn get_cluster_status(
        &self,
        _: Request<GetClusterStatusRequest>,
    ) -> Result<Response<ClusterStatus>, Status> {
        let status = self.status().await?;
        let state = self.replica.published().borrow().state.clone();
        let met = self.peers.met();
        let replicas = members(&state).map(|replica| {
            let member = status.members.iter().find(|member| member.id == replica.id);
            let met = met.get(&replica.id);
            let own = replica.id == status.id;
            let version = match own {
                true => self.peers.own().version.clone(),
                false => met.map(|met| met.hello.version.clone()).unwrap_or_default(),
            };
            let last = met.map(|met| met.last).or(own.then(Instant::now));
            ReplicaStatus {
                id: replica.id,
                role: match replica.role() {
                    _ if status.leader == Some(replica.id) => replica_status::Role::Leader,
                    Role::Voter => replica_status::Role::Voter,
                    _ => replica_status::Role::Learner,
                } as i32,
                endpoint: replica.endpoint.clone(),
                version,
                last_contact: last.and_then(|last| last.elapsed().try_into().ok()),
                matched_index: member.map(|member| member.matched),
                receives_snapshot: member.is_some_and(|member| member.in_snapshot),
            }
        });
        Ok(Response::new(ClusterStatus {
            ensemble: state.ensemble.clone(),
            epoch: state.epoch,
            replica_id: status.id,
            leader_id: status.leader.unwrap_or_default(),
            term: status.term,
            committed_index: status.committed,
            applied_index: status.applied,
            first_index: status.first,
            last_index: status.last,
            log_bytes: status.log_bytes,
            snapshot_index: status.snapshot,
            revision: state.revision,
            version: self.peers.own().version.clone(),
            replicas: replicas.collect(),
            state_hash: state
                .comparison
                .digest
                .map_or(String::new(), |digest| hex(&digest.bytes())),
            state_hash_index: state.comparison.decided,
            feature_level: state.feature_level,
            restored: state.restored,
            absent_node_count: restore::absent(&state).count() as i32,
            stray_attempt_count: restore::undecided(&state).count() as i32,
        }))
    }

    async fn add_learner(
        &self,
        request: Request<AddLearnerRequest>,
    ) -> Result<Response<AddLearnerResponse>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        if request.replica_id == 0 {
            faults.invalid("replica_id", "must be a number from 1 on");
        }
        if let Err(error) = check_endpoint(&request.endpoint) {
            faults.invalid("endpoint", error);
        }
        if request.endpoint.contains(',') {
            faults.invalid("endpoint", "a replica has one");
        }
        faults.finish(Some(()))?;
        let own = self.replica.published().borrow().state.clone();
        let own = own.replicas.get(&self.replica.id());
        if own.is_some_and(|own| own.endpoint.is_empty()) {
            let why =
                "it was told no address by which others reach it; start it with --advertise URL";
            return Err(wrong(&crate::state::replicas::name(self.replica.id()), why).into());
        }
        self.change(request.replica_id, Role::Learner, request.endpoint)
            .await?;
        Ok(Response::new(AddLearnerResponse {}))
    }

    async fn promote_replica(
        &self,
        request: Request<PromoteReplicaRequest>,
    ) -> Result<Response<PromoteReplicaResponse>, Status> {
        let id = request.into_inner().replica_id;
        self.change(id, Role::Voter, String::new()).await?;
        Ok(Response::new(PromoteReplicaResponse {}))
    }

    async fn remove_replica(
        &self,
        request: Request<RemoveReplicaRequest>,
    ) -> Result<Response<RemoveReplicaResponse>, Status> {
        let id = request.into_inner().replica_id;
        if id == self.replica.id() && self.replica.must_lead().is_ok() {
            // Whoever leads then removes it: who asked goes there.
            let handed_over = self.replica.hand_over(None).await;
            handed_over.map_err(|error| self.error(error))?;
            self.replica.must_lead()?;
        }
        self.change(id, Role::Removed, String::new()).await?;
        Ok(Response::new(RemoveReplicaResponse {}))
    }

    async fn transfer_leadership(
        &self,
        request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        self.replica.must_lead()?;
        let to = Some(request.into_inner().replica_id).filter(|id| *id != 0);
        if to == Some(self.replica.id()) {
            let leader_id = self.replica.id();
            return Ok(Response::new(TransferLeadershipResponse { leader_id }));
        }
        let done = self.replica.hand_over(to).await;
        done.map_err(|error| self.error(error))?;
        let leader = self.replica.role().borrow().leader;
        Ok(Response::new(TransferLeadershipResponse {
            leader_id: leader.unwrap_or_default(),
        }))
    }

    async fn take_snapshot(
        &self,
        _: Request<TakeSnapshotRequest>,
    ) -> Result<Response<TakeSnapshotResponse>, Status> {
        let saved = self.replica.save().await;
        saved.map_err(|error| self.error(error))?;
        let index = self.status().await?.snapshot;
        Ok(Response::new(TakeSnapshotResponse { index }))
    }

    type SaveSnapshotStream = Replies<SaveSnapshotResponse>;

    async fn save_snapshot(
        &self,
        _: Request<SaveSnapshotRequest>,
    ) -> Result<Response<Self::SaveSnapshotStream>, Status> {
        self.save().await
    }

    async fn accept_restore(
        &self,
        request: Request<AcceptRestoreRequest>,
    ) -> Result<Response<AcceptRestoreResponse>, Status> {
        let force = request.get_ref().force;
        self.write(Kind::AcceptRestore(AcceptRestore { force }))
            .await?;
        Ok(Response::new(AcceptRestoreResponse {}))
    }

    async fn list_stray_attempts(
        &self,
        request: Request<ListStrayAttemptsRequest>,
    ) -> Result<Response<ListStrayAttemptsResponse>, Status> {
        Ok(Response::new(self.strays(request.get_ref()).await?))
    }

    async fn adopt_attempt(
        &self,
        request: Request<AdoptAttemptRequest>,
    ) -> Result<Response<AdoptAttemptResponse>, Status> {
        let adopt = AdoptAttempt {
            attempt: attempt_id(&request.get_ref().attempt)?,
            log_home: self.replica.id() as i64,
        };
        let id = adopt.attempt.clone();
        let state = self.write(Kind::AdoptAttempt(adopt)).await?;
        let job = state.attempts.get(&id).and_then(|attempt| attempt.job());
        let job = job.unwrap_or_default().to_owned();
        Ok(Response::new(AdoptAttemptResponse { job }))
    }

    async fn discard_attempt(
        &self,
        request: Request<DiscardAttemptRequest>,
    ) -> Result<Response<DiscardAttemptResponse>, Status> {
        let attempt = attempt_id(&request.get_ref().attempt)?;
        self.write(Kind::DiscardAttempt(DiscardAttempt { attempt }))
            .await?;
        Ok(Response::new(DiscardAttemptResponse {}))
    }
}

impl Api {
    async fn status(&self) -> Result<core::Status, ApiError> {
        let status = self.replica.status().await;
        status.map_err(|error| self.unavailable(&error))
    }

    async fn change(&self, id: u64, role: Role, endpoint: String) -> Result<(), ApiError> {
        if id == 0 {
            let fault = Fault::new("replica_id", "must be a number from 1 on");
            return Err(ApiError::Invalid(vec![fault]));
        }
        let change = ChangeReplica {
            id,
            role: role as i32,
            endpoint,
        };
        let revision = self.replica.change(change).await;
        led_to(revision.map_err(|error| self.error(error))?);
        Ok(())
    }
}

fn wrong(name: &str, why: &str) -> ApiError {
    ApiError::WrongState {
        name: name.to_owned(),
        why: why.to_owned(),
    }
}
