//! Times on the wire. Reading the clock happens here and in tests only; what is PURE takes times as arguments.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// The wall clock.
pub fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

/// Milliseconds since 1970, for comparing.
pub fn millis(time: &Timestamp) -> i64 {
    time.seconds
        .saturating_mul(1000)
        .saturating_add(i64::from(time.nanos) / 1_000_000)
}

/// The wall clock in milliseconds since 1970.
pub fn now_millis() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as i64)
}

/// A time from milliseconds since 1970.
pub fn from_millis(millis: i64) -> Timestamp {
    Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: (millis.rem_euclid(1000) * 1_000_000) as i32,
    }
}

/// The clock that durations are measured on where they matter to a process: it counts suspended time and never jumps.
pub fn boot_time() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("CLOCK_BOOTTIME exists on every Linux since 2.6.39");
    Duration::new(time.tv_sec() as u64, time.tv_nsec() as u32)
}

/// The same in milliseconds, as leases and contacts are counted.
pub fn boot_millis() -> i64 {
    boot_time().as_millis() as i64
}
