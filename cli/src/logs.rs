//! Follows a log file of a job through restarts of the coordinator: each time from the byte that is missing.

use std::io::Write;
use std::time::Duration;

use batchai_proto::v1::stream_job_logs_response::End;
use batchai_proto::v1::{GetJobRequest, StreamJobLogsRequest, job};
use tonic::Code;

use crate::client::{Client, Retry, request};
use crate::error::CliError;

/// A job that was put back into the queue gets another attempt: it is looked for this often.
const NEXT_ATTEMPT_PAUSE: Duration = Duration::from_millis(500);

/// How a file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// All of it was written out.
    Complete,
    /// The node was lost: there may have been more.
    Truncated,
}

/// Writes a log file out as it grows.
pub async fn follow(
    client: &Client,
    mut stream: StreamJobLogsRequest,
    out: &mut impl Write,
) -> Result<Follow, CliError> {
    let mut retry = Retry::default();
    loop {
        match read(client, &mut stream, out, &mut retry).await? {
            Some(Follow::Truncated) if stream.follow && goes_on(client, &stream.name).await? => {
                eprintln!("the job's node was lost; its next attempt begins anew");
                stream.offset = 0;
                tokio::time::sleep(NEXT_ATTEMPT_PAUSE).await;
            }
            Some(end) => return Ok(end),
            None => {}
        }
    }
}

/// One call. `None` where it broke and is to be made again.
async fn read(
    client: &Client,
    stream: &mut StreamJobLogsRequest,
    out: &mut impl Write,
    retry: &mut Retry,
) -> Result<Option<Follow>, CliError> {
    let mut pieces = match client.jobs().stream_job_logs(stream.clone()).await {
        Ok(pieces) => pieces.into_inner(),
        Err(status) => return retry.again(status).await.map(|()| None),
    };
    loop {
        match pieces.message().await {
            Ok(Some(piece)) => {
                retry.reset();
                out.write_all(&piece.data)?;
                out.flush()?;
                stream.offset = piece.offset + piece.data.len() as i64;
                match piece.end() {
                    End::Unspecified => {}
                    End::Complete | End::NotFollowed => return Ok(Some(Follow::Complete)),
                    End::Truncated => return Ok(Some(Follow::Truncated)),
                }
            }
            Ok(None) => return Ok(None),
            Err(status) if status.code() == Code::NotFound => return Err(status.into()),
            Err(status) => return retry.again(status).await.map(|()| None),
        }
    }
}

async fn goes_on(client: &Client, name: &str) -> Result<bool, CliError> {
    let get = GetJobRequest {
        name: name.to_owned(),
    };
    let state = client
        .jobs()
        .get_job(request(get))
        .await?
        .into_inner()
        .state();
    Ok(!matches!(state, job::State::Succeeded | job::State::Failed))
}
