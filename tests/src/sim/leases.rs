//! Leases: production's cores at both ends, and at the fences of shims. That a shim kills in time is played.

use batchai_node_agent::status::{FailureRecord, Phase};
use batchai_proto::internal::v1::command::Kind;

use super::Sim;
use super::replicas::Reading;

/// How long leases are: longer than nodes that are silent get no work for, as production's are.
pub const LEASE_MS: i64 = 16_000;
/// Steps from one round of a leader to the next.
const ROUND_STEPS: u64 = 5;
/// Steps that a grant takes at most.
const DELAY_STEPS: u64 = 10;

/// A grant on its way.
pub struct Grant {
    due: u64,
    agent: usize,
    conversation: u64,
    number: u64,
}

impl Sim {
    /// A leader has its leases confirmed.
    pub(super) fn ask_for_leases(&mut self, id: u64) {
        if !self.step.is_multiple_of(ROUND_STEPS) {
            return;
        }
        self.look_at_leadership(id);
        let replica = self.replica(id);
        if replica.reading.values().any(|reading| reading.lease) {
            return;
        }
        let beats = replica.contacts.beats();
        if !replica.leases.begin(beats) {
            return;
        }
        self.tickets += 1;
        let (ticket, since) = (self.tickets, self.step);
        if self.core(id).read(ticket) {
            let reading = Reading {
                least: 0,
                since,
                user: None,
                lease: true,
            };
            self.replica(id).reading.insert(ticket, reading);
        } else {
            self.end_round(id, false);
        }
    }

    fn look_at_leadership(&mut self, id: u64) {
        let (term, leads) = (self.core(id).term().0, self.leads(id));
        let step = self.step;
        let replica = self.replica(id);
        let now = replica.clock.boot(step);
        replica.leases.look(leads.then_some(term), now);
    }

    /// A majority has spoken, or has not in time.
    pub(super) fn end_round(&mut self, id: u64, majority: bool) {
        self.look_at_leadership(id);
        let replica = self.replica(id);
        for beat in replica.leases.end(majority) {
            replica.contacts.grant(&beat);
        }
    }

    /// A grant goes to an agent.
    pub(super) fn grant(&mut self, agent: usize, conversation: u64, number: u64) {
        self.grants.push(Grant {
            due: self.step + self.random.u64(..DELAY_STEPS),
            agent,
            conversation,
            number,
        });
    }

    /// What grants have come, and whose lease is over.
    pub(super) fn step_leases(&mut self) {
        let step = self.step;
        let (come, later) = std::mem::take(&mut self.grants)
            .into_iter()
            .partition(|grant| grant.due <= step);
        self.grants = later;
        let come: Vec<Grant> = come;
        for grant in come {
            let agent = &mut self.agents[grant.agent];
            if agent.conversation != grant.conversation {
                continue;
            }
            if let Some(held) = agent.lease.granted(grant.number, LEASE_MS) {
                (agent.leased_until, agent.written) = (held.until, Some(held));
            }
        }
        for agent in &mut self.agents {
            let now = agent.clock.boot(step);
            for (id, fence) in &mut agent.fences {
                let local = agent.local.get_mut(id).map(|(local, _)| local);
                let Some(local) = local.filter(|local| local.shim) else {
                    continue;
                };
                if fence.left(now) > 0 || fence.look(now, agent.written) {
                    continue;
                }
                let status = local.status.get_or_insert_default();
                status.phase = Phase::Ended;
                status.failure.get_or_insert(FailureRecord {
                    code: "NodeLeaseExpired".into(),
                    infrastructure: true,
                    ..FailureRecord::default()
                });
                (local.shim, local.shipped) = (false, true);
                self.checks.saw("a lease is over amid a job");
            }
        }
    }

    /// A leader takes nodes for lost.
    pub(super) fn note_losses(&mut self, duties: &[Kind]) {
        for duty in duties {
            let Kind::LoseNode(lost) = duty else {
                continue;
            };
            let agent = self.agents.iter().find(|agent| agent.name() == lost.node);
            if agent.is_some_and(|agent| agent.is_cut_off(self.step)) {
                self.checks.saw("a lease is over while its node is cut off");
            }
        }
    }
}
