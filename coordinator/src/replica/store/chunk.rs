//! PURE. How log entries become the values of the database: chunks of at most 20 KB with a checksum.
//!
//! A chunk holds several small entries, or a part of one large entry. The bound keeps the database from putting
//! values into files of their own, which it would never sync.
//!
//! Key: `L`, first index (8 bytes, big endian), part (2 bytes). Value: CRC-32 of what follows it, number of parts,
//! number of this part, then a piece of the payload. Payload: entries, each with its length before it.

use batchai_common::fault;
use protobuf::Message;
use raft::eraftpb::Entry;

/// The most payload bytes in one chunk.
const PAYLOAD_BYTES_MAX: usize = 20_000;
const HEADER_BYTES: usize = 8;
const KEY_PREFIX: u8 = b'L';

/// A key and its value.
pub type Record = (Vec<u8>, Vec<u8>);

/// The entries of one first index, as they lie in the database.
#[derive(Debug, PartialEq)]
pub struct Chunk {
    pub first: u64,
    pub last: u64,
    pub records: Vec<Record>,
}

/// Packs entries, in order, into as few chunks as fit.
pub fn pack(entries: &[Entry]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut payload = Vec::new();
    let mut first = 0;
    let mut last = 0;
    for entry in entries {
        let bytes = entry
            .write_to_bytes()
            .expect("an entry in memory can be encoded");
        if !payload.is_empty() && payload.len() + 4 + bytes.len() > PAYLOAD_BYTES_MAX {
            chunks.push(cut(first, last, &payload));
            payload.clear();
        }
        if payload.is_empty() {
            first = entry.index;
        }
        payload.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        payload.extend_from_slice(&bytes);
        last = entry.index;
    }
    if !payload.is_empty() {
        chunks.push(cut(first, last, &payload));
    }
    chunks
}

fn cut(first: u64, last: u64, payload: &[u8]) -> Chunk {
    let pieces: Vec<_> = payload.chunks(PAYLOAD_BYTES_MAX).collect();
    let count = pieces.len() as u16;
    let record = |(part, piece): (usize, &&[u8])| {
        let mut body = Vec::with_capacity(HEADER_BYTES + piece.len());
        body.extend_from_slice(&count.to_le_bytes());
        body.extend_from_slice(&(part as u16).to_le_bytes());
        body.extend_from_slice(piece);
        let mut value = crc32fast::hash(&body).to_le_bytes().to_vec();
        value.extend_from_slice(&body);
        (key(first, part as u16), value)
    };
    Chunk {
        first,
        last,
        records: pieces.iter().enumerate().map(record).collect(),
    }
}

/// The key of a part of the chunk that begins at an index.
pub fn key(first: u64, part: u16) -> Vec<u8> {
    let mut key = vec![KEY_PREFIX];
    key.extend_from_slice(&first.to_be_bytes());
    key.extend_from_slice(&part.to_be_bytes());
    key
}

/// What all keys of chunks begin with.
pub fn prefix() -> [u8; 1] {
    [KEY_PREFIX]
}

/// Reads records of a database, in the order of their keys, back into the entries behind an index, without gaps. What lies
/// before that is passed over, gaps and all.
///
/// # Errors
/// Says what is damaged.
pub fn unpack_behind(begin: u64, records: &[Record]) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut rest = records;
    while let Some((key, _)) = rest.first() {
        let (first, _) = read_key(key)?;
        let same = |(key, _): &&Record| read_key(key).is_ok_and(|(other, _)| other == first);
        let (chunk, behind) = rest.split_at(rest.iter().take_while(same).count());
        rest = behind;
        for entry in unpack_from(first, chunk)? {
            let expected = entries.last().map_or(begin + 1, |last| last.index + 1);
            if entry.index <= begin {
                continue;
            }
            if entry.index != expected {
                return Err(format!(
                    "entry {expected} is missing: {} follows",
                    entry.index
                ));
            }
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// Reads records whose first entry has the given index.
pub fn unpack_from(begin: u64, records: &[Record]) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut rest = records;
    while let Some((first_key, _)) = rest.first() {
        let (first, _) = read_key(first_key)?;
        let (_, parts, _) = read_value(&rest[0].1)?;
        let parts = usize::from(parts);
        if parts == 0 || parts > rest.len() {
            return Err(format!("parts of the chunk at index {first} are missing"));
        }
        let mut payload = Vec::new();
        for (part, (key, value)) in rest[..parts].iter().enumerate() {
            let (own_part, own_parts, piece) = read_value(value)?;
            let right = read_key(key)? == (first, part as u16)
                && usize::from(own_part) == part
                && usize::from(own_parts) == parts;
            if !right {
                return Err(format!("parts of the chunk at index {first} are missing"));
            }
            payload.extend_from_slice(piece);
        }
        read_payload(begin, first, &payload, &mut entries)?;
        rest = &rest[parts..];
    }
    Ok(entries)
}

fn read_payload(
    log_begin: u64,
    first: u64,
    mut payload: &[u8],
    entries: &mut Vec<Entry>,
) -> Result<(), String> {
    let damaged = || format!("the chunk at index {first} does not hold whole entries");
    let begin = entries.len();
    while !payload.is_empty() {
        let (length, rest) = payload.split_first_chunk::<4>().ok_or_else(damaged)?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > rest.len() {
            return Err(damaged());
        }
        let (bytes, rest) = rest.split_at(length);
        let entry = Entry::parse_from_bytes(bytes).map_err(|_| damaged())?;
        let expected = entries.last().map_or(log_begin, |last| last.index + 1);
        if entry.index != expected {
            return Err(format!(
                "entry {expected} is missing: {} follows",
                entry.index
            ));
        }
        entries.push(entry);
        payload = rest;
    }
    match entries.get(begin) {
        Some(entry) if entry.index == first => Ok(()),
        _ => Err(damaged()),
    }
}

/// First index and part.
pub fn read_key(key: &[u8]) -> Result<(u64, u16), String> {
    let damaged = || "a key of the log is malformed".to_owned();
    let rest = key.strip_prefix(&prefix()).ok_or_else(damaged)?;
    let (first, part) = rest.split_first_chunk::<8>().ok_or_else(damaged)?;
    let part: [u8; 2] = part.try_into().map_err(|_| damaged())?;
    Ok((u64::from_be_bytes(*first), u16::from_be_bytes(part)))
}

/// Part, number of parts, piece.
fn read_value(value: &[u8]) -> Result<(u16, u16, &[u8]), String> {
    let short = || "a chunk of the log is too short".to_owned();
    let (crc, body) = value.split_first_chunk::<4>().ok_or_else(short)?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) && !fault!("checksum_not_checked") {
        return Err("a chunk of the log has a wrong checksum".to_owned());
    }
    let (parts, rest) = body.split_first_chunk::<2>().ok_or_else(short)?;
    let (part, piece) = rest.split_first_chunk::<2>().ok_or_else(short)?;
    Ok((u16::from_le_bytes(*part), u16::from_le_bytes(*parts), piece))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(sizes: &[usize]) -> Vec<Entry> {
        let entry = |(i, size): (usize, &usize)| Entry {
            index: i as u64 + 1,
            term: 3,
            data: vec![i as u8; *size].into(),
            ..Default::default()
        };
        sizes.iter().enumerate().map(entry).collect()
    }

    fn records(sizes: &[usize]) -> Vec<Record> {
        pack(&entries(sizes))
            .into_iter()
            .flat_map(|chunk| chunk.records)
            .collect()
    }

    #[test]
    fn entries_of_every_size_come_back_and_no_chunk_is_large() {
        for sizes in [
            vec![],
            vec![0],
            vec![1; 5000],
            vec![19_000, 19_000, 10],
            vec![20_000],
            vec![3_000_000, 5, 70_000, 5],
        ] {
            let records = records(&sizes);
            assert_eq!(unpack_behind(0, &records).unwrap(), entries(&sizes));
            assert!(
                records
                    .iter()
                    .all(|(_, v)| v.len() <= PAYLOAD_BYTES_MAX + HEADER_BYTES)
            );
        }
        assert_eq!(records(&[1; 5]).len(), 1, "small entries share a chunk");
    }

    #[test]
    fn every_flipped_bit_and_every_missing_record_is_noticed() {
        let whole = records(&[10, 30_000, 10]);
        for i in 0..whole.len() {
            let mut missing = whole.clone();
            missing.remove(i);
            // The last chunk can be absent without a trace here: the witness is what knows the last index.
            let last = i == whole.len() - 1;
            assert_eq!(unpack_behind(0, &missing).is_err(), !last, "record {i}");
            for bit in (0..whole[i].1.len() * 8).step_by(97) {
                let mut flipped = whole.clone();
                flipped[i].1[bit / 8] ^= 1 << (bit % 8);
                assert!(unpack_behind(0, &flipped).is_err(), "record {i} bit {bit}");
            }
        }
    }
}
