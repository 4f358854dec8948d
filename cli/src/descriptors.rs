//! Messages to and from JSON, by the descriptors that reflection serves too: there is one mapping, the standard one.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde_json::Value;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(batchai_proto::DESCRIPTORS).expect("the descriptors are our own")
});

/// The descriptor of a message of the public API.
pub fn of(message: &str) -> MessageDescriptor {
    let name = format!("batchai.v1.{message}");
    POOL.get_message_by_name(&name)
        .expect("the message is one of the public API")
}

/// A message as JSON.
pub fn to_json<M: Message>(name: &str, message: &M) -> Value {
    let dynamic = DynamicMessage::decode(of(name), message.encode_to_vec().as_slice())
        .expect("a message decodes by its own descriptor");
    serde_json::to_value(dynamic).expect("every message of the API has a JSON form")
}

/// A message from JSON.
///
/// # Errors
/// Says what does not fit, in the words of the JSON mapping.
pub fn from_json<M: Message + Default>(name: &str, value: Value) -> Result<M, String> {
    let dynamic = DynamicMessage::deserialize(of(name), value).map_err(|e| e.to_string())?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|e| e.to_string())
}
