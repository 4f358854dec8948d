//! Backups, and restores of them: now and then everything that the replicas have is lost at once, and an ensemble of one begins anew from
//! the latest backup, as production's `backup` has it begin.
//!
//! An administrator then does what the manual asks for: he decides about each attempt that the State does not know, and lets work be placed
//! when every machine has come back; nothing is forced. Replicas that go on beside the new ensemble are not played.

use std::sync::OnceLock;

use batchai_common::time::from_millis;
use batchai_coordinator::backup::begin_with;
use batchai_coordinator::replica::store::snapshot;
use batchai_coordinator::state::requests::REQUESTS_MAX;
use batchai_coordinator::state::{State, apply, restore};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{
    AcceptRestore, AdoptAttempt, Command, DiscardAttempt, InitEnsemble, Labels, Replica as Member,
    RequestKey, SnapshotMark, Update,
};
use batchai_proto::v1;

use super::clients::GROUP;
use super::clocks::Clock;
use super::members::Admin;
use super::network::Network;
use super::relay::Carried;
use super::replicas::{Replica, endpoint};
use super::{Asked, ENSEMBLE, Sim};

/// How often a backup is made, and how often the administrator decides something, in each step.
const BACKUPS: f64 = 0.01;
const DECISIONS: f64 = 0.1;
/// About what production's epochs are: they count seconds, and revisions follow from them.
const EPOCHS_BEGIN: i64 = 200_000_000;

/// Which ensemble it is by now.
#[derive(Default)]
pub struct Ensemble {
    /// The replicas that it began with.
    pub first: Vec<u64>,
    backup: Option<Vec<u8>>,
}

impl Ensemble {
    pub fn new(first: Vec<u64>) -> Ensemble {
        Ensemble {
            first,
            backup: None,
        }
    }
}

/// The backup of an ensemble that remembers all the requests it may: from then on each that is carried out has another one forgotten.
/// Made once, and the same for all worlds.
pub fn old() -> &'static [u8] {
    static OLD: OnceLock<Vec<u8>> = OnceLock::new();
    OLD.get_or_init(|| {
        let mut state = State::default();
        for number in 1..=REQUESTS_MAX as u64 + 1 {
            let kind = match number {
                1 => Kind::InitEnsemble(InitEnsemble {
                    ensemble: ENSEMBLE.into(),
                    ..Default::default()
                }),
                2 => Kind::CreateResourceGroup(v1::ResourceGroup {
                    name: GROUP.into(),
                    ..Default::default()
                }),
                _ => Kind::Update(Update {
                    name: GROUP.into(),
                    labels: Some(Labels {
                        labels: [("n".to_owned(), number.to_string())].into(),
                    }),
                    ..Default::default()
                }),
            };
            let command = Command {
                // Until what every clock begins with: they are forgotten in this order, which is not that of their names.
                time: Some(from_millis(
                    Clock::default().wall(0) - 100 * (REQUESTS_MAX as i64 - number as i64),
                )),
                request: Some(RequestKey {
                    caller: "users/old".into(),
                    // Scattered, as those of clients are.
                    id: format!("{:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                    digest: vec![1; 32],
                }),
                kind: Some(kind),
            };
            apply(&mut state, number, &command).expect("what it is about is there");
        }
        backup(&state)
    })
}

fn backup(state: &State) -> Vec<u8> {
    let mark = SnapshotMark {
        index: state.applied_index,
        ..SnapshotMark::default()
    };
    let mut backup = Vec::new();
    snapshot::encode(&mut backup, &mark, state).expect("memory is there");
    backup
}

impl Sim {
    /// Loses all replicas, where there is a backup of what they held.
    pub(super) fn fail_ensemble(&mut self) -> Result<(), String> {
        if self.options.restore == 0.0 {
            return Ok(());
        }
        if self.random.f64() < BACKUPS {
            self.back_up();
        }
        if self.random.f64() < self.options.restore
            && let Some(backup) = self.ensemble.backup.clone()
        {
            return self.restore(&backup);
        }
        Ok(())
    }

    /// Any replica has its State copied. Machines that come later are not waited for after a restore, so there is none before all came.
    fn back_up(&mut self) {
        let up = self.ids().into_iter().filter(|id| self.is_up(*id));
        let Some(id) = self.random.choice(up.collect::<Vec<_>>()) else {
            return;
        };
        let state = self.core(id).state().clone();
        if state.nodes.len() < self.agents.len() {
            return;
        }
        self.ensemble.backup = Some(backup(&state));
    }

    pub(super) fn restore(&mut self, backup: &[u8]) -> Result<(), String> {
        let (mark, state) = snapshot::decode(&mut &backup[..])?;
        for id in self.ids() {
            self.stop(id);
        }
        for agent in &mut self.agents {
            agent.hang_up();
        }
        let id = self.replicas.keys().next_back().map_or(1, |last| last + 1);
        self.replicas.clear();
        self.network = Network::default();
        self.relayed = Carried::default();
        self.admin = Admin::default();
        self.ensemble.first = vec![id];
        let own = Member {
            id,
            role: Role::Voter as i32,
            endpoint: endpoint(id),
            ..Member::default()
        };
        let epoch = EPOCHS_BEGIN + self.step as i64;
        let state = restore::restored(state, epoch, own);
        self.checks.restored(&state)?;
        self.registers.begin_anew(&state);
        let mut replica = Replica::new(id, &mut self.random, &self.options);
        begin_with(&mut replica.disk, id, mark.index, &state).expect("memory is there");
        replica.disk.take();
        self.replicas.insert(id, replica);
        self.start(id);
        self.checks.saw("a backup is restored");
        Ok(())
    }

    /// What the administrator does about a State that was restored.
    pub(super) fn step_restored(&mut self) {
        let restored = self.latest().is_some_and(|state| state.restored);
        if !restored || self.random.f64() >= DECISIONS {
            return;
        }
        let Some(leader) = self.find_leader() else {
            return;
        };
        let state = self.core(leader).state().clone();
        if let Some((kind, what)) = self.decision(&state) {
            self.propose(leader, kind, None, Asked::Decision(what));
        }
    }

    /// What he decides next, and what is to be seen of it.
    fn decision(&mut self, state: &State) -> Option<(Kind, &'static str)> {
        let all_here = self.agents.iter().all(|agent| {
            let node = state.nodes.get(&agent.name());
            node.is_some_and(|node| node.epoch == state.epoch)
        });
        let undecided: Vec<_> = restore::undecided(state).collect();
        let Some(id) = self.random.choice(&undecided) else {
            let accept = Kind::AcceptRestore(AcceptRestore { force: false });
            return all_here.then_some((accept, "a restore is accepted"));
        };
        let attempt = (*id).to_owned();
        let adoptable = restore::adoptable(state, id).is_ok();
        if adoptable && self.random.f64() < 0.7 {
            let log_home = self.ensemble.first[0] as i64;
            let adopt = Kind::AdoptAttempt(AdoptAttempt { attempt, log_home });
            return Some((adopt, "an attempt is adopted"));
        }
        // Others of its nodes may be on their way.
        let discard = Kind::DiscardAttempt(DiscardAttempt { attempt });
        (adoptable || all_here).then_some((discard, "an attempt is discarded"))
    }
}
