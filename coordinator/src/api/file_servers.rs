//! File servers.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Delete, DeleteFileServer};
use batchai_proto::v1::data_disks::{CachingType, StorageAccountType};
use batchai_proto::v1::file_server_service_server::FileServerService;
use batchai_proto::v1::{
    CreateFileServerRequest, DataDisks, DeleteFileServerRequest, FileServer, GetFileServerRequest,
    ListFileServerFilesRequest, ListFileServerFilesResponse, ListFileServersRequest,
    ListFileServersResponse, ReadFileServerFileRequest, ReadFileServerFileResponse,
    SshConfiguration, Warning, WriteFileServerFileRequest, WriteFileServerFileResponse,
};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::faults::Faults;
use super::{Api, Replies, cluster_spec, fields, parse, seal};

/// As many ranges as the original took.
const RANGES_MAX: usize = 400;
const DISKS_MAX: i32 = 64;
/// A petabyte each.
const DISK_GB_MAX: i32 = 1_000_000;

#[tonic::async_trait]
impl FileServerService for Api {
    async fn create_file_server(
        &self,
        request: Request<CreateFileServerRequest>,
    ) -> Result<Response<FileServer>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let shown = seal::file_server_without_secrets(&request);
        let once = faults.once(&request.request_id, request.validate_only, &shown);
        let (parent, id) = (&request.parent, &request.file_server_id);
        let name = faults.new_name(Noun::FileServer, parent, "file_server_id", id);
        let server = check(&mut faults, request.file_server.unwrap_or_default());
        let name = faults.finish(name)?;
        let server = FileServer {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            ..server
        };
        let state = self
            .write_once(Kind::CreateFileServer(server), once)
            .await?;
        self.show(&state, name.as_str())
    }

    async fn get_file_server(
        &self,
        request: Request<GetFileServerRequest>,
    ) -> Result<Response<FileServer>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_file_servers(
        &self,
        request: Request<ListFileServersRequest>,
    ) -> Result<Response<ListFileServersResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (file_servers, next_page_token) =
            self.list(&request.parent, page, &request.filter).await?;
        Ok(Response::new(ListFileServersResponse {
            file_servers,
            next_page_token,
        }))
    }

    async fn delete_file_server(
        &self,
        request: Request<DeleteFileServerRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteFileServerRequest {
            name,
            etag,
            force,
            purge,
        } = request.into_inner();
        let name = parse(Noun::FileServer, &name)?.into();
        let delete = Some(Delete { name, etag, force });
        self.write(Kind::DeleteFileServer(DeleteFileServer { delete, purge }))
            .await?;
        Ok(Response::new(()))
    }

    async fn list_file_server_files(
        &self,
        request: Request<ListFileServerFilesRequest>,
    ) -> Result<Response<ListFileServerFilesResponse>, Status> {
        let page = self.list_server_files(request.into_inner()).await?;
        Ok(Response::new(page))
    }

    type ReadFileServerFileStream = Replies<ReadFileServerFileResponse>;

    async fn read_file_server_file(
        &self,
        request: Request<ReadFileServerFileRequest>,
    ) -> Result<Response<Self::ReadFileServerFileStream>, Status> {
        self.read_server_file(request.into_inner()).await
    }

    type WriteFileServerFileStream = Replies<WriteFileServerFileResponse>;

    async fn write_file_server_file(
        &self,
        request: Request<Streaming<WriteFileServerFileRequest>>,
    ) -> Result<Response<Self::WriteFileServerFileStream>, Status> {
        self.write_server_file(request.into_inner()).await
    }
}

/// What is kept of what a user set.
fn check(faults: &mut Faults, given: FileServer) -> FileServer {
    fields::check_output_only(faults, "file_server", "FileServer", &given);
    if !given.node.is_empty() {
        faults.name("file_server.node", Noun::Node, &given.node);
    }
    faults.text("file_server.vm_size", &given.vm_size, true);
    faults.text("file_server.subnet", &given.subnet, false);
    if given.ssh_configuration.is_none() {
        faults.invalid("file_server.ssh_configuration", "must be given");
    }
    match &given.data_disks {
        Some(disks) => check_disks(faults, disks),
        None => faults.invalid("file_server.data_disks", "must be given"),
    }
    FileServer {
        vm_size: given.vm_size,
        ssh_configuration: given.ssh_configuration.map(|ssh| check_ssh(faults, ssh)),
        data_disks: given.data_disks,
        subnet: given.subnet,
        node: given.node,
        ..FileServer::default()
    }
}

fn check_ssh(faults: &mut Faults, given: SshConfiguration) -> SshConfiguration {
    const AT: &str = "file_server.ssh_configuration";
    let ranges = &given.public_ips_to_allow;
    if ranges.len() > RANGES_MAX {
        let why = format!("has more than {RANGES_MAX} elements");
        faults.invalid(format!("{AT}.public_ips_to_allow"), why);
    }
    for (i, range) in ranges.iter().enumerate().take(RANGES_MAX) {
        let (address, bits) = range.split_once('/').unwrap_or((range, "0"));
        let address: Result<core::net::IpAddr, _> = address.parse();
        let most = address
            .as_ref()
            .map_or(0, |a| if a.is_ipv4() { 32 } else { 128 });
        let legal = bits.parse::<u8>().is_ok_and(|bits| bits <= most);
        if range != "*" && (address.is_err() || !legal) {
            let field = format!("{AT}.public_ips_to_allow[{i}]");
            faults.invalid(
                field,
                "must be an address, a range such as 10.0.0.0/24, or *",
            );
        }
    }
    let at = format!("{AT}.user_account_settings");
    if given.user_account_settings.is_none() {
        faults.invalid(&at, "must be given");
    }
    let account = given.user_account_settings;
    SshConfiguration {
        user_account_settings: account.map(|given| cluster_spec::check_account(faults, &at, given)),
        ..given
    }
}

fn check_disks(faults: &mut Faults, given: &DataDisks) {
    const AT: &str = "file_server.data_disks";
    if !(1..=DISK_GB_MAX).contains(&given.disk_size_in_gb) {
        let why = format!("must be from 1 to {DISK_GB_MAX}");
        faults.invalid(format!("{AT}.disk_size_in_gb"), why);
    }
    if !(1..=DISKS_MAX).contains(&given.disk_count) {
        faults.invalid(
            format!("{AT}.disk_count"),
            format!("must be from 1 to {DISKS_MAX}"),
        );
    }
    match StorageAccountType::try_from(given.storage_account_type) {
        Ok(StorageAccountType::Unspecified) | Err(_) => faults.invalid(
            format!("{AT}.storage_account_type"),
            "must be STANDARD_LRS or PREMIUM_LRS",
        ),
        Ok(_) => {}
    }
    if CachingType::try_from(given.caching_type).is_err() {
        faults.invalid(format!("{AT}.caching_type"), "is not one of its values");
    }
}

/// The settings that are kept and have no effect here.
pub fn warnings(given: &FileServer) -> Vec<Warning> {
    let disks = given.data_disks.unwrap_or_default();
    let ssh = given.ssh_configuration.clone().unwrap_or_default();
    let kept = [
        (
            "ssh_configuration.user_account_settings",
            ssh.user_account_settings.is_some(),
            "accounts on your machines are yours to make; a password is not even kept",
        ),
        (
            "ssh_configuration.public_ips_to_allow",
            !ssh.public_ips_to_allow.is_empty(),
            "who may log in to your machines is yours to say",
        ),
        (
            "subnet",
            !given.subnet.is_empty(),
            "your machines are in your network already",
        ),
        (
            "data_disks.storage_account_type",
            true,
            "your disks are what they are: only their room is looked at",
        ),
        (
            "data_disks.caching_type",
            disks.caching_type() != CachingType::Unspecified,
            "the kernel caches what is read there",
        ),
    ];
    fields::warnings(&kept)
}
