//! What running something on a node takes.

use std::path::PathBuf;

use clap::Args;

/// What to run on which node, and how.
#[derive(Debug, Args)]
pub struct NodeExec {
    /// The node; the first where it is left out.
    #[arg(
        short = 'n',
        long = "node-id",
        visible_alias = "node",
        value_name = "NODE"
    )]
    pub node: Option<String>,
    /// Give it a terminal, this one. A shell has one where this is one.
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Let it read what this command reads. A shell does.
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// What to run there in a login shell, with a terminal where this is one.
    #[arg(
        long = "exec",
        value_name = "COMMAND",
        conflicts_with_all = ["program", "tty", "stdin"]
    )]
    pub command: Option<String>,
    #[command(flatten)]
    pub ssh: Ssh,
    /// The program to run there, and its arguments; a shell where it is left out.
    #[arg(last = true, value_name = "PROGRAM")]
    pub program: Vec<String>,
}

/// The other way to a node: by the ssh of this machine, where the node has an SSH server.
#[derive(Debug, Args)]
pub struct Ssh {
    /// Log in by ssh instead; each of the options below does so as well. Nodes need no SSH server otherwise.
    #[arg(long, conflicts_with_all = ["program", "tty", "stdin"])]
    pub ssh: bool,
    /// Forward a port as LOCAL:HOST:PORT, as long as the command runs. May be given several times.
    #[arg(
        short = 'L',
        long = "address",
        value_name = "FORWARD",
        conflicts_with_all = ["program", "tty", "stdin"]
    )]
    pub forward: Vec<String>,
    /// The account to log in to; your own name where it is left out.
    #[arg(
        short = 'u',
        long = "user-name",
        value_name = "NAME",
        conflicts_with_all = ["program", "tty", "stdin"]
    )]
    pub user: Option<String>,
    /// Its password; better in BATCHAI_SSH_PASSWORD.
    #[arg(
        short = 'p',
        long,
        value_name = "PASSWORD",
        env = "BATCHAI_SSH_PASSWORD",
        hide_env = true,
        hide_env_values = true
    )]
    pub password: Option<String>,
    /// The private key to log in with.
    #[arg(
        short = 'k',
        long = "ssh-private-key",
        value_name = "FILE",
        conflicts_with_all = ["program", "tty", "stdin"]
    )]
    pub key: Option<PathBuf>,
}

impl Ssh {
    /// Whether ssh is to be used.
    pub fn is_wanted(&self) -> bool {
        let given = self.user.is_some() || self.password.is_some() || self.key.is_some();
        self.ssh || given || !self.forward.is_empty()
    }
}
