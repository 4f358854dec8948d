//! Processes that end with the test.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Generous: the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The command as it was built with this test.
pub fn under_test() -> PathBuf {
    let mut path = std::env::current_exe().expect("a process knows its own file");
    // These carry the command themselves.
    if path.ends_with("bench") || path.ends_with("torture") {
        return path;
    }
    // target/{profile}/deps/{test} or target/{profile}/{program}
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.join("batchai-under-test")
}

/// How to start it by another program, which becomes it.
pub fn command_by(prefix: &[String]) -> Command {
    match prefix {
        [] => Command::new(under_test()),
        [program, args @ ..] => {
            let mut command = Command::new(program);
            command.args(args).arg(under_test());
            command
        }
    }
}

/// Waits until something is so.
///
/// # Panics
/// When patience is over; `what` says for what it was.
pub fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "waited too long: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A process with its log. Dropping it kills it.
pub struct Process {
    pub child: Child,
    pub log: PathBuf,
}

impl Process {
    /// Starts the command under test with its standard error in a file.
    pub fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, log: &Path) -> Process {
        Process::start_with(args, &[], log)
    }

    /// The same with some variables set.
    pub fn start_with<S: AsRef<OsStr>>(
        args: impl IntoIterator<Item = S>,
        variables: &[(&str, &str)],
        log: &Path,
    ) -> Process {
        Process::start_by(&[], args, variables, log)
    }

    /// The same, started by another program, which becomes it.
    pub fn start_by<S: AsRef<OsStr>>(
        prefix: &[String],
        args: impl IntoIterator<Item = S>,
        variables: &[(&str, &str)],
        log: &Path,
    ) -> Process {
        let file = File::create(log).expect("the log can be written");
        let child = command_by(prefix)
            .args(args)
            // Tests may be root, and their jobs as well.
            .env("BATCHAI_JOB_USER", "self")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .expect("the command under test was built with this test");
        Process {
            child,
            log: log.to_owned(),
        }
    }

    /// The next line of its standard output that begins with a prefix.
    pub fn line(&mut self, prefix: &str) -> String {
        let stdout = self.child.stdout.take().expect("it is asked for once");
        for line in BufReader::new(stdout).lines() {
            let line = line.expect("output is text");
            if let Some(rest) = line.strip_prefix(prefix) {
                return rest.to_owned();
            }
        }
        panic!("no line with {prefix:?}; its log:\n{}", self.log_text());
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("it is not reaped yet");
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        until("a process to end", || {
            self.child.try_wait().expect("it is our child")
        })
    }

    /// Cuts it down and waits for its end.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log_text());
        }
    }
}

/// A command that prints while the test does something else. Dropping it kills it.
pub struct Background {
    child: Option<Child>,
}

impl Background {
    /// Starts it.
    pub fn start(command: &mut Command) -> Background {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Background {
            child: Some(child.expect("it can be started")),
        }
    }

    /// Waits for its end; returns what it printed.
    pub fn finish(mut self) -> Output {
        let child = self.child.take().expect("it is finished once");
        child.wait_with_output().expect("it is our child")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The processes whose command line or environment names a directory: everything that an ensemble in it has started.
pub fn processes_of(dir: &Path) -> Vec<(i32, String)> {
    let needle = dir.to_string_lossy().into_owned();
    let own = std::process::id() as i32;
    let entries = fs::read_dir("/proc").expect("this is Linux");
    let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| *pid != own)
        .filter_map(|pid| {
            let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).replace('\0', " ");
            let (cmdline, environ) = (text(read("cmdline")), text(read("environ")));
            (cmdline.contains(&needle) || environ.contains(&needle)).then_some((pid, cmdline))
        })
        .collect()
}

/// Kills everything that belongs to a directory: for the end of a test.
pub fn sweep(dir: &Path) {
    for _ in 0..100 {
        let left = processes_of(dir);
        if left.is_empty() {
            return;
        }
        for (pid, _) in left {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A port of loopback that is free now, and that no connection is given in the meantime: it is below those that the kernel draws, and
/// below those of jobs.
pub fn free_port() -> u16 {
    let mut drawn = std::iter::repeat_with(|| fastrand::u16(10_000..20_000));
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    drawn.find(free).expect("it goes on for ever")
}
