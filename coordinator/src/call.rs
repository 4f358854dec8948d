//! The call that is being answered: whoever answers it can ask who made it, wherever that is.
//!
//! It is set where calls come in, and holds for what the same task does.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::access::Caller;

tokio::task_local! {
    static CALL: Arc<Call>;
}

/// A call that is being answered.
pub struct Call {
    caller: Caller,
    /// What it led to; 0 where it changed nothing.
    revision: AtomicI64,
}

impl Call {
    /// A call of somebody.
    pub fn new(caller: Caller) -> Arc<Call> {
        let revision = AtomicI64::new(0);
        Arc::new(Call { caller, revision })
    }

    /// Does something as part of it.
    pub async fn scope<F: Future>(self: Arc<Call>, work: F) -> F::Output {
        CALL.scope(self, work).await
    }

    /// The revision that it led to; 0 where it changed nothing.
    pub fn revision(&self) -> i64 {
        self.revision.load(Ordering::Relaxed)
    }
}

/// Who makes this call: nobody where there is none.
pub fn caller() -> Caller {
    let caller = CALL.try_with(|call| call.caller.clone());
    caller.unwrap_or_else(|_| Caller::nobody())
}

/// Notes the revision that this call led to.
pub fn led_to(revision: i64) {
    // What the leader does by itself is no call.
    let _ = CALL.try_with(|call| call.revision.store(revision, Ordering::Relaxed));
}
