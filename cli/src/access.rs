//! The verbs of roles, tokens and certificates.
//!
//! Secrets and keys are made here and never sent: of a token the coordinator learns the digest, of a key the public half.

use std::path::Path;
use std::process::ExitCode;

use batchai_common::names::{Kind, hex, last_id};
use batchai_common::tls::Credentials;
use batchai_common::tls::authority::Request;
use batchai_common::tls::credentials::write_private;
use batchai_proto::v1;
use batchai_proto::v1::role_binding::Role;
use sha2::{Digest as _, Sha256};

use crate::args;
use crate::client::{Client, Target, request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all};

const BINDING: View<v1::RoleBinding> = View {
    message: "RoleBinding",
    columns: &["Name", "Member", "Role", "Scope"],
    row: |b| {
        vec![
            last_id(&b.name).into(),
            b.member.clone(),
            b.role().as_str_name().to_lowercase(),
            b.scope.clone(),
        ]
    },
};

const TOKEN: View<v1::Token> = View {
    message: "Token",
    columns: &["Name", "Kind", "Member", "Uses", "Expires"],
    row: |t| {
        let uses = match t.use_count_max {
            0 => String::new(),
            most => format!("{} of {most}", t.use_count),
        };
        vec![
            last_id(&t.name).into(),
            t.kind().as_str_name().to_lowercase(),
            t.member.clone(),
            uses,
            t.expire_time
                .map(|time| time.to_string())
                .unwrap_or_default(),
        ]
    },
};

/// A token that is to be.
pub struct NewToken {
    pub id: String,
    pub settings: v1::Token,
}

impl NewToken {
    fn named(name: Option<String>, settings: v1::Token) -> NewToken {
        let id = name.unwrap_or_else(|| format!("t-{}", uuid::Uuid::new_v4().simple()));
        NewToken { id, settings }
    }

    /// Makes it; returns its text: for a node with the digest of the authority, which it does not know.
    pub async fn create(self, client: &Client, target: &Target) -> Result<String, CliError> {
        // Two UUIDs of 122 random bits each.
        let random = || uuid::Uuid::new_v4().simple().to_string();
        let secret = random() + &random();
        let create = v1::CreateTokenRequest {
            token_id: self.id.clone(),
            token: Some(v1::Token {
                secret_sha256: hex(&Sha256::digest(&secret)),
                ..self.settings
            }),
            request_id: request_id(),
            validate_only: false,
        };
        let token = send_once(create, |r| {
            let mut access = client.access();
            async move { access.create_token(r).await }
        })
        .await?;
        let text = format!("{}.{secret}", self.id);
        Ok(match token.kind() {
            v1::token::Kind::Node => format!("{text}.{}", hex(&authority(target)?)),
            _ => text,
        })
    }
}

/// The digest of the authority that one trusts oneself.
fn authority(target: &Target) -> Result<[u8; 32], CliError> {
    let missing = || CliError::Usage("a lab without TLS needs no tokens to join".to_owned());
    let path = target.credentials.as_deref().ok_or_else(missing)?;
    let failed = |source| CliError::Credentials {
        path: path.to_owned(),
        source,
    };
    let read = Credentials::read(path).map_err(failed)?;
    read.authority().ok_or_else(missing)
}

fn role(role: args::Role) -> i32 {
    let role = match role {
        args::Role::Reader => Role::Reader,
        args::Role::Contributor => Role::Contributor,
        args::Role::Owner => Role::Owner,
        args::Role::Admin => Role::Admin,
    };
    role as i32
}

fn scope(scope: &args::Scope) -> String {
    match (&scope.group, &scope.workspace) {
        (None, _) => String::new(),
        (Some(group), None) => format!("resourceGroups/{group}"),
        (Some(group), Some(workspace)) => format!("resourceGroups/{group}/workspaces/{workspace}"),
    }
}

fn ttl(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

pub async fn roles(command: args::RoleCommand, context: &Context) -> Done {
    let mut access = context.client().await?.access();
    match command {
        args::RoleCommand::Create {
            name,
            user,
            role: given,
            scope: within,
        } => {
            let made = || {
                let legal = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
                let user: String = user.chars().take(32).map(legal).collect();
                let random = uuid::Uuid::new_v4().simple().to_string();
                format!("{user}-{}", &random[..8])
            };
            let create = v1::CreateRoleBindingRequest {
                role_binding_id: name.unwrap_or_else(made),
                role_binding: Some(v1::RoleBinding {
                    member: format!("users/{user}"),
                    role: role(given),
                    scope: scope(&within),
                    ..Default::default()
                }),
                request_id: request_id(),
                validate_only: false,
            };
            let binding = send_once(create, |r| {
                let mut access = access.clone();
                async move { access.create_role_binding(r).await }
            })
            .await?;
            context.printer.show(&BINDING, &binding)?;
        }
        args::RoleCommand::List => {
            let list = v1::ListRoleBindingsRequest::default();
            let all = all_pages!(access.list_role_bindings, list, role_bindings);
            context.printer.list(&BINDING, &all)?;
        }
        args::RoleCommand::Delete { which, confirm: c } => {
            let names = context.which(&which, Kind::RoleBinding, || Ok(String::new()))?;
            let delete = |name| v1::DeleteRoleBindingRequest {
                name,
                etag: String::new(),
            };
            delete_all!(
                access.delete_role_binding,
                get_role_binding,
                (delete, GetRoleBindingRequest),
                names,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn user(command: args::User, context: &Context) -> Done {
    match command {
        args::User::Token(args::UserToken::Create {
            name,
            user,
            ttl: good,
            role: most,
            scope: within,
        }) => {
            let settings = v1::Token {
                kind: v1::token::Kind::User as i32,
                member: format!("users/{user}"),
                role: most.map(role).unwrap_or_default(),
                scope: scope(&within),
                ttl: ttl(good.ttl),
                ..Default::default()
            };
            create(NewToken::named(name, settings), context).await
        }
        args::User::Token(args::UserToken::List) => list(context).await,
        args::User::Token(args::UserToken::Revoke { which, confirm: c }) => {
            revoke(&which, &c, context).await
        }
        args::User::Certificate(args::Certificate::Create {
            user,
            ttl: good,
            to,
        }) => {
            let client = context.client().await?;
            certify(&client, &user, good, &to).await
        }
        args::User::Certificate(args::Certificate::Revoke { user, confirm: c }) => {
            let member = format!("users/{user}");
            confirm(&format!("Revoke all certificates of {member}?"), c.yes)?;
            let revoke = v1::RevokeCertificatesRequest { member };
            let mut access = context.client().await?.access();
            access.revoke_certificates(request(revoke)).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Has a key certified that never leaves this machine.
async fn certify(client: &Client, user: &str, seconds: i64, to: &Path) -> Done {
    if to.exists() {
        return Err(CliError::Usage(format!("{} exists already", to.display())));
    }
    let failed = |source| CliError::Credentials {
        path: to.to_owned(),
        source,
    };
    let Request {
        key,
        request: asked,
    } = Request::new().map_err(failed)?;
    let issue = v1::IssueCertificateRequest {
        member: format!("users/{user}"),
        certificate_request: asked,
        ttl: ttl(seconds),
    };
    let issued = client.access().issue_certificate(request(issue)).await?;
    let v1::IssueCertificateResponse {
        certificate,
        authority,
    } = issued.into_inner();
    write_private(to, &format!("{certificate}{key}{authority}")).map_err(failed)?;
    say!("{}", to.display());
    Ok(ExitCode::SUCCESS)
}

/// The verbs of tokens by which machines join.
pub async fn node_token(command: args::NodeToken, context: &Context) -> Done {
    match command {
        args::NodeToken::Create {
            name,
            vm_size,
            ttl: good,
            uses,
        } => {
            let settings = v1::Token {
                kind: v1::token::Kind::Node as i32,
                vm_size,
                use_count_max: uses,
                ttl: ttl(good.ttl),
                ..Default::default()
            };
            create(NewToken::named(name, settings), context).await
        }
        args::NodeToken::List => list(context).await,
        args::NodeToken::Revoke { which, confirm: c } => revoke(&which, &c, context).await,
    }
}

async fn create(new: NewToken, context: &Context) -> Done {
    let client = context.client().await?;
    println!("{}", new.create(&client, &context.target()).await?);
    Ok(ExitCode::SUCCESS)
}

async fn list(context: &Context) -> Done {
    let mut access = context.client().await?.access();
    let list = v1::ListTokensRequest::default();
    let all = all_pages!(access.list_tokens, list, tokens);
    context.printer.list(&TOKEN, &all)?;
    Ok(ExitCode::SUCCESS)
}

async fn revoke(which: &args::Which, c: &args::Confirm, context: &Context) -> Done {
    let mut access = context.client().await?.access();
    let names = context.which(which, Kind::Token, || Ok(String::new()))?;
    let delete = |name| v1::DeleteTokenRequest {
        name,
        etag: String::new(),
    };
    delete_all!(
        access.delete_token,
        get_token,
        (delete, GetTokenRequest),
        names,
        c
    );
    Ok(ExitCode::SUCCESS)
}

/// One line a record, as it comes; in JSON, one object a line.
pub async fn audit(command: args::Audit, context: &Context) -> Done {
    let args::Audit::Tail { lines, follow } = command;
    let tail = v1::TailAuditLogRequest {
        record_count: lines,
        follow,
    };
    let mut access = context.client().await?.access();
    let mut records = access.tail_audit_log(tail).await?.into_inner();
    while let Some(record) = records.message().await? {
        context.printer.line("AuditRecord", &record, |r| {
            let time = r.time.map(|time| time.to_string()).unwrap_or_default();
            // Quoted: others typed it, and it is shown to an administrator's terminal.
            let command: Vec<_> = r.command.iter().map(|word| format!("{word:?}")).collect();
            vec![
                time,
                r.result.clone(),
                r.caller.clone(),
                r.address.clone(),
                r.method.clone(),
                r.name.clone(),
                r.revision.to_string(),
                command.join(" "),
            ]
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
