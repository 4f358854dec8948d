//! Who a call is for, and doing what it asks with that one's rights: what may be done is the kernel's own decision, and what is made belongs
//! to the caller.
//!
//! A thread takes the caller's place in file systems and no more: nobody else can signal it or look into it for that. Root of a client is
//! nobody in particular here.

use std::io;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::rpc::Caller;
use super::sys;

/// Whom root of a client, and who says nothing, is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Squash {
    pub uid: u32,
    pub gid: u32,
    /// So is everybody else.
    pub all: bool,
}

/// Whose rights a call has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// What the client calls user and group.
    called: (u32, u32),
}

impl Identity {
    /// Root, its group, and whoever says nothing are squashed.
    pub fn of(caller: Option<Caller>, squash: Squash) -> Identity {
        let Some(caller) = caller.filter(|_| !squash.all) else {
            return Identity {
                uid: squash.uid,
                gid: squash.gid,
                groups: Vec::new(),
                called: (squash.uid, squash.gid),
            };
        };
        let or = |id: u32, other: u32| if id == 0 { other } else { id };
        let mut groups = caller.groups;
        groups.retain(|group| ![0, u32::MAX].contains(group));
        Identity {
            uid: or(caller.uid, squash.uid),
            gid: or(caller.gid, squash.gid),
            groups,
            called: (caller.uid, caller.gid),
        }
    }

    /// Whether a user is the caller, as it is called here or by the client.
    pub fn is_user(&self, uid: u32) -> bool {
        uid == self.uid || uid == self.called.0
    }

    /// Whether a group is the caller's own.
    pub fn is_group(&self, gid: u32) -> bool {
        gid == self.gid || gid == self.called.1
    }

    /// Does something with the caller's rights, on this thread.
    pub fn act<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        // Dropped however the work ends.
        let _own = Own;
        sys::set_thread_groups(&self.groups)?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // The call does not say whether it did it, but who it was before.
        setfsgid(gid);
        setfsuid(uid);
        if setfsgid(gid) != gid || setfsuid(uid) != uid {
            return Err(io::Error::other(
                "the kernel does not let this thread take the caller's place",
            ));
        }
        Ok(work())
    }
}

/// Gives the thread its own rights again.
struct Own;

impl Drop for Own {
    fn drop(&mut self) {
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        setfsuid(uid);
        setfsgid(gid);
        let back = setfsuid(uid) == uid && setfsgid(gid) == gid;
        if !back || sys::set_thread_groups(&[]).is_err() {
            // The next call on this thread would have another one's rights.
            tracing::error!("a thread cannot have its own rights again");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    const SQUASH: Squash = Squash {
        uid: 65534,
        gid: 65533,
        all: false,
    };

    fn caller(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        let groups = groups.to_vec();
        Identity::of(Some(Caller { uid, gid, groups }), SQUASH)
    }

    #[test]
    fn root_is_nobody() {
        let root = caller(0, 0, &[0, 5, 0]);
        assert_eq!((root.uid, root.gid), (65534, 65533));
        assert_eq!(root.groups, [5]);
        assert_eq!(Identity::of(None, SQUASH).uid, 65534);
        assert_eq!(caller(7, 0, &[]).gid, 65533);
        assert!(root.is_user(0) && root.is_user(65534) && root.is_group(0));
        assert!(!caller(7, 8, &[]).is_user(0) && !caller(7, 8, &[9]).is_group(9));
        assert_eq!(caller(7, 8, &[9]).uid, 7);
    }

    #[test]
    fn where_all_belongs_to_one_user_everybody_is_that_one() {
        let squash = Squash {
            uid: 1000,
            gid: 1001,
            all: true,
        };
        for uid in [0, 7, 1000] {
            let groups = vec![5];
            let who = Identity::of(
                Some(Caller {
                    uid,
                    gid: 8,
                    groups,
                }),
                squash,
            );
            assert_eq!((who.uid, who.gid, who.groups.len()), (1000, 1001, 0));
        }
    }

    #[test]
    fn a_thread_has_the_callers_rights_and_its_own_again() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: only root takes another one's place");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2777)).unwrap();
        let (own, theirs) = (dir.path().join("own"), dir.path().join("theirs"));
        fs::write(&own, "x").unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o640)).unwrap();
        nix::unistd::chown(&own, None, Some(Gid::from_raw(4321))).unwrap();
        let refused = caller(1234, 1235, &[]).act(|| fs::read(&own)).unwrap();
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let by_group = caller(1234, 1235, &[4321]).act(|| fs::read(&own)).unwrap();
        assert_eq!(by_group.unwrap(), b"x");
        let made = caller(1234, 1235, &[]).act(|| fs::write(&theirs, "y"));
        made.unwrap().unwrap();
        assert_eq!(fs::metadata(&theirs).unwrap().uid(), 1234);
        // A panic gives the rights back as well.
        let panicked = std::panic::catch_unwind(|| {
            let _ = caller(1234, 1235, &[]).act(|| panic!("as it is tried"));
        });
        panicked.unwrap_err();
        assert_eq!(fs::read(&own).unwrap(), b"x");
    }
}
