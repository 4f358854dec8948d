//! Messages to and from JSON, by the descriptors that reflection serves too: there is one mapping, the standard one.

use batchai_proto::reflect::{descriptor, dynamic};
use prost::Message;
use prost_reflect::DynamicMessage;
use serde_json::Value;

/// A message as JSON.
pub fn to_json<M: Message>(name: &str, message: &M) -> Value {
    serde_json::to_value(dynamic(name, message)).expect("every message of the API has a JSON form")
}

/// A message from JSON.
///
/// # Errors
/// Says what does not fit, in the words of the JSON mapping.
pub fn from_json<M: Message + Default>(name: &str, value: Value) -> Result<M, String> {
    let dynamic =
        DynamicMessage::deserialize(descriptor(name), value).map_err(|e| e.to_string())?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|e| e.to_string())
}
