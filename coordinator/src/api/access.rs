//! Role bindings, tokens and certificates.

use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_common::tls::Identity;
use batchai_proto::internal::v1::RevokeCertificates;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1::access_service_server::AccessService;
use batchai_proto::v1::role_binding::Role;
use batchai_proto::v1::token::Kind as TokenKind;
use batchai_proto::v1::{
    AuditRecord, CreateRoleBindingRequest, CreateTokenRequest, DeleteRoleBindingRequest,
    DeleteTokenRequest, GetRoleBindingRequest, GetTokenRequest, IssueCertificateRequest,
    IssueCertificateResponse, ListRoleBindingsRequest, ListRoleBindingsResponse, ListTokensRequest,
    ListTokensResponse, RevokeCertificatesRequest, RoleBinding, TailAuditLogRequest, Token,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::faults::Faults;
use super::page::Query;
use super::{Api, Replies, fields, internal};
use crate::access::{Caller, SET_UP, rules};
use crate::audit::Audit;
use crate::call::caller;

/// A token, and a user's certificate, is good for so long at most.
const LIFETIME_MAX: Duration = Duration::from_secs(366 * 24 * 3600);
/// Records of the audit log that are sent first.
const RECORDS_DEFAULT: usize = 10;
const RECORDS_MAX: usize = 10_000;
/// Records that who follows has not taken.
const RECORDS_WAITING_MAX: usize = 64;
const USES_MAX: i32 = 10_000;
const REQUEST_BYTES_MAX: usize = 16 << 10;

#[tonic::async_trait]
impl AccessService for Api {
    async fn create_role_binding(
        &self,
        request: Request<CreateRoleBindingRequest>,
    ) -> Result<Response<RoleBinding>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let given = request.role_binding.unwrap_or_default();
        let name = faults.new_name(
            Noun::RoleBinding,
            "",
            "role_binding_id",
            &request.role_binding_id,
        );
        fields::check_output_only(&mut faults, "role_binding", "RoleBinding", &given);
        check_user(&mut faults, "role_binding.member", &given.member);
        check_scope(&mut faults, "role_binding.scope", &given.scope);
        check_role(&mut faults, "role_binding.role", given.role, true);
        if given.role() == Role::Admin && !given.scope.is_empty() {
            let why = "must be empty: an administrator is one of the whole ensemble";
            faults.invalid("role_binding.scope", why);
        }
        let name = faults.finish(name)?;
        if given.role() == Role::Admin {
            demand(&caller(), "batchai/tokens/write", "")?;
        }
        let binding = RoleBinding {
            name: name.to_string(),
            ..given
        };
        let state = self
            .write_once(Kind::CreateRoleBinding(binding), once)
            .await?;
        self.show(&state, name.as_str())
    }

    async fn get_role_binding(
        &self,
        request: Request<GetRoleBindingRequest>,
    ) -> Result<Response<RoleBinding>, Status> {
        let found = self.binding(&request.get_ref().name, "read").await?;
        Ok(Response::new(found))
    }

    async fn list_role_bindings(
        &self,
        request: Request<ListRoleBindingsRequest>,
    ) -> Result<Response<ListRoleBindingsResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let query = Query::new(
            (Noun::RoleBinding, "RoleBinding"),
            "",
            page,
            &request.filter,
        )?;
        let (state, caller) = (self.read().await?, caller());
        // What one may not see is not there: not in pages, and not between them.
        let may = |binding: &RoleBinding| caller.may("batchai/roleBindings/read", &binding.scope);
        let view = |name: &str| {
            let found = state.role_bindings.get(name)?;
            may(found).then(|| RoleBinding::clone(found))
        };
        let (role_bindings, next_page_token) =
            tokio::task::block_in_place(|| query.page(&state, view));
        Ok(Response::new(ListRoleBindingsResponse {
            role_bindings,
            next_page_token,
        }))
    }

    async fn delete_role_binding(
        &self,
        request: Request<DeleteRoleBindingRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteRoleBindingRequest { name, etag } = request.into_inner();
        let found = self.binding(&name, "delete").await?;
        if found.role() == Role::Admin {
            demand(&caller(), "batchai/tokens/delete", "")?;
        }
        // What was looked at, and nothing that came in its place.
        let etag = match etag.as_str() {
            "" => found.etag,
            _ => etag,
        };
        self.delete(Noun::RoleBinding, &name, etag, false).await?;
        Ok(Response::new(()))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<Token>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let mut token = request.token.unwrap_or_default();
        let name = faults.new_name(Noun::Token, "", "token_id", &request.token_id);
        fields::check_output_only(&mut faults, "token", "Token", &token);
        check_token(&mut faults, &mut token);
        let name = faults.finish(name)?;
        token.name = name.to_string();
        let state = self.write_once(Kind::CreateToken(token), once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_token(
        &self,
        request: Request<GetTokenRequest>,
    ) -> Result<Response<Token>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_tokens(
        &self,
        request: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (tokens, next_page_token) = self.list("", page, &request.filter).await?;
        Ok(Response::new(ListTokensResponse {
            tokens,
            next_page_token,
        }))
    }

    async fn delete_token(
        &self,
        request: Request<DeleteTokenRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteTokenRequest { name, etag } = request.into_inner();
        self.delete(Noun::Token, &name, etag, false).await?;
        Ok(Response::new(()))
    }

    async fn issue_certificate(
        &self,
        request: Request<IssueCertificateRequest>,
    ) -> Result<Response<IssueCertificateResponse>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let identity = check_user(&mut faults, "member", &request.member);
        if request.certificate_request.len() > REQUEST_BYTES_MAX {
            let why = format!("has more than {REQUEST_BYTES_MAX} bytes");
            faults.invalid("certificate_request", why);
        }
        let ttl = lifetime(&mut faults, "ttl", request.ttl);
        let identity = faults.finish(identity)?;
        let authority = self.authority()?;
        let ttl = ttl.unwrap_or(LIFETIME_MAX);
        let issued = authority.issue(&request.certificate_request, &identity, &[], ttl);
        let certificate = issued.map_err(|error| invalid("certificate_request", &error))?;
        Ok(Response::new(IssueCertificateResponse {
            certificate,
            authority: authority.certificate().to_owned(),
        }))
    }

    type TailAuditLogStream = Replies<AuditRecord>;

    async fn tail_audit_log(
        &self,
        request: Request<TailAuditLogRequest>,
    ) -> Result<Response<Self::TailAuditLogStream>, Status> {
        let TailAuditLogRequest {
            record_count,
            follow,
        } = request.into_inner();
        let count = match record_count {
            0 => RECORDS_DEFAULT,
            count => usize::try_from(count)
                .map_err(|_| invalid("record_count", &"must not be negative"))?
                .min(RECORDS_MAX),
        };
        let (outbox, replies) = mpsc::channel(RECORDS_WAITING_MAX);
        let (audit, shutdown) = (self.audit.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = tail(audit, (count, follow), outbox) => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    async fn revoke_certificates(
        &self,
        request: Request<RevokeCertificatesRequest>,
    ) -> Result<Response<()>, Status> {
        let member = request.into_inner().member;
        let mut faults = Faults::default();
        let is_node = Name::parse(Noun::Node, &member).is_ok();
        if !is_node {
            check_user(&mut faults, "member", &member);
        }
        faults.finish(Some(()))?;
        self.write(Kind::RevokeCertificates(RevokeCertificates { member }))
            .await?;
        Ok(Response::new(()))
    }
}

/// Sends the latest records, then what comes, until nobody takes them.
async fn tail(
    audit: Audit,
    (count, follow): (usize, bool),
    outbox: mpsc::Sender<Result<AuditRecord, Status>>,
) {
    // Before the file is read: what is written meanwhile comes twice rather than never.
    let mut coming = audit.follow();
    let latest = tokio::task::spawn_blocking(move || audit.latest(count)).await;
    let latest = match latest.map_err(std::io::Error::other).and_then(|read| read) {
        Ok(latest) => latest,
        Err(error) => {
            // Who asked may be gone.
            let _ = outbox.send(Err(internal(error).into())).await;
            return;
        }
    };
    let read: Vec<_> = latest
        .iter()
        .rev()
        .take(RECORDS_WAITING_MAX)
        .cloned()
        .collect();
    for record in latest {
        if outbox.send(Ok(record)).await.is_err() {
            return;
        }
    }
    if !follow {
        return;
    }
    loop {
        let record = tokio::select! {
            record = coming.recv() => record,
            () = outbox.closed() => return,
        };
        let next = match record {
            Ok(record) if read.contains(&record) => continue,
            Ok(record) => Ok(record),
            Err(RecvError::Lagged(_)) => Err(ApiError::TooSlow { revision: 0 }.into()),
            Err(RecvError::Closed) => return,
        };
        let over = next.is_err();
        if outbox.send(next).await.is_err() || over {
            return;
        }
    }
}

impl Api {
    /// A role binding of a part of the ensemble where the caller may do something with it; for others it is not there.
    async fn binding(&self, name: &str, verb: &str) -> Result<RoleBinding, Status> {
        let found = self.get::<RoleBinding>(name).await?.into_inner();
        let permission = format!("batchai/roleBindings/{verb}");
        match caller().may(&permission, &found.scope) {
            true => Ok(found),
            false => Err(ApiError::NotFound {
                kind: Noun::RoleBinding,
                name: name.to_owned(),
            }
            .into()),
        }
    }

    fn authority(&self) -> Result<&batchai_common::tls::Authority, ApiError> {
        self.authority
            .as_deref()
            .ok_or_else(|| ApiError::WrongState {
                name: "certificates".to_owned(),
                why: "the ensemble has none of its own making: get one where its others come from"
                    .to_owned(),
            })
    }
}

/// Refuses who may not do something to what has a name.
pub(super) fn demand(caller: &Caller, permission: &str, name: &str) -> Result<(), ApiError> {
    debug_assert!(
        rules::RULES
            .iter()
            .any(|(_, known, _)| [known, SET_UP].contains(&permission))
    );
    match caller.may(permission, name) {
        true => Ok(()),
        false => Err(ApiError::Forbidden {
            caller: caller.label(),
            permission: permission.to_owned(),
            name: name.to_owned(),
        }),
    }
}

fn invalid(field: &str, error: &dyn std::fmt::Display) -> ApiError {
    ApiError::Invalid(vec![Fault::new(field, error.to_string())])
}

fn check_user(faults: &mut Faults, field: &str, member: &str) -> Option<Identity> {
    let identity = member.strip_prefix("users/").map(Identity::user);
    match identity {
        Some(Ok(identity)) => return Some(identity),
        Some(Err(error)) => faults.invalid(field, error.to_string()),
        None => faults.invalid(field, "must be users/NAME"),
    }
    None
}

fn check_scope(faults: &mut Faults, field: &str, scope: &str) {
    let kinds = [Noun::ResourceGroup, Noun::Workspace];
    if !scope.is_empty() && !kinds.iter().any(|kind| Name::parse(*kind, scope).is_ok()) {
        faults.invalid(
            field,
            "must be the full name of a resource group or workspace, or empty",
        );
    }
}

fn check_role(faults: &mut Faults, field: &str, role: i32, required: bool) {
    match Role::try_from(role) {
        Ok(Role::Unspecified) if required => faults.invalid(field, "must be given"),
        Ok(_) => {}
        Err(_) => faults.invalid(field, "is none of the roles"),
    }
}

fn check_token(faults: &mut Faults, token: &mut Token) {
    let digest = &token.secret_sha256;
    if batchai_common::names::check_id(Noun::Bundle, digest).is_err() {
        let why = "must be a SHA-256 in 64 hexadecimal digits";
        faults.invalid("token.secret_sha256", why);
    }
    lifetime(faults, "token.ttl", token.ttl);
    let only = |faults: &mut Faults, field: &str, set: bool, kind: &str| {
        if set {
            faults.invalid(field, format!("must be left out of all but {kind}"));
        }
    };
    let kind = TokenKind::try_from(token.kind);
    if kind != Ok(TokenKind::User) {
        only(faults, "token.member", !token.member.is_empty(), "USER");
        only(faults, "token.role", token.role != 0, "USER");
        only(faults, "token.scope", !token.scope.is_empty(), "USER");
    }
    if kind != Ok(TokenKind::Node) {
        only(
            faults,
            "token.use_count_max",
            token.use_count_max != 0,
            "NODE",
        );
        only(faults, "token.vm_size", !token.vm_size.is_empty(), "NODE");
    }
    match kind {
        Ok(TokenKind::User) => {
            check_user(faults, "token.member", &token.member);
            check_role(faults, "token.role", token.role, false);
            check_scope(faults, "token.scope", &token.scope);
        }
        Ok(TokenKind::Node) => {
            faults.text("token.vm_size", &token.vm_size, false);
            if !(0..=USES_MAX).contains(&token.use_count_max) {
                let why = format!("must be from 1 to {USES_MAX}");
                faults.invalid("token.use_count_max", why);
            }
            token.use_count_max = token.use_count_max.max(1);
        }
        Ok(TokenKind::Replica) => faults.not_served("token.kind", true),
        Ok(TokenKind::Unspecified) | Err(_) => {
            faults.invalid("token.kind", "must be USER or NODE");
        }
    }
}

fn lifetime(
    faults: &mut Faults,
    field: &str,
    given: Option<prost_types::Duration>,
) -> Option<Duration> {
    let ttl = Duration::try_from(given?).unwrap_or_default();
    if ttl < Duration::from_secs(1) || ttl > LIFETIME_MAX {
        let most = LIFETIME_MAX.as_secs();
        faults.invalid(field, format!("must be from 1 s to {most} s"));
    }
    Some(ttl)
}
