//! Files that lose their beginning and keep their offsets: a hole is as long as what it stands for, and takes no disk.
//!
//! Who writes a file decides what of it is given up. Where a file system has no holes, that fails and says so.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

/// What a hole ends at a multiple of, so that `first_kept` finds its end to the byte on every file system.
pub const HOLE_ALIGN: u64 = 64 << 10;

/// Makes a hole of all bytes before an offset.
pub fn give_up(file: &File, before: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let length = i64::try_from(before).map_err(io::Error::other)?;
    loop {
        match fallocate(file, flags, 0, length) {
            Err(Errno::EINTR) => {}
            done => return Ok(done?),
        }
    }
}

/// Where the hole ends that a file begins with. What was read before this was asked, and lies behind it, is what was written.
pub fn first_kept(file: &File) -> io::Result<u64> {
    // Asking moves the place where the file is read and written next.
    let place = lseek(file, 0, Whence::SeekCur)?;
    let found = lseek(file, 0, Whence::SeekData);
    lseek(file, place, Whence::SeekSet)?;
    match found {
        Ok(at) => Ok(u64::try_from(at).unwrap_or_default()),
        // Nothing but a hole, or nothing at all.
        Err(Errno::ENXIO) => Ok(file.metadata()?.len()),
        // A file system that knows nothing of holes has none.
        Err(Errno::EINVAL) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_knows_where_its_hole_ends() {
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(first_kept(&file).unwrap(), 0);
        file.write_all(&vec![b'x'; 5 * HOLE_ALIGN as usize + 7])
            .unwrap();
        assert_eq!(first_kept(&file).unwrap(), 0);
        give_up(&file, 3 * HOLE_ALIGN).unwrap();
        assert_eq!(first_kept(&file).unwrap(), 3 * HOLE_ALIGN);
        assert_eq!(file.metadata().unwrap().len(), 5 * HOLE_ALIGN + 7);
        give_up(&file, 6 * HOLE_ALIGN).unwrap();
        assert_eq!(first_kept(&file).unwrap(), 5 * HOLE_ALIGN + 7);
    }
}
