//! Unpacks a bundle into a job's directory: files, directories and links, nothing else, nothing outside, and within bounds.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path};

use batchai_common::limits::{BUNDLE_ENTRIES_MAX, BUNDLE_RESERVED, BUNDLE_UNPACKED_BYTES_MAX};
use flate2::read::GzDecoder;
use tar::{Archive, EntryType};

/// What an entry takes in an archive beside its content: a header and a block that is not full.
const ENTRY_BYTES: u64 = 1024;
/// What unpacking may take of memory, beyond the process's own: a name of gigabytes is read whole before it is refused.
const MEMORY_BYTES_MAX: u64 = 512 << 20;

/// Unpacks a bundle.
pub fn unpack(bundle: File, into: &Path) -> io::Result<()> {
    // Whatever its headers say: no more than this ever comes out of it.
    let most = BUNDLE_UNPACKED_BYTES_MAX + BUNDLE_ENTRIES_MAX as u64 * ENTRY_BYTES;
    let mut archive = Archive::new(GzDecoder::new(bundle).take(most));
    archive.set_preserve_mtime(false);
    let (mut count, mut size) = (0, 0_u64);
    let mut directories = Vec::new();
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
        if first.is_some_and(|first| BUNDLE_RESERVED.contains(&first)) {
            return Err(refused(
                "has a name that the service uses itself in a job's directory",
            ));
        }
        // Last, and the innermost first: one that is read-only must take what lies in it before.
        if kind == EntryType::Directory {
            directories.push((path, entry));
            continue;
        }
        // It follows no link that an earlier entry made to elsewhere.
        if !entry.unpack_in(into)? {
            return Err(refused("leads out of the job's directory"));
        }
    }
    directories.sort_by(|a, b| b.0.cmp(&a.0));
    for (path, mut directory) in directories {
        if !directory.unpack_in(into)? {
            let why = format!("{}: leads out of the job's directory", path.display());
            return Err(io::Error::other(why));
        }
    }
    Ok(())
}

/// Bounds the memory of this process, which unpacks.
pub fn bound_memory() -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm
        .split(' ')
        .next()
        .and_then(|pages| pages.parse().ok())
        .unwrap_or_default();
    let most = pages * 4096 + MEMORY_BYTES_MAX;
    let (_, hard) = getrlimit(Resource::RLIMIT_AS)?;
    setrlimit(Resource::RLIMIT_AS, most.min(hard), hard)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

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
            // Of a directory, the content is its mode.
            let mode = u32::from_str_radix(content, 8).ok();
            header.set_mode(
                mode.filter(|_| *kind == EntryType::Directory)
                    .unwrap_or(0o755),
            );
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            let is_link = !matches!(kind, EntryType::Regular);
            if *kind == EntryType::Symlink || *kind == EntryType::Link {
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
                ("closed/", EntryType::Directory, "0555"),
                ("closed/in/", EntryType::Directory, "0555"),
                ("closed/in/b.py", EntryType::Regular, "b"),
            ],
        );
        unpack(File::open(&bundle).unwrap(), &into).unwrap();
        assert_eq!(
            fs::read_to_string(into.join("train.py")).unwrap(),
            "print()"
        );
        assert_eq!(fs::read_to_string(into.join("link")).unwrap(), "a");
        assert_eq!(
            fs::read_to_string(into.join("closed/in/b.py")).unwrap(),
            "b"
        );
        let mode = fs::metadata(into.join("closed")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o555);
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
            assert!(
                unpack(File::open(&bundle).unwrap(), &into).is_err(),
                "{entries:?}"
            );
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{entries:?}");
        }
        fs::write(dir.path().join("b"), "no archive").unwrap();
        assert!(unpack(File::open(dir.path().join("b")).unwrap(), &into).is_err());
    }
}
