//! What the verbs of resource groups, workspaces, clusters, file servers, experiments and nodes take.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Account, Confirm, InGroup, InWorkspace, Labels, Mounts, NodeExec, Which};

#[derive(Debug, Subcommand)]
pub enum Group {
    /// Create a resource group.
    Create {
        /// Its name.
        #[arg(short, long)]
        name: String,
        /// Where it is, in words of your own.
        #[arg(short, long, default_value = "")]
        location: String,
        #[command(flatten)]
        labels: Labels,
    },
    /// List resource groups.
    List,
    /// Show resource groups.
    Show {
        #[command(flatten)]
        which: Which,
    },
    /// Replace the tags of a resource group.
    Update {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        labels: Labels,
    },
    /// Delete resource groups and everything in them; running jobs are terminated first.
    Delete {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}

/// How a workspace keeps logs.
#[derive(Debug, Default, Args)]
pub struct LogKeeping {
    /// Keep the logs of jobs so long after they have ended (90s, 10m, 2h, 30d), or forever: as long as the job is there.
    #[arg(long, value_name = "TIME", value_parser = retention)]
    pub log_retention: Option<i64>,
    /// Let logs take so many MiB at each coordinator, 0 for any number. Beyond it those of the job go that ended longest ago.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(i64).range(0..))]
    pub log_quota: Option<i64>,
}

/// Seconds; none of them are for ever.
fn retention(text: &str) -> Result<i64, String> {
    match (text, super::seconds(text)) {
        ("forever", _) => Ok(0),
        (_, Some(seconds)) if seconds > 0 => Ok(seconds),
        _ => Err("give a time such as 90s, 10m, 2h or 30d, or forever".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub enum Workspace {
    /// Create a workspace.
    Create {
        #[command(flatten)]
        parent: InGroup,
        /// Its name.
        #[arg(short, long)]
        name: String,
        /// Where it is; the resource group's location where it is left out.
        #[arg(short, long, default_value = "")]
        location: String,
        #[command(flatten)]
        logs: LogKeeping,
        #[command(flatten)]
        labels: Labels,
    },
    /// List the workspaces of a resource group, or of all.
    List {
        #[command(flatten)]
        parent: InGroup,
    },
    /// Show workspaces.
    Show {
        #[command(flatten)]
        parent: InGroup,
        #[command(flatten)]
        which: Which,
    },
    /// Replace the tags of a workspace, or say how it keeps logs.
    Update {
        #[command(flatten)]
        parent: InGroup,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        logs: LogKeeping,
        #[command(flatten)]
        labels: Labels,
    },
    /// Make another key for the secrets of workspaces: it protects those of new jobs and clusters.
    RotateKey {
        #[command(flatten)]
        parent: InGroup,
        #[command(flatten)]
        which: Which,
    },
    /// Delete workspaces and everything in them; running jobs are terminated first.
    Delete {
        #[command(flatten)]
        parent: InGroup,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum Experiment {
    /// Create an experiment.
    Create {
        #[command(flatten)]
        parent: InWorkspace,
        /// Its name.
        #[arg(short, long)]
        name: String,
        #[command(flatten)]
        labels: Labels,
    },
    /// List the experiments of a workspace.
    List {
        #[command(flatten)]
        parent: InWorkspace,
    },
    /// Show experiments.
    Show {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
    },
    /// Replace the labels of an experiment.
    Update {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        labels: Labels,
    },
    /// Delete experiments and their jobs; running ones are terminated first.
    Delete {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Args)]
pub struct ClusterCreate {
    #[command(flatten)]
    pub parent: InWorkspace,
    /// Its name.
    #[arg(short, long)]
    pub name: String,
    /// Settings as JSON: {"properties": {"vmSize": ..., ...}}. Options go before it.
    #[arg(short = 'f', long = "config-file", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// The VM size of its nodes, or an alias of it.
    #[arg(short = 's', long, value_name = "SIZE")]
    pub vm_size: Option<String>,
    /// The image of its nodes: publisher:offer:sku:version, UbuntuLTS or UbuntuDSVM.
    #[arg(short = 'i', long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Id of a managed image; goes with --image.
    #[arg(long, value_name = "ID", requires = "image")]
    pub custom_image: Option<String>,
    /// dedicated or lowpriority.
    #[arg(long, value_name = "PRIORITY")]
    pub vm_priority: Option<String>,
    /// How many nodes it shall have.
    #[arg(short = 't', long, value_name = "COUNT", allow_negative_numbers = true)]
    pub target: Option<i32>,
    /// The fewest nodes; goes with --max.
    #[arg(long, value_name = "COUNT", requires = "max")]
    pub min: Option<i32>,
    /// The most nodes; goes with --min.
    #[arg(long, value_name = "COUNT", requires = "min")]
    pub max: Option<i32>,
    /// Id of a virtual network's subnet.
    #[arg(long, value_name = "ID")]
    pub subnet: Option<String>,
    /// Command to run on every node that joins.
    #[arg(long, value_name = "COMMAND")]
    pub setup_task: Option<String>,
    /// Directory for its output.
    #[arg(long, value_name = "DIR", requires = "setup_task")]
    pub setup_task_output: Option<String>,
    /// Mount the workspace's file server batchaiautostorage at autoafs and autobfs, made if absent.
    #[arg(long)]
    pub use_auto_storage: bool,
    #[command(flatten)]
    pub account: Account,
    #[command(flatten)]
    pub mounts: Mounts,
    #[command(flatten)]
    pub labels: Labels,
    /// Do not wait. Nothing is waited for in any case: nodes join in their own time.
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Subcommand)]
pub enum Cluster {
    /// Create a cluster.
    Create(Box<ClusterCreate>),
    /// Set how many nodes a cluster shall have.
    Resize {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
        /// How many nodes.
        #[arg(short = 't', long, value_name = "COUNT", allow_negative_numbers = true)]
        target: i32,
    },
    /// Let the number of nodes follow the load. Not served yet.
    AutoScale {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
        /// The fewest nodes.
        #[arg(long, value_name = "COUNT")]
        min: i32,
        /// The most nodes.
        #[arg(long, value_name = "COUNT")]
        max: i32,
    },
    /// List the clusters of a workspace.
    List {
        #[command(flatten)]
        parent: InWorkspace,
    },
    /// Show clusters.
    Show {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
    },
    /// Delete clusters; jobs that need them end as failed.
    Delete {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// The nodes of a cluster.
    #[command(subcommand)]
    Node(ClusterNode),
    /// The files of a cluster's set-up task.
    #[command(subcommand)]
    File(ClusterFile),
}

#[derive(Debug, Subcommand)]
pub enum ClusterNode {
    /// List where to log in to the nodes of a cluster.
    List {
        #[command(flatten)]
        parent: InWorkspace,
        /// The cluster.
        #[arg(short = 'c', long, env = "BATCHAI_CLUSTER", hide_env = true)]
        cluster: Option<String>,
    },
    /// Run a command, or a shell, on a node of a cluster, outside of any job: as the user that jobs run as there.
    Exec {
        #[command(flatten)]
        parent: InWorkspace,
        /// The cluster.
        #[arg(short = 'c', long, env = "BATCHAI_CLUSTER", hide_env = true)]
        cluster: Option<String>,
        #[command(flatten)]
        exec: NodeExec,
    },
}

#[derive(Debug, Subcommand)]
pub enum ClusterFile {
    /// List the files that a cluster's set-up task has written.
    List {
        #[command(flatten)]
        parent: InWorkspace,
        /// The cluster.
        #[arg(short = 'c', long, env = "BATCHAI_CLUSTER", hide_env = true)]
        cluster: Option<String>,
        /// A directory below.
        #[arg(short = 'p', long, default_value = ".")]
        path: String,
        #[command(flatten)]
        expiry: super::Expiry,
    },
}

#[derive(Debug, Args)]
pub struct FileServerCreate {
    #[command(flatten)]
    pub parent: InWorkspace,
    /// Its name.
    #[arg(short, long)]
    pub name: String,
    /// Settings as JSON: {"properties": {"vmSize": ..., ...}}. Options go before it.
    #[arg(short = 'f', long = "config-file", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// The VM size of its node.
    #[arg(short = 's', long, value_name = "SIZE")]
    pub vm_size: Option<String>,
    /// The node that serves it. One that fits is chosen where it is left out.
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// How many disks.
    #[arg(long, value_name = "COUNT")]
    pub disk_count: Option<i32>,
    /// The size of each in GB.
    #[arg(long, value_name = "GB")]
    pub disk_size: Option<i32>,
    /// Standard_LRS or Premium_LRS.
    #[arg(long, value_name = "SKU")]
    pub storage_sku: Option<String>,
    /// none, readonly or readwrite.
    #[arg(long, value_name = "CACHING")]
    pub caching_type: Option<String>,
    /// Id of a virtual network's subnet.
    #[arg(long, value_name = "ID")]
    pub subnet: Option<String>,
    #[command(flatten)]
    pub account: Account,
    /// Do not wait until it is there.
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Subcommand)]
pub enum FileServer {
    /// Create a file server and wait until it is served.
    Create(Box<FileServerCreate>),
    /// List the file servers of a workspace.
    List {
        #[command(flatten)]
        parent: InWorkspace,
    },
    /// Show file servers.
    Show {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
    },
    /// Delete file servers. What lies on them stays on the disk.
    Delete {
        #[command(flatten)]
        parent: InWorkspace,
        #[command(flatten)]
        which: Which,
        /// Also those that something mounts.
        #[arg(long)]
        force: bool,
        /// With all that lies on them.
        #[arg(long)]
        purge: bool,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// The files on a file server.
    #[command(subcommand)]
    File(ServerFile),
}

/// Which file server.
#[derive(Debug, Args)]
pub struct OfServer {
    #[command(flatten)]
    pub parent: InWorkspace,
    /// The file server.
    #[arg(short, long)]
    pub name: String,
}

#[derive(Debug, Subcommand)]
pub enum ServerFile {
    /// List a directory of a file server.
    List {
        #[command(flatten)]
        of: OfServer,
        /// A directory below, or a file.
        #[arg(short = 'p', long, default_value = "", hide_default_value = true)]
        path: String,
    },
    /// Copy a file, or a directory with all below it, from a file server to this machine. What broke off is gone on with.
    Download {
        #[command(flatten)]
        of: OfServer,
        /// The file or directory; all there is where it is left out.
        #[arg(short = 'p', long, default_value = "", hide_default_value = true)]
        path: String,
        /// Into this directory.
        #[arg(short = 'd', long = "to", value_name = "DIR", default_value = ".")]
        to: PathBuf,
    },
    /// Copy files, and directories with all below them, to a file server, for jobs of the workspace. What broke off is gone on with.
    Upload {
        #[command(flatten)]
        of: OfServer,
        /// Files and directories of this machine. Links and empty directories in them are left out.
        #[arg(required = true, value_name = "LOCAL")]
        local: Vec<PathBuf>,
        /// Into this directory of the file server, which is made where it is missing.
        #[arg(short = 'p', long, default_value = "", hide_default_value = true)]
        path: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// List nodes.
    List {
        /// Only those for which this holds, for example: state = IDLE AND facts.cpu_cores > 8
        #[arg(
            long,
            default_value = "",
            value_name = "FILTER",
            hide_default_value = true
        )]
        filter: String,
    },
    /// Show nodes.
    Show {
        #[command(flatten)]
        which: Which,
    },
    /// Have nodes refused from now on; what runs on them is ended.
    Expel {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Say that machines that are silent are gone, or were off: nothing of what ran there runs any more, and jobs need not wait for it.
    ConfirmLost {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Tokens by which machines become nodes.
    #[command(subcommand)]
    Token(super::NodeToken),
}

#[derive(Debug, Subcommand)]
pub enum VmSize {
    /// List the VM sizes and images that nodes have.
    List,
    /// Other names for VM sizes.
    #[command(subcommand)]
    Alias(VmSizeAlias),
}

#[derive(Debug, Subcommand)]
pub enum VmSizeAlias {
    /// Give a VM size another name, such as Standard_NC6.
    Create {
        /// The other name.
        #[arg(short, long)]
        name: String,
        /// The VM size, as nodes register it.
        #[arg(short = 's', long, value_name = "SIZE")]
        vm_size: String,
    },
    /// List aliases.
    List,
    /// Delete aliases.
    Delete {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}
