//! Snapshots as files: `{index}.snapshot`, whole or not there.
//!
//! A file begins with its format and what it stands for. Then come the records of the State, each with its length and a checksum
//! that goes on from the one before, so that none can be missing, moved or doubled; then how many there were. What is in the
//! records is others' business.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use batchai_proto::internal::v1::{SnapshotMark, SnapshotRecord};
use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc;

use crate::state::State;
use crate::state::snapshot::{Builder, records};

const MAGIC: &[u8; 16] = b"batchai snapshot";
/// The only format that this version reads and writes.
const FORMAT: u32 = 1;
/// No record is larger: resources are bounded where they are made, attempts by their processes.
const RECORD_BYTES_MAX: u32 = 64 << 20;
/// What stands in the place of a length where no record follows.
const END: u32 = u32::MAX;
const BUFFER_BYTES: usize = 1 << 20;
/// Of what is sent, at most so much in one message.
const PIECE_BYTES: usize = 64 << 10;
const SUFFIX: &str = "snapshot";

fn name(index: u64) -> String {
    // In the order of their indexes.
    format!("{index:020}.{SUFFIX}")
}

/// Where the snapshot of an index lies.
pub fn path(dir: &Path, index: u64) -> PathBuf {
    dir.join(name(index))
}

/// One is written at a time: an own one, or one that comes from a peer.
static WRITING: Mutex<()> = Mutex::new(());

/// Writes a snapshot, and has it survive a power cut.
pub fn write(dir: &Path, mark: &SnapshotMark, state: &State) -> io::Result<()> {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    fs::create_dir_all(dir)?;
    let (path, part) = (path(dir, mark.index), dir.join("part"));
    let file = File::create(&part)?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    encode(&mut out, mark, state)?;
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()?;
    fs::rename(&part, &path)?;
    File::open(dir)?.sync_all()
}

/// The bytes of a snapshot.
pub fn encode(out: &mut impl Write, mark: &SnapshotMark, state: &State) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(&FORMAT.to_le_bytes())?;
    let mut checksum = crc32fast::Hasher::new();
    frame(out, &mut checksum, &mark.encode_to_vec())?;
    let mut count = 0_u64;
    for record in records(state) {
        frame(out, &mut checksum, &record.encode_to_vec())?;
        count += 1;
    }
    out.write_all(&END.to_le_bytes())?;
    checksum.update(&count.to_le_bytes());
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&checksum.finalize().to_le_bytes())
}

/// Takes what is written to a channel, in pieces, from a thread that may wait.
pub struct Pieces<T, F> {
    outbox: mpsc::Sender<T>,
    piece: F,
}

impl<T, F: Fn(Bytes) -> T> Pieces<T, F> {
    pub fn new(outbox: mpsc::Sender<T>, piece: F) -> Pieces<T, F> {
        Pieces { outbox, piece }
    }
}

impl<T, F: Fn(Bytes) -> T> Write for Pieces<T, F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(PIECE_BYTES)];
        let piece = (self.piece)(Bytes::copy_from_slice(bytes));
        let sent = self.outbox.blocking_send(piece);
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn frame(out: &mut impl Write, checksum: &mut crc32fast::Hasher, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len())
        .ok()
        .filter(|length| *length <= RECORD_BYTES_MAX);
    let length = length.ok_or_else(|| io::Error::other("a record is too large"))?;
    checksum.update(bytes);
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&checksum.clone().finalize().to_le_bytes())?;
    out.write_all(bytes)
}

/// Reads a snapshot.
///
/// # Errors
/// Says what is damaged.
pub fn read(path: &Path) -> Result<(SnapshotMark, State), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    decode(&mut BufReader::with_capacity(BUFFER_BYTES, file))
}

/// The same from anywhere.
pub fn decode(from: &mut impl Read) -> Result<(SnapshotMark, State), String> {
    let mut magic = [0; MAGIC.len()];
    take(from, &mut magic)?;
    let format = u32::from_le_bytes(number(from)?);
    if magic != *MAGIC {
        return Err("it is no snapshot".to_owned());
    }
    if format != FORMAT {
        return Err(format!(
            "it has format {format}, this version knows {FORMAT}"
        ));
    }
    let mut checksum = crc32fast::Hasher::new();
    let first = unframe(from, &mut checksum)?.ok_or("it ends too early")?;
    let mark = SnapshotMark::decode(&first[..]).map_err(|error| error.to_string())?;
    let (mut builder, mut count) = (Builder::default(), 0_u64);
    while let Some(bytes) = unframe(from, &mut checksum)? {
        let record = SnapshotRecord::decode(&bytes[..]).map_err(|error| error.to_string())?;
        builder.add(record).map_err(|error| error.to_string())?;
        count += 1;
    }
    let counted: [u8; 8] = number(from)?;
    checksum.update(&counted);
    let expected = u32::from_le_bytes(number(from)?);
    if checksum.finalize() != expected || u64::from_le_bytes(counted) != count {
        return Err("its end has a wrong checksum".to_owned());
    }
    let mut more = [0];
    if from.read(&mut more).map_err(|error| error.to_string())? > 0 {
        return Err("something follows its end".to_owned());
    }
    let state = builder.finish().map_err(|error| error.to_string())?;
    // Entries that change nothing may have come after the last command.
    if state.applied_index > mark.index {
        return Err("its State is of a later index".to_owned());
    }
    Ok((mark, state))
}

/// The next record; none where there are no more.
fn unframe(
    from: &mut impl Read,
    checksum: &mut crc32fast::Hasher,
) -> Result<Option<Vec<u8>>, String> {
    let length = u32::from_le_bytes(number(from)?);
    if length == END {
        return Ok(None);
    }
    if length > RECORD_BYTES_MAX {
        return Err("a record is too large".to_owned());
    }
    let expected = u32::from_le_bytes(number(from)?);
    // As much as there is, whatever the length says.
    let mut bytes = Vec::new();
    let read = from.take(u64::from(length)).read_to_end(&mut bytes);
    if read.map_err(|error| error.to_string())? as u64 != u64::from(length) {
        return Err("it ends too early".to_owned());
    }
    checksum.update(&bytes);
    match checksum.clone().finalize() == expected {
        true => Ok(Some(bytes)),
        false => Err("a record has a wrong checksum".to_owned()),
    }
}

fn number<const N: usize>(from: &mut impl Read) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    take(from, &mut bytes)?;
    Ok(bytes)
}

fn take(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), String> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "it ends too early".to_owned(),
        _ => error.to_string(),
    })
}

/// Removes what is older than the one that is relied on.
pub fn sweep(dir: &Path, latest: u64) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?.file_name().to_string_lossy().into_owned();
        if entry < name(latest) && entry.ends_with(SUFFIX) {
            fs::remove_file(dir.join(entry))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use batchai_proto::v1;

    use super::*;

    fn state() -> State {
        let mut state = State {
            applied_index: 7,
            ensemble: "e".into(),
            ..State::default()
        };
        for i in 0..3 {
            let name = format!("resourceGroups/g{i}");
            let group = v1::ResourceGroup {
                name: name.clone(),
                ..Default::default()
            };
            state.resource_groups.insert(name, Arc::new(group));
        }
        state
    }

    fn mark(index: u64) -> SnapshotMark {
        SnapshotMark {
            index,
            term: 3,
            conf_state: vec![1],
        }
    }

    fn encoded() -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&mut bytes, &mark(7), &state()).unwrap();
        bytes
    }

    #[test]
    fn a_snapshot_comes_back_whole_or_is_refused() {
        let bytes = encoded();
        assert_eq!(decode(&mut &bytes[..]).unwrap(), (mark(7), state()));
        for length in 0..bytes.len() {
            assert!(decode(&mut &bytes[..length]).is_err(), "{length}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&mut &flipped[..]).is_err(), "bit {bit}");
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(decode(&mut &longer[..]).is_err());
        let mut other = Vec::new();
        encode(&mut other, &mark(6), &state()).unwrap();
        assert!(decode(&mut &other[..]).unwrap_err().contains("later index"));
    }

    #[test]
    fn files_are_whole_and_the_latest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("snapshots");
        for index in [7, 30, 200] {
            let state = State {
                applied_index: index,
                ..state()
            };
            write(&dir, &mark(index), &state).unwrap();
            sweep(&dir, index).unwrap();
            assert_eq!(read(&path(&dir, index)).unwrap().0, mark(index));
        }
        let mut left: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [name(200)]);
        assert!(read(&dir.join("none")).is_err());
    }
}
