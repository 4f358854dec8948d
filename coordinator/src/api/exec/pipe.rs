//! Joins who runs a command with the agent that does: what the one sends the other gets, until either goes away.
//!
//! It judges nothing of it but the size. Both ends bound what they send ahead; who does not is not read from any more.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::EXEC_CHUNK_BYTES_MAX;
use batchai_common::time::boot_millis;
use batchai_proto::agent::v1::serve_exec_request::Message;
use batchai_proto::agent::v1::{ServeExecRequest, ServeExecResponse};
use batchai_proto::v1::exec_input::Input;
use batchai_proto::v1::exec_output::Output;
use batchai_proto::v1::{ExecInput, ExecOutput};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::is_size;
use crate::agents::execs::Exec;

/// A command that reads and prints nothing for so long is hung up.
const IDLE_MAX: Duration = Duration::from_secs(4 * 3600);

type ToAgent = mpsc::Sender<Result<ServeExecResponse, Status>>;
type ToCaller = mpsc::Sender<Result<ExecOutput, Status>>;

/// Both ends.
pub struct Pipe<R> {
    pub node: String,
    pub exec: Exec,
    pub incoming: Streaming<R>,
    /// What of a message is for the command.
    pub input: fn(R) -> Option<ExecInput>,
    pub outbox: ToCaller,
}

impl<R: Send + 'static> Pipe<R> {
    /// Runs until the command has ended, or an end is gone: then the other learns that.
    pub async fn run(self, shutdown: CancellationToken) {
        let Pipe {
            node,
            exec: Exec { agent, permit },
            incoming,
            input,
            outbox,
        } = self;
        let lately = AtomicI64::new(boot_millis());
        let end = tokio::select! {
            end = down(incoming, input, &agent.outbox, &lately) => end,
            end = up(agent.incoming, &outbox, &lately) => end,
            () = outbox.closed() => Ok(()),
            () = idle(&lately, IDLE_MAX) => {
                Err(over(format!("nothing was read or printed for {} h", IDLE_MAX.as_secs() / 3600)))
            }
            () = shutdown.cancelled() => Err(over("the coordinator is shutting down".to_owned())),
        };
        tracing::info!(node, ended = ?end.as_ref().err().map(Status::message), "a command has ended");
        if let Err(status) = end {
            // Who ran it may be gone, or may not read: it learns that from the end of the stream.
            let _ = outbox.try_send(Err(status));
        }
        drop(permit);
    }
}

/// From who runs it to the agent. It ends only where that makes no sense, or is broken.
async fn down<R>(
    mut incoming: Streaming<R>,
    input: fn(R) -> Option<ExecInput>,
    agent: &ToAgent,
    lately: &AtomicI64,
) -> Result<(), Status> {
    while let Some(request) = incoming.message().await? {
        let input = input(request).filter(is_input).ok_or_else(|| {
            let why = "is not what a command can be given";
            Status::from(ApiError::Invalid(vec![Fault::new("input", why)]))
        })?;
        lately.store(boot_millis(), Ordering::Relaxed);
        pass(input, agent).await;
    }
    let end = Some(Input::End(true));
    pass(ExecInput { input: end }, agent).await;
    // It goes on without more to read.
    std::future::pending().await
}

async fn pass(input: ExecInput, agent: &ToAgent) {
    let input = Some(input);
    // That the agent is gone is noticed by who listens to it.
    let _ = agent.send(Ok(ServeExecResponse { input })).await;
}

fn is_input(input: &ExecInput) -> bool {
    match &input.input {
        Some(Input::Data(data)) => data.len() <= EXEC_CHUNK_BYTES_MAX,
        Some(Input::Resize(size)) => is_size(*size),
        Some(Input::End(end)) => *end,
        Some(Input::Taken(taken)) => *taken >= 0,
        None => false,
    }
}

/// From the agent to who runs it, up to the exit code.
async fn up(
    mut incoming: Streaming<ServeExecRequest>,
    caller: &ToCaller,
    lately: &AtomicI64,
) -> Result<(), Status> {
    loop {
        let next = incoming.message().await;
        let message = next.ok().flatten().and_then(|request| request.message);
        let output = match message {
            Some(Message::Output(output)) if is_output(&output) => output,
            Some(Message::Fault(fault)) => return Err(over(fault.message)),
            Some(_) => return Err(over("its agent says what makes no sense".to_owned())),
            None => {
                let why = "the node's agent has ended, or is not reached any more";
                return Err(over(why.to_owned()));
            }
        };
        lately.store(boot_millis(), Ordering::Relaxed);
        let last = matches!(output.output, Some(Output::ExitCode(_)));
        if caller.send(Ok(output)).await.is_err() || last {
            return Ok(());
        }
    }
}

fn is_output(output: &ExecOutput) -> bool {
    match &output.output {
        Some(Output::Stdout(data) | Output::Stderr(data)) => data.len() <= EXEC_CHUNK_BYTES_MAX,
        Some(Output::Taken(_) | Output::ExitCode(_)) => true,
        None => false,
    }
}

/// Returns when nothing has happened for so long.
async fn idle(lately: &AtomicI64, most: Duration) {
    loop {
        let since = boot_millis() - lately.load(Ordering::Relaxed);
        let since = Duration::from_millis(u64::try_from(since).unwrap_or_default());
        match most.checked_sub(since) {
            None | Some(Duration::ZERO) => return,
            Some(left) => tokio::time::sleep(left).await,
        }
    }
}

/// It has done something, and nobody knows what: it is not for clients to repeat.
fn over(why: String) -> Status {
    ApiError::HungUp { why }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_idle_for_too_long_is_over_and_nothing_else() {
        let lately = AtomicI64::new(boot_millis());
        let most = Duration::from_millis(60);
        let working = async {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                lately.store(boot_millis(), Ordering::Relaxed);
            }
        };
        tokio::select! {
            () = idle(&lately, most) => panic!("it was not idle"),
            () = working => {}
        }
        let begun = std::time::Instant::now();
        idle(&lately, most).await;
        assert!(begun.elapsed() >= Duration::from_millis(50));
    }
}
