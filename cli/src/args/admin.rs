//! What the verbs of the ensemble itself take.

use clap::Subcommand;

use super::Confirm;

#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Say how the ensemble is, and how far each of its replicas.
    Status,
    /// Have the replica that answers write a snapshot now, and forget the log before it.
    TakeSnapshot,
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
