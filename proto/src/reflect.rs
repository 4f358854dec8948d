//! Messages by their descriptors, the same ones that reflection serves: for what treats all of them alike.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, MessageDescriptor, Value};

/// The numbers of two values of `google.api.FieldBehavior`.
const OUTPUT_ONLY: i32 = 3;
const INPUT_ONLY: i32 = 4;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(crate::DESCRIPTORS).expect("the descriptors are our own")
});

/// All descriptors.
pub fn pool() -> &'static DescriptorPool {
    &POOL
}

/// The descriptor of a message of the public API, such as `Job`.
pub fn descriptor(message: &str) -> MessageDescriptor {
    let name = format!("batchai.v1.{message}");
    POOL.get_message_by_name(&name)
        .expect("the message is one of the public API")
}

/// A message of the public API as one whose fields can be walked.
pub fn dynamic<M: Message>(name: &str, message: &M) -> DynamicMessage {
    DynamicMessage::decode(descriptor(name), message.encode_to_vec().as_slice())
        .expect("a message decodes by its own descriptor")
}

/// The full names of all fields that only the service sets.
static OUTPUT_ONLY_FIELDS: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    let fields = POOL
        .all_messages()
        .flat_map(|message| message.fields().collect::<Vec<_>>());
    let fields = fields.filter(|field| says(field, OUTPUT_ONLY));
    fields.map(|field| field.full_name().to_owned()).collect()
});

/// Whether only the service sets a field.
pub fn is_output_only(field: &FieldDescriptor) -> bool {
    OUTPUT_ONLY_FIELDS.contains(field.full_name())
}

/// Whether a field is one that replies never have.
pub fn is_input_only(field: &FieldDescriptor) -> bool {
    says(field, INPUT_ONLY)
}

fn says(field: &FieldDescriptor, what: i32) -> bool {
    let behavior = POOL.get_extension_by_name("google.api.field_behavior");
    let behavior = behavior.expect("it is among the descriptors");
    match field.options().get_extension(&behavior).as_ref() {
        Value::List(values) => values.contains(&Value::EnumNumber(what)),
        _ => false,
    }
}
