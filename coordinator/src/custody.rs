//! Looks after the keys of secrets: reads the keyring anew when it has changed, has data keys wrapped by its first key, and says
//! which of them cannot be opened.
//!
//! A loop of its own: a keyring on a disk that does not answer holds up nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::agents::contacts::Contacts;
use crate::replica::Handle;
use crate::secrets::Vault;

const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How long the keyring's disk may take to answer.
const READ_MAX: Duration = Duration::from_secs(5);

/// Runs until the token is cancelled.
pub async fn run(replica: Handle, contacts: Contacts, vault: Vault, shutdown: CancellationToken) {
    let mut custody = Custody {
        replica,
        contacts,
        vault,
        closed: Arc::default(),
        wrapped_by: String::new(),
    };
    loop {
        custody.look().await;
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

struct Custody {
    replica: Handle,
    contacts: Contacts,
    vault: Vault,
    /// What was said last: the same is not said again.
    closed: Arc<BTreeSet<String>>,
    wrapped_by: String,
}

impl Custody {
    async fn look(&mut self) {
        let vault = self.vault.clone();
        let read = tokio::task::spawn_blocking(move || vault.reload());
        match tokio::time::timeout(READ_MAX, read).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::error!(%error, "the keyring stays as it was"),
            Ok(Err(error)) => tracing::error!(%error, "the keyring cannot be read"),
            Err(_) => tracing::error!("the keyring's disk does not answer"),
        }
        let mut published = self.replica.published();
        let (state, leads) = {
            let seen = published.borrow_and_update();
            (seen.state.clone(), seen.leads)
        };
        let closed = self.vault.closed(&state);
        if closed != self.closed {
            tracing::error!(
                count = closed.len(),
                keys = ?closed.iter().take(5).collect::<Vec<_>>(),
                "data keys that the keyring cannot open; what they seal waits"
            );
            self.closed.clone_from(&closed);
        }
        self.contacts.close(closed);
        if leads {
            self.rewrap().await;
        }
    }

    /// Until none is left, or one cannot be written.
    async fn rewrap(&mut self) {
        loop {
            let state = self.replica.published().borrow().state.clone();
            let anew = self.vault.rewrap(&state);
            if anew.is_empty() {
                break;
            }
            for result in self.replica.propose_all(anew, None).await {
                if let Err(error) = result {
                    tracing::warn!(%error, "a data key was not wrapped anew; it is tried again");
                    return;
                }
            }
        }
        let current = self.vault.current();
        if self.closed.is_empty() && self.wrapped_by != current {
            tracing::info!(
                key = current,
                "all data keys are wrapped by the first key of the keyring"
            );
            self.wrapped_by = current;
        }
    }
}
