//! Bundles on this replica's disk: `{sha256}.tar.gz`, whole and with the right digest, or not there at all.
//!
//! They are not unpacked here, and never enter the replicated log.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes};
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use batchai_common::error::ApiError;
use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_common::names::hex;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::logs::check_space;

const SUFFIX: &str = ".tar.gz";
/// What the names of unfinished ones end with.
const PART: &str = ".part";
/// Bundles that are sent or received at once: each holds a thread.
const TRANSFERS_MAX: usize = 64;
/// One that no job names is kept for so long.
const UNUSED_MAX: Duration = Duration::from_secs(3600);

/// Why a bundle was not taken.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("{sent} bytes came, {announced} were announced")]
    Size { sent: u64, announced: u64 },
    #[error("its SHA-256 is {found}")]
    Digest { found: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// All bundles of this replica.
#[derive(Clone, Debug)]
pub struct BundleStore {
    root: PathBuf,
    transfers: Arc<Semaphore>,
}

impl BundleStore {
    /// Keeps bundles in a directory, which is made where it does not exist.
    pub fn new(root: PathBuf) -> io::Result<BundleStore> {
        fs::create_dir_all(&root)?;
        for entry in fs::read_dir(&root)? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(PART) {
                fs::remove_file(path)?;
            }
        }
        let transfers = Arc::new(Semaphore::new(TRANSFERS_MAX));
        Ok(BundleStore { root, transfers })
    }

    /// The right to receive or send one.
    pub fn transfer(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let what = "the list of bundles that are sent or received";
        let permit = self.transfers.clone().try_acquire_owned();
        permit.map_err(|_| ApiError::Busy { what })
    }

    fn path(&self, digest: &str) -> PathBuf {
        self.root.join(format!("{digest}{SUFFIX}"))
    }

    /// Size and time of last use; none where it is absent.
    pub fn find(&self, digest: &str) -> io::Result<Option<(u64, SystemTime)>> {
        match fs::metadata(self.path(digest)) {
            Ok(found) => Ok(Some((found.len(), found.modified()?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Notes that somebody has a use for it. `false` where it is absent.
    pub fn use_now(&self, digest: &str) -> io::Result<bool> {
        match File::options().append(true).open(self.path(digest)) {
            Ok(file) => {
                file.set_times(FileTimes::new().set_modified(SystemTime::now()))?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Its bytes; none where it is absent.
    pub fn open(&self, digest: &str) -> io::Result<Option<File>> {
        match File::open(self.path(digest)) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives the pieces of a bundle that was opened, as long as they are taken. It waits for the disk. One that turns out to be damaged
    /// is removed: who sends it again then replaces it.
    pub fn give(
        &self,
        digest: &str,
        mut file: File,
        mut take: impl FnMut(Bytes) -> bool,
    ) -> Result<(), BundleError> {
        let mut hash = Sha256::new();
        loop {
            let mut piece = vec![0; FILE_CHUNK_BYTES_MAX];
            let read = file.read(&mut piece)?;
            if read == 0 {
                break;
            }
            piece.truncate(read);
            hash.update(&piece);
            if !take(piece.into()) {
                return Ok(());
            }
        }
        let found = hex(&hash.finalize());
        if found == digest {
            return Ok(());
        }
        let removed = fs::remove_file(self.path(digest));
        tracing::error!(digest, ?removed, "a bundle is damaged; it was removed");
        Err(BundleError::Digest { found })
    }

    /// Takes the pieces of a bundle until there are no more, and keeps it if it is what was announced. It waits for the
    /// disk.
    pub fn receive(
        &self,
        digest: &str,
        announced: u64,
        mut pieces: mpsc::Receiver<Bytes>,
    ) -> Result<(), BundleError> {
        let part = Part {
            path: self.root.join(format!("{}{PART}", uuid::Uuid::new_v4())),
        };
        let mut file = File::create_new(&part.path)?;
        let (mut hash, mut sent) = (Sha256::new(), 0);
        while let Some(piece) = pieces.blocking_recv() {
            sent += piece.len() as u64;
            if sent > announced {
                return Err(BundleError::Size { sent, announced });
            }
            check_space(&self.root)?;
            hash.update(&piece);
            file.write_all(&piece)?;
        }
        if sent != announced {
            return Err(BundleError::Size { sent, announced });
        }
        let found = hex(&hash.finalize());
        if found != digest {
            return Err(BundleError::Digest { found });
        }
        file.sync_all()?;
        fs::rename(&part.path, self.path(digest))?;
        File::open(&self.root)?.sync_all()?;
        Ok(())
    }

    /// Removes what no job names and nobody has used for long.
    pub fn sweep(&self, used: &BTreeSet<&str>) -> io::Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(digest) = name.strip_suffix(SUFFIX) else {
                continue;
            };
            let age = entry.metadata()?.modified()?.elapsed();
            if !used.contains(digest) && age.is_ok_and(|age| age > UNUSED_MAX) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// An unfinished file. It goes, unless it was renamed.
struct Part {
    path: PathBuf,
}

impl Drop for Part {
    fn drop(&mut self) {
        // After a success it is not there any more; else the next start removes what could not be removed now.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(
        store: &BundleStore,
        digest: &str,
        size: u64,
        text: &str,
    ) -> Result<(), BundleError> {
        let (sender, pieces) = mpsc::channel(8);
        for piece in text.as_bytes().chunks(3) {
            sender.try_send(Bytes::copy_from_slice(piece)).unwrap();
        }
        drop(sender);
        store.receive(digest, size, pieces)
    }

    #[test]
    fn what_is_not_what_was_announced_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = BundleStore::new(dir.path().join("bundles")).unwrap();
        let digest = hex(&Sha256::digest("hello"));
        assert!(matches!(
            receive(&store, &digest, 4, "hello"),
            Err(BundleError::Size { .. })
        ));
        assert!(matches!(
            receive(&store, &digest, 6, "hello"),
            Err(BundleError::Size { .. })
        ));
        assert!(matches!(
            receive(&store, &digest, 5, "hallo"),
            Err(BundleError::Digest { .. })
        ));
        assert_eq!(fs::read_dir(dir.path().join("bundles")).unwrap().count(), 0);
        assert!(!store.use_now(&digest).unwrap());
        receive(&store, &digest, 5, "hello").unwrap();
        assert_eq!(store.find(&digest).unwrap().unwrap().0, 5);
        assert!(store.use_now(&digest).unwrap());
    }

    #[test]
    fn what_nobody_uses_goes_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let store = BundleStore::new(dir.path().to_owned()).unwrap();
        let long_ago = FileTimes::new().set_modified(SystemTime::now() - 2 * UNUSED_MAX);
        let mut digests = Vec::new();
        for text in ["old", "used", "new"] {
            let digest = hex(&Sha256::digest(text));
            receive(&store, &digest, text.len() as u64, text).unwrap();
            if text != "new" {
                let file = File::options()
                    .append(true)
                    .open(store.path(&digest))
                    .unwrap();
                file.set_times(long_ago).unwrap();
            }
            digests.push(digest);
        }
        fs::write(dir.path().join("x.part"), "").unwrap();
        store.sweep(&BTreeSet::from([digests[1].as_str()])).unwrap();
        let left = |digest: &str| store.find(digest).unwrap().is_some();
        assert_eq!(
            digests.iter().map(|d| left(d)).collect::<Vec<_>>(),
            [false, true, true]
        );
        BundleStore::new(dir.path().to_owned()).unwrap();
        assert!(!dir.path().join("x.part").exists());
    }
}
