//! How much one caller may ask for: so many calls a second, and so many that are being answered, streams included.
//!
//! Callers are told apart by who they are; those who show nothing, by where they come from. Who has used up his share is told to
//! come again, and waits for nobody else's.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use batchai_common::error::ApiError;
use batchai_common::tls::acceptor::network;

/// Callers that are remembered. Where there are more, those with nothing to remember are forgotten first.
const CALLERS_MAX: usize = 10_000;
/// Seconds of calls that may come at once.
const BURST_S: u32 = 2;

/// What each caller may.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    /// Calls a second.
    pub rate: u32,
    /// Calls that are being answered.
    pub open: u32,
}

/// What callers use.
#[derive(Clone)]
pub struct Quota {
    shares: Shares,
    callers: Arc<Mutex<HashMap<String, Use>>>,
}

struct Use {
    /// When the calls so far would have come, had they come evenly.
    even: Instant,
    open: u32,
}

/// The right to be answered, until it is dropped.
pub struct Permit {
    quota: Quota,
    caller: String,
}

impl Quota {
    pub fn new(shares: Shares) -> Quota {
        Quota {
            shares,
            callers: Arc::default(),
        }
    }

    /// Takes a call of somebody in.
    pub fn enter(&self, caller: String) -> Result<Permit, ApiError> {
        self.enter_at(caller, Instant::now())
    }

    fn enter_at(&self, caller: String, now: Instant) -> Result<Permit, ApiError> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= CALLERS_MAX && !callers.contains_key(&caller) {
            callers.retain(|_, used| used.open > 0 || used.even > now);
            if callers.len() >= CALLERS_MAX {
                return Err(busy("the list of callers"));
            }
        }
        let fresh = || Use { even: now, open: 0 };
        let used = callers.entry(caller.clone()).or_insert_with(fresh);
        if used.open >= self.shares.open {
            return Err(busy("your share of open calls"));
        }
        let even = used.even.max(now) + Duration::from_secs(1) / self.shares.rate;
        if even > now + Duration::from_secs(1) * BURST_S {
            return Err(busy("your share of calls a second"));
        }
        used.even = even;
        used.open += 1;
        drop(callers);
        let quota = self.clone();
        Ok(Permit { quota, caller })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let callers = self.quota.callers.lock();
        let mut callers = callers.unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = callers.get_mut(&self.caller) {
            used.open = used.open.saturating_sub(1);
        }
    }
}

/// Whose share those use who show nothing: that of their network.
pub fn stranger(address: Option<SocketAddr>) -> String {
    let network = address.map(|address| network(address.ip()).to_string());
    network.unwrap_or_else(|| "nowhere".to_owned())
}

fn busy(what: &'static str) -> ApiError {
    ApiError::Busy { what }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARES: Shares = Shares { rate: 10, open: 3 };

    #[test]
    fn a_caller_gets_his_share_and_takes_no_other() {
        let quota = Quota::new(SHARES);
        let start = Instant::now();
        let enter =
            |who: &str, ms: u64| quota.enter_at(who.to_owned(), start + Duration::from_millis(ms));
        // A burst of two seconds, then one call every tenth of one.
        for _ in 0..20 {
            drop(enter("ada", 0).unwrap());
        }
        assert!(enter("ada", 0).is_err());
        assert!(enter("grace", 0).is_ok());
        assert!(enter("ada", 99).is_err());
        assert!(enter("ada", 101).is_ok());
        assert!(enter("ada", 102).is_err());
        // What is not used is not saved up for ever.
        let mut passed = 0;
        while enter("ada", 3_600_000).is_ok() {
            passed += 1;
        }
        assert_eq!(passed, 20);
        let held: Vec<_> = (0..3).map(|_| enter("alan", 0).unwrap()).collect();
        assert!(enter("alan", 0).is_err());
        drop(held);
        assert!(enter("alan", 0).is_ok());
    }

    #[test]
    fn those_who_have_used_nothing_lately_are_forgotten() {
        let quota = Quota::new(SHARES);
        let start = Instant::now();
        let held = quota.enter_at("first".to_owned(), start).unwrap();
        for i in 1..CALLERS_MAX {
            quota.enter_at(i.to_string(), start).unwrap();
        }
        assert!(quota.enter_at("one more".to_owned(), start).is_err());
        let later = start + Duration::from_secs(1);
        drop(quota.enter_at("one more".to_owned(), later).unwrap());
        let callers = quota.callers.lock().unwrap();
        assert!(callers.len() == 2 && callers["first"].open == 1);
        drop(callers);
        drop(held);
    }
}
