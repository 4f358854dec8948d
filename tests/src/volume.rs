//! Volumes of their own: an ext4 image in a file, mounted through a loop device that goes with it, also when a test fails.
//!
//! What is synced in the volume is in the image, what is not is in the page cache; so a copy of the image is the disk after a power
//! cut. Only almost: a device that loses or reorders what it was given but not told to flush is not played. What the kernel has
//! written back on its own is in the image as well.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::requirement;

/// What is nothing but zeroes stays a hole in a copy.
const BLOCK_BYTES: usize = 64 << 10;
/// For how long an image may change after everybody was told to stand still.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// A mounted volume. Dropping it unmounts it, and the image stays.
pub struct Volume {
    image: PathBuf,
    at: PathBuf,
}

impl Volume {
    /// Makes a volume of so many MiB and mounts it; says why not where that takes rights or programs that are not there.
    ///
    /// # Panics
    /// Where it cannot and nothing may be skipped.
    pub fn make(image: &Path, at: &Path, mib: u64) -> Option<Volume> {
        let file = File::create(image).expect("the image can be made");
        file.set_len(mib << 20).expect("it can be sparse");
        // Nothing is kept back for root, and nothing is written later by the kernel alone.
        let lazy = "lazy_itable_init=0,lazy_journal_init=0";
        let mut make = Command::new("mkfs.ext4");
        let made = run(make.args(["-q", "-F", "-m", "0", "-E", lazy]).arg(image));
        match made.and_then(|()| Volume::mount(image, at)) {
            Ok(volume) => Some(volume),
            Err(why) => {
                requirement::skip(&format!(
                    "a volume cannot be mounted: run as root, with e2fsprogs: {why}"
                ));
                None
            }
        }
    }

    /// Mounts an image. Its journal is replayed where it was not unmounted.
    ///
    /// # Errors
    /// Says what `mount` said.
    pub fn mount(image: &Path, at: &Path) -> Result<Volume, String> {
        fs::create_dir_all(at).map_err(|error| error.to_string())?;
        run(Command::new("mount").args(["-o", "loop"]).args([image, at]))?;
        Ok(Volume {
            image: image.to_owned(),
            at: at.to_owned(),
        })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// `ro` or `rw`.
    pub fn remount(&self, how: &str) {
        let options = format!("remount,{how}");
        let done = run(Command::new("mount").args(["-o", &options]).arg(&self.at));
        done.expect("who may mount may mount again");
    }

    /// Takes all room that is left; returns the file that has it.
    pub fn fill(&self) -> PathBuf {
        let path = self.at.join("filler");
        let file = File::create(&path).expect("there is room for a name");
        let mut at = 0;
        for bytes in [1 << 20, 4096, 1] {
            let chunk = vec![b'x'; bytes];
            while file.write_all_at(&chunk, at).is_ok() {
                at += bytes as u64;
            }
        }
        // What the kernel took on credit must have its room.
        let _ = file.sync_all();
        path
    }

    /// Copies the image as it is now, nothing written back, while nobody writes into the volume: the kernel still may, so the copy
    /// is that of a moment only when it comes out the same twice.
    pub fn cut_power(&self, to: &Path) {
        let end = Instant::now() + SETTLE_MAX;
        let read = || fs::read(&self.image).expect("the image is there");
        let mut copy = read();
        loop {
            let again = read();
            if again == copy {
                break;
            }
            assert!(Instant::now() < end, "the image never stands still");
            copy = again;
        }
        let file = File::create(to).expect("the copy can be made");
        file.set_len(copy.len() as u64).expect("it can be sparse");
        for (i, block) in copy.chunks(BLOCK_BYTES).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block, (i * BLOCK_BYTES) as u64)
                    .expect("there is room for the copy");
            }
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if run(Command::new("umount").arg(&self.at)).is_err() {
            // Somebody is in it: it goes when he does.
            let _ = run(Command::new("umount").arg("-l").arg(&self.at));
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
