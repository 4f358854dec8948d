//! PURE. What NFS version 3 (RFC 1813) calls things: procedures, errors, attributes.

use super::xdr::{Garbage, Reader, Writer};

/// Of a handle.
pub const HANDLE_MAX: usize = 64;
/// Of a name: what Linux bears. A longer one is an error of the file system, and no garbage, up to the second.
pub const NAME_MAX: usize = 255;
pub const NAME_READ_MAX: usize = 4096;
/// Of the target of a symbolic link, and of a path in a call of MOUNT.
pub const PATH_MAX: usize = 4096;
/// Of what one call reads or writes.
pub const IO_MAX: u32 = 1 << 20;
/// Of an answer that lists a directory.
pub const LIST_MAX: u32 = 256 << 10;

/// What a call of ACCESS asks for.
pub mod access {
    pub const READ: u32 = 1;
    pub const LOOKUP: u32 = 2;
    pub const MODIFY: u32 = 4;
    pub const EXTEND: u32 = 8;
    pub const DELETE: u32 = 16;
    pub const EXECUTE: u32 = 32;
}

/// How stable a write is to be, or is.
pub const UNSTABLE: u32 = 0;
pub const FILE_SYNC: u32 = 2;

/// The procedures of NFS, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Procedure {
    Null,
    Getattr,
    Setattr,
    Lookup,
    Access,
    Readlink,
    Read,
    Write,
    Create,
    Mkdir,
    Symlink,
    Mknod,
    Remove,
    Rmdir,
    Rename,
    Link,
    Readdir,
    Readdirplus,
    Fsstat,
    Fsinfo,
    Pathconf,
    Commit,
}

impl Procedure {
    pub fn of(number: u32) -> Option<Procedure> {
        use Procedure::*;
        let all = [
            Null,
            Getattr,
            Setattr,
            Lookup,
            Access,
            Readlink,
            Read,
            Write,
            Create,
            Mkdir,
            Symlink,
            Mknod,
            Remove,
            Rmdir,
            Rename,
            Link,
            Readdir,
            Readdirplus,
            Fsstat,
            Fsinfo,
            Pathconf,
            Commit,
        ];
        all.get(number as usize).copied()
    }

    /// Whether a second call of the same kind may have another answer than the first.
    pub fn once(self) -> bool {
        use Procedure::*;
        matches!(
            self,
            Setattr | Create | Mkdir | Symlink | Mknod | Remove | Rmdir | Rename | Link
        )
    }
}

/// What an answer says went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    Perm = 1,
    NoEnt = 2,
    Io = 5,
    Nxio = 6,
    Acces = 13,
    Exist = 17,
    Xdev = 18,
    Nodev = 19,
    NotDir = 20,
    IsDir = 21,
    Inval = 22,
    Fbig = 27,
    NoSpc = 28,
    Rofs = 30,
    Mlink = 31,
    NameTooLong = 63,
    NotEmpty = 66,
    Dquot = 69,
    Stale = 70,
    BadHandle = 10001,
    NotSync = 10002,
    BadCookie = 10003,
    NotSupp = 10004,
    TooSmall = 10005,
    ServerFault = 10006,
    BadType = 10007,
    Jukebox = 10008,
}

/// Seconds and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    pub seconds: u32,
    pub nanoseconds: u32,
}

/// What an answer says of an object.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// As the protocol numbers kinds.
    pub kind: u32,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub used: u64,
    pub device: (u32, u32),
    pub system: u64,
    pub id: u64,
    pub accessed: Time,
    pub modified: Time,
    pub changed: Time,
}

fn time(writer: &mut Writer, time: Time) {
    writer.u32(time.seconds).u32(time.nanoseconds);
}

impl Attributes {
    pub fn write(&self, writer: &mut Writer) {
        writer.u32(self.kind).u32(self.mode).u32(self.links);
        writer.u32(self.uid).u32(self.gid);
        writer.u64(self.size).u64(self.used);
        writer.u32(self.device.0).u32(self.device.1);
        writer.u64(self.system).u64(self.id);
        time(writer, self.accessed);
        time(writer, self.modified);
        time(writer, self.changed);
    }
}

/// Attributes that may not be known.
pub fn maybe(writer: &mut Writer, attributes: Option<&Attributes>) {
    writer.bool(attributes.is_some());
    if let Some(attributes) = attributes {
        attributes.write(writer);
    }
}

/// An object before and after a change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    pub before: Option<Attributes>,
    pub after: Option<Attributes>,
}

impl Change {
    pub fn write(&self, writer: &mut Writer) {
        writer.bool(self.before.is_some());
        if let Some(before) = &self.before {
            writer.u64(before.size);
            time(writer, before.modified);
            time(writer, before.changed);
        }
        maybe(writer, self.after.as_ref());
    }
}

/// What a time is to become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SetTime {
    #[default]
    Leave,
    Now,
    To(Time),
}

/// What is to become of an object's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub accessed: SetTime,
    pub modified: SetTime,
}

pub fn read_time(reader: &mut Reader) -> Result<Time, Garbage> {
    let (seconds, nanoseconds) = (reader.u32()?, reader.u32()?);
    if nanoseconds >= 1_000_000_000 {
        return Err(Garbage);
    }
    Ok(Time {
        seconds,
        nanoseconds,
    })
}

fn set_time(reader: &mut Reader) -> Result<SetTime, Garbage> {
    Ok(match reader.u32()? {
        0 => SetTime::Leave,
        1 => SetTime::Now,
        2 => SetTime::To(read_time(reader)?),
        _ => return Err(Garbage),
    })
}

pub fn settings(reader: &mut Reader) -> Result<Settings, Garbage> {
    Ok(Settings {
        mode: reader.option(Reader::u32)?,
        uid: reader.option(Reader::u32)?,
        gid: reader.option(Reader::u32)?,
        size: reader.option(Reader::u64)?,
        accessed: set_time(reader)?,
        modified: set_time(reader)?,
    })
}

/// The arguments of READ.
#[derive(Clone, Copy, Debug)]
pub struct Read<'a> {
    pub file: &'a [u8],
    pub offset: u64,
    pub count: u32,
}

pub fn read<'a>(reader: &mut Reader<'a>) -> Result<Read<'a>, Garbage> {
    Ok(Read {
        file: reader.bytes(HANDLE_MAX)?,
        offset: reader.u64()?,
        count: reader.u32()?,
    })
}

/// A directory and a name in it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub directory: &'a [u8],
    pub name: &'a [u8],
}

pub fn place<'a>(reader: &mut Reader<'a>) -> Result<Place<'a>, Garbage> {
    Ok(Place {
        directory: reader.bytes(HANDLE_MAX)?,
        name: reader.bytes(NAME_READ_MAX)?,
    })
}
