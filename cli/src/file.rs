//! Reads the original's files: `{"$schema": ..., "properties": {...}}` with the create parameters in camelCase.
//!
//! They are our own JSON form but for a few spellings: references are `{"id": ...}`, values of enums are in lower case,
//! durations are ISO 8601. Every key that fits nowhere is named, all of them at once.

use std::collections::BTreeSet;
use std::path::Path;

use batchai_common::names::Kind;
use prost::Message;
use prost_reflect::{EnumDescriptor, FieldDescriptor, Kind as FieldKind, MessageDescriptor};
use serde_json::{Map, Value};

use crate::context::name_of;
use crate::descriptors;
use crate::error::CliError;

/// Names less like another than this are not offered in its place.
const LIKENESS_MIN: f64 = 0.75;
/// Variables whose names in angle brackets stand for their values.
const PLACEHOLDERS: [&str; 2] = ["AZURE_BATCHAI_STORAGE_ACCOUNT", "AZURE_BATCHAI_STORAGE_KEY"];

/// Reads the properties of a file as a message of the API.
pub fn read<M: Message + Default>(path: &Path, message: &str) -> Result<M, CliError> {
    let text = std::fs::read_to_string(path).map_err(|source| CliError::File {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, message).map_err(|faults| CliError::Content {
        path: path.to_owned(),
        faults: faults.join("; "),
    })
}

pub(crate) fn parse<M: Message + Default>(text: &str, message: &str) -> Result<M, Vec<String>> {
    let mut value: Value =
        serde_json::from_str(text).map_err(|e| vec![format!("not JSON: {e}")])?;
    let mut missing = BTreeSet::new();
    fill_in(&mut value, &|name| std::env::var(name).ok(), &mut missing);
    if !missing.is_empty() {
        let fault = |name: &str| format!("<{name}> is to be filled in: set {name}");
        return Err(missing.into_iter().map(fault).collect());
    }
    let Value::Object(mut top) = value else {
        return Err(vec!["a JSON object is expected".to_owned()]);
    };
    top.remove("$schema");
    let Some(mut properties) = top.remove("properties") else {
        return Err(vec![
            "the key \"properties\" is missing; settings stand below it".to_owned(),
        ]);
    };
    let mut faults: Vec<_> = top
        .keys()
        .map(|key| format!("unknown key {key:?} beside \"properties\""))
        .collect();
    normalise(
        &mut properties,
        &batchai_proto::reflect::descriptor(message),
        "properties",
        &mut faults,
    );
    if !faults.is_empty() {
        return Err(faults);
    }
    descriptors::from_json(message, properties).map_err(|fault| vec![fault])
}

/// Puts the values of variables in the places of their names, as the original's command did.
fn fill_in(
    value: &mut Value,
    variable: &impl Fn(&str) -> Option<String>,
    missing: &mut BTreeSet<&str>,
) {
    match value {
        Value::Object(map) => map
            .values_mut()
            .for_each(|value| fill_in(value, variable, missing)),
        Value::Array(values) => values
            .iter_mut()
            .for_each(|value| fill_in(value, variable, missing)),
        Value::String(text) => {
            for name in PLACEHOLDERS {
                let place = format!("<{name}>");
                if !text.contains(&place) {
                    continue;
                }
                match variable(name) {
                    Some(value) => *text = text.replace(&place, &value),
                    None => drop(missing.insert(name)),
                }
            }
        }
        _ => {}
    }
}

/// Turns the original's spellings into ours, and notes what fits nowhere.
fn normalise(value: &mut Value, of: &MessageDescriptor, path: &str, faults: &mut Vec<String>) {
    let Value::Object(map) = value else {
        return faults.push(format!("{path}: an object is expected"));
    };
    let keys: Vec<String> = map.keys().cloned().collect();
    for key in keys {
        let path = format!("{path}.{key}");
        let Some(field) = of.get_field_by_json_name(&key) else {
            faults.push(unknown(&key, &path, of));
            continue;
        };
        if let Some(value) = map.get_mut(&key) {
            normalise_field(value, &field, &path, faults);
        }
    }
}

fn normalise_field(
    value: &mut Value,
    field: &FieldDescriptor,
    path: &str,
    faults: &mut Vec<String>,
) {
    if field.is_map() {
        return check_map(value, path, faults);
    }
    if let (true, Value::Array(elements)) = (field.is_list(), &mut *value) {
        for (i, element) in elements.iter_mut().enumerate() {
            normalise_element(element, &field.kind(), &format!("{path}[{i}]"), faults);
        }
        return;
    }
    normalise_element(value, &field.kind(), path, faults);
}

/// The maps of the API are of texts.
fn check_map(value: &Value, path: &str, faults: &mut Vec<String>) {
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map.iter().filter(|(_, value)| !value.is_string()) {
                faults.push(format!("{path}.{key}: text is expected, not {value}"));
            }
        }
        _ => faults.push(format!("{path}: an object is expected")),
    }
}

fn normalise_element(value: &mut Value, kind: &FieldKind, path: &str, faults: &mut Vec<String>) {
    match (kind, &*value) {
        (_, Value::Null) => {}
        (FieldKind::Message(message), Value::String(text))
            if message.full_name() == "google.protobuf.Duration" =>
        {
            match seconds(text) {
                Some(seconds) => *value = Value::String(format!("{seconds}s")),
                None => faults.push(format!(
                    "{path}: {text:?} is not a duration: use ISO 8601 such as PT30M or P7D"
                )),
            }
        }
        (FieldKind::Message(message), _) => normalise(value, message, path, faults),
        (FieldKind::Enum(values), Value::String(text)) => match enum_value(values, text) {
            Some(name) => *value = Value::String(name),
            None => {
                let names: Vec<_> = values
                    .values()
                    .skip(1)
                    .map(|v| spelling(v.name()))
                    .collect();
                let names = names.join(", ");
                faults.push(format!("{path}: {text:?} is none of {names}"));
            }
        },
        (FieldKind::String, Value::Object(reference)) => match reference_of(reference) {
            Some(name) => *value = Value::String(name),
            None => faults.push(format!("{path}: text or {{\"id\": ...}} is expected")),
        },
        (kind, value) => {
            if let Some(expected) = misfit(kind, value) {
                faults.push(format!("{path}: {expected} is expected, not {value}"));
            }
        }
    }
}

/// What is expected, where a value is something else.
fn misfit(kind: &FieldKind, value: &Value) -> Option<&'static str> {
    match kind {
        FieldKind::Int32 | FieldKind::Int64 => {
            let text = value
                .as_str()
                .is_some_and(|text| text.parse::<i64>().is_ok());
            (!text && value.as_i64().is_none()).then_some("a whole number")
        }
        FieldKind::Bool => (!value.is_boolean()).then_some("true or false"),
        FieldKind::String => (!value.is_string()).then_some("text"),
        FieldKind::Enum(_) => Some("the name of a value"),
        _ => None,
    }
}

fn unknown(key: &str, path: &str, of: &MessageDescriptor) -> String {
    let names: Vec<_> = of
        .fields()
        .map(|field| field.json_name().to_owned())
        .collect();
    let likeness = |name: &&String| (strsim::jaro_winkler(name, key) * 1000.0) as i64;
    match names.iter().max_by_key(likeness) {
        Some(name) if strsim::jaro_winkler(name, key) >= LIKENESS_MIN => {
            format!("unknown key {key:?} at {path}; did you mean {name:?}?")
        }
        _ => format!("unknown key {key:?} at {path}"),
    }
}

fn spelling(name: &str) -> String {
    name.replace('_', "").to_ascii_lowercase()
}

fn enum_value(values: &EnumDescriptor, text: &str) -> Option<String> {
    let found = values
        .values()
        .find(|value| spelling(value.name()) == spelling(text))?;
    Some(found.name().to_owned())
}

/// `{"id": NAME}`, where the name may be one of Azure's, with its subscription and provider.
fn reference_of(reference: &Map<String, Value>) -> Option<String> {
    let id = reference
        .get("id")
        .filter(|_| reference.len() == 1)?
        .as_str()?;
    let known = [Kind::Cluster, Kind::FileServer];
    let name = known.iter().find_map(|kind| name_of(id, *kind));
    Some(name.unwrap_or_else(|| id.to_owned()))
}

/// ISO 8601 (`PT30M`, `P7D`), our own form (`90s`), `1h` and `7d`, or the `d.hh:mm:ss` that Azure's tools write.
pub fn seconds(text: &str) -> Option<i64> {
    if let Some(number) = text
        .strip_suffix('s')
        .filter(|number| !number.starts_with('P'))
    {
        return number.parse().ok();
    }
    if let Some((head, [minutes, seconds])) = clock(text) {
        let (days, hours) = match head.split_once('.') {
            Some((days, hours)) => (days.parse::<i64>().ok()?, hours.parse::<i64>().ok()?),
            None => (0, head.parse().ok()?),
        };
        let hours = days.checked_mul(24)?.checked_add(hours)?;
        let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
        return minutes.checked_mul(60)?.checked_add(seconds);
    }
    let span: jiff::Span = text.parse().ok()?;
    let options = jiff::SpanRelativeTo::days_are_24_hours();
    let seconds = span.total((jiff::Unit::Second, options)).ok()?;
    Some(seconds as i64)
}

fn clock(text: &str) -> Option<(&str, [i64; 2])> {
    let (rest, seconds) = text.rsplit_once(':')?;
    let (head, minutes) = rest.rsplit_once(':')?;
    Some((head, [minutes.parse().ok()?, seconds.parse().ok()?]))
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1::Job;
    use batchai_proto::v1::job::SchedulingPriority;

    use super::*;

    #[test]
    fn the_originals_form_is_read() {
        let text = r#"{
            "$schema": "https://example.invalid/job.json",
            "properties": {
                "cluster": {"id": "/subscriptions/0/resourceGroups/g/providers/Microsoft.BatchAI/workspaces/w/clusters/c"},
                "nodeCount": 2,
                "schedulingPriority": "high",
                "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/logs",
                "constraints": {"maxWallClockTime": "P1DT1H"},
                "pyTorchSettings": {"pythonScriptFilePath": "a.py", "communicationBackend": "gloo"},
                "environmentVariables": [{"name": "A", "value": "b"}]
            }
        }"#;
        let job: Job = parse(text, "Job").unwrap();
        assert_eq!(job.cluster, "resourceGroups/g/workspaces/w/clusters/c");
        assert_eq!(job.scheduling_priority(), SchedulingPriority::High);
        assert_eq!(
            job.constraints
                .unwrap()
                .max_wall_clock_time
                .unwrap()
                .seconds,
            25 * 3600
        );
        assert_eq!(
            job.py_torch_settings.unwrap().python_script_file_path,
            "a.py"
        );
        assert_eq!(job.environment_variables[0].value, "b");
    }

    #[test]
    fn every_key_that_fits_nowhere_is_named() {
        let text = r#"{"propertys": 1, "properties": {
            "nodeCont": 2,
            "pyTorchSettings": {"pythonScriptFilepath": "a"},
            "secrets": [{"name": "S", "valueReference": {}}],
            "schedulingPriority": "urgent",
            "constraints": {"maxWallClockTime": "soon"},
            "nodeCount": "many",
            "labels": {"team": 7},
            "cluster": 7
        }}"#;
        let faults = parse::<Job>(text, "Job").unwrap_err().join("\n");
        for expected in [
            "\"propertys\"",
            "\"nodeCont\" at properties.nodeCont; did you mean \"nodeCount\"?",
            "did you mean \"pythonScriptFilePath\"?",
            "\"valueReference\" at properties.secrets[0].valueReference",
            "\"urgent\" is none of low, normal, high",
            "\"soon\" is not a duration",
            "properties.nodeCount: a whole number is expected, not \"many\"",
            "properties.labels.team: text is expected, not 7",
            "properties.cluster: text is expected, not 7",
        ] {
            assert!(faults.contains(expected), "{expected} in:\n{faults}");
        }
        assert!(parse::<Job>("{}", "Job").unwrap_err()[0].contains("properties"));
        assert!(parse::<Job>("[", "Job").unwrap_err()[0].contains("not JSON"));
    }

    #[test]
    fn placeholders_are_filled_in_or_named() {
        let mut value = serde_json::json!({"a": ["x<AZURE_BATCHAI_STORAGE_ACCOUNT>y"], "b": "<z>"});
        let mut missing = BTreeSet::new();
        fill_in(&mut value, &|_| Some("acct".into()), &mut missing);
        assert_eq!(value, serde_json::json!({"a": ["xaccty"], "b": "<z>"}));
        assert!(missing.is_empty());
        let mut value = serde_json::json!({"k": "<AZURE_BATCHAI_STORAGE_KEY>"});
        fill_in(&mut value, &|_| None, &mut missing);
        assert_eq!(missing, BTreeSet::from(["AZURE_BATCHAI_STORAGE_KEY"]));
    }

    #[test]
    fn durations_of_all_spellings() {
        for (text, expected) in [
            ("P7D", Some(604_800)),
            ("PT1H30M", Some(5400)),
            ("90s", Some(90)),
            ("01:00:00", Some(3600)),
            ("7.00:00:00", Some(604_800)),
            ("1h", Some(3600)),
            ("7d", Some(604_800)),
            ("week", None),
            ("99999999999999999.00:00:00", None),
            ("", None),
        ] {
            assert_eq!(seconds(text), expected, "{text}");
        }
    }
}
