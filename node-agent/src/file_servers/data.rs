//! What is shared, on the disk: made, and taken away.
//!
//! ```text
//! SHARES/NAME-UID             what is shared
//! SHARES/.purged-NAME-UID     the same while it is taken away; empty at last, until the journal says so
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::mounts::is_mounted_below;

/// Everybody may write there, as on a disk of one's own; what belongs to whom the server sees to.
pub fn make(data: &Path) -> io::Result<()> {
    let at = |path: &Path, error: io::Error| {
        let why = format!("{} cannot be made: {error}", path.display());
        io::Error::new(error.kind(), why)
    };
    let make = |path: &Path| match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.map_err(|error| at(path, error)),
    };
    let shares = data.parent().expect("it lies below the shares");
    make(shares)?;
    fs::set_permissions(shares, fs::Permissions::from_mode(0o700))?;
    make(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o1777))?;
    fs::File::open(shares)?.sync_all()
}

/// Where what is being taken away lies.
pub fn aside(data: &Path) -> PathBuf {
    let name = data.file_name().unwrap_or_default().to_string_lossy();
    data.with_file_name(format!(".purged-{name}"))
}

/// Takes away all that is shared, out of the way first: what is half gone is nobody's any more. An empty directory stays for as long as that
/// is not written down.
pub fn purge(data: &Path) -> io::Result<()> {
    let gone = aside(data);
    for path in [data, &gone] {
        // What an administrator has mounted there was never part of it.
        if is_mounted_below(path).unwrap_or(true) {
            let why = format!("something is mounted below {}: unmount it", path.display());
            return Err(io::Error::other(why));
        }
    }
    if gone.try_exists()? {
        empty(&gone)?;
    }
    if data.try_exists()? {
        // It may lie where an empty one does.
        fs::rename(data, &gone)?;
        empty(&gone)?;
    }
    // A disk that loses power has it gone as well.
    for path in [&gone, gone.parent().unwrap_or(&gone)] {
        fs::File::open(path)?.sync_all()?;
    }
    Ok(())
}

fn empty(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// What stayed has served its time: whoever died before sees it, and purges again.
pub fn forget(data: &Path) -> io::Result<()> {
    fs::remove_dir(aside(data))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_purged_is_gone_whatever_lay_where_and_what_it_led_to_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("shares/data");
        let fill = |path: &Path| {
            fs::create_dir_all(path.join("below")).unwrap();
            fs::write(path.join("below/file"), "x").unwrap();
            symlink(dir.path(), path.join("link")).unwrap();
        };
        // A whole one; what was left of an earlier purge; both.
        for (whole, left) in [(true, false), (false, true), (true, true)] {
            if whole {
                make(&data).unwrap();
                fill(&data);
            }
            if left {
                fill(&aside(&data));
            }
            purge(&data).unwrap();
            assert!(!data.exists() && aside(&data).is_dir());
            assert_eq!(fs::read_dir(aside(&data)).unwrap().count(), 0);
            // Once more is as well.
            purge(&data).unwrap();
            forget(&data).unwrap();
            assert_eq!(fs::read_dir(dir.path().join("shares")).unwrap().count(), 0);
        }
        assert!(purge(&data).is_err(), "there is nothing");
    }
}
