//! From a call's bytes to its answer's.
//!
//! A procedure writes its answer as if all went well. Where it did not, that is taken back and the error is answered, without the attributes
//! that an answer may carry: clients ask for them where they need them.

use super::export::Export;
use super::identity::{Identity, Squash};
use super::protocol::{self, IO_MAX, LIST_MAX, Procedure, Status};
use super::rpc::{self, Head, Refused};
use super::xdr::{Garbage, Reader, Writer};

/// Why a procedure has not done what it was asked.
#[derive(Debug)]
pub enum Fault {
    Garbage,
    Status(Status),
}

impl<E: Into<Status>> From<E> for Fault {
    fn from(status: E) -> Fault {
        Fault::Status(status.into())
    }
}

impl From<Garbage> for Fault {
    fn from(_: Garbage) -> Fault {
        Fault::Garbage
    }
}

pub type Done = Result<(), Fault>;

/// A call that is being answered.
pub struct Call<'a> {
    pub export: &'a Export,
    pub who: &'a Identity,
}

impl<'a> Reader<'a> {
    /// All arguments of a procedure: nothing is done before they are read to their end.
    pub fn all<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Garbage>,
    ) -> Result<T, Garbage> {
        let arguments = read(self)?;
        self.end()?;
        Ok(arguments)
    }
}

/// How many bytes the answer to a call may have beside a few that all answers have.
pub fn most(record: &[u8]) -> usize {
    let mut arguments = Reader(record);
    let Ok(head) = rpc::head(&mut arguments) else {
        return 0;
    };
    match (head.program, Procedure::of(head.procedure)) {
        (rpc::NFS, Some(Procedure::Read)) => {
            let count = arguments.all(protocol::read).map_or(0, |read| read.count);
            count.min(IO_MAX) as usize
        }
        (rpc::NFS, Some(Procedure::Readdir | Procedure::Readdirplus)) => LIST_MAX as usize,
        _ => 0,
    }
}

/// Answers a call whose head was read.
pub fn answer(export: &Export, head: &Head, squash: Squash, arguments: Reader) -> Vec<u8> {
    let who = Identity::of(head.caller.clone(), squash);
    let call = Call { export, who: &who };
    let answered = match (head.program, head.version) {
        (rpc::NFS, rpc::VERSION) => call.nfs(head, arguments),
        (rpc::MOUNT, rpc::VERSION) => call.mount(head, arguments),
        (rpc::NFS | rpc::MOUNT, _) => Err(Refused::Version),
        _ => Err(Refused::Program),
    };
    answered.unwrap_or_else(|refused| rpc::refusal(head.xid, refused))
}

impl Call<'_> {
    fn nfs(&self, head: &Head, mut arguments: Reader) -> Result<Vec<u8>, Refused> {
        let procedure = Procedure::of(head.procedure).ok_or(Refused::Procedure)?;
        let mut answer = rpc::accepted(head.xid);
        let begin = answer.0.len();
        if procedure == Procedure::Null {
            return Ok(answer.0);
        }
        answer.u32(0);
        match self.procedure(procedure, &mut arguments, &mut answer) {
            Ok(()) => {}
            Err(Fault::Garbage) => return Err(Refused::Garbage),
            Err(Fault::Status(status)) => {
                answer.0.truncate(begin);
                answer.u32(status as u32);
                (0..unknown(procedure)).for_each(|_| {
                    answer.bool(false);
                });
            }
        }
        Ok(answer.0)
    }

    fn procedure(&self, procedure: Procedure, args: &mut Reader, out: &mut Writer) -> Done {
        match procedure {
            Procedure::Null => Ok(()),
            Procedure::Getattr => self.getattr(args, out),
            Procedure::Setattr => self.setattr(args, out),
            Procedure::Lookup => self.lookup(args, out),
            Procedure::Access => self.access(args, out),
            Procedure::Readlink => self.readlink(args, out),
            Procedure::Read => self.read(args, out),
            Procedure::Write => self.write(args, out),
            Procedure::Create => self.create(args, out),
            Procedure::Mkdir => self.mkdir(args, out),
            Procedure::Symlink => self.symlink(args, out),
            Procedure::Mknod => self.mknod(args, out),
            Procedure::Remove => self.remove(args, out, false),
            Procedure::Rmdir => self.remove(args, out, true),
            Procedure::Rename => self.rename(args, out),
            Procedure::Link => self.link(args, out),
            Procedure::Readdir => self.readdir(args, out),
            Procedure::Readdirplus => self.readdirplus(args, out),
            Procedure::Fsstat => self.fsstat(args, out),
            Procedure::Fsinfo => self.fsinfo(args, out),
            Procedure::Pathconf => self.pathconf(args, out),
            Procedure::Commit => self.commit(args, out),
        }
    }
}

/// How many attributes of objects, and of what they were before, the answer to a call that failed has room for.
fn unknown(procedure: Procedure) -> usize {
    use Procedure::*;
    match procedure {
        Null | Getattr => 0,
        Lookup | Access | Readlink | Read | Readdir | Readdirplus | Fsstat | Fsinfo | Pathconf => 1,
        Setattr | Write | Create | Mkdir | Symlink | Mknod | Remove | Rmdir | Commit => 2,
        Link => 3,
        Rename => 4,
    }
}

/// For fuzzers and tests: an export with a key in another directory, and a call, once as it came and once with the export's handle before the
/// rest of it, of a procedure that its first byte chooses.
#[cfg(any(test, fuzzing))]
pub fn any(bytes: &[u8], root: &std::path::Path, keys: &std::path::Path) {
    let export = Export::open(root, keys, 1).expect("it can be exported");
    let squash = Squash {
        uid: 65534,
        gid: 65534,
        all: false,
    };
    let mut arguments = Reader(bytes);
    if let Ok(head) = rpc::head(&mut arguments) {
        answer(&export, &head, squash, arguments);
    }
    let Some((procedure, rest)) = bytes.split_first() else {
        return;
    };
    let head = Head {
        xid: 1,
        program: rpc::NFS,
        version: rpc::VERSION,
        procedure: u32::from(*procedure % 24),
        caller: None,
    };
    let own = export.root.try_clone().expect("there are descriptors");
    let mut arguments = Writer::default();
    let handle = export.handle(&own.into());
    arguments.bytes(&handle.expect("it has one"));
    arguments.0.extend(rest);
    let answered = answer(&export, &head, squash, Reader(&arguments.0));
    assert!(answered.len() >= 28 && answered.len().is_multiple_of(4));
}
