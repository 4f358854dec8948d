//! Questions to agents about files of their nodes, and the way of the answers back to who asked.
//!
//! Nothing is kept: an answer flows as fast as who asked takes it, and what nobody waits for any more is thrown away.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{CALL_TIMEOUT, FILE_CHUNK_BYTES_MAX};
use batchai_common::names::{Kind, Name};
use batchai_proto::agent::v1::answer_file_request::Part as Message;
use batchai_proto::agent::v1::{
    AnswerFileRequest, AnswerFileResponse, ExecRequest, FileDone, FileEntry, FileFault, FileRequest,
};
use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

/// Questions that an agent has not taken yet.
pub const QUESTIONS_MAX: usize = 16;
/// Parts of an answer that who asked has not taken yet.
const PARTS_MAX: usize = 4;
/// How long an answer may take to begin, or to go on.
const PATIENCE: Duration = Duration::from_secs(30);
/// Files of file servers that go through one replica at once, and those of one caller: a node takes more than that.
const TRANSFERS_MAX: usize = 128;
const TRANSFERS_OF_ONE_MAX: usize = 16;
/// Pieces to write that an agent has not taken yet.
pub const PIECES_MAX: usize = 8;

/// A part of an answer.
#[derive(Debug)]
pub enum Part {
    Entries(Vec<FileEntry>),
    Data(Bytes),
    /// What is to be written goes there, from that offset on.
    Begun(i64, Pieces),
    /// It takes its time.
    Alive,
    /// That was all of it.
    Done(FileDone),
}

/// What an agent is sent.
pub type Pieces = mpsc::Sender<Result<AnswerFileResponse, Status>>;

/// What an agent is asked over its session. The answer comes over another connection.
#[derive(Clone, Debug)]
pub enum Question {
    /// To show something of a file.
    File(FileRequest),
    /// To run a command (`execs`).
    Exec(ExecRequest),
}

/// Where questions to nodes are put, with the node's name.
pub type Questions = mpsc::Sender<(String, Question)>;
type Parts = mpsc::Sender<Result<Part, FileFault>>;

/// Who can be asked, and what was asked and is not answered.
#[derive(Clone, Default)]
pub struct FileDesk {
    inner: Arc<Mutex<Inner>>,
    /// How many whole files each caller has on their way; nobody has none.
    transfers: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A whole file on its way, until it is dropped.
pub struct Transfer {
    desk: FileDesk,
    caller: String,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let transfers = self.desk.transfers.lock();
        let mut transfers = transfers.unwrap_or_else(PoisonError::into_inner);
        let left = transfers.get(&self.caller).map_or(0, |open| open - 1);
        match left {
            0 => transfers.remove(&self.caller),
            left => transfers.insert(self.caller.clone(), left),
        };
    }
}

#[derive(Default)]
struct Inner {
    /// By node: who attends, and where to ask.
    agents: BTreeMap<String, (u64, Questions)>,
    attendances: u64,
    open: HashMap<String, (String, Parts)>,
}

impl Inner {
    fn put(&self, node: &str, question: Question) -> Result<(), &'static str> {
        let (_, agent) = self.agents.get(node).ok_or("is not in contact")?;
        let sent = agent.try_send((node.to_owned(), question));
        sent.map_err(|_| "has too many questions to answer")
    }
}

impl FileDesk {
    /// From now on questions to a node go there, for as long as what is returned is kept.
    pub fn attend(&self, node: &str, questions: Questions) -> Attendance {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.attendances += 1;
        let number = inner.attendances;
        inner.agents.insert(node.to_owned(), (number, questions));
        Attendance {
            desk: self.clone(),
            node: node.to_owned(),
            number,
        }
    }

    /// Passes a question on that somebody asked elsewhere, where the answer goes too. It may be lost.
    pub fn pass(&self, node: &str, question: Question) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = inner
            .agents
            .get(node)
            .map(|(_, agent)| agent.try_send((node.to_owned(), question)));
        if !matches!(sent, Some(Ok(()))) {
            tracing::debug!(node, "a question is lost");
        }
    }

    /// Asks a node.
    pub fn ask(&self, node: &str, question: FileRequest) -> Result<Answer, ApiError> {
        let (sender, parts) = mpsc::channel(PARTS_MAX);
        let id = question.id.clone();
        // Before it is put: the answer may come at once.
        let open = (node.to_owned(), sender);
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.open.insert(id.clone(), open);
        if let Err(why) = inner.put(node, Question::File(question)) {
            inner.open.remove(&id);
            return Err(unavailable(node, why));
        }
        drop(inner);
        Ok(Answer {
            desk: self.clone(),
            node: node.to_owned(),
            id,
            parts,
            done: FileDone::default(),
        })
    }

    /// A place among the whole files that go through this replica.
    ///
    /// # Errors
    /// There is none now, or none for this caller.
    pub fn transfer(&self, caller: &str) -> Result<Transfer, ApiError> {
        let transfers = self.transfers.lock();
        let mut transfers = transfers.unwrap_or_else(PoisonError::into_inner);
        if transfers.values().sum::<usize>() >= TRANSFERS_MAX {
            return Err(ApiError::Busy {
                what: "this replica's room for files of file servers",
            });
        }
        let open = transfers.entry(caller.to_owned()).or_default();
        if *open >= TRANSFERS_OF_ONE_MAX {
            return Err(ApiError::Busy {
                what: "your share of files of file servers at once",
            });
        }
        *open += 1;
        Ok(Transfer {
            desk: self.clone(),
            caller: caller.to_owned(),
        })
    }

    /// Puts a question that is answered elsewhere.
    ///
    /// # Errors
    /// Says why the node cannot be asked.
    pub fn put(&self, node: &str, question: Question) -> Result<(), &'static str> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.put(node, question)
    }

    /// Passes an agent's answer on to who asked.
    pub async fn take_in(
        &self,
        registered: impl Fn(&str, &str) -> bool,
        mut incoming: Streaming<AnswerFileRequest>,
        outbox: &Pieces,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
        let first = first.map_err(|_| invalid("part", "the hello did not come in time"))??;
        let Some(Message::Hello(hello)) = first.and_then(|request| request.part) else {
            return Err(invalid("part", "the first message must be a hello"));
        };
        let node = Name::top(Kind::Node, &hello.node_id)
            .map_err(|error| invalid("hello.node_id", &error.to_string()))?;
        let parts = self.parts(node.as_str(), &hello.id);
        let parts = parts.filter(|_| registered(node.as_str(), &hello.uid));
        let Some(parts) = parts else {
            return Err(invalid("hello.id", "nobody waits for this answer"));
        };
        let mut writes = false;
        loop {
            let next = tokio::select! {
                next = incoming.message() => next?,
                // Who waits for one that writes also knows how long.
                () = tokio::time::sleep(PATIENCE), if !writes => {
                    return Err(invalid("part", "did not come in time"));
                }
                () = parts.closed() => break,
            };
            let Some(request) = next else {
                break;
            };
            let part = match request.part {
                Some(Message::Entries(entries)) => Ok(Part::Entries(entries.entries)),
                Some(Message::Data(data)) if data.len() <= FILE_CHUNK_BYTES_MAX => {
                    Ok(Part::Data(data))
                }
                Some(Message::Fault(fault)) => Err(fault),
                Some(Message::Done(done)) => Ok(Part::Done(done)),
                Some(Message::Alive(_)) => Ok(Part::Alive),
                Some(Message::Begun(begun)) if !writes => {
                    writes = true;
                    Ok(Part::Begun(begun.offset, outbox.clone()))
                }
                Some(Message::Data(_) | Message::Hello(_) | Message::Begun(_)) | None => {
                    return Err(invalid("part", "is not a part of an answer"));
                }
            };
            if parts.send(part).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    fn parts(&self, node: &str, id: &str) -> Option<Parts> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.open.get(id).filter(|(asked, _)| asked == node)?;
        inner.open.remove(id).map(|(_, parts)| parts)
    }
}

/// Somebody answers for a node. Dropping it makes an end of that.
pub struct Attendance {
    desk: FileDesk,
    node: String,
    number: u64,
}

impl Drop for Attendance {
    fn drop(&mut self) {
        let inner = self.desk.inner.lock();
        let mut inner = inner.unwrap_or_else(PoisonError::into_inner);
        let agent = inner.agents.get(&self.node);
        // Another one may attend by now.
        if agent.is_some_and(|(number, _)| *number == self.number) {
            inner.agents.remove(&self.node);
        }
    }
}

/// An answer on its way.
pub struct Answer {
    desk: FileDesk,
    node: String,
    id: String,
    parts: mpsc::Receiver<Result<Part, FileFault>>,
    /// What was said at its end.
    pub done: FileDone,
}

impl Answer {
    /// The next part; none where that was all.
    pub async fn next(&mut self) -> Result<Option<Result<Part, FileFault>>, ApiError> {
        loop {
            let part = tokio::time::timeout(PATIENCE, self.parts.recv()).await;
            let part = part.map_err(|_| unavailable(&self.node, "does not answer"))?;
            if !matches!(part, Some(Ok(Part::Alive))) {
                return self.told(part);
            }
        }
    }

    /// The same, however long it takes.
    pub async fn whenever(&mut self) -> Result<Option<Result<Part, FileFault>>, ApiError> {
        let part = self.parts.recv().await;
        self.told(part)
    }

    fn told(
        &mut self,
        part: Option<Result<Part, FileFault>>,
    ) -> Result<Option<Result<Part, FileFault>>, ApiError> {
        match part {
            Some(Ok(Part::Done(done))) => {
                self.done = done;
                Ok(None)
            }
            Some(Err(fault)) if fault.passing => Err(ApiError::Unavailable {
                why: format!("{}: {}", self.node, fault.message),
                leader: None,
            }),
            Some(part) => Ok(Some(part)),
            None => Err(unavailable(&self.node, "broke off its answer")),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let mut inner = self
            .desk
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        inner.open.remove(&self.id);
    }
}

fn unavailable(node: &str, why: &str) -> ApiError {
    ApiError::Unavailable {
        why: format!("{node}, which has the files, {why}"),
        leader: None,
    }
}

fn invalid(field: &str, why: &str) -> Status {
    ApiError::Invalid(vec![Fault::new(field, why)]).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_has_his_share_of_transfers_and_leaves_the_others_theirs() {
        let desk = FileDesk::default();
        let share = |caller: &str| {
            (0..TRANSFERS_OF_ONE_MAX)
                .map(|_| desk.transfer(caller))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut held = vec![share("ada").unwrap()];
        let refused = desk.transfer("ada").err().unwrap();
        assert!(refused.to_string().contains("your share"), "{refused}");
        held.extend(
            (1..TRANSFERS_MAX / TRANSFERS_OF_ONE_MAX)
                .map(|other| share(&other.to_string()).unwrap()),
        );
        let refused = desk.transfer("grace").err().unwrap();
        assert!(
            refused.to_string().contains("this replica's room"),
            "{refused}"
        );
        held[0].pop();
        drop(desk.transfer("grace").unwrap());
        assert!(desk.transfer("ada").is_ok());
        drop(held);
        assert!(desk.transfers.lock().unwrap().is_empty());
    }

    #[test]
    fn a_node_is_asked_where_it_was_attended_last_until_that_is_over() {
        let desk = FileDesk::default();
        let question = || FileRequest::default();
        let (first, mut asked_first) = mpsc::channel(1);
        let (second, mut asked_second) = mpsc::channel(1);
        assert!(desk.ask("nodes/a", question()).is_err());
        let earlier = desk.attend("nodes/a", first);
        let later = desk.attend("nodes/a", second);
        drop(earlier);
        assert!(desk.ask("nodes/a", question()).is_ok());
        assert!(asked_first.try_recv().is_err() && asked_second.try_recv().is_ok());
        drop(later);
        assert!(desk.ask("nodes/a", question()).is_err());
    }
}
