//! The clocks of machines: one for people, which may jump, and one that counts from the machine's start, which may go too fast or too
//! slow.

use super::{STEP_MS, Sim};

/// How far a clock for people is off at most: requests are remembered for an hour of it.
const OFF_MAX_MS: i64 = 10 * 60 * 1000;
/// How much a clock that counts goes wrong at most, in thousandths: two of them go apart by less than leases allow for.
const DRIFT_MAX: i64 = 4;

/// The clocks of a machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Milliseconds by which the one for people is off.
    off: i64,
    /// Thousandths by which the other one is too fast.
    drift: i64,
    /// What that one showed when everything began.
    first: i64,
}

impl Clock {
    pub fn draw(random: &mut fastrand::Rng, wrong: bool) -> Clock {
        let drift = random.i64(-DRIFT_MAX..=DRIFT_MAX);
        Clock {
            off: 0,
            drift: if wrong { drift } else { 0 },
            first: random.i64(0..1_000_000_000),
        }
    }

    fn passed(step: u64) -> i64 {
        step as i64 * STEP_MS
    }

    /// Milliseconds since 1970, as the machine believes.
    pub fn wall(&self, step: u64) -> i64 {
        1_000_000_000 + Clock::passed(step) + self.off
    }

    /// Milliseconds since some time of its own.
    pub fn boot(&self, step: u64) -> i64 {
        let passed = Clock::passed(step);
        self.first + passed + passed * self.drift / 1000
    }
}

impl Sim {
    /// The clock of a machine jumps.
    pub(super) fn jump(&mut self, id: u64) {
        let off = self.random.i64(-OFF_MAX_MS..=OFF_MAX_MS);
        let replica = self.replica(id);
        let back = off < replica.clock.off;
        let leads = replica.core.as_ref().is_some_and(|core| core.leads());
        replica.clock.off = off;
        if leads && back {
            self.checks.saw("the clock of a leader jumps back");
        }
    }
}
