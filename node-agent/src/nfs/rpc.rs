//! PURE. Calls and answers of ONC RPC (RFC 5531) with the credentials of AUTH_SYS: who calls what, and how a call is refused that
//! reaches no procedure.

use super::xdr::{Garbage, Reader, Writer};

pub const NFS: u32 = 100_003;
pub const MOUNT: u32 = 100_005;
/// Of both.
pub const VERSION: u32 = 3;
pub const AUTH_SYS: u32 = 1;

const CALL: u32 = 0;
const REPLY: u32 = 1;
const RPC_VERSION: u32 = 2;
const CREDENTIALS_MAX: usize = 400;
const MACHINE_NAME_MAX: usize = 255;
pub const GROUPS_MAX: usize = 16;

/// Whom a client says that a call is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// The head of a call. Its arguments come after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub xid: u32,
    pub program: u32,
    pub version: u32,
    pub procedure: u32,
    /// None where the client did not say.
    pub caller: Option<Caller>,
}

/// Why a call reaches no procedure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    RpcVersion,
    /// Credentials that are not as AUTH_SYS says.
    Credentials,
    /// Credentials of a kind that is not known here.
    Flavor,
    Program,
    Version,
    Procedure,
    Garbage,
}

/// Reads a head. An error without a number is no call at all: there is nobody to answer.
pub fn head(reader: &mut Reader) -> Result<Head, (Option<u32>, Refused)> {
    let none = |_: Garbage| (None, Refused::Garbage);
    let xid = reader.u32().map_err(none)?;
    if reader.u32().map_err(none)? != CALL {
        return Err((None, Refused::Garbage));
    }
    let refused = |refused| (Some(xid), refused);
    let garbage = |_: Garbage| refused(Refused::Garbage);
    if reader.u32().map_err(garbage)? != RPC_VERSION {
        return Err(refused(Refused::RpcVersion));
    }
    let program = reader.u32().map_err(garbage)?;
    let version = reader.u32().map_err(garbage)?;
    let procedure = reader.u32().map_err(garbage)?;
    let bad = |_: Garbage| refused(Refused::Credentials);
    let flavor = reader.u32().map_err(bad)?;
    let credentials = reader.bytes(CREDENTIALS_MAX).map_err(bad)?;
    let caller = match flavor {
        0 => None,
        AUTH_SYS => Some(auth_sys(Reader(credentials)).map_err(bad)?),
        _ => return Err(refused(Refused::Flavor)),
    };
    // The verifier of AUTH_SYS says nothing.
    reader.u32().map_err(bad)?;
    reader.bytes(CREDENTIALS_MAX).map_err(bad)?;
    Ok(Head {
        xid,
        program,
        version,
        procedure,
        caller,
    })
}

fn auth_sys(mut reader: Reader) -> Result<Caller, Garbage> {
    reader.u32()?;
    reader.bytes(MACHINE_NAME_MAX)?;
    let (uid, gid, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
    if count as usize > GROUPS_MAX {
        return Err(Garbage);
    }
    let groups = (0..count).map(|_| reader.u32());
    let groups = groups.collect::<Result<_, _>>()?;
    reader.end()?;
    // The number that stands for none is nobody's.
    if [uid, gid].contains(&u32::MAX) {
        return Err(Garbage);
    }
    Ok(Caller { uid, gid, groups })
}

/// What is before an answer on its way: its length, which is filled in by `whole`.
const MARK: usize = 4;
const LAST: u32 = 1 << 31;

/// The beginning of an answer: what the procedure says comes after it.
pub fn accepted(xid: u32) -> Writer {
    let mut writer = Writer(vec![0; MARK]);
    // Accepted, an empty verifier, success.
    writer.u32(xid).u32(REPLY).u32(0).u32(0).u32(0).u32(0);
    writer
}

/// The answer to a call that reaches no procedure.
pub fn refusal(xid: u32, refused: Refused) -> Vec<u8> {
    let mut writer = Writer(vec![0; MARK]);
    writer.u32(xid).u32(REPLY);
    let denied = |writer: &mut Writer, why: &[u32]| {
        writer.u32(1);
        why.iter().for_each(|n| {
            writer.u32(*n);
        });
    };
    let failed = |writer: &mut Writer, why: &[u32]| {
        writer.u32(0).u32(0).u32(0);
        why.iter().for_each(|n| {
            writer.u32(*n);
        });
    };
    match refused {
        Refused::RpcVersion => denied(&mut writer, &[0, RPC_VERSION, RPC_VERSION]),
        Refused::Credentials => denied(&mut writer, &[1, 1]),
        Refused::Flavor => denied(&mut writer, &[1, 5]),
        Refused::Program => failed(&mut writer, &[1]),
        Refused::Version => failed(&mut writer, &[2, VERSION, VERSION]),
        Refused::Procedure => failed(&mut writer, &[3]),
        Refused::Garbage => failed(&mut writer, &[4]),
    }
    writer.0
}

/// An answer as it travels: one record of one piece.
pub fn whole(mut answer: Vec<u8>) -> Vec<u8> {
    let length = (answer.len() - MARK) as u32 | LAST;
    answer[..MARK].copy_from_slice(&length.to_be_bytes());
    answer
}

/// How long a piece of a record is, and whether it is the last.
pub fn piece(mark: [u8; MARK]) -> (usize, bool) {
    let mark = u32::from_be_bytes(mark);
    ((mark & !LAST) as usize, mark & LAST != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(groups: u32) -> Vec<u8> {
        let mut credentials = Writer::default();
        credentials.u32(7).bytes(b"host").u32(1000).u32(1001);
        credentials.u32(groups);
        (0..groups).for_each(|n| {
            credentials.u32(n);
        });
        let mut writer = Writer::default();
        writer.u32(9).u32(CALL).u32(2).u32(NFS).u32(3).u32(1);
        writer.u32(AUTH_SYS).bytes(&credentials.0).u32(0).bytes(&[]);
        writer.u32(77);
        writer.0
    }

    #[test]
    fn a_head_tells_who_calls_what() {
        let bytes = call(2);
        let mut reader = Reader(&bytes);
        let head = head(&mut reader).unwrap();
        assert_eq!((head.xid, head.program, head.procedure), (9, NFS, 1));
        let caller = Caller {
            uid: 1000,
            gid: 1001,
            groups: vec![0, 1],
        };
        assert_eq!(head.caller, Some(caller));
        assert_eq!(reader.u32(), Ok(77), "the arguments are left");
    }

    #[test]
    fn what_is_wrong_is_told_where_there_is_somebody_to_tell() {
        let bad = head(&mut Reader(&call(17))).unwrap_err();
        assert_eq!(bad, (Some(9), Refused::Credentials));
        assert_eq!(head(&mut Reader(&[1, 2])).unwrap_err().0, None);
        let mut bytes = call(0);
        bytes[11] = 3;
        let old = head(&mut Reader(&bytes)).unwrap_err();
        assert_eq!(old, (Some(9), Refused::RpcVersion));
        let mut bytes = call(0);
        bytes[27] = 6;
        let gss = head(&mut Reader(&bytes)).unwrap_err();
        assert_eq!(gss, (Some(9), Refused::Flavor));
    }
}
