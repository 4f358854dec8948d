//! PURE. The lease of this node, as its agent counts it: from the moment at which the heartbeat was sent that it was granted for.
//!
//! Work that may be begun anew elsewhere runs only while it lasts; its shims see to that, from the file that the agent keeps up.

use std::collections::VecDeque;

use batchai_common::fault;

/// Heartbeats that may wait for an answer; who gets none for longer has no session.
const UNANSWERED_MAX: usize = 64;

/// All times are milliseconds of the boot clock.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The number of the latest heartbeat.
    latest: u64,
    /// Number and time of those that have no answer.
    sent: VecDeque<(u64, i64)>,
    held: Held,
}

/// For how long a node has held leases without a gap, and until when it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub since: i64,
    pub until: i64,
}

impl Lease {
    /// That of an agent that begins now. Its numbers go on behind those of the agents before it: an answer to one of theirs is none to it.
    pub fn new(now: i64) -> Lease {
        Lease {
            latest: u64::try_from(now).unwrap_or_default(),
            sent: VecDeque::new(),
            held: Held::default(),
        }
    }

    /// The number of a heartbeat that is sent now.
    pub fn beat(&mut self, now: i64) -> u64 {
        self.latest += 1;
        self.sent.push_back((self.latest, now));
        if self.sent.len() > UNANSWERED_MAX {
            self.sent.pop_front();
        }
        self.latest
    }

    /// A heartbeat was granted a lease. Returns what is held now, where that lasts longer than was known.
    pub fn granted(&mut self, number: u64, lease_ms: i64) -> Option<Held> {
        let at = self.sent.iter().position(|(sent, _)| *sent == number)?;
        let (_, sent) = self.sent[at];
        let sent = match fault!("lease_counted_from_the_latest_heartbeat") {
            true => self.sent.back().map_or(sent, |(_, at)| *at),
            false => sent,
        };
        self.sent.drain(..=at);
        let until = sent.saturating_add(lease_ms);
        if until <= self.held.until {
            return None;
        }
        let since = match sent > self.held.until {
            true => sent,
            false => self.held.since,
        };
        self.held = Held { since, until };
        Some(self.held)
    }
}

/// Until when an attempt that may be begun anew elsewhere runs on this host: as its shim counts it, from what is written down.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fence {
    /// The end of the lease, as far as was last looked.
    until: Option<i64>,
}

impl Fence {
    /// How long it lasts without another look; not at all before the first.
    pub fn left(&self, now: i64) -> i64 {
        self.until
            .map_or(0, |until| until.saturating_sub(now).max(0))
    }

    /// Takes in what is written down, nothing where that cannot be read. Returns whether the attempt may go on.
    pub fn look(&mut self, now: i64, written: Option<Held>) -> bool {
        if fault!("fence_not_watched") {
            return true;
        }
        // A lease that began when the last known was over leaves a gap, in which the attempt may have begun elsewhere.
        let follows = |held: &Held| {
            self.until.is_none_or(|known| held.since <= known)
                || fault!("gap_between_leases_not_seen")
        };
        let held = written.filter(|held| now < held.until && follows(held));
        if let Some(held) = held {
            self.until = Some(held.until);
        }
        held.is_some()
    }
}

/// As many bytes as what is written down has, whatever it says: it is written over in place, also where the disk is full.
pub const WRITTEN_BYTES: usize = 60;

/// What is written down for shims.
pub fn written(held: Held) -> String {
    let text = format!("{:024} {:024}", held.since, held.until);
    let sum = crc32fast::hash(text.as_bytes());
    format!("{text} {sum:010}")
}

/// Reads it; nothing where it is not whole.
pub fn read(text: &str) -> Option<Held> {
    let (rest, sum) = text.get(..WRITTEN_BYTES)?.rsplit_once(' ')?;
    let (since, until) = rest.split_once(' ')?;
    let whole = sum.parse() == Ok(crc32fast::hash(rest.as_bytes()));
    let held = Held {
        since: since.parse().ok()?,
        until: until.parse().ok()?,
    };
    whole.then_some(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(since: i64, until: i64) -> Option<Held> {
        Some(Held { since, until })
    }

    #[test]
    fn a_lease_counts_from_when_its_heartbeat_was_sent() {
        let mut lease = Lease::new(100);
        let (first, second) = (lease.beat(100), lease.beat(200));
        assert_eq!(lease.granted(first, 1000), held(100, 1100));
        assert_eq!(lease.granted(first, 9000), None, "it was answered");
        assert_eq!(
            lease.granted(second, 500),
            None,
            "what is known lasts longer"
        );
        assert_eq!(lease.granted(77, 9000), None, "it was never sent");
        let third = lease.beat(300);
        assert_eq!(lease.granted(third, 1000), held(100, 1300));
        for at in 0..200 {
            lease.beat(1000 + at);
        }
        assert!(lease.sent.len() <= UNANSWERED_MAX);
    }

    #[test]
    fn a_gap_between_leases_is_known() {
        let mut lease = Lease::new(0);
        let first = lease.beat(100);
        assert_eq!(lease.granted(first, 1000), held(100, 1100));
        let late = lease.beat(1101);
        assert_eq!(lease.granted(late, 1000), held(1101, 2101));
    }

    #[test]
    fn a_fence_falls_with_the_lease_and_does_not_rise_again() {
        let mut fence = Fence::default();
        assert_eq!(fence.left(100), 0, "it must look");
        assert!(fence.look(100, held(100, 1100)));
        assert_eq!(fence.left(1000), 100);
        // The lease went on meanwhile.
        assert!(fence.look(1100, held(100, 2000)));
        assert_eq!(fence.left(2500), 0);
        for (what, written) in [
            ("it is over", held(100, 2000)),
            ("it cannot be read", None),
            ("there was a gap", held(2001, 3000)),
        ] {
            assert!(!fence.clone().look(2500, written), "{what}");
        }
        // It may have stood still while the lease was renewed without a gap.
        assert!(fence.look(2500, held(2000, 3000)));
        assert!(!Fence::default().look(100, None));
    }

    #[test]
    fn an_answer_to_an_earlier_agent_is_none_to_the_next() {
        let mut before = Lease::new(100);
        let number = before.beat(200);
        let mut lease = Lease::new(5000);
        lease.beat(5000);
        assert_eq!(lease.granted(number, 1000), None);
    }

    #[test]
    fn what_is_written_is_read_whole_or_not_at_all() {
        for known in [Held::default(), held(7, i64::MAX).unwrap()] {
            let text = written(known);
            assert_eq!(text.len(), WRITTEN_BYTES);
            assert_eq!(read(&text), Some(known));
            for length in 0..text.len() {
                assert_eq!(read(&text[..length]), None);
            }
            let changed = text.replacen('0', "1", 1);
            assert_eq!(read(&changed), None);
        }
    }
}
