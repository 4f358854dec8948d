//! Options that several verbs take: accounts and mounts.

use clap::Args;

/// The administrator's account. It is recorded only: the accounts on your machines are yours.
#[derive(Debug, Default, Args)]
pub struct Account {
    /// Name of the administrator's account.
    #[arg(short = 'u', long = "user-name", value_name = "NAME")]
    pub user: Option<String>,
    /// Its SSH public key, or a file with it.
    #[arg(short = 'k', long, value_name = "KEY")]
    pub ssh_key: Option<String>,
    /// Its password; better in BATCHAI_ADMIN_PASSWORD.
    #[arg(
        short = 'p',
        long,
        value_name = "PASSWORD",
        env = "BATCHAI_ADMIN_PASSWORD",
        hide_env = true,
        hide_env_values = true
    )]
    pub password: Option<String>,
    /// Make a pair of keys in ~/.ssh where there is none.
    #[arg(long)]
    pub generate_ssh_keys: bool,
}

impl Account {
    /// Whether anything of it was given.
    pub fn any(&self) -> bool {
        let named = self.user.is_some() || self.ssh_key.is_some() || self.password.is_some();
        named || self.generate_ssh_keys
    }
}

/// What to mount.
#[derive(Debug, Default, Args)]
pub struct Mounts {
    /// Account of an Azure storage, for --afs-name and --bfs-name.
    #[arg(
        long,
        env = "AZURE_BATCHAI_STORAGE_ACCOUNT",
        value_name = "NAME",
        hide_env = true
    )]
    pub storage_account_name: Option<String>,
    /// Its key.
    #[arg(
        long,
        env = "AZURE_BATCHAI_STORAGE_KEY",
        value_name = "KEY",
        hide_env = true,
        hide_env_values = true
    )]
    pub storage_account_key: Option<String>,
    /// Azure file share to mount.
    #[arg(long, value_name = "NAME")]
    pub afs_name: Option<String>,
    /// Where to mount it, below the mount root.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "afs",
        requires = "afs_name"
    )]
    pub afs_mount_path: String,
    /// Azure blob container to mount.
    #[arg(long, value_name = "NAME")]
    pub bfs_name: Option<String>,
    /// Where to mount it, below the mount root.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "bfs",
        requires = "bfs_name"
    )]
    pub bfs_mount_path: String,
    /// File server to mount: a name in the same workspace, or a full one.
    #[arg(long, value_name = "NAME")]
    pub nfs: Option<String>,
    /// Where to mount it, below the mount root.
    #[arg(long, value_name = "PATH", default_value = "nfs", requires = "nfs")]
    pub nfs_mount_path: String,
}

impl Mounts {
    /// Whether anything is to be mounted.
    pub fn any(&self) -> bool {
        self.afs_name.is_some() || self.bfs_name.is_some() || self.nfs.is_some()
    }
}
