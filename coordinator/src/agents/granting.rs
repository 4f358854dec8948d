//! Has the leader's leases confirmed by a majority, again and again, and hands the grants to the sessions and to the replicas that
//! relay.

use std::time::Duration;

use batchai_common::time::boot_millis;
use tokio_util::sync::CancellationToken;

use super::contacts::Contacts;
use super::lease::Leases;
use crate::replica::Handle;

/// Heartbeats that come within this time share a round.
const ROUND_INTERVAL: Duration = Duration::from_millis(250);
/// A majority that has not answered by then is asked anew.
const ROUND_MAX: Duration = Duration::from_secs(2);

/// Runs until the token is cancelled.
pub async fn run(replica: Handle, contacts: Contacts, shutdown: CancellationToken) {
    let mut leases = Leases::default();
    let (role, mut changes) = (replica.role(), replica.role());
    let mut interval = tokio::time::interval(ROUND_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let leading = || {
        let role = *role.borrow();
        role.leads.then_some(role.term)
    };
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            Ok(()) = changes.changed() => {}
            () = shutdown.cancelled() => return,
        }
        changes.mark_unchanged();
        if leases.look(leading(), boot_millis()) {
            contacts.keep(leases.granted());
        }
        // In this order: what came later than the question is not answered by it.
        if !leases.begin(contacts.beats()) {
            continue;
        }
        let majority = tokio::select! {
            read = replica.read() => read.is_ok(),
            // Whoever asked may not lead any more, and would get no answer.
            _ = changes.changed() => false,
            () = tokio::time::sleep(ROUND_MAX) => false,
            () = shutdown.cancelled() => return,
        };
        leases.look(leading(), boot_millis());
        for beat in leases.end(majority) {
            contacts.grant(&beat);
        }
        contacts.keep(leases.granted());
    }
}
