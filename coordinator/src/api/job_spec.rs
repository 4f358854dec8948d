//! PURE. Checks what a user asks of a job, all of it at once, and fills in the defaults.

use std::collections::BTreeSet;

use batchai_proto::v1::job::{SchedulingPriority, ToolType};
use batchai_proto::v1::{Job, JobConstraints, PyTorchSettings};
use prost::Message as _;

use super::Faults;
use batchai_common::names::Kind as Noun;

const NODES_MAX: i32 = 10_000;
/// An attempt with all of its ranks and files still fits one reply.
const PROCESSES_MAX: i32 = 10_000;
/// A job is kept in memory and in every copy of the log.
const JOB_BYTES_MAX: usize = 256 << 10;
const LIST_MAX: usize = 1000;
const ID_BYTES_MAX: usize = 64;
/// Linux itself takes no longer path; no longer argument either, with room for the name of a variable.
const PATH_BYTES_MAX: usize = 4096;
const TEXT_BYTES_MAX: usize = (128 << 10) - 128;
const WALL_CLOCK_DEFAULT_S: i64 = 7 * 24 * 3600;
/// Ten years.
const WALL_CLOCK_MAX_S: i64 = 10 * 366 * 24 * 3600;
/// Where paths may begin with a variable.
const VARIABLE: &str = "$AZ_BATCHAI_";

/// Checks a job; what comes back is what is stored, apart from name and uid.
pub fn check(faults: &mut Faults, given: Job) -> Job {
    faults.name("job.cluster", Noun::Cluster, &given.cluster);
    if !(1..=NODES_MAX).contains(&given.node_count) {
        faults.invalid("job.node_count", format!("must be from 1 to {NODES_MAX}"));
    }
    if SchedulingPriority::try_from(given.scheduling_priority).is_err() {
        faults.invalid("job.scheduling_priority", "is not one of its values");
    }
    absolute(
        faults,
        "job.std_out_err_path_prefix",
        &given.std_out_err_path_prefix,
    );
    check_directories(faults, &given);
    check_environment(faults, &given);
    if let Some(preparation) = &given.job_preparation {
        text(
            faults,
            "job.job_preparation.command_line",
            &preparation.command_line,
        );
    }
    let constraints = check_constraints(faults, given.constraints);
    check_toolkit(faults, &given);
    check_not_served(faults, &given);
    check_output_only(faults, &given);
    if given.encoded_len() > JOB_BYTES_MAX {
        faults.invalid("job", format!("is larger than {JOB_BYTES_MAX} bytes"));
    }
    let priority = match given.scheduling_priority() {
        SchedulingPriority::Unspecified => SchedulingPriority::Normal,
        priority => priority,
    };
    let tool = match &given.py_torch_settings {
        Some(_) => ToolType::Pytorch,
        None => ToolType::Custom,
    };
    Job {
        scheduling_priority: priority as i32,
        constraints: Some(constraints),
        tool_type: tool as i32,
        py_torch_settings: given
            .py_torch_settings
            .clone()
            .map(|settings| materialise_pytorch(settings, given.node_count)),
        ..given
    }
}

fn check_directories(faults: &mut Faults, given: &Job) {
    let lists = [
        ("job.input_directories", given.input_directories.len()),
        ("job.output_directories", given.output_directories.len()),
    ];
    for (field, length) in lists {
        at_most(faults, field, length);
    }
    let mut seen = BTreeSet::new();
    for (i, directory) in given.input_directories.iter().enumerate().take(LIST_MAX) {
        let field = format!("job.input_directories[{i}]");
        directory_id(faults, &format!("{field}.id"), &directory.id, &mut seen);
        path(faults, &format!("{field}.path"), &directory.path);
    }
    let mut seen = BTreeSet::new();
    for (i, directory) in given.output_directories.iter().enumerate().take(LIST_MAX) {
        let field = format!("job.output_directories[{i}]");
        directory_id(faults, &format!("{field}.id"), &directory.id, &mut seen);
        if directory.id == "stdouterr" {
            faults.invalid(
                format!("{field}.id"),
                "is the reserved name of the log directory",
            );
        }
        absolute(
            faults,
            &format!("{field}.path_prefix"),
            &directory.path_prefix,
        );
        let suffix = &directory.path_suffix;
        if !suffix.is_empty() && (suffix.starts_with('/') || climbs(suffix) || bad_path(suffix)) {
            let why = "must be a relative path without `..`";
            faults.invalid(format!("{field}.path_suffix"), why);
        }
    }
}

fn directory_id<'a>(faults: &mut Faults, field: &str, id: &'a str, seen: &mut BTreeSet<&'a str>) {
    let legal = !id.is_empty()
        && id.len() <= ID_BYTES_MAX
        && id.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
    if !legal {
        faults.invalid(field, "must have 1 to 64 characters of [A-Za-z0-9_]");
    }
    if !seen.insert(id) {
        faults.invalid(field, "stands twice in the list");
    }
}

fn check_environment(faults: &mut Faults, given: &Job) {
    at_most(
        faults,
        "job.environment_variables",
        given.environment_variables.len(),
    );
    let mut seen = BTreeSet::new();
    for (i, variable) in given
        .environment_variables
        .iter()
        .enumerate()
        .take(LIST_MAX)
    {
        let field = format!("job.environment_variables[{i}]");
        let name = variable.name.as_str();
        let mut characters = name.bytes();
        let legal = name.len() <= ID_BYTES_MAX
            && characters
                .next()
                .is_some_and(|c| c.is_ascii_alphabetic() || c == b'_')
            && characters.all(|c| c.is_ascii_alphanumeric() || c == b'_');
        if !legal {
            faults.invalid(
                format!("{field}.name"),
                "must match [A-Za-z_][A-Za-z0-9_]{0,63}",
            );
        }
        if name.starts_with("AZ_BATCHAI_") || name.starts_with("BATCHAI_") {
            let why = "names with AZ_BATCHAI_ or BATCHAI_ in front are set by the service";
            faults.invalid(format!("{field}.name"), why);
        }
        if !seen.insert(name) {
            faults.invalid(format!("{field}.name"), "stands twice in the list");
        }
        if variable.value.contains('\0') || variable.value.len() > TEXT_BYTES_MAX {
            let why = format!("must have at most {TEXT_BYTES_MAX} bytes and no NUL");
            faults.invalid(format!("{field}.value"), why);
        }
    }
}

fn check_constraints(faults: &mut Faults, given: Option<JobConstraints>) -> JobConstraints {
    let default = prost_types::Duration {
        seconds: WALL_CLOCK_DEFAULT_S,
        nanos: 0,
    };
    let limit = given
        .and_then(|given| given.max_wall_clock_time)
        .unwrap_or(default);
    let legal = (1..=WALL_CLOCK_MAX_S).contains(&limit.seconds);
    if !legal || !(0..1_000_000_000).contains(&limit.nanos) {
        faults.invalid(
            "job.constraints.max_wall_clock_time",
            "must be from 1 second to 10 years",
        );
    }
    JobConstraints {
        max_wall_clock_time: Some(limit),
    }
}

fn toolkits(given: &Job) -> [(&'static str, bool, bool); 9] {
    // Name, whether it is served, whether it is set.
    [
        (
            "custom_toolkit_settings",
            true,
            given.custom_toolkit_settings.is_some(),
        ),
        ("py_torch_settings", true, given.py_torch_settings.is_some()),
        (
            "tensor_flow_settings",
            false,
            given.tensor_flow_settings.is_some(),
        ),
        ("cntk_settings", false, given.cntk_settings.is_some()),
        ("caffe_settings", false, given.caffe_settings.is_some()),
        ("caffe2_settings", false, given.caffe2_settings.is_some()),
        ("chainer_settings", false, given.chainer_settings.is_some()),
        ("horovod_settings", false, given.horovod_settings.is_some()),
        (
            "custom_mpi_settings",
            false,
            given.custom_mpi_settings.is_some(),
        ),
    ]
}

fn check_toolkit(faults: &mut Faults, given: &Job) {
    let set: Vec<_> = toolkits(given)
        .into_iter()
        .filter(|(_, _, set)| *set)
        .collect();
    match set[..] {
        [_] => {}
        [] => faults.invalid(
            "job",
            "one toolkit must be given: set custom_toolkit_settings or py_torch_settings",
        ),
        _ => {
            let names: Vec<_> = set.iter().map(|(name, ..)| *name).collect();
            let names = names.join(" and ");
            faults.invalid(
                "job",
                format!("exactly one toolkit may be given, not {names}"),
            );
        }
    }
    if let Some(settings) = &given.custom_toolkit_settings {
        text(
            faults,
            "job.custom_toolkit_settings.command_line",
            &settings.command_line,
        );
    }
    if let Some(settings) = &given.py_torch_settings {
        check_pytorch(faults, settings, given.node_count);
    }
}

fn check_pytorch(faults: &mut Faults, given: &PyTorchSettings, nodes: i32) {
    const FIELD: &str = "job.py_torch_settings";
    path(
        faults,
        &format!("{FIELD}.python_script_file_path"),
        &given.python_script_file_path,
    );
    let interpreter = &given.python_interpreter_path;
    if !interpreter.is_empty() {
        path(
            faults,
            &format!("{FIELD}.python_interpreter_path"),
            interpreter,
        );
    }
    let arguments = &given.command_line_args;
    if shlex::split(arguments).is_none() || arguments.contains('\0') {
        let why = "is not a list of words in shell quoting";
        faults.invalid(format!("{FIELD}.command_line_args"), why);
    }
    let count = given.process_count;
    if count != 0 && (count < nodes || count > PROCESSES_MAX) {
        let why = format!("must be 0 or from node_count to {PROCESSES_MAX}");
        faults.invalid(format!("{FIELD}.process_count"), why);
    }
    let field = format!("{FIELD}.communication_backend");
    match given.communication_backend.to_ascii_lowercase().as_str() {
        "" | "gloo" | "nccl" | "tcp" => {}
        "mpi" => faults.not_served(&field, true),
        _ => faults.invalid(field, "must be gloo, nccl or tcp"),
    }
}

fn materialise_pytorch(given: PyTorchSettings, nodes: i32) -> PyTorchSettings {
    let backend = given.communication_backend.to_ascii_lowercase();
    PyTorchSettings {
        process_count: if given.process_count == 0 {
            nodes
        } else {
            given.process_count
        },
        communication_backend: if backend.is_empty() {
            "gloo".into()
        } else {
            backend
        },
        ..given
    }
}

fn check_not_served(faults: &mut Faults, given: &Job) {
    faults.not_served("job.secrets", !given.secrets.is_empty());
    faults.not_served("job.mount_volumes", given.mount_volumes.is_some());
    faults.not_served("job.container_settings", given.container_settings.is_some());
    for (name, served, set) in toolkits(given) {
        faults.not_served(&format!("job.{name}"), set && !served);
    }
}

fn check_output_only(faults: &mut Faults, given: &Job) {
    for (field, set) in [
        ("job.name", !given.name.is_empty()),
        ("job.uid", !given.uid.is_empty()),
        ("job.etag", !given.etag.is_empty()),
        ("job.create_time", given.create_time.is_some()),
        ("job.tool_type", given.tool_type != 0),
        ("job.state", given.state != 0),
        (
            "job.state_transition_time",
            given.state_transition_time.is_some(),
        ),
        ("job.pending_reason", !given.pending_reason.is_empty()),
        ("job.start_time", given.start_time.is_some()),
        ("job.end_time", given.end_time.is_some()),
        ("job.exit_code", given.exit_code.is_some()),
        ("job.errors", !given.errors.is_empty()),
        (
            "job.job_output_directory_path_segment",
            !given.job_output_directory_path_segment.is_empty(),
        ),
        ("job.attempt", given.attempt.is_some()),
        ("job.deleting", given.deleting),
    ] {
        faults.output_only(field, set);
    }
}

fn at_most(faults: &mut Faults, field: &str, length: usize) {
    if length > LIST_MAX {
        faults.invalid(field, format!("has more than {LIST_MAX} elements"));
    }
}

fn text(faults: &mut Faults, field: &str, text: &str) {
    if text.trim().is_empty() || text.contains('\0') || text.len() > TEXT_BYTES_MAX {
        let why = format!("must be given, with at most {TEXT_BYTES_MAX} bytes and no NUL");
        faults.invalid(field, why);
    }
}

fn bad_path(path: &str) -> bool {
    path.contains('\0') || path.len() > PATH_BYTES_MAX
}

fn climbs(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

fn path(faults: &mut Faults, field: &str, path: &str) {
    if path.is_empty() || bad_path(path) {
        let why = format!("must be a path of 1 to {PATH_BYTES_MAX} bytes without NUL");
        faults.invalid(field, why);
    }
}

fn absolute(faults: &mut Faults, field: &str, path: &str) {
    let begins_well = path.starts_with('/') || path.starts_with(VARIABLE);
    if !begins_well || climbs(path) || bad_path(path) {
        let why = "must be an absolute path without `..`; it may begin with $AZ_BATCHAI_...";
        faults.invalid(field, why);
    }
}

#[cfg(test)]
#[path = "job_spec_tests.rs"]
mod tests;
