//! Who did what: every call that changes something, and every refusal, in files of this replica.
//!
//! One JSON object a line, in the order of the answers; the latest file is `audit.jsonl`, and older ones are numbered. Refusals
//! of nobody lie apart, in `strangers.jsonl`, and where there are too many some are left out: nobody must be able to push out
//! what others did, or hold them up. What a request says beside its names is never written, but for commands that are run on nodes; what they
//! read and print is not. What is read of the ensemble is not recorded, unless it was refused.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use batchai_proto::v1::AuditRecord;
use prost_reflect::DynamicMessage;
use tokio::sync::{broadcast, mpsc};

/// Records that are not written yet: calls wait when there are more.
const QUEUE_MAX: usize = 4096;
/// Records that share a write.
const BATCH_MAX: usize = 256;
/// Records that who follows has not taken: he is cut off when there are more.
const FOLLOWED_MAX: usize = 1024;
/// A file that is larger is put aside.
const FILE_BYTES_MAX: u64 = 32 << 20;
/// The names of files: of calls of those who are known, and of nobody.
const KINDS: [&str; 2] = ["audit", "strangers"];
/// As callers are called who have shown nothing, or nothing that is good any more.
const NOBODY: &str = "nobody";
/// So many are kept beside the latest.
const FILES_MAX: usize = 8;

/// Where calls are recorded.
#[derive(Clone)]
pub struct Audit {
    root: PathBuf,
    queue: mpsc::Sender<AuditRecord>,
    written: broadcast::Sender<AuditRecord>,
}

impl Audit {
    /// Records into a directory, which is made where it does not exist, on a thread of its own.
    pub fn new(root: PathBuf) -> io::Result<Audit> {
        fs::create_dir_all(&root)?;
        let (queue, records) = mpsc::channel(QUEUE_MAX);
        let (written, _) = broadcast::channel(FOLLOWED_MAX);
        let writer = Writer {
            files: [open(&root, KINDS[0])?, open(&root, KINDS[1])?],
            root: root.clone(),
            written: written.clone(),
        };
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(records))?;
        Ok(Audit {
            root,
            queue,
            written,
        })
    }

    /// Records a call. It waits for room, unless it is nobody's.
    pub async fn record(&self, record: AuditRecord) {
        if is_nobody(&record) {
            // What finds no room is left out.
            let _ = self.queue.try_send(record);
        } else if self.queue.send(record).await.is_err() {
            tracing::error!("the audit log is not written any more");
        }
    }

    /// From now on: what is recorded.
    pub fn follow(&self) -> broadcast::Receiver<AuditRecord> {
        self.written.subscribe()
    }

    /// The latest records, oldest first. It waits for the disk.
    pub fn latest(&self, count: usize) -> io::Result<Vec<AuditRecord>> {
        let mut found = Vec::new();
        for kind in KINDS {
            let mut of_kind = Vec::new();
            for number in 0..=FILES_MAX {
                let mut of_file = read(&path(&self.root, kind, number))?;
                of_file.append(&mut of_kind);
                of_kind = of_file;
                if of_kind.len() >= count {
                    break;
                }
            }
            found.extend(of_kind);
        }
        found.sort_by_key(|record: &AuditRecord| record.time.map(|t| (t.seconds, t.nanos)));
        found.drain(..found.len().saturating_sub(count));
        Ok(found)
    }
}

struct Writer {
    root: PathBuf,
    files: [File; 2],
    written: broadcast::Sender<AuditRecord>,
}

impl Writer {
    fn run(mut self, mut records: mpsc::Receiver<AuditRecord>) {
        let mut taken = Vec::new();
        while records.blocking_recv_many(&mut taken, BATCH_MAX) > 0 {
            for at in 0..KINDS.len() {
                let of_kind = taken.iter().filter(|r| usize::from(is_nobody(r)) == at);
                let of_kind: Vec<_> = of_kind.collect();
                if let Err(error) = self.write(at, &of_kind) {
                    tracing::error!(%error, records = ?of_kind, "cannot be written to the audit log");
                }
            }
            for record in taken.drain(..) {
                // Nobody may be following.
                let _ = self.written.send(record);
            }
        }
    }

    /// Those that waited together share a write.
    fn write(&mut self, at: usize, records: &[&AuditRecord]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        if self.files[at].metadata()?.len() > FILE_BYTES_MAX {
            let path = |number| path(&self.root, KINDS[at], number);
            for number in (0..FILES_MAX).rev() {
                if path(number).exists() {
                    fs::rename(path(number), path(number + 1))?;
                }
            }
            self.files[at] = open(&self.root, KINDS[at])?;
        }
        let mut lines = Vec::new();
        for record in records {
            let message = batchai_proto::reflect::dynamic("AuditRecord", *record);
            serde_json::to_writer(&mut lines, &message)?;
            lines.push(b'\n');
        }
        self.files[at].write_all(&lines)
    }
}

fn is_nobody(record: &AuditRecord) -> bool {
    record.caller.starts_with(NOBODY)
}

fn path(root: &Path, kind: &str, number: usize) -> PathBuf {
    match number {
        0 => root.join(format!("{kind}.jsonl")),
        number => root.join(format!("{kind}.{number}.jsonl")),
    }
}

fn open(root: &Path, kind: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).read(true).mode(0o600);
    let mut file = options.open(path(root, kind, 0))?;
    // A line that a power cut has cut off ends here.
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.read_exact_at(&mut last, length - 1)?;
    }
    if last != [b'\n'] {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

fn read(path: &Path) -> io::Result<Vec<AuditRecord>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut found = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        let mut from = serde_json::Deserializer::from_slice(&line);
        let of = batchai_proto::reflect::descriptor("AuditRecord");
        // A line that was cut off is no record.
        if let Ok(message) = DynamicMessage::deserialize(of, &mut from) {
            found.push(message.transcode_to().map_err(io::Error::other)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_recorded_comes_back_in_order_and_in_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::new(dir.path().to_owned()).unwrap();
        let mut follow = audit.follow();
        for revision in 0..20 {
            let record = AuditRecord {
                revision,
                name: "x".repeat(5 << 20),
                ..Default::default()
            };
            audit.record(record).await;
            assert_eq!(follow.recv().await.unwrap().revision, revision);
        }
        let revisions = |count| {
            let latest = audit.latest(count).unwrap();
            latest.into_iter().map(|r| r.revision).collect::<Vec<_>>()
        };
        assert_eq!(revisions(3), [17, 18, 19]);
        assert_eq!(revisions(100), (0..20).collect::<Vec<_>>());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
        // Cut off in the middle of a letter; the next one begins a line of its own. Nobody's lie apart.
        let file = OpenOptions::new()
            .append(true)
            .open(path(dir.path(), "audit", 0));
        file.unwrap().write_all(b"{\"name\": \"\xc3").unwrap();
        assert_eq!(revisions(1), [19]);
        let audit = Audit::new(dir.path().to_owned()).unwrap();
        let mut follow = audit.follow();
        for (caller, revision) in [("users/a", 20), (NOBODY, 21)] {
            let record = AuditRecord {
                caller: caller.into(),
                revision,
                ..Default::default()
            };
            audit.record(record).await;
            follow.recv().await.unwrap();
        }
        let mut latest: Vec<_> = audit.latest(3).unwrap();
        latest.sort_by_key(|record| record.revision);
        let latest: Vec<_> = latest.into_iter().map(|record| record.revision).collect();
        assert_eq!(latest, [19, 20, 21]);
        assert_eq!(read(&path(dir.path(), "strangers", 0)).unwrap().len(), 1);
    }
}
