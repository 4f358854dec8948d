//! Wakes those who wait for something in the journal to change. What changed, they look up.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::Notify;

use crate::journal::{AttemptDir, LOGS};

#[derive(Clone, Copy)]
enum Subject {
    Status,
    Logs,
}

/// Watches attempt directories.
pub struct Watch {
    inotify: Inotify,
    subjects: Mutex<HashMap<WatchDescriptor, Subject>>,
    /// A status file was replaced, or the like.
    pub status: Notify,
    /// A log file has grown.
    pub logs: Notify,
}

impl Watch {
    /// A watch over nothing yet.
    pub fn new() -> io::Result<Arc<Watch>> {
        let watch = Arc::new(Watch {
            inotify: Inotify::init(InitFlags::IN_CLOEXEC)?,
            subjects: Mutex::default(),
            status: Notify::new(),
            logs: Notify::new(),
        });
        let watcher = watch.clone();
        // A thread that waits in the kernel, for as long as the process lives.
        std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || watcher.run())?;
        Ok(watch)
    }

    /// Watches an attempt; watching it again changes nothing. It ends with its directory.
    pub fn add(&self, attempt: &AttemptDir) -> io::Result<()> {
        // An agent that was cut down while it made the directory left it incomplete.
        attempt.create().map_err(io::Error::other)?;
        let replaced = AddWatchFlags::IN_MOVED_TO;
        self.watch(&attempt.path, replaced, Subject::Status)?;
        let grown = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE;
        self.watch(&attempt.path.join(LOGS), grown, Subject::Logs)
    }

    fn watch(&self, path: &Path, events: AddWatchFlags, subject: Subject) -> io::Result<()> {
        let descriptor = self.inotify.add_watch(path, events)?;
        let mut subjects = self.subjects.lock().unwrap_or_else(PoisonError::into_inner);
        subjects.insert(descriptor, subject);
        Ok(())
    }

    fn run(&self) {
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(nix::Error::EINTR) => continue,
                // Those who wait look from time to time in any case.
                Err(error) => return tracing::error!(%error, "the journal is not watched any more"),
            };
            let mut subjects = self.subjects.lock().unwrap_or_else(PoisonError::into_inner);
            for event in events {
                match subjects.get(&event.wd) {
                    Some(Subject::Status) => self.status.notify_one(),
                    Some(Subject::Logs) => self.logs.notify_one(),
                    // Too many at once to be told one by one.
                    None => {
                        self.status.notify_one();
                        self.logs.notify_one();
                    }
                }
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    subjects.remove(&event.wd);
                }
            }
        }
    }
}
