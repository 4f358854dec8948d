//! Keeps a log file on this host within bounds: its beginning is given up when it is too large or too old.
//!
//! The file keeps its offsets (see `holes`), so that whoever reads it sees neither a gap that he is not told of nor anything twice. It
//! is looked at when something is written. What was not shipped yet is given up as well: a rank is not held up by an ensemble that
//! is away.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::time::Duration;

use batchai_common::holes::{self, HOLE_ALIGN};

use crate::launch::LogLimit;

/// So many times within the age that bytes may have are remembered: they are given up in as many parts.
const MARKS: u32 = 32;

/// How much of one file is kept.
pub struct Rotation {
    limit: LogLimit,
    length: u64,
    first: u64,
    /// When the file had reached which length, on the boot clock, not longer ago than bytes may be.
    marks: VecDeque<(Duration, u64)>,
}

impl Rotation {
    /// Of a file as it is now.
    pub fn new(limit: LogLimit, file: &File, now: Duration) -> io::Result<Rotation> {
        let length = file.metadata()?.len();
        Ok(Rotation {
            limit,
            length,
            first: holes::first_kept(file)?,
            marks: VecDeque::from([(now, length)]),
        })
    }

    /// So much more is about to be written. Where the file cannot be kept within its bounds it must not be.
    pub fn make_room(&mut self, file: &File, count: u64, now: Duration) -> io::Result<()> {
        let most = self.limit.bytes.max(2 * HOLE_ALIGN);
        let kept = self.length - self.first;
        // An eighth more is kept for a while: little is given up seldom, and not a little each time.
        let large = match kept + count > most + most / 8 {
            true => (self.length + count).saturating_sub(most),
            false => 0,
        };
        let before = large.max(self.old(now)).min(self.length) / HOLE_ALIGN * HOLE_ALIGN;
        if before > self.first {
            holes::give_up(file, before)?;
            self.first = before;
        }
        Ok(())
    }

    /// So much more was written.
    pub fn written(&mut self, count: u64) {
        self.length += count;
    }

    /// Where the bytes end that are too old.
    fn old(&mut self, now: Duration) -> u64 {
        let Some(age) = self.limit.age_s.map(Duration::from_secs) else {
            return 0;
        };
        let step = age / MARKS;
        let last = self.marks.back().map_or(Duration::ZERO, |(at, _)| *at);
        if now >= last + step {
            // What came behind the last mark came within a step of it.
            if last + step + age < now {
                self.marks.clear();
                self.marks.push_back((now, self.length));
                return self.length;
            }
            self.marks.push_back((now, self.length));
        }
        let mut old = 0;
        while let Some((at, length)) = self.marks.front().copied()
            && at + age < now
        {
            old = length;
            self.marks.pop_front();
        }
        old
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn write(rotation: &mut Rotation, file: &mut File, count: u64, now: Duration) {
        rotation.make_room(file, count, now).unwrap();
        file.write_all(&vec![b'x'; count as usize]).unwrap();
        rotation.written(count);
    }

    #[test]
    fn a_file_stays_within_its_size_and_keeps_its_offsets() {
        let mut file = tempfile::tempfile().unwrap();
        let (bytes, piece) = (1 << 20, 50_000);
        let limit = LogLimit { bytes, age_s: None };
        let mut rotation = Rotation::new(limit, &file, seconds(0)).unwrap();
        for turn in 1..=200 {
            write(&mut rotation, &mut file, piece, seconds(turn));
            let first = holes::first_kept(&file).unwrap();
            let kept = turn * piece - first;
            assert!(kept <= bytes + bytes / 8 + HOLE_ALIGN, "{kept}");
            assert!(kept >= bytes.min(turn * piece), "{kept}");
        }
        assert_eq!(file.metadata().unwrap().len(), 200 * piece);
        // A shim that begins again goes on with it.
        let again = Rotation::new(limit, &file, seconds(300)).unwrap();
        assert_eq!(
            (again.first, again.length),
            (rotation.first, rotation.length)
        );
    }

    #[test]
    fn what_is_too_old_goes_in_parts() {
        let mut file = tempfile::tempfile().unwrap();
        let limit = LogLimit {
            bytes: 1 << 30,
            age_s: Some(320),
        };
        let mut rotation = Rotation::new(limit, &file, seconds(0)).unwrap();
        for turn in 0..100 {
            write(&mut rotation, &mut file, HOLE_ALIGN, seconds(turn * 10));
            let first = holes::first_kept(&file).unwrap() / HOLE_ALIGN;
            assert!(
                turn.saturating_sub(34) <= first && first <= turn.saturating_sub(32),
                "{turn} {first}"
            );
        }
        assert!(rotation.marks.len() <= MARKS as usize + 2);
        // After a long silence everything before it goes.
        write(&mut rotation, &mut file, 10, seconds(10_000));
        assert_eq!(holes::first_kept(&file).unwrap(), 100 * HOLE_ALIGN);
        write(&mut rotation, &mut file, HOLE_ALIGN, seconds(10_020));
        write(&mut rotation, &mut file, 10, seconds(10_040));
        assert_eq!(holes::first_kept(&file).unwrap(), 100 * HOLE_ALIGN);
    }
}
