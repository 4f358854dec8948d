//! Files of file servers: listed, read and written by the agents of the nodes that serve them. What passes here is not looked into.

use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use batchai_common::limits::{CALL_TIMEOUT, FILE_CHUNK_BYTES_MAX, MESSAGE_BYTES_MAX};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::agent::v1::file_entry;
use batchai_proto::agent::v1::file_request::Kind;
use batchai_proto::agent::v1::{
    AnswerFileResponse, FileEntry, FileFault, FileRequest, FileServerTarget,
};
use batchai_proto::v1::file_server_file::FileType;
use batchai_proto::v1::write_file_server_file_request::Message;
use batchai_proto::v1::{
    FileServerFile, ListFileServerFilesRequest, ListFileServerFilesResponse,
    ReadFileServerFileRequest, ReadFileServerFileResponse, WriteFileServerFileRequest,
    WriteFileServerFileResponse, WriteFileServerFileStart,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::faults::Faults;
use super::files::check_path;
use super::log_request::number;
use super::page::{decode, encode, page_size};
use super::{Api, Replies, draining, internal, not_found};
use crate::agents::files::{Answer, Part, Pieces};
use crate::call::caller;
use crate::state::State;
use crate::state::keys::workspace_of;

/// Pieces that a reader has not taken yet.
const PIECES_MAX: usize = 8;
/// A reader that takes nothing for so long is sent no more, and neither is a node that writes nothing.
const SLOW_MAX: Duration = Duration::from_secs(600);

/// A file on a file server, or a directory.
struct Place {
    server: String,
    path: String,
}

impl Place {
    fn absent(&self, hint: &str) -> ApiError {
        ApiError::NoSuchFile {
            job: self.server.clone(),
            file: self.path.clone(),
            hint: hint.to_owned(),
        }
    }

    fn refused(&self, fault: FileFault) -> ApiError {
        if fault.busy {
            return ApiError::Busy {
                what: "the node's room for files, or for another upload of this very one,",
            };
        }
        match fault.absent {
            true => self.absent(&fault.message),
            false => ApiError::WrongState {
                name: format!("{}: {}", self.server, self.path),
                why: fault.message,
            },
        }
    }
}

impl Api {
    pub(super) async fn list_server_files(
        &self,
        request: ListFileServerFilesRequest,
    ) -> Result<ListFileServerFilesResponse, ApiError> {
        let mut faults = Faults::default();
        let name = faults.name("name", Noun::FileServer, &request.name);
        check_path(&mut faults, "path", &request.path);
        let size = page_size(&mut faults, request.page_size);
        let list = format!("{} {}", request.name, request.path);
        let after = match request.page_token.as_str() {
            "" => String::new(),
            token => decode(&list, token).unwrap_or_else(|| {
                faults.invalid("page_token", "is not one that this list returned");
                String::new()
            }),
        };
        let name = faults.finish(name)?;
        let place = Place {
            server: name.to_string(),
            path: request.path.trim_end_matches('/').to_owned(),
        };
        let question = FileRequest {
            kind: Kind::List as i32,
            after,
            limit: size as i64 + 1,
            ..FileRequest::default()
        };
        let mut answer = self.ask_server(&name, &place, question).await?;
        let mut files = entries(&mut answer, &place, size + 1).await?;
        let more = files.len() > size;
        files.truncate(size);
        let last = files.last().filter(|_| more);
        Ok(ListFileServerFilesResponse {
            next_page_token: last
                .map(|last| encode(&list, &last.name))
                .unwrap_or_default(),
            files: files.into_iter().map(|file| of(&place, file)).collect(),
        })
    }

    pub(super) async fn read_server_file(
        &self,
        request: ReadFileServerFileRequest,
    ) -> Result<Response<Replies<ReadFileServerFileResponse>>, Status> {
        let mut faults = Faults::default();
        let name = faults.name("name", Noun::FileServer, &request.name);
        check_file(&mut faults, "path", &request.path);
        let offset = number(&mut faults, "offset", request.offset);
        let limit = number(&mut faults, "limit", request.limit);
        let name = faults.finish(name)?;
        let place = Place {
            server: name.to_string(),
            path: request.path,
        };
        let permit = self.desk.transfer(&caller().label())?;
        let question = FileRequest {
            kind: Kind::Read as i32,
            offset: offset as i64,
            limit: limit as i64,
            ..FileRequest::default()
        };
        let answer = self.ask_server(&name, &place, question).await?;
        let (outbox, replies) = mpsc::channel(PIECES_MAX);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let end = tokio::select! {
                end = pass_on(answer, &place, &outbox) => end,
                () = outbox.closed() => return,
                () = shutdown.cancelled() => Err(draining()),
            };
            drop(permit);
            if let Err(error) = end {
                say(&outbox, error.into()).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    pub(super) async fn write_server_file(
        &self,
        mut incoming: Streaming<WriteFileServerFileRequest>,
    ) -> Result<Response<Replies<WriteFileServerFileResponse>>, Status> {
        let first = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
        let first = first.map_err(|_| invalid("start", "did not come in time"))??;
        let Some(Message::Start(start)) = first.and_then(|first| first.message) else {
            return Err(invalid("start", "the first message must be a start").into());
        };
        let name = check(&start)?;
        let place = Place {
            server: name.to_string(),
            path: start.path,
        };
        let permit = self.desk.transfer(&caller().label())?;
        let question = FileRequest {
            kind: Kind::Write as i32,
            size_bytes: start.size_bytes,
            sha256: start.sha256,
            executable: start.executable,
            ..FileRequest::default()
        };
        let answer = self.ask_server(&name, &place, question).await?;
        // Both answers: nobody is waited for.
        let (outbox, replies) = mpsc::channel(2);
        let (shutdown, size) = (self.shutdown.clone(), start.size_bytes);
        tokio::spawn(async move {
            let end = tokio::select! {
                end = write(answer, &place, incoming, size, &outbox) => end,
                () = outbox.closed() => return,
                () = shutdown.cancelled() => Err(draining().into()),
            };
            drop(permit);
            if let Err(status) = end {
                say(&outbox, status).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    /// Asks the node that serves a file server.
    async fn ask_server(
        &self,
        name: &Name,
        place: &Place,
        question: FileRequest,
    ) -> Result<Answer, ApiError> {
        // Agents bring their answers to who leads.
        self.replica.must_lead()?;
        let state = self.read().await?;
        let (node, target) = serving(&state, name)?;
        let question = FileRequest {
            id: uuid::Uuid::new_v4().to_string(),
            path: place.path.clone(),
            file_server: Some(target),
            ..question
        };
        self.desk.ask(&node, question)
    }
}

/// The node that serves a file server, and what that needs to know.
fn serving(state: &State, name: &Name) -> Result<(String, FileServerTarget), ApiError> {
    let server = state.file_servers.get(name.as_str());
    let server = server.ok_or_else(|| not_found(Noun::FileServer, name))?;
    let served = server.deleting.is_none() && server.place.is_some();
    let node = server.node.as_ref().filter(|_| served);
    let node = node.ok_or_else(|| ApiError::WrongState {
        name: name.to_string(),
        why: "it is not served now; `batchai file-server show` says why".to_owned(),
    })?;
    let workspace = state.workspaces.get(workspace_of(name.as_str()));
    let target = FileServerTarget {
        name: name.to_string(),
        uid: server.spec.uid.clone(),
        workspace_number: workspace.map_or(0, |workspace| workspace.number),
    };
    Ok((node.clone(), target))
}

/// All entries of an answer, up to so many.
async fn entries(
    answer: &mut Answer,
    place: &Place,
    most: usize,
) -> Result<Vec<FileEntry>, ApiError> {
    let mut files = Vec::new();
    while let Some(part) = answer.next().await? {
        match part {
            Ok(Part::Entries(entries)) => files.extend(entries),
            Ok(_) => return Err(internal("something else than entries came for a list")),
            Err(fault) => return Err(place.refused(fault)),
        }
        let size: usize = files.iter().map(prost::Message::encoded_len).sum();
        if files.len() > most || size > MESSAGE_BYTES_MAX {
            return Err(internal("more came than was asked for"));
        }
    }
    Ok(files)
}

/// An entry with all of its path; one without a name is what was asked for itself.
fn of(place: &Place, file: FileEntry) -> FileServerFile {
    let path = match (place.path.as_str(), file.name.as_str()) {
        ("", name) => name.to_owned(),
        (path, "") => path.to_owned(),
        (path, name) => format!("{path}/{name}"),
    };
    let file_type = match file.kind() {
        file_entry::Kind::File => FileType::File,
        file_entry::Kind::Directory => FileType::Directory,
        file_entry::Kind::Other => FileType::Other,
        // One of an agent that knows more is read by nobody either.
        file_entry::Kind::Unreadable | file_entry::Kind::Unspecified => FileType::Unreadable,
    };
    FileServerFile {
        path,
        file_type: file_type as i32,
        size_bytes: match file_type {
            FileType::File => file.length,
            _ => 0,
        },
        modify_time: file.last_modified,
        executable: file.executable,
    }
}

type Readers = mpsc::Sender<Result<ReadFileServerFileResponse, Status>>;

async fn pass_on(mut answer: Answer, place: &Place, outbox: &Readers) -> Result<(), ApiError> {
    loop {
        let reply = match answer.next().await? {
            Some(Ok(Part::Data(data))) => ReadFileServerFileResponse {
                data,
                ..Default::default()
            },
            Some(Ok(_)) => return Err(internal("something else than bytes came for a file")),
            Some(Err(fault)) => return Err(place.refused(fault)),
            None => {
                let done = std::mem::take(&mut answer.done);
                let end = ReadFileServerFileResponse {
                    size_bytes: done.size_bytes,
                    sha256: done.sha256,
                    ..Default::default()
                };
                return sent(outbox, end).await;
            }
        };
        sent(outbox, reply).await?;
    }
}

async fn sent(outbox: &Readers, reply: ReadFileServerFileResponse) -> Result<(), ApiError> {
    let sent = tokio::time::timeout(SLOW_MAX, outbox.send(Ok(reply))).await;
    // A reader that has gone away is noticed by who has it sent.
    sent.map(drop)
        .map_err(|_| slow("the reader took nothing for too long"))
}

/// Says why it has ended, to who may have gone away or takes nothing.
async fn say<T>(outbox: &mpsc::Sender<Result<T, Status>>, status: Status) {
    let _ = tokio::time::timeout(CALL_TIMEOUT, outbox.send(Err(status))).await;
}

type Writers = mpsc::Sender<Result<WriteFileServerFileResponse, Status>>;

async fn write(
    mut answer: Answer,
    place: &Place,
    incoming: Streaming<WriteFileServerFileRequest>,
    size: i64,
    outbox: &Writers,
) -> Result<(), Status> {
    let (offset, pieces) = match answer.next().await? {
        Some(Ok(Part::Begun(offset, pieces))) if (0..=size).contains(&offset) => (offset, pieces),
        Some(Err(fault)) => return Err(place.refused(fault).into()),
        _ => return Err(internal("it was not said from where to write").into()),
    };
    let tell = |offset, complete| {
        let reply = WriteFileServerFileResponse { offset, complete };
        // The sender may be gone: its stream says so.
        let _ = outbox.try_send(Ok(reply));
    };
    tell(offset, false);
    let early = tokio::select! {
        early = answer.whenever() => Some(early?),
        fed = feed(incoming, size - offset, pieces) => {
            fed?;
            None
        }
    };
    let end = match early {
        Some(early) => early,
        None => answer.next().await?,
    };
    match end {
        None => {
            tell(size, true);
            Ok(())
        }
        Some(Err(fault)) => Err(place.refused(fault).into()),
        Some(Ok(_)) => Err(internal("something came while a file was written").into()),
    }
}

/// Passes on what is to be written: as much as was announced, and no more.
async fn feed(
    mut incoming: Streaming<WriteFileServerFileRequest>,
    mut left: i64,
    pieces: Pieces,
) -> Result<(), Status> {
    while left > 0 {
        let next = tokio::time::timeout(CALL_TIMEOUT, incoming.message()).await;
        let next = next.map_err(|_| invalid("data", "did not come in time"))??;
        let Some(request) = next else {
            return Err(invalid("data", "ended before all of the file was there").into());
        };
        let data = match request.message {
            Some(Message::Data(data)) if (1..=FILE_CHUNK_BYTES_MAX).contains(&data.len()) => data,
            _ => {
                let why = format!("must be pieces of 1 to {FILE_CHUNK_BYTES_MAX} bytes");
                return Err(invalid("data", &why).into());
            }
        };
        left -= data.len() as i64;
        if left < 0 {
            return Err(invalid("data", "is more than was announced").into());
        }
        let sent = pieces.send(Ok(AnswerFileResponse { data }));
        let sent = tokio::time::timeout(SLOW_MAX, sent).await;
        if sent
            .map_err(|_| slow("the node took nothing for too long"))?
            .is_err()
        {
            // It has gone away, or says why it has had enough.
            break;
        }
    }
    Ok(())
}

fn check(start: &WriteFileServerFileStart) -> Result<Name, ApiError> {
    let mut faults = Faults::default();
    let name = faults.name("start.name", Noun::FileServer, &start.name);
    let path = match start.size_bytes {
        // A directory's.
        0 => start.path.trim_end_matches('/'),
        _ => &start.path,
    };
    check_file(&mut faults, "start.path", path);
    number(&mut faults, "start.size_bytes", start.size_bytes);
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if start.sha256.len() != 64 || !start.sha256.bytes().all(digit) {
        let why = "must have 64 hexadecimal digits in lower case";
        faults.invalid("start.sha256", why);
    }
    if start.executable && start.path.ends_with('/') {
        faults.invalid(
            "start.executable",
            "is for files: the path is a directory's",
        );
    }
    faults.finish(name)
}

/// A path that ends with the name of a file.
fn check_file(faults: &mut Faults, field: &str, path: &str) {
    check_path(faults, field, path);
    if matches!(path.rsplit('/').next(), Some("" | ".")) {
        faults.invalid(field, "must end with the name of a file");
    }
}

fn slow(why: &str) -> ApiError {
    ApiError::Unavailable {
        why: why.to_owned(),
        leader: None,
    }
}

fn invalid(field: &str, why: &str) -> ApiError {
    ApiError::Invalid(vec![Fault::new(field, why)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_is_refused_with_all_its_faults() {
        let good = WriteFileServerFileStart {
            name: "resourceGroups/g/workspaces/w/fileServers/f".to_owned(),
            path: "sets/one".to_owned(),
            size_bytes: 0,
            sha256: "0a".repeat(32),
            executable: false,
        };
        assert!(check(&good).is_ok());
        let directory = |path: &str, size_bytes| WriteFileServerFileStart {
            path: path.to_owned(),
            size_bytes,
            ..good.clone()
        };
        assert!(check(&directory("sets/one/", 0)).is_ok());
        for (path, size) in [("sets/one/", 1), ("/", 0), ("sets/./", 0)] {
            assert!(check(&directory(path, size)).is_err(), "{path}");
        }
        for (path, is_good) in [("sets/one", true), ("sets/one/", false)] {
            let start = WriteFileServerFileStart {
                executable: true,
                ..directory(path, 0)
            };
            assert_eq!(check(&start).is_ok(), is_good, "{path}");
        }
        let bad = WriteFileServerFileStart {
            name: "jobs/f".to_owned(),
            path: "../x".to_owned(),
            size_bytes: -1,
            sha256: "0A".repeat(32),
            executable: false,
        };
        let Err(ApiError::Invalid(faults)) = check(&bad) else {
            panic!("it must be refused");
        };
        let fields: Vec<_> = faults.iter().map(|fault| fault.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "start.name",
                "start.path",
                "start.size_bytes",
                "start.sha256"
            ]
        );
        for path in ["", "/a", "a/.", "a/../b", "a\0"] {
            let path = path.to_owned();
            let bad = WriteFileServerFileStart {
                path,
                ..good.clone()
            };
            assert!(check(&bad).is_err(), "{}", bad.path);
        }
    }
}
