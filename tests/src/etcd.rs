//! Three members of etcd on loopback, for comparison: as Debian ships it, in plain text.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::process::free_port;

/// `etcdserverpb.PutRequest`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// `etcdserverpb.PutResponse`: nothing of it is looked at.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PutResponse {}

/// `etcdserverpb.StatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatusRequest {}

/// `etcdserverpb.StatusResponse`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatusResponse {
    #[prost(uint64, tag = "4")]
    pub leader: u64,
    #[prost(message, tag = "1")]
    pub header: Option<Header>,
}

/// `etcdserverpb.ResponseHeader`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Header {
    #[prost(uint64, tag = "2")]
    pub member: u64,
}

/// The members. Dropping them kills them.
pub struct Etcd {
    args: Vec<Vec<String>>,
    pub members: Vec<Option<Child>>,
    pub endpoints: Vec<String>,
}

impl Etcd {
    /// Starts three in a directory.
    pub fn start(dir: &Path, more: &[&str]) -> Etcd {
        let (clients, peers) = ([0; 3].map(|_| free_port()), [0; 3].map(|_| free_port()));
        let cluster: Vec<_> = (0..3)
            .map(|i| format!("m{i}=http://127.0.0.1:{}", peers[i]))
            .collect();
        let args = (0..3).map(|i| {
            let client = format!("http://127.0.0.1:{}", clients[i]);
            let peer = format!("http://127.0.0.1:{}", peers[i]);
            let data = dir.join(format!("m{i}")).display().to_string();
            let mut args: Vec<String> = [
                ("--name", format!("m{i}")),
                ("--data-dir", data),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client),
                ("--listen-peer-urls", peer.clone()),
                ("--initial-advertise-peer-urls", peer),
                ("--initial-cluster", cluster.join(",")),
            ]
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value])
            .collect();
            args.extend(more.iter().map(|arg| (*arg).to_owned()));
            args
        });
        let mut etcd = Etcd {
            args: args.collect(),
            members: vec![None, None, None],
            endpoints: clients
                .map(|port| format!("http://127.0.0.1:{port}"))
                .to_vec(),
        };
        for i in 0..3 {
            etcd.begin(i);
        }
        etcd
    }

    pub fn begin(&mut self, i: usize) {
        let child = Command::new("etcd")
            .args(&self.args[i])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.members[i] = Some(child.expect("etcd is there"));
    }

    pub fn kill(&mut self, i: usize) {
        if let Some(mut child) = self.members[i].take() {
            child.kill().expect("it is our child");
            child.wait().expect("it is our child");
        }
    }

    /// A connection that is made when it is needed.
    pub fn channel(&self, i: usize) -> Channel {
        let endpoint = Endpoint::from_shared(self.endpoints[i].clone());
        endpoint.expect("an address").connect_lazy()
    }

    /// Which member leads, as one of them says.
    pub async fn leader(&self) -> Option<usize> {
        let mut leads = None;
        for i in 0..3 {
            let path = "/etcdserverpb.Maintenance/Status";
            let status: Result<StatusResponse, _> =
                call(&mut self.channel(i), path, StatusRequest {}).await;
            if let Ok(status) = status
                && status.leader != 0
                && status
                    .header
                    .is_some_and(|header| header.member == status.leader)
            {
                leads = Some(i);
            }
        }
        leads
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for i in 0..self.members.len() {
            self.kill(i);
        }
    }
}

/// One unary call.
pub async fn call<M, R>(channel: &mut Channel, path: &'static str, message: M) -> Result<R, Status>
where
    M: prost::Message + Send + Sync + 'static,
    R: prost::Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel.clone());
    let ready = client.ready().await;
    ready.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<M, R>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    let mut request = tonic::Request::new(message);
    // Short: a member that does not lead waits for one, and nobody learns where it is.
    request.set_timeout(std::time::Duration::from_millis(300));
    Ok(client.unary(request, path, codec).await?.into_inner())
}

/// A put.
pub async fn put(
    channel: &mut Channel,
    key: String,
    value: Vec<u8>,
) -> Result<PutResponse, Status> {
    let request = PutRequest {
        key: key.into_bytes(),
        value,
    };
    call(channel, "/etcdserverpb.KV/Put", request).await
}
