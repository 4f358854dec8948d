//! `batchai run`: a command on some nodes, with the files of a directory, as if it ran here.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use batchai_common::shutdown::Interrupts;
use batchai_proto::v1;
use batchai_proto::v1::job::State;

use crate::args;
use crate::bundle;
use crate::client::{Client, Retry, request, request_id, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::job::{exit_code, until_ended};
use crate::ranks::{self, To, Turn};
use crate::resources::Done;
use crate::variables;

/// Ranks whose output is followed; of a larger job these are the first.
const FOLLOWED_MAX: usize = 64;
/// Where logs are kept on the nodes.
const LOGS: &str = "$AZ_BATCHAI_MOUNT_ROOT/logs";
/// The exit code of who was interrupted.
const INTERRUPTED: u8 = 130;

pub async fn run(args: args::Run, context: &Context) -> Done {
    let mut interrupts = Interrupts::new()?;
    let count = usize::try_from(args.nodes * args.processes_per_node).unwrap_or_default();
    let prepared = async {
        let client = context.client().await?;
        let create = prepare(args, &client, context).await?;
        Ok::<_, CliError>((client, create))
    };
    let (client, create) = tokio::select! {
        prepared = prepared => prepared?,
        () = interrupts.next() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    // From here on there may be a job: an interrupt is heeded when its name is known to be taken.
    let job = send_once(create, |r| {
        let mut jobs = client.jobs();
        async move { jobs.create_job(r).await }
    })
    .await?;
    tokio::select! {
        ended = follow(&client, &job.name, count) => match ended {
            Err(CliError::System(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                say!("batchai: nobody reads the output any more; job {} goes on", job.name);
                Ok(ExitCode::FAILURE)
            }
            ended => ended,
        },
        left = end_when_told(&client, &job.name, interrupts) => left,
    }
}

/// Sends the files, and says what is to be created.
async fn prepare(
    args: args::Run,
    client: &Client,
    context: &Context,
) -> Result<v1::CreateJobRequest, CliError> {
    let cluster = context.the_cluster(args.cluster.as_ref(), &args.parent.workspace)?;
    let parent = context.experiment(&args.parent)?;
    let command_line = shlex::try_join(args.command.iter().map(String::as_str));
    let command_line = command_line.map_err(|error| CliError::Usage(error.to_string()))?;
    let mut job = v1::Job {
        cluster,
        node_count: args.nodes,
        std_out_err_path_prefix: LOGS.to_owned(),
        custom_toolkit_settings: Some(v1::CustomToolkitSettings {
            command_line,
            processes_per_node: args.processes_per_node,
        }),
        ..Default::default()
    };
    // What was typed wrong is said before anything is sent.
    variables::add(&mut job, args.variables)?;
    let source = bundle::source(None, (!args.no_dir).then_some(args.dir))?;
    if let Some(path) = &source {
        job.bundle = bundle::send(client, path).await?;
    }
    Ok(v1::CreateJobRequest {
        parent,
        job_id: args.name.unwrap_or_else(name),
        job: Some(job),
        request_id: request_id(),
        validate_only: false,
    })
}

/// The first Ctrl-C ends the job, and its output is followed to its end. The second leaves it.
async fn end_when_told(client: &Client, name: &str, mut interrupts: Interrupts) -> Done {
    interrupts.next().await;
    say!("batchai: ending job {name}; interrupt again to leave it");
    let end = async {
        let mut retry = Retry::default();
        let terminate = v1::TerminateJobRequest {
            name: name.to_owned(),
        };
        while let Err(status) = client
            .jobs()
            .terminate_job(request(terminate.clone()))
            .await
        {
            retry.again(status).await?;
        }
        std::future::pending::<Done>().await
    };
    tokio::select! {
        failed = end => failed,
        () = interrupts.next() => {
            say!("batchai: left; job {name} may still run: batchai job show --ids {name}");
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

async fn follow(client: &Client, name: &str, count: usize) -> Done {
    let turn = Turn::default();
    let client = Arc::new(client.clone());
    if count > FOLLOWED_MAX {
        say!("batchai: following the first {FOLLOWED_MAX} of {count} processes");
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
    let followed = async {
        while let Some(follower) = followers.join_next().await {
            follower.map_err(io::Error::other)??;
        }
        Ok(())
    };
    let mut said = String::new();
    let ended = until_ended(&client, name, None, |job| {
        // Who waits wants to know for what; who runs prints for himself.
        if job.state() == State::Queued && job.pending_reason != said {
            said.clone_from(&job.pending_reason);
            say!("batchai: job {name} waits: {said}");
        }
    });
    let (job, ()) = tokio::try_join!(ended, followed)?;
    // An exit code says for itself what a signal needs words for.
    let plain = |error: &v1::ResourceError| {
        error.code == "JobFailed" && error.details.iter().all(|detail| detail.name != "signal")
    };
    for error in job.errors.iter().filter(|error| !plain(error)) {
        say!("batchai: {}: {}", error.code, error.message);
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
