//! File servers: checked, and refused. There are none.

use batchai_common::names::Kind as Noun;
use batchai_proto::v1::data_disks::{CachingType, StorageAccountType};
use batchai_proto::v1::file_server_service_server::FileServerService;
use batchai_proto::v1::{
    CreateFileServerRequest, DataDisks, DeleteFileServerRequest, FileServer, GetFileServerRequest,
    ListFileServersRequest, ListFileServersResponse, SshConfiguration,
};
use tonic::{Request, Response, Status};

use super::faults::Faults;
use super::page::Query;
use super::{Api, cluster_spec, fields, not_found, parse};

/// As many ranges as the original took.
const RANGES_MAX: usize = 400;
const DISKS_MAX: i32 = 64;

#[tonic::async_trait]
impl FileServerService for Api {
    async fn create_file_server(
        &self,
        request: Request<CreateFileServerRequest>,
    ) -> Result<Response<FileServer>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        faults.once(&request.request_id, request.validate_only, &request);
        let (parent, id) = (&request.parent, &request.file_server_id);
        faults.new_name(Noun::FileServer, parent, "file_server_id", id);
        check(&mut faults, &request.file_server.unwrap_or_default());
        faults.not_served("file_server", true);
        Err(faults.refuse().into())
    }

    async fn get_file_server(
        &self,
        request: Request<GetFileServerRequest>,
    ) -> Result<Response<FileServer>, Status> {
        let name = parse(Noun::FileServer, &request.get_ref().name)?;
        Err(not_found(Noun::FileServer, &name).into())
    }

    async fn list_file_servers(
        &self,
        request: Request<ListFileServersRequest>,
    ) -> Result<Response<ListFileServersResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let kind = (Noun::FileServer, "FileServer");
        let query = Query::new(kind, &request.parent, page, &request.filter)?;
        query.check_parent(&*self.read().await?)?;
        Ok(Response::new(ListFileServersResponse::default()))
    }

    async fn delete_file_server(
        &self,
        request: Request<DeleteFileServerRequest>,
    ) -> Result<Response<()>, Status> {
        let name = parse(Noun::FileServer, &request.get_ref().name)?;
        Err(not_found(Noun::FileServer, &name).into())
    }
}

fn check(faults: &mut Faults, given: &FileServer) {
    fields::check_output_only(faults, "file_server", "FileServer", given);
    faults.text("file_server.vm_size", &given.vm_size, true);
    faults.text("file_server.subnet", &given.subnet, false);
    match &given.ssh_configuration {
        Some(ssh) => check_ssh(faults, ssh),
        None => faults.invalid("file_server.ssh_configuration", "must be given"),
    }
    match &given.data_disks {
        Some(disks) => check_disks(faults, disks),
        None => faults.invalid("file_server.data_disks", "must be given"),
    }
}

fn check_ssh(faults: &mut Faults, given: &SshConfiguration) {
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
    match given.user_account_settings.clone() {
        Some(account) => {
            cluster_spec::check_account(faults, &at, account);
        }
        None => faults.invalid(at, "must be given"),
    }
}

fn check_disks(faults: &mut Faults, given: &DataDisks) {
    const AT: &str = "file_server.data_disks";
    if given.disk_size_in_gb < 1 {
        faults.invalid(format!("{AT}.disk_size_in_gb"), "must be at least 1");
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
