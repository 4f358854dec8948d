//! The command line. What each verb takes is in `resources`, `jobs` and `exec`; an example of each is in `examples`.

mod access;
mod admin;
mod examples;
mod exec;
mod jobs;
mod resources;
mod settings;
mod storage;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

pub use access::{Audit, Certificate, NodeToken, Role, RoleCommand, Scope, User, UserToken};
pub use admin::{Admin, Replica, Snapshot, Stray};
pub use exec::NodeExec;
pub use jobs::{Job, JobCreate, JobFile, JobNode, OfJob, Run, Variables};
pub use resources::{
    Cluster, ClusterCreate, ClusterFile, ClusterNode, Experiment, FileServer, FileServerCreate,
    Group, LogKeeping, Node, OfServer, ServerFile, VmSize, VmSizeAlias, Workspace,
};
pub use settings::{Account, Mounts};
pub use storage::{StorageAlias, StorageAliasCreate};

/// Batch training jobs on your own machines.
#[derive(Debug, Parser)]
#[command(name = "batchai", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// A length of time such as 90s, 10m, 2h or 30d.
fn seconds(text: &str) -> Option<i64> {
    let (at, unit) = text.char_indices().next_back()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    let count = text[..at].parse::<u32>().ok()?;
    Some(i64::from(count) * seconds)
}

impl Cli {
    /// The command line with an example in the help of every verb.
    pub fn with_examples() -> clap::Command {
        examples::add(Cli::command())
    }

    /// Parses the arguments of this process; ends it where they are wrong or ask for help.
    pub fn read() -> Cli {
        let matches = Cli::with_examples().get_matches();
        Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Where the coordinator listens; of several, with commas between them.
    #[arg(
        long,
        global = true,
        env = "BATCHAI_ENDPOINT",
        value_name = "URL",
        hide_env = true
    )]
    pub endpoint: Option<String>,
    /// PEM file with your certificate, its key, and whom you trust.
    // The variable for it is read elsewhere: daemons have an option of this name, and it is not for them.
    #[arg(long, global = true, value_name = "FILE")]
    pub credentials: Option<PathBuf>,
    /// How to print; jsonc is in colours, tsv has tabs between values.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Json)]
    pub output: Format,
    /// Print only what this JMESPath expression finds.
    #[arg(long, global = true, value_name = "JMESPATH")]
    pub query: Option<String>,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Json,
    Jsonc,
    Table,
    Tsv,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show everything: start an ensemble, train on two nodes, watch, and end it.
    Demo(Demo),
    /// Run a coordinator and some node agents on this machine until Ctrl-C.
    Dev(Dev),
    /// Run a command on nodes of a cluster, with the files of a directory, and follow it.
    Run(Run),
    /// Say how the ensemble is.
    Status,
    /// Resource groups: one for a team or a lab.
    #[command(subcommand)]
    Group(Group),
    /// Workspaces: what holds clusters and experiments.
    #[command(subcommand)]
    Workspace(Workspace),
    /// Clusters: nodes of one VM size and image that run jobs.
    #[command(subcommand)]
    Cluster(Cluster),
    /// File servers: machines that share disks with clusters.
    #[command(subcommand)]
    FileServer(FileServer),
    /// Experiments: groups of jobs.
    #[command(subcommand)]
    Experiment(Experiment),
    /// Jobs.
    #[command(subcommand)]
    Job(Job),
    /// Nodes: the machines, as their agents register them.
    #[command(subcommand)]
    Node(Node),
    /// Who may do what.
    #[command(subcommand)]
    Role(RoleCommand),
    /// Tokens and certificates of users.
    #[command(subcommand)]
    User(User),
    /// Who did what, or was not let.
    #[command(subcommand)]
    Audit(Audit),
    /// The ensemble itself: its replicas.
    #[command(subcommand)]
    Admin(Admin),
    /// VM sizes: what kinds of machines there are, and other names for them.
    #[command(subcommand)]
    VmSize(VmSize),
    /// What lies behind shares and containers of storage accounts.
    #[command(subcommand)]
    StorageAlias(StorageAlias),
    /// List how much is used of what is bounded.
    ListUsages {
        /// Count only what lies in workspaces of this location.
        #[arg(short, long, default_value = "")]
        location: String,
    },
    /// Keep what nobody wants to type each time.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a script that completes commands in a shell.
    Completion { shell: clap_complete::Shell },
    /// Run the coordinator.
    Coordinator(batchai_coordinator::Cli),
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

/// What can be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Setting {
    Endpoint,
    Credentials,
    Group,
    Workspace,
    Experiment,
    Cluster,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Use a value wherever none is given.
    Set { setting: Setting, value: String },
    /// Forget a value.
    Unset { setting: Setting },
    /// Show what is kept.
    Show,
}

#[derive(Clone, Debug, Args)]
pub struct InGroup {
    /// The resource group.
    #[arg(
        short = 'g',
        long = "resource-group",
        env = "BATCHAI_RESOURCE_GROUP",
        value_name = "NAME",
        hide_env = true
    )]
    pub group: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct InWorkspace {
    #[command(flatten)]
    pub group: InGroup,
    /// The workspace.
    #[arg(
        short = 'w',
        long,
        env = "BATCHAI_WORKSPACE",
        value_name = "NAME",
        hide_env = true
    )]
    pub workspace: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct InExperiment {
    #[command(flatten)]
    pub workspace: InWorkspace,
    /// The experiment.
    #[arg(
        short = 'e',
        long,
        env = "BATCHAI_EXPERIMENT",
        value_name = "NAME",
        hide_env = true
    )]
    pub experiment: Option<String>,
}

/// Which resources: one by its name, or some by their full names.
#[derive(Clone, Debug, Args)]
pub struct Which {
    /// Its name.
    #[arg(short, long, required_unless_present = "ids")]
    pub name: Option<String>,
    /// Full names instead, also the original's ids.
    #[arg(long, num_args = 1.., conflicts_with = "name", value_name = "ID")]
    pub ids: Vec<String>,
}

/// An option of the original's that has nothing to say here.
#[derive(Clone, Debug, Args)]
pub struct Expiry {
    /// Minutes until links to the files expire. There are no links here: noted, and nothing else.
    #[arg(long, value_name = "MINUTES")]
    pub expiry: Option<u32>,
}

impl Expiry {
    pub fn note(&self) {
        if self.expiry.is_some() {
            say!(
                "batchai: --expiry has no effect: files are read by `job file download`, not by links"
            );
        }
    }
}

#[derive(Debug, Args)]
pub struct Confirm {
    /// Do not ask.
    #[arg(short = 'y', long)]
    pub yes: bool,
    /// Do not wait until it is done.
    #[arg(long)]
    pub no_wait: bool,
}

/// Labels or tags.
#[derive(Clone, Debug, Args)]
pub struct Labels {
    /// Names and values of your own.
    #[arg(long = "labels", alias = "tags", num_args = 1.., value_name = "NAME=VALUE", value_parser = pair)]
    pub labels: Vec<(String, String)>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("give NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verbs, each with the words that lead to it.
    fn verbs(command: &clap::Command, above: &str) -> Vec<String> {
        let name = format!("{above}{}", command.get_name());
        let mut found = Vec::new();
        for below in command
            .get_subcommands()
            .filter(|c| !c.is_hide_set() && c.get_name() != "help")
        {
            found.extend(verbs(below, &format!("{name} ")));
        }
        if found.is_empty() {
            found.push(name);
        }
        found
    }

    #[test]
    fn the_help_of_every_verb_fits_a_screen_and_has_an_example_that_parses() {
        let mut root = Cli::with_examples();
        root.build();
        let verbs = verbs(&root, "");
        assert!(verbs.len() > 40, "{}", verbs.len());
        for name in verbs {
            let words = name.split(' ').chain(["--help"]);
            let help = Cli::with_examples().try_get_matches_from(words);
            let help = help.map(|_| ()).unwrap_err().to_string();
            assert!(
                help.lines().count() <= 50,
                "{name}: {} lines",
                help.lines().count()
            );
            let long = help.lines().find(|line| line.chars().count() > 100);
            assert_eq!(long, None, "{name}");
            let (_, example) = help
                .split_once("Example:\n")
                .unwrap_or_else(|| panic!("{name}"));
            let example = example.lines().next().unwrap().trim();
            assert!(example.starts_with(&name), "{name}: {example}");
            let words = shlex::split(example).unwrap();
            let parsed = Cli::with_examples().try_get_matches_from(words);
            let parsed = parsed.map(|matches| Cli::from_arg_matches(&matches).unwrap());
            assert!(parsed.is_ok(), "{name}: {}", parsed.unwrap_err());
        }
    }
}
