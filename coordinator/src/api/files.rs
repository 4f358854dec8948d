//! Files of jobs: logs from this replica's store, output directories from the nodes that have them.

use std::time::{Duration, SystemTime};

use batchai_common::error::ApiError;
use batchai_common::limits::MESSAGE_BYTES_MAX;
use batchai_common::names::{Kind as Noun, Name};
use batchai_common::time::from_millis;
use batchai_proto::agent::v1::file_request::Kind;
use batchai_proto::agent::v1::{FileEntry, FileFault, FileRequest, file_entry};
use batchai_proto::v1::job_file::FileType;
use batchai_proto::v1::stream_job_logs_response::End;
use batchai_proto::v1::{
    JobFile, ListJobFilesRequest, ListJobFilesResponse, StreamJobLogsRequest, StreamJobLogsResponse,
};
use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::Status;

use super::faults::Faults;
use super::page::{decode, encode, page_size};
use super::{Api, internal, log_request};
use crate::agents::files::Part;
use crate::logs::{self, Listed, is_whole};
use crate::state::State;
use crate::state::assignments::for_files;
use crate::state::attempts::Attempt;

/// The directory of logs.
const STDOUTERR: &str = "stdouterr";
const PATH_BYTES_MAX: usize = 4096;
/// A file in an output directory that is followed is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// So much of such a file is asked for at a time, and is here before it is passed on: a slow reader holds up nobody who
/// asks the same node.
const RANGE_BYTES: u64 = 1 << 20;
/// A reader that takes nothing for so long is sent no more.
const SLOW_MAX: Duration = Duration::from_secs(600);

type Outbox = mpsc::Sender<Result<StreamJobLogsResponse, Status>>;

/// Whose file is asked for.
struct Place {
    job: String,
    /// An output directory; none for logs.
    directory: Option<String>,
    node: Option<String>,
}

impl Place {
    fn check(faults: &mut Faults, name: &str, directory: &str, node: &str) -> Option<Place> {
        let job = faults.name("name", Noun::Job, name);
        let node = match node {
            "" => None,
            node => faults.name("node", Noun::Node, node),
        };
        let directory = match directory {
            "" | STDOUTERR => None,
            directory => {
                faults.text("directory", directory, true);
                Some(directory.to_owned())
            }
        };
        Some(Place {
            job: job?.into(),
            directory,
            node: node.map(Name::into),
        })
    }
}

impl Api {
    pub(super) async fn list_files(
        &self,
        request: ListJobFilesRequest,
    ) -> Result<ListJobFilesResponse, ApiError> {
        let mut faults = Faults::default();
        let place = Place::check(
            &mut faults,
            &request.name,
            &request.directory,
            &request.node,
        );
        check_path(&mut faults, "path", &request.path);
        let size = page_size(&mut faults, request.page_size);
        let list = format!(
            "{} {} {} {}",
            request.name, request.directory, request.path, request.node
        );
        let after = match request.page_token.as_str() {
            "" => String::new(),
            token => decode(&list, token).unwrap_or_else(|| {
                faults.invalid("page_token", "is not one that this list returned");
                String::new()
            }),
        };
        let place = faults.finish(place)?;
        let state = self.read().await?;
        let (mut files, key): (_, fn(&JobFile) -> String) = match &place.directory {
            None if request.path.is_empty() => {
                let found = self.list_logs(&state, &place).await?;
                // In the order of the list: nothing sorts before the character between them.
                let key = |file: &JobFile| format!("{}\0{}", file.name, file.node);
                let behind = found.into_iter().filter(|file| key(file) > after);
                (behind.take(size + 1).collect::<Vec<_>>(), key)
            }
            None => {
                let mut faults = Faults::default();
                faults.invalid("path", "must be left out: logs lie in one directory");
                return Err(faults.refuse());
            }
            Some(directory) => {
                let question = FileRequest {
                    directory: directory.clone(),
                    path: request.path,
                    kind: Kind::List as i32,
                    after,
                    limit: size as i64 + 1,
                    ..Default::default()
                };
                (self.list_outputs(&state, &place, question).await?, |file| {
                    file.name.clone()
                })
            }
        };
        let more = files.len() > size;
        files.truncate(size);
        let last = files.last().filter(|_| more);
        let next_page_token = last
            .map(|last| encode(&list, &key(last)))
            .unwrap_or_default();
        Ok(ListJobFilesResponse {
            files,
            next_page_token,
        })
    }

    async fn list_logs(&self, state: &State, place: &Place) -> Result<Vec<JobFile>, ApiError> {
        let attempt = attempt_of(state, &place.job)?;
        let Some(attempt) = attempt else {
            return Ok(Vec::new());
        };
        let found = self.logs.files(&attempt.id).await.map_err(internal)?;
        if !is_whole(attempt, &found) {
            // The leader has what is not copied yet, or written still.
            self.replica.must_lead()?;
        }
        let node = |listed: &Listed| format!("nodes/{}", listed.node_id);
        let asked = |listed: &Listed| place.node.as_ref().is_none_or(|n| *n == node(listed));
        let found = found.into_iter().filter(asked);
        let files = found.map(|listed| JobFile {
            node: node(&listed),
            name: listed.file,
            file_type: FileType::File as i32,
            content_length: listed.length as i64,
            last_modified: Some(timestamp(listed.modified)),
        });
        Ok(files.collect())
    }

    async fn list_outputs(
        &self,
        state: &State,
        place: &Place,
        question: FileRequest,
    ) -> Result<Vec<JobFile>, ApiError> {
        let path = question.path.clone();
        let most = usize::try_from(question.limit).unwrap_or_default();
        let (node, question) = address(state, place, question)?;
        let mut answer = self.desk.ask(&node, question)?;
        let mut files = Vec::new();
        while let Some(part) = answer.next().await? {
            match part {
                Ok(Part::Entries(entries)) => {
                    files.extend(entries.into_iter().map(|entry| of(entry, &node)));
                    let size = files.iter().map(prost::Message::encoded_len).sum::<usize>();
                    if files.len() > most || size > MESSAGE_BYTES_MAX {
                        return Err(internal("more came than was asked for"));
                    }
                }
                Ok(_) => return Err(internal("something else than entries came for a list")),
                Err(fault) => return Err(refused(place, &path, fault)),
            }
        }
        Ok(files)
    }

    /// Sends a file into the outbox, up to its end message or an error.
    pub(super) async fn stream_file(&self, request: StreamJobLogsRequest, outbox: Outbox) {
        if matches!(request.directory.as_str(), "" | STDOUTERR) {
            match log_request::check(request) {
                Ok(read) => {
                    return logs::read(self.replica.clone(), self.logs.clone(), read, outbox).await;
                }
                Err(error) => return say(error, &outbox).await,
            }
        }
        let end = match Stream::check(&request) {
            Ok(stream) => tokio::select! {
                end = self.stream_output(stream, &outbox) => end,
                () = outbox.closed() => return,
            },
            Err(error) => Err(error),
        };
        if let Err(error) = end {
            say(error, &outbox).await;
        }
    }

    /// A file of an output directory: asked for again and again, each time from where it ended, while it is followed.
    async fn stream_output(&self, mut stream: Stream, outbox: &Outbox) -> Result<(), ApiError> {
        loop {
            // In this order: what an ended job has written was there before it was looked at.
            let state = self.read().await?;
            let job = state.jobs.get(stream.place.job.as_str());
            let ended = job.is_none_or(|job| job.ended());
            let sent = match attempt_of(&state, &stream.place.job)? {
                Some(attempt) if stream.is_another(&attempt.id) => {
                    // The file of the next attempt is another file.
                    return end(&stream, End::Truncated, outbox).await;
                }
                Some(attempt) => {
                    stream.attempt.clone_from(&attempt.id);
                    self.send_range(&state, &mut stream, outbox).await
                }
                None => Err(absent(&stream.place, &stream.path, "the job has not begun")),
            };
            let wait = stream.follow && !ended && !stream.is_full();
            match sent {
                Ok(Sent::Range) if !stream.is_full() => continue,
                Ok(_) if wait => {}
                Err(ApiError::NoSuchFile { .. }) if wait => {}
                Ok(_) if ended && !stream.is_full() => {
                    return end(&stream, End::Complete, outbox).await;
                }
                Ok(_) => return end(&stream, End::NotFollowed, outbox).await,
                Err(error) => return Err(error),
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Sends what there is behind the stream's offset, a range at most.
    async fn send_range(
        &self,
        state: &State,
        stream: &mut Stream,
        outbox: &Outbox,
    ) -> Result<Sent, ApiError> {
        let wanted = stream.left.unwrap_or(u64::MAX).min(RANGE_BYTES);
        let question = FileRequest {
            directory: stream.place.directory.clone().unwrap_or_default(),
            path: stream.path.clone(),
            kind: Kind::Read as i32,
            offset: stream.offset as i64,
            limit: wanted as i64,
            ..Default::default()
        };
        let (node, question) = address(state, &stream.place, question)?;
        stream.node.clone_from(&node);
        let mut answer = self.desk.ask(&node, question)?;
        let (mut pieces, mut size) = (Vec::new(), 0);
        while let Some(part) = answer.next().await? {
            match part {
                Ok(Part::Data(data)) => {
                    size += data.len() as u64;
                    if size > wanted {
                        return Err(internal("more came than was asked for"));
                    }
                    pieces.push(data);
                }
                Ok(_) => return Err(internal("something else than bytes came for a file")),
                Err(fault) => return Err(refused(&stream.place, &stream.path, fault)),
            }
        }
        for data in pieces {
            let length = data.len() as u64;
            send(stream.message(data, End::Unspecified), outbox).await?;
            stream.offset += length;
            stream.left = stream.left.map(|left| left.saturating_sub(length));
        }
        match size == wanted {
            true => Ok(Sent::Range),
            false => Ok(Sent::Rest),
        }
    }
}

/// An entry of a node's directory.
fn of(entry: FileEntry, node: &str) -> JobFile {
    let file_type = match entry.kind() {
        file_entry::Kind::Directory => FileType::Directory,
        _ => FileType::File,
    };
    JobFile {
        name: entry.name,
        file_type: file_type as i32,
        content_length: entry.length,
        last_modified: entry.last_modified,
        node: node.to_owned(),
    }
}

/// How much was sent.
enum Sent {
    /// As much as is asked for at a time: there may be more.
    Range,
    /// All that there is now.
    Rest,
}

async fn send(piece: StreamJobLogsResponse, outbox: &Outbox) -> Result<(), ApiError> {
    match tokio::time::timeout(SLOW_MAX, outbox.send(Ok(piece))).await {
        // A reader that has gone away is noticed by who sends.
        Ok(_) => Ok(()),
        Err(_) => Err(ApiError::Unavailable {
            why: "the reader took nothing for too long".to_owned(),
            leader: None,
        }),
    }
}

async fn say(error: ApiError, outbox: &Outbox) {
    // The reader may have gone away in this very moment.
    let _ = outbox.send(Err(error.into())).await;
}

async fn end(stream: &Stream, end: End, outbox: &Outbox) -> Result<(), ApiError> {
    send(stream.message(Bytes::new(), end), outbox).await
}

/// A file that is being sent.
struct Stream {
    place: Place,
    path: String,
    offset: u64,
    /// How much is still wanted; all of it where there is no bound.
    left: Option<u64>,
    follow: bool,
    attempt: String,
    node: String,
}

impl Stream {
    fn check(request: &StreamJobLogsRequest) -> Result<Stream, ApiError> {
        let mut faults = Faults::default();
        let place = Place::check(
            &mut faults,
            &request.name,
            &request.directory,
            &request.node,
        );
        faults.text("file", &request.file, true);
        check_path(&mut faults, "file", &request.file);
        log_request::refuse_what_is_of_logs(&mut faults, request);
        let offset = log_request::number(&mut faults, "offset", request.offset);
        let length = log_request::number(&mut faults, "length", request.length);
        Ok(Stream {
            place: faults.finish(place)?,
            path: request.file.clone(),
            offset,
            left: Some(length).filter(|length| *length > 0),
            follow: request.follow,
            attempt: String::new(),
            node: String::new(),
        })
    }

    /// Whether bytes of a file of another attempt were sent already.
    fn is_another(&self, attempt: &str) -> bool {
        !self.attempt.is_empty() && self.attempt != attempt
    }

    fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    fn message(&self, data: Bytes, end: End) -> StreamJobLogsResponse {
        StreamJobLogsResponse {
            node: self.node.clone(),
            attempt: self.attempt.clone(),
            offset: self.offset as i64,
            data,
            end: end as i32,
            file: self.path.clone(),
            ..Default::default()
        }
    }
}

pub(super) fn check_path(faults: &mut Faults, field: &str, path: &str) {
    let climbs = path.split('/').any(|part| part == "..");
    if path.len() > PATH_BYTES_MAX || path.contains('\0') || path.starts_with('/') || climbs {
        faults.invalid(field, "must be a relative path without `..`");
    }
}

fn attempt_of<'a>(state: &'a State, job: &str) -> Result<Option<&'a Attempt>, ApiError> {
    let found = state.jobs.get(job).ok_or_else(|| ApiError::NotFound {
        kind: Noun::Job,
        name: job.to_owned(),
    })?;
    let attempt = found.attempt.as_ref().and_then(|id| state.attempts.get(id));
    Ok(attempt.map(|attempt| &**attempt))
}

/// Which node to ask, and the question with everything that it needs to know.
fn address(
    state: &State,
    place: &Place,
    question: FileRequest,
) -> Result<(String, FileRequest), ApiError> {
    let attempt = attempt_of(state, &place.job)?;
    let attempt = attempt.ok_or_else(|| absent(place, &question.path, "the job has not begun"))?;
    let known = &attempt.spec.output_directories;
    if !known
        .iter()
        .any(|directory| directory.id == question.directory)
    {
        let mut ids: Vec<_> = known
            .iter()
            .map(|directory| directory.id.as_str())
            .collect();
        ids.insert(0, STDOUTERR);
        let hint = format!("the job's directories are {}", ids.join(", "));
        return Err(absent(place, &question.path, &hint));
    }
    let mut nodes = attempt.nodes.iter().map(|n| n.node.as_str());
    let node = match &place.node {
        Some(node) => nodes.find(|n| n == node),
        None => nodes.next(),
    };
    let node =
        node.ok_or_else(|| absent(place, &question.path, "that node has no part in the job"))?;
    let question = FileRequest {
        id: uuid::Uuid::new_v4().to_string(),
        attempt: for_files(state, attempt, node),
        ..question
    };
    Ok((node.to_owned(), question))
}

fn absent(place: &Place, path: &str, hint: &str) -> ApiError {
    let directory = place.directory.as_deref().unwrap_or(STDOUTERR);
    ApiError::NoSuchFile {
        job: place.job.clone(),
        file: format!("{directory}/{path}"),
        hint: hint.to_owned(),
    }
}

fn refused(place: &Place, path: &str, fault: FileFault) -> ApiError {
    match fault.absent {
        true => absent(place, path, &fault.message),
        false => ApiError::WrongState {
            name: place.job.clone(),
            why: fault.message,
        },
    }
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    from_millis(since.map_or(0, |since| since.as_millis() as i64))
}
