//! From a question to a process: what the command is to run as, in which group, directory and environment, and the start of the process
//! that holds it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use batchai_proto::agent::v1::exec_fault::Kind;
use batchai_proto::agent::v1::{Assignment, ExecFault, ExecRequest};
use batchai_proto::v1::ExecCommand;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::sync::oneshot;

use super::streams::{Streams, StreamsOf};
use super::{ForPeer, Parts, fault};
use crate::cgroups::Group;
use crate::journal::{JournalError, LAUNCH, PREPARE, STATUS};
use crate::launch::{HostFacts, JobUser, Preparation, ProcessPlan, beside};
use crate::shim::{Beside, ExecPlan, Words};
use crate::status::Status;

/// What a shell is where the caller names no program, best first.
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];
/// The terminal of a caller who does not say what he has.
const TERMINAL_TYPE: &str = "xterm";
/// The home of a user who has none.
const NO_HOME: &str = "/";

/// A command that was started.
pub struct Started {
    pub holder: Holder,
    /// The exit code, when nothing is left of it.
    pub exited: oneshot::Receiver<i32>,
    pub streams: Streams,
}

/// The process that holds a command. Dropping this has it hang up what is left.
pub struct Holder {
    /// None once it has ended: its number may be another's by then.
    pid: Arc<Mutex<Option<Pid>>>,
}

impl Drop for Holder {
    fn drop(&mut self) {
        let pid = self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = *pid {
            // Why it cannot be told would be that it has ended.
            let _ = kill(pid, Signal::SIGTERM);
        }
    }
}

/// Where a command is to run.
struct Place {
    plan: ExecPlan,
    /// What the process that holds it is told: the directory of the attempt, or that of the agent.
    dir: PathBuf,
}

/// Starts what is asked for.
pub fn start(question: &ExecRequest, parts: &Parts) -> Result<Started, ExecFault> {
    let assignment = question.attempt.clone().unwrap_or_default();
    let command = question.command.clone().unwrap_or_default();
    let place = match assignment.attempt.as_str() {
        "" => on_the_node(&assignment, parts)?,
        _ => beside_an_attempt(&assignment, parts)?,
    };
    begin(place, command, parts)
}

/// Starts what another node of an attempt wants.
pub fn start_for_peer(what: ForPeer, parts: &Parts) -> Result<Started, ExecFault> {
    let mut place = beside_an_attempt(&what.assignment, parts)?;
    place.plan.env.extend(what.more);
    begin(place, what.command, parts)
}

fn begin(place: Place, command: ExecCommand, parts: &Parts) -> Result<Started, ExecFault> {
    let Place { mut plan, dir } = place;
    plan.group = plan.group.map(|group| {
        let id = uuid::Uuid::new_v4().simple();
        group.below(&format!("exec-{id}"))
    });
    let terminal = command.terminal;
    complete(&mut plan, command);
    let started = StreamsOf::new(terminal.as_ref(), plan.user.as_ref())
        .and_then(|streams| spawn(&plan, &dir, parts.own, streams));
    started.map_err(|error| failed(format!("the command cannot be started: {error}")))
}

/// Whether what is asked for is to run beside an attempt that is about to begin.
pub fn is_early(assignment: &Assignment, parts: &Parts) -> bool {
    let dir = parts.journal.attempt(&assignment.attempt);
    dir.is_some_and(|dir| Beside::of(&dir) == Beside::NotYet)
}

fn failed(message: impl Into<String>) -> ExecFault {
    fault(Kind::Unspecified, message)
}

/// What the caller says of it.
fn complete(plan: &mut ExecPlan, command: ExecCommand) {
    plan.terminal = command.terminal.is_some();
    plan.input = command.input || plan.terminal;
    let known = SHELLS.iter().find(|shell| Path::new(shell).exists());
    let shell = known.unwrap_or(&SHELLS[1]);
    plan.env.insert("SHELL".to_owned(), (*shell).to_owned());
    if plan.terminal {
        let given = Some(command.terminal_type).filter(|given| !given.is_empty());
        let given = given.unwrap_or_else(|| TERMINAL_TYPE.to_owned());
        plan.env.insert("TERM".to_owned(), given);
    }
    plan.argv = command.arguments;
    if plan.argv.is_empty() {
        plan.argv.push((*shell).to_owned());
    }
}

/// Beside the processes of an attempt: as they are.
fn beside_an_attempt(assignment: &Assignment, parts: &Parts) -> Result<Place, ExecFault> {
    let over = || {
        let why =
            "its processes do not run on this node now: `batchai job show` says how far it is";
        fault(Kind::NotRunning, why)
    };
    let dir = parts.journal.attempt(&assignment.attempt);
    let dir = dir.filter(|dir| Beside::of(dir) == Beside::Now);
    let dir = dir.ok_or_else(over)?;
    let unread = |error: JournalError| failed(error.to_string());
    // As it was planned, whatever this agent would plan now.
    let preparation: Preparation = dir.read(PREPARE).map_err(unread)?.ok_or_else(over)?;
    let processes: Vec<ProcessPlan> = dir.read(LAUNCH).map_err(unread)?.unwrap_or_default();
    let (mut env, cwd) = match processes.into_iter().next() {
        Some(first) => (first.env, first.cwd),
        None => beside(assignment, &parts.facts).map_err(|error| failed(error.to_string()))?,
    };
    let ranks = dir.read::<Status>(STATUS).ok().flatten();
    let ranks = ranks.map(|status| status.ranks).unwrap_or_default();
    let alive = ranks.iter().filter(|rank| rank.exit_code.is_none());
    env.extend(secrets(assignment, alive.map(|rank| rank.pid)));
    let plan = ExecPlan {
        env,
        cwd,
        user: preparation.user,
        limits: preparation.limits,
        group: preparation.group,
        bounds: preparation.bounds,
        of_attempt: true,
        argv: Vec::new(),
        terminal: false,
        input: false,
        agent: std::process::id() as i32,
    };
    Ok(Place {
        plan,
        dir: dir.path,
    })
}

/// The job's secrets: nobody has them any more but its processes, whose user may read them there.
pub fn secrets(
    assignment: &Assignment,
    processes: impl Iterator<Item = i32>,
) -> BTreeMap<String, String> {
    let names = assignment.job.iter().flat_map(|job| &job.secrets);
    let names: Vec<_> = names.map(|secret| secret.name.as_str()).collect();
    if names.is_empty() {
        return BTreeMap::new();
    }
    let mut environs = processes.filter_map(|pid| fs::read(format!("/proc/{pid}/environ")).ok());
    let environ = environs.next().unwrap_or_default();
    let variables = environ.split(|byte| *byte == 0);
    let pairs =
        variables.filter_map(|variable| std::str::from_utf8(variable).ok()?.split_once('='));
    let found = pairs.filter(|(name, _)| names.contains(name));
    found
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Outside of any job, as the user that those of a workspace run as.
fn on_the_node(assignment: &Assignment, parts: &Parts) -> Result<Place, ExecFault> {
    let Parts { facts, journal, .. } = parts;
    let user = facts.users.of(assignment);
    let user = user.map_err(|error| failed(error.to_string()))?;
    let (env, cwd) = at_home(facts, user.as_ref());
    let plan = ExecPlan {
        env,
        cwd,
        user,
        limits: facts.limits.clone(),
        group: facts.isolation.groups.clone(),
        bounds: Vec::new(),
        of_attempt: false,
        argv: Vec::new(),
        terminal: false,
        input: false,
        agent: std::process::id() as i32,
    };
    let dir = journal.bundles();
    let dir = dir.parent().unwrap_or(Path::new(NO_HOME)).to_owned();
    Ok(Place { plan, dir })
}

fn at_home(facts: &HostFacts, user: Option<&JobUser>) -> (BTreeMap<String, String>, String) {
    let mut env = facts.base_env.clone();
    if let Some(user) = user {
        for name in ["USER", "LOGNAME"] {
            env.insert(name.to_owned(), user.name.clone());
        }
        env.insert("HOME".to_owned(), user.home.clone());
    }
    let home = env.get("HOME").filter(|home| Path::new(home).is_dir());
    let home = home.map_or(NO_HOME, String::as_str).to_owned();
    env.insert("HOME".to_owned(), home.clone());
    (env, home)
}

/// Starts the process that holds a command, and tells it what to run.
fn spawn(
    plan: &ExecPlan,
    dir: &Path,
    own: &'static [&'static str],
    streams: StreamsOf,
) -> io::Result<Started> {
    let words = Words::of(plan)?;
    // The very file that this agent runs, even if it was replaced meanwhile.
    let mut child = Command::new("/proc/self/exe")
        .arg0("batchai-exec")
        .args(own)
        .arg("exec")
        .arg(dir)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(streams.output)
        .stderr(streams.error)
        .spawn()?;
    let stdin = child.stdin.take();
    let (holder, exited) = watch(child, plan.group.clone());
    let mut stdin = stdin.ok_or_else(|| io::Error::other("its input is not piped"))?;
    // It reads all of that at once, and then no more.
    stdin.write_all(&words)?;
    let stdin = plan.input.then_some(stdin).filter(|_| !plan.terminal);
    let streams = streams.ends.complete(stdin, plan.user.as_ref())?;
    Ok(Started {
        holder,
        exited,
        streams,
    })
}

/// Waits for a child on a thread of its own, which the end of this process does not wait for. Where somebody has killed it, what it held is
/// ended here, as far as it is in a group.
fn watch(mut child: Child, group: Option<Group>) -> (Holder, oneshot::Receiver<i32>) {
    let (tell, exited) = oneshot::channel();
    let number = Pid::from_raw(child.id() as i32);
    let pid = Arc::new(Mutex::new(Some(number)));
    let held = pid.clone();
    std::thread::spawn(move || {
        // It keeps its number until nobody may use that any more.
        while waitid(Id::Pid(number), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            == Err(nix::errno::Errno::EINTR)
        {}
        held.lock().unwrap_or_else(PoisonError::into_inner).take();
        let status = child.wait();
        let code = status.ok().and_then(|status| status.code());
        if let Some(group) = group.filter(|group| group.path.exists())
            && let Err(error) = group.end()
        {
            tracing::error!(%error, "what a command left is not gone");
        }
        // One that was killed itself cannot tell how the command ended: as it did, then.
        let _ = tell.send(code.unwrap_or(128 + Signal::SIGKILL as i32));
    });
    (Holder { pid }, exited)
}
