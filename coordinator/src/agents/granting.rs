//! Has the leader's leases confirmed by a majority, again and again, and hands the grants to the sessions.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::contacts::{Contacts, boot_millis};
use super::lease::Leases;
use crate::replica::Handle;

/// Heartbeats that come within this time share a round.
const ROUND_INTERVAL: Duration = Duration::from_millis(250);

/// Runs until the token is cancelled.
pub async fn run(replica: Handle, contacts: Contacts, shutdown: CancellationToken) {
    let mut leases = Leases::default();
    let role = replica.role();
    let mut interval = tokio::time::interval(ROUND_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let leading = || {
            let role = *role.borrow();
            role.leads.then_some(role.term)
        };
        leases.look(leading(), boot_millis());
        // In this order: what came later than the question is not answered by it.
        if leases.begin(contacts.beats()) {
            let majority = replica.read().await.is_ok();
            leases.look(leading(), boot_millis());
            for (node, number) in leases.end(majority) {
                contacts.grant(&node, number);
            }
        }
        contacts.keep(leases.granted());
    }
}
