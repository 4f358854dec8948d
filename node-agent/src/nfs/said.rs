//! The lines of the log that clients and file systems can cause without end: one a day of each kind, or of each kind about each client.
//!
//! The log is a file that grows as long as the server runs. What is left out here is nowhere.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many of those about clients. Of the others there are no more than kinds.
const LINES_MAX: usize = 64;
const PERIOD: Duration = Duration::from_secs(24 * 60 * 60);

type Line = (&'static str, Option<IpAddr>);

#[derive(Default)]
struct Said {
    since: Option<Instant>,
    lines: HashSet<Line>,
    about_clients: usize,
}

impl Said {
    fn may_say(&mut self, line: Line, now: Instant) -> bool {
        if self.since.is_none_or(|since| now - since >= PERIOD) {
            self.since = Some(now);
            self.lines.clear();
            self.about_clients = 0;
        }
        let about_client = usize::from(line.1.is_some());
        let left = self.about_clients + about_client <= LINES_MAX;
        let says = left && self.lines.insert(line);
        if says {
            self.about_clients += about_client;
        }
        says
    }
}

static SAID: LazyLock<Mutex<Said>> = LazyLock::new(Mutex::default);

/// Whether a line of a kind, about a client where it is about one, may be logged now. Who asks logs it.
pub fn may_say(kind: &'static str, client: Option<IpAddr>) -> bool {
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    said.may_say((kind, client), Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_an_end() {
        let mut said = Said::default();
        let now = Instant::now();
        let client = |n: u32| Some(IpAddr::V4(n.into()));
        assert!(said.may_say(("a", client(1)), now));
        assert!(!said.may_say(("a", client(1)), now + PERIOD / 2));
        assert!(!said.may_say(("a", client(1)), now), "said already");
        assert!(said.may_say(("b", client(1)), now));
        assert!(said.may_say(("a", None), now));
        let more = (2..1000).filter(|n| said.may_say(("a", client(*n)), now));
        assert_eq!(more.count(), LINES_MAX - 2);
        assert!(said.may_say(("b", None), now), "there is room for the rest");
        assert!(said.may_say(("a", client(1)), now + PERIOD));
    }
}
