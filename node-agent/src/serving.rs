//! PURE. What is to be done about the file servers of a node, from what is wanted and what its journal and its disk show.
//!
//! Level, not edge, as in `reconcile`. Nothing is served, made or taken away here.

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};

use batchai_common::fault;
use batchai_common::names::last_id;
use batchai_proto::agent::v1::{FileServerPlace, FileServerReport, ServedFileServer};
use batchai_proto::v1::{NameValuePair, ResourceError};

/// The ports that they listen at: none that the kernel gives away, for each keeps its own over restarts.
pub const PORTS: Range<u16> = 19_000..20_000;

/// A file server as the journal and the disk show it.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Who may mount it, once it was written down how it is served.
    pub clients: Option<BTreeSet<String>>,
    /// What serves it is there, or was started just now.
    pub runs: bool,
    /// What lies on it is there.
    pub data: bool,
    /// What is being taken away is there, out of the way: at last an empty directory.
    pub rest: bool,
    /// It was written down that all of it was taken away.
    pub purged: bool,
}

/// What to do about one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Todo {
    /// As it is, it stays.
    #[default]
    Nothing,
    /// Have it served to these; where `make`, what it is to lie in is made first.
    Serve {
        clients: BTreeSet<String>,
        make: bool,
    },
    /// What lies on it, or is to be purged, is not there: it is missed, and never made anew.
    Miss,
    /// End what serves it.
    End,
    /// Take away all that lies on it.
    Purge,
    /// It is gone: say so.
    Gone,
    /// Nobody asks for it: remove what the journal has of it.
    Forget,
}

/// What to do about a file server. Where the list is one of a State that was restored, nothing is ended, for nobody knows what is wanted;
/// and who may mount it by what was known before goes on.
pub fn todo(wanted: Option<&ServedFileServer>, restored: bool, found: &Found) -> Todo {
    let restored = restored && !fault!("restored_server_ended");
    let Some(wanted) = wanted else {
        return match (restored, found.runs) {
            (true, _) => Todo::Nothing,
            (false, true) => Todo::End,
            (false, false) => Todo::Forget,
        };
    };
    match (wanted.ending, restored) {
        (true, true) => Todo::Nothing,
        (true, false) => end(wanted, found),
        (false, _) => serve(wanted, restored, found),
    }
}

fn end(wanted: &ServedFileServer, found: &Found) -> Todo {
    let made = wanted.existing || found.clients.is_some();
    match () {
        () if found.runs && !fault!("purged_while_served") => Todo::End,
        () if !wanted.purge => Todo::Gone,
        // Whatever was written down: it may have come there since.
        () if found.data || found.rest => Todo::Purge,
        () if found.purged => Todo::Gone,
        // That it is not seen says nothing: its disk may be away, also amid the purge.
        () if made && !fault!("purged_because_unseen") => Todo::Miss,
        () => Todo::Gone,
    }
}

fn serve(wanted: &ServedFileServer, restored: bool, found: &Found) -> Todo {
    let new = found.clients.is_none();
    if new && wanted.existing && !found.data && !fault!("missing_made_anew") {
        return Todo::Miss;
    }
    let mut clients: BTreeSet<_> = wanted.clients.iter().cloned().collect();
    if restored && !fault!("restored_server_cuts_off") {
        clients.extend(found.clients.iter().flatten().cloned());
    }
    Todo::Serve {
        clients,
        make: new && !(wanted.existing && found.data),
    }
}

/// A port for a new one, from the first on: no other file server's, no job's, and one that is free.
pub fn port(
    first: u16,
    others: &BTreeSet<u16>,
    jobs: &RangeInclusive<i32>,
    free: impl Fn(u16) -> bool,
) -> Option<u16> {
    let usable = |port: &u16| {
        (!others.contains(port) || fault!("port_of_another_server"))
            && !jobs.contains(&i32::from(*port))
            && free(*port)
    };
    (first..PORTS.end).chain(PORTS.start..first).find(usable)
}

/// What to say of one that is wanted, when so much was to be done about it: where it is served, and what is the matter.
pub fn report(
    wanted: &ServedFileServer,
    todo: &Todo,
    place: Option<FileServerPlace>,
    why: Option<&str>,
) -> FileServerReport {
    let gone = *todo == Todo::Gone;
    FileServerReport {
        uid: wanted.uid.clone(),
        place: place.filter(|_| !wanted.ending),
        failure: why.map(|why| failure(wanted, why)),
        gone,
        purged: gone && wanted.purge,
    }
}

fn failure(server: &ServedFileServer, why: &str) -> ResourceError {
    let name = last_id(&server.name);
    let code = match server.ending {
        true => "FileServerNotPurged",
        false => "FileServerNotServed",
    };
    ResourceError {
        code: code.to_owned(),
        message: format!("{name}: {why}"),
        details: vec![NameValuePair {
            name: "error".to_owned(),
            value: why.to_owned(),
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(ending: bool, purge: bool, existing: bool) -> ServedFileServer {
        ServedFileServer {
            clients: vec!["10.0.0.1".into()],
            ending,
            purge,
            existing,
            ..ServedFileServer::default()
        }
    }

    fn to(clients: &[&str], make: bool) -> Todo {
        Todo::Serve {
            clients: clients.iter().map(|c| (*c).to_owned()).collect(),
            make,
        }
    }

    /// One that is served to somebody else.
    fn served() -> Found {
        Found {
            clients: Some(["10.0.0.2".to_owned()].into()),
            runs: true,
            data: true,
            ..Found::default()
        }
    }

    #[test]
    fn what_was_never_there_is_made_and_what_was_is_missed() {
        let empty = Found::default();
        let make = todo(Some(&wanted(false, false, false)), false, &empty);
        assert_eq!(make, to(&["10.0.0.1"], true));
        let existing = wanted(false, false, true);
        for (data, expected) in [(false, Todo::Miss), (true, to(&["10.0.0.1"], false))] {
            let found = Found {
                data,
                ..Found::default()
            };
            assert_eq!(todo(Some(&existing), false, &found), expected);
        }
        // What is written down has been made: what serves it says what is wrong with it.
        let lost = Found {
            data: false,
            ..served()
        };
        let kept = todo(Some(&existing), false, &lost);
        assert_eq!(kept, to(&["10.0.0.1"], false));
    }

    #[test]
    fn a_state_that_was_restored_ends_nothing_and_cuts_nobody_off() {
        let both = to(&["10.0.0.1", "10.0.0.2"], false);
        let stays = wanted(false, false, true);
        assert_eq!(todo(Some(&stays), true, &served()), both);
        assert_eq!(
            todo(Some(&stays), false, &served()),
            to(&["10.0.0.1"], false)
        );
        let ending = wanted(true, true, true);
        assert_eq!(todo(Some(&ending), true, &served()), Todo::Nothing);
        assert_eq!(todo(None, true, &served()), Todo::Nothing);
        assert_eq!(todo(None, true, &Found::default()), Todo::Nothing);
    }

    #[test]
    fn nothing_is_taken_away_while_it_is_served_or_where_it_is_not_asked_for() {
        let ended = Found {
            runs: false,
            ..served()
        };
        let (keep, purge) = (wanted(true, false, true), wanted(true, true, true));
        assert_eq!(todo(Some(&keep), false, &served()), Todo::End);
        assert_eq!(todo(Some(&purge), false, &served()), Todo::End);
        assert_eq!(todo(Some(&keep), false, &ended), Todo::Gone);
        assert_eq!(todo(Some(&purge), false, &ended), Todo::Purge);
        assert_eq!(todo(None, false, &served()), Todo::End);
        assert_eq!(todo(None, false, &ended), Todo::Forget);
    }

    #[test]
    fn what_is_not_seen_is_purged_only_where_that_was_written_down() {
        let gone = Found {
            runs: false,
            data: false,
            ..served()
        };
        let half = Found {
            rest: true,
            ..gone.clone()
        };
        let purged = Found {
            purged: true,
            ..gone.clone()
        };
        // Whether it was served before, as the coordinator knows, or only made.
        for existing in [true, false] {
            let purge = wanted(true, true, existing);
            assert_eq!(todo(Some(&purge), false, &gone), Todo::Miss);
            assert_eq!(todo(Some(&purge), false, &half), Todo::Purge);
            assert_eq!(todo(Some(&purge), false, &purged), Todo::Gone);
            // What is there again is not what was purged.
            for (data, rest) in [(true, false), (false, true), (true, true)] {
                let again = Found {
                    data,
                    rest,
                    ..purged.clone()
                };
                assert_eq!(todo(Some(&purge), false, &again), Todo::Purge);
            }
        }
        let purge = wanted(true, true, false);
        let never = todo(Some(&purge), false, &Found::default());
        assert_eq!(never, Todo::Gone);
    }

    #[test]
    fn what_is_said_of_one_is_of_what_is_wanted_now() {
        let (keep, purge) = (wanted(true, false, true), wanted(true, true, true));
        let told = |wanted, todo: &Todo| {
            let told = report(wanted, todo, None, None);
            (told.gone, told.purged)
        };
        assert_eq!(told(&keep, &Todo::Gone), (true, false));
        assert_eq!(told(&purge, &Todo::Gone), (true, true));
        // It was gone already, and then its data was to go as well.
        assert_eq!(told(&purge, &Todo::Purge), (false, false));
        let place = FileServerPlace::default();
        let told = report(&keep, &Todo::End, Some(place.clone()), Some("busy"));
        assert_eq!(told.place, None);
        assert_eq!(told.failure.unwrap().code, "FileServerNotPurged");
        let stays = wanted(false, false, true);
        let told = report(&stays, &Todo::Nothing, Some(place.clone()), None);
        assert_eq!((told.place, told.failure), (Some(place), None));
    }

    #[test]
    fn a_port_is_nobody_elses() {
        let others = BTreeSet::from([19_999, 19_000]);
        let jobs = 19_001..=19_001;
        assert_eq!(port(19_999, &others, &jobs, |_| true), Some(19_002));
        assert_eq!(port(19_999, &others, &jobs, |p| p != 19_002), Some(19_003));
        assert_eq!(port(19_500, &others, &jobs, |_| false), None);
    }
}
