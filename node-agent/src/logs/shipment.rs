//! What one connection knows of log files, and what is to be sent on it next. It reads no file and has no clock.
//!
//! One file that floods holds up no other: files take turns, each may have so many pieces unanswered, and all of them together so
//! many.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use batchai_common::limits::LOG_CHUNK_BYTES_MAX;

/// Pieces of one file that were not answered yet.
const WINDOW: usize = 16;
/// Pieces of all files that were not answered yet: answers are small, and too many that nobody has read break a connection.
pub const IN_FLIGHT_MAX: usize = 64;
/// What nobody wants is offered again so often, and what could not be read is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Attempt and file.
pub type Key = (String, String);

/// What is to be sent. One without bytes asks how much is kept, and has it synced first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub key: Key,
    pub offset: u64,
    pub length: usize,
}

/// A file as it lies here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub size: u64,
    /// It grows no more.
    pub over: bool,
}

/// What the coordinator says of a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answer {
    pub stored: u64,
    pub synced: u64,
    pub unwanted: bool,
}

/// What an answer came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// It answered bytes, not a question.
    pub data: bool,
    /// All that the file has is safe there, or nobody wants it.
    pub settled: bool,
}

#[derive(Debug, Default)]
struct Sending {
    /// How far it was sent; nothing is sent before the first answer.
    sent: Option<u64>,
    asked: bool,
    /// Bytes that are kept there, and those of them that survive a power cut.
    stored: u64,
    synced: u64,
    size: u64,
    over: bool,
    unanswered: usize,
    /// Nobody wanted it then; it is asked again, for the coordinator may only have been behind.
    unwanted_since: Option<Instant>,
    /// It could not be read then.
    failed: Option<Instant>,
}

/// All files of one connection.
#[derive(Debug, Default)]
pub struct Shipment {
    files: BTreeMap<Key, Sending>,
    in_flight: usize,
    /// The file that had its turn last.
    last: Option<Key>,
}

impl Shipment {
    /// Takes in which files there are now.
    pub fn seen(&mut self, seen: BTreeMap<Key, Seen>) {
        self.files.retain(|key, file| {
            let present = seen.contains_key(key);
            // Nobody counts its answers any more.
            self.in_flight -= if present { 0 } else { file.unanswered };
            present
        });
        for (key, found) in seen {
            let file = self.files.entry(key).or_default();
            (file.size, file.over) = (found.size, found.over);
        }
    }

    /// The next piece, if any may be sent now. It comes again until it is `sent` or `failed`.
    pub fn next(&mut self, now: Instant) -> Option<Piece> {
        if self.in_flight >= IN_FLIGHT_MAX {
            return None;
        }
        let last = self.last.clone();
        let (behind, before) = match &last {
            Some(last) => (Bound::Excluded(last), Bound::Included(last)),
            None => (Bound::Unbounded, Bound::Unbounded),
        };
        let again = last.as_ref().map(|_| (Bound::Unbounded, before));
        let mut found = self.files.range::<Key, _>((behind, Bound::Unbounded));
        let due = found.find_map(|(key, file)| file.next(key, now));
        due.or_else(|| {
            let mut found = self.files.range::<Key, _>(again?);
            found.find_map(|(key, file)| file.next(key, now))
        })
    }

    /// A piece is on its way; it ends there, which may be further than was asked for where bytes are not kept any more.
    pub fn sent(&mut self, piece: &Piece, end: u64) {
        let Some(file) = self.files.get_mut(&piece.key) else {
            return;
        };
        if piece.length > 0 {
            file.sent = Some(end);
        } else if !file.asked || file.unwanted_since.is_some() {
            (file.asked, file.sent, file.unwanted_since) = (true, None, None);
        }
        file.unanswered += 1;
        self.in_flight += 1;
        self.last = Some(piece.key.clone());
    }

    /// A piece could not be read; others are sent meanwhile.
    pub fn failed(&mut self, piece: &Piece, now: Instant) {
        if let Some(file) = self.files.get_mut(&piece.key) {
            file.failed = Some(now);
        }
    }

    /// Takes in an answer.
    pub fn answered(&mut self, key: &Key, answer: Answer, now: Instant) -> Taken {
        let Some(file) = self.files.get_mut(key) else {
            return Taken::default();
        };
        if file.unanswered > 0 {
            file.unanswered -= 1;
            self.in_flight -= 1;
        }
        let data = file.sent.is_some();
        file.unwanted_since = answer.unwanted.then_some(now);
        // The first answer says where to begin; a last one that is behind says that something is missing.
        if file.sent.is_none() || file.unanswered == 0 {
            file.sent = Some(answer.stored);
        }
        file.stored = answer.stored;
        file.synced = file.synced.max(answer.synced);
        let settled = answer.unwanted || file.synced >= file.size;
        Taken { data, settled }
    }
}

impl Sending {
    fn next(&self, key: &Key, now: Instant) -> Option<Piece> {
        let piece = |offset, length| {
            let key = key.clone();
            Some(Piece {
                key,
                offset,
                length,
            })
        };
        let rests = |since: Option<Instant>| since.is_some_and(|since| now < since + AGAIN);
        if rests(self.failed) {
            return None;
        }
        if !self.asked {
            return piece(0, 0);
        }
        if self.unwanted_since.is_some() {
            let asks = !rests(self.unwanted_since) && self.unanswered == 0;
            return asks.then(|| piece(0, 0)).flatten();
        }
        let sent = self.sent?;
        if self.unanswered >= WINDOW {
            return None;
        }
        if sent < self.size {
            let length = (self.size - sent).min(LOG_CHUNK_BYTES_MAX as u64) as usize;
            return piece(sent, length);
        }
        // All of it is there. When nothing more can come, it must also be safe there.
        let arrived = self.unanswered == 0 && self.stored >= self.size;
        let unsafe_yet = arrived && self.over && self.synced < self.size;
        unsafe_yet.then(|| piece(self.size, 0)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(file: &str) -> Key {
        ("1-1".to_owned(), file.to_owned())
    }

    fn seen(files: &[(&str, u64)], over: bool) -> BTreeMap<Key, Seen> {
        let files = files.iter();
        files
            .map(|(file, size)| (key(file), Seen { size: *size, over }))
            .collect()
    }

    fn stored(stored: u64) -> Answer {
        Answer {
            stored,
            ..Answer::default()
        }
    }

    /// Sends all that may be sent now.
    fn pump(shipment: &mut Shipment, now: Instant) -> Vec<Piece> {
        let next = || {
            let piece = shipment.next(now)?;
            shipment.sent(&piece, piece.offset + piece.length as u64);
            Some(piece)
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_file_is_asked_for_first_and_goes_on_from_where_the_other_side_is() {
        let now = Instant::now();
        let mut shipment = Shipment::default();
        shipment.seen(seen(&[("f", 100)], false));
        let asked = pump(&mut shipment, now);
        assert_eq!((asked.len(), asked[0].offset, asked[0].length), (1, 0, 0));
        let taken = shipment.answered(&key("f"), stored(40), now);
        assert_eq!(taken, Taken::default(), "a question says nothing of bytes");
        let sent = pump(&mut shipment, now);
        assert_eq!((sent.len(), sent[0].offset, sent[0].length), (1, 40, 60));
        // It lost some of them.
        assert!(shipment.answered(&key("f"), stored(70), now).data);
        let sent = pump(&mut shipment, now);
        assert_eq!((sent[0].offset, sent[0].length), (70, 30));
        shipment.answered(&key("f"), stored(100), now);
        assert!(pump(&mut shipment, now).is_empty(), "it may still grow");
        shipment.seen(seen(&[("f", 100)], true));
        let sync = pump(&mut shipment, now);
        assert_eq!((sync.len(), sync[0].offset, sync[0].length), (1, 100, 0));
        let synced = Answer {
            stored: 100,
            synced: 100,
            unwanted: false,
        };
        assert!(shipment.answered(&key("f"), synced, now).settled);
        assert!(pump(&mut shipment, now).is_empty());
    }

    #[test]
    fn files_that_flood_leave_room_for_the_others_and_their_answers_are_bounded() {
        let now = Instant::now();
        let mut shipment = Shipment::default();
        let size = (LOG_CHUNK_BYTES_MAX * 100) as u64;
        let names: Vec<_> = (0..10).map(|n| n.to_string()).collect();
        let files: Vec<_> = names.iter().map(|n| (n.as_str(), size)).collect();
        shipment.seen(seen(&files, false));
        assert_eq!(pump(&mut shipment, now).len(), 10);
        for name in &names {
            shipment.answered(&key(name), stored(0), now);
        }
        let mut sent = pump(&mut shipment, now);
        assert_eq!(sent.len(), IN_FLIGHT_MAX);
        for name in &names {
            let of = |piece: &&Piece| piece.key == key(name);
            assert!(sent.iter().filter(of).count() >= IN_FLIGHT_MAX / 10);
        }
        // One answer makes room for one piece, each time of another file.
        let mut turns = std::collections::BTreeSet::new();
        for _ in 0..names.len() {
            let piece = sent.remove(0);
            let end = piece.offset + piece.length as u64;
            shipment.answered(&piece.key, stored(end), now);
            let next = pump(&mut shipment, now);
            assert_eq!(next.len(), 1);
            turns.insert(next[0].key.clone());
        }
        assert_eq!(turns.len(), names.len());
        // What is gone is not waited for.
        shipment.seen(BTreeMap::new());
        assert_eq!(shipment.in_flight, 0);
    }

    #[test]
    fn what_nobody_wants_or_nobody_can_read_is_tried_again_later() {
        let now = Instant::now();
        let mut shipment = Shipment::default();
        shipment.seen(seen(&[("f", 100), ("g", 100)], true));
        pump(&mut shipment, now);
        let unwanted = Answer {
            unwanted: true,
            ..Answer::default()
        };
        assert!(shipment.answered(&key("f"), unwanted, now).settled);
        shipment.answered(&key("g"), stored(0), now);
        let piece = shipment.next(now).unwrap();
        assert_eq!(piece.key, key("g"));
        shipment.failed(&piece, now);
        assert_eq!(shipment.next(now), None);
        let sent = pump(&mut shipment, now + AGAIN);
        let what: Vec<_> = sent.iter().map(|p| (&*p.key.1, p.length)).collect();
        assert_eq!(what, [("f", 0), ("g", 100)]);
    }
}
