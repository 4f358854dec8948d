//! The faults, where they were drawn from, and who must notice them. Where each is in the sources says its name. Nothing is run here.

use Drawn::{Code, Rules};
use Judge::{Agent, Coordinator, Damage, Disk, Simulator};

/// What a fault was thought of from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    /// The code alone, without a look at what is checked.
    Code,
    /// The rules of the design, or code that has its tests beside it.
    Rules,
}

/// A program of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Judge {
    Coordinator,
    Agent,
    Simulator,
    Damage,
    Disk,
}

/// Name, origin, and the judges, one after the other, until one notices it.
pub type Fault = (&'static str, Drawn, &'static [Judge]);

pub const FAULTS: &[Fault] = &[
    ("plan_of_an_older_job", Code, &[Coordinator, Simulator]),
    (
        "nodes_not_checked_when_placed",
        Rules,
        &[Coordinator, Simulator],
    ),
    (
        "port_not_checked_when_placed",
        Code,
        &[Coordinator, Simulator],
    ),
    ("gang_in_part", Rules, &[Coordinator, Simulator]),
    ("incarnation_ignored", Rules, &[Coordinator, Simulator]),
    ("attempt_id_ignored", Rules, &[Coordinator, Simulator]),
    ("word_after_the_last", Code, &[Coordinator, Simulator]),
    ("phase_goes_back", Code, &[Coordinator, Simulator]),
    ("ranks_of_others", Code, &[Coordinator, Simulator]),
    ("exit_code_changes", Code, &[Coordinator, Simulator]),
    ("secrets_kept_in_attempts", Code, &[Coordinator, Simulator]),
    (
        "ended_before_all_are_gone",
        Rules,
        &[Coordinator, Simulator],
    ),
    (
        "launched_before_all_are_ready",
        Code,
        &[Coordinator, Simulator],
    ),
    ("attempt_outlives_job", Code, &[Coordinator, Simulator]),
    ("retries_without_bound", Code, &[Coordinator, Simulator]),
    (
        "failed_runs_tried_without_bound",
        Code,
        &[Coordinator, Simulator],
    ),
    (
        "job_stays_among_the_running",
        Code,
        &[Coordinator, Simulator],
    ),
    ("requeued_in_no_queue", Code, &[Coordinator, Simulator]),
    ("queue_by_name", Code, &[Coordinator, Simulator]),
    ("reboot_loses_nothing", Code, &[Coordinator, Simulator]),
    ("assignments_not_renewed", Code, &[Coordinator, Simulator]),
    ("leaving_forgotten", Rules, &[Coordinator, Simulator]),
    (
        "released_node_stays_a_member",
        Rules,
        &[Coordinator, Simulator],
    ),
    ("node_of_two_clusters", Code, &[Coordinator, Simulator]),
    ("set_up_not_awaited", Code, &[Coordinator, Simulator]),
    (
        "set_up_retries_not_counted",
        Code,
        &[Coordinator, Simulator],
    ),
    ("cluster_deleted_with_jobs", Code, &[Coordinator, Simulator]),
    ("request_applied_twice", Rules, &[Coordinator, Simulator]),
    (
        "request_remembered_for_ever",
        Code,
        &[Coordinator, Simulator],
    ),
    ("last_voter_removed", Code, &[Coordinator, Simulator]),
    ("removed_id_used_again", Code, &[Coordinator, Simulator]),
    ("another_store_taken", Code, &[Coordinator, Simulator]),
    ("removed_replica_counted", Rules, &[Coordinator, Simulator]),
    (
        "membership_answered_at_once",
        Rules,
        &[Coordinator, Simulator],
    ),
    ("granted_before_the_state", Rules, &[Coordinator, Simulator]),
    (
        "lone_replica_keeps_its_agents",
        Code,
        &[Coordinator, Simulator],
    ),
    ("unknown_level_taken", Rules, &[Coordinator, Simulator]),
    (
        "written_without_a_majority",
        Code,
        &[Coordinator, Simulator],
    ),
    ("time_goes_back", Code, &[Coordinator, Simulator]),
    ("held_not_counted_down", Code, &[Coordinator, Simulator]),
    ("digest_without_nodes", Rules, &[Coordinator, Simulator]),
    (
        "snapshot_without_requests",
        Rules,
        &[Coordinator, Simulator],
    ),
    ("port_given_twice", Rules, &[Coordinator, Simulator]),
    ("queue_overtaken", Code, &[Coordinator, Simulator]),
    (
        "slow_preparation_never_ends",
        Code,
        &[Coordinator, Simulator],
    ),
    ("launch_waits_for_ever", Rules, &[Coordinator]),
    ("one_node_too_many", Code, &[Coordinator, Simulator]),
    ("vote_forgotten", Rules, &[Coordinator, Simulator]),
    ("no_check_quorum", Rules, &[Coordinator, Simulator]),
    ("no_pre_vote", Rules, &[Coordinator, Simulator]),
    ("read_without_asking", Rules, &[Coordinator, Simulator]),
    ("log_not_written", Code, &[Coordinator, Simulator]),
    ("read_before_applied", Code, &[Coordinator, Simulator]),
    ("answer_of_another_term", Code, &[Coordinator, Simulator]),
    ("lost_proposals_not_told", Code, &[Coordinator, Simulator]),
    (
        "snapshot_index_off_by_one",
        Rules,
        &[Coordinator, Simulator],
    ),
    ("state_not_from_snapshot", Code, &[Coordinator, Simulator]),
    ("another_state_goes_on", Code, &[Coordinator, Simulator]),
    ("minority_decides", Code, &[Coordinator, Simulator]),
    (
        "membership_changed_though_rejected",
        Rules,
        &[Coordinator, Simulator],
    ),
    ("hand_over_while_behind", Rules, &[Coordinator, Simulator]),
    (
        "vote_for_one_that_is_behind",
        Code,
        &[Coordinator, Simulator],
    ),
    ("overlap_off_by_one", Rules, &[Coordinator, Simulator]),
    ("begin_off_by_one", Rules, &[Coordinator, Simulator]),
    ("snapshot_for_a_stranger", Rules, &[Coordinator, Simulator]),
    ("log_not_synced", Rules, &[Coordinator, Disk]),
    ("witness_not_written", Rules, &[Coordinator, Damage]),
    ("witness_promises_what_goes", Code, &[Coordinator, Damage]),
    ("whole_chunk_truncated", Code, &[Coordinator, Damage]),
    ("checksum_not_checked", Rules, &[Coordinator, Damage]),
    ("older_witness_counts", Rules, &[Coordinator, Damage]),
    ("not_swept", Rules, &[Agent, Simulator]),
    ("not_stopped", Rules, &[Agent, Simulator]),
    ("started_again", Rules, &[Agent, Simulator]),
    ("loss_not_told", Rules, &[Agent, Simulator]),
    ("loss_told_before_swept", Rules, &[Agent, Simulator]),
    ("strays_ended", Rules, &[Agent]),
    ("begun_without_a_lease", Rules, &[Agent]),
    ("begun_beside_what_ends", Rules, &[Agent]),
    ("lease_counted_from_the_latest_heartbeat", Rules, &[Agent]),
    ("fence_not_watched", Rules, &[Agent, Simulator]),
    ("gap_between_leases_not_seen", Rules, &[Agent, Simulator]),
    ("granted_without_a_majority", Rules, &[Coordinator]),
    ("granted_in_another_term", Rules, &[Coordinator]),
    ("new_leader_does_not_wait", Rules, &[Coordinator]),
    ("what_waits_is_lost", Rules, &[Coordinator]),
    ("longest_lease_shortened", Rules, &[Coordinator]),
    (
        "placed_before_the_restore_is_accepted",
        Rules,
        &[Coordinator],
    ),
    ("adopted_in_part", Rules, &[Coordinator]),
    ("told_by_an_older_list", Rules, &[Coordinator]),
    ("revisions_used_again", Rules, &[Coordinator]),
];
