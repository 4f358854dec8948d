//! The root of mounts and job directories, claimed by one agent: what lies in `ROOT/jobs` is wiped for every new job, so
//! it must be nobody else's.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Says whose the directory is.
pub const MARKER: &str = ".batchai-node";

/// Why a root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("{path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} holds what no agent put there, and an agent removes everything in it before each job: give the agent \
         another --root, or empty it",
        path = .path.display()
    )]
    Foreign { path: PathBuf },
    #[error("{path}: another agent uses this root; give each agent its own --root", path = .path.display())]
    Shared { path: PathBuf },
}

/// A root that this process has claimed. The claim goes with the process.
#[derive(Debug)]
pub struct Root {
    _lock: Flock<File>,
}

impl Root {
    /// Claims a root for the node with a uid; makes it where it does not exist.
    pub fn claim(root: &Path, uid: &str) -> Result<Root, RootError> {
        let jobs = root.join("jobs");
        let failed = |source| RootError::Io {
            path: jobs.clone(),
            source,
        };
        fs::create_dir_all(&jobs).map_err(failed)?;
        let marker = jobs.join(MARKER);
        if !marker.exists() && fs::read_dir(&jobs).map_err(failed)?.next().is_some() {
            return Err(RootError::Foreign { path: jobs });
        }
        let mut options = OpenOptions::new();
        let opened = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&marker);
        let lock = Flock::lock(opened.map_err(failed)?, FlockArg::LockExclusiveNonblock);
        let mut lock = lock.map_err(|(_, error)| match error {
            nix::Error::EWOULDBLOCK => RootError::Shared { path: jobs.clone() },
            error => failed(error.into()),
        })?;
        let mut known = String::new();
        lock.read_to_string(&mut known).map_err(failed)?;
        // A node that lost its journal is another node, and what the earlier one left is as good as gone.
        if known != uid {
            lock.set_len(0).map_err(failed)?;
            lock.rewind().map_err(failed)?;
            lock.write_all(uid.as_bytes()).map_err(failed)?;
        }
        Ok(Root { _lock: lock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_has_one_agent_and_holds_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::claim(dir.path(), "u").unwrap();
        assert!(matches!(
            Root::claim(dir.path(), "v"),
            Err(RootError::Shared { .. })
        ));
        drop(root);
        Root::claim(dir.path(), "v").unwrap();
        let marker = fs::read_to_string(dir.path().join("jobs").join(MARKER)).unwrap();
        assert_eq!(marker, "v", "a node that lost its journal is another node");
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("jobs/thesis")).unwrap();
        assert!(matches!(
            Root::claim(home.path(), "u"),
            Err(RootError::Foreign { .. })
        ));
    }
}
