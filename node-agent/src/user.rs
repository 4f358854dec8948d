//! Whom jobs run as.
//!
//! An agent that is root starts jobs as somebody else; one that is not can only start them as itself. What a process gives up
//! here it never gets back.

use std::ffi::CString;
use std::io;

use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, User, geteuid, getgrouplist, setfsgid, setfsuid, setgroups, setresgid, setresuid,
};

use crate::launch::{JobLimit, JobUser, JobUsers, Limited};

/// New files of jobs are readable by others, as those of people are.
const UMASK: Mode = Mode::S_IWGRP.union(Mode::S_IWOTH);
/// What `--job-user` calls the agent's own user.
const SELF: &str = "self";
/// What a number for all workspaces begins with.
const PER_WORKSPACE: &str = "per-workspace:";
/// Lower numbers are those of the system, of people, and of nobody.
const BASE_MIN: u32 = 65_536;

/// Why jobs cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error(
        "this agent is root, and jobs must not be without somebody saying so: make a user (useradd --system --create-home \
         batchai-job) and give --job-user batchai-job, alike on all nodes; --job-user self runs jobs as root"
    )]
    NotSaid,
    #[error("--job-user {text}: there is no such user")]
    Unknown { text: String },
    #[error(
        "--job-user {text}: give per-workspace:NUMBER with a number of at least {BASE_MIN}, above all users of this machine"
    )]
    Base { text: String },
    #[error(
        "--job-limit {name}: this agent may give at most {have}: raise its own limit (`Limit{}=` of its unit, or ulimit)",
        .name.to_uppercase()
    )]
    Limit { name: &'static str, have: u64 },
    #[error("--job-user {text}: only an agent that is root starts jobs as somebody else")]
    NotRoot { text: String },
    #[error("--job-user {text}: {source}")]
    System { text: String, source: nix::Error },
}

/// Finds whom jobs run as.
pub fn resolve(given: Option<&str>) -> Result<JobUsers, UserError> {
    let is_root = geteuid().is_root();
    let text = match given {
        None if is_root => return Err(UserError::NotSaid),
        None | Some(SELF) => {
            tracing::warn!(
                uid = geteuid().as_raw(),
                "jobs run as the agent's own user: they can read what it can, its credentials included"
            );
            return Ok(JobUsers::Own);
        }
        Some(text) => text,
    };
    let users = match text.strip_prefix(PER_WORKSPACE) {
        Some(base) => {
            let base = base.parse().ok().filter(|base| *base >= BASE_MIN);
            let base = base.ok_or_else(|| UserError::Base {
                text: text.to_owned(),
            })?;
            JobUsers::PerWorkspace(base)
        }
        None => JobUsers::One(find(text)?),
    };
    match (is_root, &users) {
        (_, JobUsers::One(user)) if user.uid == geteuid().as_raw() => Ok(JobUsers::Own),
        (true, _) => Ok(users),
        (false, _) => Err(UserError::NotRoot {
            text: text.to_owned(),
        }),
    }
}

fn find(text: &str) -> Result<JobUser, UserError> {
    let failed = |source| UserError::System {
        text: text.to_owned(),
        source,
    };
    let unknown = || UserError::Unknown {
        text: text.to_owned(),
    };
    if let Some((uid, gid)) = text.split_once(':') {
        let (uid, gid) = (uid.parse().ok(), gid.parse().ok());
        let (uid, gid) = uid.zip(gid).ok_or_else(unknown)?;
        return Ok(JobUser {
            name: format!("{uid}"),
            uid,
            gid,
            groups: vec![gid],
            home: "/".to_owned(),
        });
    }
    let user = User::from_name(text).map_err(failed)?.ok_or_else(unknown)?;
    let name = CString::new(text).map_err(|_| unknown())?;
    let groups = getgrouplist(&name, user.gid).map_err(failed)?;
    Ok(JobUser {
        name: text.to_owned(),
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        groups: groups.into_iter().map(Gid::as_raw).collect(),
        home: user.dir.to_string_lossy().into_owned(),
    })
}

/// Sees to it that this process, and so the shims that it starts, can give what jobs shall have.
pub fn check_limits(limits: &[JobLimit]) -> Result<(), UserError> {
    for limit in limits {
        let (resource, name) = kernels(limit.of);
        let most = limit.most.unwrap_or(RLIM_INFINITY);
        let failed = |source| UserError::System {
            text: name.to_owned(),
            source,
        };
        let (soft, have) = getrlimit(resource).map_err(failed)?;
        if most > have && setrlimit(resource, soft, most).is_err() {
            return Err(UserError::Limit { name, have });
        }
    }
    Ok(())
}

/// What the kernel calls it, and what people do.
fn kernels(limited: Limited) -> (Resource, &'static str) {
    match limited {
        Limited::Core => (Resource::RLIMIT_CORE, "core"),
        Limited::Memlock => (Resource::RLIMIT_MEMLOCK, "memlock"),
        Limited::Nofile => (Resource::RLIMIT_NOFILE, "nofile"),
        Limited::Nproc => (Resource::RLIMIT_NPROC, "nproc"),
        Limited::Stack => (Resource::RLIMIT_STACK, "stack"),
    }
}

/// Bounds what this process may take, for good. It allocates nothing: it may run between fork and exec.
pub fn take_limit(limit: &JobLimit) -> io::Result<()> {
    let most = limit.most.unwrap_or(RLIM_INFINITY);
    Ok(setrlimit(kernels(limit.of).0, most, most)?)
}

/// Makes this process somebody's, for good. It allocates nothing: it may run between fork and exec.
pub fn become_user(user: &Identity) -> io::Result<()> {
    let Identity { uid, gid, groups } = user;
    setgroups(groups)?;
    setresgid(*gid, *gid, *gid)?;
    setresuid(*uid, *uid, *uid)?;
    Ok(())
}

/// What every process of a job gives up: nothing that it starts has more rights than it has, unless it may gain some.
pub fn give_up_privileges(may_gain: bool) -> io::Result<()> {
    umask(UMASK);
    if !may_gain {
        prctl::set_no_new_privs()?;
    }
    Ok(())
}

/// A user in the kernel's terms.
pub struct Identity {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl From<&JobUser> for Identity {
    fn from(user: &JobUser) -> Identity {
        Identity {
            uid: Uid::from_raw(user.uid),
            gid: Gid::from_raw(user.gid),
            groups: user.groups.iter().copied().map(Gid::from_raw).collect(),
        }
    }
}

/// Has the groups of somebody, for good.
pub fn take_groups(user: &JobUser) -> io::Result<()> {
    Ok(setgroups(&Identity::from(user).groups)?)
}

/// Does something to files as somebody else, and is oneself again. For helpers of the shim: the kernel forgets with whom a
/// process dies when it becomes somebody else, so it is told again.
pub fn with_files_of<T>(user: Option<&JobUser>, work: impl FnOnce() -> T) -> T {
    let Some(user) = user else {
        return work();
    };
    let (gid, uid) = (
        setfsgid(Gid::from_raw(user.gid)),
        setfsuid(Uid::from_raw(user.uid)),
    );
    let die_with_shim = || {
        if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
            tracing::warn!(%error, "a helper may outlive its shim");
        }
    };
    die_with_shim();
    let done = work();
    setfsuid(uid);
    setfsgid(gid);
    die_with_shim();
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let root = find("root").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
        let number = find("4242:4343").unwrap();
        assert_eq!((number.uid, number.gid), (4242, 4343));
        for text in ["no-such-user", "1:", ":1", "-1:1", "a:b", ""] {
            assert!(
                matches!(find(text), Err(UserError::Unknown { .. })),
                "{text}"
            );
        }
        assert_eq!(resolve(Some(SELF)).unwrap(), JobUsers::Own);
        for text in ["per-workspace:", "per-workspace:65535", "per-workspace:x"] {
            assert!(matches!(resolve(Some(text)), Err(UserError::Base { .. })));
        }
    }
}
