//! A small file that knows how much the log must hold.
//!
//! Checksums never see what is absent, and the database opens some damaged files without a word. So the last durable
//! index, with term and vote, is also kept here: in two slots written in turn, each with a checksum, synced after the
//! database was and before anything is acknowledged.

use batchai_common::fault;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u32 = 0x6261_7761;
const SLOT_BYTES: usize = 48;
/// One slot a block, so that a torn write hurts one of them only.
const SLOT_STRIDE: u64 = 4096;

/// What the log must hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    pub replica: u64,
    pub term: u64,
    pub vote: u64,
    /// The last index that was durable when this was written.
    pub last: u64,
}

/// The open file.
#[derive(Debug)]
pub struct Witness {
    file: File,
    sequence: u64,
}

impl Witness {
    /// Makes the file and writes the first mark; the directory is the caller's to sync.
    pub fn create(path: &Path, mark: Mark) -> io::Result<Witness> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        file.write_all_at(&[0; 2 * SLOT_STRIDE as usize], 0)?;
        let mut witness = Witness { file, sequence: 0 };
        witness.write(mark)?;
        Ok(witness)
    }

    /// Opens the file and reads the latest mark. `None` where no slot is whole.
    pub fn open(path: &Path) -> io::Result<Option<(Witness, Mark)>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut latest = None;
        for slot in 0..2 {
            let mut bytes = [0; SLOT_BYTES];
            match file.read_exact_at(&mut bytes, slot * SLOT_STRIDE) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => continue,
                other => other?,
            }
            if let Some((sequence, mark)) = decode(&bytes)
                && latest
                    .is_none_or(|(known, _)| sequence > known || fault!("older_witness_counts"))
            {
                latest = Some((sequence, mark));
            }
        }
        Ok(latest.map(|(sequence, mark)| (Witness { file, sequence }, mark)))
    }

    /// Writes a mark over the older slot and syncs it.
    pub fn write(&mut self, mark: Mark) -> io::Result<()> {
        self.sequence += 1;
        let slot = self.sequence % 2;
        self.file
            .write_all_at(&encode(self.sequence, mark), slot * SLOT_STRIDE)?;
        self.file.sync_data()
    }
}

fn encode(sequence: u64, mark: Mark) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    for (i, field) in [sequence, mark.replica, mark.term, mark.vote, mark.last]
        .iter()
        .enumerate()
    {
        bytes[4 + i * 8..12 + i * 8].copy_from_slice(&field.to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[..SLOT_BYTES - 4]);
    bytes[SLOT_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; SLOT_BYTES]) -> Option<(u64, Mark)> {
    let (body, crc) = bytes.split_at(SLOT_BYTES - 4);
    if crc32fast::hash(body).to_le_bytes() != crc || body[..4] != MAGIC.to_le_bytes() {
        return None;
    }
    let field = |i: usize| {
        let bytes = body[4 + i * 8..12 + i * 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let mark = Mark {
        replica: field(1),
        term: field(2),
        vote: field(3),
        last: field(4),
    };
    Some((field(0), mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(last: u64) -> Mark {
        Mark {
            replica: 1,
            term: 2,
            vote: 1,
            last,
        }
    }

    #[test]
    fn the_latest_whole_slot_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("witness");
        let mut witness = Witness::create(&path, mark(0)).unwrap();
        for last in 1..=5 {
            witness.write(mark(last)).unwrap();
            assert_eq!(Witness::open(&path).unwrap().unwrap().1, mark(last));
        }
        // Sequence 6 lies in slot 0: damage it, and the one before counts.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 20).unwrap();
        assert_eq!(Witness::open(&path).unwrap().unwrap().1, mark(4));
        file.write_all_at(b"x", SLOT_STRIDE + 20).unwrap();
        assert!(Witness::open(&path).unwrap().is_none());
        file.set_len(3).unwrap();
        assert!(Witness::open(&path).unwrap().is_none());
    }
}
