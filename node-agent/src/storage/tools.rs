//! The programs of the system that make and mount file systems: each within a deadline, and none outlives who has started it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Between two looks at whether it has ended.
const PAUSE: Duration = Duration::from_millis(10);
/// One that is killed has ended by then, or is stuck in the kernel.
const DEATH_MAX: Duration = Duration::from_secs(1);
/// What one says is not longer.
const SAID_BYTES_MAX: usize = 64 << 10;
/// Of an error its end is told.
const TOLD_CHARS_MAX: usize = 400;
/// Where they are, before the agent's own PATH, which may be a user's.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
/// Names a directory that comes before all of them: for tests, which end the agent before and after a program.
const TEST_TOOLS: &str = "BATCHAI_TEST_STORAGE_TOOLS";
/// Becomes the program, unless the agent, whose number comes first, had ended before the kernel was told to end this with it.
const WITH_AGENT: &str = r#"[ "$PPID" = "$0" ] && exec "$@""#;

/// A program, and the package that has it on Debian.
pub struct Tool {
    name: &'static str,
    package: &'static str,
    most: Duration,
}

const fn tool(name: &'static str, package: &'static str, most_s: u64) -> Tool {
    let most = Duration::from_secs(most_s);
    Tool {
        name,
        package,
        most,
    }
}

pub const MDADM: Tool = tool("mdadm", "mdadm", 60);
pub const WIPEFS: Tool = tool("wipefs", "util-linux", 60);
/// What was not unmounted waits until no other machine can have it mounted: for minutes where the disks were slow.
pub const MOUNT: Tool = tool("mount", "mount", 900);
/// A large one has much to write.
pub const MKFS: Tool = tool("mkfs.ext4", "e2fsprogs", 1800);
const SETPRIV: Tool = tool("setpriv", "util-linux", 0);
const SH: Tool = tool("sh", "dash", 0);

/// Why one did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{name} is not installed: apt-get install {package}")]
    Missing {
        name: &'static str,
        package: &'static str,
    },
    #[error("{name} ended with {status}: {said}")]
    Failed {
        name: &'static str,
        status: ExitStatus,
        said: String,
    },
    #[error("{name} took longer than {s} s", s = .most.as_secs())]
    Late { name: &'static str, most: Duration },
    #[error("the agent is to end before {name} does")]
    Unwanted { name: &'static str },
    #[error("{name} cannot be run: {error}")]
    System {
        name: &'static str,
        error: io::Error,
    },
}

impl Tool {
    fn path(&self) -> Result<PathBuf, ToolError> {
        let first = std::env::var_os(TEST_TOOLS).map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let known = DIRECTORIES.iter().map(PathBuf::from);
        let mut all = first
            .into_iter()
            .chain(known)
            .chain(std::env::split_paths(&path))
            .filter(|dir| dir.is_absolute());
        let found = all.find_map(|dir| Some(dir.join(self.name)).filter(|path| path.is_file()));
        found.ok_or(ToolError::Missing {
            name: self.name,
            package: self.package,
        })
    }

    /// Runs it to its end, or until nobody wants it; returns what it printed.
    pub fn run<A: AsRef<OsStr>>(
        &self,
        args: &[A],
        unwanted: &dyn Fn() -> bool,
    ) -> Result<String, ToolError> {
        let name = self.name;
        let system = |error| ToolError::System { name, error };
        let (printed, complained) = (said().map_err(system)?, said().map_err(system)?);
        let mut command = Command::new(SETPRIV.path()?);
        // Whoever begins anew after this process was cut down must not meet what it had begun.
        command.args(["--pdeathsig", "KILL", "--"]);
        command.arg(SH.path()?).args(["-c", WITH_AGENT]);
        command.arg(std::process::id().to_string());
        command.arg(self.path()?).args(args);
        command.env_clear().env("LC_ALL", "C");
        command.env("PATH", DIRECTORIES.join(":"));
        command.stdin(Stdio::null());
        command.stdout(printed.try_clone().map_err(system)?);
        command.stderr(complained.try_clone().map_err(system)?);
        let mut child = command.spawn().map_err(system)?;
        let ended = ended(&mut child, self.most, unwanted).map_err(system)?;
        let Some(status) = ended else {
            child.kill().map_err(system)?;
            // What does not end now waits for a disk, and is left to the kernel.
            let _ = self::ended(&mut child, DEATH_MAX, &|| false);
            return Err(match unwanted() {
                true => ToolError::Unwanted { name },
                false => ToolError::Late {
                    name,
                    most: self.most,
                },
            });
        };
        if !status.success() {
            let said = read(&complained).map_err(system)?;
            let from = said.chars().count().saturating_sub(TOLD_CHARS_MAX);
            let said = said.trim().chars().skip(from).collect();
            return Err(ToolError::Failed { name, status, said });
        }
        read(&printed).map_err(system)
    }
}

/// How a child ended, should it end in time.
fn ended(
    child: &mut Child,
    most: Duration,
    unwanted: &dyn Fn() -> bool,
) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + most;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= end || unwanted() {
            return Ok(status);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Where a program prints to without waiting for anybody.
fn said() -> io::Result<File> {
    Ok(memfd_create("said", MFdFlags::MFD_CLOEXEC)?.into())
}

fn read(said: &File) -> io::Result<String> {
    let mut bytes = vec![0; SAID_BYTES_MAX];
    let mut count = 0;
    while count < bytes.len() {
        match said.read_at(&mut bytes[count..], count as u64)? {
            0 => break,
            more => count += more,
        }
    }
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

/// A path as an argument among others.
pub fn arg(path: &Path) -> &OsStr {
    path.as_os_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_has_its_time_and_says_what_is_the_matter() {
        let said = |tool: Tool, args: &[&str], unwanted: bool| {
            let ended = tool.run(args, &|| unwanted);
            ended.unwrap_or_else(|error| error.to_string())
        };
        assert_eq!(said(tool("echo", "x", 60), &["a"], false), "a\n");
        let failed = said(tool("ls", "x", 60), &["/no/such"], false);
        assert!(
            failed.starts_with("ls ended with exit status: 2: ") && failed.contains("/no/such"),
            "{failed}"
        );
        let begun = Instant::now();
        assert_eq!(
            said(tool("sleep", "x", 0), &["60"], false),
            "sleep took longer than 0 s"
        );
        assert_eq!(
            said(tool("sleep", "x", 60), &["60"], true),
            "the agent is to end before sleep does"
        );
        assert!(begun.elapsed() < Duration::from_secs(30));
        let missing = said(tool("no-such-tool", "some-package", 60), &[], false);
        assert_eq!(
            missing,
            "no-such-tool is not installed: apt-get install some-package"
        );
    }
}
