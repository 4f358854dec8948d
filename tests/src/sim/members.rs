//! Who belongs to the ensemble: an administrator adds replicas, gives them votes, removes some and has others lead; and a disk is lost now
//! and then, whose replica never comes back.
//!
//! He looks at what is there and goes on from it, as `batchai admin replica` would. He loses no majority by himself: one disk at a time,
//! of three at least, and none while it is not known what became of what he wanted last.

use batchai_coordinator::replica::core::{Core, Proposed};
use batchai_coordinator::state::State;
use batchai_coordinator::state::replicas::members;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::replica::Role;
use batchai_proto::internal::v1::{ChangeReplica, Command};

use super::disk::Disk;
use super::replicas::{Replica, endpoint};
use super::{Asked, Sim};

/// Replicas that there ever are.
const IDS_MAX: u64 = 20;

/// The administrator.
#[derive(Debug, Default)]
pub struct Admin {
    /// He waits for an answer.
    asked: bool,
    /// What became of the last thing is not known.
    unsure: bool,
    /// The revision that his last change led to: who does not know it yet is not asked.
    changed: i64,
    /// The disk that was lost, until another replica stands for its.
    pub wiped: Option<u64>,
    /// Whom he asked to lead, in which term.
    heir: Option<(u64, u64)>,
}

/// What he wants next.
enum Wish {
    Change(u64, Role),
    Add,
    HandOver(u64),
    Wipe(u64),
}

impl Sim {
    pub(super) fn step_admin(&mut self) {
        self.see_heir();
        let often = if self.healed {
            0.2
        } else {
            self.options.change
        };
        if self.admin.asked || self.random.f64() >= often {
            return;
        }
        let Some(leader) = self.find_leader() else {
            return;
        };
        let state = self.core(leader).state().clone();
        match self.admin_wish(leader, &state) {
            Some(Wish::Change(id, role)) => self.change(leader, id, role),
            Some(Wish::Add) => {
                let id = self.replicas.keys().next_back().map_or(1, |last| last + 1);
                let replica = Replica::new(id, &mut self.random, &self.options);
                self.replicas.insert(id, replica);
                self.start(id);
                self.change(leader, id, Role::Learner);
            }
            Some(Wish::HandOver(to)) => {
                let term = self.core(leader).term().0;
                if self.core(leader).hand_over(to).is_ok() {
                    self.admin.heir = Some((to, term + 1));
                }
            }
            Some(Wish::Wipe(id)) => {
                self.stop(id);
                self.tell_gone(id);
                self.replica(id).over = true;
                self.admin.wiped = Some(id);
            }
            None => {}
        }
    }

    fn admin_wish(&mut self, leader: u64, state: &State) -> Option<Wish> {
        if state.ensemble.is_empty() || state.revision < self.admin.changed {
            return None;
        }
        let with = |role: Role| {
            let found = members(state).filter(move |replica| replica.role() == role);
            found.map(|replica| replica.id).collect::<Vec<_>>()
        };
        let (voters, learners) = (with(Role::Voter), with(Role::Learner));
        let usual = self.options.replicas as usize;
        if let Some(wiped) = self.admin.wiped {
            if voters.contains(&wiped) || learners.contains(&wiped) {
                return Some(Wish::Change(wiped, Role::Removed));
            }
            if state.replicas.contains_key(&wiped) && voters.len() >= usual {
                self.checks.saw("a wiped replica is replaced");
                self.admin.wiped = None;
            }
        }
        if let Some(learner) = learners.first() {
            let leave = !self.healed && self.random.f64() < 0.1;
            let role = if leave { Role::Removed } else { Role::Voter };
            return Some(Wish::Change(*learner, role));
        }
        let room = self.replicas.len() < IDS_MAX as usize;
        if voters.len() < usual {
            // One that was begun for a change that came to nothing is taken first.
            let idle = self.replicas.iter().find(|(id, replica)| {
                !replica.over && replica.core.is_some() && !state.replicas.contains_key(id)
            });
            return match idle.map(|(id, _)| *id) {
                Some(id) => Some(Wish::Change(id, Role::Learner)),
                None => Some(Wish::Add),
            };
        }
        if self.healed {
            return None;
        }
        let any = *self.random.choice(&voters)?;
        match self.random.u32(..5) {
            0 if voters.len() <= usual && room => Some(Wish::Add),
            1 if any != leader && (voters.len() > usual || (usual > 2 && room)) => {
                Some(Wish::Change(any, Role::Removed))
            }
            2 if voters.len() > 2 && room && self.admin.wiped.is_none() && !self.admin.unsure => {
                Some(Wish::Wipe(any))
            }
            // Also where that one leads and is to go: whoever leads then removes it.
            _ if any != leader => Some(Wish::HandOver(any)),
            _ => None,
        }
    }

    fn change(&mut self, leader: u64, id: u64, role: Role) {
        self.tickets += 1;
        let (ticket, step) = (self.tickets, self.step);
        let change = ChangeReplica {
            id,
            role: role as i32,
            endpoint: match role {
                Role::Learner => endpoint(id),
                _ => String::new(),
            },
        };
        let wall = self.replicas[&leader].clock.wall(step);
        let command = Command {
            time: Some(batchai_common::time::from_millis(wall)),
            request: None,
            kind: Some(Kind::ChangeReplica(change.clone())),
        };
        self.admin.asked = true;
        let asked = Asked::Admin(role);
        match self.core(leader).change(ticket, &command, &change) {
            Some((_, proposed)) => self.answer(asked, &proposed),
            None => {
                let waiting = &mut self.replica(leader).waiting;
                waiting.insert(ticket, (asked, step));
            }
        }
    }

    pub(super) fn answer_admin(&mut self, role: Role, proposed: &Proposed) {
        self.admin.asked = false;
        match proposed {
            Proposed::Unknown => self.admin.unsure = true,
            // What came before it in the log is decided.
            Proposed::Applied(Ok(revision)) => {
                self.admin.unsure = false;
                self.admin.changed = *revision;
                self.checks.saw(match role {
                    Role::Voter => "a replica gets a vote",
                    Role::Learner => "a replica is added",
                    _ => "a replica is removed",
                });
            }
            Proposed::Applied(Err(_)) | Proposed::NotLeader => {}
        }
    }

    fn see_heir(&mut self) {
        let Some((heir, term)) = self.admin.heir else {
            return;
        };
        let core = self.replicas[&heir].core.as_ref();
        let (now, leads) = core.map_or((0, false), |core| core.term());
        if leads && now == term {
            self.checks.saw("leadership is handed over");
        }
        if leads || now > term {
            self.admin.heir = None;
        }
    }

    /// What is known of the ensemble where most is known.
    pub(super) fn latest(&self) -> Option<&State> {
        let states = self.replicas.values();
        let states = states.filter_map(|replica| Some(replica.core.as_ref()?.state()));
        states.max_by_key(|state| state.applied_index)
    }

    /// Who belongs to the ensemble, as far as anybody knows.
    pub(super) fn members(&self) -> Vec<u64> {
        let state = self.latest();
        let members = state.into_iter().flat_map(members);
        members.map(|replica| replica.id).collect()
    }

    /// As far as a replica knows, the membership is changing.
    pub(super) fn is_changing(&self, id: u64) -> bool {
        let core = self.replicas[&id].core.as_ref();
        let learner = |core: &Core<Disk>| members(core.state()).any(|r| r.role() == Role::Learner);
        self.admin.asked || core.is_some_and(learner)
    }

    /// For who looks into a failure.
    pub(super) fn how_replicas_are(&self) -> String {
        let each = self.replicas.iter().map(|(id, replica)| {
            let core = replica.core.as_ref();
            let known = core.map(|core| (core.term(), core.state().revision));
            format!(
                "{id}: over {}, term, leads, revision {known:?}",
                replica.over
            )
        });
        each.collect::<Vec<_>>().join("; ")
    }

    /// The membership is as it should be in the end.
    pub(super) fn is_manned(&self, state: &State) -> bool {
        let whole = members(state).all(|r| r.role() == Role::Voter && !self.replicas[&r.id].over);
        let voters = members(state).count();
        whole && voters >= self.options.replicas as usize && !self.admin.asked
    }
}
