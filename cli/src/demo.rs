//! `batchai demo`: everything once, for real, in front of a newcomer's eyes.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use batchai_common::shutdown;
use batchai_proto::v1;
use batchai_proto::v1::job::State;

use crate::args::Demo;
use crate::client::{Client, Target, request, request_id};
use crate::dev::Ensemble;
use crate::error::CliError;
use crate::job::until_ended;
use crate::ranks::{self, To, Turn};

const TRAIN: &[u8] = include_bytes!("../../examples/digits/train.py");
const DIGITS: &[u8] = include_bytes!("../../examples/digits/digits.csv.gz");
const NODES: u16 = 2;
const GROUP: &str = "resourceGroups/demo";
const WORKSPACE: &str = "resourceGroups/demo/workspaces/demo";
const EXPERIMENT: &str = "resourceGroups/demo/workspaces/demo/experiments/digits";
const CLUSTER: &str = "resourceGroups/demo/workspaces/demo/clusters/two-nodes";
const JOB: &str = "resourceGroups/demo/workspaces/demo/experiments/digits/jobs/train";

pub async fn run(args: Demo) -> Result<ExitCode, CliError> {
    let token = shutdown::on_signal()?;
    check_python()?;
    let dir = directory(&args)?;
    say("starting a coordinator and two node agents on this machine");
    let mut ensemble = tokio::select! {
        started = Ensemble::start(&dir, ([127, 0, 0, 1], 0).into(), NODES) => started?,
        () = token.cancelled() => return Ok(ExitCode::from(130)),
    };
    let target = ensemble.target.clone();
    let done = tokio::select! {
        done = train(&target, &dir, args.epochs) => done,
        () = token.cancelled() => {
            say("interrupted: ending the job and all processes");
            Ok(ExitCode::from(130))
        }
        who = ensemble.died() => Err(CliError::Failed(format!("{who} ended by itself"))),
    };
    ensemble.stop().await;
    done
}

fn say(text: &str) {
    say!("==> {text}");
}

fn check_python() -> Result<(), CliError> {
    let version = Command::new("python3")
        .args(["-c", "import sys; sys.exit(sys.version_info < (3, 8))"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match version {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(CliError::Failed(
            "the demo needs python3 3.8 or newer".to_owned(),
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(CliError::Failed(
            "the demo trains with python3, and there is none on the PATH: install it (Debian: \
             apt install python3) and run the demo again"
                .to_owned(),
        )),
        Err(error) => Err(CliError::Failed(format!(
            "python3 cannot be started: {error}"
        ))),
    }
}

fn directory(args: &Demo) -> Result<PathBuf, CliError> {
    let dir = match &args.data {
        Some(dir) => dir.clone(),
        None => tempfile::Builder::new()
            .prefix("batchai-demo-")
            .tempdir()?
            .keep(),
    };
    let source = dir.join("digits");
    if source.exists() {
        let why = format!(
            "{} was used for a demo before; give another --data",
            dir.display()
        );
        return Err(CliError::Usage(why));
    }
    let write = |name: &str, content: &[u8]| {
        let path = source.join(name);
        std::fs::write(&path, content).map_err(|source| CliError::File { path, source })
    };
    std::fs::create_dir_all(&source).map_err(|e| CliError::File {
        path: source.clone(),
        source: e,
    })?;
    write("train.py", TRAIN)?;
    write("digits.csv.gz", DIGITS)?;
    Ok(dir.canonicalize()?)
}

async fn train(target: &Target, dir: &Path, epochs: u32) -> Result<ExitCode, CliError> {
    let client = Client::connect(target).await?;
    say("creating a resource group, a workspace, a cluster of two nodes and an experiment");
    create_resources(&client).await?;
    say("submitting a PyTorch job on two nodes: digits, data-parallel");
    let create = v1::CreateJobRequest {
        parent: EXPERIMENT.to_owned(),
        job_id: "train".to_owned(),
        job: Some(job(dir, epochs)),
        request_id: request_id(),
        validate_only: false,
    };
    client.jobs().create_job(request(create)).await?;
    let mut streams = Vec::new();
    let turn = Turn::default();
    for rank in 0..usize::from(NODES) {
        let (client, turn) = (client.clone(), turn.clone());
        let prefixes = (
            (format!("[rank {rank}] "), To::Stdout),
            (format!("[rank {rank} stderr] "), To::Stdout),
        );
        let follow = async move { ranks::follow(&client, JOB, rank, prefixes, &turn).await };
        streams.push(tokio::spawn(follow));
    }
    let mut known = State::Unspecified;
    let ended = until_ended(&client, JOB, None, |job| {
        if job.state() != known {
            known = job.state();
            say(&format!(
                "the job is {}",
                known.as_str_name().to_lowercase()
            ));
        }
    });
    let job = ended.await?;
    for stream in streams {
        stream.await.map_err(io::Error::other)??;
    }
    Ok(summary(&job, dir))
}

async fn create_resources(client: &Client) -> Result<(), CliError> {
    let group = v1::CreateResourceGroupRequest {
        resource_group_id: "demo".to_owned(),
        resource_group: None,
        request_id: request_id(),
        validate_only: false,
    };
    client
        .groups()
        .create_resource_group(request(group))
        .await?;
    let workspace = v1::CreateWorkspaceRequest {
        parent: GROUP.to_owned(),
        workspace_id: "demo".to_owned(),
        workspace: None,
        request_id: request_id(),
        validate_only: false,
    };
    client
        .workspaces()
        .create_workspace(request(workspace))
        .await?;
    let nodes = client
        .nodes()
        .list_nodes(request(v1::ListNodesRequest::default()))
        .await?;
    let vm_size = nodes
        .into_inner()
        .nodes
        .into_iter()
        .find_map(|node| node.facts);
    let manual = v1::ManualScaleSettings {
        target_node_count: i32::from(NODES),
        ..Default::default()
    };
    let cluster = v1::Cluster {
        vm_size: vm_size.unwrap_or_default().vm_size,
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(manual),
            auto_scale: None,
        }),
        ..Default::default()
    };
    let cluster = v1::CreateClusterRequest {
        parent: WORKSPACE.to_owned(),
        cluster_id: "two-nodes".to_owned(),
        cluster: Some(cluster),
        request_id: request_id(),
        validate_only: false,
    };
    client.clusters().create_cluster(request(cluster)).await?;
    let experiment = v1::CreateExperimentRequest {
        parent: WORKSPACE.to_owned(),
        experiment_id: "digits".to_owned(),
        experiment: None,
        request_id: request_id(),
        validate_only: false,
    };
    client
        .experiments()
        .create_experiment(request(experiment))
        .await?;
    Ok(())
}

fn job(dir: &Path, epochs: u32) -> v1::Job {
    let outputs = dir.join("outputs").to_string_lossy().into_owned();
    let source = dir.join("digits").to_string_lossy().into_owned();
    v1::Job {
        cluster: CLUSTER.to_owned(),
        node_count: i32::from(NODES),
        std_out_err_path_prefix: outputs.clone(),
        input_directories: vec![v1::InputDirectory {
            id: "DIGITS".to_owned(),
            path: source,
        }],
        output_directories: vec![v1::OutputDirectory {
            id: "MODEL".to_owned(),
            path_prefix: outputs,
            path_suffix: "model".to_owned(),
        }],
        py_torch_settings: Some(v1::PyTorchSettings {
            python_script_file_path: "$AZ_BATCHAI_INPUT_DIGITS/train.py".to_owned(),
            command_line_args: format!(
                "--data $AZ_BATCHAI_INPUT_DIGITS/digits.csv.gz --model $AZ_BATCHAI_OUTPUT_MODEL \
                 --epochs {epochs}"
            ),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn summary(job: &v1::Job, dir: &Path) -> ExitCode {
    let seconds = |time: Option<prost_types::Timestamp>| {
        time.map_or(0.0, |time| {
            time.seconds as f64 + f64::from(time.nanos) / 1e9
        })
    };
    let duration = seconds(job.end_time) - seconds(job.start_time);
    let outputs = dir
        .join("outputs")
        .join(&job.job_output_directory_path_segment);
    println!("\nstate      {}", job.state().as_str_name().to_lowercase());
    match job.exit_code {
        Some(code) => println!("exit code  {code}"),
        None => println!("exit code  none"),
    }
    println!("duration   {duration:.1} s");
    println!("outputs    {}", outputs.display());
    for error in &job.errors {
        println!("error      {}: {}", error.code, error.message);
    }
    match job.state() {
        State::Succeeded => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
