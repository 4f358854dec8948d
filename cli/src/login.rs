//! Where to log in to nodes, and logging in: by the ssh of this machine, to the SSH servers of the nodes.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use batchai_common::names::last_id;
use batchai_proto::v1;

use crate::args;
use crate::client::{Client, request};
use crate::error::CliError;
use crate::output::View;
use crate::resources::{Done, all_pages};

/// ssh asks this very program for a password, which finds it here.
const PASSWORD: &str = "BATCHAI_SSH_PASSWORD";

pub const LOGIN: View<v1::RemoteLoginInformation> = View {
    message: "RemoteLoginInformation",
    columns: &["ID", "IP", "SSH Port"],
    row: |l| {
        vec![
            last_id(&l.node).into(),
            l.ip_address.clone(),
            l.port.to_string(),
        ]
    },
};

type Nodes = Vec<v1::RemoteLoginInformation>;

pub async fn of_cluster(client: &Client, name: String) -> Result<Nodes, CliError> {
    let mut clusters = client.clusters();
    let list = v1::ListClusterRemoteLoginInformationRequest {
        name,
        ..Default::default()
    };
    Ok(all_pages!(
        clusters.list_cluster_remote_login_information,
        list,
        remote_login_information
    ))
}

pub async fn of_job(client: &Client, name: String) -> Result<Nodes, CliError> {
    let mut jobs = client.jobs();
    let list = v1::ListJobRemoteLoginInformationRequest {
        name,
        ..Default::default()
    };
    Ok(all_pages!(
        jobs.list_job_remote_login_information,
        list,
        remote_login_information
    ))
}

/// Answers ssh where it asks this program for a password; `None` where it was started for something else.
pub fn answer_password() -> Option<ExitCode> {
    let password = std::env::var(PASSWORD).ok()?;
    let prompt = std::env::args().nth(1).unwrap_or_default().to_lowercase();
    // Whether an unknown host is to be trusted is not answered by a password.
    if !prompt.contains("password") {
        say!("batchai: ssh asks: {prompt}\nLog in once without --password to answer that.");
        return Some(ExitCode::FAILURE);
    }
    println!("{password}");
    Some(ExitCode::SUCCESS)
}

/// Becomes an ssh to one of the nodes.
pub fn exec(nodes: Nodes, args: args::NodeExec) -> Done {
    let wanted = args.node.as_deref().map(last_id);
    let mut nodes = nodes.into_iter();
    let node = nodes.find(|node| wanted.is_none_or(|wanted| last_id(&node.node) == wanted));
    let node = node.ok_or_else(|| match wanted {
        Some(wanted) => CliError::Failed(format!("there is no node {wanted}")),
        None => CliError::Failed("there are no nodes".to_owned()),
    })?;
    let mut ssh = Command::new("ssh");
    ssh.arg("-p").arg(node.port.to_string());
    let of = &args.ssh;
    for forward in &of.forward {
        ssh.arg("-L").arg(forward);
    }
    if let Some(key) = &of.key {
        ssh.arg("-i").arg(key);
    }
    if let Some(password) = &of.password {
        let own = std::env::current_exe()?;
        ssh.env("SSH_ASKPASS", own)
            .env("SSH_ASKPASS_REQUIRE", "force")
            .env(PASSWORD, password)
            .args(["-o", "SendEnv=-*"]);
    }
    let target = match &of.user {
        Some(user) => format!("{user}@{}", node.ip_address),
        None => node.ip_address.clone(),
    };
    match &args.command {
        // In a login shell, as a person would run it.
        Some(command) => {
            let quoted = shlex::try_quote(command);
            let quoted = quoted.map_err(|error| CliError::Usage(format!("--exec: {error}")))?;
            ssh.arg("-t")
                .arg("--")
                .arg(target)
                .arg(format!("bash -lc {quoted}"))
        }
        // Ports alone need no shell.
        None if !of.forward.is_empty() => ssh.arg("-N").arg("--").arg(target),
        None => ssh.arg("--").arg(target),
    };
    let error = ssh.exec();
    Err(CliError::Failed(format!("ssh cannot be started: {error}")))
}

/// The public key that is meant where none is named; made where there is none, if that is wanted.
pub fn default_key(make: bool) -> Result<PathBuf, CliError> {
    let home = std::env::var_os("HOME");
    let home =
        home.ok_or_else(|| CliError::Usage("there is no HOME to look for keys in".into()))?;
    let key = PathBuf::from(home).join(".ssh/id_rsa.pub");
    if make && !key.exists() {
        if let Some(dir) = key.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "rsa", "-N", "", "-f"])
            .arg(key.with_extension(""))
            .status()?;
        if !made.success() {
            return Err(CliError::Failed("ssh-keygen made no key".to_owned()));
        }
    }
    Ok(key)
}
