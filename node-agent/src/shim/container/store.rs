//! The unpacked images of a node: each under its digest, whole or not there at all, for every job that names it, and written to by none.
//!
//! It does not know how an image is come by: who has one unpacked fills the directory that is given to it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use batchai_common::images::is_sha256;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::syncfs;

use super::apart::Trouble;

/// So many unpacked images are kept, and those in use.
const IMAGES_KEPT: usize = 8;
/// Where one is made before it is one, and where one goes before it is none.
const NEW: &str = ".new";
const WHOLE: &str = "image";
const ROOT: &str = "root";
const KNOWN: &str = "image.json";
const LEFT_OUT: &str = "left-out.json";
const USED: &str = "used";

/// An image that is there.
pub struct Image {
    /// Its root file system.
    pub root: File,
    pub env: BTreeMap<String, String>,
    /// What it says that is not done, in words.
    pub left_out: Vec<String>,
    /// As long as this is open it is not removed.
    pub lock: Option<File>,
}

/// What is known of an image beside its files.
pub struct Known {
    pub env: BTreeMap<String, String>,
    pub left_out: Vec<String>,
}

/// The unpacked images, held by this process.
pub struct Store {
    at: PathBuf,
    _held: Flock<File>,
}

impl Store {
    /// Waits for whoever has it, and clears away what was not brought to an end.
    pub fn open(at: &str) -> io::Result<Store> {
        let at = PathBuf::from(at);
        private_dir(&at)?;
        let file = File::create(at.join(".lock"))?;
        // Another job of this node may be unpacking: it ends, or is ended.
        let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let new = at.join(NEW);
        remove_tree(&new)?;
        private_dir(&new)?;
        let store = Store { at, _held: held };
        for (_, path) in store.images()? {
            // What is no image, however much of it is there: of an agent that was cut down while it removed it.
            if !path.join(KNOWN).exists() {
                store.remove(&path)?;
            }
        }
        Ok(store)
    }

    /// Where somebody may write what an image is made from. It is gone when this is.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.at.join(NEW).join(name)
    }

    /// Its disk has so much free, and what else is to be left.
    pub fn leaves_room(&self, bytes: u64) -> io::Result<()> {
        super::layers::leave_room(&self.at, bytes)
    }

    /// The image of a digest, if it is kept.
    pub fn kept(&self, digest: &str) -> io::Result<Option<Image>> {
        let kept = self.at.join(digest);
        if !kept.join(KNOWN).exists() {
            return Ok(None);
        }
        let used = File::options().write(true).open(kept.join(USED))?;
        used.set_modified(SystemTime::now())?;
        let locked = Flock::lock(used.try_clone()?, FlockArg::LockShared);
        // Both descriptors have the lock: it is held while one of them is open.
        std::mem::forget(locked.map_err(|(_, error)| error)?);
        let left_out = match fs::read(kept.join(LEFT_OUT)) {
            Ok(text) => serde_json::from_slice(&text)?,
            // Of an agent that did not know of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(Some(Image {
            root: File::open(kept.join(ROOT))?,
            env: serde_json::from_slice(&fs::read(kept.join(KNOWN))?)?,
            left_out,
            lock: Some(used),
        }))
    }

    /// Makes the image of a digest of what is put into its root. Whoever does that and finds the disk full does it again when others have made
    /// room: those that were not used for longest and are in nobody's use, one by one, as long as there are some.
    pub fn keep(
        &self,
        digest: &str,
        mut fill: impl FnMut(&Path) -> Result<Known, Trouble>,
    ) -> Result<Image, Trouble> {
        let new = self.scratch(WHOLE);
        let known = loop {
            remove_tree(&new)?;
            private_dir(&new)?;
            let root = new.join(ROOT);
            // Of the image's own root: everybody may pass, and nobody passes what is above it.
            DirBuilder::new().mode(0o755).create(&root)?;
            match fill(&root) {
                Err(Trouble::Full(why)) => {
                    if !self.remove_oldest(digest)? {
                        return Err(Trouble::Full(why));
                    }
                    println!("{why}: it is tried again with what that gave free");
                }
                filled => break filled?,
            }
        };
        let write = |name: &str, text: serde_json::Result<Vec<u8>>| {
            fs::write(new.join(name), text.map_err(io::Error::from)?)
        };
        write(KNOWN, serde_json::to_vec(&known.env))?;
        write(LEFT_OUT, serde_json::to_vec(&known.left_out))?;
        File::create(new.join(USED))?;
        // What is kept is whole, also after a power cut.
        syncfs(File::open(&new)?).map_err(io::Error::from)?;
        fs::rename(&new, self.at.join(digest))?;
        self.leave_few(digest)?;
        let kept = self.kept(digest)?;
        kept.ok_or_else(|| Trouble::Node("it is gone as soon as it is there".to_owned()))
    }

    /// All directories of images and when they were used last, the latest first.
    fn images(&self) -> io::Result<Vec<(SystemTime, PathBuf)>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.at)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(is_sha256) {
                let used = fs::metadata(path.join(USED)).and_then(|used| used.modified());
                images.push((used.unwrap_or(SystemTime::UNIX_EPOCH), path));
            }
        }
        images.sort_by(|a, b| b.cmp(a));
        Ok(images)
    }

    /// Removes what was not used for longest, where it is too much and not in use.
    fn leave_few(&self, except: &str) -> io::Result<()> {
        let images = self.images()?.into_iter();
        let others = images.filter(|(_, path)| !path.ends_with(except));
        for (_, path) in others.skip(IMAGES_KEPT - 1) {
            if is_free(&path) {
                self.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes the one that was not used for longest and is in nobody's use; there may be none.
    fn remove_oldest(&self, except: &str) -> io::Result<bool> {
        let images = self.images()?.into_iter().rev();
        let mut others = images.filter(|(_, path)| !path.ends_with(except));
        match others.find(|(_, path)| is_free(path)) {
            Some((_, path)) => self.remove(&path).map(|()| true),
            None => Ok(false),
        }
    }

    /// First out of its place: cut off at any time, there is no part of an image where one should be.
    fn remove(&self, path: &Path) -> io::Result<()> {
        println!("removing {}", path.display());
        let name = path.file_name().and_then(|name| name.to_str());
        let aside = self.scratch(&format!("old-{}", name.unwrap_or_default()));
        fs::rename(path, &aside)?;
        remove_tree(&aside)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // What this leaves the next one removes.
        if let Err(error) = remove_tree(&self.at.join(NEW)) {
            println!("what the image was made from stays for now: {error}");
        }
    }
}

/// Nobody uses this image, and while the store is held nobody begins to.
fn is_free(image: &Path) -> bool {
    match File::open(image.join(USED)) {
        Ok(used) => Flock::lock(used, FlockArg::LockExclusiveNonblock).is_ok(),
        // What has no such file nobody can use.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

pub fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn name(at: usize) -> String {
        format!("{at:064}")
    }

    fn known() -> Known {
        Known {
            env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            left_out: vec!["USER app".to_owned()],
        }
    }

    /// A store of so many images, the first of which was not used for longest.
    fn of(dir: &Path, count: usize) -> Store {
        let store = Store::open(&dir.to_string_lossy()).unwrap();
        for at in 0..count {
            let path = dir.join(name(at));
            private_dir(&path.join(ROOT)).unwrap();
            fs::write(path.join(KNOWN), "{}").unwrap();
            let used = File::create(path.join(USED)).unwrap();
            let age = Duration::from_secs((count - at) as u64);
            used.set_modified(SystemTime::now() - age).unwrap();
        }
        store
    }

    fn left(dir: &Path, count: usize) -> Vec<usize> {
        let is_there = |at: &usize| dir.join(name(*at)).join(KNOWN).exists();
        (0..count).filter(is_there).collect()
    }

    #[test]
    fn what_was_used_last_and_what_is_in_use_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let count = IMAGES_KEPT + 4;
        let store = of(dir.path(), count);
        // The oldest one, before it is used.
        let held = File::open(dir.path().join(name(0)).join(USED)).unwrap();
        let held = Flock::lock(held, FlockArg::LockShared).unwrap();
        let used = store.kept(&name(1)).unwrap().unwrap();
        store.leave_few(&name(count - 1)).unwrap();
        let expected = [0, 1].into_iter().chain(count - IMAGES_KEPT + 1..count);
        assert_eq!(left(dir.path(), count), expected.collect::<Vec<_>>());
        drop((held, used));
    }

    #[test]
    fn a_full_disk_takes_the_images_that_nobody_uses_and_no_more_than_it_must() {
        let dir = tempfile::tempdir().unwrap();
        let store = of(dir.path(), 4);
        let held = store.kept(&name(1)).unwrap().unwrap();
        let mut tries = 0;
        let image = store.keep(&name(9), |root| {
            tries += 1;
            // Nothing of the try before is there.
            File::create_new(root.join("x"))?;
            match tries {
                3 => Ok(known()),
                _ => Err(Trouble::Full("full".to_owned())),
            }
        });
        let image = image.unwrap();
        assert_eq!((image.env, image.left_out), (known().env, known().left_out));
        assert_eq!(left(dir.path(), 4), [1, 3]);
        assert!(dir.path().join(name(9)).join(ROOT).join("x").exists());
        // As long as there is something to remove; what is in use is not, nor what is wanted.
        let none = store.keep(&name(8), |_| Err(Trouble::Full("full".to_owned())));
        assert!(matches!(none, Err(Trouble::Full(_))));
        assert_eq!(left(dir.path(), 9), [1]);
        let other = store.keep(&name(7), |_| Err(Trouble::Image("bad".to_owned())));
        assert!(matches!(other, Err(Trouble::Image(_))));
        assert!(store.kept(&name(7)).unwrap().is_none());
        drop(held);
    }

    #[test]
    fn what_is_left_of_an_image_is_none_and_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        drop(of(dir.path(), 2));
        // An agent was cut down while it removed one.
        fs::remove_file(dir.path().join(name(0)).join(KNOWN)).unwrap();
        fs::write(dir.path().join(name(0)).join(ROOT).join("x"), "").unwrap();
        fs::create_dir_all(dir.path().join(NEW).join("old-1/root")).unwrap();
        let store = Store::open(&dir.path().to_string_lossy()).unwrap();
        assert!(!dir.path().join(name(0)).exists());
        assert!(dir.path().join(name(1)).exists());
        store.keep(&name(0), |_| Ok(known())).unwrap();
        assert_eq!(left(dir.path(), 2), [0, 1]);
        drop(store);
        assert!(!dir.path().join(NEW).exists());
    }
}
