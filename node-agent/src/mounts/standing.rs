//! PURE. How mounts stand, each by itself and all together, in the words that their job or node has as its error.

use super::{FAILED, Phase, Status, UNAVAILABLE};
use crate::launch::{How, Mount};
use crate::status::FailureRecord;

/// How a mount stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Coming,
    Up,
    /// It was up.
    Down(String),
    /// It is to go, and not all that was written is written back.
    Unwritten(String),
    Failed(String),
}

/// All of them together. `phase`: how far they were until now.
pub fn all(mounts: &[Mount], states: &[State], phase: Phase) -> Status {
    let mut failure = None;
    let mut up = true;
    for (mount, state) in mounts.iter().zip(states) {
        let path = &mount.path;
        match state {
            State::Coming => {
                up = false;
                // They were all up once.
                if phase == Phase::Ready {
                    failure.get_or_insert_with(being_mounted);
                }
            }
            State::Up => {}
            State::Failed(why) => {
                let message = format!("{path} cannot be mounted: {}: {why}", named(mount));
                return Status {
                    phase: Phase::Failed,
                    failure: Some(record(failed_code(mount), mount, why, message)),
                    ..Status::default()
                };
            }
            State::Down(why) => {
                let message = format!("what is mounted at {path} does not answer: {why}");
                failure.get_or_insert(record(UNAVAILABLE, mount, why, message));
            }
            State::Unwritten(why) => {
                let message = format!("what was written to {path} is lost in part: {why}");
                failure.get_or_insert(record(UNAVAILABLE, mount, why, message));
            }
        }
    }
    Status {
        phase: if up { Phase::Ready } else { phase },
        failure,
        ..Status::default()
    }
}

fn record(code: &str, mount: &Mount, why: &str, message: String) -> FailureRecord {
    FailureRecord {
        code: code.to_owned(),
        message,
        details: vec![
            ("path".to_owned(), mount.path.clone()),
            ("error".to_owned(), why.to_owned()),
        ],
        ..FailureRecord::default()
    }
}

/// What was mounted once is to be again, and is not yet.
pub fn being_mounted() -> FailureRecord {
    FailureRecord {
        code: UNAVAILABLE.to_owned(),
        message: "what is mounted for the cluster is gone, and is being mounted again".to_owned(),
        ..FailureRecord::default()
    }
}

/// What is mounted, as people call it.
pub fn named(mount: &Mount) -> String {
    if !mount.what.is_empty() {
        return mount.what.clone();
    }
    match &mount.how {
        How::Command(line) => format!("{line:?}"),
        How::Nfs {
            address,
            port,
            directory,
            ..
        } => format!("NFS from {address}:{port}, {directory}"),
        How::Local {
            shared, directory, ..
        } => match directory.as_str() {
            "" => shared.clone(),
            directory => format!("the directory {directory:?} of {shared}"),
        },
        How::Remote(remote) => remote.named(),
    }
}

fn failed_code(mount: &Mount) -> &str {
    match mount.code.as_str() {
        "" => FAILED,
        code => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_missing_is_said_of_all() {
        let mount = |path: &str| Mount {
            path: path.into(),
            how: How::Command("c".into()),
            code: String::new(),
            what: String::new(),
            wait_s: 0,
        };
        let mounts = [mount("/a"), mount("/b")];
        let said = |states: [State; 2], phase: Phase| {
            let status = all(&mounts, &states, phase);
            let failure = status.failure.map(|it| (it.code, it.message));
            (status.phase, failure.unwrap_or_default())
        };
        let none = (String::new(), String::new());
        let (up, coming) = (|| State::Up, || State::Coming);
        assert_eq!(
            said([up(), coming()], Phase::Mounting),
            (Phase::Mounting, none.clone())
        );
        assert_eq!(said([up(), up()], Phase::Mounting), (Phase::Ready, none));
        // What was ready once stays so, and says what is the matter.
        let (phase, (code, message)) = said([up(), coming()], Phase::Ready);
        assert_eq!((phase, code.as_str()), (Phase::Ready, UNAVAILABLE));
        assert!(message.contains("mounted again"), "{message}");
        let down = || State::Down("why".into());
        let (phase, (code, message)) = said([up(), down()], Phase::Ready);
        assert_eq!((phase, code.as_str()), (Phase::Ready, UNAVAILABLE));
        assert!(message.contains("/b does not answer: why"), "{message}");
        let failed = || State::Failed("why".into());
        let (phase, (code, message)) = said([down(), failed()], Phase::Mounting);
        assert_eq!((phase, code.as_str()), (Phase::Failed, FAILED));
        assert!(message.contains("/b cannot be mounted"), "{message}");
    }
}
