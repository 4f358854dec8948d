//! Copies files, some at once.
//!
//! A copy is whole or has another name, here (`part`) and there. What broke off is gone on with, within one command and by the next, and
//! every copy is compared by its SHA-256.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};

use batchai_common::executable;
use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_common::names::hex;
use batchai_proto::v1;
use batchai_proto::v1::write_file_server_file_request::Message;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::part::{self, Part, read_all};
use super::{Copied, Found};
use crate::client::{Client, Retry};
use crate::error::CliError;
use crate::job_files::at;
use crate::output::{shown, shown_lines};

/// Files at once: small ones wait for each other's round trips else.
const AT_ONCE: usize = 4;
const PIECES_MAX: usize = 8;

/// Makes a directory of a file server, where it is absent, with what leads there.
pub async fn make_directory(client: &Client, name: &str, path: &str) -> Result<(), CliError> {
    let start = v1::WriteFileServerFileStart {
        name: name.to_owned(),
        path: format!("{path}/"),
        size_bytes: 0,
        sha256: hex(&Sha256::digest(b"")),
        executable: false,
    };
    let make = async || {
        let start = v1::WriteFileServerFileRequest {
            message: Some(Message::Start(start.clone())),
        };
        let mut servers = client.file_servers();
        let replies = servers.write_file_server_file(tokio_stream::once(start));
        let mut replies = replies.await?.into_inner();
        while let Some(reply) = replies.message().await? {
            if reply.complete {
                return Ok(());
            }
        }
        Err(Status::cancelled("the answer was broken off"))
    };
    let mut retry = Retry::default();
    while let Err(status) = make().await {
        retry.again(status).await?;
    }
    Ok(())
}

/// Copies files, some at once.
#[derive(Clone)]
pub struct Copier {
    client: Client,
    server: String,
    bar: ProgressBar,
}

impl Copier {
    pub fn new(client: &Client, server: String, total: u64) -> Copier {
        let bar = match io::stderr().is_terminal() {
            true => ProgressBar::new(total),
            false => ProgressBar::hidden(),
        };
        let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}";
        let style = ProgressStyle::with_template(template);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Copier {
            client: client.clone(),
            server,
            bar,
        }
    }

    /// Copies all of them that can be.
    ///
    /// # Errors
    /// Some could not be, each of which was said; or one that was the only one; or what would meet all of them, such as a coordinator
    /// that is gone: then the rest is not tried.
    pub async fn all<F>(
        &self,
        found: Found,
        copy: impl Fn(Copier, Copied) -> F,
    ) -> Result<(), CliError>
    where
        F: Future<Output = Result<String, CliError>> + Send + 'static,
    {
        let total = found.files.len() + found.failed;
        let (mut files, mut running) = (found.files.into_iter(), JoinSet::new());
        let (mut failed, mut end) = (found.failed, Ok(()));
        while end.is_ok() {
            while running.len() < AT_ONCE
                && let Some(file) = files.next()
            {
                let path = shown(&file.path);
                let copied = copy(self.clone(), file);
                running.spawn(async move { (path, copied.await) });
            }
            let Some(done) = running.join_next().await else {
                break;
            };
            match done.map_err(io::Error::other)? {
                (_, Ok(said)) => self.bar.suspend(|| say!("{said}")),
                (path, Err(error)) if total > 1 && is_of_one(&error) => {
                    failed += 1;
                    let error = shown_lines(&error.to_string());
                    self.bar.suspend(|| say!("batchai: {path}: {error}"));
                }
                (_, Err(error)) => end = Err(error),
            }
        }
        self.bar.finish_and_clear();
        end?;
        match failed {
            0 => Ok(()),
            failed => Err(CliError::Failed(format!("{failed} of {total} failed"))),
        }
    }

    pub async fn upload(self, file: Copied) -> Result<String, CliError> {
        self.bar.set_message(shown(&file.path));
        if let Some(directory) = file.path.strip_suffix('/') {
            make_directory(&self.client, &self.server, directory).await?;
            return Ok(format!("{}: an empty directory", shown(&file.path)));
        }
        let local = file.local.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let mut opened = File::open(&local).map_err(at(&local))?;
            let mut hash = Sha256::new();
            let size = read_all(&mut opened, &mut hash).map_err(at(&local))?;
            Ok::<_, CliError>((opened, size, hex(&hash.finalize())))
        });
        let (opened, size, sha256) = looked.await.map_err(io::Error::other)??;
        let start = v1::WriteFileServerFileStart {
            name: self.server.clone(),
            path: file.path.clone(),
            size_bytes: size as i64,
            sha256,
            executable: file.executable,
        };
        let (mut retry, mut sent, mut furthest) = (Retry::patient(), 0, None);
        let there = loop {
            let again = opened.try_clone().map_err(at(&file.local))?;
            match self.send(start.clone(), again, &mut sent).await {
                Ok(there) => break there,
                Err((Some(offset), status)) => {
                    // It gets on: whoever brings it may go and come as often as need be.
                    if furthest.is_some_and(|furthest| offset > furthest) {
                        retry.reset();
                    }
                    furthest = furthest.max(Some(offset));
                    retry.again(status).await?;
                }
                Err((None, status)) => retry.again(status).await?,
            }
        };
        self.bar.inc(file.size.saturating_sub(sent));
        let path = shown(&file.path);
        Ok(match there == size && sent == 0 && size > 0 {
            true => format!("{path}: {size} bytes, all there already"),
            false => format!("{path}: {size} bytes, {sent} of them sent"),
        })
    }

    /// Sends what is missing of a file; how much was not. An error comes with that as well, where it is known.
    async fn send(
        &self,
        start: v1::WriteFileServerFileStart,
        mut file: File,
        sent: &mut u64,
    ) -> Result<u64, (Option<u64>, Status)> {
        let size = start.size_bytes as u64;
        let none = |status| (None, status);
        let message = |message| v1::WriteFileServerFileRequest {
            message: Some(message),
        };
        let (sender, messages) = mpsc::channel(PIECES_MAX);
        // The channel has room: nothing was sent yet.
        let _ = sender.try_send(message(Message::Start(start)));
        let mut servers = self.client.file_servers();
        let replies = servers.write_file_server_file(ReceiverStream::new(messages));
        let mut replies = replies.await.map_err(none)?.into_inner();
        let first = replies.message().await.map_err(none)?;
        let offset = first.ok_or_else(|| none(broken()))?.offset as u64;
        let bar = self.bar.clone();
        let reader = tokio::task::spawn_blocking(move || {
            let mut sent = 0;
            file.seek(SeekFrom::Start(offset))?;
            // What it has grown by since is not what was announced.
            let mut file = file.take(size.saturating_sub(offset));
            loop {
                let mut piece = vec![0; FILE_CHUNK_BYTES_MAX];
                let read = file.read(&mut piece)?;
                piece.truncate(read);
                // Who does not want more says why in its answer.
                let data = message(Message::Data(piece.into()));
                if read == 0 || sender.blocking_send(data).is_err() {
                    return io::Result::Ok(sent);
                }
                sent += read as u64;
                bar.inc(read as u64);
            }
        });
        let last = replies.message().await;
        drop(replies);
        let read = reader.await.map_err(io::Error::other).and_then(|read| read);
        let known = |status| (Some(offset), status);
        *sent +=
            read.map_err(|error| known(Status::aborted(format!("it cannot be read: {error}"))))?;
        match last.map_err(known)? {
            Some(last) if last.complete => Ok(offset),
            _ => Err(known(broken())),
        }
    }

    pub async fn download(self, file: Copied) -> Result<String, CliError> {
        self.bar.set_message(shown(&file.path));
        let path = shown(&file.local.to_string_lossy());
        if self.is_there(&file).await? {
            self.bar.inc(file.size);
            return Ok(format!("{path}: {} bytes, all there already", file.size));
        }
        if let Some(dir) = file.local.parent() {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        let mut part = Part::open(&file.local, &format!("{}/{}", self.server, file.path))?;
        let (size, came) = match self.fetch(&file, part.file()).await {
            Ok(fetched) => fetched,
            Err(error) => {
                part.leave();
                return Err(error);
            }
        };
        let is_set = part.whole(&file.local, file.executable)?;
        self.bar.inc(size.saturating_sub(came));
        let but = match is_set {
            true => "",
            false => "; whether it is a program cannot be set here",
        };
        Ok(format!(
            "{path}: {size} bytes, {came} of them received{but}"
        ))
    }

    /// Fetches what is missing of a file until it is whole; its size, and how much of that came.
    async fn fetch(&self, file: &Copied, opened: &mut File) -> Result<(u64, u64), CliError> {
        let (mut retry, mut came) = (Retry::patient(), 0);
        loop {
            let before = came;
            match self.receive(file, opened, &mut came).await {
                Ok(Some(size)) => return Ok((size, came)),
                // What was there is of another file: all of it is asked for.
                Ok(None) => opened.set_len(0).map_err(at(&file.local))?,
                Err(CliError::Refused(status)) => {
                    if came > before {
                        retry.reset();
                    }
                    retry.again(*status).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the very file lies here already: a regular one of its size and, as the node says, its content.
    async fn is_there(&self, file: &Copied) -> Result<bool, CliError> {
        let (local, size) = (file.local.clone(), file.size);
        let looked = tokio::task::spawn_blocking(move || part::digest_of(&local, size));
        // What cannot be read is fetched, and it turns out then whether it can be replaced.
        let Ok(Some((opened, sha256))) = looked.await.map_err(io::Error::other)? else {
            return Ok(false);
        };
        let mut retry = Retry::patient();
        let same = loop {
            match self.compare(file, &sha256).await {
                Ok(same) => break same,
                Err(status) => retry.again(status).await?,
            }
        };
        // Where its mode may not be changed another one is put in its place.
        Ok(same && executable::set(&opened, file.executable).is_ok())
    }

    /// Whether a file has this content there. Behind its end there is nothing but its digest.
    async fn compare(&self, file: &Copied, sha256: &str) -> Result<bool, Status> {
        let mut replies = self.read(file, file.size).await?;
        while let Some(reply) = replies.message().await? {
            if !reply.sha256.is_empty() {
                return Ok(reply.size_bytes as u64 == file.size && reply.sha256 == sha256);
            }
            if !reply.data.is_empty() {
                return Ok(false);
            }
        }
        Err(broken())
    }

    async fn read(
        &self,
        file: &Copied,
        offset: u64,
    ) -> Result<Streaming<v1::ReadFileServerFileResponse>, Status> {
        let read = v1::ReadFileServerFileRequest {
            name: self.server.clone(),
            path: file.path.clone(),
            offset: offset as i64,
            limit: 0,
        };
        let mut servers = self.client.file_servers();
        Ok(servers.read_file_server_file(read).await?.into_inner())
    }

    /// Receives what is missing; its size where it is whole, none where it is not what lies there. Counts what came.
    async fn receive(
        &self,
        file: &Copied,
        opened: &mut File,
        came: &mut u64,
    ) -> Result<Option<u64>, CliError> {
        let mut again = opened.try_clone().map_err(at(&file.local))?;
        // It shares its place in the file with the other one.
        let looked = tokio::task::spawn_blocking(move || {
            let mut hash = Sha256::new();
            let offset = read_all(&mut again, &mut hash)?;
            io::Result::Ok((offset, hash))
        });
        let looked = looked.await.map_err(io::Error::other).and_then(|l| l);
        let (offset, mut hash) = looked.map_err(at(&file.local))?;
        let mut size = offset;
        let mut replies = self.read(file, offset).await?;
        while let Some(reply) = replies.message().await? {
            if !reply.sha256.is_empty() {
                let whole =
                    reply.size_bytes as u64 == size && reply.sha256 == hex(&hash.finalize());
                if !whole && offset == 0 {
                    let why = "what came has another SHA-256 than what lies there";
                    return Err(CliError::Failed(format!("{}: {why}", file.path)));
                }
                return Ok(whole.then_some(size));
            }
            hash.update(&reply.data);
            opened.write_all(&reply.data).map_err(at(&file.local))?;
            let length = reply.data.len() as u64;
            size += length;
            *came += length;
            self.bar.inc(length);
        }
        Err(broken().into())
    }
}

fn broken() -> Status {
    Status::cancelled("the answer was broken off")
}

/// Whether an error is of one file: with another one it may go well.
pub fn is_of_one(error: &CliError) -> bool {
    let of_one = |code| {
        use Code::{Aborted, FailedPrecondition, InvalidArgument, NotFound};
        matches!(
            code,
            Aborted | FailedPrecondition | InvalidArgument | NotFound
        )
    };
    match error {
        CliError::Refused(status) => of_one(status.code()),
        CliError::File { .. } | CliError::Failed(_) => true,
        _ => false,
    }
}
