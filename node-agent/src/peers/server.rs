//! Who may start what: the two ways in.

use std::sync::Arc;
use std::time::Duration;

use batchai_common::limits::CALL_TIMEOUT;
use batchai_common::names::last_id;
use batchai_common::tls::{Identity, Peer};
use batchai_proto::agent::v1::peer_service_server::PeerService;
use batchai_proto::agent::v1::start_remote_request::Message;
use batchai_proto::agent::v1::{Assignment, Host, RemoteHello, StartRemoteRequest};
use batchai_proto::v1::{ExecCommand, ExecInput};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Shared, inputs, of_this_node};
use crate::execs::{ForPeer, outbox, run_for_peer, secrets};

/// How long an attempt is waited for that another node has launched.
const LAUNCH_MAX: Duration = Duration::from_secs(30);

/// Processes of this machine.
pub struct FromHere(pub Arc<Shared>);

/// Agents of other nodes.
pub struct FromPeers(pub Arc<Shared>);

#[tonic::async_trait]
impl PeerService for FromHere {
    type StartRemoteStream = Answers;

    async fn start_remote(
        &self,
        request: Request<Streaming<StartRemoteRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let info = request.extensions().get::<UdsConnectInfo>();
        let pid = info.and_then(|info| info.peer_cred?.pid());
        let (hello, rest) = first(request.into_inner()).await?;
        let shared = &self.0;
        // The same answer to who has no token and to who asks for what is not here.
        let known = shared.key.token(&hello.attempt) == hello.token;
        let assignment = shared.assignment(&hello.attempt).filter(|_| known);
        let why = "only processes of a job that runs here start others on its nodes";
        let assignment = assignment.ok_or_else(|| Status::permission_denied(why))?;
        let host = host(&assignment, &hello.host)?.clone();
        let hello = RemoteHello {
            token: String::new(),
            secrets: secrets(&assignment, pid.into_iter()),
            ..hello
        };
        let (attempt, command) = (&hello.attempt, &hello.command_line);
        tracing::info!(
            attempt,
            to = host.node,
            command,
            "a job starts something on another node of it"
        );
        let answers = match host.node == shared.node {
            true => begin(shared, assignment, hello, rest)?,
            false => shared.pass_on(&host, hello, rest).await?,
        };
        Ok(Response::new(answers))
    }
}

#[tonic::async_trait]
impl PeerService for FromPeers {
    type StartRemoteStream = Answers;

    async fn start_remote(
        &self,
        request: Request<Streaming<StartRemoteRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let shown = peer.and_then(|peer| peer.certificate);
        let shown = shown.filter(|shown| !shown.expired());
        let Some(Identity::Node { id, uid }) = shown.map(|shown| shown.identity.clone()) else {
            return Err(Status::unauthenticated(
                "only agents of nodes are served here",
            ));
        };
        let (hello, rest) = first(request.into_inner()).await?;
        let shared = &self.0;
        let launched = shared.launched(&hello.attempt);
        let assignment = tokio::time::timeout(LAUNCH_MAX, launched).await;
        let is_it = |host: &Host| last_id(&host.node) == id && host.uid == uid;
        let assignment = assignment.ok().flatten();
        let assignment = assignment.filter(|assignment| assignment.hosts.iter().any(is_it));
        let why = format!("{} runs nothing that nodes/{id} has a part in", shared.node);
        let assignment = assignment.ok_or_else(|| Status::permission_denied(why))?;
        let (attempt, command) = (&hello.attempt, &hello.command_line);
        tracing::info!(
            attempt,
            from = id,
            command,
            "started for another node of a job"
        );
        Ok(Response::new(begin(shared, assignment, hello, rest)?))
    }
}

/// Runs it here.
fn begin(
    shared: &Shared,
    assignment: Assignment,
    hello: RemoteHello,
    rest: impl Stream<Item = ExecInput> + Send + 'static,
) -> Result<Answers, Status> {
    let permit = shared.room.clone().try_acquire_owned();
    let why = || Status::resource_exhausted(format!("{}: too many commands", shared.node));
    let permit = permit.map_err(|_| why())?;
    let arguments = match hello.command_line.as_str() {
        "" => vec!["/bin/bash".to_owned(), "-s".to_owned()],
        line => ["/bin/bash", "-c", line].map(str::to_owned).to_vec(),
    };
    // Only what the job calls so: another node has no say in the rest of the environment.
    let names = assignment.job.iter().flat_map(|job| &job.secrets);
    let names: Vec<_> = names.map(|secret| secret.name.clone()).collect();
    let mut more = of_this_node(&shared.key, &assignment.attempt);
    let secrets = hello.secrets.into_iter();
    more.extend(secrets.filter(|(name, _)| names.contains(name)));
    let what = ForPeer {
        assignment,
        command: ExecCommand {
            arguments,
            input: hello.input,
            ..ExecCommand::default()
        },
        more,
    };
    let parts = shared.parts.clone();
    let (outbox, answers) = outbox();
    tokio::spawn(async move {
        let attempt = what.assignment.attempt.clone();
        let end = run_for_peer(what, &parts, outbox, Box::pin(rest)).await;
        tracing::info!(attempt, end, "what was started for a node of a job is over");
        drop(permit);
    });
    Ok(Box::pin(ReceiverStream::new(answers).map(Ok)))
}

async fn first(
    mut incoming: Streaming<StartRemoteRequest>,
) -> Result<(RemoteHello, impl Stream<Item = ExecInput> + Send), Status> {
    let first = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
    let first = first.map_err(|_| Status::invalid_argument("nothing came in time"))??;
    match first.and_then(|request| request.message) {
        Some(Message::Hello(hello)) => Ok((hello, inputs(incoming))),
        _ => Err(Status::invalid_argument(
            "the first message must be a hello",
        )),
    }
}

/// The node of an attempt that is meant, by its address or its id.
fn host<'a>(assignment: &'a Assignment, meant: &str) -> Result<&'a Host, Status> {
    let hosts = &assignment.hosts;
    let is_it = |host: &&Host| host.address == meant || last_id(&host.node) == meant;
    hosts.iter().find(is_it).ok_or_else(|| {
        let known = hosts.iter().map(|host| host.address.as_str());
        let known: Vec<_> = known.collect();
        let known = known.join(", ");
        Status::not_found(format!("{meant} is no node of this job, which has {known}"))
    })
}
