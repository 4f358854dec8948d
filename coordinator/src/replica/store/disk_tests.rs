use std::fs;

use super::*;

fn identity() -> ReplicaIdentity {
    ReplicaIdentity {
        format: FORMAT,
        ensemble: "e".into(),
        replica_id: 1,
        voters: vec![1],
        store: "one".into(),
    }
}

fn entry(index: u64, term: u64, size: usize) -> Entry {
    Entry {
        index,
        term,
        data: vec![index as u8; size].into(),
        ..Default::default()
    }
}

fn hard_state(term: u64, vote: u64) -> HardState {
    HardState {
        term,
        vote,
        ..Default::default()
    }
}

fn at(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("replica")
}

fn open(path: &Path) -> (DiskStore, Recovered) {
    DiskStore::open(path, &identity()).unwrap()
}

/// A store with entries 1 to 9 in several chunks, one of them in parts.
fn filled() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, recovered) = open(&at(&dir));
    assert!(recovered.entries.is_empty());
    store
        .append(
            &[entry(1, 1, 5), entry(2, 1, 5), entry(3, 1, 5)],
            Some(&hard_state(1, 1)),
        )
        .unwrap();
    store.append(&[entry(4, 1, 90_000)], None).unwrap();
    store
        .append(
            &(5..=9).map(|i| entry(i, 1, 8_000)).collect::<Vec<_>>(),
            None,
        )
        .unwrap();
    dir
}

#[test]
fn what_was_appended_comes_back() {
    let dir = filled();
    let (_, recovered) = open(&at(&dir));
    assert_eq!(recovered.entries.len(), 9);
    assert_eq!(recovered.entries[3], entry(4, 1, 90_000));
    assert_eq!(recovered.hard_state, hard_state(1, 1));
    assert_eq!(recovered.identity, identity());
    let blobs = at(&dir).join("log/blobs");
    let blobs = fs::read_dir(blobs).map(|dir| dir.count()).unwrap_or(0);
    assert_eq!(blobs, 0, "values in files of their own are never synced");
}

#[test]
fn a_conflict_replaces_the_tail_wherever_it_begins() {
    for from in 1..=9 {
        let dir = filled();
        {
            let (mut store, _) = open(&at(&dir));
            store
                .append(&[entry(from, 2, 7)], Some(&hard_state(2, 1)))
                .unwrap();
            store.append(&[entry(from + 1, 2, 7)], None).unwrap();
        }
        let (_, recovered) = open(&at(&dir));
        let terms: Vec<_> = recovered
            .entries
            .iter()
            .map(|e| (e.index, e.term))
            .collect();
        let kept = (1..from).map(|i| (i, 1));
        assert_eq!(
            terms,
            kept.chain([(from, 2), (from + 1, 2)]).collect::<Vec<_>>()
        );
    }
}

/// The witness is written before and after the log: a crash between the log and the second time leaves what was promised before.
#[test]
fn a_shorter_log_without_its_witness_is_no_damage() {
    let dir = filled();
    let (mut store, _) = open(&at(&dir));
    let mut batch = sled::Batch::default();
    store.truncate(5, &mut batch).unwrap();
    store.insert(&[entry(5, 2, 7)], &mut batch);
    store.commit(batch).unwrap();
    drop(store);
    let (_, recovered) = open(&at(&dir));
    assert_eq!(recovered.entries.last(), Some(&entry(5, 2, 7)));
}

#[test]
fn a_log_that_lost_its_tail_or_its_vote_is_refused() {
    let dir = filled();
    let witness = at(&dir).join("witness");
    let (_, mark) = Witness::open(&witness).unwrap().unwrap();
    assert_eq!(
        mark,
        Mark {
            replica: 1,
            term: 1,
            vote: 1,
            last: 9
        }
    );
    for (mark, refused) in [
        (Mark { last: 10, ..mark }, true),
        (Mark { term: 2, ..mark }, true),
        (Mark { vote: 3, ..mark }, true),
        (Mark { replica: 2, ..mark }, true),
        (Mark { last: 8, ..mark }, false),
        (
            Mark {
                term: 0,
                vote: 0,
                ..mark
            },
            false,
        ),
    ] {
        fs::remove_file(&witness).unwrap();
        Witness::create(&witness, mark).unwrap();
        let opened = DiskStore::open(&at(&dir), &identity());
        assert_eq!(
            matches!(opened, Err(StoreError::Damaged { .. })),
            refused,
            "{mark:?}"
        );
    }
}

#[test]
fn a_missing_half_is_damage_and_nothing_is_made_anew() {
    let dir = filled();
    let (log, witness) = (at(&dir).join("log"), at(&dir).join("witness"));
    fs::rename(&log, at(&dir).join("away")).unwrap();
    let error = DiskStore::open(&at(&dir), &identity()).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(!log.exists());
    fs::rename(at(&dir).join("away"), &log).unwrap();
    fs::remove_file(&witness).unwrap();
    let error = DiskStore::open(&at(&dir), &identity()).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[test]
fn another_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let later = ReplicaIdentity {
        format: FORMAT + 1,
        ..identity()
    };
    let error = DiskStore::open(&at(&dir), &later).err().unwrap();
    assert!(matches!(error, StoreError::Format { found, .. } if found == FORMAT + 1));
}

fn state(index: u64) -> State {
    State {
        applied_index: index,
        ..State::default()
    }
}

fn mark(index: u64) -> SnapshotMark {
    SnapshotMark {
        index,
        term: 1,
        conf_state: vec![],
    }
}

fn begin(index: u64) -> Begin {
    Begin { index, term: 1 }
}

/// A store with entries 1 to 200, of which those up to 150 are in a snapshot and those up to 140 may go.
fn compacted(dir: &tempfile::TempDir) -> DiskStore {
    let (mut store, _) = open(&at(dir));
    for i in 1..=200 {
        store
            .append(&[entry(i, 1, 100)], Some(&hard_state(1, 1)))
            .unwrap();
    }
    store.snapshots().write(&mark(150), &state(150)).unwrap();
    store.compact(&mark(150), begin(140)).unwrap();
    store
}

#[test]
fn a_log_begins_behind_its_snapshot_and_its_prefix_goes_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = compacted(&dir);
    let check = |indexes: std::ops::RangeInclusive<u64>| {
        let (store, recovered) = open(&at(&dir));
        let found: Vec<_> = recovered.entries.iter().map(|e| e.index).collect();
        assert_eq!(found, indexes.collect::<Vec<_>>());
        assert_eq!(recovered.begin, begin(140));
        assert_eq!(recovered.snapshot, Some((mark(150), state(150))));
        store
    };
    let before = store.chunks.len();
    drop(store);
    store = check(141..=200);
    for i in 201..=203 {
        store.append(&[entry(i, 1, 100)], None).unwrap();
        let gone = before + (i - 200) as usize - store.chunks.len();
        assert_eq!(gone, FORGOTTEN_AT_ONCE * (i - 200) as usize);
    }
    drop(store);
    store = check(141..=203);
    for i in 204..=230 {
        store.append(&[entry(i, 1, 100)], None).unwrap();
    }
    assert_eq!(store.chunks.len(), 90, "one a chunk, from 141 on");
    // A conflict behind the begin.
    store
        .append(&[entry(160, 2, 7)], Some(&hard_state(2, 1)))
        .unwrap();
    drop(store);
    store = check(141..=160);
    // The next snapshot takes the one before along.
    store.snapshots().write(&mark(160), &state(160)).unwrap();
    assert!(snapshot::path(&at(&dir).join(SNAPSHOTS), 150).exists());
    store.compact(&mark(160), begin(160)).unwrap();
    assert!(!snapshot::path(&at(&dir).join(SNAPSHOTS), 150).exists());
    drop(store);
    let (_, recovered) = open(&at(&dir));
    assert_eq!((recovered.begin, recovered.entries.len()), (begin(160), 0));
}

#[test]
fn a_snapshot_that_is_damaged_missing_or_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(compacted(&dir));
    let file = snapshot::path(&at(&dir).join(SNAPSHOTS), 150);
    let whole = fs::read(&file).unwrap();
    let refused = |why: &str| {
        let error = DiskStore::open(&at(&dir), &identity())
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("damaged") && error.contains(why), "{error}");
    };
    let mut flipped = whole.clone();
    flipped[30] ^= 1;
    fs::write(&file, flipped).unwrap();
    refused("checksum");
    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    refused("too early");
    fs::remove_file(&file).unwrap();
    refused("No such file");
    let other = SnapshotMark {
        term: 9,
        ..mark(150)
    };
    snapshot::write(&at(&dir).join(SNAPSHOTS), &other, &state(150)).unwrap();
    refused("not the one");
    fs::write(&file, whole).unwrap();
    open(&at(&dir));
    // A log whose middle is missing.
    let (mut store, _) = open(&at(&dir));
    let mut batch = sled::Batch::default();
    store.remove(145, 1, &mut batch);
    store.commit(batch).unwrap();
    drop(store);
    refused("145 is missing");
}

#[test]
fn a_snapshot_from_a_peer_takes_the_place_of_the_log() {
    for (index, why) in [(150, "in the middle"), (230, "behind the end")] {
        let dir = tempfile::tempdir().unwrap();
        let mut store = compacted(&dir);
        let mark = SnapshotMark {
            term: 2,
            ..mark(index)
        };
        let begin = Begin { index, term: 2 };
        store.snapshots().write(&mark, &state(index)).unwrap();
        store.install(&mark, begin).unwrap();
        drop(store);
        let (mut store, recovered) = open(&at(&dir));
        assert_eq!(
            (recovered.begin, recovered.entries.len()),
            (begin, 0),
            "{why}"
        );
        assert_eq!(recovered.snapshot, Some((mark, state(index))));
        store
            .append(&[entry(index + 1, 2, 9)], Some(&hard_state(2, 1)))
            .unwrap();
        drop(store);
        let (_, recovered) = open(&at(&dir));
        let indexes: Vec<_> = recovered.entries.iter().map(|entry| entry.index).collect();
        assert_eq!(indexes, [index + 1], "{why}");
    }
}
