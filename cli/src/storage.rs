//! The verbs of storage aliases.

use std::process::ExitCode;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;
use batchai_proto::v1::storage_alias::Target;

use crate::args;
use crate::client::{request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all, get_all};

const ALIAS: View<v1::StorageAlias> = View {
    message: "StorageAlias",
    columns: &["Name", "Account", "Share", "Container", "Stead"],
    row: |a| {
        let stead = match &a.target {
            None => String::new(),
            Some(Target::Path(path)) => path.clone(),
            Some(Target::Url(url)) => url.clone(),
            Some(Target::S3Bucket(bucket)) => {
                format!("{} at {}", bucket.bucket, bucket.endpoint)
            }
            Some(Target::FileServer(inside)) => {
                format!("/{} of {}", inside.directory, inside.file_server)
            }
        };
        vec![
            last_id(&a.name).into(),
            a.account_name.clone(),
            a.share_name.clone(),
            a.container_name.clone(),
            stead,
        ]
    },
};

pub async fn alias(command: args::StorageAlias, context: &Context) -> Done {
    let mut client = context.client().await?.storage_aliases();
    let named =
        |which: &args::Which| context.which(which, Kind::StorageAlias, || Ok(String::new()));
    match command {
        args::StorageAlias::Create(given) => {
            let create = v1::CreateStorageAliasRequest {
                storage_alias_id: given.name.clone(),
                storage_alias: Some(of(*given, context)?),
                request_id: request_id(),
                validate_only: false,
            };
            let alias = send_once(create, |r| {
                let mut client = client.clone();
                async move { client.create_storage_alias(r).await }
            })
            .await?;
            context.printer.show(&ALIAS, &alias)?;
        }
        args::StorageAlias::List => {
            let list = v1::ListStorageAliasesRequest::default();
            let all = all_pages!(client.list_storage_aliases, list, storage_aliases);
            context.printer.list(&ALIAS, &all)?;
        }
        args::StorageAlias::Show { which } => {
            let names = named(&which)?;
            let found = get_all!(client.get_storage_alias, GetStorageAliasRequest, names);
            context.printer.named(&ALIAS, &found)?;
        }
        args::StorageAlias::Delete { which, confirm: c } => {
            let delete = |name| v1::DeleteStorageAliasRequest {
                name,
                etag: String::new(),
            };
            delete_all!(
                client.delete_storage_alias,
                get_storage_alias,
                (delete, GetStorageAliasRequest),
                named(&which)?,
                &c
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What was given, of which the command line has seen that it is one thing for one thing.
fn of(given: args::StorageAliasCreate, context: &Context) -> Result<v1::StorageAlias, CliError> {
    let server = given.file_server.as_ref();
    let server = server.map(|server| context.file_server(server, &given.parent));
    let directory = given.directory.unwrap_or_default();
    let server = server.transpose()?.map(|file_server| {
        Target::FileServer(v1::FileServerDirectory {
            file_server,
            directory,
        })
    });
    let region = given.s3_region.unwrap_or_default();
    let bucket = given
        .s3_bucket
        .zip(given.s3_endpoint)
        .map(|(bucket, endpoint)| {
            Target::S3Bucket(v1::S3Bucket {
                endpoint,
                bucket,
                region,
            })
        });
    let target = given.path.map(Target::Path).or(bucket).or(server);
    Ok(v1::StorageAlias {
        account_name: given.account,
        share_name: given.share.unwrap_or_default(),
        container_name: given.container.unwrap_or_default(),
        target: target.or(given.url.map(Target::Url)),
        ..Default::default()
    })
}
