//! PURE. The directory that the nodes of a job share, which it finds as `AZ_BATCHAI_SHARED_JOB_TEMP`: one, on the master's node.
//!
//! Nodes of the master's machine have it by its path. Those of other machines mount it by NFS, from a server that the master's shim has for
//! the time of the attempt. It listens at the last of the attempt's ports on the master's node, which all of them know from the
//! assignment: nothing is said between nodes. That is done for jobs that name the variable (`batchai_proto::shared`); others that are on several
//! machines do not have it. Locks (`flock`, `fcntl`) are each machine's own.
//!
//! Nothing is served, mounted or waited for here.

use core::net::{IpAddr, SocketAddr};

use batchai_common::limits::SHARED_TEMP_CLIENTS_MAX;
use batchai_proto::agent::v1::{Assignment, Host};
use batchai_proto::shared::{SHARED_JOB_TEMP, is_named};
use batchai_proto::v1::Job;
use serde::{Deserialize, Serialize};

use super::volumes::{How, Mount};
use super::{Context, LaunchError, layout, own_host};

/// What the error is called where it cannot be served or mounted.
pub const FAILED: &str = "JobSharedTempFailed";
/// The master's node may be busy with what comes before, such as fetching the job's bundle.
const WAIT_S: u64 = 300;

/// What the master's node serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serve {
    /// Which node that is.
    pub node: String,
    pub directory: String,
    pub listen: SocketAddr,
    /// The job's nodes on other machines: nobody else may come.
    pub clients: Vec<IpAddr>,
}

/// What a host waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitFor {
    /// It exists then.
    pub path: String,
    pub most_s: u64,
    /// What it is, in words.
    pub what: String,
}

/// Where a host has the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Shared {
    #[default]
    Nowhere,
    /// The master's own, on the same machine.
    Here(String),
    /// The master's, which is on another machine, is mounted there.
    Mounted(String),
}

impl Shared {
    /// `temp` says where the job's directory is below the root of an agent.
    pub(super) fn of(
        job: &Job,
        assignment: &Assignment,
        temp: impl Fn(&str) -> String,
        root: &str,
    ) -> Result<Shared, LaunchError> {
        let (own, master) = (own_host(assignment)?, master(assignment)?);
        if !is_far_from(master, assignment) {
            return Ok(Shared::Here(format!("{}/shared", temp(&master.root))));
        }
        Ok(match (is_named(job), own.boot_id == master.boot_id) {
            (false, _) => Shared::Nowhere,
            (true, true) => Shared::Here(format!("{}/shared", temp(&master.root))),
            (true, false) => Shared::Mounted(format!("{}/shared", temp(root))),
        })
    }

    pub(super) fn path(&self) -> Option<&String> {
        match self {
            Shared::Nowhere => None,
            Shared::Here(path) | Shared::Mounted(path) => Some(path),
        }
    }
}

fn master(assignment: &Assignment) -> Result<&Host, LaunchError> {
    let master = assignment.hosts.first();
    master.ok_or(LaunchError::Incomplete { what: "master" })
}

/// Whether one of the hosts is on another machine than the master.
fn is_far_from(master: &Host, assignment: &Assignment) -> bool {
    let mut hosts = assignment.hosts.iter();
    hosts.any(|host| host.boot_id != master.boot_id)
}

/// What this host serves to others: of the master's, where it has what others are to mount.
pub(super) fn serve(context: &Context<'_>) -> Result<Option<Serve>, LaunchError> {
    let assignment = context.assignment;
    let master = master(assignment)?;
    let Shared::Here(directory) = &context.paths.shared else {
        return Ok(None);
    };
    if !context.paths.is_master || !is_far_from(master, assignment) {
        return Ok(None);
    }
    let address = |host: &Host| {
        let address = host.address.parse();
        address.map_err(|_| LaunchError::Incomplete { what: "address" })
    };
    let far = assignment.hosts.iter();
    let far = far.filter(|host| host.boot_id != master.boot_id);
    let mut clients = far.map(address).collect::<Result<Vec<IpAddr>, _>>()?;
    clients.sort();
    clients.dedup();
    if clients.len() > SHARED_TEMP_CLIENTS_MAX {
        return Err(LaunchError::SharedTooWidely {
            count: clients.len(),
        });
    }
    Ok(Some(Serve {
        node: master.node.clone(),
        directory: directory.clone(),
        listen: SocketAddr::new(address(master)?, port(context)?),
        clients,
    }))
}

/// What the master's node makes last of all: its directory may be there from before, and about to be cleared.
pub(super) fn made(context: &Context<'_>) -> Result<Option<String>, LaunchError> {
    let named = context.assignment.hosts.len() > 1 && is_named(context.job);
    let path = |master: &Host| {
        let attempt = &context.assignment.attempt;
        format!("{}/jobs/.shared/{attempt}", master.root)
    };
    let master = master(context.assignment)?;
    Ok(named.then(|| path(master)))
}

/// What this host waits for that is on the master's machine.
pub(super) fn wait_for(context: &Context<'_>) -> Result<Option<WaitFor>, LaunchError> {
    let here = matches!(context.paths.shared, Shared::Here(_));
    let (own, master) = (own_host(context.assignment)?, master(context.assignment)?);
    let made = made(context)?.filter(|_| here && !context.paths.is_master);
    Ok(made.map(|path| WaitFor {
        path,
        most_s: WAIT_S,
        what: format!("${SHARED_JOB_TEMP} on {}, from {}", own.node, master.node),
    }))
}

/// What this host mounts from the master's.
pub(super) fn mount(context: &Context<'_>) -> Result<Option<Mount>, LaunchError> {
    let Shared::Mounted(path) = &context.paths.shared else {
        return Ok(None);
    };
    let master = master(context.assignment)?;
    let own = &own_host(context.assignment)?.node;
    Ok(Some(Mount {
        path: path.clone(),
        how: How::Nfs {
            address: master.address.clone(),
            port: port(context)?,
            version: 3,
            directory: "/".to_owned(),
            options: String::new(),
            fresh: true,
        },
        code: FAILED.to_owned(),
        what: format!("${SHARED_JOB_TEMP} on {own}, from {}", master.node),
        wait_s: WAIT_S,
    }))
}

/// The last of the attempt's ports on the master's node: behind those of its processes.
fn port(context: &Context<'_>) -> Result<u16, LaunchError> {
    let before = match &context.job.tensor_flow_settings {
        Some(_) => layout(context).of(0).count().max(1),
        None => 1,
    };
    let first = master(context.assignment)?.port;
    let before = i32::try_from(before).unwrap_or(i32::MAX);
    let port = u16::try_from(first.saturating_add(before));
    port.map_err(|_| LaunchError::Incomplete { what: "port" })
}
