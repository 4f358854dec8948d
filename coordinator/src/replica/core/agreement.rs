//! Whether this replica's State is that of the others: it takes its digest where the log says so, tells it, and, where it leads,
//! counts what all of them tell.

use batchai_common::fault;
use std::collections::BTreeMap;

use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Command, DecideComparison};

use super::{Core, CoreError, Output};
use crate::replica::store::LogStore;
use crate::state::State;
use crate::state::digest::Digest;

/// Comparisons that are remembered.
const KEPT_MAX: usize = 8;
/// A ticket that nobody waits for.
const NOBODY: super::Ticket = 0;

/// What is known of comparisons.
#[derive(Default)]
pub struct Agreement {
    /// The State whose digest was taken last, and the digest; none before the first, which looks at all of it.
    last: Option<(State, Digest)>,
    /// By entry and replica.
    told: BTreeMap<u64, BTreeMap<u64, Digest>>,
    /// Not told yet.
    fresh: Vec<(u64, Digest)>,
    /// The latest entry whose comparison this replica has proposed to decide.
    proposed: u64,
}

impl<S: LogStore> Core<S> {
    /// The digest of the State as it is. It is kept up with what changed.
    pub fn digest(&mut self) -> Digest {
        let digest = match self.agreement.last.take() {
            Some((before, digest)) => digest.advance(&before, &self.state),
            None => Digest::of(&self.state),
        };
        self.agreement.last = Some((self.state.clone(), digest));
        digest
    }

    /// After a command of the log was applied.
    ///
    /// # Errors
    /// The majority has another State.
    pub(super) fn after(&mut self, index: u64, command: &Command) -> Result<(), CoreError> {
        match &command.kind {
            Some(Kind::CompareStates(_)) => {
                let digest = self.digest();
                self.agreement.fresh.push((index, digest));
                self.note(self.raw.raft.id, index, digest);
            }
            Some(Kind::DecideComparison(decided)) => {
                let own = self.agreement.told.get(&decided.index);
                let own = own.and_then(|told| told.get(&self.raw.raft.id));
                let majority = Digest::read(&decided.digest);
                if let (Some(own), Some(majority)) = (own, majority)
                    && *own != majority
                    && !fault!("another_state_goes_on")
                {
                    let index = decided.index;
                    return Err(CoreError::Differs { index });
                }
                // Nobody asks for those any more.
                self.agreement
                    .told
                    .retain(|index, _| *index > decided.index);
            }
            _ => {}
        }
        Ok(())
    }

    /// Passes on what was taken, to whoever leads.
    pub(super) fn tell(&mut self, output: &mut Output) {
        let fresh = std::mem::take(&mut self.agreement.fresh);
        let others = self.leader().filter(|leader| *leader != self.raw.raft.id);
        if let Some(leader) = others {
            let told = fresh
                .iter()
                .map(|(index, digest)| (leader, *index, *digest));
            output.digests.extend(told);
        }
        for (index, _) in fresh {
            self.judge(index);
        }
    }

    /// A peer tells the digest of its State at an entry.
    pub fn told(&mut self, from: u64, index: u64, digest: Digest) {
        let known = self.raw.raft.prs().get(from).is_some();
        if known && index <= self.raw.raft.raft_log.last_index() {
            self.note(from, index, digest);
            self.judge(index);
        }
    }

    fn note(&mut self, from: u64, index: u64, digest: Digest) {
        let told = &mut self.agreement.told;
        told.entry(index).or_default().insert(from, digest);
        while told.len() > KEPT_MAX {
            told.pop_first();
        }
    }

    /// Where this replica leads and the majority is known, or that there is none, has it decided.
    fn judge(&mut self, index: u64) {
        let due = index > self.state.comparison.decided && index > self.agreement.proposed;
        if !self.leads() || !due {
            return;
        }
        let Some(told) = self.agreement.told.get(&index) else {
            return;
        };
        let voters = self.raw.raft.prs().conf().voters().ids();
        let (mut counts, mut all, mut heard) = (BTreeMap::new(), 0, 0);
        for voter in voters.iter() {
            all += 1;
            if let Some(digest) = told.get(&voter) {
                heard += 1;
                *counts.entry(*digest).or_insert(0) += 1;
            }
        }
        let majority = counts
            .into_iter()
            .find(|(_, count)| *count > all / 2 || fault!("minority_decides"));
        let digest = match majority {
            Some((digest, _)) => digest.bytes().to_vec(),
            None if heard == all => Vec::new(),
            None => return,
        };
        self.agreement.proposed = index;
        let decide = DecideComparison { index, digest };
        let command = Command {
            kind: Some(Kind::DecideComparison(decide)),
            ..Command::default()
        };
        // One that gets lost is followed by the next comparison.
        let _ = self.propose(&[(NOBODY, command)]);
    }
}
