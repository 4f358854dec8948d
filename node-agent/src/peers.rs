//! Starts what processes of a job want on its other nodes: from agent to agent, so that no node needs a server for that and no coordinator
//! has to be there.
//!
//! A process of an attempt comes to its own node's agent, through a socket of this machine and with the attempt's token (`shell`, what
//! jobs find as `ssh`). That agent goes to the other node's, and passes on what each end says without looking into it. Between agents
//! both show the certificates that the ensemble's authority signed, and whoever is asked has to have the attempt itself, and the other among its
//! nodes: so no attempt reaches the nodes of another. What is started is a command beside the attempt (`execs`): it is in its group, has its
//! environment there, and ends with it, with who wants it, and with either agent.

mod server;
pub mod shell;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt as _;
use std::pin::Pin;
use std::sync::Arc;

use batchai_common::error::causes;
use batchai_common::limits::EXEC_CHUNK_BYTES_MAX;
use batchai_common::names::last_id;
use batchai_common::tls::{Credentials, Identity, acceptor, connector};
use batchai_proto::agent::v1::assignment::Desired;
use batchai_proto::agent::v1::peer_service_client::PeerServiceClient;
use batchai_proto::agent::v1::peer_service_server::PeerServiceServer;
use batchai_proto::agent::v1::start_remote_request::Message;
use batchai_proto::agent::v1::{
    Assignment, AssignmentList, Host, RemoteHello, ServeExecRequest, StartRemoteRequest,
};
use batchai_proto::v1::ExecInput;
use rustls::ServerConfig;
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Server;
use tonic::{Status, Streaming};

use crate::execs::Parts;
use server::{FromHere, FromPeers};

/// The variable that has the token of an attempt on this node.
pub const TOKEN: &str = "BATCHAI_REMOTE_TOKEN";
/// Commands of other nodes at once, and of this node's processes on others.
const STARTS_MAX: usize = 1024;
/// The largest message: an environment of secrets, or a command line.
const MESSAGE_BYTES_MAX: usize = (4 << 20) + EXEC_CHUNK_BYTES_MAX;
/// Connections of this machine that are not served yet.
const WAITING_MAX: usize = 64;

type Answers = Pin<Box<dyn Stream<Item = Result<ServeExecRequest, Status>> + Send>>;

/// From it the tokens of a node's attempts are made: they are known again after a restart, and nobody keeps them.
#[derive(Clone)]
pub struct Key(Arc<str>);

impl Key {
    pub fn new(text: &str) -> Key {
        Key(text.into())
    }

    /// What the processes of an attempt on this node have, and nobody else.
    pub fn token(&self, attempt: &str) -> String {
        // Twice, so that none can be made longer.
        let inner = Sha256::digest(format!("{}/{attempt}", self.0));
        let outer = Sha256::new().chain_update(self.0.as_bytes());
        let digest = outer.chain_update(inner).finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The name of an agent's socket. It has no place in the file system: it is as near in a container, and its name is never too long.
fn socket(uid: &str) -> io::Result<std::os::unix::net::SocketAddr> {
    std::os::unix::net::SocketAddr::from_abstract_name(format!("batchai-{uid}"))
}

/// Where other agents are listened to.
pub fn listen(port: u16, last: u16) -> io::Result<std::net::TcpListener> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    // The last one, so that others who know it still reach it after a restart; where that is taken, another.
    let ports = match port {
        0 => vec![last, 0],
        port => vec![port],
    };
    let mut failed = None;
    for port in ports {
        for address in any {
            match std::net::TcpListener::bind(SocketAddr::new(address, port)) {
                Ok(listener) => return Ok(listener),
                Err(error) => failed = Some(error),
            }
        }
    }
    Err(failed.unwrap_or_else(|| io::Error::other("there is no address to listen at")))
}

/// What serves.
pub struct Peers {
    pub parts: Parts,
    pub key: Key,
    /// `nodes/{node}`.
    pub node: String,
    pub assignments: watch::Receiver<Option<AssignmentList>>,
    pub credentials: watch::Receiver<Arc<Credentials>>,
    pub tls: watch::Receiver<Arc<ServerConfig>>,
    pub listener: std::net::TcpListener,
}

/// What both ways have.
struct Shared {
    parts: Parts,
    key: Key,
    node: String,
    assignments: watch::Receiver<Option<AssignmentList>>,
    credentials: watch::Receiver<Arc<Credentials>>,
    room: Arc<Semaphore>,
}

impl Peers {
    /// Runs for ever.
    pub async fn run(self) {
        let uid = self.parts.facts.node_uid.clone();
        let (listener, tls) = (self.listener, self.tls);
        let shared = Arc::new(Shared {
            parts: self.parts,
            key: self.key,
            node: self.node,
            assignments: self.assignments,
            credentials: self.credentials,
            room: Arc::new(Semaphore::new(STARTS_MAX)),
        });
        let ended = tokio::try_join!(
            serve_here(&uid, shared.clone()),
            serve_peers(listener, tls, shared)
        );
        if let Err(error) = ended {
            tracing::error!(error, "jobs cannot start anything on other nodes");
        }
        // Everything else goes on without it.
        std::future::pending::<()>().await;
    }
}

async fn serve_here(uid: &str, shared: Arc<Shared>) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let address = socket(uid).map_err(text)?;
    let listener = std::os::unix::net::UnixListener::bind_addr(&address).map_err(text)?;
    listener.set_nonblocking(true).map_err(text)?;
    let listener = UnixListener::from_std(listener).map_err(text)?;
    let (accepted, connections) = mpsc::channel::<io::Result<UnixStream>>(WAITING_MAX);
    tokio::spawn(async move {
        loop {
            let next = listener.accept().await.map(|(stream, _)| stream);
            if let Err(error) = &next {
                tracing::warn!(%error, "a process of a job cannot be heard");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
            if accepted.send(next).await.is_err() {
                return;
            }
        }
    });
    let service = PeerServiceServer::new(FromHere(shared));
    let service = service.max_decoding_message_size(MESSAGE_BYTES_MAX);
    let served = Server::builder().add_service(service);
    let served = served.serve_with_incoming(ReceiverStream::new(connections));
    served.await.map_err(|error| causes(&error))
}

async fn serve_peers(
    listener: std::net::TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    shared: Arc<Shared>,
) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    listener.set_nonblocking(true).map_err(text)?;
    let listener = TcpListener::from_std(listener).map_err(text)?;
    let service = PeerServiceServer::new(FromPeers(shared));
    let service = service.max_decoding_message_size(MESSAGE_BYTES_MAX);
    let served = Server::builder()
        .http2_keepalive_interval(Some(batchai_common::limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(batchai_common::limits::KEEPALIVE_TIMEOUT))
        .add_service(service);
    let served = served.serve_with_incoming(acceptor::incoming(listener, Some(tls)));
    served.await.map_err(|error| causes(&error))
}

impl Shared {
    /// The work of an attempt here, while it is to run.
    fn assignment(&self, attempt: &str) -> Option<Assignment> {
        let list = self.assignments.borrow();
        let mut all = list.iter().flat_map(|list| &list.assignments);
        let found = all.find(|assignment| assignment.attempt == attempt && !assignment.set_up);
        found.cloned()
    }

    /// The same, for who has heard of its launch before this node has.
    async fn launched(&self, attempt: &str) -> Option<Assignment> {
        let mut changes = self.assignments.clone();
        loop {
            changes.borrow_and_update();
            let assignment = self.assignment(attempt)?;
            match assignment.desired() {
                Desired::Launch => return Some(assignment),
                Desired::Prepare => changes.changed().await.ok()?,
                _ => return None,
            }
        }
    }

    /// Goes to the agent of another node, and passes on what both say.
    async fn pass_on(
        &self,
        host: &Host,
        hello: RemoteHello,
        inputs: impl Stream<Item = ExecInput> + Send + 'static,
    ) -> Result<Answers, Status> {
        let name = &host.node;
        let unreachable = |why: String| Status::unavailable(format!("{name}: {why}"));
        let port = u16::try_from(host.agent_port).unwrap_or_default();
        if port == 0 {
            let why = "its agent does not listen to others: upgrade it, or give it TLS";
            return Err(unreachable(why.to_owned()));
        }
        let address: IpAddr = host
            .address
            .parse()
            .map_err(|_| unreachable(format!("{} is no address", host.address)))?;
        let who = Identity::node(last_id(name), &host.uid);
        let who = who.map_err(|error| unreachable(error.to_string()))?;
        let credentials = self.credentials.borrow().clone();
        let config = credentials.client_of(who);
        let config = config.map_err(|error| unreachable(error.to_string()))?;
        let channel = connector::connect_to(SocketAddr::new(address, port), config).await;
        let channel = channel.map_err(|error| unreachable(causes(&error)))?;
        let request = |message| StartRemoteRequest {
            message: Some(message),
        };
        let first = tokio_stream::once(request(Message::Hello(hello)));
        let rest = inputs.map(move |input| request(Message::Input(input)));
        let mut client = PeerServiceClient::new(channel.clone());
        let answer = client.start_remote(first.chain(rest)).await?;
        // The connection is kept as long as it is used.
        let name = name.clone();
        let answers = answer.into_inner().map(move |answer| {
            let _connection = &channel;
            answer.map_err(|status| {
                let why = status.message();
                Status::unavailable(format!("{name}: the way to its agent broke off: {why}"))
            })
        });
        Ok(Box::pin(answers))
    }
}

/// What follows the first message.
fn inputs(incoming: Streaming<StartRemoteRequest>) -> impl Stream<Item = ExecInput> + Send {
    incoming.map_while(|request| match request.ok()?.message? {
        Message::Input(input) => Some(input),
        Message::Hello(_) => None,
    })
}

/// What a command has of this node's own: it may start others in turn.
fn of_this_node(key: &Key, attempt: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(TOKEN.to_owned(), key.token(attempt))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_one_attempt_on_one_node() {
        let (one, other) = (Key::new("a"), Key::new("b"));
        assert_eq!(one.token("1-7").len(), 64);
        assert_eq!(one.token("1-7"), Key::new("a").token("1-7"));
        assert_ne!(one.token("1-7"), one.token("1-8"));
        assert_ne!(one.token("1-7"), other.token("1-7"));
    }
}
