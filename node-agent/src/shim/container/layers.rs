//! What `docker save` writes, read and unpacked: layers of files over each other, checked against the digests that the image names.
//!
//! It unpacks below `/`: whose root that is, who calls it has seen to, and how much memory it may take: what an archive says of its entries
//! is read whole. Devices and pipes are left out: a container has the host's. The archive may be changed by whoever has it while it is read: nothing
//! of it is kept that was not seen to be what the image names.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};

use batchai_common::images::is_sha256;
use flate2::read::MultiGzDecoder;
use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tar::{Archive, Entry, EntryType};

/// The largest text in an archive that says what is in it.
const TEXT_BYTES_MAX: u64 = 4 << 20;
const LAYERS_MAX: usize = 512;
const FILES_MAX: usize = 10_000;
/// Of all layers together.
const ENTRIES_MAX: usize = 10_000_000;
/// The variables of an image, as they are written down: those of a process may not be much more.
const ENV_BYTES_MAX: usize = 96 << 10;
/// Of what an image says and nobody heeds, so much is repeated.
const SAID_CHARS_MAX: usize = 200;
/// Left free on the disk, for all else that is there.
pub const SPARE_BYTES: u64 = 256 << 20;
const SPARE_FILES: u64 = 10_000;
const HIDES: &str = ".wh.";
const HIDES_ALL: &str = ".wh..wh..opq";
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What an archive says of its image.
#[derive(Debug, Serialize, Deserialize)]
pub struct Image {
    /// The SHA-256 of its configuration, which names those of its layers.
    pub digest: String,
    pub env: BTreeMap<String, String>,
    /// What it says that is not done, in words.
    pub left_out: Vec<String>,
    /// Where each layer lies in the archive, and the SHA-256 of what it is.
    layers: Vec<(Section, String)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    config: String,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    config: Option<Settings>,
    rootfs: Rootfs,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Settings {
    env: Option<Vec<String>>,
    user: Value,
    working_dir: Value,
    shell: Value,
    entrypoint: Value,
    cmd: Value,
    volumes: Value,
}

impl Settings {
    /// Variables that a process can have.
    fn env(&self) -> io::Result<BTreeMap<String, String>> {
        let all = self.env.iter().flatten();
        let pairs = all.filter_map(|variable| variable.split_once('='));
        // A process could not be started with the others.
        let legal = pairs.filter(|(name, value)| {
            !name.is_empty() && !name.contains('\0') && !value.contains('\0')
        });
        let env: BTreeMap<_, _> = legal
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        match serde_json::to_vec(&env)?.len() <= ENV_BYTES_MAX {
            true => Ok(env),
            false => Err(bad(format!(
                "its variables take more than {} KiB",
                ENV_BYTES_MAX >> 10
            ))),
        }
    }

    /// What an engine would do that is not done here.
    fn left_out(&self) -> Vec<String> {
        let all = [
            ("USER", &self.user),
            ("WORKDIR", &self.working_dir),
            ("SHELL", &self.shell),
            ("ENTRYPOINT", &self.entrypoint),
            ("CMD", &self.cmd),
            ("VOLUME", &self.volumes),
        ];
        let says = |value: &Value| match value {
            Value::Null => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            Value::Bool(_) | Value::Number(_) => true,
        };
        let said = all.into_iter().filter(|(_, value)| says(value));
        let said = said.map(|(word, value)| {
            let text = value.to_string();
            let cut: String = text.chars().take(SAID_CHARS_MAX).collect();
            format!("{word} {cut}")
        });
        said.collect()
    }
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

/// A part of a file.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Section {
    at: u64,
    size: u64,
}

/// What is in an archive under a name.
enum Held {
    Here(Section),
    /// The same as another.
    As(PathBuf),
}

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl Section {
    fn of(self, file: &File) -> Reading<'_> {
        Reading {
            file,
            at: self.at,
            end: self.at + self.size,
        }
    }
}

/// A part of a file that is being read, wherever others read the same.
struct Reading<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Reading<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Reads what an archive says of its image.
pub fn read(file: &File) -> io::Result<Image> {
    let held = contents(file)?;
    let text = |name: &str| -> io::Result<Vec<u8>> {
        let section = find(&held, name)?;
        if section.size > TEXT_BYTES_MAX {
            return Err(bad(format!("{name} in it is too large")));
        }
        let mut text = Vec::new();
        section.of(file).read_to_end(&mut text)?;
        Ok(text)
    };
    let manifests: Vec<Manifest> = serde_json::from_slice(&text("manifest.json")?)
        .map_err(|error| bad(format!("manifest.json in it is not understood: {error}")))?;
    let [manifest] = &manifests[..] else {
        let count = manifests.len();
        return Err(bad(format!("it holds {count} images: save one alone")));
    };
    let configuration = text(&manifest.config)?;
    let digest = hex(&Sha256::digest(&configuration));
    let configuration: Configuration = serde_json::from_slice(&configuration)
        .map_err(|error| bad(format!("its configuration is not understood: {error}")))?;
    let ids = configuration.rootfs.diff_ids;
    if ids.len() != manifest.layers.len() || ids.len() > LAYERS_MAX {
        return Err(bad(
            "its configuration names other layers than it has, or too many",
        ));
    }
    let sections = manifest.layers.iter().map(|name| find(&held, name));
    let sections = sections.collect::<io::Result<Vec<_>>>()?;
    let ids = ids.iter().map(|id| id.trim_start_matches("sha256:"));
    let ids: Vec<_> = ids.map(str::to_owned).collect();
    if !ids.iter().all(|id| is_sha256(id)) {
        return Err(bad("its configuration names a layer by what is no SHA-256"));
    }
    let settings = configuration.config.unwrap_or_default();
    Ok(Image {
        digest,
        env: settings.env()?,
        left_out: settings.left_out(),
        layers: sections.into_iter().zip(ids).collect(),
    })
}

fn contents(mut file: &File) -> io::Result<BTreeMap<PathBuf, Held>> {
    let mut magic = [0; 2];
    file.read_exact_at(&mut magic, 0)
        .map_err(|_| bad("it is no archive"))?;
    if magic == GZIP {
        return Err(bad("it is compressed: gunzip it"));
    }
    file.seek(SeekFrom::Start(0))?;
    let mut held = BTreeMap::new();
    let mut archive = Archive::new(file);
    for entry in archive.entries_with_seek()? {
        let entry = entry
            .map_err(|error| io::Error::new(error.kind(), format!("it is no archive: {error}")))?;
        let path = plain(&entry.path()?).ok_or_else(|| bad("a name in it leads out of it"))?;
        let section = Section {
            at: entry.raw_file_position(),
            size: entry.size(),
        };
        let held_here = match entry.header().entry_type() {
            EntryType::Symlink | EntryType::Link => {
                let target = entry.link_name()?.unwrap_or_default().into_owned();
                let beside = path.parent().unwrap_or(Path::new(""));
                let whole = match entry.header().entry_type() {
                    EntryType::Symlink => beside.join(target),
                    _ => target,
                };
                Held::As(resolved(&whole))
            }
            _ => Held::Here(section),
        };
        held.insert(path, held_here);
        if held.len() > FILES_MAX {
            return Err(bad("it holds too many files"));
        }
    }
    Ok(held)
}

fn find(held: &BTreeMap<PathBuf, Held>, name: &str) -> io::Result<Section> {
    let missing = || bad(format!("it is no image: {name} is not in it"));
    let first = held.get(&resolved(Path::new(name))).ok_or_else(missing)?;
    match first {
        Held::Here(section) => Ok(*section),
        Held::As(other) => match held.get(other) {
            Some(Held::Here(section)) => Ok(*section),
            _ => Err(missing()),
        },
    }
}

/// A path without detours, as far as it goes down.
fn resolved(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            _ => {}
        }
    }
    plain
}

/// A path that goes down only.
fn plain(path: &Path) -> Option<PathBuf> {
    let climbs = path.components().any(|part| part == Component::ParentDir);
    (!climbs).then(|| resolved(path))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads, and knows the digest of what was read.
struct Counted<R> {
    inner: R,
    digest: Sha256,
}

impl<R: Read> Counted<R> {
    fn of(inner: R) -> Counted<R> {
        let digest = Sha256::new();
        Counted { inner, digest }
    }

    /// All of it, padding included, is what has this SHA-256.
    fn is(mut self, id: &str) -> io::Result<()> {
        io::copy(&mut self, &mut io::sink())?;
        let digest = hex(&self.digest.finalize());
        match digest == id {
            true => Ok(()),
            false => Err(bad(format!(
                "it is not what the image names: its SHA-256 is {digest}, not {id}"
            ))),
        }
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.digest.update(&buffer[..read]);
        Ok(read)
    }
}

/// Counts the entries of all layers.
#[derive(Default)]
struct Entries(usize);

impl Entries {
    fn one_more(&mut self) -> io::Result<()> {
        self.0 += 1;
        match self.0 > ENTRIES_MAX {
            true => Err(bad("it holds too many files")),
            false => Ok(()),
        }
    }
}

/// Does something with each layer.
fn each(image: &Image, mut work: impl FnMut(Section, &str) -> io::Result<()>) -> io::Result<()> {
    for (at, (section, id)) in image.layers.iter().enumerate() {
        work(*section, id)
            .map_err(|error| io::Error::new(error.kind(), format!("layer {}: {error}", at + 1)))?;
    }
    Ok(())
}

/// Unpacks all layers below `/`.
pub fn unpack(file: &File, image: &Image) -> io::Result<()> {
    let (mut seen, mut made) = (Entries::default(), Entries::default());
    each(image, |section, id| {
        // What it hides is of those below it: first. Nothing of it is unpacked before it was seen to be what the image names.
        let mut reading = Counted::of(uncompressed(file, section)?);
        hide(&mut reading, &mut seen)?;
        reading.is(id)?;
        // It may have been changed since.
        let mut reading = Counted::of(uncompressed(file, section)?);
        add(&mut reading, &mut made)?;
        reading.is(id)
    })
}

/// Sees to it that an archive holds all that its image names: who only knows its name has no image.
pub fn check(file: &File, image: &Image) -> io::Result<()> {
    each(image, |section, id| {
        Counted::of(uncompressed(file, section)?).is(id)
    })
}

fn uncompressed(file: &File, section: Section) -> io::Result<Box<dyn Read + '_>> {
    let mut magic = [0; 4];
    // An empty layer is shorter than that: then it is no archive either, which is said when it is read.
    let _ = section.of(file).read_exact(&mut magic);
    if magic == ZSTD {
        return Err(bad(
            "it is compressed with zstd, which is not read: save the image with gzip or none",
        ));
    }
    Ok(match magic[..2] == GZIP {
        true => Box::new(MultiGzDecoder::new(section.of(file))),
        false => Box::new(section.of(file)),
    })
}

/// The place of an entry below `/`.
fn place<R: Read>(entry: &Entry<'_, R>) -> io::Result<PathBuf> {
    let path = entry.path()?;
    let plain = plain(&path).ok_or_else(|| bad(format!("{}: leads out of it", path.display())))?;
    Ok(Path::new("/").join(plain))
}

fn hide(layer: impl Read, count: &mut Entries) -> io::Result<()> {
    for entry in Archive::new(layer).entries()? {
        count.one_more()?;
        let path = place(&entry?)?;
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let parent = path.parent().unwrap_or(Path::new("/"));
        if name == HIDES_ALL {
            for below in fs::read_dir(parent).into_iter().flatten() {
                remove(&below?.path())?;
            }
        } else if let Some(hidden) = name.strip_prefix(HIDES)
            && !matches!(hidden, "" | "." | "..")
        {
            remove(&parent.join(hidden))?;
        }
    }
    Ok(())
}

fn add(layer: impl Read, count: &mut Entries) -> io::Result<()> {
    let mut archive = Archive::new(layer);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_unpack_xattrs(false);
    for entry in archive.entries()? {
        let mut entry = entry?;
        count.one_more()?;
        let path = place(&entry)?;
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(HIDES)) || path == Path::new("/") {
            continue;
        }
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::Char | EntryType::Block | EntryType::Fifo) {
            continue;
        }
        leave_room(Path::new("/"), entry.size())?;
        make_way(&path, kind == EntryType::Directory)?;
        let unpacked = entry.unpack_in("/");
        let unpacked =
            unpacked.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        if !unpacked {
            return Err(bad(format!("{}: leads out of it", path.display())));
        }
    }
    Ok(())
}

/// A disk has so much free, and what else is to be left, of files too where it counts them.
pub fn leave_room(at: &Path, bytes: u64) -> io::Result<()> {
    let disk = statvfs(at)?;
    let size = |blocks: u64| blocks.saturating_mul(disk.fragment_size() as u64);
    let free = size(disk.blocks_available() as u64);
    let wanted = bytes.saturating_add(SPARE_BYTES);
    if wanted > size(disk.blocks() as u64) {
        // No other image need go for it; another node may have a larger one.
        let why = format!(
            "it takes {} MiB, which is more than the disk of the agent's --data has",
            bytes >> 20
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    let full = |what: &str| {
        let why = format!("the disk of the agent's --data {what}");
        Err(io::Error::new(io::ErrorKind::StorageFull, why))
    };
    if free <= wanted {
        return full("is full");
    }
    if disk.files() > 0 && disk.files_available() as u64 <= SPARE_FILES {
        return full("can hold no more files");
    }
    Ok(())
}

/// A directory of one layer stays where another has it as well; all else goes.
fn make_way(path: &Path, directory: bool) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() && directory => Ok(()),
        Ok(_) => remove(path),
        Err(_) => Ok(()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
