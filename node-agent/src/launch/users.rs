//! PURE. Whom jobs run as, and what they may take.

use std::str::FromStr;

use batchai_proto::agent::v1::Assignment;
use serde::{Deserialize, Serialize};

use super::LaunchError;

/// Whom processes run as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobUser {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// Whom the jobs of a node run as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum JobUsers {
    /// The agent's own user.
    #[default]
    Own,
    /// All of them as one.
    One(JobUser),
    /// Those of each workspace as a user of its own: this number and the workspace's, which is the same on all nodes.
    PerWorkspace(u32),
}

/// The kernel takes larger numbers; programs that read them as signed ones do not.
const UID_MAX: u32 = i32::MAX as u32;

impl JobUsers {
    /// Whom the work of an assignment runs as; none for the agent's own user.
    pub fn of(&self, assignment: &Assignment) -> Result<Option<JobUser>, LaunchError> {
        match self {
            // The set-up of a node is the agent's own work.
            _ if assignment.set_up => Ok(None),
            JobUsers::Own => Ok(None),
            JobUsers::One(user) => Ok(Some(user.clone())),
            JobUsers::PerWorkspace(base) => {
                let number = u32::try_from(assignment.workspace_number).ok();
                let uid = number.filter(|n| *n > 0).and_then(|n| base.checked_add(n));
                let uid = uid.filter(|uid| *uid <= UID_MAX);
                let uid = uid.ok_or(LaunchError::NoUser {
                    number: assignment.workspace_number,
                })?;
                Ok(Some(JobUser {
                    name: uid.to_string(),
                    uid,
                    gid: uid,
                    groups: vec![uid],
                    // Where the job begins: it has no other home.
                    home: String::new(),
                }))
            }
        }
    }
}

/// What a process may take of something, at most; none where there is no bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLimit {
    pub of: Limited,
    pub most: Option<u64>,
}

/// What can be bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limited {
    /// Bytes of a core file.
    Core,
    /// Bytes that stay in memory: RDMA needs much of that.
    Memlock,
    /// Open files.
    Nofile,
    /// Processes of the user.
    Nproc,
    /// Bytes of a stack.
    Stack,
}

impl FromStr for JobLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<JobLimit, String> {
        let usage = || "give NAME=NUMBER or NAME=unlimited; names are core, memlock, nofile, nproc and stack";
        let (name, most) = text.split_once('=').ok_or_else(usage)?;
        let of = match name {
            "core" => Limited::Core,
            "memlock" => Limited::Memlock,
            "nofile" => Limited::Nofile,
            "nproc" => Limited::Nproc,
            "stack" => Limited::Stack,
            _ => return Err(usage().to_owned()),
        };
        let most = match most {
            "unlimited" => None,
            number => Some(number.parse().map_err(|_| usage())?),
        };
        Ok(JobLimit { of, most })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_has_the_same_user_on_all_nodes_and_no_other_has_it() {
        let uid = |base: u32, number: i64| {
            let assignment = Assignment {
                workspace_number: number,
                ..Default::default()
            };
            JobUsers::PerWorkspace(base)
                .of(&assignment)
                .map(|user| user.unwrap().uid)
        };
        assert_eq!(uid(200_000, 1), Ok(200_001));
        assert_eq!(uid(200_000, 7), Ok(200_007));
        for number in [0, -1, i64::MAX, i64::from(u32::MAX), i64::from(i32::MAX)] {
            assert_eq!(uid(200_000, number), Err(LaunchError::NoUser { number }));
        }
        let set_up = Assignment {
            set_up: true,
            ..Default::default()
        };
        assert_eq!(JobUsers::PerWorkspace(200_000).of(&set_up), Ok(None));
        assert_eq!(JobUsers::One(JobUser::default()).of(&set_up), Ok(None));
    }

    #[test]
    fn limits_are_read_as_they_are_typed() {
        let limit = |text: &str| JobLimit::from_str(text).ok();
        let memlock = JobLimit {
            of: Limited::Memlock,
            most: None,
        };
        assert_eq!(limit("memlock=unlimited"), Some(memlock));
        let nofile = JobLimit {
            of: Limited::Nofile,
            most: Some(4096),
        };
        assert_eq!(limit("nofile=4096"), Some(nofile));
        for text in [
            "",
            "nofile",
            "nofile=",
            "nofile=-1",
            "nofile=many",
            "cpu=3",
            "=3",
        ] {
            assert_eq!(limit(text), None, "{text}");
        }
    }
}
