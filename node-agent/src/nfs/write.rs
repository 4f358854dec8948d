//! WRITE and COMMIT.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::calls::{Call, Done};
use super::protocol::{Change, FILE_SYNC, HANDLE_MAX, IO_MAX, Status, UNSTABLE};
use super::xdr::{Garbage, Reader, Writer};

impl Call<'_> {
    pub fn write(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let (handle, offset, stable, data) = args.all(|args| {
            let (handle, offset) = (args.bytes(HANDLE_MAX)?, args.u64()?);
            let (count, stable) = (args.u32()?, args.u32()?);
            let data = args.bytes(IO_MAX as usize)?;
            match count as usize == data.len() && stable <= FILE_SYNC {
                true => Ok((handle, offset, stable, data)),
                false => Err(Garbage),
            }
        })?;
        let object = self.export.object(handle)?;
        let file = Arc::new(object.data(self.who, true)?);
        let unstable = &self.export.unstable;
        let verifier = unstable.verifier();
        let held = self.export.lock(&object);
        let before = self.export.now(&object);
        let written = self.who.act(|| write_all(&file, data, offset))?;
        let after = self.export.now(&object);
        drop(held);
        // Also of a write that failed amid it.
        let waits = stable == UNSTABLE && unstable.wrote(object.stat.st_ino, &file);
        if !waits {
            unstable.sync(&file)?;
        }
        let written = written?;
        Change { before, after }.write(out);
        out.u32(written as u32);
        out.u32(if waits { UNSTABLE } else { FILE_SYNC });
        out.u64(verifier);
        Ok(())
    }

    /// The whole file, whatever part of it a client asks for.
    pub fn commit(&self, args: &mut Reader, out: &mut Writer) -> Done {
        let handle = args.all(|args| {
            let handle = args.bytes(HANDLE_MAX)?;
            args.u64()?;
            args.u32()?;
            Ok(handle)
        })?;
        let object = self.export.object(handle)?;
        object.is_file()?;
        self.export.unstable.commit(object.stat.st_ino)?;
        // It changes nothing, and others may meanwhile: nothing is said of before.
        let change = Change {
            before: None,
            after: self.export.now(&object),
        };
        change.write(out);
        out.u64(self.export.unstable.verifier());
        Ok(())
    }
}

/// Writes; returns how much of it could be.
fn write_all(file: &File, data: &[u8], offset: u64) -> Result<usize, Status> {
    let end = offset.checked_add(data.len() as u64);
    if end.is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(Status::Fbig);
    }
    let mut written = 0;
    while written < data.len() {
        match file.write_at(&data[written..], offset + written as u64) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // What is written is told, and the next call fails.
            Err(_) if written > 0 => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(written)
}
