//! PURE. A TensorFlow job: one process on one node, or parameter servers and workers over the nodes.
//!
//! **Which form.** The job is distributed where it has parameter servers, more than one worker, or more than one node; the coordinator has
//! filled in how many (see `materialise` there). Otherwise the script runs once, with `masterCommandLineArgs` and without `TF_CONFIG`:
//! a cluster of one would make Estimators ask for a chief.
//!
//! **Processes.** Worker i has rank i: rank 0 is the master, which gets `masterCommandLineArgs`; the other workers get
//! `workerCommandLineArgs`. Behind them come the servers: server i of n workers has rank n + i, and gets
//! `parameterServerCommandLineArgs`. Servers are spread over the nodes in their order, as workers are, so that server 0 is beside the master; on
//! every node the servers start first. Their ports follow each other on each node in the same order: this is what the original's
//! dumps show, which counted from 2222; here the first one is the attempt's own.
//!
//! **Environment.** `AZ_BATCHAI_PS_HOSTS` and `AZ_BATCHAI_WORKER_HOSTS` (empty where there are none), `AZ_BATCHAI_TASK_INDEX` (within the
//! role), and `TF_CONFIG` as the original gave it, which `tf.distribute` takes: the first worker is its chief. A role without
//! processes is left out of it, since TensorFlow takes no empty one. The original's documentation also has a role `master`; no dump of it had.
//!
//! **GPUs.** TensorFlow takes all memory of every GPU that it sees. So the workers of a node share its GPUs out, as evenly as can be and side
//! by side: the second of two workers on four GPUs sees the last two. A parameter server sees none. The only process of the first form sees all.
//!
//! **Files** are `stdout-wk-{i}.txt`, `stderr-wk-{i}.txt`, and `-ps-{i}` for servers, also of the one process of the first form.
//!
//! **End.** The job is over when its workers are, or anything fails: a server as well. Servers, which do not end by themselves, are then ended
//! by the node, and that is no failure; one that ends by itself with 0 is done.

use batchai_common::ranks::Layout;
use batchai_proto::v1::TensorFlowSettings;
use serde_json::{Value, json};

use super::{Context, LaunchError, ProcessPlan, environment, gpus, host_number, layout, script};

/// A role and the number in it.
#[derive(Clone, Copy)]
struct Task {
    rank: usize,
    server: bool,
    index: usize,
}

pub fn processes(
    context: &Context<'_>,
    settings: &TensorFlowSettings,
) -> Result<Vec<ProcessPlan>, LaunchError> {
    let layout = layout(context);
    let index = host_number(context);
    layout
        .of(index)
        .map(|rank| process(context, settings, &layout, task(&layout, rank)))
        .collect()
}

fn task(layout: &Layout, rank: usize) -> Task {
    let server = layout.server(rank);
    Task {
        rank,
        server: server.is_some(),
        index: server.unwrap_or(rank),
    }
}

fn process(
    context: &Context<'_>,
    settings: &TensorFlowSettings,
    layout: &Layout,
    task: Task,
) -> Result<ProcessPlan, LaunchError> {
    let (servers, workers) = addresses(context, layout);
    let mut env = context.env.clone();
    let own = layout.workers_of(host_number(context));
    let all = &context.facts.gpus;
    let seen = match task.server {
        true => &[],
        false => gpus::share(all, task.rank - own.start, own.len()),
    };
    env.extend(gpus::variables(all, seen));
    for (name, value) in [
        ("AZ_BATCHAI_PS_HOSTS", servers.join(",")),
        ("AZ_BATCHAI_WORKER_HOSTS", workers.join(",")),
        ("AZ_BATCHAI_TASK_INDEX", task.index.to_string()),
    ] {
        env.insert(name.to_owned(), value);
    }
    if layout.workers + layout.servers > 1 {
        let config = config(&servers, &workers, task).to_string();
        env.insert("TF_CONFIG".to_owned(), config);
    }
    let env = environment::with_user(context, env)?;
    let arguments = match (task.server, task.index) {
        (true, _) => (
            "parameter_server_command_line_args",
            &*settings.parameter_server_command_line_args,
        ),
        (false, 0) => (
            "master_command_line_args",
            &*settings.master_command_line_args,
        ),
        (false, _) => (
            "worker_command_line_args",
            &*settings.worker_command_line_args,
        ),
    };
    let paths = (
        &*settings.python_script_file_path,
        &*settings.python_interpreter_path,
    );
    let name = match task.server {
        true => format!("ps-{}", task.index),
        false => format!("wk-{}", task.index),
    };
    Ok(ProcessPlan {
        rank: task.rank as i32,
        argv: script::argv(context, paths, arguments, &env)?,
        env,
        cwd: context.paths.job_temp.clone(),
        stdout: format!("stdout-{name}.txt"),
        stderr: format!("stderr-{name}.txt"),
    })
}

/// Where the servers and the workers listen, each in their order.
fn addresses(context: &Context<'_>, layout: &Layout) -> (Vec<String>, Vec<String>) {
    let mut all = vec![String::new(); layout.workers + layout.servers];
    for (node, host) in context.assignment.hosts.iter().enumerate() {
        for (port, rank) in (host.port..).zip(layout.of(node)) {
            all[rank] = match host.address.contains(':') {
                true => format!("[{}]:{port}", host.address),
                false => format!("{}:{port}", host.address),
            };
        }
    }
    let servers = all.split_off(layout.workers);
    (servers, all)
}

fn config(servers: &[String], workers: &[String], task: Task) -> Value {
    let roles = [("ps", servers), ("worker", workers)];
    let roles = roles.into_iter().filter(|(_, hosts)| !hosts.is_empty());
    let cluster: Value = roles.map(|(role, hosts)| (role, json!(hosts))).collect();
    let role = if task.server { "ps" } else { "worker" };
    json!({
        "cluster": cluster,
        "task": { "type": role, "index": task.index },
        "environment": "cloud",
    })
}
