//! PURE. What processes are told of InfiniBand: by which ports NCCL reaches other hosts, and by what Intel MPI does. UCX, by which Open MPI and MPICH
//! go, finds it by itself, and `UCX_NET_DEVICES` would take all other devices away from it.
//!
//! It is said where a job has several hosts and every one of them has a port that is up; elsewhere nothing is, and all of them go by TCP as they find it. RoCE is left
//! alone. A job's own variables come later.
//!
//! Intel MPI is told what its versions from 2019 on know, `shm:ofi`. What the original said to those of 2018 (`I_MPI_FABRICS=dapl` with
//! `I_MPI_DAPL_PROVIDER`) is gone from it: a job with such an image says so in its variables.
//!
//! Not run on hardware: that these programs read their variables in this way is known from their documentation only.

use std::collections::BTreeMap;

use batchai_proto::agent::v1::Host;

/// The variables of every process of a job on a host with these ports, as `device:port`.
pub fn variables(hosts: &[Host], ports: &[String]) -> BTreeMap<String, String> {
    if ports.is_empty() || hosts.len() < 2 || !hosts.iter().all(|host| host.infiniband) {
        return BTreeMap::new();
    }
    let ports = ports.join(",");
    let variables = [
        ("I_MPI_FABRICS", "shm:ofi".to_owned()),
        // These very ports: without the sign mlx5_1 would stand for mlx5_10 as well.
        ("NCCL_IB_HCA", format!("={ports}")),
    ];
    let owned = variables.map(|(name, value)| (name.to_owned(), value));
    owned.into()
}
