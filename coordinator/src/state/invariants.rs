//! PURE. What must hold of every State, by name. Tests and simulations check all of it after every step.

use super::attempts::{Phase, Work};
use super::jobs::INFRASTRUCTURE_RETRIES_MAX;
use super::{Attempt, Job, State, keys};
use batchai_common::attempt;
use batchai_common::names::{self, Kind};

/// Returns the first invariant that does not hold, and for what.
pub fn check(state: &State) -> Result<(), String> {
    parents_exist(state)?;
    queue_holds_exactly_the_queued_jobs(state)?;
    members_and_nodes_agree(state)?;
    nodes_and_attempts_agree(state)?;
    ended_jobs_are_whole(state)?;
    retries_have_a_bound(state)?;
    what_is_being_deleted_exists(state)?;
    secrets_are_sealed_and_forgotten(state)?;
    grants_and_bindings_agree(state)?;
    workspaces_hold_what_is_counted(state)?;
    strays_are_of_earlier_epochs(state)?;
    ports_are_unique_per_machine(state)
}

/// And nothing that it holds is new: that is refused when it is made.
fn what_is_being_deleted_exists(state: &State) -> Result<(), String> {
    for name in &state.deleting {
        let kind = names::Kind::of(name);
        if !kind.is_some_and(|kind| state.contains(kind, name)) {
            return Err(format!("what_is_being_deleted_exists: {name}"));
        }
    }
    let deleting = batchai_proto::v1::ProvisioningState::Deleting;
    let groups = state
        .resource_groups
        .iter()
        .map(|(n, r)| (n, r.provisioning_state()));
    let workspaces = state
        .workspaces
        .iter()
        .map(|(n, r)| (n, r.provisioning_state()));
    let experiments = state
        .experiments
        .iter()
        .map(|(n, r)| (n, r.provisioning_state()));
    for (name, provisioning) in groups.chain(workspaces).chain(experiments) {
        if (provisioning == deleting) != state.deleting.contains(name) {
            return Err(format!("what_is_being_deleted_exists: {name}"));
        }
    }
    for (name, cluster) in &state.clusters {
        if cluster.deleting.is_some() != state.deleting.contains(name) {
            return Err(format!("what_is_being_deleted_exists: {name}"));
        }
    }
    Ok(())
}

fn parents_exist(state: &State) -> Result<(), String> {
    let orphan = |name: &str| format!("parents_exist: {name}");
    for name in state.workspaces.keys() {
        let parent = names::parent(name).unwrap_or_default();
        state
            .resource_groups
            .get(parent)
            .ok_or_else(|| orphan(name))?;
    }
    let held = state.clusters.keys().chain(state.experiments.keys());
    for name in held.chain(state.file_servers.keys()) {
        let parent = names::parent(name).unwrap_or_default();
        state.workspaces.get(parent).ok_or_else(|| orphan(name))?;
    }
    for (name, job) in &state.jobs {
        let parent = names::parent(name).unwrap_or_default();
        state.experiments.get(parent).ok_or_else(|| orphan(name))?;
        if !job.ended() {
            state
                .clusters
                .get(&job.spec.cluster)
                .ok_or_else(|| orphan(name))?;
        }
    }
    Ok(())
}

fn retries_have_a_bound(state: &State) -> Result<(), String> {
    let within = |job: &Job| {
        let allowed = job.spec.constraints.map_or(0, |c| c.max_retries);
        let counted = job.retries + job.infrastructure_retries;
        job.retries <= allowed
            && job.infrastructure_retries <= INFRASTRUCTURE_RETRIES_MAX
            && counted <= job.attempts
    };
    match state.jobs.iter().find(|(_, job)| !within(job)) {
        Some((name, _)) => Err(format!("retries_have_a_bound: {name}")),
        None => Ok(()),
    }
}

fn queue_holds_exactly_the_queued_jobs(state: &State) -> Result<(), String> {
    let mut queued = 0;
    for (name, cluster) in &state.clusters {
        for key in &cluster.queue {
            queued += 1;
            let job = state.jobs.get(&key.job);
            let right = job.is_some_and(|job| {
                job.state == batchai_proto::v1::job::State::Queued && &job.spec.cluster == name
            });
            if !right {
                return Err(format!("queue_holds_exactly_the_queued_jobs: {}", key.job));
            }
        }
    }
    let jobs = state
        .jobs
        .values()
        .filter(|j| j.state == batchai_proto::v1::job::State::Queued);
    match jobs.count() == queued {
        true => Ok(()),
        false => Err("queue_holds_exactly_the_queued_jobs: a queued job is in no queue".into()),
    }
}

fn members_and_nodes_agree(state: &State) -> Result<(), String> {
    for (name, node) in &state.nodes {
        let member = node.cluster.as_ref().is_none_or(|cluster| {
            state
                .clusters
                .get(cluster)
                .is_some_and(|cluster| cluster.members.contains(name))
        });
        if !member || (node.cluster.is_none() && (node.attempt.is_some() || node.leaving)) {
            return Err(format!("members_and_nodes_agree: {name}"));
        }
    }
    for (name, cluster) in &state.clusters {
        for member in &cluster.members {
            let node = state.nodes.get(member);
            if node.is_none_or(|node| node.cluster.as_ref() != Some(name)) {
                return Err(format!("members_and_nodes_agree: {member} of {name}"));
            }
        }
    }
    Ok(())
}

/// Every live attempt has all of its nodes, and every busy node is in the attempt it is busy with: no two jobs on one
/// node, gangs all or nothing, at most one live attempt of a job.
fn nodes_and_attempts_agree(state: &State) -> Result<(), String> {
    for (name, node) in &state.nodes {
        let Some(id) = &node.attempt else { continue };
        let attempt = state.attempts.get(id);
        if !attempt.is_some_and(|a| a.phase != Phase::Ended && part_of(a, name)) {
            return Err(format!(
                "nodes_and_attempts_agree: {name} is busy with {id}"
            ));
        }
    }
    for (id, attempt) in &state.attempts {
        let latest = match &attempt.work {
            Work::Job(job) => state
                .jobs
                .get(job.as_str())
                .and_then(|job| job.attempt.as_ref()),
            Work::SetUp => attempt.nodes.first().and_then(|n| {
                let setup = state.nodes.get(&n.node)?.setup.as_ref()?;
                Some(&setup.attempt)
            }),
        };
        if latest != Some(id) {
            return Err(format!("nodes_and_attempts_agree: {id} is not the latest"));
        }
        let held = |node: &String| {
            state
                .nodes
                .get(node)
                .is_some_and(|node| node.attempt.as_ref() == Some(id))
        };
        let live = attempt.phase != Phase::Ended;
        if attempt.nodes.iter().any(|n| held(&n.node) != live) {
            return Err(format!(
                "nodes_and_attempts_agree: {id} does not have its nodes"
            ));
        }
    }
    Ok(())
}

fn part_of(attempt: &Attempt, node: &str) -> bool {
    attempt.nodes.iter().any(|n| n.node == node)
}

fn ended_jobs_are_whole(state: &State) -> Result<(), String> {
    for (name, job) in &state.jobs {
        let live = job.attempt.as_ref().and_then(|id| state.attempts.get(id));
        let live = live.is_some_and(|attempt| attempt.phase != Phase::Ended);
        let running = matches!(
            job.state,
            batchai_proto::v1::job::State::Running | batchai_proto::v1::job::State::Terminating
        );
        let failed_says_why =
            job.state != batchai_proto::v1::job::State::Failed || !job.errors.is_empty();
        if live != running || job.ended() != job.end_time.is_some() || !failed_says_why {
            return Err(format!("ended_jobs_are_whole: {name} is {:?}", job.state));
        }
    }
    Ok(())
}

fn grants_and_bindings_agree(state: &State) -> Result<(), String> {
    for (member, name) in &state.grants {
        let binding = state.role_bindings.get(name);
        if binding.is_none_or(|binding| binding.member != *member) {
            return Err(format!("grants_and_bindings_agree: {name}"));
        }
    }
    match state.grants.len() == state.role_bindings.len() {
        true => Ok(()),
        false => Err("grants_and_bindings_agree: a binding is missing".to_owned()),
    }
}

fn workspaces_hold_what_is_counted(state: &State) -> Result<(), String> {
    let mut held = std::collections::BTreeMap::new();
    for kind in [Kind::Cluster, Kind::Experiment, Kind::FileServer, Kind::Job] {
        for name in state.names(kind, "", "") {
            *held
                .entry((keys::workspace_of(name).to_owned(), kind))
                .or_insert(0) += 1;
        }
    }
    match held
        .into_iter()
        .eq(state.held.iter().map(|(key, held)| (key.clone(), *held)))
    {
        true => Ok(()),
        false => Err("workspaces_hold_what_is_counted".to_owned()),
    }
}

/// Secrets are sealed by keys that are there, and there only as long as they are of use.
fn secrets_are_sealed_and_forgotten(state: &State) -> Result<(), String> {
    let wrong = |name: &str| Err(format!("secrets_are_sealed_and_forgotten: {name}"));
    for workspace in state.data_keys.keys() {
        if !state.workspaces.contains_key(workspace) {
            return wrong(workspace);
        }
    }
    let jobs = state.jobs.iter();
    let jobs = jobs.map(|(name, job)| (&**name, &job.spec.secrets, !job.ended()));
    let attempts = state.attempts.values().map(|attempt| {
        let open = attempt.phase != Phase::Ended;
        (attempt.spec.name.as_str(), &attempt.spec.secrets, open)
    });
    let clusters = state.clusters.iter().filter_map(|(name, cluster)| {
        let task = cluster.spec.node_setup.as_ref()?.setup_task.as_ref()?;
        Some((name.as_str(), &task.secrets, true))
    });
    for (name, secrets, open) in jobs.chain(attempts).chain(clusters) {
        for secret in secrets.iter().filter(|s| !s.value.is_empty()) {
            let workspace = keys::workspace_of(name);
            let sealed = keys::Sealed::parse(&secret.value);
            let key = sealed.and_then(|sealed| keys::find(state, workspace, &sealed.key));
            if !open || key.is_none() {
                return wrong(name);
            }
        }
    }
    Ok(())
}

/// And of nodes that are there, which do not do the same at the State's behest.
fn strays_are_of_earlier_epochs(state: &State) -> Result<(), String> {
    for (node, id) in state.strays.keys() {
        let earlier = attempt::epoch(id).is_some_and(|epoch| epoch < state.epoch);
        let held = state.nodes.get(node).map(|node| &node.attempt);
        if !earlier || held.is_none_or(|held| held.as_ref() == Some(id)) {
            return Err(format!("strays_are_of_earlier_epochs: {id} on {node}"));
        }
    }
    Ok(())
}

fn ports_are_unique_per_machine(state: &State) -> Result<(), String> {
    let mut seen = std::collections::BTreeSet::new();
    for (name, port) in super::attempts::ports_in_use(state) {
        let machine = state.nodes.get(name).map(|node| node.facts.boot_id.clone());
        if !seen.insert((machine, port)) {
            return Err(format!("ports_are_unique_per_machine: {port} of {name}"));
        }
    }
    Ok(())
}
