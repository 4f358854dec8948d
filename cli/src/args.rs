//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Batch training jobs on your own machines.
#[derive(Debug, Parser)]
#[command(name = "batchai", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub struct Global {
    /// Where the coordinator listens.
    #[arg(
        long,
        global = true,
        env = "BATCHAI_ENDPOINT",
        default_value = "http://127.0.0.1:7070",
        value_name = "URL"
    )]
    pub endpoint: String,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Json)]
    pub output: Format,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Json,
    Table,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show everything: start an ensemble, train on two nodes, watch, and end it.
    Demo(Demo),
    /// Run a coordinator and some node agents on this machine until Ctrl-C.
    Dev(Dev),
    /// Resource groups: one for a team or a lab.
    #[command(subcommand)]
    Group(Group),
    /// Workspaces: what holds clusters and experiments.
    #[command(subcommand)]
    Workspace(Workspace),
    /// Clusters: nodes of one VM size and image that run jobs.
    #[command(subcommand)]
    Cluster(Cluster),
    /// Experiments: groups of jobs.
    #[command(subcommand)]
    Experiment(Experiment),
    /// Jobs.
    #[command(subcommand)]
    Job(Job),
    /// Nodes: the machines, as their agents register them.
    #[command(subcommand)]
    Node(Node),
    /// Run the coordinator.
    Coordinator(batchai_coordinator::Config),
    /// Run the node agent.
    NodeAgent(batchai_node_agent::Cli),
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Where to keep everything, the job's outputs too. A new directory for temporary files where it is left out.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// How many times to go through the training data.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub epochs: u32,
}

#[derive(Debug, Args)]
pub struct Dev {
    /// How many node agents.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub agents: u16,
    /// Where the coordinator listens. Port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Where to keep everything.
    #[arg(long, default_value = "batchai-dev", value_name = "DIR")]
    pub data: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct InGroup {
    /// The resource group.
    #[arg(
        short = 'g',
        long = "resource-group",
        env = "BATCHAI_RESOURCE_GROUP",
        value_name = "NAME"
    )]
    pub group: String,
}

#[derive(Clone, Debug, Args)]
pub struct InWorkspace {
    #[command(flatten)]
    pub group: InGroup,
    /// The workspace.
    #[arg(short = 'w', long, env = "BATCHAI_WORKSPACE", value_name = "NAME")]
    pub workspace: String,
}

#[derive(Clone, Debug, Args)]
pub struct InExperiment {
    #[command(flatten)]
    pub workspace: InWorkspace,
    /// The experiment.
    #[arg(short = 'e', long, env = "BATCHAI_EXPERIMENT", value_name = "NAME")]
    pub experiment: String,
}

#[derive(Debug, Args)]
pub struct Confirm {
    /// Do not ask.
    #[arg(short = 'y', long)]
    pub yes: bool,
}

#[derive(Debug, Subcommand)]
pub enum Group {
    /// Create a resource group.
    Create {
        #[arg(short, long)]
        name: String,
        /// Where it is, in words of your own.
        #[arg(short, long, default_value = "")]
        location: String,
    },
    /// List resource groups.
    List,
    /// Show a resource group.
    Show {
        #[arg(short, long)]
        name: String,
    },
    /// Delete an empty resource group.
    Delete {
        #[arg(short, long)]
        name: String,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum Workspace {
    /// Create a workspace.
    Create {
        #[command(flatten)]
        parent: InGroup,
        #[arg(short, long)]
        name: String,
        /// Where it is; the resource group's location where it is left out.
        #[arg(short, long, default_value = "")]
        location: String,
    },
    /// List the workspaces of a resource group.
    List {
        #[command(flatten)]
        parent: InGroup,
    },
    /// Show a workspace.
    Show {
        #[command(flatten)]
        parent: InGroup,
        #[arg(short, long)]
        name: String,
    },
    /// Delete an empty workspace.
    Delete {
        #[command(flatten)]
        parent: InGroup,
        #[arg(short, long)]
        name: String,
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
        #[arg(short, long)]
        name: String,
    },
    /// List the experiments of a workspace.
    List {
        #[command(flatten)]
        parent: InWorkspace,
    },
    /// Show an experiment.
    Show {
        #[command(flatten)]
        parent: InWorkspace,
        #[arg(short, long)]
        name: String,
    },
    /// Delete an empty experiment.
    Delete {
        #[command(flatten)]
        parent: InWorkspace,
        #[arg(short, long)]
        name: String,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum Cluster {
    /// Create a cluster.
    Create {
        #[command(flatten)]
        parent: InWorkspace,
        #[arg(short, long)]
        name: String,
        /// Settings as JSON: {"properties": {"vmSize": ..., "scaleSettings": ...}}. Options go before it.
        #[arg(short = 'f', long = "config-file", value_name = "FILE")]
        file: Option<PathBuf>,
        /// The VM size of its nodes.
        #[arg(short = 's', long, value_name = "SIZE")]
        vm_size: Option<String>,
        /// The image of its nodes, as publisher:offer:sku:version.
        #[arg(short = 'i', long, value_name = "IMAGE")]
        image: Option<String>,
        /// How many nodes it shall have.
        #[arg(short = 't', long, value_name = "COUNT", allow_negative_numbers = true)]
        target: Option<i32>,
    },
    /// Change how many nodes a cluster shall have.
    Resize {
        #[command(flatten)]
        parent: InWorkspace,
        #[arg(short, long)]
        name: String,
        /// How many nodes.
        #[arg(short = 't', long, value_name = "COUNT", allow_negative_numbers = true)]
        target: i32,
    },
    /// List the clusters of a workspace.
    List {
        #[command(flatten)]
        parent: InWorkspace,
    },
    /// Show a cluster.
    Show {
        #[command(flatten)]
        parent: InWorkspace,
        #[arg(short, long)]
        name: String,
    },
    /// Delete a cluster that no job needs.
    Delete {
        #[command(flatten)]
        parent: InWorkspace,
        #[arg(short, long)]
        name: String,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum Job {
    /// Create a job. It is queued at once; `job wait` waits for its end.
    Create {
        #[command(flatten)]
        parent: InExperiment,
        #[arg(short, long)]
        name: String,
        /// Settings as JSON: {"properties": {"nodeCount": ..., ...}}.
        #[arg(short = 'f', long = "config-file", value_name = "FILE")]
        file: PathBuf,
        /// The cluster to run on: a name in the same workspace, or a full one. It goes before the file's.
        #[arg(short = 'c', long, value_name = "CLUSTER")]
        cluster: Option<String>,
    },
    /// List the jobs of an experiment.
    List {
        #[command(flatten)]
        parent: InExperiment,
    },
    /// Show a job.
    Show {
        #[command(flatten)]
        parent: InExperiment,
        #[arg(short, long)]
        name: String,
    },
    /// End a job.
    Terminate {
        #[command(flatten)]
        parent: InExperiment,
        #[arg(short, long)]
        name: String,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Delete a job; a running one is terminated first.
    Delete {
        #[command(flatten)]
        parent: InExperiment,
        #[arg(short, long)]
        name: String,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Wait until a job has ended. Exits with the job's exit code, or 255 where it has none.
    Wait {
        #[command(flatten)]
        parent: InExperiment,
        #[arg(short, long)]
        name: String,
    },
    /// The files of a job.
    #[command(subcommand)]
    File(JobFile),
}

#[derive(Debug, Subcommand)]
pub enum JobFile {
    /// Print a log file of a job, and what is added to it, until the job has ended.
    Stream {
        #[command(flatten)]
        parent: InExperiment,
        /// The job.
        #[arg(short = 'j', long)]
        job: String,
        /// The file: stdout.txt, stdout-0.txt, execution.log, ...
        #[arg(
            short = 'f',
            long,
            value_name = "FILE",
            required_unless_present = "rank"
        )]
        file: Option<String>,
        /// Standard output of this rank, instead of a file's name.
        #[arg(long, conflicts_with = "file")]
        rank: Option<u32>,
        /// The directory; only stdouterr is served yet.
        #[arg(short = 'd', long = "output-directory-id", default_value = "stdouterr")]
        directory: String,
        /// The node, where several have a file of that name.
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        /// Begin at this byte.
        #[arg(long, default_value_t = 0)]
        offset: i64,
        /// Print what there is, and do not wait for more.
        #[arg(long)]
        no_follow: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// List nodes.
    List,
    /// Show a node.
    Show {
        #[arg(short, long)]
        name: String,
    },
}
