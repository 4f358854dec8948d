//! One log file: bytes that are only ever added at its end, and given up at its beginning.
//!
//! An offset means the same byte for ever. What is given up leaves a hole: the file keeps its length and the disk gets its blocks
//! back. Which bytes are holes the index says, which lies beside it and is safe on the disk before anything is given up; what the
//! holes read as is never shown. Which files there are, and which bytes are to be given up, is not decided here.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use batchai_common::holes;
use batchai_common::limits::LOG_CHUNK_BYTES_MAX;
use bytes::Bytes;
use tokio::sync::watch;

use super::index::{Change, Index};

/// What the name of an index ends with: no log file has a comma in its name.
pub const INDEX_SUFFIX: &str = ",index";
/// The lines before the end of a file are looked for in so many of its last bytes.
pub const TAIL_BYTES_MAX: u64 = 16 << 20;
/// The beginning of a line is looked for so far back.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// A log file that is open.
pub struct LogFile {
    data: File,
    path: PathBuf,
    /// Whoever holds it alone writes.
    index: Mutex<Index>,
    length: watch::Sender<u64>,
}

/// Some bytes of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// How many bytes before them were asked for and are kept no more.
    pub dropped: u64,
    pub offset: u64,
    pub data: Bytes,
}

impl LogFile {
    /// Opens a file with its index.
    pub fn open(data: File, path: PathBuf) -> io::Result<LogFile> {
        let length = data.metadata()?.len();
        let written = match fs::read(index_path(&path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            written => written?,
        };
        let mut index = Index::read(&written);
        index.cut_to(length);
        let file = LogFile {
            data,
            path,
            index: Mutex::new(index),
            length: watch::Sender::new(length),
        };
        {
            // What is appended must not stand behind half a record.
            let index = file.index();
            if index.written() != written {
                file.keep(&index, Change::Rewrite)?;
            }
        }
        Ok(file)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its length, as it grows.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.length.subscribe()
    }

    /// Whether somebody follows it.
    pub fn is_followed(&self) -> bool {
        self.length.receiver_count() > 0
    }

    /// Writes a piece at an offset if the file reaches so far; what it has already is left alone. Where the sender has `lost` what
    /// lies before, the file gets a gap there. Returns the length, from which the sender goes on.
    pub fn append(&self, offset: u64, data: &[u8], lost: bool, now_ms: i64) -> io::Result<u64> {
        let mut index = self.index();
        let length = *self.length.borrow();
        let end = offset + data.len() as u64;
        if end <= length || (offset > length && !lost) {
            return Ok(length);
        }
        let begin = offset.max(length);
        if begin > length {
            let change = index.lost(length, begin);
            self.keep(&index, change)?;
        }
        let new = &data[(begin - offset) as usize..];
        self.data.write_all_at(new, begin)?;
        if new.is_empty() {
            self.data.set_len(begin)?;
        }
        let change = index.came(now_ms, begin);
        // Without it the bytes are there all the same.
        if let Err(error) = self.keep(&index, change) {
            tracing::warn!(%error, path = %self.path.display(), "when bytes came is not written down");
        }
        self.length.send_replace(end);
        Ok(end)
    }

    fn keep(&self, index: &Index, change: Change) -> io::Result<()> {
        let path = index_path(&self.path);
        match change {
            Change::Nothing => Ok(()),
            Change::Append(record) => {
                let mut options = OpenOptions::new();
                let mut file = options.append(true).create(true).open(path)?;
                file.write_all(&record)
            }
            Change::Rewrite => {
                let mut new = path.clone().into_os_string();
                new.push("-new");
                let mut file = File::create(&new)?;
                file.write_all(&index.written())?;
                file.sync_all()?;
                fs::rename(&new, &path)?;
                let dir = path.parent().unwrap_or(Path::new("."));
                File::open(dir)?.sync_all()
            }
        }
    }

    /// Gives up all bytes before an offset, and returns how many more those are than before.
    pub fn give_up(&self, before: u64) -> io::Result<u64> {
        let mut index = self.index();
        let length = *self.length.borrow();
        let before = before.min(length);
        let kept = index.kept(before);
        if kept == 0 {
            return Ok(0);
        }
        // In this order: what is a hole is known to be one, also after a power cut.
        let change = index.lost(0, before);
        self.keep(&index, change)?;
        // The rest of the last block holds no byte of anybody's once all of them are given up.
        let reach = match before == length {
            true => before.next_multiple_of(1 << 20),
            false => before,
        };
        holes::give_up(&self.data, reach)?;
        Ok(kept)
    }

    /// Gives up what came before a time, or lies so far back that more than `most` bytes are kept behind it. Returns how many bytes that
    /// was. An eighth more may be kept for a while, so that little is given up seldom and not a little at every turn.
    pub fn rotate(&self, most: u64, oldest_ms: i64) -> io::Result<u64> {
        let before = {
            let index = self.index();
            let length = *self.length.borrow();
            let (old, first) = (index.older_than(oldest_ms), index.first());
            let large = match index.kept(length) > most.saturating_add(most / 8) {
                true => length.saturating_sub(most),
                false => 0,
            };
            match old.max(large).min(length) {
                before if before > first => before,
                _ => return Ok(0),
            }
        };
        self.give_up(before)
    }

    /// When a byte came, as far as that is known.
    pub fn came_at(&self, offset: u64) -> Option<i64> {
        self.index().came_at(offset)
    }

    /// Bytes from an offset on, before an end that the file has reached. None of them where none is kept.
    pub fn read(&self, offset: u64, end: u64) -> io::Result<Piece> {
        loop {
            let (from, to) = {
                let index = self.index();
                let from = index.kept_from(offset).min(end);
                let to = index.kept_to(from).unwrap_or(end).min(end);
                (from, to.min(from + LOG_CHUNK_BYTES_MAX as u64))
            };
            let mut data = vec![0; (to - from) as usize];
            self.data.read_exact_at(&mut data, from)?;
            // What was given up meanwhile may have been read as zeros.
            let still = self.index().kept_from(from);
            if still == from || from == end {
                return Ok(Piece {
                    dropped: from - offset,
                    offset: from,
                    data: data.into(),
                });
            }
        }
    }

    /// Where the last lines begin, of those that are kept and lie within the last `TAIL_BYTES_MAX`.
    pub fn tail(&self, lines: u64) -> io::Result<u64> {
        let length = *self.length.borrow();
        if lines == 0 {
            return Ok(length);
        }
        // The end of the last line is not the beginning of another one.
        let mut missing = lines;
        let mut end = length.saturating_sub(1);
        let least = self
            .index()
            .first()
            .max(length.saturating_sub(TAIL_BYTES_MAX));
        while end > least {
            let begin = end.saturating_sub(LOG_CHUNK_BYTES_MAX as u64).max(least);
            let piece = self.read(begin, end)?;
            if piece.dropped > 0 {
                return Ok(piece.offset);
            }
            for at in (0..piece.data.len()).rev() {
                if piece.data[at] == b'\n' {
                    missing -= 1;
                }
                if missing == 0 {
                    return Ok(begin + at as u64 + 1);
                }
            }
            end = begin;
        }
        Ok(least)
    }

    /// Where the first line begins of which something came at a time or later.
    pub fn since(&self, at_ms: i64) -> io::Result<u64> {
        let from = {
            let index = self.index();
            let length = *self.length.borrow();
            index.kept_from(index.older_than(at_ms).min(length))
        };
        let begin = from.saturating_sub(LINE_BYTES_MAX);
        let piece = self.read(begin, from)?;
        let line = piece.data.iter().rposition(|byte| *byte == b'\n');
        Ok(match line {
            Some(at) => piece.offset + at as u64 + 1,
            None if piece.offset == 0 => 0,
            // A line that long is cut.
            None => from,
        })
    }

    /// Makes what is kept survive a power cut; returns the length.
    pub fn sync(&self) -> io::Result<u64> {
        let length = *self.length.borrow();
        self.data.sync_data()?;
        Ok(length)
    }
}

fn index_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(INDEX_SUFFIX);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> LogFile {
        let path = dir.join("f");
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        LogFile::open(options.open(&path).unwrap(), path).unwrap()
    }

    fn disk_bytes(file: &LogFile) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        file.data.metadata().unwrap().blocks() * 512
    }

    fn text(file: &LogFile, offset: u64) -> (u64, String) {
        let end = *file.follow().borrow();
        let piece = file.read(offset, end).unwrap();
        (piece.dropped, String::from_utf8(piece.data.into()).unwrap())
    }

    #[test]
    fn what_is_given_up_is_told_to_the_byte_and_frees_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let file = open(dir.path());
        let block = "x".repeat(99_999) + "\n";
        for turn in 0..10 {
            let end = file.append(turn * 100_000, block.as_bytes(), false, turn as i64 * 2000);
            assert_eq!(end.unwrap(), (turn + 1) * 100_000);
        }
        let before = disk_bytes(&file);
        assert_eq!(
            file.rotate(900_000, 0).unwrap(),
            0,
            "an eighth more is kept"
        );
        assert_eq!(file.rotate(300_001, 0).unwrap(), 699_999);
        assert_eq!(file.rotate(300_001, 0).unwrap(), 0);
        assert!(disk_bytes(&file) <= before - 600_000);
        assert_eq!(text(&file, 100).0, 699_899);
        assert_eq!(text(&file, 699_999).1.as_bytes()[..2], *b"\nx");
        // By age: all but the last two came before.
        assert_eq!(file.rotate(1 << 30, 15_100).unwrap(), 100_001);
        assert_eq!(text(&file, 0).0, 800_000);
        // Another process finds it as it was.
        let again = open(dir.path());
        assert_eq!(text(&again, 0).0, 800_000);
        assert_eq!(
            again.append(1_000_000, b"more\n", false, 30_000).unwrap(),
            1_000_005
        );
        assert_eq!(again.give_up(u64::MAX).unwrap(), 200_005);
        assert_eq!(disk_bytes(&again), 0);
        assert_eq!(text(&again, 999_999), (6, String::new()));
        assert_eq!(
            again.append(1_000_005, b"on", false, 30_000).unwrap(),
            1_000_007
        );
        assert_eq!(text(&again, 1_000_000), (5, "on".into()));
    }

    #[test]
    fn what_the_sender_lost_is_a_gap_and_nothing_is_made_up() {
        let dir = tempfile::tempdir().unwrap();
        let file = open(dir.path());
        file.append(0, b"one", false, 0).unwrap();
        assert_eq!(file.append(9, b"two", false, 0).unwrap(), 3);
        assert_eq!(file.append(9, b"two", true, 0).unwrap(), 12);
        assert_eq!(file.append(2, b"xyz", true, 0).unwrap(), 12);
        assert_eq!(text(&file, 0), (0, "one".into()));
        assert_eq!(text(&file, 3), (6, "two".into()));
        assert_eq!(file.append(20, b"", true, 0).unwrap(), 20);
        assert_eq!(text(&open(dir.path()), 12), (8, String::new()));
    }

    #[test]
    fn the_last_lines_and_those_since_a_time_begin_where_lines_do() {
        let dir = tempfile::tempdir().unwrap();
        let file = open(dir.path());
        assert_eq!((file.tail(3).unwrap(), file.since(5).unwrap()), (0, 0));
        file.append(0, b"one\ntwo\nth", false, 1000).unwrap();
        file.append(10, b"ree\nfour", false, 5000).unwrap();
        for (lines, from) in [(0, 18), (1, 14), (2, 8), (3, 4), (4, 0), (9, 0)] {
            assert_eq!(file.tail(lines).unwrap(), from, "{lines}");
        }
        file.append(18, b"\n", false, 5000).unwrap();
        assert_eq!((file.tail(1).unwrap(), file.tail(2).unwrap()), (14, 8));
        assert_eq!(file.since(2000).unwrap(), 0);
        let began = file.since(4000).unwrap();
        assert_eq!(began, 8, "the line that went on then");
        assert_eq!(file.since(7000).unwrap(), 19);
        file.give_up(9).unwrap();
        assert_eq!((file.tail(9).unwrap(), file.since(0).unwrap()), (9, 9));
    }
}
