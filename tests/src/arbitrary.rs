//! Arbitrary messages of the API, made from their descriptors: whatever a client could send.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};

/// How deep messages are filled.
const DEPTH_MAX: u32 = 5;

/// A message that shows itself as JSON where a test fails.
#[derive(Clone)]
pub struct Arbitrary(pub DynamicMessage);

impl std::fmt::Debug for Arbitrary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match serde_json::to_string(&self.0) {
            Ok(json) => f.write_str(&json),
            Err(error) => write!(f, "a message without a JSON form: {error}"),
        }
    }
}

/// Any message of a descriptor; `skip` says which fields stay unset.
pub fn message(
    of: MessageDescriptor,
    skip: fn(&FieldDescriptor) -> bool,
) -> impl Strategy<Value = Arbitrary> {
    at_depth(of, skip, 0).prop_map(Arbitrary)
}

fn at_depth(
    of: MessageDescriptor,
    skip: fn(&FieldDescriptor) -> bool,
    depth: u32,
) -> BoxedStrategy<DynamicMessage> {
    // Times and durations have a JSON form within bounds only.
    match of.full_name() {
        "google.protobuf.Timestamp" => return seconds(of, 0..253_402_300_799),
        "google.protobuf.Duration" => return seconds(of, -315_576_000_000..315_576_000_000),
        _ => {}
    }
    let fields: Vec<_> = of.fields().filter(|field| !skip(field)).collect();
    let values: Vec<_> = fields
        .iter()
        .map(|field| prop::option::weighted(0.3, value(field, skip, depth)))
        .collect();
    values
        .prop_map(move |values| {
            let mut message = DynamicMessage::new(of.clone());
            for (field, value) in fields.iter().zip(values) {
                if let Some(value) = value {
                    message.set_field(field, value);
                }
            }
            message
        })
        .boxed()
}

fn seconds(of: MessageDescriptor, range: std::ops::Range<i64>) -> BoxedStrategy<DynamicMessage> {
    range
        .prop_map(move |seconds| {
            let mut message = DynamicMessage::new(of.clone());
            message.set_field_by_name("seconds", Value::I64(seconds));
            message
        })
        .boxed()
}

fn value(
    field: &FieldDescriptor,
    skip: fn(&FieldDescriptor) -> bool,
    depth: u32,
) -> BoxedStrategy<Value> {
    if field.is_map() {
        let entry = (
            text().prop_map(MapKey::String),
            text().prop_map(Value::String),
        );
        return btree_map(entry.0, entry.1, 0..3)
            .prop_map(|map| Value::Map(map.into_iter().collect()))
            .boxed();
    }
    let one = one(field, skip, depth);
    match field.is_list() {
        true => vec(one, 0..3).prop_map(Value::List).boxed(),
        false => one,
    }
}

fn one(
    field: &FieldDescriptor,
    skip: fn(&FieldDescriptor) -> bool,
    depth: u32,
) -> BoxedStrategy<Value> {
    match field.kind() {
        Kind::String => text().prop_map(Value::String).boxed(),
        Kind::Bytes => vec(any::<u8>(), 0..20)
            .prop_map(|bytes| Value::Bytes(bytes.into()))
            .boxed(),
        Kind::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        Kind::Int32 => prop_oneof![any::<i32>(), -2..5_i32]
            .prop_map(Value::I32)
            .boxed(),
        Kind::Int64 => prop_oneof![any::<i64>(), -2..5_i64]
            .prop_map(Value::I64)
            .boxed(),
        Kind::Uint64 => prop_oneof![any::<u64>(), 0..5_u64]
            .prop_map(Value::U64)
            .boxed(),
        // As people write them: of more digits JSON's reader may miss the last bit.
        Kind::Double => prop_oneof![any::<i32>(), -2..50_i32]
            .prop_map(|eighths| Value::F64(f64::from(eighths) / 8.0))
            .boxed(),
        Kind::Enum(values) => {
            let numbers: Vec<_> = values.values().map(|value| value.number()).collect();
            prop::sample::select(numbers)
                .prop_map(Value::EnumNumber)
                .boxed()
        }
        Kind::Message(of) if depth < DEPTH_MAX => at_depth(of, skip, depth + 1)
            .prop_map(Value::Message)
            .boxed(),
        Kind::Message(of) => Just(Value::Message(DynamicMessage::new(of))).boxed(),
        other => unreachable!("the API has no {other:?}"),
    }
}

/// Texts of every sort, among them what the API gives a meaning.
fn text() -> BoxedStrategy<String> {
    prop_oneof![
        ".{0,12}",
        "[a-zA-Z0-9_-]{1,12}",
        Just(String::new()),
        Just("../../etc/passwd".to_owned()),
        Just("$AZ_BATCHAI_MOUNT_ROOT/x".to_owned()),
        Just("resourceGroups/g/workspaces/w/clusters/c".to_owned()),
        Just("a\0b".to_owned()),
        Just("'unclosed".to_owned()),
    ]
    .boxed()
}
