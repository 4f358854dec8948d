//! Packs a directory or a file, and sends it to the coordinator, unless that has it already.
//!
//! The same files make the same archive: it has neither times nor owners, and its entries are in order.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write};
use std::path::{Path, PathBuf};

use batchai_common::limits::{
    BUNDLE_BYTES_MAX, BUNDLE_ENTRIES_MAX, BUNDLE_RESERVED, BUNDLE_UNPACKED_BYTES_MAX,
    FILE_CHUNK_BYTES_MAX,
};
use batchai_common::names::hex;
use batchai_proto::v1;
use batchai_proto::v1::upload_bundle_request::Part;
use flate2::Compression;
use flate2::write::GzEncoder;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use sha2::{Digest as _, Sha256};
use std::os::unix::fs::MetadataExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::client::{Client, Retry, request};
use crate::error::CliError;

/// What is never sent: the history of the sources is not the sources.
const LEFT_OUT: &str = ".git";
/// Names what else is not sent, in the manner of `.gitignore`.
const IGNORE_FILE: &str = ".batchaiignore";
const PIECES_MAX: usize = 8;

/// A packed bundle.
struct Packed {
    file: File,
    digest: String,
    size: u64,
}

/// Packs and sends a directory with all that is in it, or a single file; returns the bundle's name.
pub async fn send(client: &Client, path: &Path) -> Result<String, CliError> {
    let source = path.to_owned();
    let packed = tokio::task::spawn_blocking(move || pack(&source));
    let mut packed = packed.await.map_err(io::Error::other)??;
    let name = format!("bundles/{}", packed.digest);
    let mut retry = Retry::default();
    loop {
        let get = v1::GetBundleRequest { name: name.clone() };
        let sent = match client.bundles().get_bundle(request(get)).await {
            Ok(_) => return Ok(name),
            Err(status) if status.code() == Code::NotFound => {
                upload(client, &name, &mut packed).await
            }
            Err(status) => Err(status.into()),
        };
        match sent {
            Ok(()) => {}
            Err(CliError::Refused(status)) => retry.again(*status).await?,
            Err(error) => return Err(error),
        }
    }
}

async fn upload(client: &Client, name: &str, packed: &mut Packed) -> Result<(), CliError> {
    let (sender, parts) = mpsc::channel(PIECES_MAX);
    let mut file = packed.file.try_clone()?;
    file.rewind()?;
    let header = Part::Header(v1::BundleHeader {
        name: name.to_owned(),
        size_bytes: packed.size as i64,
    });
    let reader = tokio::task::spawn_blocking(move || {
        let send = |part| sender.blocking_send(v1::UploadBundleRequest { part: Some(part) });
        let mut sent = send(header).is_ok();
        while sent {
            let mut piece = vec![0; FILE_CHUNK_BYTES_MAX];
            let read = file.read(&mut piece)?;
            piece.truncate(read);
            // Who does not want more says why in its answer.
            sent = read > 0 && send(Part::Data(piece.into())).is_ok();
        }
        io::Result::Ok(())
    });
    let answer = client
        .bundles()
        .upload_bundle(ReceiverStream::new(parts))
        .await;
    let answer = match answer {
        Ok(replies) => replies.into_inner().message().await,
        Err(status) => Err(status),
    };
    // It shares its place in the file with who tries again.
    reader.await.map_err(io::Error::other)??;
    answer?;
    Ok(())
}

fn pack(path: &Path) -> Result<Packed, CliError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| CliError::File { path, source }
    };
    let mut packer = Packer {
        archive: tar::Builder::new(GzEncoder::new(
            Counted::new(tempfile::tempfile()?),
            Compression::default(),
        )),
        entries: 0,
        unpacked: 0,
        ignored: Gitignore::empty(),
    };
    let metadata = fs::metadata(path).map_err(at(path))?;
    match metadata.is_dir() {
        true => {
            packer.ignored = ignored(path)?;
            packer.directory(path, Path::new(""))?;
        }
        false => {
            let name = path.file_name().unwrap_or(path.as_os_str());
            // What a link leads to is sent, under the link's name.
            let own = fs::canonicalize(path).map_err(at(path))?;
            packer.entry(&own, Path::new(name))?;
        }
    }
    let finish = || packer.archive.into_inner()?.finish();
    let counted = finish().map_err(at(path))?;
    let digest = counted.hash.finalize();
    Ok(Packed {
        digest: hex(&digest),
        size: counted.size,
        file: counted.file,
    })
}

/// A file that knows its size and digest as it grows.
struct Counted {
    file: File,
    hash: Sha256,
    size: u64,
}

impl Counted {
    fn new(file: File) -> Counted {
        Counted {
            file,
            hash: Sha256::new(),
            size: 0,
        }
    }
}

impl Write for Counted {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.size += data.len() as u64;
        if self.size > BUNDLE_BYTES_MAX {
            let most = BUNDLE_BYTES_MAX >> 20;
            let why = format!(
                "it is larger than {most} MiB, packed: have data on the nodes, and name in {IGNORE_FILE} what \
                 is not to be sent"
            );
            return Err(io::Error::other(why));
        }
        self.file.write_all(data)?;
        self.hash.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

struct Packer {
    archive: tar::Builder<GzEncoder<Counted>>,
    entries: usize,
    unpacked: u64,
    ignored: Gitignore,
}

/// What a directory's own list says is not to be sent.
fn ignored(root: &Path) -> Result<Gitignore, CliError> {
    let path = root.join(IGNORE_FILE);
    let mut builder = GitignoreBuilder::new(root);
    let wrong = match path.exists() {
        true => builder.add(&path),
        false => None,
    };
    let built = builder.build();
    match (wrong, built) {
        (None, Ok(ignored)) => Ok(ignored),
        (Some(error), _) | (_, Err(error)) => Err(CliError::Content {
            path,
            faults: error.to_string(),
        }),
    }
}

impl Packer {
    /// All entries of a directory, in the order of their names.
    fn directory(&mut self, path: &Path, inside: &Path) -> Result<(), CliError> {
        let failed = |source| CliError::File {
            path: path.to_owned(),
            source,
        };
        let entries = fs::read_dir(path).map_err(failed)?;
        let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name())).collect();
        let mut names = names.map_err(failed)?;
        names.sort();
        for name in names.into_iter().filter(|name| name != LEFT_OUT) {
            self.entry(&path.join(&name), &inside.join(&name))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, inside: &Path) -> Result<(), CliError> {
        let failed = |source| CliError::File {
            path: path.to_owned(),
            source,
        };
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        if self.ignored.matched(path, metadata.is_dir()).is_ignore() {
            return Ok(());
        }
        if BUNDLE_RESERVED.iter().any(|name| inside == Path::new(name)) {
            let why = "the service itself puts something of this name where the files will lie; rename it, or name it in";
            let why = format!("{}: {why} {IGNORE_FILE}", path.display());
            return Err(CliError::Failed(why));
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(metadata.mode() & 0o777);
        header.set_size(0);
        let kind = metadata.file_type();
        let appended = if kind.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            self.archive.append_data(&mut header, inside, io::empty())
        } else if kind.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            let target = fs::read_link(path).map_err(failed)?;
            self.archive.append_link(&mut header, inside, target)
        } else if kind.is_file() {
            header.set_size(metadata.len());
            self.unpacked += metadata.len();
            // A file that is being written must not be longer than its header says, nor shorter.
            let mut file = File::open(path).map_err(failed)?.take(metadata.len());
            let appended = self.archive.append_data(&mut header, inside, &mut file);
            if appended.is_ok() && file.limit() > 0 {
                let why = "it became shorter while it was read; try again";
                return Err(failed(io::Error::other(why)));
            }
            appended
        } else {
            say!("batchai: {}: not sent: it is no file", path.display());
            return Ok(());
        };
        appended.map_err(failed)?;
        self.entries += 1;
        if self.entries > BUNDLE_ENTRIES_MAX || self.unpacked > BUNDLE_UNPACKED_BYTES_MAX {
            let most = BUNDLE_UNPACKED_BYTES_MAX >> 30;
            return Err(CliError::Failed(format!(
                "there are more than {BUNDLE_ENTRIES_MAX} files or {most} GiB to send"
            )));
        }
        match kind.is_dir() {
            true => self.directory(path, inside),
            false => Ok(()),
        }
    }
}

/// What is sent along, of the two options that say so.
pub fn source(script: Option<PathBuf>, dir: Option<PathBuf>) -> Result<Option<PathBuf>, CliError> {
    let wrong =
        |path: &Path, what: &str| Err(CliError::Usage(format!("{} is no {what}", path.display())));
    match (script, dir) {
        (Some(script), _) if !script.is_file() => wrong(&script, "file"),
        (_, Some(dir)) if !dir.is_dir() => wrong(&dir, "directory"),
        (script, dir) => Ok(script.or(dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_bundle() {
        let digest = |order: [&str; 3]| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("lib")).unwrap();
            fs::create_dir_all(dir.path().join(".git/objects")).unwrap();
            fs::write(dir.path().join(".git/HEAD"), order[0]).unwrap();
            for name in order {
                fs::write(dir.path().join(name), name).unwrap();
            }
            pack(dir.path()).unwrap().digest
        };
        let first = digest(["a.py", "b.py", "lib/c.py"]);
        assert_eq!(first, digest(["lib/c.py", "b.py", "a.py"]));
        assert_ne!(first, digest(["a.py", "b.py", "lib/d.py"]));
    }

    #[test]
    fn what_is_to_be_left_out_is() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("data/deep")).unwrap();
        fs::create_dir_all(at("lib")).unwrap();
        for name in ["data/deep/x", "lib/a.pyc", "lib/a.py", "keep.pyc"] {
            fs::write(at(name), name).unwrap();
        }
        fs::write(at(IGNORE_FILE), "data/\n*.pyc\n!keep.pyc\n").unwrap();
        let packed = pack(dir.path()).unwrap();
        let mut file = packed.file;
        file.rewind().unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
        let names = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            entry.path().unwrap().to_string_lossy().into_owned()
        });
        assert_eq!(
            names.collect::<Vec<_>>(),
            [IGNORE_FILE, "keep.pyc", "lib", "lib/a.py"]
        );
        fs::write(at("hostfile"), "x").unwrap();
        let refused = pack(dir.path()).err().unwrap().to_string();
        assert!(refused.contains("hostfile"), "{refused}");
        // A script that is a link is what it leads to.
        std::os::unix::fs::symlink(at("lib/a.py"), at("main.py")).unwrap();
        fs::copy(at("lib/a.py"), at("lib/main.py")).unwrap();
        let (link, file) = (at("main.py"), at("lib/main.py"));
        assert_eq!(pack(&link).unwrap().digest, pack(&file).unwrap().digest);
    }

    #[test]
    fn what_is_too_large_is_not_packed() {
        let mut counted = Counted::new(tempfile::tempfile().unwrap());
        counted.size = BUNDLE_BYTES_MAX;
        let error = counted.write(b"x").unwrap_err();
        assert!(error.to_string().contains("larger than"), "{error}");
        assert!(source(Some("/none".into()), None).is_err());
        assert!(source(None, Some("/none".into())).is_err());
        assert_eq!(source(None, None).unwrap(), None);
    }
}
