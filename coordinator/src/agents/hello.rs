//! Whether what an agent says about itself and its work can be so. It knows nothing of the State but what it is given.

use std::collections::BTreeSet;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{LAST_WORDS_BYTES_MAX, STUCK_MAX};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::agent::v1::{AttemptObservation, Hello, Report};
use batchai_proto::internal::v1::RegisterNode;
use batchai_proto::v1::{NodeFacts, ResourceError};
use prost::Message as _;
use tonic::Status;

/// Texts of an agent about itself are short.
const TEXT_BYTES_MAX: usize = 1024;
const LIST_MAX: usize = 64;
const FACTS_BYTES_MAX: usize = 64 << 10;
/// Attempts that one node can hold: one that runs, and some that are not forgotten yet.
const ATTEMPTS_MAX: usize = 1000;
/// More file servers than are given to a node.
const FILE_SERVERS_MAX: usize = 100;
/// As many as a job may have processes.
const RANKS_MAX: usize = 10_000;
/// What a node says about a failure.
const FAILURE_BYTES_MAX: usize = 64 << 10;

/// A node belongs to one ensemble; one that has not met any belongs to this one from now on.
pub fn check_ensemble(name: &str, theirs: &str, own: &str) -> Result<(), Status> {
    if own.is_empty() {
        let why = "the ensemble is being set up".to_owned();
        return Err(ApiError::Unavailable { why, leader: None }.into());
    }
    if theirs.is_empty() || theirs == own {
        return Ok(());
    }
    let why = format!(
        "it belongs to ensemble {theirs}, this one is {own}; give its agent another --data directory to have it join"
    );
    Err(ApiError::WrongState {
        name: name.to_owned(),
        why,
    }
    .into())
}

/// What an ensemble began anew from is over for those who have met what it became.
pub fn check_epoch(name: &str, met: i64, own: i64) -> Result<(), Status> {
    if met <= own {
        return Ok(());
    }
    let why = format!(
        "it has met epoch {met} of the ensemble, and this coordinator is of epoch {own}: the ensemble began anew from a backup. Stop \
         this coordinator, or have it join the other ones under a new id"
    );
    Err(ApiError::WrongState {
        name: name.to_owned(),
        why,
    }
    .into())
}

/// Checks the sizes of a report before it enters the log.
pub fn check_report(report: &Report) -> Result<(), Status> {
    let strays = report.strays.iter().flat_map(|list| &list.strays);
    let told = strays.clone().filter_map(|stray| stray.seen.as_ref());
    let small = strays.clone().all(|stray| {
        let hosts = stray.hosts.iter().all(|host| {
            host.node.len() <= TEXT_BYTES_MAX
                && (0..=65_535).contains(&host.port)
                && [&host.address, &host.boot_id, &host.root]
                    .iter()
                    .all(|text| text.is_empty())
        });
        let texts = stray.job.len() <= TEXT_BYTES_MAX && stray.job_uid.len() <= TEXT_BYTES_MAX;
        hosts && texts && stray.hosts.len() <= RANKS_MAX && stray.seen.is_some()
    });
    let mounts = report.mounts.as_ref();
    let mounts_fit = mounts.is_none_or(|mounts| {
        let failure = mounts.failure.as_ref();
        mounts.cluster_uid.len() <= TEXT_BYTES_MAX
            && failure.is_none_or(|error| text_of(error) <= FAILURE_BYTES_MAX)
    });
    let servers = &report.file_servers;
    let servers_fit = servers.len() <= FILE_SERVERS_MAX
        && servers.iter().all(|said| {
            let place = said.place.clone().unwrap_or_default();
            let texts = [&said.uid, &place.address, &place.path, &place.backend];
            texts.iter().all(|text| text.len() <= TEXT_BYTES_MAX)
                && (0..=65_535).contains(&place.port)
                && said
                    .failure
                    .as_ref()
                    .is_none_or(|error| text_of(error) <= FAILURE_BYTES_MAX)
        });
    if !small || !mounts_fit || !servers_fit || !fit(told) || !fit(report.attempts.iter()) {
        let fault = Fault::new("report", "it is larger than a report can be");
        return Err(ApiError::Invalid(vec![fault]).into());
    }
    Ok(())
}

fn text_of(error: &ResourceError) -> usize {
    let details = error.details.iter().map(|d| d.name.len() + d.value.len());
    error.code.len() + error.message.len() + details.sum::<usize>()
}

/// Whether observations are few enough, each once, and each small enough.
fn fit<'a>(seen: impl Iterator<Item = &'a AttemptObservation> + Clone) -> bool {
    let fits = |seen: &'a AttemptObservation| {
        let error = seen
            .failure
            .as_ref()
            .and_then(|failure| failure.error.as_ref());
        seen.attempt.len() <= TEXT_BYTES_MAX
            && seen.stuck.len() <= STUCK_MAX
            && seen.last_words.len() <= LAST_WORDS_BYTES_MAX
            && seen.ranks.len() <= RANKS_MAX
            && seen
                .ranks
                .iter()
                .all(|rank| (0..RANKS_MAX as i32).contains(&rank.rank))
            && seen.files.len() <= 2 * RANKS_MAX + LIST_MAX
            && seen
                .files
                .iter()
                .all(|file| file.name.len() <= TEXT_BYTES_MAX)
            && error.is_none_or(|error| text_of(error) <= FAILURE_BYTES_MAX)
    };
    let (ids, count): (BTreeSet<_>, _) = (
        seen.clone().map(|seen| &seen.attempt).collect(),
        seen.clone().count(),
    );
    count <= ATTEMPTS_MAX && ids.len() == count && seen.clone().all(fits)
}

/// Checks everything an agent says about itself; returns its full name.
pub fn check(hello: &Hello, facts: &NodeFacts) -> Result<Name, Status> {
    let mut faults = Vec::new();
    let name = Name::top(Noun::Node, &hello.node_id);
    if let Err(error) = &name {
        faults.push(Fault::new("hello.node_id", error.to_string()));
    }
    for (field, text) in [
        ("hello.uid", &hello.uid),
        ("hello.journal_id", &hello.journal_id),
    ] {
        if uuid::Uuid::try_parse(text).is_err() {
            faults.push(Fault::new(field, "must be a UUID"));
        }
    }
    if !hello.ensemble.is_empty() && uuid::Uuid::try_parse(&hello.ensemble).is_err() {
        faults.push(Fault::new("hello.ensemble", "must be a UUID"));
    }
    check_facts(facts, &mut faults);
    match (name, faults.is_empty()) {
        (Ok(name), true) => Ok(name),
        _ => Err(ApiError::Invalid(faults).into()),
    }
}

fn check_facts(facts: &NodeFacts, faults: &mut Vec<Fault>) {
    let texts = [
        &facts.vm_size,
        &facts.image,
        &facts.boot_id,
        &facts.root,
        &facts.storage_root,
        &facts.storage_failure,
        &facts.agent_version,
        &facts.isolation,
    ];
    let gpus = facts.gpus.iter().flat_map(|gpu| [&gpu.uuid, &gpu.model]);
    let long = texts.into_iter().chain(gpus).chain(&facts.addresses);
    if long.into_iter().any(|text| text.len() > TEXT_BYTES_MAX) {
        faults.push(Fault::new(
            "hello.facts",
            format!("texts have at most {TEXT_BYTES_MAX} bytes"),
        ));
    }
    let longest = [
        facts.gpus.len(),
        facts.addresses.len(),
        facts.disks.len(),
        facts.numa_nodes.len(),
        facts.rdma_devices.len(),
    ];
    if facts.encoded_len() > FACTS_BYTES_MAX {
        faults.push(Fault::new("hello.facts", "are larger than facts can be"));
    }
    if longest.into_iter().any(|length| length > LIST_MAX) {
        faults.push(Fault::new(
            "hello.facts",
            format!("lists have at most {LIST_MAX} elements"),
        ));
    }
    let ports = (1..=65_535).contains(&facts.first_port)
        && (1..=65_535).contains(&facts.last_port)
        && facts.first_port <= facts.last_port;
    if !ports {
        faults.push(Fault::new(
            "hello.facts.first_port",
            "must begin a range of ports",
        ));
    }
    if facts.vm_size.is_empty() || facts.boot_id.is_empty() || facts.addresses.is_empty() {
        faults.push(Fault::new(
            "hello.facts",
            "vm_size, boot_id and addresses must be given",
        ));
    }
}

/// The same for what another replica has made of it.
pub fn check_register(register: &RegisterNode) -> Result<(), Status> {
    let mut faults = Vec::new();
    for (field, text) in [
        ("register_node.name", &register.name),
        ("register_node.uid", &register.uid),
        ("register_node.incarnation", &register.incarnation),
    ] {
        if text.len() > 2 * TEXT_BYTES_MAX {
            faults.push(Fault::new(field, "is too long"));
        }
    }
    check_facts(
        register.facts.as_ref().unwrap_or(&NodeFacts::default()),
        &mut faults,
    );
    match faults.is_empty() {
        true => Ok(()),
        false => Err(ApiError::Invalid(faults).into()),
    }
}
