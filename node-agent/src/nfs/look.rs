//! Procedures that change nothing, but for listing directories: see `listing`.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise, readlinkat};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::AccessFlags;

use super::calls::{Call, Done, Fault};
use super::export::{self, Object};
use super::protocol::{self, HANDLE_MAX, IO_MAX, LIST_MAX, NAME_MAX, PATH_MAX, Status, access};
use super::rpc::{self, Head, Refused};
use super::xdr::{Reader, Writer, padding};

/// More than one link, symbolic links, alike everywhere, times as they are set.
const PROPERTIES: u32 = 1 | 2 | 8 | 16;
/// Of an object: what ext4 bears, of those file systems that bear the least.
const LINKS_MAX: u32 = 65_000;
/// A shorter read is one of a few.
const READ_AHEAD_MIN: usize = 128 << 10;
/// What an answer to READ has before its data: attributes, how much it is, whether it is the end, and its length.
const READ_HEAD: usize = 4 + 84 + 4 + 4 + 4;

/// Has the kernel fetch what a long read takes, and what the next one will: it learns nothing of a file that is opened for each.
fn read_ahead(file: &File, offset: u64, count: usize) {
    if count < READ_AHEAD_MIN {
        return;
    }
    for part in 0..2 {
        let from = i64::try_from(offset.saturating_add((part * count) as u64));
        if let Ok(from) = from {
            let will_need = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
            // It is no more than advice.
            let _ = posix_fadvise(file, from, count as i64, will_need);
        }
    }
}

impl Call<'_> {
    /// The object whose handle is all that a procedure is given.
    fn only(&self, args: &mut Reader) -> Result<Object, Fault> {
        let handle = args.all(|args| args.bytes(HANDLE_MAX))?;
        Ok(self.export.object(handle)?)
    }

    fn attributes(&self, object: &Object, out: &mut Writer) {
        protocol::maybe(out, Some(&self.export.attributes(&object.stat)));
    }

    pub fn getattr(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let object = self.only(args)?;
        self.export.attributes(&object.stat).write(out);
        Ok(())
    }

    /// What a name stands for, where the caller may pass the directory.
    pub fn found(&self, directory: &Object, name: &[u8]) -> Result<Object, Status> {
        let found = self
            .who
            .act(|| directory.child(name, OFlag::O_PATH, Mode::empty()))?;
        match found {
            Ok(fd) => self.export.own(fd),
            // Another file system: what is mounted there is not exported.
            Err(nix::errno::Errno::EXDEV) => Err(Status::Acces),
            Err(error) => Err(error.into()),
        }
    }

    pub fn lookup(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let place = args.all(protocol::place)?;
        let directory = self.export.directory(place.directory)?;
        let object = self.found(&directory, export::name(place.name)?)?;
        out.bytes(&self.export.handle(&object.fd)?);
        self.attributes(&object, out);
        self.attributes(&directory, out);
        Ok(())
    }

    pub fn access(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (handle, asked) = args.all(|args| Ok((args.bytes(HANDLE_MAX)?, args.u32()?)))?;
        let object = self.export.object(handle)?;
        let (pass, change) = match object.kind() {
            SFlag::S_IFDIR => (
                access::LOOKUP,
                access::MODIFY | access::EXTEND | access::DELETE,
            ),
            _ => (access::EXECUTE, access::MODIFY | access::EXTEND),
        };
        let rights = [
            (AccessFlags::R_OK, access::READ),
            (AccessFlags::X_OK, pass),
            (AccessFlags::W_OK, change),
        ];
        let granted = self.who.act(|| {
            let asked_for = rights.iter().filter(|(_, rights)| asked & rights != 0);
            let granted = asked_for.filter(|(flag, _)| object.may(*flag));
            granted.fold(0, |all, (_, rights)| all | rights)
        })?;
        self.attributes(&object, out);
        out.u32(granted & asked);
        Ok(())
    }

    pub fn readlink(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let object = self.only(args)?;
        if object.kind() != SFlag::S_IFLNK {
            return Err(Status::Inval.into());
        }
        let target = readlinkat(&object.fd, c"")?;
        self.attributes(&object, out);
        out.bytes(target.as_encoded_bytes());
        Ok(())
    }

    pub fn read(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let protocol::Read {
            file,
            offset,
            count,
        } = args.all(protocol::read)?;
        let object = self.export.object(file)?;
        let file = object.data(self.who, false)?;
        let count = count.min(IO_MAX) as usize;
        read_ahead(&file, offset, count);
        // The data is read into its place, and what comes before it is written when its length is known.
        let head = out.0.len();
        let data = head + READ_HEAD;
        // New memory is zeroed already, and need not be touched before the data comes.
        let mut whole = vec![0; data + count + padding(count)];
        whole[..head].copy_from_slice(&out.0);
        out.0 = whole;
        let mut filled = 0;
        // Beyond what the kernel can say there is nothing.
        while filled < count && i64::try_from(offset + filled as u64).is_ok() {
            match file.read_at(
                &mut out.0[data + filled..data + count],
                offset + filled as u64,
            ) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let object = self.export.own(object.fd)?;
        let end = offset.saturating_add(filled as u64) >= object.stat.st_size as u64;
        let mut before = Writer::default();
        self.attributes(&object, &mut before);
        before.u32(filled as u32).bool(end).u32(filled as u32);
        out.0[head..data].copy_from_slice(&before.0);
        out.0.truncate(data + filled);
        out.0.resize(data + filled + padding(filled), 0);
        Ok(())
    }

    pub fn fsstat(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let object = self.only(args)?;
        let system = nix::sys::statvfs::fstatvfs(&self.export.root)?;
        let block = system.fragment_size();
        self.attributes(&object, out);
        for blocks in [
            system.blocks(),
            system.blocks_free(),
            system.blocks_available(),
        ] {
            out.u64(blocks.saturating_mul(block));
        }
        out.u64(system.files());
        out.u64(system.files_free()).u64(system.files_available());
        // It may be otherwise at once.
        out.u32(0);
        Ok(())
    }

    pub fn fsinfo(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let object = self.only(args)?;
        self.attributes(&object, out);
        // The most, the best and the unit, of reads and of writes.
        for size in [IO_MAX, IO_MAX, 4096, IO_MAX, IO_MAX, 4096] {
            out.u32(size);
        }
        out.u32(LIST_MAX / 4).u64(i64::MAX as u64);
        // Times are kept to the nanosecond.
        out.u32(0).u32(1).u32(PROPERTIES);
        Ok(())
    }

    pub fn pathconf(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let object = self.only(args)?;
        self.attributes(&object, out);
        out.u32(LINKS_MAX).u32(NAME_MAX as u32);
        // Longer names are refused; owners are given by root only; names differ by case, and are kept as they are.
        out.bool(true).bool(true).bool(false).bool(true);
        Ok(())
    }

    /// The program by which a client gets its first handle.
    pub fn mount(&self, head: &Head, mut args: Reader) -> Result<Vec<u8>, Refused> {
        let mut answer = rpc::accepted(head.xid);
        let path = |args: &mut Reader| -> Result<Vec<u8>, Refused> {
            let path = args.all(|args| args.bytes(PATH_MAX));
            Ok(path.map_err(|_| Refused::Garbage)?.to_vec())
        };
        match head.procedure {
            0 => {}
            1 => match self.mounted(&path(&mut args)?) {
                Ok(handle) => {
                    answer.u32(0).bytes(&handle).u32(1).u32(rpc::AUTH_SYS);
                }
                Err(status) => {
                    // Those that MOUNT has in common with NFS; of the others the nearest.
                    let known = [
                        Status::Perm,
                        Status::NoEnt,
                        Status::Io,
                        Status::Acces,
                        Status::NotDir,
                        Status::Inval,
                        Status::NameTooLong,
                        Status::NotSupp,
                    ];
                    let told = known.contains(&status).then_some(status);
                    answer.u32(told.unwrap_or(Status::ServerFault) as u32);
                }
            },
            // Who has mounted what is not written down.
            2 => {
                answer.bool(false);
            }
            3 => {
                path(&mut args)?;
            }
            4 => {}
            5 => {
                let root = self.export.path.as_os_str().as_encoded_bytes();
                answer.bool(true).bytes(root).bool(false).bool(false);
            }
            _ => return Err(Refused::Procedure),
        }
        Ok(answer.0)
    }

    /// The handle of a directory that a client may mount: `/` is the export's root, which may be called as it is here too, and what
    /// lies below it.
    fn mounted(&self, path: &[u8]) -> Result<Vec<u8>, Status> {
        let root = self.export.path.as_os_str().as_encoded_bytes();
        let below = path.strip_prefix(root);
        let below = below.filter(|rest| rest.is_empty() || rest[0] == b'/');
        let names = below.unwrap_or(path).split(|byte| *byte == b'/');
        let mut at = self.export.own(self.export.root.try_clone()?.into())?;
        for part in names.filter(|name| !name.is_empty()) {
            at = self.found(&at, export::name(part)?)?;
        }
        match at.kind() {
            SFlag::S_IFDIR => self.export.handle(&at.fd),
            _ => Err(Status::NotDir),
        }
    }
}
