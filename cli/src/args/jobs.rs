//! What the verbs of jobs take.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Confirm, InExperiment, Labels, Mounts, NodeExec, Which};

/// Files to send along with a job.
#[derive(Debug, Default, Args)]
pub struct Files {
    /// Send a file along: it lies in the directory where the job begins.
    #[arg(long, value_name = "FILE")]
    pub script: Option<PathBuf>,
    /// Send a directory along: what is in it lies where the job begins. `.git` and what
    /// `.batchaiignore` names stay here.
    #[arg(long, value_name = "DIR", conflicts_with = "script")]
    pub dir: Option<PathBuf>,
}

/// Variables of the job's environment.
#[derive(Debug, Default, Args)]
pub struct Variables {
    /// Set a variable; with its name alone it has the value that it has here.
    #[arg(long = "env", value_name = "NAME[=VALUE]")]
    pub variables: Vec<String>,
    /// Set a variable to the secret value that it has here: it is sealed, given to the job and shown to nobody.
    #[arg(long = "secret", value_name = "NAME")]
    pub secrets: Vec<String>,
}

#[derive(Debug, Args)]
pub struct JobCreate {
    #[command(flatten)]
    pub parent: InExperiment,
    /// Its name.
    #[arg(short, long)]
    pub name: String,
    /// Settings as JSON: {"properties": {"nodeCount": ..., ...}}.
    #[arg(short = 'f', long = "config-file", value_name = "FILE")]
    pub file: PathBuf,
    /// The cluster to run on: a name in the same workspace, or a full one. It goes before the file's.
    #[arg(short = 'c', long, value_name = "CLUSTER")]
    pub cluster: Option<String>,
    #[command(flatten)]
    pub files: Files,
    #[command(flatten)]
    pub variables: Variables,
    #[command(flatten)]
    pub mounts: Mounts,
    #[command(flatten)]
    pub labels: Labels,
}

#[derive(Debug, Subcommand)]
pub enum Job {
    /// Create a job. It is queued at once; `job wait` waits for its end.
    Create(Box<JobCreate>),
    /// List the jobs of an experiment.
    List {
        #[command(flatten)]
        parent: InExperiment,
        /// Only those for which this holds, for example: state = FAILED AND labels.fold = 3
        #[arg(
            long,
            default_value = "",
            value_name = "FILTER",
            hide_default_value = true
        )]
        filter: String,
    },
    /// Show jobs.
    Show {
        #[command(flatten)]
        parent: InExperiment,
        #[command(flatten)]
        which: Which,
    },
    /// Replace the labels of a job.
    Update {
        #[command(flatten)]
        parent: InExperiment,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        labels: Labels,
    },
    /// End jobs.
    Terminate {
        #[command(flatten)]
        parent: InExperiment,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Delete jobs; running ones are terminated first.
    Delete {
        #[command(flatten)]
        parent: InExperiment,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Wait until a job has ended. Exits with the job's exit code, or 255 where it has none.
    Wait {
        #[command(flatten)]
        parent: InExperiment,
        /// Its name.
        #[arg(short, long)]
        name: String,
        /// Look every so many seconds, instead of being told at once.
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: Option<u64>,
    },
    /// The files of a job.
    #[command(subcommand)]
    File(JobFile),
    /// The nodes of a job.
    #[command(subcommand)]
    Node(JobNode),
}

/// A directory of a job.
#[derive(Clone, Debug, Args)]
pub struct OfJob {
    #[command(flatten)]
    pub parent: InExperiment,
    /// The job.
    #[arg(short = 'j', long)]
    pub job: String,
    /// The directory: stdouterr, or the id of an output directory.
    #[arg(
        short = 'd',
        long = "output-directory-id",
        default_value = "stdouterr",
        value_name = "ID"
    )]
    pub directory: String,
    /// The node, where several have such a file. Of an output directory it is the first that is shown otherwise.
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum JobFile {
    /// List a directory of a job.
    List {
        #[command(flatten)]
        of: OfJob,
        /// A directory below an output directory.
        #[arg(short = 'p', long, default_value = "", hide_default_value = true)]
        path: String,
        #[command(flatten)]
        expiry: super::Expiry,
    },
    /// Print a file of a job, and what is added to it, until the job has ended.
    Stream {
        #[command(flatten)]
        of: OfJob,
        /// The file: stdout.txt, stdout-0.txt, execution.log, ...
        #[arg(
            short = 'f',
            long = "file-name",
            alias = "file",
            value_name = "FILE",
            required_unless_present_any = ["rank", "all_ranks"]
        )]
        file: Option<String>,
        /// The directory of the file, below an output directory.
        #[arg(short = 'p', long, default_value = "", hide_default_value = true)]
        path: String,
        /// Standard output of this rank, instead of a file's name. Of TensorFlow, worker i has rank i, and parameter servers have those behind.
        #[arg(long, conflicts_with = "file")]
        rank: Option<u32>,
        /// What all ranks print, each line with its rank in front; only stdout or stderr where --file-name says so.
        #[arg(long, conflicts_with_all = ["rank", "path", "offset", "length"])]
        all_ranks: bool,
        /// Begin at the last so many lines; 0 is only what comes from now on. Of logs only.
        #[arg(long, value_name = "LINES", value_parser = clap::value_parser!(i32).range(0..=100_000))]
        tail: Option<i32>,
        /// Begin at what arrived since a time (2026-05-01T12:00:00Z), or within the last seconds, minutes, hours or days (90s, 10m, 2h,
        /// 1d). Of logs only.
        #[arg(long, value_name = "TIME", value_parser = since)]
        since: Option<prost_types::Timestamp>,
        /// Begin at this byte.
        #[arg(long, default_value_t = 0)]
        offset: i64,
        /// Print so many bytes at most.
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        length: i64,
        /// Print what there is, and do not wait for more.
        #[arg(long)]
        no_follow: bool,
    },
    /// Copy files of a job to this machine: one, or a whole directory with all below it.
    Download {
        #[command(flatten)]
        of: OfJob,
        /// The file; everything where it is left out.
        #[arg(short = 'f', long = "file-name", value_name = "FILE")]
        file: Option<String>,
        /// A directory below an output directory.
        #[arg(short = 'p', long, default_value = "", hide_default_value = true)]
        path: String,
        /// Where to put them. A directory, made where it does not exist.
        #[arg(long = "to", default_value = ".", value_name = "DIR")]
        to: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum JobNode {
    /// List where to log in to the nodes of a job.
    List {
        #[command(flatten)]
        parent: InExperiment,
        /// The job.
        #[arg(short = 'j', long)]
        job: String,
    },
    /// Run a command, or a shell, beside the processes of a running job: as their user, with their directory and environment.
    Exec {
        #[command(flatten)]
        parent: InExperiment,
        /// The job.
        #[arg(short = 'j', long)]
        job: String,
        #[command(flatten)]
        exec: NodeExec,
    },
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub parent: InExperiment,
    /// The cluster: a name in the same workspace, or a full one.
    #[arg(
        short = 'c',
        long,
        value_name = "CLUSTER",
        env = "BATCHAI_CLUSTER",
        hide_env = true
    )]
    pub cluster: Option<String>,
    /// How many nodes.
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    pub nodes: i32,
    /// How many times on each.
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(i32).range(1..=1024))]
    pub processes_per_node: i32,
    /// The job's name; made of the time where it is left out.
    #[arg(short, long)]
    pub name: Option<String>,
    /// The directory to send along. `.git` and what `.batchaiignore` names stay here.
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub dir: PathBuf,
    /// Send nothing along.
    #[arg(long, conflicts_with = "dir")]
    pub no_dir: bool,
    #[command(flatten)]
    pub variables: Variables,
    /// What to run, behind `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// A time, or how long ago it was.
fn since(text: &str) -> Result<prost_types::Timestamp, String> {
    let wrong = || {
        format!(
            "{text:?} is neither a time (2026-05-01T12:00:00Z) nor how long ago it was (90s, 10m, 2h, 1d)"
        )
    };
    match super::seconds(text) {
        Some(seconds) => {
            let now = batchai_common::time::now();
            Ok(prost_types::Timestamp {
                seconds: now.seconds - seconds,
                ..now
            })
        }
        None => text.parse().map_err(|_| wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::since;

    #[test]
    fn times_are_given_as_such_or_as_how_long_ago() {
        let at = since("2026-05-01T12:00:00Z").unwrap();
        assert_eq!((at.seconds, at.nanos), (1_777_636_800, 0));
        let now = batchai_common::time::now().seconds;
        for (text, ago) in [
            ("0s", 0),
            ("90s", 90),
            ("10m", 600),
            ("2h", 7200),
            ("1d", 86_400),
        ] {
            assert!(
                (now - since(text).unwrap().seconds - ago).abs() <= 5,
                "{text}"
            );
        }
        for text in ["", "m", "10", "-5m", "10w", "soon", "1µ"] {
            assert!(since(text).is_err(), "{text}");
        }
    }
}
