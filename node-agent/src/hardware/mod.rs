//! What this machine is.

mod cloud;
mod gpu;
mod os;
mod sysfs;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use batchai_proto::rdma;
use batchai_proto::v1::{Gpu, NodeFacts};

use crate::cgroups::{Isolation, PROCESS_TREE};
use crate::config::Config;
use crate::launch::{Ability, Device, HostFacts, JobLimit, JobUsers, LogLimit, Maker};

pub use gpu::{ANSWER_MAX, answer_in_time, main as gpus};
use sysfs::Sysfs;

/// Why the machine cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    #[error("{path}: {source}")]
    Read {
        path: &'static str,
        source: io::Error,
    },
    #[error("{path}: not understood: {why}")]
    Parse {
        path: &'static str,
        why: &'static str,
    },
    #[error("--storage-root {}: {error}", path.display())]
    Storage { path: PathBuf, error: io::Error },
    #[error("no address of this machine leads to {coordinator}: {source}; give --address")]
    Address {
        coordinator: String,
        source: io::Error,
    },
}

/// What jobs inherit from the agent's own environment; everything else is cleared.
const INHERITED: [&str; 7] = ["PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ"];

/// A GPU, as jobs are given it and as the node tells of it.
pub struct Found {
    device: Device,
    gpu: Gpu,
}

/// Describes the machine for its registration, and says which GPUs jobs are given. `own` are the arguments that lead to this program's own
/// subcommands.
pub fn facts(
    own: &[&str],
    config: &Config,
    isolation: &Isolation,
    containers: &Ability,
) -> Result<(NodeFacts, Vec<Device>), HardwareError> {
    let sysfs = Sysfs::of_this_machine();
    let found = gpu::registered(own).into_iter().chain(sysfs.amd_gpus());
    let (devices, gpus): (_, Vec<_>) = found.map(|found| (found.device, found.gpu)).unzip();
    let cpu_cores = std::thread::available_parallelism().map_or(1, usize::from) as i32;
    let memory_mib = os::memory_mib()?;
    let vm_size = vm_size(
        config,
        &sysfs,
        &os::size_name(cpu_cores, memory_mib, gpus.len()),
    );
    let storage = config.storage_root.as_deref();
    let (storage_free_bytes, storage_bytes) = storage.map_or(Ok((0, 0)), room)?;
    let facts = NodeFacts {
        vm_size,
        storage_root: storage
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
        storage_free_bytes,
        storage_bytes,
        // Known by who makes it of disks.
        storage_failure: String::new(),
        image: config.image.clone().map_or_else(os::image, Ok)?,
        cpu_cores,
        memory_mib,
        gpus,
        addresses: vec![address(config)?.to_string()],
        boot_id: os::boot_id()?,
        agent_version: batchai_common::VERSION.to_owned(),
        root: config.root.to_string_lossy().into_owned(),
        first_port: i32::from(config.ports.0),
        last_port: i32::from(config.ports.1),
        ssh_port: i32::from(config.ssh_port),
        // Known when it listens.
        agent_port: 0,
        kernel_version: os::kernel_version()?,
        disks: sysfs.disks(),
        numa_nodes: sysfs.numa_nodes(),
        rdma_devices: sysfs.rdma_devices(),
        isolation: isolation
            .groups
            .as_ref()
            .map_or(PROCESS_TREE, |groups| groups.method.name())
            .to_owned(),
        enforced_limits: isolation
            .seats
            .iter()
            .map(|seat| seat.controller.name().to_owned())
            .collect(),
        image_sources: containers.image_sources(),
    };
    Ok((facts, devices))
}

/// Which processes compute on these GPUs. Whoever asks may be kept waiting (see `answer_in_time`).
///
/// # Errors
/// Says which driver does not tell.
pub fn used(devices: &[Device]) -> Result<Vec<(&Device, i32)>, String> {
    let of = |maker| devices.iter().filter(move |device| device.maker == maker);
    let nvidia: Vec<_> = of(Maker::Nvidia).collect();
    let used = gpu::used(&nvidia).map_err(|error| format!("the NVIDIA driver: {error}"));
    let amd: Vec<_> = of(Maker::Amd).collect();
    let mut used = used?;
    let of_amd = Sysfs::of_this_machine().amd_used(&amd);
    used.extend(of_amd.map_err(|error| format!("the AMD driver: {error}"))?);
    Ok(used)
}

/// How much room there is where file servers may lie, and how large that is in all. Who may write there could put anything in their stead.
fn room(storage: &Path) -> Result<(i64, i64), HardwareError> {
    let bad = |error| HardwareError::Storage {
        path: storage.to_owned(),
        error,
    };
    let found = storage.metadata().map_err(bad)?;
    if !found.is_dir() || found.uid() != 0 || found.mode() & 0o022 != 0 {
        let why = "it must be a directory of root's that nobody else may write to";
        return Err(bad(io::Error::other(why)));
    }
    let room = nix::sys::statvfs::statvfs(storage).map_err(|error| bad(error.into()))?;
    let bytes = |blocks: u64| {
        let bytes = blocks.saturating_mul(room.fragment_size());
        i64::try_from(bytes).unwrap_or(i64::MAX)
    };
    Ok((bytes(room.blocks_available()), bytes(room.blocks())))
}

/// What was typed, what the cloud says, what the maker says, or what the machine has.
fn vm_size(config: &Config, sysfs: &Sysfs, made: &str) -> String {
    if let Some(typed) = &config.vm_size {
        return typed.clone();
    }
    let asked = config
        .vm_size_from_cloud
        .then(|| cloud::vm_size(&config.cloud_metadata));
    match asked {
        Some(Ok(vm_size)) => vm_size,
        Some(Err(error)) => {
            tracing::warn!(%error, "the cloud does not say the VM size");
            sysfs.size_name(made)
        }
        None => sysfs.size_name(made),
    }
}

/// The same machine, as launchers see it.
pub fn host_facts(
    facts: &NodeFacts,
    node_uid: &str,
    (bundles, lease): (&Path, &Path),
    (users, limits, isolation): (JobUsers, Vec<JobLimit>, Isolation),
    gpus: &[Device],
) -> HostFacts {
    let base = INHERITED
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)));
    HostFacts {
        node_uid: node_uid.to_owned(),
        root: facts.root.clone(),
        bundles: bundles.to_string_lossy().into_owned(),
        lease: lease.to_string_lossy().into_owned(),
        gpus: gpus.to_vec(),
        infiniband: facts
            .rdma_devices
            .iter()
            .filter(|port| rdma::is_infiniband(port))
            // mlx5_0/1 is mlx5_0:1 to those who are told of it.
            .map(|port| port.name.replace('/', ":"))
            .collect(),
        interface: facts
            .addresses
            .first()
            .and_then(|address| interface(address)),
        users,
        limits,
        log_limit: LogLimit::default(),
        isolation,
        containers: Ability::default(),
        base_env: base.collect::<BTreeMap<_, _>>(),
        remote_shell: Vec::new(),
    }
}

/// The address that the coordinator is reached from. Nothing is sent: the kernel only looks up the route.
fn address(config: &Config) -> Result<IpAddr, HardwareError> {
    if let Some(address) = config.address {
        return Ok(address);
    }
    let authority = config.coordinator.split("://").last().unwrap_or_default();
    let look_up = || -> io::Result<IpAddr> {
        let peer = authority.trim_end_matches('/');
        let peer: SocketAddr = std::net::ToSocketAddrs::to_socket_addrs(peer)?
            .next()
            .ok_or_else(|| io::Error::other("the name has no address"))?;
        let any = if peer.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(peer)?;
        Ok(socket.local_addr()?.ip())
    };
    look_up().map_err(|source| HardwareError::Address {
        coordinator: config.coordinator.clone(),
        source,
    })
}

/// The network interface that has an address.
fn interface(address: &str) -> Option<String> {
    let wanted: IpAddr = address.parse().ok()?;
    let interfaces = nix::ifaddrs::getifaddrs().ok()?;
    interfaces
        .into_iter()
        .find(|interface| {
            let own = interface.address.as_ref().and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            });
            own == Some(wanted)
        })
        .map(|interface| interface.interface_name)
}
