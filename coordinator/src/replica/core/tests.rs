use std::collections::BTreeMap;

use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{ChangeReplica, InitEnsemble, Replica, ReplicaIdentity};
use batchai_proto::v1;

use raft::eraftpb::HardState;

use super::members::BEHIND_MAX;
use super::*;
use crate::replica::store::FORMAT;
use crate::replica::store::memory::MemoryStore;

fn group(id: &str) -> Command {
    let name = format!("resourceGroups/{id}");
    let group = v1::ResourceGroup {
        name,
        ..Default::default()
    };
    Command {
        time: None,
        request: None,
        kind: Some(Kind::CreateResourceGroup(group)),
    }
}

fn init() -> Command {
    let init = InitEnsemble {
        ensemble: "e".into(),
        epoch: 1,
        replicas: Vec::new(),
    };
    Command {
        time: None,
        request: None,
        kind: Some(Kind::InitEnsemble(init)),
    }
}

fn start(store: &MemoryStore, id: u64, voters: &[u64]) -> Core<MemoryStore> {
    let identity = ReplicaIdentity {
        format: FORMAT,
        ensemble: "e".into(),
        replica_id: id,
        voters: voters.to_vec(),
        store: String::new(),
    };
    let policy = SnapshotPolicy {
        entries: 10,
        kept: 3,
        ..SnapshotPolicy::default()
    };
    Core::new(store.clone(), store.recover(identity), 7, policy).unwrap()
}

impl Core<MemoryStore> {
    fn all_ready(&mut self, send: &mut dyn FnMut(Vec<Message>)) -> Result<Output, CoreError> {
        let mut all = self.ready(send)?;
        while self.has_ready() {
            let more = self.ready(send)?;
            all.proposals.extend(more.proposals);
            all.reads.extend(more.reads);
            all.jumped = more.jumped.or(all.jumped);
            all.digests.extend(more.digests);
            all.revisions.extend(more.revisions);
        }
        Ok(all)
    }
}

/// Several replicas and the messages between them.
struct Net {
    cores: BTreeMap<u64, Core<MemoryStore>>,
    outputs: BTreeMap<u64, Output>,
    /// Who cannot be reached.
    cut: Vec<u64>,
}

impl Net {
    fn new(voters: &[u64]) -> Net {
        let cores = voters
            .iter()
            .map(|&id| (id, start(&MemoryStore::default(), id, voters)));
        Net {
            cores: cores.collect(),
            outputs: BTreeMap::new(),
            cut: Vec::new(),
        }
    }

    fn settle(&mut self) {
        self.try_settle().unwrap();
    }

    /// Until nothing moves, or somebody stops.
    fn try_settle(&mut self) -> Result<(), (u64, CoreError)> {
        loop {
            let (mut messages, mut named) = (Vec::new(), BTreeMap::new());
            let mut told = Vec::new();
            for (id, core) in &mut self.cores {
                let mut output = core
                    .all_ready(&mut |mut sent| messages.append(&mut sent))
                    .map_err(|error| (*id, error))?;
                let kept = self.outputs.entry(*id).or_default();
                kept.proposals.append(&mut output.proposals);
                kept.reads.append(&mut output.reads);
                kept.jumped = output.jumped.or(kept.jumped);
                told.extend(output.digests.into_iter().map(|told| (*id, told)));
                for message in messages.iter().filter(|m: &&Message| m.from == *id) {
                    if let Some(snapshot) = core.snapshot_of(message) {
                        named.insert(message.get_snapshot().get_metadata().index, snapshot);
                    }
                }
            }
            messages.retain(|m| !self.cut.contains(&m.to) && !self.cut.contains(&m.from));
            for (from, (to, index, digest)) in &told {
                self.cores.get_mut(to).unwrap().told(*from, *index, *digest);
            }
            if messages.is_empty() && told.is_empty() {
                return Ok(());
            }
            for message in messages {
                // A message for a core that has since moved on is refused, as on a real network.
                let core = self.cores.get_mut(&message.to).unwrap();
                if message.get_msg_type() != MessageType::MsgSnapshot {
                    let _ = core.step(message);
                    continue;
                }
                let index = message.get_snapshot().get_metadata().index;
                let (mark, state) = named[&index].clone();
                core.snapshots().write(&mark, &state).unwrap();
                core.step_snapshot(message, mark, state).unwrap();
            }
        }
    }

    fn elect(&mut self) -> u64 {
        for _ in 0..200 {
            self.settle();
            let leader = self
                .cores
                .iter()
                .find(|(id, c)| c.leads() && !self.cut.contains(id));
            if let Some((id, _)) = leader {
                return *id;
            }
            self.cores.values_mut().for_each(Core::tick);
        }
        panic!("no leader");
    }
}

#[test]
fn one_voter_leads_at_once_and_applies_what_it_is_told() {
    let store = MemoryStore::default();
    let mut core = start(&store, 1, &[1]);
    core.all_ready(&mut |_| {}).unwrap();
    assert!(core.leads());
    let refused = core.propose(&[(6, init()), (7, group("a")), (8, group("a"))]);
    assert!(refused.is_empty());
    let output = core.all_ready(&mut |_| {}).unwrap();
    assert!(matches!(output.proposals[1], (7, Proposed::Applied(Ok(2)))));
    assert!(matches!(
        output.proposals[2],
        (8, Proposed::Applied(Err(Rejection::Exists { .. })))
    ));
    assert!(core.read(9));
    assert_eq!(core.all_ready(&mut |_| {}).unwrap().reads, [9]);

    let mut again = start(&store, 1, &[1]);
    again.all_ready(&mut |_| {}).unwrap();
    assert_eq!(again.state(), core.state(), "a restart finds everything");
}

/// Writes the snapshot that is due, as another thread would.
fn take_snapshot(core: &mut Core<MemoryStore>) -> Option<u64> {
    let (mark, state) = core.snapshot_due(false)?;
    core.snapshots().write(&mark, &state).unwrap();
    core.compact(&mark, state).unwrap();
    Some(mark.index)
}

#[test]
fn a_replica_begins_from_its_snapshot_and_what_came_behind_it() {
    let store = MemoryStore::default();
    let mut core = start(&store, 1, &[1]);
    core.all_ready(&mut |_| {}).unwrap();
    core.propose(&[(0, init())]);
    let mut taken = Vec::new();
    for i in 1..40 {
        assert!(core.propose(&[(i, group(&i.to_string()))]).is_empty());
        core.all_ready(&mut |_| {}).unwrap();
        taken.extend(take_snapshot(&mut core));
    }
    assert_eq!(taken, [10, 20, 30, 40], "every ten entries");
    let recovered = store.recover(ReplicaIdentity::default());
    assert_eq!(recovered.begin.index, 37, "three are kept");
    let indexes: Vec<_> = recovered.entries.iter().map(|entry| entry.index).collect();
    assert_eq!(indexes, (38..=41).collect::<Vec<_>>());
    let (mark, state) = recovered.snapshot.unwrap();
    assert_eq!((mark.index, state.applied_index), (40, 40));

    let mut again = start(&store, 1, &[1]);
    again.all_ready(&mut |_| {}).unwrap();
    assert_eq!(again.state(), core.state());
    assert!(again.leads());
    again.propose(&[(1, group("more"))]);
    let output = again.all_ready(&mut |_| {}).unwrap();
    assert!(matches!(
        output.proposals[..],
        [(1, Proposed::Applied(Ok(_)))]
    ));
    // One that was written and not relied on yet is as if it were not there.
    let (mark, state) = (0..20)
        .find_map(|i| {
            again.propose(&[(i, group(&format!("again-{i}")))]);
            again.all_ready(&mut |_| {}).unwrap();
            again.snapshot_due(false)
        })
        .unwrap();
    again.snapshots().write(&mark, &state).unwrap();
    let mut third = start(&store, 1, &[1]);
    third.all_ready(&mut |_| {}).unwrap();
    assert_eq!(third.state(), again.state());
}

#[test]
fn three_voters_agree_and_a_cut_off_leader_does_not_pretend() {
    let mut net = Net::new(&[1, 2, 3]);
    let leader = net.elect();
    net.cores
        .get_mut(&leader)
        .unwrap()
        .propose(&[(1, init()), (2, group("a"))]);
    net.settle();
    // Followers learn what is committed with the next heartbeat.
    net.cores
        .values_mut()
        .for_each(|core| (0..HEARTBEAT_TICKS).for_each(|_| core.tick()));
    net.settle();
    let state = net.cores[&leader].state().clone();
    assert_eq!(state.revision, 2);
    assert!(net.cores.values().all(|core| core.state() == &state));

    let follower = *net.cores.keys().find(|id| **id != leader).unwrap();
    let refused = net
        .cores
        .get_mut(&follower)
        .unwrap()
        .propose(&[(3, group("b"))]);
    assert!(matches!(refused[..], [(3, Proposed::NotLeader)]));

    net.cut = vec![leader];
    net.cores
        .get_mut(&leader)
        .unwrap()
        .propose(&[(4, group("c"))]);
    assert!(net.cores.get_mut(&leader).unwrap().read(5));
    let other = net.elect();
    assert_ne!(other, leader);
    // The old leader notices that no quorum answers, and steps down.
    for _ in 0..2 * ELECTION_TICKS {
        net.cores.values_mut().for_each(Core::tick);
        net.settle();
    }
    let output = &net.outputs[&leader];
    assert!(
        output
            .proposals
            .iter()
            .any(|p| matches!(p, (4, Proposed::Unknown)))
    );
    assert!(
        !output.reads.contains(&5),
        "a leader without a quorum answers no read"
    );
}

#[test]
fn a_follower_that_is_far_behind_gets_a_snapshot() {
    let mut net = Net::new(&[1, 2, 3]);
    let leader = net.elect();
    let behind = *net.cores.keys().find(|id| **id != leader).unwrap();
    net.cut = vec![behind];
    net.cores.get_mut(&leader).unwrap().propose(&[(1, init())]);
    for i in 0..50 {
        let lead = net.cores.get_mut(&leader).unwrap();
        lead.propose(&[(i + 2, group(&i.to_string()))]);
        net.settle();
        take_snapshot(net.cores.get_mut(&leader).unwrap());
    }
    assert!(net.cores[&behind].state().ensemble.is_empty());
    net.cut.clear();
    for _ in 0..4 * ELECTION_TICKS {
        net.cores.values_mut().for_each(Core::tick);
        net.settle();
    }
    let (state, applied) = (
        net.cores[&leader].state().clone(),
        net.cores[&leader].raw.raft.raft_log.applied,
    );
    assert_eq!(net.cores[&behind].state(), &state);
    assert_eq!(net.cores[&behind].raw.raft.raft_log.applied, applied);
    let jumped = net.outputs[&behind].jumped;
    assert!(jumped.is_some_and(|revision| revision > 30), "{jumped:?}");
}

fn join(id: u64, role: Role) -> (Command, ChangeReplica) {
    let change = ChangeReplica {
        id,
        role: role as i32,
        endpoint: "https://a:1".into(),
    };
    let command = Command {
        time: None,
        request: None,
        kind: Some(Kind::ChangeReplica(change.clone())),
    };
    (command, change)
}

/// Found by reading: a replica that began alone and has grown to three must not lead by itself when it starts again.
#[test]
fn who_began_alone_does_not_lead_alone_after_others_joined() {
    let store = MemoryStore::default();
    let mut net = Net::new(&[1]);
    net.cores.insert(1, start(&store, 1, &[1]));
    net.elect();
    let refused = net.cores.get_mut(&1).unwrap().propose(&[(1, init())]);
    assert!(refused.is_empty());
    net.settle();
    for id in [2, 3] {
        net.cores
            .insert(id, start(&MemoryStore::default(), id, &[1]));
        for role in [Role::Learner, Role::Voter] {
            let (command, change) = join(id, role);
            let refused = net.cores.get_mut(&1).unwrap().change(9, &command, &change);
            assert!(refused.is_none(), "{refused:?}");
            // It answers the leader before it gets a vote.
            for _ in 0..5 {
                net.settle();
                net.cores.values_mut().for_each(Core::tick);
            }
            net.settle();
        }
    }
    assert_eq!(net.cores[&1].status().members.len(), 3);
    let mut alone = start(&store, 1, &[1]);
    alone.all_ready(&mut |_| {}).unwrap();
    for _ in 0..100 {
        alone.tick();
        alone.all_ready(&mut |_| {}).unwrap();
        assert!(!alone.leads(), "it knows that others vote");
    }
    assert_eq!(alone.state().replicas.len(), 2);
}

/// Found by the simulator: a removal was answered when its leader alone knew of it; that one was lost, and the others missed the
/// removed one for every majority.
#[test]
fn a_removal_is_answered_when_a_majority_knows_of_it() {
    let mut net = Net::new(&[1, 2, 3, 4]);
    let leader = net.elect();
    let mut init = init();
    let replica = |id| Replica {
        id,
        role: Role::Voter as i32,
        ..Replica::default()
    };
    if let Some(Kind::InitEnsemble(init)) = &mut init.kind {
        init.replicas = (1..=4).map(replica).collect();
    }
    let refused = net.cores.get_mut(&leader).unwrap().propose(&[(1, init)]);
    assert!(refused.is_empty());
    net.settle();
    let gone = if leader == 4 { 3 } else { 4 };
    let (command, mut change) = join(gone, Role::Removed);
    change.endpoint.clear();
    let core = net.cores.get_mut(&leader).unwrap();
    assert!(core.change(9, &command, &change).is_none());
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    core.all_ready(&mut |mut sent| asked.append(&mut sent))
        .unwrap();
    for message in asked {
        let follower = net.cores.get_mut(&message.to).unwrap();
        follower.step(message).unwrap();
        follower
            .all_ready(&mut |mut sent| answered.append(&mut sent))
            .unwrap();
    }
    let core = net.cores.get_mut(&leader).unwrap();
    for message in answered {
        core.step(message).unwrap();
    }
    // What it says to the others is lost.
    let output = core.all_ready(&mut |_| {}).unwrap();
    assert_eq!(core.state().replicas[&gone].role(), Role::Removed);
    assert!(output.proposals.is_empty(), "nobody else knows of it");
    for _ in 0..5 {
        net.cores.values_mut().for_each(Core::tick);
        net.settle();
    }
    let answers = &net.outputs[&leader].proposals;
    let answer = answers.iter().find(|(ticket, _)| *ticket == 9);
    assert!(matches!(answer, Some((_, Proposed::Applied(Ok(_))))));
}

#[test]
fn a_vote_is_given_only_where_a_majority_stays_in_contact() {
    let mut net = Net::new(&[1]);
    net.elect();
    assert!(
        net.cores
            .get_mut(&1)
            .unwrap()
            .propose(&[(1, init())])
            .is_empty()
    );
    net.settle();
    let (command, change) = join(2, Role::Learner);
    let core = net.cores.get_mut(&1).unwrap();
    assert!(core.change(2, &command, &change).is_none());
    core.all_ready(&mut |_| {}).unwrap();
    // Nobody ever heard of it.
    let (command, change) = join(2, Role::Voter);
    let refused = core.change(3, &command, &change);
    let Some((3, Proposed::Applied(Err(rejection)))) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        rejection.to_string().contains("not in contact"),
        "{rejection}"
    );
    core.all_ready(&mut |_| {}).unwrap();
    assert!(core.leads());
}

#[test]
fn no_vote_is_given_to_one_that_is_far_behind() {
    let mut net = Net::new(&[1]);
    net.elect();
    let core = net.cores.get_mut(&1).unwrap();
    assert!(core.propose(&[(1, init())]).is_empty());
    net.settle();
    net.cores.insert(2, start(&MemoryStore::default(), 2, &[1]));
    let ask = |net: &mut Net, role| {
        let (command, change) = join(2, role);
        net.cores.get_mut(&1).unwrap().change(9, &command, &change)
    };
    assert!(ask(&mut net, Role::Learner).is_none());
    for _ in 0..5 {
        net.settle();
        net.cores.values_mut().for_each(Core::tick);
    }
    net.settle();
    // It was heard of a moment ago, and has nothing of this.
    net.cut.push(2);
    for i in 0..=BEHIND_MAX {
        let more = (10 + i, group(&i.to_string()));
        assert!(net.cores.get_mut(&1).unwrap().propose(&[more]).is_empty());
        net.settle();
    }
    let refused = ask(&mut net, Role::Voter);
    let Some((9, Proposed::Applied(Err(rejection)))) = refused else {
        panic!("{refused:?}");
    };
    let why = rejection.to_string();
    assert!(why.contains("entries behind"), "{why}");
}

#[test]
fn a_change_that_the_state_rejects_changes_no_membership() {
    let mut core = start(&MemoryStore::default(), 1, &[1]);
    core.all_ready(&mut |_| {}).unwrap();
    core.propose(&[(1, init())]);
    core.all_ready(&mut |_| {}).unwrap();
    // It was never added: it cannot get a vote.
    let (command, change) = join(9, Role::Voter);
    assert!(core.change(2, &command, &change).is_none());
    let output = core.all_ready(&mut |_| {}).unwrap();
    assert!(
        matches!(output.proposals[..], [(2, Proposed::Applied(Err(_)))]),
        "{:?}",
        output.proposals
    );
    assert_eq!(core.status().members.len(), 1);
}

#[test]
fn what_comes_in_another_term_is_no_answer() {
    let mut core = start(&MemoryStore::default(), 1, &[1]);
    core.all_ready(&mut |_| {}).unwrap();
    // As if it had been proposed there under an earlier leadership.
    let (index, term) = (core.raw.raft.raft_log.last_index() + 1, core.term().0);
    core.proposed.insert(index, (term - 1, 5));
    core.raw.propose(vec![], init().encode_to_vec()).unwrap();
    let output = core.all_ready(&mut |_| {}).unwrap();
    assert_eq!(core.state().revision, 1, "it is applied");
    assert!(
        matches!(output.proposals[..], [(5, Proposed::NotLeader)]),
        "{:?}",
        output.proposals
    );
}

#[test]
fn a_leader_that_is_gone_is_not_waited_for() {
    let mut net = Net::new(&[1, 2, 3]);
    let leader = net.elect();
    net.cut.push(leader);
    let left: Vec<_> = (1..=3).filter(|id| *id != leader).collect();
    for id in &left {
        net.cores.get_mut(id).unwrap().gone(leader);
    }
    for _ in 0..GONE_TICKS {
        for id in &left {
            net.cores.get_mut(id).unwrap().tick();
        }
        net.settle();
    }
    // The first by id, and nobody stands against it.
    assert!(net.cores[&left[0]].leads());
    assert_eq!(net.cores[&left[1]].leader(), Some(left[0]));
    // Who hears it of one that does not lead goes on.
    let term = net.cores[&left[1]].term();
    net.cores.get_mut(&left[1]).unwrap().gone(leader);
    net.cores.get_mut(&left[0]).unwrap().gone(left[1]);
    assert_eq!(net.cores[&left[1]].leader(), Some(left[0]));
    assert_eq!(net.cores[&left[1]].term(), term);
    assert!(net.cores[&left[0]].leads());
}

fn compare() -> Command {
    Command {
        kind: Some(Kind::CompareStates(Default::default())),
        ..Command::default()
    }
}

/// Three that have something in them, and the one that leads.
fn three() -> (Net, u64) {
    let mut net = Net::new(&[1, 2, 3]);
    let leader = net.elect();
    let all = [(1, init()), (2, group("a")), (3, group("b"))];
    net.cores.get_mut(&leader).unwrap().propose(&all);
    net.settle();
    (net, leader)
}

fn damage(net: &mut Net, id: u64) {
    let core = net.cores.get_mut(&id).unwrap();
    core.state.submissions += id as i64;
}

#[test]
fn replicas_that_agree_say_so_and_the_one_that_does_not_stops() {
    let (mut net, leader) = three();
    net.cores
        .get_mut(&leader)
        .unwrap()
        .propose(&[(4, compare())]);
    net.settle();
    for core in net.cores.values_mut() {
        let comparison = core.state().comparison.clone();
        assert_eq!(comparison.decided, comparison.begun);
        assert!(comparison.digest.is_some());
        assert_eq!(core.digest(), Digest::of(core.state()));
    }
    for wrong in [leader % 3 + 1, leader] {
        let (mut net, leader) = match wrong == leader {
            true => three(),
            false => (std::mem::replace(&mut net, Net::new(&[])), leader),
        };
        let wrong = if wrong == leader { leader } else { wrong };
        damage(&mut net, wrong);
        net.cores
            .get_mut(&leader)
            .unwrap()
            .propose(&[(5, compare())]);
        let (stopped, error) = net.try_settle().unwrap_err();
        assert_eq!(stopped, wrong);
        assert!(matches!(error, CoreError::Differs { .. }), "{error}");
        // The others go on without it.
        net.cores.remove(&wrong);
        net.cut.push(wrong);
        let leader = net.elect();
        assert_ne!(leader, wrong);
        net.cores
            .get_mut(&leader)
            .unwrap()
            .propose(&[(6, group("c"))]);
        net.settle();
        assert_eq!(net.cores[&leader].state().resource_groups.len(), 3);
    }
}

#[test]
fn without_a_majority_for_any_state_nothing_is_written() {
    let (mut net, leader) = three();
    for id in 1..=3 {
        damage(&mut net, id);
    }
    let propose = |net: &mut Net, ticket, command| {
        net.cores
            .get_mut(&leader)
            .unwrap()
            .propose(&[(ticket, command)]);
        net.settle();
        let outputs = &mut net.outputs.get_mut(&leader).unwrap().proposals;
        let found = outputs.iter().position(|(of, _)| *of == ticket).unwrap();
        outputs.remove(found).1
    };
    let decided = propose(&mut net, 4, compare());
    assert!(matches!(decided, Proposed::Applied(Ok(_))));
    let refused = propose(&mut net, 5, group("c"));
    let Proposed::Applied(Err(Rejection::WrongState { why, .. })) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("disagree"), "{why}");
    // When the administrator has made up his mind which of them is right, it goes on.
    let right = net.cores[&leader].state().clone();
    for core in net.cores.values_mut() {
        core.state = right.clone();
    }
    assert!(matches!(
        propose(&mut net, 6, compare()),
        Proposed::Applied(Ok(_))
    ));
    assert!(matches!(
        propose(&mut net, 7, group("c")),
        Proposed::Applied(Ok(_))
    ));
}

#[test]
fn who_hears_of_no_leader_does_not_raise_the_term_by_itself() {
    let mut core = start(&MemoryStore::default(), 1, &[1, 2, 3]);
    for _ in 0..100 {
        core.tick();
        core.all_ready(&mut |_| {}).unwrap();
    }
    assert_eq!(core.term(), (0, false), "nobody would vote for it");
}

#[test]
fn a_vote_that_was_given_is_kept_over_a_restart() {
    let store = MemoryStore::default();
    let voted = HardState {
        term: 5,
        vote: 2,
        commit: 0,
        ..HardState::default()
    };
    store.clone().append(&[], Some(&voted)).unwrap();
    let mut core = start(&store, 1, &[1, 2, 3]);
    let mut asks = Message::default();
    asks.set_msg_type(MessageType::MsgRequestVote);
    (asks.from, asks.to, asks.term) = (3, 1, 5);
    core.step(asks).unwrap();
    let mut answers = Vec::new();
    core.all_ready(&mut |mut sent| answers.append(&mut sent))
        .unwrap();
    assert_eq!(answers.len(), 1);
    assert!(
        answers[0].reject,
        "it has voted for another one in that term"
    );
}

#[test]
fn nobody_is_handed_the_lead_who_was_not_heard_of_lately() {
    let mut net = Net::new(&[1, 2, 3]);
    let leader = net.elect();
    let other = (1..=3).find(|id| *id != leader).unwrap();
    net.cut.push(other);
    for _ in 0..3 * ELECTION_TICKS {
        net.cores.values_mut().for_each(Core::tick);
        net.settle();
    }
    let core = net.cores.get_mut(&leader).unwrap();
    assert!(core.leads());
    let refused = core.hand_over(other).unwrap_err();
    assert!(refused.contains("not in contact"), "{refused}");
}
