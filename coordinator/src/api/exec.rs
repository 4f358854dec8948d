//! Commands on nodes: what to run is checked whole and addressed to a node, and when its agent has begun, the two ends are joined.
//!
//! Who may do it was decided before (`access::rules`); what the command reads and prints is not looked at (`pipe`).

mod pipe;

use batchai_common::error::ApiError;
use batchai_common::names::{Kind as Noun, Name, last_id};
use batchai_proto::agent::v1::exec_fault::Kind as FaultKind;
use batchai_proto::agent::v1::serve_exec_request::Message;
use batchai_proto::agent::v1::{Assignment, ExecFault, ExecRequest};
use batchai_proto::v1::exec_service_server::ExecService;
use batchai_proto::v1::{
    ExecCommand, ExecInput, ExecJobRequest, ExecJobStart, ExecNodeRequest, ExecNodeStart,
    ExecOutput, TerminalSize, exec_job_request, exec_node_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::faults::Faults;
use super::{Api, Replies, not_found};
use crate::agents::execs::{Exec, OUTBOX_MAX, unavailable};
use crate::call::caller;
use crate::state::State;
use crate::state::assignments::for_files;
use crate::state::attempts::Phase;
use crate::state::keys::workspace_of;

/// Of a command: how many arguments, and how many bytes of them all.
const ARGUMENTS_MAX: usize = 256;
const ARGUMENT_BYTES_MAX: usize = 32 << 10;
const TERMINAL_TYPE_MAX: usize = 64;

/// Where something runs, as the agent needs to know it.
struct Place {
    /// The job, or the cluster.
    name: String,
    node: String,
    attempt: Assignment,
}

#[tonic::async_trait]
impl ExecService for Api {
    type ExecJobStream = Replies<ExecOutput>;

    async fn exec_job(
        &self,
        request: Request<Streaming<ExecJobRequest>>,
    ) -> Result<Response<Self::ExecJobStream>, Status> {
        self.replica.must_lead()?;
        let mut incoming = request.into_inner();
        let first = incoming.message().await?.and_then(|first| first.message);
        let Some(exec_job_request::Message::Start(start)) = first else {
            return Err(unopened().into());
        };
        let (name, node, command) = check_job(start)?;
        let place = of_job(&*self.read().await?, &name, node)?;
        let input = |request: ExecJobRequest| match request.message {
            Some(exec_job_request::Message::Input(input)) => Some(input),
            _ => None,
        };
        self.exec(place, command, incoming, input).await
    }

    type ExecNodeStream = Replies<ExecOutput>;

    async fn exec_node(
        &self,
        request: Request<Streaming<ExecNodeRequest>>,
    ) -> Result<Response<Self::ExecNodeStream>, Status> {
        self.replica.must_lead()?;
        let mut incoming = request.into_inner();
        let first = incoming.message().await?.and_then(|first| first.message);
        let Some(exec_node_request::Message::Start(start)) = first else {
            return Err(unopened().into());
        };
        let (name, node, command) = check_node(start)?;
        let place = of_cluster(&*self.read().await?, &name, node)?;
        let input = |request: ExecNodeRequest| match request.message {
            Some(exec_node_request::Message::Input(input)) => Some(input),
            _ => None,
        };
        self.exec(place, command, incoming, input).await
    }
}

impl Api {
    /// Has the node's agent run it. Returns when it does.
    async fn exec<R: Send + 'static>(
        &self,
        place: Place,
        command: ExecCommand,
        incoming: Streaming<R>,
        input: fn(R) -> Option<ExecInput>,
    ) -> Result<Response<Replies<ExecOutput>>, Status> {
        let question = ExecRequest {
            token: uuid::Uuid::new_v4().to_string(),
            attempt: Some(place.attempt.clone()),
            command: Some(command),
        };
        let mut exec = self.execs.ask(&place.node, question).await?;
        begun(&mut exec, &place).await?;
        tracing::info!(
            caller = caller().label(),
            name = place.name,
            node = place.node,
            "a command runs"
        );
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX);
        let pipe = pipe::Pipe {
            node: place.node,
            exec,
            incoming,
            input,
            outbox,
        };
        tokio::spawn(pipe.run(self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}

/// Waits until the command runs.
async fn begun(exec: &mut Exec, place: &Place) -> Result<(), ApiError> {
    match exec.agent.next(&place.node).await? {
        Message::Started(_) => Ok(()),
        Message::Fault(fault) => Err(refused(place, fault)),
        Message::Hello(_) | Message::Output(_) => {
            Err(unavailable(&place.node, "says what makes no sense"))
        }
    }
}

fn refused(place: &Place, fault: ExecFault) -> ApiError {
    let (kind, why) = (fault.kind(), fault.message);
    let name = match kind {
        FaultKind::TooMany => {
            return ApiError::Busy {
                what: "the node's room for commands",
            };
        }
        FaultKind::NotRunning => place.name.clone(),
        FaultKind::Unspecified => place.node.clone(),
    };
    ApiError::WrongState { name, why }
}

fn unopened() -> ApiError {
    let mut faults = Faults::default();
    faults.invalid("start", "the first message must be a start");
    faults.refuse()
}

type Checked = Result<(Name, Option<Name>, ExecCommand), ApiError>;

fn check_job(start: ExecJobStart) -> Checked {
    check(Noun::Job, &start.name, &start.node, start.command)
}

fn check_node(start: ExecNodeStart) -> Checked {
    check(Noun::Cluster, &start.name, &start.node, start.command)
}

fn check(kind: Noun, name: &str, node: &str, command: Option<ExecCommand>) -> Checked {
    let mut faults = Faults::default();
    let name = faults.name("start.name", kind, name);
    let node = match node {
        "" => None,
        node => faults.name("start.node", Noun::Node, node),
    };
    let command = command.unwrap_or_default();
    faults.within("start.command.", |faults| check_command(faults, &command));
    faults.finish(name).map(|name| (name, node, command))
}

fn check_command(faults: &mut Faults, command: &ExecCommand) {
    let arguments = &command.arguments;
    let size: usize = arguments.iter().map(|argument| argument.len() + 1).sum();
    if arguments.len() > ARGUMENTS_MAX || size > ARGUMENT_BYTES_MAX {
        let why =
            format!("must have at most {ARGUMENTS_MAX} entries and {ARGUMENT_BYTES_MAX} bytes");
        faults.invalid("arguments", why);
    }
    let program = arguments.first().is_none_or(|program| !program.is_empty());
    if !program || arguments.iter().any(|argument| argument.contains('\0')) {
        faults.invalid("arguments", "must begin with a program, and have no NUL");
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || "-+._".contains(c);
    let terminal_type = &command.terminal_type;
    if terminal_type.len() > TERMINAL_TYPE_MAX || !terminal_type.chars().all(legal) {
        let why = format!("must have at most {TERMINAL_TYPE_MAX} characters of [-+.A-Za-z0-9_]");
        faults.invalid("terminal_type", why);
    }
    if command.terminal.is_none() && !terminal_type.is_empty() {
        faults.invalid("terminal_type", "goes with a terminal");
    }
    if command.terminal.is_some_and(|size| !is_size(size)) {
        faults.invalid("terminal", "must have 1 to 65535 rows and columns");
    }
}

fn is_size(size: TerminalSize) -> bool {
    let fits = |count: i32| (1..=i32::from(u16::MAX)).contains(&count);
    fits(size.rows) && fits(size.columns)
}

fn of_job(state: &State, name: &Name, node: Option<Name>) -> Result<Place, ApiError> {
    let job = state.jobs.get(name.as_str());
    let job = job.ok_or_else(|| not_found(Noun::Job, name))?;
    let attempt = job.attempt.as_ref().and_then(|id| state.attempts.get(id));
    let wrong = |why: String| ApiError::WrongState {
        name: name.to_string(),
        why,
    };
    let attempt = attempt.filter(|attempt| attempt.phase == Phase::Running);
    let attempt = attempt.ok_or_else(|| {
        let why = "it does not run now, and a command runs only beside a job that does: `batchai job show` says how it is, \
                   `batchai job file stream` what it printed";
        wrong(why.to_owned())
    })?;
    let mut nodes = attempt.nodes.iter().map(|node| node.node.as_str());
    let found = match &node {
        None => nodes.next(),
        Some(node) => nodes.find(|known| *known == node.as_str()),
    };
    let assignment = found.and_then(|found| Some((found, for_files(state, attempt, found)?)));
    let (found, attempt) = assignment.ok_or_else(|| {
        let ids: Vec<_> = attempt.nodes.iter().map(|n| last_id(&n.node)).collect();
        let asked = node.map_or(String::new(), |node| node.to_string());
        wrong(format!(
            "{asked} has no part in it; its nodes are {}",
            ids.join(", ")
        ))
    })?;
    Ok(Place {
        name: name.to_string(),
        node: found.to_owned(),
        attempt,
    })
}

fn of_cluster(state: &State, name: &Name, node: Option<Name>) -> Result<Place, ApiError> {
    let cluster = state.clusters.get(name.as_str());
    let cluster = cluster.ok_or_else(|| not_found(Noun::Cluster, name))?;
    if let Some(node) = &node
        && !state.nodes.contains_key(node.as_str())
    {
        return Err(not_found(Noun::Node, node));
    }
    let found = match &node {
        None => cluster.members.get_min(),
        Some(node) => cluster.members.get(node.as_str()),
    };
    let found = found.ok_or_else(|| ApiError::WrongState {
        name: name.to_string(),
        why: match &node {
            None => "it has no nodes now; `batchai cluster show` says why".to_owned(),
            Some(node) => {
                format!("{node} is not one of its nodes; `batchai cluster node list` names them")
            }
        },
    })?;
    let workspace = state.workspaces.get(workspace_of(name.as_str()));
    Ok(Place {
        name: name.to_string(),
        node: found.clone(),
        attempt: Assignment {
            workspace_number: workspace.map_or(0, |workspace| workspace.number),
            ..Assignment::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let name = "resourceGroups/g/workspaces/w/experiments/e/jobs/j";
        let fields = |command: ExecCommand| match check(Noun::Job, name, "", Some(command)) {
            Err(ApiError::Invalid(faults)) => faults.into_iter().map(|f| f.field).collect(),
            _ => Vec::new(),
        };
        let of = |arguments: &[&str]| ExecCommand {
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            ..ExecCommand::default()
        };
        let none: [&str; 0] = [];
        assert_eq!(fields(of(&[])), none);
        assert_eq!(fields(of(&["sh", "-c", ""])), none);
        let arguments = "start.command.arguments";
        for bad in [
            &["", "x"][..],
            &["a\0b"],
            &["x"; 300],
            &[&*"x".repeat(40_000)],
        ] {
            assert_eq!(fields(of(bad)), [arguments]);
        }
        let size = |rows, columns| ExecCommand {
            terminal: Some(TerminalSize { rows, columns }),
            ..ExecCommand::default()
        };
        assert_eq!(fields(size(24, 80)), none);
        for (rows, columns) in [(0, 80), (24, -1), (65_536, 80)] {
            assert_eq!(fields(size(rows, columns)), ["start.command.terminal"]);
        }
        for (bad, size) in [("x\u{1b}[0m", size(24, 80)), ("xterm", of(&[]))] {
            let terminal_type = bad.to_owned();
            let bad = ExecCommand {
                terminal_type,
                ..size
            };
            assert_eq!(fields(bad), ["start.command.terminal_type"]);
        }
        assert!(check(Noun::Job, name, "nodes/..", None).is_err());
        assert!(check(Noun::Cluster, name, "", None).is_err());
    }
}
