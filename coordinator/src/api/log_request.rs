//! What a request for logs asks for. It reads nothing.

use std::collections::BTreeMap;

use batchai_common::error::ApiError;
use batchai_common::names::{Kind as Noun, Name};
use batchai_common::time::millis;
use batchai_proto::v1::{LogPosition, StreamJobLogsRequest};

use super::faults::Faults;
use crate::logs::{Begin, OutputStream, Ranks, ReadRequest, What, check_file};

/// Lines that are looked for from the end.
const TAIL_LINES_MAX: i32 = 100_000;
/// As many as files are followed on one stream.
const POSITIONS_MAX: usize = 1024;

/// Checks all of a request for logs.
pub fn check(request: StreamJobLogsRequest) -> Result<ReadRequest, ApiError> {
    let mut faults = Faults::default();
    let job = faults.name("name", Noun::Job, &request.name);
    let node = match request.node.as_str() {
        "" => None,
        node => faults.name("node", Noun::Node, node),
    };
    let what = match request.all_ranks {
        true => What::Ranks(ranks(&mut faults, &request)),
        false => {
            if !check_file(&request.file) {
                let why = "must be the name of a file, such as stdout.txt";
                faults.invalid("file", why);
            }
            if !request.positions.is_empty() {
                faults.invalid("positions", "is for all_ranks only");
            }
            What::File(request.file.clone())
        }
    };
    let tail = request.tail_lines;
    if tail.is_some_and(|lines| !(0..=TAIL_LINES_MAX).contains(&lines)) {
        faults.invalid("tail_lines", format!("must be 0 to {TAIL_LINES_MAX}"));
    }
    let begin = Begin {
        offset: number(&mut faults, "offset", request.offset),
        tail_lines: tail.and_then(|lines| u64::try_from(lines).ok()),
        since_ms: request.since.as_ref().map(millis),
    };
    let length = number(&mut faults, "length", request.length);
    if request.all_ranks && (begin.offset > 0 || length > 0) {
        faults.invalid("all_ranks", "has neither offset nor length: use positions");
    }
    let job = faults.finish(job)?;
    Ok(ReadRequest {
        job: job.into(),
        what,
        node: node.map(Name::into),
        begin,
        length: Some(length).filter(|length| *length > 0),
        follow: request.follow,
    })
}

fn ranks(faults: &mut Faults, request: &StreamJobLogsRequest) -> Ranks {
    let stream = match request.file.as_str() {
        "" => None,
        "stdout" => Some(OutputStream::Stdout),
        "stderr" => Some(OutputStream::Stderr),
        _ => {
            faults.invalid("file", "must be stdout, stderr or empty with all_ranks");
            None
        }
    };
    if request.positions.len() > POSITIONS_MAX {
        faults.invalid("positions", format!("has more than {POSITIONS_MAX}"));
    }
    let positions = request.positions.iter().take(POSITIONS_MAX).enumerate();
    let positions: BTreeMap<_, _> = positions
        .map(|(i, LogPosition { node, file, offset })| {
            let offset = number(faults, &format!("positions[{i}].offset"), *offset);
            ((node.clone(), file.clone()), offset)
        })
        .collect();
    Ranks { stream, positions }
}

/// A request for a file that is no log must not have what is of logs only.
pub fn refuse_what_is_of_logs(faults: &mut Faults, request: &StreamJobLogsRequest) {
    for (field, set) in [
        ("tail_lines", request.tail_lines.is_some()),
        ("since", request.since.is_some()),
        ("all_ranks", request.all_ranks),
        ("positions", !request.positions.is_empty()),
    ] {
        if set {
            faults.invalid(field, "is for logs only");
        }
    }
}

pub fn number(faults: &mut Faults, field: &str, value: i64) -> u64 {
    u64::try_from(value).unwrap_or_else(|_| {
        faults.invalid(field, "must not be negative");
        0
    })
}
