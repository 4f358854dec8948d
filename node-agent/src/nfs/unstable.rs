//! Files with writes that clients were not told are stable.
//!
//! Such a file stays open until it is synced, by the client's COMMIT, or here when it is left alone: the kernel tells of a failed write to the
//! disk only those who had the file open before. After such a failure the verifier, which every answer to WRITE and COMMIT carries, is another
//! one. So it is after a start. Clients that see it change write again what they were not told is stable.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::said;

/// How many files may wait. Writes to others are stable at once.
const FILES_MAX: usize = 256;
/// How long a file may be left alone.
const ALONE: Duration = Duration::from_secs(3);

struct Waiting {
    file: Arc<File>,
    /// Held while it is synced: nobody else is told that all is well before a failure has changed the verifier.
    syncing: Arc<Mutex<()>>,
    writes: u64,
    last: Instant,
}

/// The files, by their numbers: as long as they are open no other file of the export, which is one file system, has one of these.
pub struct Unstable {
    files: Mutex<HashMap<u64, Waiting>>,
    verifier: AtomicU64,
}

impl Unstable {
    pub fn new() -> Unstable {
        Unstable {
            files: Mutex::default(),
            verifier: AtomicU64::new(fastrand::u64(..)),
        }
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        // Every change is one step.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write takes it before it is done, a COMMIT after that.
    pub fn verifier(&self) -> u64 {
        self.verifier.load(Ordering::SeqCst)
    }

    /// That a file was written to. Where it does not remember that, the write has to be made stable.
    #[must_use]
    pub fn wrote(&self, number: u64, file: &Arc<File>) -> bool {
        let mut files = self.files();
        if let Some(waiting) = files.get_mut(&number) {
            waiting.writes += 1;
            waiting.last = Instant::now();
            return true;
        }
        if files.len() >= FILES_MAX {
            return false;
        }
        let waiting = Waiting {
            file: Arc::clone(file),
            syncing: Arc::default(),
            writes: 1,
            last: Instant::now(),
        };
        files.insert(number, waiting);
        true
    }

    /// Syncs a file that was just written to.
    pub fn sync(&self, file: &File) -> io::Result<()> {
        let synced = file.sync_all();
        if synced.is_err() {
            // What others wrote to it may be lost as well.
            self.verifier.fetch_add(1, Ordering::SeqCst);
        }
        synced
    }

    /// Makes all writes to a file stable. One that does not wait has none that are not.
    ///
    /// Where that fails it waits no longer either, but for writes that came meanwhile: what was lost cannot be synced, and who wrote it
    /// learns of it by the verifier.
    pub fn commit(&self, number: u64) -> io::Result<()> {
        let found = self
            .files()
            .get(&number)
            .map(|waiting| (Arc::clone(&waiting.file), Arc::clone(&waiting.syncing)));
        let Some((file, syncing)) = found else {
            return Ok(());
        };
        let _alone = syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |files: &HashMap<u64, Waiting>| {
            let waiting = files.get(&number);
            // One that came in its stead may have as many.
            let same = waiting.filter(|waiting| Arc::ptr_eq(&waiting.syncing, &syncing));
            same.map(|waiting| waiting.writes)
        };
        let writes = of(&self.files());
        if writes.is_none() {
            // Another one has synced it meanwhile.
            return Ok(());
        }
        let synced = self.sync(&file);
        let mut files = self.files();
        if of(&files) == writes {
            files.remove(&number);
        }
        synced
    }

    /// Syncs the files that were left alone, or all.
    pub fn settle(&self, all: bool) {
        let idle = |waiting: &Waiting| all || waiting.last.elapsed() >= ALONE;
        let files = self.files();
        let numbers = files.iter().filter(|(_, waiting)| idle(waiting));
        let numbers: Vec<u64> = numbers.map(|(number, _)| *number).collect();
        drop(files);
        for number in numbers {
            if let Err(error) = self.commit(number)
                && said::may_say("lost data", None)
            {
                tracing::error!(%error, file = number, "written data may be lost: clients are asked to write it again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: u64) -> (tempfile::TempDir, Arc<File>) {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join(n.to_string())).unwrap();
        (dir, Arc::new(file))
    }

    #[test]
    fn a_file_waits_until_it_is_synced() {
        let unstable = Unstable::new();
        let (_dir, file) = file(1);
        assert!(unstable.wrote(1, &file) && unstable.wrote(1, &file));
        unstable.settle(false);
        assert_eq!(unstable.files()[&1].writes, 2, "it is not left alone");
        let before = unstable.verifier();
        unstable.commit(1).unwrap();
        unstable.commit(1).unwrap();
        assert!(unstable.files().is_empty());
        assert_eq!(unstable.verifier(), before);
    }

    #[test]
    fn a_failure_changes_the_verifier() {
        let unstable = Unstable::new();
        // Nothing that can be synced.
        let pipe = Arc::new(File::from(nix::unistd::pipe().unwrap().1));
        assert!(unstable.wrote(1, &pipe));
        let before = unstable.verifier();
        assert!(unstable.commit(1).is_err());
        assert_ne!(unstable.verifier(), before);
        assert!(
            unstable.files().is_empty(),
            "what is lost is not waited for"
        );
    }

    #[test]
    fn nobody_is_told_that_lost_data_is_stable() {
        use std::sync::atomic::AtomicBool;
        let unstable = Unstable::new();
        let pipe = Arc::new(File::from(nix::unistd::pipe().unwrap().1));
        let done = AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    unstable.settle(true);
                }
            });
            for round in 0..20_000 {
                let told = unstable.verifier();
                assert!(unstable.wrote(1, &pipe));
                let committed = unstable.commit(1);
                if committed.is_ok() && unstable.verifier() == told {
                    done.store(true, Ordering::SeqCst);
                    panic!("round {round}: what cannot be synced is said to be stable");
                }
            }
            done.store(true, Ordering::SeqCst);
        });
    }

    #[test]
    fn there_is_an_end_to_what_waits() {
        let unstable = Unstable::new();
        let (_dir, file) = file(1);
        for number in 0..FILES_MAX as u64 {
            assert!(unstable.wrote(number, &file));
        }
        assert!(!unstable.wrote(FILES_MAX as u64, &file));
        assert!(unstable.wrote(0, &file));
        unstable.settle(true);
        assert!(unstable.wrote(FILES_MAX as u64, &file));
    }
}
