//! PURE. Checks what a user asks of a job, all of it at once, and fills in the defaults.

use std::collections::BTreeSet;

use batchai_proto::v1::job::{OnNodeLoss, SchedulingPriority};
use batchai_proto::v1::{Job, JobConstraints, NameValuePair, ResourceLimits};

use super::faults::Faults;
use super::{containers, fields, toolkits, volumes};
use batchai_common::names::Kind as Noun;

const NODES_MAX: i32 = 10_000;
/// An attempt with all of its ranks and files still fits one reply.
pub const PROCESSES_MAX: i32 = 10_000;
const LIST_MAX: usize = 1000;
const ID_BYTES_MAX: usize = 64;
/// Linux itself takes no longer path; no longer argument either, with room for the name of a variable.
const PATH_BYTES_MAX: usize = 4096;
const TEXT_BYTES_MAX: usize = (128 << 10) - 128;
const WALL_CLOCK_DEFAULT_S: i64 = 7 * 24 * 3600;
const RETRIES_MAX: i32 = 100;
const CPUS_MAX: f64 = 100_000.0;
/// With less, what makes the job's directories would not run.
const MEMORY_MIN_MIB: i64 = 16;
/// A pebibyte.
const MEMORY_MAX_MIB: i64 = 1 << 30;
const PIDS_MIN: i32 = 16;
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
    if OnNodeLoss::try_from(given.on_node_loss).is_err() {
        faults.invalid("job.on_node_loss", "is not one of its values");
    }
    absolute(
        faults,
        "job.std_out_err_path_prefix",
        &given.std_out_err_path_prefix,
    );
    check_directories(faults, &given);
    check_variables(
        faults,
        "job.environment_variables",
        &given.environment_variables,
    );
    if let Some(preparation) = &given.job_preparation {
        text(
            faults,
            "job.job_preparation.command_line",
            &preparation.command_line,
        );
    }
    let constraints = check_constraints(faults, given.constraints);
    check_limits(faults, given.resource_limits.as_ref());
    faults.labels("job.labels", &given.labels);
    if !given.bundle.is_empty() {
        faults.name("job.bundle", Noun::Bundle, &given.bundle);
    }
    let tool = toolkits::check(faults, &given);
    check_not_served(faults, &given);
    fields::check_output_only(faults, "job", "Job", &given);
    let priority = match given.scheduling_priority() {
        SchedulingPriority::Unspecified => SchedulingPriority::Normal,
        priority => priority,
    };
    let mut job = Job {
        scheduling_priority: priority as i32,
        on_node_loss: given.on_node_loss.max(OnNodeLoss::Requeue as i32),
        constraints: Some(constraints),
        tool_type: tool as i32,
        ..given
    };
    toolkits::materialise(&mut job);
    job
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

/// Checks environment variables that a user sets.
pub fn check_variables(faults: &mut Faults, field: &str, given: &[NameValuePair]) {
    at_most(faults, field, given.len());
    let names = given.iter().map(|variable| variable.name.as_str());
    check_variable_names(faults, field, names, &mut BTreeSet::new());
    for (i, variable) in given.iter().enumerate().take(LIST_MAX) {
        no_longer_than_a_text(faults, &format!("{field}[{i}].value"), &variable.value);
    }
}

/// Checks names of environment variables; `seen` are those that are taken.
pub fn check_variable_names<'a>(
    faults: &mut Faults,
    field: &str,
    names: impl Iterator<Item = &'a str>,
    seen: &mut BTreeSet<&'a str>,
) {
    for (i, name) in names.enumerate().take(LIST_MAX) {
        let field = format!("{field}[{i}]");
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
    }
}

/// A text that may be empty.
pub fn no_longer_than_a_text(faults: &mut Faults, field: &str, text: &str) {
    if text.contains('\0') || text.len() > TEXT_BYTES_MAX {
        let why = format!("must have at most {TEXT_BYTES_MAX} bytes and no NUL");
        faults.invalid(field, why);
    }
}

fn check_limits(faults: &mut Faults, given: Option<&ResourceLimits>) {
    let Some(given) = given else {
        return;
    };
    let ResourceLimits {
        cpus,
        memory_mib,
        pids,
    } = *given;
    // What is no number is in no range.
    if cpus != 0.0 && !(0.01..=CPUS_MAX).contains(&cpus) {
        let why = format!("must be from 0.01 to {CPUS_MAX}, or 0 for no limit");
        faults.invalid("job.resource_limits.cpus", why);
    }
    if memory_mib != 0 && !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&memory_mib) {
        let why =
            format!("must be from {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB, or 0 for no limit");
        faults.invalid("job.resource_limits.memory_mib", why);
    }
    if pids != 0 && pids < PIDS_MIN {
        let why = format!("must be at least {PIDS_MIN}, or 0 for no limit");
        faults.invalid("job.resource_limits.pids", why);
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
    if !(1..=WALL_CLOCK_MAX_S).contains(&limit.seconds) || limit.nanos != 0 {
        faults.invalid(
            "job.constraints.max_wall_clock_time",
            "must be from 1 second to 10 years, in whole seconds",
        );
    }
    let max_retries = given.map_or(0, |given| given.max_retries);
    if !(0..=RETRIES_MAX).contains(&max_retries) {
        let why = format!("must be from 0 to {RETRIES_MAX}");
        faults.invalid("job.constraints.max_retries", why);
    }
    JobConstraints {
        max_wall_clock_time: Some(limit),
        max_retries,
    }
}

fn check_not_served(faults: &mut Faults, given: &Job) {
    let variables = &given.environment_variables;
    volumes::check_secrets(faults, "job.secrets", &given.secrets, variables);
    if let Some(mounts) = &given.mount_volumes {
        volumes::check_mounts(faults, "job.mount_volumes", mounts);
    }
    if let Some(container) = &given.container_settings {
        containers::check(faults, "job.container_settings", container);
    }
}

fn at_most(faults: &mut Faults, field: &str, length: usize) {
    if length > LIST_MAX {
        faults.invalid(field, format!("has more than {LIST_MAX} elements"));
    }
}

pub fn text(faults: &mut Faults, field: &str, text: &str) {
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

pub fn path(faults: &mut Faults, field: &str, path: &str) {
    if path.is_empty() || bad_path(path) {
        let why = format!("must be a path of 1 to {PATH_BYTES_MAX} bytes without NUL");
        faults.invalid(field, why);
    }
}

pub fn absolute(faults: &mut Faults, field: &str, path: &str) {
    let begins_well = path.starts_with('/') || path.starts_with(VARIABLE);
    if !begins_well || climbs(path) || bad_path(path) {
        let why = "must be an absolute path without `..`; it may begin with $AZ_BATCHAI_...";
        faults.invalid(field, why);
    }
}

#[cfg(test)]
#[path = "job_spec_tests.rs"]
mod tests;
