//! Answers to calls that a client may send once more: whether a name was made or removed is asked after a broken connection, and the answer
//! is what it was the first time.
//!
//! Each client has a number of answers of its own, so that others who are busy do not have them forgotten. It lasts as long as the process.
//! A client whose call was done just before the server was cut down is told that the name is there, or is gone, already: so it is with every
//! server of this protocol.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::clients::CALLS_OF_ONE;

/// How many answers are kept for a client. They are a few hundred bytes each.
const ANSWERS_OF_ONE: usize = 128;
// Those that are being done are kept, and there is room for others.
const _: () = assert!(ANSWERS_OF_ONE > CALLS_OF_ONE);

/// The number of a call, and what stands for the rest of it.
type Key = (u32, u64);

#[derive(Default)]
struct Answers {
    /// None: it is being done.
    of: HashMap<Key, Option<Vec<u8>>>,
    oldest: VecDeque<Key>,
}

impl Answers {
    /// Has room for one more, if need be in the place of the oldest that is not being done.
    fn make_room(&mut self) {
        if self.oldest.len() < ANSWERS_OF_ONE {
            return;
        }
        let done = |key: &Key| !matches!(self.of.get(key), Some(None));
        if let Some(at) = self.oldest.iter().position(done)
            && let Some(key) = self.oldest.remove(at)
        {
            self.of.remove(&key);
        }
    }
}

/// The answers of late.
#[derive(Default)]
pub struct Replay {
    answers: Mutex<HashMap<IpAddr, Answers>>,
}

/// A call that is being done. Where that panics it is as if it had never come.
struct Doing<'a> {
    replay: &'a Replay,
    client: IpAddr,
    key: Key,
}

impl Drop for Doing<'_> {
    fn drop(&mut self) {
        let mut all = self.replay.lock();
        if let Some(answers) = all.get_mut(&self.client)
            && let Some(None) = answers.of.get(&self.key)
        {
            answers.of.remove(&self.key);
            answers.oldest.retain(|key| *key != self.key);
        }
    }
}

impl Replay {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Answers>> {
        // Every change is one step.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
        let key = (xid, hasher.finish());
        let mut all = self.lock();
        let answers = all.entry(client).or_default();
        if let Some(known) = answers.of.get(&key) {
            return known.clone();
        }
        answers.make_room();
        answers.of.insert(key, None);
        answers.oldest.push_back(key);
        drop(all);
        let doing = Doing {
            replay: self,
            client,
            key,
        };
        let answer = work();
        let mut all = self.lock();
        let known = all.get_mut(&client).and_then(|own| own.of.get_mut(&key));
        if let Some(known) = known {
            *known = Some(answer.clone());
        }
        drop(all);
        drop(doing);
        Some(answer)
    }

    /// Forgets those that are no clients any more.
    pub fn keep(&self, is_client: impl Fn(IpAddr) -> bool) {
        self.lock().retain(|address, _| is_client(*address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn ask(replay: &Replay, client: IpAddr, xid: u32, call: &[u8], answer: u8) -> Option<Vec<u8>> {
        replay.once(client, xid, call, || vec![answer])
    }

    #[test]
    fn a_call_is_done_once() {
        let replay = Replay::default();
        let ask = |client, xid, call: &[u8], answer| ask(&replay, client, xid, call, answer);
        assert_eq!(ask(CLIENT, 1, b"a", 1), Some(vec![1]));
        assert_eq!(ask(CLIENT, 1, b"a", 2), Some(vec![1]), "the same call");
        assert_eq!(ask(CLIENT, 1, b"b", 3), Some(vec![3]));
        assert_eq!(ask(CLIENT, 2, b"a", 4), Some(vec![4]));
        assert_eq!(ask(OTHER, 1, b"a", 5), Some(vec![5]));
        for xid in 10..10 + ANSWERS_OF_ONE as u32 {
            ask(CLIENT, xid, b"", 0);
        }
        assert_eq!(ask(CLIENT, 1, b"a", 6), Some(vec![6]), "long ago");
        assert_eq!(replay.lock()[&CLIENT].of.len(), ANSWERS_OF_ONE);
        replay.keep(|client| client == OTHER);
        assert_eq!(replay.lock().len(), 1);
    }

    #[test]
    fn who_is_busy_has_only_its_own_answers_forgotten() {
        let replay = Replay::default();
        assert_eq!(ask(&replay, CLIENT, 1, b"a", 1), Some(vec![1]));
        for xid in 0..10_000 {
            ask(&replay, OTHER, xid, b"", 0);
        }
        assert_eq!(ask(&replay, CLIENT, 1, b"a", 2), Some(vec![1]));
        assert_eq!(replay.lock()[&OTHER].of.len(), ANSWERS_OF_ONE);
    }

    #[test]
    fn what_is_being_done_is_not_done_a_second_time() {
        let replay = Replay::default();
        let answered = replay.once(CLIENT, 9, b"", || {
            for xid in 10..10 + 2 * ANSWERS_OF_ONE as u32 {
                ask(&replay, CLIENT, xid, b"", 0);
            }
            assert_eq!(ask(&replay, CLIENT, 9, b"", 7), None, "it is being done");
            vec![8]
        });
        assert_eq!(answered, Some(vec![8]));
        assert_eq!(ask(&replay, CLIENT, 9, b"", 7), Some(vec![8]));
        let panics = || replay.once(CLIENT, 1, b"", || panic!("as it is tried"));
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
        assert_eq!(ask(&replay, CLIENT, 1, b"", 3), Some(vec![3]));
    }
}
