//! Files that grow at their end.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use batchai_common::names::{Kind, Name, check_id};
use bytes::Bytes;
use tokio::sync::watch;

/// Which file: names that are safe as parts of a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileKey {
    attempt: String,
    node_id: String,
    file: String,
}

impl FileKey {
    /// `None` where one of the parts could leave its directory.
    pub fn new(attempt: &str, node: &str, file: &str) -> Option<FileKey> {
        check_id(Kind::Node, attempt).ok()?;
        let node = Name::parse(Kind::Node, node).ok()?;
        // The same characters as in the ids of resource groups: dots, but no slashes, and neither `.` nor `..`.
        check_id(Kind::ResourceGroup, file).ok()?;
        Some(FileKey {
            attempt: attempt.to_owned(),
            node_id: node.id().to_owned(),
            file: file.to_owned(),
        })
    }

    fn path(&self, root: &Path) -> PathBuf {
        root.join(&self.attempt)
            .join(&self.node_id)
            .join(&self.file)
    }
}

/// A file that is being written or read.
struct Open {
    file: Arc<File>,
    length: watch::Sender<u64>,
}

/// All log files of this replica.
#[derive(Clone)]
pub struct LogStore {
    root: PathBuf,
    open: Arc<Mutex<HashMap<FileKey, Arc<Open>>>>,
}

impl LogStore {
    /// Keeps files below a directory, which is made where it does not exist.
    pub fn new(root: PathBuf) -> io::Result<LogStore> {
        fs::create_dir_all(&root)?;
        Ok(LogStore {
            root,
            open: Arc::default(),
        })
    }

    /// Writes a piece at an offset if the file reaches so far; what it has already is left alone. Returns the file's
    /// length, from which the sender goes on.
    pub async fn append(&self, key: FileKey, offset: u64, data: Bytes) -> io::Result<u64> {
        let store = self.clone();
        let write = move || {
            let open = store.open(&key, true)?;
            let length = *open.length.borrow();
            let end = offset + data.len() as u64;
            if offset > length || end <= length {
                return Ok(length);
            }
            open.file
                .write_all_at(&data[(length - offset) as usize..], length)?;
            open.length.send_replace(end);
            Ok(end)
        };
        tokio::task::spawn_blocking(write)
            .await
            .map_err(io::Error::other)?
    }

    /// A file and its growing length; `None` where it does not exist.
    pub async fn follow(
        &self,
        key: FileKey,
    ) -> io::Result<Option<(Arc<File>, watch::Receiver<u64>)>> {
        let store = self.clone();
        let open = move || match store.open(&key, false) {
            Ok(open) => Ok(Some((open.file.clone(), open.length.subscribe()))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        tokio::task::spawn_blocking(open)
            .await
            .map_err(io::Error::other)?
    }

    fn open(&self, key: &FileKey, create: bool) -> io::Result<Arc<Open>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get(key) {
            return Ok(known.clone());
        }
        let path = key.path(&self.root);
        if let (true, Some(parent)) = (create, path.parent()) {
            fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .open(path)?;
        let length = file.metadata()?.len();
        let new = Arc::new(Open {
            file: Arc::new(file),
            length: watch::Sender::new(length),
        });
        open.insert(key.clone(), new.clone());
        Ok(new)
    }

    /// The attempts that have files.
    pub fn attempts(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.root)?.map(|entry| Ok(entry?.file_name()));
        names
            .map(|name| name.map(|name| name.to_string_lossy().into_owned()))
            .collect()
    }

    /// Closes the files of attempts that have ended and that nobody reads; they are opened again when they are needed.
    pub fn close(&self, ended: impl Fn(&str) -> bool) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|key, file| !ended(&key.attempt) || file.length.receiver_count() > 0);
    }

    /// Removes the files of attempts.
    pub fn remove(&self, attempts: impl Iterator<Item = String>) -> io::Result<()> {
        for attempt in attempts {
            fs::remove_dir_all(self.root.join(attempt))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(file: &str) -> FileKey {
        FileKey::new("1-1", "nodes/n", file).unwrap()
    }

    #[test]
    fn names_that_leave_their_directory_are_no_keys() {
        for (attempt, node, file) in [
            ("..", "nodes/n", "f"),
            ("1/2", "nodes/n", "f"),
            ("1", "n", "f"),
            ("1", "nodes/..", "f"),
            ("1", "nodes/n", ".."),
            ("1", "nodes/n", "a/b"),
            ("1", "nodes/n", ""),
        ] {
            assert_eq!(
                FileKey::new(attempt, node, file),
                None,
                "{attempt} {node} {file}"
            );
        }
    }

    #[tokio::test]
    async fn pieces_arrive_once_and_without_gaps_whatever_is_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let store = LogStore::new(dir.path().join("logs")).unwrap();
        let put = async |store: &LogStore, offset, text: &'static str| {
            store
                .append(key("f"), offset, Bytes::from_static(text.as_bytes()))
                .await
                .unwrap()
        };
        assert!(store.follow(key("f")).await.unwrap().is_none());
        assert_eq!(put(&store, 0, "hello ").await, 6);
        assert_eq!(put(&store, 8, "gap").await, 6);
        assert_eq!(put(&store, 0, "hello ").await, 6);
        assert_eq!(put(&store, 4, "o world").await, 11);
        let again = LogStore::new(dir.path().join("logs")).unwrap();
        assert_eq!(put(&again, 11, "!").await, 12);
        assert_eq!(
            fs::read(dir.path().join("logs/1-1/n/f")).unwrap(),
            b"hello world!"
        );
        assert_eq!(again.attempts().unwrap(), ["1-1"]);
        again.close(|_| true);
        again.remove(["1-1".to_owned()].into_iter()).unwrap();
        assert!(again.follow(key("f")).await.unwrap().is_none());
    }
}
