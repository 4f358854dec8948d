//! What the verbs of the ensemble itself take.

use std::path::PathBuf;

use clap::Subcommand;

use super::Confirm;

#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Say how the ensemble is, and how far each of its replicas.
    Status,
    /// Have the replica that answers write a snapshot now, and forget the log before it.
    TakeSnapshot,
    /// Backups: all that the ensemble knows, in a file.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Work from before a restore that nodes hold and the restored ensemble does not know.
    #[command(subcommand)]
    Stray(Stray),
    /// The replicas: who keeps the log, and votes.
    #[command(subcommand)]
    Replica(Replica),
}

#[derive(Debug, Subcommand)]
pub enum Replica {
    /// List them.
    List,
    /// Let a replica in that gets the log and has no vote. Make its data directory first: batchai coordinator add-replica.
    Add {
        /// Its number: one that no replica of the ensemble ever had.
        #[arg(long, value_name = "ID")]
        id: u64,
        /// Where the others reach it.
        #[arg(long, value_name = "URL")]
        at: String,
    },
    /// Give a replica a vote, once it has the log.
    Promote {
        /// Its number.
        #[arg(long, value_name = "ID")]
        id: u64,
    },
    /// Remove a replica. Its number is not used again.
    Remove {
        /// Its number.
        #[arg(long, value_name = "ID")]
        id: u64,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Have a replica lead.
    Lead {
        /// Its number; whoever has most of the log where it is left out.
        #[arg(
            long,
            value_name = "ID",
            default_value_t = 0,
            hide_default_value = true
        )]
        id: u64,
    },
}

#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Write a backup. Certificates, the keys of secrets, job logs and bundles are not in it: keep a copy of `pki` and `secrets.key`
    /// of a data directory elsewhere.
    Save {
        /// The file to write; there must be none.
        #[arg(long = "to", value_name = "FILE")]
        to: PathBuf,
    },
    /// Read all of a backup, here and without a coordinator, and say what is in it.
    Verify {
        /// The backup.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Begin anew from a backup, here and while no coordinator runs: one replica, alone, with all that the backup knows. It places
    /// nothing before `batchai admin snapshot accept`. Others join it under new ids.
    Restore {
        /// The backup.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// A data directory whose log is gone or set aside, of a replica or as `batchai coordinator init` makes it.
        #[arg(
            long,
            default_value = "/var/lib/batchai/coordinator",
            value_name = "DIR"
        )]
        data: PathBuf,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Let a restored ensemble place work, once its nodes are back and what they hold is adopted or discarded.
    Accept {
        /// Also where nodes are not back, or hold work that nothing was decided about: what they hold may then run twice.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Stray {
    /// List it.
    List,
    /// Take an attempt over: its job, which is queued here, runs by it.
    Adopt {
        /// Its id.
        #[arg(long, value_name = "ID")]
        attempt: String,
    },
    /// End an attempt on all of its nodes.
    Discard {
        /// Its id.
        #[arg(long, value_name = "ID")]
        attempt: String,
        #[command(flatten)]
        confirm: Confirm,
    },
}
