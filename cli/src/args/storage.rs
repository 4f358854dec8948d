//! The verbs of storage aliases.

use clap::{ArgGroup, Args, Subcommand};

use super::{Confirm, InWorkspace, Which};

#[derive(Debug, Subcommand)]
pub enum StorageAlias {
    /// Say what is mounted where a share or a container of a storage account is asked for.
    Create(Box<StorageAliasCreate>),
    /// List storage aliases.
    List,
    /// Show storage aliases.
    Show {
        #[command(flatten)]
        which: Which,
    },
    /// Delete storage aliases. What is mounted by them stays so until its job ends or its node leaves the cluster.
    Delete {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true))]
#[command(group = ArgGroup::new("stead").required(true))]
#[command(
    override_usage = "batchai storage-alias create [OPTIONS] -n <NAME> -a <ACCOUNT> <WHAT> <STEAD>"
)]
pub struct StorageAliasCreate {
    /// Its name.
    #[arg(short, long)]
    pub name: String,
    /// The storage account, as jobs and clusters name it.
    #[arg(short, long, value_name = "ACCOUNT")]
    pub account: String,
    /// The share, as the URL of it has it.
    #[arg(long, value_name = "SHARE", group = "what")]
    pub share: Option<String>,
    /// The container.
    #[arg(long, value_name = "CONTAINER", group = "what")]
    pub container: Option<String>,
    /// A directory that every node has. Keys are not used then: whoever may submit jobs gets to what lies there.
    #[arg(long, value_name = "DIR", group = "stead")]
    pub path: Option<String>,
    /// A bucket of a service that speaks S3; account and key of the job are its access key.
    #[arg(long, value_name = "BUCKET", group = "stead", requires = "s3_endpoint")]
    pub s3_bucket: Option<String>,
    /// The URL of that service.
    #[arg(long, value_name = "URL", requires = "s3_bucket")]
    pub s3_endpoint: Option<String>,
    /// The region of the bucket, for services that must be told.
    #[arg(long, value_name = "REGION", requires = "s3_bucket")]
    pub s3_region: Option<String>,
    /// Another share, smb://HOST/SHARE, or another service of blobs, https://HOST.
    #[arg(long, value_name = "URL", group = "stead")]
    pub url: Option<String>,
    /// A file server of batchai: a name in the workspace, or a full one. Keys are not used then.
    #[arg(long, value_name = "NAME", group = "stead")]
    pub file_server: Option<String>,
    /// The directory of it. The whole of it where it is left out.
    #[arg(long, value_name = "DIR", requires = "file_server")]
    pub directory: Option<String>,
    #[command(flatten)]
    pub parent: InWorkspace,
}
