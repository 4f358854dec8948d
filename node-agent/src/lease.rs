//! PURE. The lease of this node, as its agent counts it: from the moment at which the heartbeat was sent that it was granted for.
//!
//! Work that may be begun anew elsewhere runs only while it lasts; its shims see to that, from the file that the agent keeps up.

use std::collections::VecDeque;

/// Heartbeats that may wait for an answer; who gets none for longer has no session.
const UNANSWERED_MAX: usize = 64;

/// All times are milliseconds of the boot clock.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    /// The number of the latest heartbeat.
    latest: u64,
    /// Number and time of those that have no answer.
    sent: VecDeque<(u64, i64)>,
    until: i64,
}

impl Lease {
    /// The number of a heartbeat that is sent now.
    pub fn beat(&mut self, now: i64) -> u64 {
        self.latest += 1;
        self.sent.push_back((self.latest, now));
        if self.sent.len() > UNANSWERED_MAX {
            self.sent.pop_front();
        }
        self.latest
    }

    /// A heartbeat was granted a lease. Returns until when it lasts, where that is later than was known.
    pub fn granted(&mut self, number: u64, lease_ms: i64) -> Option<i64> {
        let at = self.sent.iter().position(|(sent, _)| *sent == number)?;
        let (_, sent) = self.sent[at];
        self.sent.drain(..=at);
        let until = sent.saturating_add(lease_ms);
        (until > self.until).then(|| {
            self.until = until;
            until
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_from_when_its_heartbeat_was_sent() {
        let mut lease = Lease::default();
        let (first, second) = (lease.beat(100), lease.beat(200));
        assert_eq!(lease.granted(first, 1000), Some(1100));
        assert_eq!(lease.granted(first, 9000), None, "it was answered");
        assert_eq!(
            lease.granted(second, 500),
            None,
            "what is known lasts longer"
        );
        assert_eq!(lease.granted(77, 9000), None, "it was never sent");
        let third = lease.beat(300);
        assert_eq!(lease.granted(third, 1000), Some(1300));
        for at in 0..200 {
            lease.beat(1000 + at);
        }
        assert!(lease.sent.len() <= UNANSWERED_MAX);
    }
}
