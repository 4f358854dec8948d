use super::*;

fn identity() -> ReplicaIdentity {
    ReplicaIdentity {
        format: FORMAT,
        ensemble: "e".into(),
        replica_id: 1,
        voters: vec![1],
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
