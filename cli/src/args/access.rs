//! What the verbs of roles, tokens and certificates take.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Confirm, Which};

/// What one may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    Reader,
    Contributor,
    Owner,
    Admin,
}

/// A part of the ensemble. What is kept in the configuration file says nothing here.
#[derive(Debug, Args)]
pub struct Scope {
    /// Only in this resource group; in all of the ensemble where it is left out.
    #[arg(short = 'g', long = "resource-group", value_name = "GROUP")]
    pub group: Option<String>,
    /// Only in this workspace of it.
    #[arg(short = 'w', long, value_name = "WORKSPACE", requires = "group")]
    pub workspace: Option<String>,
}

/// How long something is good.
#[derive(Debug, Args)]
pub struct Ttl {
    /// How long it is good: 30m, 1h, 7d.
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = seconds)]
    pub ttl: i64,
}

fn seconds(text: &str) -> Result<i64, String> {
    let seconds = crate::file::seconds(text).filter(|seconds| *seconds > 0);
    seconds.ok_or_else(|| format!("{text:?} is no time such as 30m, 1h or 7d"))
}

#[derive(Debug, Subcommand)]
pub enum RoleCommand {
    /// Let a user do something, everywhere or in a part of the ensemble.
    Create {
        /// The binding's name; made of user and role where it is left out.
        #[arg(short, long)]
        name: Option<String>,
        /// Who.
        #[arg(short, long, value_name = "USER")]
        user: String,
        /// What: see; and run; and manage groups and roles; and everything.
        #[arg(long, value_enum)]
        role: Role,
        #[command(flatten)]
        scope: Scope,
    },
    /// List who may do what.
    List,
    /// Take roles away.
    Delete {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum User {
    /// Tokens that act for a user, for programs that have no certificate.
    #[command(subcommand)]
    Token(UserToken),
    /// Certificates of users.
    #[command(subcommand)]
    Certificate(Certificate),
}

#[derive(Debug, Subcommand)]
pub enum UserToken {
    /// Make a token, and print it. It is not shown again.
    Create {
        /// The token's name; made up where it is left out.
        #[arg(short, long)]
        name: Option<String>,
        /// For whom.
        #[arg(short, long, value_name = "USER")]
        user: String,
        #[command(flatten)]
        ttl: Ttl,
        /// The most that it may do, whatever its user may.
        #[arg(long, value_enum)]
        role: Option<Role>,
        #[command(flatten)]
        scope: Scope,
    },
    /// List tokens.
    List,
    /// Revoke tokens.
    Revoke {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum Certificate {
    /// Make a key here, have it certified, and write a file of credentials.
    Create {
        /// For whom.
        #[arg(short, long, value_name = "USER")]
        user: String,
        /// How long it is good: 30m, 1h, 7d.
        #[arg(long, default_value = "365d", value_name = "TIME", value_parser = seconds)]
        ttl: i64,
        /// The file to write.
        #[arg(long = "to", value_name = "FILE")]
        to: PathBuf,
    },
    /// Have all certificates of a user refused that were made until now.
    Revoke {
        /// Whose.
        #[arg(short, long, value_name = "USER")]
        user: String,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Print the latest of what changed something or was refused.
    Tail {
        /// How many.
        #[arg(short = 'n', long, default_value_t = 10, value_name = "COUNT")]
        lines: i32,
        /// And what comes, until Ctrl-C.
        #[arg(short, long)]
        follow: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum NodeToken {
    /// Make a token by which machines become nodes, and print it. It is not shown again.
    Create {
        /// The token's name; made up where it is left out.
        #[arg(short, long)]
        name: Option<String>,
        /// The VM size that they register; their own where it is left out.
        #[arg(
            short = 's',
            long,
            value_name = "SIZE",
            default_value = "",
            hide_default_value = true
        )]
        vm_size: String,
        #[command(flatten)]
        ttl: Ttl,
        /// How many machines may join by it.
        #[arg(long, default_value_t = 1, value_name = "COUNT")]
        uses: i32,
    },
    /// List tokens.
    List,
    /// Revoke tokens. Nodes that have joined by them stay.
    Revoke {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}
