//! The files of file servers: listed, and copied both ways (`copy`).
//!
//! What cannot be copied is said with its name, the rest is copied all the same, and the command fails at its end. Links and what is
//! neither file nor directory are said and left out, and so is what came so far of files that are not whole yet.

mod copy;
mod part;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use batchai_common::{executable, parts};
use batchai_proto::v1;
use batchai_proto::v1::file_server_file::FileType;

use crate::args;
use crate::client::{Client, Retry, request};
use crate::context::Context;
use crate::error::CliError;
use crate::job_files::{at, join, safe};
use crate::output::{View, shown, shown_lines};
use crate::resources::Done;
use copy::Copier;

pub use copy::make_directory;

/// Directories below each other that are copied.
const DEPTH_MAX: usize = 100;

const FILE: View<v1::FileServerFile> = View {
    message: "FileServerFile",
    columns: &["Path", "Type", "Size", "Modified"],
    row: |f| {
        let whole = |time: prost_types::Timestamp| prost_types::Timestamp { nanos: 0, ..time };
        let modified = f.modify_time.map(|time| whole(time).to_string());
        let (kind, has_size) = match f.file_type() {
            FileType::Directory => ("directory", false),
            FileType::File if f.executable => ("program", true),
            FileType::File => ("file", true),
            FileType::Other => ("other", false),
            FileType::Unreadable | FileType::Unspecified => ("unreadable", false),
        };
        let size = has_size.then(|| f.size_bytes.to_string());
        vec![
            f.path.clone(),
            kind.to_owned(),
            size.unwrap_or_default(),
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
            let found = below(client, &server, &path, &to).await?;
            let copier = Copier::new(client, server, found.size());
            copier.all(found, Copier::download).await?;
        }
        args::ServerFile::Upload { of, local, path } => {
            let path = path.trim_matches('/');
            let found = tokio::task::spawn_blocking({
                let path = path.to_owned();
                move || gather(&local, &path)
            });
            let found = found.await.map_err(io::Error::other)??;
            let copier = Copier::new(client, server(&of)?, found.size());
            copier.all(found, Copier::upload).await?;
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
    let mut list = v1::ListFileServerFilesRequest {
        name: name.to_owned(),
        path: path.trim_matches('/').to_owned(),
        page_size: 1000,
        ..Default::default()
    };
    let (mut files, mut retry) = (Vec::new(), Retry::patient());
    loop {
        let mut page = match servers.list_file_server_files(request(list.clone())).await {
            Ok(page) => page.into_inner(),
            Err(status) => {
                retry.again(status).await?;
                continue;
            }
        };
        retry.reset();
        files.append(&mut page.files);
        if page.next_page_token.is_empty() {
            return Ok(files);
        }
        list.page_token = page.next_page_token;
    }
}

/// A file to copy.
struct Copied {
    local: PathBuf,
    path: String,
    size: u64,
    executable: bool,
}

/// What is to be copied, and how much cannot be, which was said.
#[derive(Default)]
struct Found {
    files: Vec<Copied>,
    failed: usize,
}

impl Found {
    fn size(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    fn fail(&mut self, path: &str, why: &str) {
        self.failed += 1;
        say!("batchai: {}: {}", shown(path), shown_lines(why));
    }
}

/// Of directories below each other.
fn too_deep() -> String {
    format!("more than {DEPTH_MAX} directories below each other")
}

/// The files at a path of a file server, and where each goes here: below the last part of the path. Directories are made at once.
async fn below(client: &Client, server: &str, path: &str, to: &Path) -> Result<Found, CliError> {
    let path = path.trim_matches('/');
    let to = match path {
        "" => to.to_owned(),
        path => to.join(safe(path)?),
    };
    let (mut found, mut open) = (Found::default(), vec![(path.to_owned(), to, 0)]);
    while let Some((path, to, depth)) = open.pop() {
        if depth > DEPTH_MAX {
            found.fail(&path, &too_deep());
            continue;
        }
        let files = match list(client, server, &path).await {
            Ok(files) => files,
            Err(error) if depth > 0 && copy::is_of_one(&error) => {
                found.fail(&path, &error.to_string());
                continue;
            }
            Err(error) => return Err(error),
        };
        if files.iter().all(|file| file.path != path)
            && let Err(error) = fs::create_dir_all(&to)
        {
            found.fail(&path, &at(&to)(error).to_string());
            continue;
        }
        for file in files {
            let local = match file.path == path {
                true => to.clone(),
                false => to.join(safe(&file.path)?),
            };
            match file.file_type() {
                FileType::Directory => open.push((file.path, local, depth + 1)),
                FileType::File => found.files.push(Copied {
                    local,
                    path: file.path,
                    size: u64::try_from(file.size_bytes).unwrap_or_default(),
                    executable: file.executable,
                }),
                FileType::Other => {
                    let path = shown(&file.path);
                    say!("batchai: {path}: not copied: it is a link, or no file");
                }
                FileType::Unreadable | FileType::Unspecified => {
                    let why = "it may not be looked at, or its name is not UTF-8";
                    found.fail(&file.path, why);
                }
            }
        }
    }
    Ok(found)
}

/// The files of this machine, and where each goes there; and the directories that have none.
fn gather(local: &[PathBuf], path: &str) -> Result<Found, CliError> {
    let (mut found, mut open) = (Found::default(), Vec::new());
    for given in local {
        match begin(given, path) {
            Ok(begun) => open.push(begun),
            Err(error) if local.len() == 1 => return Err(error),
            Err(error) => found.fail(&given.to_string_lossy(), &error.to_string()),
        }
    }
    open.reverse();
    while let Some((local, path, metadata, depth)) = open.pop() {
        let is_part = path.rsplit('/').next().is_some_and(parts::is_part);
        if metadata.is_file() && !is_part {
            found.files.push(Copied {
                local,
                path,
                size: metadata.len(),
                executable: executable::is(&metadata),
            });
            continue;
        }
        if !metadata.is_dir() {
            let why = match is_part {
                true => "it is what came so far of another file",
                false => "it is no file",
            };
            say!(
                "batchai: {}: not sent: {why}",
                shown(&local.to_string_lossy())
            );
            continue;
        }
        if depth > DEPTH_MAX {
            found.fail(&path, &too_deep());
            continue;
        }
        let mut inside = match inside(&local) {
            Ok(inside) => inside,
            Err(error) => {
                found.fail(&path, &at(&local)(error).to_string());
                continue;
            }
        };
        if inside.is_empty() {
            // A directory's path has a slash at its end.
            found.files.push(Copied {
                local,
                path: format!("{path}/"),
                size: 0,
                executable: false,
            });
            continue;
        }
        inside.sort();
        for inside in inside.into_iter().rev() {
            let name = inside.file_name().unwrap_or_default();
            let below = join(&path, &name.to_string_lossy());
            match (name.to_str(), fs::symlink_metadata(&inside)) {
                (None, _) => found.fail(&below, UNNAMED),
                (_, Err(error)) => found.fail(&below, &error.to_string()),
                (Some(_), Ok(metadata)) => open.push((inside, below, metadata, depth + 1)),
            }
        }
    }
    Ok(found)
}

type Open = (PathBuf, String, fs::Metadata, usize);

/// What a link leads to that was named itself is sent, under the link's name.
fn begin(given: &Path, path: &str) -> Result<Open, CliError> {
    let metadata = fs::metadata(given).map_err(at(given))?;
    let whole = fs::canonicalize(given).map_err(at(given))?;
    let name = given.file_name().or(whole.file_name());
    let name = name.and_then(|name| name.to_str());
    let unnamed = || CliError::Failed(format!("{}: {UNNAMED}", given.display()));
    let path = join(path, name.ok_or_else(unnamed)?);
    Ok((whole, path, metadata, 0))
}

const UNNAMED: &str = "its name is not UTF-8";

fn inside(dir: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}
