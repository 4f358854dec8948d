//! `batchai run`: a command on some nodes, with the files of a directory, as if it ran here.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use batchai_common::shutdown;
use batchai_proto::v1;
use batchai_proto::v1::job::State;

use crate::args;
use crate::bundle;
use crate::client::{Client, request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::job::{exit_code, until_ended};
use crate::ranks::{self, To, Turn};
use crate::resources::Done;

/// Ranks whose output is followed; of a larger job these are the first.
const FOLLOWED_MAX: usize = 64;
/// Where logs are kept on the nodes.
const LOGS: &str = "$AZ_BATCHAI_MOUNT_ROOT/logs";

pub async fn run(args: args::Run, context: &Context) -> Done {
    let token = shutdown::on_signal()?;
    let client = context.client().await?;
    let cluster = context.the_cluster(args.cluster.as_ref(), &args.parent.workspace)?;
    let parent = context.experiment(&args.parent)?;
    let source = bundle::source(None, (!args.no_dir).then_some(args.dir))?;
    let bundle = match &source {
        Some(path) => bundle::send(&client, path).await?,
        None => String::new(),
    };
    let command_line = shlex::try_join(args.command.iter().map(String::as_str));
    let command_line = command_line.map_err(|error| CliError::Usage(error.to_string()))?;
    let create = v1::CreateJobRequest {
        parent,
        job_id: args.name.unwrap_or_else(name),
        job: Some(v1::Job {
            cluster,
            node_count: args.nodes,
            std_out_err_path_prefix: LOGS.to_owned(),
            custom_toolkit_settings: Some(v1::CustomToolkitSettings {
                command_line,
                processes_per_node: args.processes_per_node,
            }),
            bundle,
            ..Default::default()
        }),
        request_id: request_id(),
        validate_only: false,
    };
    let job = send_once(create, |r| {
        let mut jobs = client.jobs();
        async move { jobs.create_job(r).await }
    })
    .await?;
    let count = usize::try_from(args.nodes * args.processes_per_node).unwrap_or_default();
    let interrupted = end_when_told(&client, &job.name, token);
    let ended = follow(&client, &job.name, count);
    tokio::select! {
        ended = ended => ended,
        failed = interrupted => failed,
    }
}

/// The first Ctrl-C ends the job, and its output is followed to its end.
async fn end_when_told(
    client: &Client,
    name: &str,
    token: tokio_util::sync::CancellationToken,
) -> Done {
    token.cancelled().await;
    eprintln!("batchai: ending job {name}");
    let terminate = v1::TerminateJobRequest {
        name: name.to_owned(),
    };
    client.jobs().terminate_job(request(terminate)).await?;
    std::future::pending().await
}

async fn follow(client: &Client, name: &str, count: usize) -> Done {
    let turn = Turn::default();
    let client = Arc::new(client.clone());
    if count > FOLLOWED_MAX {
        eprintln!("batchai: following the first {FOLLOWED_MAX} of {count} processes");
    }
    let mut followers = tokio::task::JoinSet::new();
    for rank in 0..count.min(FOLLOWED_MAX) {
        let prefix = match count {
            1 => String::new(),
            _ => format!("[{rank}] "),
        };
        let (client, name, turn) = (client.clone(), name.to_owned(), turn.clone());
        followers.spawn(async move {
            let prefixes = ((prefix.clone(), To::Stdout), (prefix, To::Stderr));
            ranks::follow(&client, &name, rank, prefixes, &turn).await
        });
    }
    let mut said = String::new();
    let ended = until_ended(&client, name, None, |job| {
        // Who waits wants to know for what; who runs prints for himself.
        if job.state() == State::Queued && job.pending_reason != said {
            said.clone_from(&job.pending_reason);
            eprintln!("batchai: job {name} waits: {said}");
        }
    });
    let job = ended.await?;
    while let Some(follower) = followers.join_next().await {
        follower.map_err(std::io::Error::other)??;
    }
    for error in job.errors.iter().filter(|error| error.code != "JobFailed") {
        eprintln!("batchai: {}: {}", error.code, error.message);
    }
    Ok(ExitCode::from(exit_code(&job)))
}

/// A name that sorts by time and that nobody else has.
fn name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = now.map_or(0, |now| now.as_millis());
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("run-{millis}-{}", &random[..6])
}
