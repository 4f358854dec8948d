//! Disks of this machine for tests: images in files, behind loop devices that go with the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::requirement;

/// A disk. Dropping it unmounts and detaches it; its image stays.
pub struct Disk {
    pub image: PathBuf,
    /// `/dev/loop0` or another.
    pub device: String,
}

impl Disk {
    /// Attaches a blank one. `None` where that takes rights or programs that are not there.
    pub fn blank(image: &Path, mib: u64) -> Option<Disk> {
        let file = File::create(image).expect("the image can be made");
        file.set_len(mib << 20).expect("it can be sparse");
        let attached = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .output();
        let device = match attached {
            Ok(output) if output.status.success() => output.stdout,
            _ => {
                requirement::skip("only root attaches a loop device, by losetup (mount)");
                return None;
            }
        };
        let device = String::from_utf8(device).expect("a path");
        Some(Disk {
            image: image.to_owned(),
            device: device.trim().to_owned(),
        })
    }

    /// All that is on it, but for what nobody has synced.
    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.image).expect("the image is there")
    }

    /// Unmounts it where it is mounted.
    pub fn unmount(&self) -> bool {
        let unmounted = Command::new("umount").arg(&self.device).output();
        unmounted.is_ok_and(|output| output.status.success())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.unmount();
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}
