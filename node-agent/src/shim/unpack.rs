//! Unpacks a bundle into a job's directory: files, directories and links, nothing else, nothing outside, and within bounds.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path};

use batchai_common::limits::{BUNDLE_ENTRIES_MAX, BUNDLE_UNPACKED_BYTES_MAX};
use flate2::read::GzDecoder;
use tar::{Archive, EntryType};

/// What an entry takes in an archive beside its content: a header and a block that is not full.
const ENTRY_BYTES: u64 = 1024;
/// What the service itself puts into the directory.
const RESERVED: [&str; 3] = ["mounts", "shared", "hostfile"];

/// Unpacks a bundle.
pub fn unpack(bundle: &Path, into: &Path) -> io::Result<()> {
    // Whatever its headers say: no more than this ever comes out of it.
    let most = BUNDLE_UNPACKED_BYTES_MAX + BUNDLE_ENTRIES_MAX as u64 * ENTRY_BYTES;
    let mut archive = Archive::new(GzDecoder::new(File::open(bundle)?).take(most));
    archive.set_preserve_mtime(false);
    let (mut count, mut size) = (0, 0_u64);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        count += 1;
        size = size.saturating_add(entry.size());
        if count > BUNDLE_ENTRIES_MAX || size > BUNDLE_UNPACKED_BYTES_MAX {
            return Err(io::Error::other(format!(
                "it is larger than {BUNDLE_ENTRIES_MAX} files or {BUNDLE_UNPACKED_BYTES_MAX} bytes"
            )));
        }
        let refused = |why: &str| io::Error::other(format!("{}: {why}", path.display()));
        let kind = entry.header().entry_type();
        if !matches!(
            kind,
            EntryType::Regular | EntryType::Directory | EntryType::Symlink
        ) {
            return Err(refused(
                "is neither a file nor a directory nor a symbolic link",
            ));
        }
        let own = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        if !path.components().all(own) {
            return Err(refused("leads out of the job's directory"));
        }
        let first = path.components().find_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        });
        if first.is_some_and(|first| RESERVED.contains(&first)) {
            return Err(refused(
                "has a name that the service uses itself in a job's directory",
            ));
        }
        // It follows no link that an earlier entry made to elsewhere.
        if !entry.unpack_in(into)? {
            return Err(refused("leads out of the job's directory"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{Builder, Header};

    use super::*;

    /// Packs entries as they are given, also those that no honest packer makes.
    fn pack(path: &Path, entries: &[(&str, EntryType, &str)]) {
        let mut builder = Builder::new(GzEncoder::new(
            File::create(path).unwrap(),
            Compression::fast(),
        ));
        for (name, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            let is_link = !matches!(kind, EntryType::Regular);
            if is_link && !content.is_empty() {
                header.set_link_name(content).unwrap();
            }
            let data = if is_link { "" } else { content };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap();
    }

    #[test]
    fn files_directories_and_links_come_out_as_they_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, into) = (dir.path().join("b"), dir.path().join("into"));
        fs::create_dir(&into).unwrap();
        pack(
            &bundle,
            &[
                ("train.py", EntryType::Regular, "print()"),
                ("lib/", EntryType::Directory, ""),
                ("lib/a.py", EntryType::Regular, "a"),
                ("link", EntryType::Symlink, "lib/a.py"),
            ],
        );
        unpack(&bundle, &into).unwrap();
        assert_eq!(
            fs::read_to_string(into.join("train.py")).unwrap(),
            "print()"
        );
        assert_eq!(fs::read_to_string(into.join("link")).unwrap(), "a");
    }

    #[test]
    fn nothing_is_written_outside_and_nothing_else_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("into");
        fs::create_dir(&into).unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let elsewhere = outside.to_string_lossy().into_owned();
        for entries in [
            &[("../outside/f", EntryType::Regular, "x")][..],
            &[("a/../../outside/f", EntryType::Regular, "x")],
            &[
                ("l", EntryType::Symlink, elsewhere.as_str()),
                ("l/f", EntryType::Regular, "x"),
            ],
            &[("hard", EntryType::Link, "/etc/passwd")],
            &[("pipe", EntryType::Fifo, "")],
            &[("shared", EntryType::Symlink, "/tmp")],
            &[("./mounts/x", EntryType::Regular, "x")],
        ] {
            let bundle = dir.path().join("b");
            pack(&bundle, entries);
            assert!(unpack(&bundle, &into).is_err(), "{entries:?}");
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{entries:?}");
        }
        fs::write(dir.path().join("b"), "no archive").unwrap();
        assert!(unpack(&dir.path().join("b"), &into).is_err());
    }
}
