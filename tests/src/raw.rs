//! Calls of any method, by its descriptor, with bytes or JSON.

use std::time::Duration;

use batchai_common::tls::Route;
use batchai_proto::reflect::pool;
use bytes::{Buf as _, BufMut as _, Bytes};
use prost::Message as _;
use prost_reflect::{DynamicMessage, MethodDescriptor};
use serde_json::Value;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

/// Sends bytes as they are.
#[derive(Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

/// Every method of a package.
pub fn methods(package: &str) -> Vec<MethodDescriptor> {
    let services = pool().services().filter(|s| s.package_name() == package);
    services
        .flat_map(|service| service.methods().collect::<Vec<_>>())
        .collect()
}

/// Makes a call; returns its answer, or the first of them. Where the other end sends nothing, it is nothing.
pub async fn first(
    channel: Route,
    method: &MethodDescriptor,
    mut request: Request<Bytes>,
) -> Result<Bytes, Status> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let path = path.parse().expect("it is a path");
    let mut grpc = Grpc::new(channel);
    let ready = grpc.ready().await;
    ready.map_err(|error| Status::unavailable(error.to_string()))?;
    request.set_timeout(Duration::from_secs(10));
    let request = request.map(tokio_stream::once);
    let mut answers = grpc.streaming(request, path, Raw).await?.into_inner();
    Ok(answers.message().await?.unwrap_or_default())
}

/// The same in JSON.
pub async fn json(channel: Route, method: &str, request: Value) -> Result<Value, Status> {
    json_with(channel, method, request, |_| ()).await
}

/// The same with something said beside the request.
pub async fn json_with(
    channel: Route,
    method: &str,
    request: Value,
    change: impl FnOnce(&mut Request<Bytes>),
) -> Result<Value, Status> {
    let (service, name) = method.split_once('/').expect("service and method");
    let service = pool().get_service_by_name(service).expect("a service");
    let method = service.methods().find(|method| method.name() == name);
    let method = method.expect("a method");
    let request = DynamicMessage::deserialize(method.input(), request).expect("a request");
    let mut request = Request::new(Bytes::from(request.encode_to_vec()));
    change(&mut request);
    let answer = first(channel, &method, request).await?;
    let answer = DynamicMessage::decode(method.output(), answer).expect("an answer");
    Ok(serde_json::to_value(&answer).expect("messages have JSON"))
}
