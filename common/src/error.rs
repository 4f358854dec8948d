//! Errors on the wire: one type, turned into a `google.rpc.Status` at the last step.
//!
//! Every status carries exactly one ErrorInfo with every value that its message mentions. Causes that are nobody's
//! business outside go to the log, not into a status.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::names::Kind;

/// The domain of every ErrorInfo.
pub const DOMAIN: &str = "batchai";

/// The reason by which an agent knows that its node was expelled.
pub const NODE_EXPELLED: &str = "NODE_EXPELLED";

/// Clients that are told to come again wait this long.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// A field of a request and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The path as in the request, for example `job.node_count`.
    pub field: String,
    /// What is wrong and what to do.
    pub reason: String,
}

impl Fault {
    /// A fault.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Fault {
        Fault {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    #[error("invalid request: {}", list(.0))]
    Invalid(Vec<Fault>),
    #[error("not served yet: {}", list(.0))]
    NotServed(Vec<Fault>),
    #[error("{} {name} does not exist", .kind.noun())]
    NotFound { kind: Kind, name: String },
    #[error("file {file} of {job} does not exist; {hint}")]
    NoSuchFile {
        job: String,
        file: String,
        hint: String,
    },
    #[error("{} {name} exists already", .kind.noun())]
    AlreadyExists { kind: Kind, name: String },
    #[error("{name}: {why}")]
    WrongState { name: String, why: String },
    #[error("{name} has changed since: its etag is {actual}, not {expected}; read it again")]
    StaleEtag {
        name: String,
        expected: String,
        actual: String,
    },
    #[error(
        "there are {limit} of kind {} in {place} already, as many as there may be; delete some first",
        .kind.noun()
    )]
    LimitReached {
        kind: Kind,
        limit: usize,
        place: String,
    },
    #[error(
        "revision {revision} is not remembered: what is goes from {oldest} to {latest}; watch again from revision 0"
    )]
    Forgotten {
        revision: i64,
        oldest: i64,
        latest: i64,
    },
    #[error("the watcher took nothing for too long; watch again from revision {revision}")]
    TooSlow { revision: i64 },
    #[error("{caller} may not do this: it takes the permission {permission} on {}", place(.name))]
    Forbidden {
        caller: String,
        permission: String,
        name: String,
    },
    #[error("{name} was expelled")]
    Expelled { name: String },
    #[error("who are you? {why}")]
    Unauthenticated { why: &'static str },
    #[error("{what} is full; try again soon")]
    Busy { what: &'static str },
    #[error("this replica cannot serve: {why}")]
    Unavailable { why: String, leader: Option<String> },
    #[error("the request may or may not have been carried out: {why}; look before you repeat it")]
    Unknown { why: String },
    #[error("{why}; the command is hung up, and how far it came is not known")]
    HungUp { why: String },
    #[error("internal error; the log of the replica names it by {id}")]
    Internal { id: String },
}

fn place(name: &str) -> &str {
    match name {
        "" => "the ensemble",
        name => name,
    }
}

/// An error with what caused it, outermost first: transport errors say nothing by themselves.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut source = error.source();
    while let Some(cause) = source {
        texts.push(cause.to_string());
        source = cause.source();
    }
    texts.dedup();
    texts.join(": ")
}

/// So many faults are named: a status travels in headers, and clients take 16 KiB of them.
const FAULTS_MAX: usize = 20;
/// So many of them in the message, too.
const FAULTS_IN_MESSAGE_MAX: usize = 10;
/// The longest text of a fault.
const TEXT_CHARS_MAX: usize = 90;

fn short(text: &str) -> String {
    match text.chars().count() > TEXT_CHARS_MAX {
        true => text.chars().take(TEXT_CHARS_MAX).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// The first faults, each of a bounded length.
fn named(faults: &[Fault]) -> impl Iterator<Item = Fault> {
    let first = faults.iter().take(FAULTS_MAX);
    first.map(|fault| Fault::new(short(&fault.field), short(&fault.reason)))
}

fn list(faults: &[Fault]) -> String {
    let named = named(faults).take(FAULTS_IN_MESSAGE_MAX);
    let mut parts: Vec<_> = named
        .map(|f| format!("{}: {}", f.field, f.reason))
        .collect();
    if faults.len() > FAULTS_IN_MESSAGE_MAX {
        parts.push(format!("and {} more", faults.len() - FAULTS_IN_MESSAGE_MAX));
    }
    parts.join("; ")
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Status {
        let (code, reason) = class(&error);
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata(&error));
        match &error {
            ApiError::Invalid(faults) | ApiError::NotServed(faults) => {
                for fault in named(faults) {
                    details.add_bad_request_violation(&fault.field, &fault.reason);
                }
            }
            ApiError::NotFound { kind, name } | ApiError::AlreadyExists { kind, name } => {
                details.set_resource_info(kind.noun(), name, "", error.to_string());
            }
            ApiError::NoSuchFile { file, .. } => {
                details.set_resource_info("log file", file, "", error.to_string());
            }
            ApiError::WrongState { name, why } => {
                details.add_precondition_failure_violation("STATE", name, why);
            }
            ApiError::LimitReached { kind, .. } => {
                details.add_quota_failure_violation(kind.noun(), error.to_string());
            }
            ApiError::Busy { what } => {
                details.add_quota_failure_violation(*what, error.to_string());
                details.set_retry_info(Some(RETRY_AFTER));
            }
            ApiError::Unavailable { .. } | ApiError::Unknown { .. } => {
                details.set_retry_info(Some(RETRY_AFTER));
            }
            ApiError::Internal { id } => {
                details.set_request_info(id, "");
            }
            ApiError::StaleEtag { .. }
            | ApiError::Forgotten { .. }
            | ApiError::TooSlow { .. }
            | ApiError::Forbidden { .. }
            | ApiError::Expelled { .. }
            | ApiError::HungUp { .. }
            | ApiError::Unauthenticated { .. } => {}
        }
        Status::with_error_details(code, error.to_string(), details)
    }
}

/// Code and reason. Clients repeat only UNAVAILABLE by themselves, so an unknown outcome is not that.
fn class(error: &ApiError) -> (Code, &'static str) {
    match error {
        ApiError::Invalid(_) => (Code::InvalidArgument, "INVALID_FIELD"),
        ApiError::NotServed(_) => (Code::Unimplemented, "FIELD_NOT_SERVED"),
        ApiError::NotFound { .. } => (Code::NotFound, "RESOURCE_NOT_FOUND"),
        ApiError::NoSuchFile { .. } => (Code::NotFound, "FILE_NOT_FOUND"),
        ApiError::AlreadyExists { .. } => (Code::AlreadyExists, "RESOURCE_EXISTS"),
        ApiError::WrongState { .. } => (Code::FailedPrecondition, "WRONG_STATE"),
        ApiError::StaleEtag { .. } => (Code::Aborted, "STALE_ETAG"),
        ApiError::LimitReached { .. } => (Code::ResourceExhausted, "LIMIT_REACHED"),
        ApiError::Forgotten { .. } => (Code::OutOfRange, "REVISION_FORGOTTEN"),
        ApiError::TooSlow { .. } => (Code::OutOfRange, "WATCHER_TOO_SLOW"),
        ApiError::Forbidden { .. } => (Code::PermissionDenied, "FORBIDDEN"),
        ApiError::Expelled { .. } => (Code::PermissionDenied, NODE_EXPELLED),
        ApiError::Unauthenticated { .. } => (Code::Unauthenticated, "UNAUTHENTICATED"),
        ApiError::Busy { .. } => (Code::ResourceExhausted, "BUSY"),
        ApiError::Unavailable { .. } => (Code::Unavailable, "UNAVAILABLE"),
        ApiError::Unknown { .. } => (Code::Aborted, "OUTCOME_UNKNOWN"),
        ApiError::HungUp { .. } => (Code::Aborted, "HUNG_UP"),
        ApiError::Internal { .. } => (Code::Internal, "INTERNAL"),
    }
}

fn metadata(error: &ApiError) -> HashMap<String, String> {
    let pairs: Vec<(&str, String)> = match error {
        ApiError::Invalid(faults) | ApiError::NotServed(faults) => {
            let fields: Vec<_> = named(faults).map(|fault| fault.field).collect();
            vec![("fields", fields.join(","))]
        }
        ApiError::NotFound { kind, name } | ApiError::AlreadyExists { kind, name } => {
            vec![("type", kind.noun().into()), ("name", name.clone())]
        }
        ApiError::NoSuchFile { job, file, hint } => {
            vec![
                ("job", job.clone()),
                ("file", file.clone()),
                ("hint", hint.clone()),
            ]
        }
        ApiError::WrongState { name, why } => vec![("name", name.clone()), ("why", why.clone())],
        ApiError::StaleEtag {
            name,
            expected,
            actual,
        } => vec![
            ("name", name.clone()),
            ("expected", expected.clone()),
            ("actual", actual.clone()),
        ],
        ApiError::LimitReached { kind, limit, place } => {
            vec![
                ("type", kind.noun().into()),
                ("limit", limit.to_string()),
                ("place", place.clone()),
            ]
        }
        ApiError::Forgotten {
            revision,
            oldest,
            latest,
        } => vec![
            ("revision", revision.to_string()),
            ("oldest", oldest.to_string()),
            ("latest", latest.to_string()),
        ],
        ApiError::TooSlow { revision } => vec![("revision", revision.to_string())],
        ApiError::Forbidden {
            caller,
            permission,
            name,
        } => vec![
            ("caller", caller.clone()),
            ("permission", permission.clone()),
            ("name", name.clone()),
        ],
        ApiError::Expelled { name } => vec![("name", name.clone())],
        ApiError::Unauthenticated { why } => vec![("why", (*why).into())],
        ApiError::Busy { what } => vec![("what", (*what).into())],
        ApiError::Unavailable { why, leader } => {
            let mut pairs = vec![("why", why.clone())];
            pairs.extend(leader.clone().map(|leader| ("leader", leader)));
            pairs
        }
        ApiError::Unknown { why } | ApiError::HungUp { why } => vec![("why", why.clone())],
        ApiError::Internal { id } => vec![("id", id.clone())],
    };
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_names_every_fault_and_has_one_error_info() {
        let error = ApiError::Invalid(vec![
            Fault::new("a.b", "is bad"),
            Fault::new("c", "is worse"),
        ]);
        let status = Status::from(error);
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().metadata["fields"], "a.b,c");
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations.len(), 2);
        assert_eq!(violations[1].description, "is worse");
    }

    #[test]
    fn a_status_fits_into_headers_however_much_is_wrong() {
        let faults = (0..1000)
            .map(|i| Fault::new(format!("f{i}"), "ü".repeat(5000)))
            .collect();
        let status = Status::from(ApiError::Invalid(faults));
        // What is not ASCII takes three characters a byte; details travel in base64.
        let message: usize = status
            .message()
            .bytes()
            .map(|b| if b.is_ascii() { 1 } else { 3 })
            .sum();
        let size = message + status.details().len() * 4 / 3;
        assert!(size < 15 << 10, "{size}");
        assert!(
            status.message().ends_with("and 990 more"),
            "{}",
            status.message()
        );
    }
}
