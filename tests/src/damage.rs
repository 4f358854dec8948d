//! Damage to a data directory, drawn from a seed: the same seed does the same. One file is hurt at a time, as a disk or an
//! administrator does it; a whole directory that is put back from an old copy is not played, for nobody can tell it from the
//! present one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use fastrand::Rng;

/// What a disk loses at once.
const BLOCK_BYTES: usize = 512;
/// So many kinds of damage there are.
pub const KINDS: u64 = 5;

/// The content of every file below a directory, by its path from there.
pub type Contents = BTreeMap<PathBuf, Vec<u8>>;

/// Reads all files below a directory.
pub fn contents(dir: &Path) -> Contents {
    let mut found = Contents::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).expect("a directory can be read") {
            let path = entry.expect("a directory can be read").path();
            if path.is_dir() {
                left.push(path);
            } else {
                let bytes = fs::read(&path).expect("a file can be read");
                let inside = path.strip_prefix(dir).expect("it was found there");
                found.insert(inside.to_owned(), bytes);
            }
        }
    }
    found
}

/// Copies a directory with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory can be made");
    for entry in fs::read_dir(from).expect("a directory can be read") {
        let path = entry.expect("a directory can be read").path();
        let target = to.join(path.file_name().expect("it has a name"));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, target).expect("a file can be copied");
        }
    }
}

/// The files that damage is drawn from: the replica's store, and what says which store and which replica it is. What lies beside
/// them holds nothing that a client was told is kept in the log: certificates are made anew, `audit`, `logs` and `bundles` are
/// files of their own, and what the keys of secrets open nobody can list.
fn drawn_from(path: &Path) -> bool {
    path.starts_with("replica") || path == Path::new("begun") || path == Path::new("ensemble.json")
}

/// Does the damage of a seed to a data directory, of which an earlier copy exists; returns what it was. Something is another
/// afterwards.
pub fn hurt(data: &Path, earlier: &Path, seed: u64) -> String {
    let mut rng = Rng::with_seed(seed);
    let of = |dir: &Path| {
        let mut files = contents(dir);
        files.retain(|path, _| drawn_from(path));
        files
    };
    let (now, before) = (of(data), of(earlier));
    loop {
        let (path, changed, what) = match seed % KINDS {
            4 => {
                let (path, bytes) = pick(&mut rng, &before);
                (path, Some(bytes), "of an earlier copy".to_owned())
            }
            kind => {
                let (path, bytes) = pick(&mut rng, &now);
                let (changed, what) = change(&mut rng, kind, bytes);
                (path, changed, what)
            }
        };
        if now.get(&path) == changed.as_ref() {
            continue;
        }
        let file = data.join(&path);
        match changed {
            Some(bytes) => fs::write(&file, bytes).expect("a file can be written"),
            None => fs::remove_file(&file).expect("a file can be removed"),
        }
        return format!("{}: {what}", path.display());
    }
}

/// A file; half of the time it is the log's, which has by far the most bytes.
fn pick(rng: &mut Rng, files: &Contents) -> (PathBuf, Vec<u8>) {
    let log = Path::new("replica/log/db").to_owned();
    let all: Vec<_> = files.keys().collect();
    let path = match rng.bool() {
        true => &log,
        false => all[rng.usize(..all.len())],
    };
    (path.clone(), files[path].clone())
}

/// What becomes of a file, and in words.
fn change(rng: &mut Rng, kind: u64, mut bytes: Vec<u8>) -> (Option<Vec<u8>>, String) {
    // Most of the log's file was never written.
    let written = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
    let at = rng.usize(..written);
    match kind {
        0 if !bytes.is_empty() => {
            let bit = rng.usize(..8);
            bytes[at] ^= 1 << bit;
            (Some(bytes), format!("bit {bit} of byte {at} flipped"))
        }
        1 => {
            bytes.truncate(at);
            (Some(bytes), format!("cut off at {at}"))
        }
        2 if !bytes.is_empty() => {
            let begin = at - at % BLOCK_BYTES;
            let end = bytes.len().min(begin + BLOCK_BYTES);
            bytes[begin..end].fill(0);
            (Some(bytes), format!("zeroes from {begin} to {end}"))
        }
        _ => (None, "removed".to_owned()),
    }
}

/// What has become of a directory that nobody should have changed; it may have been locked.
pub fn differences(before: &Contents, after: &Contents) -> Vec<String> {
    let paths: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let differ = paths.into_iter().filter_map(|path| {
        let said = match (before.get(path), after.get(path)) {
            (Some(old), Some(new)) if old == new => return None,
            (Some(old), Some(new)) => {
                let differ = old.iter().zip(new).filter(|(old, new)| old != new).count();
                format!(
                    "changed: {} bytes were {}, {differ} of them differ",
                    new.len(),
                    old.len()
                )
            }
            (Some(_), None) => "removed".to_owned(),
            (None, _) if path == Path::new("lock") => return None,
            (None, _) => "made".to_owned(),
        };
        Some(format!("{} {said}", path.display()))
    });
    differ.collect()
}
