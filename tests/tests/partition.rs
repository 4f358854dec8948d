//! Three coordinators on three machines, which are network namespaces, and a network between them that breaks: a replica is cut off,
//! hears and is not heard, and comes back.
//!
//! What a majority has accepted meanwhile, nobody may read as if it were not so.

use std::process::Stdio;
use std::time::{Duration, Instant};

use batchai_tests::network::Network;
use batchai_tests::process::until;
use batchai_tests::replicas::Replicas;

/// Nobody is answered where there is no majority; who asks there gives up after so long.
const GIVEN_UP: Duration = Duration::from_secs(3);

/// The network and what runs in it; the processes end first.
struct World {
    e: Replicas,
    network: Network,
}

impl World {
    /// None where it cannot be: then the test was told so.
    fn new(test: &str) -> Option<World> {
        let network = Network::new(test, 3)?;
        let e = network.replicas(&[]);
        e.ok_at(e.endpoint(1), &["group", "create", "-n", "before"]);
        Some(World { e, network })
    }

    fn others(&self, id: u64) -> [u64; 2] {
        let others: Vec<_> = (1..=3).filter(|other| *other != id).collect();
        [others[0], others[1]]
    }

    /// Asks some replicas, from where one of them is, until it is answered or there is no more time: what it printed, if that went
    /// well.
    fn ask(&self, from: u64, of: &[u64], args: &[&str], time: Duration) -> Option<String> {
        let list: Vec<_> = of.iter().map(|id| self.e.endpoint(*id)).collect();
        let mut command = self.e.command_from(from, &list.join(","), args);
        let out = tempfile::tempfile().unwrap();
        let command = command
            .stdout(out.try_clone().unwrap())
            .stderr(Stdio::null());
        let (mut child, begun) = (command.spawn().unwrap(), Instant::now());
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if begun.elapsed() > time {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let printed = || {
            let mut out = out;
            std::io::Seek::rewind(&mut out).unwrap();
            std::io::read_to_string(out).unwrap()
        };
        status.filter(|status| status.success()).map(|_| printed())
    }

    fn create(&self, from: u64, of: &[u64], name: &str, time: Duration) -> bool {
        let create = ["group", "create", "-n", name];
        self.ask(from, of, &create, time).is_some()
    }

    /// What a replica answers to who asks it alone, from where it is.
    fn groups(&self, at: u64, time: Duration) -> Option<String> {
        self.ask(at, &[at], &["group", "list", "-o", "tsv"], time)
    }

    /// One that is cut off answers nothing and takes nothing.
    fn answers_nothing(&self, lost: u64) {
        let name = format!("by-{lost}");
        std::thread::scope(|scope| {
            let write = scope.spawn(|| self.create(lost, &[lost], &name, GIVEN_UP));
            let read = self.groups(lost, GIVEN_UP);
            assert_eq!(read, None, "replica {lost} cannot know, and answers");
            let taken = write.join().unwrap();
            assert!(!taken, "replica {lost} has no majority, and accepts");
        });
    }

    /// The other two have a leader and go on; the times that this took.
    fn go_on(&self, lost: u64, name: &str) -> (Duration, Duration) {
        let (others, begun) = (self.others(lost), Instant::now());
        let lost = lost.to_string();
        until("the others to have a leader", || {
            let led = |id: u64| self.e.status_of(id)["leaderId"].clone();
            let agreed = others.map(led);
            let known = agreed[0] == agreed[1] && agreed[0].is_string();
            (known && agreed[0].as_str() != Some(&lost)).then_some(())
        });
        let elected = begun.elapsed();
        let patience = Duration::from_secs(60);
        assert!(self.create(others[0], &others, name, patience), "{name}");
        (elected, begun.elapsed())
    }

    fn all_have(&self, names: &[&str], not: &str) {
        let begun = Instant::now();
        for id in 1..=3 {
            until("a replica to have what all have", || {
                let read = self.groups(id, Duration::from_secs(5))?;
                assert!(!read.contains(not), "{not} was never accepted: {read}");
                names.iter().all(|name| read.contains(name)).then_some(())
            });
        }
        let leader = self.e.leader();
        let applied = |id| self.e.status_of(id)["revision"].clone();
        until("the replicas to be equally far", || {
            let revision = applied(leader);
            (1..=3).all(|id| applied(id) == revision).then_some(())
        });
        eprintln!("all agreed again after {:?}", begun.elapsed());
    }
}

#[test]
fn a_leader_that_is_cut_off_accepts_nothing_and_answers_nothing_stale() {
    let Some(world) = World::new("cut") else {
        return;
    };
    let lost = world.e.leader();
    world.network.plug(lost, "down");
    let (elected, took) = world.go_on(lost, "meanwhile");
    eprintln!(
        "replica {lost} led and was cut off; the others had a leader after {elected:?} and accepted after {took:?}"
    );
    world.answers_nothing(lost);
    world.network.plug(lost, "up");
    world.all_have(&["before", "meanwhile"], &format!("by-{lost}"));
}

#[test]
fn a_follower_that_is_cut_off_holds_up_nobody_and_answers_nothing_stale() {
    let Some(world) = World::new("follower") else {
        return;
    };
    let leader = world.e.leader();
    let lost = world.others(leader)[1];
    world.network.lose(lost, true);
    let (elected, took) = world.go_on(lost, "meanwhile");
    eprintln!(
        "replica {lost} followed and was cut off; the others had a leader after {elected:?} and accepted after {took:?}"
    );
    world.answers_nothing(lost);
    world.network.lose(lost, false);
    world.all_have(&["before", "meanwhile"], &format!("by-{lost}"));
}

#[test]
fn a_leader_that_hears_and_is_not_heard_gives_way() {
    let Some(world) = World::new("mute") else {
        return;
    };
    let lost = world.e.leader();
    world.network.mute(lost, true);
    let (elected, took) = world.go_on(lost, "meanwhile");
    eprintln!(
        "replica {lost} led and was not heard; the others had a leader after {elected:?} and accepted after {took:?}"
    );
    world.answers_nothing(lost);
    world.network.mute(lost, false);
    world.all_have(&["before", "meanwhile"], &format!("by-{lost}"));
}
