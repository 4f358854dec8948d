//! The files of file servers: listed, and copied both ways.
//!
//! A copy is whole or has another name: `.NAME.part` here, and one of the node's choosing there. What broke off is gone on with, within
//! one command and by the next, and every copy is compared by its SHA-256.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use batchai_common::limits::FILE_CHUNK_BYTES_MAX;
use batchai_common::names::hex;
use batchai_proto::v1;
use batchai_proto::v1::write_file_server_file_request::Message;
use indicatif::{ProgressBar, ProgressStyle};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::args;
use crate::client::{Client, Retry, request};
use crate::context::Context;
use crate::error::CliError;
use crate::job_files::{at, join, safe};
use crate::output::View;
use crate::resources::{Done, all_pages};

/// Directories below each other that are copied.
const DEPTH_MAX: usize = 100;
/// Files at once: small ones wait for each other's round trips else.
const AT_ONCE: usize = 4;
const PIECES_MAX: usize = 8;
const BUFFER_BYTES: usize = 256 << 10;

const FILE: View<v1::FileServerFile> = View {
    message: "FileServerFile",
    columns: &["Path", "Type", "Size", "Modified"],
    row: |f| {
        let whole = |time: prost_types::Timestamp| prost_types::Timestamp { nanos: 0, ..time };
        let modified = f.modify_time.map(|time| whole(time).to_string());
        let kind = if f.is_directory { "directory" } else { "file" };
        vec![
            f.path.clone(),
            kind.to_owned(),
            f.size_bytes.to_string(),
            modified.unwrap_or_default(),
        ]
    },
};

pub async fn run(command: args::ServerFile, client: &Client, context: &Context) -> Done {
    let server = |of: &args::OfServer| context.file_server(&of.name, &of.parent);
    match command {
        args::ServerFile::List { of, path } => {
            let found = list(client, &server(&of)?, &path).await?;
            context.printer.list(&FILE, &found)?;
        }
        args::ServerFile::Download { of, path, to } => {
            let server = server(&of)?;
            let files = below(client, &server, &path, &to).await?;
            let total = files.iter().map(|file| file.size).sum();
            let copier = Copier::new(client, server, total);
            copier.all(files, Copier::download).await?;
        }
        args::ServerFile::Upload { of, local, path } => {
            let path = path.trim_matches('/');
            let found = tokio::task::spawn_blocking({
                let path = path.to_owned();
                move || gather(&local, &path)
            });
            let files = found.await.map_err(io::Error::other)??;
            let total = files.iter().map(|file| file.size).sum();
            let copier = Copier::new(client, server(&of)?, total);
            copier.all(files, Copier::upload).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(
    client: &Client,
    name: &str,
    path: &str,
) -> Result<Vec<v1::FileServerFile>, CliError> {
    let mut servers = client.file_servers();
    let list = v1::ListFileServerFilesRequest {
        name: name.to_owned(),
        path: path.trim_matches('/').to_owned(),
        page_size: 1000,
        ..Default::default()
    };
    Ok(all_pages!(servers.list_file_server_files, list, files))
}

/// Makes a directory of a file server, where it is absent, with what leads there.
pub async fn make_directory(client: &Client, name: &str, path: &str) -> Result<(), CliError> {
    let start = v1::WriteFileServerFileStart {
        name: name.to_owned(),
        path: format!("{path}/"),
        size_bytes: 0,
        sha256: hex(&Sha256::digest(b"")),
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

/// A file to copy.
struct Copied {
    local: PathBuf,
    path: String,
    size: u64,
}

/// The files at a path of a file server, and where each goes here: below the last part of the path.
async fn below(
    client: &Client,
    server: &str,
    path: &str,
    to: &Path,
) -> Result<Vec<Copied>, CliError> {
    let path = path.trim_matches('/');
    let to = match path {
        "" => to.to_owned(),
        path => to.join(safe(path)?),
    };
    let (mut files, mut open) = (Vec::new(), vec![(path.to_owned(), to, 0)]);
    while let Some((path, to, depth)) = open.pop() {
        if depth > DEPTH_MAX {
            let why = format!("{path}: more than {DEPTH_MAX} directories below each other");
            return Err(CliError::Failed(why));
        }
        for file in list(client, server, &path).await? {
            let local = match file.path == path {
                true => to.clone(),
                false => to.join(safe(&file.path)?),
            };
            match file.is_directory {
                true => open.push((file.path, local, depth + 1)),
                false => files.push(Copied {
                    local,
                    path: file.path,
                    size: u64::try_from(file.size_bytes).unwrap_or_default(),
                }),
            }
        }
    }
    Ok(files)
}

/// The files of this machine, and where each goes there.
fn gather(local: &[PathBuf], path: &str) -> Result<Vec<Copied>, CliError> {
    let (mut files, mut open) = (Vec::new(), Vec::new());
    for given in local {
        // What a link leads to that was named itself is sent, under the link's name.
        let metadata = fs::metadata(given).map_err(at(given))?;
        let whole = fs::canonicalize(given).map_err(at(given))?;
        let name = given.file_name().or(whole.file_name());
        let name = name
            .and_then(|name| name.to_str())
            .ok_or_else(|| unnamed(given))?;
        open.push((whole.clone(), join(path, name), metadata, 0));
    }
    open.reverse();
    while let Some((local, path, metadata, depth)) = open.pop() {
        if depth > DEPTH_MAX {
            let why = format!("{path}: more than {DEPTH_MAX} directories below each other");
            return Err(CliError::Failed(why));
        }
        if metadata.is_file() {
            let size = metadata.len();
            files.push(Copied { local, path, size });
            continue;
        }
        if !metadata.is_dir() {
            say!("batchai: {}: not sent: it is no file", local.display());
            continue;
        }
        let entries = fs::read_dir(&local).map_err(at(&local))?;
        let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name())).collect();
        let mut names = names.map_err(at(&local))?;
        names.sort();
        for name in names.iter().rev() {
            let inside = local.join(name);
            let metadata = fs::symlink_metadata(&inside).map_err(at(&inside))?;
            let name = name.to_str().ok_or_else(|| unnamed(&inside))?;
            open.push((inside, join(&path, name), metadata, depth + 1));
        }
    }
    Ok(files)
}

fn unnamed(path: &Path) -> CliError {
    CliError::Failed(format!("{}: its name is not UTF-8", path.display()))
}

/// Copies files, some at once.
#[derive(Clone)]
struct Copier {
    client: Client,
    server: String,
    bar: ProgressBar,
}

impl Copier {
    fn new(client: &Client, server: String, total: u64) -> Copier {
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

    /// Copies all of them, or up to the first that fails.
    async fn all<F>(
        &self,
        files: Vec<Copied>,
        copy: impl Fn(Copier, Copied) -> F,
    ) -> Result<(), CliError>
    where
        F: Future<Output = Result<String, CliError>> + Send + 'static,
    {
        let (mut files, mut running) = (files.into_iter(), JoinSet::new());
        loop {
            while running.len() < AT_ONCE
                && let Some(file) = files.next()
            {
                running.spawn(copy(self.clone(), file));
            }
            let Some(done) = running.join_next().await else {
                break;
            };
            let said = done.map_err(io::Error::other)??;
            self.bar.suspend(|| say!("{said}"));
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    async fn upload(self, file: Copied) -> Result<String, CliError> {
        self.bar.set_message(file.path.clone());
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
        };
        let (mut retry, mut sent, mut furthest) = (Retry::default(), 0, None);
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
        let path = file.path.escape_debug();
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
        let broken = || Status::cancelled("the answer was broken off");
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

    async fn download(self, file: Copied) -> Result<String, CliError> {
        self.bar.set_message(file.path.clone());
        let failed = at(&file.local);
        let name = file.local.file_name().unwrap_or_default().to_string_lossy();
        let part = file.local.with_file_name(format!(".{name}.part"));
        if let Some(dir) = part.parent() {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        let mut open = File::options();
        let open = open.read(true).write(true).create(true).truncate(false);
        let opened = open.open(&part).map_err(at(&part))?;
        let locked = Flock::lock(opened, FlockArg::LockExclusiveNonblock);
        let mut opened = locked.map_err(|(_, error)| {
            let why = format!("another download writes it: {error}");
            at(&part)(io::Error::other(why))
        })?;
        let (mut retry, mut came) = (Retry::default(), 0);
        let (size, known) = loop {
            let before = came;
            match self.receive(&file, &mut opened, &mut came).await {
                Ok(Some(size)) => break (size, size.saturating_sub(came)),
                // What was there is of another file: all of it is asked for.
                Ok(None) => opened.set_len(0).map_err(at(&part))?,
                Err(CliError::Refused(status)) => {
                    if came > before {
                        retry.reset();
                    }
                    retry.again(*status).await?;
                }
                Err(error) => return Err(error),
            }
        };
        opened.sync_all().map_err(at(&part))?;
        fs::rename(&part, &file.local).map_err(failed)?;
        self.bar.inc(known);
        let path = file.local.to_string_lossy();
        let path = path.escape_debug();
        Ok(format!("{path}: {size} bytes, {came} of them received"))
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
        let read = v1::ReadFileServerFileRequest {
            name: self.server.clone(),
            path: file.path.clone(),
            offset: offset as i64,
            limit: 0,
        };
        let mut size = offset;
        let mut replies = self
            .client
            .file_servers()
            .read_file_server_file(read)
            .await?
            .into_inner();
        while let Some(reply) = replies.message().await? {
            if !reply.sha256.is_empty() {
                let whole =
                    reply.size_bytes as u64 == size && reply.sha256 == hex(&hash.finalize());
                if !whole && offset == 0 {
                    let why = format!(
                        "{}: what came has another SHA-256 than what lies there",
                        file.path
                    );
                    return Err(CliError::Failed(why));
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
        Err(Status::cancelled("the answer was broken off").into())
    }
}

/// Takes all of a file into a digest; how much that is. It stands at its end then.
fn read_all(file: &mut File, hash: &mut Sha256) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let (mut buffer, mut size) = (vec![0; BUFFER_BYTES], 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(size);
        }
        hash.update(&buffer[..read]);
        size += read as u64;
    }
}
