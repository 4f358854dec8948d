//! PURE. Compares the work a node shall do with what its journal shows, and says what to do and what to report.
//!
//! Level, not edge: it remembers nothing, so an agent that was killed at any line goes on from what lies there.

use batchai_common::limits::LAST_WORDS_BYTES_MAX;
use batchai_common::{attempt, fault, signals};
use batchai_proto::agent::v1::assignment::Desired;
use batchai_proto::agent::v1::{Assignment, AssignmentList, AttemptObservation, Failure};
use batchai_proto::v1::job_attempt_node::Phase as NodePhase;
use batchai_proto::v1::{JobLogFile, JobRank, NameValuePair, ResourceError};

use crate::status::{FailureRecord, Phase, Status};

const MESSAGE_CHARS_MAX: usize = 2000;
const DETAIL_CHARS_MAX: usize = 500;
const DETAILS_MAX: usize = 10;

/// An attempt as the journal shows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Local {
    pub attempt: String,
    /// A shim holds it now, or was started just now.
    pub shim: bool,
    /// A shim began it at some time: it must never begin again.
    pub started: bool,
    pub status: Option<Status>,
    pub launch_written: bool,
    pub stop_written: bool,
    /// No process of it is left, apart from what a live shim holds.
    pub swept: bool,
    /// Every log file has arrived at the coordinator, or nobody wants it.
    pub shipped: bool,
    /// What is left of it that a sweep could not end.
    pub unswept: Vec<i32>,
}

impl Local {
    /// The exit record is the last thing a shim writes, when nothing of the attempt runs any more.
    fn ended(&self) -> bool {
        self.status
            .as_ref()
            .is_some_and(|status| status.phase == Phase::Ended)
    }

    /// Its shim is gone and left no exit record.
    fn lost(&self) -> bool {
        self.started && !self.shim && !self.ended()
    }
}

/// What to do about an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write the plan and start the shim.
    Start(String),
    /// Hand the shim the processes.
    Launch(String),
    /// Tell the shim to end everything.
    Stop(String),
    /// End processes that a dead shim left.
    Sweep(String),
    /// Remove what the journal has of it.
    Forget(String),
}

/// Whether an attempt is of before a restore that the list comes after, and is not asked for: nobody knows whether it is wanted.
fn is_stray(list: &AssignmentList, attempt: &str) -> bool {
    let asked = list
        .assignments
        .iter()
        .any(|wanted| wanted.attempt == attempt);
    is_earlier(list, attempt) && !asked && !list.discarded.iter().any(|id| id == attempt)
}

fn is_earlier(list: &AssignmentList, attempt: &str) -> bool {
    attempt::epoch(attempt).is_some_and(|epoch| epoch < list.epoch)
}

/// What to do, in order. Work that is fenced begins and goes on only under a lease.
pub fn actions(list: &AssignmentList, local: &[Local], leased: bool) -> Vec<Action> {
    let mut actions = Vec::new();
    let desired = &list.assignments;
    let may_run = |wanted: &Assignment| leased || !wanted.fenced || fault!("begun_without_a_lease");
    // A node does one thing at a time: what it was told to end has ended first.
    let busy = local.iter().any(|found| {
        let asked = desired.iter().any(|wanted| wanted.attempt == found.attempt);
        !asked && (found.shim || (found.lost() && !found.swept))
    });
    let may_begin =
        |wanted: &Assignment| may_run(wanted) && (!busy || fault!("begun_beside_what_ends"));
    for found in local {
        let name = || found.attempt.clone();
        let wanted = desired
            .iter()
            .find(|wanted| wanted.attempt == found.attempt);
        let stop = wanted.is_none_or(|wanted| wanted.desired() == Desired::Stop);
        match wanted {
            _ if found.lost() && !found.swept && !fault!("not_swept") => {
                actions.push(Action::Sweep(name()))
            }
            None if is_stray(list, &found.attempt) && !fault!("strays_ended") => {}
            // Also where no shim is seen: one may be about to begin, and then finds that it must not.
            _ if stop
                && !fault!("not_stopped")
                && !found.stop_written
                && !found.ended()
                && !found.lost() =>
            {
                actions.push(Action::Stop(name()));
            }
            None if !found.shim && found.shipped => actions.push(Action::Forget(name())),
            Some(wanted) if wanted.desired() == Desired::Launch => {
                let ready = found
                    .status
                    .as_ref()
                    .is_some_and(|s| s.phase == Phase::Ready);
                if found.shim && ready && !found.launch_written && may_run(wanted) {
                    actions.push(Action::Launch(name()));
                }
            }
            // It was written down but never began.
            Some(wanted)
                if wanted.desired() == Desired::Prepare
                    && !found.shim
                    && (!found.started || fault!("started_again"))
                    && may_begin(wanted) =>
            {
                actions.push(Action::Start(name()));
            }
            _ => {}
        }
    }
    let known = |attempt: &str| local.iter().any(|found| found.attempt == attempt);
    // What was placed before a restore and is not known here may have ended since: it does not begin again.
    let new = desired.iter().filter(|wanted| {
        wanted.desired() == Desired::Prepare
            && !is_earlier(list, &wanted.attempt)
            && may_begin(wanted)
    });
    actions.extend(
        new.filter(|wanted| !known(&wanted.attempt))
            .map(|wanted| Action::Start(wanted.attempt.clone())),
    );
    actions
}

/// What is here of before a restore and not asked for, as it is: whoever decides about it must know of all. What a dead shim left and
/// nobody has swept yet may run.
pub fn strays(list: &AssignmentList, local: &[Local]) -> Vec<AttemptObservation> {
    let discarded = |found: &Local| list.discarded.contains(&found.attempt);
    let strays = local
        .iter()
        .filter(|found| is_stray(list, &found.attempt) || discarded(found));
    let told = |found: &Local| match found.lost() && !found.swept {
        true => Some(AttemptObservation {
            attempt: found.attempt.clone(),
            phase: NodePhase::Running as i32,
            stuck: found.unswept.clone(),
            ..AttemptObservation::default()
        }),
        false => observation(found),
    };
    strays.filter_map(told).collect()
}

/// What to report: everything the journal shows, and the absence of what it should show.
pub fn observations(list: &AssignmentList, local: &[Local]) -> Vec<AttemptObservation> {
    let desired = &list.assignments;
    // What has ended and is not asked for any more only waits for its logs to be shipped: nobody needs to hear of it.
    let asked = |found: &&Local| {
        let wanted = desired.iter().any(|wanted| wanted.attempt == found.attempt);
        wanted || (!found.ended() && !is_stray(list, &found.attempt))
    };
    let mut seen: Vec<_> = local.iter().filter(asked).filter_map(observation).collect();
    for wanted in desired {
        if local.iter().any(|found| found.attempt == wanted.attempt) {
            continue;
        }
        let phase = match wanted.desired() {
            // It never began here, and now it will not.
            Desired::Stop => NodePhase::Ended,
            // It was ready once, and nothing of it is left.
            Desired::Launch if fault!("loss_not_told") => continue,
            Desired::Launch => NodePhase::Lost,
            Desired::Prepare if is_earlier(list, &wanted.attempt) => NodePhase::Lost,
            Desired::Prepare | Desired::Unspecified => continue,
        };
        seen.push(AttemptObservation {
            attempt: wanted.attempt.clone(),
            phase: phase as i32,
            ..Default::default()
        });
    }
    seen
}

fn observation(found: &Local) -> Option<AttemptObservation> {
    // What a dead shim left may still run: nothing is said before it does not, but what it is.
    if found.lost() && !found.swept && !fault!("loss_told_before_swept") {
        let told = AttemptObservation {
            attempt: found.attempt.clone(),
            phase: NodePhase::Preparing as i32,
            stuck: found.unswept.clone(),
            ..AttemptObservation::default()
        };
        return (!found.unswept.is_empty()).then_some(told);
    }
    let status = found.status.clone().unwrap_or_default();
    let phase = match status.phase {
        _ if found.lost() => NodePhase::Lost,
        _ if !found.started && found.stop_written => NodePhase::Ended,
        Phase::Preparing => NodePhase::Preparing,
        Phase::Ready => NodePhase::Ready,
        Phase::Running => NodePhase::Running,
        Phase::Ended => NodePhase::Ended,
    };
    let rank = |r: &crate::status::RankStatus| JobRank {
        rank: r.rank,
        exit_code: r.exit_code,
        signal: r
            .signal
            .and_then(signals::name)
            .unwrap_or_default()
            .to_owned(),
    };
    let file = |(name, size): &(String, u64)| JobLogFile {
        name: name.clone(),
        size_bytes: *size as i64,
    };
    Some(AttemptObservation {
        attempt: found.attempt.clone(),
        phase: phase as i32,
        ranks: status.ranks.iter().map(rank).collect(),
        files: status.files.iter().map(file).collect(),
        failure: status.failure.map(failure),
        last_words: status.last_words,
        first_failed: status.first_failed,
        stuck: status.stuck,
    })
}

/// A report has a bound; what a failure quotes of a job has none.
pub fn failure(record: FailureRecord) -> Failure {
    let short = |text: String, most: usize| match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    };
    let details = record.details.into_iter().take(DETAILS_MAX);
    let details = details.map(|(name, value)| NameValuePair {
        // What a process said last is bounded where it is read: its end is what counts.
        value: match name.as_str() {
            "stderr" if value.len() <= LAST_WORDS_BYTES_MAX => value,
            _ => short(value, DETAIL_CHARS_MAX),
        },
        name: short(name, DETAIL_CHARS_MAX),
    });
    Failure {
        error: Some(ResourceError {
            code: record.code,
            message: short(record.message, MESSAGE_CHARS_MAX),
            details: details.collect(),
        }),
        exit_code: record.exit_code,
        infrastructure: record.infrastructure,
        ends_job: record.ends_job,
        undoes_success: record.undoes_success,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(desired: Desired) -> Vec<Assignment> {
        vec![Assignment {
            attempt: "a".into(),
            desired: desired as i32,
            ..Default::default()
        }]
    }

    /// A list of the second epoch, with an attempt of the first where it is asked for.
    fn second(asked: Option<Desired>, discarded: &[&str]) -> AssignmentList {
        let assignment = |desired| Assignment {
            attempt: "1-5".into(),
            desired: desired as i32,
            ..Default::default()
        };
        AssignmentList {
            assignments: asked.map(assignment).into_iter().collect(),
            epoch: 2,
            discarded: discarded.iter().map(|id| (*id).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn what_a_sweep_cannot_end_is_named_and_never_told_of_as_gone() {
        let found = Local {
            attempt: "1-1".to_owned(),
            started: true,
            unswept: vec![7],
            ..Local::default()
        };
        let seen = observation(&found).unwrap();
        assert_eq!((seen.phase(), seen.stuck), (NodePhase::Preparing, vec![7]));
        // Of before a restore it may run, whoever decides about it.
        let list = AssignmentList {
            epoch: 2,
            ..AssignmentList::default()
        };
        let stray = strays(&list, &[found]).remove(0);
        assert_eq!((stray.phase(), stray.stuck), (NodePhase::Running, vec![7]));
    }

    #[test]
    fn work_of_an_earlier_epoch_is_kept_and_reported_until_it_is_discarded() {
        let old = |phase, shim| Local {
            attempt: "1-5".into(),
            shipped: true,
            swept: true,
            ..found(phase, shim)
        };
        let unknown = second(None, &[]);
        for local in [
            old(Phase::Running, true),
            old(Phase::Ended, false),
            old(Phase::Running, false),
        ] {
            assert_eq!(actions(&unknown, std::slice::from_ref(&local), true), []);
            let seen = strays(&unknown, std::slice::from_ref(&local));
            assert_eq!(seen.len(), 1);
            assert!(observations(&unknown, std::slice::from_ref(&local)).is_empty());
            let first = AssignmentList {
                epoch: 1,
                ..unknown.clone()
            };
            assert!(strays(&first, std::slice::from_ref(&local)).is_empty());
            let unswept = Local {
                swept: false,
                ..local.clone()
            };
            let seen = strays(&unknown, &[unswept]);
            let may_run = local.lost() || local.shim;
            assert_eq!(seen[0].phase() == NodePhase::Running, may_run, "{local:?}");
            assert_ne!(actions(&first, &[local], true), []);
        }
        let discarded = second(None, &["1-5"]);
        let running = [old(Phase::Running, true)];
        assert_eq!(
            actions(&discarded, &running, true),
            [Action::Stop("1-5".into())]
        );
        assert_eq!(strays(&discarded, &running).len(), 1);
        let ended = [old(Phase::Ended, false)];
        assert_eq!(
            actions(&discarded, &ended, true),
            [Action::Forget("1-5".into())]
        );
        let adopted = second(Some(Desired::Launch), &[]);
        assert!(strays(&adopted, &running).is_empty());
        assert_eq!(observations(&adopted, &running).len(), 1);
    }

    #[test]
    fn fenced_work_begins_and_is_launched_under_a_lease_only() {
        let list = |desired, fenced| AssignmentList {
            assignments: vec![Assignment {
                fenced,
                ..wanted(desired)[0].clone()
            }],
            ..Default::default()
        };
        let ready = [found(Phase::Ready, true)];
        for (fenced, leased, runs) in [
            (true, false, false),
            (true, true, true),
            (false, false, true),
        ] {
            let begun = actions(&list(Desired::Prepare, fenced), &[], leased);
            assert_eq!(begun.is_empty(), !runs);
            let launched = actions(&list(Desired::Launch, fenced), &ready, leased);
            assert_eq!(launched.is_empty(), !runs);
        }
    }

    #[test]
    fn nothing_begins_before_what_is_not_asked_for_any_more_has_ended() {
        let list = AssignmentList {
            assignments: wanted(Desired::Prepare),
            ..Default::default()
        };
        let other = |phase, shim| Local {
            attempt: "b".into(),
            ..found(phase, shim)
        };
        let stop = Action::Stop("b".into());
        assert_eq!(actions(&list, &[other(Phase::Running, true)], true), [stop]);
        let lost = actions(&list, &[other(Phase::Running, false)], true);
        assert_eq!(lost, [Action::Sweep("b".into())]);
        let ended = actions(&list, &[other(Phase::Ended, false)], true);
        assert_eq!(ended, [Action::Start("a".into())]);
    }

    #[test]
    fn what_was_placed_before_a_restore_and_is_not_here_does_not_begin_again() {
        let list = second(Some(Desired::Prepare), &[]);
        assert_eq!(actions(&list, &[], true), []);
        assert_eq!(observations(&list, &[])[0].phase(), NodePhase::Lost);
        let now = AssignmentList { epoch: 1, ..list };
        assert_eq!(actions(&now, &[], true), [Action::Start("1-5".into())]);
    }

    fn found(phase: Phase, shim: bool) -> Local {
        Local {
            attempt: "a".into(),
            shim,
            started: true,
            status: Some(Status {
                phase,
                ..Status::default()
            }),
            ..Local::default()
        }
    }

    fn check(
        desired: &[Assignment],
        local: &[Local],
        expected: &[Action],
        phase: Option<NodePhase>,
    ) {
        let list = AssignmentList {
            assignments: desired.to_vec(),
            ..Default::default()
        };
        assert_eq!(
            actions(&list, local, true),
            expected,
            "{desired:?} {local:?}"
        );
        let seen = observations(&list, local);
        assert_eq!(
            seen.first().map(|o| o.phase()),
            phase,
            "{desired:?} {local:?}"
        );
    }

    #[test]
    fn the_way_of_an_attempt() {
        use Desired::{Launch, Prepare, Stop};
        let a = || "a".to_owned();
        let (ready, running) = (found(Phase::Ready, true), found(Phase::Running, true));
        check(&wanted(Prepare), &[], &[Action::Start(a())], None);
        let preparing = found(Phase::Preparing, true);
        check(
            &wanted(Prepare),
            &[preparing],
            &[],
            Some(NodePhase::Preparing),
        );
        check(
            &wanted(Prepare),
            std::slice::from_ref(&ready),
            &[],
            Some(NodePhase::Ready),
        );
        check(
            &wanted(Launch),
            std::slice::from_ref(&ready),
            &[Action::Launch(a())],
            Some(NodePhase::Ready),
        );
        let told = Local {
            launch_written: true,
            ..ready
        };
        check(&wanted(Launch), &[told], &[], Some(NodePhase::Ready));
        check(
            &wanted(Launch),
            std::slice::from_ref(&running),
            &[],
            Some(NodePhase::Running),
        );
        check(
            &wanted(Stop),
            std::slice::from_ref(&running),
            &[Action::Stop(a())],
            Some(NodePhase::Running),
        );
        let stopping = Local {
            stop_written: true,
            ..running
        };
        check(&wanted(Stop), &[stopping], &[], Some(NodePhase::Running));
        let ended = found(Phase::Ended, false);
        check(
            &wanted(Stop),
            std::slice::from_ref(&ended),
            &[],
            Some(NodePhase::Ended),
        );
        check(&[], std::slice::from_ref(&ended), &[], None);
        let shipped = Local {
            shipped: true,
            ..ended
        };
        check(&[], &[shipped], &[Action::Forget(a())], None);
    }

    #[test]
    fn a_failure_quotes_no_more_than_a_report_may_hold() {
        let long = "ü".repeat(100_000);
        let record = FailureRecord {
            message: long.clone(),
            details: vec![(long.clone(), long); 50],
            ..FailureRecord::default()
        };
        let error = failure(record).error.unwrap();
        let details: usize = error
            .details
            .iter()
            .map(|d| d.name.len() + d.value.len())
            .sum();
        assert!(error.message.len() + details < 32 << 10);
    }

    #[test]
    fn an_agent_that_comes_back_goes_on_from_what_lies_there() {
        use Desired::{Launch, Prepare, Stop};
        let a = || "a".to_owned();
        // Written down, but the shim never began.
        let written = Local {
            attempt: a(),
            ..Local::default()
        };
        check(
            &wanted(Prepare),
            &[written],
            &[Action::Start(a())],
            Some(NodePhase::Preparing),
        );
        // The shim died: first its processes go, then the loss is told, and it never begins again.
        let lost = found(Phase::Running, false);
        check(
            &wanted(Launch),
            std::slice::from_ref(&lost),
            &[Action::Sweep(a())],
            None,
        );
        let swept = Local {
            swept: true,
            ..lost
        };
        check(
            &wanted(Launch),
            std::slice::from_ref(&swept),
            &[],
            Some(NodePhase::Lost),
        );
        check(&wanted(Prepare), &[swept], &[], Some(NodePhase::Lost));
        // It never began, and must not any more.
        let written = Local {
            attempt: a(),
            ..Local::default()
        };
        check(
            &wanted(Stop),
            std::slice::from_ref(&written),
            &[Action::Stop(a())],
            Some(NodePhase::Preparing),
        );
        let told = Local {
            stop_written: true,
            ..written
        };
        check(&wanted(Stop), &[told], &[], Some(NodePhase::Ended));
        // Work that nobody wants any more.
        let running = found(Phase::Running, true);
        check(
            &[],
            &[running],
            &[Action::Stop(a())],
            Some(NodePhase::Running),
        );
        // Nothing is left of what should run.
        check(&wanted(Launch), &[], &[], Some(NodePhase::Lost));
        check(&wanted(Stop), &[], &[], Some(NodePhase::Ended));
    }
}
