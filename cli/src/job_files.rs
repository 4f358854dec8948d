//! The files of jobs: listed, followed, copied to this machine.

use std::cell::Cell;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use batchai_common::names::last_id;
use batchai_common::shutdown::Interrupts;
use batchai_proto::v1;
use batchai_proto::v1::job_file::FileType;

use crate::args::{self, OfJob};
use crate::client::{Client, request, send_once};
use crate::context::Context;
use crate::error::CliError;
use crate::logs::{self, Follow, Sink};
use crate::output::View;
use crate::ranks::AllRanks;
use crate::resources::{Done, all_pages};

/// Directories below each other that are copied.
const DEPTH_MAX: usize = 100;
/// Who waits so long for a file's first byte is told that it waits.
const WAIT_NOTE_AFTER: Duration = Duration::from_secs(2);

const FILE: View<v1::JobFile> = View {
    message: "JobFile",
    columns: &["Name", "Type", "Size", "Modified", "Node"],
    row: |f| {
        let whole = |time: prost_types::Timestamp| prost_types::Timestamp { nanos: 0, ..time };
        let modified = f.last_modified.map(|time| whole(time).to_string());
        vec![
            f.name.clone(),
            f.file_type().as_str_name().to_lowercase(),
            f.content_length.to_string(),
            modified.unwrap_or_default(),
            last_id(&f.node).into(),
        ]
    },
};

pub async fn run(command: args::JobFile, client: &Client, context: &Context) -> Done {
    match command {
        args::JobFile::List { of, path, expiry } => {
            expiry.note();
            let found = list(client, &Place::new(&of, context)?, &path).await?;
            context.printer.list(&FILE, &found)?;
            Ok(ExitCode::SUCCESS)
        }
        args::JobFile::Stream {
            of,
            file,
            path,
            rank,
            all_ranks,
            tail,
            since,
            offset,
            length,
            no_follow,
        } => {
            let place = Place::new(&of, context)?;
            let file = match rank {
                Some(rank) => file_of_rank(client, &place, rank).await?,
                None => file.unwrap_or_default(),
            };
            let stream = v1::StreamJobLogsRequest {
                file: join(&path, &file),
                offset,
                length,
                all_ranks,
                tail_lines: tail,
                since,
                follow: !no_follow,
                ..place.request()
            };
            print(client, stream).await
        }
        args::JobFile::Download { of, file, path, to } => {
            let place = Place::new(&of, context)?;
            fs::create_dir_all(&to).map_err(at(&to))?;
            match file {
                Some(file) => {
                    let target = to.join(safe(&file)?);
                    download(client, &place, &join(&path, &file), &target).await?;
                }
                None => download_all(client, &place, &path, &to).await?,
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Where a rank's standard output is: TensorFlow's workers have the first ranks, its parameter servers those behind.
async fn file_of_rank(client: &Client, place: &Place, rank: u32) -> Result<String, CliError> {
    let name = place.job.clone();
    let job = send_once(v1::GetJobRequest { name }, |get| {
        let mut jobs = client.jobs();
        async move { jobs.get_job(get).await }
    });
    let job = job.await?;
    let Some(settings) = &job.tensor_flow_settings else {
        return Ok(format!("stdout-{rank}.txt"));
    };
    let workers = u32::try_from(settings.worker_count).unwrap_or_default();
    Ok(match rank.checked_sub(workers) {
        None => format!("stdout-wk-{rank}.txt"),
        Some(server) => format!("stdout-ps-{server}.txt"),
    })
}

/// Prints a file. Ctrl-C is a good end of it.
async fn print(client: &Client, stream: v1::StreamJobLogsRequest) -> Done {
    let mut interrupts = Interrupts::new()?;
    let follows = stream.follow;
    let file = match stream.all_ranks {
        true => "what ranks print".to_owned(),
        false => stream.file.clone(),
    };
    let begun = Cell::new(false);
    let mut out = Begun {
        begun: &begun,
        ranks: stream.all_ranks.then(AllRanks::default),
    };
    let follow = logs::follow(client, stream, &mut out);
    let waits = async {
        tokio::time::sleep(WAIT_NOTE_AFTER).await;
        if follows && !begun.get() {
            say!("batchai: waiting for {file}");
        }
        std::future::pending().await
    };
    tokio::select! {
        end = follow => complete(end?),
        () = interrupts.next() => Ok(ExitCode::SUCCESS),
        never = waits => never,
    }
}

/// Standard output, and whether anything was written to it.
struct Begun<'a> {
    begun: &'a Cell<bool>,
    /// Where the lines of all ranks go.
    ranks: Option<AllRanks>,
}

impl Sink for Begun<'_> {
    fn take(&mut self, piece: &v1::StreamJobLogsResponse) -> io::Result<()> {
        self.begun.set(self.begun.get() || !piece.data.is_empty());
        match &mut self.ranks {
            Some(ranks) => ranks.take(piece),
            None => io::stdout().take(piece),
        }
    }
}

fn complete(end: Follow) -> Done {
    match end {
        Follow::Complete => Ok(ExitCode::SUCCESS),
        Follow::Truncated => Err(CliError::Failed(
            "the job began anew, or a part never came: the file had more".to_owned(),
        )),
        Follow::NodeLost => Err(CliError::Failed(
            "the node was lost: the file may have had more".to_owned(),
        )),
    }
}

/// A directory of a job on a node.
struct Place {
    job: String,
    directory: String,
    node: String,
}

impl Place {
    fn new(of: &OfJob, context: &Context) -> Result<Place, CliError> {
        let node = of
            .node
            .as_deref()
            .map(|node| format!("nodes/{}", last_id(node)));
        Ok(Place {
            job: format!("{}/jobs/{}", context.experiment(&of.parent)?, of.job),
            directory: of.directory.clone(),
            node: node.unwrap_or_default(),
        })
    }

    fn request(&self) -> v1::StreamJobLogsRequest {
        v1::StreamJobLogsRequest {
            name: self.job.clone(),
            directory: self.directory.clone(),
            node: self.node.clone(),
            ..Default::default()
        }
    }
}

async fn list(client: &Client, place: &Place, path: &str) -> Result<Vec<v1::JobFile>, CliError> {
    let mut jobs = client.jobs();
    let list = v1::ListJobFilesRequest {
        name: place.job.clone(),
        directory: place.directory.clone(),
        path: path.to_owned(),
        node: place.node.clone(),
        page_size: 1000,
        ..Default::default()
    };
    Ok(all_pages!(jobs.list_job_files, list, files))
}

/// Copies a directory and all below it. Logs of several nodes lie in a directory for each.
async fn download_all(
    client: &Client,
    place: &Place,
    path: &str,
    to: &Path,
) -> Result<(), CliError> {
    let mut open = vec![(path.to_owned(), to.to_owned(), 0)];
    while let Some((path, to, depth)) = open.pop() {
        if depth > DEPTH_MAX {
            let why = format!("{path}: more than {DEPTH_MAX} directories below each other");
            return Err(CliError::Failed(why));
        }
        let files = list(client, place, &path).await?;
        let nodes: std::collections::BTreeSet<_> = files.iter().map(|file| &file.node).collect();
        let several = nodes.len() > 1;
        for file in &files {
            let dir = match several {
                true => to.join(last_id(&file.node)),
                false => to.clone(),
            };
            let target = dir.join(safe(&file.name)?);
            if file.file_type() == FileType::Directory {
                open.push((join(&path, &file.name), target, depth + 1));
                continue;
            }
            let place = Place {
                node: file.node.clone(),
                job: place.job.clone(),
                directory: place.directory.clone(),
            };
            fs::create_dir_all(&dir).map_err(at(&dir))?;
            download(client, &place, &join(&path, &file.name), &target).await?;
        }
    }
    Ok(())
}

async fn download(
    client: &Client,
    place: &Place,
    file: &str,
    target: &Path,
) -> Result<(), CliError> {
    let stream = v1::StreamJobLogsRequest {
        file: file.to_owned(),
        ..place.request()
    };
    // Whole or not there: what broke off is not taken for what was asked for.
    let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty());
    let part =
        tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new("."))).map_err(at(target))?;
    let mut out = io::BufWriter::new(part.as_file());
    let end = logs::follow(client, stream, &mut out).await;
    let done = end.and_then(|end| {
        out.flush().map_err(at(target))?;
        complete(end)
    });
    done?;
    drop(out);
    // As any other file that this user makes, and not for him alone.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(part.path(), readable).map_err(at(target))?;
    part.persist(target)
        .map_err(|error| at(target)(error.error))?;
    say!("{}", target.to_string_lossy().escape_debug());
    Ok(())
}

pub fn at(path: &Path) -> impl Fn(io::Error) -> CliError {
    let path: PathBuf = path.to_owned();
    move |source| CliError::File {
        path: path.clone(),
        source,
    }
}

pub fn join(path: &str, name: &str) -> String {
    match path.trim_end_matches('/') {
        "" | "." => name.to_owned(),
        path => format!("{path}/{name}"),
    }
}

/// The last part of a name that a node gave: it must not lead out of where the file goes.
pub fn safe(name: &str) -> Result<&str, CliError> {
    let last = Path::new(name).components().next_back();
    match last {
        Some(Component::Normal(last)) if !name.ends_with('/') => last
            .to_str()
            .ok_or_else(|| CliError::Failed(format!("{name:?} is no file's name"))),
        _ => Err(CliError::Failed(format!("{name:?} is no file's name"))),
    }
}
