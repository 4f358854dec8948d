//! What lies behind shares and containers of storage accounts.

use batchai_common::names::Kind as Noun;
use batchai_common::{paths, storage};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1::storage_alias::Target;
use batchai_proto::v1::storage_alias_service_server::StorageAliasService;
use batchai_proto::v1::{
    CreateStorageAliasRequest, DeleteStorageAliasRequest, GetStorageAliasRequest,
    ListStorageAliasesRequest, ListStorageAliasesResponse, StorageAlias, WatchStorageAliasRequest,
    WatchStorageAliasResponse,
};
use tonic::{Request, Response, Status};

use super::faults::Faults;
use super::{Api, Replies, fields};

const PATH_MAX: usize = 4096;

#[tonic::async_trait]
impl StorageAliasService for Api {
    async fn create_storage_alias(
        &self,
        request: Request<CreateStorageAliasRequest>,
    ) -> Result<Response<StorageAlias>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let given = request.storage_alias.unwrap_or_default();
        let id = &request.storage_alias_id;
        let name = faults.new_name(Noun::StorageAlias, "", "storage_alias_id", id);
        fields::check_output_only(&mut faults, "storage_alias", "StorageAlias", &given);
        check(&mut faults, &given);
        let name = faults.finish(name)?;
        let alias = StorageAlias {
            name: name.to_string(),
            ..given
        };
        let create = Kind::CreateStorageAlias(alias);
        let state = self.write_once(create, once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_storage_alias(
        &self,
        request: Request<GetStorageAliasRequest>,
    ) -> Result<Response<StorageAlias>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_storage_aliases(
        &self,
        request: Request<ListStorageAliasesRequest>,
    ) -> Result<Response<ListStorageAliasesResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (storage_aliases, next_page_token) = self.list("", page, &request.filter).await?;
        Ok(Response::new(ListStorageAliasesResponse {
            storage_aliases,
            next_page_token,
        }))
    }

    async fn delete_storage_alias(
        &self,
        request: Request<DeleteStorageAliasRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteStorageAliasRequest { name, etag } = request.into_inner();
        self.delete(Noun::StorageAlias, &name, etag, false).await?;
        Ok(Response::new(()))
    }

    type WatchStorageAliasStream = Replies<WatchStorageAliasResponse>;

    async fn watch_storage_alias(
        &self,
        request: Request<WatchStorageAliasRequest>,
    ) -> Result<Response<Self::WatchStorageAliasStream>, Status> {
        let WatchStorageAliasRequest { name, revision } = request.into_inner();
        let reply = |revision, storage_aliases, deleted| WatchStorageAliasResponse {
            revision,
            storage_aliases,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }
}

fn check(faults: &mut Faults, given: &StorageAlias) {
    if let Some(Target::FileServer(directory)) = &given.target {
        let field = "storage_alias.file_server.file_server";
        faults.name(field, Noun::FileServer, &directory.file_server);
    }
    let mut must = |field: &str, checked: Result<(), String>| {
        if let Err(why) = checked {
            faults.invalid(format!("storage_alias.{field}"), why);
        }
    };
    must("account_name", storage::check_account(&given.account_name));
    match (given.share_name.as_str(), given.container_name.as_str()) {
        ("", "") => must(
            "share_name",
            Err("must be given, or a container_name".into()),
        ),
        ("", container) => must("container_name", storage::check_container(container)),
        (share, "") => must("share_name", storage::check_share(share)),
        _ => must(
            "container_name",
            Err("must be left out beside a share_name".into()),
        ),
    }
    match &given.target {
        None => must(
            "path",
            Err(
                "must be given, or an s3_bucket, a url or a file_server: what lies behind it"
                    .into(),
            ),
        ),
        Some(Target::Path(path)) => must("path", check_path(path)),
        Some(Target::S3Bucket(bucket)) => {
            let endpoint = storage::endpoint(&bucket.endpoint);
            must("s3_bucket.endpoint", endpoint.map(drop));
            must("s3_bucket.bucket", storage::check_container(&bucket.bucket));
            must("s3_bucket.region", storage::check_region(&bucket.region));
        }
        Some(Target::Url(url)) if given.container_name.is_empty() => {
            must("url", storage::share(url).map(drop))
        }
        Some(Target::Url(url)) => must("url", storage::blob_endpoint(url).map(drop)),
        Some(Target::FileServer(inside)) => {
            let directory = &inside.directory;
            must("file_server.directory", paths::inside(directory).map(drop));
        }
    }
}

fn check_path(path: &str) -> Result<(), String> {
    let mut parts = path.split('/');
    match path.starts_with('/')
        && path.len() <= PATH_MAX
        && !path.contains('\0')
        && !parts.any(|part| part == "..")
    {
        true => Ok(()),
        false => Err(format!(
            "must be an absolute path of at most {PATH_MAX} bytes, without `..`"
        )),
    }
}
