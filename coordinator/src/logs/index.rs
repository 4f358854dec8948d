//! What is known of a log file beside its bytes: when they came, and which of them are kept no more.
//!
//! It is bounded, however long a file is written and however often it is cut. It reads no file, writes none and has no clock.

/// After so much time a file that grows gets another mark.
const MARK_EVERY_MS: i64 = 1000;
/// Beyond so many marks every second one is forgotten: the older a file, the coarser they are.
const MARKS_MAX: usize = 4096;
/// Beyond so many gaps what lies before the oldest is given up as well.
const GAPS_MAX: usize = 64;
/// A kind, two numbers and a checksum.
pub const RECORD_BYTES: usize = 1 + 8 + 8 + 4;
const MARK: u8 = 1;
const GAP: u8 = 2;
const COARSE: u8 = 3;

/// What has to be written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Nothing,
    /// This, behind what is written already.
    Append([u8; RECORD_BYTES]),
    /// All of it anew.
    Rewrite,
}

/// Bytes from `offset` on came at this time or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    at_ms: i64,
    offset: u64,
}

/// These bytes are kept no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    from: u64,
    to: u64,
}

/// The index of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    marks: Vec<Mark>,
    /// Marks before this offset are not all there any more: what lies between two of them came between their times. From here on all of
    /// it came within `MARK_EVERY_MS` of the first.
    coarse: u64,
    /// Apart from each other, in their order.
    gaps: Vec<Gap>,
}

impl Index {
    /// Reads what was written, as far as it is whole: a power cut leaves half a record.
    pub fn read(bytes: &[u8]) -> Index {
        let mut index = Index::default();
        for record in bytes.chunks_exact(RECORD_BYTES) {
            let (told, sum) = record.split_at(RECORD_BYTES - 4);
            if crc32fast::hash(told).to_le_bytes() != sum {
                break;
            }
            let number = |at: usize| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&told[at..at + 8]);
                u64::from_le_bytes(bytes)
            };
            let (a, b) = (number(1), number(9));
            match told[0] {
                MARK => index.marks.push(Mark {
                    at_ms: a as i64,
                    offset: b,
                }),
                GAP if a < b => index.merge(Gap { from: a, to: b }),
                COARSE => index.coarse = a,
                _ => break,
            }
        }
        index
    }

    /// All of it, as it is written.
    pub fn written(&self) -> Vec<u8> {
        let marks = self
            .marks
            .iter()
            .map(|m| record(MARK, m.at_ms as u64, m.offset));
        let gaps = self.gaps.iter().map(|gap| record(GAP, gap.from, gap.to));
        let coarse = (self.coarse > 0).then(|| record(COARSE, self.coarse, 0));
        coarse
            .into_iter()
            .chain(gaps)
            .chain(marks)
            .flatten()
            .collect()
    }

    /// Bytes come now, from an offset on.
    pub fn came(&mut self, now_ms: i64, offset: u64) -> Change {
        let due = self.marks.last().is_none_or(|last| {
            offset > last.offset && now_ms.saturating_sub(last.at_ms) >= MARK_EVERY_MS
        });
        if !due {
            return Change::Nothing;
        }
        let mark = Mark {
            at_ms: now_ms,
            offset,
        };
        self.marks.push(mark);
        if self.marks.len() > MARKS_MAX {
            self.coarse = offset;
            let mut at = 0;
            self.marks.retain(|_| {
                at += 1;
                at % 2 == 1
            });
            return Change::Rewrite;
        }
        Change::Append(record(MARK, mark.at_ms as u64, offset))
    }

    /// Some bytes are kept no more. Marks among the first of them say nothing any more, apart from the last.
    pub fn lost(&mut self, from: u64, to: u64) -> Change {
        if from >= to {
            return Change::Nothing;
        }
        self.merge(Gap { from, to });
        while self.gaps.len() > GAPS_MAX {
            let to = match self.gaps[0].from {
                0 => self.gaps[1].to,
                _ => self.gaps[0].to,
            };
            self.merge(Gap { from: 0, to });
        }
        let first = self.first();
        let dead = self.marks.partition_point(|mark| mark.offset <= first);
        self.marks.drain(..dead.saturating_sub(1));
        Change::Rewrite
    }

    fn merge(&mut self, mut gap: Gap) {
        self.gaps.retain(|known| {
            let apart = known.to < gap.from || gap.to < known.from;
            if !apart {
                gap = Gap {
                    from: gap.from.min(known.from),
                    to: gap.to.max(known.to),
                };
            }
            apart
        });
        let at = self.gaps.partition_point(|known| known.from < gap.from);
        self.gaps.insert(at, gap);
    }

    /// Gaps that reach beyond the file were written down before it was written itself, and that never happened.
    pub fn cut_to(&mut self, length: u64) {
        self.gaps.retain(|gap| gap.to <= length);
        self.marks.retain(|mark| mark.offset <= length);
    }

    /// The first byte that is kept, from an offset on.
    pub fn kept_from(&self, offset: u64) -> u64 {
        let around = |gap: &&Gap| gap.from <= offset && offset < gap.to;
        self.gaps.iter().find(around).map_or(offset, |gap| gap.to)
    }

    /// Where the bytes that are kept end, from one on that is.
    pub fn kept_to(&self, offset: u64) -> Option<u64> {
        let behind = |gap: &&Gap| gap.from > offset;
        self.gaps.iter().find(behind).map(|gap| gap.from)
    }

    /// The first byte that is kept.
    pub fn first(&self) -> u64 {
        self.kept_from(0)
    }

    /// How many bytes below a length are kept.
    pub fn kept(&self, length: u64) -> u64 {
        let gaps = self.gaps.iter();
        let lost = gaps.map(|gap| gap.to.min(length).saturating_sub(gap.from));
        length.saturating_sub(lost.sum())
    }

    /// When a byte came, as far as that is known: not before that, and not long after it.
    pub fn came_at(&self, offset: u64) -> Option<i64> {
        let behind = self.marks.partition_point(|mark| mark.offset <= offset);
        let last = behind.checked_sub(1)?;
        Some(self.marks[last].at_ms)
    }

    /// Where the bytes end that have all come before a time: the others begin there at the latest. Beyond all that there is where
    /// nothing has come since.
    pub fn older_than(&self, at_ms: i64) -> u64 {
        let before = self.marks.partition_point(|mark| mark.at_ms < at_ms);
        let Some(last) = before.checked_sub(1) else {
            return 0;
        };
        let Mark {
            at_ms: came,
            offset,
        } = self.marks[last];
        let whole = offset >= self.coarse && at_ms.saturating_sub(came) > MARK_EVERY_MS;
        match whole {
            true => self.marks.get(before).map_or(u64::MAX, |next| next.offset),
            // What came behind it may be younger.
            false => offset,
        }
    }
}

fn record(kind: u8, a: u64, b: u64) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    bytes[0] = kind;
    bytes[1..9].copy_from_slice(&a.to_le_bytes());
    bytes[9..17].copy_from_slice(&b.to_le_bytes());
    let sum = crc32fast::hash(&bytes[..17]);
    bytes[17..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_known_to_the_byte_and_what_is_written_is_read() {
        let mut index = Index::default();
        assert_eq!(index.lost(5, 5), Change::Nothing);
        assert_eq!(index.lost(10, 20), Change::Rewrite);
        index.lost(30, 40);
        assert_eq!((index.kept_from(9), index.kept_from(10)), (9, 20));
        assert_eq!(
            (index.kept_to(9), index.kept_to(20), index.kept_to(40)),
            (Some(10), Some(30), None)
        );
        assert_eq!((index.first(), index.kept(100)), (0, 80));
        index.lost(0, 10);
        assert_eq!((index.first(), index.kept(35)), (20, 10));
        index.lost(15, 30);
        assert_eq!(index.gaps, [Gap { from: 0, to: 40 }]);
        index.came(1000, 40);
        let mut written = index.written();
        assert_eq!(Index::read(&written), index);
        // Half a record, or one that was torn, is none.
        written.extend(&record(GAP, 50, 60)[..7]);
        assert_eq!(Index::read(&written), index);
        let at = written.len() - 7 - RECORD_BYTES;
        written[at + 3] ^= 1;
        assert_eq!(Index::read(&written).marks, []);
        let mut ahead = index.clone();
        ahead.lost(70, 80);
        ahead.cut_to(75);
        assert_eq!(ahead, index);
    }

    #[test]
    fn what_came_since_a_time_is_found_and_never_less_than_it() {
        let mut index = Index::default();
        assert!(matches!(index.came(1000, 0), Change::Append(_)));
        assert_eq!(index.came(1500, 10), Change::Nothing, "too soon");
        assert_eq!(index.came(9000, 0), Change::Nothing, "nothing came");
        index.came(5000, 30);
        index.came(9000, 90);
        for (at, to) in [
            (0, 0),
            (1001, 0),
            (2000, 0),
            (2001, 30),
            (5000, 30),
            (5001, 30),
            (6001, 90),
            (10_001, u64::MAX),
        ] {
            assert_eq!(index.older_than(at), to, "{at}");
        }
        index.coarse = 31;
        assert_eq!(index.older_than(6001), 30, "it may have come later");
        assert_eq!(index.older_than(10_001), u64::MAX);
        assert_eq!(Index::read(&index.written()), index);
        index.lost(0, 50);
        assert_eq!(index.marks.len(), 2);
    }

    #[test]
    fn it_stays_small_however_long_a_file_lives() {
        let mut index = Index::default();
        let mut rewrites = 0;
        for turn in 0..50_000u64 {
            rewrites += usize::from(index.came(turn as i64 * 1000, turn * 10) == Change::Rewrite);
            if turn % 100 == 50 {
                index.lost(turn * 10 - 5, turn * 10);
            }
        }
        assert!(index.marks.len() <= MARKS_MAX && index.gaps.len() <= GAPS_MAX);
        assert!((1..100).contains(&rewrites));
        assert!(index.written().len() <= (MARKS_MAX + GAPS_MAX) * RECORD_BYTES);
        // The bound on gaps gives up what is oldest.
        assert!(index.first() > 0 && index.kept(500_000) > 500_000 / 80);
    }
}
