//! Deliberate faults stay out of ordinary programs, and every one of them is tried. Whether they are noticed is seen by
//! `src/bin/mutants`.

#[path = "../src/bin/mutants/table.rs"]
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use batchai_tests::process::under_test;
use batchai_tests::sources;

/// So many at least were thought of from the code, by somebody who did not know what is checked.
const CODE_MIN: usize = 30;
/// What every `batchai` has in it: without them nothing would follow from not finding others.
const REAL: [&str; 2] = [
    "BATCHAI_JOB_USER",
    "neither slot of the witness file is whole",
];

#[test]
fn every_fault_is_tried_and_every_one_tried_is_there_once() {
    let there = sources::given_to("fault");
    let mut tried: Vec<_> = table::FAULTS
        .iter()
        .map(|fault| fault.0.to_owned())
        .collect();
    tried.sort();
    assert_eq!(there, tried);
    let unique: BTreeSet<_> = tried.iter().collect();
    assert_eq!(unique.len(), tried.len(), "a name stands twice");
    let of_code = table::FAULTS
        .iter()
        .filter(|fault| fault.1 == table::Drawn::Code);
    assert!(
        of_code.count() >= CODE_MIN,
        "too few are drawn from the code alone"
    );
    assert!(table::FAULTS.iter().all(|fault| !fault.2.is_empty()));
}

#[test]
fn no_fault_is_in_what_is_shipped() {
    let mut sought: Vec<_> = table::FAULTS.iter().map(|fault| fault.0).collect();
    sought.push("BATCHAI_FAULT");
    sought.extend(REAL);
    let list = tempfile::NamedTempFile::new().unwrap();
    fs::write(list.path(), sought.join("\n")).unwrap();
    // A program is large: who is made for that looks through it.
    let grep = Command::new("grep")
        .args(["-a", "-o", "-F", "-f"])
        .arg(list.path())
        .arg(under_test())
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(grep.stderr.is_empty(), "{grep:?}");
    let found = String::from_utf8_lossy(&grep.stdout);
    let found: BTreeSet<_> = found.lines().collect();
    assert_eq!(found, BTreeSet::from(REAL));
}
