//! The commands for jobs.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use batchai_common::names::{Kind, last_id};
use batchai_proto::v1;
use batchai_proto::v1::job::State;
use indicatif::ProgressBar;
use tonic::Status;

use crate::args;
use crate::bundle;
use crate::client::{Client, Retry, request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::exec;
use crate::file;
use crate::job_files;
use crate::login;
use crate::output::{View, confirm};
use crate::resources::{Done, all_pages, delete_all, get_all, labels, part, update_all};
use crate::variables;

use crate::settings::add_mounts;

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

pub async fn run(command: args::Job, context: &Context) -> Done {
    let client = context.client().await?;
    let named = |which: &args::Which, parent: &args::InExperiment| {
        context.which(which, Kind::Job, || context.experiment(parent))
    };
    let mut jobs = client.jobs();
    match command {
        args::Job::Create(create) => {
            context
                .printer
                .show(&JOB, &self::create(*create, &client, context).await?)?;
        }
        args::Job::List { parent, filter } => {
            let list = v1::ListJobsRequest {
                parent: context.experiment(&parent)?,
                filter,
                ..Default::default()
            };
            let all = all_pages!(jobs.list_jobs, list, jobs);
            context.printer.list(&JOB, &all)?;
        }
        args::Job::Show { parent, which } => {
            let found = get_all!(jobs.get_job, GetJobRequest, named(&which, &parent)?);
            context.printer.named(&JOB, &found)?;
        }
        args::Job::Update {
            parent,
            which,
            labels: given,
        } => {
            let changed = update_all!(
                jobs.update_job,
                UpdateJobRequest { job: Job.labels },
                named(&which, &parent)?,
                given
            );
            context.printer.named(&JOB, &changed)?;
        }
        args::Job::Terminate {
            parent,
            which,
            confirm: c,
        } => {
            let ended = terminate(&client, named(&which, &parent)?, &c).await?;
            context.printer.named(&JOB, &ended)?;
        }
        args::Job::Delete {
            parent,
            which,
            confirm: c,
        } => {
            let delete = |name| v1::DeleteJobRequest {
                name,
                etag: String::new(),
            };
            let names = named(&which, &parent)?;
            delete_all!(jobs.delete_job, get_job, (delete, GetJobRequest), names, &c);
        }
        args::Job::Wait {
            parent,
            name,
            interval,
        } => {
            let name = format!("{}/jobs/{name}", context.experiment(&parent)?);
            return wait(&client, &name, interval.map(Duration::from_secs)).await;
        }
        args::Job::File(command) => return job_files::run(command, &client, context).await,
        args::Job::Node(command) => return node(command, &client, context).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn node(command: args::JobNode, client: &Client, context: &Context) -> Done {
    let of = async |parent: &args::InExperiment, job: &str| {
        let name = format!("{}/jobs/{job}", context.experiment(parent)?);
        login::of_job(client, name).await
    };
    match command {
        args::JobNode::List { parent, job } => {
            context
                .printer
                .list(&login::LOGIN, &of(&parent, &job).await?)?;
            Ok(ExitCode::SUCCESS)
        }
        args::JobNode::Exec { parent, job, exec } if exec.ssh.is_wanted() => {
            login::exec(of(&parent, &job).await?, exec)
        }
        args::JobNode::Exec { parent, job, exec } => {
            let name = format!("{}/jobs/{job}", context.experiment(&parent)?);
            exec::beside_job(client, name, exec).await
        }
    }
}

async fn create(
    args: args::JobCreate,
    client: &Client,
    context: &Context,
) -> Result<v1::Job, CliError> {
    let create = create_request(args, client, context).await?;
    send_once(create, |r| {
        let mut jobs = client.jobs();
        async move { jobs.create_job(r).await }
    })
    .await
}

/// Asks, ends some jobs, and waits until they have ended, unless told not to.
async fn terminate(
    client: &Client,
    names: Vec<String>,
    asked: &args::Confirm,
) -> Result<Vec<v1::Job>, CliError> {
    confirm(&format!("Terminate {}?", names.join(", ")), asked.yes)?;
    let mut ended = Vec::new();
    for name in names {
        let terminate = v1::TerminateJobRequest { name };
        let job = client.jobs().terminate_job(request(terminate)).await?;
        ended.push(job.into_inner());
    }
    for job in ended.iter_mut().filter(|_| !asked.no_wait) {
        *job = until_ended(client, &job.name.clone(), None, |_| ()).await?;
    }
    Ok(ended)
}

async fn create_request(
    args: args::JobCreate,
    client: &Client,
    context: &Context,
) -> Result<v1::CreateJobRequest, CliError> {
    let mut job: v1::Job = file::read(&args.file, "Job")?;
    let workspace = &args.parent.workspace;
    // What was typed goes before the file's cluster, and that before what is kept.
    let typed = args.cluster.as_ref();
    if typed.is_some() || job.cluster.is_empty() {
        job.cluster = context.cluster(typed, workspace)?.unwrap_or_default();
    } else if !job.cluster.contains('/') {
        job.cluster = format!("{}/clusters/{}", context.workspace(workspace)?, job.cluster);
    }
    if args.mounts.any() {
        let mounts = job.mount_volumes.get_or_insert_default();
        add_mounts(mounts, &args.mounts, workspace, context)?;
    }
    variables::add(&mut job, args.variables)?;
    job.labels.extend(labels(args.labels));
    let parent = context.experiment(&args.parent)?;
    // Last: what was typed wrong is said before anything is sent.
    if let Some(path) = bundle::source(args.files.script, args.files.dir)? {
        job.bundle = bundle::send(client, &path).await?;
    }
    Ok(v1::CreateJobRequest {
        parent,
        job_id: args.name,
        job: Some(job),
        request_id: request_id(),
        validate_only: false,
    })
}

/// Prints every change of a job's state until it has ended.
async fn wait(client: &Client, name: &str, interval: Option<Duration>) -> Done {
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new_spinner(),
        false => ProgressBar::hidden(),
    };
    bar.enable_steady_tick(Duration::from_millis(100));
    let mut said = String::new();
    let mut say = |job: &v1::Job| {
        let text = line(job);
        if said != text {
            bar.suspend(|| say!("{text}"));
            said = text;
        }
        bar.set_message(match job.pending_reason.as_str() {
            "" => job.state().as_str_name().to_lowercase(),
            reason => reason.to_owned(),
        });
    };
    let job = until_ended(client, name, interval, &mut say).await?;
    bar.finish_and_clear();
    for error in &job.errors {
        say!("{}: {}", error.code, error.message);
    }
    Ok(ExitCode::from(exit_code(&job)))
}

/// The exit code that says how a job ended.
pub fn exit_code(job: &v1::Job) -> u8 {
    match (job.state(), job.exit_code) {
        (State::Succeeded, _) => 0,
        (_, Some(code)) => u8::try_from(code).unwrap_or(UNKNOWN_EXIT_CODE),
        (_, None) => UNKNOWN_EXIT_CODE,
    }
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

/// Watches a job, or looks at it now and then, through restarts of the coordinator, and shows it after every change;
/// returns it when it has ended.
pub async fn until_ended(
    client: &Client,
    name: &str,
    interval: Option<Duration>,
    mut show: impl FnMut(&v1::Job),
) -> Result<v1::Job, CliError> {
    let mut retry = Retry::default();
    while let Some(pause) = interval {
        let get = v1::GetJobRequest {
            name: name.to_owned(),
        };
        match client.jobs().get_job(request(get)).await {
            Ok(job) => {
                let job = job.into_inner();
                retry.reset();
                show(&job);
                if matches!(job.state(), State::Succeeded | State::Failed) {
                    return Ok(job);
                }
                tokio::time::sleep(pause).await;
            }
            Err(status) => retry.again(status).await?,
        }
    }
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
