//! What a node agent is told on its command line.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use batchai_common::limits::LOG_FILE_MIB;

use crate::launch::{JobLimit, LogLimit};

/// Runs a node agent: it registers this machine and runs its part of jobs.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Where the coordinator listens.
    #[arg(long, default_value = "https://127.0.0.1:7070", value_name = "URL")]
    pub coordinator: String,
    /// A token that `batchai node token create` printed, with which this machine becomes a node. It is needed once. On a
    /// command line others on this machine see it.
    #[arg(
        long,
        env = "BATCHAI_JOIN_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN"
    )]
    pub join_token: Option<String>,
    /// A file with that token.
    #[arg(long, value_name = "FILE", conflicts_with = "join_token")]
    pub join_token_file: Option<PathBuf>,
    /// For tests only: go to a coordinator in plain text, `http://`. Anyone between here and there runs commands on this machine.
    #[arg(long)]
    pub insecure_lab: bool,
    /// A certificate from elsewhere: a PEM file with the node's certificate, its key and the authority's certificate.
    #[arg(long, value_name = "FILE")]
    pub credentials: Option<PathBuf>,
    /// Whom jobs run as, alike on all nodes: a user's name, UID:GID, per-workspace:NUMBER (a user for each, whose number is this
    /// one and the workspace's), or self, the agent's own user. Root must say.
    #[arg(long, env = "BATCHAI_JOB_USER", hide_env = true, value_name = "USER")]
    pub job_user: Option<String>,
    /// What each process of a job may take of core, memlock, nofile, nproc or stack: a number (of bytes, or how many) or
    /// unlimited.
    #[arg(
        long = "job-limit",
        env = "BATCHAI_JOB_LIMITS",
        hide_env = true,
        value_delimiter = ',',
        value_name = "NAME=NUMBER"
    )]
    pub job_limits: Vec<JobLimit>,
    /// How many MiB of each log file are kept here.
    #[arg(long, env = "BATCHAI_LOG_MIB", hide_env = true, default_value_t = LOG_FILE_MIB, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub log_mib: u64,
    /// How old what is kept of a log file may be, in seconds.
    #[arg(long, env = "BATCHAI_LOG_AGE", hide_env = true, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub log_age: Option<u64>,
    /// The node's name in the ensemble. The host name where it is left out.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// What the agent remembers.
    #[arg(
        long,
        default_value = "/var/lib/batchai/node-agent",
        value_name = "DIR"
    )]
    pub data: PathBuf,
    /// For mounts and jobs.
    #[arg(
        long,
        default_value = "/mnt/batch/tasks/shared/LS_root",
        value_name = "DIR"
    )]
    pub root: PathBuf,
    /// A directory of root's in which file servers may lie.
    #[arg(
        long,
        env = "BATCHAI_STORAGE_ROOT",
        hide_env = true,
        value_name = "DIR"
    )]
    pub storage_root: Option<PathBuf>,
    /// A blank disk to make that of, once for each; several are RAID 0.
    #[arg(
        long = "storage-disk",
        env = "BATCHAI_STORAGE_DISKS",
        hide_env = true,
        value_delimiter = ',',
        requires = "storage_root",
        value_name = "DEVICE"
    )]
    pub storage_disks: Vec<PathBuf>,
    /// Seconds that a mount may take, or not answer.
    #[arg(long, env = "BATCHAI_MOUNT_PATIENCE", hide_env = true, default_value_t = 60, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub mount_patience: u64,
    /// The VM size to register; a token may be for one only. Made of product name, cores, memory and GPUs where it is left out.
    #[arg(long, value_name = "SIZE")]
    pub vm_size: Option<String>,
    /// Ask the cloud that this machine runs in for its VM size, where none is given: Azure, AWS and Google Cloud answer.
    #[arg(long, conflicts_with = "vm_size")]
    pub vm_size_from_cloud: bool,
    /// Where the cloud answers.
    #[arg(
        long,
        hide = true,
        default_value = "http://169.254.169.254",
        value_name = "URL"
    )]
    pub cloud_metadata: String,
    /// The image to register, as publisher:offer:sku:version. Made of the operating system where it is left out.
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// The address under which other nodes reach this one. Where it is left out: the one that the coordinator is
    /// reached from.
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
    /// The ports that jobs may be given. Keep them out of the kernel's own range (net.ipv4.ip_local_port_range).
    #[arg(long, default_value = "20000-29999", value_name = "FIRST-LAST", value_parser = ports)]
    pub ports: (u16, u16),
    /// The port for other nodes' agents. A free one where it is left out.
    #[arg(
        long,
        env = "BATCHAI_PEER_PORT",
        hide_env = true,
        hide_default_value = true,
        default_value_t = 0,
        value_name = "PORT"
    )]
    pub peer_port: u16,
    /// The port of this machine's SSH server.
    #[arg(long, default_value_t = 22, value_name = "PORT")]
    pub ssh_port: u16,
    /// For tests: the one way to end all that a job started at once that is tried, as nodes name it in `isolation`.
    #[arg(long, hide = true, value_name = "METHOD")]
    pub isolation: Option<String>,
    /// End this node's jobs with the agent; else the next takes them over.
    #[arg(long)]
    pub end_jobs_on_stop: bool,
    /// End when the process with this pid, which started this one, ends.
    #[arg(long, hide = true, value_name = "PID")]
    pub die_with_parent: Option<i32>,
}

impl Config {
    /// Its paths are what they are wherever they are used.
    pub fn absolute(self) -> io::Result<Config> {
        let storage_root = self.storage_root.as_deref().map(std::path::absolute);
        let disks = self.storage_disks.iter().map(std::path::absolute);
        Ok(Config {
            root: std::path::absolute(&self.root)?,
            data: std::path::absolute(&self.data)?,
            storage_root: storage_root.transpose()?,
            storage_disks: disks.collect::<io::Result<_>>()?,
            ..self
        })
    }

    /// How much of each log file is kept here.
    pub fn log_limit(&self) -> LogLimit {
        LogLimit {
            bytes: self.log_mib << 20,
            age_s: self.log_age,
        }
    }
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let range = text
        .split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)));
    match range {
        Some((first, last)) if first > 0 && first <= last => Ok((first, last)),
        _ => Err("give two ports as FIRST-LAST".to_owned()),
    }
}
