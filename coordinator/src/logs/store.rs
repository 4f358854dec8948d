//! Files that grow at their end.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use batchai_common::names::{Kind, Name, check_id};
use batchai_common::time::now_millis;
use bytes::Bytes;
use tokio::sync::watch;

use super::LogFile;

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
        check_file(file).then_some(())?;
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

/// The longest name of a log file; it may carry the name of a node.
const FILE_NAME_BYTES_MAX: usize = 128;

/// Whether a text may name a log file: letters, digits, `-`, `_` and dots, and neither `.` nor `..`.
pub fn check_file(name: &str) -> bool {
    let legal = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    !name.is_empty()
        && name.len() <= FILE_NAME_BYTES_MAX
        && name.bytes().all(legal)
        && name != "."
        && name != ".."
}

/// Files that are kept open at most; those that are needed again are opened again.
const OPEN_MAX: usize = 1024;
/// What the kernel counts files in.
const BLOCK_BYTES: u64 = 512;
/// Logs leave so much of their disk alone, a twentieth of it but no more than this: the replicated log may lie on it too.
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// A job that floods its log, or whoever sends large bundles, must not take the last of the disk.
pub fn check_space(root: &Path) -> io::Result<()> {
    let disk = nix::sys::statvfs::statvfs(root)?;
    let block = disk.fragment_size() as u64;
    let reserve = (disk.blocks() as u64 * block / 20).min(RESERVE_BYTES_MAX);
    match disk.blocks_available() as u64 * block > reserve {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::StorageFull)),
    }
}

/// A log file as it lies on the disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    pub file: String,
    pub node_id: String,
    pub length: u64,
    /// What it takes of the disk.
    pub disk_bytes: u64,
    pub modified: SystemTime,
}

/// How much of each file is kept while it is written.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bytes: u64,
    /// How long ago what is kept may have come; any time where it is none.
    pub age_ms: Option<i64>,
}

/// Who waits for files of which attempt.
#[derive(Clone, Default)]
struct Made {
    waiting: Arc<Mutex<HashMap<String, watch::Sender<()>>>>,
}

impl Made {
    fn follow(&self, attempt: &str) -> watch::Receiver<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody waits for any more are few: attempts whose followers have all found their files.
        waiting.retain(|_, sender| sender.receiver_count() > 0);
        let sender = waiting.entry(attempt.to_owned()).or_default();
        sender.subscribe()
    }

    fn tell(&self, attempt: &str) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = waiting.get(attempt) {
            sender.send_replace(());
        }
    }
}

/// All log files of this replica.
#[derive(Clone)]
pub struct LogStore {
    root: PathBuf,
    limits: Limits,
    open: Arc<Mutex<HashMap<FileKey, Arc<LogFile>>>>,
    made: Made,
}

impl LogStore {
    /// Keeps files below a directory, which is made where it does not exist.
    pub fn new(root: PathBuf, limits: Limits) -> io::Result<LogStore> {
        fs::create_dir_all(&root)?;
        Ok(LogStore {
            root,
            limits,
            open: Arc::default(),
            made: Made::default(),
        })
    }

    /// Writes a piece at an offset if the file reaches so far; what it has already is left alone. Where the sender has `lost` what
    /// lies before, the file gets a gap there; where it came not now but at a time before, that is given. Returns the file's length, from
    /// which the sender goes on.
    pub async fn append(
        &self,
        key: FileKey,
        offset: u64,
        data: Bytes,
        (lost, came_ms): (bool, Option<i64>),
    ) -> io::Result<u64> {
        let store = self.clone();
        let write = move || {
            let file = store.open(&key, true)?;
            check_space(&store.root)?;
            let now = now_millis();
            let length = file.append(offset, &data, lost, came_ms.unwrap_or(now))?;
            file.rotate(store.limits.bytes, store.oldest(now))?;
            Ok(length)
        };
        on_a_thread(write).await
    }

    /// What came before this is too old.
    fn oldest(&self, now_ms: i64) -> i64 {
        let age = self.limits.age_ms;
        age.map_or(i64::MIN, |age| now_ms.saturating_sub(age))
    }

    /// Gives up what is too old of the files of an attempt, and what is beyond so many bytes of each. Returns how many bytes that was.
    /// It waits for the disk.
    pub fn rotate(&self, attempt: &str, bytes: u64, now_ms: i64) -> io::Result<u64> {
        let mut count = 0;
        if bytes == u64::MAX && self.limits.age_ms.is_none() {
            return Ok(count);
        }
        for found in self.list(attempt)? {
            let node = format!("nodes/{}", found.node_id);
            let key = FileKey::new(attempt, &node, &found.file);
            let may = found.disk_bytes > bytes || self.limits.age_ms.is_some();
            if let Some(key) = key.filter(|_| may && found.disk_bytes > 0)
                && let Some(file) = present(self.open(&key, false))?
            {
                count += file.rotate(bytes, self.oldest(now_ms))?;
            }
        }
        Ok(count)
    }

    /// Makes what is kept of a file survive a power cut; returns how much that is.
    pub async fn sync(&self, key: FileKey) -> io::Result<u64> {
        let store = self.clone();
        let sync = move || {
            let length = store.open(&key, true)?.sync()?;
            // The file itself, and the directories that it is the first in.
            for dir in key.path(&store.root).ancestors().skip(1).take(3) {
                File::open(dir)?.sync_all()?;
            }
            Ok(length)
        };
        on_a_thread(sync).await
    }

    /// A file; `None` where it does not exist.
    pub async fn find(&self, key: FileKey) -> io::Result<Option<Arc<LogFile>>> {
        let store = self.clone();
        on_a_thread(move || present(store.open(&key, false))).await
    }

    fn open(&self, key: &FileKey, create: bool) -> io::Result<Arc<LogFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get(key) {
            return Ok(known.clone());
        }
        let path = key.path(&self.root);
        if let (true, Some(parent)) = (create, path.parent()) {
            fs::create_dir_all(parent)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let (file, new) = match options.open(&path) {
            Err(e) if create && e.kind() == io::ErrorKind::NotFound => {
                (options.create(true).open(&path)?, true)
            }
            opened => (opened?, false),
        };
        let opened = Arc::new(LogFile::open(file, path)?);
        if open.len() >= OPEN_MAX {
            let closed = open
                .iter()
                .find(|(_, file)| !is_used(file))
                .map(|(key, _)| key.clone());
            closed.and_then(|key| open.remove(&key));
        }
        open.insert(key.clone(), opened.clone());
        if new {
            self.made.tell(&key.attempt);
        }
        Ok(opened)
    }

    /// Is told of every file of an attempt that is made from now on.
    pub fn files_made(&self, attempt: &str) -> watch::Receiver<()> {
        self.made.follow(attempt)
    }

    /// The attempts that have files. What else lies in the directory is not ours.
    pub fn attempts(&self) -> io::Result<Vec<String>> {
        let mut attempts = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let number = |part: &str| part.parse::<u64>().is_ok();
            if name
                .split_once('-')
                .is_some_and(|(epoch, rest)| number(epoch) && number(rest))
            {
                attempts.push(name);
            }
        }
        Ok(attempts)
    }

    /// Closes the files of attempts that have ended and that nobody reads; they are opened again when they are needed.
    pub fn close(&self, ended: impl Fn(&str) -> bool) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|key, file| is_used(file) || !ended(&key.attempt));
    }

    /// The files of an attempt, by name and node.
    pub async fn files(&self, attempt: &str) -> io::Result<Vec<Listed>> {
        let (store, attempt) = (self.clone(), attempt.to_owned());
        on_a_thread(move || store.list(&attempt)).await
    }

    /// The same; it waits for the disk.
    pub fn list(&self, attempt: &str) -> io::Result<Vec<Listed>> {
        list(&self.root.join(attempt))
    }

    /// Removes the files of an attempt.
    pub fn remove(&self, attempt: &str) -> io::Result<()> {
        fs::remove_dir_all(self.root.join(attempt))
    }
}

/// Whether somebody has it who does not want to open it again.
fn is_used(file: &Arc<LogFile>) -> bool {
    Arc::strong_count(file) > 1 || file.is_followed()
}

/// Runs what waits for the disk where it holds up nobody.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other)?
}

/// What lies below an attempt's directory. It may be swept meanwhile: what is gone is not listed.
fn list(root: &Path) -> io::Result<Vec<Listed>> {
    let mut found = Vec::new();
    for (node_id, node) in entries(root)? {
        for (file, entry) in entries(&node.path())? {
            if !check_file(&file) {
                continue;
            }
            let Some(metadata) = present(entry.metadata())? else {
                continue;
            };
            found.push(Listed {
                file,
                node_id: node_id.clone(),
                length: metadata.len(),
                disk_bytes: metadata.blocks() * BLOCK_BYTES,
                modified: metadata.modified()?,
            });
        }
    }
    found.sort();
    Ok(found)
}

fn entries(dir: &Path) -> io::Result<Vec<(String, fs::DirEntry)>> {
    let Some(entries) = present(fs::read_dir(dir))? else {
        return Ok(Vec::new());
    };
    let named = entries
        .map(|entry| entry.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry)));
    named.collect()
}

fn present<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        bytes: 1 << 30,
        age_ms: None,
    };

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
        let store = LogStore::new(dir.path().join("logs"), LIMITS).unwrap();
        let put = async |store: &LogStore, offset, text: &'static str| {
            store
                .append(
                    key("f"),
                    offset,
                    Bytes::from_static(text.as_bytes()),
                    (false, None),
                )
                .await
                .unwrap()
        };
        assert!(store.find(key("f")).await.unwrap().is_none());
        assert_eq!(put(&store, 0, "hello ").await, 6);
        assert_eq!(put(&store, 8, "gap").await, 6);
        assert_eq!(put(&store, 0, "hello ").await, 6);
        assert_eq!(put(&store, 4, "o world").await, 11);
        let again = LogStore::new(dir.path().join("logs"), LIMITS).unwrap();
        assert_eq!(put(&again, 11, "!").await, 12);
        assert_eq!(
            fs::read(dir.path().join("logs/1-1/n/f")).unwrap(),
            b"hello world!"
        );
        assert_eq!(again.sync(key("f")).await.unwrap(), 12);
        fs::create_dir(dir.path().join("logs/lost+found")).unwrap();
        assert_eq!(again.attempts().unwrap(), ["1-1"]);
        again.close(|_| true);
        again.remove("1-1").unwrap();
        assert!(again.find(key("f")).await.unwrap().is_none());
    }
}
