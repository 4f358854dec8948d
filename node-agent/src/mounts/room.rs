//! The disk that what is written to a mount waits on: that of the agent's state, which is to have room for more than that.

use std::path::Path;

use nix::sys::statvfs::statvfs;

/// So much of it stays free, or a twentieth part of a small one.
const RESERVE_BYTES: u64 = 512 << 20;

/// Why no more may be written to a mount with this cache. Nothing is said of one that is not there.
pub fn lacking(cache: &Path) -> Option<String> {
    let disk = statvfs(cache).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.fragment_size());
    let (size, left) = (bytes(disk.blocks()), bytes(disk.blocks_available()));
    (left < reserve(size)).then(|| {
        format!(
            "the disk of {} is nearly full: {} MiB are left, and what is written to what is mounted waits there until it is written back",
            cache.display(),
            left >> 20
        )
    })
}

fn reserve(size: u64) -> u64 {
    RESERVE_BYTES.min(size / 20)
}

/// How much of what was read may stay there, of what is wanted, where `mounts` of them share it: never more than half of what is free.
pub fn share_mib(cache: &Path, wanted_mib: u64, mounts: usize) -> u64 {
    let Ok(disk) = statvfs(cache) else {
        return wanted_mib;
    };
    let left = disk.blocks_available().saturating_mul(disk.fragment_size());
    let most = (left >> 21) / (mounts.max(1) as u64);
    wanted_mib.min(most.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_of_the_disk_stays_free() {
        assert_eq!(reserve(100 << 30), RESERVE_BYTES);
        assert_eq!(reserve(1000 << 20), 50 << 20);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(lacking(&dir.path().join("missing")), None);
        assert_eq!(share_mib(dir.path(), 1, 1), 1);
        let (all, half) = (
            share_mib(dir.path(), u64::MAX, 1),
            share_mib(dir.path(), u64::MAX, 2),
        );
        assert!(all < u64::MAX && half <= all, "{half} of {all}");
    }
}
