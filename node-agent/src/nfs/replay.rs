//! Answers to calls that a client may send once more: whether a name was made or removed is asked after a broken connection, and the answer
//! is what it was the first time.
//!
//! It lasts as long as the process. A client whose call was done just before the server was cut down is told that the name is there, or is
//! gone, already: so it is with every server of this protocol.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

/// How many answers are kept.
const ANSWERS_MAX: usize = 2048;

type Key = (IpAddr, u32, u64);

#[derive(Default)]
struct Answers {
    /// None: it is being done.
    of: HashMap<Key, Option<Vec<u8>>>,
    oldest: VecDeque<Key>,
}

/// The answers of late.
#[derive(Default)]
pub struct Replay {
    answers: Mutex<Answers>,
}

impl Replay {
    /// Does something, if the same call has not been made before. None: it is being done now, and whoever asked first is answered.
    pub fn once(
        &self,
        client: IpAddr,
        xid: u32,
        call: &[u8],
        work: impl FnOnce() -> Vec<u8>,
    ) -> Option<Vec<u8>> {
        let mut hasher = DefaultHasher::new();
        call.hash(&mut hasher);
        let key = (client, xid, hasher.finish());
        let lock = || self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut answers = lock();
        if let Some(known) = answers.of.get(&key) {
            return known.clone();
        }
        if answers.oldest.len() >= ANSWERS_MAX
            && let Some(oldest) = answers.oldest.pop_front()
        {
            answers.of.remove(&oldest);
        }
        answers.of.insert(key, None);
        answers.oldest.push_back(key);
        drop(answers);
        let answer = work();
        if let Some(known) = lock().of.get_mut(&key) {
            *known = Some(answer.clone());
        }
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_done_once() {
        let replay = Replay::default();
        let client = IpAddr::from([10, 0, 0, 1]);
        let ask =
            |client, xid, call: &[u8], answer: u8| replay.once(client, xid, call, || vec![answer]);
        assert_eq!(ask(client, 1, b"a", 1), Some(vec![1]));
        assert_eq!(ask(client, 1, b"a", 2), Some(vec![1]), "the same call");
        assert_eq!(ask(client, 1, b"b", 3), Some(vec![3]));
        assert_eq!(ask(client, 2, b"a", 4), Some(vec![4]));
        let other = IpAddr::from([10, 0, 0, 2]);
        assert_eq!(ask(other, 1, b"a", 5), Some(vec![5]));
        let within = replay.once(client, 9, b"", || {
            assert_eq!(ask(client, 9, b"", 7), None, "it is being done");
            vec![8]
        });
        assert_eq!(within, Some(vec![8]));
        for xid in 10..10 + ANSWERS_MAX as u32 {
            ask(client, xid, b"", 0);
        }
        assert_eq!(ask(client, 1, b"a", 6), Some(vec![6]), "long ago");
        assert_eq!(replay.answers.lock().unwrap().of.len(), ANSWERS_MAX);
    }
}
