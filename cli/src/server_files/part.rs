//! What came so far of a file that is fetched: beside it, under a name that no other file has.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use batchai_common::names::hex;
use batchai_common::{executable, parts};
use nix::fcntl::{Flock, FlockArg, OFlag};
use sha2::{Digest as _, Sha256};

use crate::error::CliError;
use crate::job_files::at;

const BUFFER_BYTES: usize = 256 << 10;
/// A link, or a pipe that nobody writes, is not waited for.
const FLAGS: OFlag = OFlag::O_NOFOLLOW.union(OFlag::O_NONBLOCK);
/// So often another one that ends takes it away before this one has it.
const TRIES: usize = 10;

/// It is locked for as long as it is kept.
pub struct Part {
    path: PathBuf,
    file: Flock<File>,
}

impl Part {
    /// That of a file that comes from somewhere; what is there already stays.
    pub fn open(local: &Path, from: &str) -> Result<Part, CliError> {
        let name = local.file_name().unwrap_or_default().to_string_lossy();
        let path = local.with_file_name(parts::name(&name, from));
        let failed = at(&path);
        for _ in 0..TRIES {
            let mut open = File::options();
            let open = open.read(true).write(true).create(true).truncate(false);
            let opened = open
                .custom_flags(FLAGS.bits())
                .open(&path)
                .map_err(&failed)?;
            let metadata = opened.metadata().map_err(&failed)?;
            if !metadata.is_file() || metadata.nlink() > 1 {
                let why = "something lies there that is no file of a download: take it away";
                return Err(failed(io::Error::other(why)));
            }
            let locked = Flock::lock(opened, FlockArg::LockExclusiveNonblock);
            let file = locked.map_err(|(_, error)| {
                let why = format!("another download writes it: {error}");
                failed(io::Error::other(why))
            })?;
            let part = Part {
                path: path.clone(),
                file,
            };
            // Whoever had it may have given it its name meanwhile.
            if part.has_its_name().map_err(&failed)? {
                return Ok(part);
            }
        }
        let why = "other downloads of the same file end all the time";
        Err(failed(io::Error::other(why)))
    }

    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// All of it is there: it gets the file's name. Whether it could be made a program, or none: some file systems have modes of their own.
    pub fn whole(self, local: &Path, executable: bool) -> Result<bool, CliError> {
        let failed = at(&self.path);
        let is_set = executable::set(&self.file, executable).is_ok();
        self.file.sync_all().map_err(&failed)?;
        if !self.has_its_name().map_err(&failed)? {
            let why = "something else was put there while it came: fetch it again";
            return Err(failed(io::Error::other(why)));
        }
        fs::rename(&self.path, local).map_err(at(local))?;
        Ok(is_set)
    }

    /// It is for the next download to go on with, where anything came.
    pub fn leave(self) {
        let is_empty = self.file.metadata().is_ok_and(|part| part.len() == 0);
        if is_empty && self.has_its_name().unwrap_or(false) {
            // An empty file that stays harms nobody, and why nothing came is said already.
            let _ = fs::remove_file(&self.path);
        }
    }

    fn has_its_name(&self) -> io::Result<bool> {
        let own = self.file.metadata()?;
        match fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            there => there.map(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())),
        }
    }
}

/// A regular file of this size with its digest, in hexadecimal digits; none where that does not lie there.
pub fn digest_of(path: &Path, size: u64) -> io::Result<Option<(File, String)>> {
    let mut open = File::options();
    let mut opened = open.read(true).custom_flags(FLAGS.bits()).open(path)?;
    let metadata = opened.metadata()?;
    if !metadata.is_file() || metadata.len() != size {
        return Ok(None);
    }
    let mut hash = Sha256::new();
    read_all(&mut opened, &mut hash)?;
    Ok(Some((opened, hex(&hash.finalize()))))
}

/// Takes all of a file into a digest; how much that is. It stands at its end then.
pub fn read_all(file: &mut File, hash: &mut Sha256) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let (mut buffer, mut size) = (vec![0; BUFFER_BYTES], 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(size);
        }
        hash.update(&buffer[..read]);
        size += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    use super::*;

    fn why(opened: Result<Part, CliError>) -> String {
        opened.err().unwrap().to_string()
    }

    #[test]
    fn a_part_is_no_other_file_and_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (local, other) = (dir.path().join("x"), dir.path().join(".x.part"));
        fs::write(&other, "another file").unwrap();
        let mut part = Part::open(&local, "server/x").unwrap();
        part.file().write_all(b"content").unwrap();
        let at = part.path.clone();
        assert_ne!(Part::open(&local, "server/y").unwrap().path, at);
        // One at a time, and what was put in its place has no name.
        assert!(why(Part::open(&local, "server/x")).contains("another download"));
        fs::rename(&at, dir.path().join("aside")).unwrap();
        fs::write(&at, "planted").unwrap();
        assert!(
            part.whole(&local, false)
                .unwrap_err()
                .to_string()
                .contains("something else")
        );
        assert!(!local.exists());
        // What it is of stays with it.
        fs::rename(dir.path().join("aside"), &at).unwrap();
        let part = Part::open(&local, "server/x").unwrap();
        part.whole(&local, false).unwrap();
        assert_eq!(fs::read(&local).unwrap(), b"content");
        assert_eq!(fs::read(&other).unwrap(), b"another file");
        // Nobody is written through.
        symlink(&other, &at).unwrap();
        assert!(Part::open(&local, "server/x").is_err());
        fs::remove_file(&at).unwrap();
        fs::hard_link(&other, &at).unwrap();
        assert!(why(Part::open(&local, "server/x")).contains("no file of a download"));
        assert_eq!(fs::read(&other).unwrap(), b"another file");
        // What came stays, nothing does not.
        fs::remove_file(&at).unwrap();
        Part::open(&local, "server/x").unwrap().leave();
        assert!(!at.exists());
        let mut part = Part::open(&local, "server/x").unwrap();
        part.file().write_all(b"con").unwrap();
        part.leave();
        assert_eq!(fs::read(&at).unwrap(), b"con");
        // Of a longest name as well.
        let long = dir.path().join("x".repeat(255));
        Part::open(&long, "server/long")
            .unwrap()
            .whole(&long, false)
            .unwrap();
        assert!(long.exists());
    }

    #[test]
    fn only_a_regular_file_of_the_very_size_has_a_digest() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "content").unwrap();
        symlink(&file, &link).unwrap();
        let (_, digest) = digest_of(&file, 7).unwrap().unwrap();
        assert_eq!(digest, hex(&Sha256::digest(b"content")));
        assert!(digest_of(&file, 6).unwrap().is_none());
        assert!(digest_of(&link, 7).is_err());
        assert!(digest_of(dir.path(), 7).is_ok_and(|digest| digest.is_none()));
    }
}
