//! The commands for jobs.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use batchai_common::names::last_id;
use batchai_proto::v1;
use batchai_proto::v1::job::State;
use indicatif::ProgressBar;
use tonic::Status;

use crate::args::{self, Global, InExperiment};
use crate::client::{Client, Retry, request, request_id, send_once};
use crate::error::CliError;
use crate::file;
use crate::logs::{self, Follow};
use crate::output::{View, confirm};
use crate::resources::{all_pages, part};

type Done = Result<ExitCode, CliError>;

/// The exit code of a job that has none.
const UNKNOWN_EXIT_CODE: u8 = 255;

const JOB: View<v1::Job> = View {
    message: "Job",
    columns: &[
        "Name",
        "Cluster",
        "Cluster RG",
        "Cluster Workspace",
        "Tool",
        "Nodes",
        "State",
        "Exit code",
    ],
    row: |j| {
        vec![
            last_id(&j.name).into(),
            last_id(&j.cluster).into(),
            part(&j.cluster, 0),
            part(&j.cluster, 1),
            j.tool_type().as_str_name().to_lowercase(),
            j.node_count.to_string(),
            j.state().as_str_name().to_lowercase(),
            j.exit_code.map(|code| code.to_string()).unwrap_or_default(),
        ]
    },
};

pub async fn run(command: args::Job, global: &Global) -> Done {
    let client = Client::connect(&global.endpoint).await?;
    let named = |parent: &InExperiment, name: &str| format!("{}/jobs/{name}", parent.name());
    match command {
        args::Job::Create {
            parent,
            name,
            file,
            cluster,
        } => {
            let create = create_request(&parent, name, &file, cluster)?;
            let job = send_once(create, |r| {
                let mut jobs = client.jobs();
                async move { jobs.create_job(r).await }
            })
            .await?;
            JOB.show(global.output, &job)?;
        }
        args::Job::List { parent } => {
            let list = v1::ListJobsRequest {
                parent: parent.name(),
                ..Default::default()
            };
            let mut jobs = client.jobs();
            let all = all_pages!(jobs.list_jobs, list, jobs);
            JOB.list(global.output, &all)?;
        }
        args::Job::Show { parent, name } => {
            let get = v1::GetJobRequest {
                name: named(&parent, &name),
            };
            let job = client.jobs().get_job(request(get)).await?.into_inner();
            JOB.show(global.output, &job)?;
        }
        args::Job::Terminate {
            parent,
            name,
            confirm: c,
        } => {
            confirm(&format!("Terminate job {name}?"), c.yes)?;
            let terminate = v1::TerminateJobRequest {
                name: named(&parent, &name),
            };
            let job = client
                .jobs()
                .terminate_job(request(terminate))
                .await?
                .into_inner();
            JOB.show(global.output, &job)?;
        }
        args::Job::Delete {
            parent,
            name,
            confirm: c,
        } => {
            confirm(&format!("Delete job {name}?"), c.yes)?;
            let delete = v1::DeleteJobRequest {
                name: named(&parent, &name),
                ..Default::default()
            };
            client.jobs().delete_job(request(delete)).await?;
        }
        args::Job::Wait { parent, name } => return wait(&client, &named(&parent, &name)).await,
        args::Job::File(command) => return stream(&client, command).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn stream(client: &Client, command: args::JobFile) -> Done {
    let args::JobFile::Stream {
        parent,
        job,
        file,
        rank,
        directory,
        node,
        offset,
        no_follow,
    } = command;
    let file = file
        .or(rank.map(|rank| format!("stdout-{rank}.txt")))
        .unwrap_or_default();
    let stream = v1::StreamJobLogsRequest {
        name: format!("{}/jobs/{job}", parent.name()),
        directory,
        file,
        node: node
            .map(|node| format!("nodes/{}", last_id(&node)))
            .unwrap_or_default(),
        offset,
        length: 0,
        follow: !no_follow,
    };
    match logs::follow(client, stream, &mut std::io::stdout()).await? {
        Follow::Complete => Ok(ExitCode::SUCCESS),
        Follow::Truncated => Err(CliError::Failed(
            "the node was lost: the file may have had more".to_owned(),
        )),
    }
}

fn create_request(
    parent: &InExperiment,
    name: String,
    path: &std::path::Path,
    cluster: Option<String>,
) -> Result<v1::CreateJobRequest, CliError> {
    let mut job: v1::Job = file::read(path, "Job")?;
    if let Some(cluster) = cluster {
        job.cluster = cluster;
    }
    // A bare name is one of the job's own workspace.
    if !job.cluster.is_empty() && !job.cluster.contains('/') {
        job.cluster = format!("{}/clusters/{}", parent.workspace.name(), job.cluster);
    }
    Ok(v1::CreateJobRequest {
        parent: parent.name(),
        job_id: name,
        job: Some(job),
        request_id: request_id(),
        validate_only: false,
    })
}

/// Prints every change of a job's state until it has ended.
async fn wait(client: &Client, name: &str) -> Done {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new_spinner(),
        false => ProgressBar::hidden(),
    };
    bar.enable_steady_tick(Duration::from_millis(100));
    let mut said = String::new();
    let mut say = |job: &v1::Job| {
        let text = line(job);
        if said != text {
            bar.suspend(|| eprintln!("{text}"));
            said = text;
        }
        bar.set_message(match job.pending_reason.as_str() {
            "" => job.state().as_str_name().to_lowercase(),
            reason => reason.to_owned(),
        });
    };
    let job = until_ended(client, name, &mut say).await?;
    bar.finish_and_clear();
    for error in &job.errors {
        eprintln!("{}: {}", error.code, error.message);
    }
    let code = match (job.state(), job.exit_code) {
        (State::Succeeded, _) => 0,
        (_, Some(code)) => u8::try_from(code).unwrap_or(UNKNOWN_EXIT_CODE),
        (_, None) => UNKNOWN_EXIT_CODE,
    };
    Ok(ExitCode::from(code))
}

fn line(job: &v1::Job) -> String {
    let time = job
        .state_transition_time
        .map(|time| time.to_string())
        .unwrap_or_default();
    let state = job.state().as_str_name().to_lowercase();
    match job.pending_reason.as_str() {
        "" => format!("{time} {state}"),
        reason => format!("{time} {state}: {reason}"),
    }
}

/// Watches a job, through restarts of the coordinator, and shows it after every change; returns it when it has ended.
pub async fn until_ended(
    client: &Client,
    name: &str,
    mut show: impl FnMut(&v1::Job),
) -> Result<v1::Job, CliError> {
    let mut retry = Retry::default();
    loop {
        let watch = v1::WatchJobRequest {
            name: name.to_owned(),
            revision: 0,
        };
        let mut changes = match client.jobs().watch_job(watch).await {
            Ok(changes) => changes.into_inner(),
            Err(status) => {
                retry.again(status).await?;
                continue;
            }
        };
        loop {
            match changes.message().await {
                Ok(Some(change)) => {
                    retry.reset();
                    if !change.deleted.is_empty() {
                        return Err(CliError::Failed(format!("{name} was deleted")));
                    }
                    for job in change.jobs {
                        show(&job);
                        if matches!(job.state(), State::Succeeded | State::Failed) {
                            return Ok(job);
                        }
                    }
                }
                Ok(None) => {
                    retry
                        .again(Status::unavailable("the stream ended early"))
                        .await?;
                    break;
                }
                Err(status) => {
                    retry.again(status).await?;
                    break;
                }
            }
        }
    }
}
