//! Makes machines nodes, and keeps their certificates fresh.

use std::sync::Arc;
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::time::{millis, now};
use batchai_common::tls::{Authority, Identity};
use batchai_proto::agent::v1::join_service_server::JoinService;
use batchai_proto::agent::v1::{JoinRequest, JoinResponse, RenewRequest, RenewResponse};
use batchai_proto::internal::v1::UseToken;
use batchai_proto::internal::v1::command::Kind;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use crate::access::{TokenFault, Who, find_token};
use crate::call::caller;
use crate::replica::handle::unavailable;
use crate::replica::{Handle, ReplicaError};
use crate::state::Rejection;

/// How long a node's certificate is good. Agents ask for another when a third of that is left.
const LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// Lets machines in.
pub struct Join {
    pub replica: Handle,
    /// None where certificates come from elsewhere, or are not used.
    pub authority: Option<Arc<Authority>>,
}

#[tonic::async_trait]
impl JoinService for Join {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        let authority = self.authority()?;
        let identity = Identity::node(&request.node_id, &request.uid)
            .map_err(|error| invalid("node_id", &error))?;
        let state = self.replica.published().borrow().state.clone();
        let known = find_token(&state, &request.token, millis(&now()));
        // One that was made just now may not be known here yet. What is no token at all costs no round of the replicas.
        let state = match known {
            Err(TokenFault::Unknown) => self
                .replica
                .read()
                .await
                .map_err(|error| status(&self.replica, error))?,
            _ => state,
        };
        let token = find_token(&state, &request.token, millis(&now())).map_err(|error| {
            let node = &identity;
            tracing::warn!(%node, %error, "a token to join is refused");
            let why = "the token is not good: it is wrong, was revoked or has expired";
            ApiError::Unauthenticated { why }
        })?;
        // Before the token is used: what cannot be signed uses none.
        let certificate = issue(authority, &request.certificate_request, &identity)?;
        let used = UseToken {
            name: token.name.clone(),
            node: identity.to_string(),
            uid: request.uid,
            digest: Sha256::digest(&request.certificate_request).to_vec(),
        };
        let used = self.replica.propose(Kind::UseToken(used)).await;
        used.map_err(|error| status(&self.replica, error))?;
        tracing::info!(node = %identity, token = token.name, "joined");
        Ok(Response::new(JoinResponse {
            certificate,
            authority: authority.certificate().to_owned(),
            vm_size: token.vm_size.clone(),
        }))
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let authority = self.authority()?;
        let caller = caller();
        let Who::Known(identity @ Identity::Node { .. }) = caller.who.clone() else {
            let why = "only a node renews its certificate here";
            return Err(ApiError::Unauthenticated { why }.into());
        };
        // As things are now that the whole request is here, whenever it was begun.
        let state = self
            .replica
            .read()
            .await
            .map_err(|error| status(&self.replica, error))?;
        if let Some(refusal) = caller.refusal(&state) {
            return Err(refusal.into());
        }
        let certificate = issue(authority, &request.get_ref().certificate_request, &identity)?;
        Ok(Response::new(RenewResponse {
            certificate,
            authority: authority.certificate().to_owned(),
        }))
    }
}

impl Join {
    fn authority(&self) -> Result<&Authority, ApiError> {
        self.authority
            .as_deref()
            .ok_or_else(|| ApiError::WrongState {
                name: "certificates".to_owned(),
                why: "the ensemble makes none; give the agent --credentials FILE, or none in a lab"
                    .to_owned(),
            })
    }
}

fn issue(authority: &Authority, request: &str, identity: &Identity) -> Result<String, ApiError> {
    if request.len() > REQUEST_BYTES_MAX {
        return Err(invalid("certificate_request", &"is too long"));
    }
    let issued = authority.issue(request, identity, &[], LIFETIME);
    issued.map_err(|error| invalid("certificate_request", &error))
}

fn invalid(field: &str, error: &dyn std::fmt::Display) -> ApiError {
    ApiError::Invalid(vec![Fault::new(field, error.to_string())])
}

fn status(replica: &Handle, error: ReplicaError) -> ApiError {
    match error {
        ReplicaError::Rejected(Rejection::WrongState { name, why }) => {
            ApiError::WrongState { name, why }
        }
        ReplicaError::Rejected(_) => ApiError::Unauthenticated {
            why: "the token is not good: it was revoked just now",
        },
        error => unavailable(replica, &error),
    }
}
