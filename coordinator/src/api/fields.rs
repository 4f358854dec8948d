//! PURE. What is the same for every message: fields that only the service sets, and the masks of updates.

use batchai_proto::reflect::{dynamic, is_output_only};
use batchai_proto::v1::Warning;
use prost::Message;
use prost_reflect::{DynamicMessage, MessageDescriptor, ReflectMessage as _, Value};
use prost_types::FieldMask;

use super::faults::Faults;

/// The mask that stands for everything that can be changed.
const ALL: &str = "*";
const PATHS_MAX: usize = 100;
/// A resource is kept in memory and in every copy of the log.
const RESOURCE_BYTES_MAX: usize = 256 << 10;

/// Notes every field that is set and that only the service sets.
pub fn check_output_only<M: Message>(faults: &mut Faults, prefix: &str, name: &str, message: &M) {
    if check_size(faults, prefix, message) {
        walk(faults, prefix, &dynamic(name, message));
    }
}

/// Whether a resource is small enough to look at it field by field, and to keep it.
fn check_size<M: Message>(faults: &mut Faults, prefix: &str, message: &M) -> bool {
    let fits = message.encoded_len() <= RESOURCE_BYTES_MAX;
    if !fits {
        faults.invalid(prefix, format!("is larger than {RESOURCE_BYTES_MAX} bytes"));
    }
    fits
}

fn walk(faults: &mut Faults, prefix: &str, message: &DynamicMessage) {
    for (field, value) in message.fields() {
        let path = format!("{prefix}.{}", field.name());
        if is_output_only(&field) {
            faults.invalid(path, "is output only; leave it out");
            continue;
        }
        match value {
            Value::Message(message) => walk(faults, &path, message),
            Value::List(values) => {
                for (i, value) in values.iter().enumerate() {
                    if let Value::Message(message) = value {
                        walk(faults, &format!("{path}[{i}]"), message);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Which of the paths that can be changed an update changes: those that its mask covers, or, where there is no mask, those
/// that are set. `name`, `etag` and what only the service sets may be set, as a reader got them.
pub fn masked<M: Message>(
    faults: &mut Faults,
    (prefix, name): (&str, &str),
    message: &M,
    mask: Option<FieldMask>,
    changeable: &[&'static str],
) -> Vec<&'static str> {
    if !check_size(faults, prefix, message) {
        return Vec::new();
    }
    let message = dynamic(name, message);
    let covers = |path: &str, changeable: &str| {
        path == ALL || path == changeable || changeable.starts_with(&format!("{path}."))
    };
    // In JSON a mask that names nothing and none at all look alike.
    let Some(mask) = mask.filter(|mask| !mask.paths.is_empty()) else {
        for (field, _) in message.fields() {
            let own = |path: &&&str| path.split('.').next() == Some(field.name());
            if !is_output_only(&field) && changeable.iter().find(own).is_none() {
                let why = "cannot be changed; leave it out, or name in update_mask what to change";
                faults.invalid(format!("{prefix}.{}", field.name()), why);
            }
        }
        let set = |path: &&&str| is_set(&message, path);
        return changeable.iter().filter(set).copied().collect();
    };
    for path in mask.paths.iter().take(PATHS_MAX) {
        let covered = changeable.iter().any(|changeable| covers(path, changeable));
        if !covered {
            let whole = changeable
                .iter()
                .find(|c| path.starts_with(&format!("{c}.")));
            let why = match (exists(&message.descriptor(), path), whole) {
                (true, Some(whole)) => format!("can be changed only with all of {whole}"),
                (true, None) => "cannot be changed".to_owned(),
                (false, _) => "is not a field".to_owned(),
            };
            let path: String = path.chars().take(PATHS_MAX).collect();
            faults.invalid("update_mask", format!("{path}: {why}"));
        }
    }
    if mask.paths.len() > PATHS_MAX {
        faults.invalid("update_mask", format!("has more than {PATHS_MAX} paths"));
    }
    let named = |changeable: &&&str| mask.paths.iter().any(|path| covers(path, changeable));
    changeable.iter().filter(named).copied().collect()
}

fn is_set(message: &DynamicMessage, path: &str) -> bool {
    let (first, rest) = match path.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (path, None),
    };
    match (message.get_field_by_name(first).as_deref(), rest) {
        _ if !message.has_field_by_name(first) => false,
        (Some(Value::Message(inner)), Some(rest)) => is_set(inner, rest),
        (_, rest) => rest.is_none(),
    }
}

fn exists(message: &MessageDescriptor, path: &str) -> bool {
    let (first, rest) = match path.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (path, None),
    };
    let Some(field) = message.get_field_by_name(first) else {
        return false;
    };
    match (field.kind().as_message(), rest) {
        (_, None) => true,
        (Some(inner), Some(rest)) => exists(inner, rest),
        (None, Some(_)) => false,
    }
}

/// The settings that are kept and have no effect here, of some: each with whether it is set, and why.
pub fn warnings(settings: &[(&str, bool, &str)]) -> Vec<Warning> {
    let set = settings.iter().filter(|(_, set, _)| *set);
    let warnings = set.map(|(field, _, message)| Warning {
        field: (*field).to_owned(),
        message: (*message).to_owned(),
    });
    warnings.collect()
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1;

    use super::*;

    fn faults_of(faults: Faults) -> Vec<String> {
        match faults.finish(Some(())) {
            Ok(()) => Vec::new(),
            Err(error) => vec![error.to_string()],
        }
    }

    #[test]
    fn what_only_the_service_sets_is_found_at_any_depth() {
        let cluster = v1::Cluster {
            uid: "u".into(),
            node_setup: Some(v1::NodeSetup {
                setup_task: Some(v1::SetupTask {
                    std_out_err_path_suffix: "s".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut faults = Faults::default();
        check_output_only(&mut faults, "cluster", "Cluster", &cluster);
        let faults = faults_of(faults).join("");
        assert!(faults.contains("cluster.uid"), "{faults}");
        let nested = "cluster.node_setup.setup_task.std_out_err_path_suffix";
        assert!(faults.contains(nested), "{faults}");
    }

    #[test]
    fn masks_cover_what_they_name() {
        const CHANGEABLE: [&str; 2] = ["scale_settings", "labels"];
        let cluster = v1::Cluster {
            name: "n".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            ..Default::default()
        };
        let ask = |cluster: &v1::Cluster, paths: Option<&[&str]>| {
            let mask = paths.map(|paths| FieldMask {
                paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            });
            let mut faults = Faults::default();
            let about = ("cluster", "Cluster");
            let changed = masked(&mut faults, about, cluster, mask, &CHANGEABLE);
            (changed, faults_of(faults))
        };
        assert_eq!(ask(&cluster, None), (vec!["labels"], vec![]));
        assert_eq!(ask(&cluster, Some(&[])), (vec!["labels"], vec![]));
        assert_eq!(ask(&cluster, Some(&["*"])).0, CHANGEABLE);
        assert_eq!(
            ask(&cluster, Some(&["scale_settings"])).0,
            ["scale_settings"]
        );
        for (path, why) in [
            ("uid", "cannot be changed"),
            ("vm_size", "cannot be changed"),
            ("scale_settings.manual", "only with all of scale_settings"),
            ("scale_settings.manual.nonsense", "is not a field"),
            ("", "is not a field"),
        ] {
            let (changed, faults) = ask(&cluster, Some(&[path]));
            assert!(
                changed.is_empty() && faults[0].contains(why),
                "{path}: {faults:?}"
            );
        }
        let resized = v1::Cluster {
            vm_size: "other".into(),
            ..cluster
        };
        assert!(ask(&resized, None).1[0].contains("cluster.vm_size: cannot be changed"));
    }
}
