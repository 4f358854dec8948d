//! Commands that agents run for callers: where the two ends of one meet, and the way of what it reads and prints.
//!
//! Nothing is kept, and nothing is looked into: each end says how much it has taken, and the other sends no more ahead of that than
//! fits into the queues here. Who may run what, and where, is decided elsewhere.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{CALL_TIMEOUT, EXEC_CHUNKS_MAX};
use batchai_common::names::{Kind, Name};
use batchai_proto::agent::v1::serve_exec_request::Message;
use batchai_proto::agent::v1::{ExecRequest, ServeExecRequest, ServeExecResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tonic::{Status, Streaming};

use super::files::{FileDesk, Question};

/// Commands that go through one replica at once.
const EXECS_MAX: usize = 512;
/// How long an agent may take to answer, and to begin.
const PATIENCE: Duration = Duration::from_secs(10);
/// What waits for one end to take it: all that the other may send ahead, in data and in what it says of its own queue.
pub const OUTBOX_MAX: usize = 2 * EXEC_CHUNKS_MAX + 16;

/// Where agents answer.
#[derive(Clone)]
pub struct ExecDesk {
    agents: FileDesk,
    open: Arc<Mutex<HashMap<String, Waiting>>>,
    room: Arc<Semaphore>,
}

/// Somebody waits for a node's agent.
struct Waiting {
    node: String,
    answer: oneshot::Sender<Agent>,
}

/// The agent's end of a command.
pub struct Agent {
    pub incoming: Streaming<ServeExecRequest>,
    pub outbox: mpsc::Sender<Result<ServeExecResponse, Status>>,
}

/// A command that an agent is to run.
pub struct Exec {
    pub agent: Agent,
    /// Its place among those that go through this replica.
    pub permit: OwnedSemaphorePermit,
}

impl ExecDesk {
    /// One that asks agents by another desk.
    pub fn new(agents: FileDesk) -> ExecDesk {
        ExecDesk {
            agents,
            open: Arc::default(),
            room: Arc::new(Semaphore::new(EXECS_MAX)),
        }
    }

    /// Asks a node's agent to run a command; returns when it has come to do so.
    pub async fn ask(&self, node: &str, question: ExecRequest) -> Result<Exec, ApiError> {
        let permit = self.room.clone().try_acquire_owned();
        let permit = permit.map_err(|_| ApiError::Busy {
            what: "this replica's room for commands on nodes",
        })?;
        let (answer, answered) = oneshot::channel();
        let open = Open {
            desk: self.clone(),
            token: question.token.clone(),
        };
        let waiting = Waiting {
            node: node.to_owned(),
            answer,
        };
        // Before it is put: the answer may come at once.
        self.lock().insert(open.token.clone(), waiting);
        let put = self.agents.put(node, Question::Exec(question));
        put.map_err(|why| unavailable(node, why))?;
        let agent = tokio::time::timeout(PATIENCE, answered).await;
        let agent = agent.ok().and_then(Result::ok);
        let agent = agent.ok_or_else(|| unavailable(node, "does not answer"))?;
        Ok(Exec { agent, permit })
    }

    /// Takes an agent in that comes to run a command. `registered` says whether a node is who it says.
    ///
    /// # Errors
    /// Nobody waits for it here.
    pub async fn take_in(
        &self,
        registered: impl Fn(&str, &str) -> bool,
        mut incoming: Streaming<ServeExecRequest>,
        outbox: mpsc::Sender<Result<ServeExecResponse, Status>>,
    ) -> Result<(), ApiError> {
        let first = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
        let first = first.map_err(|_| invalid("hello", "did not come in time"))?;
        let first = first.map_err(|error| invalid("hello", error.message()))?;
        let Some(Message::Hello(hello)) = first.and_then(|request| request.message) else {
            return Err(invalid("message", "the first one must be a hello"));
        };
        let node = Name::top(Kind::Node, &hello.node_id)
            .map_err(|error| invalid("hello.node_id", &error.to_string()))?;
        let waiting = {
            let mut open = self.lock();
            // Another node takes nothing away from the one that is meant.
            let meant = open.get(&hello.id).is_some_and(|w| w.node == node.as_str());
            let is_it = meant && registered(node.as_str(), &hello.uid);
            is_it.then(|| open.remove(&hello.id)).flatten()
        };
        let waiting = waiting.ok_or_else(|| invalid("hello.id", "nobody waits for this"))?;
        // Only now the agent runs anything.
        let _ = outbox.try_send(Ok(ServeExecResponse::default()));
        // Who waited may just have given up: then the stream ends here.
        let _ = waiting.answer.send(Agent { incoming, outbox });
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Waiting>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is waited for; nothing is left of it when nobody waits any more.
struct Open {
    desk: ExecDesk,
    token: String,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.desk.lock().remove(&self.token);
    }
}

impl Agent {
    /// What it says next; what it says by itself is not believed to be anything else.
    pub async fn next(&mut self, node: &str) -> Result<Message, ApiError> {
        let next = tokio::time::timeout(PATIENCE, self.incoming.message()).await;
        let next = next.map_err(|_| unavailable(node, "does not begin"))?;
        let message = next.ok().flatten().and_then(|request| request.message);
        message.ok_or_else(|| unavailable(node, "broke off"))
    }
}

/// The node cannot be reached now.
pub fn unavailable(node: &str, why: &str) -> ApiError {
    let id = batchai_common::names::last_id(node);
    ApiError::Unavailable {
        why: format!(
            "{node}, where the command is to run, {why}; `batchai node show -n {id}` says how it is"
        ),
        leader: None,
    }
}

fn invalid(field: &str, why: &str) -> ApiError {
    ApiError::Invalid(vec![Fault::new(field, why)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_that_is_not_there_is_not_waited_for_and_leaves_nothing() {
        let desk = ExecDesk::new(FileDesk::default());
        let question = ExecRequest {
            token: "t".to_owned(),
            ..ExecRequest::default()
        };
        let asked = desk.ask("nodes/a", question.clone()).await.err();
        assert!(matches!(asked, Some(ApiError::Unavailable { .. })));
        assert!(desk.lock().is_empty());
        // Asked, and nobody comes: whoever gave up leaves nothing either.
        let (questions, mut asked) = mpsc::channel(1);
        let attendance = desk.agents.attend("nodes/a", questions);
        let waited = desk.ask("nodes/a", question);
        let waited = tokio::time::timeout(Duration::from_millis(50), waited).await;
        assert!(waited.is_err() && asked.try_recv().is_ok() && desk.lock().is_empty());
        assert_eq!(desk.room.available_permits(), EXECS_MAX);
        drop(attendance);
    }
}
