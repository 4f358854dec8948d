//! READDIR and READDIRPLUS. Where a client goes on is the file system's own position in the directory, which stays as it is while others
//! change what is around it, and over restarts: nothing is kept for a client here.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::calls::{Call, Done};
use super::export::Object;
use super::protocol::{self, HANDLE_MAX, LIST_MAX, Status};
use super::sys;
use super::xdr::{Garbage, Reader, Writer};

/// What is read of a directory at once.
const BUFFER: usize = 32 << 10;
/// After the entries: that there is none more, and whether this is the end.
const TAIL: usize = 8;
/// A number, a position, and the length of a name, before a name; and that there is one more.
const ENTRY: usize = 4 + 8 + 4 + 8;

/// One entry as the kernel tells it.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    id: u64,
    /// Of the next one.
    position: u64,
    name: &'a [u8],
}

/// The first entry in a buffer, and how long it is.
fn entry(buffer: &[u8]) -> Option<(Entry<'_>, usize)> {
    let number = |at: usize| Some(u64::from_ne_bytes(*buffer.get(at..)?.first_chunk()?));
    let length = u16::from_ne_bytes(*buffer.get(16..)?.first_chunk()?) as usize;
    let name = buffer.get(19..length)?;
    let entry = Entry {
        id: number(0)?,
        position: number(8)?,
        name: name.split(|byte| *byte == 0).next()?,
    };
    Some((entry, length))
}

/// How long an answer may get.
struct Room {
    /// Names, with numbers and positions.
    names: usize,
    all: usize,
}

impl Call<'_> {
    pub fn readdir(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (handle, position, count) = args.all(|args| {
            let (handle, position, _) = from(args)?;
            Ok((handle, position, args.u32()?))
        })?;
        let directory = self.export.directory(handle)?;
        let all = count.min(LIST_MAX) as usize;
        let room = Room { names: all, all };
        self.list(&directory, position, room, out, |_, _| {})
    }

    pub fn readdirplus(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (handle, position, names, all) = args.all(|args| {
            let (handle, position, _) = from(args)?;
            Ok((handle, position, args.u32()?, args.u32()?))
        })?;
        let directory = self.export.directory(handle)?;
        let room = Room {
            names: names as usize,
            all: all.min(LIST_MAX) as usize,
        };
        self.list(&directory, position, room, out, |name, out| {
            let object = match name {
                b".." => None,
                name => directory.child(name, OFlag::O_PATH, Mode::empty()).ok(),
            };
            let object = object.and_then(|fd| self.export.own(fd).ok());
            let handle = object.as_ref().and_then(|o| self.export.handle(&o.fd).ok());
            let attributes = object.map(|object| self.export.attributes(&object.stat));
            // Neither is told of what may not be looked up, or is there no more.
            protocol::maybe(out, attributes.as_ref());
            out.bool(handle.is_some());
            if let Some(handle) = handle {
                out.bytes(&handle);
            }
        })
    }

    /// Lists as much of a directory as there is room for.
    fn list(
        &self,
        directory: &Object,
        position: u64,
        room: Room,
        out: &mut Writer,
        more: impl Fn(&[u8], &mut Writer),
    ) -> Done {
        let begin = out.0.len() - 4;
        let attributes = self.export.attributes(&directory.stat);
        protocol::maybe(out, Some(&attributes));
        // Positions are always good.
        out.u64(0);
        let listed = self.who.act(|| {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            // By what is open here: to open `.` takes the right to pass the directory as well.
            let fd = nix::fcntl::open(&directory.path(), flags, Mode::empty())?;
            let mut file = File::from(fd);
            // What the file system does not take as a position.
            let sought = file.seek(SeekFrom::Start(position));
            sought.map_err(|_| Status::BadCookie)?;
            let root = std::os::unix::fs::MetadataExt::ino(&self.export.root.metadata()?);
            let at_root = directory.stat.st_ino == root;
            let up = at_root.then_some(root);
            fill(&mut file, &room, begin, out, up, more)
        })?;
        let end = listed?;
        out.bool(false).bool(end);
        Ok(())
    }
}

/// The arguments that both have: a handle, a position, and a verifier, which says nothing here.
fn from<'a>(args: &mut Reader<'a>) -> Result<(&'a [u8], u64, [u8; 8]), Garbage> {
    Ok((args.bytes(HANDLE_MAX)?, args.u64()?, args.array()?))
}

/// Writes entries; returns whether they were all. `up` is the number that the root's parent is told to have: its own.
fn fill(
    file: &mut File,
    room: &Room,
    begin: usize,
    out: &mut Writer,
    up: Option<u64>,
    more: impl Fn(&[u8], &mut Writer),
) -> Result<bool, Status> {
    // The name of an entry may be as long as the room is.
    let mut buffer = vec![0; room.all.clamp(BUFFER / 8, BUFFER)];
    let first = out.0.len();
    let mut names = 0;
    loop {
        let read = sys::entries(file, &mut buffer)?;
        if read == 0 {
            return Ok(true);
        }
        let mut left = &buffer[..read];
        while let Some((entry, length)) = entry(left) {
            left = &left[length..];
            let before = out.0.len();
            let id = match (entry.name, up) {
                (b"..", Some(root)) => root,
                _ => entry.id,
            };
            out.bool(true).u64(id).bytes(entry.name).u64(entry.position);
            more(entry.name, out);
            names += ENTRY + entry.name.len();
            if out.0.len() - begin + TAIL > room.all
                || names > room.names.max(ENTRY) && before > first
            {
                out.0.truncate(before);
                return if before > first {
                    Ok(false)
                } else {
                    Err(Status::TooSmall)
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_the_kernel_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let long = "n".repeat(255);
        std::fs::write(dir.path().join(&long), "").unwrap();
        let mut buffer = vec![0; 4096];
        let file = File::open(dir.path()).unwrap();
        let read = sys::entries(&file, &mut buffer).unwrap();
        let mut left = &buffer[..read];
        let mut names = Vec::new();
        while let Some((entry, length)) = entry(left) {
            left = &left[length..];
            assert!(entry.id > 0 && entry.position > 0);
            names.push(String::from_utf8(entry.name.to_vec()).unwrap());
        }
        names.sort();
        assert_eq!(names, [".", "..", &long]);
        assert!(left.is_empty());
        assert_eq!(sys::entries(&file, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn half_an_entry_is_none() {
        for length in 0..24 {
            assert_eq!(entry(&vec![30; length]), None);
        }
    }
}
